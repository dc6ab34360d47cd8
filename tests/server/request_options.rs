// SPDX-License-Identifier: Apache-2.0

//! What a request may ask for works with early exit as well: sampling, log probabilities, grammar, stop strings, several
//! completions, and the figures that drex adds.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Suite, Test, exits, generate, greedy, prompt};
use crate::load::Generation;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "involuntary exits: none but under the forcing policies, where they are counted",
            involuntary,
        ),
        Test::new(
            "sampling, probabilities, grammar, stop strings and n work at ramps",
            features,
        ),
        Test::new(
            "a bias towards the end of the text counts at ramps",
            end_bias,
        ),
        Test::new("timings, /slots and /metrics tell of early exit", figures),
        Test::new("every API passes drex_* fields on", fields),
    ]
};

fn involuntary(suite: &Suite) -> Result<()> {
    for policy in [
        "off", "auto", "hold", "latency", "art", "lazy", "eager", "median", "mean",
    ] {
        let server = suite.start(&suite.patched, 8, &["--drex-policy", policy])?;
        let requests: Vec<_> = (0..32).map(|i| greedy(&prompt(i), 32)).collect();
        let done = generate(server.client, &requests, 8)?;
        let total = |name: &str| -> u64 {
            done.iter()
                .filter_map(|g| g.last["timings"][name].as_u64())
                .sum()
        };
        let metrics = server.client.metrics()?;
        if policy == "off" {
            ensure!(
                metrics.get("drex_tokens_total").is_none(),
                "policy off is not off"
            );
            continue;
        }
        let (exits_forced, stays) = (
            total("drex_involuntary_exits"),
            total("drex_involuntary_stays"),
        );
        ensure!(
            metrics.get("drex_involuntary_exits_total") == Some(exits_forced as f64),
            "{policy}: /metrics and timings differ"
        );
        ensure!(
            metrics.get("drex_involuntary_stays_total") == Some(stays as f64),
            "{policy}: /metrics and timings differ"
        );
        let forces = ["eager", "median", "mean"].contains(&policy);
        ensure!(
            (exits_forced > 0) == forces,
            "{policy}: {exits_forced} involuntary exits"
        );
        let exited: u64 = done.iter().flat_map(exits).sum();
        ensure!(
            metrics.get("drex_exits_total") == Some(exited as f64),
            "{policy}: /metrics and timings differ"
        );
        ensure!(
            metrics.get("drex_tokens_total") == Some(32.0 * 32.0),
            "{policy}: {:?} tokens",
            metrics.get("drex_tokens_total")
        );
        ensure!(
            // What the others do depends on measured times, or on which rows are in a window together.
            exited > 100 || !["hold", "latency", "eager"].contains(&policy),
            "{policy}: only {exited} exits"
        );
    }
    Ok(())
}

