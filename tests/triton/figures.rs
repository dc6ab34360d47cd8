// SPDX-License-Identifier: Apache-2.0
//! What /metrics says of requests: how long they took, how they ended, and what the server counts as a failure.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Bench, Test, quiet, request, requests, whole};
use crate::metrics::Metrics;

pub const TESTS: &[Test] = &[(
    "times of requests, and how they ended, are at /metrics",
    figures,
)];

const COUNT: usize = 12;
const TOKENS: u32 = 40;

fn figures(bench: &Bench) -> Result<()> {
    let server = bench.start_with(&[("slots", "2"), ("max_queue", "10")])?;
    let before = Metrics::parse(&server.metrics()?);
    for reason in [
        "stop",
        "length",
        "cancelled",
        "invalid",
        "unavailable",
        "internal",
    ] {
        let ended = before.by_label("drex_requests_ended_total", "reason");
        ensure!(
            ended.contains(&(reason.to_owned(), 0.0)),
            "{reason} is not there from the start: {ended:?}"
        );
    }
    let mut all = requests(COUNT, TOKENS);
    let mut cancelled = request(0, 400);
    cancelled["cancel_after"] = json!(3);
    let start = Instant::now();
    whole(&bench.stream(&server, &all)?, |_| TOKENS as usize)?;
    let took = start.elapsed().as_secs_f64();
    all = vec![cancelled, request(1, 0), request(2, 0), request(3, 0)];
    bench.stream(&server, &all)?;
    quiet(&server)?;
    let metrics = Metrics::parse(&server.metrics()?);
    let ended = metrics.by_label("drex_requests_ended_total", "reason");
    for (reason, wanted) in [
        ("length", COUNT as f64),
        ("cancelled", 1.0),
        ("invalid", 3.0),
    ] {
        ensure!(
            ended.contains(&(reason.to_owned(), wanted)),
            "{reason} is not {wanted}: {ended:?}"
        );
    }
    // What clients took back or got wrong is no failure of the backend.
    for (name, wanted) in [
        ("nv_inference_request_success", COUNT as f64),
        ("nv_inference_request_failure", 0.0),
        ("nv_inference_pending_request_count", 0.0),
    ] {
        let got = metrics.get(name);
        ensure!(got == Some(wanted), "{name} is {got:?}, not {wanted}");
    }
    let of = |name: &str| metrics.get(name).unwrap_or(f64::NAN);
    let (count, tokens) = (COUNT as f64, f64::from(TOKENS));
    let first = of("drex_time_to_first_token_seconds_sum");
    let between = of("drex_inter_token_latency_seconds_sum");
    let whole = of("drex_e2e_request_latency_seconds_sum");
    let queue = of("drex_request_queue_time_seconds_sum");
    ensure!(
        of("drex_time_to_first_token_seconds_count") == count + 1.0
            && of("drex_inter_token_latency_seconds_count") >= count * (tokens - 1.0) + 2.0
            && of("drex_e2e_request_latency_seconds_count") == count
            && of("drex_request_queue_time_seconds_count") == count + 1.0,
        "the counts: {}",
        server.metrics()?
    );
    // Ten of twelve wait for two slots, and no request took longer than all of them.
    ensure!(
        0.0 < queue && queue < first && first < whole && whole < count * took && between > 0.0,
        "queue {queue}, first {first}, between {between}, whole {whole}, all took {took}"
    );
    let prompts = of("drex_prompt_tokens_total");
    ensure!(prompts > count, "{prompts} tokens of prompts");
    ensure!(of("drex_build_info") == 1.0, "no drex_build_info");
    let windows = of("drex_window_seconds_count");
    ensure!(
        windows >= of("drex_steps_total") && of("drex_window_seconds_sum") > 0.0,
        "{windows} windows"
    );
    println!(
        "        to the first token {:.3} s, of these {:.3} s for a slot; between tokens {:.4} s",
        first / (count + 1.0),
        queue / (count + 1.0),
        between / of("drex_inter_token_latency_seconds_count")
    );
    Ok(())
}
