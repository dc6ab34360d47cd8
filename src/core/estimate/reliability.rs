// SPDX-License-Identifier: Apache-2.0

//! What a confidence is worth: the chance that the full model chooses the token
//! that a ramp is so sure of (a reliability diagram), and how often rows are so
//! sure.
//!
//! Confidences lie in bins. A bin's chance starts at its own confidence, as of a
//! calibrated ramp, and is learned from the full model's word on each token that a
//! ramp looked at. Chances are made monotone by pooling adjacent violators (Ayer
//! et al. 1955), so surer is never taken for less right. A ramp whose confidence
//! says nothing, or lies, ends as one flat line. Learning from a token costs the
//! same however much is known.

/// The lowest confidence of each bin. Bins are narrow near 1, where most of what exits
/// lies.
const FLOORS: [f32; BINS] = [
    0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8,
    0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
];
pub const BINS: usize = 24;

/// Verdicts that a ramp's chances remember.
const VERDICTS: f64 = 2000.0;
/// Rows that the shares of the bins remember.
const LOOKS: f64 = 600.0;
/// Verdicts that a bin's own confidence counts for, before the ramp's first.
const PRIOR: f64 = 3.0;
/// Verdicts on a ramp after which it counts for half of that: what a ramp says of
/// itself is the less worth the more is known of it.
const KNOWN: f64 = 200.0;
/// Rows that the shares at any time count for, in those behind one other ramp.
const PRIOR_LOOKS: f64 = 8.0;
/// Verdicts after which the chances are made anew.
const FRESH: u32 = 8;
/// Weights are brought back before they grow out of what a number can hold.
const HEAVY: f64 = 1e9;

/// The bin of a confidence.
pub fn bin(confidence: f32) -> u8 {
    FLOORS[1..].partition_point(|&floor| floor <= confidence) as u8
}

fn middle(bin: usize) -> f64 {
    let ceiling = FLOORS.get(bin + 1).map_or(1.0, |&c| f64::from(c));
    0.5 * (f64::from(FLOORS[bin]) + ceiling)
}

/// Sums that forget: each new one weighs more than the one before.
#[derive(Debug, Clone, Copy)]
struct Fading {
    weight: f64,
}

impl Fading {
    const NEW: Fading = Fading { weight: 1.0 };

    /// The weight of the next one. `sums` are all that were weighed so.
    fn next(&mut self, memory: f64, sums: &mut [&mut [f64; BINS]]) -> f64 {
        self.weight *= 1.0 + 1.0 / memory;
        if self.weight > HEAVY {
            for s in sums.iter_mut().flat_map(|s| s.iter_mut()) {
                *s /= self.weight;
            }
            self.weight = 1.0;
        }
        self.weight
    }
}

/// The full model's verdicts on what one ramp said.
#[derive(Debug, Clone)]
struct Verdicts {
    fading: Fading,
    all: [f64; BINS],
    right: [f64; BINS],
    /// The chance of each bin, never less than that of the bin before.
    chance: [f32; BINS],
    stale: u32,
}

impl Verdicts {
    fn new() -> Self {
        Verdicts {
            fading: Fading::NEW,
            all: [0.0; BINS],
            right: [0.0; BINS],
            chance: std::array::from_fn(|b| middle(b) as f32),
            stale: 0,
        }
    }

    fn observe(&mut self, bin: usize, right: bool) {
        let w = self
            .fading
            .next(VERDICTS, &mut [&mut self.all, &mut self.right]);
        self.all[bin] += w;
        self.right[bin] += if right { w } else { 0.0 };
        self.stale += 1;
        if self.stale >= FRESH {
            self.pool();
        }
    }

    /// Verdicts that a bin's own confidence counts for now.
    fn prior(&self) -> f64 {
        let known = self.all.iter().sum::<f64>() / self.fading.weight;
        PRIOR * KNOWN / (KNOWN + known)
    }

    /// Makes the chances monotone: neighbours that are not become one.
    fn pool(&mut self) {
        self.stale = 0;
        let prior = self.prior();
        // Of each pool: verdicts, those that were right, bins.
        let mut pools = [(0.0, 0.0, 0usize); BINS];
        let mut n = 0;
        for b in 0..BINS {
            let all = self.all[b] / self.fading.weight + prior;
            let right = self.right[b] / self.fading.weight + prior * middle(b);
            pools[n] = (all, right, 1);
            n += 1;
            while n > 1 && pools[n - 2].1 * pools[n - 1].0 >= pools[n - 1].1 * pools[n - 2].0 {
                let (all, right, bins) = pools[n - 1];
                let before = &mut pools[n - 2];
                *before = (before.0 + all, before.1 + right, before.2 + bins);
                n -= 1;
            }
        }
        let mut b = 0;
        for &(all, right, bins) in &pools[..n] {
            self.chance[b..b + bins].fill((right / all) as f32);
            b += bins;
        }
    }
}

