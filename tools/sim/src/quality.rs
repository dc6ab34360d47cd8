// SPDX-License-Identifier: Apache-2.0

//! Quality `lossless`, where thresholds are learned, against every fixed threshold
//! and chain of drafts, over machines, loads and ramps that are honest or not.

use anyhow::Result;
use drex::core::config::{Fill, Quality};
use serde_json::{Value, json};

use crate::grid::cells;
use crate::profiles::{CLASSES, Class};
use crate::report::table;
use crate::run::{Contender, Filling, Report, Setup, USUAL, run};
use crate::workload::{Confidence, Curve, Honesty, Workload};

const REQUESTS: [u32; 4] = [1, 4, 16, 64];
const DEPTHS: [f64; 2] = [0.25, 0.5];
const RIGHT: [f64; 3] = [0.3, 0.6, 0.85];
const HONESTY: [(Honesty, &str); 3] = [
    (Honesty::Calibrated, "calibrated"),
    (Honesty::Flat, "flat"),
    (Honesty::Lying, "sure and wrong"),
];
const LAYERS: u32 = 16;
/// Pending rows of a request at most, where nothing is fixed.
const CHAIN: u32 = 8;
/// What a user may fix.
const THRESHOLDS: [f32; 8] = [0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 1.01];
const CHAINS: [u32; 3] = [1, 3, CHAIN];

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    pub tokens: u64,
    pub seed: u64,
    pub noise: f64,
    /// Share of itself by which the share of right tokens swings; a swing takes a
    /// quarter of the tokens of a run.
    pub drift: f64,
}

/// Tokens per second of one cell's runs.
#[derive(Debug, Clone)]
pub struct Cell {
    pub class: Class,
    pub requests: u32,
    pub depth: f64,
    pub right: f64,
    pub honesty: &'static str,
    pub off: f64,
    /// `auto` with the best threshold and chain, and these.
    pub fixed: f64,
    pub threshold: f32,
    pub chain: u32,
    /// `auto` with the usual ones.
    pub usual: f64,
    pub learned: Report,
}

impl Cell {
    pub fn vs_off(&self) -> f64 {
        self.learned.tokens_per_s / self.off
    }

    pub fn vs_fixed(&self) -> f64 {
        self.learned.tokens_per_s / self.fixed.max(self.off)
    }

    pub fn vs_usual(&self) -> f64 {
        self.learned.tokens_per_s / self.usual
    }

    pub fn json(&self) -> Value {
        let r = |x: f64| (x * 1e4).round() / 1e4;
        json!({
            "regime": self.class.name, "requests": self.requests, "depth": self.depth, "right": self.right,
            "honesty": self.honesty, "off_tokens_per_s": r(self.off), "fixed": r(self.fixed / self.off),
            "threshold": self.threshold, "chain": self.chain, "usual": r(self.usual / self.off),
            "learned": r(self.vs_off()), "learned_vs_fixed": r(self.vs_fixed()),
            "survival": self.learned.rule.map(|r| r.survival), "flush_rows": self.learned.rule.map(|r| r.hold_rows),
            "predicted": r(self.learned.predicted),
            "learned_vs_usual": r(self.vs_usual()),
            "drafts_accepted": r(self.learned.accepted as f64 / self.learned.drafts.max(1) as f64),
        })
    }
}

pub fn cell(class: Class, requests: u32, depth: f64, curve: Curve, o: &Options) -> Result<Cell> {
    let ramp = (depth * f64::from(LAYERS)).round() as u32;
    let mut workload = Workload::closed(requests, Vec::new(), o.seed);
    workload.confidence = Confidence::Curve(Curve {
        drift: (o.drift, o.tokens / u64::from(requests) / 4),
        ..curve
    });
    let go = |policy: &str, quality, threshold: f32, chain: u32| {
        let filling = Filling {
            fill: Fill::Verify,
            max_pending: chain,
            accept: curve.right,
            harm: 0.0,
        };
        let profile = class.profile(LAYERS, &[ramp]);
        let setup = Setup {
            thresholds: vec![threshold],
            noise: o.noise,
            quality,
            ..Setup::in_one_batch(profile, workload.clone(), requests, filling, o.tokens)
        };
        run(&setup, &Contender::parse(policy)?)
    };
    let off = go("off", Quality::Given, USUAL, CHAIN)?.tokens_per_s;
    let mut best = (0.0, 0.0, 0);
    for threshold in THRESHOLDS {
        for chain in CHAINS {
            let speed = go("auto", Quality::Given, threshold, chain)?.tokens_per_s;
            if speed > best.0 {
                best = (speed, threshold, chain);
            }
        }
    }
    Ok(Cell {
        class,
        requests,
        depth,
        right: curve.right,
        honesty: HONESTY
            .iter()
            .find(|h| h.0 == curve.honesty)
            .map_or("", |h| h.1),
        off,
        fixed: best.0,
        threshold: best.1,
        chain: best.2,
        usual: go("auto", Quality::Given, USUAL, CHAIN)?.tokens_per_s,
        learned: go("auto", Quality::Lossless, USUAL, CHAIN)?,
    })
}

