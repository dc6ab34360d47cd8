// SPDX-License-Identifier: Apache-2.0

//! What a layer window costs, learned as serving goes on.
//!
//! One model explains every window, full passes and parts of them alike:
//!
//! t = C0 + C1 b + C2 P + [ends at a ramp, b > 0](R0 + R1 b)
//!     + sum over its segments of L (A0 + A1 b + A2 k + A3 P) + D + E b
//!
//! for b decode rows that attend over k KV cells in all, P prompt rows, and L
//! layers in a segment. Prompt rows have coefficients of their own: a large
//! batch is cheaper by the row, and no prompt row has a ramp's head. Until the
//! first one is seen, a prompt row is taken for a decode row.
//! A layer costs what a layer costs (A); a segment may differ from that by a
//! little (D, E). So a full pass of 64 rows and a deep window of 13 together
//! tell how the time grows with rows, which neither does alone.
//!
//! The numbers are those of a Bayesian linear regression on relative errors,
//! with exponential forgetting and Huber's weights for outliers (Huber 1964).
//! What is forgotten moves the prior's centre, so an hour at one batch size
//! does not unlearn what other sizes cost.

use crate::core::estimate::profile::{Line, MAX_NS, Profile, Segment, Window, Work};

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
/// Of prompt rows.
const C2: usize = 7;
const A3: usize = 8;
const FIXED: usize = 9;

