// SPDX-License-Identifier: Apache-2.0

//! What the core's calls cost: a step over so many rows among so many
//! requests, part by part, and the search for a rule.

use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use drex::core::config::{Config, Fill, Policy, Quality};
use drex::core::decision::Decision;
use drex::core::metric::{Metric, Score};
use drex::core::policy::auto::{Auto, Known, Load};
use drex::core::rows::requests::RequestConfig;
use drex::core::scheduler::Scheduler;

const STEP_NS: u64 = 10_000_000;

fn engine(policy: Policy, requests: u32, batch: u32, ramps: u32, deadlines: bool) -> Scheduler {
    let mut engine = Scheduler::new(Config {
        n_layers: 4 * (ramps + 1),
        ramp_layers: (1..=ramps).map(|r| 4 * r).collect(),
        thresholds: vec![0.5; ramps as usize],
        n_slots: requests,
        max_requests: requests,
        max_batch: batch,
        max_pass_rows: 0,
        policy,
        metric: Metric::Gap,
        fill: Fill::Copy,
        max_pending: 0,
        flush_rows: 0,
        min_ready: 0,
        max_hold_ns: 0,
        token_deadline_ns: if deadlines { 10_000 * STEP_NS } else { 0 },
        seed: 1,
        art_ratio: None,
        quality: Quality::Given,
    })
    .unwrap();
    for id in 0..u64::from(requests) {
        engine
            .add(RequestConfig {
                id,
                metric: None,
                threshold: None,
                fill: None,
                quality: None,
                token_deadline_ns: 0,
                request_deadline_ns: 0,
                max_tokens: 0,
                priority: 0,
            })
            .unwrap();
        engine.ready(id, 0).unwrap();
    }
    engine
}

/// Time of plan, ramp, complete and ready in steps that had `rows` rows.
#[derive(Default)]
struct Spent {
    plan: Duration,
    ramp: Duration,
    complete: Duration,
    ready: Duration,
    steps: u64,
}

fn serve(engine: &mut Scheduler, rows: usize, iterations: u64) -> Spent {
    // The search is timed on its own.
    engine.replan(1);
    let mut spent = Spent::default();
    let mut clock = 0;
    let mut rng = fastrand::Rng::with_seed(1);
    let mut scores = Vec::new();
    let mut done = Vec::new();
    while spent.steps < iterations {
        let t0 = Instant::now();
        let step = engine.plan(clock, rows, 0).unwrap().unwrap();
        let t1 = Instant::now();
        scores.clear();
        for _ in 0..engine.step_rows().len() {
            scores.push(Score {
                confidence: rng.f32(),
                token: 0,
            });
        }
        let t2 = Instant::now();
        if step.ramp.is_some() {
            engine.ramp(&scores).unwrap();
        }
        let t3 = Instant::now();
        done.clear();
        for r in engine.step_rows() {
            if step.ramp.is_none() || r.decision == Decision::Exit {
                done.push(r.id);
            }
        }
        let counts = engine.step_rows().len() == rows;
        clock += STEP_NS;
        let t4 = Instant::now();
        engine.complete(clock, STEP_NS, 0).unwrap();
        let t5 = Instant::now();
        for &id in &done {
            engine.ready(id, clock).unwrap();
        }
        let t6 = Instant::now();
        if counts {
            spent.steps += 1;
            spent.plan += t1 - t0;
            spent.ramp += t3 - t2;
            spent.complete += t5 - t4;
            spent.ready += t6 - t5;
        }
    }
    spent
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("core");
    for (rows, requests, deadlines) in [
        (1, 1, false),
        (32, 64, false),
        (256, 512, false),
        (256, 512, true),
        (256, 10_000, false),
        (256, 10_000, true),
    ] {
        let with = if deadlines { "_deadlines" } else { "" };
        let name = |part| format!("{part}_{rows}_rows_of_{requests}{with}");
        type Part = (&'static str, fn(&Spent) -> Duration);
        let parts: [Part; 4] = [
            ("plan", |s| s.plan),
            ("ramp", |s| s.ramp),
            // What stands between a window's end and the next one's start.
            ("decision", |s| s.plan + s.ramp),
            ("whole_step", |s| s.plan + s.ramp + s.complete + s.ready),
        ];
        for (part, time) in parts {
            group.bench_function(name(part), |b| {
                let mut e = engine(Policy::Hold, requests, 256, 1, deadlines);
                serve(&mut e, rows, 200);
                b.iter_custom(|n| time(&serve(&mut e, rows, n)));
            });
        }
    }
    group.finish();
}

/// Policy `auto` at the start of a search, with what the engine knows.
fn searching(engine: &Scheduler, known: Known) -> Auto {
    let config = engine.config();
    let load = Load {
        requests: config.max_requests,
        ..Load::default()
    };
    let ramps = (1 << config.n_ramps()) - 1;
    let mut auto = Auto::new(config);
    while !auto.searching() {
        auto.step(config.max_batch.into(), STEP_NS, load, ramps, known);
    }
    auto
}

fn replan(c: &mut Criterion) {
    let mut group = c.benchmark_group("core");
    for (requests, batch, ramps) in [
        (8, 8, 1),
        (64, 64, 1),
        (128, 64, 1),
        (64, 64, 3),
        (64, 64, 8),
        (10_000, 256, 8),
    ] {
        group.bench_function(format!("replan_{requests}_requests_{ramps}_ramps"), |b| {
            let mut e = engine(Policy::Auto, requests, batch, ramps, false);
            serve(&mut e, requests.min(batch) as usize, 50);
            let known = Known {
                cost: e.cost(),
                exit_rates: e.exit_rates(),
                acceptance: e.acceptance(),
                reliability: e.reliability(),
            };
            b.iter_batched(
                || searching(&e, known),
                |mut auto| auto.work(u32::MAX, known),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = steps, replan
}
criterion_main!(benches);
