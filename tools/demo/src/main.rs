// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask demo`: the exit policies against each other, on the bundled model.
//!
//! The client talks to the native `/completion` endpoint, not to `/v1/completions`: only the former can return token
//! ids in its stream (`return_tokens`), and agreement with the full model is counted over ids. Both run the same code in
//! the server.

mod cells;
mod measure;
mod options;
mod plot;
mod report;

use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Parser;
use drex_build::{
    cache::{self, Cache},
    llama::{Kind, Llama},
    process,
};
use drex_harness::{machine, race};

use measure::{Prompts, Samples, measure, score_all, stock};
use options::{LAYOUTS, Load, Options, REFERENCE, base, contenders, verifies};
use report::Report;

/// Rounds end here even if some are still to come: the whole demo should take about four minutes.
const BUDGET: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    process::main(|| run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    options::check(options)?;
    let out = cache::out_dir(&options.out)?;
    let prompts = Prompts::read()?;
    let loads: Vec<Load> = options
        .traffic
        .iter()
        .flat_map(|traffic| {
            options.concurrency.iter().map(|concurrency| Load {
                traffic: traffic.clone(),
                concurrency: *concurrency,
            })
        })
        .collect();
    let model = cache::bundled_model()?;
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let patched = options.policies.iter().any(|p| base(p) != REFERENCE);
    // Lossless or not is a question for builds whose results do not depend on who shares a batch: the others disagree with
    // themselves in half a percent of the tokens.
    let exact = options.policies.iter().any(|p| verifies(options, p));
    let kinds: &[Kind] = match (patched, exact) {
        (false, _) => &[Kind::Reference],
        (true, false) => &[Kind::Reference, Kind::Patched],
        (true, true) => &[
            Kind::Reference,
            Kind::Patched,
            Kind::ReferenceExact,
            Kind::PatchedExact,
        ],
    };
    let runtimes = llama.ensure(kinds)?;
    let scorer = llama.scorer(&runtimes[if exact { 2 } else { 0 }])?;

    let _machine = cache.lock_machine()?;
    machine::warn_if_busy();
    let start = Instant::now();
    let mut samples = Samples::new();
    let contenders = contenders(options);
    let rounds = options.rounds.unwrap_or(3);
    let mut done = 0;
    let mut progress = process::Progress::new("measuring");
    for round in 0..rounds {
        let so_far = start.elapsed();
        let next = if round > 0 {
            so_far / round
        } else {
            Duration::ZERO
        };
        if options.rounds.is_none() && so_far + next > BUDGET {
            break;
        }
        for load in &loads {
            let (fast, lead) = stock(&samples, load);
            // Side by side in time: what the machine does meanwhile hits all policies alike.
            for at in race::order(round as usize, contenders.len()) {
                let policy = &contenders[at];
                // A layout that is so much slower is no baseline in this cell.
                if round > 0 && LAYOUTS.contains(&policy.as_str()) && policy != fast && lead > 1.2 {
                    continue;
                }
                progress.update(&format!(
                    "round {} of {rounds}  {policy}, {load}",
                    round + 1
                ));
                let runtime = &runtimes[usize::from(base(policy) != REFERENCE)];
                let sample = measure(runtime, options, policy, load, &model, &prompts, false)
                    .with_context(|| format!("policy {policy}, {load}"))?;
                samples
                    .entry((policy.clone(), load.clone()))
                    .or_default()
                    .push(sample);
            }
        }
        done += 1;
    }
    progress.finish("done");

    let mut apart = Samples::new();
    if exact {
        let mut progress =
            process::Progress::new("repeating in builds that do not depend on the batch");
        for (policy, load) in samples.keys() {
            progress.update(&format!("{policy}, {load}"));
            let runtime = &runtimes[if base(policy) == REFERENCE { 2 } else { 3 }];
            let sample = measure(runtime, options, policy, load, &model, &prompts, true)
                .with_context(|| format!("policy {policy}, {load}"))?;
            apart.insert((policy.clone(), load.clone()), vec![sample]);
        }
        progress.finish("done");
    }

    let cut: u64 = samples.values().flatten().map(|s| s.cut).sum();
    if cut > 0 {
        eprintln!("warning: {cut} requests were given up because they took too long");
    }

    let mut progress = process::Progress::new("scoring with the full model");
    progress.update("");
    let scores = score_all(
        &scorer,
        &model,
        options.threads,
        if exact { &apart } else { &samples },
        exact,
    )?;
    progress.finish("done");

    let report = Report {
        cells: cells::cells(options, &contenders, &loads, &samples, &scores),
        model: model
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        machine: machine::name(),
        threshold: options.threshold,
        rounds: done,
        tokens_per_request: options.tokens,
        threads: options.threads,
        exact,
        seconds: start.elapsed().as_secs_f64(),
    };
    let json = report.json();
    fs::write(
        out.join("report.json"),
        serde_json::to_string_pretty(&json)? + "\n",
    )?;
    fs::write(out.join("report.html"), report.html())?;
    if options.json {
        println!("{json}");
    } else {
        print!("{}", report.table());
        println!(
            "\nreport: {}\n        {}",
            out.join("report.html").display(),
            out.join("report.json").display()
        );
    }
    Ok(())
}
