// SPDX-License-Identifier: Apache-2.0

//! What a layer window costs, learned as serving goes on.
//!
//! One model explains every window, full passes and parts of them alike:
//!
//! t = C0 + C1 b + [ends at a ramp](R0 + R1 b)
//!     + sum over its segments of L (A0 + A1 b + A2 k) + D + E b
//!
//! for b rows that attend over k KV cells in all, and L layers in a segment.
//! A layer costs what a layer costs (A); a segment may differ from that by a
//! little (D, E). So a full pass of 64 rows and a deep window of 13 together
//! tell how the time grows with rows, which neither does alone.
//!
//! The numbers are those of a Bayesian linear regression on relative errors,
//! with exponential forgetting and Huber's weights for outliers (Huber 1964).
//! What is forgotten moves the prior's centre, so an hour at one batch size
//! does not unlearn what other sizes cost.

use super::profile::{Line, Profile, Segment};

/// Share of an observation's weight that is left after each later one.
const FORGET: f64 = 0.995;
/// Spread of a time around what was expected, as a share of it.
const NOISE: f64 = 0.03;
/// Residuals beyond this many times their usual size weigh less.
const HUBER: f64 = 3.0;
/// So many large residuals of one sign in a row are a change, not a stall.
const CHANGE_AFTER: u32 = 12;
/// The numbers are solved for after every observation up to this one, and
/// after every eighth later on.
const SOLVE_ALWAYS: u64 = 48;
/// Time of a row as a share of a pass's fixed time, before anything is known.
const PRIOR_SLOPE: f64 = 0.02;

/// A window that runs for the first time with so many rows may have its graph
/// built, its memory touched, its kernels loaded: a time above what is expected
/// then counts for this much.
const FIRST_WEIGHT: f64 = 0.02;
const FIRST_SLOWER: f64 = 1.1;
const SEEN: usize = 4096;

/// Places of the coefficients; two per segment follow.
const C0: usize = 0;
const C1: usize = 1;
const R0: usize = 2;
const R1: usize = 3;
const A0: usize = 4;
const A1: usize = 5;
const A2: usize = 6;
const FIXED: usize = 7;

#[derive(Debug, Clone)]
pub struct CostModel {
    /// 0, the ramp layers, n_layers.
    bounds: Vec<u32>,
    /// Number of coefficients.
    p: usize,
    observed: u64,
    /// Windows seen: whole passes, those that end at a ramp, the others.
    kinds: [u64; 3],
    /// Times are divided by this: that of a full pass in the first
    /// observation. 0: nothing is known.
    unit: f64,
    /// Weighted data: sum of x x' and of x y, row-major, lower triangle.
    xx: Vec<f64>,
    xy: Vec<f64>,
    prior_mean: Vec<f64>,
    /// 1 / sd^2
    prior_weight: Vec<f64>,
    beta: Vec<f64>,
    /// Observations since `beta` was solved for.
    stale: u32,
    /// Usual absolute relative residual.
    spread: f64,
    /// Large residuals of one sign in a row, negative when too small, and
    /// the sum of the logarithms of what they were off by.
    run: i32,
    run_log: f64,
    cells_per_row: f64,
    /// Bit of a hash of (window, rows): seen before.
    seen: [u64; SEEN / 64],
    profile: Profile,
    x: Vec<f64>,
    factor: Vec<f64>,
    solution: Vec<f64>,
    pinned: Vec<bool>,
}

