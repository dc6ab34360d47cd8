// SPDX-License-Identifier: Apache-2.0

//! Rows of logits, and what is to be found in them, in f64.

#![allow(dead_code)] // every test file uses its own part

use drex::core::metric::Metric;
use drex::device::Dtype;
use half::{bf16, f16};

pub const METRICS: [Metric; 3] = [Metric::Gap, Metric::MaxProb, Metric::Entropy];
pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// The numbers that a row has once it is stored as `dtype`.
pub fn rounded(row: &[f32], dtype: Dtype) -> Vec<f64> {
    row.iter()
        .map(|&x| match dtype {
            Dtype::F32 => f64::from(x),
            Dtype::F16 => f16::from_f32(x).to_f64(),
            Dtype::Bf16 => bf16::from_f32(x).to_f64(),
        })
        .collect()
}

pub fn bytes(row: &[f32], dtype: Dtype) -> Vec<u8> {
    row.iter()
        .flat_map(|&x| match dtype {
            Dtype::F32 => x.to_ne_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(x).to_ne_bytes().to_vec(),
            Dtype::Bf16 => bf16::from_f32(x).to_ne_bytes().to_vec(),
        })
        .collect()
}

/// By the definitions, in the plainest way.
pub fn reference(row: &[f64], metric: Metric) -> (f64, i32) {
    let bad = |x: &f64| x.is_nan() || *x == f64::INFINITY;
    if row.iter().any(bad) || row.iter().all(|&x| x == f64::NEG_INFINITY) {
        return (f64::NAN, -1);
    }
    let mut token = 0;
    for (i, &x) in row.iter().enumerate() {
        if x > row[token] {
            token = i;
        }
    }
    let total: f64 = row.iter().map(|x| (x - row[token]).exp()).sum();
    let mut p: Vec<f64> = row.iter().map(|x| (x - row[token]).exp() / total).collect();
    let entropy: f64 = p.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
    p.sort_by(|a, b| b.total_cmp(a));
    let c = match metric {
        Metric::MaxProb => p[0],
        Metric::Gap => p[0] - p.get(1).copied().unwrap_or(0.0),
        Metric::Entropy if row.len() == 1 => 1.0,
        Metric::Entropy => 1.0 - entropy / (row.len() as f64).ln(),
    };
    (c, token as i32)
}

pub fn noise(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| (rng.f32() - 0.5) * scale).collect()
}

/// The greatest `k`, by sorting: (index, value).
pub fn greatest(row: &[f64], k: usize) -> Vec<(i32, f64)> {
    let mut all: Vec<_> = row.iter().copied().enumerate().collect();
    all.retain(|(_, x)| !x.is_nan());
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    // +0 and -0 are equal.
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    all.truncate(k);
    all.into_iter().map(|(i, x)| (i as i32, x)).collect()
}

/// Random, adversarial and huge rows, by name.
pub fn cases(lengths: &[usize]) -> Vec<(String, Vec<f32>)> {
    let mut out = Vec::new();
    for &n in lengths {
        let mut add = |what: &str, row: Vec<f32>| out.push((format!("{what}, n = {n}"), row));
        for scale in [0.0, 1.0, 30.0] {
            add("random", noise(n, n as u64, scale));
        }
        add("all equal", vec![-4.25; n]);
        add("all masked", vec![f32::NEG_INFINITY; n]);
        add("lowest", vec![-f32::MAX; n]);
        let mut row = vec![-f32::MAX; n];
        row[n / 2] = f32::MAX;
        add("the whole range", row);
        for at in [0, n / 2, n - 1] {
            for hot in [1.0f32, 80.0, 60000.0, 1e30] {
                let mut row = vec![0.0; n];
                row[at] = hot;
                add("one hot", row);
            }
            let mut row = vec![f32::NEG_INFINITY; n];
            row[at] = -3.0;
            add("one left", row.clone());
            row[0] = -3.5;
            add("two left", row);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let mut row = noise(n, 11, 8.0);
                row[at] = bad;
                add("bad", row);
                let mut row = vec![f32::NEG_INFINITY; n];
                row[at] = bad;
                add("bad among masks", row);
            }
        }
        for (i, j) in [
            (0, n - 1),
            (n / 2, n - 1),
            (n.max(2) - 2, n - 1),
            (0, 1.min(n - 1)),
        ] {
            let mut row = noise(n, 5, 1.0);
            row[i] = 3.0;
            row[j] = 3.0;
            add("tie", row);
        }
        let mut row = noise(n, 9, 8.0);
        for x in row.iter_mut().step_by(3) {
            *x = f32::NEG_INFINITY;
        }
        add("every third masked", row);
    }
    out
}
