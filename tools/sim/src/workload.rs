// SPDX-License-Identifier: Apache-2.0

//! Who comes when, how long a request's answer is, and which of its tokens
//! are confident where.

use std::collections::HashMap;

use crate::draw::{exponential, purpose, uniform};

/// In a token's number, the bits from here on say how often drafts of its
/// request were taken back: what comes then is another text.
pub const TURN_SHIFT: u32 = 40;

#[derive(Debug, Clone)]
pub enum Arrivals {
    /// So many requests at all times: one that ends is replaced at once.
    Closed(u32),
    /// Requests per second.
    Poisson(f64),
    /// Poisson arrivals with this mean rate, three times as many in the first
    /// third of every period of so many seconds, none in the rest.
    Bursty(f64, f64),
    /// Times in ns, and lengths in tokens.
    Trace(Vec<(u64, u64)>),
}

#[derive(Debug, Clone)]
pub enum Confidence {
    /// Chance to be confident at each ramp, given that the row was not at the
    /// ones before.
    Fixed(Vec<f64>),
    /// Requests differ: a request's chance is drawn around the mean, from 0
    /// (all alike) to 1 (all or nothing).
    Spread(Vec<f64>, f64),
    /// The chance swings around the mean by this share of it, over a period
    /// in seconds.
    Drift(Vec<f64>, f64, f64),
    /// Recorded, by request and token: one number per ramp, NaN where it is
    /// unknown.
    Recorded(HashMap<u64, Vec<Vec<f32>>>),
    /// Any number from 0 to 1, and a chance to be right that it goes with.
    Curve(Curve),
    /// The first for requests before the one with this number, the second from there on.
    Change(Curve, u64, Curve),
}

/// How right a confidence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Honesty {
    /// As often as it says.
    Calibrated,
    /// Equally often, however sure.
    Flat,
    /// The surer, the less.
    Lying,
}

/// Ramps that are equally good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Curve {
    pub honesty: Honesty,
    /// Share of the tokens that are right.
    pub right: f64,
    /// Share of `right` by which it swings, and the period in tokens of a request.
    pub drift: (f64, u64),
}

impl Curve {
    /// Of a token that `u`, uniform in [0, 1), is drawn for: its confidence, and its
    /// chance to be right.
    fn at(&self, u: f64, token: u64) -> (f64, f64) {
        let (swing, period) = self.drift;
        let phase = match period {
            0 => 0.0,
            n => (token as f64 / n as f64 * std::f64::consts::TAU).sin(),
        };
        let mean = (self.right * (1.0 + swing * phase)).clamp(0.01, 0.99);
        // A power of a uniform number, with this mean.
        let power = (1.0 - mean) / mean;
        let confidence = u.powf(power);
        let right = match self.honesty {
            Honesty::Calibrated => confidence,
            Honesty::Flat => mean,
            Honesty::Lying => (1.0 - u).powf(power),
        };
        (confidence, right)
    }
}

#[derive(Debug, Clone)]
pub struct Workload {
    pub arrivals: Arrivals,
    pub confidence: Confidence,
    /// Tokens of an answer: from, to (uniform). 0: endless.
    pub length: (u64, u64),
    /// Instead, lengths of recorded requests, which go around.
    pub lengths: Vec<u64>,
    /// Rows of a prompt: from, to (uniform).
    pub prompt_rows: (u64, u64),
    /// Instead, those of recorded requests, which go around.
    pub prompts: Vec<u64>,
    pub token_deadline_ns: u64,
    pub request_deadline_ns: u64,
    /// Priorities and their shares.
    pub priorities: Vec<(i32, f64)>,
    pub seed: u64,
}

impl Workload {
    pub fn closed(n: u32, p: Vec<f64>, seed: u64) -> Self {
        Workload {
            arrivals: Arrivals::Closed(n),
            confidence: Confidence::Fixed(p),
            length: (0, 0),
            lengths: Vec::new(),
            prompt_rows: (0, 0),
            prompts: Vec::new(),
            token_deadline_ns: 0,
            request_deadline_ns: 0,
            priorities: vec![(0, 1.0)],
            seed,
        }
    }

    /// Tokens of request `id`; `None`: endless.
    pub fn tokens(&self, id: u64) -> Option<u64> {
        if let Arrivals::Trace(all) = &self.arrivals {
            return all.get(id as usize).map(|a| a.1);
        }
        if !self.lengths.is_empty() {
            return Some(self.lengths[id as usize % self.lengths.len()]);
        }
        let (low, high) = self.length;
        if high == 0 {
            return None;
        }
        let u = uniform(self.seed, purpose::LENGTH, id, 0);
        Some(low + (u * (high - low + 1) as f64) as u64)
    }

    /// Rows of the prompt of request `id`.
    pub fn prompt(&self, id: u64) -> u64 {
        if !self.prompts.is_empty() {
            return self.prompts[id as usize % self.prompts.len()];
        }
        let (low, high) = self.prompt_rows;
        let u = uniform(self.seed, purpose::PROMPT, id, 0);
        low + (u * (high - low + 1) as f64) as u64
    }