fn features(suite: &Suite) -> Result<()> {
    let server = suite.start(
        &suite.patched,
        4,
        &["--drex-policy", "hold", "--drex-threshold", "0.4"],
    )?;
    let client = server.client;
    let ask = |mut body: Value, more: Value| -> Result<Value> {
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        client.post("/completion", &body)?.ok()?.json()
    };
    let exited = |answer: &Value| -> u64 {
        answer["timings"]["drex_exits"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_u64)
            .sum()
    };

    // Seeded sampling through the slot's own chain, twice the same.
    let sampled = json!({"temperature": 0.8, "top_k": 20, "seed": 7});
    let a = ask(greedy(&prompt(1), 48), sampled.clone())?;
    let b = ask(greedy(&prompt(1), 48), sampled)?;
    ensure!(
        a["content"] == b["content"],
        "{} and {}",
        a["content"],
        b["content"]
    );
    ensure!(exited(&a) > 0);

    // Every token has its probabilities, those from a ramp included, and the greedy token is the most probable one.
    let answer = ask(greedy(&prompt(2), 40), json!({"n_probs": 3}))?;
    let probs = answer["completion_probabilities"]
        .as_array()
        .context("no probabilities")?;
    ensure!(
        probs.len() == 40 && exited(&answer) > 0,
        "{} probabilities, {} exits",
        probs.len(),
        exited(&answer)
    );
    for (i, p) in probs.iter().enumerate() {
        let top = p["top_logprobs"][0]["logprob"]
            .as_f64()
            .context("no logprob")?;
        ensure!(
            top <= 0.0 && p["logprob"].as_f64().is_some_and(|l| l <= top),
            "token {i}: {p}"
        );
    }

    // A grammar holds, and rows that are sure of what it does not allow stay.
    let grammar = json!({"grammar": "root ::= [ab]+", "ignore_eos": false});
    let answer = ask(greedy(&prompt(3), 24), grammar.clone())?;
    let text = answer["content"].as_str().unwrap_or_default();
    ensure!(
        !text.is_empty() && text.chars().all(|c| "ab".contains(c)),
        "{text:?} does not follow the grammar"
    );
    let mut forced = grammar;
    forced["drex_threshold"] = json!(0.0);
    let answer = ask(greedy(&prompt(3), 24), forced)?;
    let text = answer["content"].as_str().unwrap_or_default();
    ensure!(
        !text.is_empty() && text.chars().all(|c| "ab".contains(c)),
        "{text:?} does not follow the grammar"
    );

    // A stop string that ends at an exited token.
    let whole = ask(greedy(&prompt(4), 48), json!({}))?;
    let text = whole["content"].as_str().context("no content")?.to_owned();
    let stop: String = text.chars().skip(20).take(4).collect();
    let answer = ask(greedy(&prompt(4), 48), json!({"stop": [stop]}))?;
    ensure!(
        answer["stop_type"] == "word"
            && text.starts_with(answer["content"].as_str().unwrap_or("?")),
        "{answer}"
    );

    // Several completions of one prompt.
    let body = json!({"prompt": prompt(5), "n": 3, "max_tokens": 16, "temperature": 0, "ignore_eos": true});
    let answer = client.post("/v1/completions", &body)?.ok()?.json()?;
    let texts: Vec<_> = answer["choices"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| c["text"].clone())
        .collect();
    ensure!(texts.len() == 3, "{answer}");

    // The context ends in the middle of a generation.
    let answer = ask(greedy("a ".repeat(240).as_str(), 600), json!({}))?;
    ensure!(answer["stop_type"] == "limit", "{}", answer["stop_type"]);

    // And chat.
    let body =
        json!({"messages": [{"role": "user", "content": "What is a slice?"}], "max_tokens": 16});
    client.post("/v1/chat/completions", &body)?.ok()?;
    Ok(())
}

fn end_bias(suite: &Suite) -> Result<()> {
    let server = suite.start(
        &suite.patched,
        1,
        &["--drex-policy", "hold", "--drex-fill", "copy"],
    )?;
    let client = server.client;
    let props = client.get("/props")?.ok()?.json()?;
    let body = json!({"content": props["eos_token"], "parse_special": true});
    let eos = client.post("/tokenize", &body)?.ok()?.json()?["tokens"][0].clone();
    ensure!(eos.is_number(), "{} is not a token", props["eos_token"]);

    let biased = |bias: f64, more: &[(&str, Value)]| -> Result<Generation> {
        let mut body = greedy(&prompt(0), 40);
        body["ignore_eos"] = json!(false);
        body["logit_bias"] = json!([[eos, bias]]);
        for (key, value) in more {
            body[key] = value.clone();
        }
        Ok(generate(client, &[body], 1)?.remove(0))
    };
    let ended = biased(100.0, &[])?;
    ensure!(
        ended.tokens.len() <= 1 && ended.last["stop_type"] == "eos",
        "{} tokens, then {}",
        ended.tokens.len(),
        ended.last["stop_type"]
    );
    // The first token comes with the prompt, the others from ramps that leave the bias to the sampler.
    for (bias, threshold, some) in [
        (-100.0, None, true),
        (0.01, None, false),
        (0.01, Some(0.0), true),
    ] {
        let more: Vec<_> = threshold
            .map(|t: f64| ("drex_threshold", json!(t)))
            .into_iter()
            .collect();
        let g = biased(bias, &more)?;
        let n: u64 = exits(&g).iter().sum();
        ensure!(
            g.tokens.len() > 1 && (n > 0) == some,
            "bias {bias}, threshold {threshold:?}: {} tokens, {n} exits",
            g.tokens.len()
        );
    }
    Ok(())
}

