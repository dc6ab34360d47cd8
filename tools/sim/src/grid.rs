// SPDX-License-Identifier: Apache-2.0

//! Every policy in every regime, against the best fixed threshold rule and
//! the analytic limit.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use drex::core::config::{Fill, Policy, Quality};
use drex::core::estimate::acceptance::Cycle;
use drex::core::estimate::profile::Profile;
use serde_json::{Value, json};

use crate::profiles::{CLASSES, Class};
use crate::run::{Contender, Filling, Report, Setup, run};
use crate::workload::{Confidence, Workload};

const SIZES: [(u32, u32); 6] = [(8, 8), (16, 8), (32, 16), (64, 64), (96, 64), (128, 64)];
const DEPTHS: [f64; 2] = [0.25, 0.5];
const CHANCES: [f64; 3] = [0.2, 0.5, 0.8];
const LAYERS: u32 = 16;

#[derive(Debug, Clone)]
pub struct Options {
    pub tokens: u64,
    pub seed: u64,
    pub noise: f64,
    pub outliers: f64,
    pub spread: f64,
    pub drift: f64,
    /// `auto` starts from a profile that is wrong by this factor in the cost
    /// of rows. 1: from nothing.
    pub wrong: f64,
    pub filling: Filling,
    /// Share of the work that prompts are, where no row exits.
    pub prompt_share: f64,
    pub pass_rows: u32,
}

/// Tokens of an answer, where prompts come before it.
const LENGTH: (u64, u64) = (50, 150);

/// Rows of the prompt before an answer that takes `answer_ns`, so that they
/// are `share` of both.
pub fn prompt_rows(profile: &Profile, share: f64, answer_ns: f64) -> u64 {
    let row = profile.prompt_row(0, profile.segments.len());
    (share / (1.0 - share) * answer_ns / row).round().max(1.0) as u64
}

#[derive(Debug, Clone)]
pub struct Cell {
    pub class: Class,
    pub n: u32,
    pub batch: u32,
    pub a: f64,
    pub p: f64,
    pub off: Report,
    pub art: Report,
    pub latency: Report,
    pub eager: Report,
    pub auto: Report,
    pub best: Report,
    pub theta: u32,
    pub phi: u32,
    /// The best rule with phi = 1.
    pub best_phi1: f64,
    /// Tokens per second.
    pub limit: f64,
}

impl Cell {
    pub fn ratio(&self, r: &Report) -> f64 {
        r.tokens_per_s / self.off.tokens_per_s
    }

    pub fn vs_off(&self) -> f64 {
        self.ratio(&self.auto)
    }

    /// Of `auto`, relative to the best fixed rule, "no early exit" included.
    pub fn vs_best(&self) -> f64 {
        let best = self.best.tokens_per_s.max(self.off.tokens_per_s);
        self.auto.tokens_per_s / best
    }

    pub fn json(&self) -> Value {
        let r = |x: f64| (x * 1e4).round() / 1e4;
        json!({
            "regime": self.class.name, "N": self.n, "B": self.batch, "a": self.a, "p": self.p,
            "off_tokens_per_s": r(self.off.tokens_per_s), "off": 1.0,
            "art": r(self.ratio(&self.art)), "latency": r(self.ratio(&self.latency)),
            "eager": r(self.ratio(&self.eager)), "eager_involuntary_exits": self.eager.involuntary_exits,
            "auto": r(self.vs_off()), "auto_second_half": r(self.auto.late_tokens_per_s / self.off.late_tokens_per_s),
            "best": r(self.ratio(&self.best)), "theta": self.theta, "phi": self.phi,
            "best_phi1": r(self.best_phi1 / self.off.tokens_per_s),
            "limit": r(self.limit / self.off.tokens_per_s),
            "auto_vs_best": r(self.vs_best()),
            "auto_p99_ms": r(self.auto.tbt_p99_ms), "off_p99_ms": r(self.off.tbt_p99_ms),
        })
    }
}

/// Tokens per second of full batches at every window: b over the sum of
/// (share of rows that get there) x (time of the window). Rows that stay
/// pending get everywhere, but in windows that run for others.
pub fn limit(profile: &Profile, rows: u32, chances: &[f64], filling: &Filling) -> f64 {
    let b = f64::from(rows);
    let left: f64 = chances.iter().map(|p| 1.0 - p).product();
    let cycle = Cycle::new(1.0 - left, filling.max_pending, filling.accept);
    let keeps = filling.fill.keeps();
    let mut share = 1.0;
    let mut ns = 0.0;
    for k in 0..profile.segments.len() {
        let empty = profile.time(k, k + 1, 0.0, 0.0);
        let rows = profile.time(k, k + 1, b, 0.0) - empty;
        ns += share * empty + if keeps { rows } else { share * rows };
        let p = chances.get(k).copied().unwrap_or(0.0);
        share *= 1.0 - if keeps { p * (1.0 - cycle.full) } else { p };
    }
    let verify = filling.fill == Fill::Verify;
    b / ns * 1e9 * if verify { cycle.worth } else { 1.0 }
}

