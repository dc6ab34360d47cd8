// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask triton --load`: AIPerf, the load generator of Triton's makers, against the server, without early exit and
//! with it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    server::Triton,
    setup::{Installed, MODEL},
};
use crate::{
    cache::{self, Cache, Key},
    client::Metrics,
    process,
    server_tests::prompt,
};

/// The exact packages, for Python 3.10 or newer.
const PACKAGES: &str = "integration/triton/tests/aiperf.txt";
const TOKENS: u32 = 64;
pub const POLICIES: [&str; 2] = ["off", "auto"];

/// Name here, name in AIPerf's export, and which of its values.
const FIGURES: [(&str, &str, &str); 6] = [
    ("requests/s", "request_throughput", "avg"),
    ("tokens/s", "output_token_throughput", "avg"),
    ("ms to first token, p50", "time_to_first_token", "p50"),
    ("ms to first token, p99", "time_to_first_token", "p99"),
    ("ms between tokens, p50", "inter_token_latency", "p50"),
    ("ms between tokens, p99", "inter_token_latency", "p99"),
];

/// From drex's own metrics: what the engine spent in layer windows for a token. The rest is the server, and the load
/// generator where they share cores.
const WINDOWS: &str = "ms in windows per token";

pub struct Load {
    pub requests: u32,
    pub concurrency: Vec<u32>,
    /// Each policy in turn, so often; figures are medians.
    pub rounds: u32,
}

/// AIPerf in the cache: 1.2 GB, which is why no other test needs it.
pub fn aiperf(cache: &Cache, installed: &Installed) -> Result<PathBuf> {
    let list = cache::repo().join(PACKAGES);
    let version = process::output(
        installed
            .python
            .command()
            .args(["-c", "import sys; print(sys.implementation.cache_tag)"]),
    )?;
    let key = Key::default().add(fs::read(&list)?).add(&version).short();
    let dir = cache.path(format!("aiperf-{key}"));
    let _lock = cache.lock()?;
    if dir.join("aiperf").is_dir() {
        return Ok(dir);
    }
    let temp = cache.temp_dir()?;
    let mut command = installed.python.pip();
    command
        .args([
            "install",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--progress-bar",
            "off",
            "--target",
        ])
        .arg(temp.path().join("aiperf"))
        .arg("-r")
        .arg(&list);
    process::logged(
        &mut command,
        "installing AIPerf (1.2 GB)",
        &cache.log("aiperf")?,
        false,
    )
    .with_context(|| format!("{PACKAGES} is for Python 3.10 or newer, this one is {version}"))?;
    temp.publish("aiperf", &dir)?;
    Ok(dir)
}

/// One run of AIPerf: its figures in the order of `FIGURES`, and its whole export.
fn once(
    installed: &Installed,
    aiperf: &Path,
    server: &Triton,
    requests: u32,
    concurrency: u32,
) -> Result<(Vec<f64>, Value)> {
    let dir = installed.scratch().join("aiperf");
    cache::remove(&dir)?;
    let tokenizer = dir.join("tokenizer");
    fs::create_dir_all(&tokenizer)?;
    fs::copy(
        cache::repo().join("tools/model/tokenizer.json"),
        tokenizer.join("tokenizer.json"),
    )?;
    fs::write(
        tokenizer.join("tokenizer_config.json"),
        r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#,
    )?;
    let prompts: String = (0..requests as usize)
        .map(|i| format!("{}\n", json!({"text": prompt(i)})))
        .collect();
    fs::write(dir.join("prompts.jsonl"), prompts)?;
    let template = format!(
        r#"{{"text_input": {{{{ text|tojson }}}}, "stream": true, "temperature": 0, "max_tokens": {TOKENS}, "ignore_eos": true}}"#
    );
    fs::write(dir.join("template.json"), template)?;
    let url = format!(
        "http://{}/v2/models/{MODEL}/generate_stream",
        server.http.addr
    );
    let count = |n: u32| n.to_string();
    let mut command: Command = installed.python.command();
    command
        .current_dir(&dir)
        .env("PYTHONPATH", aiperf)
        .args(["-m", "aiperf", "profile", "--model", MODEL, "--url", &url])
        .args(["--endpoint-type", "template", "--streaming"])
        .arg("--extra-inputs")
        .arg(format!(
            "payload_template:{}",
            dir.join("template.json").display()
        ))
        .args(["--extra-inputs", "response_field:text_output"])
        .arg("--tokenizer")
        .arg(&tokenizer)
        .args(["--input-file", "prompts.jsonl"])
        .args(["--custom-dataset-type", "single_turn"])
        .args(["--request-count", &count(requests)])
        .args(["--concurrency", &count(concurrency)])
        .args(["--warmup-request-count", &count(concurrency)])
        .args(["--random-seed", "1", "--export-level", "summary"])
        .args(["--no-gpu-telemetry", "--no-server-metrics", "--ui", "none"])
        .args(["--output-artifact-dir", "out"]);
    let out = command.output().context("cannot run python3")?;
    let text = fs::read_to_string(dir.join("out/profile_export_aiperf.json"));
    let said = || {
        let all = [out.stdout.as_slice(), &out.stderr].concat();
        let all = String::from_utf8_lossy(&all).into_owned();
        let lines: Vec<_> = all.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    };
    ensure!(
        out.status.success() && text.is_ok(),
        "AIPerf failed ({}):\n{}",
        out.status,
        said()
    );
    let export: Value = serde_json::from_str(&text?)?;
    let of = |name: &str, part: &str| export[name][part].as_f64();
    // Its own count of what failed, and what came: each request one event for each token.
    ensure!(
        of("request_count", "avg") == Some(requests.into())
            && export["error_summary"] == json!([])
            && export["was_cancelled"] == false,
        "{} of {requests} requests went well: {}\n{}",
        export["request_count"]["avg"],
        export["error_summary"],
        said()
    );
    let length = of("output_sequence_length", "avg").unwrap_or(0.0);
    // AIPerf counts with its own tokenizer: pieces of text may merge into fewer tokens than were made.
    ensure!(
        length > f64::from(TOKENS) * 0.5 && length <= f64::from(TOKENS) * 1.5,
        "{length} tokens an answer, not about {TOKENS}"
    );
    let figures = FIGURES
        .iter()
        .map(|(_, name, part)| {
            of(name, part)
                .filter(|value| *value > 0.0)
                .with_context(|| format!("AIPerf gives no {name}.{part}"))
        })
        .collect::<Result<_>>()?;
    Ok((figures, export))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n % 2 == 1 {
        values[n / 2]
    } else {
        (values[n / 2 - 1] + values[n / 2]) / 2.0
    }
}

