// SPDX-License-Identifier: Apache-2.0
//! A model's requests at /metrics, whatever the instance: how they ended, and how long they took.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine::Finish;
use crate::families::{About, BETWEEN, BOUNDS, ENDED, FIRST, PROMPT_TOKENS, QUEUE, WAITING, WHOLE};
use crate::registry::{Label, Metric};
use crate::triton::abi;
use crate::triton::error::Failure;

/// Why requests end.
const REASONS: [&str; 6] = [
    "stop",
    "length",
    "cancelled",
    "invalid",
    "unavailable",
    "internal",
];

/// None of them is there with a server that has no metrics.
pub struct Load {
    /// By `REASONS`
    ended: Vec<Option<Metric>>,
    prompt_tokens: Option<Metric>,
    waiting: Option<Metric>,
    /// In `waiting`.
    now_waiting: AtomicUsize,
    queue: Option<Metric>,
    first: Option<Metric>,
    between: Option<Metric>,
    whole: Option<Metric>,
}

impl Load {
    pub fn new(model: &str, version: u64) -> Self {
        let base: [Label; 2] = [
            ("model", model.to_owned()),
            ("version", version.to_string()),
        ];
        let ended = |reason: &&str| {
            let labels = [&base[..], &[("reason", (*reason).to_owned())]].concat();
            let metric = Metric::of(ENDED.1, &labels)?;
            // Whoever looks for a rate needs the 0.
            metric.add(0.0);
            Some(metric)
        };
        let histogram = |about: About| Metric::histogram(about, &base, &BOUNDS);
        Self {
            ended: REASONS.iter().map(ended).collect(),
            prompt_tokens: Metric::of(PROMPT_TOKENS.1, &base),
            waiting: Metric::of(WAITING.1, &base),
            now_waiting: AtomicUsize::new(0),
            queue: histogram(QUEUE),
            first: histogram(FIRST),
            between: histogram(BETWEEN),
            whole: histogram(WHOLE),
        }
    }

    fn ended(&self, reason: &str) {
        let at = REASONS.iter().position(|known| *known == reason);
        if let Some(metric) = at.and_then(|at| self.ended[at].as_ref()) {
            metric.add(1.0);
        }
    }

    /// A request came to its end.
    pub fn finished(&self, how: Finish) {
        self.ended(how.name());
    }

    /// A request ended with an error.
    pub fn ended_by(&self, failure: &Failure) {
        self.ended(match failure.code {
            abi::ERROR_CANCELLED => Finish::Cancelled.name(),
            abi::ERROR_INVALID_ARG | abi::ERROR_UNSUPPORTED => "invalid",
            abi::ERROR_UNAVAILABLE => "unavailable",
            _ => "internal",
        });
    }

    pub fn waiting(&self, n: usize) {
        let before = self.now_waiting.swap(n, Ordering::Relaxed);
        if let (Some(metric), true) = (&self.waiting, n != before) {
            metric.add(n as f64 - before as f64);
        }
    }

    /// A request got a slot.
    pub fn started(&self, waited_ns: u64, prompt_tokens: u32) {
        seen(&self.queue, waited_ns);
        if let Some(metric) = &self.prompt_tokens {
            metric.add(prompt_tokens.into());
        }
    }

    pub fn first_token(&self, ns: u64) {
        seen(&self.first, ns);
    }

    pub fn next_token(&self, ns: u64) {
        seen(&self.between, ns);
    }

    pub fn whole(&self, ns: u64) {
        seen(&self.whole, ns);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.waiting(0);
    }
}

fn seen(metric: &Option<Metric>, ns: u64) {
    if let Some(metric) = metric {
        metric.observe(ns as f64 / 1e9);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{register, unregister};
    use crate::triton::fake_host as host;

    #[test]
    fn every_way_to_end_has_its_counter_and_two_of_a_model_add_up() {
        register();
        let (old, new) = (Load::new("m", 1), Load::new("m", 1));
        let get = |reason: &str| {
            let key = format!("drex_requests_ended_total{{model=m,version=1,reason={reason}}}");
            host::metrics()[&key]
        };
        assert!(REASONS.iter().all(|reason| get(reason) == 0.0));
        old.finished(Finish::Stop);
        new.finished(Finish::Stop);
        old.finished(Finish::Length);
        old.finished(Finish::Cancelled);
        for failure in [
            Failure::invalid("x"),
            Failure::unsupported("x"),
            Failure::unavailable("x"),
            Failure::internal("x"),
        ] {
            old.ended_by(&failure);
        }
        assert_eq!(REASONS.map(get), [2.0, 1.0, 1.0, 2.0, 1.0, 1.0]);
        let waiting = || host::metrics()["drex_requests_waiting{model=m,version=1}"];
        old.waiting(3);
        new.waiting(1);
        assert_eq!(waiting(), 4.0);
        drop(old);
        assert_eq!(waiting(), 1.0);
        new.started(500_000_000, 7);
        new.whole(1_000_000_000);
        assert_eq!(host::take_observed(), [0.5, 1.0]);
        drop(new);
        unregister();
        assert_eq!(host::live(), 0);
    }
}
