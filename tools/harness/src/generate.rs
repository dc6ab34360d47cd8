// SPDX-License-Identifier: Apache-2.0

//! Requests to `/completion` whose whole answers are looked at.

use anyhow::{Context, Result, ensure};
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

/// Drafts that were verified, and those of them that the full model confirmed.
pub fn drafts(generations: &[Generation]) -> (u64, u64) {
    let sum = |name: &str| {
        let each = generations.iter().map(|g| g.last["timings"][name].as_u64());
        each.map(Option::unwrap_or_default).sum()
    };
    (sum("drex_drafts"), sum("drex_drafts_accepted"))
}

/// The same requests have the same tokens and texts. Fails at the first difference, else says how many tokens there were.
pub fn equal(what: &str, expected: &[Generation], got: &[Generation]) -> Result<usize> {
    ensure!(
        expected.len() == got.len(),
        "{what}: {} answers instead of {}",
        got.len(),
        expected.len()
    );
    for (i, (a, b)) in expected.iter().zip(got).enumerate() {
        let at = a.tokens.iter().zip(&b.tokens).position(|(a, b)| a != b);
        ensure!(
            a.tokens == b.tokens && a.text == b.text,
            "{what}: request {i} differs from token {at:?} on:\n  expected {:?} {:?}\n  got      {:?} {:?}",
            a.text,
            a.tokens,
            b.text,
            b.tokens
        );
    }
    Ok(expected.iter().map(|g| g.tokens.len()).sum())
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
