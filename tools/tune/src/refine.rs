// SPDX-License-Identifier: Apache-2.0

//! From the ridge solution to the one whose distribution over the head's tokens is nearest to the full model's.

use ndarray::{Array, Array1, Array2, ArrayView2, ArrayViewMut1, Axis, Dimension, Ix1, Ix2, Zip};

use crate::{
    head::Head,
    map::{Map, silu, silu_slope},
};

/// Adam's moments of one array of numbers, and the size of a step.
struct Adam<D: Dimension> {
    first: Array<f32, D>,
    second: Array<f32, D>,
    step: i32,
    /// In units of the numbers themselves.
    unit: f32,
}

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.98;

impl<D: Dimension> Adam<D> {
    fn new(of: &Array<f32, D>, unit: f32) -> Adam<D> {
        Adam {
            first: Array::zeros(of.raw_dim()),
            second: Array::zeros(of.raw_dim()),
            step: 0,
            unit,
        }
    }

    fn update(&mut self, values: &mut Array<f32, D>, gradient: &Array<f32, D>, rate: f32) {
        self.step += 1;
        let rate = rate * self.unit;
        let (c1, c2) = (1.0 - BETA1.powi(self.step), 1.0 - BETA2.powi(self.step));
        Zip::from(values)
            .and(gradient)
            .and(&mut self.first)
            .and(&mut self.second)
            .for_each(|v, &g, m, s| {
                *m = BETA1 * *m + (1.0 - BETA1) * g;
                *s = BETA2 * *s + (1.0 - BETA2) * g * g;
                *v -= rate * (*m / c1) / ((*s / c2).sqrt() + 1e-8);
            });
    }
}

/// Root of the mean square.
fn size(values: &Array2<f32>) -> f32 {
    let square: f32 = values.iter().map(|v| v * v).sum();
    (square / values.len() as f32).sqrt()
}

/// exp(x) for x <= 0, to about 3e-6 of its value, in a form that compilers make vector code of.
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    // ln(2) in two parts, of which products of the first with whole numbers are exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2.0) - n * LN_2.1;
    let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0)))));
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Logits to probabilities; returns the logarithm of the sum of exp(logit).
pub fn softmax(mut row: ArrayViewMut1<f32>) -> f32 {
    let top = row.fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    row.map_inplace(|v| *v = exp(*v - top));
    let sum = row.sum();
    row.map_inplace(|v| *v /= sum);
    top + sum.ln()
}

/// What the exit is to say: the full model's distribution over the head's tokens, and the weight of each row, the share
/// of the probability that those tokens have.
pub struct Target {
    pub p: Array2<f32>,
    pub weight: Array1<f32>,
}

impl Target {
    pub fn new(head: &Head, last: ArrayView2<f32>, log_sums: &[f32]) -> Target {
        let mut p = head.logits(last);
        let mut weight = Array1::zeros(log_sums.len());
        for ((row, w), &all) in p.outer_iter_mut().zip(&mut weight).zip(log_sums) {
            *w = (softmax(row) - all).exp().min(1.0);
        }
        Target { p, weight }
    }
}

/// A map that is being refined, of white states.
pub struct Refined {
    pub map: Map,
    weight: Adam<Ix2>,
    bias: Adam<Ix1>,
    mlp: Option<(Adam<Ix2>, Adam<Ix1>, Adam<Ix2>)>,
}

impl Refined {
    pub fn new(map: Map) -> Refined {
        let unit = size(&map.affine.weight);
        Refined {
            weight: Adam::new(&map.affine.weight, unit),
            bias: Adam::new(&map.affine.bias, unit),
            mlp: map.mlp.as_ref().map(|mlp| {
                let own = size(&mlp.up.weight);
                // What leads out of the network is 0 at first.
                (
                    Adam::new(&mlp.up.weight, own),
                    Adam::new(&mlp.up.bias, own),
                    Adam::new(&mlp.down, unit),
                )
            }),
            map,
        }
    }

