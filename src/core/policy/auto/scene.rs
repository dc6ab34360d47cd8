// SPDX-License-Identifier: Apache-2.0

//! What a rollout runs on, made from what is known: times, chances to exit, and
//! where exited rows stay pending, what they cost and how many of their tokens
//! come out.

use super::rollout::{LEVELS, Scene};
use super::{Auto, Known, Load};
use crate::core::MAX_RAMPS;
use crate::core::estimate::acceptance::{Acceptance, Cycle};
use crate::core::estimate::carrier::Ways;
use crate::core::estimate::exit_rate::HABITS;
use crate::core::estimate::reliability::{BINS, Spread};
use crate::core::policy::rule::Rule;

impl Auto {
    /// The scene that a rule is played on.
    pub(super) fn scene(&self, rule: Rule, known: Known) -> Scene {
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
            batch: self.batch,
            deep_batch: self.batch,
            prompt_ns: self.load.prompt_ns,
            prompt_rows: self.load.prompt_rows,
            prompt_row_ns: profile.prompt_row(0, segments),
            chunk: self.load.chunk,
            gap_ns: self.load.gap_ns,
            ..Scene::EMPTY
        };
        scene.requests[..HABITS].copy_from_slice(&[requests - frequent, frequent]);
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
                for (e, p) in scene.exits[k].iter_mut().zip(p) {
                    *e = in_1024(p + c.error);
                }
                looked_at[k] = ramp;
                scene.ways[k] = Ways::new(cost, begin, ramp, self.load.gap_ns);
            }
            scene.windows += 1;
            begin = end;
            after = Some(ramp);
        }
        if rule.ramps != 0 && self.load.keeping > 0.0 {
            self.keep(&mut scene, rule, &looked_at, known);
        }
        scene
    }

    /// Enters into the scene that exited rows stay pending: they go deep later on,
    /// at most so many of a request, and a draft may turn out wrong.
    fn keep(&self, scene: &mut Scene, rule: Rule, ramps: &[usize; MAX_RAMPS], known: Known) {
        let Load {
            keeping,
            verifying,
            learning,
            ..
        } = self.load;
        let last = scene.windows - 1;
        let mut behind = 0.0;
        for k in (0..last).rev() {
            behind += scene.ns_per_row[k + 1];
            scene.pending_ns[k] = behind * keeping;
            let whole = scene.ns[0] + scene.ns_per_row[0] + behind;
            let b = f64::from(self.batch.min(self.load.requests).max(1));
            let wrong = verifying * (1.0 - known.acceptance.chance(ramps[k]));
            scene.exit_ns[k] = scene.pending_ns[k] + wrong * whole / b;
        }
        let (mut rows, mut lost) = (0.0, 0.0);
        let learners = if learning > 0.0 {
            let mean = self.learn(scene, rule, &ramps[..last], known);
            rows += learning * mean;
            let all = self.players();
            let learners = (learning * f64::from(all)).round() as u32;
            // Both habits have their share of them.
            let frequent = u64::from(scene.requests[1]) * u64::from(learners);
            let frequent = (frequent / u64::from(all.max(1))) as u32;
            scene.requests[1] -= frequent;
            scene.requests[0] -= learners - frequent;
            scene.requests[HABITS] = learners;
            learners
        } else {
            0
        };
        // Of requests with given thresholds, the shares whose rows stay pending, and
        // are verified.
        let given = (1.0 - learning).max(f64::MIN_POSITIVE);
        let (kept, verified) = ((keeping - learning) / given, (verifying - learning) / given);
        let all = f64::from((self.players() - learners).max(1));
        for habit in 0..HABITS {
            let share = f64::from(scene.requests[habit]) / all;
            let cycle = self.given_cycle(scene, ramps, habit, known.acceptance);
            rows += share * (keeping - learning) * cycle.rows;
            lost += share * verified * (1.0 - cycle.worth);
            for e in &mut scene.exits[..last] {
                e[habit] = (f64::from(e[habit]) * (1.0 - kept * cycle.full)).round() as u32;
            }
        }
        scene.worth = 1.0 - lost;
        let fit = f64::from(self.pass_rows) / (1.0 + rows);
        scene.deep_batch = self.batch.min((fit as u32).max(1));
    }

    /// The cycle of a request whose thresholds are given.
    fn given_cycle(
        &self,
        scene: &Scene,
        ramps: &[usize; MAX_RAMPS],
        habit: usize,
        acceptance: &Acceptance,
    ) -> Cycle {
        let mut stay = 1.0;
        let mut exits = [0.0; MAX_RAMPS];
        for k in 0..scene.windows - 1 {
            let p = f64::from(scene.exits[k][habit]) / 1024.0;
            exits[ramps[k]] = stay * p;
            stay *= 1.0 - p;
        }
        Cycle::new(1.0 - stay, self.max_pending, acceptance.mean(&exits))
    }

    /// Enters the chances of requests whose thresholds follow from the rule's
    /// survival: the further a request's drafts go, the surer the next one has to be.
    /// Returns the mean number of drafts that a deep row takes along.
    fn learn(&self, scene: &mut Scene, rule: Rule, ramps: &[usize], known: Known) -> f64 {
        let mut spreads = [Spread::NONE; MAX_RAMPS];
        let mut after = None;
        for (s, &ramp) in spreads.iter_mut().zip(ramps) {
            *s = known.reliability.spread(after, ramp);
            after = Some(ramp);
        }
        let spreads = &spreads[..ramps.len()];
        let most = rule.drafts.min(self.max_pending) as usize;
        let mut level = Level::FIRST;
        let mut rows = 0.0;
        for drafts in 0..LEVELS {
            let mut exits = [0.0; MAX_RAMPS];
            if drafts >= most {
                scene.out[drafts] = level.out();
                rows += match drafts == most {
                    true => level.all() * drafts as f64,
                    false => 0.0,
                };
                for e in &mut scene.exits[..ramps.len()] {
                    e[HABITS + drafts] = 0;
                }
                continue;
            }
            let (next, stay) = level.exit(rule.survival, spreads, &mut exits);
            for (k, s) in spreads.iter().enumerate() {
                let error = if exits[k] > 0.0 {
                    s.error(exits[k])
                } else {
                    0.0
                };
                scene.exits[k][HABITS + drafts] = in_1024(exits[k] + error);
            }
            scene.out[drafts] = stay.out();
            rows += stay.all() * drafts as f64;
            level = next;
        }
        rows
    }
}

