// SPDX-License-Identifier: Apache-2.0
//! A model with two instances: one queue, and the threads shared out.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, By, Test, parameters, quiet, refused, requests, whole};
use crate::{
    metrics::Metrics,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    ("two instances have one queue", one_queue),
    (
        "an instance that is taken away ends what it runs",
        fewer_instances,
    ),
];

const TWO: &str = "instance_group { count: 2 kind: KIND_CPU }\n";

/// A repository whose only model has two instances, of two slots each.
fn start(bench: &Bench, max_queue: &str) -> Result<Triton> {
    let parameters = parameters(&[("slots", "2"), ("max_queue", max_queue)]);
    let repository = bench.installed.repository(&[])?;
    fs::remove_dir_all(&repository)?;
    bench
        .installed
        .model(&repository, MODEL, TWO, &parameters)?;
    Triton::start(&bench.installed, repository, 0, &[])
}

/// Running requests of each instance.
fn running(server: &Triton) -> Result<Vec<f64>> {
    let metrics = Metrics::parse(&server.metrics()?);
    let each = metrics.by_label("drex_requests_running", "instance");
    Ok(each.into_iter().map(|(_, value)| value).collect())
}

fn one_queue(bench: &Bench) -> Result<()> {
    let server = start(bench, "0")?;
    // Servers of tests before have written to the same file.
    let all = fs::read_to_string(server.log())?;
    let log = all.rsplit("\"loading: ").next().unwrap_or_default();
    let threads = log.matches(", 1 threads, on the CPU").count();
    ensure!(threads == 2, "2 threads for two instances: {log}");
    // Six at once for four slots: four run, whichever instance the server asks, and two are refused.
    for _ in 0..3 {
        let answers = bench.stream(&server, &requests(6, 300))?;
        let (served, others): (Vec<Value>, Vec<Value>) =
            answers.into_iter().partition(|a| a["errors"] == json!([]));
        ensure!(served.len() == 4, "{} of 6 were served", served.len());
        whole(&served, |_| 300)?;
        for answer in &others {
            refused(answer, By::Backend, "0 requests wait, which is max_queue")?;
        }
        quiet(&server)?;
    }
    let metrics = Metrics::parse(&server.metrics()?);
    let ended = metrics.by_label("drex_requests_ended_total", "reason");
    let of = |reason: &str| ended.iter().find(|(name, _)| name == reason).map(|e| e.1);
    ensure!(
        of("length") == Some(12.0) && of("unavailable") == Some(6.0),
        "{ended:?}"
    );
    drop(server);

    // Sixteen for four slots: those who wait get the slots of both, in the order in which they came.
    let server = start(bench, "64")?;
    whole(&bench.stream(&server, &requests(16, 40))?, |_| 40)?;
    let text = server.metrics_with("drex_tokens_total", |tokens| tokens >= 16.0 * 40.0)?;
    let metrics = Metrics::parse(&text);
    let tokens = metrics.by_label("drex_tokens_total", "instance");
    ensure!(
        tokens.len() == 2 && tokens.iter().all(|(_, n)| *n > 4.0 * 40.0),
        "{tokens:?}"
    );
    println!("        tokens of the instances: {tokens:?}");
    quiet(&server)
}

/// The server takes an instance away from a model that it keeps, when only the count in the configuration has changed.
fn fewer_instances(bench: &Bench) -> Result<()> {
    let server = start(bench, "64")?;
    let eight = server.spawn(&bench.installed, &requests(8, 300), json!({}))?;
    server.metrics_with("drex_requests_running", |n| n == 4.0)?;
    let config = server
        .log()
        .parent()
        .context("a log has a folder")?
        .read_dir()?
        .filter_map(|entry| Some(entry.ok()?.path().join(MODEL).join("config.pbtxt")))
        .filter(|path| path.exists())
        .max_by_key(|path| fs::metadata(path).and_then(|about| about.modified()).ok())
        .context("no configuration")?;
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace("count: 2", "count: 1"))?;
    let load = format!("/v2/repository/models/{MODEL}/load");
    server.http.post(&load, &json!({}))?.ok()?;
    whole(&eight.finish()?, |_| 300)?;
    ensure!(running(&server)?.len() == 1, "{:?}", running(&server)?);
    whole(&bench.stream(&server, &requests(4, 16))?, |_| 16)?;
    quiet(&server)
}
