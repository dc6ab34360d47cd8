// SPDX-License-Identifier: Apache-2.0

//! Fill modes: what a request may ask for gives the unpatched server's answer with `verify`, and all three modes work side
//! by side.

use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::EXACT;
use super::exact::builds;
use super::{Suite, Test, exits, generate, greedy, prompt};
use crate::client::Client;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("fills: all four in one batch", mixed),
        Test::new(
            "fills: cancelled streams leave no pending rows behind",
            cancelled,
        ),
        Test::new("fills: a KV cache that just fits", tight),
        Test::new(
            "exact: verify answers every kind of request as the unpatched server does",
            features,
        )
        .exact(),
    ]
};

const MODES: [&str; 4] = ["copy", "postfill", "verify", "propagate"];

fn mixed(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "hold", "--drex-threshold", "0.5"];
    let server = suite.start(&suite.patched, 12, &flags)?;
    let idle = server.client.metrics()?;
    let requests: Vec<_> = (0..40)
        .map(|i| {
            let mut request = greedy(&prompt(i), 20 + i as u32);
            request["drex_fill"] = json!(MODES[i % 4]);
            request
        })
        .collect();
    let done = generate(server.client, &requests, 12)?;
    let count = |i: usize, name: &str| done[i].last["timings"][name].as_u64().unwrap_or(0);
    let (mut tokens, mut drafts) = (0, [0; 4]);
    for (i, g) in done.iter().enumerate() {
        ensure!(
            g.tokens.len() == 20 + i,
            "request {i} ({}): {} tokens instead of {}",
            MODES[i % 4],
            g.tokens.len(),
            20 + i
        );
        ensure!(
            count(i, "drex_involuntary_exits") == 0,
            "request {i}: a row was forced"
        );
        ensure!(
            exits(g).iter().sum::<u64>() > 0,
            "request {i} ({}): no exits",
            MODES[i % 4]
        );
        tokens += g.tokens.len() as u64;
        drafts[i % 4] += count(i, "drex_drafts");
    }
    ensure!(
        drafts[0] + drafts[1] + drafts[3] == 0 && drafts[2] > 100,
        "drafts of each mode: {drafts:?}"
    );
    let metrics = server.client.metrics()?;
    let get = |name: &str| metrics.get(name).with_context(|| format!("no {name}"));
    ensure!(
        get("drex_tokens_total")? == tokens as f64,
        "drex_tokens_total is {}, the clients got {tokens}",
        get("drex_tokens_total")?
    );
    let (judged, accepted) = (
        get("drex_drafts_total")?,
        get("drex_drafts_accepted_total")?,
    );
    ensure!(
        // A final answer is written before its last draft is counted.
        judged >= drafts[2] as f64 && judged <= drafts[2] as f64 + 12.0,
        "drex_drafts_total is {judged}, timings say {}",
        drafts[2]
    );
    ensure!(
        accepted > 0.5 * judged && accepted <= judged,
        "{accepted} of {judged} drafts accepted"
    );
    ensure!(
        get("drex_postfilled_rows_total")? > judged,
        "postfill filled nothing"
    );
    ensure!(get("drex_filled_cells_total")? > 0.0, "copy filled nothing");
    nothing_left(server.client, &idle)
}

/// After all is done, the arena is as free as at the start.
fn nothing_left(client: Client, idle: &crate::metrics::Metrics) -> Result<()> {
    let metrics = client.metrics()?;
    for (name, expect) in [
        ("drex_pending_rows", Some(0.0)),
        ("drex_requests", Some(0.0)),
        ("drex_slots_free", idle.get("drex_slots_free")),
    ] {
        ensure!(
            metrics.get(name) == expect,
            "{name} is {:?}, expected {expect:?}",
            metrics.get(name)
        );
    }
    Ok(())
}

