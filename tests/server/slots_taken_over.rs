// SPDX-License-Identifier: Apache-2.0

//! Slots and caches that requests take over from each other: nobody's cells change while it runs, and who asks for the full
//! model gets no K/V that early exit has approximated.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    Build, EXACT, Suite, Test, exact::builds, exits, generate, profile_and_record::Folder, prompt,
};
use crate::{client::Client, server::Server};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "exact: who names a busy slot waits, and its neighbours answer as ever",
            busy_slots,
        )
        .exact(),
        Test::new(
            "exact: a turn of the full model reuses nothing that a turn before it approximated",
            full_model,
        )
        .exact(),
    ]
};

const FILLS: [&str; 4] = ["copy", "propagate", "postfill", "verify"];
const POLICIES: [&str; 8] = [
    "hold", "latency", "art", "auto", "lazy", "eager", "median", "mean",
];

/// A server with a RAM cache for prompts and a folder for slot files.
fn start(
    suite: &Suite,
    build: &Build,
    slots: usize,
    folder: &Folder,
    args: &[&str],
) -> Result<Server> {
    let folder = folder.path();
    let caches = [
        "--cache-ram",
        "64",
        "-sps",
        "0.1",
        "--slot-save-path",
        &folder,
    ];
    suite.start(build, slots, &[EXACT, &caches, args].concat())
}

/// A greedy request in a slot, with its prompt from the cache.
fn in_slot(prompt: &Value, tokens: u32, slot: u32) -> Value {
    json!({"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": true, "id_slot": slot, "return_tokens": true})
}

fn ask(client: Client, body: &Value) -> Result<Value> {
    client.post("/completion", body)?.ok()?.json()
}

/// A stream that has begun, and its tokens.
fn tokens(stream: crate::client::Stream, first: Value) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for event in std::iter::once(Ok(first)).chain(stream) {
        let event = event?;
        all.extend(event["tokens"].as_array().into_iter().flatten().cloned());
    }
    Ok(all)
}

/// Rounds of each policy and fill; `DREX_ROUNDS` says how many.
fn rounds(suite: &Suite) -> Result<usize> {
    match std::env::var("DREX_ROUNDS") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("DREX_ROUNDS {text}: not a number")),
        Err(_) => Ok(if suite.long { 3 } else { 1 }),
    }
}

/// Tokens of the answers in whose middle somebody comes.
const LONG: u32 = 36;

fn busy_slots(suite: &Suite) -> Result<()> {
    let folder = Folder::new("slots")?;
    let (reference, patched) = builds(suite)?;
    let long = |i: usize, slot: u32| in_slot(&json!(prompt(20 + i)), LONG, slot);
    let alone = |body: &Value| -> Result<Value> {
        let server = start(suite, reference, 2, &folder, &[])?;
        Ok(ask(server.client, body)?["tokens"].clone())
    };
    let short = in_slot(&json!(prompt(5)), 12, 0);
    let expected = [alone(&long(0, 0))?, alone(&long(1, 1))?, alone(&short)?];
    let (each, mut rounds) = (rounds(suite)?, 0);
    for policy in POLICIES {
        let flags = ["--drex-policy", policy, "--drex-exit-layers", "8"];
        let server = start(suite, patched, 2, &folder, &flags)?;
        for fill in FILLS
            .iter()
            .flat_map(|fill| std::iter::repeat_n(fill, each))
        {
            // What comes into the middle goes on from one policy and fill to the next.
            let round = rounds;
            let what = format!("{policy}, {fill}, round {round}");
            one_round(
                server.client,
                fill,
                round,
                &short,
                [long(0, 0), long(1, 1)],
                &expected,
            )
            .with_context(|| what)?;
            rounds += 1;
        }
    }
    println!("        {rounds} rounds, each with a request for a slot that was busy");
    Ok(())
}

/// Two long answers in slots 0 and 1, and in their middle something that wants slot 0.
fn one_round(
    client: Client,
    fill: &str,
    round: usize,
    short: &Value,
    mut long: [Value; 2],
    expected: &[Value; 3],
) -> Result<()> {
    let asked = |mut body: Value, fields: &[(&str, Value)]| {
        for (key, value) in fields {
            body[*key] = value.clone();
        }
        body
    };
    // The prompt of the one to come lies in the RAM cache.
    let strict = [("drex_threshold", json!(2))];
    ask(client, &asked(short.clone(), &[("drex_fill", json!(fill))]))?;
    ask(client, &asked(in_slot(&json!(prompt(7)), 4, 0), &strict))?;

    let lossless = fill == "verify";
    long[0] = asked(
        long[0].clone(),
        &[("drex_fill", json!(fill)), ("stream", json!(true))],
    );
    long[1] = asked(
        long[1].clone(),
        &[("drex_fill", json!(fill)), ("stream", json!(true))],
    );
    if !lossless {
        // One of them is answered by the full model all the same: it says whether anything was mixed up.
        long[round % 2] = asked(long[round % 2].clone(), &strict);
    }
    let begin = |body: &Value| -> Result<_> {
        let mut stream = client.stream("/completion", body)?;
        let first = stream.next().context("no event")??;
        Ok((stream, first))
    };
    let (a, b) = (begin(&long[0])?, begin(&long[1])?);
    std::thread::scope(|scope| {
        let third = scope.spawn(|| -> Result<()> {
            let slot = |action: &str| {
                let body = json!({"filename": "turns.bin"});
                client
                    .post(&format!("/slots/0?action={action}"), &body)?
                    .ok()
            };
            match round % 5 {
                1 => drop(slot("erase")?),
                2 => drop(slot("save")?),
                // Before the first file there is nothing to restore.
                3 => drop(slot("restore")?),
                4 => drop(ask(client, &asked(short.clone(), &[("n_cmpl", json!(2))]))?),
                _ => {
                    let got = ask(client, &asked(short.clone(), &strict))?;
                    ensure!(
                        got["tokens"] == expected[2],
                        "who waited says {} instead of {}",
                        got["tokens"],
                        expected[2]
                    );
                }
            }
            Ok(())
        });
        for (i, (stream, first)) in [a, b].into_iter().enumerate() {
            let got = json!(tokens(stream, first)?);
            let compared = lossless || round % 2 == i;
            let n = got.as_array().map_or(0, Vec::len);
            ensure!(n == LONG as usize, "the answer in slot {i} has {n} tokens");
            ensure!(
                !compared || got == expected[i],
                "the answer in slot {i} is {got} instead of {}",
                expected[i]
            );
        }
        third.join().expect("no panic")
    })
}

