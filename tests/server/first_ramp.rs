// SPDX-License-Identifier: Apache-2.0

//! The first ramp against a reference that knows nothing of windows: the bundled model cut off after the ramp's layers, in
//! the unpatched engine. Below the first ramp no layer is ever skipped, so that both must see the same logits.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Build, EXACT, Suite, Test, exact::builds, generate, greedy, program, prompt};
use crate::{gguf, score::Scorer};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "exact: exits at the first ramp are the cut model's",
            |suite| {
                let (reference, patched) = builds(suite)?;
                compare(suite, reference, patched, EXACT, "q8_0", 1e-6)
            },
        )
        .exact(),
        // Teacher forcing: the same inputs, the same decision wherever the margin is larger than what batch sizes do.
        Test::new(
            "exits at the first ramp are the cut model's, default build",
            |suite| compare(suite, &suite.reference, &suite.patched, &[], "f16", 0.05),
        ),
    ]
};

const LAYERS: u32 = 4;
const THRESHOLD: f64 = 0.6;

fn compare(
    suite: &Suite,
    reference: &Build,
    patched: &Build,
    args: &[&str],
    kv: &str,
    tolerance: f64,
) -> Result<()> {
    let cut = std::env::temp_dir().join(format!("drex-cut-{}.gguf", std::process::id()));
    gguf::rewrite(
        &suite.model,
        &cut,
        &gguf::Edit {
            layers: Some(LAYERS),
            ..Default::default()
        },
    )?;
    let result = against(suite, reference, patched, args, kv, tolerance, &cut);
    std::fs::remove_file(&cut)?;
    result
}

fn against(
    suite: &Suite,
    reference: &Build,
    patched: &Build,
    args: &[&str],
    kv: &str,
    tolerance: f64,
    cut: &std::path::Path,
) -> Result<()> {
    let threshold = THRESHOLD.to_string();
    let flags = [
        "--drex-policy",
        "hold",
        "--drex-exit-layers",
        "4",
        "--drex-threshold",
        &threshold,
    ];
    let requests: Vec<_> = (0..32)
        .map(|i| {
            let mut request = greedy(&prompt(i), 48);
            request["timings_per_token"] = json!(true);
            request
        })
        .collect();
    // A slot for each request: a KV cell that is used again may lie before older ones of its request, and then attention
    // adds up in another order.
    let server = suite.start(patched, requests.len(), &[args, &flags].concat())?;
    let mut streams = Vec::new();
    for (request, generation) in requests.iter().zip(generate(server.client, &requests, 8)?) {
        let text = request["prompt"].as_str().unwrap_or_default();
        if generation.is_complete() {
            streams.push((server.client.tokenize(text)?, generation));
        }
    }
    ensure!(
        streams.len() > 20,
        "only {} of {} streams have all their tokens",
        streams.len(),
        requests.len()
    );
    let pairs: Vec<_> = streams
        .iter()
        .map(|(prompt, g)| (prompt.clone(), g.tokens.clone()))
        .collect();
    let scorer = Scorer {
        tool: program(reference, "drex-score")?,
        model: cut,
        threads: 2,
        kv,
        ignore_eos: true,
    };
    let choices = scorer.choices(&pairs)?;

    let (mut rows, mut exited, mut near) = (0, 0, 0);
    for (i, ((_, generation), choice)) in streams.iter().zip(&choices).enumerate() {
        ensure!(
            generation.exits.len() == generation.tokens.len(),
            "request {i}: no timings per token"
        );
        // The first token comes from the prompt, which runs through all layers.
        for t in 1..generation.tokens.len() {
            let gap = choice.gaps[t];
            let exit = generation.exits[t] > generation.exits[t - 1];
            if (gap - THRESHOLD).abs() <= tolerance {
                near += 1;
                continue;
            }
            rows += 1;
            ensure!(
                exit == (gap >= THRESHOLD),
                "request {i}, token {t}: exit {exit}, but the cut model's gap is {gap}"
            );
            if exit {
                exited += 1;
                ensure!(
                    generation.tokens[t] == choice.choices[t],
                    "request {i}, token {t}: {} emitted at the ramp, the cut model says {}",
                    generation.tokens[t],
                    choice.choices[t]
                );
            }
        }
    }
    ensure!(
        exited > 50 && rows > 2 * exited / 3,
        "{exited} of {rows} rows exited: too few to test anything"
    );
    ensure!(
        near < rows / 10,
        "{near} rows are within {tolerance} of the threshold, {rows} are not"
    );
    println!(
        "        {} requests, {rows} decisions compared ({exited} exits), {near} within {tolerance} of the threshold left out",
        streams.len()
    );
    Ok(())
}
