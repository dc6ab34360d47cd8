// SPDX-License-Identifier: Apache-2.0

//! Policy `auto`: which threshold rule to follow, "no early exit" among them.
//!
//! A *search* plays every candidate forward under what is known by now (see
//! [`super::rollout`]) and keeps the one that makes the most tokens per
//! second. It is cut into rollouts, so that a call does a bounded part of it.
//! A search starts when what it would run on has moved.
//!
//! Only a rule that is tried is learned of, so a small share of the tokens is made
//! under another one: full passes while early exit is on, all ramps while it
//! is not. A ramp's chance is taken a standard error too high, so that a rule
//! is dropped for what is known of it, not for what is not.

use super::MAX_RAMPS;
use super::carrier::Ways;
use super::config::Config;
use super::cost::CostModel;
use super::drafts::{Acceptance, Cycle};
use super::exits::{Exits, KINDS};
use super::rollout::{Game, Outcome, Rollout, Rule, Scene};

/// Tokens, in units of the requests alive, per probe of the ramps.
const PROBE_RAMPS: u64 = 80;
/// The first probes come sooner: what the first windows of a process took may
/// say little. The distance grows by half each time.
const PROBE_FIRST: u64 = 4;
/// [`PROBE_RAMPS`] for full passes, which cost more.
const PROBE_OFF: u64 = 320;
/// A probe that loses the inverse of this of its time waits twice as long.
const IMPATIENT: f64 = 10.0;
/// Bounds of what probes lose: a share of all time so far, and on top of it so
/// many full passes at the start.
const PROBE_SHARE: f64 = 0.01;
const PROBE_PASSES: f64 = 0.1;
/// Weight of a step in the usual time of a token.
const USUAL: f64 = 1.0 / 32.0;
/// A search starts after this many steps at the latest.
const SEARCH_AFTER: u32 = 200;
/// A rule must promise this much more than the present one.
const HYSTERESIS: f64 = 1.003;
/// Changes that start a search: of a chance, and, relatively, of a time or
/// the number of requests.
const MOVED_CHANCE: f64 = 0.02;
const MOVED_SHARE: f64 = 0.04;
/// theta is tried in twentieths of the scale.
const GRID: u32 = 20;
/// phi, as shares of theta's scale. 0: held rows flush when none is ready.
const READY: [f32; 4] = [0.0, 0.0625, 0.125, 0.25];
/// Candidates that are played again for longer.
const FINALISTS: usize = 10;
/// Windows of one rollout at most.
const PASSES: u32 = 400;
/// Cost of the beginning of a rollout, or of a step of the search, in windows.
const STEP_WINDOWS: u32 = 4;

/// The host's load, besides times and exits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    pub requests: u32,
    /// Requests that exit often, see [`super::exits::Kind`].
    pub often: u32,
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
    /// Rows that are held, each as the share of its layers that it has passed.
    pub done: f64,
}

/// Time that probes lose: where a pass takes long, so does a probe, and a
/// window of a shape that never ran before may take several times as long.
#[derive(Debug, Clone, Copy, Default)]
struct Losses {
    /// Of all steps.
    elapsed_ns: f64,
    lost_ns: f64,
    /// Usual time and tokens of late, without probes.
    usual_ns: f64,
    usual_tokens: f64,
    /// Of the probe under way.
    probe_ns: f64,
    probe_tokens: f64,
    done: f64,
    /// Loss of the last probe of full passes, and of ramps.
    last_ns: [f64; 2],
}

impl Losses {
    fn step(&mut self, ns: f64, tokens: f64, probe: bool) {
        self.elapsed_ns += ns;
        if probe {
            self.probe_ns += ns;
            self.probe_tokens += tokens;
        } else {
            self.usual_ns += (ns - self.usual_ns) * USUAL;
            self.usual_tokens += (tokens - self.usual_tokens) * USUAL;
        }
    }

