// SPDX-License-Identifier: Apache-2.0

//! The trace, through the C ABI, against what the test did itself and what
//! `drex_stats` says.

mod common;

use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::ptr;

use common::*;
use serde_json::Value;

struct Sunk {
    engine: *mut drex_engine,
    bytes: Vec<u8>,
    parts: usize,
}

unsafe extern "C" fn sink(user: *mut c_void, bytes: *const c_char, n: usize) {
    // SAFETY: the test's own struct, and n bytes.
    let (to, from) = unsafe {
        (
            &mut *user.cast::<Sunk>(),
            std::slice::from_raw_parts(bytes.cast::<u8>(), n),
        )
    };
    to.bytes.extend(from);
    to.parts += 1;
    // SAFETY: a handle.
    let inner = unsafe { drex_trace_stop(to.engine) };
    assert_eq!(inner, DREX_ERROR_HANDLE_BUSY);
}

fn start(e: &Engine, max: u32) {
    // SAFETY: a handle.
    ok(unsafe { drex_trace_start(e.raw, max) }).unwrap();
}

fn written(e: &Engine) -> (Value, usize) {
    let mut to = Sunk {
        engine: e.raw,
        bytes: Vec::new(),
        parts: 0,
    };
    // SAFETY: a handle and a live struct.
    ok(unsafe { drex_trace_write(e.raw, Some(sink), ptr::from_mut(&mut to).cast()) }).unwrap();
    if let Some(path) = std::env::var_os("DREX_TRACE_OUT") {
        std::fs::write(path, &to.bytes).unwrap();
    }
    (serde_json::from_slice(&to.bytes).unwrap(), to.parts)
}

const N: u64 = 24;

/// Windows that completed: (begin_ns, end_ns, rows).
type Windows = Vec<(u64, u64, u64)>;

/// Some steps, with requests that come and go, and steps that fail before
/// their ramp or after it. Also how many held rows exited in one of these:
/// they have no wait of their own.
fn serve(e: &Engine, steps: u64) -> (Windows, u64) {
    let (mut done, mut failed_out) = (Vec::new(), 0);
    let (mut now, mut rng) = (1000, fastrand::Rng::with_seed(1));
    for id in 0..N {
        e.add(id).unwrap();
    }
    for i in 0..steps {
        now += 1001;
        let x = rng.u64(..);
        for id in 0..N {
            let _ = e.ready(id, now);
        }
        let p = e.plan(now, 8).unwrap();
        let (step, rows) = (p.step, p.rows);
        let fails = i % 7;
        let forget = |id: u64| {
            e.remove(id).unwrap();
            e.add(id).unwrap();
        };
        if step.n_rows == 0 {
            continue;
        }
        if fails == 1 {
            forget(rows[0].request);
        }
        if fails == 2 {
            e.abandon().unwrap();
            continue;
        }
        if step.ramp != DREX_NO_RAMP {
            let levels = [0.1, 0.2, 0.9, 0.3];
            let conf: Vec<f32> = (0..rows.len())
                .map(|j| levels[(x >> (8 + 3 * j)) as usize % 4])
                .collect();
            let exits = e.ramp(&conf).unwrap();
            let exits = exits.iter().filter(|v| v.decision == DREX_DECISION_EXIT);
            if fails == 4 && step.layer_begin > 0 {
                failed_out += exits.count() as u64;
            }
        }
        if fails == 3 {
            forget(rows[rows.len() - 1].request);
        }
        if fails == 4 {
            e.abandon().unwrap();
            continue;
        }
        e.complete(now + 499, 321).unwrap();
        done.push((now, now + 499, rows.len() as u64));
        if fails == 5 {
            forget(x % N);
        }
    }
    (done, failed_out)
}

fn engine() -> Engine {
    let ramps = [4, 8];
    let mut c = config(&ramps, N as u32, 8, DREX_POLICY_HOLD);
    c.flush_rows = 6;
    Engine::new(&c)
}

fn ns(v: &Value) -> u64 {
    // Three digits behind the point: exact.
    let text = v.to_string();
    let (us, rest) = text.split_once('.').unwrap_or((&text, "0"));
    us.parse::<u64>().unwrap() * 1000 + format!("{rest:0<3}").parse::<u64>().unwrap()
}

/// Events of one phase.
fn of<'a>(all: &'a Value, ph: &str) -> Vec<&'a Value> {
    let events = all["traceEvents"].as_array().unwrap();
    events.iter().filter(|e| e["ph"] == ph).collect()
}

fn text_at<'a>(e: &'a Value, field: &str) -> &'a str {
    let text = e[field].as_str();
    text.unwrap_or_else(|| panic!("{field} is no string: {e}"))
}