/// Prints a table for each concurrency and returns everything as JSON.
pub fn run(cache: &Cache, installed: &Installed, load: &Load, quiet: bool) -> Result<Value> {
    let aiperf = aiperf(cache, installed)?;
    let _machine = cache.lock_machine()?;
    let mut cells = Vec::new();
    for &concurrency in &load.concurrency {
        let slots = concurrency.to_string();
        // By policy, then by round.
        let mut figures = [const { Vec::new() }; POLICIES.len()];
        let mut exits = [0.0; POLICIES.len()];
        for round in 0..load.rounds {
            for (at, policy) in POLICIES.iter().enumerate() {
                let repository = installed.repository(&[
                    ("policy", policy),
                    ("slots", &slots),
                    ("context", "512"),
                    ("threads", "1"),
                ])?;
                let server = Triton::start(installed, repository, 0, &[])?;
                eprintln!(
                    "AIPerf, {concurrency} at a time, policy {policy}, round {} of {}",
                    round + 1,
                    load.rounds
                );
                let (mut found, _) = once(installed, &aiperf, &server, load.requests, concurrency)?;
                // The counters are whole when nothing runs any more.
                let idle = server.metrics_with("drex_requests_running", |n| n == 0.0)?;
                let metrics = Metrics::parse(&idle);
                let of = |name: &str| metrics.get(name).unwrap_or(0.0);
                found
                    .push(of("drex_window_seconds_total") / of("drex_tokens_total").max(1.0) * 1e3);
                figures[at].push(found);
                exits[at] = of("drex_exits_total") / of("drex_tokens_total").max(1.0);
                ensure!(
                    of("drex_involuntary_exits_total") == 0.0,
                    "involuntary exits"
                );
            }
        }
        ensure!(
            exits[0] == 0.0 && exits[1] > 0.0,
            "early exits: {exits:?} of the tokens, by policy {POLICIES:?}"
        );
        let mut rows = Vec::new();
        let names = FIGURES.iter().map(|(name, _, _)| *name).chain([WINDOWS]);
        for (i, name) in names.enumerate() {
            let of = |at: usize| figures[at].iter().map(|f| f[i]).collect::<Vec<_>>();
            let (off, auto) = (of(0), of(1));
            let ratios: Vec<f64> = off
                .iter()
                .zip(&auto)
                .map(|(off, auto)| auto / off)
                .collect();
            rows.push(json!({"figure": name, "off": median(off), "auto": median(auto), "ratio": median(ratios.clone()),
                "ratios": ratios}));
        }
        if !quiet {
            println!(
                "\n{concurrency} at a time; {:.0} % of the tokens left early\n{:24} {:>10} {:>10} {:>7}  rounds",
                exits[1] * 100.0,
                "",
                POLICIES[0],
                POLICIES[1],
                "ratio"
            );
            for row in &rows {
                let number = |name: &str| row[name].as_f64().unwrap_or(0.0);
                let ratios: Vec<String> = row["ratios"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|r| format!("{:.2}", r.as_f64().unwrap_or(0.0)))
                    .collect();
                println!(
                    "{:24} {:10.2} {:10.2} {:7.2}  {}",
                    row["figure"].as_str().unwrap_or_default(),
                    number("off"),
                    number("auto"),
                    number("ratio"),
                    ratios.join(", ")
                );
            }
        }
        cells.push(json!({"concurrency": concurrency, "exits": exits[1], "figures": rows}));
    }
    Ok(json!({"requests": load.requests, "tokens": TOKENS, "rounds": load.rounds, "cells": cells}))
}
