// SPDX-License-Identifier: Apache-2.0

//! A target agreement as the quality: what it brings beside lossless, and whether the promise is kept where the text
//! changes its kind in the middle.

use anyhow::Result;
use drex::core::config::{Fill, Quality};
use drex::core::estimate::agreement::target;
use serde_json::{Value, json};

use crate::grid::cells;
use crate::profiles::{CLASSES, Class};
use crate::report::table;
use crate::run::{Contender, Filling, Report, Setup, run};
use crate::workload::{Confidence, Curve, Honesty, Workload};

const TARGETS: [f64; 3] = [0.95, 0.99, 0.999];
const REQUESTS: u32 = 16;
const LAYERS: u32 = 16;
const RAMP: u32 = 8;
const ANSWER: (u64, u64) = (32, 128);
const CHAIN: u32 = 8;
/// Of runs over text that changes, for each target and change.
const RUNS: u64 = 100;
/// What holes do: about what the bundled model has with fill `propagate`, and with `copy`.
const HARM: [(&str, f64); 2] = [("little", 0.01), ("much", 0.08)];

/// Calibrated text before, and what it becomes.
const BEFORE: Curve = Curve {
    honesty: Honesty::Calibrated,
    right: 0.85,
    drift: (0.0, 0),
};
const CHANGES: [(&str, Curve); 3] = [
    ("as before", BEFORE),
    (
        "half right, however sure",
        Curve {
            honesty: Honesty::Flat,
            right: 0.5,
            drift: (0.0, 0),
        },
    ),
    (
        "sure and wrong",
        Curve {
            honesty: Honesty::Lying,
            right: 0.7,
            drift: (0.0, 0),
        },
    ),
];

/// How many tokens a run has, and with which numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    pub tokens: u64,
    pub seed: u64,
    pub noise: f64,
}

fn go(
    class: Class,
    harm: f64,
    text: Confidence,
    policy: &str,
    quality: Quality,
    o: &Options,
) -> Result<Report> {
    let filling = Filling {
        fill: Fill::Copy,
        max_pending: CHAIN,
        accept: 1.0,
        harm,
    };
    let mut workload = Workload::closed(REQUESTS, Vec::new(), o.seed);
    workload.confidence = text;
    workload.length = ANSWER;
    let profile = class.profile(LAYERS, &[RAMP]);
    let setup = Setup {
        noise: o.noise,
        quality,
        ..Setup::in_one_batch(profile, workload, REQUESTS, filling, o.tokens)
    };
    run(&setup, &Contender::parse(policy)?)
}

fn quality(agreement: f64) -> Quality {
    target(agreement).map_or(Quality::Lossless, Quality::Agreement)
}

fn agreement_of(r: &Report) -> f64 {
    1.0 - r.differing as f64 / r.tokens as f64
}

/// What a target brings on text that stays as it is.
#[derive(Debug, Clone)]
pub struct Speed {
    pub class: Class,
    pub harm: &'static str,
    pub target: f64,
    /// Tokens per second of the second half.
    pub off: f64,
    pub lossless: f64,
    pub report: Report,
}

impl Speed {
    pub fn vs_off(&self) -> f64 {
        self.report.late_tokens_per_s / self.off
    }

    pub fn vs_lossless(&self) -> f64 {
        self.report.late_tokens_per_s / self.lossless
    }
}

/// Runs of one target over text that changes: how many kept the promise, counted over all tokens, and the least agreement.
#[derive(Debug, Clone)]
pub struct Promise {
    pub change: &'static str,
    pub target: f64,
    pub runs: u64,
    pub kept: u64,
    pub least: f64,
    /// Tokens that were audited, in all runs.
    pub audited: u64,
}

