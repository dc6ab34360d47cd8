// SPDX-License-Identifier: Apache-2.0

//! `host.cpp` against llama.cpp, by teacher forcing: its streams are read by the unpatched library, which says what it
//! would have chosen at each token.
//!
//! Both quantise activations to 8 bits before each matrix product, so differences of the last bit upstream become
//! steps. What that did to a choice in 1,444 tokens was at most 0.056 of a logit.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache, TempDir},
    llama::{Kind, Llama, Runtime},
};
use drex_harness::{
    gguf,
    score::{Margins, Scorer},
    server::Server,
};

use super::{Kit, host};

/// By how much the logit of llama.cpp's choice may exceed that of ours.
const LOGIT: f64 = 0.12;
/// Mean difference of a token's negative log likelihood, in nats.
const NLL: f64 = 0.02;
/// Difference of confidences, in probability.
const CONFIDENCE: f64 = 0.1;

fn reference(cache: &Cache) -> Result<(Runtime, PathBuf)> {
    let llama = Llama::open(cache, None)?;
    let runtime = llama.ensure_one(Kind::Reference)?;
    let tool = llama.scorer(&runtime)?;
    Ok((runtime, tool))
}

fn pairs(streams: &[host::Stream]) -> Vec<(Vec<i64>, Vec<i64>)> {
    streams
        .iter()
        .map(|s| (s.prompt.clone(), s.output.clone()))
        .collect()
}

/// A copy of the model that ends after `layers` layers, in a folder.
fn cut(folder: &Path, layers: u32) -> Result<PathBuf> {
    let path = folder.join("cut.gguf");
    let edit = gguf::Edit {
        layers: Some(layers),
        ..Default::default()
    };
    gguf::rewrite(&cache::bundled_model()?, &path, &edit)?;
    Ok(path)
}

/// `host.cpp` takes an end of the text like any other token.
fn scorer<'a>(tool: &'a Path, model: &'a Path) -> Scorer<'a> {
    Scorer {
        tool,
        model,
        threads: 2,
        kv: "f16",
        ignore_eos: false,
    }
}

fn worst_margin(scores: &[Margins]) -> f64 {
    scores
        .iter()
        .flat_map(|s| s.margins.iter().copied())
        .fold(0.0, f64::max)
}

pub fn full_model(kit: &Kit) -> Result<()> {
    let cache = Cache::open()?;
    let (runtime, tool) = reference(&cache)?;
    // Out of reach, not off: every row goes through a shallow and a deep window.
    let (streams, totals) = host::run(
        kit,
        "host",
        &["--threshold", "1.1", "-n", "40,20,48", "-np", "8"],
    )?;
    ensure!(totals.exits == 0, "something left at a threshold of 1.1");

    let text = std::fs::read_to_string(cache::repo().join("demo/prompts.txt"))?;
    let model = cache::bundled_model()?;
    let server = Server::start(&runtime, [std::ffi::OsStr::new("-m"), model.as_os_str()])?;
    let lines: Vec<&str> = text.lines().filter(|l| !l.is_empty()).collect();
    ensure!(lines.len() == streams.len(), "a request for each prompt");
    for (line, stream) in lines.iter().zip(&streams) {
        let theirs = server.client.tokenize(&line.replace("\\n", "\n"))?;
        ensure!(
            theirs == stream.prompt,
            "{line:?} is {theirs:?}, here {:?}",
            stream.prompt
        );
    }
    drop(server);

    let scores = scorer(&tool, &model).margins(&pairs(&streams))?;
    let (mut tokens, mut agree, mut nll) = (0, 0, 0.0_f64);
    for (stream, score) in streams.iter().zip(&scores) {
        let ours: f64 = stream.nll.iter().sum();
        nll = nll.max((ours - score.nll).abs() / stream.output.len() as f64);
        tokens += score.n;
        agree += score.agree;
    }
    let margin = worst_margin(&scores);
    println!(
        "        {tokens} tokens, {agree} the same choice, the others within {margin:.3} of it; \
         log likelihood within {nll:.4} a token"
    );
    ensure!(tokens > 1000, "only {tokens} tokens");
    ensure!(
        margin <= LOGIT,
        "a choice is off by {margin}, more than {LOGIT}"
    );
    ensure!(
        nll <= NLL,
        "a log likelihood is off by {nll} a token, more than {NLL}"
    );

    // A model without its last layer must not pass for this one.
    let folder = TempDir::unlocked("examples-cut")?;
    let cut = cut(folder.path(), 15)?;
    let other = worst_margin(&scorer(&tool, &cut).margins(&pairs(&streams))?);
    ensure!(
        other > LOGIT,
        "15 layers of 16 are within {other} too: the limit says nothing"
    );
    Ok(())
}

/// Below the first ramp no layer is ever skipped, so that what is decided there does not depend on the fill: it is what the
/// model cut off there would say of the same text.
pub fn first_ramp(kit: &Kit) -> Result<()> {
    const LAYERS: u32 = 8;
    const THRESHOLD: f64 = 0.6;
    let cache = Cache::open()?;
    let (_, tool) = reference(&cache)?;
    let (streams, totals) = host::run(
        kit,
        "host",
        &["--threshold", "0.6", "-n", "40,20,48", "-np", "8"],
    )?;
    ensure!(totals.held_max > 1, "nothing was held");
    let folder = TempDir::unlocked("examples-cut")?;
    let cut = cut(folder.path(), LAYERS)?;
    let choices = scorer(&tool, &cut).choices(&pairs(&streams))?;
    let (mut compared, mut exits, mut close, mut worst) = (0, 0, 0, 0.0_f64);
    for (stream, theirs) in streams.iter().zip(&choices) {
        for (i, token) in stream.output.iter().enumerate() {
            let ours = stream.confidence[i].context("a token without a confidence")?;
            let gap = theirs.gaps[i];
            worst = worst.max((ours - gap).abs());
            let left = stream.layers[i] == LAYERS;
            exits += u32::from(left);
            if (gap - THRESHOLD).abs() <= CONFIDENCE {
                close += 1;
                continue;
            }
            compared += 1;
            ensure!(
                left == (gap >= THRESHOLD),
                "request {}, token {i}: confidence {ours}, llama.cpp's {gap}, and it saw {} layers",
                stream.id,
                stream.layers[i]
            );
            ensure!(
                !left || *token == theirs.choices[i],
                "request {}, token {i}: {token}, llama.cpp's {}",
                stream.id,
                theirs.choices[i]
            );
        }
    }
    println!(
        "        {compared} decisions compared, {exits} exits, {close} too close to call; confidence within {worst:.4}"
    );
    ensure!(worst <= CONFIDENCE, "a confidence is off by {worst}");
    ensure!(
        compared > 1000 && exits > 300,
        "{compared} decisions, {exits} exits"
    );
    Ok(())
}
