// SPDX-License-Identifier: Apache-2.0

//! How likely a row is to exit at a ramp, given the last ramp before it that
//! was looked at and that it did not exit there.

use super::MAX_RAMPS;

/// Looks that an estimate remembers.
const MEMORY: f64 = 600.0;
/// What an estimate falls back to when a batch contradicts it.
const AFTER_CHANGE: f64 = 48.0;
/// Standard deviations by which a batch contradicts an estimate.
const CONTRADICTION: f64 = 4.5;
/// Looks that the prior counts for.
const PRIOR: f64 = 2.0;

#[derive(Debug, Clone, Copy, Default)]
struct Share {
    looks: f64,
    exits: f64,
}

#[derive(Debug, Clone)]
pub struct Exits {
    ramps: usize,
    /// `[after + 1][ramp]`; row 0 is "no ramp before".
    shares: Vec<[Share; MAX_RAMPS]>,
}

/// An estimate and its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chance {
    pub p: f64,
    pub error: f64,
    /// Looks behind it, old ones faded.
    pub looks: f64,
}

impl Exits {
    pub fn new(ramps: usize) -> Self {
        Exits {
            ramps,
            shares: vec![[Share::default(); MAX_RAMPS]; ramps + 1],
        }
    }

    /// `exits` of `looks` rows at `ramp` were confident; `after` is the last
    /// ramp before it that they were scored at.
    pub fn observe(&mut self, after: Option<usize>, ramp: usize, looks: u32, exits: u32) {
        if looks == 0 {
            return;
        }
        let s = &mut self.shares[after.map_or(0, |a| a + 1)][ramp];
        let (n, k) = (f64::from(looks), f64::from(exits));
        if s.looks > AFTER_CHANGE {
            let p = ((s.exits + 0.5) / (s.looks + 1.0)).clamp(0.01, 0.99);
            let deviation = (k - n * p).abs() / (n * p * (1.0 - p) * (1.0 + n / s.looks)).sqrt();
            if deviation > CONTRADICTION {
                let keep = AFTER_CHANGE / s.looks;
                s.looks *= keep;
                s.exits *= keep;
            }
        }
        let keep = (1.0 - n / MEMORY).max(0.0);
        s.looks = s.looks * keep + n;
        s.exits = s.exits * keep + k;
    }

    /// Sets an estimate by hand, worth `looks` looks.
    pub fn set(&mut self, after: Option<usize>, ramp: usize, p: f64, looks: f64) {
        self.shares[after.map_or(0, |a| a + 1)][ramp] = Share {
            looks,
            exits: p.clamp(0.0, 1.0) * looks,
        };
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

    pub fn ramps(&self) -> usize {
        self.ramps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converges_and_follows() {
        let mut e = Exits::new(1);
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
        let mut e = Exits::new(3);
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
    fn knows_what_it_does_not_know() {
        let mut e = Exits::new(2);
        let blank = e.chance(None, 0);
        assert_eq!(blank.p, 0.5);
        assert!(blank.error > 0.3);
        e.observe(None, 0, 500, 250);
        assert!(e.chance(None, 0).error < 0.03);
    }
}
