// SPDX-License-Identifier: Apache-2.0

//! Log, snapshot and metrics, through the C ABI.

mod common;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;

use common::*;

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

/// A text by the format's rules: a family is its HELP line, its TYPE line and
/// its samples, and comes once. By family: its type, and its samples by what
/// stands before the value.
fn families(text: &str) -> Vec<(String, String, BTreeMap<String, f64>)> {
    let mut all: Vec<(String, String, BTreeMap<String, f64>)> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(
                all.iter().all(|f| f.0 != name) && help.ends_with('.'),
                "{line}"
            );
            let kind = lines.next().unwrap().strip_prefix("# TYPE ").unwrap();
            let kind = kind.strip_prefix(name).unwrap().trim_start();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            all.push((name.to_owned(), kind.to_owned(), BTreeMap::new()));
            continue;
        }
        let (family, kind, samples) = all.last_mut().unwrap();
        let (sample, value) = line.rsplit_once(' ').unwrap();
        let name = sample.split('{').next().unwrap();
        let suffixes: &[&str] = match kind.as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            "counter" | "gauge" => &[""],
            other => panic!("{other}"),
        };
        let suffix = name.strip_prefix(family.as_str());
        assert!(suffix.is_some_and(|s| suffixes.contains(&s)), "{line}");
        let twice = samples.insert(sample.to_owned(), value.parse().unwrap());
        assert_eq!(twice, None, "{line}");
    }
    assert!(text.ends_with('\n'));
    all
}

fn metrics(e: &Engine, labels: &str) -> String {
    let labels = CString::new(labels).unwrap();
    // SAFETY: valid pointers.
    text_of(|p, n, out| unsafe { drex_metrics_text(e.raw, labels.as_ptr(), p, n, out) })
}

/// An engine under AUTO that has searched, with cells filled by copy, and
/// rows by post-fill and verification.
fn busy(fill: drex_fill_mode) -> Engine {
    let ramps = [4, 8];
    let mut c = config(&ramps, 8, 8, DREX_POLICY_AUTO);
    c.n_slots = 32;
    c.fill = fill;
    c.token_deadline_ns = 900;
    let e = Engine::new(&c);
    let mut kv = vec![[0u8; 8 * 16]; 24];
    let layers: Vec<drex_kv_layer> = (0..12)
        .map(|i| {
            let mut l = sized!(drex_kv_layer);
            (l.n_cells, l.k_row_bytes, l.v_row_bytes) = (8, 16, 16);
            (l.k_cell_stride, l.v_cell_stride) = (16, 16);
            l.k = kv[i].as_mut_ptr().cast();
            l.v = kv[12 + i].as_mut_ptr().cast();
            l
        })
        .collect();
    // SAFETY: the tensors live as long as the calls below.
    ok(unsafe { drex_bind_kv(e.raw, layers.as_ptr(), 12) }).unwrap();
    for id in 0..8 {
        e.add(id).unwrap();
    }
    let mut now = 0;
    for i in 0..600 {
        now += 1000;
        for id in 0..8 {
            let _ = e.ready(id, now);
        }
        let p = e.plan(now, 8).unwrap();
        if p.step.n_rows == 0 {
            continue;
        }
        let cells: Vec<u32> = p.ids().iter().map(|&id| id as u32).collect();
        if p.step.ramp != DREX_NO_RAMP {
            let sure = |r: &drex_row| [0.1, 0.9, 0.8][(r.request + i) as usize % 3];
            let conf: Vec<f32> = p.rows.iter().map(sure).collect();
            e.ramp_at(&conf, cells.as_ptr()).unwrap();
            e.fill().unwrap();
        } else {
            let agrees: Vec<u8> = p
                .rows
                .iter()
                .map(|r| u8::from((r.request + i) % 4 > 0))
                .collect();
            let mut out = [0; 32];
            // SAFETY: as many of each as there are rows, or more.
            ok(unsafe { drex_verify(e.raw, agrees.as_ptr(), p.step.n_rows, out.as_mut_ptr(), 32) })
                .unwrap();
        }
        let layers = u64::from(p.step.layer_end - p.step.layer_begin);
        e.complete(now + 100 * layers, 100 * layers).unwrap();
    }
    // SAFETY: a handle, here and below.
    ok(unsafe { drex_bind_kv(e.raw, ptr::null(), 0) }).unwrap();
    // Windows as short as these leave the search next to no time.
    ok(unsafe { drex_replan(e.raw, 0, ptr::null_mut()) }).unwrap();
    e
}

