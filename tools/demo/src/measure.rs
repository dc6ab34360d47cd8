// SPDX-License-Identifier: Apache-2.0

//! One policy under one load: a server, its requests, and what the full model says about the answers.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use drex_build::llama::{EXACT_ARGS, Runtime};
use drex_harness::{
    is_quality, load,
    score::{Score, Scorer, Stream},
    server::Server,
    stats::{median, quantile},
    traffic::{self, Text},
};
use serde::Serialize;

use crate::{
    options::{
        LAYOUTS, Load, OFF, Options, REFERENCE, SHORT, fill, length, lengths, parts, verifies,
    },
    subject::Subject,
};

/// A measurement takes two seconds on a quiet machine, and some ten with the chat model. On a busy one the server's threads
/// wait for each other across time slices and it can be a hundred times that: then less is measured, and the report says so.
pub const LIMITS: load::Limits = limits(6, 14);
pub const CHAT_LIMITS: load::Limits = limits(20, 45);

const fn limits(send: u64, total: u64) -> load::Limits {
    load::Limits {
        silence: Duration::from_secs(60),
        send: Duration::from_secs(send),
        total: Duration::from_secs(total),
    }
}

/// Of the exact builds, which take as long as they take.
const PATIENCE: load::Limits = load::Limits {
    silence: Duration::from_secs(300),
    send: Duration::MAX,
    total: Duration::MAX,
};

/// A policy under a load.
pub type Key = (String, Load);

pub type Samples = BTreeMap<Key, Vec<Sample>>;

/// One measurement: one policy under one load in one round.
pub struct Sample {
    pub tokens_per_s: f64,
    /// Those that ended.
    pub requests: u64,
    /// Those that were given up because they took too long.
    pub cut: u64,
    pub tokens: u64,
    pub gaps_ms: (f64, f64),
    pub completion_ms: f64,
    /// Tokens that left at each ramp, by the layer after which it sits.
    pub exits: BTreeMap<u32, u64>,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub held_ms: f64,
    pub flushes: BTreeMap<String, u64>,
    pub client_cpu: f64,
    /// Drafts of exits that the full model judged, and those that it took.
    pub drafts: (u64, u64),
    /// Prompts and outputs by request, for scoring.
    pub streams: BTreeMap<usize, Stream>,
}

/// A part of a load, for builds that are slow.
#[derive(Clone, Copy)]
pub struct Repeat {
    pub requests: usize,
    /// As `Options::tokens`.
    pub tokens: u32,
}

/// How much a server is asked, and which build it is.
#[derive(Clone, Copy)]
pub struct Task {
    requests: usize,
    tokens: u32,
    limits: load::Limits,
    /// The build's results do not depend on who shares a batch.
    exact: bool,
}

impl Task {
    pub fn usual(options: &Options, load: &Load, subject: &Subject) -> Task {
        Task {
            requests: requests(load).min(subject.most(load.concurrency.into())),
            tokens: options.tokens,
            limits: subject.limits,
            exact: false,
        }
    }

    pub fn exact(options: &Options, load: &Load, subject: &Subject) -> Task {
        let mut task = Task::usual(options, load, subject);
        task.exact = true;
        if let Some(repeat) = subject.repeat {
            task.requests = repeat.requests.max(load.concurrency.into());
            task.tokens = repeat.tokens.min(options.tokens);
            task.limits = PATIENCE;
        }
        task
    }

    /// In words.
    pub fn of(self, load: &Load) -> String {
        let requests = self.requests;
        match load.traffic.as_str() {
            SHORT => format!(
                "{requests} requests for {} tokens on average, {load}",
                self.tokens
            ),
            _ => format!("{requests} requests, {load}"),
        }
    }
}

