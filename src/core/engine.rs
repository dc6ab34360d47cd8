// SPDX-License-Identifier: Apache-2.0

//! Ties the parts together: the life of requests and rows through
//! plan, ramp and complete.

use super::buffer::Buffer;
use super::config::{Config, check_threshold};
use super::cost::CostModel;
use super::counters::{Counters, Reason};
use super::error::{Error, Result};
use super::metric::{Metric, Score};
use super::planner::{Choice, Planner, View};
use super::policy::{self, Decision, Policy, RampRow};
use super::request::{Request, RequestConfig, Requests, State};
use super::{MAX_RAMPS, NONE};

/// What the host is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub layer_begin: u32,
    pub layer_end: u32,
    /// The ramp at the window's end, if it is not the model's.
    pub ramp: Option<usize>,
    pub reason: Reason,
    pub now_ns: u64,
}

/// Where a row of the step goes back to if the step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Ready,
    Queue(usize),
}

#[derive(Debug, Clone, Copy)]
pub struct StepRow {
    /// Index of the request; meaningless once `gone`.
    pub request: u32,
    pub id: u64,
    pub slot: u32,
    /// The request was removed since the plan.
    pub gone: bool,
    /// Set by `ramp`.
    pub decision: Decision,
    pub forced: bool,
    pub score: Score,
    origin: Origin,
}

impl StepRow {
    /// Left at the ramp, and still wants its skipped layers filled.
    pub fn exited(&self) -> bool {
        self.decision == Decision::Exit && !self.gone
    }
}

pub struct Engine {
    config: Config,
    requests: Requests,
    buffer: Buffer,
    cost: CostModel,
    counters: Counters,
    planner: Planner,
    ready: Vec<u32>,
    decoding: usize,
    step: Option<Step>,
    rows: Vec<StepRow>,
    ramped: bool,
    /// Rows of the last step that had any.
    last_rows: u32,
    ramp_rows: Vec<RampRow>,
    scratch: Vec<f32>,
    seq: u64,
    clock_ns: u64,
}

