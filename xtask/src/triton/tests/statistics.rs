// SPDX-License-Identifier: Apache-2.0
//! What the server counts of the backend's requests.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, By, PARAMETERS, Test, refused, request, requests, whole};
use crate::{
    client::Metrics,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    ("/stats and nv_inference_* count what was asked", counts),
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
    ensure!(
        number("success", "count")? == 12 && number("fail", "count")? == 5,
        "12 succeeded and 5 failed: {stats}"
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
        ("nv_inference_request_failure", 5.0),
        ("nv_inference_count", 12.0),
    ] {
        let got = metrics.get(name);
        ensure!(got == Some(wanted), "{name} is {got:?}, not {wanted}");
    }
    println!("        {stats}");
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
