// SPDX-License-Identifier: Apache-2.0
//! The drex_* families at /metrics. A server without metrics is no error: then there are none.
//!
//! Triton gives metrics of equal labels the same value, and while a model is loaded anew its old instance and its new one
//! have equal labels. So nothing is ever set: each instance adds its changes, and at its end takes its gauges back.

use std::ffi::{CString, c_char};
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use drex::ffi::types::DREX_WAIT_BUCKETS;

use crate::families::{FAMILIES, FLUSHES, MISSES, Over, RULES, Snapshot, WAITS};
use crate::triton::abi;
use crate::triton::error::check;

/// In the order of `FAMILIES`, the histogram behind them; NULL: the server refused it.
struct Families(Vec<*mut abi::MetricFamily>);
// SAFETY: Triton's metrics may be used from any thread.
unsafe impl Send for Families {}

/// One for the process: two families of one name would be an error.
static MADE: Mutex<Families> = Mutex::new(Families(Vec::new()));

fn made() -> MutexGuard<'static, Families> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the families, when the backend is loaded.
pub fn register() {
    let histogram =
        abi::TRITONSERVER_MetricObserve().map(|_| (abi::METRIC_HISTOGRAM, WAITS.0, WAITS.1));
    let all = FAMILIES.iter().map(|f| (f.kind, f.name, f.help));
    made().0 = all
        .chain(histogram)
        .map(|(kind, name, help)| {
            let (name, help) = (text(name), text(help));
            let mut family = null_mut();
            // SAFETY: Triton copies the texts.
            let new = unsafe {
                check(abi::TRITONSERVER_MetricFamilyNew(
                    &mut family,
                    kind,
                    name.as_ptr(),
                    help.as_ptr(),
                ))
            };
            new.map_or(null_mut(), |()| family)
        })
        .collect();
}

/// When the backend is unloaded; every metric is gone by then.
pub fn unregister() {
    for family in made().0.drain(..).filter(|family| !family.is_null()) {
        // SAFETY: made above, deleted once.
        let _ = unsafe { check(abi::TRITONSERVER_MetricFamilyDelete(family)) };
    }
}