fn figures(suite: &Suite) -> Result<()> {
    let server = suite.start(
        &suite.patched,
        4,
        &["--drex-policy", "hold", "--drex-threshold", "0.5"],
    )?;
    let requests: Vec<_> = (0..8).map(|i| greedy(&prompt(i), 40)).collect();
    let done = generate(server.client, &requests, 4)?;
    for g in &done {
        let t = &g.last["timings"];
        ensure!(exits(g).len() == 3, "{t}");
        ensure!(
            t["drex_held_ms"].as_f64().is_some_and(|ms| ms >= 0.0),
            "{t}"
        );
    }
    let held: f64 = done
        .iter()
        .filter_map(|g| g.last["timings"]["drex_held_ms"].as_f64())
        .sum();
    ensure!(held > 0.0, "no row was ever held");
    let slots = server.client.get("/slots")?.ok()?.json()?;
    ensure!(
        slots[0]["drex"]["state"] == "idle"
            && slots[0]["drex"]["exits"]
                .as_array()
                .is_some_and(|e| e.len() == 3),
        "{}",
        slots[0]
    );
    let text = server.client.get("/metrics")?.ok()?.text();
    for name in [
        "drex_exits_total",
        "drex_held_rows",
        "drex_flushes_total",
        "drex_held_seconds_bucket",
        "drex_filled_cells_total",
    ] {
        ensure!(text.contains(&format!("\n{name}")), "no {name} in /metrics");
    }
    let metrics = server.client.metrics()?;
    ensure!(
        metrics.get("drex_filled_cells_total") == metrics.get("drex_exits_total"),
        "every exit leaves one cell to fill"
    );
    let flushes: f64 = metrics
        .by_label("drex_flushes_total", "reason")
        .iter()
        .map(|(_, n)| n)
        .sum();
    ensure!(
        flushes > 0.0
            && metrics
                .get("drex_held_seconds_count")
                .is_some_and(|n| n > 0.0)
    );
    Ok(())
}

fn fields(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "latency", "--drex-threshold", "2"];
    let server = suite.start(&suite.patched, 1, &flags)?;
    let client = server.client;
    let user = json!([{"role": "user", "content": "What is a slice?"}]);
    let cases = [
        ("/completion", json!({"prompt": prompt(0), "n_predict": 24})),
        (
            "/v1/completions",
            json!({"prompt": prompt(0), "max_tokens": 24}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 24}),
        ),
        (
            "/v1/responses",
            json!({"input": "What is a slice?", "max_output_tokens": 24}),
        ),
        ("/v1/messages", json!({"messages": user, "max_tokens": 24})),
    ];
    for (path, body) in cases {
        let count = |field: Option<(&str, Value)>| -> Result<f64> {
            let before = client.metrics()?.get("drex_exits_total").unwrap_or(0.0);
            let mut body = body.clone();
            if let Some((name, value)) = field {
                body[name] = value;
            }
            client.post(path, &body)?.ok()?;
            Ok(client.metrics()?.get("drex_exits_total").unwrap_or(0.0) - before)
        };
        ensure!(count(None)? == 0.0, "{path}: rows exit at a threshold of 2");
        ensure!(
            count(Some(("drex_threshold", json!(0))))? > 5.0,
            "{path}: drex_threshold does not arrive"
        );
        let mut typo = body.clone();
        typo["drex_treshold"] = json!(0);
        let answer = client.post(path, &typo)?;
        ensure!(
            answer.status == 400 && answer.text().contains("drex_threshold"),
            "{path}: a typo gets HTTP {} {}",
            answer.status,
            answer.text()
        );
    }
    Ok(())
}