pub fn run_grid(o: &Options, progress: impl Fn(usize, usize) + Sync) -> Result<Vec<Cell>> {
    let mut places = Vec::new();
    for class in CLASSES {
        for (n, batch) in SIZES {
            // Deep windows have room for what comes along.
            let batch = match o.filling.max_pending {
                0 => batch,
                _ => o.filling.pass_rows(n),
            };
            for a in DEPTHS {
                for p in CHANCES {
                    places.push((class, n, batch, a, p));
                }
            }
        }
    }
    cells(&places, progress, |&(class, n, batch, a, p)| {
        cell(class, n, batch, a, p, o)
    })
}

/// One cell for each place, on all cores, in the order of the places. `progress` is told how many are done, of how many.
pub fn cells<P: Sync, C: Send>(
    places: &[P],
    progress: impl Fn(usize, usize) + Sync,
    cell: impl Fn(&P) -> Result<C> + Sync,
) -> Result<Vec<C>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Result<C>)>> = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(place) = places.get(i) else {
                        break;
                    };
                    let cell = cell(place);
                    let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
                    done.push((i, cell));
                    progress(done.len(), places.len());
                }
            });
        }
    });
    let mut cells = done.into_inner().unwrap_or_else(|e| e.into_inner());
    cells.sort_by_key(|c| c.0);
    cells.into_iter().map(|c| c.1).collect()
}

pub fn cell(class: Class, n: u32, batch: u32, a: f64, p: f64, o: &Options) -> Result<Cell> {
    let ramp = (a * f64::from(LAYERS)).round() as u32;
    let profile = class.profile(LAYERS, &[ramp]);
    let mut workload = Workload::closed(n, vec![p], o.seed);
    if o.spread > 0.0 {
        workload.confidence = Confidence::Spread(vec![p], o.spread);
    }
    let prompt = if o.prompt_share > 0.0 {
        let b = f64::from(n.min(batch));
        let mean = (LENGTH.0 + LENGTH.1) as f64 / 2.0;
        let answer = mean * profile.time(0, 2, b, 0.0) / b;
        let rows = prompt_rows(&profile, o.prompt_share, answer);
        workload.length = LENGTH;
        workload.prompt_rows = (rows, rows);
        rows as f64 * profile.prompt_row(0, 2) / mean
    } else {
        0.0
    };
    if o.drift > 0.0 {
        // Three swings in the time that full passes would take.
        let pass = profile.time(0, 2, f64::from(n.min(batch)), 0.0) / 1e9;
        let period = pass * o.tokens as f64 / f64::from(n.min(batch)) / 3.0;
        workload.confidence = Confidence::Drift(vec![p], o.drift, period);
    }
    let start = (o.wrong != 1.0).then(|| {
        let mut wrong = profile.clone();
        for s in &mut wrong.segments {
            s.ns_per_row *= o.wrong;
        }
        wrong
    });
    let setup = Setup {
        profile: profile.clone(),
        workload,
        batch,
        pass_rows: o.pass_rows.max(batch),
        max_hold_ns: 0,
        max_requests: n,
        thresholds: vec![0.5],
        tokens: o.tokens,
        noise: o.noise,
        outliers: o.outliers,
        gap_ns: 0.0,
        start: None,
        filling: o.filling,
        quality: Quality::Given,
    };
    let policy = |name: &str| run(&setup, &Contender::parse(name)?);
    let off = policy("off")?;
    let auto = run(
        &Setup {
            start,
            ..setup.clone()
        },
        &Contender::parse("auto")?,
    )?;
    debug_assert_eq!(auto.name, "auto");
    let mut best: Option<(Report, u32, u32)> = None;
    let mut best_phi1 = 0.0f64;
    let scale = n.min(2 * batch);
    let mut before = 0;
    for f in 1..=20u32 {
        let theta = ((f64::from(scale) * f64::from(f) / 20.0).round() as u32).max(1);
        if theta == before {
            continue;
        }
        before = theta;
        let mut last = 0;
        for phi in [1, n / 8, n / 4, n / 2] {
            let phi = phi.max(1);
            if phi == last {
                continue;
            }
            last = phi;
            let r = run(
                &setup,
                &Contender {
                    policy: Policy::Hold,
                    ..Contender::rule(theta, phi)
                },
            )?;
            if phi == 1 {
                best_phi1 = best_phi1.max(r.tokens_per_s);
            }
            if best
                .as_ref()
                .is_none_or(|b| r.tokens_per_s > b.0.tokens_per_s)
            {
                best = Some((r, theta, phi));
            }
        }
    }
    let (best, theta, phi) = best.unwrap_or_else(|| (off.clone(), 0, 0));
    Ok(Cell {
        class,
        n,
        batch,
        a,
        p,
        art: policy("art")?,
        latency: policy("latency")?,
        eager: policy("eager")?,
        auto,
        off,
        best,
        theta,
        phi,
        best_phi1,
        limit: 1e9 / (1e9 / limit(&profile, n.min(batch), &[p], &o.filling) + prompt),
    })
}

/// The worst of `auto` against no early exit and against the best rule.
pub fn worst(cells: &[Cell]) -> (f64, f64) {
    let least = |f: fn(&Cell) -> f64| cells.iter().map(f).fold(f64::INFINITY, f64::min);
    (least(Cell::vs_off), least(Cell::vs_best))
}
