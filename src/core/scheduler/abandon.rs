// SPDX-License-Identifier: Apache-2.0

//! The end of a step that failed: its rows go back to where they were.

use super::{Origin, Scheduler, Step};
use crate::core::NONE;
use crate::core::config::Fill;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};
use crate::core::rows::requests::State;

impl Scheduler {
    /// The planned step failed: its rows go back to where they were, as if it
    /// had not been planned. Rows that a ramp already let out have given
    /// their token, and stay out. Its prompt rows are forgotten: the host
    /// starts them again.
    pub fn abandon(&mut self) -> Result<()> {
        let Some(step) = self.step else {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        };
        for k in 0..self.rows.len() {
            self.take_back(k, &step);
        }
        self.put_back();
        if !self.rows.is_empty() {
            self.planner.uncount(&mut self.buffer, step.choice);
        }
        self.end_step();
        Ok(())
    }

    /// Takes the ramp's verdict on a row back, but for an exit: that ends here.
    fn take_back(&mut self, k: usize, step: &Step) {
        let row = self.rows[k];
        let clock = self.clock_ns;
        // Verdicts on requests that went away since included.
        let undone = self.ramped && matches!(row.decision, Decision::Hold | Decision::Stay);
        let forced = u64::from(undone && row.forced);
        if undone {
            self.counters.involuntary_stays -= forced;
            self.counters.nonfinite_rows -= u64::from(row.score.confidence.is_nan());
        }
        if row.gone {
            return;
        }
        // Rows that came along stay where a newer one has left: it may not
        // wait deeper than they do. Else they go back as well.
        if let (true, false, Some(after)) = (row.back > 0, self.newer_left(k), step.after()) {
            self.pending.advance(row.slot, after);
        }
        let r = self.requests.get_mut(row.request);
        r.involuntary_stays -= forced as u32;
        if self.ramped && row.decision == Decision::Exit {
            r.in_step = NONE;
            r.left_ns = clock;
            self.count_wait(row, step.now_ns);
            if row.fill != Fill::Verify {
                self.emitted(row.request, clock);
            }
        }
    }

    /// Rows that did not leave go back to where they were, the last first: so
    /// queues and free slots are what they were, too.
    pub(super) fn put_back(&mut self) {
        for k in (0..self.rows.len()).rev() {
            let row = self.rows[k];
            let left = self.ramped && row.decision == Decision::Exit;
            if row.gone || left && !row.fill.keeps() {
                self.buffer.return_slot(row.slot);
            }
            if row.gone || left {
                continue;
            }
            let r = self.requests.get_mut(row.request);
            r.in_step = NONE;
            match row.origin {
                Origin::Ready => {
                    r.state = State::Ready;
                    r.slot = NONE;
                    r.ramp = NONE;
                    self.buffer.return_slot(row.slot);
                    self.buffer.restore_ready(row.request);
                }
                Origin::Held(ramp) => {
                    r.ramp = ramp as u32;
                    r.state = State::Held;
                    self.buffer.restore(ramp, row.slot, false);
                }
                Origin::Stay(ramp) => {
                    r.ramp = ramp as u32;
                    // The ramp may have wanted it held.
                    r.state = State::Running;
                    self.buffer.restore(ramp, row.slot, true);
                }
                Origin::Pending => {}
            }
        }
    }

    /// The own row of the request whose pending row is the `k`-th has left.
    fn newer_left(&self, k: usize) -> bool {
        let request = self.rows[k].request;
        let its = self.rows[k..].iter().take_while(|r| r.request == request);
        self.ramped && its.last().is_some_and(|r| r.decision == Decision::Exit)
    }
}
