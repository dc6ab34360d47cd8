// SPDX-License-Identifier: Apache-2.0

//! A server's tokens against the unpatched server's, and among other requests against alone.

use anyhow::{Result, ensure};
use drex_harness::{
    generate::{drafts, equal, exits, generate},
    load::Generation,
    server::Server,
};
use serde_json::{Value, json};

const COUNT: usize = 8;

/// So many drafts of a model that was made for tests turn out right.
pub const ACCEPTED: u64 = 21;

/// What was compared.
#[derive(Default)]
pub struct Streams {
    pub tokens: usize,
    pub drafts: u64,
    pub accepted: u64,
}

/// Half of the prompts are longer than a sliding window has cells left. No fill: for a server without early exit.
pub fn requests(fill: &str) -> Vec<Value> {
    let words = [
        "iterator", "returns", "the", "borrowed", "value", "of", "a", "slice",
    ];
    let request = |i: usize| {
        let n = if i.is_multiple_of(2) { 90 } else { 6 };
        let prompt: Vec<_> = (0..n)
            .map(|j| words[(i + j * (1 + i % 3)) % words.len()])
            .collect();
        let mut request = json!({
            "prompt": prompt.join(" "), "n_predict": 48, "temperature": 0, "ignore_eos": true, "cache_prompt": false,
        });
        if i % 4 == 3 {
            request["temperature"] = json!(0.7);
            request["seed"] = json!(i);
        }
        if !fill.is_empty() {
            request["drex_fill"] = json!(fill);
        }
        request
    };
    (0..COUNT).map(request).collect()
}

/// So many that every request gets a slot that no other has had.
pub fn slots(fills: &[&str]) -> usize {
    COUNT * (1 + 2 * fills.len())
}

/// `unpatched`: the answers to `requests("")`, one at a time. `fills`: those but `verify` that the server has.
/// `no_copy`: why fill `copy` is refused. `accepted`: at least so many drafts must turn out right.
pub fn compare(
    unpatched: &[Generation],
    server: &Server,
    fills: &[&str],
    no_copy: Option<&str>,
    accepted: u64,
) -> Result<Streams> {
    let mut out = Streams::default();
    let verified = generate(server.client, &requests("verify"), COUNT)?;
    out.tokens += equal("verify against the unpatched server", unpatched, &verified)?;
    (out.drafts, out.accepted) = drafts(&verified);
    ensure!(
        out.accepted >= accepted && out.accepted < out.drafts && out.drafts > 20,
        "verify: {} of {} drafts accepted: too few to test anything",
        out.accepted,
        out.drafts
    );

    for fill in fills {
        let alone = generate(server.client, &requests(fill), 1)?;
        let together = generate(server.client, &requests(fill), COUNT)?;
        out.tokens += equal(&format!("{fill}, in company as alone"), &alone, &together)?;
        let left: u64 = together.iter().flat_map(exits).sum();
        ensure!(left > 20, "{fill}: {left} exits: too few to test anything");
    }

    if let Some(why) = no_copy {
        let request = requests("copy").swap_remove(0);
        let answer = server.client.post("/completion", &request)?;
        let said = answer.text();
        ensure!(
            answer.status == 400
                && said.contains(why)
                && said.contains("propagate, postfill and verify"),
            "copy is not refused as it should be: {} {said}",
            answer.status
        );
    }
    Ok(out)
}
