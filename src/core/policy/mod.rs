// SPDX-License-Identifier: Apache-2.0

//! The policies: the choice of the rows that leave at a ramp, as pure functions of
//! the rows' confidences.

pub mod auto;
pub mod rule;

use crate::core::config::Policy;
use crate::core::decision::Decision;

/// One row at a ramp; `decide` fills in the last two fields.
#[derive(Debug, Clone, Copy)]
pub struct RampRow {
    pub confidence: f32,
    pub threshold: f32,
    /// The request was removed while the step ran: it has no say.
    pub gone: bool,
    pub decision: Decision,
    /// Made to exit, or to go on, against its own confidence.
    pub forced: bool,
}

impl RampRow {
    /// Written so that NaN falls on the side of going on.
    pub fn confident(&self) -> bool {
        self.confidence >= self.threshold && self.may_exit()
    }

    /// A threshold above 1 says "never", and no policy overrules it.
    pub fn may_exit(&self) -> bool {
        self.threshold <= 1.0
    }

    fn votes(&self) -> bool {
        !self.gone && self.may_exit()
    }

    fn margin(&self) -> Option<f32> {
        (self.votes() && !self.confidence.is_nan()).then_some(self.confidence - self.threshold)
    }

    fn set(&mut self, decision: Decision) {
        self.decision = if self.gone { Decision::Gone } else { decision };
        self.forced = match self.decision {
            Decision::Exit => !self.confident(),
            Decision::Stay => self.confident(),
            _ => false,
        };
    }
}

/// Decides every row of a step. `art_ratio` is c/t_d, or 0 when unknown;
/// `scratch` has room for one number per row.
pub fn decide(policy: Policy, art_ratio: f64, rows: &mut [RampRow], scratch: &mut Vec<f32>) {
    match policy {
        // A row that cannot exit is never asked to under `off` either.
        Policy::Off => all_stay(rows),
        Policy::Latency => split(rows, Decision::Stay),
        Policy::Hold | Policy::Auto => split(rows, Decision::Hold),
        Policy::Art => {
            let here = rows.iter().filter(|r| !r.gone).count();
            let confident = rows.iter().filter(|r| !r.gone && r.confident()).count();
            if confident == here || confident as f64 > art_ratio * here as f64 {
                split(rows, Decision::Hold);
            } else {
                all_stay(rows);
            }
        }
        Policy::Eager => {
            let any = rows.iter().any(|r| r.votes() && r.confident());
            together(any, rows);
        }
        Policy::Lazy => {
            // A NaN row votes here, and votes no: "all are confident" is not
            // true of a batch that holds one.
            let all = rows.iter().filter(|r| r.votes()).all(RampRow::confident);
            together(all, rows);
        }
        Policy::Median => {
            scratch.clear();
            scratch.extend(rows.iter().filter_map(RampRow::margin));
            together(median(scratch).is_some_and(|m| m >= 0.0), rows);
        }
        Policy::Mean => {
            let (mut n, mut sum) = (0u32, 0f64);
            for m in rows.iter().filter_map(RampRow::margin) {
                n += 1;
                sum += f64::from(m);
            }
            together(n > 0 && sum >= 0.0, rows);
        }
    }
}

fn split(rows: &mut [RampRow], rest: Decision) {
    for r in rows {
        let d = if r.confident() { Decision::Exit } else { rest };
        r.set(d);
    }
}

fn all_stay(rows: &mut [RampRow]) {
    for r in rows {
        r.set(Decision::Stay);
    }
}

fn together(exit: bool, rows: &mut [RampRow]) {
    for r in rows {
        let out = exit && r.may_exit() && !r.confidence.is_nan();
        r.set(if out { Decision::Exit } else { Decision::Stay });
    }
}