    fn begin(&mut self, done: f64) {
        (self.probe_ns, self.probe_tokens, self.done) = (0.0, 0.0, done);
    }

    /// A probe ended; rows that it left held are worth the part that ran.
    fn end(&mut self, ramps: bool, done: f64) {
        if self.usual_tokens <= 0.0 {
            return;
        }
        let tokens = self.probe_tokens + done - self.done;
        let loss = self.probe_ns - tokens * self.usual_ns / self.usual_tokens;
        self.last_ns[usize::from(ramps)] = loss.max(0.0);
        self.lost_ns += loss.max(0.0);
    }

    /// Another probe that loses what the last one did is within bounds.
    fn allow(&self, ramps: bool, pass_ns: f64) -> bool {
        let next = self.lost_ns + self.last_ns[usize::from(ramps)];
        next <= PROBE_SHARE * self.elapsed_ns + PROBE_PASSES * pass_ns
    }
}

/// The sources of times and exits.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    pub cost: &'a CostModel,
    pub exits: &'a Exits,
    pub acceptance: &'a Acceptance,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    rule: Rule,
    rate: f64,
}

/// The numbers that a search ran on, to see when they have moved.
#[derive(Debug, Clone, Copy)]
struct Basis {
    requests: f64,
    chances: [f64; MAX_RAMPS],
    accepted: [f64; MAX_RAMPS],
    times: [f64; 3],
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Idle,
    /// Each ramp alone, at a few thetas.
    Single,
    /// The best set so far, with one more ramp or one less.
    Grow,
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
    /// Distance of probes of the ramps, of full passes a quarter.
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
        let load = self.load;
        self.steps += 1;
        let span = u64::from(load.requests.clamp(1, 2 * self.batch));
        let probes = matches!(self.phase, Phase::Start(1 | 3) | Phase::Probe(_));
        let ns = ns as f64 + load.gap_ns;
        self.losses.step(ns, tokens as f64, probes);
        self.until_ramps = self.until_ramps.saturating_sub(tokens);
        self.until_off = self.until_off.saturating_sub(tokens);
        self.left = self.left.saturating_sub(tokens);
        if self.left == 0 {
            let ramps = self.rule().ramps != 0;
            if probes {
                self.losses.end(ramps, load.done);
            }
            let pass = u64::from(load.requests.clamp(1, self.batch)) as f64;
            let profile = known.cost.profile();
            let cells = pass * known.cost.cells_per_row();
            let pass_ns = profile.time(0, profile.segments.len(), pass, cells);
            let dear = !self.losses.allow(true, pass_ns);
            self.phase = match self.phase {
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
            };
        }
        let idle = none || self.stage != Stage::Idle || !known.cost.known();
        if self.phase == Phase::Run && !idle {
            let late = self.steps >= SEARCH_AFTER;
            // Soon after the start every step tells a lot.
            let early = self.searches < 12 && self.steps >= 4 << (self.searches / 3);
            if late || early || self.moved(known) {
                self.begin(known);
            }
        }
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

    fn basis(&self, known: Known) -> Basis {
        let cost = known.cost;
        let mut chances = [0.0; MAX_RAMPS];
        let mut accepted = [0.0; MAX_RAMPS];
        for r in 0..self.ramps {
            chances[r] = known.exits.chance(None, r).p;
            accepted[r] = known.acceptance.chance(r);
        }
        let p = cost.profile();
        let (n, b) = (
            p.segments.len(),
            f64::from(self.batch.min(self.load.requests.max(1))),
        );
        let time = |i, j, rows: f64| p.time(i, j, rows, rows * cost.cells_per_row());
        Basis {
            requests: f64::from(self.load.requests),
            chances,
            accepted,
            times: [
                time(0, n, b),
                time(0, 1, b),
                time(n - 1, n, (b / 2.0).ceil()),
            ],
        }
    }