pub fn speed(class: Class, harm: (&'static str, f64), target: f64, o: &Options) -> Result<Speed> {
    let run = |policy, quality| go(class, harm.1, Confidence::Curve(BEFORE), policy, quality, o);
    Ok(Speed {
        class,
        harm: harm.0,
        target,
        off: run("off", Quality::Given)?.late_tokens_per_s,
        lossless: run("auto", Quality::Lossless)?.late_tokens_per_s,
        report: run("auto", quality(target))?,
    })
}

/// One run, whose text changes when half of its tokens are made: its agreement, and how many tokens were audited.
pub fn over_change(class: Class, target: f64, after: Curve, o: &Options) -> Result<(f64, u64)> {
    let answers = o.tokens / 2 / ((ANSWER.0 + ANSWER.1) / 2);
    let text = Confidence::Change(BEFORE, answers, after);
    let r = go(class, HARM[0].1, text, "auto", quality(target), o)?;
    Ok((agreement_of(&r), r.audited))
}

pub fn speeds(o: &Options, progress: impl Fn(usize, usize) + Sync) -> Result<Vec<Speed>> {
    let mut places = Vec::new();
    for class in CLASSES {
        for harm in HARM {
            places.extend(TARGETS.map(|target| (class, harm, target)));
        }
    }
    cells(&places, progress, |&(class, harm, target)| {
        speed(class, harm, target, o)
    })
}

pub fn promises(
    runs: u64,
    o: &Options,
    progress: impl Fn(usize, usize) + Sync,
) -> Result<Vec<Promise>> {
    let mut places = Vec::new();
    for target in TARGETS {
        for (change, after) in CHANGES {
            places.extend((0..runs).map(|seed| (target, change, after, seed)));
        }
    }
    let got = cells(&places, progress, |&(target, _, after, seed)| {
        let class = CLASSES[seed as usize % CLASSES.len()];
        let seed = o.seed + seed;
        over_change(class, target, after, &Options { seed, ..*o })
    })?;
    let mut out: Vec<Promise> = Vec::new();
    for (&(target, change, ..), got) in places.iter().zip(got) {
        let (agreement, audited) = got;
        let same = |p: &Promise| p.target == target && p.change == change;
        if !out.last().is_some_and(same) {
            out.push(Promise {
                change,
                target,
                runs: 0,
                kept: 0,
                least: 1.0,
                audited: 0,
            });
        }
        let Some(p) = out.last_mut() else { continue };
        p.runs += 1;
        p.kept += u64::from(agreement >= target);
        p.least = p.least.min(agreement);
        p.audited += audited;
    }
    Ok(out)
}

/// All runs of the default number.
pub fn run_agreement(
    o: &Options,
    progress: impl Fn(usize, usize) + Sync,
) -> Result<(Vec<Speed>, Vec<Promise>)> {
    Ok((speeds(o, &progress)?, promises(RUNS, o, &progress)?))
}

pub fn agreement_json(speeds: &[Speed], promises: &[Promise]) -> Value {
    let r = |x: f64| (x * 1e4).round() / 1e4;
    json!({
        "speeds": speeds.iter().map(|s| json!({
            "regime": s.class.name, "requests": REQUESTS, "harm": s.harm, "target": s.target,
            "agreement": (agreement_of(&s.report) * 1e5).round() / 1e5,
            "vs_off": r(s.vs_off()), "vs_lossless": r(s.vs_lossless()), "lossless": r(s.lossless / s.off),
            "audited": r(s.report.audited as f64 / s.report.tokens as f64), "audit_share": r(s.report.audit_share),
        })).collect::<Vec<_>>(),
        "promises": promises.iter().map(|p| json!({
            "change": p.change, "target": p.target, "runs": p.runs, "kept": p.kept,
            "least": (p.least * 1e5).round() / 1e5,
        })).collect::<Vec<_>>(),
        "worst_vs_lossless": r(speeds.iter().map(Speed::vs_lossless).fold(f64::INFINITY, f64::min)),
        "least_kept": promises.iter().map(|p| p.kept as f64 / p.runs as f64).fold(f64::INFINITY, f64::min),
    })
}

pub fn agreement_tables(speeds: &[Speed], promises: &[Promise]) -> String {
    let r = |x: f64| format!("{x:.3}");
    let head = [
        "regime",
        "harm",
        "target",
        "agreement",
        "lossless",
        "target's",
        "of lossless",
        "audited",
    ];
    let rows: Vec<Vec<String>> = speeds
        .iter()
        .map(|s| {
            vec![
                s.class.name.into(),
                s.harm.into(),
                s.target.to_string(),
                format!("{:.4}", agreement_of(&s.report)),
                r(s.lossless / s.off),
                r(s.vs_off()),
                r(s.vs_lossless()),
                r(s.report.audited as f64 / s.report.tokens as f64),
            ]
        })
        .collect();
    let kept: Vec<Vec<String>> = promises
        .iter()
        .map(|p| {
            vec![
                p.target.to_string(),
                p.change.into(),
                format!("{} of {}", p.kept, p.runs),
                format!("{:.4}", p.least),
            ]
        })
        .collect();
    format!(
        "{}\nThroughput of the second half relative to no early exit, {REQUESTS} requests, the exit half way.\n\n{}\n\
         Runs over text that changes its kind in the middle, and how many kept the promise over all their tokens.\n",
        table(&head, &rows),
        table(&["target", "text becomes", "kept", "least"], &kept)
    )
}
