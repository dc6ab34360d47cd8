// SPDX-License-Identifier: Apache-2.0

//! Ties the parts together: the life of requests and rows through
//! plan, ramp and complete.

use super::auto::{Auto, Known, Load};
use super::buffer::Buffer;
use super::config::{Config, Fill, check_threshold};
use super::cost::CostModel;
use super::counters::{Counters, Miss, Reason};
use super::drafts::Acceptance;
use super::error::{Error, Result};
use super::exits::Exits;
use super::gaps::Gaps;
use super::metric::{Metric, Score};
use super::pending::Pending;
use super::planner::{Choice, Marks, Planner, View};
use super::policy::{self, Decision, Policy, RampRow};
use super::profile::Profile;
use super::queue::Entry;
use super::request::{Request, RequestConfig, Requests, State};
use super::routing::{Routing, Stop, best_stop};
use super::{MAX_RAMPS, NONE, memory};

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
    /// The window ends where pending rows wait, and nobody is to exit.
    only_meets: bool,
}

/// Where a row of the step goes back to if the step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Ready,
    Held(usize),
    Stay(usize),
    /// Stays in its request's chain.
    Pending,
}

#[derive(Debug, Clone, Copy)]
pub struct StepRow {
    /// Index of the request; meaningless once `gone`.
    pub request: u32,
    pub id: u64,
    pub slot: u32,
    /// 0: the request's own row. n: a pending one, n tokens before.
    pub back: u32,
    pub fill: Fill,
    /// The request was removed since the plan.
    pub gone: bool,
    /// Set by `ramp` and `verify`.
    pub decision: Decision,
    pub forced: bool,
    pub score: Score,
    origin: Origin,
}

impl StepRow {
    /// Left at the ramp, and wants the K/V of its skipped layers copied.
    pub fn copies(&self) -> bool {
        self.decision == Decision::Exit && !self.gone && self.fill == Fill::Copy
    }

    /// The ramp that it was held at before the step.
    pub fn was_held_at(&self) -> Option<usize> {
        match self.origin {
            Origin::Held(ramp) => Some(ramp),
            _ => None,
        }
    }

    /// Waits for [`Engine::verify`] in a step that ends at the last layer.
    pub fn is_draft(&self) -> bool {
        self.back > 0 && self.fill == Fill::Verify && !self.gone
    }
}

