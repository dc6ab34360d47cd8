// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask demo`: the exit policies against each other, on the bundled model or a public one.
//!
//! The client talks to the native `/completion` endpoint, not to `/v1/completions`: only the former can return token
//! ids in its stream (`return_tokens`), and agreement with the full model is counted over ids. Both run the same code in
//! the server.

mod cells;
mod chat;
mod measure;
mod options;
mod plot;
mod report;
mod subject;

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

use measure::{Key, Samples, Task, compare, measure, score_all, stock};
use options::{LAYOUTS, Load, Options, REFERENCE, base, contenders, verifies};
use report::Report;
use subject::Subject;

fn main() -> ExitCode {
    process::main(|| run(&Options::parse().settled()))
}

/// What is served again by the exact builds: everything, or under the one load that is repeated what verifies and what it is
/// compared with.
fn repeated(options: &Options, load: Option<&Load>, samples: &Samples) -> Vec<Key> {
    let wanted = |(policy, of): &&Key| {
        load.is_none_or(|load| of == load && (policy == REFERENCE || verifies(options, policy)))
    };
    samples.keys().filter(wanted).cloned().collect()
}

fn run(options: &Options) -> Result<()> {
    options::check(options)?;
    let out = cache::out_dir(&options.out)?;
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
    let cache = Cache::open()?;
    let subject = Subject::of(&cache, &options.model)?;
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
    let chat = match (&subject.exits, runtimes.get(1)) {
        (Some(exits), Some(runtime)) => {
            let mut progress = process::Progress::new("a chat through OpenAI's client");
            progress.update("");
            let chat = chat::chat(&cache, runtime, options, &subject.model, exits)?;
            progress.finish("done");
            Some(chat)
        }
        _ => None,
    };
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
        if options.rounds.is_none() && so_far + next > subject.budget {
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
                let task = Task::usual(options, load, &subject);
                let sample = measure(runtime, options, policy, load, &subject, task)
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
    let one = subject.repeat.map(|_| &loads[loads.len() / 2]);
    if exact {
        let mut progress =
            process::Progress::new("repeating in builds that do not depend on the batch");
        for (policy, load) in &repeated(options, one, &samples) {
            progress.update(&format!("{policy}, {load}"));
            let runtime = &runtimes[if base(policy) == REFERENCE { 2 } else { 3 }];
            let task = Task::exact(options, load, &subject);
            let sample = measure(runtime, options, policy, load, &subject, task)
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
        &subject.model,
        options.threads,
        if exact { &apart } else { &samples },
        exact,
    )?;
    progress.finish("done");

    let report = Report {
        cells: cells::cells(options, &contenders, &loads, &samples, &scores),
        model: subject
            .model
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        model_is: subject.is,
        short_is: subject.short_is,
        chat,
        machine: machine::name(),
        threshold: options.threshold,
        fill: options.fill.clone(),
        rounds: done,
        tokens_per_request: options.tokens,
        threads: options.threads,
        repeat: one
            .filter(|_| exact)
            .map(|load| Task::exact(options, load, &subject).of(load)),
        compared: exact.then(|| compare(options, &apart)),
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
