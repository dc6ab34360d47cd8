// SPDX-License-Identifier: Apache-2.0

//! The search for a rule: candidates are played, the best few for longer.

use super::rollout::{Game, Outcome, Rollout, Scene};
use super::{Auto, Candidate, Known, Stage};
use crate::core::MAX_RAMPS;
use crate::core::estimate::acceptance::{Acceptance, Cycle};
use crate::core::estimate::carrier::Ways;
use crate::core::estimate::exit_rate::HABITS;
use crate::core::policy::rule::Rule;

/// A probe that loses the share x of its time makes the next ones wait 1 + this · x
/// times as long.
const IMPATIENT: f64 = 10.0;
/// A rule must promise this much more than the present one.
const HYSTERESIS: f64 = 1.003;
/// Changes that start a search: of a chance, and, relatively, of a time or
/// the number of requests.
const MOVED_CHANCE: f64 = 0.02;
const MOVED_SHARE: f64 = 0.04;
/// theta is tried in twentieths of the scale.
pub(super) const GRID: u32 = 20;
/// phi, as shares of theta's scale. 0: held rows flush when none is ready.
pub(super) const READY: [f32; 4] = [0.0, 0.0625, 0.125, 0.25];
/// Candidates that are played again for longer.
pub(super) const FINALISTS: usize = 10;
/// Windows of one rollout at most.
const WINDOWS: u32 = 400;
/// Cost of the beginning of a rollout, or of a step of the search, in windows.
const STEP_WINDOWS: u32 = 4;

/// The numbers that a search ran on, to see when they have moved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Basis {
    requests: f64,
    chances: [f64; MAX_RAMPS],
    accepted: [f64; MAX_RAMPS],
    times: [f64; 3],
}

impl Auto {
    fn basis(&self, known: Known) -> Basis {
        let cost = known.cost;
        let mut chances = [0.0; MAX_RAMPS];
        let mut accepted = [0.0; MAX_RAMPS];
        for r in 0..self.ramps {
            chances[r] = known.exit_rates.chance(None, r).p;
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

    pub(super) fn moved(&self, known: Known) -> bool {
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
    pub(super) fn begin(&mut self, known: Known) {
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
        let Known {
            cost, exit_rates, ..
        } = known;
        let profile = cost.profile();
        let segments = profile.segments.len();
        let requests = self.players();
        let frequent = u64::from(self.load.frequent.min(self.load.requests)) * u64::from(requests)
            / u64::from(self.load.requests.max(1));
        let frequent = frequent as u32;
        let mut scene = Scene {
            requests: [requests - frequent, frequent],
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
                let c = exit_rates.chance(after, ramp);
                let p = exit_rates.by_habit(after, ramp).unwrap_or([c.p; HABITS]);
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
            windows: WINDOWS,
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
        for habit in 0..HABITS {
            let share = f64::from(scene.requests[habit]) / all;
            let mut stay = 1.0;
            let mut exits = [0.0; MAX_RAMPS];
            for k in 0..last {
                let p = f64::from(scene.exits[k][habit]) / 1024.0;
                exits[ramps[k]] = stay * p;
                stay *= 1.0 - p;
            }
            let accept = acceptance.mean(&exits);
            let cycle = Cycle::new(1.0 - stay, self.max_pending, accept);
            rows += share * cycle.rows;
            worth += share * cycle.worth;
            for e in &mut scene.exits[..last] {
                e[habit] = (f64::from(e[habit]) * (1.0 - keeping * cycle.full)).round() as u32;
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
