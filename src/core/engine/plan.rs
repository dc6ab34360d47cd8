// SPDX-License-Identifier: Apache-2.0

//! The next window, and its rows.

use super::{Engine, Origin, Step, StepRow};
use crate::core::carrier::{Riders, Ways};
use crate::core::config::Fill;
use crate::core::counters::Reason;
use crate::core::error::{Error, Result};
use crate::core::metric::Score;
use crate::core::planner::{Carrier, Choice, Marks, View};
use crate::core::policy::{Decision, Policy};
use crate::core::request::State;
use crate::core::routing::{Stop, best_stop};
use crate::core::{MAX_RAMPS, NONE};

impl Engine {
    /// Chooses the next window and at most `capacity` decode rows for it, where
    /// `n_prompts` prompt rows wait at layer 0. `None`: there is nothing to run.
    pub fn plan(&mut self, now_ns: u64, capacity: usize, n_prompts: u32) -> Result<Option<Step>> {
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
        self.prompts.carried |= n_prompts > 0;
        let transit = self.prompts.transit.take();
        let all = self.config.window_rows();
        let (mut limit, mut room) = (self.config.batch(), self.config.pass_rows());
        (limit, room) = (limit.min(capacity), room.min(capacity));
        let mut carrier = None;
        if let Some(t) = transit {
            let beside = all.saturating_sub(t.rows as usize);
            (limit, room) = (limit.min(beside), room.min(beside));
        } else if n_prompts > 0 {
            carrier = Some(self.carrier(marks, limit, n_prompts));
        }
        let mut view = View {
            config: &self.config,
            buffer: &mut self.buffer,
            cost: &self.cost,
            marks,
            rows_each: 1.0 + f64::from(self.pending.total()) / self.decoding.max(1) as f64,
            carrier,
        };
        let choice = match transit {
            Some(t) => Choice::Flush(t.ramp, Reason::Prompt),
            None => self.planner.choose(&mut view, now_ns, limit),
        };
        let (after, reason) = match choice {
            Choice::Nothing => {
                self.gaps.idle();
                return Ok(None);
            }
            Choice::Ready => {
                limit = limit.min(view.buffer.free_slots());
                if carrier.is_some() {
                    limit = limit.min(all - least_prompts(all, n_prompts));
                }
                (None, Reason::None)
            }
            Choice::Flush(ramp, reason) => (Some(ramp), reason),
        };
        let first = after.map_or(0, |r| r + 1);
        let carries = transit.is_some() || after.is_none() && carrier.is_some();
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
        if self.rows.is_empty() && short > 0 && !carries {
            return Err(Error::Capacity {
                field: "capacity",
                value: capacity as u64,
                need: short.into(),
                why: "the pending rows of a request run in one window; give max_batch",
            });
        }
        if self.rows.is_empty() && !carries {
            return Ok(None);
        }
        self.gaps.resume(now_ns, self.prompts.carried);

        // The window ends at the first ramp that is looked at and where one
        // of its rows may exit: any other is not worth its head.
        let ramps = &self.config.ramp_layers;
        let begin = after.map_or(0, |r| ramps[r]);
        let looked_at = marks.ramps & may_exit;
        let stop = if carries {
            let stop = self.first_cut(marks, first, looked_at);
            let known = carrier.filter(|_| first == 0);
            self.cut(marks, first, stop, known, transit.map_or(0, |t| t.rows))
        } else {
            let stop = (first..ramps.len()).find(|&r| looked_at & (1 << r) != 0);
            self.route(marks, begin, first, stop)
        };
        let stop = [stop, barrier].into_iter().flatten().min();
        let prompt_rows = match transit {
            Some(t) => t.rows,
            None if carries => self.prompt_room(stop, all).min(n_prompts),
            None => 0,
        };
        let ramps = &self.config.ramp_layers;
        let step = Step {
            layer_begin: begin,
            layer_end: stop.map_or(self.config.n_layers, |r| ramps[r]),
            ramp: stop,
            reason,
            now_ns,
            prompt_rows,
            after,
            only_meets: stop.is_some_and(|r| looked_at >> r & 1 == 0),
        };
        if !self.rows.is_empty() {
            self.last_rows = self.rows.len() as u32;
        }
        self.step = Some(step);
        Ok(Some(step))
    }