/// Every number of drex_stats is in the metrics, under its name there.
#[test]
fn metrics_say_what_stats_say() {
    let mut seen = Vec::new();
    for fill in [DREX_FILL_COPY, DREX_FILL_POSTFILL, DREX_FILL_VERIFY] {
        let e = busy(fill);
        let (s, all) = (e.stats(), families(&metrics(&e, "")));
        let value = |sample: &str| {
            let found = all.iter().find_map(|f| f.2.get(sample));
            *found.unwrap_or_else(|| panic!("no {sample} in {all:?}"))
        };
        let mut check = |sample: &str, number: f64| {
            assert!(
                (value(sample) - number).abs() <= 1e-9 * number.abs(),
                "{sample} {number}"
            );
            if number != 0.0 {
                seen.push(sample.to_owned());
            }
        };
        for (name, number) in [
            ("drex_tokens_total", s.tokens),
            ("drex_involuntary_exits_total", s.involuntary_exits),
            ("drex_involuntary_stays_total", s.involuntary_stays),
            ("drex_nonfinite_rows_total", s.nonfinite_rows),
            ("drex_steps_total", s.steps),
            ("drex_step_rows_total", s.step_rows),
            ("drex_prompt_steps_total", s.prompt_steps),
            ("drex_prompt_rows_total", s.prompt_rows),
            ("drex_held_rows_max", s.held_rows_max),
            ("drex_pending_rows", s.pending_rows),
            ("drex_requests", s.requests),
            ("drex_slots_free", s.slots_free),
            ("drex_filled_cells_total", s.cells_filled),
            ("drex_filled_bytes_total", s.bytes_filled),
            ("drex_postfilled_rows_total", s.rows_filled),
            ("drex_drafts_total", s.drafts),
            ("drex_drafts_accepted_total", s.drafts_accepted),
            ("drex_dropped_rows_total", s.rows_dropped),
            ("drex_searches_total", s.searches),
            ("drex_rule_hold_rows", s.rule_hold_rows.into()),
            ("drex_rule_ready_rows", s.rule_ready_rows.into()),
            ("drex_rule_drafts", s.rule_drafts.into()),
            ("drex_audits_total", s.audits),
            ("drex_audited_tokens_total", s.audited_tokens),
            ("drex_audited_differing_total", s.audited_differing),
            ("drex_audits_missed_total", s.audits_missed),
            ("drex_held_seconds_count", s.wait_us_buckets.iter().sum()),
        ] {
            check(name, number as f64);
        }
        // As the shortest text of an f32.
        check(
            "drex_rule_survival",
            s.rule_survival.to_string().parse().unwrap(),
        );
        check("drex_held_seconds_sum", s.wait_us_sum as f64 / 1e6);
        let [chosen, off] = ["chosen", "off"]
            .map(|rule| format!("drex_predicted_tokens_per_second{{rule=\"{rule}\"}}"));
        check(&chosen, s.predicted_tokens_per_s);
        check(&off, s.predicted_off_tokens_per_s);
        for r in 0..2 {
            let layer = [4, 8][r];
            let at = |name| format!("{name}{{ramp=\"{r}\",layer=\"{layer}\"}}");
            check(&at("drex_exits_total"), s.exits[r] as f64);
            check(&at("drex_held_rows"), s.held_rows_at[r] as f64);
            check(&at("drex_rule_ramp"), f64::from(s.rule_ramps >> r & 1));
            if s.exit_share[r].is_finite() {
                check(&at("drex_exit_share"), s.exit_share[r]);
            }
        }
        for (i, reason) in ["host", "queue", "held", "run"].iter().enumerate() {
            let sample = format!("drex_deadline_misses_total{{reason=\"{reason}\"}}");
            check(&sample, s.misses[i] as f64);
        }
        // Steps of ready rows are no flushes.
        let flushes = all.iter().find(|f| f.0 == "drex_flushes_total").unwrap();
        let sum: f64 = flushes.2.values().sum();
        assert_eq!(sum as u64, s.steps - s.flushes[DREX_FLUSH_NONE as usize]);
        assert!(flushes.2.keys().all(|k| !k.contains("none")) && flushes.2.len() == 6);
    }
    // None of these was compared with 0 only.
    for name in [
        "drex_filled_bytes_total",
        "drex_postfilled_rows_total",
        "drex_drafts_accepted_total",
        "drex_dropped_rows_total",
        "drex_searches_total",
        "drex_slots_free",
        "drex_predicted_tokens_per_second{rule=\"chosen\"}",
        "drex_predicted_tokens_per_second{rule=\"off\"}",
        "drex_exit_share{ramp=\"0\",layer=\"4\"}",
        "drex_rule_hold_rows",
    ] {
        assert!(seen.iter().any(|s| s == name), "{name}");
    }
}

