// SPDX-License-Identifier: Apache-2.0

//! Requests to `/completion` whose whole answers are looked at.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    client::{Client, TIMEOUT},
    load::{self, Generation},
};

/// The exits per ramp that a finished request reports.
pub fn exits(generation: &Generation) -> Vec<u64> {
    let list = generation.last["timings"]["drex_exits"].as_array();
    list.into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect()
}

/// Sends requests to `/completion` as streams with token ids, so many at a time; the answers are in the requests' order.
pub fn generate(client: Client, requests: &[Value], concurrency: usize) -> Result<Vec<Generation>> {
    let bodies: Vec<_> = requests
        .iter()
        .map(|request| {
            let mut request = request.clone();
            request["stream"] = json!(true);
            request["return_tokens"] = json!(true);
            request.to_string().into_bytes()
        })
        .collect();
    let outcome = load::closed_loop(
        client.addr,
        "/completion",
        &bodies,
        concurrency,
        load::Limits::silence(TIMEOUT),
    )?;
    let mut out = vec![Generation::default(); requests.len()];
    for finished in &outcome.finished {
        out[finished.job] = finished
            .generation()
            .with_context(|| format!("request {}", finished.job))?;
    }
    Ok(out)
}
