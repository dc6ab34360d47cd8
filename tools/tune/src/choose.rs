// SPDX-License-Identifier: Apache-2.0

//! What a set of exits will bring on this machine, by the simulator that drives drex's own scheduler.

use std::collections::HashMap;

use anyhow::{Context, Result};
use drex::core::config::{Fill, Policy, Quality};
use drex::core::estimate::profile::{Line, Profile, Segment, Window};
use drex_harness::stats::median;
use drex_sim::{
    run::{Contender, Filling, Setup, run},
    workload::{Arrivals, Confidence, Workload},
};
use serde::Serialize;

use crate::engine::Cost;

/// Microseconds for so many rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RowCost {
    pub rows: u32,
    /// Of every window.
    pub window: f64,
    pub layer: f64,
    /// Map and head of an exit.
    pub ramp: f64,
    /// The model's own norm and head.
    pub head: f64,
}

impl RowCost {
    /// A full pass.
    pub fn full(&self, n_layers: u32) -> f64 {
        self.window + f64::from(n_layers) * self.layer + self.head
    }
}

/// The rows that were measured, increasing.
pub fn row_costs(costs: &[Cost], n_layers: u32) -> Result<Vec<RowCost>> {
    let mut rows: Vec<u32> = costs.iter().map(|c| c.rows).collect();
    rows.sort_unstable();
    rows.dedup();
    let one = |&rows: &u32| -> Result<RowCost> {
        let of = |head: &'static str, end: Option<u32>| {
            costs.iter().filter(move |c| {
                c.rows == rows
                    && c.begin == 0
                    && c.head == head
                    && end.is_none_or(|end| c.end == end)
            })
        };
        let bare: Vec<(f64, f64)> = of("none", None).map(|c| (f64::from(c.end), c.us)).collect();
        let (window, layer) = line(&bare).context("fewer than two layers were measured")?;
        let full: Vec<f64> = of("own", Some(n_layers)).map(|c| c.us).collect();
        let ramps: Vec<f64> = of("exit", None)
            .filter_map(|c| Some(c.us - of("none", Some(c.end)).next()?.us))
            .collect();
        Ok(RowCost {
            rows,
            window: window.max(0.0),
            layer: layer.max(1e-3),
            ramp: median(&ramps).max(0.0),
            head: (median(&full) - window.max(0.0) - f64::from(n_layers) * layer).max(0.0),
        })
    };
    rows.iter().map(one).collect()
}

/// Least squares: intercept and slope.
fn line(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let n = points.len() as f64;
    let (mx, my) = points
        .iter()
        .fold((0.0, 0.0), |a, p| (a.0 + p.0 / n, a.1 + p.1 / n));
    let xx: f64 = points.iter().map(|p| (p.0 - mx).powi(2)).sum();
    let xy: f64 = points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    (xx > 0.0).then(|| (my - xy / xx * mx, xy / xx))
}

/// The time of windows around so many rows, as a line through two measured numbers of rows.
pub fn profile(costs: &[RowCost], n_layers: u32, ramps: &[u32], rows: u32) -> Profile {
    let at = costs.iter().rposition(|c| c.rows <= rows).unwrap_or(0);
    let low = &costs[at.min(costs.len().saturating_sub(2))];
    let high = &costs[(at.min(costs.len().saturating_sub(2)) + 1).min(costs.len() - 1)];
    let through = |f: fn(&RowCost) -> f64| {
        let (a, b) = (f(low), f(high));
        let span = f64::from(high.rows.saturating_sub(low.rows)).max(1.0);
        let slope = ((b - a) / span).max(0.0);
        Line {
            ns: 1e3 * (a - slope * f64::from(low.rows)).max(0.0),
            ns_per_row: 1e3 * slope,
        }
    };
    let window = through(|c| c.window);
    let layer = through(|c| c.layer);
    let head = through(|c| c.head);
    let mut bounds = vec![0];
    bounds.extend_from_slice(ramps);
    bounds.push(n_layers);
    let segments = bounds
        .windows(2)
        .map(|w| {
            let n = f64::from(w[1] - w[0]);
            let own = f64::from(u8::from(w[1] == n_layers));
            let ns_per_row = n * layer.ns_per_row + own * head.ns_per_row;
            Segment {
                ns: n * layer.ns + own * head.ns,
                ns_per_row,
                ns_per_prompt_row: ns_per_row,
                ns_per_cell: 0.0,
            }
        })
        .collect();
    Profile {
        n_layers,
        ramp_layers: ramps.to_vec(),
        window: Window {
            ns: window.ns,
            ns_per_row: window.ns_per_row,
            ns_per_prompt_row: window.ns_per_row,
        },
        ramp: through(|c| c.ramp),
        segments,
    }
}