/// Of so many windows with prompt rows, the first, a time that is not what was
/// expected says that prompt rows are not what was expected.
const PROMPTS_NEW: u64 = 8;

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
    /// Windows with prompt rows.
    prompts: u64,
    /// Windows with decode rows.
    seen_rows: u64,
    /// A prompt row is taken for a decode row.
    prompts_as_rows: bool,
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
            prompts: 0,
            seen_rows: 0,
            prompts_as_rows: true,
            seen: [0; SEEN / 64],
            profile: Profile {
                n_layers,
                ramp_layers: ramp_layers.to_vec(),
                window: Window::default(),
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
        let total = |of: fn(&Segment) -> f64| p.segments.iter().map(of).sum::<f64>();
        let sum = (total(|s| s.ns), total(|s| s.ns_per_row));
        (self.prompts, self.prompts_as_rows) = (0, false);
        let u = self.unit;
        let mean = &mut self.prior_mean;
        mean[C0] = p.window.ns / u;
        mean[C1] = p.window.ns_per_row / u;
        mean[R0] = p.ramp.ns / u;
        mean[R1] = p.ramp.ns_per_row / u;
        mean[A0] = sum.0 / layers / u;
        mean[A1] = sum.1 / layers / u;
        mean[A2] = total(|s| s.ns_per_cell) / layers / u;
        mean[C2] = p.window.ns_per_prompt_row / u;
        mean[A3] = total(|s| s.ns_per_prompt_row) / layers / u;
        for (i, s) in p.segments.iter().enumerate() {
            let l = f64::from(self.bounds[i + 1] - self.bounds[i]);
            mean[FIXED + 2 * i] = (s.ns - sum.0 / layers * l) / u;
            mean[FIXED + 2 * i + 1] = (s.ns_per_row - sum.1 / layers * l) / u;
        }
        for (k, w) in self.prior_weight.iter_mut().enumerate() {
            // A number that is 0 in the profile may have been unknown, or be
            // wrong: no spread is less than a small share of a pass.
            let (scale, least) = match k {
                C0 | R0 => (mean[k].max(mean[A0] * layers * 0.02), 1e-3),
                C1 | R1 => (mean[k].max(mean[A1] * layers * 0.02), 1e-4),
                C2 => (mean[k].max(mean[A3] * layers * 0.02), 1e-4),
                A0 => (mean[k], 1e-2 / layers),
                A1 | A3 => (mean[k], 1e-3 / layers),
                A2 => (mean[k], 1e-5 / layers),
                _ if (k - FIXED).is_multiple_of(2) => (mean[A0] * layers * 0.1, 1e-3),
                _ => (mean[A1] * layers * 0.1, 1e-4),
            };
            let sd = (0.2 * scale).max(least);
            *w = 1.0 / (sd * sd);
        }
        self.beta.copy_from_slice(&self.prior_mean);
        self.publish();
    }

    /// The first time seen sets the scale, and what to expect of the rest.
    fn begin(&mut self, layers: f64, work: &Work, ns: f64) {
        let (rows, cells) = (work.rows + work.prompts, work.cells);
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
        set(C2, 0.0, 0.03 / rows);
        set(A3, slope / n, 0.5 / n / rows);
        for i in 0..self.bounds.len() - 1 {
            let share = f64::from(self.bounds[i + 1] - self.bounds[i]) / n;
            set(FIXED + 2 * i, 0.0, 0.05 * share);
            set(FIXED + 2 * i + 1, 0.0, 0.05 * share / rows);
        }
        self.beta.copy_from_slice(&self.prior_mean);
    }

    /// Fills `x` for layers `[begin, end)`, partly covered segments by their
    /// share.
    fn features(&mut self, begin: u32, end: u32, work: &Work) {
        let rows = work.rows;
        let layers = f64::from(end - begin);
        self.x.fill(0.0);
        self.x[C0] = 1.0;
        self.x[C1] = rows;
        self.x[C2] = work.prompts;
        if end < self.n_layers() && rows > 0.0 {
            self.x[R0] = 1.0;
            self.x[R1] = rows;
        }
        self.x[A0] = layers;
        self.x[A1] = layers * rows;
        self.x[A2] = layers * work.cells;
        self.x[A3] = layers * work.prompts;
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

    /// Takes in that layers `[begin, end)` took `ns` over `rows` decode rows, which
    /// attended over `cells` KV cells in all (0: unknown), and `prompts` prompt rows.
    pub fn observe(&mut self, begin: u32, end: u32, rows: u32, cells: u64, prompts: u32, ns: u64) {
        // Longer than any window: a clock that jumped.
        if rows == 0 && prompts == 0 || ns == 0 || ns as f64 > MAX_NS {
            return;
        }
        let first = self.first_time(begin, end, rows, prompts);
        let ns = ns as f64;
        let work = Work {
            rows: f64::from(rows),
            cells: if rows > 0 { cells as f64 } else { 0.0 },
            prompts: f64::from(prompts),
        };
        let new = prompts > 0 && self.prompts < PROMPTS_NEW;
        self.count(begin, end, &work, ns);
        self.features(begin, end, &work);
        let expected: f64 = self.x.iter().zip(&self.beta).map(|(x, b)| x * b).sum();
        let (y, weight) = self.weigh(ns, expected, first, new);
        self.fade(FORGET);
        self.take_in(y, expected, weight);
        self.observed += 1;
        self.stale += 1;
        if new || self.observed <= SOLVE_ALWAYS || self.stale >= 8 {
            self.solve();
            self.publish();
        }
    }

    /// Counts a window by its kind, its decode rows and its prompts. The first of
    /// each sets what to expect of the next.
    fn count(&mut self, begin: u32, end: u32, work: &Work, ns: f64) {
        let layers = f64::from(end - begin);
        if self.unit == 0.0 {
            self.begin(layers, work, ns);
        }
        if work.rows > 0.0 {
            let per_row = work.cells / work.rows;
            self.seen_rows += 1;
            self.cells_per_row += (per_row - self.cells_per_row) / self.seen_rows.min(32) as f64;
        }
        if work.prompts > 0.0 {
            if self.prompts_as_rows {
                self.expect_prompts(layers, work, ns);
            }
            self.prompts += 1;
        }
        let kind = match (begin == 0, end == self.n_layers()) {
            (true, true) => 0,
            (_, false) => 1,
            (false, true) => 2,
        };
        self.kinds[kind] += 1;
    }

    /// A time in units, and its weight. A window of a shape that never ran before
    /// is often slow once, and one time that is far off says little. Many in a row
    /// say that the machine has changed.
    fn weigh(&mut self, ns: f64, expected: f64, first: bool, new: bool) -> (f64, f64) {
        let y = ns / self.unit;
        if first && (self.observed == 0 || y > expected * FIRST_SLOWER) && !new {
            return (y, FIRST_WEIGHT);
        }
        let judged = !new && self.observed >= 4 && expected > 0.0;
        if !judged {
            return (y, 1.0);
        }
        let ratio = y / expected;
        let off = (ratio - 1.0).abs();
        let size = (HUBER * self.spread).clamp(0.03, 0.2);
        self.spread += (off.min(size) - self.spread) * 0.03;
        if off > size {
            self.surprise(ratio);
        } else {
            self.end_run();
            return (y, 1.0);
        }
        if self.run.unsigned_abs() >= CHANGE_AFTER {
            self.rescale();
            return (ns / self.unit, 1.0);
        }
        (y.clamp(expected / 4.0, expected * 4.0), size / off)
    }

    /// Counts a time that is far off, and `ratio` times the expected one, into the
    /// run of those that are off in the same direction.
    fn surprise(&mut self, ratio: f64) {
        let r = ratio - 1.0;
        if (self.run < 0) != (r < 0.0) {
            self.end_run();
        }
        self.run += r.signum() as i32;
        self.run_log += ratio.ln();
    }

    fn end_run(&mut self) {
        (self.run, self.run_log) = (0, 0.0);
    }

    /// The machine has changed. Most likely all of it: what was learned holds on the
    /// scale of the run, but counts less from here on.
    fn rescale(&mut self) {
        let scale = (self.run_log / f64::from(self.run.unsigned_abs())).exp();
        self.unit *= scale;
        self.fade(0.1);
        self.end_run();
    }

    /// Adds the window whose features are in `x` to the sums of the regression.
    fn take_in(&mut self, y: f64, expected: f64, weight: f64) {
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
    }

    /// The first prompt rows: they cost what a decode row is believed to, or
    /// what would make this window's time, with a spread of that size.
    fn expect_prompts(&mut self, layers: f64, work: &Work, ns: f64) {
        let per_layer = ns / self.unit / layers / work.prompts;
        let (c, a) = (self.beta[C1], self.beta[A1]);
        let mut set = |k: usize, mean: f64, sd: f64| {
            self.prior_mean[k] = mean;
            self.prior_weight[k] = 1.0 / (sd * sd);
        };
        set(A3, a, a.max(per_layer));
        set(C2, c, c.max(0.03 * per_layer * layers));
        (self.beta[C2], self.beta[A3]) = (c, a);
        self.prompts_as_rows = false;
    }

    /// Prompts of about the same length count as the same.
    fn first_time(&mut self, begin: u32, end: u32, rows: u32, prompts: u32) -> bool {
        let rows = match prompts {
            0 => u64::from(rows),
            _ => 1 << 20 | u64::from((rows + prompts).ilog2()),
        };
        let key = (u64::from(begin) << 42 | u64::from(end) << 21 | rows)
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
        if self.prompts_as_rows {
            self.solution[C2] = self.solution[C1];
            self.solution[A3] = self.solution[A1];
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
        let b = &self.beta;
        // Within what a profile may hold, so that what is saved can be loaded.
        #[allow(clippy::manual_clamp)] // which keeps NaN; this makes it 0
        let ns = |units: f64| (units * self.unit).max(0.0).min(MAX_NS);
        let line = |fixed: f64, per_row: f64| Line {
            ns: ns(fixed),
            ns_per_row: ns(per_row),
        };
        let window = line(b[C0], b[C1]);
        self.profile.window = Window {
            ns: window.ns,
            ns_per_row: window.ns_per_row,
            ns_per_prompt_row: ns(b[C2]),
        };
        self.profile.ramp = line(b[R0], b[R1]);
        for (i, s) in self.profile.segments.iter_mut().enumerate() {
            let l = f64::from(self.bounds[i + 1] - self.bounds[i]);
            let at = FIXED + 2 * i;
            let sum = line(b[A0] * l + b[at], b[A1] * l + b[at + 1]);
            *s = Segment {
                ns: sum.ns,
                ns_per_row: sum.ns_per_row,
                ns_per_prompt_row: ns(b[A3] * l),
                ns_per_cell: ns(b[A2] * l),
            };
        }
    }

    /// The predicted time in ns of layers `[begin, end)`. `None` only while
    /// nothing is known.
    pub fn predict(&self, begin: u32, end: u32, rows: u32) -> Option<f64> {
        self.predict_mixed(begin, end, rows, 0)
    }

    /// [`CostModel::predict`] with `prompts` prompt rows beside the decode rows.
    pub fn predict_mixed(&self, begin: u32, end: u32, rows: u32, prompts: u32) -> Option<f64> {
        if !self.known() {
            return None;
        }
        if begin >= end {
            return Some(0.0);
        }
        let (b, prompts) = (f64::from(rows), f64::from(prompts));
        let cells = b * self.cells_per_row;
        let w = &self.profile.window;
        let mut t = w.ns + w.ns_per_row * b + w.ns_per_prompt_row * prompts;
        for (i, s) in self.profile.segments.iter().enumerate() {
            let share = self.share(i, begin, end);
            let rows = s.ns_per_row * b + s.ns_per_cell * cells;
            t += share * (s.ns + rows + s.ns_per_prompt_row * prompts);
        }
        if end < self.n_layers() && (rows > 0 || prompts == 0.0) {
            t += self.profile.ramp.at(b);
        }
        Some(t)
    }

    /// Time of the rest of the model for rows that wait at `layer`, in a
    /// window for each segment.
    pub fn remaining(&self, layer: u32, rows: u32) -> Option<f64> {
        self.remaining_mixed(layer, rows, 0)
    }

    /// [`CostModel::remaining`] with `prompts` prompt rows beside the decode rows.
    pub fn remaining_mixed(&self, layer: u32, rows: u32, prompts: u32) -> Option<f64> {
        let first = self.bounds.iter().position(|&b| b == layer)?;
        let work = Work {
            rows: f64::from(rows),
            cells: f64::from(rows) * self.cells_per_row,
            prompts: f64::from(prompts),
        };
        let windows = first..self.segments();
        let sum = windows.map(|k| self.profile.window(k, k + 1, work)).sum();
        self.known().then_some(sum)
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

    impl CostModel {
        /// A window without prompt rows.
        fn saw(&mut self, begin: u32, end: u32, rows: u32, cells: u64, ns: u64) {
            self.observe(begin, end, rows, cells, 0, ns);
        }
    }

    fn near(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} is not near {b}");
    }

    /// A machine: layers cost the same, a ramp's head comes on top.
    fn machine(m: &mut CostModel, begin: u32, end: u32, rows: u32, t0: f64, t1: f64, scale: f64) {
        let n = f64::from(m.n_layers());
        let head = if end < m.n_layers() { 0.02 * t0 } else { 0.0 };
        let t = (t0 + t1 * f64::from(rows)) * f64::from(end - begin) / n + head;
        m.saw(begin, end, rows, 0, (t * scale) as u64);
    }

    #[test]
    fn learns_a_line() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..200u32 {
            let b = 1 + i % 16;
            m.saw(0, 4, b, 0, 1_000_000 + 50_000 * u64::from(b));
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
            m.saw(0, 4, b, 0, 1_000_000 + 50_000 * u64::from(b));
        }
        for i in 0..5000u64 {
            m.saw(0, 4, 8, 0, 1_400_000 + (i % 7) * 2000);
        }
        near(m.predict(0, 4, 32).unwrap(), 2.6e6, 0.1);
    }

    #[test]
    fn a_stall_moves_little_and_a_change_wins() {
        let mut m = CostModel::new(16, &[4]);
        for _ in 0..50 {
            m.saw(0, 4, 8, 0, 1_000_000);
        }
        m.saw(0, 4, 8, 0, 10_000_000_000);
        near(m.predict(0, 4, 8).unwrap(), 1e6, 0.1);
        for _ in 0..100 {
            m.saw(0, 4, 8, 0, 5_000_000);
        }
        near(m.predict(0, 4, 8).unwrap(), 5e6, 0.05);
        for _ in 0..100 {
            m.saw(0, 4, 8, 0, 1_000_000);
        }
        near(m.predict(0, 4, 8).unwrap(), 1e6, 0.05);
    }

    #[test]
    fn unseen_windows_are_scaled_from_seen_ones() {
        let mut m = CostModel::new(16, &[4, 8]);
        assert_eq!(m.predict(0, 16, 1), None);
        m.saw(0, 16, 1, 0, 1_600_000);
        near(m.predict(4, 8, 1).unwrap(), 4e5, 0.2);
        for _ in 0..20 {
            m.saw(4, 8, 1, 0, 500_000);
        }
        near(m.predict(4, 8, 1).unwrap(), 5e5, 0.05);
        // not at ramps
        for _ in 0..20 {
            m.saw(1, 3, 1, 0, 222_000);
        }
        near(m.predict(1, 3, 1).unwrap(), 2.22e5, 0.1);
    }

    #[test]
    fn more_work_is_never_cheaper() {
        let mut m = CostModel::new(16, &[4, 8]);
        // nonsense: time falls with rows, layers and cells
        for i in 1..400u32 {
            let (b, e) = [(0, 4), (4, 8), (8, 16), (0, 16)][i as usize % 4];
            m.saw(
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
                m.saw(b, e, rows, cells, t as u64);
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
        m.saw(0, 4, b, 0, (400_000.0 * scale) as u64);
        m.saw(4, 16, b, 0, (1_000_000.0 * scale) as u64);
    }

    #[test]
    fn art_is_defined_for_every_sign_of_c() {
        for (full, expect) in [(1_200_000, 0.2), (1_400_000, 0.0), (1_500_000, 0.0)] {
            let mut m = CostModel::new(16, &[4]);
            split(&mut m, 1.0, 8);
            assert_eq!(m.art_ratio(4, 8), None);
            for _ in 0..200 {
                split(&mut m, 1.0, 8);
                m.saw(0, 16, 8, 0, full);
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
            m.saw(0, 16, 8, 0, 1_200_000);
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
            window: Window {
                ns: 1e4,
                ns_per_row: 10.0,
                ns_per_prompt_row: 10.0,
            },
            ramp: Line {
                ns: 2e4,
                ns_per_row: 100.0,
            },
            segments: vec![
                Segment {
                    ns: 3e5,
                    ns_per_row: 1e3,
                    ns_per_prompt_row: 5e2,
                    ns_per_cell: 1.0,
                },
                Segment {
                    ns: 8e5,
                    ns_per_row: 4e3,
                    ns_per_prompt_row: 1.5e3,
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
            let per_row = m.profile().prompt_row(0, 2);
            near(per_row, p.prompt_row(0, 2), 0.01);
        }
        // and a wrong one is left behind
        for i in 0..100 {
            m.saw(0, 4, 1 + i % 16, 0, 3_000_000);
            m.saw(4, 16, 1 + i % 16, 0, 9_000_000);
        }
        near(m.predict(4, 16, 8).unwrap(), 9e6, 0.05);
    }

    /// A file that says 0 is a start, and no law.
    #[test]
    fn a_zero_in_a_profile_does_not_stay() {
        let mut p = CostModel::new(16, &[8]).profile().clone();
        for s in &mut p.segments {
            s.ns = 6e5;
        }
        let mut m = CostModel::new(16, &[8]);
        m.load(&p);
        for i in 0..60_000u64 {
            let b = 1 + (i * 7 % 64) as u32;
            m.saw(0, 16, b, 0, 1_100_000 + 100_000 * u64::from(b));
        }
        let ratio = m.predict(0, 16, 64).unwrap() / m.predict(0, 16, 1).unwrap();
        near(ratio, 7.5 / 1.2, 0.03);
        // Cells are seen for the first time after the load.
        for i in 0..5_000u64 {
            let (b, each) = (1 + (i * 7 % 64) as u32, 100 + i * 37 % 900);
            let cells = u64::from(b) * each;
            let t = 1_100_000 + 100_000 * u64::from(b) + 200 * cells;
            m.saw(0, 16, b, cells, t);
        }
        let time = |cells| m.profile().time(0, 2, 8.0, cells);
        near(time(8_000.0) - time(0.0), 1.6e6, 0.1);
    }

    /// A machine on which a prompt row costs a quarter of a decode row.
    fn mixed(m: &mut CostModel, begin: u32, end: u32, rows: u32, prompts: u32) -> f64 {
        let share = f64::from(end - begin) / 16.0;
        let head = f64::from(u8::from(end < 16 && rows > 0));
        let work = 1e6 + 4e4 * f64::from(rows) + 1e4 * f64::from(prompts);
        let t = share * work + head * (3e4 + 1e3 * f64::from(rows));
        m.observe(begin, end, rows, 0, prompts, t as u64);
        t
    }

    #[test]
    fn prompt_rows_are_told_from_decode_rows() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..200u32 {
            mixed(&mut m, 0, 16, 1 + i % 16, 0);
        }
        // Taken for a decode row while none was seen.
        near(m.predict_mixed(0, 16, 0, 100).unwrap(), 1e6 + 4e6, 0.15);
        for i in 0..8 {
            mixed(&mut m, 0, 16, 1 + i % 4, 100 + 40 * i);
        }
        near(m.predict_mixed(0, 16, 2, 300).unwrap(), 4.08e6, 0.05);
        for i in 0..100u32 {
            mixed(&mut m, 0, 4, 1 + i % 16, 64 + i);
            mixed(&mut m, 4, 16, 1 + i % 12, 64 + i);
            mixed(&mut m, 0, 16, i % 5, 64 + 3 * i);
            mixed(&mut m, 0, 4, 0, 64 + i);
        }
        for (begin, end, rows, prompts) in [
            (0, 4, 8, 128),
            (4, 16, 8, 128),
            (0, 16, 8, 512),
            (0, 16, 12, 0),
            (0, 4, 0, 100),
        ] {
            let t = mixed(&mut m.clone(), begin, end, rows, prompts);
            let got = m.predict_mixed(begin, end, rows, prompts).unwrap();
            near(got, t, 0.04);
        }
        // Only decode rows have a head.
        let head = m.predict_mixed(0, 4, 1, 100).unwrap() - m.predict_mixed(0, 4, 0, 100).unwrap();
        near(head, 3e4 + 1e3 + 1e4, 0.4);
    }

    /// A server's first window may be nothing but a prompt.
    #[test]
    fn a_prompt_may_be_the_first_of_all() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..3 {
            mixed(&mut m, 0, 16, 0, 256 + i);
        }
        for i in 0..20 {
            mixed(&mut m, 0, 16, 1 + i % 4, 0);
        }
        near(m.predict(0, 16, 2).unwrap(), 1.08e6, 0.05);
        near(m.predict_mixed(0, 16, 0, 256).unwrap(), 3.56e6, 0.1);
        for _ in 0..20 {
            mixed(&mut m, 0, 4, 4, 0);
            mixed(&mut m, 4, 16, 4, 0);
        }
        near(m.predict(4, 16, 4).unwrap(), 0.75 * 1.16e6, 0.05);
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        let mut m = CostModel::new(16, &[4]);
        m.saw(0, 4, 0, 0, 100);
        m.saw(0, 4, 8, 0, 0);
        assert_eq!(m.predict(0, 4, 8), None);
    }
}
