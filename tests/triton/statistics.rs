// SPDX-License-Identifier: Apache-2.0
//! What the server counts of the backend's requests.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, By, PARAMETERS, Test, refused, request, requests, whole};
use crate::{
    metrics::Metrics,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    ("/stats and nv_inference_* count what was asked", counts),
    (
        "executions, responses and waiting are in /stats",
        executions,
    ),
    ("--allow-metrics=false serves", without_metrics),
];

fn statistics(server: &Triton) -> Result<Value> {
    let answer = server
        .http
        .get(&format!("/v2/models/{MODEL}/stats"))?
        .ok()?
        .json()?;
    Ok(answer["model_stats"][0].clone())
}

fn counts(bench: &Bench) -> Result<()> {
    let server = bench.start_with(&[("slots", "2")])?;
    let mut all = requests(12, 40);
    for i in 0..5 {
        let mut wrong = request(i, 8);
        wrong["sampling"]["tempreature"] = json!(1);
        all.push(wrong);
    }
    let answers = bench.stream(&server, &all)?;
    whole(&answers[..12], |_| 40)?;
    for answer in &answers[12..] {
        refused(answer, By::Backend, "tempreature")?;
    }
    let stats = statistics(&server)?;
    let inference = &stats["inference_stats"];
    let number = |of: &str, what: &str| -> Result<u64> {
        inference[of][what]
            .as_u64()
            .with_context(|| format!("no {of}.{what} in {stats}"))
    };
    // What is wrong with a request is no failure of the backend.
    ensure!(
        number("success", "count")? == 12 && number("fail", "count")? == 0,
        "12 succeeded and none failed: {stats}"
    );
    for part in ["queue", "compute_infer"] {
        ensure!(
            number(part, "count")? == 12 && number(part, "ns")? > 0,
            "{part}: {stats}"
        );
    }
    ensure!(
        number("success", "ns")? >= number("queue", "ns")? + number("compute_infer", "ns")?,
        "the parts are longer than the whole: {stats}"
    );
    ensure!(stats["inference_count"] == 12, "{stats}");
    let metrics = Metrics::parse(&server.metrics()?);
    for (name, wanted) in [
        ("nv_inference_request_success", 12.0),
        ("nv_inference_request_failure", 0.0),
        ("nv_inference_count", 12.0),
    ] {
        let got = metrics.get(name);
        ensure!(got == Some(wanted), "{name} is {got:?}, not {wanted}");
    }
    println!("        {stats}");
    Ok(())
}

/// On two slots each pair of twelve requests waits for those before it: 0 + 1 + ... + 5 times what it takes to serve one,
/// and so longer in sum than they run.
fn executions(bench: &Bench) -> Result<()> {
    let server = bench.start_with(&[("slots", "2")])?;
    whole(&bench.stream(&server, &requests(12, 60))?, |_| 60)?;
    let stats = statistics(&server)?;
    let ns = |of: &str| stats["inference_stats"][of]["ns"].as_u64().unwrap_or(0);
    ensure!(
        ns("queue") > ns("compute_infer") && ns("compute_infer") > 0,
        "12 requests on 2 slots: {stats}"
    );
    // Layer windows: at most two rows each, and a token takes one window or two.
    let executed = stats["execution_count"].as_u64().unwrap_or(0);
    ensure!(
        (12 * 60 / 2..=12 * 60 * 2 + 100).contains(&executed),
        "{executed} executions: {stats}"
    );
    ensure!(
        stats["response_stats"].as_object().is_some_and(
            |all| all.len() == 60 && all.values().all(|one| one["success"]["count"] == 12)
        ),
        "12 requests with 60 responses each: {stats}"
    );
    let metrics = Metrics::parse(&server.metrics()?);
    let of = metrics.get("nv_inference_exec_count");
    ensure!(
        of == Some(executed as f64),
        "nv_inference_exec_count is {of:?}"
    );
    println!("        {executed} executions for 720 tokens");
    Ok(())
}

fn without_metrics(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    let server = Triton::start(&bench.installed, repository, 0, &["--allow-metrics=false"])?;
    whole(&bench.stream(&server, &requests(8, 16))?, |_| 16)?;
    let (status, _) = server.stop(std::time::Duration::from_secs(20))?;
    ensure!(status.success(), "ended with {status}");
    Ok(())
}