impl Engine {
    pub fn new(config: Config) -> Result<Self> {
        config.validate()?;
        let (batch, requests) = (config.batch(), config.max_requests as usize);
        Ok(Engine {
            requests: Requests::new(requests),
            buffer: Buffer::new(config.n_slots as usize, config.n_ramps()),
            cost: CostModel::new(config.n_layers, &config.ramp_layers),
            counters: Counters::default(),
            planner: Planner::new(&config),
            ready: Vec::with_capacity(requests),
            decoding: 0,
            step: None,
            rows: Vec::with_capacity(batch),
            ramped: false,
            last_rows: 0,
            ramp_rows: Vec::with_capacity(batch),
            scratch: Vec::with_capacity(batch),
            seq: 0,
            clock_ns: 0,
            config,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    pub fn cost(&self) -> &CostModel {
        &self.cost
    }

    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    pub fn requests(&self) -> usize {
        self.requests.alive()
    }

    pub fn request(&self, id: u64) -> Result<&Request> {
        Ok(self.requests.get(self.requests.find(id)?))
    }

    pub fn step(&self) -> Option<&Step> {
        self.step.as_ref()
    }

    /// The planned step's rows, in the order in which they run.
    pub fn step_rows(&self) -> &[StepRow] {
        &self.rows
    }

    /// `ramp` has been called for the planned step.
    pub fn ramped(&self) -> bool {
        self.ramped
    }

    pub fn metric_of(&self, row: &StepRow) -> Metric {
        self.requests.get(row.request).metric
    }

    /// c/t_d at the first ramp for the last batch.
    pub fn art_ratio(&self) -> Option<f64> {
        self.config.art_ratio.map(f64::from).or_else(|| {
            self.cost
                .art_ratio(self.config.ramp_layers[0], self.last_rows)
        })
    }

    pub fn add(&mut self, request: RequestConfig) -> Result<()> {
        if let Some(t) = request.threshold {
            check_threshold("threshold", t)?;
        }
        let i = self.requests.add(request.id)?;
        let mut may_exit = 0;
        for (r, &t) in self.config.thresholds.iter().enumerate() {
            if request.threshold.unwrap_or(t) <= 1.0 {
                may_exit |= 1 << r;
            }
        }
        let item = self.requests.get_mut(i);
        item.metric = request.metric.unwrap_or(self.config.metric);
        item.threshold = request.threshold;
        item.deadline_ns = match request.token_deadline_ns {
            0 => self.config.token_deadline_ns,
            ns => ns,
        };
        item.priority = request.priority;
        item.may_exit = may_exit;
        Ok(())
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
        let seq = self.next_seq();
        let (mark, decoding) = (self.planner.first, &mut self.decoding);
        let r = self.requests.get_mut(i);
        r.ready_seq = seq;
        r.ready_mark = mark;
        if !r.started {
            r.started = true;
            r.last_token_ns = now_ns;
            *decoding += 1;
        }
        self.push_ready(i);
        Ok(())
    }

    /// Forgets a request, whatever it is doing. A row that is in the planned
    /// step gives its slot back when the step ends.
    pub fn remove(&mut self, id: u64) -> Result<()> {
        let i = self.requests.find(id)?;
        let r = self.requests.get(i);
        let (state, slot, in_step, started) = (r.state, r.slot, r.in_step, r.started);
        if in_step != NONE {
            self.rows[in_step as usize].gone = true;
        }
        if state == State::Ready {
            self.pop_ready(i);
        }
        if in_step == NONE && slot != NONE {
            let ramp = self.requests.get(i).ramp as usize;
            let row = *self.buffer.row(slot);
            if !row.stay {
                self.counters
                    .wait(self.clock_ns.saturating_sub(row.since_ns));
            }
            self.buffer.dequeue(ramp, slot);
            self.buffer.return_slot(slot);
        }
        if started {
            self.decoding -= 1;
        }
        self.requests.remove(i);
        Ok(())
    }

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

        let view = View {
            config: &self.config,
            requests: &self.requests,
            buffer: &self.buffer,
            cost: &self.cost,
            ready: &self.ready,
            decoding: self.decoding,
        };
        let mut limit = self.config.batch().min(capacity);
        let choice = self.planner.choose(&view, now_ns, limit);
        let (origin, reason) = match choice {
            Choice::Nothing => return Ok(None),
            Choice::Ready => {
                limit = limit.min(self.buffer.free_slots());
                (Origin::Ready, Reason::None)
            }
            Choice::Flush(ramp, reason) => (Origin::Queue(ramp), reason),
        };
        for c in self.planner.pick(&view, choice, now_ns, limit) {
            let (request, slot) = match origin {
                Origin::Ready => (c.index, NONE),
                Origin::Queue(_) => (self.buffer.row(c.index).request, c.index),
            };
            self.rows.push(StepRow {
                request,
                id: self.requests.get(request).id,
                slot,
                gone: false,
                decision: Decision::Stay,
                forced: false,
                score: Score::NONE,
                origin,
            });
        }
        if self.rows.is_empty() {
            return Ok(None);
        }

        let mut may_exit = 0;
        for k in 0..self.rows.len() {
            let StepRow { request, slot, .. } = self.rows[k];
            let slot = match origin {
                Origin::Ready => {
                    self.pop_ready(request);
                    // `limit` was cut to the free slots.
                    self.buffer.take_slot(request).unwrap_or(NONE)
                }
                Origin::Queue(ramp) => {
                    self.buffer.dequeue(ramp, slot);
                    slot
                }
            };
            self.rows[k].slot = slot;
            let r = self.requests.get_mut(request);
            r.state = State::Running;
            r.ramp = NONE;
            r.slot = slot;
            r.in_step = k as u32;
            may_exit |= r.may_exit;
        }

        // The window ends at the first ramp where one of its rows may exit:
        // a ramp at which nobody can is not worth its head.
        let ramps = &self.config.ramp_layers;
        let (begin, first) = match origin {
            Origin::Ready => (0, 0),
            Origin::Queue(ramp) => (ramps[ramp], ramp + 1),
        };
        let stop = (first..ramps.len())
            .find(|&r| self.config.policy != Policy::Off && may_exit & (1 << r) != 0);
        let step = Step {
            layer_begin: begin,
            layer_end: stop.map_or(self.config.n_layers, |r| ramps[r]),
            ramp: stop,
            reason,
            now_ns,
        };
        self.last_rows = self.rows.len() as u32;
        self.step = Some(step);
        Ok(Some(step))
    }

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

    /// Decides every row of the planned step; the verdicts are in
    /// [`Engine::step_rows`].
    pub fn ramp(&mut self, scores: &[Score]) -> Result<()> {
        let ramp = self.expect_ramp()?;
        if scores.len() != self.rows.len() {
            return Err(Error::Conflict {
                field: "n_rows",
                index: None,
                value: scores.len() as u64,
                other: "the planned step's n_rows",
                other_value: self.rows.len() as u64,
                why: "every planned row has one row of logits",
            });
        }
        self.ramp_rows.clear();
        for (row, score) in self.rows.iter().zip(scores) {
            let threshold = if row.gone {
                f32::INFINITY
            } else {
                let own = self.requests.get(row.request).threshold;
                own.unwrap_or(self.config.thresholds[ramp])
            };
            self.ramp_rows.push(RampRow {
                confidence: score.confidence,
                threshold,
                gone: row.gone,
                decision: Decision::Gone,
                forced: false,
            });
        }
        let ratio = self.ratio_at(ramp).unwrap_or(0.0);
        policy::decide(
            self.config.policy,
            ratio,
            &mut self.ramp_rows,
            &mut self.scratch,
        );
        for (k, score) in scores.iter().enumerate() {
            let RampRow {
                decision, forced, ..
            } = self.ramp_rows[k];
            let row = &mut self.rows[k];
            row.decision = decision;
            row.forced = forced;
            row.score = if row.gone { Score::NONE } else { *score };
            if row.gone {
                continue;
            }
            let r = self.requests.get_mut(row.request);
            r.last_confidence = score.confidence;
            self.counters.nonfinite_rows += u64::from(score.confidence.is_nan());
            match decision {
                Decision::Exit => {
                    r.state = State::Idle;
                    r.slot = NONE;
                    r.tokens += 1;
                    r.exits[ramp] += 1;
                    r.involuntary_exits += u64::from(forced);
                    self.counters.tokens += 1;
                    self.counters.exits[ramp] += 1;
                    self.counters.involuntary_exits += u64::from(forced);
                }
                Decision::Hold => {
                    r.state = State::Held;
                    r.ramp = ramp as u32;
                }
                Decision::Stay => {
                    r.involuntary_stays += u64::from(forced);
                    self.counters.involuntary_stays += u64::from(forced);
                }
                Decision::Gone => {}
            }
        }
        self.ramped = true;
        Ok(())
    }

    fn ratio_at(&self, ramp: usize) -> Option<f64> {
        self.config.art_ratio.map(f64::from).or_else(|| {
            let layer = self.config.ramp_layers[ramp];
            self.cost.art_ratio(layer, self.rows.len() as u32)
        })
    }

    /// The planned step ran: its rows go where they were sent.
    pub fn complete(&mut self, now_ns: u64, duration_ns: u64) -> Result<()> {
        let Some(step) = self.step else {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        };
        if step.ramp.is_some() && !self.ramped {
            return Err(Error::CallOrder(
                "the planned window ends at a ramp; expected drex_ramp first",
            ));
        }
        self.tick(now_ns);
        self.cost.observe(
            step.layer_begin,
            step.layer_end,
            self.rows.len() as u32,
            duration_ns,
        );
        self.counters.steps += 1;
        self.counters.step_rows += self.rows.len() as u64;
        self.counters.flushes[step.reason as usize] += 1;

        for k in 0..self.rows.len() {
            let row = self.rows[k];
            if matches!(row.origin, Origin::Queue(_)) {
                let queued = *self.buffer.row(row.slot);
                if !queued.stay {
                    let ns = step.now_ns.saturating_sub(queued.since_ns);
                    self.counters.wait(ns);
                    if !row.gone {
                        self.requests.get_mut(row.request).held_ns += ns;
                    }
                }
            }
            if !row.gone {
                self.requests.get_mut(row.request).in_step = NONE;
            }
            match (row.gone, step.ramp, row.decision) {
                (true, ..) | (false, _, Decision::Gone) => self.buffer.return_slot(row.slot),
                (false, None, _) => {
                    self.buffer.return_slot(row.slot);
                    let r = self.requests.get_mut(row.request);
                    r.state = State::Idle;
                    r.slot = NONE;
                    r.tokens += 1;
                    self.counters.tokens += 1;
                    self.emitted(row.request, now_ns);
                }
                (false, Some(_), Decision::Exit) => {
                    self.buffer.return_slot(row.slot);
                    self.emitted(row.request, now_ns);
                }
                (false, Some(ramp), Decision::Hold | Decision::Stay) => {
                    let stay = row.decision == Decision::Stay;
                    let seq = self.next_seq();
                    let queued = self.buffer.row_mut(row.slot);
                    queued.seq = seq;
                    queued.since_ns = now_ns;
                    queued.plans = self.planner.plans;
                    queued.flushes = self.planner.flushes[ramp];
                    queued.stay = stay;
                    self.requests.get_mut(row.request).ramp = ramp as u32;
                    self.buffer.enqueue(ramp, row.slot);
                }
            }
        }
        let held = u64::from(self.buffer.held());
        self.counters.held_rows_max = self.counters.held_rows_max.max(held);
        self.end_step();
        Ok(())
    }

    /// The planned step failed: its rows go back to where they were, as if it
    /// had not been planned. Rows that a ramp already let out have given
    /// their token, and stay out.
    pub fn abandon(&mut self) -> Result<()> {
        if self.step.is_none() {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        }
        for k in 0..self.rows.len() {
            let row = self.rows[k];
            // The ramp's verdicts are taken back with the step, those of
            // requests that went away since included.
            let undone = self.ramped && matches!(row.decision, Decision::Hold | Decision::Stay);
            let forced = u64::from(undone && row.forced);
            if undone {
                self.counters.involuntary_stays -= forced;
                self.counters.nonfinite_rows -= u64::from(row.score.confidence.is_nan());
            }
            if row.gone {
                self.buffer.return_slot(row.slot);
                continue;
            }
            let r = self.requests.get_mut(row.request);
            r.in_step = NONE;
            r.involuntary_stays -= forced;
            if self.ramped && row.decision == Decision::Exit {
                self.buffer.return_slot(row.slot);
                continue;
            }
            match row.origin {
                Origin::Ready => {
                    r.slot = NONE;
                    r.ramp = NONE;
                    self.buffer.return_slot(row.slot);
                    self.push_ready(row.request);
                }
                Origin::Queue(ramp) => {
                    r.ramp = ramp as u32;
                    r.state = if self.buffer.row(row.slot).stay {
                        State::Running
                    } else {
                        State::Held
                    };
                    self.buffer.enqueue(ramp, row.slot);
                }
            }
        }
        self.end_step();
        Ok(())
    }

    /// A timing that was not planned here.
    pub fn observe(&mut self, begin: u32, end: u32, rows: u32, ns: u64) -> Result<()> {
        if end > self.config.n_layers {
            return Err(Error::Conflict {
                field: "layer_end",
                index: None,
                value: end.into(),
                other: "n_layers",
                other_value: self.config.n_layers.into(),
                why: "the window lies within the model",
            });
        }
        if begin >= end {
            return Err(Error::Conflict {
                field: "layer_begin",
                index: None,
                value: begin.into(),
                other: "layer_end",
                other_value: end.into(),
                why: "the window has at least one layer",
            });
        }
        if rows == 0 {
            return Err(Error::int("n_rows", rows, "at least 1"));
        }
        if ns == 0 {
            return Err(Error::int("duration_ns", ns, "at least 1"));
        }
        self.cost.observe(begin, end, rows, ns);
        Ok(())
    }

    fn end_step(&mut self) {
        self.step = None;
        self.ramped = false;
        self.rows.clear();
    }

    fn emitted(&mut self, request: u32, now_ns: u64) {
        let r = self.requests.get_mut(request);
        if r.due_ns().is_some_and(|due| now_ns > due) {
            r.deadline_misses += 1;
            self.counters.deadline_misses += 1;
        }
        r.last_token_ns = now_ns;
    }

    fn push_ready(&mut self, i: u32) {
        let r = self.requests.get_mut(i);
        r.state = State::Ready;
        r.ready_pos = self.ready.len() as u32;
        self.ready.push(i);
    }

    fn pop_ready(&mut self, i: u32) {
        let pos = self.requests.get(i).ready_pos;
        self.ready.swap_remove(pos as usize);
        if let Some(&moved) = self.ready.get(pos as usize) {
            self.requests.get_mut(moved).ready_pos = pos;
        }
        self.requests.get_mut(i).ready_pos = NONE;
    }

    fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    /// The latest time that any call named.
    fn tick(&mut self, now_ns: u64) {
        self.clock_ns = self.clock_ns.max(now_ns);
    }

    /// Held rows per ramp, without those of the planned step.
    pub fn held_rows_at(&self) -> [u64; MAX_RAMPS] {
        let mut at = [0; MAX_RAMPS];
        for (r, n) in at.iter_mut().enumerate().take(self.config.n_ramps()) {
            *n = u64::from(self.buffer.held_at(r));
        }
        at
    }
}
