// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask triton --load`: AIPerf, the load generator of Triton's makers, against the server, without early exit and
//! with it, and against the unpatched llama-server, in whose faster layout of the cache the baseline is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache, Key},
    llama::Runtime,
    process,
};
use drex_harness::{metrics::Metrics, prompts::prompt, race::order, server::Server, stats::median};
use serde_json::{Value, json};

use crate::{
    server::Triton,
    setup::{Installed, MODEL},
};

/// The exact packages, for Python 3.10 or newer.
const PACKAGES: &str = "integration/triton/tests/aiperf.txt";
const TOKENS: u32 = 64;
/// The unpatched llama-server in its layouts of the cache (a stream for each sequence, one for all), and Triton's policies.
const CONTENDERS: [&str; 4] = ["streams", "unified", "off", "auto"];
/// So many of them are llama-server.
const STOCK: usize = 2;

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
    let key = Key::default().with(fs::read(&list)?).with(&version).short();
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

/// Where AIPerf sends requests, and in which form.
struct Target {
    url: String,
    /// A request's body, with the prompt's place in it.
    template: String,
    /// Which field of an answer is its text.
    text: &'static str,
}

impl Target {
    fn triton(server: &Triton) -> Target {
        Target {
            url: format!(
                "http://{}/v2/models/{MODEL}/generate_stream",
                server.http.addr
            ),
            template: format!(
                r#"{{"text_input": {{{{ text|tojson }}}}, "stream": true, "temperature": 0, "max_tokens": {TOKENS}, "ignore_eos": true}}"#
            ),
            text: "text_output",
        }
    }

    fn llama(server: &Server) -> Target {
        Target {
            url: format!("http://{}/completion", server.client.addr),
            template: format!(
                r#"{{"prompt": {{{{ text|tojson }}}}, "stream": true, "temperature": 0, "n_predict": {TOKENS}, "ignore_eos": true, "cache_prompt": false}}"#
            ),
            text: "content",
        }
    }
}

