// SPDX-License-Identifier: Apache-2.0

//! What the server counts is what happened: tokens, drafts, time, attended cells.

use std::time::{Duration, Instant};

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
        Test::new(
            "requests are counted by how they ended, and their times add up",
            ends,
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
        // The engine's own names: its drafts are all that were put to the full model, those behind a wrong one included.
        let of_engine = |name: &str| at(&format!("spec_decode_num_{name}_total"));
        let places = m.by_label("spec_decode_num_accepted_tokens_per_pos_total", "position");
        ensure!(
            of_engine("accepted_tokens")? == accepted
                && places.iter().map(|p| p.1).sum::<f64>() == accepted,
            "{policy}: {accepted} drafts are accepted, the engine's metrics say {} and {places:?}",
            of_engine("accepted_tokens")?
        );
        let (put, times) = (of_engine("draft_tokens")?, of_engine("drafts")?);
        ensure!(
            drafts <= put && put <= drafts + at("drex_dropped_rows_total")? && times <= put,
            "{policy}: {put} drafts were put to the full model, {times} times; {drafts} were judged"
        );
        ensure!(
            (times > 0.0) == (drafts > 0.0) && places.iter().all(|p| p.1 <= times),
            "{policy}: {times} times, {places:?}"
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
            .get("drex_window_seconds_sum")
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

fn ends(suite: &Suite) -> Result<()> {
    let server = suite.start(&suite.patched, 2, &["--drex-policy", "hold"])?;
    let client = server.client;
    let metrics = || client.metrics();
    let ended = || -> Result<Vec<(String, f64)>> {
        Ok(metrics()?.by_label("drex_requests_ended_total", "reason"))
    };
    let none: Vec<_> = [
        "stop",
        "length",
        "cancelled",
        "invalid",
        "unavailable",
        "internal",
    ]
    .map(|reason| (reason.to_owned(), 0.0))
    .to_vec();
    ensure!(ended()? == none, "at the start: {:?}", ended()?);

    // Ten of twelve wait for two slots.
    let mut bodies: Vec<_> = (0..12).map(|i| greedy(&prompt(i), 40)).collect();
    for body in &mut bodies[..3] {
        body["stop"] = json!(["e", " "]);
    }
    let start = Instant::now();
    let waited = std::thread::scope(|scope| -> Result<bool> {
        let all = scope.spawn(|| generate(client, &bodies, 12));
        let mut waited = false;
        while !all.is_finished() {
            waited |= metrics()?.get("drex_requests_waiting") > Some(0.0);
        }
        all.join()
            .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        Ok(waited)
    })?;
    let took = start.elapsed().as_secs_f64();
    ensure!(waited, "none of twelve requests waited for two slots");

    // A prompt that is longer than the context, and a client that hangs up.
    let long = client.post("/completion", &greedy(&"a ".repeat(2000), 8))?;
    ensure!(long.status == 400, "HTTP {}", long.status);
    let mut body = greedy(&prompt(0), 400);
    body["stream"] = json!(true);
    client.stream("/completion", &body)?.take(3).for_each(drop);
    let hung_up = Instant::now();
    while metrics()?.get("drex_requests_running") != Some(0.0) {
        ensure!(
            hung_up.elapsed() < Duration::from_secs(30),
            "a request runs on after its client hung up"
        );
    }
    let wanted = [3.0, 9.0, 1.0, 1.0, 0.0, 0.0];
    let ended = ended()?;
    ensure!(ended.iter().map(|e| e.1).eq(wanted), "{ended:?}");

    let m = metrics()?;
    let at = |name: &str| m.get(name).with_context(|| format!("no {name}"));
    let of = |name: &str| -> Result<(f64, f64)> {
        Ok((at(&format!("{name}_count"))?, at(&format!("{name}_sum"))?))
    };
    let queue = of("drex_request_queue_time_seconds")?;
    let first = of("drex_time_to_first_token_seconds")?;
    let between = of("drex_inter_token_latency_seconds")?;
    let whole = of("drex_e2e_request_latency_seconds")?;
    // The one that was too long got a slot and no token.
    ensure!(
        (queue.0, first.0, whole.0) == (14.0, 13.0, 12.0)
            && first.0 + between.0 == at("drex_tokens_total")?,
        "{queue:?} {first:?} {between:?} {whole:?}"
    );
    // No request took longer than all of them.
    ensure!(
        0.0 < queue.1 && queue.1 < first.1 && whole.1 < 12.0 * took && between.1 > 0.0,
        "{queue:?} {first:?} {between:?} {whole:?}, all took {took} s"
    );
    ensure!(
        of("drex_window_seconds")?.0 == at("drex_steps_total")?,
        "{} windows are timed of {}",
        of("drex_window_seconds")?.0,
        at("drex_steps_total")?
    );
    let prompts = at("drex_prompt_tokens_total")?;
    ensure!(prompts > 2000.0, "{prompts} tokens of prompts");
    Ok(())
}