impl CostModel {
    pub fn new(n_layers: u32, ramp_layers: &[u32]) -> Self {
        let mut bounds = vec![0];
        bounds.extend_from_slice(ramp_layers);
        bounds.push(n_layers);
        let segments = bounds.len() - 1;
        let p = FIXED + 2 * segments;
        CostModel {
            bounds,
            p,
            observed: 0,
            kinds: [0; 3],
            unit: 0.0,
            xx: vec![0.0; p * p],
            xy: vec![0.0; p],
            prior_mean: vec![0.0; p],
            prior_weight: vec![0.0; p],
            beta: vec![0.0; p],
            stale: 0,
            spread: NOISE,
            run: 0,
            run_log: 0.0,
            cells_per_row: 0.0,
            seen: [0; SEEN / 64],
            profile: Profile {
                n_layers,
                ramp_layers: ramp_layers.to_vec(),
                window: Line::default(),
                ramp: Line::default(),
                segments: vec![Segment::default(); segments],
            },
            x: vec![0.0; p],
            factor: vec![0.0; p * p],
            solution: vec![0.0; p],
            pinned: vec![false; p],
        }
    }

    fn n_layers(&self) -> u32 {
        self.bounds[self.bounds.len() - 1]
    }

    fn segments(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Something is known.
    pub fn known(&self) -> bool {
        self.unit > 0.0
    }

    pub fn observations(&self) -> u64 {
        self.observed
    }

    /// The current numbers. All zero while nothing is known.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// KV cells that a row attends over, on average of late.
    pub fn cells_per_row(&self) -> f64 {
        self.cells_per_row
    }

    /// Starts from numbers learned before, weighed as a few dozen
    /// observations. `p` has this model's layers and ramps.
    pub fn load(&mut self, p: &Profile) {
        let n = self.n_layers();
        self.unit = p.time(0, self.segments(), 1.0, 0.0).max(1.0);
        self.observed = 0;
        self.kinds = [0; 3];
        self.xx.fill(0.0);
        self.xy.fill(0.0);
        let layers = f64::from(n);
        let sum = p.segments.iter().fold((0.0, 0.0, 0.0), |s, g| {
            (s.0 + g.ns, s.1 + g.ns_per_row, s.2 + g.ns_per_cell)
        });
        let u = self.unit;
        let mean = &mut self.prior_mean;
        mean[C0] = p.window.ns / u;
        mean[C1] = p.window.ns_per_row / u;
        mean[R0] = p.ramp.ns / u;
        mean[R1] = p.ramp.ns_per_row / u;
        mean[A0] = sum.0 / layers / u;
        mean[A1] = sum.1 / layers / u;
        mean[A2] = sum.2 / layers / u;
        for (i, s) in p.segments.iter().enumerate() {
            let l = f64::from(self.bounds[i + 1] - self.bounds[i]);
            mean[FIXED + 2 * i] = (s.ns - sum.0 / layers * l) / u;
            mean[FIXED + 2 * i + 1] = (s.ns_per_row - sum.1 / layers * l) / u;
        }
        for (k, w) in self.prior_weight.iter_mut().enumerate() {
            let scale = match k {
                C0 | C1 | R0 | R1 => mean[k].abs().max(mean[A0 + k % 2] * layers * 0.02),
                A0..=A2 => mean[k].abs(),
                _ => mean[A0 + (k - FIXED) % 2] * layers * 0.1,
            };
            let sd = (0.2 * scale).max(1e-9);
            *w = 1.0 / (sd * sd);
        }
        self.beta.copy_from_slice(&self.prior_mean);
        self.publish();
    }

    /// The first time seen sets the scale, and what to expect of the rest.
    fn begin(&mut self, layers: f64, rows: f64, cells: f64, ns: f64) {
        let n = f64::from(self.n_layers());
        self.unit = ns * n / layers;
        let grown = PRIOR_SLOPE * rows;
        let (fixed, slope) = (1.0 / (1.0 + grown), grown / (1.0 + grown) / rows);
        let cell = if cells > 0.0 {
            1.0 / cells
        } else {
            1e-3 / rows
        };
        let mut set = |k: usize, mean: f64, sd: f64| {
            self.prior_mean[k] = mean;
            self.prior_weight[k] = 1.0 / (sd * sd);
        };
        set(C0, 0.005, 0.03);
        set(C1, 0.0, 0.03 / rows);
        set(R0, 0.01, 0.03);
        set(R1, 0.005 / rows, 0.03 / rows);
        set(A0, fixed / n, 0.5 / n);
        set(A1, slope / n, 0.5 / n / rows);
        set(A2, 0.0, 0.2 / n * cell);
        for i in 0..self.bounds.len() - 1 {
            let share = f64::from(self.bounds[i + 1] - self.bounds[i]) / n;
            set(FIXED + 2 * i, 0.0, 0.05 * share);
            set(FIXED + 2 * i + 1, 0.0, 0.05 * share / rows);
        }
        self.beta.copy_from_slice(&self.prior_mean);
    }

    /// Fills `x` for layers `[begin, end)`, partly covered segments by their
    /// share.
    fn features(&mut self, begin: u32, end: u32, rows: f64, cells: f64) {
        let layers = f64::from(end - begin);
        self.x.fill(0.0);
        self.x[C0] = 1.0;
        self.x[C1] = rows;
        if end < self.n_layers() {
            self.x[R0] = 1.0;
            self.x[R1] = rows;
        }
        self.x[A0] = layers;
        self.x[A1] = layers * rows;
        self.x[A2] = layers * cells;
        for i in 0..self.segments() {
            let share = self.share(i, begin, end);
            self.x[FIXED + 2 * i] = share;
            self.x[FIXED + 2 * i + 1] = share * rows;
        }
    }

    /// The part of segment `i` that lies within `[begin, end)`.
    fn share(&self, i: usize, begin: u32, end: u32) -> f64 {
        let (b, e) = (self.bounds[i], self.bounds[i + 1]);
        f64::from(end.min(e).saturating_sub(begin.max(b))) / f64::from(e - b)
    }

    /// Takes in that layers `[begin, end)` took `ns` over `rows` rows that
    /// attended over `cells` KV cells in all (0: unknown).
    pub fn observe(&mut self, begin: u32, end: u32, rows: u32, cells: u64, ns: u64) {
        if rows == 0 || ns == 0 {
            return;
        }
        let (rows, cells, ns) = (f64::from(rows), cells as f64, ns as f64);
        if self.unit == 0.0 {
            self.begin(f64::from(end - begin), rows, cells, ns);
        }
        let per_row = cells / rows;
        self.cells_per_row += (per_row - self.cells_per_row) / (self.observed + 1).min(32) as f64;
        let kind = match (begin == 0, end == self.n_layers()) {
            (true, true) => 0,
            (_, false) => 1,
            (false, true) => 2,
        };
        self.kinds[kind] += 1;

        self.features(begin, end, rows, cells);
        let mut y = ns / self.unit;
        let expected: f64 = self.x.iter().zip(&self.beta).map(|(x, b)| x * b).sum();
        let mut weight = 1.0;
        let first = self.first_time(begin, end, rows as u32);
        if first && (self.observed == 0 || y > expected * FIRST_SLOWER) {
            weight = FIRST_WEIGHT;
        } else if self.observed >= 4 && expected > 0.0 {
            let r = y / expected - 1.0;
            let size = (HUBER * self.spread).clamp(0.03, 0.2);
            if r.abs() > size {
                weight = size / r.abs();
                if (self.run < 0) != (r < 0.0) {
                    (self.run, self.run_log) = (0, 0.0);
                }
                self.run += r.signum() as i32;
                self.run_log += (y / expected).ln();
                y = y.clamp(expected / 4.0, expected * 4.0);
            } else {
                (self.run, self.run_log) = (0, 0.0);
            }
            self.spread += (r.abs().min(size) - self.spread) * 0.03;
            if self.run.unsigned_abs() >= CHANGE_AFTER {
                // The machine has changed. Most likely all of it: what was
                // learned holds on a new scale, but counts less from here on.
                let scale = (self.run_log / f64::from(self.run.unsigned_abs())).exp();
                self.unit *= scale;
                y = ns / self.unit;
                self.fade(0.1);
                (self.run, self.run_log) = (0, 0.0);
                weight = 1.0;
            }
        }
        self.fade(FORGET);
        // Relative errors: a row of x / y should give 1. Divided by the
        // greater of both, so that a time that is far too short does not
        // count for many.
        let w = weight / (NOISE * y.max(expected)).powi(2);
        for i in 0..self.p {
            let xi = self.x[i] * w;
            if xi == 0.0 {
                continue;
            }
            self.xy[i] += xi * y;
            for j in 0..=i {
                self.xx[i * self.p + j] += xi * self.x[j];
            }
        }
        self.observed += 1;
        self.stale += 1;
        if self.observed <= SOLVE_ALWAYS || self.stale >= 8 {
            self.solve();
            self.publish();
        }
    }

    fn first_time(&mut self, begin: u32, end: u32, rows: u32) -> bool {
        let key = (u64::from(begin) << 40 | u64::from(end) << 20 | u64::from(rows))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let at = (key >> 52) as usize % SEEN;
        let (word, bit) = (at / 64, 1u64 << (at % 64));
        let first = self.seen[word] & bit == 0;
        self.seen[word] |= bit;
        first
    }

    fn fade(&mut self, by: f64) {
        for v in self.xx.iter_mut().chain(&mut self.xy) {
            *v *= by;
        }
    }

    /// The posterior mean, with the coefficients that cannot be negative
    /// pinned at 0 where they would be.
    fn solve(&mut self) {
        self.pinned.fill(false);
        for _ in 0..FIXED {
            if !self.factorise() {
                return;
            }
            let worst = (0..FIXED)
                .filter(|&i| !self.pinned[i] && self.solution[i] < 0.0)
                .min_by(|&i, &j| {
                    let z = |k: usize| self.solution[k] * self.prior_weight[k].sqrt();
                    z(i).total_cmp(&z(j))
                });
            match worst {
                Some(i) => self.pinned[i] = true,
                None => break,
            }
        }
        for i in 0..FIXED {
            self.solution[i] = self.solution[i].max(0.0);
        }
        self.beta.copy_from_slice(&self.solution);
        let forgotten = 1.0 - FORGET.powi(self.stale as i32);
        for (m, b) in self.prior_mean.iter_mut().zip(&self.beta) {
            *m += (b - *m) * forgotten;
        }
        self.stale = 0;
    }

    /// Cholesky's factorisation of data plus prior, in units of the prior's
    /// spread, then both substitutions. False if it broke down.
    fn factorise(&mut self) -> bool {
        let p = self.p;
        for i in 0..p {
            let si = self.prior_weight[i].sqrt();
            for j in 0..=i {
                let mut v = if self.pinned[i] || self.pinned[j] {
                    0.0
                } else {
                    self.xx[i * p + j] / (si * self.prior_weight[j].sqrt())
                };
                if i == j {
                    v += 1.0;
                }
                for k in 0..j {
                    v -= self.factor[i * p + k] * self.factor[j * p + k];
                }
                if i == j {
                    if v.is_nan() || v <= 0.0 {
                        return false;
                    }
                    self.factor[i * p + i] = v.sqrt();
                } else {
                    self.factor[i * p + j] = v / self.factor[j * p + j];
                }
            }
            let target = if self.pinned[i] {
                0.0
            } else {
                self.xy[i] / si + self.prior_mean[i] * si
            };
            let done: f64 = (0..i)
                .map(|k| self.factor[i * p + k] * self.solution[k])
                .sum();
            self.solution[i] = (target - done) / self.factor[i * p + i];
        }
        for i in (0..p).rev() {
            let done: f64 = (i + 1..p)
                .map(|k| self.factor[k * p + i] * self.solution[k])
                .sum();
            self.solution[i] = (self.solution[i] - done) / self.factor[i * p + i];
        }
        for i in 0..p {
            self.solution[i] /= self.prior_weight[i].sqrt();
        }
        self.solution.iter().all(|v| v.is_finite())
    }

    /// From coefficients to times: none below 0.
    fn publish(&mut self) {
        let u = self.unit;
        let b = &self.beta;
        let line = |ns: f64, per_row: f64| Line {
            ns: (ns * u).max(0.0),
            ns_per_row: (per_row * u).max(0.0),
        };
        self.profile.window = line(b[C0], b[C1]);
        self.profile.ramp = line(b[R0], b[R1]);
        for (i, s) in self.profile.segments.iter_mut().enumerate() {
            let l = f64::from(self.bounds[i + 1] - self.bounds[i]);
            let at = FIXED + 2 * i;
            let sum = line(b[A0] * l + b[at], b[A1] * l + b[at + 1]);
            *s = Segment {
                ns: sum.ns,
                ns_per_row: sum.ns_per_row,
                ns_per_cell: (b[A2] * l * u).max(0.0),
            };
        }
    }

    /// The predicted time in ns of layers `[begin, end)`. `None` only while
    /// nothing is known.
    pub fn predict(&self, begin: u32, end: u32, rows: u32) -> Option<f64> {
        if !self.known() {
            return None;
        }
        if begin >= end {
            return Some(0.0);
        }
        let b = f64::from(rows);
        let cells = b * self.cells_per_row;
        let mut t = self.profile.window.at(b);
        for (i, s) in self.profile.segments.iter().enumerate() {
            let share = self.share(i, begin, end);
            t += share * (s.ns + s.ns_per_row * b + s.ns_per_cell * cells);
        }
        if end < self.n_layers() {
            t += self.profile.ramp.at(b);
        }
        Some(t)
    }

    /// Time of the rest of the model for rows that wait at `layer`, in a
    /// window for each segment.
    pub fn remaining(&self, layer: u32, rows: u32) -> Option<f64> {
        let mut sum = 0.0;
        let first = self.bounds.iter().position(|&b| b == layer)?;
        for k in first..self.segments() {
            sum += self.predict(self.bounds[k], self.bounds[k + 1], rows)?;
        }
        Some(sum)
    }

    /// Of the time of a deep pass behind `layer`, the share that goes with its
    /// rows; the rest is the same for any number of them.
    pub fn share_per_row(&self, layer: u32, rows: u32) -> Option<f64> {
        let first = self.bounds.iter().position(|&b| b == layer)?;
        let (n, rows) = (self.segments(), f64::from(rows));
        let time = |rows: f64| {
            self.profile
                .time(first, n, rows, rows * self.cells_per_row())
        };
        let all = time(rows);
        (all > 0.0).then(|| ((all - time(0.0)) / all).clamp(0.0, 1.0))
    }

    /// c / t_d at a ramp for a batch of `rows`: what splitting costs, as a
    /// share of the deep pass that a row saves. In [0, 1]; `None` until full
    /// passes and both parts of the split have been seen.
    pub fn art_ratio(&self, ramp_layer: u32, rows: u32) -> Option<f64> {
        if self.kinds.contains(&0) {
            return None;
        }
        let n = self.n_layers();
        let shallow = self.predict(0, ramp_layer, rows)?;
        let deep = self.remaining(ramp_layer, rows)?;
        let full = self.predict(0, n, rows)?;
        (deep > 0.0).then(|| ((shallow + deep - full) / deep).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} is not near {b}");
    }

    /// A machine: layers cost the same, a ramp's head comes on top.
    fn machine(m: &mut CostModel, begin: u32, end: u32, rows: u32, t0: f64, t1: f64, scale: f64) {
        let n = f64::from(m.n_layers());
        let head = if end < m.n_layers() { 0.02 * t0 } else { 0.0 };
        let t = (t0 + t1 * f64::from(rows)) * f64::from(end - begin) / n + head;
        m.observe(begin, end, rows, 0, (t * scale) as u64);
    }

    #[test]
    fn learns_a_line() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..200u32 {
            let b = 1 + i % 16;
            m.observe(0, 4, b, 0, 1_000_000 + 50_000 * u64::from(b));
        }
        near(m.predict(0, 4, 1).unwrap(), 1.05e6, 0.02);
        near(m.predict(0, 4, 64).unwrap(), 4.2e6, 0.05);
    }

