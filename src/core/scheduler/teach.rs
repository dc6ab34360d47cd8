// SPDX-License-Identifier: Apache-2.0

//! The full model's word on what ramps said, for requests whose thresholds are
//! learned.

use super::{Guess, Scheduler, StepRow};
use crate::core::decision::Decision;
use crate::core::estimate::reliability::bin;
use crate::core::metric::Score;

/// Weight of one token in a request's luck.
const RECENT: f32 = 1.0 / 16.0;
/// Share of its luck that a request loses with each row that is scored: without
/// verdicts, none is left in the end.
const FADE: f32 = 1.0 / 256.0;

impl Scheduler {
    /// Notes what a ramp said of each row that it may learn from, until the full
    /// model has chosen.
    pub(super) fn note(&mut self, after: Option<usize>, ramp: usize) {
        for i in 0..self.rows.len() {
            let row = self.rows[i];
            // What a host refuses, such as what a grammar forbids, says nothing of a ramp.
            if row.gone || row.back > 0 || row.refused || row.score.confidence.is_nan() {
                continue;
            }
            let r = self.requests.get_mut(row.request);
            let Score { confidence, token } = row.score;
            let bin = bin(confidence);
            if r.learns || r.terms.is_some() {
                self.reliability.look(after, ramp, bin);
            }
            if r.learns {
                r.luck -= r.luck * FADE;
                self.looked_at[row.slot as usize] |= 1 << ramp;
                self.guesses[row.slot as usize * self.config.n_ramps() + ramp] =
                    Guess { token, bin };
            }
        }
    }

    /// In a step that ends at the last layer: `token` says what the full model chose
    /// from a row's logits, so that ramps learn from the rows that they held too.
    /// `token` is asked about rows that are no drafts and that the request's drafts
    /// led to; -1: it is not known.
    pub fn teach(&mut self, token: impl Fn(usize) -> i32) {
        if self.learning == 0 {
            return;
        }
        for i in 0..self.rows.len() {
            let row = self.rows[i];
            let own = row.back == 0 && !row.gone && row.decision != Decision::Drop;
            if !own || !self.requests.get(row.request).learns {
                continue;
            }
            let token = token(i);
            if token >= 0 {
                self.judge(row, |guess| Some(guess == token));
            }
        }
    }

    /// The full model's word on a draft, for the ramp that let it out and for those
    /// before that did not: a ramp that is asked about its hardest rows alone would
    /// look worse than it is.
    pub(super) fn judge_draft(&mut self, row: StepRow) {
        if !self.requests.get(row.request).learns {
            return;
        }
        let left_at = self.pending.left_at(row.slot);
        let draft = self.guesses[row.slot as usize * self.config.n_ramps() + left_at].token;
        match row.decision {
            Decision::Accept => self.judge(row, |guess| Some(guess == draft)),
            // What the full model said instead is not known.
            Decision::Replace => self.judge(row, |guess| (guess == draft).then_some(false)),
            _ => {}
        }
    }

    /// The full model has chosen a row's token: `right` says of each token that a ramp
    /// said whether it is that, or `None` where that is not known.
    fn judge(&mut self, row: StepRow, right: impl Fn(i32) -> Option<bool>) {
        let looks = self.looked_at[row.slot as usize];
        let first = row.slot as usize * self.config.n_ramps();
        // One token is one verdict on the request, however many ramps looked at it.
        let weight = RECENT / looks.count_ones().max(1) as f32;
        let r = self.requests.get_mut(row.request);
        for ramp in (0..self.config.n_ramps()).filter(|r| looks >> r & 1 == 1) {
            let Guess { token, bin } = self.guesses[first + ramp];
            let Some(right) = right(token) else { continue };
            let surprise = f32::from(u8::from(right)) - self.reliability.chance(ramp, bin);
            r.luck += weight * (surprise - r.luck);
            self.reliability.judge(ramp, bin, right);
        }
    }
}