/// How often rows were how sure.
#[derive(Debug, Clone)]
struct Shares {
    fading: Fading,
    bins: [f64; BINS],
}

impl Shares {
    fn new() -> Self {
        Shares {
            fading: Fading::NEW,
            bins: [0.0; BINS],
        }
    }

    fn observe(&mut self, bin: usize) {
        self.bins[bin] += self.fading.next(LOOKS, &mut [&mut self.bins]);
    }

    fn looks(&self) -> f64 {
        self.bins.iter().sum::<f64>() / self.fading.weight
    }
}

/// The rows at a ramp by how sure they are: of each bin, its share and the chance
/// that its rows are right, which never falls.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub share: [f64; BINS],
    pub chance: [f32; BINS],
    /// Rows behind it, old ones faded.
    pub looks: f64,
}

impl Spread {
    pub const NONE: Spread = Spread {
        share: [0.0; BINS],
        chance: [0.0; BINS],
        looks: 0.0,
    };

    /// The first bin worth `chance`; [`BINS`]: there is none.
    pub fn from(&self, chance: f32) -> usize {
        self.chance.partition_point(|&c| c < chance)
    }

    /// The standard error of a share.
    pub fn error(&self, share: f64) -> f64 {
        let p = share.clamp(0.05, 0.95);
        (p * (1.0 - p) / self.looks).sqrt()
    }
}

pub struct Reliability {
    verdicts: Vec<Verdicts>,
    /// `[after + 1][ramp]`; row 0 is "no ramp before".
    shares: Vec<Vec<Shares>>,
}

impl Reliability {
    pub fn new(ramps: usize) -> Self {
        Reliability {
            verdicts: vec![Verdicts::new(); ramps],
            shares: vec![vec![Shares::new(); ramps]; ramps + 1],
        }
    }

    /// A row was scored at `ramp`; `after` is the last ramp before it that it was
    /// scored at.
    pub fn look(&mut self, after: Option<usize>, ramp: usize, bin: u8) {
        self.shares[after.map_or(0, |a| a + 1)][ramp].observe(bin.into());
    }

    /// The full model has chosen, and `right` says whether the ramp had said so.
    pub fn judge(&mut self, ramp: usize, bin: u8, right: bool) {
        self.verdicts[ramp].observe(bin.into(), right);
    }

    /// The chance that the full model chooses the token of a row so sure.
    pub fn chance(&self, ramp: usize, bin: u8) -> f32 {
        self.verdicts[ramp].chance[usize::from(bin)]
    }

    /// The lowest confidence that is worth `chance`; `None`: there is none.
    pub fn floor(&self, ramp: usize, chance: f32) -> Option<f32> {
        let all = &self.verdicts[ramp].chance;
        let b = all.partition_point(|&c| c < chance);
        FLOORS.get(b).copied()
    }

    /// The rows that come to `ramp` from `after`. What is not known of them is taken
    /// from those that come from layer 0.
    pub fn spread(&self, after: Option<usize>, ramp: usize) -> Spread {
        let own = &self.shares[after.map_or(0, |a| a + 1)][ramp];
        let any = &self.shares[0][ramp];
        let looks = own.looks() + PRIOR_LOOKS;
        let any_looks = any.looks() + 1.0;
        Spread {
            share: std::array::from_fn(|b| {
                let width = 2.0 * (middle(b) - f64::from(FLOORS[b]));
                let prior = (any.bins[b] / any.fading.weight + width) / any_looks;
                (own.bins[b] / own.fading.weight + PRIOR_LOOKS * prior) / looks
            }),
            chance: self.verdicts[ramp].chance,
            looks,
        }
    }