/// What the exits of a set say of held-out texts, token by token.
pub struct Heard {
    /// [text][token][exit]: its confidence, and whether it is right.
    pub texts: Vec<Vec<Vec<(f32, bool)>>>,
}

impl Heard {
    /// At these thresholds, the share of tokens that leave, and of those the share that is right.
    pub fn leaving(&self, thresholds: &[f32]) -> (f64, f64) {
        let (mut all, mut left, mut right) = (0u64, 0u64, 0u64);
        for exits in self.texts.iter().flatten() {
            all += 1;
            let first = exits.iter().zip(thresholds).find(|(e, t)| e.0 >= **t);
            if let Some((exit, _)) = first {
                left += 1;
                right += u64::from(exit.1);
            }
        }
        (
            left as f64 / all.max(1) as f64,
            right as f64 / left.max(1) as f64,
        )
    }

    /// Share of tokens that are the full model's where right and wrong ones leave and the others go on.
    pub fn agreement(&self, thresholds: &[f32]) -> f64 {
        let (left, right) = self.leaving(thresholds);
        1.0 - left * (1.0 - right)
    }
}

#[derive(Debug, Clone)]
pub struct Predicted {
    /// Tokens per second without exits, and with them.
    pub off: f64,
    pub auto: f64,
    pub threshold: f32,
}

/// Tokens that a simulation runs for each request in flight, and at least.
const TOKENS_EACH: u64 = 200;
const TOKENS_LEAST: u64 = 3000;
/// Tried where the fill is lossless: there a threshold is a matter of speed alone.
pub const THRESHOLDS: [f32; 5] = [0.3, 0.45, 0.6, 0.75, 0.9];

/// The best of these thresholds under this fill, `in_flight` requests at a time.
pub fn predict(
    costs: &[RowCost],
    n_layers: u32,
    layers: &[u32],
    heard: &Heard,
    in_flight: u32,
    fill: Fill,
    thresholds: &[f32],
) -> Result<Predicted> {
    let profile = profile(costs, n_layers, layers, in_flight);
    let confidences: HashMap<u64, Vec<Vec<f32>>> = heard
        .texts
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let tokens = text.iter().map(|exits| exits.iter().map(|e| e.0).collect());
            (i as u64, tokens.collect())
        })
        .collect();
    let lengths: Vec<u64> = heard.texts.iter().map(|t| t.len() as u64).collect();
    let mut best: Option<Predicted> = None;
    let mut off = None;
    for &threshold in thresholds {
        let all = vec![threshold; layers.len()];
        let workload = Workload {
            arrivals: Arrivals::Closed(in_flight),
            confidence: Confidence::Recorded(confidences.clone()),
            lengths: lengths.clone(),
            ..Workload::closed(in_flight, vec![0.5; layers.len()], 1)
        };
        let filling = Filling {
            fill,
            max_pending: if fill.keeps() { 8 } else { 0 },
            accept: heard.leaving(&all).1,
            harm: 0.0,
        };
        let setup = Setup {
            profile: profile.clone(),
            workload,
            batch: filling.pass_rows(in_flight),
            pass_rows: 0,
            max_hold_ns: 0,
            max_requests: in_flight,
            thresholds: all,
            tokens: (u64::from(in_flight) * TOKENS_EACH).max(TOKENS_LEAST),
            noise: 0.0,
            outliers: 0.0,
            gap_ns: 0.0,
            start: Some(profile.clone()),
            filling,
            quality: Quality::Given,
        };
        let speed = |policy, name: &str| -> Result<f64> {
            let contender = Contender {
                name: name.into(),
                policy,
                theta: 0,
                phi: 0,
            };
            Ok(run(&setup, &contender)?.late_tokens_per_s)
        };
        let off = match off {
            Some(speed) => speed,
            None => *off.insert(speed(Policy::Off, "off")?),
        };
        let auto = speed(Policy::Auto, "auto")?;
        if best.as_ref().is_none_or(|b| auto > b.auto) {
            best = Some(Predicted {
                off,
                auto,
                threshold,
            });
        }
    }
    best.context("no threshold was tried")
}