/// The layout that made more tokens/s under a load, and how much more in its worst round than the other in its best one.
pub fn stock(samples: &Samples, load: &Load) -> (&'static str, f64) {
    let rates = |layout: &str| -> Vec<f64> {
        let list = samples.get(&(layout.to_owned(), load.clone()));
        list.into_iter().flatten().map(|s| s.tokens_per_s).collect()
    };
    let of = LAYOUTS.map(|layout| (layout, rates(layout)));
    let [a, b] = &of;
    let (fast, slow) = if median(&a.1) >= median(&b.1) {
        (a, b)
    } else {
        (b, a)
    };
    let worst = fast.1.iter().copied().fold(f64::INFINITY, f64::min);
    let best = slow.1.iter().copied().fold(0.0, f64::max);
    (fast.0, worst / best)
}

/// Enough for a steady state, and about the same time for each.
fn requests(load: &Load) -> usize {
    let c = usize::from(load.concurrency);
    if load.traffic != SHORT {
        return (2 * c).max(8);
    }
    match c {
        1..=2 => 8,
        3..=8 => 3 * c,
        _ => (2 * c).max(40),
    }
}

fn server_args(
    options: &Options,
    policy: &str,
    slots: usize,
    subject: &Subject,
    ctx: usize,
    exact: bool,
) -> Vec<String> {
    let mut args: Vec<String> = vec!["-m".into(), subject.model.display().to_string()];
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    add("-np", slots.to_string());
    add("-c", ctx.to_string());
    add("-t", options.threads.to_string());
    add("--cache-ram", "0".into());
    add("-fa", "on".into());
    if exact {
        for pair in EXACT_ARGS.chunks(2) {
            add(pair[0], pair[1].to_owned());
        }
    }
    let (base, variant) = parts(policy);
    if base == REFERENCE {
        if let Some(variant) = variant.filter(|_| policy != LAYOUTS[1]) {
            add("--spec-type", variant.into());
        }
    } else {
        add("--drex-policy", base.into());
        if base != OFF {
            match fill(options, policy) {
                quality if is_quality(quality) => add("--drex-quality", quality.into()),
                fill => {
                    add("--drex-threshold", options.threshold.to_string());
                    add("--drex-metric", "gap".into());
                    add("--drex-fill", fill.into());
                }
            }
            if let Some(exits) = &subject.exits {
                add("--drex-exits", exits.display().to_string());
            }
            if options.exit_layers != "model" {
                add("--drex-exit-layers", options.exit_layers.clone());
            }
        }
    }
    if policy == LAYOUTS[1] {
        args.push("--kv-unified".into());
    }
    args.extend(["--metrics", "--slots", "--no-webui"].map(Into::into));
    args
}

pub fn measure(
    runtime: &Runtime,
    options: &Options,
    policy: &str,
    load: &Load,
    subject: &Subject,
    task: Task,
) -> Result<Sample> {
    // Exact, no slot serves twice: a KV cell that is used again changes the order of summation.
    let slots = match task.exact {
        true => usize::from(load.concurrency) + task.requests,
        false => load.concurrency.into(),
    };
    // Each request gets a prompt and an output; the room that is left over costs nothing, since only used cells are
    // attended to.
    let room = match lengths(&load.traffic)? {
        Some(lengths) => lengths.longest().next_multiple_of(256),
        None => task.tokens as usize * 3 / 2 + 128,
    };
    let ctx = (slots * room).max(512).next_multiple_of(256);
    let server = Server::start(
        runtime,
        server_args(options, policy, slots, subject, ctx, task.exact),
    )?;
    let result = drive(&server, load, subject, task);
    match result {
        Ok(sample) => {
            // On a busy machine it ends when its last step has.
            server.stop(Duration::from_secs(60))?;
            Ok(sample)
        }
        Err(error) => {
            let last = server.last_lines(12);
            Err(error.context(format!("the server's last lines:\n  {last}\n")))
        }
    }
}

