// SPDX-License-Identifier: Apache-2.0

//! The next window, and its rows.

use super::{Engine, Origin, Step, StepRow};
use crate::core::counters::Reason;
use crate::core::error::{Error, Result};
use crate::core::metric::Score;
use crate::core::planner::{Choice, Marks, View};
use crate::core::policy::{Decision, Policy};
use crate::core::request::State;
use crate::core::routing::{Stop, best_stop};
use crate::core::{MAX_RAMPS, NONE};

impl Engine {
    /// Chooses the next window and at most `capacity` rows for it. `None`:
    /// there is nothing to run.
    pub fn plan(&mut self, now_ns: u64, capacity: usize) -> Result<Option<Step>> {
        if self.step.is_some() {
            return Err(Error::CallOrder(
                "a step is planned already; expected drex_complete or drex_abandon first",
            ));
        }
        if capacity == 0 {
            return Err(Error::Capacity {
                field: "capacity",
                value: 0,
                need: 1,
                why: "rows must have room for max_batch rows, or a step is cut short",
            });
        }
        self.tick(now_ns);
        self.rows.clear();
        self.ramped = false;
        self.verified = false;

        let marks = Marks::new(&self.config, self.decoding, self.auto.rule());
        let mut view = View {
            config: &self.config,
            buffer: &mut self.buffer,
            cost: &self.cost,
            marks,
            rows_each: 1.0 + f64::from(self.pending.total()) / self.decoding.max(1) as f64,
        };
        let room = self.config.pass_rows().min(capacity);
        let mut limit = self.config.batch().min(capacity);
        let choice = self.planner.choose(&mut view, now_ns, limit);
        let (after, reason) = match choice {
            Choice::Nothing => {
                self.gaps.idle();
                return Ok(None);
            }
            Choice::Ready => {
                limit = limit.min(view.buffer.free_slots());
                (None, Reason::None)
            }
            Choice::Flush(ramp, reason) => (Some(ramp), reason),
        };
        let first = after.map_or(0, |r| r + 1);
        let mut may_exit = 0;
        // Where pending rows wait that must not be passed.
        let mut barrier = None;
        let mut short = 0;
        for &handle in self.planner.pick(&mut view, choice, now_ns, limit) {
            let (request, mut slot) = view.buffer.owner(handle);
            let r = self.requests.get_mut(request);
            let chain = r.pending;
            let along = match after {
                Some(ramp) if !chain.is_empty() => self.pending.at(&chain, ramp),
                _ => 0,
            };
            let rows = along + u32::from(!r.settling);
            if short > 0 || self.rows.len() + rows as usize > room {
                // Back to where it was: it comes first next time.
                match after {
                    None => view.buffer.restore_ready(request),
                    Some(ramp) => view.buffer.restore(ramp, slot, r.state == State::Running),
                }
                short = short.max(rows);
                continue;
            }
            let origin = match after {
                None => {
                    // `limit` was cut to the free slots.
                    slot = view.buffer.take_slot(request).unwrap_or(NONE);
                    Origin::Ready
                }
                Some(ramp) if r.state == State::Running => Origin::Stay(ramp),
                Some(ramp) => Origin::Held(ramp),
            };
            r.state = State::Running;
            r.ramp = NONE;
            r.slot = slot;
            r.in_step = self.rows.len() as u32;
            r.step_rows = rows;
            may_exit |= if r.settling { 0 } else { r.may_exit };
            let row = StepRow {
                request,
                id: r.id,
                slot,
                back: 0,
                fill: r.fill,
                gone: false,
                decision: Decision::Stay,
                forced: false,
                score: Score::NONE,
                origin,
            };
            if !chain.is_empty() {
                let stop = self.pending.stop(&chain, first);
                barrier = [barrier, stop].into_iter().flatten().min();
                let older = self.pending.iter(&chain).enumerate();
                for (k, slot) in older.skip((chain.len() - along) as usize) {
                    let back = chain.len() - k as u32;
                    let last = r.settling && back == 1;
                    self.rows.push(StepRow {
                        slot,
                        back,
                        decision: Decision::Pending,
                        origin: if last { origin } else { Origin::Pending },
                        ..row
                    });
                }
            }
            if !r.settling {
                self.rows.push(row);
            }
        }
        if self.rows.is_empty() && short > 0 {
            return Err(Error::Capacity {
                field: "capacity",
                value: capacity as u64,
                need: short.into(),
                why: "the pending rows of a request run in one window; give max_batch",
            });
        }
        if self.rows.is_empty() {
            return Ok(None);
        }
        self.gaps.resume(now_ns);

        // The window ends at the first ramp that is looked at and where one
        // of its rows may exit: any other is not worth its head.
        let ramps = &self.config.ramp_layers;
        let begin = after.map_or(0, |r| ramps[r]);
        let looked_at = marks.ramps & may_exit;
        let stop = (first..ramps.len()).find(|&r| looked_at & (1 << r) != 0);
        let stop = self.route(marks, begin, first, stop);
        let stop = [stop, barrier].into_iter().flatten().min();
        let ramps = &self.config.ramp_layers;
        let step = Step {
            layer_begin: begin,
            layer_end: stop.map_or(self.config.n_layers, |r| ramps[r]),
            ramp: stop,
            reason,
            now_ns,
            after,
            only_meets: stop.is_some_and(|r| looked_at >> r & 1 == 0),
        };
        self.last_rows = self.rows.len() as u32;
        self.step = Some(step);
        Ok(Some(step))
    }

    /// Under `auto`, once costs and rules are known, the stop that is best for
    /// these rows; probes look where they are told to.
    fn route(
        &mut self,
        marks: Marks,
        begin: u32,
        first: usize,
        stop: Option<usize>,
    ) -> Option<usize> {
        if self.config.policy != Policy::Auto || !self.config.routing || !self.auto.settled() {
            return stop;
        }
        let mut stops = [Stop { ramp: 0, stay: 0.0 }; MAX_RAMPS];
        let mut n = 0;
        for ramp in stop?..self.config.n_ramps() {
            if marks.ramps >> ramp & 1 == 0 {
                continue;
            }
            let after = first.checked_sub(1);
            let share = self.exits.chance(after, ramp).p;
            let mut stay = self.rows.len() as f64;
            for row in &self.rows {
                let r = self.requests.get(row.request);
                if r.may_exit >> ramp & 1 == 1 {
                    stay -= self.routing.chance(&r.recent, ramp, share);
                }
            }
            stops[n] = Stop { ramp, stay };
            n += 1;
        }
        let config = &self.config;
        let (rows, flush) = (
            self.rows.len() as u32,
            marks.hold_rows.min(config.batch() as u32),
        );
        let best = best_stop(
            &self.cost,
            begin,
            &config.ramp_layers,
            config.n_layers,
            rows,
            flush,
            &stops[..n],
        );
        self.routing.passed += u64::from(best != stop);
        best
    }

    /// Windows that passed a ramp because their rows were unlikely to exit.
    pub fn routed(&self) -> u64 {
        self.routing.passed
    }
}