/// The lowest threshold at which this share of tokens is the full model's.
pub fn threshold_for(heard: &Heard, n_exits: usize, agreement: f64) -> f32 {
    (0..=100)
        .map(|i| i as f32 / 100.0)
        .find(|&t| heard.agreement(&vec![t; n_exits]) >= agreement)
        .unwrap_or(1.01)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(rows: u32, begin: u32, end: u32, head: &str, us: f64) -> Cost {
        Cost {
            rows,
            begin,
            end,
            head: head.into(),
            us,
        }
    }

    #[test]
    fn costs_come_apart() {
        let mut all = Vec::new();
        for rows in [1, 4] {
            let unit = f64::from(rows);
            all.push(cost(rows, 0, 12, "own", 10.0 + 12.0 * unit + 5.0));
            for end in [3, 6, 9] {
                let bare = 10.0 + f64::from(end) * unit;
                all.push(cost(rows, 0, end, "none", bare));
                all.push(cost(rows, 0, end, "exit", bare + 2.0));
            }
        }
        let costs = row_costs(&all, 12).unwrap();
        assert_eq!(costs.len(), 2);
        for (c, unit) in costs.iter().zip([1.0, 4.0]) {
            assert!(
                (c.window - 10.0).abs() < 1e-9 && (c.layer - unit).abs() < 1e-9,
                "{c:?}"
            );
            assert!(
                (c.ramp - 2.0).abs() < 1e-9 && (c.head - 5.0).abs() < 1e-9,
                "{c:?}"
            );
        }
        let p = profile(&costs, 12, &[3], 2);
        p.validate().unwrap();
        // Three layers, a window and a ramp for two rows: 10 + 3 * 2 + 2 microseconds.
        assert!((p.time(0, 1, 2.0, 0.0) - 18_000.0).abs() < 1.0);
        assert!((p.time(0, 2, 2.0, 0.0) - (10.0 + 24.0 + 5.0) * 1e3).abs() < 1.0);
    }

    /// Exits that are free and always right bring the most that there is; exits that know nothing bring nothing.
    #[test]
    fn predictions_of_the_two_extremes() {
        let costs = [1, 4].map(|rows| RowCost {
            rows,
            window: 0.0,
            layer: 100.0,
            ramp: 1.0,
            head: 0.0,
        });
        let heard = |c: f32, right| Heard {
            texts: vec![vec![vec![(c, right)]; 50]; 8],
        };
        let speed = |h: &Heard| {
            let p = predict(&costs, 12, &[3], h, 1, Fill::Copy, &[0.5]).unwrap();
            p.auto / p.off
        };
        let most = speed(&heard(0.99, true));
        assert!(most > 3.0 && most <= 4.0, "{most}");
        let none = speed(&heard(0.01, false));
        assert!(none > 0.95 && none < 1.01, "{none}");
        // Drafts that are all refused bring nothing.
        let refused = predict(
            &costs,
            12,
            &[3],
            &heard(0.99, false),
            1,
            Fill::Verify,
            &[0.5],
        )
        .unwrap();
        let ratio = refused.auto / refused.off;
        assert!(ratio < 1.01, "{ratio}");
        assert_eq!(heard(0.9, false).agreement(&[0.5]), 0.0);
        assert_eq!(threshold_for(&heard(0.9, false), 1, 0.99), 0.91);
    }
}