    /// Numbers that tell when a ramp has become another: how right its rows are in
    /// all, and the shares that are worth two and four fifths.
    pub fn outline(&self, ramp: usize) -> [f64; 3] {
        let s = self.spread(None, ramp);
        let share = |chance| s.share[s.from(chance)..].iter().sum();
        let right = s.share.iter().zip(s.chance);
        let right = right.map(|(n, c)| n * f64::from(c)).sum();
        [right, share(0.4), share(0.8)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(rows: usize, seed: u64, right: impl Fn(f64) -> f64) -> Reliability {
        let mut r = Reliability::new(1);
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..rows {
            let c = rng.f64();
            let b = bin(c as f32);
            r.look(None, 0, b);
            r.judge(0, b, rng.f64() < right(c));
        }
        r
    }

    #[test]
    fn bins_hold_what_lies_between_their_floors() {
        for (b, &floor) in FLOORS.iter().enumerate() {
            assert_eq!(usize::from(bin(floor)), b);
            assert_eq!(usize::from(bin(floor.next_down())), b.saturating_sub(1));
        }
        assert_eq!(usize::from(bin(1.0)), BINS - 1);
        assert_eq!(bin(-1.0), 0);
    }

    #[test]
    fn before_the_first_verdict_a_confidence_is_a_chance() {
        let r = Reliability::new(2);
        for chance in [0.1f32, 0.5, 0.9] {
            let floor = r.floor(1, chance).unwrap();
            assert!((floor - chance).abs() <= 0.051, "{chance}: {floor}");
            let s = r.spread(None, 1);
            let share: f64 = s.share[s.from(chance)..].iter().sum();
            assert!((share - f64::from(1.0 - floor)).abs() < 1e-3, "{share}");
            assert!(s.error(share) > 0.05);
            assert!((s.share.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
        assert_eq!(r.floor(0, 0.99999), None);
        assert_eq!(r.floor(0, 0.0), Some(0.0));
    }

    #[test]
    fn chances_are_those_of_the_verdicts() {
        // More often right than sure, and twice as often wrong as its confidence says.
        for curve in [(|c: f64| c.sqrt()) as fn(f64) -> f64, |c| 0.5 * c] {
            let r = learned(60_000, 3, curve);
            for b in 0..20u8 {
                let (got, expect) = (r.chance(0, b), curve(middle(b.into())));
                let error = (f64::from(got) - expect).abs();
                assert!(error < 0.1, "bin {b}: {got}, {expect}");
            }
            // Shares are those of the last hundreds of rows.
            let s = r.spread(None, 0);
            for (floor, share) in FLOORS.iter().zip(1..).map(|(f, b)| (f, &s.share[b - 1..])) {
                let got: f64 = share.iter().sum();
                assert!(
                    (got - f64::from(1.0 - floor)).abs() < 0.08,
                    "{floor}: {got}"
                );
            }
            let [right, ..] = r.outline(0);
            let expect = (0..1000)
                .map(|i| curve((f64::from(i) + 0.5) / 1000.0))
                .sum::<f64>()
                / 1e3;
            assert!((right - expect).abs() < 0.05, "{right} {expect}");
        }
    }

    #[test]
    fn a_confidence_that_lies_is_worth_the_mean() {
        let r = learned(60_000, 5, |c| 0.9 - 0.8 * c);
        let (first, last) = (r.chance(0, 0), r.chance(0, BINS as u8 - 1));
        assert!(last >= first && last - first < 0.08, "{first} {last}");
        assert!((first - 0.5).abs() < 0.06, "{first}");
    }

    #[test]
    fn what_is_long_ago_is_forgotten_and_sums_stay_finite() {
        let mut r = Reliability::new(1);
        // So many that weights are brought back on the way.
        for _ in 0..100_000 {
            r.judge(0, 10, true);
            r.look(None, 0, 10);
        }
        assert!(r.chance(0, 10) > 0.99);
        for _ in 0..6000 {
            r.judge(0, 10, false);
            r.look(None, 0, 2);
        }
        assert!(r.chance(0, 10) < 0.06, "{}", r.chance(0, 10));
        let s = r.spread(None, 0);
        assert!(s.share.iter().all(|n| n.is_finite()) && s.share[2] > 0.9);
        assert!((r.shares[0][0].looks() - LOOKS).abs() < 2.0);
    }

    /// The pools are the least-squares fit: no monotone line is nearer.
    #[test]
    fn pools_are_the_nearest_monotone_line() {
        let r = learned(500, 9, |c| if c < 0.5 { 0.8 } else { 0.3 + 0.5 * c });
        let v = &r.verdicts[0];
        let mean = |from: usize, to: usize| {
            let (mut all, mut right) = (0.0, 0.0);
            for b in from..to {
                all += v.all[b] / v.fading.weight + v.prior();
                right += v.right[b] / v.fading.weight + v.prior() * middle(b);
            }
            right / all
        };
        // The minimax formula of isotonic regression (Barlow et al. 1972).
        for b in 0..BINS {
            let mut expect = f64::NEG_INFINITY;
            for from in 0..=b {
                let least = (b + 1..=BINS).map(|to| mean(from, to));
                expect = expect.max(least.fold(f64::INFINITY, f64::min));
            }
            let stale = f64::from(v.stale) * 0.02;
            assert!((f64::from(v.chance[b]) - expect).abs() < 1e-6 + stale);
        }
    }
}