/// What the Trace Event Format asks of each kind of event; and time goes on,
/// every begin has its end, windows do not overlap, and tracks have names.
fn check(all: &Value) {
    let events = all["traceEvents"].as_array().unwrap();
    let mut last = HashMap::new();
    let mut open = HashMap::new();
    let mut named = HashMap::new();
    let mut ends = HashMap::new();
    let mut processes = 0;
    for e in events {
        let pid = e["pid"].as_u64().unwrap();
        assert_eq!(pid, u64::from(std::process::id()));
        if e["ph"] == "M" {
            let name = text_at(&e["args"], "name").to_owned();
            match text_at(e, "name") {
                "process_name" => processes += 1,
                "thread_name" => {
                    assert_eq!(named.insert(e["tid"].as_u64().unwrap(), name), None);
                }
                other => panic!("{other}"),
            }
            continue;
        }
        let tid = e["tid"].as_u64().unwrap();
        assert!(
            named.contains_key(&tid) && !text_at(e, "name").is_empty(),
            "{e}"
        );
        let ts = ns(&e["ts"]);
        let before = last.insert(tid, ts);
        assert!(before <= Some(ts), "{e}");
        match text_at(e, "ph") {
            // By category and id alone, as a viewer does.
            "b" => {
                let key = (text_at(e, "cat"), text_at(e, "id"));
                let name = text_at(e, "name");
                assert_eq!(open.insert(key, (ts, name)), None, "{e}");
            }
            "e" => {
                let key = (text_at(e, "cat"), text_at(e, "id"));
                let (begun, name) = open.remove(&key).unwrap();
                assert!(begun <= ts && name == text_at(e, "name"), "{e}");
            }
            "X" => {
                let end = ends.insert(tid, ts + ns(&e["dur"]));
                assert!(end <= Some(ts), "{e}");
            }
            "i" => assert_eq!(e["s"], "t"),
            "C" => {
                let series = e["args"].as_object().unwrap();
                assert!(series.values().all(Value::is_u64), "{e}");
                text_at(e, "id");
            }
            other => panic!("{other}"),
        }
    }
    assert!(open.is_empty(), "{open:?}");
    assert!(processes > 0);
    let mut names: Vec<String> = named.into_values().collect();
    names.sort_unstable();
    let n = names.len();
    names.dedup();
    assert_eq!(names.len(), n);
}

/// The track of that name.
fn track(all: &Value, name: &str) -> u64 {
    let found = of(all, "M").into_iter().find(|m| {
        let of_engine = text_at(&m["args"], "name").strip_prefix("engine ");
        of_engine.is_some_and(|n| n.split_once(", ").unwrap().1.starts_with(name))
    });
    found.unwrap()["tid"].as_u64().unwrap()
}

#[test]
fn it_says_what_happened() {
    let e = engine();
    start(&e, 1 << 16);
    let (done, failed_out) = serve(&e, 399);
    let stats = e.stats();
    let (all, parts) = written(&e);
    check(&all);
    assert!(parts > 2);
    assert_eq!(all["otherData"]["dropped_events"], "0");
    let windows = of(&all, "X");
    let ours: Windows = windows
        .iter()
        .map(|w| {
            let at = ns(&w["ts"]);
            let rows = w["args"]["rows"].as_u64().unwrap();
            (at, at + ns(&w["dur"]), rows)
        })
        .collect();
    assert_eq!(ours, done);
    assert_eq!(windows.len() as u64, stats.steps);
    assert!(windows.iter().all(|w| w["args"]["duration_ns"] == 321));
    for (r, name) in REASONS.iter().enumerate() {
        let n = windows.iter().filter(|w| w["args"]["reason"] == *name);
        assert_eq!(n.count() as u64, stats.flushes[r], "{name}");
    }
    let exits = of(&all, "i");
    for ramp in 0..2 {
        let tid = track(&all, &format!("ramp {ramp}"));
        let n = exits.iter().filter(|x| x["tid"] == tid).count();
        assert_eq!(n as u64, stats.exits[ramp as usize]);
        assert!(n > 10);
    }
    // A time that a row was held is over, also where it left in a step that was
    // given up, or it is held now.
    let waits: u64 = stats.wait_us_buckets.iter().sum();
    let begun = of(&all, "b").len() as u64;
    assert!(stats.held_rows > 0 && waits > 50, "{stats:?}");
    assert!(failed_out > 0);
    assert_eq!(begun, waits + stats.held_rows);
    let counts = of(&all, "C");
    assert_eq!(counts.len() as u64, stats.steps);
    assert_eq!(counts.last().unwrap()["args"]["held"], stats.held_rows);
}

