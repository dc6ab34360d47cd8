// SPDX-License-Identifier: Apache-2.0

//! The verdicts of a ramp, or of the full model, on each row.

use super::{Agrees, Engine, Step, StepRow};
use crate::core::config::Fill;
use crate::core::error::{Error, Result};
use crate::core::metric::Score;
use crate::core::policy::{Decision, RampRow};
use crate::core::request::State;
use crate::core::{NONE, policy};

impl Engine {
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

    fn check_rows(&self, n_rows: usize, why: &'static str) -> Result<()> {
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

    /// How a row stands at a ramp before anything is decided.
    fn ramp_row(&self, ramp: usize, row: &StepRow, score: &Score) -> RampRow {
        let aside = row.gone || row.back > 0;
        let only_meets = self.step.is_some_and(|s| s.only_meets);
        let threshold = if aside || only_meets {
            f32::INFINITY
        } else {
            let own = self.requests.get(row.request).threshold;
            own.unwrap_or(self.config.thresholds[ramp])
        };
        RampRow {
            confidence: score.confidence,
            threshold,
            gone: aside,
            decision: Decision::Gone,
            forced: false,
        }
    }

    /// Lowers the confidence of rows that would exit with a token that `may`
    /// refuses, to the greatest that is not sufficient.
    pub fn confirm(&self, scores: &mut [Score], may: impl Fn(u32, i32) -> bool) -> Result<()> {
        let ramp = self.expect_ramp()?;
        for (i, (row, score)) in self.rows.iter().zip(scores).enumerate() {
            let own = self.ramp_row(ramp, row, score);
            if own.confident() && !may(i as u32, score.token) {
                score.confidence = own.threshold.next_down();
            }
        }
        Ok(())
    }

    /// Decides every row of the planned step; the verdicts are in
    /// [`Engine::step_rows`].
    pub fn ramp(&mut self, scores: &[Score]) -> Result<()> {
        let ramp = self.expect_ramp()?;
        self.check_rows(scores.len(), "every planned row has one row of logits")?;
        self.ramp_rows.clear();
        for (row, score) in self.rows.iter().zip(scores) {
            let own = self.ramp_row(ramp, row, score);
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
        let mut sorter = self.exits.sorter(after, ramp);
        let decided = self.ramp_rows.iter().zip(scores);
        for (row, (own, score)) in self.rows.iter_mut().zip(decided) {
            let (mut decision, mut forced) = (own.decision, own.forced);
            if row.gone || row.back > 0 {
                if !row.gone {
                    decision = Decision::Pending;
                    self.pending.advance(row.slot, ramp);
                }
                row.decision = decision;
                row.score = Score::NONE;
                continue;
            }
            let r = self.requests.get_mut(row.request);
            if decision == Decision::Exit && r.fill.keeps() {
                if self.pending.full() || r.pending.len() >= self.config.pending() {
                    // No room to stay pending: it goes deep now, and takes
                    // the others along.
                    decision = self.config.policy.otherwise();
                    forced = own.confident();
                } else {
                    self.pending.push(&mut r.pending, row.slot, ramp);
                }
            }
            row.decision = decision;
            row.forced = forced;
            row.score = *score;
            if own.may_exit() && !own.confidence.is_nan() {
                let (exits, kind) = (own.confident(), r.kind.index());
                sorter.look(&mut r.kind, exits);
                self.often = self.often + r.kind.index() - kind;
            }
            r.last_confidence = score.confidence;
            self.counters.nonfinite_rows += u64::from(score.confidence.is_nan());
            match decision {
                Decision::Exit => {
                    r.state = State::Idle;
                    r.slot = NONE;
                    // A draft becomes a token when it is verified.
                    let token = u64::from(r.fill != Fill::Verify);
                    r.tokens += token;
                    r.exits[ramp] += 1;
                    r.involuntary_exits += u64::from(forced);
                    self.counters.tokens += token;
                    self.counters.exits[ramp] += 1;
                    self.counters.involuntary_exits += u64::from(forced);
                }
                Decision::Hold => {
                    r.state = State::Held;
                    r.ramp = ramp as u32;
                    r.involuntary_stays += u32::from(forced);
                    self.counters.involuntary_stays += u64::from(forced);
                }
                Decision::Stay => {
                    r.involuntary_stays += u32::from(forced);
                    self.counters.involuntary_stays += u64::from(forced);
                }
                _ => {}
            }
        }
        self.exits.observe_sorted(after, ramp, &sorter);
        self.ramped = true;
        Ok(())
    }

    /// Whether [`Engine::verify`] may be called now, with so many rows.
    pub fn expect_verify(&self, n_rows: usize) -> Result<()> {
        match &self.step {
            None => {
                return Err(Error::CallOrder(
                    "no step is planned; expected drex_plan first",
                ));
            }
            Some(step) if step.ramp.is_some() => {
                return Err(Error::CallOrder(
                    "the planned window ends at a ramp; expected drex_ramp",
                ));
            }
            Some(_) if self.verified => {
                return Err(Error::CallOrder(
                    "the planned step is verified; expected drex_complete",
                ));
            }
            Some(_) => {}
        }
        self.check_rows(n_rows, "every planned row has one answer")
    }

    /// In a step that ends at the last layer: `agrees` says of a row whether
    /// the full model's token is the one that it emitted as a draft. It is
    /// asked about drafts only, and not about those after one that does not
    /// stand. The verdicts are in [`Engine::step_rows`].
    pub fn verify(
        &mut self,
        n_rows: usize,
        mut agrees: impl FnMut(usize) -> Result<Agrees>,
    ) -> Result<()> {
        self.expect_verify(n_rows)?;
        // A request's rows stand together, the oldest first. What follows one
        // that was replaced, or that ends the request, is void. Verdicts of a
        // call that fails mean nothing, and nobody looks at them.
        let mut replaced = NONE;
        for (i, row) in self.rows.iter_mut().enumerate() {
            row.decision = if row.gone {
                Decision::Gone
            } else if replaced == row.request {
                Decision::Drop
            } else if !row.is_draft() {
                if row.back > 0 {
                    Decision::Pending
                } else {
                    Decision::Exit
                }
            } else {
                let agrees = agrees(i)?;
                if agrees != Agrees::Yes {
                    replaced = row.request;
                }
                match agrees {
                    Agrees::No => Decision::Replace,
                    Agrees::Yes | Agrees::AndEnds => Decision::Accept,
                }
            };
        }
        self.verified = true;
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
