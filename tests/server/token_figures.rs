// SPDX-License-Identifier: Apache-2.0

//! `drex_tokens`: what an answer says of each of its tokens, against what the timings say of all of them.

use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Suite, Test, greedy, prompt};
use crate::client::Client;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("drex_tokens adds up to the timings, with every fill", sums),
        Test::new("drex_tokens is in the answers of three APIs", apis),
        Test::new(
            "drex_tokens is there for those that ask, and refused where it cannot be",
            asked,
        ),
    ]
};

const PATHS: [&str; 3] = ["/completion", "/v1/completions", "/v1/chat/completions"];

/// An answer, as a whole or put together from its chunks.
#[derive(Default)]
struct Answer {
    text: String,
    /// Of all chunks, in their order.
    tokens: Vec<Value>,
    /// Chunks with text and one token.
    chunks: Vec<(String, Value)>,
    timings: Value,
}

fn text_of(event: &Value) -> &str {
    let choice = &event["choices"][0];
    [
        &event["content"],
        &choice["text"],
        &choice["delta"]["content"],
        &choice["message"]["content"],
    ]
    .into_iter()
    .find_map(Value::as_str)
    .unwrap_or_default()
}

fn ask(client: Client, path: &str, body: &Value, streamed: bool) -> Result<Answer> {
    let mut body = body.clone();
    body["drex_tokens"] = json!(true);
    body["stream"] = json!(streamed);
    let events = if streamed {
        client.stream(path, &body)?.collect::<Result<Vec<_>>>()?
    } else {
        vec![client.post(path, &body)?.ok()?.json()?]
    };
    let mut answer = Answer::default();
    for event in &events {
        let tokens = event["drex_tokens"].as_array();
        // A chunk in the chat's format can begin or end a message without a token.
        let tokens = match (tokens, path) {
            (Some(tokens), _) => tokens.clone(),
            (None, "/v1/chat/completions") if streamed => Vec::new(),
            (None, _) => anyhow::bail!("{path}: no drex_tokens in {event}"),
        };
        let text = text_of(event);
        if let [token] = &tokens[..]
            && streamed
            && !text.is_empty()
        {
            answer.chunks.push((text.to_owned(), token.clone()));
        }
        answer.text.push_str(text);
        answer.tokens.extend(tokens);
    }
    let last = events.last().context("no answer")?;
    answer.timings = last["timings"].clone();
    Ok(answer)
}

/// `body`, in the words of an API.
fn for_path(path: &str, prompt: &str, tokens: u32) -> Value {
    let mut body = greedy(prompt, tokens);
    if path != "/completion" {
        body["max_tokens"] = json!(tokens);
    }
    if path == "/v1/chat/completions" {
        body["messages"] = json!([{"role": "user", "content": prompt}]);
    }
    body
}

