// SPDX-License-Identifier: Apache-2.0
//! Medians, quantiles and intervals, and random numbers by name.

use fastrand::Rng;

/// The value below which a share `q` of the values lies (nearest rank); 0 of none.
pub fn quantile(values: &mut [f64], q: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

/// 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// No more digits than mean something.
pub fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

/// Student's t for 95 %, two-sided.
fn t95(degrees: usize) -> f64 {
    const SMALL: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    // Above 30 the first terms of its expansion around the normal quantile are exact to three digits.
    match degrees {
        0 => f64::INFINITY,
        n if n <= SMALL.len() => SMALL[n - 1],
        n => 1.96 + 2.372 / n as f64 + 2.822 / (n * n) as f64,
    }
}

/// 95 % interval of ratios from paired rounds: Student's t over their logarithms. None of fewer than two, or where one is not
/// positive.
pub fn ratio_interval(ratios: &[f64]) -> Option<(f64, f64)> {
    if ratios.len() < 2 || ratios.iter().any(|r| !(*r > 0.0 && r.is_finite())) {
        return None;
    }
    let logs: Vec<f64> = ratios.iter().map(|r| r.ln()).collect();
    let n = logs.len() as f64;
    let centre = mean(&logs);
    let variance = logs.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / (n - 1.0);
    let half = t95(logs.len() - 1) * (variance / n).sqrt();
    Some(((centre - half).exp(), (centre + half).exp()))
}

/// A generator of its own for each use, from texts and numbers, each of which changes everything that follows.
pub fn random(name: &str, numbers: &[u64]) -> Rng {
    let words = name.bytes().map(u64::from).chain(numbers.iter().copied());
    words.fold(Rng::with_seed(0x5eed), |mut random, word| {
        Rng::with_seed(random.u64(..) ^ word)
    })
}

/// 95 % interval of the ratio of two quantiles of pooled rounds: rounds are drawn again with replacement, the same ones for
/// both. None of fewer than two rounds.
pub fn quantile_ratio_interval(ours: &[&[f64]], theirs: &[&[f64]], q: f64) -> Option<(f64, f64)> {
    const DRAWS: usize = 200;
    let rounds = ours.len().min(theirs.len());
    if rounds < 2 {
        return None;
    }
    let mut random = random("bootstrap", &[rounds as u64]);
    let mut ratios: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            let draw: Vec<usize> = (0..rounds).map(|_| random.usize(..rounds)).collect();
            let pooled = |from: &[&[f64]]| {
                let mut all: Vec<f64> = draw.iter().flat_map(|i| from[*i]).copied().collect();
                quantile(&mut all, q)
            };
            let ratio = pooled(ours) / pooled(theirs);
            ratio.is_finite().then_some(ratio)
        })
        .collect();
    if ratios.is_empty() {
        return None;
    }
    Some((quantile(&mut ratios, 0.025), quantile(&mut ratios, 0.975)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_medians() {
        let mut values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.5), 50.0);
        assert_eq!(quantile(&mut values, 0.99), 99.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    /// Against `scipy.stats.t.ppf(0.975, n)`.
    #[test]
    fn t_values() {
        for (degrees, t) in [
            (1, 12.7062),
            (4, 2.7764),
            (30, 2.0423),
            (31, 2.0395),
            (60, 2.0003),
            (1000, 1.9623),
        ] {
            assert!(
                (t95(degrees) - t).abs() < 2e-3,
                "{degrees}: {}",
                t95(degrees)
            );
        }
    }

    /// Logarithms 0, 0.1, 0.2: mean 0.1, standard error 0.1 / sqrt(3), t(2) = 4.303.
    #[test]
    fn an_interval_by_hand() {
        let ratios = [1.0, 0.1_f64.exp(), 0.2_f64.exp()];
        let (low, high) = ratio_interval(&ratios).unwrap();
        assert!((low.ln() - (0.1 - 0.248_434)).abs() < 1e-4, "{low}");
        assert!((high.ln() - (0.1 + 0.248_434)).abs() < 1e-4, "{high}");
        assert_eq!(ratio_interval(&[1.2]), None);
        assert_eq!(ratio_interval(&[1.2, 0.0]), None);
        assert_eq!(ratio_interval(&[1.2, f64::NAN]), None);
    }

    /// Of many made-up experiments with a known ratio, about 95 % of the intervals hold it.
    #[test]
    fn intervals_cover_the_truth() {
        let mut random = Rng::with_seed(1);
        // A sum of twelve uniform numbers is close to normal.
        let mut noise = move || (0..12).map(|_| random.f64()).sum::<f64>() - 6.0;
        let runs = 4000;
        let mut held = 0;
        for _ in 0..runs {
            let ratios: Vec<f64> = (0..5).map(|_| (0.2 + 0.1 * noise()).exp()).collect();
            let (low, high) = ratio_interval(&ratios).unwrap();
            held += u32::from((low..=high).contains(&0.2_f64.exp()));
        }
        let share = f64::from(held) / f64::from(runs);
        assert!((0.935..0.965).contains(&share), "{share}");
    }

    #[test]
    fn the_interval_of_quantiles_holds_a_ratio_that_all_rounds_have() {
        let theirs: Vec<Vec<f64>> = (1..5)
            .map(|round| (1..50).map(|i| f64::from(i * round)).collect())
            .collect();
        let ours: Vec<Vec<f64>> = theirs
            .iter()
            .map(|list| list.iter().map(|x| x * 1.5).collect())
            .collect();
        let of = |all: &[Vec<f64>]| {
            let (a, b): (Vec<&[f64]>, Vec<&[f64]>) = (
                all.iter().map(Vec::as_slice).collect(),
                theirs.iter().map(Vec::as_slice).collect(),
            );
            quantile_ratio_interval(&a, &b, 0.99)
        };
        // The same rounds are drawn for both, so that what differs between rounds cancels.
        let (low, high) = of(&ours).unwrap();
        assert!((low - 1.5).abs() < 1e-9 && (high - 1.5).abs() < 1e-9);
        assert_eq!(of(&ours[..1]), None);
        // One round that differs is in some draws.
        let mut odd = ours.clone();
        odd[3].iter_mut().for_each(|x| *x *= 4.0);
        let (low, high) = of(&odd).unwrap();
        assert!(low < 1.6 && high > 4.0, "{low} {high}");
    }

    #[test]
    fn random_numbers_depend_on_each_part_of_their_name_and_on_nothing_else() {
        let of = |name, numbers: &[u64]| random(name, numbers).u64(..);
        assert_eq!(of("a", &[1]), of("a", &[1]));
        let all = [
            of("a", &[1]),
            of("a", &[2]),
            of("b", &[1]),
            of("a", &[1, 0]),
            of("", &[]),
        ];
        for (i, word) in all.iter().enumerate() {
            assert!(!all[..i].contains(word), "{all:?}");
        }
    }
}
