// SPDX-License-Identifier: Apache-2.0

//! What a server has at /metrics, by name and label.

use std::io;

use prometheus_parse::{Labels, Scrape, Value};

/// The samples of one scrape, in its order, but for buckets, which come last.
#[derive(Clone, Default)]
pub struct Metrics(Vec<Sample>);

#[derive(Clone)]
struct Sample {
    name: String,
    labels: Labels,
    value: f64,
}

impl Metrics {
    /// llama-server's own names begin with `llamacpp:`, which is left out: the parser knows no colon in a name.
    pub fn parse(text: &str) -> Metrics {
        let lines = text.lines().map(|line| line.replacen("llamacpp:", "", 1));
        let scrape = Scrape::parse(lines.map(io::Result::Ok));
        let mut samples = Vec::new();
        for sample in scrape.into_iter().flat_map(|scrape| scrape.samples) {
            let (name, labels) = (sample.metric, sample.labels);
            match sample.value {
                Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => {
                    samples.push(Sample {
                        name,
                        labels,
                        value,
                    });
                }
                Value::Histogram(buckets) => {
                    samples.extend(buckets.into_iter().map(|bucket| Sample {
                        name: format!("{name}_bucket"),
                        labels: labels.clone(),
                        value: bucket.count,
                    }));
                }
                Value::Summary(_) => {}
            }
        }
        Metrics(samples)
    }

    fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The value of a metric, summed over its labels; none where the server has no such metric.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.of(name)
            .map(|sample| sample.value)
            .reduce(|a, b| a + b)
    }

    /// The samples of a metric by one of their labels.
    pub fn by_label(&self, name: &str, label: &str) -> Vec<(String, f64)> {
        self.of(name)
            .filter_map(|sample| Some((sample.labels.get(label)?.to_owned(), sample.value)))
            .collect()
    }

    /// By how much the samples of a metric have grown since a scrape, by one of their labels.
    pub fn growth_by_label(&self, since: &Metrics, name: &str, label: &str) -> Vec<(String, f64)> {
        let old = since.by_label(name, label);
        let mut grown = self.by_label(name, label);
        for (label, value) in &mut grown {
            *value -= old.iter().find(|(l, _)| l == label).map_or(0.0, |l| l.1);
        }
        grown
    }

    /// Which values some labels of a metric have together.
    pub fn labels<const N: usize>(&self, name: &str, labels: [&str; N]) -> Vec<[String; N]> {
        self.of(name)
            .filter_map(|sample| {
                let found = labels.map(|label| sample.labels.get(label));
                let all = found.iter().all(Option::is_some);
                all.then(|| found.map(|value| value.unwrap_or_default().to_owned()))
            })
            .collect()
    }

    /// The names that begin so, each once, in the order of the alphabet.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let mut names: Vec<String> = self
            .0
            .iter()
            .filter(|sample| sample.name.starts_with(prefix))
            .map(|sample| sample.name.clone())
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_metrics() {
        let text = "# HELP drex_exits_total Exits: by ramp\n# TYPE drex_exits_total counter\n\
                    drex_exits_total{ramp=\"0\",layer=\"4\"} 3\ndrex_exits_total{ramp=\"1\",layer=\"8\"} 4\n\
                    # HELP llamacpp:n_decode_total n\n# TYPE llamacpp:n_decode_total counter\nllamacpp:n_decode_total 6\n\
                    # TYPE wait_seconds histogram\nwait_seconds_bucket{le=\"0.1\"} 2\nwait_seconds_bucket{le=\"+Inf\"} 3\n\
                    wait_seconds_sum 0.5\nwait_seconds_count 3\ndrex_held_ms NaN\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.get("drex_exits_total"), Some(7.0));
        assert_eq!(metrics.get("n_decode_total"), Some(6.0));
        assert_eq!(metrics.get("none"), None);
        assert_eq!(metrics.get("wait_seconds_bucket"), Some(5.0));
        assert_eq!(metrics.get("wait_seconds_sum"), Some(0.5));
        assert!(metrics.get("drex_held_ms").is_some_and(f64::is_nan));
        assert_eq!(
            metrics.labels("drex_exits_total", ["ramp", "layer"])[1],
            ["1", "8"]
        );
        assert_eq!(
            metrics.by_label("drex_exits_total", "layer"),
            [("4".into(), 3.0), ("8".into(), 4.0)]
        );
        let before = "drex_exits_total{ramp=\"1\",layer=\"8\"} 1\n";
        assert_eq!(
            metrics.growth_by_label(&Metrics::parse(before), "drex_exits_total", "layer"),
            [("4".into(), 3.0), ("8".into(), 3.0)]
        );
        assert_eq!(metrics.names("drex_"), ["drex_exits_total", "drex_held_ms"]);
    }
}
