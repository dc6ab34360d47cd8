// SPDX-License-Identifier: Apache-2.0
//! Models that come and go under load, servers that end under load, and an installed backend.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, PARAMETERS, Test, parameters, quiet, requests, whole};
use crate::{
    cache,
    metrics::Metrics,
    triton::{
        server::{Start, Triton},
        setup::{self, MODEL},
    },
};

pub const TESTS: &[Test] = &[
    ("what --install leaves serves by itself", installed),
    ("two models, one with two instances", several),
    ("unload with 32 requests in flight, and load again", unload),
    ("shutdown under load", shutdown),
    ("shutdown that does not wait for the requests", outlasted),
];

/// A user's folder has everything: nothing is loaded from the cache or from this clone.
fn installed(bench: &Bench) -> Result<()> {
    let temp = cache::TempDir::unlocked("triton-install")?;
    setup::install_to(&bench.cache, &bench.patched, temp.path())?;
    let (backends, models) = (temp.path().join("backends"), temp.path().join("models"));
    let config = models.join(MODEL).join("config.pbtxt");
    ensure!(
        fs::read_to_string(&config)? == "backend: \"drex\"\n",
        "the example's config.pbtxt"
    );
    let mut start = Start {
        backends: &backends,
        repository: &models,
        port: 0,
        args: &[],
        preload: None,
    };
    let server = Triton::start_with(&bench.installed, &start)?;
    let answers = bench.stream(&server, &requests(8, 16))?;
    whole(&answers, |_| 16)?;
    let maps = fs::read_to_string(format!("/proc/{}/maps", server.pid()))?;
    let mut ours: Vec<&str> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .filter(|path| {
            ["libtriton_drex", "libdrex_llama", "libllama", "libggml"]
                .iter()
                .any(|name| path.contains(name))
        })
        .collect();
    ours.sort_unstable();
    ours.dedup();
    let root = temp.path().canonicalize()?;
    ensure!(
        ours.len() >= 5
            && ours
                .iter()
                .all(|path| path.starts_with(&*root.to_string_lossy())),
        "{ours:?}"
    );
    drop(server);
    // Again, over what is there: the user's configuration stays.
    fs::write(
        &config,
        "backend: \"drex\"\nparameters { key: \"slots\" value { string_value: \"3\" } }\n",
    )?;
    setup::install_to(&bench.cache, &bench.patched, temp.path())?;
    start.args = &["--model-control-mode=explicit"];
    let server = Triton::start_with(&bench.installed, &start)?;
    let config = server
        .http
        .get(&format!("/v2/models/{MODEL}/config"))?
        .ok()?
        .json()?;
    ensure!(
        config["parameters"]["slots"]["string_value"] == "3",
        "{config}"
    );
    println!("        {} libraries, all from the folder", ours.len());
    Ok(())
}

fn several(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    bench.installed.model(
        &repository,
        "other",
        "instance_group { count: 2 kind: KIND_CPU }\n",
        &parameters(&[("policy", "latency"), ("slots", "4")]),
    )?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let requests = requests(16, 16);
    let other = server.spawn(&bench.installed, &requests, json!({"model": "other"}))?;
    whole(&bench.stream(&server, &requests)?, |_| 16)?;
    whole(&other.finish()?, |_| 16)?;
    let text = server.metrics_with("drex_tokens_total", |tokens| tokens >= 32.0 * 15.0)?;
    let labels = Metrics::parse(&text).labels("drex_tokens_total", ["model", "instance"]);
    ensure!(labels.len() == 3, "{labels:?}");
    quiet(&server)
}

