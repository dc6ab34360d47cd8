// SPDX-License-Identifier: Apache-2.0

//! The end of a step: its rows go where they were sent, or back.

use super::{Engine, Origin, Step, StepRow};
use crate::core::NONE;
use crate::core::auto::Load;
use crate::core::config::Fill;
use crate::core::counters::Miss;
use crate::core::error::{Error, Result};
use crate::core::policy::{Decision, Policy};
use crate::core::prompts::Transit;
use crate::core::request::State;

impl Engine {
    /// The planned step, if [`Engine::complete`] would end it.
    pub fn expect_complete(&self) -> Result<Step> {
        let Some(step) = self.step else {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        };
        if step.ramp.is_some() && !self.ramped && !self.rows.is_empty() {
            return Err(Error::CallOrder(
                "the planned window ends at a ramp; expected drex_ramp first",
            ));
        }
        if step.ramp.is_none() && !self.verified && self.rows.iter().any(StepRow::is_draft) {
            return Err(Error::CallOrder(
                "the planned step has drafts; expected drex_verify first",
            ));
        }
        Ok(step)
    }

    /// The planned step ran: its rows go where they were sent.
    pub fn complete(&mut self, now_ns: u64, duration_ns: u64, cells: u64) -> Result<()> {
        let step = self.expect_complete()?;
        self.tick(now_ns);
        // 0 is "unknown", and no short window.
        if duration_ns > 0 {
            self.counters.window(duration_ns);
        }
        self.cost.observe_mixed(
            step.layer_begin,
            step.layer_end,
            self.rows.len() as u32,
            cells,
            step.prompt_rows,
            duration_ns,
        );
        if step.prompt_rows > 0 {
            let rows = step.prompt_rows;
            self.counters.prompt_steps += 1;
            self.counters.prompt_rows += u64::from(rows);
            self.prompts.transit = step.ramp.map(|ramp| Transit { ramp, rows });
            if step.layer_begin == 0 {
                self.prompts.ran(rows);
            }
        }
        self.counters.steps += 1;
        self.counters.step_rows += self.rows.len() as u64;
        self.counters.flushes[step.reason as usize] += 1;

        for k in 0..self.rows.len() {
            let row = self.rows[k];
            self.count_wait(row, step.now_ns);
            if !row.gone {
                let r = self.requests.get_mut(row.request);
                r.in_step = NONE;
                r.left_ns = now_ns;
            }
            self.leave(row, step.ramp, now_ns);
        }
        let held = u64::from(self.buffer.held());
        self.counters.held_rows_max = self.counters.held_rows_max.max(held);
        let tokens = self.counters.tokens - self.gaps.tokens;
        self.gaps.pause(now_ns, self.counters.tokens);
        self.prompts.made(tokens);
        self.end_step();
        if self.config.policy == Policy::Auto {
            let load = Load {
                requests: self.decoding as u32,
                often: self.often as u32,
                prompt_rows: self.prompts.per_token(),
                chunk: self.prompts.chunk(),
                gap_ns: self.gaps.gap_ns(),
                prompt_ns: self.gaps.prompt_ns_per_token(),
                keeping: self.share_keeping(),
                verifying: self.share_of(Fill::Verify),
                done: self.held_share(),
            };
            let allowed = self.allowed();
            let (auto, known) = self.auto_and_known();
            auto.step(tokens, duration_ns, load, allowed, known);
            if !self.host_replans {
                self.replan_beside(duration_ns);
            }
        }
        Ok(())
    }

    /// Counts how long a row waited until its step was planned.
    fn count_wait(&mut self, row: StepRow, planned_ns: u64) {
        let ns = planned_ns.saturating_sub(row.since_ns);
        let held = matches!(row.origin, Origin::Held(_));
        if held {
            self.counters.wait(ns);
        }
        if row.gone {
            return;
        }
        let r = self.requests.get_mut(row.request);
        if held {
            r.held_ns = r.held_ns.saturating_add(ns);
            r.spend(Miss::Held, ns);
        } else if row.origin == Origin::Ready {
            r.spend(Miss::Queue, ns);
        }
    }

    /// Where a row goes when its window has run.
    fn leave(&mut self, row: StepRow, ramp: Option<usize>, now_ns: u64) {
        if row.gone {
            return self.buffer.return_slot(row.slot);
        }
        let r = self.requests.get_mut(row.request);
        if row.back > 0 {
            let settled = row.origin != Origin::Pending;
            if let Some(ramp) = ramp {
                // The row stays pending, further on.
                if settled {
                    self.wait_at(row.request, ramp, row.slot, true, now_ns);
                }
                return;
            }
            let left = self.pending.left(row.slot);
            self.acceptance.observe(left, row.decision);
            let slot = self.pending.pop(&mut r.pending);
            debug_assert_eq!(slot, Some(row.slot));
            if settled {
                r.settling = false;
                r.state = State::Idle;
                r.slot = NONE;
            }
            self.buffer.return_slot(row.slot);
            let emits = row.decision.emits();
            r.tokens += u64::from(emits);
            let c = &mut self.counters;
            c.rows_filled += u64::from(row.decision != Decision::Drop);
            c.tokens += u64::from(emits);
            c.drafts += u64::from(emits);
            c.accepted += u64::from(row.decision == Decision::Accept);
            c.dropped += u64::from(row.decision == Decision::Drop);
            if emits {
                self.emitted(row.request, now_ns);
            }
            return;
        }
        match (ramp, row.decision) {
            (None, decision) => {
                self.buffer.return_slot(row.slot);
                r.state = State::Idle;
                r.slot = NONE;
                if decision == Decision::Drop {
                    self.counters.dropped += 1;
                    return;
                }
                r.tokens += 1;
                self.counters.tokens += 1;
                self.emitted(row.request, now_ns);
            }
            (Some(_), Decision::Exit) => {
                if !row.fill.keeps() {
                    self.buffer.return_slot(row.slot);
                }
                if row.fill != Fill::Verify {
                    self.emitted(row.request, now_ns);
                }
            }
            (Some(ramp), decision) => {
                let stay = decision == Decision::Stay;
                self.wait_at(row.request, ramp, row.slot, stay, now_ns);
            }
        }
    }

    /// A token of the request is out.
    fn emitted(&mut self, request: u32, now_ns: u64) {
        let r = self.requests.get_mut(request);
        if r.due_ns > 0 && now_ns > r.due_ns {
            let all = now_ns.saturating_sub(r.last_token_ns);
            let spent = r.spent_ns.iter().fold(0, |a, &ns| ns.saturating_add(a));
            r.deadline_misses += 1;
            self.counters.deadline_misses += 1;
            let mut reason = Miss::Run as usize;
            let mut most = all.saturating_sub(spent);
            for (i, &ns) in r.spent_ns.iter().enumerate() {
                if ns > most {
                    (reason, most) = (i, ns);
                }
            }
            self.counters.misses[reason] += 1;
        }
        r.restart(now_ns);
        if r.state == State::Ready {
            // Made ready before its step was complete: the deadline of its
            // next token starts here.
            self.buffer.set_ready_due(request, r.due_ns);
        }
    }

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

    fn end_step(&mut self) {
        self.step = None;
        self.ramped = false;
        self.verified = false;
        self.rows.clear();
    }
}
