// SPDX-License-Identifier: Apache-2.0

//! Ties the parts together: the life of requests and rows through
//! plan, ramp and complete.

use super::auto::{Auto, Load};
use super::buffer::Buffer;
use super::config::{Config, check_threshold};
use super::cost::CostModel;
use super::counters::{Counters, Miss, Reason};
use super::error::{Error, Result};
use super::exits::Exits;
use super::gaps::Gaps;
use super::metric::{Metric, Score};
use super::planner::{Choice, Marks, Planner, View};
use super::policy::{self, Decision, Policy, RampRow};
use super::profile::Profile;
use super::queue::Entry;
use super::request::{Request, RequestConfig, Requests, State};
use super::routing::{Routing, Stop, best_stop};
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
    /// The ramp that its rows were looked at before.
    after: Option<usize>,
}

/// Where a row of the step goes back to if the step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Ready,
    Held(usize),
    Stay(usize),
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

/// The search for a rule takes at most this share of a window's time, where
/// the host does not call for it itself.
const REPLAN_SHARE: u64 = 200;
/// About what a simulated window takes.
const WINDOW_NS: u64 = 40;
const REPLAN_MIN: u64 = 50;
const REPLAN_MAX: u64 = 20_000;

pub struct Engine {
    config: Config,
    requests: Requests,
    buffer: Buffer,
    cost: CostModel,
    counters: Counters,
    planner: Planner,
    exits: Exits,
    auto: Auto,
    routing: Routing,
    gaps: Gaps,
    /// The host calls [`Engine::replan`] itself.
    host_replans: bool,
    decoding: usize,
    /// Those of them that exit often.
    often: usize,
    /// Requests alive that may exit at each ramp.
    may_exit: [u32; MAX_RAMPS],
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
            buffer: Buffer::new(config.n_slots as usize, requests, config.n_ramps()),
            cost: CostModel::new(config.n_layers, &config.ramp_layers),
            counters: Counters::default(),
            planner: Planner::new(&config),
            exits: Exits::new(config.n_ramps()),
            auto: Auto::new(config.n_ramps(), batch, config.seed),
            routing: Routing::default(),
            gaps: Gaps::default(),
            host_replans: false,
            decoding: 0,
            often: 0,
            may_exit: [0; MAX_RAMPS],
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

    pub fn exits(&self) -> &Exits {
        &self.exits
    }

    pub fn auto(&self) -> &Auto {
        &self.auto
    }

