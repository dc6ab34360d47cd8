// SPDX-License-Identifier: Apache-2.0

//! Log, snapshot and metrics, through the C ABI.

mod common;

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;

use common::*;
use drex::ffi::observe::*;

struct Seen {
    engine: *mut drex_engine,
    lines: Vec<(u32, String)>,
    inner: Vec<drex_status>,
}

unsafe extern "C" fn note(user: *mut c_void, level: u32, text: *const c_char) {
    // SAFETY: the test's own struct, and a C string.
    let (seen, text) = unsafe { (&mut *user.cast::<Seen>(), CStr::from_ptr(text)) };
    seen.lines.push((level, text.to_str().unwrap().to_owned()));
    // SAFETY: a handle.
    seen.inner.push(unsafe { drex_abandon(seen.engine) });
}

fn text_of(call: impl Fn(*mut c_char, usize, *mut usize) -> drex_status) -> String {
    let mut n = 0;
    assert_eq!(call(ptr::null_mut(), 0, &mut n), DREX_OK);
    let mut out = vec![0u8; n + 1];
    let mut same = 7;
    let p = out.as_mut_ptr().cast();
    assert_eq!(call(p, n, &mut same), DREX_ERROR_CAPACITY);
    assert_eq!((same, out[0]), (n, 0));
    same = 7;
    assert_eq!(call(p, n + 1, &mut same), DREX_OK);
    assert_eq!((same, out.pop()), (n, Some(0)));
    String::from_utf8(out).unwrap()
}

/// Two rows, of which one exits and one is held from 2000 on.
fn served(level: u32, seen: &mut Seen) -> Engine {
    let ramps = [4];
    let mut c = config(&ramps, 4, 4, DREX_POLICY_HOLD);
    c.flush_rows = 4;
    let e = Engine::new(&c);
    seen.engine = e.raw;
    let user = ptr::from_mut(seen).cast();
    // SAFETY: `seen` outlives the engine's calls.
    ok(unsafe { drex_log_set(e.raw, Some(note), user, level) }).unwrap();
    for id in 0..3 {
        e.add(id).unwrap();
        e.ready(id, 0).unwrap();
    }
    e.plan(1000, 2).unwrap();
    e.ramp(&[0.9, 0.1]).unwrap();
    e.complete(2000, 900_000).unwrap();
    e
}

fn empty() -> Seen {
    Seen {
        engine: ptr::null_mut(),
        lines: Vec::new(),
        inner: Vec::new(),
    }
}

#[test]
fn a_callback_gets_its_levels_and_cannot_come_back() {
    for level in DREX_LOG_OFF..=DREX_LOG_TRACE {
        let mut seen = empty();
        let e = served(level, &mut seen);
        assert_eq!(e.plan(5, 0).unwrap_err().0, DREX_ERROR_CAPACITY);
        let refused = text();
        drop(e);
        let mut levels: Vec<u32> = seen.lines.iter().map(|l| l.0).collect();
        let last = seen.inner.pop();
        levels.sort_unstable();
        levels.dedup();
        // No device failed.
        let expect: Vec<u32> = (DREX_LOG_WARN..=level).collect();
        assert_eq!(levels, expect, "{:?}", seen.lines);
        assert!(seen.inner.iter().all(|&s| s == DREX_ERROR_HANDLE_BUSY));
        let end = match level {
            0 | 1 => None,
            2 => Some(DREX_ERROR_HANDLE_BUSY),
            _ => Some(DREX_ERROR_INVALID_HANDLE),
        };
        assert_eq!(last, end);
        let warned = seen.lines.iter().filter(|l| l.0 == DREX_LOG_WARN);
        let warned: Vec<&String> = warned.map(|l| &l.1).collect();
        if level >= DREX_LOG_WARN {
            assert_eq!(warned, [&refused]);
        }
    }
}

#[test]
fn events_stay_with_their_engine_and_null_ends_them() {
    let mut seen = empty();
    let e = served(DREX_LOG_TRACE, &mut seen);
    let n = seen.lines.len();
    let ramps = [4];
    let other = Engine::new(&config(&ramps, 4, 4, DREX_POLICY_HOLD));
    other.add(1).unwrap();
    assert_eq!(seen.lines.len(), n);
    // SAFETY: a handle.
    let set = |level| unsafe { drex_log_set(e.raw, None, ptr::null_mut(), level) };
    assert_eq!(set(6), DREX_ERROR_INVALID_ARGUMENT);
    let n = seen.lines.len();
    assert_eq!(set(DREX_LOG_TRACE), DREX_OK);
    e.add(9).unwrap();
    assert_eq!(seen.lines.len(), n);
}

#[test]
fn the_snapshot_is_json_and_says_what_stats_say() {
    let mut seen = empty();
    let e = served(DREX_LOG_OFF, &mut seen);
    e.ready(0, 7000).unwrap();
    // SAFETY: valid pointers.
    let json = text_of(|p, n, out| unsafe { drex_snapshot(e.raw, p, n, out) });
    let v: serde_json::Value = serde_json::from_str(&json).unwrap();
    let stats = e.stats();
    assert_eq!(v["counters"]["tokens"], stats.tokens);
    assert_eq!(v["ramps"][0]["exits"], stats.exits[0]);
    assert_eq!(v["queues"]["held"], stats.held_rows);
    assert_eq!(v["queues"]["ready"], 2);
    assert_eq!(v["held_rows"][0]["request"], 1);
    assert_eq!(v["held_rows"][0]["age_ns"], 5000);
    assert_eq!(v["counters"]["window_us_sum"], 900);
}

#[test]
fn metrics_add_up_and_labels_are_checked() {
    let mut seen = empty();
    let e = served(DREX_LOG_OFF, &mut seen);
    let at = |labels: &str, p, n, out| {
        let labels = CString::new(labels).unwrap();
        // SAFETY: valid pointers.
        unsafe { drex_metrics_text(e.raw, labels.as_ptr(), p, n, out) }
    };
    let text = text_of(|p, n, out| at("model=\"a\\\"b\",x=\"\"", p, n, out));
    for line in [
        "drex_exits_total{model=\"a\\\"b\",x=\"\",ramp=\"0\"} 1",
        "drex_held_rows{model=\"a\\\"b\",x=\"\",ramp=\"0\"} 1",
        "drex_window_seconds_bucket{model=\"a\\\"b\",x=\"\",le=\"0.000512\"} 0",
        "drex_window_seconds_bucket{model=\"a\\\"b\",x=\"\",le=\"0.001024\"} 1",
        "drex_window_seconds_sum{model=\"a\\\"b\",x=\"\"} 0.0009",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    if let Some(path) = std::env::var_os("DREX_METRICS_OUT") {
        std::fs::write(path, &text).unwrap();
    }
    for bad in [
        "a",
        "a=\"",
        "a=\"\\x\"",
        "a=\"1\",",
        "a=\"1\"b=\"2\"",
        "1a=\"\"",
        "__a=\"\"",
        "a=\"1\",a=\"2\"",
        "ramp=\"0\"",
        "a=\"1\n\"",
    ] {
        let mut n = 0;
        let status = at(bad, ptr::null_mut(), 0, &mut n);
        assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT, "{bad}");
    }
}
