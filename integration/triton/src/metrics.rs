// SPDX-License-Identifier: Apache-2.0
//! The drex_* families at /metrics. A server without metrics is no error: then there are none.

use std::ffi::{CString, c_char};
use std::ptr::{null, null_mut};
use std::sync::Mutex;

use drex::ffi::types::{DREX_FLUSH_REASONS, drex_stats};

use crate::triton::abi;
use crate::triton::error::check;

const COUNTERS: [(&str, &str); 12] = [
    ("drex_exits_total", "Tokens emitted at an exit ramp"),
    (
        "drex_tokens_total",
        "Tokens decoded, at a ramp or after the last layer",
    ),
    (
        "drex_involuntary_exits_total",
        "Rows made to exit below their threshold",
    ),
    (
        "drex_involuntary_stays_total",
        "Confident rows that went on with the batch",
    ),
    (
        "drex_nonfinite_rows_total",
        "Rows whose confidence was NaN or infinite",
    ),
    ("drex_steps_total", "Layer windows run"),
    ("drex_step_rows_total", "Rows of all layer windows run"),
    ("drex_window_seconds_total", "Time spent in layer windows"),
    (
        "drex_filled_cells_total",
        "KV cells whose skipped layers were filled by state-copy",
    ),
    (
        "drex_postfilled_rows_total",
        "Exited rows that went through their skipped layers later on",
    ),
    (
        "drex_deadline_misses_total",
        "Tokens emitted after their deadline",
    ),
    (
        "drex_flushes_total",
        "Windows over held rows, by what caused them",
    ),
];
const GAUGES: [(&str, &str); 5] = [
    ("drex_held_rows", "Rows waiting in the rebatching buffer"),
    (
        "drex_pending_rows",
        "Exited rows in the hidden arena that have layers to go",
    ),
    ("drex_slots_free", "Free rows of the hidden arena"),
    ("drex_requests_running", "Requests that run"),
    ("drex_requests_waiting", "Requests that wait for a slot"),
];
const REASONS: [&str; DREX_FLUSH_REASONS] = ["none", "fill", "age", "deadline", "idle", "stay"];

