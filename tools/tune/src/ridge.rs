// SPDX-License-Identifier: Apache-2.0

//! Ridge regression in closed form, in coordinates in which the states are white.

use anyhow::{Context, Result};
use linfa_linalg::{cholesky::Cholesky, triangular::SolveTriangular, triangular::UPLO};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};

/// x to L^-1 (x - mean), where L L' is the states' covariance plus a ridge.
pub struct White {
    pub mean: Array1<f32>,
    /// L^-1, lower triangular.
    pub inverse: Array2<f32>,
}

/// Sums over rows, chunk by chunk, so that f32 products lose nothing in them.
const CHUNK: usize = 1024;

fn chunks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows)
        .step_by(CHUNK)
        .map(move |i| (i, rows.min(i + CHUNK)))
}

impl White {
    /// The ridge is a share of the states' mean variance.
    pub fn of(x: ArrayView2<f32>, ridge: f64) -> Result<White> {
        let n = x.nrows() as f64;
        let width = x.ncols();
        let mean = x.mean_axis(Axis(0)).context("there are no states")?;
        let mut covariance = Array2::<f64>::zeros((width, width));
        for (from, to) in chunks(x.nrows()) {
            let part = &x.slice(s![from..to, ..]) - &mean;
            covariance += &part.t().dot(&part).mapv(f64::from);
        }
        covariance /= n;
        let trace: f64 = covariance.diag().sum();
        covariance
            .diag_mut()
            .map_inplace(|v| *v += ridge * trace / width as f64);
        let lower = covariance
            .cholesky()
            .context("the states' covariance has no square root")?;
        let inverse = lower
            .solve_triangular(&Array2::eye(width), UPLO::Lower)
            .context("the states' covariance has no inverse")?;
        Ok(White {
            mean,
            inverse: inverse.mapv(|v| v as f32),
        })
    }

    pub fn apply(&self, x: ArrayView2<f32>) -> Array2<f32> {
        (&x - &self.mean).dot(&self.inverse.t())
    }
}

/// y = weight x + bias
#[derive(Clone)]
pub struct Affine {
    pub weight: Array2<f32>,
    pub bias: Array1<f32>,
}

impl Affine {
    /// The least squares solution for white states.
    ///
    /// The covariance that made them white had the ridge in it, so this shrinks as ridge regression does.
    pub fn regressed(white: ArrayView2<f32>, y: ArrayView2<f32>) -> Result<Affine> {
        let n = white.nrows() as f64;
        let bias = y.mean_axis(Axis(0)).context("there are no states")?;
        let mut product = Array2::<f64>::zeros((y.ncols(), white.ncols()));
        for (from, to) in chunks(white.nrows()) {
            let part = &y.slice(s![from..to, ..]) - &bias;
            product += &part.t().dot(&white.slice(s![from..to, ..])).mapv(f64::from);
        }
        Ok(Affine {
            weight: product.mapv(|v| (v / n) as f32),
            bias,
        })
    }

    pub fn apply(&self, x: ArrayView2<f32>) -> Array2<f32> {
        x.dot(&self.weight.t()) + &self.bias
    }

    /// The same map of states as they are.
    pub fn unwhitened(&self, white: &White) -> Affine {
        let weight = self.weight.dot(&white.inverse);
        let bias = &self.bias - &weight.dot(&white.mean);
        Affine { weight, bias }
    }
}

/// Numbers between -0.5 and 0.5, the same for the same seed.
#[cfg(test)]
pub fn noise(seed: u64, shape: (usize, usize)) -> Array2<f32> {
    let mut k = seed;
    Array2::from_shape_simple_fn(shape, || {
        k = k
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (k >> 40) as f32 / (1 << 24) as f32 - 0.5
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_map_is_found_again() {
        // States that are correlated and off the origin.
        let x = noise(1, (500, 6)).dot(&noise(2, (6, 6))) + 3.0;
        let weight = noise(3, (4, 6));
        let bias = Array1::from(vec![1.0, -2.0, 0.5, 0.0]);
        let y = x.dot(&weight.t()) + &bias;
        let white = White::of(x.view(), 1e-9).unwrap();
        let z = white.apply(x.view());
        let found = Affine::regressed(z.view(), y.view()).unwrap();
        let plain = found.unwhitened(&white);
        for (a, b) in plain.weight.iter().zip(&weight) {
            assert!((a - b).abs() < 2e-3, "{a} {b}");
        }
        for (a, b) in plain.bias.iter().zip(&bias) {
            assert!((a - b).abs() < 2e-2, "{a} {b}");
        }
        let covariance = z.t().dot(&z) / 500.0;
        for ((i, j), v) in covariance.indexed_iter() {
            let want = f32::from(u8::from(i == j));
            assert!((v - want).abs() < 1e-3, "[{i}, {j}] is {v}");
        }
    }
}
