// SPDX-License-Identifier: Apache-2.0

//! The next window, and its rows.

use super::{Origin, Scheduler, Step, StepRow};
use crate::core::NONE;
use crate::core::config::{Config, Fill, Policy};
use crate::core::counters::Reason;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};
use crate::core::estimate::carrier::{Carrier, Riders, Ways};
use crate::core::estimate::cost::CostModel;
use crate::core::estimate::prompts::Transit;
use crate::core::flush::planner::{Choice, View};
use crate::core::metric::Score;
use crate::core::policy::rule::RowRule;
use crate::core::rows::buffer::Buffer;
use crate::core::rows::pending::Pending;
use crate::core::rows::requests::{Request, State};

/// The terms of a plan.
#[derive(Clone, Copy)]
struct Terms {
    row_rule: RowRule,
    /// Requests at most.
    limit: usize,
    /// Rows at most.
    room: usize,
    /// Prompt rows on their way, which the window must take on.
    transit: Option<Transit>,
    /// A pass for prompt rows that wait; `None` while others are on their way.
    carrier: Option<Carrier>,
    /// Rows of a request in a deep window, pending ones included.
    rows_each: f64,
}

impl Terms {
    /// The window has prompt rows.
    fn carries(&self, choice: Choice) -> bool {
        self.transit.is_some() || choice.ramp().is_none() && self.carrier.is_some()
    }

    /// The scheduler as the planner sees it.
    fn view<'a>(
        &self,
        config: &'a Config,
        buffer: &'a mut Buffer,
        cost: &'a CostModel,
    ) -> View<'a> {
        View {
            config,
            buffer,
            cost,
            row_rule: self.row_rule,
            rows_each: self.rows_each,
            carrier: self.carrier,
        }
    }
}

/// Rows that a plan took.
#[derive(Default)]
struct Taken {
    /// Bit r: one of them may exit at ramp r.
    may_exit: u32,
    /// The first ramp ahead where pending rows wait, which must not be passed.
    barrier: Option<usize>,
    /// Rows of the first request that did not fit.
    unfit: u32,
}

impl Scheduler {
    /// Chooses the next window and at most `capacity` decode rows for it, where
    /// `n_prompts` prompt rows wait at layer 0. `None`: there is nothing to run.
    pub fn plan(&mut self, now_ns: u64, capacity: usize, n_prompts: u32) -> Result<Option<Step>> {
        self.plan_with(now_ns, capacity, n_prompts, |_| Ok(()))
    }

    /// [`Scheduler::plan`], where `prepare` has the last word: where it fails with the
    /// rows of the step, nothing has happened.
    pub fn plan_with(
        &mut self,
        now_ns: u64,
        capacity: usize,
        n_prompts: u32,
        prepare: impl FnOnce(&[StepRow]) -> Result<()>,
    ) -> Result<Option<Step>> {
        self.expect_plan(capacity)?;
        let mut terms = self.terms(capacity, n_prompts);
        let choice = self.choose(&terms, now_ns);
        if choice == Choice::Ready {
            terms.limit = terms.limit.min(self.buffer.free_slots());
            if terms.carrier.is_some() {
                let all = self.config.window_rows();
                terms.limit = terms.limit.min(all - least_prompts(all, n_prompts));
            }
        }
        let taken = self.take(&terms, choice, now_ns);
        let carries = terms.carries(choice);
        if self.rows.is_empty() && !carries {
            if taken.unfit > 0 {
                return Err(Error::Capacity {
                    field: "capacity",
                    value: capacity as u64,
                    need: taken.unfit.into(),
                    why: "the pending rows of a request run in one window; give max_batch",
                });
            }
            self.tick(now_ns);
            self.prompts.carried |= n_prompts > 0;
            if choice == Choice::Nothing {
                self.host_time.idle();
            }
            return Ok(None);
        }
        let end = self.end(&terms, choice.ramp(), carries, &taken);
        if let Err(e) = prepare(&self.rows) {
            self.put_back();
            self.rows.clear();
            return Err(e);
        }
        let prompt_rows = match terms.transit {
            Some(t) => t.rows,
            None if carries => self.prompt_room(end).min(n_prompts),
            None => 0,
        };
        let looked_at = terms.row_rule.ramps & taken.may_exit;
        let ramps = &self.config.ramp_layers;
        let step = Step {
            layer_begin: choice.ramp().map_or(0, |r| ramps[r]),
            layer_end: end.map_or(self.config.n_layers, |r| ramps[r]),
            ramp: end,
            reason: choice.reason(),
            now_ns,
            prompt_rows,
            choice,
            nobody_exits: end.is_some_and(|r| looked_at >> r & 1 == 0),
        };
        self.begin_step(step, n_prompts > 0);
        Ok(Some(step))
    }

    fn expect_plan(&self, capacity: usize) -> Result<()> {
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
        Ok(())
    }