    /// The rule in force without probes, in rows.
    pub fn chosen_marks(&self) -> Marks {
        Marks::new(&self.config, self.decoding, self.auto.chosen())
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
    fn allowed(&self) -> u32 {
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
        let seq = self.next_seq();
        let r = self.requests.get_mut(i);
        if !r.started {
            r.started = true;
            r.started_ns = now_ns;
            r.last_token_ns = now_ns;
            self.decoding += 1;
            self.often += r.kind.index();
            self.gaps.began();
        }
        r.spent_ns[Miss::Host as usize] += now_ns.saturating_sub(r.last_token_ns);
        r.state = State::Ready;
        let entry = Entry {
            seq,
            since_ns: now_ns,
            due_ns: r.due_ns().unwrap_or(0),
            priority: r.priority,
            plans: self.planner.plans,
        };
        self.buffer.push_ready(i, entry);
        Ok(())
    }

    /// Forgets a request, whatever it is doing. A row that is in the planned
    /// step gives its slot back when the step ends.
    pub fn remove(&mut self, id: u64) -> Result<()> {
        let i = self.requests.find(id)?;
        let r = self.requests.get(i);
        let (state, slot, in_step, started) = (r.state, r.slot, r.in_step, r.started);
        let (ramp, may_exit, kind) = (r.ramp, r.may_exit, r.kind);
        if in_step != NONE {
            self.rows[in_step as usize].gone = true;
        }
        if state == State::Ready {
            self.buffer.pop_ready(i);
        }
        if in_step == NONE && slot != NONE {
            debug_assert_ne!(ramp, NONE);
            let stay = state == State::Running;
            if !stay {
                let since = self.buffer.node(slot).since_ns;
                self.counters.wait(self.clock_ns.saturating_sub(since));
            }
            self.buffer.remove(slot, stay);
            self.buffer.return_slot(slot);
        }
        if started {
            self.decoding -= 1;
            self.often -= kind.index();
        }
        self.count_may_exit(may_exit, false);
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

        let marks = Marks::new(&self.config, self.decoding, self.auto.rule());
        let mut view = View {
            config: &self.config,
            buffer: &mut self.buffer,
            cost: &self.cost,
            marks,
        };
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
        let mut may_exit = 0;
        for &handle in self.planner.pick(&mut view, choice, now_ns, limit) {
            let (request, mut slot) = view.buffer.owner(handle);
            let r = self.requests.get_mut(request);
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
            may_exit |= r.may_exit;
            self.rows.push(StepRow {
                request,
                id: r.id,
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
        self.gaps.resume(now_ns);

        // The window ends at the first ramp that is looked at and where one
        // of its rows may exit: any other is not worth its head.
        let ramps = &self.config.ramp_layers;
        let (begin, first) = match after {
            None => (0, 0),
            Some(ramp) => (ramps[ramp], ramp + 1),
        };
        let looked_at = marks.ramps & may_exit;
        let stop = (first..ramps.len()).find(|&r| looked_at & (1 << r) != 0);
        let stop = self.route(marks, begin, first, stop);
        let ramps = &self.config.ramp_layers;
        let step = Step {
            layer_begin: begin,
            layer_end: stop.map_or(self.config.n_layers, |r| ramps[r]),
            ramp: stop,
            reason,
            now_ns,
            after,
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
        let (requests, config) = (&self.requests, &self.config);
        let rows = self.rows.iter().zip(scores).map(|(row, score)| {
            let threshold = if row.gone {
                f32::INFINITY
            } else {
                let own = requests.get(row.request).threshold;
                own.unwrap_or(config.thresholds[ramp])
            };
            RampRow {
                confidence: score.confidence,
                threshold,
                gone: row.gone,
                decision: Decision::Gone,
                forced: false,
            }
        });
        self.ramp_rows.extend(rows);
        let ratio = self.ratio_at(ramp).unwrap_or(0.0);
        policy::decide(
            self.config.policy,
            ratio,
            &mut self.ramp_rows,
            &mut self.scratch,
        );
        let after = self.step.as_ref().and_then(|s| s.after);
        let mut sorter = self.exits.sorter(after, ramp);
        let decided = self.ramp_rows.iter().zip(scores);
        for (row, (own, score)) in self.rows.iter_mut().zip(decided) {
            let (decision, forced) = (own.decision, own.forced);
            row.decision = decision;
            row.forced = forced;
            row.score = if row.gone { Score::NONE } else { *score };
            if row.gone {
                continue;
            }
            let r = self.requests.get_mut(row.request);
            if own.may_exit() && !own.confidence.is_nan() {
                let (exits, kind) = (own.confident(), r.kind.index());
                sorter.look(&mut r.kind, exits);
                self.often = self.often + r.kind.index() - kind;
                if self.config.routing {
                    self.routing.observe(&mut r.recent, ramp, exits);
                }
            }
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
        self.exits.observe_sorted(after, ramp, &sorter);
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
    pub fn complete(&mut self, now_ns: u64, duration_ns: u64, cells: u64) -> Result<()> {
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
            cells,
            duration_ns,
        );
        self.counters.steps += 1;
        self.counters.step_rows += self.rows.len() as u64;
        self.counters.flushes[step.reason as usize] += 1;

        for k in 0..self.rows.len() {
            let row = self.rows[k];
            let waited = |since: u64| step.now_ns.saturating_sub(since);
            match row.origin {
                Origin::Held(_) => {
                    let ns = waited(self.buffer.node(row.slot).since_ns);
                    self.counters.wait(ns);
                    if !row.gone {
                        let r = self.requests.get_mut(row.request);
                        r.held_ns += ns;
                        r.spent_ns[Miss::Held as usize] += ns;
                    }
                }
                Origin::Ready if !row.gone => {
                    let ns = waited(self.buffer.ready_node(row.request).since_ns);
                    let r = self.requests.get_mut(row.request);
                    // A row that exited may be ready again by now, and then
                    // its node is not this token's.
                    if r.state != State::Ready {
                        r.spent_ns[Miss::Queue as usize] += ns;
                    }
                }
                Origin::Ready | Origin::Stay(_) => {}
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
                    let r = self.requests.get_mut(row.request);
                    r.ramp = ramp as u32;
                    let entry = Entry {
                        seq,
                        since_ns: now_ns,
                        due_ns: r.due_ns().unwrap_or(0),
                        priority: r.priority,
                        plans: self.planner.plans,
                    };
                    self.buffer.push(ramp, row.slot, stay, entry);
                }
            }
        }
        let held = u64::from(self.buffer.held());
        self.counters.held_rows_max = self.counters.held_rows_max.max(held);
        let tokens = self.counters.tokens - self.gaps.tokens;
        self.gaps.pause(now_ns, self.counters.tokens);
        self.end_step();
        if self.config.policy == Policy::Auto {
            let load = Load {
                requests: self.decoding as u32,
                often: self.often as u32,
                gap_ns: self.gaps.gap_ns(),
                prompt_ns: self.gaps.prompt_ns_per_token(),
            };
            let allowed = self.allowed();
            self.auto
                .step(tokens, load, allowed, &self.cost, &self.exits);
            if !self.host_replans {
                let share = duration_ns / REPLAN_SHARE / WINDOW_NS;
                self.replan_some(share.clamp(REPLAN_MIN, REPLAN_MAX) as u32);
            }
        }
        Ok(())
    }

    fn replan_some(&mut self, windows: u32) -> bool {
        self.auto.work(windows, &self.cost, &self.exits)
    }

    /// Does up to about `windows` simulated windows' worth of the search for
    /// a better rule (0: all of it). After the first call, [`Engine::complete`]
    /// leaves that work to the host. True when none is left.
    pub fn replan(&mut self, windows: u32) -> bool {
        self.host_replans = true;
        self.replan_some(if windows == 0 { u32::MAX } else { windows })
    }

    /// A whole search for a rule from what is known now.
    pub fn search_anew(&mut self) {
        self.auto.begin(&self.cost, &self.exits);
        self.replan_some(u32::MAX);
    }

    /// Starts from times learned before.
    pub fn load_profile(&mut self, p: &Profile) -> Result<()> {
        p.validate()?;
        if p.n_layers != self.config.n_layers {
            return Err(Error::Conflict {
                field: "n_layers",
                index: None,
                value: p.n_layers.into(),
                other: "the engine's n_layers",
                other_value: self.config.n_layers.into(),
                why: "a profile belongs to one model",
            });
        }
        if p.ramp_layers != self.config.ramp_layers {
            return Err(Error::int(
                "ramp_layers",
                p.ramp_layers.len() as u64,
                "the engine's own exit layers",
            ));
        }
        self.cost.load(p);
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
                    self.buffer.restore(ramp, row.slot, true);
                }
            }
        }
        self.end_step();
        Ok(())
    }

    /// A timing that was not planned here.
    pub fn observe(&mut self, begin: u32, end: u32, rows: u32, cells: u64, ns: u64) -> Result<()> {
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
        self.cost.observe(begin, end, rows, cells, ns);
        Ok(())
    }

    fn end_step(&mut self) {
        self.step = None;
        self.ramped = false;
        self.rows.clear();
    }

    fn emitted(&mut self, request: u32, now_ns: u64) {
        let r = self.requests.get_mut(request);
        let all = now_ns.saturating_sub(r.last_token_ns);
        let spent: u64 = r.spent_ns.iter().sum();
        if r.due_ns().is_some_and(|due| now_ns > due) {
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
        r.spent_ns = [0; 3];
        r.last_token_ns = now_ns;
        if r.state == State::Ready {
            // Made ready before its step was complete: the deadline of its
            // next token starts here.
            let node = *self.buffer.ready_node(request);
            let entry = Entry {
                seq: node.seq,
                since_ns: node.since_ns,
                due_ns: r.due_ns().unwrap_or(0),
                priority: node.priority,
                plans: node.plans,
            };
            self.buffer.pop_ready(request);
            self.buffer.push_ready(request, entry);
        }
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