/// As docs/observability.md says: of the second text and later ones, each
/// family's samples go behind those of the first.
fn merged(texts: &[String]) -> String {
    let blocks = |text: &String| -> Vec<String> {
        let blocks = text.split("# HELP ").skip(1);
        blocks.map(|b| format!("# HELP {b}")).collect()
    };
    let texts: Vec<Vec<String>> = texts.iter().map(blocks).collect();
    let mut out = String::new();
    for i in 0..texts[0].len() {
        out += &texts[0][i];
        for other in &texts[1..] {
            for line in other[i].lines().filter(|l| !l.starts_with('#')) {
                out += line;
                out.push('\n');
            }
        }
    }
    out
}

#[test]
fn texts_of_several_engines_merge() {
    let mut seen = empty();
    let engines = [
        busy(DREX_FILL_VERIFY),
        served(DREX_LOG_OFF, &mut seen),
        Engine::new(&config(&[2, 4, 6], 4, 4, DREX_POLICY_AUTO)),
    ];
    let texts = ["a", "b", "c"].map(|m| format!("model=\"{m}\""));
    let texts: Vec<String> = (engines.iter().zip(&texts))
        .map(|(e, labels)| metrics(e, labels))
        .collect();
    let alone: Vec<_> = texts.iter().map(|t| families(t)).collect();
    let names = |i: usize| alone[i].iter().map(|f| (&f.0, &f.1)).collect::<Vec<_>>();
    assert!(names(0) == names(1) && names(1) == names(2));
    let all = merged(&texts);
    if let Some(path) = std::env::var_os("DREX_METRICS_OUT") {
        std::fs::write(path, &all).unwrap();
    }
    for (i, family) in families(&all).into_iter().enumerate() {
        let mut sum = BTreeMap::new();
        for one in &alone {
            sum.extend(one[i].2.clone());
        }
        assert_eq!(family.2, sum);
    }
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
        "drex_exits_total{model=\"a\\\"b\",x=\"\",ramp=\"0\",layer=\"4\"} 1",
        "drex_held_rows{model=\"a\\\"b\",x=\"\",ramp=\"0\",layer=\"4\"} 1",
        "drex_window_seconds_bucket{model=\"a\\\"b\",x=\"\",le=\"0.000512\"} 0",
        "drex_window_seconds_bucket{model=\"a\\\"b\",x=\"\",le=\"0.001024\"} 1",
        "drex_window_seconds_sum{model=\"a\\\"b\",x=\"\"} 0.0009",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
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
        "layer=\"4\"",
        "rule=\"0\"",
        "a=\"1\n\"",
    ] {
        let mut n = 0;
        let status = at(bad, ptr::null_mut(), 0, &mut n);
        assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT, "{bad}");
    }
}