fn check(answer: &Answer, fill: &str, layers: &[u64], threshold: f64) -> Result<()> {
    let number = |name: &str| answer.timings[name].as_u64().unwrap_or(u64::MAX);
    let tokens = &answer.tokens;
    ensure!(
        tokens.len() as u64 == number("predicted_n"),
        "{} objects for {} tokens",
        tokens.len(),
        number("predicted_n")
    );
    let mut left = vec![0; layers.len()];
    let (mut replaced, mut held) = (0, 0.0);
    for token in tokens {
        let mut names: Vec<_> = token
            .as_object()
            .into_iter()
            .flat_map(|t| t.keys())
            .collect();
        names.sort();
        ensure!(
            names
                == [
                    "confidence",
                    "exit_layer",
                    "held_ms",
                    "replaced",
                    "verified"
                ],
            "{token}"
        );
        let confidence = token["confidence"].as_f64();
        ensure!(
            token["confidence"].is_null() || confidence.is_some_and(|c| (0.0..=1.0).contains(&c)),
            "{token}"
        );
        if let Some(layer) = token["exit_layer"].as_u64() {
            let ramp = layers.iter().position(|l| *l == layer);
            left[ramp.with_context(|| format!("there is no exit after layer {layer}"))?] += 1;
            ensure!(confidence.is_some_and(|c| c >= threshold), "{token}");
            ensure!(token["replaced"].is_null(), "{token}");
        }
        let full = token["exit_layer"].is_null();
        ensure!(
            token["verified"] == (full || fill == "verify"),
            "{fill}: {token}"
        );
        if token["replaced"].is_string() {
            ensure!(fill == "verify" && full, "{fill}: {token}");
            ensure!(confidence.is_some_and(|c| c >= threshold), "{token}");
            replaced += 1;
        }
        let ms = token["held_ms"].as_f64().context("no held_ms")?;
        ensure!(ms >= 0.0, "{token}");
        held += ms;
    }
    let exits: Vec<_> = answer.timings["drex_exits"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect();
    let all_held = answer.timings["drex_held_ms"].as_f64().context("no time")?;
    if fill == "verify" {
        let (drafts, accepted) = (number("drex_drafts"), number("drex_drafts_accepted"));
        ensure!(
            replaced == drafts - accepted && left.iter().sum::<u64>() == accepted,
            "{replaced} are replaced and {left:?} confirmed, of {drafts} drafts {accepted} are"
        );
        ensure!(
            left.iter().zip(&exits).all(|(l, e)| l <= e),
            "{left:?} tokens of {exits:?} exits"
        );
        // Rows behind a wrong draft were held too.
        ensure!(held <= all_held + 1e-3, "{held} ms of {all_held}");
    } else {
        ensure!(left == exits, "{fill}: {left:?} instead of {exits:?}");
        ensure!(
            (held - all_held).abs() < 1e-3,
            "{fill}: {held} ms instead of {all_held}"
        );
    }
    // What was replaced was something else.
    for (text, token) in &answer.chunks {
        ensure!(token["replaced"] != text.as_str(), "{text:?}: {token}");
    }
    Ok(())
}

fn sums(suite: &Suite) -> Result<()> {
    const FILLS: [&str; 4] = ["copy", "propagate", "postfill", "verify"];
    let threshold = 0.4;
    let text = threshold.to_string();
    let flags = ["--drex-policy", "hold", "--drex-exit-layers", "4,8"];
    let flags = [&flags[..], &["--drex-threshold", &text]].concat();
    let server = suite.start(&suite.patched, 8, &flags)?;
    let client = server.client;
    let mut all: Vec<(&str, Answer)> = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..8)
            .map(|k| {
                scope.spawn(move || -> Result<Vec<(&str, Answer)>> {
                    let mut out = Vec::new();
                    for i in 0..4 {
                        let fill = FILLS[(k + i) % 4];
                        let mut body = greedy(&prompt(4 * k + i), 48);
                        body["drex_fill"] = json!(fill);
                        if i % 2 == 1 {
                            body["n_probs"] = json!(2);
                        }
                        if i == 2 {
                            body["temperature"] = json!(0.8);
                            body["seed"] = json!(k);
                        }
                        let answer = ask(client, "/completion", &body, (k + i / 2) % 2 == 0)?;
                        out.push((fill, answer));
                    }
                    Ok(out)
                })
            })
            .collect();
        for thread in threads {
            all.extend(thread.join().expect("a client panicked")?);
        }
        Ok(())
    })?;
    let (mut left, mut replaced, mut held) = ([0, 0], 0, 0);
    for (i, (fill, answer)) in all.iter().enumerate() {
        check(answer, fill, &[4, 8], threshold).with_context(|| format!("answer {i}, {fill}"))?;
        for token in &answer.tokens {
            left[0] += u64::from(token["exit_layer"] == 4);
            left[1] += u64::from(token["exit_layer"] == 8);
            replaced += u64::from(token["replaced"].is_string());
            held += u64::from(token["held_ms"].as_f64() > Some(0.0));
        }
    }
    // Everything that was compared has happened.
    ensure!(
        left[0] > 0 && left[1] > 100 && replaced > 10 && held > 100,
        "exits {left:?}, {replaced} drafts replaced, {held} rows held"
    );
    Ok(())
}

