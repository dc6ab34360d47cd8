// SPDX-License-Identifier: Apache-2.0

//! The end of a step that ran: its rows go where they were sent.

use super::{Origin, Scheduler, Step, StepRow};
use crate::core::NONE;
use crate::core::config::{Fill, Policy};
use crate::core::counters::TimeIn;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};
use crate::core::estimate::prompts::Transit;
use crate::core::policy::auto::Load;
use crate::core::rows::requests::State;

impl Scheduler {
    /// The planned step, if [`Scheduler::complete`] would end it.
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
        self.count_step(&step, duration_ns);
        self.learn_step(&step, duration_ns, cells);
        self.pass_prompts_on(&step);
        for k in 0..self.rows.len() {
            let row = self.rows[k];
            self.count_wait(row, step.now_ns);
            if row.gone {
                self.buffer.return_slot(row.slot);
                continue;
            }
            let r = self.requests.get_mut(row.request);
            r.in_step = NONE;
            r.left_ns = now_ns;
            match (row.back, step.ramp) {
                (0, None) => self.end_of_token(row, now_ns),
                (0, Some(ramp)) => self.leave_ramp(row, ramp, now_ns),
                (_, None) => self.end_of_pending(row, now_ns),
                (_, Some(ramp)) => self.pending_goes_on(row, ramp, now_ns),
            }
        }
        let held = u64::from(self.buffer.held());
        self.counters.held_rows_max = self.counters.held_rows_max.max(held);
        let tokens = self.counters.tokens - self.host_time.tokens;
        self.host_time.pause(now_ns, self.counters.tokens);
        self.prompts.made(tokens);
        self.end_step();
        if self.config.policy == Policy::Auto {
            self.tell_auto(tokens, duration_ns);
        }
        Ok(())
    }

    fn count_step(&mut self, step: &Step, duration_ns: u64) {
        let c = &mut self.counters;
        // 0 is "unknown", and no short window.
        if duration_ns > 0 {
            c.window(duration_ns);
        }
        c.steps += 1;
        c.step_rows += self.rows.len() as u64;
        c.prompt_steps += u64::from(step.prompt_rows > 0);
        c.prompt_rows += u64::from(step.prompt_rows);
        c.flushes[step.reason as usize] += 1;
    }

    /// Learns what the window took, and how many prompt rows come.
    fn learn_step(&mut self, step: &Step, duration_ns: u64, cells: u64) {
        self.cost.observe(
            step.layer_begin,
            step.layer_end,
            self.rows.len() as u32,
            cells,
            step.prompt_rows,
            duration_ns,
        );
        if step.prompt_rows > 0 && step.layer_begin == 0 {
            self.prompts.ran(step.prompt_rows);
        }
    }

    /// Prompt rows that ran to a ramp are on their way to the next window.
    fn pass_prompts_on(&mut self, step: &Step) {
        let rows = step.prompt_rows;
        if rows > 0 {
            self.prompts.transit = step.ramp.map(|ramp| Transit { ramp, rows });
        }
    }

    fn tell_auto(&mut self, tokens: u64, duration_ns: u64) {
        let load = Load {
            requests: self.decoding as u32,
            frequent: self.frequent as u32,
            prompt_rows: self.prompts.per_token(),
            chunk: self.prompts.chunk(),
            gap_ns: self.host_time.gap_ns(),
            prompt_ns: self.host_time.prompt_ns_per_token(),
            keeping: self.share_keeping(),
            verifying: self.share_of(Fill::Verify),
            learning: self.learning as f64 / self.decoding.max(1) as f64,
            done: self.held_share(),
        };
        let allowed = self.allowed();
        let (auto, known) = self.auto_and_known();
        auto.step(tokens, duration_ns, load, allowed, known);
        if !self.host_replans {
            self.replan_beside(duration_ns);
        }
    }

    /// Counts how long a row waited until its step was planned.
    pub(super) fn count_wait(&mut self, row: StepRow, planned_ns: u64) {
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
            r.spend(TimeIn::Held, ns);
        } else if row.origin == Origin::Ready {
            r.spend(TimeIn::Queue, ns);
        }
    }

    /// A pending row waits at a ramp further on.
    fn pending_goes_on(&mut self, row: StepRow, ramp: usize, now_ns: u64) {
        if row.origin != Origin::Pending {
            self.wait_at(row.request, ramp, row.slot, true, now_ns);
        }
    }

    /// A pending row has been through the last layer.
    fn end_of_pending(&mut self, row: StepRow, now_ns: u64) {
        let ramp = self.pending.left_at(row.slot);
        self.acceptance.observe(ramp, row.decision);
        self.judge_draft(row);
        let r = self.requests.get_mut(row.request);
        let slot = self.pending.pop(&mut r.pending);
        debug_assert_eq!(slot, Some(row.slot));
        if row.origin != Origin::Pending {
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
    }

    /// A request's own row has been through the last layer.
    fn end_of_token(&mut self, row: StepRow, now_ns: u64) {
        self.buffer.return_slot(row.slot);
        let r = self.requests.get_mut(row.request);
        r.state = State::Idle;
        r.slot = NONE;
        if row.decision == Decision::Drop {
            self.counters.dropped += 1;
            return;
        }
        r.tokens += 1;
        self.counters.tokens += 1;
        self.emitted(row.request, now_ns);
    }

    /// A request's own row is out at a ramp, or waits there.
    fn leave_ramp(&mut self, row: StepRow, ramp: usize, now_ns: u64) {
        if row.decision != Decision::Exit {
            let stay = row.decision == Decision::Stay;
            return self.wait_at(row.request, ramp, row.slot, stay, now_ns);
        }
        if !row.fill.keeps() {
            self.buffer.return_slot(row.slot);
        }
        if row.fill != Fill::Verify {
            self.emitted(row.request, now_ns);
        }
    }

    /// A token of the request is out.
    pub(super) fn emitted(&mut self, request: u32, now_ns: u64) {
        let r = self.requests.get_mut(request);
        if r.due_ns > 0 && now_ns > r.due_ns {
            let all = now_ns.saturating_sub(r.last_token_ns);
            let spent = r.spent_ns.iter().fold(0, |a, &ns| ns.saturating_add(a));
            r.deadline_misses += 1;
            self.counters.deadline_misses += 1;
            let mut reason = TimeIn::Run as usize;
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

    pub(super) fn end_step(&mut self) {
        self.step = None;
        self.ramped = false;
        self.verified = false;
        self.rows.clear();
    }
}
