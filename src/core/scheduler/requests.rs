// SPDX-License-Identifier: Apache-2.0

//! Requests: from the first token they have to run to their end.

use super::Scheduler;
use crate::core::NONE;
use crate::core::config::check_threshold;
use crate::core::counters::TimeIn;
use crate::core::error::{Error, Result};
use crate::core::rows::queue::Entry;
use crate::core::rows::requests::{RequestConfig, State};

impl Scheduler {
    pub fn add(&mut self, request: RequestConfig) -> Result<()> {
        if let Some(t) = request.threshold {
            check_threshold("threshold", t)?;
        }
        let quality = self.quality_of(&request)?;
        let fill = request.fill.unwrap_or(self.config.fill_of(quality));
        self.config.check_fill(fill)?;
        let i = self.requests.add(request.id)?;
        let serving = self.serve(&request, quality);
        let mut may_exit = 0;
        for (r, &t) in self.config.thresholds.iter().enumerate() {
            if serving.learns || serving.threshold.unwrap_or(t) <= 1.0 {
                may_exit |= 1 << r;
            }
        }
        let item = self.requests.get_mut(i);
        item.metric = request.metric.unwrap_or(self.config.metric);
        item.learns = serving.learns;
        item.threshold = serving.threshold;
        item.fill = serving.fill;
        item.lossless = serving.lossless;
        item.terms = serving.terms;
        item.deadline_ns = match request.token_deadline_ns {
            0 => self.config.token_deadline_ns,
            ns => ns,
        };
        item.request_deadline_ns = request.request_deadline_ns;
        item.max_tokens = request.max_tokens;
        item.priority = request.priority;
        item.may_exit = may_exit;
        self.count_may_exit(may_exit, true);
        Ok(())
    }

    fn count_may_exit(&mut self, mask: u32, more: bool) {
        for (r, n) in self.may_exit.iter_mut().enumerate() {
            let one = mask >> r & 1;
            *n = if more { *n + one } else { *n - one };
        }
    }

    /// Ramps at which some request alive may exit.
    pub(super) fn allowed(&self) -> u32 {
        let bit = |(r, &n): (usize, &u32)| u32::from(n > 0) << r;
        self.may_exit.iter().enumerate().map(bit).sum()
    }

    /// The request has a token to run from now on.
    pub fn ready(&mut self, id: u64, now_ns: u64) -> Result<()> {
        let i = self.requests.find(id)?;
        let state = self.requests.get(i).state;
        if state != State::Idle {
            return Err(Error::NotIdle {
                id,
                state: state.name(),
            });
        }
        self.tick(now_ns);
        let r = self.requests.get_mut(i);
        if !r.started {
            r.started = true;
            r.started_ns = now_ns;
            r.left_ns = now_ns;
            r.restart(now_ns);
            self.decoding += 1;
            self.frequent += r.habit.index();
            self.fills[r.fill as usize] += 1;
            self.learning += usize::from(r.learns);
            self.agreeing += usize::from(r.terms.is_some());
            self.host_time.began();
        }
        // Before its step is complete, the time since then is its window's.
        if r.in_step == NONE {
            r.spend(TimeIn::Host, now_ns.saturating_sub(r.left_ns));
        }
        r.state = State::Ready;
        let entry = self.entry(i, now_ns);
        self.buffer.push_ready(i, entry);
        Ok(())
    }

    /// For a row that waits from now on.
    fn entry(&mut self, request: u32, now_ns: u64) -> Entry {
        let seq = self.next_seq();
        let r = self.requests.get(request);
        Entry {
            seq,
            since_ns: now_ns,
            due_ns: r.due_ns,
            priority: r.priority,
            plans: self.planner.plans,
        }
    }

    /// Sends an idle request's pending rows on to the last layer, without a
    /// newer one: at its end, or where its K/V must be whole. False: it has
    /// none, and stays idle.
    pub fn settle(&mut self, id: u64, now_ns: u64) -> Result<bool> {
        let i = self.requests.find(id)?;
        let r = self.requests.get(i);
        if r.state != State::Idle {
            return Err(Error::NotIdle {
                id,
                state: r.state.name(),
            });
        }
        let Some(slot) = r.pending.newest() else {
            return Ok(false);
        };
        if r.in_step != NONE {
            return Err(Error::CallOrder(
                "the request's row is in the planned step; expected drex_complete first",
            ));
        }
        self.tick(now_ns);
        let ramp = self.pending.ramp(slot);
        let r = self.requests.get_mut(i);
        r.settling = true;
        r.state = State::Running;
        r.slot = slot;
        self.wait_at(i, ramp, slot, true, now_ns);
        Ok(true)
    }

    /// A row waits at a ramp from now on.
    pub(super) fn wait_at(
        &mut self,
        request: u32,
        ramp: usize,
        slot: u32,
        stay: bool,
        now_ns: u64,
    ) {
        self.requests.get_mut(request).ramp = ramp as u32;
        let entry = self.entry(request, now_ns);
        self.buffer.push(ramp, slot, stay, entry);
    }

    /// Forgets a request, whatever it is doing. A row that is in the planned
    /// step gives its slot back when the step ends.
    pub fn remove(&mut self, id: u64) -> Result<()> {
        let i = self.requests.find(id)?;
        let r = self.requests.get(i);
        let (state, slot, in_step, started) = (r.state, r.slot, r.in_step, r.started);
        let (ramp, may_exit, habit, fill) = (r.ramp, r.may_exit, r.habit, r.fill);
        let (learns, terms, tokens, audited) = (r.learns, r.terms, r.tokens, r.audited);
        let (settling, mut chain) = (r.settling, r.pending);
        let in_step = match in_step {
            NONE => 0..0,
            first => {
                let first = first as usize;
                let its = self.rows[first..].iter().take_while(|r| r.request == i);
                first..first + its.count()
            }
        };
        let own = in_step.end > in_step.start;
        for row in &mut self.rows[in_step.clone()] {
            row.gone = true;
        }
        if state == State::Ready {
            self.buffer.pop_ready(i);
        }
        if !own && slot != NONE {
            debug_assert_ne!(ramp, NONE);
            let stay = state == State::Running;
            if !stay {
                let since = self.buffer.node(slot).since_ns;
                self.counters.wait(self.clock_ns.saturating_sub(since));
            }
            self.buffer.remove(slot, stay);
            if !settling {
                self.buffer.return_slot(slot);
            }
        }
        while let Some(slot) = self.pending.pop(&mut chain) {
            // Rows in the step give their slots back with it.
            if self.rows[in_step.clone()].iter().all(|r| r.slot != slot) {
                self.buffer.return_slot(slot);
            }
        }
        if started {
            self.decoding -= 1;
            self.frequent -= habit.index();
            self.fills[fill as usize] -= 1;
            self.learning -= usize::from(learns);
            self.agreeing -= usize::from(terms.is_some());
        }
        if let Some(terms) = terms {
            self.agreement.end(terms, tokens, audited);
        }
        self.count_may_exit(may_exit, false);
        self.requests.remove(i);
        Ok(())
    }
}
