// SPDX-License-Identifier: Apache-2.0
//! The drex_* families of an instance at /metrics.
//!
//! While a model is loaded anew its old instance and its new one have equal labels, and so the same metrics. So nothing is
//! ever set: each instance adds its changes, and at its end takes its gauges back.

use drex::ffi::DREX_WAIT_BUCKETS;

use crate::families::{
    BOUNDS, FAMILIES, FLUSHES, Family, HELD, MISSES, Over, RULES, Snapshot, WINDOW,
};
use crate::registry::{Label, Metric};
use crate::triton::abi;

type Labels = Vec<Label>;

struct One {
    family: &'static Family,
    index: usize,
    labels: Labels,
    /// None until the value is known.
    metric: Option<Metric>,
    refused: bool,
    last: f64,
}

/// The metrics of one instance.
pub struct Metrics {
    all: Vec<One>,
    held: Option<Metric>,
    last_held: [u64; DREX_WAIT_BUCKETS],
    last_held_us: u64,
    windows: Option<Metric>,
    last_window_ns: u64,
}

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
        for family in FAMILIES {
            let each: Vec<Labels> = match family.over {
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
            let skip = usize::from(matches!(family.over, Over::Flushes));
            for (index, own) in each.into_iter().enumerate().skip(skip) {
                all.push(One {
                    family,
                    index,
                    labels: [base.clone(), own].concat(),
                    metric: None,
                    refused: false,
                    last: 0.0,
                });
            }
        }
        Self {
            all,
            held: Metric::histogram(HELD, &base, &bounds()),
            last_held: [0; DREX_WAIT_BUCKETS],
            last_held_us: 0,
            windows: Metric::histogram(WINDOW, &base, &BOUNDS),
            last_window_ns: 0,
        }
    }

    /// What counts, and what `update_gauges` brings.
    pub fn update(&mut self, now: &Snapshot) {
        self.observe_window(now);
        self.update_where(now, |_| true);
        if let Some(held) = &self.held {
            let us = now.stats.wait_us_sum - self.last_held_us;
            for seconds in observations(&self.last_held, &now.stats.wait_us_buckets, us) {
                held.observe(seconds);
            }
        }
        self.last_held = now.stats.wait_us_buckets;
        self.last_held_us = now.stats.wait_us_sum;
    }

    /// What goes up and down. After every step, so that whoever looks finds each value as often as it holds: taken once in
    /// a while, after a step, it would be the one after the long steps, which are those that leave no row held.
    pub fn update_gauges(&mut self, now: &Snapshot) {
        self.observe_window(now);
        self.update_where(now, |kind| kind == abi::METRIC_GAUGE);
    }

    /// There is one window at most between two calls.
    fn observe_window(&mut self, now: &Snapshot) {
        let ns = now.window_ns - self.last_window_ns;
        self.last_window_ns = now.window_ns;
        if let (Some(windows), true) = (&self.windows, ns > 0) {
            windows.observe(ns as f64 / 1e9);
        }
    }

    fn update_where(&mut self, now: &Snapshot, which: impl Fn(u32) -> bool) {
        for m in &mut self.all {
            let about = m.family;
            if m.refused || !which(about.kind) {
                continue;
            }
            let value = (about.value)(now, m.index);
            if !value.is_finite() || (value == m.last && m.metric.is_some()) {
                continue;
            }
            if m.metric.is_none() {
                m.metric = Metric::of(about.name, &m.labels);
            }
            let Some(metric) = &m.metric else {
                m.refused = true;
                continue;
            };
            let mut change = value - m.last;
            if about.kind == abi::METRIC_COUNTER {
                change = change.max(0.0);
            }
            if metric.add(change) {
                m.last = value;
            }
        }
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        let gauges = self
            .all
            .iter()
            .filter(|m| m.family.kind == abi::METRIC_GAUGE);
        for m in gauges {
            if let Some(metric) = &m.metric {
                metric.add(-m.last);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::Graphs;
    use crate::registry::{register, unregister};
    use crate::triton::fake_host as host;

    fn snapshot() -> Snapshot {
        Snapshot {
            // SAFETY: plain numbers.
            stats: unsafe { std::mem::zeroed() },
            window_ns: 0,
            tokens: 0,
            running: 0,
            graphs: Graphs::default(),
        }
    }

    #[test]
    fn instances_of_equal_labels_add_up_and_take_back_their_gauges() {
        register();
        let mut old = Metrics::new("m", 1, "m_0", &[4, 8]);
        let mut now = snapshot();
        now.stats.art_ratio = f64::NAN;
        now.stats.exit_share = [f64::NAN; drex::ffi::DREX_MAX_RAMPS];
        now.tokens = 5;
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
        (now.tokens, now.running) = (6, 3);
        old.update_gauges(&now);
        assert_eq!(get("drex_tokens_total", ""), Some(5.0));
        assert_eq!(get("drex_requests_running", ""), Some(3.0));
        now.running = 4;
        old.update(&now);
        assert_eq!(get("drex_tokens_total", ""), Some(6.0));

        let mut new = Metrics::new("m", 1, "m_0", &[4, 8]);
        let mut other = snapshot();
        other.tokens = 2;
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
        // Each window is one observation.
        host::take_observed();
        other.window_ns = 1_500_000_000;
        new.update_gauges(&other);
        new.update(&other);
        assert_eq!(host::take_observed(), [1.5]);
        drop(new);
        let left: Vec<_> = host::metrics().into_iter().collect();
        assert!(
            left.len() == 1 && left[0].0.starts_with("drex_build_info{version="),
            "{left:?}"
        );
        unregister();
        assert_eq!(host::live(), 0);
    }

    /// Counts as Prometheus does, whose bounds belong to their bucket, against drex's counts.
    #[test]
    fn observations_have_the_counts_and_the_sum() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut last = [0; DREX_WAIT_BUCKETS];
        for round in 0..50 {
            let (mut now, mut us) = (last, 0);
            for _ in 0..1 + round % 7 {
                let wait = rng.u64(..1 << 31) >> rng.u32(..32);
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