fn drive(server: &Server, load: &Load, subject: &Subject, task: Task) -> Result<Sample> {
    let client = server.client;
    // Each request pays for its own prompt, whichever slot it comes to.
    let body = |prompt: &[i64], tokens: usize| traffic::body(prompt, tokens, false);
    let in_flight = usize::from(load.concurrency);
    let total = task.requests;
    let jobs: Vec<(Vec<i64>, usize)> = match lengths(&load.traffic)? {
        None => {
            let ids = subject
                .short
                .iter()
                .map(|text| subject.tokens(client, text))
                .collect::<Result<Vec<_>>>()?;
            (0..total)
                .map(|i| (ids[i % ids.len()].clone(), length(task.tokens, i) as usize))
                .collect()
        }
        Some(lengths) => {
            Text::of(client, &subject.corpus).map(|text| lengths.requests(&text, 0, total))?
        }
    };
    let warm_up: Vec<_> = (0..in_flight)
        .map(|i| body(&jobs[i % jobs.len()].0, 8))
        .collect();
    load::closed_loop(client.addr, "/completion", &warm_up, in_flight, task.limits)?;

    let before = client.metrics().unwrap_or_default();
    let bodies: Vec<_> = jobs.iter().map(|(prompt, n)| body(prompt, *n)).collect();
    let outcome = load::closed_loop(client.addr, "/completion", &bodies, in_flight, task.limits)?;
    let after = client.metrics().unwrap_or_default();

    let mut sample = Sample {
        tokens_per_s: 0.0,
        requests: outcome.finished.len() as u64,
        cut: outcome.cut.len() as u64,
        tokens: 0,
        gaps_ms: (0.0, 0.0),
        completion_ms: 0.0,
        exits: BTreeMap::new(),
        involuntary_exits: 0,
        involuntary_stays: 0,
        held_ms: 0.0,
        flushes: BTreeMap::new(),
        client_cpu: outcome.client_cpu,
        drafts: (0, 0),
        streams: BTreeMap::new(),
    };
    // Ramps are numbered in responses; the metrics know after which layers they are.
    let mut layers: Vec<(u32, u32)> = after
        .labels("drex_exits_total", ["ramp", "layer"])
        .into_iter()
        .filter_map(|[ramp, layer]| Some((ramp.parse().ok()?, layer.parse().ok()?)))
        .collect();
    layers.sort_unstable();
    let mut in_window = 0_u64;
    let mut gaps = Vec::new();
    let mut ramps: Vec<u64> = Vec::new();
    for finished in &outcome.finished {
        let generation = finished
            .generation()
            .with_context(|| format!("request {}", finished.job))?;
        let predicted = generation.last["tokens_predicted"]
            .as_u64()
            .unwrap_or(generation.tokens.len() as u64);
        sample.tokens += predicted;
        in_window += generation
            .times
            .iter()
            .filter(|time| **time <= outcome.drain)
            .count() as u64;
        // While a character is incomplete, the server holds its bytes back and their tokens' ids are lost.
        in_window += predicted.saturating_sub(generation.tokens.len() as u64);
        gaps.extend(gaps_ms(&generation.times));
        sample.completion_ms +=
            (finished.ended - finished.sent).as_secs_f64() * 1e3 / outcome.finished.len() as f64;
        let timings = &generation.last["timings"];
        for (ramp, count) in timings["drex_exits"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            ramps.resize(ramps.len().max(ramp + 1), 0);
            ramps[ramp] += count.as_u64().unwrap_or(0);
        }
        sample.involuntary_exits += timings["drex_involuntary_exits"].as_u64().unwrap_or(0);
        sample.involuntary_stays += timings["drex_involuntary_stays"].as_u64().unwrap_or(0);
        sample.held_ms += timings["drex_held_ms"].as_f64().unwrap_or(0.0);
        sample.drafts.0 += timings["drex_drafts"].as_u64().unwrap_or(0);
        sample.drafts.1 += timings["drex_drafts_accepted"].as_u64().unwrap_or(0);
        if generation.tokens.len() as u64 == predicted {
            let stream = (jobs[finished.job].0.clone(), generation.tokens);
            sample.streams.insert(finished.job, stream);
        }
    }
    for cut in &outcome.cut {
        let times = cut.partial()?.times;
        in_window += times.iter().filter(|time| **time <= outcome.drain).count() as u64;
        gaps.extend(gaps_ms(&times));
    }
    let window = (outcome.drain - outcome.start).as_secs_f64();
    sample.tokens_per_s = in_window as f64 / window.max(1e-9);
    sample.gaps_ms = (quantile(&mut gaps, 0.5), quantile(&mut gaps, 0.99));
    for (ramp, count) in ramps.iter().enumerate() {
        let layer = layers
            .iter()
            .find(|(r, _)| *r as usize == ramp)
            .map_or(4 * (ramp as u32 + 1), |(_, layer)| *layer);
        sample.exits.insert(layer, *count);
    }
    for (reason, count) in after.growth_by_label(&before, "drex_flushes_total", "reason") {
        sample.flushes.insert(reason, count.max(0.0) as u64);
    }
    Ok(sample)
}