/// What happens to a slot between two turns.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Between {
    Nothing,
    /// Another prompt: the first one goes to the RAM cache and comes back.
    Ram,
    /// A file.
    File,
}

fn full_model(suite: &Suite) -> Result<()> {
    let folder = Folder::new("slots")?;
    let (reference, patched) = builds(suite)?;
    let unpatched = start(suite, reference, 1, &folder, &[])?;
    let client = unpatched.client;
    let (mut compared, mut exited, mut kept, mut dropped) = (0, 0, 0, 0);
    for fill in FILLS {
        let flags = [
            "--drex-policy",
            "hold",
            "--drex-threshold",
            "0.4",
            "--drex-fill",
            fill,
        ];
        let server = start(suite, patched, 1, &folder, &flags)?;
        // Prompts differ, so that nobody finds what another one has left exactly.
        let all = [Between::Nothing, Between::Ram, Between::File];
        for (i, between) in (0..12).map(|i| (i, all[i / 4])) {
            let what = format!("{fill}, prompt {i}, {between:?}");
            let first = client.tokenize(&prompt(i))?;
            let turn = ask(server.client, &in_slot(&json!(first), 40, 0))?;
            let early: u64 = turn["timings"]["drex_exits"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .sum();
            exited += early;

            let mut second = first.clone();
            second.extend(
                turn["tokens"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_i64),
            );
            second.extend(client.tokenize("\n\nSee also")?);

            let slot = |action: &str| {
                let body = json!({"filename": "full.bin"});
                server
                    .client
                    .post(&format!("/slots/0?action={action}"), &body)?
                    .ok()
            };
            match between {
                Between::Nothing => {}
                Between::Ram => {
                    let other = client.tokenize("It is an error to")?;
                    ask(server.client, &in_slot(&json!(other), 4, 0))?;
                }
                Between::File => {
                    slot("save")?;
                    slot("erase")?;
                    slot("restore")?;
                }
            }

            let body = in_slot(&json!(second), 32, 0);
            let mut alone = body.clone();
            alone["cache_prompt"] = json!(false);
            let expected = ask(client, &alone)?;
            let mut strict = body;
            if i % 2 == 0 {
                strict["drex_fill"] = json!("verify");
            } else {
                strict["drex_threshold"] = json!(2);
            }
            let got = ask(server.client, &strict)?;
            ensure!(
                got["tokens"] == expected["tokens"],
                "{what}: {} instead of {}",
                got["content"],
                expected["content"]
            );
            compared += 1;

            // What was computed exactly is still reused, and only that.
            let cached = got["timings"]["cache_n"].as_u64().context("no cache_n")? as usize;
            let exact = fill == "postfill" || fill == "verify" || early == 0;
            ensure!(
                cached >= first.len() && (exact || cached < second.len() - 4),
                "{what}: {cached} of {} tokens are reused, {} of them were the first prompt, {early} exits",
                second.len(),
                first.len()
            );
            if exact {
                kept += cached;
            } else {
                dropped += second.len() - cached;
            }
        }
    }
    ensure!(
        exited > 300 && kept > 0 && dropped > 0,
        "{exited} exits, {kept} tokens reused, {dropped} not: nothing was tested"
    );
    println!(
        "        {compared} second turns compared with the unpatched server, all equal; {exited} exits in the first ones"
    );

    // A server without early exit reuses none of them either, and the unpatched one refuses the file.
    let server = start(
        suite,
        patched,
        1,
        &folder,
        &["--drex-policy", "hold", "--drex-threshold", "0.4"],
    )?;
    let first = client.tokenize(&prompt(3))?;
    let turn = generate(server.client, &[in_slot(&json!(first), 40, 0)], 1)?.remove(0);
    ensure!(exits(&turn).iter().sum::<u64>() > 0, "nobody exits");
    let body = json!({"filename": "lossy.bin"});
    server.client.post("/slots/0?action=save", &body)?.ok()?;
    let off = start(suite, patched, 1, &folder, &["--drex-policy", "off"])?;
    off.client.post("/slots/0?action=restore", &body)?.ok()?;
    let mut second = first.clone();
    second.extend(&turn.tokens);
    let asked = in_slot(&json!(second), 32, 0);
    let got = ask(off.client, &asked)?;
    let mut alone = asked;
    alone["cache_prompt"] = json!(false);
    ensure!(
        got["tokens"] == ask(client, &alone)?["tokens"]
            && got["timings"]["cache_n"].as_u64() < Some(second.len() as u64 - 4),
        "policy off goes on with approximate K/V: {}",
        got["timings"]
    );
    let answer = client.post("/slots/0?action=restore", &body)?;
    ensure!(
        answer.status == 400,
        "the unpatched server takes the file: HTTP {}",
        answer.status
    );
    Ok(())
}