/// Two engines' events in one list: nothing of one is taken for the other's,
/// though their requests have the same ids.
#[test]
fn traces_of_two_engines_merge() {
    let engines = [engine(), engine()];
    let mut all = Vec::new();
    let mut windows = Vec::new();
    for e in &engines {
        start(e, 1 << 12);
        serve(e, 150);
        let one = written(e).0;
        check(&one);
        windows.push((track(&one, "windows"), of(&one, "X").len() as u64));
        let rows: Vec<&str> = of(&one, "C").iter().map(|c| text_at(c, "id")).collect();
        assert!(rows.iter().all(|id| *id == rows[0]));
        all.extend(one["traceEvents"].as_array().unwrap().clone());
    }
    let all = serde_json::json!({"traceEvents": all});
    check(&all);
    for (e, (tid, n)) in engines.iter().zip(&windows) {
        let own = of(&all, "X");
        let own = own.iter().filter(|w| w["tid"] == *tid).count() as u64;
        assert_eq!((own, *n), (e.stats().steps, e.stats().steps));
    }
    let counters = of(&all, "C");
    let mut ids: Vec<&str> = counters.iter().map(|c| text_at(c, "id")).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 2);
}

/// A number of JavaScript's ends at 2^53.
#[test]
fn a_requests_id_keeps_its_digits() {
    let e = engine();
    start(&e, 100);
    let ids = [u64::MAX, (1 << 53) + 1];
    for id in ids {
        e.add(id).unwrap();
        e.ready(id, 0).unwrap();
    }
    e.plan(1, 2).unwrap();
    e.ramp(&[0.9, 0.1]).unwrap();
    e.complete(2, 1).unwrap();
    let all = written(&e).0;
    check(&all);
    let request = |ph| text_at(&of(&all, ph)[0]["args"], "request").to_owned();
    assert_eq!([request("i"), request("b")], ids.map(|id| id.to_string()));
    assert!(text_at(of(&all, "b")[0], "id").ends_with(".9007199254740993"));
}

const REASONS: [&str; 7] = ["none", "fill", "age", "deadline", "idle", "stay", "prompt"];

#[test]
fn a_small_ring_keeps_the_newest_and_stays_whole() {
    for max in [1, 2, 3, 50] {
        let e = engine();
        start(&e, max);
        let (done, _) = serve(&e, 200);
        let (all, _) = written(&e);
        check(&all);
        let count = |ph| of(&all, ph).len() as u64;
        let kept = count("X") + count("i") + count("C") + count("b");
        assert_eq!(kept, u64::from(max) + e.stats().held_rows);
        let dropped = all["otherData"]["dropped_events"].as_str().unwrap();
        assert!(dropped.parse::<u64>().unwrap() > done.len() as u64);
        let counts = of(&all, "C");
        assert_eq!(ns(&counts.last().unwrap()["ts"]), done.last().unwrap().1);
    }
}

#[test]
fn a_clock_that_goes_back_breaks_nothing() {
    let e = engine();
    start(&e, 1000);
    serve(&e, 60);
    for id in 0..N {
        let _ = e.ready(id, 10);
    }
    for now in [7, 3, 5, 0] {
        let p = e.plan(now, 8).unwrap();
        let (step, rows) = (p.step, p.rows);
        if step.ramp != DREX_NO_RAMP {
            e.ramp(&vec![0.2; rows.len()]).unwrap();
        }
        e.complete(0, 1).unwrap();
        check(&written(&e).0);
    }
    // In the middle of a step too.
    let p = e.plan(1, 8).unwrap();
    let (step, rows) = (p.step, p.rows);
    check(&written(&e).0);
    if step.ramp != DREX_NO_RAMP {
        e.ramp(&vec![0.2; rows.len()]).unwrap();
    }
    check(&written(&e).0);
}

#[test]
fn what_is_refused() {
    let e = engine();
    let null = ptr::null_mut();
    // SAFETY: a handle.
    unsafe {
        assert_eq!(drex_trace_start(e.raw, 0), DREX_ERROR_INVALID_ARGUMENT);
        assert!(text().contains("max_events is 0"), "{}", text());
        let status = drex_trace_write(e.raw, Some(sink), null);
        assert_eq!(status, DREX_ERROR_CALL_ORDER);
        assert_eq!(drex_trace_stop(e.raw), DREX_OK);
        start(&e, 4);
        let status = drex_trace_write(e.raw, None, null);
        assert_eq!(status, DREX_ERROR_NULL_ARGUMENT);
        assert_eq!(drex_trace_stop(e.raw), DREX_OK);
        let status = drex_trace_write(e.raw, Some(sink), null);
        assert_eq!(status, DREX_ERROR_CALL_ORDER);
    }
}