/// One run of AIPerf: its figures in the order of `FIGURES`, and its whole export.
fn once(
    installed: &Installed,
    aiperf: &Path,
    target: &Target,
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
    fs::write(dir.join("template.json"), &target.template)?;
    let count = |n: u32| n.to_string();
    let mut command: Command = installed.python.command();
    command
        .current_dir(&dir)
        .env("PYTHONPATH", aiperf)
        .args([
            "-m",
            "aiperf",
            "profile",
            "--model",
            MODEL,
            "--url",
            &target.url,
        ])
        .args(["--endpoint-type", "template", "--streaming"])
        .arg("--extra-inputs")
        .arg(format!(
            "payload_template:{}",
            dir.join("template.json").display()
        ))
        .args(["--extra-inputs", &format!("response_field:{}", target.text)])
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

/// One run against the unpatched llama-server. The last figure is nobody's: it comes from drex's metrics.
fn stock(
    installed: &Installed,
    aiperf: &Path,
    reference: &Runtime,
    layout: &str,
    load: &Load,
    concurrency: u32,
) -> Result<Vec<f64>> {
    let model = cache::bundled_model()?.display().to_string();
    let (slots, context) = (concurrency.to_string(), (concurrency * 512).to_string());
    let mut args = vec![
        "-m", &model, "-np", &slots, "-c", &context, "-t", "1", "-tb", "1",
    ];
    args.extend(["--cache-ram", "0", "-fa", "on", "--no-webui"]);
    if layout == "unified" {
        args.push("--kv-unified");
    }
    let server = Server::start(reference, &args)?;
    let (mut found, _) = once(
        installed,
        aiperf,
        &Target::llama(&server),
        load.requests,
        concurrency,
    )?;
    found.push(f64::NAN);
    server.stop(Duration::from_secs(10))?;
    Ok(found)
}

/// Prints a table for each concurrency and returns everything as JSON.
pub fn run(
    cache: &Cache,
    installed: &Installed,
    reference: &Runtime,
    load: &Load,
    quiet: bool,
) -> Result<Value> {
    let aiperf = aiperf(cache, installed)?;
    let _machine = cache.lock_machine()?;
    let mut cells = Vec::new();
    for &concurrency in &load.concurrency {
        let slots = concurrency.to_string();
        // By contender, then by round.
        let mut figures = [const { Vec::new() }; CONTENDERS.len()];
        let mut exits = [0.0; CONTENDERS.len()];
        for round in 0..load.rounds {
            for at in order(round as usize, CONTENDERS.len()) {
                let name = CONTENDERS[at];
                eprintln!(
                    "AIPerf, {concurrency} at a time, {name}, round {} of {}",
                    round + 1,
                    load.rounds
                );
                if at < STOCK {
                    figures[at].push(stock(
                        installed,
                        &aiperf,
                        reference,
                        name,
                        load,
                        concurrency,
                    )?);
                    continue;
                }
                let repository = installed.repository(&[
                    ("policy", name),
                    ("slots", &slots),
                    ("context", "512"),
                    ("threads", "1"),
                ])?;
                let server = Triton::start(installed, repository, 0, &[])?;
                let target = Target::triton(&server);
                let (mut found, _) = once(installed, &aiperf, &target, load.requests, concurrency)?;
                // The counters are whole when nothing runs any more.
                let idle = server.metrics_with("drex_requests_running", |n| n == 0.0)?;
                let metrics = Metrics::parse(&idle);
                let of = |name: &str| metrics.get(name).unwrap_or(0.0);
                found.push(of("drex_window_seconds_sum") / of("drex_tokens_total").max(1.0) * 1e3);
                figures[at].push(found);
                exits[at] = of("drex_exits_total") / of("drex_tokens_total").max(1.0);
                ensure!(
                    of("drex_involuntary_exits_total") == 0.0,
                    "involuntary exits"
                );
            }
        }
        let (off, auto) = (STOCK, STOCK + 1);
        ensure!(
            exits[off] == 0.0 && exits[auto] > 0.0,
            "early exits: {exits:?} of the tokens, by contender {CONTENDERS:?}"
        );
        let names: Vec<&str> = FIGURES
            .iter()
            .map(|(name, _, _)| *name)
            .chain([WINDOWS])
            .collect();
        let of =
            |at: usize, figure: usize| figures[at].iter().map(|f| f[figure]).collect::<Vec<f64>>();
        let rate = |at: usize| median(&of(at, 1));
        let stock = usize::from(rate(1) > rate(0));
        let ratios = |at: usize, to: usize, figure: usize| -> Vec<f64> {
            of(at, figure)
                .iter()
                .zip(of(to, figure))
                .map(|(ours, theirs)| ours / theirs)
                .collect()
        };
        let known = |value: f64| value.is_finite().then_some(value);
        let rows: Vec<Value> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                let to_stock = ratios(auto, stock, i);
                json!({
                    "figure": name,
                    "stock": known(median(&of(stock, i))),
                    "off": known(median(&of(off, i))),
                    "auto": known(median(&of(auto, i))),
                    "ratio_to_stock": known(median(&to_stock)),
                    "ratio_to_off": known(median(&ratios(auto, off, i))),
                    "ratios": to_stock.iter().map(|r| known(*r)).collect::<Vec<_>>(),
                })
            })
            .collect();
        if !quiet {
            println!(
                "\n{concurrency} at a time; {:.0} % of the tokens left early; stock: llama-server, {}\n{:24} {:>10} {:>10} {:>10} {:>8} {:>8}  rounds",
                exits[auto] * 100.0,
                CONTENDERS[stock],
                "",
                "stock",
                CONTENDERS[off],
                CONTENDERS[auto],
                "x stock",
                "x off"
            );
            for row in &rows {
                let number = |value: &Value| {
                    value
                        .as_f64()
                        .map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"))
                };
                let rounds: Vec<String> = row["ratios"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(number)
                    .collect();
                println!(
                    "{:24} {:>10} {:>10} {:>10} {:>8} {:>8}  {}",
                    row["figure"].as_str().unwrap_or_default(),
                    number(&row["stock"]),
                    number(&row["off"]),
                    number(&row["auto"]),
                    number(&row["ratio_to_stock"]),
                    number(&row["ratio_to_off"]),
                    rounds.join(", ")
                );
            }
        }
        cells.push(json!({"concurrency": concurrency, "exits": exits[auto], "stock_layout": CONTENDERS[stock], "figures": rows}));
    }
    Ok(json!({"requests": load.requests, "tokens": TOKENS, "rounds": load.rounds, "cells": cells}))
}
