// SPDX-License-Identifier: Apache-2.0

//! That the servers start, answer and end; and that the patched one without early exit is the unpatched one.

use std::{ffi::OsString, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Build, Suite, Test, exits, generate, greedy};
use crate::{cache, serve, server::Server};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("reference server answers", |suite| {
            answers(suite, &suite.reference, &[])
        }),
        Test::new("patched server answers, policy off", |suite| {
            answers(suite, &suite.patched, &["--drex-policy", "off"])
        }),
        Test::new("as the README and --help start it, rows exit", as_told),
        Test::new("a policy runs on the cache that the flags ask for", layouts),
        Test::new("a policy takes no room in the context away", room),
    ]
};

fn answers(suite: &Suite, build: &Build, args: &[&str]) -> Result<()> {
    let mut server = suite.start(build, 2, args)?;
    let client = server.client;
    ensure!(client.get("/health")?.ok()?.json()?["status"] == "ok");

    // The same request in every way that it can be made says the same.
    let streamed = generate(client, &[greedy("Returns the number of elements", 12)], 1)?.remove(0);
    ensure!(
        streamed.tokens.len() == 12,
        "{} tokens instead of 12",
        streamed.tokens.len()
    );
    let request = json!({
        "prompt": "Returns the number of elements", "max_tokens": 12, "temperature": 0, "ignore_eos": true,
        "cache_prompt": false,
    });
    let whole = client.post("/v1/completions", &request)?.ok()?.json()?;
    ensure!(
        whole["choices"][0]["text"] == streamed.text,
        "{} instead of {:?}",
        whole["choices"][0],
        streamed.text
    );
    let mut request = request;
    request["stream"] = json!(true);
    let mut text = String::new();
    for event in client.stream("/v1/completions", &request)? {
        text.push_str(event?["choices"][0]["text"].as_str().unwrap_or_default());
    }
    ensure!(
        text == streamed.text,
        "{text:?} instead of {:?}",
        streamed.text
    );

    // A client that goes away in the middle leaves a free slot behind.
    let mut endless = client.stream(
        "/completion",
        &json!({"prompt": "fn", "n_predict": 400, "stream": true}),
    )?;
    ensure!(endless.next().is_some_and(|event| event.is_ok()));
    drop(endless);
    generate(client, &vec![greedy("let mut", 4); 4], 4)?;

    ensure!(
        client
            .metrics()?
            .get("tokens_predicted_total")
            .is_some_and(|n| n >= 40.0)
    );
    ensure!(client.get("/no-such-page")?.status == 404);
    ensure!(server.is_running());
    let status = server.stop(Duration::from_secs(5))?;
    ensure!(status.success(), "the server ended with {status}");
    Ok(())
}

/// The first command of the README, and the example of `serve --help`, on the bundled model.
fn as_told(suite: &Suite) -> Result<()> {
    let readme = std::fs::read_to_string(cache::repo().join("README.md"))?;
    let told = readme.lines().find(|line| line.starts_with(COMMAND));
    for line in [
        told.context("the README has no command to serve")?,
        serve::EXAMPLE,
    ] {
        let (_, args) = line.split_once(COMMAND).context("another command")?;
        let args = args.replace("-m model.gguf", "").replace("--port 8080", "");
        let args = args.split_whitespace().map(OsString::from).collect();
        let args = serve::completed(args, |_| false, cache::bundled_model)?;
        let server = Server::start(&suite.patched.0, &args)?;
        // `auto` looks around within a share of the time that has passed: its first exits come within the first seconds.
        let mut exited = 0;
        for _ in 0..15 {
            let done = generate(server.client, &[greedy("Returns the", 200)], 1)?.remove(0);
            ensure!(
                done.tokens.len() == 200 && !exits(&done).is_empty(),
                "{line}: {} tokens, exits {:?}",
                done.tokens.len(),
                exits(&done)
            );
            exited += exits(&done).iter().sum::<u64>();
            if exited > 0 {
                break;
            }
        }
        ensure!(exited > 0, "{line}: no row exits in 3000 tokens");
    }
    Ok(())
}

fn layouts(suite: &Suite) -> Result<()> {
    let model = suite.model.to_string_lossy();
    let common = ["-m", &model, "-np", "2", "-c", "512", "-t", "2"];
    for (flags, n_ctx) in [
        (&["--drex-policy", "auto"][..], 256),
        (&["--drex-policy", "auto", "--no-kv-unified"], 256),
        (&["--drex-policy", "auto", "--kv-unified"], 512),
    ] {
        let server = Server::start(&suite.patched.0, common.iter().chain(flags))?;
        let done = generate(server.client, &vec![greedy("Returns the", 20); 2], 2)?;
        ensure!(
            done.iter()
                .all(|g| g.tokens.len() == 20 && !exits(g).is_empty()),
            "{flags:?}: {done:?}"
        );
        let slots = server.client.get("/slots")?.ok()?.json()?;
        ensure!(
            slots[0]["n_ctx"] == n_ctx,
            "{flags:?}: a slot has {} instead of {n_ctx}",
            slots[0]["n_ctx"]
        );
    }
    Ok(())
}

/// Each slot has its share of the context, and answers that fill it end as those of the unpatched server.
fn room(suite: &Suite) -> Result<()> {
    let model = suite.model.to_string_lossy();
    let common = ["-m", &model, "-np", "4", "-c", "1024", "-t", "2"];
    let mut lengths = Vec::new();
    for (build, flags) in [
        (&suite.reference, &[][..]),
        (&suite.patched, &["--drex-policy", "hold"]),
        (
            &suite.patched,
            &["--drex-policy", "auto", "--drex-fill", "verify"],
        ),
    ] {
        let server = Server::start(&build.0, common.iter().chain(flags))?;
        let requests: Vec<_> = (0..4).map(|i| greedy(&super::prompt(i), 2000)).collect();
        let done = generate(server.client, &requests, 4)?;
        let ends = |g: &super::Generation| {
            g.last["tokens_evaluated"].as_u64().unwrap_or(0)
                + g.last["timings"]["predicted_n"].as_u64().unwrap_or(0)
        };
        lengths.push(done.iter().map(ends).collect::<Vec<_>>());
    }
    ensure!(
        lengths[0].iter().all(|n| *n >= 255),
        "the unpatched server stops at {:?}",
        lengths[0]
    );
    ensure!(
        lengths.iter().all(|l| *l == lengths[0]),
        "answers end after {lengths:?} tokens of context"
    );
    Ok(())
}

const COMMAND: &str = "cargo xtask serve -- ";
