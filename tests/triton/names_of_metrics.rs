// SPDX-License-Identifier: Apache-2.0
//! A metric has one name, type and set of labels in the library, llama-server and Triton: those of the table in
//! docs/observability.md.

use std::{collections::BTreeSet, ptr};

use anyhow::{Result, ensure};
use drex::ffi::*;
use serde_json::json;

use super::{Bench, Test, requests, whole};
use crate::{
    cache,
    families::{Families, Host, differences, of_text, promised},
    generate::generate,
    prompt,
    server::Server,
};

pub const TESTS: &[Test] = &[(
    "metrics have the names, types and labels of the book's table in all hosts",
    same_names,
)];

fn same_names(bench: &Bench) -> Result<()> {
    let mut labelled = BTreeSet::new();
    let mut all = 0;
    for (host, found) in [
        (Host::Library, of_text(&library()?)?),
        (Host::LlamaServer, of_text(&llama_server(bench)?)?),
        (Host::Triton, of_text(&triton(bench)?)?),
    ] {
        let wrong = differences(&promised(host)?, &found, |name| own_labels(host, name));
        ensure!(wrong.is_empty(), "{host:?}: {}", wrong.join("; "));
        all += found.len();
        labelled.extend(of_samples(&found));
    }
    // What no host has a sample of was compared by name and type alone.
    for host in [Host::Library, Host::LlamaServer] {
        for name in promised(host)?.keys() {
            ensure!(labelled.contains(name), "no host has a sample of {name}");
        }
    }
    println!("        {all} families in three hosts");
    Ok(())
}

fn of_samples(found: &Families) -> impl Iterator<Item = String> {
    let known = found.iter().filter(|(_, family)| family.labels.is_some());
    known.map(|(name, _)| name.clone())
}

/// Triton has several models, and these have instances; a request is no instance's.
fn own_labels(host: Host, name: &str) -> BTreeSet<String> {
    const OF_REQUESTS: [&str; 7] = [
        "drex_requests_waiting",
        "drex_requests_ended_total",
        "drex_request_queue_time_seconds",
        "drex_time_to_first_token_seconds",
        "drex_inter_token_latency_seconds",
        "drex_e2e_request_latency_seconds",
        "drex_prompt_tokens_total",
    ];
    let labels: &[&str] = match (host, name) {
        (Host::Library | Host::LlamaServer, _) | (_, "drex_build_info") => &[],
        (Host::Triton, name) if OF_REQUESTS.contains(&name) => &["model", "version"],
        (Host::Triton, _) => &["model", "version", "instance"],
    };
    labels.iter().map(|label| (*label).to_owned()).collect()
}

/// The text of an engine that has done nothing: it has all families.
fn library() -> Result<String> {
    let ramps = [4u32];
    // SAFETY: structs of plain numbers and pointers that may be NULL; the others outlive the calls.
    unsafe {
        let mut config: drex_config = std::mem::zeroed();
        config.size = size_of::<drex_config>() as u32;
        config.abi_version = DREX_ABI_VERSION;
        config.n_layers = 12;
        config.n_ramps = 1;
        config.ramp_layers = ramps.as_ptr();
        config.n_slots = 4;
        config.max_requests = 4;
        config.max_batch = 4;
        config.policy = DREX_POLICY_AUTO;
        config.threshold = 0.5;
        config.art_ratio = 0.1;
        let mut engine = ptr::null_mut();
        let check = |status| -> Result<()> {
            ensure!(status == DREX_OK, "the library says {status}");
            Ok(())
        };
        check(drex_create(&config, &mut engine))?;
        let mut length = 0;
        let none = ptr::null_mut();
        check(drex_metrics_text(engine, ptr::null(), none, 0, &mut length))?;
        let mut text = vec![0u8; length + 1];
        let room = text.as_mut_ptr().cast();
        check(drex_metrics_text(
            engine,
            ptr::null(),
            room,
            length + 1,
            &mut length,
        ))?;
        check(drex_destroy(engine))?;
        text.truncate(length);
        Ok(String::from_utf8(text)?)
    }
}

/// Of the usual build, under policy `auto`.
fn llama_server(bench: &Bench) -> Result<String> {
    let model = cache::bundled_model()?;
    let model = model.to_string_lossy();
    let args = [
        "-m",
        &*model,
        "-np",
        "4",
        "-c",
        "2048",
        "-t",
        "2",
        "--metrics",
        "--no-webui",
        "--drex-policy",
        "auto",
    ];
    let server = Server::start(&bench.usual, args)?;
    let request =
        |i| json!({"prompt": prompt(i), "n_predict": 48, "temperature": 0, "ignore_eos": true});
    generate(server.client, &(0..24).map(request).collect::<Vec<_>>(), 4)?;
    Ok(server.client.get("/metrics")?.ok()?.text())
}

fn triton(bench: &Bench) -> Result<String> {
    let server = bench.start_with(&[
        ("policy", "auto"),
        ("slots", "4"),
        ("art_ratio", "0.1"),
        ("quality", "0.9"),
    ])?;
    whole(&bench.stream(&server, &requests(24, 48))?, |_| 48)?;
    // Triton has no family before its first value, and the rule is known after a search.
    server.metrics_with("drex_searches_total", |searches| searches > 0.0)
}
