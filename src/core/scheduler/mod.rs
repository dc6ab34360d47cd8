// SPDX-License-Identifier: Apache-2.0

//! Ties the parts together: the life of requests and rows through
//! plan, ramp and complete.

mod abandon;
mod agree;
mod complete;
mod learn;
mod plan;
mod ramp;
mod requests;
mod teach;
mod verify;

use crate::core::config::{Config, Fill, Quality};
use crate::core::counters::{Counters, Reason};
use crate::core::decision::Decision;
use crate::core::error::Result;
use crate::core::estimate::acceptance::Acceptance;
use crate::core::estimate::agreement::Agreement;
use crate::core::estimate::cost::CostModel;
use crate::core::estimate::exit_rate::ExitRates;
use crate::core::estimate::host_time::HostTime;
use crate::core::estimate::prompts::Prompts;
use crate::core::estimate::reliability::Reliability;
use crate::core::flush::planner::{Choice, Planner};
use crate::core::metric::{Metric, Score};
use crate::core::policy::RampRow;
use crate::core::policy::auto::Auto;
use crate::core::policy::rule::RowRule;
use crate::core::random::Rng;
use crate::core::rows::buffer::Buffer;
use crate::core::rows::pending::Pending;
use crate::core::rows::requests::{Request, Requests, State};
use crate::core::{MAX_RAMPS, NONE, memory};

/// A window for the host to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub layer_begin: u32,
    pub layer_end: u32,
    /// The ramp at the window's end; `None` at the last layer.
    pub ramp: Option<usize>,
    pub reason: Reason,
    pub now_ns: u64,
    /// Prompt rows that run along.
    pub prompt_rows: u32,
    choice: Choice,
    /// The window ends where pending rows wait, and nobody is to exit.
    nobody_exits: bool,
}

impl Step {
    /// The ramp where its rows waited; `None` for a window from layer 0.
    fn after(&self) -> Option<usize> {
        self.choice.ramp()
    }
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
    /// The host would not have it exit with the ramp's token.
    pub refused: bool,
    pub score: Score,
    /// When it began to wait for the step.
    pub since_ns: u64,
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

    /// Waits for [`Scheduler::verify`] in a step that ends at the last layer.
    pub fn is_draft(&self) -> bool {
        self.back > 0 && self.fill == Fill::Verify && !self.gone
    }
}

/// The full model's word on a draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agrees {
    No,
    Yes,
    /// Yes, and the token is the request's last: what was made after it is void.
    AndEnds,
}

/// A ramp's word on a token, until the full model has chosen.
#[derive(Debug, Clone, Copy, Default)]
struct Guess {
    token: i32,
    /// Of its confidence, see [`bin`](crate::core::estimate::reliability::bin).
    bin: u8,
}

pub struct Scheduler {
    config: Config,
    requests: Requests,
    buffer: Buffer,
    cost: CostModel,
    counters: Counters,
    planner: Planner,
    exit_rates: ExitRates,
    auto: Auto,
    host_time: HostTime,
    prompts: Prompts,
    /// The host calls [`Scheduler::replan`] itself.
    host_replans: bool,
    /// Time that the search may take and has not.
    replan_ns: i64,
    decoding: usize,
    /// Requests in decode that exit often.
    frequent: usize,
    /// Requests in decode that fill their holes in each way.
    fills: [usize; Fill::ALL.len()],
    /// Requests in decode whose thresholds are learned.
    learning: usize,
    acceptance: Acceptance,
    reliability: Reliability,
    agreement: Agreement,
    /// See [`Scheduler::target`].
    target: Option<u8>,
    /// Requests in decode with a target.
    agreeing: usize,
    /// Draws who is audited.
    rng: Rng,
    /// What each ramp said of the token in a slot, by slot and ramp; and in which of
    /// them it was looked at: bit r for ramp r. Empty where nobody learns.
    guesses: Vec<Guess>,
    looked_at: Vec<u16>,
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

const _: () = assert!(MAX_RAMPS <= u16::BITS as usize); // looked_at

impl Scheduler {
    pub fn new(config: Config) -> Result<Self> {
        config.validate()?;
        let requests = config.max_requests as usize;
        let pass = config.pass_rows();
        // Of requests whose drafts stay pending, for which there must be room.
        let teaching = match config.pending() {
            0 => 0,
            _ => config.n_slots as usize,
        };
        Ok(Scheduler {
            requests: Requests::new(requests)?,
            buffer: Buffer::new(config.n_slots as usize, requests, config.n_ramps())?,
            cost: CostModel::new(config.n_layers, &config.ramp_layers),
            counters: Counters::default(),
            planner: Planner::new(&config)?,
            exit_rates: ExitRates::new(config.n_ramps()),
            auto: Auto::new(&config),
            host_time: HostTime::default(),
            prompts: Prompts::default(),
            host_replans: false,
            replan_ns: 0,
            decoding: 0,
            frequent: 0,
            fills: [0; Fill::ALL.len()],
            learning: 0,
            acceptance: Acceptance::default(),
            reliability: Reliability::new(config.n_ramps()),
            agreement: Agreement::default(),
            target: match config.quality {
                Quality::Agreement(target) => Some(target),
                _ => None,
            },
            agreeing: 0,
            rng: Rng(config.seed),
            guesses: memory::filled(Guess::default(), teaching * config.n_ramps())?,
            looked_at: memory::filled(0, teaching)?,
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

    pub fn exit_rates(&self) -> &ExitRates {
        &self.exit_rates
    }

    pub fn auto(&self) -> &Auto {
        &self.auto
    }

    /// The rule in force, in rows.
    fn row_rule(&self) -> RowRule {
        RowRule::new(&self.config, self.decoding, self.auto.rule())
    }

    /// The rule in force without probes, in rows.
    pub fn chosen_rule(&self) -> RowRule {
        RowRule::new(&self.config, self.decoding, self.auto.chosen())
    }

    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    pub fn acceptance(&self) -> &Acceptance {
        &self.acceptance
    }

    pub fn reliability(&self) -> &Reliability {
        &self.reliability
    }

    /// Requests in decode whose thresholds are learned.
    pub fn learning(&self) -> usize {
        self.learning
    }

    pub fn host_time(&self) -> &HostTime {
        &self.host_time
    }

    pub fn prompts(&self) -> &Prompts {
        &self.prompts
    }

    /// Requests alive that have had a token to run.
    pub fn decoding(&self) -> usize {
        self.decoding
    }

    /// The time that the last call named.
    pub fn clock_ns(&self) -> u64 {
        self.clock_ns
    }

    /// The requests alive whose row is held, in no order; without those that
    /// the planned step's ramp wants held.
    pub fn held_requests(&self) -> impl Iterator<Item = &Request> {
        let held = |r: &&Request| r.state == State::Held && r.in_step == NONE;
        self.requests.iter().filter(held)
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

    /// Rows that left and have layers to go.
    pub fn pending_rows(&self) -> u32 {
        self.pending.total()
    }

    fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    /// The host's clock may go back, and a wrong time does not stay.
    fn tick(&mut self, now_ns: u64) {
        self.clock_ns = now_ns;
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
