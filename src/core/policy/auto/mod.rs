// SPDX-License-Identifier: Apache-2.0

//! Policy `auto`: which threshold rule to follow, "no early exit" among them.
//!
//! A *search* plays every candidate forward under what is known by now (see
//! [`rollout`]) and keeps the one that makes the most tokens per
//! second. It is cut into rollouts, so that a call does a bounded part of it.
//! A search starts when what it would run on has moved.
//!
//! Only a rule that is tried is learned of, so a small share of the tokens is made
//! under another one: full passes while early exit is on, all ramps while it
//! is not. A ramp's chance is taken a standard error too high, so that a rule
//! is dropped for what is known of it, not for what is not.

mod losses;
pub mod rollout;
mod scene;
mod search;

use self::losses::Losses;
use self::rollout::{Rollout, Scene};
use self::search::{Basis, FINALISTS, GRID, READY};
use crate::core::MAX_RAMPS;
use crate::core::config::Config;
use crate::core::estimate::acceptance::Acceptance;
use crate::core::estimate::cost::CostModel;
use crate::core::estimate::exit_rate::ExitRates;
use crate::core::estimate::reliability::Reliability;
use crate::core::policy::rule::{MOST_DRAFTS, Rule, SURVIVAL};

/// Tokens, in units of the requests alive, per probe of the ramps.
const PROBE_RAMPS: u64 = 80;
/// The first probes come sooner: what the first windows of a process took may
/// say little. The distance grows by half each time.
const PROBE_FIRST: u64 = 4;
/// [`PROBE_RAMPS`] for full passes, which cost more.
const PROBE_OFF: u64 = 320;
/// A search starts after this many steps at the latest.
const SEARCH_AFTER: u32 = 200;

/// The host's load, besides times and exits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    pub requests: u32,
    /// Requests that exit often, see [`Habit`](crate::core::estimate::exit_rate::Habit).
    pub frequent: u32,
    pub gap_ns: f64,
    /// Prompt work between windows, per token made.
    pub prompt_ns: f64,
    /// Prompt rows in windows, per token made, and of one pass.
    pub prompt_rows: f64,
    pub chunk: f64,
    /// Share of the requests whose exited rows stay pending, and of those
    /// whose tokens are verified.
    pub keeping: f64,
    pub verifying: f64,
    /// Share of the requests whose thresholds are learned; their tokens are verified.
    pub learning: f64,
    /// Rows that are held, each as the share of its layers that it has passed.
    pub done: f64,
}

/// The sources of times and exits.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    pub cost: &'a CostModel,
    pub exit_rates: &'a ExitRates,
    pub acceptance: &'a Acceptance,
    pub reliability: &'a Reliability,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    rule: Rule,
    rate: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Idle,
    /// Each ramp alone, at a few thetas.
    Single,
    /// The best set so far, with one more ramp or one less.
    Grow,
    /// The best set, at every least survival of drafts.
    Survival,
    /// The best set, at every theta and phi.
    Fine,
    /// The best few and the present rule, for longer.
    Final,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Nothing is known: full passes, ramps, and again, in spans of as many
    /// tokens as there are requests.
    Start(u8),
    Run,
    Probe(Rule),
}

/// The rule in force and the search for the next one.
pub struct Auto {
    batch: u32,
    /// Rows in one pass at most, and pending rows of a request.
    pass_rows: u32,
    max_pending: u32,
    ramps: usize,
    seed: u64,
    /// Bit r: some request may exit at ramp r.
    allowed: u32,
    rule: Rule,
    /// The best rule that is not "off", for probes.
    other: Rule,
    predicted: f64,
    predicted_off: f64,
    /// How much longer to wait with a probe of the ramps, by what it would
    /// lose where exited rows stay pending: the more, the further things must
    /// move for it to matter.
    patience: f64,
    losses: Losses,
    phase: Phase,
    /// Tokens until the phase ends.
    left: u64,
    until_ramps: u64,
    until_off: u64,
    /// Spans between two probes of the ramps; between two probes of full passes
    /// there are four times as many.
    distance: u64,
    steps: u32,
    searches: u64,
    basis: Option<Basis>,
    load: Load,
    stage: Stage,
    next: usize,
    list: Vec<Candidate>,
    final_list: Vec<Candidate>,
    best: Candidate,
    grown: u32,
    /// The candidate that is played now, and on what.
    rollout: Option<Rollout>,
    scene: Scene,
}

impl Auto {
    pub fn new(config: &Config) -> Self {
        let ramps = config.n_ramps();
        let all = ((1u64 << ramps) - 1) as u32;
        let half = Rule {
            ramps: all,
            hold: 0.5,
            ready: 0.0,
            survival: SURVIVAL,
            drafts: MOST_DRAFTS,
        };
        Auto {
            batch: config.batch() as u32,
            pass_rows: config.pass_rows() as u32,
            max_pending: config.pending(),
            ramps,
            seed: config.seed,
            allowed: all,
            rule: Rule::OFF,
            other: half,
            predicted: 0.0,
            predicted_off: 0.0,
            patience: 1.0,
            losses: Losses::default(),
            phase: Phase::Start(0),
            left: 1,
            until_ramps: 0,
            until_off: 0,
            distance: PROBE_FIRST,
            steps: 0,
            searches: 0,
            basis: None,
            load: Load::default(),
            stage: Stage::Idle,
            next: 0,
            list: Vec::with_capacity(GRID as usize * READY.len() + 8 * MAX_RAMPS),
            final_list: Vec::with_capacity(FINALISTS + 4),
            best: Candidate {
                rule: Rule::OFF,
                rate: 0.0,
            },
            grown: 0,
            rollout: None,
            scene: Scene::EMPTY,
        }
    }

