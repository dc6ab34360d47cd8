// SPDX-License-Identifier: Apache-2.0

//! Maps from the states of some layers to what the head can read.

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result};
use drex_build::process::Progress;
use ndarray::{Array1, Array2, Axis, s};
use rayon::prelude::*;

use crate::{
    harvest::duration,
    head::Head,
    map::{Map, Mlp},
    refine::{Refined, Target},
    ridge::{Affine, White},
    states::States,
};

/// A map of states in units of their root mean square.
#[derive(Clone)]
pub struct Fitted {
    pub layer: u32,
    pub map: Map,
}

/// Of the states' mean variance. States of middle layers have directions that hardly vary and say nothing.
const RIDGE: f64 = 1e-4;

/// The ridge solution for each layer.
pub fn regress(states: &States, layers: &[u32]) -> Result<Vec<Fitted>> {
    let last = states.last(states.all())?;
    layers
        .par_iter()
        .map(|&layer| {
            let x = states.layer(layer, states.all())?;
            let white = White::of(x.view(), RIDGE)?;
            let affine = Affine::regressed(white.apply(x.view()).view(), last.view())?;
            Ok(Fitted {
                layer,
                map: Map { affine, mlp: None }.unwhitened(&white),
            })
        })
        .collect()
}

pub struct Schedule {
    pub passes: usize,
    pub batch: usize,
    /// A step's size at the start, as a share of the map's own numbers; it falls to 0 along a cosine.
    pub rate: f32,
    /// Width of the network beside the affine map; 0: none.
    pub mlp: usize,
}

/// A network that says nothing yet: what leads into it is random, what leads out of it 0.
fn network(width: usize, inner: usize, seed: u64) -> Mlp {
    // Uniform, of variance 1 / width: white states leave it with variance 1.
    let order = shuffled(inner * width, seed);
    let (n, span) = (order.len() as f32, 2.0 * (3.0 / width as f32).sqrt());
    let values = order
        .into_iter()
        .map(|i| ((i as f32 + 0.5) / n - 0.5) * span);
    Mlp {
        up: Affine {
            weight: Array2::from_shape_vec((inner, width), values.collect())
                .expect("as many numbers as the shape has"),
            bias: Array1::zeros(inner),
        },
        down: Array2::zeros((width, inner)),
    }
}

/// Where an interrupted refinement goes on.
pub struct Checkpoint {
    pub path: PathBuf,
    /// What the maps depend on: with another key, it begins anew.
    pub key: String,
}

struct Work {
    layer: u32,
    white: White,
    x: Array2<f32>,
    refined: Refined,
}