fn unload(bench: &Bench) -> Result<()> {
    let server = bench.start(&[])?;
    for _ in 0..3 {
        let requests = requests(32, 100);
        let streams = server.spawn(&bench.installed, &requests, json!({}))?;
        server.metrics_with("drex_requests_running", |running| running >= 32.0)?;
        let model = |what: &str| format!("/v2/repository/models/{MODEL}/{what}");
        server.http.post(&model("unload"), &json!({}))?.ok()?;
        whole(&streams.finish()?, |_| 100)?;
        // What is unloaded is gone from /metrics too.
        server.gone("drex_tokens_total")?;
        server.http.post(&model("load"), &json!({}))?.ok()?;
    }
    // Load while it is loaded and busy: a new one takes over.
    let requests = requests(32, 100);
    let streams = server.spawn(&bench.installed, &requests, json!({}))?;
    server.metrics_with("drex_requests_running", |running| running > 0.0)?;
    server
        .http
        .post(&format!("/v2/repository/models/{MODEL}/load"), &json!({}))?
        .ok()?;
    whole(&streams.finish()?, |_| 100)?;
    quiet(&server)
}

/// Within the exit timeout every request comes whole.
fn shutdown(bench: &Bench) -> Result<()> {
    const TOKENS: u32 = 60;
    let server = bench.start(&[])?;
    let requests = requests(32, TOKENS);
    let streams = server.spawn(&bench.installed, &requests, json!({}))?;
    server.metrics_with("drex_requests_running", |running| running >= 32.0)?;
    let (status, time) = server.stop(Duration::from_secs(25))?;
    ensure!(status.success(), "ended with {status} after {time:?}");
    // The end of the connection may come as an error after the final flag; it is not the request's.
    for (i, answer) in streams.finish()?.iter().enumerate() {
        ensure!(
            answer["finals"] == 1
                && answer["after_final"] == 0
                && answer["tokens"].as_array().map_or(0, Vec::len) == TOKENS as usize,
            "request {i}: {answer}"
        );
    }
    println!(
        "        32 requests of {TOKENS} tokens, all whole; ended after {:.1} s",
        time.as_secs_f64()
    );
    Ok(())
}

/// Beyond the exit timeout the server gives up on the requests that run and calls exit(), with status 1. Each is told so,
/// once, and the process ends soon and by itself. In the usual build too: there the engine has more to take down at exit.
fn outlasted(bench: &Bench) -> Result<()> {
    const TOKENS: u32 = 450;
    /// docs/triton.md
    const ASSERTION: &str = "ASSERTION FAILED: grpc_cq_begin_op";
    let mut ended = 0;
    let usual = setup::install(&bench.cache, &bench.usual)?;
    for installed in [&bench.installed, &usual, &usual] {
        let repository = installed.repository(PARAMETERS)?;
        let server = Triton::start(installed, repository, 0, &["--exit-timeout-secs=1"])?;
        // A stream that is still open when the server closes its endpoint may end in an assertion of gRPC, whatever the
        // backend: the server puts the stream back into a queue that is shut down. So each is closed after its last answer.
        // On a busy machine that is too late at times. Every request has its answer then, too.
        let streams = server.spawn(installed, &requests(32, TOKENS), json!({"drain": 0}))?;
        server.metrics_with("drex_requests_running", |running| running >= 32.0)?;
        let how = match server.stop(Duration::from_secs(25)) {
            // One second is the server's; drex would give up after five more.
            Ok((status, time)) => {
                ensure!(
                    status.code() == Some(1) && time < Duration::from_secs(5),
                    "ended with {status} after {time:?}"
                );
                ended += 1;
                format!("ended after {:.1} s", time.as_secs_f64())
            }
            Err(e) if e.to_string().contains(ASSERTION) => "then an assertion of gRPC".into(),
            Err(e) => return Err(e),
        };
        for (i, answer) in streams.finish()?.iter().enumerate() {
            let errors = answer["errors"].as_array().context("no errors")?;
            let told = |error: &Value| {
                let text = error.as_str().unwrap_or_default();
                text.contains("the server is exiting")
            };
            ensure!(
                answer["finals"] == 1
                    && answer["after_final"] == 0
                    && errors.iter().filter(|e| told(e)).count() == 1
                    && answer["responses"].as_u64() < Some(TOKENS.into()),
                "request {i}: {answer}"
            );
        }
        println!(
            "        32 requests of {TOKENS} tokens, all told that the server is exiting; {how}"
        );
    }
    ensure!(ended > 0, "no server came to its own end");
    Ok(())
}
