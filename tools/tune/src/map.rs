// SPDX-License-Identifier: Apache-2.0

//! What an exit makes of a state.

use ndarray::{Array2, ArrayView2};

use crate::ridge::{Affine, White};

/// y = affine(x), and beside it a small network.
#[derive(Clone)]
pub struct Map {
    pub affine: Affine,
    pub mlp: Option<Mlp>,
}

/// y = down silu(up(x))
#[derive(Clone)]
pub struct Mlp {
    pub up: Affine,
    pub down: Array2<f32>,
}

pub fn silu(v: f32) -> f32 {
    v / (1.0 + (-v).exp())
}

/// The derivative of `silu`.
pub fn silu_slope(v: f32) -> f32 {
    let s = 1.0 / (1.0 + (-v).exp());
    s * (1.0 + v * (1.0 - s))
}

impl Map {
    pub fn kind(&self) -> &'static str {
        match self.mlp {
            None => "affine",
            Some(_) => "mlp",
        }
    }

    pub fn apply(&self, x: ArrayView2<f32>) -> Array2<f32> {
        let mut y = self.affine.apply(x);
        if let Some(mlp) = &self.mlp {
            y += &mlp.up.apply(x).mapv_into(silu).dot(&mlp.down.t());
        }
        y
    }

    /// The same map of states as they are.
    pub fn unwhitened(&self, white: &White) -> Map {
        Map {
            affine: self.affine.unwhitened(white),
            mlp: self.mlp.as_ref().map(|mlp| Mlp {
                up: mlp.up.unwhitened(white),
                down: mlp.down.clone(),
            }),
        }
    }

    /// All numbers, in an order that depends on the map's shape alone.
    pub fn numbers(&self) -> impl Iterator<Item = &f32> {
        let mlp = self.mlp.iter();
        let rest = mlp.flat_map(|m| m.up.weight.iter().chain(&m.up.bias).chain(&m.down));
        self.affine
            .weight
            .iter()
            .chain(&self.affine.bias)
            .chain(rest)
    }

    pub fn numbers_mut(&mut self) -> impl Iterator<Item = &mut f32> {
        let mlp = self.mlp.iter_mut();
        let rest = mlp.flat_map(|m| {
            let up = m.up.weight.iter_mut().chain(&mut m.up.bias);
            up.chain(&mut m.down)
        });
        self.affine
            .weight
            .iter_mut()
            .chain(&mut self.affine.bias)
            .chain(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ridge::noise;
    use ndarray::{Array1, s};

    #[test]
    fn slopes_are_those_of_differences() {
        for v in [-4.0f32, -0.5, 0.0, 1.0, 6.0] {
            let difference = (silu(v + 1e-2) - silu(v - 1e-2)) / 2e-2;
            assert!((difference - silu_slope(v)).abs() < 1e-3, "at {v}");
        }
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
    }

    #[test]
    fn white_states_are_mapped_as_they_are() {
        let x = noise(1, (300, 5)).dot(&noise(2, (5, 5))) + 2.0;
        let white = White::of(x.view(), 1e-6).unwrap();
        let map = Map {
            affine: Affine {
                weight: noise(3, (4, 5)),
                bias: Array1::from_elem(4, 0.5),
            },
            mlp: Some(Mlp {
                up: Affine {
                    weight: noise(4, (7, 5)),
                    bias: noise(5, (1, 7)).slice(s![0, ..]).to_owned(),
                },
                down: noise(6, (4, 7)),
            }),
        };
        let here = map.apply(white.apply(x.view()).view());
        let there = map.unwhitened(&white).apply(x.view());
        for (a, b) in here.iter().zip(&there) {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
        assert_eq!(map.numbers().count(), 4 * 5 + 4 + 7 * 5 + 7 + 4 * 7);
        let mut other = map.clone();
        other.numbers_mut().for_each(|v| *v += 1.0);
        assert!(
            map.numbers()
                .zip(other.numbers())
                .all(|(a, b)| (b - a - 1.0).abs() < 1e-5)
        );
    }
}