fn median(v: &mut [f32]) -> Option<f64> {
    if v.is_empty() {
        return None;
    }
    v.sort_unstable_by(f32::total_cmp);
    let (a, b) = (v[(v.len() - 1) / 2], v[v.len() / 2]);
    Some((f64::from(a) + f64::from(b)) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::Decision::{Exit, Gone, Hold, Stay};
    use super::*;

    fn run(policy: Policy, ratio: f64, rows: &[(f32, f32)]) -> Vec<(Decision, bool)> {
        let mut rows: Vec<RampRow> = rows
            .iter()
            .map(|&(confidence, threshold)| RampRow {
                confidence,
                threshold,
                gone: false,
                decision: Gone,
                forced: false,
            })
            .collect();
        decide(policy, ratio, &mut rows, &mut Vec::new());
        rows.iter().map(|r| (r.decision, r.forced)).collect()
    }

    const NAN: f32 = f32::NAN;

    #[test]
    fn nan_goes_on_under_every_policy() {
        for policy in Policy::ALL {
            for other in [0.0, 1.0] {
                let got = run(policy, 0.0, &[(NAN, 0.0), (other, 0.5), (other, 0.5)]);
                assert_ne!(got[0].0, Exit, "{policy:?}");
                assert!(!got[0].1, "{policy:?}");
            }
        }
    }

    #[test]
    fn a_threshold_above_one_is_never_overruled() {
        for policy in Policy::ALL {
            let got = run(policy, 0.0, &[(1.0, 1.01), (1.0, 0.5), (1.0, 0.5)]);
            assert_ne!(got[0].0, Exit, "{policy:?}");
        }
    }

    #[test]
    fn grouped_policies_count_both_directions() {
        assert_eq!(
            run(Policy::Eager, 0.0, &[(0.9, 0.7), (0.1, 0.7)]),
            [(Exit, false), (Exit, true)]
        );
        assert_eq!(
            run(Policy::Eager, 0.0, &[(0.6, 0.7), (0.1, 0.7)]),
            [(Stay, false), (Stay, false)]
        );
        assert_eq!(
            run(Policy::Lazy, 0.0, &[(0.9, 0.7), (0.1, 0.7)]),
            [(Stay, true), (Stay, false)]
        );
        assert_eq!(
            run(Policy::Lazy, 0.0, &[(0.9, 0.7), (0.7, 0.7)]),
            [(Exit, false), (Exit, false)]
        );
        // margins -0.6, 0.1, 0.2: the median passes, the mean does not
        let rows = [(0.1, 0.7), (0.8, 0.7), (0.9, 0.7)];
        assert_eq!(
            run(Policy::Median, 0.0, &rows),
            [(Exit, true), (Exit, false), (Exit, false)]
        );
        assert_eq!(
            run(Policy::Mean, 0.0, &rows),
            [(Stay, false), (Stay, true), (Stay, true)]
        );
        // an even count takes the mean of the middle two: (-0.1 + 0.1) / 2
        let rows = [(0.25, 0.5), (0.375, 0.5), (0.625, 0.5), (0.75, 0.5)];
        assert_eq!(run(Policy::Median, 0.0, &rows)[0], (Exit, true));
        // nobody to vote: nobody leaves
        assert_eq!(run(Policy::Median, 0.0, &[(NAN, 0.0)]), [(Stay, false)]);
        assert_eq!(run(Policy::Mean, 0.0, &[(NAN, 0.0)]), [(Stay, false)]);
        assert_eq!(run(Policy::Lazy, 0.0, &[(1.0, 2.0)]), [(Stay, false)]);
    }

    #[test]
    fn art_splits_only_above_the_ratio() {
        let rows = [(0.9, 0.7), (0.9, 0.7), (0.1, 0.7), (0.1, 0.7)];
        let split = [(Exit, false), (Exit, false), (Hold, false), (Hold, false)];
        let stay = [(Stay, true), (Stay, true), (Stay, false), (Stay, false)];
        assert_eq!(run(Policy::Art, 0.0, &rows), split);
        assert_eq!(run(Policy::Art, 0.49, &rows), split);
        assert_eq!(run(Policy::Art, 0.5, &rows), stay);
        assert_eq!(run(Policy::Art, 1.0, &rows), stay);
        // all confident: nothing is split, whatever splitting costs
        assert_eq!(run(Policy::Art, 1.0, &rows[..2]), split[..2]);
        assert_eq!(run(Policy::Art, 0.0, &rows[2..]), stay[2..]);
    }

    #[test]
    fn the_threshold_itself_is_confident() {
        assert_eq!(run(Policy::Hold, 0.0, &[(0.7, 0.7)]), [(Exit, false)]);
        assert_eq!(run(Policy::Latency, 0.0, &[(0.69, 0.7)]), [(Stay, false)]);
    }
}