    /// The step is the planned one from now on; its rows are taken.
    fn begin_step(&mut self, step: Step, prompts_wait: bool) {
        self.tick(step.now_ns);
        self.prompts.carried |= prompts_wait;
        self.prompts.transit = None;
        self.host_time.resume(step.now_ns, self.prompts.carried);
        if !self.rows.is_empty() {
            self.last_rows = self.rows.len() as u32;
            self.planner.count(&mut self.buffer, step.choice);
        }
        self.step = Some(step);
    }

    fn terms(&self, capacity: usize, n_prompts: u32) -> Terms {
        let row_rule = self.row_rule();
        let transit = self.prompts.transit;
        let mut limit = self.config.batch().min(capacity);
        let mut room = self.config.pass_rows().min(capacity);
        let mut carrier = None;
        if let Some(t) = transit {
            let beside = self.config.window_rows().saturating_sub(t.rows as usize);
            (limit, room) = (limit.min(beside), room.min(beside));
        } else if n_prompts > 0 {
            carrier = Some(self.carrier(row_rule, limit, n_prompts));
        }
        Terms {
            row_rule,
            limit,
            room,
            transit,
            carrier,
            rows_each: 1.0 + f64::from(self.pending.total()) / self.decoding.max(1) as f64,
        }
    }

    fn choose(&mut self, terms: &Terms, now_ns: u64) -> Choice {
        if let Some(t) = terms.transit {
            return Choice::Flush(t.ramp, Reason::Prompt);
        }
        let view = terms.view(&self.config, &mut self.buffer, &self.cost);
        self.planner.choose(&view, now_ns, terms.limit)
    }

    /// Takes the rows of a choice out of their queues.
    fn take(&mut self, terms: &Terms, choice: Choice, now_ns: u64) -> Taken {
        self.rows.clear();
        let mut taken = Taken::default();
        let after = choice.ramp();
        let first = after.map_or(0, |r| r + 1);
        let (requests, pending, mut left) = (&self.requests, &self.pending, terms.room);
        let mut fits = |request: u32| {
            let rows = match pending.total() {
                0 => 1,
                _ => {
                    let r = requests.get(request);
                    along(pending, r, after) + u32::from(!r.settling)
                }
            };
            match left.checked_sub(rows as usize) {
                Some(rest) => left = rest,
                None => taken.unfit = rows,
            }
            taken.unfit == 0
        };
        let mut view = terms.view(&self.config, &mut self.buffer, &self.cost);
        let picked = self
            .planner
            .pick(&mut view, choice, now_ns, terms.limit, &mut fits);
        for &handle in picked {
            let since_ns = self.buffer.node(handle).since_ns;
            let (request, mut slot) = self.buffer.owner(handle);
            let r = self.requests.get_mut(request);
            let origin = match after {
                None => {
                    // The limit was cut to the free slots.
                    slot = self.buffer.take_slot(request).unwrap_or(NONE);
                    if let Some(looks) = self.looked_at.get_mut(slot as usize) {
                        *looks = 0;
                    }
                    Origin::Ready
                }
                Some(ramp) if r.state == State::Running => Origin::Stay(ramp),
                Some(ramp) => Origin::Held(ramp),
            };
            r.state = State::Running;
            r.ramp = NONE;
            r.slot = slot;
            r.in_step = self.rows.len() as u32;
            taken.may_exit |= if r.settling { 0 } else { r.may_exit };
            let row = own_row(request, r, since_ns, origin);
            if pending.total() > 0 && !r.pending.is_empty() {
                let stop = pending.stop(&r.pending, first);
                taken.barrier = [taken.barrier, stop].into_iter().flatten().min();
                push_pending(&mut self.rows, pending, r, after, row);
            }
            if !r.settling {
                self.rows.push(row);
            }
        }
        taken
    }

    /// The ramp where the window ends, if it is not the last layer: the first that
    /// is looked at and where one of its rows may exit, since any other is not
    /// worth its head; with prompt rows, only where a cut pays; and no later than
    /// where pending rows wait.
    fn end(
        &self,
        terms: &Terms,
        after: Option<usize>,
        carries: bool,
        taken: &Taken,
    ) -> Option<usize> {
        let first = after.map_or(0, |r| r + 1);
        let looked_at = terms.row_rule.ramps & taken.may_exit;
        let end = if carries {
            let cut = self.first_cut(terms.row_rule, first, looked_at);
            let known = terms.carrier.filter(|_| first == 0);
            let prompts = terms.transit.map_or(0, |t| t.rows);
            self.cut(terms.row_rule, first, cut, known, prompts)
        } else {
            (first..self.config.n_ramps()).find(|&r| looked_at & (1 << r) != 0)
        };
        [end, taken.barrier].into_iter().flatten().min()
    }

    /// The first ramp of the rule from `first` on where rows may exit, or are held.
    fn first_cut(&self, row_rule: RowRule, first: usize, may_exit: u32) -> Option<usize> {
        (first..self.config.n_ramps()).find(|&r| {
            let held = self.buffer.held_at(r) > 0;
            row_rule.ramps >> r & 1 == 1 && (held || may_exit >> r & 1 == 1)
        })
    }

