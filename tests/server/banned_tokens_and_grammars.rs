// SPDX-License-Identifier: Apache-2.0

//! Confidence is that in tokens that can be emitted: banned ones do not count, and a grammar is asked before a row leaves.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{EXACT, Suite, Test, exact::builds, exits, generate, greedy, prompt};
use crate::client::Client;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "a row that is sure of a banned token does not leave",
            banned,
        ),
        Test::new(
            "a grammar that does not constrain does not keep rows",
            grammars,
        ),
        Test::new(
            "exact: lossless: grammars, tools and formats equal unpatched",
            formats,
        )
        .exact(),
    ]
};

const THRESHOLD: f64 = 0.6;

/// A token of a stream.
struct Emitted {
    token: i64,
    /// It left at a ramp.
    early: bool,
    /// The model's best tokens there with their probabilities, whatever is banned.
    top: Vec<(i64, f64)>,
}

fn emitted(client: Client, mut body: Value) -> Result<Vec<Emitted>> {
    body["stream"] = json!(true);
    body["n_probs"] = json!(6);
    body["timings_per_token"] = json!(true);
    let mut out = Vec::new();
    let (mut exits_before, mut n_before) = (0, 0);
    for event in client.stream("/completion", &body)? {
        let event = event?;
        let timings = &event["timings"];
        let n = timings["predicted_n"].as_u64().unwrap_or(n_before);
        let exits = timings["drex_exits"].as_array();
        let exits = exits.map_or(exits_before, |e| e.iter().filter_map(Value::as_u64).sum());
        let (is_next, early) = (n == n_before + 1, exits > exits_before);
        (exits_before, n_before) = (exits, n);
        // A token that ends in the middle of a character comes with the next one.
        if !is_next {
            continue;
        }
        for p in event["completion_probabilities"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let top = p["top_logprobs"].as_array().context("no top_logprobs")?;
            let top = top
                .iter()
                .filter_map(|t| Some((t["id"].as_i64()?, t["logprob"].as_f64()?.exp())))
                .collect();
            out.push(Emitted {
                token: p["id"].as_i64().context("no id")?,
                early,
                top,
            });
        }
    }
    Ok(out)
}

fn banned(suite: &Suite) -> Result<()> {
    let threshold = THRESHOLD.to_string();
    let flags = ["--drex-policy", "latency", "--drex-threshold", &threshold];
    let server = suite.start(&suite.patched, 1, &flags)?;
    let client = server.client;
    let props = client.get("/props")?.ok()?.json()?;
    let body = json!({"content": props["eos_token"], "parse_special": true});
    let eos = client.post("/tokenize", &body)?.ok()?.json()?["tokens"][0]
        .as_i64()
        .context("no end of text")?;
    let newline = client.tokenize("\n")?;
    let newline = *newline.last().context("no newline")?;

    let (mut early, mut tempted) = (0, 0);
    for i in 0..16 {
        for (what, ban) in [
            ("ignore_eos", None),
            ("a bias of false", Some(json!([[newline, false]]))),
            (
                "a bias of -100",
                Some(json!([[newline, -100], [eos, -100]])),
            ),
        ] {
            let mut body = greedy(&prompt(i), 48);
            let mut bans = vec![eos];
            if let Some(ban) = ban {
                body["ignore_eos"] = json!(false);
                bans = ban
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|b| b[0].as_i64())
                    .collect();
                body["logit_bias"] = ban;
            }
            for e in emitted(client, body)? {
                ensure!(
                    !bans.contains(&e.token),
                    "{what}: token {} is banned",
                    e.token
                );
                let tempting = e.top.first().is_some_and(|t| bans.contains(&t.0));
                tempted += usize::from(tempting);
                if !e.early {
                    continue;
                }
                early += 1;
                // The two best that are not banned, as shares of what is not.
                let rest: f64 = 1.0
                    - e.top
                        .iter()
                        .filter(|t| bans.contains(&t.0))
                        .map(|t| t.1)
                        .sum::<f64>();
                let mut free = e.top.iter().filter(|t| !bans.contains(&t.0));
                let (best, next) = (free.next(), free.next());
                let (best, next) = best
                    .zip(next)
                    .context("six tokens and no two of them free")?;
                ensure!(
                    best.0 == e.token && (best.1 - next.1) / rest > THRESHOLD - 1e-3,
                    "{what}, prompt {i}: token {} leaves at gap {} of {:?}",
                    e.token,
                    (best.1 - next.1) / rest,
                    e.top
                );
            }
        }
    }
    ensure!(
        early > 300 && tempted > 20,
        "{early} exits, {tempted} rows whose best token is banned: too few to test anything"
    );
    println!("        {early} exits, {tempted} rows whose best token is banned");
    Ok(())
}

/// A tool grammar that waits for a word, which never comes.
fn lazy(body: &mut Value) {
    body["grammar"] = json!("root ::= \"<tool>\" [a-z]+");
    body["grammar_lazy"] = json!(true);
    body["grammar_triggers"] = json!([{"type": 1, "value": "<tool>"}]);
}

