// SPDX-License-Identifier: Apache-2.0

//! What the server counts is what happened: tokens, drafts, time, attended cells.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    Suite, Test, generate, greedy,
    profile_and_record::{record_file, windows},
    prompt,
};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "tokens and drafts are counted as clients and the engine count them",
            tokens,
        ),
        Test::new(
            "windows are recorded with the cells that they attend over and all of their time",
            cells,
        ),
    ]
};

fn tokens(suite: &Suite) -> Result<()> {
    for policy in ["hold", "auto", "eager"] {
        let flags = ["--drex-policy", policy, "--drex-threshold", "0.5"];
        let server = suite.start(&suite.patched, 8, &flags)?;
        let requests: Vec<_> = (0..24)
            .map(|i| {
                let mut body = greedy(&prompt(i), 16 + (i as u32 % 3) * 16);
                body["drex_fill"] = json!(["copy", "propagate", "postfill", "verify"][i % 4]);
                body["ignore_eos"] = json!(i % 2 == 0);
                body
            })
            .collect();
        let done = generate(server.client, &requests, 8)?;
        let several = json!({"prompt": prompt(5), "n": 3, "max_tokens": 16, "temperature": 0, "ignore_eos": true});
        server.client.post("/v1/completions", &several)?.ok()?;

        let sum = |name: &str| -> u64 {
            let of = |g: &super::Generation| g.last["timings"][name].as_u64().unwrap_or(0);
            done.iter().map(of).sum()
        };
        let m = server.client.metrics()?;
        let at = |name: &str| m.get(name).with_context(|| format!("no {name}"));
        let expected = sum("predicted_n") as f64 + 3.0 * 16.0;
        ensure!(
            at("drex_tokens_total")? == expected && at("tokens_predicted_total")? == expected,
            "{policy}: drex counts {}, the engine {}, clients got {expected}",
            at("drex_tokens_total")?,
            at("tokens_predicted_total")?
        );
        let (drafts, accepted) = (
            sum("drex_drafts") as f64,
            sum("drex_drafts_accepted") as f64,
        );
        ensure!(
            at("drex_drafts_total")? == drafts && at("drex_drafts_accepted_total")? == accepted,
            "{policy}: {} drafts of which {} are accepted, in the timings {drafts} and {accepted}",
            at("drex_drafts_total")?,
            at("drex_drafts_accepted_total")?
        );
        ensure!(
            policy != "hold" || drafts > 50.0,
            "{policy}: {drafts} drafts"
        );
    }
    Ok(())
}

fn cells(suite: &Suite) -> Result<()> {
    let prompt = "a ".repeat(100);
    for unified in [false, true] {
        let file = record_file(if unified { "unified" } else { "streams" });
        let layout = if unified {
            "--kv-unified"
        } else {
            "--no-kv-unified"
        };
        let flags = ["--drex-policy", "latency", "--drex-record", &file, layout];
        let server = suite.start(&suite.patched, 2, &flags)?;
        // The first one stays in its slot, idle, when the second one runs.
        let mut ends = Vec::new();
        for slot in 0..2 {
            let mut body = greedy(&prompt, 20);
            body["id_slot"] = json!(slot);
            let done = generate(server.client, &[body], 1)?.remove(0);
            let n = |name: &str| done.last["timings"][name].as_u64().unwrap_or(0);
            ends.push(n("prompt_n") + n("predicted_n"));
        }
        let seconds = server
            .client
            .metrics()?
            .get("drex_window_seconds_total")
            .context("no time")?;
        let steps = windows(&file)?;
        let ns: u64 = steps.iter().filter_map(|s| s["ns"].as_u64()).sum();
        ensure!(
            (seconds - ns as f64 / 1e9).abs() < 1e-6,
            "{seconds} s in windows, {} s by the record",
            ns as f64 / 1e9
        );
        // The last token is not run.
        let last = steps
            .iter()
            .rev()
            .find(|s| s["ids"].as_array().is_some_and(|ids| ids.len() == 1));
        let last = last
            .and_then(|s| s["kv"].as_u64())
            .context("no window of one row")?;
        let expected = if unified {
            ends[0] + ends[1] - 2
        } else {
            ends[1] - 1
        };
        ensure!(
            last == expected,
            "{layout}: the last row attends over {last} cells, expected {expected} of {ends:?}"
        );
        std::fs::remove_file(&file)?;
    }
    Ok(())
}
