// SPDX-License-Identifier: Apache-2.0

//! What a layer window costs, learned as serving goes on: per window a line
//! t = T0 + T1 * rows, fitted by least squares that slowly forgets.

/// One observation's weight fades by this much with each later one: the last
/// hundred or so count.
const FORGET: f64 = 0.99;
/// Observations after which a new one is trusted only up to `CLIP` times what
/// was expected. A stall of the machine then moves the line by a bounded
/// step, and a lasting change still wins.
const TRUST_AFTER: u64 = 8;
const CLIP: f64 = 3.0;
/// Pull of the slope towards its last value, in squared rows. A server that
/// runs one batch size for an hour tells nothing about the slope; without the
/// pull, the noise of its timings would.
const SLOPE_MEMORY: f64 = 1.0;
/// Windows that do not start and end at ramps, kept besides those that do.
const OTHER_RANGES: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    pub t0: f64,
    pub t1: f64,
}

impl Line {
    const ZERO: Line = Line { t0: 0.0, t1: 0.0 };

    pub fn at(&self, rows: f64) -> f64 {
        self.t0 + self.t1 * rows
    }

    fn plus(self, o: Line) -> Line {
        Line {
            t0: self.t0 + o.t0,
            t1: self.t1 + o.t1,
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Fit {
    n: u64,
    w: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
    slope: f64,
}

impl Fit {
    fn add(&mut self, x: f64, mut y: f64) {
        if self.n >= TRUST_AFTER {
            if let Some(line) = self.line() {
                let expected = line.at(x);
                if expected > 0.0 {
                    y = y.clamp(expected / CLIP, expected * CLIP);
                }
            }
        }
        self.n += 1;
        for s in [
            &mut self.w,
            &mut self.x,
            &mut self.y,
            &mut self.xx,
            &mut self.xy,
        ] {
            *s *= FORGET;
        }
        self.w += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.xy += x * y;
        let cxx = (self.xx - self.x * self.x / self.w).max(0.0);
        let cxy = self.xy - self.x * self.y / self.w;
        self.slope = ((cxy + SLOPE_MEMORY * self.slope) / (cxx + SLOPE_MEMORY)).max(0.0);
    }

    fn line(&self) -> Option<Line> {
        if self.n == 0 {
            return None;
        }
        let (mx, my) = (self.x / self.w, self.y / self.w);
        let t0 = my - self.slope * mx;
        Some(if t0 >= 0.0 {
            Line { t0, t1: self.slope }
        } else {
            // No pass takes less than nothing: through the origin instead.
            Line {
                t0: 0.0,
                t1: self.xy / self.xx,
            }
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Range {
    begin: u32,
    end: u32,
    fit: Fit,
}

#[derive(Debug, Clone)]
pub struct CostModel {
    /// 0, the ramp layers, n_layers.
    bounds: Vec<u32>,
    /// First every window between two bounds, then up to `OTHER_RANGES` more.
    ranges: Vec<Range>,
    aligned: usize,
    next_other: usize,
    /// What the windows of a full pass summed to when the full pass itself
    /// was observed (mean over the same weights). Full passes are rare while
    /// rows exit; this carries their time along when the machine's speed
    /// drifts.
    full_ref: Option<Line>,
}

impl CostModel {
    pub fn new(n_layers: u32, ramp_layers: &[u32]) -> Self {
        let mut bounds = vec![0];
        bounds.extend_from_slice(ramp_layers);
        bounds.push(n_layers);
        let mut ranges = Vec::with_capacity(bounds.len() * bounds.len() / 2 + OTHER_RANGES);
        for (i, &begin) in bounds.iter().enumerate() {
            for &end in &bounds[i + 1..] {
                ranges.push(Range {
                    begin,
                    end,
                    fit: Fit::default(),
                });
            }
        }
        ranges.reserve_exact(OTHER_RANGES);
        let aligned = ranges.len();
        CostModel {
            bounds,
            ranges,
            aligned,
            next_other: 0,
            full_ref: None,
        }
    }

    fn n_layers(&self) -> u32 {
        self.bounds[self.bounds.len() - 1]
    }

    /// Takes in that layers `[begin, end)` took `ns` over `rows` rows.
    pub fn observe(&mut self, begin: u32, end: u32, rows: u32, ns: u64) {
        if rows == 0 || ns == 0 {
            return;
        }
        let i = self.slot(begin, end);
        self.ranges[i].fit.add(f64::from(rows), ns as f64);

        let split = self.segments(0, self.n_layers());
        let full = self.find(0, self.n_layers()).map(|f| f.w);
        if let (Some(split), Some(weight)) = (split, full) {
            if weight > 0.0 {
                let is_full = begin == 0 && end == self.n_layers();
                self.full_ref = Some(match self.full_ref {
                    None => split,
                    Some(r) if is_full => Line {
                        t0: r.t0 + (split.t0 - r.t0) / weight,
                        t1: r.t1 + (split.t1 - r.t1) / weight,
                    },
                    Some(r) => r,
                });
            }
        }
    }

    fn slot(&mut self, begin: u32, end: u32) -> usize {
        let known = |r: &Range| r.begin == begin && r.end == end;
        if let Some(i) = self.ranges.iter().position(known) {
            return i;
        }
        let fresh = Range {
            begin,
            end,
            fit: Fit::default(),
        };
        if self.ranges.len() < self.aligned + OTHER_RANGES {
            self.ranges.push(fresh);
            self.ranges.len() - 1
        } else {
            let i = self.aligned + self.next_other;
            self.next_other = (self.next_other + 1) % OTHER_RANGES;
            self.ranges[i] = fresh;
            i
        }
    }

    fn find(&self, begin: u32, end: u32) -> Option<&Fit> {
        self.ranges
            .iter()
            .find(|r| r.begin == begin && r.end == end)
            .map(|r| &r.fit)
    }

    /// The sum of the segments of a window that starts and ends at ramps.
    fn segments(&self, begin: u32, end: u32) -> Option<Line> {
        let i = self.bounds.iter().position(|&b| b == begin)?;
        let j = self.bounds.iter().position(|&b| b == end)?;
        let mut sum = Line::ZERO;
        for k in i..j {
            sum = sum.plus(self.find(self.bounds[k], self.bounds[k + 1])?.line()?);
        }
        Some(sum)
    }

    /// From observations of exactly these layers, in one window or in its
    /// segments. Windows that were run come first: they are what is planned.
    fn known(&self, begin: u32, end: u32, rows: f64) -> Option<f64> {
        if begin == end {
            return Some(0.0);
        }
        let whole = self.find(begin, end).and_then(Fit::line);
        whole
            .or_else(|| self.segments(begin, end))
            .map(|l| l.at(rows))
    }

    /// The predicted time in ns; where these layers have not been seen, the
    /// best overlapping window's time by the number of layers. `None` only
    /// before the first observation.
    pub fn predict(&self, begin: u32, end: u32, rows: u32) -> Option<f64> {
        let x = f64::from(rows);
        if let Some(t) = self.known(begin, end, x) {
            return Some(t);
        }
        let mut best: Option<(u32, u32, f64)> = None;
        for r in &self.ranges {
            let Some(line) = r.fit.line() else { continue };
            let overlap = end.min(r.end).saturating_sub(begin.max(r.begin));
            let layers = r.end - r.begin;
            // More of the wanted layers first, then fewer of the others.
            if best.is_none_or(|(o, l, _)| (overlap, l) > (o, layers)) {
                best = Some((overlap, layers, line.at(x)));
            }
        }
        best.map(|(_, layers, t)| t * f64::from(end - begin) / f64::from(layers))
    }

    /// Time of the rest of the model for rows that wait at `layer`, summed
    /// over the segments that they will run in.
    pub fn remaining(&self, layer: u32, rows: u32) -> Option<f64> {
        let n = self.n_layers();
        match self.segments(layer, n) {
            Some(line) => Some(line.at(f64::from(rows))),
            None => self.predict(layer, n, rows),
        }
    }

    /// c / t_d at a ramp for a batch of `rows`: what splitting costs, as a
    /// share of the deep pass that a row saves. In [0, 1]; `None` until full
    /// passes and both parts of the split have been seen.
    pub fn art_ratio(&self, ramp_layer: u32, rows: u32) -> Option<f64> {
        let n = self.n_layers();
        let x = f64::from(rows);
        let part = |b, e| {
            self.segments(b, e)
                .map(|l| l.at(x))
                .or_else(|| self.known(b, e, x))
        };
        let shallow = part(0, ramp_layer)?;
        let deep = part(ramp_layer, n)?;
        let mut full = self.find(0, n)?.line()?.at(x);
        if let (Some(then), Some(now)) = (self.full_ref, self.segments(0, n)) {
            if then.at(x) > 0.0 {
                full *= (now.at(x) / then.at(x)).clamp(0.1, 10.0);
            }
        }
        if deep <= 0.0 {
            return None;
        }
        Some(((shallow + deep - full) / deep).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} is not near {b}");
    }

    #[test]
    fn learns_a_line() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..200u32 {
            let b = 1 + i % 16;
            m.observe(0, 4, b, 1_000_000 + 50_000 * u64::from(b));
        }
        near(m.predict(0, 4, 1).unwrap(), 1.05e6, 0.01);
        near(m.predict(0, 4, 64).unwrap(), 4.2e6, 0.01);
    }

    #[test]
    fn one_batch_size_keeps_the_slope() {
        let mut m = CostModel::new(16, &[4]);
        for i in 0..100u32 {
            let b = 1 + i % 16;
            m.observe(0, 4, b, 1_000_000 + 50_000 * u64::from(b));
        }
        for i in 0..5000u64 {
            m.observe(0, 4, 8, 1_400_000 + (i % 7) * 2000);
        }
        near(m.predict(0, 4, 32).unwrap(), 2.6e6, 0.1);
    }

    #[test]
    fn a_stall_moves_little_and_a_change_wins() {
        let mut m = CostModel::new(16, &[4]);
        for _ in 0..50 {
            m.observe(0, 4, 8, 1_000_000);
        }
        m.observe(0, 4, 8, 10_000_000_000);
        near(m.predict(0, 4, 8).unwrap(), 1e6, 0.1);
        for _ in 0..500 {
            m.observe(0, 4, 8, 5_000_000);
        }
        near(m.predict(0, 4, 8).unwrap(), 5e6, 0.05);
    }

    #[test]
    fn unseen_windows_are_scaled_from_seen_ones() {
        let mut m = CostModel::new(16, &[4, 8]);
        assert_eq!(m.predict(0, 16, 1), None);
        m.observe(0, 16, 1, 1600);
        near(m.predict(4, 8, 1).unwrap(), 400.0, 1e-9);
        m.observe(4, 8, 1, 500);
        near(m.predict(4, 8, 1).unwrap(), 500.0, 1e-9);
        // not at ramps
        m.observe(1, 3, 1, 222);
        near(m.predict(1, 3, 1).unwrap(), 222.0, 1e-9);
        for i in 0..100 {
            m.observe(2, 3 + i % 12, 1, 10);
            m.observe(3, 4 + i % 12, 1, 10);
            m.observe(5, 6 + i % 10, 1, 10);
        }
        near(m.predict(4, 8, 1).unwrap(), 500.0, 1e-9);
    }

    fn split(m: &mut CostModel, scale: f64, b: u32) {
        m.observe(0, 4, b, (400.0 * scale) as u64);
        m.observe(4, 16, b, (1000.0 * scale) as u64);
    }

    #[test]
    fn art_is_defined_for_every_sign_of_c() {
        for (full, expect) in [(1200, 0.2), (1400, 0.0), (1500, 0.0), (100, 1.0)] {
            let mut m = CostModel::new(16, &[4]);
            split(&mut m, 1.0, 8);
            assert_eq!(m.art_ratio(4, 8), None);
            m.observe(0, 16, 8, full);
            let got = m.art_ratio(4, 8).unwrap();
            assert!((got - expect).abs() < 1e-9, "{full}: {got}");
        }
    }

    #[test]
    fn art_follows_the_machine_when_it_slows_down() {
        for full_first in [false, true] {
            let mut m = CostModel::new(16, &[4]);
            for _ in 0..10 {
                if full_first {
                    m.observe(0, 16, 8, 1200);
                }
                split(&mut m, 1.0, 8);
                m.observe(0, 16, 8, 1200);
            }
            for _ in 0..2000 {
                split(&mut m, 2.5, 8);
            }
            // c/t_d of the slowed machine: (3500 - 3000) / 2500
            let got = m.art_ratio(4, 8).unwrap();
            assert!((got - 0.2).abs() < 0.01, "{got}");
        }
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        let mut m = CostModel::new(16, &[4]);
        m.observe(0, 4, 0, 100);
        m.observe(0, 4, 8, 0);
        assert_eq!(m.predict(0, 4, 8), None);
    }
}
