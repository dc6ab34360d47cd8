// SPDX-License-Identifier: Apache-2.0

//! Speculative sampling: a token drawn from the ramp's distribution becomes
//! one of the full model's, accepted or replaced (Leviathan, Kalman, Matias,
//! "Fast Inference from Transformers via Speculative Decoding", 2023,
//! arXiv 2211.17192, section 2.3; Chen et al., 2023, arXiv 2302.01318).

/// The token to emit: `draft`, which was drawn from `q`, with probability
/// min(1, p/q), else one from max(p - q, 0), so that the result is distributed
/// as `p`. `q` `None`: the draft was certain, as a greedy one is. `p` and `q`
/// need not sum to 1 exactly. `u` and `v` are uniform in [0, 1), of their own.
pub fn keep_or_replace(p: &[f32], q: Option<&[f32]>, draft: usize, u: f64, v: f64) -> usize {
    let sum = |d: &[f32]| d.iter().map(|&x| f64::from(x)).sum::<f64>();
    let p_all = sum(p);
    let q_all = q.map_or(1.0, sum);
    let p_at = |i: usize| f64::from(p[i]) / p_all;
    let q_at = |i: usize| match q {
        Some(q) => f64::from(q[i]) / q_all,
        None => f64::from(u8::from(i == draft)),
    };
    if u * q_at(draft) < p_at(draft) {
        return draft;
    }
    let rest = |i: usize| (p_at(i) - q_at(i)).max(0.0);
    let all: f64 = (0..p.len()).map(rest).sum();
    let mut left = v * all;
    let mut last = draft;
    for i in 0..p.len() {
        let r = rest(i);
        if r > 0.0 {
            if left < r {
                return i;
            }
            left -= r;
            last = i;
        }
    }
    // Rounding ate the end; the draft, if the distributions are the same.
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(d: &[f32], u: f64) -> usize {
        let mut left = u * d.iter().map(|&x| f64::from(x)).sum::<f64>();
        for (i, &x) in d.iter().enumerate() {
            left -= f64::from(x);
            if left < 0.0 {
                return i;
            }
        }
        d.len() - 1
    }

    /// Chi-square with 4 degrees of freedom: above 23.5 once in 10,000 runs.
    #[test]
    fn the_result_is_distributed_as_the_full_model() {
        let p = [0.5f32, 0.2, 0.0, 0.2, 0.1];
        for q in [
            [0.2f32, 0.2, 0.2, 0.2, 0.2],
            [0.0, 0.1, 0.9, 0.0, 0.0],
            [0.5, 0.2, 0.0, 0.2, 0.1],
            [5.0, 1.0, 1.0, 1.0, 2.0],
        ] {
            for certain in [false, true] {
                let mut rng = fastrand::Rng::with_seed(11);
                let n = 200_000;
                let (mut seen, mut same) = ([0u32; 5], 0);
                for _ in 0..n {
                    let draft = if certain { 3 } else { draw(&q, rng.f64()) };
                    let (u, v) = (rng.f64(), rng.f64());
                    let q = (!certain).then_some(&q[..]);
                    let token = keep_or_replace(&p, q, draft, u, v);
                    seen[token] += 1;
                    same += u32::from(token == draft);
                }
                assert_eq!(seen[2], 0, "the full model never says 2");
                let chi: f64 = [0, 1, 3, 4]
                    .map(|i| {
                        let e = f64::from(p[i]) * f64::from(n);
                        (f64::from(seen[i]) - e).powi(2) / e
                    })
                    .iter()
                    .sum();
                assert!(chi < 23.5, "{q:?} {certain}: {seen:?} chi-square {chi}");
                // As many are kept as can be: the sum of min(p, q).
                let q_all: f32 = q.iter().sum();
                let best: f32 = if certain {
                    p[3]
                } else {
                    p.iter().zip(&q).map(|(a, b)| a.min(b / q_all)).sum()
                };
                let share = f64::from(same) / f64::from(n);
                assert!((share - f64::from(best)).abs() < 0.006, "{share} {best}");
            }
        }
    }

    #[test]
    fn equal_distributions_keep_the_draft() {
        let p = [0.25f32; 4];
        for u in [0.0, 0.5, 0.999_999_999] {
            assert_eq!(keep_or_replace(&p, Some(&p), 2, u, 0.7), 2);
        }
    }
}