    /// The first ramp of the rule from `first` on where rows may exit, or are held.
    fn first_cut(&self, marks: Marks, first: usize, may_exit: u32) -> Option<usize> {
        (first..self.config.n_ramps()).find(|&r| {
            let held = self.buffer.held_at(r) > 0;
            marks.ramps >> r & 1 == 1 && (held || may_exit >> r & 1 == 1)
        })
    }

    /// The pass that `n_prompts` prompt rows need, with at most `limit` decode
    /// rows, as far as it is known before its rows are.
    fn carrier(&self, marks: Marks, limit: usize, n_prompts: u32) -> Carrier {
        let all = self.config.window_rows();
        let most = limit.min(all - least_prompts(all, n_prompts));
        let rows = self.buffer.ready_rows().min(most) as u32;
        let may_exit = if rows > 0 { self.allowed() } else { 0 };
        let mut carrier = Carrier {
            prompts: n_prompts.min(all as u32 - rows),
            rows,
            cut: None,
        };
        let stop = self.first_cut(marks, 0, may_exit);
        carrier.cut = stop.filter(|&r| {
            let share = self.may_exit[r] as f64 / self.requests.alive().max(1) as f64;
            let exits = f64::from(rows) * share * self.exits.chance(None, r).p;
            self.cut_pays(marks, 0, r, carrier.prompts, rows, exits)
        });
        carrier
    }

    /// Where a pass over prompt rows is cut that could be at `stop`. `known`:
    /// what was planned for a pass from layer 0.
    fn cut(
        &self,
        marks: Marks,
        first: usize,
        stop: Option<usize>,
        known: Option<Carrier>,
        prompts: u32,
    ) -> Option<usize> {
        let ramp = stop?;
        if let Some(c) = known {
            return c.cut.and(stop);
        }
        let chance = self.exits.chance(first.checked_sub(1), ramp).p;
        let may =
            |r: &&StepRow| r.back == 0 && self.requests.get(r.request).may_exit >> ramp & 1 == 1;
        let exits = self.rows.iter().filter(may).count() as f64 * chance;
        let rows = self.rows.len() as u32;
        let pays = self.cut_pays(marks, first, ramp, prompts, rows, exits);
        pays.then_some(ramp)
    }

    /// Whether a cut at `ramp` makes the pass and what waits there shorter.
    /// Policies other than `auto` cut always, and so does a probe of the ramps.
    fn cut_pays(
        &self,
        marks: Marks,
        first: usize,
        ramp: usize,
        prompts: u32,
        rows: u32,
        exits: f64,
    ) -> bool {
        if self.config.policy != Policy::Auto || !self.auto.settled() || !self.cost.known() {
            return true;
        }
        let ways = Ways::new(&self.cost, first, ramp, self.gaps.gap_ns());
        let batch = self.config.batch();
        let room = self.config.window_rows() - (prompts as usize).min(self.config.window_rows());
        let stay = f64::from(rows) - exits;
        let held = f64::from(self.buffer.held_at(ramp));
        let beside = (batch.min(room) as f64 - stay).max(0.0);
        let wrong = 1.0 - self.acceptance.chance(ramp);
        let token = ways.whole.at(f64::from(rows), 0.0) / f64::from(rows.max(1));
        ways.cut_pays(&Riders {
            prompts: prompts.into(),
            rows: rows.into(),
            stay,
            held: held.min(beside),
            flush: f64::from(marks.hold_rows.min(batch as u32)),
            exit_ns: self.share_keeping() * ways.rest.per_row
                + self.share_of(Fill::Verify) * wrong * token,
        })
    }

    /// Room for prompt rows in the planned window from layer 0: decode rows
    /// come first, and behind a cut the rows that are held there.
    fn prompt_room(&self, cut: Option<usize>, all: usize) -> u32 {
        let rows = self.rows.len();
        let behind = cut.map_or(0, |r| {
            let deep = rows + self.buffer.held_at(r) as usize;
            let each = self.pending.total() as usize;
            (deep.min(self.config.batch()) + each).min(self.config.pass_rows())
        });
        let room = all - rows.max(behind).min(all);
        room.max(least_prompts(all, u32::MAX)).min(all - rows) as u32
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

/// Places that decode rows leave to `n_prompts` prompt rows that wait, in a
/// window of `all` rows: an eighth, so that no prompt waits for ever.
fn least_prompts(all: usize, n_prompts: u32) -> usize {
    all.div_ceil(8).min(n_prompts as usize)
}