    fn moved(&self, known: Known) -> bool {
        let Some(old) = self.basis else { return true };
        let new = self.basis(known);
        let apart = |a: &[f64], b: &[f64]| {
            let mut pairs = a.iter().zip(b);
            pairs.any(|(a, b)| (a - b).abs() > MOVED_CHANCE)
        };
        let share = |a: f64, b: f64| (a - b).abs() > MOVED_SHARE * a.abs().max(b.abs());
        share(old.requests, new.requests)
            || old.times.iter().zip(&new.times).any(|(a, b)| share(*a, *b))
            || apart(&old.chances, &new.chances)
            || self.load.verifying > 0.0 && apart(&old.accepted, &new.accepted)
    }

    /// Starts a search; one that was under way starts anew.
    pub fn begin(&mut self, known: Known) {
        self.basis = Some(self.basis(known));
        self.steps = 0;
        self.searches += 1;
        self.list.clear();
        self.final_list.clear();
        self.rollout = None;
        self.next = 0;
        self.grown = 0;
        self.best = Candidate {
            rule: Rule::OFF,
            rate: 0.0,
        };
        self.stage = Stage::Single;
        if self.allowed == 0 || self.load.requests == 0 {
            self.stage = Stage::Idle;
            return;
        }
        if self.allowed.count_ones() == 1 {
            self.best.rule.ramps = self.allowed;
            self.stage = Stage::Fine;
            self.fill_fine();
            return;
        }
        let allowed = self.allowed;
        for r in (0..self.ramps).filter(|r| allowed >> r & 1 == 1) {
            self.coarse(1 << r);
        }
        // All of them together is a start of its own.
        self.coarse(self.allowed);
    }

    fn coarse(&mut self, ramps: u32) {
        for hold in [0.15, 0.3, 0.5, 0.75] {
            self.push(Rule {
                ramps,
                hold,
                ready: 0.0,
            });
        }
    }

    fn push(&mut self, rule: Rule) {
        self.list.push(Candidate { rule, rate: 0.0 });
    }

    fn fill_fine(&mut self) {
        self.list.clear();
        self.next = 0;
        let ramps = self.best.rule.ramps;
        let scale = Rule::scale(self.load.requests as usize, self.batch as usize);
        let mut before = 0;
        for k in 1..=GRID {
            let hold = k as f32 / GRID as f32;
            let mut rule = Rule {
                ramps,
                hold,
                ready: 0.0,
            };
            let rows = rule.hold_rows(scale);
            if rows == before {
                continue;
            }
            before = rows;
            let mut phi = 0;
            for ready in READY {
                rule.ready = ready;
                let r = rule.ready_rows(scale);
                if r != phi {
                    self.push(rule);
                }
                phi = r;
            }
        }
    }

    /// Does up to about `budget` windows' worth of the search; how much it was.
    pub fn work(&mut self, budget: u32, known: Known) -> u32 {
        let mut spent = 0;
        while self.stage != Stage::Idle && spent < budget {
            spent += self.play(budget - spent, known);
        }
        spent
    }

    /// Plays the present candidate on for so many windows, or goes on to the next.
    fn play(&mut self, windows: u32, known: Known) -> u32 {
        let long = self.stage == Stage::Final;
        let list = match long {
            true => &mut self.final_list,
            false => &mut self.list,
        };
        let Some(candidate) = list.get_mut(self.next) else {
            self.advance();
            return STEP_WINDOWS;
        };
        if let Some(rollout) = &mut self.rollout {
            let played = rollout.run(&self.scene, windows);
            if rollout.done() {
                candidate.rate = rollout.outcome(&self.scene).rate();
                self.rollout = None;
                self.next += 1;
            }
            return played;
        }
        let rule = candidate.rule;
        self.scene = self.scene(rule, known);
        if rule.ramps == 0 {
            let rate = self.full_passes().rate();
            self.final_list[self.next].rate = rate;
            self.next += 1;
        } else {
            self.rollout = Some(Rollout::new(&self.scene, self.game(rule, long)));
        }
        STEP_WINDOWS + self.scene.windows as u32
    }

