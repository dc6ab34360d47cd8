// SPDX-License-Identifier: Apache-2.0

//! How likely a row is to exit at a ramp, given the last ramp before it that
//! was looked at and that it did not exit there.
//!
//! Requests differ, and a row that is held is more likely one of a request
//! that seldom exits. Requests are therefore told apart by whether they have
//! of late exited more often than the average, see [`Habit`], and each habit has
//! chances of its own. A habit says what a request did *before* a look, so where
//! all requests are alike both habits get the same chance.

use crate::core::MAX_RAMPS;

/// Looks that an estimate remembers.
const MEMORY: f64 = 600.0;
/// What an estimate falls back to when a batch contradicts it.
const AFTER_CHANGE: f64 = 48.0;
/// Standard deviations by which a batch contradicts an estimate.
const CONTRADICTION: f64 = 4.5;
/// Looks that the prior counts for.
const PRIOR: f64 = 2.0;
/// Looks that the chance of all requests counts for in that of a habit.
const PRIOR_HABIT: f64 = 24.0;
/// Standard errors by which the habits' chances must differ to matter.
const DISTINCT: f64 = 2.0;
/// Weight of one look in what a request did of late.
const RECENT: f32 = 1.0 / 16.0;

/// Requests that exit seldom (0), and often (1).
pub const HABITS: usize = 2;

/// Weight of one look in the middle of a habit.
const MIDDLE: f32 = 1.0 / 64.0;

/// By how much a request has of late exited more often than predicted, and
/// which habit that makes it: the one whose middle is nearer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Habit {
    recent: f32,
    frequent: bool,
}

impl Habit {
    pub const NEW: Habit = Habit {
        recent: 0.0,
        frequent: false,
    };

