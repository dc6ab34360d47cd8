// SPDX-License-Identifier: Apache-2.0

//! Policy `auto` against fixed rules, in a closed loop of its own making: a
//! virtual clock, one ramp, exits drawn per request and token, so that every
//! policy meets the same ones.

use std::collections::HashSet;

use drex::core::config::{Config, Fill, Policy, Quality};
use drex::core::decision::Decision;
use drex::core::metric::{Metric, Score};
use drex::core::rows::requests::RequestConfig;
use drex::core::scheduler::Scheduler;

#[derive(Clone, Copy)]
struct Cell {
    t0: f64,
    t1: f64,
    n: u32,
    batch: u32,
    a: f64,
    p: f64,
    /// What a window costs more that has a shape for the first time, as a share
    /// of a full pass: its graph is built, its memory touched.
    first: f64,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn uniform(request: u64, token: u64) -> f64 {
    (mix(mix(request + 1).wrapping_add(token)) >> 11) as f64 / (1u64 << 53) as f64
}

fn engine(n: u32, batch: u32, policy: Policy) -> Scheduler {
    engine_with(n, batch, policy, 0, 4)
}

/// 16 layers, and a ramp after so many.
fn engine_with(n: u32, batch: u32, policy: Policy, theta: u32, ramp: u32) -> Scheduler {
    Scheduler::new(Config {
        n_layers: 16,
        ramp_layers: vec![ramp],
        thresholds: vec![0.5],
        n_slots: n,
        max_requests: n,
        max_batch: batch,
        max_pass_rows: 0,
        policy,
        metric: Metric::Gap,
        fill: Fill::Copy,
        max_pending: 0,
        flush_rows: theta,
        min_ready: 0,
        max_hold_ns: 0,
        token_deadline_ns: 0,
        seed: 1,
        art_ratio: None,
        quality: Quality::Given,
    })
    .unwrap()
}

fn add(engine: &mut Scheduler, id: u64, now_ns: u64) {
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
    engine.ready(id, now_ns).unwrap();
}

/// Tokens per second of virtual time, from the first token on: what is
/// learned is learned on the way.
fn run(cell: Cell, policy: Policy, theta: u32, tokens: u64) -> f64 {
    let layers = 16;
    let ramp = (cell.a * f64::from(layers)) as u32;
    let mut engine = engine_with(cell.n, cell.batch, policy, theta, ramp);
    for id in 0..u64::from(cell.n) {
        add(&mut engine, id, 0);
    }
    let mut made = vec![0u64; cell.n as usize];
    let (mut clock, mut total) = (0.0f64, 0u64);
    let mut scores = Vec::new();
    let mut shapes = HashSet::new();
    while total < tokens {
        let step = engine.plan(clock as u64, 1 << 20, 0).unwrap().unwrap();
        let rows = engine.step_rows().to_vec();
        let share = f64::from(step.layer_end - step.layer_begin) / f64::from(layers);
        let mut t = share * (cell.t0 + cell.t1 * rows.len() as f64);
        if step.ramp.is_some() {
            t += 0.02 * cell.t0;
            scores.clear();
            scores.extend(rows.iter().map(|r| Score {
                confidence: if uniform(r.id, made[r.id as usize]) < cell.p {
                    0.9
                } else {
                    0.1
                },
                token: 0,
            }));
            engine.ramp(&scores).unwrap();
        }
        if shapes.insert((step.layer_begin, step.layer_end, rows.len())) {
            t += cell.first * cell.t0;
        }
        clock += t * 1e7;
        let rows = engine.step_rows().to_vec();
        engine.complete(clock as u64, (t * 1e7) as u64, 0).unwrap();
        for r in rows {
            if step.ramp.is_none() || r.decision == Decision::Exit {
                made[r.id as usize] += 1;
                total += 1;
                engine.ready(r.id, clock as u64).unwrap();
            }
        }
    }
    assert_eq!(engine.counters().tokens, total);
    assert_eq!(engine.counters().involuntary_exits, 0);
    total as f64 / clock * 1e9
}

fn thetas(cell: Cell) -> Vec<u32> {
    let scale = f64::from(cell.n.min(2 * cell.batch));
    let mut v: Vec<u32> = (1..=20)
        .map(|f| ((scale * f64::from(f) / 20.0).round() as u32).max(1))
        .collect();
    v.dedup();
    v
}

const REGIMES: [(f64, f64); 3] = [(1.0, 0.002), (1.0, 0.05), (0.2, 0.2)];

fn check(cell: Cell, tokens: u64, worst: &mut (f64, f64)) {
    let off = run(cell, Policy::Off, 0, tokens);
    let auto = run(cell, Policy::Auto, 0, tokens);
    let best = thetas(cell)
        .into_iter()
        .map(|theta| run(cell, Policy::Hold, theta, tokens))
        .fold(0.0, f64::max);
    let best = best.max(off);
    if auto / off < 0.99 || auto / best < 0.97 {
        println!(
            "T1/T0 {} N {} B {} a {} p {}: auto/off {:.4}, auto/best {:.4} (best/off {:.4})",
            cell.t1 / cell.t0,
            cell.n,
            cell.batch,
            cell.a,
            cell.p,
            auto / off,
            auto / best,
            best / off
        );
    }
    *worst = (worst.0.min(auto / off), worst.1.min(auto / best));
}

/// A corner of DESIGN's grid where each kind of mistake shows; drex-sim runs
/// all of it.
#[test]
fn never_slower_than_off_and_close_to_the_best_rule() {
    let mut worst = (f64::MAX, f64::MAX);
    let all = std::env::var_os("DREX_GRID").is_some();
    for (t0, t1) in REGIMES {
        for (n, batch) in [(8, 8), (16, 8), (32, 16), (64, 64), (96, 64), (128, 64)] {
            for a in [0.25, 0.5] {
                for p in [0.2, 0.5, 0.8] {
                    let corner = n == batch && (p != 0.5);
                    if all || corner {
                        let cell = Cell {
                            t0,
                            t1,
                            n,
                            batch,
                            a,
                            p,
                            first: 0.0,
                        };
                        check(cell, 20_000, &mut worst);
                    }
                }
            }
        }
    }
    println!(
        "worst against off {:.4}, against the best rule {:.4}",
        worst.0, worst.1
    );
    assert!(worst.0 >= 0.99 && worst.1 >= 0.97, "{worst:?}");
}

/// Virtual time of a cold start's first tokens. Where windows of a new shape
/// take longer, the first probe is dear, and no other follows before its time is
/// one part in a hundred of all.
#[test]
fn a_cold_start_is_short() {
    let mut worst = [f64::MAX; 4];
    for (t0, t1) in REGIMES {
        for (a, p) in [(0.25, 0.2), (0.25, 0.8), (0.5, 0.2), (0.5, 0.5), (0.5, 0.8)] {
            for (k, first) in [(0, 0.0), (2, 0.3)] {
                let cell = Cell {
                    t0,
                    t1,
                    n: 4,
                    batch: 4,
                    a,
                    p,
                    first,
                };
                let time = |policy, tokens: u64| tokens as f64 / run(cell, policy, 0, tokens);
                let early = |policy| time(policy, 40);
                let late = |policy| time(policy, 400) - early(policy);
                worst[k] = worst[k].min(early(Policy::Off) / early(Policy::Auto));
                worst[k + 1] = worst[k + 1].min(late(Policy::Off) / late(Policy::Auto));
            }
        }
    }
    println!("ten passes, the next 90, both with dear new shapes: {worst:.3?}");
    assert!(worst[0] >= 0.98 && worst[1] >= 0.99, "{worst:?}");
    assert!(worst[2] >= 0.90 && worst[3] >= 0.98, "{worst:?}");
}

/// One request at a time, in the order of the header's calls: a token's request
/// goes on, or away, before its step is complete. A rule that was found stays.
#[test]
fn nothing_changes_while_nobody_is_there() {
    let mut engine = engine(1, 1, Policy::Auto);
    let (mut clock, mut full, mut exits) = (0u64, 0, 0);
    for id in 0..1000u64 {
        add(&mut engine, id, clock);
        let step = loop {
            let step = engine.plan(clock, 1, 0).unwrap().unwrap();
            let deep = step.layer_end == 16;
            clock += if deep { 8_000_000 } else { 2_000_000 };
            full += u32::from(deep && step.layer_begin == 0);
            if step.ramp.is_none() {
                break step;
            }
            let confidence = if uniform(id, 0) < 0.9 { 0.9 } else { 0.1 };
            engine
                .ramp(&[Score {
                    confidence,
                    token: 0,
                }])
                .unwrap();
            if confidence > 0.5 {
                exits += 1;
                break step;
            }
            engine.complete(clock, 2_000_000, 0).unwrap();
        };
        if step.ramp.is_some() {
            engine.remove(id).unwrap();
            engine.complete(clock, 2_000_000, 0).unwrap();
        } else {
            engine.complete(clock, 8_000_000, 0).unwrap();
            engine.remove(id).unwrap();
        }
    }
    println!("{full} full passes, {exits} exits");
    assert!(full <= 65, "{full} full passes");
    assert!(exits > 800, "{exits}");
}