fn cancelled(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "hold", "--drex-threshold", "0.3"];
    let server = suite.start(&suite.patched, 6, &flags)?;
    let idle = server.client.metrics()?;
    let client = server.client;
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..6)
            .map(|k| {
                scope.spawn(move || -> Result<()> {
                    for i in 0..8 {
                        let mut request = greedy(&prompt(k * 8 + i), 400);
                        request["drex_fill"] = json!(MODES[(k + i) % 4]);
                        request["stream"] = json!(true);
                        let mut stream = client.stream("/completion", &request)?;
                        for _ in 0..=(i * 7 + k) {
                            stream.next().context("the stream ended early")??;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("a client panicked")?;
        }
        Ok(())
    })?;
    // The last ones are noticed when the server next writes to them.
    let deadline = std::time::Instant::now() + crate::client::TIMEOUT;
    while client.metrics()?.get("drex_requests") != Some(0.0) {
        ensure!(
            std::time::Instant::now() < deadline,
            "cancelled requests stay"
        );
        thread::sleep(std::time::Duration::from_millis(20));
    }
    nothing_left(client, &idle)?;
    // and it still serves
    let done = generate(client, &[greedy(&prompt(1), 24)], 1)?;
    ensure!(done[0].tokens.len() == 24, "no answer after the storm");
    Ok(())
}

/// Four requests fill the cache to the last few cells, with tokens taken back all the while: none fails for want of room.
fn tight(suite: &Suite) -> Result<()> {
    for fill in MODES {
        let flags = [
            "--drex-policy",
            "hold",
            "--drex-threshold",
            "0.3",
            "--drex-fill",
            fill,
        ];
        let server = suite.start(&suite.patched, 4, &flags)?;
        let cells = 4 * 512;
        let mut requests = Vec::new();
        for i in 0..4 {
            let prompt = prompt(i);
            let n = server.client.tokenize(&prompt)?.len();
            requests.push(greedy(&prompt, (cells / 4 - n) as u32));
        }
        let done = generate(server.client, &requests, 4)?;
        let tokens: u64 = done
            .iter()
            .filter_map(|g| g.last["tokens_predicted"].as_u64())
            .sum();
        let want: u64 = requests
            .iter()
            .filter_map(|r| r["n_predict"].as_u64())
            .sum();
        ensure!(tokens == want, "{fill}: {tokens} of {want} tokens");
    }
    Ok(())
}

/// Everything of an answer that the model, and not the clock or the slot, decides.
fn essence(answer: &Value) -> Value {
    let mut out = answer.clone();
    if let Some(all) = out.as_object_mut() {
        for key in [
            "timings",
            "id_slot",
            "generation_settings",
            "created",
            "id",
            "model",
            "system_fingerprint",
            "tokens_cached",
            "usage",
        ] {
            all.remove(key);
        }
    }
    out
}

/// Requests of several completions each, at the end of `kinds`.
const SHARED: usize = 4;

/// Requests of every kind, with a name.
fn kinds() -> Vec<(String, &'static str, Value)> {
    let mut all = Vec::new();
    let mut add = |name: &str, path: &'static str, i: usize, more: Value| {
        let mut body = greedy(&prompt(i), 40);
        if path != "/completion" {
            body = json!({"prompt": prompt(i), "max_tokens": 40, "temperature": 0});
        }
        body["return_tokens"] = json!(true);
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        all.push((format!("{name} ({i})"), path, body));
    };
    for i in 0..4 {
        add("n_predict 1", "/completion", i, json!({"n_predict": 1}));
        add("n_predict 2", "/completion", i, json!({"n_predict": 2}));
        add("n_predict 3", "/completion", i, json!({"n_predict": 3}));
        add("stop", "/completion", i, json!({"stop": ["the", "`", ";"]}));
        add(
            "stop at a line",
            "/completion",
            i + 2,
            json!({"stop": ["\n"]}),
        );
        add(
            "end of text",
            "/completion",
            i,
            json!({"ignore_eos": false, "n_predict": 160, "logit_bias": [[0, 12.0]], "drex_threshold": 0.3}),
        );
        add("probabilities", "/completion", i, json!({"n_probs": 5}));
        add(
            "probabilities after sampling",
            "/completion",
            i,
            json!({"n_probs": 3, "post_sampling_probs": true, "temperature": 0.7, "seed": i}),
        );
        add(
            "sampling",
            "/completion",
            i,
            json!({"temperature": 1.0, "top_p": 0.9, "seed": 11 + i}),
        );
        add(
            "mirostat",
            "/completion",
            i,
            json!({"mirostat": 2, "temperature": 0.8, "seed": i}),
        );
        add(
            "penalties",
            "/completion",
            i,
            json!({"repeat_penalty": 1.2, "repeat_last_n": 32, "drex_threshold": 0.3}),
        );
        add(
            "grammar",
            "/completion",
            i,
            json!({"grammar": "root ::= ([a-z]+ \" \")+", "drex_threshold": 0.3}),
        );
        add(
            "JSON schema",
            "/completion",
            i,
            json!({"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 2}, "n_predict": 60, "ignore_eos": false,
                "drex_threshold": 0.3}),
        );
        add("logprobs", "/v1/completions", i, json!({"logprobs": 2}));
    }
    // Last, and one at a time: the server gives the cells of such completions back at their end, so that others get cells
    // that were used before, and attention adds up in another order.
    for i in 0..SHARED {
        add(
            "n",
            "/v1/completions",
            i,
            json!({"n": 3, "temperature": 0.8, "seed": 5}),
        );
    }
    all
}

fn features(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let kinds = kinds();
    let ask = |client: Client, path: &str, body: &Value| -> Result<Value> {
        client.post(path, body)?.ok()?.json()
    };
    let slots = 120; // one for each completion: no cell is used twice
    let unpatched = suite.start(reference, slots, EXACT)?;
    let mut expected = Vec::new();
    for (name, path, body) in &kinds {
        expected
            .push(ask(unpatched.client, path, body).with_context(|| format!("unpatched: {name}"))?);
    }
    drop(unpatched);
    for stop in ["eos", "word", "limit"] {
        let n = expected.iter().filter(|a| a["stop_type"] == stop).count();
        ensure!(n > 3, "only {n} answers stop by {stop}");
    }
    let mut exited = 0;
    for concurrency in [1, 8] {
        let flags = [
            "--drex-policy",
            "hold",
            "--drex-threshold",
            "0.3",
            "--drex-fill",
            "verify",
        ];
        let server = suite.start(patched, slots, &[EXACT, &flags].concat())?;
        let client = server.client;
        let idle = client.metrics()?;
        thread::scope(|scope| -> Result<()> {
            let (kinds, expected) = (&kinds, &expected);
            let compare = move |i: usize| -> Result<()> {
                let (name, path, body) = &kinds[i];
                let got = ask(client, path, body).with_context(|| name.clone())?;
                ensure!(
                    essence(&got) == essence(&expected[i]),
                    "{name}, {concurrency} at a time:\n  {}\n  {}",
                    essence(&got),
                    essence(&expected[i])
                );
                Ok(())
            };
            let apart = kinds.len() - SHARED;
            let threads: Vec<_> = (0..concurrency)
                .map(|k| scope.spawn(move || (k..apart).step_by(concurrency).try_for_each(compare)))
                .collect();
            for thread in threads {
                thread.join().expect("a client panicked")?;
            }
            (apart..kinds.len()).try_for_each(compare)
        })?;
        nothing_left(client, &idle)?;
        let metrics = client.metrics()?;
        exited += metrics.get("drex_drafts_accepted_total").unwrap_or(0.0) as u64;
    }
    ensure!(exited > 500, "only {exited} drafts accepted");
    // Up to the last cell of the context.
    let small = |build| suite.start(build, 1, EXACT);
    let long = greedy(&prompt(3), 600);
    let expect = ask(small(reference)?.client, "/completion", &long)?;
    let flags = [
        "--drex-policy",
        "latency",
        "--drex-threshold",
        "0.3",
        "--drex-fill",
        "verify",
    ];
    let server = suite.start(patched, 1, &[EXACT, &flags].concat())?;
    let got = ask(server.client, "/completion", &long)?;
    ensure!(
        essence(&got) == essence(&expect),
        "at the end of the context:\n  {}\n  {}",
        essence(&got),
        essence(&expect)
    );
    ensure!(
        got["tokens_predicted"].as_u64() > Some(480) && got["truncated"] == json!(true),
        "the context was not filled: {} tokens",
        got["tokens_predicted"]
    );
    println!(
        "        {} answers compared with the unpatched server's, {exited} drafts accepted",
        2 * kinds.len() + 1
    );
    Ok(())
}