/// The maps whose distributions are nearest to the full model's.
pub fn refine(
    states: &States,
    layers: &[u32],
    head: &Head,
    schedule: &Schedule,
    checkpoint: &Checkpoint,
) -> Result<Vec<Fitted>> {
    let last = states.last(states.all())?;
    let mut all: Vec<Work> = layers
        .par_iter()
        .map(|&layer| -> Result<Work> {
            let x = states.layer(layer, states.all())?;
            let white = White::of(x.view(), RIDGE)?;
            let x = white.apply(x.view());
            let affine = Affine::regressed(x.view(), last.view())?;
            let mlp =
                (schedule.mlp > 0).then(|| network(x.ncols(), schedule.mlp, u64::from(layer)));
            Ok(Work {
                layer,
                white,
                x,
                refined: Refined::new(Map { affine, mlp }),
            })
        })
        .collect::<Result<_>>()?;
    let first = checkpoint.load(&mut all).unwrap_or_else(|| {
        if checkpoint.path.exists() {
            eprintln!(
                "refining anew: the exits, their head or the schedule are others than last time"
            );
        }
        0
    });
    let n = states.rows.len();
    let log_sums: Vec<f32> = states.rows.iter().map(|r| r.log_sum).collect();
    let steps_of_pass = n.div_ceil(schedule.batch);
    let steps = (schedule.passes * steps_of_pass) as f32;
    let began = Instant::now();
    let mut progress = Progress::new("refining");
    let mut said = String::from("as before");
    for pass in first..schedule.passes {
        let order = shuffled(n, pass as u64);
        let mut losses = vec![0.0; all.len()];
        for (k, rows) in order.chunks(schedule.batch).enumerate() {
            let done = (pass * steps_of_pass + k) as f32;
            let rate = schedule.rate * 0.5 * (1.0 + (std::f32::consts::PI * done / steps).cos());
            let target = target(head, &last, &log_sums, rows);
            all.par_iter_mut().zip(&mut losses).for_each(|(w, loss)| {
                let x = w.x.select(Axis(0), rows);
                *loss += w.refined.step(head, x.view(), &target, rate);
            });
            let here = done - (first * steps_of_pass) as f32 + 1.0;
            let each = began.elapsed().as_secs_f64() / f64::from(here);
            progress.update(&format!(
                "pass {} of {}, {} left",
                pass + 1,
                schedule.passes,
                duration(each * f64::from(steps - done - 1.0))
            ));
        }
        checkpoint.save(&all, pass + 1)?;
        let losses: Vec<String> = losses
            .iter()
            .map(|l| format!("{:.3}", l / steps_of_pass as f64))
            .collect();
        said = losses.join(" ");
    }
    progress.finish(&format!("cross entropy {said}"));
    Ok(all
        .into_iter()
        .map(|w| Fitted {
            layer: w.layer,
            map: w.refined.map.unwhitened(&w.white),
        })
        .collect())
}

/// What the full model says at these rows, computed by all threads.
fn target(head: &Head, last: &Array2<f32>, log_sums: &[f32], rows: &[usize]) -> Target {
    let part = rows.len().div_ceil(rayon::current_num_threads()).max(1);
    let parts: Vec<Target> = rows
        .par_chunks(part)
        .map(|rows| {
            let sums: Vec<f32> = rows.iter().map(|&i| log_sums[i]).collect();
            Target::new(head, last.select(Axis(0), rows).view(), &sums)
        })
        .collect();
    let mut p = Array2::zeros((rows.len(), head.len()));
    let mut weight = Array1::zeros(rows.len());
    let mut at = 0;
    for t in parts {
        let to = at + t.weight.len();
        p.slice_mut(s![at..to, ..]).assign(&t.p);
        weight.slice_mut(s![at..to]).assign(&t.weight);
        at = to;
    }
    Target { p, weight }
}

/// 0..n in an order that depends on the seed alone.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut all);
    all
}

impl Checkpoint {
    /// The number of passes that are done, and their maps.
    fn load(&self, all: &mut [Work]) -> Option<usize> {
        let bytes = fs::read(&self.path).ok()?;
        let end = bytes.iter().position(|&b| b == b'\n')?;
        let (key, passes) = std::str::from_utf8(&bytes[..end]).ok()?.rsplit_once(' ')?;
        if key != self.key {
            return None;
        }
        let mut numbers = bytes[end + 1..]
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let mut maps = Vec::new();
        for w in all.iter() {
            let mut map = w.refined.map.clone();
            for v in map.numbers_mut() {
                *v = numbers.next()?;
            }
            maps.push(map);
        }
        for (w, map) in all.iter_mut().zip(maps) {
            w.refined.map = map;
        }
        passes.parse().ok()
    }

    fn save(&self, all: &[Work], passes: usize) -> Result<()> {
        let mut bytes = format!("{} {passes}\n", self.key).into_bytes();
        for w in all {
            for v in w.refined.map.numbers() {
                bytes.extend(v.to_le_bytes());
            }
        }
        let part = self.path.with_extension("part");
        fs::write(&part, bytes).with_context(|| format!("writing {}", part.display()))?;
        fs::rename(&part, &self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_everything_once() {
        let mut order = shuffled(1000, 3);
        assert_ne!(order, shuffled(1000, 4));
        assert_eq!(order, shuffled(1000, 3));
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