fn text(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

type Labels = Vec<(&'static str, String)>;

/// NULL until the value is known.
struct Metric {
    family: usize,
    index: usize,
    labels: Labels,
    metric: *mut abi::Metric,
    refused: bool,
    last: f64,
}

/// The metrics of one instance.
pub struct Metrics {
    all: Vec<Metric>,
    waits: *mut abi::Metric,
    last_waits: [u64; DREX_WAIT_BUCKETS],
    last_wait_us: u64,
}
// SAFETY: as above.
unsafe impl Send for Metrics {}

impl Metrics {
    pub fn new(model: &str, version: u64, instance: &str, ramps: &[u32]) -> Self {
        let base = vec![
            ("model", model.to_owned()),
            ("version", version.to_string()),
            ("instance", instance.to_owned()),
        ];
        let named = |label: &'static str, names: &[&str]| {
            let labels = |name: &&str| vec![(label, (*name).to_owned())];
            names.iter().map(labels).collect::<Vec<Labels>>()
        };
        let mut all = Vec::new();
        for (family, about) in FAMILIES.iter().enumerate() {
            let each: Vec<Labels> = match about.over {
                Over::One => vec![Vec::new()],
                Over::Ramps => ramps
                    .iter()
                    .enumerate()
                    .map(|(i, layer)| vec![("ramp", i.to_string()), ("layer", layer.to_string())])
                    .collect(),
                Over::Flushes => named("reason", &FLUSHES),
                Over::Misses => named("reason", &MISSES),
                Over::Rules => named("rule", &RULES),
            };
            // The first reason of a flush is that there was none.
            let skip = usize::from(matches!(about.over, Over::Flushes));
            for (index, own) in each.into_iter().enumerate().skip(skip) {
                all.push(Metric {
                    family,
                    index,
                    labels: [base.clone(), own].concat(),
                    metric: null_mut(),
                    refused: false,
                    last: 0.0,
                });
            }
        }
        Self {
            all,
            waits: histogram(&base).unwrap_or(null_mut()),
            last_waits: [0; DREX_WAIT_BUCKETS],
            last_wait_us: 0,
        }
    }

    /// What counts, and what `update_gauges` brings.
    pub fn update(&mut self, now: &Snapshot) {
        self.update_where(now, |_| true);
        if let (false, Some(observe)) = (self.waits.is_null(), abi::TRITONSERVER_MetricObserve()) {
            let us = now.stats.wait_us_sum - self.last_wait_us;
            for seconds in observations(&self.last_waits, &now.stats.wait_us_buckets, us) {
                // SAFETY: the metric lives as long as this.
                let _ = unsafe { check(observe(self.waits, seconds)) };
            }
        }
        self.last_waits = now.stats.wait_us_buckets;
        self.last_wait_us = now.stats.wait_us_sum;
    }

    /// What goes up and down. After every step, so that whoever looks finds each value as often as it holds: taken once in
    /// a while, after a step, it would be the one after the long steps, which are those that leave no row held.
    pub fn update_gauges(&mut self, now: &Snapshot) {
        self.update_where(now, |kind| kind == abi::METRIC_GAUGE);
    }

    fn update_where(&mut self, now: &Snapshot, which: impl Fn(u32) -> bool) {
        for m in &mut self.all {
            let about = &FAMILIES[m.family];
            if m.refused || !which(about.kind) {
                continue;
            }
            let value = (about.value)(now, m.index);
            if !value.is_finite() || (value == m.last && !m.metric.is_null()) {
                continue;
            }
            if m.metric.is_null() {
                match make(m.family, &m.labels, null()) {
                    Some(metric) => m.metric = metric,
                    None => {
                        m.refused = true;
                        continue;
                    }
                }
            }
            let mut change = value - m.last;
            if about.kind == abi::METRIC_COUNTER {
                change = change.max(0.0);
            }
            // SAFETY: the metric lives as long as this.
            if unsafe { check(abi::TRITONSERVER_MetricIncrement(m.metric, change)) }.is_ok() {
                m.last = value;
            }
        }
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        for m in self.all.iter().filter(|m| !m.metric.is_null()) {
            // SAFETY: made by MetricNew, deleted once.
            unsafe {
                if FAMILIES[m.family].kind == abi::METRIC_GAUGE {
                    let _ = check(abi::TRITONSERVER_MetricIncrement(m.metric, -m.last));
                }
                let _ = check(abi::TRITONSERVER_MetricDelete(m.metric));
            }
        }
        if !self.waits.is_null() {
            // SAFETY: as above.
            let _ = unsafe { check(abi::TRITONSERVER_MetricDelete(self.waits)) };
        }
    }
}

/// Upper bounds of drex's buckets in seconds, without the last, which has none.
fn bounds() -> Vec<f64> {
    let bound = |i: usize| (1u64 << i) as f64 / 1e6;
    (0..DREX_WAIT_BUCKETS - 1).map(bound).collect()
}

/// Times in seconds that fall into the buckets as the new ones did, and that have their sum. Their own lengths are not
/// known: all lie at the same part of their buckets' widths.
fn observations(
    last: &[u64; DREX_WAIT_BUCKETS],
    now: &[u64; DREX_WAIT_BUCKETS],
    us: u64,
) -> Vec<f64> {
    let edges = |i: usize| match i {
        0 => (0.0, 1.0),
        i => ((1u64 << (i - 1)) as f64, (1u64 << i) as f64),
    };
    let new = |i: usize| now[i] - last[i];
    let (mut low, mut width) = (0.0, 0.0);
    for i in 0..DREX_WAIT_BUCKETS {
        let (from, to) = edges(i);
        low += new(i) as f64 * from;
        width += new(i) as f64 * (to - from);
    }
    // Above 0: a bound belongs to the bucket below it. In the last bucket, which has no end, more than 1 is right too.
    let most = if new(DREX_WAIT_BUCKETS - 1) > 0 {
        f64::INFINITY
    } else {
        1.0
    };
    let part = ((us as f64 - low) / width).clamp(1e-6, most);
    let mut out = Vec::new();
    for i in 0..DREX_WAIT_BUCKETS {
        let (from, to) = edges(i);
        let part = if i + 1 == DREX_WAIT_BUCKETS {
            part
        } else {
            part.min(1.0)
        };
        let value = (from + part * (to - from)) / 1e6;
        out.extend((0..new(i)).map(|_| value));
    }
    out
}

fn histogram(labels: &Labels) -> Option<*mut abi::Metric> {
    let new = abi::TRITONSERVER_MetricArgsNew()?;
    let set = abi::TRITONSERVER_MetricArgsSetHistogram()?;
    let delete = abi::TRITONSERVER_MetricArgsDelete()?;
    let bounds = bounds();
    let mut args = null_mut();
    // SAFETY: Triton copies the bounds; the arguments are deleted after the metric is made.
    unsafe {
        check(new(&mut args)).ok()?;
        let metric = check(set(args, bounds.as_ptr(), bounds.len() as u64))
            .ok()
            .and_then(|()| make(FAMILIES.len(), labels, args));
        let _ = check(delete(args));
        metric
    }
}

/// `args` NULL: none.
fn make(family: usize, labels: &Labels, args: *const abi::MetricArgs) -> Option<*mut abi::Metric> {
    let family = *made().0.get(family)?;
    if family.is_null() {
        return None;
    }
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
        let (list, count) = (labels.as_ptr(), labels.len() as u64);
        let made = if args.is_null() {
            check(abi::TRITONSERVER_MetricNew(
                &mut metric,
                family,
                list,
                count,
            ))
            .ok()
        } else {
            abi::TRITONSERVER_MetricNewWithArgs()
                .and_then(|new| check(new(&mut metric, family, list, count, args)).ok())
        };
        for label in labels {
            abi::TRITONSERVER_ParameterDelete(label.cast_mut());
        }
        made.map(|()| metric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::triton::fake_host as host;

    fn snapshot() -> Snapshot {
        Snapshot {
            // SAFETY: plain numbers.
            stats: unsafe { std::mem::zeroed() },
            window_ns: 0,
            waiting: 0,
            running: 0,
            graphs: (0, 0),
        }
    }

    #[test]
    fn instances_of_equal_labels_add_up_and_take_back_their_gauges() {
        register();
        let mut old = Metrics::new("m", 1, "m_0", &[4, 8]);
        let mut now = snapshot();
        now.stats.art_ratio = f64::NAN;
        now.stats.exit_share = [f64::NAN; drex::ffi::types::DREX_MAX_RAMPS];
        now.stats.tokens = 5;
        now.stats.exits[1] = 3;
        now.stats.misses[2] = 2;
        now.running = 4;
        old.update(&now);
        old.update(&now);
        const BASE: &str = "model=m,version=1,instance=m_0";
        let get = |name: &str, own: &str| {
            let key = format!("{name}{{{BASE}{own}}}");
            host::metrics().get(&key).copied()
        };
        assert_eq!(get("drex_tokens_total", ""), Some(5.0));
        assert_eq!(get("drex_exits_total", ",ramp=1,layer=8"), Some(3.0));
        assert_eq!(get("drex_deadline_misses_total", ",reason=held"), Some(2.0));
        assert_eq!(get("drex_flushes_total", ",reason=none"), None);
        // not known
        assert_eq!(get("drex_art_ratio", ""), None);
        assert_eq!(get("drex_rule_hold_rows", ""), None);
        assert_eq!(get("drex_exit_share", ",ramp=0,layer=4"), None);
        // Between two updates the gauges go on.
        (now.stats.tokens, now.running) = (6, 3);
        old.update_gauges(&now);
        assert_eq!(get("drex_tokens_total", ""), Some(5.0));
        assert_eq!(get("drex_requests_running", ""), Some(3.0));
        now.running = 4;
        old.update(&now);
        assert_eq!(get("drex_tokens_total", ""), Some(6.0));

        let mut new = Metrics::new("m", 1, "m_0", &[4, 8]);
        let mut other = snapshot();
        other.stats.tokens = 2;
        other.stats.searches = 1;
        other.stats.rule_ramps = 2;
        other.stats.predicted_off_tokens_per_s = 7.5;
        other.running = 1;
        new.update(&other);
        assert_eq!(get("drex_tokens_total", ""), Some(8.0));
        assert_eq!(get("drex_requests_running", ""), Some(5.0));
        drop(old);
        assert_eq!(get("drex_tokens_total", ""), Some(8.0));
        assert_eq!(get("drex_requests_running", ""), Some(1.0));
        assert_eq!(get("drex_rule_ramp", ",ramp=0,layer=4"), Some(0.0));
        assert_eq!(get("drex_rule_ramp", ",ramp=1,layer=8"), Some(1.0));
        assert_eq!(
            get("drex_predicted_tokens_per_second", ",rule=off"),
            Some(7.5)
        );
        drop(new);
        assert!(host::metrics().is_empty());
        unregister();
        assert_eq!(host::live(), 0);
    }

    /// Counts as Prometheus does, whose bounds belong to their bucket, against drex's counts.
    #[test]
    fn observations_have_the_counts_and_the_sum() {
        let mut random = 1u64;
        let mut last = [0; DREX_WAIT_BUCKETS];
        for round in 0..50 {
            let (mut now, mut us) = (last, 0);
            for _ in 0..1 + round % 7 {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let wait = (random >> 33) >> (random >> 59);
                let bucket = (64 - wait.leading_zeros() as usize).min(DREX_WAIT_BUCKETS - 1);
                now[bucket] += 1;
                us += wait;
            }
            let values = observations(&last, &now, us);
            let mut counts = last;
            for value in &values {
                let bounds = bounds();
                counts[bounds
                    .iter()
                    .position(|b| value <= b)
                    .unwrap_or(bounds.len())] += 1;
            }
            assert_eq!(counts, now);
            let sum: f64 = values.iter().sum();
            assert!(
                (sum - us as f64 / 1e6).abs() <= 2e-6 * (1.0 + sum),
                "{sum}, {us} us"
            );
            last = now;
        }
    }
}
