// SPDX-License-Identifier: Apache-2.0

//! What pending rows cost and bring, for the scheduler.
//!
//! A request that keeps its exited rows collects them until one of its rows
//! goes deep, and starts anew. With a chance q that a token exits, and at most
//! M pending rows, a cycle ends with m of them with chance q^m (1 - q), and
//! q^M for M. With fill `verify` they are drafts: of m drafts and the deep row
//! behind them, each right with chance a if all before it are,
//! 1 + a + ... + a^m tokens come out (Leviathan et al., arXiv 2211.17192,
//! equation 1).

use crate::core::MAX_RAMPS;
use crate::core::decision::Decision;

/// Verdicts that an estimate remembers.
const MEMORY: f64 = 600.0;
/// Before the first verdicts: so many, with this share accepted.
const PRIOR: f64 = 8.0;
const PRIOR_SHARE: f64 = 0.9;
/// Longer cycles than this are taken for this long.
const LONGEST: u32 = 64;

/// How often the full model says what a ramp drafted.
#[derive(Debug, Clone, Default)]
pub struct Acceptance {
    judged: [f64; MAX_RAMPS],
    accepted: [f64; MAX_RAMPS],
}

impl Acceptance {
    /// A draft that left at `ramp` was judged; drops say nothing.
    pub fn observe(&mut self, ramp: usize, decision: Decision) {
        let accepted = match decision {
            Decision::Accept => 1.0,
            Decision::Replace => 0.0,
            _ => return,
        };
        let keep = 1.0 - 1.0 / MEMORY;
        self.judged[ramp] = self.judged[ramp] * keep + 1.0;
        self.accepted[ramp] = self.accepted[ramp] * keep + accepted;
    }

    pub fn chance(&self, ramp: usize) -> f64 {
        (self.accepted[ramp] + PRIOR * PRIOR_SHARE) / (self.judged[ramp] + PRIOR)
    }

    /// Of drafts that leave at each ramp in these proportions.
    pub fn mean(&self, exits: &[f64]) -> f64 {
        let all: f64 = exits.iter().sum();
        if all <= 0.0 {
            return self.chance(0);
        }
        let good = exits.iter().enumerate().map(|(r, e)| e * self.chance(r));
        good.sum::<f64>() / all
    }
}

/// Means over the cycles of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cycle {
    /// Pending rows that its deep row takes along.
    pub rows: f64,
    /// Chance that a row may not exit because as many are pending as may be.
    pub full: f64,
    /// With fill `verify`: tokens that come out, as a share of those that
    /// went in.
    pub worth: f64,
}

impl Cycle {
    /// `exit`: chance that a token exits at some ramp; `most`: pending rows;
    /// `accept`: chance that a draft is right.
    pub fn new(exit: f64, most: u32, accept: f64) -> Self {
        let (q, a) = (exit.clamp(0.0, 1.0), accept.clamp(0.0, 1.0));
        let most = most.min(LONGEST);
        let (mut rows, mut came) = (0.0, 0.0);
        let mut reached = 1.0; // q^m
        let mut looks = 0.0;
        let (mut out, mut power) = (0.0, 1.0); // 1 + ... + a^m, a^m
        for m in 0..=most {
            out += power;
            power *= a;
            looks += reached;
            let ends = if m == most {
                reached
            } else {
                reached * (1.0 - q)
            };
            rows += ends * f64::from(m);
            came += ends * out;
            if m < most {
                reached *= q;
            }
        }
        Cycle {
            rows,
            full: reached / looks,
            worth: came / (1.0 + rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    #[test]
    fn a_cycle_without_drafts_or_doubts() {
        let c = Cycle::new(0.0, 8, 0.5);
        near(c.rows, 0.0);
        near(c.full, 0.0);
        near(c.worth, 1.0);
        // every row exits until as many are pending as may be
        let c = Cycle::new(1.0, 4, 1.0);
        near(c.rows, 4.0);
        near(c.full, 0.2);
        near(c.worth, 1.0);
        let c = Cycle::new(1.0, 4, 0.0);
        near(c.worth, 0.2);
        // speculative decoding's own figure: (1 - a^(m+1)) / (1 - a)
        let c = Cycle::new(1.0, 5, 0.8);
        near(c.worth * 6.0, (1.0 - 0.8f64.powi(6)) / 0.2);
        let c = Cycle::new(0.7, 0, 0.3);
        near(c.rows, 0.0);
        near(c.full, 1.0);
        near(c.worth, 1.0);
    }

    /// A cycle's figures are those of coins that are thrown.
    #[test]
    fn a_cycle_is_what_coins_say() {
        for (q, most, a) in [(0.8, 8, 0.9), (0.5, 3, 0.6), (0.95, 16, 0.99)] {
            let mut rng = fastrand::Rng::with_seed(5);
            let mut coin = |p: f64| rng.f64() <= p;
            let (mut rows, mut looks, mut full, mut out) = (0u64, 0u64, 0u64, 0u64);
            let cycles = 200_000;
            for _ in 0..cycles {
                let mut m = 0;
                loop {
                    looks += 1;
                    full += u64::from(m == most);
                    if m == most || !coin(q) {
                        break;
                    }
                    m += 1;
                }
                rows += u64::from(m);
                out += 1;
                for _ in 0..m {
                    if !coin(a) {
                        break;
                    }
                    out += 1;
                }
            }
            let c = Cycle::new(q, most, a);
            let share = |a: u64, b: u64| a as f64 / b as f64;
            let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 0.02, "{q} {most}: {a} {b}");
            close(c.rows, share(rows, cycles));
            close(c.full, share(full, looks));
            close(c.worth, share(out, rows + cycles));
        }
    }

    #[test]
    fn acceptance_is_learned_for_each_ramp() {
        let mut a = Acceptance::default();
        near(a.chance(3), 0.9);
        for i in 0..4000 {
            let right = i % 4 != 0;
            a.observe(
                0,
                if right {
                    Decision::Accept
                } else {
                    Decision::Replace
                },
            );
            a.observe(1, Decision::Drop);
        }
        assert!((a.chance(0) - 0.75).abs() < 0.01);
        near(a.chance(1), 0.9);
        near(a.mean(&[0.5, 0.5]), (a.chance(0) + 0.9) / 2.0);
    }
}