pub fn run_quality(o: &Options, progress: impl Fn(usize, usize) + Sync) -> Result<Vec<Cell>> {
    let mut places = Vec::new();
    for class in CLASSES {
        for n in REQUESTS {
            for depth in DEPTHS {
                for (honesty, _) in HONESTY {
                    for right in RIGHT {
                        let drift = (0.0, 0);
                        places.push((
                            class,
                            n,
                            depth,
                            Curve {
                                honesty,
                                right,
                                drift,
                            },
                        ));
                    }
                }
            }
        }
    }
    cells(&places, progress, |&(class, n, depth, curve)| {
        cell(class, n, depth, curve, o)
    })
}

/// The least of a ratio, and its median.
fn spread(cells: &[Cell], ratio: fn(&Cell) -> f64) -> (f64, f64) {
    let mut all: Vec<f64> = cells.iter().map(ratio).collect();
    all.sort_by(f64::total_cmp);
    let at = |k: usize| all.get(k).copied().unwrap_or(f64::NAN);
    (at(0), at(all.len() / 2))
}

/// The worst cells, against no early exit and against the best that is fixed.
pub fn worst(cells: &[Cell]) -> (f64, f64) {
    (
        spread(cells, Cell::vs_off).0,
        spread(cells, Cell::vs_fixed).0,
    )
}

pub fn quality_json(cells: &[Cell], o: &Options) -> Value {
    let r = |x: f64| (x * 1e4).round() / 1e4;
    let (usual_worst, usual_median) = spread(cells, Cell::vs_usual);
    json!({
        "cells": cells.iter().map(Cell::json).collect::<Vec<_>>(),
        "worst_vs_off": r(spread(cells, Cell::vs_off).0), "median_vs_off": r(spread(cells, Cell::vs_off).1),
        "worst_vs_fixed": r(spread(cells, Cell::vs_fixed).0), "median_vs_fixed": r(spread(cells, Cell::vs_fixed).1),
        "worst_vs_usual": r(usual_worst), "median_vs_usual": r(usual_median),
        "tokens_per_run": o.tokens, "seed": o.seed, "noise": o.noise, "drift": o.drift,
    })
}

pub fn quality_table(cells: &[Cell]) -> String {
    let head = [
        "regime",
        "requests",
        "depth",
        "right",
        "confidence",
        "threshold",
        "chain",
        "fixed",
        "0.7",
        "learned",
        "learned/fixed",
        "stand",
    ];
    let r = |x: f64| format!("{x:.3}");
    let rows: Vec<Vec<String>> = cells
        .iter()
        .map(|c| {
            vec![
                c.class.name.into(),
                c.requests.to_string(),
                c.depth.to_string(),
                c.right.to_string(),
                c.honesty.into(),
                c.threshold.to_string(),
                c.chain.to_string(),
                r(c.fixed / c.off),
                r(c.usual / c.off),
                r(c.vs_off()),
                r(c.vs_fixed()),
                r(c.learned.accepted as f64 / c.learned.drafts.max(1) as f64),
            ]
        })
        .collect();
    let (off, fixed) = worst(cells);
    let (usual, median) = spread(cells, Cell::vs_usual);
    format!(
        "{}\nThroughput relative to no early exit. Worst cell of learned thresholds: {off:.4} of no early exit, \
         {fixed:.4} of the best fixed threshold and chain. Against a threshold of 0.7: worst {usual:.3}, median {median:.3}.\n",
        table(&head, &rows)
    )
}
