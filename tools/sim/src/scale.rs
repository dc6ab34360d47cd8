// SPDX-License-Identifier: Apache-2.0

//! What planning itself costs, in real time, as the number of requests grows.

use std::time::Instant;

use anyhow::Result;
use drex::core::config::{Config, Fill, Policy, Quality};
use drex::core::decision::Decision;
use drex::core::metric::{Metric, Score};
use drex::core::rows::requests::RequestConfig;
use drex::core::scheduler::Scheduler;

use crate::draw::uniform;

pub struct Cost {
    pub requests: u32,
    pub ramps: usize,
    pub rows_per_step: f64,
    /// plan + ramp + complete + the requests' ready, per step and per row.
    pub ns_per_step: f64,
    pub ns_per_row: f64,
}

/// Runs `steps` windows of at most 256 rows. With `deadlines`, every request
/// has one.
pub fn measure(requests: u32, ramps: usize, steps: u32, deadlines: bool) -> Result<Cost> {
    let layers = 4 * (ramps as u32 + 1);
    let mut engine = Scheduler::new(Config {
        n_layers: layers,
        ramp_layers: (1..=ramps as u32).map(|r| 4 * r).collect(),
        thresholds: vec![0.5; ramps],
        n_slots: requests,
        max_requests: requests,
        max_batch: 256,
        max_pass_rows: 0,
        policy: Policy::Auto,
        metric: Metric::Gap,
        fill: Fill::Copy,
        max_pending: 0,
        flush_rows: 0,
        min_ready: 0,
        max_hold_ns: 0,
        token_deadline_ns: if deadlines { 2_000_000_000 } else { 0 },
        seed: 1,
        art_ratio: None,
        quality: Quality::Given,
    })?;
    // The search for a rule is timed apart.
    engine.replan(1);
    for id in 0..u64::from(requests) {
        engine.add(RequestConfig {
            id,
            metric: None,
            threshold: None,
            fill: None,
            quality: None,
            token_deadline_ns: 0,
            request_deadline_ns: 0,
            max_tokens: 0,
            priority: (id % 3) as i32,
        })?;
        engine.ready(id, 0)?;
    }
    let mut clock = 0u64;
    let (mut rows, mut ns) = (0u64, 0u128);
    let mut scores = Vec::with_capacity(256);
    let mut done = Vec::with_capacity(256);
    let warm = steps / 4;
    for i in 0..steps + warm {
        if i % 64 == 0 {
            engine.replan(0);
        }
        let start = Instant::now();
        let Some(step) = engine.plan(clock, 256, 0)? else {
            break;
        };
        let mut spent = start.elapsed();
        scores.clear();
        scores.extend((0..engine.step_rows().len()).map(|k| Score {
            confidence: uniform(1, u64::from(i), k as u64, 0) as f32,
            token: 0,
        }));
        let start = Instant::now();
        if step.ramp.is_some() {
            engine.ramp(&scores)?;
        }
        spent += start.elapsed();
        done.clear();
        done.extend(
            engine
                .step_rows()
                .iter()
                .filter(|r| step.ramp.is_none() || r.decision == Decision::Exit)
                .map(|r| r.id),
        );
        let count = engine.step_rows().len();
        clock += 10_000_000;
        let start = Instant::now();
        engine.complete(clock, 10_000_000, 0)?;
        for &id in &done {
            engine.ready(id, clock)?;
        }
        spent += start.elapsed();
        if i >= warm {
            rows += count as u64;
            ns += spent.as_nanos();
        }
    }
    Ok(Cost {
        requests,
        ramps,
        rows_per_step: rows as f64 / f64::from(steps),
        ns_per_step: ns as f64 / f64::from(steps),
        ns_per_row: ns as f64 / rows as f64,
    })
}