fn in_1024(p: f64) -> u32 {
    (p.clamp(0.0, 1.0) * 1024.0).round() as u32
}

/// Requests with equally many drafts, by the chance that all of these stand.
#[derive(Debug, Clone, Copy)]
struct Level([Group; GROUPS]);

/// Chances go up and down by so much as they are learned.
const MARGIN: f64 = 0.04;

/// How likely a draft of this chance is made where `asked` is asked for. A rule that
/// relies on drafts that are just so made, or just so not, is not as good as it looks.
fn made(asked: f64, chance: f64) -> f64 {
    (0.5 + (chance - asked) / (2.0 * MARGIN)).clamp(0.0, 1.0)
}

/// Groups by survival, of equal width.
const GROUPS: usize = 16;

#[derive(Debug, Clone, Copy)]
struct Group {
    /// Share of the requests that begin with no draft.
    share: f64,
    /// The sum of their survivals, and of the tokens that come out if they go deep.
    survival: f64,
    out: f64,
}

impl Group {
    const EMPTY: Group = Group {
        share: 0.0,
        survival: 0.0,
        out: 0.0,
    };

    fn add(&mut self, share: f64, survival: f64, out: f64) {
        self.share += share;
        self.survival += share * survival;
        self.out += share * out;
    }
}

impl Level {
    const EMPTY: Level = Level([Group::EMPTY; GROUPS]);
    /// No draft, and the next token is the full model's.
    const FIRST: Level = {
        let mut all = [Group::EMPTY; GROUPS];
        all[GROUPS - 1] = Group {
            share: 1.0,
            survival: 1.0,
            out: 1.0,
        };
        Level(all)
    };

    fn all(&self) -> f64 {
        self.0.iter().map(|g| g.share).sum()
    }

    /// Tokens that come out of one of its rows.
    fn out(&self) -> f64 {
        let all = self.all();
        match all > 0.0 {
            true => self.0.iter().map(|g| g.out).sum::<f64>() / all,
            false => 1.0,
        }
    }