    pub fn has_prompts(&self) -> bool {
        self.prompt_rows.1 > 0 || self.prompts.iter().any(|&n| n > 0)
    }

    pub fn priority(&self, id: u64) -> i32 {
        let mut u = uniform(self.seed, purpose::PRIORITY, id, 0);
        for &(priority, share) in &self.priorities {
            if u < share {
                return priority;
            }
            u -= share;
        }
        self.priorities.last().map_or(0, |p| p.0)
    }

    /// Time from arrival `id - 1` to arrival `id`, in ns.
    pub fn gap_ns(&self, id: u64, now_ns: f64) -> f64 {
        let e = exponential(self.seed, purpose::ARRIVAL, id) * 1e9;
        match self.arrivals {
            Arrivals::Poisson(rate) => e / rate,
            Arrivals::Bursty(rate, period_s) => {
                // In time that runs only during bursts.
                let (period, third) = (period_s * 1e9, period_s * 1e9 / 3.0);
                let into = now_ns % period;
                let left = (third - into).max(0.0);
                let mut burst = e / (3.0 * rate);
                if burst < left {
                    return burst;
                }
                burst -= left;
                period - into + (burst / third).floor() * period + burst % third
            }
            _ => 0.0,
        }
    }

    /// What request `id`'s confidences are worth, where the workload says so.
    fn curve(&self, id: u64) -> Option<&Curve> {
        match &self.confidence {
            Confidence::Curve(curve) => Some(curve),
            Confidence::Change(before, from, after) => {
                Some(if id < *from { before } else { after })
            }
            _ => None,
        }
    }

    /// Confidence of a token at a ramp: 0.9 or 0.1 around a threshold of
    /// 0.5, or as recorded (NaN: unknown).
    pub fn confidence(&self, id: u64, token: u64, ramp: usize, now_ns: f64) -> f32 {
        let u = uniform(self.seed, purpose::EXIT, id, token);
        let by = |chances: &mut dyn Iterator<Item = f64>| {
            1.0 - chances.take(ramp + 1).map(|p| 1.0 - p).product::<f64>()
        };
        let share = match &self.confidence {
            Confidence::Fixed(p) => by(&mut p.iter().copied()),
            Confidence::Spread(p, spread) => {
                let own = uniform(self.seed, purpose::REQUEST, id, 0);
                by(&mut p.iter().map(|&p| {
                    let extreme = f64::from(u8::from(own < p));
                    p + (extreme - p) * spread
                }))
            }
            Confidence::Drift(p, swing, period_s) => {
                let phase = (now_ns / 1e9 / period_s * std::f64::consts::TAU).sin();
                by(&mut p
                    .iter()
                    .map(|&p| (p * (1.0 + swing * phase)).clamp(0.0, 1.0)))
            }
            Confidence::Curve(_) | Confidence::Change(..) => {
                let text = token & ((1 << TURN_SHIFT) - 1);
                let curve = self.curve(id);
                return curve.map_or(f32::NAN, |c| c.at(u, text).0 as f32);
            }
            Confidence::Recorded(all) => {
                // Requests, and their tokens, go around.
                let id = match self.lengths.len() as u64 {
                    0 => id,
                    n => id % n,
                };
                let Some(tokens) = all.get(&id).filter(|t| !t.is_empty()) else {
                    return f32::NAN;
                };
                // Without how often the text was taken back, which is no
                // part of a recording.
                let token = token & ((1 << TURN_SHIFT) - 1);
                return tokens[token as usize % tokens.len()][ramp];
            }
        };
        if u < share { 0.9 } else { 0.1 }
    }

    /// Whether the full model says of a token what a ramp says; `accept` is the
    /// chance where the workload does not tell.
    pub fn right(&self, id: u64, token: u64, accept: f64) -> bool {
        let chance = match self.curve(id) {
            Some(curve) => {
                let u = uniform(self.seed, purpose::EXIT, id, token);
                curve.at(u, token & ((1 << TURN_SHIFT) - 1)).1
            }
            None => accept,
        };
        uniform(self.seed, purpose::ACCEPT, id, token) < chance
    }

    /// In place of a confidence that was not recorded: that of some other
    /// token at the same ramp; 0 where there is none.
    pub fn drawn(&self, id: u64, token: u64, ramp: usize) -> f32 {
        let Confidence::Recorded(all) = &self.confidence else {
            return 0.0;
        };
        let pick = |k: u64, n: usize| {
            (uniform(self.seed, purpose::UNKNOWN, id ^ (k << 40), token) * n as f64) as usize
        };
        for k in 0..32 {
            let Some(tokens) = all.get(&(pick(2 * k, all.len()) as u64)) else {
                continue;
            };
            let confidence = tokens[pick(2 * k + 1, tokens.len())][ramp];
            if !confidence.is_nan() {
                return confidence;
            }
        }
        0.0
    }
}
