// SPDX-License-Identifier: Apache-2.0
//! Resident memory over thousands of requests, good, bad and cancelled, and over loads and unloads.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{Bench, By, Test, one_final, quiet, refused, request, whole};
use crate::triton::{server::Triton, setup::MODEL};

pub const TESTS: &[Test] = &[
    ("memory over 4000 requests of all kinds", requests),
    ("memory over loads and unloads", loads),
];

/// Of each kind of request some: whole, cancelled, malformed, unary without streaming.
fn mixed(count: usize) -> Vec<Value> {
    (0..count)
        .map(|i| {
            let mut request = request(i, 2 + i as u32 % 4);
            match i % 8 {
                3 => {
                    request["sampling"]["max_tokens"] = json!(200);
                    request["cancel_after"] = json!(i % 3);
                }
                5 => request["sampling"]["tempreature"] = json!(1),
                7 => request["inputs"] = json!({"stream": false, "exclude_input_in_output": true}),
                _ => {}
            }
            request
        })
        .collect()
}

fn round(bench: &Bench, server: &Triton, count: usize) -> Result<u64> {
    let answers = server.stream(
        &bench.installed,
        &mixed(count),
        json!({"at_once": 32, "drain": 0}),
    )?;
    for (i, answer) in answers.iter().enumerate() {
        match i % 8 {
            3 => ensure!(answer["cancelled"] == true, "request {i}: {answer}"),
            5 => refused(answer, By::Backend, "tempreature")?,
            7 => {
                one_final(answer)?;
                ensure!(answer["responses"] == 1, "request {i}: {answer}");
            }
            _ => whole(std::slice::from_ref(answer), |_| 2 + i % 4)?,
        }
    }
    quiet(server)?;
    server.resident()
}

/// Slope of a line through points that are one apart.
fn slope(values: &[u64]) -> f64 {
    let n = values.len() as f64;
    let mean_x = (n - 1.0) / 2.0;
    let mean_y = values.iter().sum::<u64>() as f64 / n;
    let (mut over, mut under) = (0.0, 0.0);
    for (x, y) in values.iter().enumerate() {
        over += (x as f64 - mean_x) * (*y as f64 - mean_y);
        under += (x as f64 - mean_x).powi(2);
    }
    over / under
}

fn shown(values: &[u64]) -> String {
    let values: Vec<_> = values
        .iter()
        .map(|v| format!("{:.1}", *v as f64 / 1e6))
        .collect();
    values.join(", ")
}

/// Resident memory after each step, and its growth per step in bytes, over the last `window` steps. Pools grow to what a load
/// needs, later on a busy machine; a leak grows for ever. So growth at or beyond `limit` is looked at again, up to four times.
fn settles(
    window: usize,
    limit: f64,
    mut step: impl FnMut() -> Result<u64>,
) -> Result<(Vec<u64>, f64)> {
    let mut sizes = Vec::new();
    loop {
        for _ in 0..window {
            sizes.push(step()?);
        }
        let slope = slope(&sizes[sizes.len() - window..]);
        if slope < limit {
            return Ok((sizes, slope));
        }
        ensure!(
            sizes.len() < 4 * window,
            "grows by {slope:.0} bytes with each step: {} MB",
            shown(&sizes)
        );
    }
}

fn requests(bench: &Bench) -> Result<()> {
    // Few graphs, so that there are as many as there may be soon.
    let server = bench.start_with(&[("graphs", "8")])?;
    // until pools have grown to what this load needs
    round(bench, &server, 1000)?;
    let (sizes, slope) = settles(6, 5e5, || round(bench, &server, 500))?;
    println!(
        "        {} MB after each 500: {:+.2} MB over 1000 requests",
        shown(&sizes),
        slope * 2.0 / 1e6
    );
    Ok(())
}

fn loads(bench: &Bench) -> Result<()> {
    let server = bench.start(&[])?;
    let cycle = || -> Result<u64> {
        let answers = bench.stream(&server, &super::requests(8, 8))?;
        whole(&answers, |_| 8)?;
        let model = |what: &str| format!("/v2/repository/models/{MODEL}/{what}");
        server.http.post(&model("unload"), &json!({}))?.ok()?;
        server.gone("drex_tokens_total")?;
        server.http.post(&model("load"), &json!({}))?.ok()?;
        server.resident()
    };
    // Each load has new threads, and each thread's allocator keeps some of what it has freed.
    for _ in 0..8 {
        cycle()?;
    }
    let (sizes, slope) = settles(20, 1e6, cycle)?;
    println!(
        "        {} MB: {:+.2} MB a load",
        shown(&sizes),
        slope / 1e6
    );
    Ok(())
}