    /// The rule to follow now.
    pub fn rule(&self) -> Rule {
        match self.phase {
            Phase::Start(k) if k % 2 == 0 => Rule::OFF,
            Phase::Start(_) => self.all_ramps(),
            Phase::Run => self.rule,
            Phase::Probe(rule) => rule,
        }
    }

    /// A rule has been found, and is in force.
    pub fn settled(&self) -> bool {
        self.phase == Phase::Run
    }

    /// The rule that the last search chose.
    pub fn chosen(&self) -> Rule {
        self.rule
    }

    /// Tokens per ns that the last search expected, and those of full passes.
    pub fn predicted(&self) -> (f64, f64) {
        (self.predicted, self.predicted_off)
    }

    pub fn searches(&self) -> u64 {
        self.searches
    }

    pub fn searching(&self) -> bool {
        self.stage != Stage::Idle
    }

    fn all_ramps(&self) -> Rule {
        Rule {
            ramps: self.allowed,
            hold: self.other.hold,
            ready: self.other.ready,
            survival: self.other.survival,
            drafts: self.other.drafts,
        }
    }

    /// A step ended: `tokens` were emitted. Moves through start and probes,
    /// and starts a search when it is time.
    pub fn step(&mut self, tokens: u64, ns: u64, load: Load, allowed: u32, known: Known) {
        // The last request is often gone before its step ends: that says nothing
        // about those to come.
        let none = load.requests == 0;
        if !none {
            self.load = load;
        }
        if allowed != 0 {
            self.allowed = allowed;
        }
        self.steps += 1;
        self.spend(tokens, ns);
        if self.left == 0 {
            self.phase = self.next_phase(known);
        }
        let idle = none || self.stage != Stage::Idle || !known.cost.known();
        if self.phase == Phase::Run && !idle && self.search_is_due(known) {
            self.begin(known);
        }
    }

    /// Takes a step's tokens and time off the phase and the waits for probes.
    fn spend(&mut self, tokens: u64, ns: u64) {
        let ns = ns as f64 + self.load.gap_ns;
        self.losses.step(ns, tokens as f64, self.probes());
        self.until_ramps = self.until_ramps.saturating_sub(tokens);
        self.until_off = self.until_off.saturating_sub(tokens);
        self.left = self.left.saturating_sub(tokens);
    }

    /// What the present phase loses is counted as a probe's.
    fn probes(&self) -> bool {
        matches!(self.phase, Phase::Start(1 | 3) | Phase::Probe(_))
    }

    /// Ends the present phase; returns the one that follows.
    fn next_phase(&mut self, known: Known) -> Phase {
        let load = self.load;
        if self.probes() {
            self.losses.end(self.rule().ramps != 0, load.done);
        }
        let span = u64::from(load.requests.clamp(1, 2 * self.batch));
        let pass_ns = self.pass_ns(known.cost);
        let dear = !self.losses.allow(true, pass_ns);
        match self.phase {
            // Where the first windows with ramps cost too much, more wait.
            Phase::Start(k) if k < 2 || k == 2 && !dear => {
                self.left = span.min(u64::from(self.batch));
                self.losses.begin(load.done);
                Phase::Start(k + 1)
            }
            Phase::Start(_) => {
                self.until_ramps = self.distance * span;
                self.until_off = PROBE_OFF / PROBE_RAMPS * self.distance * span;
                self.begin(known);
                Phase::Run
            }
            Phase::Probe(_) => Phase::Run,
            Phase::Run => self.probe(span, pass_ns),
        }
    }

    /// Time of a full pass over as many requests as are alive and fit.
    fn pass_ns(&self, cost: &CostModel) -> f64 {
        let rows = f64::from(self.load.requests.clamp(1, self.batch));
        let profile = cost.profile();
        let cells = rows * cost.cells_per_row();
        profile.time(0, profile.segments.len(), rows, cells)
    }

    /// The last search is long ago, or what it ran on has moved.
    fn search_is_due(&self, known: Known) -> bool {
        let late = self.steps >= SEARCH_AFTER;
        // Soon after the start every step tells a lot.
        let early = self.searches < 12 && self.steps >= 4 << (self.searches / 3);
        late || early || self.moved(known)
    }

    fn probe(&mut self, span: u64, pass_ns: f64) -> Phase {
        if self.until_ramps == 0 && self.losses.allow(true, pass_ns) {
            self.distance = (self.distance + self.distance.div_ceil(2)).min(PROBE_RAMPS);
            self.until_ramps = (self.distance as f64 * self.patience) as u64 * span;
            if self.rule.ramps != self.allowed && self.allowed != 0 {
                self.left = span.min(u64::from(self.batch));
                self.losses.begin(self.load.done);
                return Phase::Probe(self.all_ramps());
            }
        }
        if self.until_off == 0 && self.losses.allow(false, pass_ns) {
            self.until_off = PROBE_OFF / PROBE_RAMPS * self.distance * span;
            if self.rule.ramps != 0 {
                self.left = 1;
                self.losses.begin(self.load.done);
                return Phase::Probe(Rule::OFF);
            }
        }
        Phase::Run
    }
}