    /// The pass that `n_prompts` prompt rows need, with at most `limit` decode
    /// rows, as far as it is known before its rows are.
    fn carrier(&self, row_rule: RowRule, limit: usize, n_prompts: u32) -> Carrier {
        let all = self.config.window_rows();
        let most = limit.min(all - least_prompts(all, n_prompts));
        let rows = self.buffer.ready_rows().min(most) as u32;
        let may_exit = if rows > 0 { self.allowed() } else { 0 };
        let mut carrier = Carrier {
            prompts: n_prompts.min(all as u32 - rows),
            rows,
            cut: None,
        };
        let stop = self.first_cut(row_rule, 0, may_exit);
        carrier.cut = stop.filter(|&r| {
            let share = self.may_exit[r] as f64 / self.requests.alive().max(1) as f64;
            let exits = f64::from(rows) * share * self.exit_rates.chance(None, r).p;
            self.cut_pays(row_rule, 0, r, carrier.prompts, rows, exits)
        });
        carrier
    }

    /// Where a pass over prompt rows is cut that could be at `stop`. `known`:
    /// what was planned for a pass from layer 0.
    fn cut(
        &self,
        row_rule: RowRule,
        first: usize,
        stop: Option<usize>,
        known: Option<Carrier>,
        prompts: u32,
    ) -> Option<usize> {
        let ramp = stop?;
        if let Some(c) = known {
            return c.cut.and(stop);
        }
        let chance = self.exit_rates.chance(first.checked_sub(1), ramp).p;
        let may =
            |r: &&StepRow| r.back == 0 && self.requests.get(r.request).may_exit >> ramp & 1 == 1;
        let exits = self.rows.iter().filter(may).count() as f64 * chance;
        let rows = self.rows.len() as u32;
        let pays = self.cut_pays(row_rule, first, ramp, prompts, rows, exits);
        pays.then_some(ramp)
    }

    /// Whether a cut at `ramp` makes the pass and what waits there shorter.
    /// Policies other than `auto` cut always, and so does a probe of the ramps.
    fn cut_pays(
        &self,
        row_rule: RowRule,
        first: usize,
        ramp: usize,
        prompts: u32,
        rows: u32,
        exits: f64,
    ) -> bool {
        if self.config.policy != Policy::Auto || !self.auto.settled() || !self.cost.known() {
            return true;
        }
        let ways = Ways::new(&self.cost, first, ramp, self.host_time.gap_ns());
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
            flush: f64::from(row_rule.hold_rows.min(batch as u32)),
            exit_ns: self.share_keeping() * ways.rest.per_row
                + self.share_of(Fill::Verify) * wrong * token,
        })
    }

    /// Room for prompt rows in the planned window from layer 0: decode rows
    /// come first, and behind a cut the rows that are held there.
    fn prompt_room(&self, cut: Option<usize>) -> u32 {
        let (rows, all) = (self.rows.len(), self.config.window_rows());
        let behind = cut.map_or(0, |r| {
            let deep = rows + self.buffer.held_at(r) as usize;
            let each = self.pending.total() as usize;
            (deep.min(self.config.batch()) + each).min(self.config.pass_rows())
        });
        let room = all - rows.max(behind).min(all);
        room.max(least_prompts(all, u32::MAX)).min(all - rows) as u32
    }
}

/// Pending rows of a request that go along in a window from where its rows wait:
/// at the ramp `after`, or at layer 0.
fn along(pending: &Pending, r: &Request, after: Option<usize>) -> u32 {
    match after {
        Some(ramp) if pending.total() > 0 => pending.at(&r.pending, ramp),
        _ => 0,
    }
}

/// A request's own row, as a step starts with it.
fn own_row(request: u32, r: &Request, since_ns: u64, origin: Origin) -> StepRow {
    StepRow {
        request,
        id: r.id,
        slot: r.slot,
        back: 0,
        fill: r.fill,
        gone: false,
        decision: Decision::Stay,
        forced: false,
        refused: false,
        score: Score::NONE,
        since_ns,
        origin,
    }
}

/// Adds the pending rows that go along with a request's own `row`, the oldest first.
fn push_pending(
    rows: &mut Vec<StepRow>,
    pending: &Pending,
    r: &Request,
    after: Option<usize>,
    row: StepRow,
) {
    let n = r.pending.len();
    let all = pending.iter(&r.pending).enumerate();
    for (k, slot) in all.skip((n - along(pending, r, after)) as usize) {
        let back = n - k as u32;
        let last = r.settling && back == 1;
        rows.push(StepRow {
            slot,
            back,
            decision: Decision::Pending,
            origin: if last { row.origin } else { Origin::Pending },
            ..row
        });
    }
}

/// Places that decode rows leave to `n_prompts` prompt rows that wait, in a
/// window of `all` rows: an eighth, so that no prompt waits for ever.
fn least_prompts(all: usize, n_prompts: u32) -> usize {
    all.div_ceil(8).min(n_prompts as usize)
}
