// SPDX-License-Identifier: Apache-2.0

//! The search for a rule: candidates are played, the best few for longer.

use super::rollout::{Game, Outcome, Rollout};
use super::{Auto, Candidate, Known, Stage};
use crate::core::MAX_RAMPS;
use crate::core::policy::rule::{MOST_DRAFTS, Rule, SURVIVAL};

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
/// Least survivals of drafts that are tried, and longest chains of them.
const SURVIVALS: [f32; 9] = [0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96];
const DRAFTS: [u32; 5] = [1, 2, 3, 5, MOST_DRAFTS];
/// Of these, the ones that are tried with each set of ramps.
const COARSE: [(f32, u32); 3] = [(0.05, 2), (0.5, MOST_DRAFTS), (0.8, MOST_DRAFTS)];
/// Candidates that are played again for longer.
pub(super) const FINALISTS: usize = 10;
/// Windows of one rollout at most.
const WINDOWS: u32 = 400;
/// Cost of the beginning of a rollout, or of a step of the search, in windows.
const STEP_WINDOWS: u32 = 4;
/// What is added for each ramp where chances follow from a survival.
const SURVIVAL_WINDOWS: u32 = 100;

/// The numbers that a search ran on, to see when they have moved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Basis {
    requests: f64,
    chances: [f64; MAX_RAMPS],
    accepted: [f64; MAX_RAMPS],
    outlines: [[f64; 3]; MAX_RAMPS],
    times: [f64; 3],
}

impl Auto {
    fn basis(&self, known: Known) -> Basis {
        let cost = known.cost;
        let mut chances = [0.0; MAX_RAMPS];
        let mut accepted = [0.0; MAX_RAMPS];
        let mut outlines = [[0.0; 3]; MAX_RAMPS];
        // What exits by learned thresholds follows from the rule, and is no reason
        // to look for another.
        let all_learn = self.load.learning >= 1.0;
        for r in 0..self.ramps {
            if !all_learn {
                chances[r] = known.exit_rates.chance(None, r).p;
                accepted[r] = known.acceptance.chance(r);
            }
            if self.load.learning > 0.0 {
                outlines[r] = known.reliability.outline(r);
            }
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
            outlines,
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
            || apart(old.outlines.as_flattened(), new.outlines.as_flattened())
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
            self.fine();
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
        let learns = self.load.learning > 0.0;
        let usual = [(SURVIVAL, MOST_DRAFTS)];
        for &(survival, drafts) in if learns { &COARSE[..] } else { &usual[..] } {
            for hold in [0.15, 0.3, 0.5, 0.75] {
                self.push(Rule {
                    ramps,
                    hold,
                    ready: 0.0,
                    survival,
                    drafts,
                });
            }
        }
    }

    /// From the best set on: how sure drafts must be, where that is the rule's to
    /// say, then theta and phi.
    fn fine(&mut self) {
        if self.load.learning == 0.0 || self.stage == Stage::Survival {
            self.stage = Stage::Fine;
            self.fill_fine();
            return;
        }
        self.stage = Stage::Survival;
        let most = self.max_pending;
        for hold in [0.3, 0.75] {
            for survival in SURVIVALS {
                for drafts in DRAFTS.into_iter().filter(|&d| d < most || d == MOST_DRAFTS) {
                    self.push(Rule {
                        hold,
                        survival,
                        drafts,
                        ..self.best.rule
                    });
                }
            }
        }
    }

    fn push(&mut self, rule: Rule) {
        self.list.push(Candidate { rule, rate: 0.0 });
    }

    fn fill_fine(&mut self) {
        self.list.clear();
        self.next = 0;
        let Rule {
            ramps,
            survival,
            drafts,
            ..
        } = self.best.rule;
        let scale = Rule::scale(self.load.requests as usize, self.batch as usize);
        let mut before = 0;
        for k in 1..=GRID {
            let hold = k as f32 / GRID as f32;
            let mut rule = Rule {
                ramps,
                hold,
                ready: 0.0,
                survival,
                drafts,
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
        let scene = STEP_WINDOWS + self.scene.windows as u32;
        match self.load.learning > 0.0 {
            true => scene + SURVIVAL_WINDOWS * rule.ramps.count_ones(),
            false => scene,
        }
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
                            let best = self.best.rule;
                            for hold in [best.hold * 0.6, best.hold] {
                                self.push(Rule {
                                    ramps,
                                    hold,
                                    ready: 0.0,
                                    ..best
                                });
                            }
                        }
                    }
                } else {
                    self.fine();
                }
            }
            Stage::Survival => {
                let top = best_of(&self.list).filter(|t| t.rate > self.best.rate);
                self.best = top.unwrap_or(self.best);
                self.fine();
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

    /// Requests that a rollout plays with: beyond a few batches, more change
    /// nothing but the time that it takes to see it.
    pub(super) fn players(&self) -> u32 {
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