    /// Full passes of one size and deep windows of another tell the slope.
    #[test]
    fn few_samples_tell_the_regime() {
        for (t0, t1) in [(1e7, 2e4), (1e7, 5e5), (2e6, 2e6)] {
            let mut m = CostModel::new(16, &[4]);
            for i in 0..8 {
                machine(&mut m, 0, 16, 64, t0, t1, 1.0);
                machine(&mut m, 0, 4, 64, t0, t1, 1.0);
                machine(&mut m, 4, 16, 30 + i % 3, t0, t1, 1.0);
            }
            near(m.predict(0, 16, 64).unwrap(), t0 + t1 * 64.0, 0.01);
            near(m.predict(4, 16, 30).unwrap(), 0.75 * (t0 + t1 * 30.0), 0.02);
            let small = m.predict(0, 4, 20).unwrap();
            near(small, 0.25 * (t0 + t1 * 20.0) + 0.02 * t0, 0.15);
        }
    }

    #[test]
    fn one_batch_size_keeps_the_slope() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..100u32 {
            let b = 1 + i % 16;
            m.observe(0, 4, b, 0, 1_000_000 + 50_000 * u64::from(b));
        }
        for i in 0..5000u64 {
            m.observe(0, 4, 8, 0, 1_400_000 + (i % 7) * 2000);
        }
        near(m.predict(0, 4, 32).unwrap(), 2.6e6, 0.1);
    }

    #[test]
    fn a_stall_moves_little_and_a_change_wins() {
        let mut m = CostModel::new(16, &[4]);
        for _ in 0..50 {
            m.observe(0, 4, 8, 0, 1_000_000);
        }
        m.observe(0, 4, 8, 0, 10_000_000_000);
        near(m.predict(0, 4, 8).unwrap(), 1e6, 0.1);
        for _ in 0..100 {
            m.observe(0, 4, 8, 0, 5_000_000);
        }
        near(m.predict(0, 4, 8).unwrap(), 5e6, 0.05);
        for _ in 0..100 {
            m.observe(0, 4, 8, 0, 1_000_000);
        }
        near(m.predict(0, 4, 8).unwrap(), 1e6, 0.05);
    }

    #[test]
    fn unseen_windows_are_scaled_from_seen_ones() {
        let mut m = CostModel::new(16, &[4, 8]);
        assert_eq!(m.predict(0, 16, 1), None);
        m.observe(0, 16, 1, 0, 1_600_000);
        near(m.predict(4, 8, 1).unwrap(), 4e5, 0.2);
        for _ in 0..20 {
            m.observe(4, 8, 1, 0, 500_000);
        }
        near(m.predict(4, 8, 1).unwrap(), 5e5, 0.05);
        // not at ramps
        for _ in 0..20 {
            m.observe(1, 3, 1, 0, 222_000);
        }
        near(m.predict(1, 3, 1).unwrap(), 2.22e5, 0.1);
    }

    #[test]
    fn more_work_is_never_cheaper() {
        let mut m = CostModel::new(16, &[4, 8]);
        // nonsense: time falls with rows, layers and cells
        for i in 1..400u32 {
            let (b, e) = [(0, 4), (4, 8), (8, 16), (0, 16)][i as usize % 4];
            m.observe(
                b,
                e,
                1 + i % 32,
                u64::from(i % 50),
                u64::from(1_000_000 / (1 + i % 32) / (e - b)),
            );
        }
        let p = m.profile();
        p.validate().unwrap();
        for rows in 1..40 {
            assert!(m.predict(0, 4, rows) <= m.predict(0, 4, rows + 1));
            assert!(m.predict(0, 4, rows) <= m.predict(0, 8, rows));
        }
    }

    #[test]
    fn cells_are_told_from_rows() {
        let mut m = CostModel::new(16, &[8]);
        for i in 0..300u32 {
            let (rows, kv) = (1 + i % 16, 100 + (i * 37) % 900);
            let cells = u64::from(rows * kv);
            for (b, e, share) in [(0, 8, 0.5), (8, 16, 0.5), (0, 16, 1.0)] {
                let t = share * (1e6 + 2e4 * f64::from(rows) + 100.0 * cells as f64);
                m.observe(b, e, rows, cells, t as u64);
            }
        }
        near(
            m.profile().time(0, 2, 8.0, 16000.0),
            1e6 + 1.6e5 + 1.6e6,
            0.03,
        );
        near(m.profile().time(0, 2, 8.0, 1000.0), 1e6 + 1.6e5 + 1e5, 0.05);
    }

    fn split(m: &mut CostModel, scale: f64, b: u32) {
        m.observe(0, 4, b, 0, (400_000.0 * scale) as u64);
        m.observe(4, 16, b, 0, (1_000_000.0 * scale) as u64);
    }

    #[test]
    fn art_is_defined_for_every_sign_of_c() {
        for (full, expect) in [(1_200_000, 0.2), (1_400_000, 0.0), (1_500_000, 0.0)] {
            let mut m = CostModel::new(16, &[4]);
            split(&mut m, 1.0, 8);
            assert_eq!(m.art_ratio(4, 8), None);
            for _ in 0..200 {
                split(&mut m, 1.0, 8);
                m.observe(0, 16, 8, 0, full);
            }
            let got = m.art_ratio(4, 8).unwrap();
            assert!((got - expect).abs() < 0.03, "{full}: {got}");
        }
    }

    #[test]
    fn art_follows_the_machine_when_it_slows_down() {
        let mut m = CostModel::new(16, &[4]);
        for _ in 0..200 {
            split(&mut m, 1.0, 8);
            m.observe(0, 16, 8, 0, 1_200_000);
        }
        for _ in 0..2000 {
            split(&mut m, 2.5, 8);
        }
        // c/t_d of the slowed machine: (3500 - 3000) / 2500
        let got = m.art_ratio(4, 8).unwrap();
        assert!((got - 0.2).abs() < 0.05, "{got}");
    }

    #[test]
    fn a_loaded_profile_is_where_it_starts() {
        let p = Profile {
            n_layers: 16,
            ramp_layers: vec![4],
            window: Line {
                ns: 1e4,
                ns_per_row: 10.0,
            },
            ramp: Line {
                ns: 2e4,
                ns_per_row: 100.0,
            },
            segments: vec![
                Segment {
                    ns: 3e5,
                    ns_per_row: 1e3,
                    ns_per_cell: 1.0,
                },
                Segment {
                    ns: 8e5,
                    ns_per_row: 4e3,
                    ns_per_cell: 3.0,
                },
            ],
        };
        let mut m = CostModel::new(16, &[4]);
        m.load(&p);
        for (i, j) in [(0, 1), (1, 2), (0, 2)] {
            near(
                m.profile().time(i, j, 8.0, 100.0),
                p.time(i, j, 8.0, 100.0),
                0.01,
            );
        }
        // and a wrong one is left behind
        for i in 0..100 {
            m.observe(0, 4, 1 + i % 16, 0, 3_000_000);
            m.observe(4, 16, 1 + i % 16, 0, 9_000_000);
        }
        near(m.predict(4, 16, 8).unwrap(), 9e6, 0.05);
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        let mut m = CostModel::new(16, &[4]);
        m.observe(0, 4, 0, 0, 100);
        m.observe(0, 4, 8, 0, 0);
        assert_eq!(m.predict(0, 4, 8), None);
    }
}