struct Families(Vec<(&'static str, *mut abi::MetricFamily)>);
// SAFETY: Triton's metrics may be used from any thread.
unsafe impl Send for Families {}

/// One for the process: two families of one name would be an error.
static FAMILIES: Mutex<Families> = Mutex::new(Families(Vec::new()));

/// Makes the families, when the backend is loaded.
pub fn register() {
    let mut families = FAMILIES.lock().unwrap_or_else(|e| e.into_inner());
    let all = COUNTERS
        .iter()
        .map(|(name, help)| (abi::METRIC_COUNTER, *name, *help))
        .chain(
            GAUGES
                .iter()
                .map(|(name, help)| (abi::METRIC_GAUGE, *name, *help)),
        );
    for (kind, name, help) in all {
        let (c_name, c_help) = (text(name), text(help));
        let mut family = null_mut();
        // SAFETY: Triton copies the texts.
        let made = unsafe {
            check(abi::TRITONSERVER_MetricFamilyNew(
                &mut family,
                kind,
                c_name.as_ptr(),
                c_help.as_ptr(),
            ))
        };
        if made.is_ok() {
            families.0.push((name, family));
        }
    }
}

/// When the backend is unloaded; every metric is gone by then.
pub fn unregister() {
    let mut families = FAMILIES.lock().unwrap_or_else(|e| e.into_inner());
    for (_, family) in families.0.drain(..) {
        // SAFETY: made above, deleted once.
        let _ = unsafe { check(abi::TRITONSERVER_MetricFamilyDelete(family)) };
    }
}

fn text(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// From a snapshot, for an entry of a list.
type Value = fn(&Snapshot, usize) -> f64;

struct Metric {
    metric: *mut abi::Metric,
    counter: bool,
    last: f64,
    value: Value,
    index: usize,
}

/// What the metrics of an instance are made from.
pub struct Snapshot {
    pub stats: drex_stats,
    pub window_ns: u64,
    pub waiting: usize,
    pub running: usize,
}

/// The metrics of one instance.
pub struct Metrics(Vec<Metric>);
// SAFETY: as above.
unsafe impl Send for Metrics {}

impl Metrics {
    pub fn new(model: &str, version: u64, instance: &str, ramps: &[u32]) -> Self {
        let base = [
            ("model", model.to_owned()),
            ("version", version.to_string()),
            ("instance", instance.to_owned()),
        ];
        let mut out = Vec::new();
        let mut add = |name: &str, extra: &[(&'static str, String)], index, value| {
            let families = FAMILIES.lock().unwrap_or_else(|e| e.into_inner());
            let Some((_, family)) = families.0.iter().find(|(known, _)| *known == name) else {
                return;
            };
            let labels = [&base[..], extra].concat();
            if let Some(metric) = make(*family, &labels) {
                let counter = COUNTERS.iter().any(|(known, _)| *known == name);
                out.push(Metric {
                    metric,
                    counter,
                    last: 0.0,
                    value,
                    index,
                });
            }
        };
        for (index, layer) in ramps.iter().enumerate() {
            let labels = [("ramp", index.to_string()), ("layer", layer.to_string())];
            add("drex_exits_total", &labels, index, |s, i| {
                s.stats.exits[i] as f64
            });
            add("drex_held_rows", &labels, index, |s, i| {
                s.stats.held_rows_at[i] as f64
            });
        }
        for (index, reason) in REASONS.iter().enumerate().skip(1) {
            let labels = [("reason", (*reason).to_owned())];
            add("drex_flushes_total", &labels, index, |s, i| {
                s.stats.flushes[i] as f64
            });
        }
        let single: [(&str, Value); 14] = [
            ("drex_tokens_total", |s, _| s.stats.tokens as f64),
            ("drex_involuntary_exits_total", |s, _| {
                s.stats.involuntary_exits as f64
            }),
            ("drex_involuntary_stays_total", |s, _| {
                s.stats.involuntary_stays as f64
            }),
            ("drex_nonfinite_rows_total", |s, _| {
                s.stats.nonfinite_rows as f64
            }),
            ("drex_steps_total", |s, _| s.stats.steps as f64),
            ("drex_step_rows_total", |s, _| s.stats.step_rows as f64),
            ("drex_window_seconds_total", |s, _| s.window_ns as f64 / 1e9),
            ("drex_filled_cells_total", |s, _| {
                s.stats.cells_filled as f64
            }),
            ("drex_postfilled_rows_total", |s, _| {
                s.stats.rows_filled as f64
            }),
            ("drex_deadline_misses_total", |s, _| {
                s.stats.deadline_misses as f64
            }),
            ("drex_pending_rows", |s, _| s.stats.pending_rows as f64),
            ("drex_slots_free", |s, _| s.stats.slots_free as f64),
            ("drex_requests_running", |s, _| s.running as f64),
            ("drex_requests_waiting", |s, _| s.waiting as f64),
        ];
        for (name, value) in single {
            add(name, &[], 0, value);
        }
        Self(out)
    }

    pub fn update(&mut self, now: &Snapshot) {
        for m in &mut self.0 {
            let value = (m.value)(now, m.index);
            // SAFETY: the metric lives as long as this.
            let done = unsafe {
                if m.counter {
                    check(abi::TRITONSERVER_MetricIncrement(
                        m.metric,
                        (value - m.last).max(0.0),
                    ))
                } else {
                    check(abi::TRITONSERVER_MetricSet(m.metric, value))
                }
            };
            if done.is_ok() {
                m.last = value;
            }
        }
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        for m in &self.0 {
            // SAFETY: made by MetricNew, deleted once.
            let _ = unsafe { check(abi::TRITONSERVER_MetricDelete(m.metric)) };
        }
    }
}

fn make(family: *mut abi::MetricFamily, labels: &[(&str, String)]) -> Option<*mut abi::Metric> {
    let mut metric = null_mut();
    // SAFETY: Triton copies the texts; labels are deleted after the metric is made.
    unsafe {
        let labels: Vec<*const abi::Parameter> = labels
            .iter()
            .map(|(name, value)| {
                let (name, value) = (text(name), text(value));
                abi::TRITONSERVER_ParameterNew(
                    name.as_ptr(),
                    abi::PARAMETER_STRING,
                    value.as_ptr().cast::<c_char>().cast(),
                )
                .cast_const()
            })
            .collect();
        let list = if labels.is_empty() {
            null()
        } else {
            labels.as_ptr()
        };
        let made = check(abi::TRITONSERVER_MetricNew(
            &mut metric,
            family,
            list,
            labels.len() as u64,
        ));
        for label in labels {
            abi::TRITONSERVER_ParameterDelete(label.cast_mut());
        }
        made.ok().map(|()| metric)
    }
}