fn apis(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "latency", "--drex-exit-layers", "4,8"];
    let flags = [&flags[..], &["--drex-threshold", "0.4"]].concat();
    let server = suite.start(&suite.patched, 2, &flags)?;
    let client = server.client;
    for path in PATHS {
        for fill in ["copy", "verify"] {
            let mut body = for_path(path, &prompt(3), 40);
            body["drex_fill"] = json!(fill);
            let whole = ask(client, path, &body, false)?;
            let parts = ask(client, path, &body, true)?;
            for answer in [&whole, &parts] {
                check(answer, fill, &[4, 8], 0.4).with_context(|| format!("{path} {fill}"))?;
            }
            ensure!(
                whole.text == parts.text && !whole.text.is_empty(),
                "{path}: {:?} and {:?}",
                whole.text,
                parts.text
            );
            let places = |a: &Answer| -> Vec<Value> {
                let of = |t: &Value| json!([t["exit_layer"], t["replaced"]]);
                a.tokens.iter().map(of).collect()
            };
            ensure!(
                places(&whole) == places(&parts),
                "{path} {fill}: streamed, the tokens left elsewhere"
            );
            ensure!(
                places(&whole).iter().any(|t| t[0].is_u64()),
                "{path} {fill}: no token left"
            );
        }
        if path == "/completion" {
            continue;
        }
        // A chunk's text in several choices: each choice has its own.
        let mut body = for_path(path, &prompt(3), 12);
        body["n"] = json!(2);
        body["drex_tokens"] = json!(true);
        let answer = client.post(path, &body)?.ok()?.json()?;
        let choices = answer["choices"].as_array().context("no choices")?;
        let counts: Vec<_> = choices
            .iter()
            .map(|c| c["drex_tokens"].as_array().map(Vec::len))
            .collect();
        ensure!(counts == [Some(12), Some(12)], "{path}: {counts:?}");
    }
    Ok(())
}

fn asked(suite: &Suite) -> Result<()> {
    let server = suite.start(&suite.patched, 2, &["--drex-policy", "hold"])?;
    let client = server.client;
    for path in PATHS {
        for value in [json!(false), json!(null)] {
            let mut body = for_path(path, "fn", 4);
            body["drex_tokens"] = value;
            let text = client.post(path, &body)?.ok()?.text();
            ensure!(!text.contains("drex_tokens"), "{path}: {text}");
            body["stream"] = json!(true);
            for event in client.stream(path, &body)? {
                ensure!(
                    event?.get("drex_tokens").is_none(),
                    "{path} has drex_tokens"
                );
            }
        }
        for value in [json!(1), json!("true"), json!([]), json!({"a": true})] {
            let mut body = for_path(path, "fn", 4);
            body["drex_tokens"] = value.clone();
            let answer = client.post(path, &body)?;
            let text = answer.text();
            ensure!(
                answer.status == 400
                    && text.contains("drex_tokens")
                    && text.contains("true or false"),
                "{path} {value}: HTTP {} {text}",
                answer.status
            );
        }
    }
    // APIs whose answers have no place for it.
    let messages = json!([{"role": "user", "content": "fn"}]);
    for (path, body) in [
        (
            "/v1/messages",
            json!({"messages": messages, "max_tokens": 4}),
        ),
        (
            "/v1/responses",
            json!({"input": "fn", "max_output_tokens": 4}),
        ),
    ] {
        client.post(path, &body)?.ok()?;
        let mut body = body;
        body["drex_tokens"] = json!(true);
        let answer = client.post(path, &body)?;
        let text = answer.text();
        ensure!(
            answer.status == 400 && text.contains("'drex_tokens'"),
            "{path}: HTTP {} {text}",
            answer.status
        );
    }
    // The server goes on.
    let answer = ask(client, "/completion", &greedy("fn", 6), false)?;
    ensure!(answer.tokens.len() == 6, "{:?}", answer.tokens);
    ensure!(
        answer.tokens[0]["exit_layer"].is_null() && answer.tokens[0]["confidence"].is_null(),
        "the first token comes from the prompt: {}",
        answer.tokens[0]
    );

    let off = suite.start(&suite.patched, 2, &[])?;
    let mut body = greedy("fn", 4);
    body["drex_tokens"] = json!(true);
    let answer = off.client.post("/completion", &body)?;
    ensure!(
        answer.status == 400 && answer.text().contains("early exit is off"),
        "{}",
        answer.text()
    );
    Ok(())
}
