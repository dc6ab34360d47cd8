// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask triton`: Triton Inference Server with the drex backend, on loopback.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use clap::Parser;
use drex_build::{
    Source,
    cache::{self, Cache},
    cargo,
    llama::{Kind, Llama, Runtime},
    process,
};
use drex_harness::{gguf, metrics::Metrics, prompts::prompt};
use drex_triton_server::{load, server::Triton, setup};
use serde_json::json;

/// Run Triton Inference Server with the drex backend on the bundled model, and stream from it
#[derive(Parser)]
#[command(name = "cargo xtask triton", bin_name = "cargo xtask triton")]
struct Options {
    /// A GGUF model with exit layers, instead of the bundled one
    #[arg(short, long, value_name = "GGUF", conflicts_with_all = ["load", "install"])]
    model: Option<PathBuf>,
    /// Keep the server running after the first requests
    #[arg(long)]
    stay: bool,
    /// One line of JSON: streams, tokens, final flags, involuntary exits, metrics found
    #[arg(long)]
    json: bool,
    /// Requests that stream at once
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=64))]
    streams: u32,
    /// Port for HTTP; gRPC and metrics take the two after it
    #[arg(
        long,
        default_value_t = 0,
        hide_default_value = true,
        value_name = "PORT",
        value_parser = clap::value_parser!(u16).range(0..=65533)
    )]
    port: u16,
    /// Measure with AIPerf instead: the unpatched llama-server, and Triton without early exit and with it (fetches 1.2 GB
    /// once)
    #[arg(long, conflicts_with_all = ["stay", "install", "port", "streams"])]
    load: bool,
    /// Requests of each of AIPerf's runs
    #[arg(
        long,
        default_value_t = 256,
        requires = "load",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    requests: u32,
    /// Requests in flight, one run for each number
    #[arg(
        long,
        default_value = "32",
        value_delimiter = ',',
        requires = "load",
        value_name = "N,...",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    concurrency: Vec<u32>,
    /// Runs of each policy in turn; the medians count
    #[arg(
        long,
        default_value_t = 1,
        requires = "load",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    rounds: u32,
    /// Start nothing: leave the backend and an example model repository in a folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["stay", "json", "streams", "port"])]
    install: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
}

/// Tokens of each answer.
const TOKENS: usize = 32;

/// The model, by what it says of itself. Checked before anything is built.
fn model(options: &Options) -> Result<PathBuf> {
    let path = match &options.model {
        Some(path) => std::path::absolute(path)?,
        None => cache::bundled_model()?,
    };
    let about = gguf::about(&path)?;
    ensure!(
        about.exits,
        "{} is {}: the backend serves models that were trained for early exit",
        path.display(),
        about.text
    );
    if !options.json {
        println!("Model: {}\n       {}", about.text, path.display());
        if options.model.is_none() {
            println!(
                "       It goes on with a text as that documentation would. It answers no questions."
            );
        }
    }
    Ok(path)
}