    pub fn index(self) -> usize {
        usize::from(self.frequent)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Sorted {
    looks: u32,
    exits: u32,
    /// Sum of what the requests did of late.
    recent: f32,
}

/// Sorts the requests of one batch at one ramp.
#[derive(Debug, Clone)]
pub struct Sorter {
    /// Chance of all rows.
    p: f32,
    /// Between the middles of the habits.
    border: f32,
    habits: [Sorted; HABITS],
}

impl Sorter {
    /// A request's row was looked at, and exited or not.
    pub fn look(&mut self, habit: &mut Habit, exited: bool) {
        let s = &mut self.habits[habit.index()];
        s.looks += 1;
        s.exits += u32::from(exited);
        let surprise = f32::from(u8::from(exited)) - self.p;
        habit.recent += RECENT * (surprise - habit.recent);
        s.recent += habit.recent;
        habit.frequent = habit.recent > self.border;
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Share {
    looks: f64,
    exits: f64,
}

impl Share {
    fn observe(&mut self, looks: u32, exits: u32) {
        let (n, k) = (f64::from(looks), f64::from(exits));
        if self.looks > AFTER_CHANGE {
            let p = ((self.exits + 0.5) / (self.looks + 1.0)).clamp(0.01, 0.99);
            let deviation = (k - n * p).abs() / (n * p * (1.0 - p) * (1.0 + n / self.looks)).sqrt();
            if deviation > CONTRADICTION {
                let keep = AFTER_CHANGE / self.looks;
                self.looks *= keep;
                self.exits *= keep;
            }
        }
        let keep = (1.0 - n / MEMORY).max(0.0);
        self.looks = self.looks * keep + n;
        self.exits = self.exits * keep + k;
    }
}

#[derive(Debug, Clone)]
pub struct ExitRates {
    /// `[after + 1][ramp]`; row 0 is "no ramp before".
    shares: Vec<[Share; MAX_RAMPS]>,
    /// Shares of the requests of each habit.
    habits: Vec<[[Share; MAX_RAMPS]; HABITS]>,
    /// Of each habit, what its requests did of late.
    middles: [f32; HABITS],
}

/// An estimate and its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chance {
    pub p: f64,
    pub error: f64,
    /// Looks behind it, old ones faded.
    pub looks: f64,
}

impl ExitRates {
    pub fn new(ramps: usize) -> Self {
        ExitRates {
            shares: vec![[Share::default(); MAX_RAMPS]; ramps + 1],
            habits: vec![[[Share::default(); MAX_RAMPS]; HABITS]; ramps + 1],
            middles: [-0.1, 0.1],
        }
    }

    /// `exits` of `looks` rows at `ramp` were confident; `after` is the last
    /// ramp before it that they were scored at.
    pub fn observe(&mut self, after: Option<usize>, ramp: usize, looks: u32, exits: u32) {
        if looks == 0 {
            return;
        }
        self.shares[after.map_or(0, |a| a + 1)][ramp].observe(looks, exits);
    }

    /// What is needed to sort the requests of a batch, whose rows' last ramp
    /// was `after`.
    pub fn sorter(&self, after: Option<usize>, ramp: usize) -> Sorter {
        Sorter {
            p: self.chance(after, ramp).p as f32,
            border: 0.5 * (self.middles[0] + self.middles[1]),
            habits: [Sorted::default(); HABITS],
        }
    }

    /// A batch was looked at.
    pub fn observe_sorted(&mut self, after: Option<usize>, ramp: usize, batch: &Sorter) {
        let at = after.map_or(0, |a| a + 1);
        for (habit, s) in batch.habits.iter().enumerate() {
            if s.looks > 0 {
                self.habits[at][habit][ramp].observe(s.looks, s.exits);
                let looks = s.looks as f32;
                let weight = (looks * MIDDLE).min(0.5);
                self.middles[habit] += weight * (s.recent / looks - self.middles[habit]);
            }
        }
        let [a, b] = batch.habits;
        self.observe(after, ramp, a.looks + b.looks, a.exits + b.exits);
    }

    /// Without looks of its own, an estimate is made from ones that skip
    /// fewer ramps: who exits at a ramp would exit at any later one, so the
    /// share that exits by `ramp` contains the share that exits by `after`.
    pub fn chance(&self, after: Option<usize>, ramp: usize) -> Chance {
        let s = &self.shares[after.map_or(0, |a| a + 1)][ramp];
        let (prior, prior_looks) = self.guess(after, ramp, s.looks);
        let looks = s.looks + prior_looks;
        let p = (s.exits + prior * prior_looks) / looks;
        Chance {
            p,
            error: (p.clamp(0.05, 0.95) * (1.0 - p.clamp(0.05, 0.95)) / looks).sqrt(),
            looks: s.looks,
        }
    }

    /// Of each habit of request; `None` where they are not known to differ.
    pub fn by_habit(&self, after: Option<usize>, ramp: usize) -> Option<[f64; HABITS]> {
        let all = self.chance(after, ramp).p;
        let habits = &self.habits[after.map_or(0, |a| a + 1)];
        let mut p = [0.0; HABITS];
        let mut variance = 0.0;
        for (p, k) in p.iter_mut().zip(habits) {
            let s = &k[ramp];
            let looks = s.looks + PRIOR_HABIT;
            *p = (s.exits + all * PRIOR_HABIT) / looks;
            let q = p.clamp(0.05, 0.95);
            variance += q * (1.0 - q) / looks;
        }
        ((p[1] - p[0]).abs() > DISTINCT * variance.sqrt()).then_some(p)
    }

    fn guess(&self, after: Option<usize>, ramp: usize, own: f64) -> (f64, f64) {
        if own >= 4.0 * PRIOR {
            return (0.5, PRIOR * 0.5);
        }
        // Chain of the longest known steps up to a ramp: 1 - product of
        // (1 - p) is the share that has left by then.
        let by = |last: usize| -> Option<f64> {
            let mut stay = 1.0;
            let mut at: Option<usize> = None;
            let mut any = false;
            while at.is_none_or(|a| a < last) {
                let from = at.map_or(0, |a| a + 1);
                let next = (from..=last).rev().find(|&r| {
                    self.shares[from][r].looks >= 4.0 * PRIOR && (r == last || self.leads(r, last))
                })?;
                let s = &self.shares[from][next];
                stay *= 1.0 - s.exits / s.looks;
                at = Some(next);
                any = true;
            }
            any.then_some(1.0 - stay)
        };
        match (after, by(ramp)) {
            (None, Some(f)) => (f, 4.0 * PRIOR),
            (Some(a), Some(f)) => match by(a) {
                Some(g) if g < 1.0 => (((f - g) / (1.0 - g)).clamp(0.0, 1.0), 4.0 * PRIOR),
                _ => (0.5, PRIOR),
            },
            _ => (0.5, PRIOR),
        }
    }

    /// `last` was looked at right after `ramp` often enough.
    fn leads(&self, ramp: usize, last: usize) -> bool {
        (ramp + 1..=last).any(|r| self.shares[ramp + 1][r].looks >= 4.0 * PRIOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converges_and_follows() {
        let mut e = ExitRates::new(1);
        for _ in 0..100 {
            e.observe(None, 0, 10, 3);
        }
        assert!((e.chance(None, 0).p - 0.3).abs() < 0.02);
        // a jump is seen after two batches
        e.observe(None, 0, 64, 58);
        e.observe(None, 0, 64, 58);
        assert!(e.chance(None, 0).p > 0.7, "{:?}", e.chance(None, 0));
    }

    #[test]
    fn a_guess_follows_from_the_chain() {
        let mut e = ExitRates::new(3);
        for _ in 0..20 {
            e.observe(None, 0, 100, 20);
            e.observe(Some(0), 1, 80, 40);
            e.observe(Some(1), 2, 40, 20);
        }
        // never seen: ramp 1 with nothing before it; 0.2 + 0.8 * 0.5
        assert!((e.chance(None, 1).p - 0.6).abs() < 0.02);
        assert!((e.chance(None, 2).p - 0.8).abs() < 0.02);
        // ramp 2 after ramp 0: (0.8 - 0.2) / 0.8
        assert!((e.chance(Some(0), 2).p - 0.75).abs() < 0.02);
    }

    #[test]
    fn habits_tell_requests_apart_that_differ_and_only_those() {
        for (chances, apart) in [([0.2, 0.9], true), ([0.5, 0.5], false)] {
            let mut e = ExitRates::new(1);
            let mut habits = [Habit::NEW; 20];
            let mut rng = fastrand::Rng::with_seed(1);
            for _ in 0..400 {
                let mut batch = e.sorter(None, 0);
                for (i, habit) in habits.iter_mut().enumerate() {
                    let exited = rng.f64() < chances[i % 2];
                    batch.look(habit, exited);
                }
                e.observe_sorted(None, 0, &batch);
            }
            match e.by_habit(None, 0) {
                Some(p) if apart => {
                    assert!((p[0] - 0.2).abs() < 0.06, "{p:?}");
                    assert!((p[1] - 0.9).abs() < 0.06, "{p:?}");
                    let right = habits.iter().enumerate();
                    let right = right.filter(|(i, k)| k.index() == i % 2).count();
                    assert!(right >= 19, "{right} of 20");
                }
                // By chance, one in twenty, and then not far apart.
                Some(p) => assert!((p[0] - p[1]).abs() < 0.12, "{p:?}"),
                None => assert!(!apart),
            }
        }
    }

    #[test]
    fn knows_what_it_does_not_know() {
        let mut e = ExitRates::new(2);
        let blank = e.chance(None, 0);
        assert_eq!(blank.p, 0.5);
        assert!(blank.error > 0.3);
        e.observe(None, 0, 500, 250);
        assert!(e.chance(None, 0).error < 0.03);
    }
}
