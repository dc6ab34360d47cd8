// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask triton`: Triton Inference Server with the drex backend, on loopback.

pub mod setup;
pub mod tests;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

use crate::{
    Source,
    cache::Cache,
    llama::{Kind, Llama},
    server_tests::prompt,
};
use setup::Triton;

#[derive(Args)]
pub struct Options {
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
        value_name = "PORT"
    )]
    port: u16,
    #[command(flatten)]
    source: Source,
}

pub fn run(options: &Options) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let runtime = llama.ensure_one(Kind::Patched)?;
    let installed = setup::install(&cache, &runtime)?;
    let repository = installed.repository(&[("slots", "64"), ("context", "512")])?;
    let server = Triton::start(&installed, repository, options.port, &[])?;
    if !options.json {
        println!(
            "Triton serves at http://{}, model {}",
            server.http.addr,
            setup::MODEL
        );
    }
    let requests: Vec<_> = (0..options.streams as usize)
        .map(|i| json!({"prompt": prompt(i), "sampling": {"temperature": 0, "max_tokens": 32, "ignore_eos": true}}))
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
    let tokens: usize = answers
        .iter()
        .map(|a| a["tokens"].as_array().map_or(0, Vec::len))
        .sum();
    let names = Triton::drex_names(&metrics);
    let errors: Vec<_> = answers
        .iter()
        .flat_map(|a| a["errors"].as_array())
        .flatten()
        .collect();
    let value = |name: &str| crate::client::Metrics::parse(&metrics).get(name);
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