/// What the full model says to a draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agrees {
    No,
    Yes,
    /// The same token, and the request's last: what was made after it is void.
    AndEnds,
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
    /// Those of them that fill their holes in each way.
    fills: [usize; Fill::ALL.len()],
    acceptance: Acceptance,
    /// Requests alive that may exit at each ramp.
    may_exit: [u32; MAX_RAMPS],
    step: Option<Step>,
    rows: Vec<StepRow>,
    ramped: bool,
    verified: bool,
    pending: Pending,
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
        let requests = config.max_requests as usize;
        let pass = config.pass_rows();
        Ok(Engine {
            requests: Requests::new(requests)?,
            buffer: Buffer::new(config.n_slots as usize, requests, config.n_ramps())?,
            cost: CostModel::new(config.n_layers, &config.ramp_layers),
            counters: Counters::default(),
            planner: Planner::new(&config)?,
            exits: Exits::new(config.n_ramps()),
            auto: Auto::new(&config),
            routing: Routing::default(),
            gaps: Gaps::default(),
            host_replans: false,
            decoding: 0,
            often: 0,
            fills: [0; Fill::ALL.len()],
            acceptance: Acceptance::default(),
            may_exit: [0; MAX_RAMPS],
            step: None,
            rows: memory::room(pass)?,
            ramped: false,
            verified: false,
            pending: Pending::new(config.n_slots, config.max_requests)?,
            last_rows: 0,
            ramp_rows: memory::room(pass)?,
            scratch: memory::room(pass)?,
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

    pub fn acceptance(&self) -> &Acceptance {
        &self.acceptance
    }

    pub fn gaps(&self) -> &Gaps {
        &self.gaps
    }

    /// Requests alive that have had a token to run.
    pub fn decoding(&self) -> usize {
        self.decoding
    }

    /// The latest time that any call named.
    pub fn clock_ns(&self) -> u64 {
        self.clock_ns
    }

    /// The requests alive whose row is held, in no order.
    pub fn held_requests(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().filter(|r| r.state == State::Held)
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
        let fill = request.fill.unwrap_or(self.config.fill);
        self.config.check_fill(fill)?;
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
        item.fill = fill;
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
            self.fills[r.fill as usize] += 1;
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
    fn wait_at(&mut self, request: u32, ramp: usize, slot: u32, stay: bool, now_ns: u64) {
        let seq = self.next_seq();
        let r = self.requests.get_mut(request);
        r.ramp = ramp as u32;
        let entry = Entry {
            seq,
            since_ns: now_ns,
            due_ns: r.due_ns().unwrap_or(0),
            priority: r.priority,
            plans: self.planner.plans,
        };
        self.buffer.push(ramp, slot, stay, entry);
    }

    /// Forgets a request, whatever it is doing. A row that is in the planned
    /// step gives its slot back when the step ends.
    pub fn remove(&mut self, id: u64) -> Result<()> {
        let i = self.requests.find(id)?;
        let r = self.requests.get(i);
        let (state, slot, in_step, started) = (r.state, r.slot, r.in_step, r.started);
        let (ramp, may_exit, kind, fill) = (r.ramp, r.may_exit, r.kind, r.fill);
        let (settling, mut chain) = (r.settling, r.pending);
        let in_step = match in_step {
            NONE => 0..0,
            first => first as usize..(first + r.step_rows) as usize,
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
            // Those in the step give theirs back with it.
            if self.rows[in_step.clone()].iter().all(|r| r.slot != slot) {
                self.buffer.return_slot(slot);
            }
        }
        if started {
            self.decoding -= 1;
            self.often -= kind.index();
            self.fills[fill as usize] -= 1;
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

    fn check_rows(&self, n_rows: usize, why: &'static str) -> Result<()> {
        if n_rows == self.rows.len() {
            return Ok(());
        }
        Err(Error::Conflict {
            field: "n_rows",
            index: None,
            value: n_rows as u64,
            other: "the planned step's n_rows",
            other_value: self.rows.len() as u64,
            why,
        })
    }

    /// Decides every row of the planned step; the verdicts are in
    /// [`Engine::step_rows`].
    pub fn ramp(&mut self, scores: &[Score]) -> Result<()> {
        let ramp = self.expect_ramp()?;
        self.check_rows(scores.len(), "every planned row has one row of logits")?;
        self.ramp_rows.clear();
        let (requests, config) = (&self.requests, &self.config);
        let only_meets = self.step.is_some_and(|s| s.only_meets);
        let rows = self.rows.iter().zip(scores).map(|(row, score)| {
            let aside = row.gone || row.back > 0;
            let threshold = if aside || only_meets {
                f32::INFINITY
            } else {
                let own = requests.get(row.request).threshold;
                own.unwrap_or(config.thresholds[ramp])
            };
            RampRow {
                confidence: score.confidence,
                threshold,
                gone: aside,
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
            let (mut decision, mut forced) = (own.decision, own.forced);
            if row.gone || row.back > 0 {
                if !row.gone {
                    decision = Decision::Pending;
                    self.pending.advance(row.slot, ramp);
                }
                row.decision = decision;
                row.score = Score::NONE;
                continue;
            }
            let r = self.requests.get_mut(row.request);
            if decision == Decision::Exit && r.fill.keeps() {
                if self.pending.full() || r.pending.len() >= self.config.pending() {
                    // No room to stay pending: it goes deep now, and takes
                    // the others along.
                    decision = self.config.policy.otherwise();
                    forced = own.confident();
                } else {
                    self.pending.push(&mut r.pending, row.slot, ramp);
                }
            }
            row.decision = decision;
            row.forced = forced;
            row.score = *score;
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
                    // A draft becomes a token when it is verified.
                    let token = u64::from(r.fill != Fill::Verify);
                    r.tokens += token;
                    r.exits[ramp] += 1;
                    r.involuntary_exits += u64::from(forced);
                    self.counters.tokens += token;
                    self.counters.exits[ramp] += 1;
                    self.counters.involuntary_exits += u64::from(forced);
                }
                Decision::Hold => {
                    r.state = State::Held;
                    r.ramp = ramp as u32;
                    r.involuntary_stays += u64::from(forced);
                    self.counters.involuntary_stays += u64::from(forced);
                }
                Decision::Stay => {
                    r.involuntary_stays += u64::from(forced);
                    self.counters.involuntary_stays += u64::from(forced);
                }
                _ => {}
            }
        }
        self.exits.observe_sorted(after, ramp, &sorter);
        self.ramped = true;
        Ok(())
    }

    /// In a step that ends at the last layer: `agrees` says of each row
    /// whether the full model's token is the one that it emitted as a draft;
    /// it is looked at for drafts only. The verdicts are in
    /// [`Engine::step_rows`].
    pub fn verify(&mut self, agrees: impl ExactSizeIterator<Item = Agrees>) -> Result<()> {
        match &self.step {
            None => {
                return Err(Error::CallOrder(
                    "no step is planned; expected drex_plan first",
                ));
            }
            Some(step) if step.ramp.is_some() => {
                return Err(Error::CallOrder(
                    "the planned window ends at a ramp; expected drex_ramp",
                ));
            }
            Some(_) if self.verified => {
                return Err(Error::CallOrder(
                    "the planned step is verified; expected drex_complete",
                ));
            }
            Some(_) => {}
        }
        self.check_rows(agrees.len(), "every planned row has one answer")?;
        // A request's rows stand together, the oldest first. What follows one
        // that was replaced, or that ends the request, is void.
        let mut replaced = NONE;
        for (row, agrees) in self.rows.iter_mut().zip(agrees) {
            let void = replaced == row.request;
            row.decision = if row.gone {
                Decision::Gone
            } else if void {
                Decision::Drop
            } else if !row.is_draft() {
                if row.back > 0 {
                    Decision::Pending
                } else {
                    Decision::Exit
                }
            } else if agrees != Agrees::No {
                if agrees == Agrees::AndEnds {
                    replaced = row.request;
                }
                Decision::Accept
            } else {
                replaced = row.request;
                Decision::Replace
            };
        }
        self.verified = true;
        Ok(())
    }

    fn ratio_at(&self, ramp: usize) -> Option<f64> {
        self.config.art_ratio.map(f64::from).or_else(|| {
            let layer = self.config.ramp_layers[ramp];
            let rows = self.rows.len() as u32;
            let ratio = self.cost.art_ratio(layer, rows)?;
            // A row that stays pending saves only its part of what a deep
            // pass costs without rows, and nothing if it was a wrong draft.
            let per_row = self.cost.share_per_row(layer, rows)?;
            let wrong = self.share_of(Fill::Verify) * (1.0 - self.acceptance.chance(ramp));
            let saved = (1.0 - self.share_keeping() * per_row) * (1.0 - wrong);
            Some(ratio / saved.max(1e-3))
        })
    }

    /// The planned step, if [`Engine::complete`] would end it.
    pub fn expect_complete(&self) -> Result<Step> {
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
        self.counters.window(duration_ns);
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
                Origin::Ready | Origin::Stay(_) | Origin::Pending => {}
            }
            if !row.gone {
                self.requests.get_mut(row.request).in_step = NONE;
            }
            self.leave(row, step.ramp, now_ns);
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
                keeping: self.share_keeping(),
                verifying: self.share_of(Fill::Verify),
            };
            let allowed = self.allowed();
            let (auto, known) = self.auto_and_known();
            auto.step(tokens, load, allowed, known);
            if !self.host_replans {
                let share = duration_ns / REPLAN_SHARE / WINDOW_NS;
                self.replan_some(share.clamp(REPLAN_MIN, REPLAN_MAX) as u32);
            }
        }
        Ok(())
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
                // It stays pending, further on.
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

    /// Rows that left and have layers to go.
    pub fn pending_rows(&self) -> u32 {
        self.pending.total()
    }

    fn auto_and_known(&mut self) -> (&mut Auto, Known<'_>) {
        let known = Known {
            cost: &self.cost,
            exits: &self.exits,
            acceptance: &self.acceptance,
        };
        (&mut self.auto, known)
    }

    /// Share of the requests in decode that fill their holes so.
    fn share_of(&self, fill: Fill) -> f64 {
        self.fills[fill as usize] as f64 / self.decoding.max(1) as f64
    }

    fn share_keeping(&self) -> f64 {
        let keep = Fill::ALL.into_iter().filter(|f| f.keeps());
        keep.map(|f| self.share_of(f)).sum()
    }

    fn replan_some(&mut self, windows: u32) -> bool {
        let (auto, known) = self.auto_and_known();
        auto.work(windows, known)
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
        let (auto, known) = self.auto_and_known();
        auto.begin(known);
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
        let Some(step) = self.step else {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        };
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
                if !row.fill.keeps() {
                    self.buffer.return_slot(row.slot);
                }
                continue;
            }
            if let (true, true, Some(after)) = (row.back > 0, r.settling, step.after) {
                // Without a newer row that may have left, all of it goes back.
                self.pending.advance(row.slot, after);
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
                Origin::Pending => {}
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
