// SPDX-License-Identifier: Apache-2.0

//! The verdicts of a ramp on each row.

use super::{Scheduler, Step, StepRow};
use crate::core::config::Fill;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};
use crate::core::estimate::reliability;
use crate::core::metric::Score;
use crate::core::policy;
use crate::core::policy::RampRow;
use crate::core::policy::rule::RowRule;
use crate::core::rows::requests::Request;

impl Scheduler {
    /// The ramp of the planned step, if it is time for its verdicts.
    pub fn expect_ramp(&self) -> Result<usize> {
        let Some(step) = &self.step else {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        };
        let Some(ramp) = step.ramp else {
            return Err(Error::CallOrder(
                "the planned window ends at the last layer, where there is no ramp; expected \
                 drex_complete",
            ));
        };
        if self.ramped {
            return Err(Error::CallOrder(
                "the planned step has had its verdicts; expected drex_fill or drex_complete",
            ));
        }
        Ok(ramp)
    }

    pub(super) fn check_rows(&self, n_rows: usize, why: &'static str) -> Result<()> {
        if n_rows == self.rows.len() {
            return Ok(());
        }
        Err(Error::Conflict {
            field: "n_rows",
            index: None,
            value: n_rows as u64,
            other: "the planned step's n_rows",
            other_value: self.rows.len() as u64,
            why,
        })
    }

    /// A row's standing at a ramp before anything is decided.
    fn ramp_row(&self, rule: RowRule, ramp: usize, row: &StepRow, score: &Score) -> RampRow {
        let aside = row.gone || row.back > 0;
        let nobody_exits = self.step.is_some_and(|s| s.nobody_exits);
        let threshold = if aside || nobody_exits {
            f32::INFINITY
        } else {
            let r = self.requests.get(row.request);
            match r.learns {
                true => self.learned_threshold(rule, ramp, r),
                false => r.threshold.unwrap_or(self.config.thresholds[ramp]),
            }
        };
        RampRow {
            confidence: score.confidence,
            threshold,
            gone: aside,
            decision: Decision::Gone,
            forced: false,
        }
    }

    /// The confidence from which a draft of the request is worth making, where all
    /// before it must stand too; above 1 where none is.
    fn learned_threshold(&self, rule: RowRule, ramp: usize, r: &Request) -> f32 {
        if rule.drafts.is_some_and(|most| r.pending.len() >= most) {
            return f32::INFINITY;
        }
        let chance = rule.survival / r.survival() - r.known_luck();
        let floor = self.reliability.floor(ramp, chance);
        floor.unwrap_or(f32::INFINITY)
    }

    /// Lowers the confidence of rows that would exit with a token that `may`
    /// refuses, to the greatest that is not sufficient.
    pub fn confirm(&mut self, scores: &mut [Score], may: impl Fn(u32, i32) -> bool) -> Result<()> {
        let ramp = self.expect_ramp()?;
        let rule = self.row_rule();
        for (i, score) in scores.iter_mut().enumerate().take(self.rows.len()) {
            let own = self.ramp_row(rule, ramp, &self.rows[i], score);
            self.rows[i].refused = own.confident() && !may(i as u32, score.token);
            if self.rows[i].refused {
                score.confidence = own.threshold.next_down();
            }
        }
        Ok(())
    }

    /// Decides every row of the planned step; the verdicts are in
    /// [`Scheduler::step_rows`].
    pub fn ramp(&mut self, scores: &[Score]) -> Result<()> {
        let ramp = self.expect_ramp()?;
        self.check_rows(scores.len(), "every planned row has one row of logits")?;
        self.ramp_rows.clear();
        let rule = self.row_rule();
        for (row, score) in self.rows.iter().zip(scores) {
            let own = self.ramp_row(rule, ramp, row, score);
            self.ramp_rows.push(own);
        }
        let ratio = self.ratio_at(ramp).unwrap_or(0.0);
        policy::decide(
            self.config.policy,
            ratio,
            &mut self.ramp_rows,
            &mut self.scratch,
        );
        let after = self.step.as_ref().and_then(Step::after);
        let nobody_exits = self.step.is_some_and(|s| s.nobody_exits);
        let mut sorter = self.exit_rates.sorter(after, ramp);
        let decided = self.ramp_rows.iter().zip(scores);
        for (row, (own, score)) in self.rows.iter_mut().zip(decided) {
            if row.back > 0 && !row.gone {
                self.pending.advance(row.slot, ramp);
                row.decision = Decision::Pending;
            } else {
                row.decision = own.decision;
            }
            if row.gone || row.back > 0 {
                row.score = Score::NONE;
                continue;
            }
            let r = self.requests.get_mut(row.request);
            row.forced = own.forced;
            row.score = *score;
            let looked = !own.confidence.is_nan() && (own.may_exit() || r.learns);
            if own.decision == Decision::Exit && r.fill.keeps() {
                if self.pending.full() || r.pending.len() >= self.config.pending() {
                    // No room to stay pending: it goes deep now, and takes
                    // the others along.
                    row.decision = self.config.policy.otherwise();
                    row.forced = own.confident();
                } else {
                    if r.learns {
                        let bin = reliability::bin(score.confidence);
                        let chance = self.reliability.chance(ramp, bin) + r.known_luck();
                        r.survival = r.survival() * chance.clamp(0.0, 1.0);
                    }
                    self.pending.push(&mut r.pending, row.slot, ramp);
                }
            }
            if looked && !nobody_exits {
                let before = r.habit.index();
                sorter.look(&mut r.habit, own.confident());
                self.frequent = self.frequent + r.habit.index() - before;
            }
            r.decided(row.decision, ramp, row.forced, score.confidence);
            // A draft becomes a token when it is verified.
            let token = r.fill != Fill::Verify;
            self.counters.decided(row.decision, ramp, row.forced, token);
            self.counters.nonfinite_rows += u64::from(score.confidence.is_nan());
        }
        self.exit_rates.observe_sorted(after, ramp, &sorter);
        if self.learning > 0 || self.agreeing > 0 {
            self.note(after, ramp);
        }
        self.ramped = true;
        Ok(())
    }

    fn ratio_at(&self, ramp: usize) -> Option<f64> {
        self.config.art_ratio.map(f64::from).or_else(|| {
            let layer = self.config.ramp_layers[ramp];
            let rows = self.rows.len() as u32;
            let ratio = self.cost.art_ratio(layer, rows)?;
            // A row that stays pending saves only its part of what a deep
            // pass costs without rows, and nothing if it was a wrong draft.
            let per_row = self.cost.share_per_row(layer, rows)?;
            let wrong = self.share_of(Fill::Verify) * (1.0 - self.acceptance.chance(ramp));
            let saved = (1.0 - self.share_keeping() * per_row) * (1.0 - wrong);
            Some(ratio / saved.max(1e-3))
        })
    }
}