    /// One step down the gradient of the Kullback-Leibler divergence; returns the mean cross entropy before it.
    pub fn step(&mut self, head: &Head, x: ArrayView2<f32>, target: &Target, rate: f32) -> f64 {
        let Map { affine, mlp } = &mut self.map;
        let mut y = affine.apply(x);
        let inside = mlp.as_ref().map(|mlp| {
            let before = mlp.up.apply(x);
            let after = before.mapv(silu);
            y += &after.dot(&mlp.down.t());
            (before, after)
        });
        let mut q = head.logits(y.view());
        let n = x.nrows() as f32;
        let mut loss = 0.0;
        for ((mut q, p), &w) in q
            .outer_iter_mut()
            .zip(target.p.outer_iter())
            .zip(&target.weight)
        {
            let dot: f32 = q.iter().zip(&p).map(|(a, b)| a * b).sum();
            let log_sum = softmax(q.view_mut());
            loss += f64::from(w * (log_sum - dot));
            let scale = w / n;
            Zip::from(&mut q)
                .and(&p)
                .for_each(|q, &p| *q = (*q - p) * scale);
        }
        let dy = q.dot(&head.rows);
        self.weight
            .update(&mut affine.weight, &dy.t().dot(&x), rate);
        self.bias
            .update(&mut affine.bias, &dy.sum_axis(Axis(0)), rate);
        if let (Some(mlp), Some((before, after)), Some((up, up_bias, down))) =
            (mlp, inside, &mut self.mlp)
        {
            let through = dy.dot(&mlp.down) * before.mapv_into(silu_slope);
            down.update(&mut mlp.down, &dy.t().dot(&after), rate);
            up.update(&mut mlp.up.weight, &through.t().dot(&x), rate);
            up_bias.update(&mut mlp.up.bias, &through.sum_axis(Axis(0)), rate);
        }
        loss / f64::from(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Mlp;
    use crate::ridge::{Affine, noise};

    fn network(seed: u64, width: usize, inner: usize) -> Mlp {
        Mlp {
            up: Affine {
                weight: noise(seed, (inner, width)),
                bias: Array1::zeros(inner),
            },
            down: noise(seed + 1, (width, inner)),
        }
    }

    /// The network's steps go the way that the loss falls, number by number.
    #[test]
    fn gradients_are_those_of_differences() {
        let x = noise(1, (16, 5)) * 3.0;
        let head = Head::new((0..12).collect(), noise(2, (12, 4)) * 3.0);
        let last = noise(3, (16, 4)) * 2.0;
        let log_sums: Vec<f32> = head
            .logits(last.view())
            .outer_iter()
            .map(|row| row.iter().map(|v| v.exp()).sum::<f32>().ln())
            .collect();
        let target = Target::new(&head, last.view(), &log_sums);
        let map = Map {
            affine: Affine {
                weight: noise(4, (4, 5)),
                bias: Array1::zeros(4),
            },
            mlp: Some(Mlp {
                down: noise(7, (4, 6)),
                ..network(6, 5, 6)
            }),
        };
        let loss = |map: &Map| Refined::new(map.clone()).step(&head, x.view(), &target, 0.0);
        // The first step of Adam has the gradient's sign and one size.
        let mut stepped = Refined::new(map.clone());
        stepped.step(&head, x.view(), &target, 1e-3);
        let n = map.numbers().count();
        let moved: Vec<f32> = map
            .numbers()
            .zip(stepped.map.numbers())
            .map(|(a, b)| b - a)
            .collect();
        let (mut seen, mut same) = (0, 0);
        for (i, moved) in moved.iter().enumerate() {
            let at = |by: f32| {
                let mut other = map.clone();
                if let Some(v) = other.numbers_mut().nth(i) {
                    *v += by;
                }
                loss(&other)
            };
            let slope = (at(0.02) - at(-0.02)) / 0.04;
            if slope.abs() > 1e-3 {
                seen += 1;
                same += u32::from((slope > 0.0) == (*moved < 0.0));
            }
        }
        assert!(
            seen > n as u32 / 4 && same == seen,
            "{same} of {seen} of {n}"
        );
    }

    /// Last states that are a known map of the states: steps lead from another map to one that says the same.
    #[test]
    fn steps_lead_to_the_full_models_distribution() {
        const ROWS: usize = 512;
        let x = noise(1, (ROWS, 6)) * 3.0;
        let last = x.dot(&(noise(2, (6, 6)) * 2.0)) + 0.3;
        let head = Head::new((0..40).collect(), noise(3, (40, 6)) * 4.0);
        let logits = head.logits(last.view()).mapv(f64::from);
        let sums: Vec<f64> = logits
            .outer_iter()
            .map(|row| row.iter().map(|v| v.exp()).sum())
            .collect();
        let log_sums: Vec<f32> = sums.iter().map(|s| s.ln() as f32).collect();
        let entropy: f64 = logits
            .outer_iter()
            .zip(&sums)
            .map(|(row, sum)| {
                row.iter()
                    .map(|v| v.exp() / sum * (sum.ln() - v))
                    .sum::<f64>()
            })
            .sum::<f64>()
            / ROWS as f64;

        let target = Target::new(&head, last.view(), &log_sums);
        assert!(target.weight.iter().all(|w| (w - 1.0).abs() < 1e-4));
        for mlp in [None, Some(network(5, 6, 8))] {
            let mut refined = Refined::new(Map {
                affine: Affine {
                    weight: noise(4, (6, 6)),
                    bias: Array1::zeros(6),
                },
                mlp,
            });
            let mut step = |rate| refined.step(&head, x.view(), &target, rate);
            let before = step(0.0);
            for k in 0..600 {
                step(0.1 * (1.0 - k as f32 / 600.0));
            }
            let after = step(0.0);
            assert!(
                before > entropy + 0.2 && (after - entropy).abs() < 0.01,
                "cross entropy {before} to {after}, of {entropy} at least"
            );
        }
    }

    /// A head without the token that the full model is sure of says nothing of such a row.
    #[test]
    fn rows_count_by_what_the_head_has_of_them() {
        let head = Head::new(vec![0, 1], noise(1, (2, 3)));
        let last = noise(2, (2, 3));
        let logits = head.logits(last.view());
        let own = |i: usize| logits.row(i).iter().map(|v| v.exp()).sum::<f32>().ln();
        let target = Target::new(&head, last.view(), &[own(0), own(1) + 4.0f32.ln()]);
        assert!((target.weight[0] - 1.0).abs() < 1e-5);
        assert!((target.weight[1] - 0.25).abs() < 1e-5);
    }

    #[test]
    fn exp_is_exp() {
        for i in 0..=8700 {
            let x = -0.01 * i as f32;
            let want = f64::from(x).exp();
            assert!(
                (f64::from(exp(x)) - want).abs() <= 4e-6 * want,
                "exp({x}) is {}",
                exp(x)
            );
        }
    }
}
