// SPDX-License-Identifier: Apache-2.0

//! What llama-server has beside serving one model from an empty cache: the router, cells that are used again elsewhere, and
//! sleep.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    EXACT, Suite, Test, drafts, equal, exact::builds, generate, greedy,
    lora_adapters::write_adapter, profile_and_record::until_asleep, prompt,
};
use crate::{cache::TempDir, client::Client, gguf, server::Server};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "router: a model without exits is served with policy off, and the log says so",
            router,
        ),
        Test::new(
            "exact: lossless: chunks of the cache that move with --cache-reuse",
            cache_reuse,
        )
        .exact(),
        Test::new(
            "exact: lossless: a server that slept, with an adapter",
            slept,
        )
        .exact(),
    ]
};

/// One early-exit model and one whose metadata names no exit layers, behind one router with one set of options.
fn router(suite: &Suite) -> Result<()> {
    let temp = TempDir::unlocked("router")?;
    fs::copy(&suite.model, temp.path().join("exits.gguf"))?;
    gguf::rewrite(
        &suite.model,
        &temp.path().join("plain.gguf"),
        &gguf::Edit {
            without: &["llama.early_exit.layers", "llama.early_exit.head"],
            ..Default::default()
        },
    )?;
    let server = start_router(suite, temp.path())?;
    let listed = server.client.get("/models")?.ok()?.json()?;
    let id = |part: &str| -> Result<String> {
        let models = listed["data"].as_array().context("/models has no data")?;
        let ids = models.iter().filter_map(|m| m["id"].as_str());
        ids.into_iter()
            .find(|id| id.contains(part))
            .map(str::to_owned)
            .with_context(|| format!("no model {part} in {listed}"))
    };
    let mut texts = Vec::new();
    for (part, exits) in [("plain", false), ("exits", true)] {
        let answer = ask(
            server.client,
            &json!({
                "model": id(part)?, "prompt": "Returns the", "n_predict": 48, "temperature": 0, "ignore_eos": true,
            }),
        )?;
        let has = answer["timings"]["drex_exits"].is_array();
        ensure!(has == exits, "{part}: {}", answer["timings"]);
        texts.push(answer["content"].as_str().unwrap_or_default().to_owned());
    }
    ensure!(
        texts[0] == texts[1] && !texts[0].is_empty(),
        "verify differs from policy off: {texts:?}"
    );
    let log = server.log();
    ensure!(
        log.contains("early exit: policy off instead of hold") && log.contains("plain.gguf"),
        "the log does not say that early exit is off"
    );
    Ok(())
}

fn start_router(suite: &Suite, models: &Path) -> Result<Server> {
    let models = models.to_string_lossy();
    let common = ["--models-dir", &models, "-c", "1024", "-np", "2", "-t", "2"];
    let exits = ["--drex-policy", "hold", "--drex-fill", "verify"];
    Server::start(
        &suite.patched.0,
        common.iter().chain(&exits).chain(&["--no-webui"]),
    )
}

fn ask(client: Client, request: &Value) -> Result<Value> {
    client.post("/completion", request)?.ok()?.json()
}

/// A prompt that lacks a part of the last one in its middle: the cells behind that part move to new positions.
fn cache_reuse(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let parts = [
        "An iterator over the elements of a slice. It yields references to them from the first to the last. ",
        "The borrow checker ensures that no reference outlives what it refers to, and that none is changed behind it. ",
        "A closure can capture variables from its environment by reference, by mutable reference, or by value. ",
        "This function will panic if the index is out of bounds, and returns the value at that index otherwise. ",
    ];
    let orders: [&[usize]; 6] = [
        &[0, 1, 2, 3],
        &[0, 2, 3],
        &[0, 3],
        &[1, 0, 3, 2],
        &[1, 3, 2],
        &[0, 1, 2, 3],
    ];
    let flags = ["--cache-reuse", "16"];
    let exits = ["--drex-policy", "hold", "--drex-fill", "verify"];
    let all = [EXACT, &flags].concat();
    let ours = [&all[..], &exits, &["--drex-threshold", "0.5"]].concat();
    let stock = suite.start(reference, 1, &all)?;
    let server = suite.start(patched, 1, &ours)?;
    let (mut tokens, mut reused, mut drafts) = (0, 0, 0);
    for (i, order) in orders.iter().enumerate() {
        let text: String = order.iter().map(|&p| parts[p]).collect();
        let request = json!({
            "prompt": text, "n_predict": 40, "temperature": 0, "ignore_eos": true, "cache_prompt": true, "return_tokens": true,
        });
        let (a, b) = (ask(stock.client, &request)?, ask(server.client, &request)?);
        ensure!(
            a["tokens"] == b["tokens"] && a["timings"]["cache_n"] == b["timings"]["cache_n"],
            "prompt {i} differs:\n  {} after {} reused\n  {} after {} reused",
            a["content"],
            a["timings"]["cache_n"],
            b["content"],
            b["timings"]["cache_n"]
        );
        tokens += a["tokens"].as_array().map_or(0, Vec::len);
        reused += a["timings"]["cache_n"].as_u64().unwrap_or(0);
        drafts += b["timings"]["drex_drafts"].as_u64().unwrap_or(0);
    }
    // The first part alone would be as many.
    ensure!(
        tokens == 40 * orders.len() && reused > 200 && drafts > 20,
        "{tokens} tokens, {reused} of prompts reused, {drafts} drafts"
    );
    println!("        {tokens} tokens equal, {reused} of prompts reused, {drafts} drafts");
    Ok(())
}

/// What is loaded again when a server wakes is what it was: model, adapter, engine and fill.
fn slept(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let temp = TempDir::unlocked("slept")?;
    let adapter = temp.path().join("adapter.gguf");
    write_adapter(&adapter)?;
    let adapter = adapter.to_string_lossy();
    let all = [EXACT, &["--lora", &adapter]].concat();
    let requests: Vec<_> = (0..4).map(|i| greedy(&prompt(i), 40)).collect();
    let unpatched = generate(suite.start(reference, 1, &all)?.client, &requests, 1)?;
    let exits = ["--drex-policy", "hold", "--drex-fill", "verify"];
    let sleeps = ["--drex-threshold", "0.4", "--sleep-idle-seconds", "1"];
    let server = suite.start(patched, 4, &[&all[..], &exits, &sleeps].concat())?;
    for nap in 0..3 {
        let got = generate(server.client, &requests, 4)?;
        equal(&format!("after {nap} naps"), &unpatched, &got)?;
        let (judged, _) = drafts(&got);
        ensure!(judged > 20, "after {nap} naps there are {judged} drafts");
        until_asleep(server.client)?;
    }
    Ok(())
}