fn gaps_ms(times: &[Instant]) -> impl Iterator<Item = f64> {
    times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
}

/// Answers of exact builds that are to be the unpatched server's, beside those.
#[derive(Clone, Default, Debug, PartialEq, Eq, Serialize)]
pub struct Compared {
    pub policies: Vec<String>,
    pub answers: u64,
    /// Those that are the same from the first token to the last.
    pub equal: u64,
    /// Of all these answers.
    pub tokens: u64,
    /// Of exits, judged by the full model, and those that it took.
    pub drafts: u64,
    pub drafts_accepted: u64,
}

/// What policies that verify said in the exact builds, beside what the unpatched server said.
pub fn compare(options: &Options, samples: &Samples) -> Compared {
    let mut all = Compared::default();
    for ((policy, load), list) in samples {
        let stock = samples.get(&(REFERENCE.to_owned(), load.clone()));
        let (true, Some(ours), Some(theirs)) = (
            verifies(options, policy),
            list.first(),
            stock.and_then(|list| list.first()),
        ) else {
            continue;
        };
        if !all.policies.contains(policy) {
            all.policies.push(policy.clone());
        }
        for (job, stream) in &ours.streams {
            let Some(expected) = theirs.streams.get(job) else {
                continue;
            };
            all.answers += 1;
            all.equal += u64::from(stream == expected);
            all.tokens += stream.1.len() as u64;
        }
        all.drafts += ours.drafts.0;
        all.drafts_accepted += ours.drafts.1;
    }
    all
}

pub type Scores = BTreeMap<Key, Vec<Score>>;

/// So many streams of long prompts are scored for each cell: most of the time goes into their prompts.
const SCORED: usize = 16;

/// The first round's streams: the later ones are mostly the same again.
pub fn score_all(
    tool: &Path,
    model: &Path,
    threads: usize,
    samples: &Samples,
    exact: bool,
) -> Result<Scores> {
    let first = |(key, list): (&Key, &Vec<Sample>)| {
        let most = if key.1.traffic == SHORT {
            usize::MAX
        } else {
            SCORED
        };
        let streams = list.first().into_iter().flat_map(|s| s.streams.values());
        streams.take(most).cloned().collect::<Vec<Stream>>()
    };
    let counts: Vec<usize> = samples.iter().map(|cell| first(cell).len()).collect();
    let streams: Vec<_> = samples.iter().flat_map(first).collect();
    let scorer = Scorer {
        tool,
        model,
        threads,
        kv: if exact { "q8_0" } else { "f16" },
        ignore_eos: true,
    };
    let mut scores = scorer.scores(&streams)?.into_iter();
    let take = |(key, n): (&Key, usize)| (key.clone(), scores.by_ref().take(n).collect());
    Ok(samples.keys().zip(counts).map(take).collect())
}
