// SPDX-License-Identifier: Apache-2.0

//! Random numbers that follow from a seed.

/// splitmix64, from a seed. Inlined: rollouts draw in their innermost loop.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    #[inline]
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from [0, 1).
    #[inline]
    pub fn share(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Successes among `n` trials of chance `p`/1024: 64 at a time, each bit
    /// of p one word of coin flips. Beyond 256 trials, a normal variable.
    #[inline]
    pub fn binomial(&mut self, n: u32, p: u32) -> u32 {
        if n == 0 || p == 0 {
            return 0;
        }
        if p >= 1024 {
            return n;
        }
        if n > 256 {
            let share = f64::from(p) / 1024.0;
            // 64 coins have a standard deviation of 4
            let z = (f64::from(self.bits().count_ones()) - 32.0) / 4.0;
            let k = f64::from(n) * share + z * (f64::from(n) * share * (1.0 - share)).sqrt();
            return (k.round().max(0.0) as u32).min(n);
        }
        let mut left = n;
        let mut k = 0;
        while left > 0 {
            let mut hit = 0u64;
            for bit in p.trailing_zeros()..10 {
                let coins = self.bits();
                hit = if p >> bit & 1 == 1 {
                    hit | coins
                } else {
                    hit & coins
                };
            }
            let take = left.min(64);
            k += (hit & (u64::MAX >> (64 - take))).count_ones();
            left -= take;
        }
        k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_spread_evenly() {
        let mut rng = Rng(3);
        let mut tenths = [0; 10];
        for _ in 0..10_000 {
            tenths[(rng.share() * 10.0) as usize] += 1;
        }
        assert!(tenths.iter().all(|n| (880..1120).contains(n)), "{tenths:?}");
    }

    #[test]
    fn binomial_has_the_right_mean_and_spread() {
        for (n, p) in [(8u32, 205u32), (64, 512), (200, 819), (1000, 300)] {
            let mut rng = Rng(7);
            let (mut s, mut ss) = (0.0, 0.0);
            let m = 20_000;
            for _ in 0..m {
                let k = f64::from(rng.binomial(n, p));
                assert!(k <= f64::from(n));
                s += k;
                ss += k * k;
            }
            let (mean, share) = (s / f64::from(m), f64::from(p) / 1024.0);
            let var = ss / f64::from(m) - mean * mean;
            let expect = f64::from(n) * share;
            assert!(
                (mean / expect - 1.0).abs() < 0.01,
                "{n} {p}: {mean} {expect}"
            );
            assert!(
                (var / (expect * (1.0 - share)) - 1.0).abs() < 0.05,
                "{n} {p}: {var}"
            );
        }
        assert_eq!(Rng(1).binomial(10, 0), 0);
        assert_eq!(Rng(1).binomial(10, 1024), 10);
    }
}
