// SPDX-License-Identifier: Apache-2.0

//! What exits bring in llama-server: policy `auto` with fill `verify` against policy `off`, in pairs of rounds.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use drex_build::process::Progress;
use drex_harness::{client::Client, generate::generate, server::Server, stats};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    engine::Engine,
    prompts::{self, Use},
    report::Prediction,
};

/// Requests at once.
const IN_FLIGHT: [u32; 3] = [1, 4, 16];
/// Pairs of rounds, each of which gives a ratio.
const PAIRS: usize = 5;
/// Tokens of an answer at most.
const TOKENS: u32 = 128;
/// Room for a prompt and its answer.
const CONTEXT: u32 = 768;

#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    pub in_flight: u32,
    pub threshold: f32,
    pub off_tokens_per_s: f64,
    pub auto_tokens_per_s: f64,
    /// The median over the pairs, and the least and the greatest.
    pub ratio: f64,
    pub least: f64,
    pub greatest: f64,
}

/// `predictions` name the threshold for each number of requests.
pub fn measure(
    engine: &Engine,
    template: bool,
    exits: &Path,
    predictions: &[Prediction],
) -> Result<Vec<Measured>> {
    let server = engine.program.with_file_name("llama-server");
    let mut progress = Progress::new("measuring");
    let mut all = Vec::new();
    for in_flight in IN_FLIGHT {
        let threshold = predictions
            .iter()
            .find(|p| p.quality == "lossless" && p.in_flight == in_flight)
            .context("no prediction")?
            .threshold;
        progress.update(&format!("{in_flight} in flight"));
        all.push(one(engine, &server, template, exits, in_flight, threshold)?);
    }
    progress.finish("done");
    Ok(all)
}

fn one(
    engine: &Engine,
    server: &PathBuf,
    template: bool,
    exits: &Path,
    in_flight: u32,
    threshold: f32,
) -> Result<Measured> {
    let start = |more: &[&str]| {
        let numbers = [in_flight, in_flight * CONTEXT, engine.threads as u32];
        let [slots, context, threads] = numbers.map(|n| n.to_string());
        let model = engine.model.to_string_lossy();
        let common = ["-m", &model, "-np", &slots, "-c", &context, "-t", &threads];
        // No answer is helped by an earlier one.
        let rest = ["--cache-ram", "0", "--no-webui"];
        Server::start(server, common.iter().chain(&rest).chain(more))
    };
    let off = start(&["--drex-policy", "off"])?;
    let (file, threshold_text) = (exits.to_string_lossy(), threshold.to_string());
    let auto = start(&[
        "--drex-policy",
        "auto",
        "--drex-fill",
        "verify",
        "--drex-exits",
        &file,
        "--drex-threshold",
        &threshold_text,
    ])?;
    let requests = requests(off.client, template, in_flight as usize)?;
    // The first rounds are where `auto` learns what windows cost.
    for client in [off.client, auto.client] {
        speed(client, &requests, in_flight)?;
    }
    let (mut ratios, mut speeds) = (Vec::new(), [Vec::new(), Vec::new()]);
    for pair in 0..PAIRS {
        let mut of = [0.0; 2];
        // Whoever goes first in one pair goes second in the next.
        for i in [pair % 2, 1 - pair % 2] {
            let client = if i == 0 { off.client } else { auto.client };
            of[i] = speed(client, &requests, in_flight)?;
            speeds[i].push(of[i]);
        }
        ratios.push(of[1] / of[0]);
    }
    Ok(Measured {
        in_flight,
        threshold,
        off_tokens_per_s: stats::median(&speeds[0]),
        auto_tokens_per_s: stats::median(&speeds[1]),
        ratio: stats::median(&ratios),
        least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        greatest: ratios.iter().copied().fold(0.0, f64::max),
    })
}

/// Prompts that the exits were neither fitted nor judged on.
fn requests(client: Client, template: bool, in_flight: usize) -> Result<Vec<Value>> {
    let all = prompts::all(Use::Measure);
    let some = all.iter().take((2 * in_flight).max(8));
    some.map(|prompt| {
        let mut text = Value::from(prompt.as_str());
        if template {
            let body = json!({"messages": [{"role": "user", "content": prompt}]});
            let answer = client.post("/apply-template", &body)?.ok()?.json()?;
            text = answer["prompt"].clone();
        }
        Ok(json!({"prompt": text, "n_predict": TOKENS, "temperature": 0, "cache_prompt": false}))
    })
    .collect()
}

/// Tokens per second.
fn speed(client: Client, requests: &[Value], in_flight: u32) -> Result<f64> {
    let began = Instant::now();
    let done = generate(client, requests, in_flight as usize)?;
    let seconds = began.elapsed().as_secs_f64();
    let tokens = done
        .iter()
        .filter_map(|g| g.last["timings"]["predicted_n"].as_u64());
    Ok(tokens.sum::<u64>() as f64 / seconds)
}