fn grammars(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "latency", "--drex-threshold", "0.5"];
    let server = suite.start(&suite.patched, 1, &flags)?;
    let client = server.client;
    let mut exited = 0;
    for i in 0..8 {
        // What the grammar lets through is what comes out without it, token by token and exit by exit.
        let free = greedy(&prompt(i), 48);
        let mut open = free.clone();
        open["grammar"] = json!("root ::= [^\\x00]*");
        let mut waiting = free.clone();
        lazy(&mut waiting);
        let got = generate(client, &[free, open, waiting], 1)?;
        for (g, what) in got[1..].iter().zip(["open", "lazy"]) {
            ensure!(
                g.tokens == got[0].tokens && exits(g) == exits(&got[0]),
                "prompt {i}, {what} grammar: exits {:?} and {:?} without, {:?} and {:?}",
                exits(g),
                exits(&got[0]),
                g.text,
                got[0].text
            );
        }
        exited += exits(&got[0]).iter().sum::<u64>();
    }
    ensure!(exited > 100, "{exited} exits");

    // Where the grammar constrains, a row leaves only with the token that it is sure of.
    let (mut early, mut constrained) = (0, 0);
    for i in 0..16 {
        let mut body = greedy(&prompt(i), 48);
        body["grammar"] = json!("root ::= [a-z ]+");
        let mut text = String::new();
        for e in emitted(client, body.clone())? {
            let best = e.top.first().context("no best token")?.0;
            constrained += usize::from(best != e.token);
            early += usize::from(e.early);
            ensure!(
                !e.early || best == e.token,
                "prompt {i}: token {} leaves where {best} is best",
                e.token
            );
        }
        body["n_predict"] = json!(48);
        text.push_str(&generate(client, &[body], 1)?[0].text);
        ensure!(
            text.chars().all(|c| c == ' ' || c.is_ascii_lowercase()),
            "{text:?} does not follow the grammar"
        );
    }
    ensure!(
        early > 50 && constrained > 50,
        "{early} exits, {constrained} constrained tokens: too few to test anything"
    );
    println!(
        "        {exited} exits with and without grammars that let all through; {early} exits and {constrained} constrained tokens with another"
    );
    Ok(())
}

fn formats(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 24}, "unsafe": {"type": "boolean"}},
        "required": ["name", "unsafe"],
    });
    let tool = json!({"type": "function", "function": {"name": "look_up", "description": "Looks up an item", "parameters": schema}});
    let user = |i: usize| json!([{"role": "user", "content": format!("What is {}?", prompt(i))}]);
    let mut bodies = Vec::new();
    for i in 0..6 {
        let base =
            json!({"messages": user(i), "max_tokens": 48, "temperature": 0, "cache_prompt": false});
        let with = |fields: Value| {
            let mut body = base.clone();
            for (key, value) in fields.as_object().into_iter().flatten() {
                body[key] = value.clone();
            }
            ("/v1/chat/completions", body)
        };
        bodies.push(with(json!({"response_format": {"type": "json_object"}})));
        bodies.push(with(
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
        ));
        bodies.push(with(json!({"tools": [tool]})));
        bodies.push(with(json!({"tools": [tool], "tool_choice": "required"})));
        let mut plain = greedy(&prompt(i), 48);
        plain["grammar"] = json!("root ::= [a-z ]+");
        bodies.push(("/completion", plain));
        let mut waiting = greedy(&prompt(i), 48);
        lazy(&mut waiting);
        bodies.push(("/completion", waiting));
    }
    let said = |client: Client, (path, body): &(&str, Value)| -> Result<(Value, u64)> {
        let answer = client.post(path, body)?.ok()?.json()?;
        let what = if answer["choices"].is_null() {
            answer["content"].clone()
        } else {
            let mut message = answer["choices"][0]["message"].clone();
            // Each call has a random name.
            for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
                call["id"] = Value::Null;
            }
            message
        };
        Ok((
            what,
            answer["timings"]["drex_drafts_accepted"]
                .as_u64()
                .unwrap_or(0),
        ))
    };
    let chat = ["--jinja"];
    let unpatched = suite.start(reference, bodies.len(), &[EXACT, &chat].concat())?;
    let verify = [
        "--drex-policy",
        "hold",
        "--drex-fill",
        "verify",
        "--drex-threshold",
        "0.5",
    ];
    let server = suite.start(patched, bodies.len(), &[EXACT, &chat, &verify].concat())?;
    let mut accepted = 0;
    for body in &bodies {
        let (expected, _) = said(unpatched.client, body)?;
        let (got, n) = said(server.client, body)?;
        ensure!(got == expected, "{}: {got} instead of {expected}", body.1);
        accepted += n;
    }
    ensure!(
        accepted > 100,
        "{accepted} drafts accepted: too few to test anything"
    );
    println!(
        "        {} answers compared with the unpatched server, all equal; {accepted} drafts accepted",
        bodies.len()
    );
    Ok(())
}