fn main() -> ExitCode {
    process::main(|| run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let model = model(options)?;
    if let Some(dir) = &options.install {
        cache::writable("--install", &std::path::absolute(dir)?)?;
    }
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let runtime = llama.ensure_one(Kind::Patched)?;
    if let Some(dir) = &options.install {
        setup::install_to(&cache, &runtime, dir)?;
        println!(
            "tritonserver --backend-directory={0}/backends --model-repository={0}/models",
            std::path::absolute(dir)?.display()
        );
        return Ok(());
    }
    let installed = setup::install(&cache, &runtime)?;
    if options.load {
        let reference = llama.ensure_one(Kind::Reference)?;
        return measure(&cache, &installed, &reference, options);
    }
    let repository = installed.repository_of(&model, &[("slots", "64"), ("context", "512")])?;
    let server = Triton::start(&installed, repository, options.port, &[])?;
    if !options.json {
        println!(
            "Triton serves at http://{}, model {}; its log is {}",
            server.http.addr,
            setup::MODEL,
            server.log().display()
        );
    }
    let requests: Vec<_> = (0..options.streams as usize)
        .map(|i| json!({"prompt": prompt(i), "sampling": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": true}}))
        .collect();
    if !options.json {
        eprint!("{}", prompt(0));
    }
    let answers = server.stream(&installed, &requests, json!({"show": !options.json}))?;
    let metrics = server.metrics_with("drex_tokens_total", |tokens| tokens > 0.0)?;
    let sum = |name: &str| {
        answers
            .iter()
            .map(|a| a[name].as_u64().unwrap_or(0))
            .sum::<u64>()
    };
    let lengths: Vec<usize> = answers
        .iter()
        .map(|a| a["tokens"].as_array().map_or(0, Vec::len))
        .collect();
    let tokens: usize = lengths.iter().sum();
    let found = Metrics::parse(&metrics);
    let names = found.names("drex_");
    let errors: Vec<_> = answers
        .iter()
        .flat_map(|a| a["errors"].as_array())
        .flatten()
        .collect();
    let value = |name: &str| found.get(name);
    if options.json {
        println!(
            "{}",
            json!({
                "streams": answers.len(),
                "tokens": tokens,
                "final_flags": sum("finals"),
                "involuntary_exits": value("drex_involuntary_exits_total"),
                "exits": value("drex_exits_total"),
                "errors": errors.len(),
                "metrics": names,
            })
        );
    } else {
        println!(
            "\n\n{} streams, {tokens} tokens, {} final flags\n",
            answers.len(),
            sum("finals")
        );
        for line in metrics.lines().filter(|line| line.starts_with("drex_")) {
            println!("{line}");
        }
    }
    ensure!(
        errors.is_empty(),
        "{} requests failed: {errors:?}",
        errors.len()
    );
    for (name, wanted) in [("finals", 1), ("after_final", 0)] {
        let wrong = answers.iter().filter(|a| a[name] != wanted).count();
        ensure!(
            wrong == 0,
            "{wrong} of {} streams: {name} is not {wanted}",
            answers.len()
        );
    }
    let short = lengths.iter().filter(|n| **n != TOKENS).count();
    ensure!(
        short == 0,
        "{short} of {} answers have not {TOKENS} tokens",
        answers.len()
    );
    ensure!(
        names.iter().any(|name| name == "drex_exits_total"),
        "no drex_exits_total at /metrics"
    );
    if options.stay {
        println!(
            "\ntry:  curl {}/v2/models/{}/generate -d '{{\"text_input\": \"Returns the\", \"max_tokens\": 32}}'\nCtrl-C ends it",
            server.http.addr,
            setup::MODEL
        );
        server.wait()?;
    }
    Ok(())
}

fn measure(
    cache: &Cache,
    installed: &setup::Installed,
    reference: &Runtime,
    options: &Options,
) -> Result<()> {
    let load = load::Load {
        requests: options.requests,
        concurrency: options.concurrency.clone(),
        rounds: options.rounds,
    };
    let figures = load::run(cache, installed, reference, &load, options.json)?;
    if options.json {
        println!("{figures}");
        return Ok(());
    }
    let file = cargo::target_dir()?.join("triton-load.json");
    std::fs::write(&file, format!("{figures:#}\n"))?;
    println!("\n{}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Before anything is built.
    #[test]
    fn what_would_measure_nothing_is_refused() {
        for args in ["--rounds 0", "--requests 0", "--concurrency 4,0"] {
            let all = format!("triton --load {args}");
            let error = Options::try_parse_from(all.split(' ')).err();
            let said = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(said.contains("0 is not in 1.."), "{args}: {said}");
        }
        for args in ["--rounds 2", "--port 65534", "--streams 0", "--streams 65"] {
            assert!(
                Options::try_parse_from(format!("triton {args}").split(' ')).is_err(),
                "{args}"
            );
        }
        let options = Options::try_parse_from(["triton", "--install", "/proc/none"]).unwrap();
        let error = format!("{:#}", run(&options).unwrap_err());
        assert!(
            error.contains("--install /proc/none: cannot write there"),
            "{error}"
        );
    }
}