    fn advance(&mut self) {
        self.next = 0;
        match self.stage {
            Stage::Idle => {}
            Stage::Single | Stage::Grow => {
                // Nothing to try where the requests that could exit are gone.
                let top = best_of(&self.list);
                let better = top.is_some_and(|t| t.rate > self.best.rate * 1.002);
                if let (Some(top), true) = (top, better) {
                    self.best = top;
                }
                self.list.clear();
                self.grown += 1;
                if better && self.grown <= 4 {
                    self.stage = Stage::Grow;
                    let allowed = self.allowed;
                    for r in (0..self.ramps).filter(|r| allowed >> r & 1 == 1) {
                        let ramps = self.best.rule.ramps ^ (1 << r);
                        if ramps != 0 {
                            let hold = self.best.rule.hold;
                            for hold in [hold * 0.6, hold] {
                                self.push(Rule {
                                    ramps,
                                    hold,
                                    ready: 0.0,
                                });
                            }
                        }
                    }
                } else {
                    self.stage = Stage::Fine;
                    self.fill_fine();
                }
            }
            Stage::Fine => {
                self.list.sort_unstable_by(|a, b| b.rate.total_cmp(&a.rate));
                self.final_list.clear();
                self.final_list.push(Candidate {
                    rule: Rule::OFF,
                    rate: 0.0,
                });
                let present = self.rule;
                if present.ramps != 0 && present.ramps & !self.allowed == 0 {
                    self.final_list.push(Candidate {
                        rule: present,
                        rate: 0.0,
                    });
                }
                for c in self.list.iter().take(FINALISTS) {
                    if c.rule != present {
                        self.final_list.push(*c);
                    }
                }
                self.stage = Stage::Final;
            }
            Stage::Final => {
                let off = self.final_list[0];
                let top = best_of(&self.final_list[1..]).unwrap_or(off);
                let winner = if top.rate > off.rate { top } else { off };
                let present = self.final_list.iter().find(|c| c.rule == self.rule);
                self.predicted_off = off.rate;
                self.predicted = winner.rate;
                match present {
                    Some(p) if winner.rate <= p.rate * HYSTERESIS => self.predicted = p.rate,
                    _ => self.rule = winner.rule,
                }
                self.other = top.rule;
                let loss = (1.0 - top.rate / off.rate.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0);
                self.patience = (1.0 + IMPATIENT * loss * self.load.keeping).min(4.0);
                self.stage = Stage::Idle;
            }
        }
    }

    /// The scene that a rule is played on.
    fn scene(&self, rule: Rule, known: Known) -> Scene {
        let Known { cost, exits, .. } = known;
        let profile = cost.profile();
        let segments = profile.segments.len();
        let requests = self.players();
        let often = u64::from(self.load.often.min(self.load.requests)) * u64::from(requests)
            / u64::from(self.load.requests.max(1));
        let often = often as u32;
        let mut scene = Scene {
            requests: [requests - often, often],
            batch: self.batch,
            deep_batch: self.batch,
            prompt_ns: self.load.prompt_ns,
            prompt_rows: self.load.prompt_rows,
            prompt_row_ns: profile.prompt_row(0, segments),
            chunk: self.load.chunk,
            gap_ns: self.load.gap_ns,
            ..Scene::EMPTY
        };
        let mut looked_at = [0; MAX_RAMPS];
        let mut begin = 0;
        let mut after = None;
        let cells = cost.cells_per_row();
        for end in 1..=segments {
            let ramp = end - 1;
            if end < segments && rule.ramps >> ramp & 1 == 0 {
                continue;
            }
            let k = scene.windows;
            let at0 = profile.time(begin, end, 0.0, 0.0);
            scene.ns[k] = at0;
            scene.ns_per_row[k] = profile.time(begin, end, 1.0, cells) - at0;
            if end < segments {
                let c = exits.chance(after, ramp);
                let p = exits.by_kind(after, ramp).unwrap_or([c.p; KINDS]);
                scene.exits[k] = p.map(|p| ((p + c.error).min(1.0) * 1024.0).round() as u32);
                looked_at[k] = ramp;
                scene.ways[k] = Ways::new(cost, begin, ramp, self.load.gap_ns);
            }
            scene.windows += 1;
            begin = end;
            after = Some(ramp);
        }
        if rule.ramps != 0 && self.load.keeping > 0.0 {
            self.keep(&mut scene, &looked_at, known.acceptance);
        }
        scene
    }