    /// One more token: where its draft survives with `least`, it exits. Returns who
    /// has one draft more, and who stays; `exits` receives the chance to exit at each
    /// ramp of those that come there.
    fn exit(&self, least: f32, spreads: &[Spread], exits: &mut [f64; MAX_RAMPS]) -> (Level, Level) {
        let (mut next, mut stays) = (Level::EMPTY, Level::EMPTY);
        let mut comes = [0.0; MAX_RAMPS];
        for group in self.0.iter().filter(|g| g.share > 1e-4) {
            let survival = group.survival / group.share;
            let out = group.out / group.share;
            let mut stay = group.share;
            for (k, s) in spreads.iter().enumerate() {
                comes[k] += stay;
                let mut gone = 0.0;
                for b in s.from((f64::from(least) / survival - MARGIN) as f32)..BINS {
                    let chance = f64::from(s.chance[b]);
                    let share = stay * s.share[b] * made(f64::from(least) / survival, chance);
                    let survival = survival * chance;
                    let place = ((survival * GROUPS as f64) as usize).min(GROUPS - 1);
                    next.0[place].add(share, survival, out + survival);
                    gone += share;
                }
                exits[k] += gone;
                stay -= gone;
            }
            let place = ((survival * GROUPS as f64) as usize).min(GROUPS - 1);
            stays.0[place].add(stay.max(0.0), survival, out);
        }
        for (e, c) in exits.iter_mut().zip(comes) {
            *e = if c > 0.0 { *e / c } else { 0.0 };
        }
        (next, stays)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::estimate::reliability::{Reliability, bin};

    /// The levels of a chain of drafts are those of coins that are thrown.
    #[test]
    fn levels_are_what_coins_say() {
        let mut known = Reliability::new(2);
        let mut rng = fastrand::Rng::with_seed(11);
        for _ in 0..20_000 {
            let c = rng.f64().sqrt();
            let b = bin(c as f32);
            for ramp in 0..2usize {
                known.look(ramp.checked_sub(1), ramp, b);
                known.judge(ramp, b, rng.f64() < c);
            }
        }
        let spreads = [known.spread(None, 0), known.spread(Some(0), 1)];
        let draw = |rng: &mut fastrand::Rng, s: &Spread| {
            let mut u = rng.f64();
            let hit = |&n: &f64| {
                u -= n;
                u < 0.0
            };
            let b = s.share.iter().position(hit).unwrap_or(BINS - 1);
            f64::from(s.chance[b])
        };
        for least in [0.3f32, 0.6] {
            // Of each level: tokens looked at, exits, tokens that came of those that went deep.
            let mut coins = [(0.0, 0.0, 0.0); 5];
            for _ in 0..200_000 {
                let mut survival = 1.0;
                let mut out = 1.0;
                for (drafts, coin) in coins.iter_mut().enumerate() {
                    coin.0 += 1.0;
                    let mut right = None;
                    for s in spreads.iter().filter(|_| drafts < 4) {
                        let chance = draw(&mut rng, s);
                        if right.is_none() && rng.f64() < made(f64::from(least) / survival, chance)
                        {
                            right = Some(chance);
                        }
                    }
                    let Some(chance) = right else {
                        coin.2 += out;
                        break;
                    };
                    coin.1 += 1.0;
                    survival *= chance;
                    out += survival;
                }
            }
            let mut level = Level::FIRST;
            for (drafts, &(looks, exits, out)) in coins[..4].iter().enumerate() {
                let mut chances = [0.0; MAX_RAMPS];
                let (next, stay) = level.exit(least, &spreads, &mut chances);
                let reached = looks / coins[0].0;
                assert!((level.all() - reached).abs() < 0.02, "{least} {drafts}");
                let all = 1.0 - (1.0 - chances[0]) * (1.0 - chances[1]);
                assert!(
                    (all - exits / looks).abs() < 0.03,
                    "{least} {drafts}: {all}"
                );
                if looks - exits > 1000.0 {
                    let expect = out / (looks - exits);
                    assert!((stay.out() / expect - 1.0).abs() < 0.02, "{least} {drafts}");
                }
                level = next;
            }
        }
    }
}
