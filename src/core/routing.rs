// SPDX-License-Identifier: Apache-2.0

//! Where a window had best end, for the rows at hand. A row's chance to exit
//! at a ramp is read off its request's recent exits there; how much these
//! tell is learned, so where they tell nothing all rows look alike.

use super::MAX_RAMPS;
use super::cost::CostModel;

const BUCKETS: usize = 8;
/// Looks that a bucket remembers.
const MEMORY: f32 = 400.0;
/// Looks that the ramp's own share counts for in a bucket.
const PRIOR: f32 = 16.0;
/// Passing a ramp that the rule looks at must be this much cheaper.
const MARGIN: f64 = 0.75;

/// Of a request at each ramp: 255 where it exited each time of late.
pub type Recent = [u8; MAX_RAMPS];
pub const UNKNOWN: Recent = [128; MAX_RAMPS];

#[derive(Debug, Clone, Copy, Default)]
struct Share {
    looks: f32,
    exits: f32,
}

#[derive(Debug, Clone)]
pub struct Routing {
    shares: [[Share; BUCKETS]; MAX_RAMPS],
    /// Windows that passed a ramp of the rule.
    pub passed: u64,
}

impl Default for Routing {
    fn default() -> Self {
        Routing {
            shares: [[Share::default(); BUCKETS]; MAX_RAMPS],
            passed: 0,
        }
    }
}

fn bucket(recent: &Recent, ramp: usize) -> usize {
    usize::from(recent[ramp]) * BUCKETS / 256
}

impl Routing {
    /// A row was scored at a ramp.
    pub fn observe(&mut self, recent: &mut Recent, ramp: usize, exits: bool) {
        let s = &mut self.shares[ramp][bucket(recent, ramp)];
        let keep = 1.0 - 1.0 / MEMORY;
        s.looks = s.looks * keep + 1.0;
        s.exits = s.exits * keep + f32::from(u8::from(exits));
        let (now, target) = (i32::from(recent[ramp]), if exits { 255 } else { 0 });
        recent[ramp] = (now + (target - now) / 4) as u8;
    }

    /// `share` is that of all rows at this ramp.
    pub fn chance(&self, recent: &Recent, ramp: usize, share: f64) -> f64 {
        let s = &self.shares[ramp][bucket(recent, ramp)];
        (f64::from(s.exits) + share * f64::from(PRIOR)) / f64::from(s.looks + PRIOR)
    }
}

/// A ramp at which a window could end.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    pub ramp: usize,
    /// Rows of the window expected to go on from there.
    pub stay: f64,
}

/// The ramp where the window that begins at `begin` ends: of the rule's
/// `stops`, or none. Time of the window, plus what the rows that do not exit
/// cost later, in a flush of `flush` rows, is least there. The first stop
/// unless another is clearly better.
pub fn best_stop(
    cost: &CostModel,
    begin: u32,
    ramp_layers: &[u32],
    n_layers: u32,
    rows: u32,
    flush: u32,
    stops: &[Stop],
) -> Option<usize> {
    let first = stops.first()?;
    let value = |s: &Stop| -> Option<f64> {
        let layer = ramp_layers[s.ramp];
        let later = cost.remaining(layer, flush)? / f64::from(flush);
        Some(cost.predict(begin, layer, rows)? + s.stay * later)
    };
    let Some(bar) = value(first).map(|v| v * MARGIN) else {
        return Some(first.ramp);
    };
    let mut best = (Some(first.ramp), bar);
    for s in &stops[1..] {
        if let Some(v) = value(s).filter(|&v| v < best.1) {
            best = (Some(s.ramp), v);
        }
    }
    match cost.predict(begin, n_layers, rows) {
        Some(v) if v < best.1 => None,
        _ => best.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_requests_apart_only_where_they_differ() {
        let mut r = Routing::default();
        let (mut yes, mut no) = (UNKNOWN, UNKNOWN);
        for _ in 0..500 {
            r.observe(&mut yes, 0, true);
            r.observe(&mut no, 0, false);
        }
        assert!(r.chance(&yes, 0, 0.5) > 0.9 && r.chance(&no, 0, 0.5) < 0.1);
        let mut r = Routing::default();
        let (mut a, mut x) = (UNKNOWN, 1u64);
        for _ in 0..20_000 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            r.observe(&mut a, 0, x >> 63 == 0);
        }
        for seen in [0, 128, 255] {
            let c = r.chance(&[seen; MAX_RAMPS], 0, 0.5);
            assert!((c - 0.5).abs() < 0.12, "{seen}: {c}");
        }
    }

    #[test]
    fn a_hopeless_ramp_is_passed() {
        let mut cost = CostModel::new(16, &[4]);
        for i in 0..40u32 {
            let b = 1 + i % 32;
            let t = |share: f64, head: f64| (share * (1e6 + 2e3 * f64::from(b)) + head) as u64;
            cost.observe(0, 4, b, 0, t(0.25, 2e4));
            cost.observe(4, 16, b, 0, t(0.75, 0.0));
            cost.observe(0, 16, b, 0, t(1.0, 0.0));
        }
        let at =
            |stay: f64, flush| best_stop(&cost, 0, &[4], 16, 32, flush, &[Stop { ramp: 0, stay }]);
        assert_eq!(at(32.0, 16), None);
        assert_eq!(at(5.0, 16), Some(0));
    }
}