    /// Requests that a rollout plays with: beyond a few batches, more change
    /// nothing but the time that it takes to see it.
    fn players(&self) -> u32 {
        self.load.requests.min(4 * self.batch)
    }

    /// How a rule is played: `long` for the last few.
    fn game(&self, rule: Rule, long: bool) -> Game {
        let requests = self.players();
        let scale = Rule::scale(self.load.requests as usize, self.batch as usize);
        let (warm, tokens) = if long {
            (2 * requests, (24 * requests).max(3000))
        } else {
            (requests, (6 * requests).max(600))
        };
        Game {
            hold: rule.hold_rows(scale),
            ready: rule.ready_rows(scale),
            warm,
            tokens,
            passes: PASSES,
            seed: self.seed,
        }
    }

    /// Outcome of full passes on the scene: every token rides along in one, and
    /// prompt rows in the same.
    fn full_passes(&self) -> Outcome {
        let s = &self.scene;
        let b = f64::from(self.players().min(self.batch));
        let prompts = s.prompt_ns + s.prompt_rows * s.prompt_row_ns;
        Outcome {
            tokens: b,
            ns: s.ns[0] + s.ns_per_row[0] * b + s.gap_ns + b * prompts,
        }
    }

    /// Enters into the scene that exited rows stay pending: they go deep later on,
    /// at most so many of a request, and a draft may turn out wrong.
    fn keep(&self, scene: &mut Scene, ramps: &[usize; MAX_RAMPS], acceptance: &Acceptance) {
        let (keeping, verifying) = (self.load.keeping, self.load.verifying);
        let last = scene.windows - 1;
        let mut behind = 0.0;
        for k in (0..last).rev() {
            behind += scene.ns_per_row[k + 1];
            scene.pending_ns[k] = behind * keeping;
            let whole = scene.ns[0] + scene.ns_per_row[0] + behind;
            let b = f64::from(self.batch.min(self.load.requests).max(1));
            let wrong = verifying * (1.0 - acceptance.chance(ramps[k]));
            scene.exit_ns[k] = scene.pending_ns[k] + wrong * whole / b;
        }
        let all = f64::from(scene.requests[0] + scene.requests[1]);
        let (mut rows, mut worth) = (0.0, 0.0);
        for kind in 0..KINDS {
            let share = f64::from(scene.requests[kind]) / all;
            let mut stay = 1.0;
            let mut exits = [0.0; MAX_RAMPS];
            for k in 0..last {
                let p = f64::from(scene.exits[k][kind]) / 1024.0;
                exits[ramps[k]] = stay * p;
                stay *= 1.0 - p;
            }
            let accept = acceptance.mean(&exits);
            let cycle = Cycle::new(1.0 - stay, self.max_pending, accept);
            rows += share * cycle.rows;
            worth += share * cycle.worth;
            for e in &mut scene.exits[..last] {
                e[kind] = (f64::from(e[kind]) * (1.0 - keeping * cycle.full)).round() as u32;
            }
        }
        scene.worth = 1.0 - verifying * (1.0 - worth);
        let fit = f64::from(self.pass_rows) / (1.0 + keeping * rows);
        scene.deep_batch = self.batch.min((fit as u32).max(1));
    }
}

fn best_of(list: &[Candidate]) -> Option<Candidate> {
    let mut best = *list.first()?;
    for c in list {
        if c.rate > best.rate {
            best = *c;
        }
    }
    Some(best)
}
