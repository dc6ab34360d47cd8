// SPDX-License-Identifier: Apache-2.0

//! Exits in a file beside the model (`--drex-exits`): heads over some of the tokens, calibrated confidences, files that are
//! refused.
//!
//! The exits here are the bundled model's own final norm: it was trained to exit through it, so its rows do leave.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::{cache, models};
use drex_harness::exits::own;
use serde_json::{Value, json};

use super::{
    Build, EXACT, Suite, Test, bad_input::refused, equal, exact::builds, exits, generate, greedy,
    program, prompt,
};
use crate::{client::Client, gguf, load::Generation, process, server::Server};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("exits: arithmetic, and files that are refused", arithmetic),
        Test::new(
            "exits: rows leave with tokens of the exits' head alone",
            head_of_two,
        ),
        Test::new(
            "exits: calibrated confidences meet the thresholds",
            calibrated,
        ),
        Test::new(
            "exits: every fill, sampled and with probabilities",
            every_fill,
        ),
        Test::new(
            "exits: files that do not fit are refused at start",
            files_that_do_not_fit,
        ),
        Test::new(
            "exact: lossless: exits with verify equal unpatched",
            lossless,
        )
        .exact(),
        Test::new(
            "exact: lossless: 200 chats with SmolLM2's fitted exits equal unpatched",
            chats,
        )
        .exact()
        .long(),
    ]
};

/// A folder for the files of a test, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("drex-exits-{test}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    /// Writes exits after these layers, with a head over these tokens: `all`, `all-5` (each fifth is left out), or numbers.
    fn exits(
        &self,
        suite: &Suite,
        layers: &str,
        tokens: &str,
        shift: Option<f32>,
    ) -> Result<PathBuf> {
        let file = self.0.join("own.exits.gguf");
        let exits_test = program(&suite.patched, "exits-test")?;
        own(exits_test, &suite.model, &file, layers, tokens, shift)?;
        Ok(file)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn start(
    suite: &Suite,
    build: &Build,
    slots: usize,
    file: &Path,
    flags: &[&str],
) -> Result<Server> {
    let exits = ["--drex-exits", &file.to_string_lossy()];
    suite.start(build, slots, &[&exits[..], flags].concat())
}

fn left(generation: &Generation) -> u64 {
    exits(generation).iter().sum()
}

fn arithmetic(suite: &Suite) -> Result<()> {
    let folder = Folder::new("test")?;
    let mut command = Command::new(program(&suite.patched, "exits-test")?);
    let text = process::output(
        process::spin_briefly(&mut command)
            .arg(&suite.model)
            .arg(&folder.0),
    )?;
    println!("        {}", text.lines().last().unwrap_or_default());
    Ok(())
}

/// Every row leaves at the first ramp, whose head has two tokens: no other can be emitted.
fn head_of_two(suite: &Suite) -> Result<()> {
    let folder = Folder::new("two")?;
    let server = suite.start(&suite.reference, 1, &[])?;
    let mut two: Vec<i64> = Vec::new();
    let mut other = None;
    for token in &generate(server.client, &[greedy(&prompt(0), 64)], 1)?[0].tokens {
        if two.len() < 2 && !two.contains(token) {
            two.push(*token);
        } else if !two.contains(token) {
            other = Some(*token);
        }
    }
    drop(server);
    two.sort_unstable();
    let [a, b] = two[..] else {
        bail!("the model repeats one token")
    };
    let other = other.context("the model repeats two tokens")?;

    let file = folder.exits(suite, "4", &format!("{a},{b}"), None)?;
    let flags = ["--drex-policy", "latency", "--drex-threshold", "0"];
    let server = start(suite, &suite.patched, 4, &file, &flags)?;
    let ask = |change: &dyn Fn(&mut Value)| -> Result<Vec<Generation>> {
        let requests: Vec<_> = (0..8)
            .map(|i| {
                let mut request = greedy(&prompt(i), 24);
                change(&mut request);
                request
            })
            .collect();
        let done = generate(server.client, &requests, 4)?;
        for (i, g) in done.iter().enumerate() {
            ensure!(
                g.tokens.len() == 24 && left(g) == 23,
                "request {i}: {} of {} tokens left early, expected all but the prompt's",
                left(g),
                g.tokens.len()
            );
            ensure!(
                g.tokens[1..].iter().all(|t| two.contains(t)),
                "request {i}: {:?} are not all among {two:?}",
                g.tokens
            );
        }
        Ok(done)
    };
    let plain = ask(&|_| ())?;
    let first = plain[0].tokens[1];
    ask(&|r| {
        r["temperature"] = json!(1.0);
        r["seed"] = json!(7);
    })?;
    // What cannot be emitted has no logit at the ramp, wherever its token stands in the head.
    let second = if first == a { b } else { a };
    for g in ask(&|r| r["logit_bias"] = json!([[first, false]]))? {
        ensure!(
            g.tokens[1..].iter().all(|t| *t == second),
            "{first} is banned: {:?}",
            g.tokens
        );
    }
    let same = ask(&|r| r["logit_bias"] = json!([[other, false]]))?;
    let after = |all: &[Generation]| {
        all.iter()
            .map(|g| g.tokens[1..].to_vec())
            .collect::<Vec<_>>()
    };
    let differing = after(&same)
        .iter()
        .zip(&after(&plain))
        .zip(same.iter().zip(&plain))
        .filter(|((a, b), (s, p))| s.tokens[0] == p.tokens[0] && a != b)
        .count();
    ensure!(
        differing == 0,
        "{other} is banned, which no exit has: {differing} streams differ"
    );
    // The probabilities are those of the two.
    let mut request = greedy(&prompt(1), 8);
    request["n_probs"] = json!(2);
    let answer = server.client.post("/completion", &request)?.ok()?.json()?;
    let all = answer["completion_probabilities"]
        .as_array()
        .context("no probabilities")?;
    for token in &all[1..] {
        let top = token["top_logprobs"]
            .as_array()
            .context("no top_logprobs")?;
        let mut ids: Vec<_> = top.iter().filter_map(|t| t["id"].as_i64()).collect();
        ids.sort_unstable();
        let sum: f64 = top
            .iter()
            .filter_map(|t| t["logprob"].as_f64())
            .map(f64::exp)
            .sum();
        ensure!(ids == [a, b] && (sum - 1.0).abs() < 1e-3, "{token}");
    }
    ensure!(all.len() == 8, "{} probabilities", all.len());
    Ok(())
}

/// The same exits with a calibration that makes every token sure, and with one that makes none.
fn calibrated(suite: &Suite) -> Result<()> {
    let folder = Folder::new("calibrated")?;
    let requests: Vec<_> = (0..4).map(|i| greedy(&prompt(i), 24)).collect();
    for (shift, threshold, expected) in [(20.0, "0.99", 4 * 23), (-20.0, "0.01", 0)] {
        let file = folder.exits(suite, "4,8", "all", Some(shift))?;
        let flags = ["--drex-policy", "latency", "--drex-threshold", threshold];
        let server = start(suite, &suite.patched, 4, &file, &flags)?;
        let done = generate(server.client, &requests, 4)?;
        let total: u64 = done.iter().map(left).sum();
        ensure!(
            total == expected,
            "with shift {shift} and threshold {threshold} {total} tokens left, expected {expected}"
        );
    }
    Ok(())
}

fn every_fill(suite: &Suite) -> Result<()> {
    let folder = Folder::new("fills")?;
    let file = folder.exits(suite, "4,8", "all-5", None)?;
    let flags = ["--drex-policy", "hold", "--drex-threshold", "0.6"];
    let server = start(suite, &suite.patched, 8, &file, &flags)?;
    let modes = ["copy", "postfill", "verify", "propagate"];
    let requests: Vec<_> = (0..32)
        .map(|i| {
            let mut request = greedy(&prompt(i), 40);
            request["drex_fill"] = json!(modes[i % 4]);
            if i % 8 >= 4 {
                request["temperature"] = json!(0.7);
                request["seed"] = json!(i);
                request["n_probs"] = json!(5);
            }
            request
        })
        .collect();
    let done = generate(server.client, &requests, 8)?;
    let mut exited = [0; 4];
    for (i, g) in done.iter().enumerate() {
        ensure!(
            g.tokens.len() == 40,
            "request {i}: {} tokens",
            g.tokens.len()
        );
        exited[i % 4] += left(g);
    }
    ensure!(
        exited.iter().all(|&n| n > 20),
        "exits of {modes:?}: {exited:?}"
    );
    let metrics = server.client.metrics()?;
    let get = |name: &str| metrics.get(name).with_context(|| format!("no {name}"));
    let (judged, accepted) = (
        get("drex_drafts_total")?,
        get("drex_drafts_accepted_total")?,
    );
    ensure!(
        accepted > 0.5 * judged && accepted <= judged,
        "{accepted} of {judged} drafts accepted"
    );
    Ok(())
}

fn files_that_do_not_fit(suite: &Suite) -> Result<()> {
    let folder = Folder::new("refused")?;
    let path = folder.exits(suite, "4,8", "all-5", None)?;
    let bytes = fs::read(&path)?;
    let on = ["--drex-policy", "auto"];
    let with = |name: &str, bytes: &[u8], more: &[&str]| -> Result<Result<Server>> {
        let path = folder.0.join(name);
        fs::write(&path, bytes)?;
        let flags = [&on, more].concat();
        Ok(start(suite, &suite.patched, 2, &path, &flags))
    };
    // The first digit of the hash, behind the key, the type of the value and its length.
    let key = b"exits.model.hash";
    let at = bytes
        .windows(key.len())
        .position(|w| w == key)
        .context("no hash")?;
    let mut hash = bytes.clone();
    hash[at + key.len() + 4 + 8] ^= 1;
    refused(
        with("hash.gguf", &hash, &[])?,
        "another model's hash",
        &[
            "--drex-exits",
            "is for another model",
            "exits.model.hash is",
        ],
    )?;
    refused(
        with("short.gguf", &bytes[..bytes.len() - 4096], &[])?,
        "a file that is cut short",
        &["--drex-exits", "ends behind the file's end"],
    )?;
    refused(
        with("text.gguf", b"no such thing", &[])?,
        "a text",
        &["--drex-exits", "is no GGUF file"],
    )?;
    refused(
        start(suite, &suite.patched, 2, Path::new("/nowhere"), &on),
        "a file that is not there",
        &["--drex-exits /nowhere is no GGUF file, or cannot be read"],
    )?;
    refused(
        with("layers.gguf", &bytes, &["--drex-exit-layers", "5"])?,
        "a layer that has no exit",
        &[
            "--drex-exits",
            "no exit after layer 5 of --drex-exit-layers",
        ],
    )?;
    let path = folder.exits(suite, "4,8", "all-5", Some(f32::NAN))?;
    refused(
        start(suite, &suite.patched, 2, &path, &on),
        "a calibration that is no number",
        &["--drex-exits", "exits.calibration has the scale"],
    )?;
    // The same file beside the first half of the model.
    let cut = folder.0.join("cut.gguf");
    let edit = gguf::Edit {
        layers: Some(8),
        ..Default::default()
    };
    gguf::rewrite(&suite.model, &cut, &edit)?;
    let cut = cut.to_string_lossy();
    let flags = [&on[..], &["-m", &cut]].concat();
    refused(
        with("half.gguf", &bytes, &flags[2..])?,
        "half of the model",
        &[
            "is for another model",
            "exits.model.block_count is 16, the model's is 8",
        ],
    )
}

fn lossless(suite: &Suite) -> Result<()> {
    let folder = Folder::new("lossless")?;
    let (reference, patched) = builds(suite)?;
    let file = folder.exits(suite, "4,8", "all-5", None)?;
    let requests: Vec<_> = (0..32)
        .map(|i| {
            let mut request = greedy(&prompt(i), 48);
            if i % 3 == 1 {
                request["temperature"] = json!(0.8);
                request["seed"] = json!(i);
            }
            request
        })
        .collect();
    let expected = generate(
        suite.start(reference, requests.len(), EXACT)?.client,
        &requests,
        1,
    )?;
    let (mut drafts, mut accepted) = (0.0, 0.0);
    for threshold in ["0.2", "0.7"] {
        let flags = [
            "--drex-policy",
            "hold",
            "--drex-fill",
            "verify",
            "--drex-threshold",
            threshold,
        ];
        let server = start(
            suite,
            patched,
            requests.len(),
            &file,
            &[EXACT, &flags].concat(),
        )?;
        let got = generate(server.client, &requests, 8)?;
        equal(&format!("threshold {threshold}"), &expected, &got)?;
        let metrics = server.client.metrics()?;
        drafts += metrics.get("drex_drafts_total").unwrap_or(0.0);
        accepted += metrics.get("drex_drafts_accepted_total").unwrap_or(0.0);
    }
    ensure!(
        accepted > 300.0 && accepted < drafts,
        "{accepted} of {drafts} drafts accepted: too few to test anything"
    );
    println!(
        "        {} requests compared with the unpatched server's, all equal; {accepted} of {drafts} drafts accepted",
        2 * requests.len()
    );
    Ok(())
}

/// How the questions of the demo's chat are asked, so that there are five of each.
const WAYS: [&str; 5] = [
    "",
    " Answer in one sentence.",
    " Explain it to a child.",
    " Give me a list.",
    " Please be precise.",
];

/// So many requests are served by one server, each in a slot of its own.
const PART: usize = 50;

/// Greedy ones and ones with a seed, ended by the model.
fn chat_requests(client: Client, questions: &[String]) -> Result<Vec<Value>> {
    let mut requests = Vec::new();
    for (i, question) in questions.iter().enumerate() {
        let body = json!({"messages": [{"role": "user", "content": question}]});
        let answer = client.post("/apply-template", &body)?.ok()?.json()?;
        let mut request = greedy(answer["prompt"].as_str().context("no prompt")?, 32);
        request["ignore_eos"] = json!(false);
        if i % 2 == 1 {
            request["temperature"] = json!(0.8);
            request["seed"] = json!(i);
        }
        requests.push(request);
    }
    Ok(requests)
}

fn chats(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let model = models::smollm2(&suite.cache)?;
    let (model, exits) = (
        model.to_string_lossy(),
        cache::repo().join("demo/smollm2.exits.gguf"),
    );
    let text = fs::read_to_string(cache::repo().join("demo/chat.txt"))?;
    let questions: Vec<String> = WAYS
        .iter()
        .flat_map(|way| text.lines().map(move |line| format!("{line}{way}")))
        .collect();
    ensure!(questions.len() == 200, "{} questions", questions.len());
    let (mut tokens, mut drafts, mut accepted) = (0, 0.0, 0.0);
    for part in questions.chunks(PART) {
        let flags = [EXACT, &["-m", &model]].concat();
        let server = suite.start(reference, part.len(), &flags)?;
        let requests = chat_requests(server.client, part)?;
        let expected = generate(server.client, &requests, 8)?;
        drop(server);
        let verify = ["--drex-policy", "hold", "--drex-fill", "verify"];
        let server = start(
            suite,
            patched,
            part.len(),
            &exits,
            &[&flags[..], &verify, &["--drex-threshold", "0.5"]].concat(),
        )?;
        let got = generate(server.client, &requests, 8)?;
        tokens += equal(&format!("from {:?} on", part[0]), &expected, &got)?;
        let metrics = server.client.metrics()?;
        drafts += metrics.get("drex_drafts_total").unwrap_or(0.0);
        accepted += metrics.get("drex_drafts_accepted_total").unwrap_or(0.0);
    }
    ensure!(
        accepted > 300.0 && accepted < drafts,
        "{accepted} of {drafts} drafts accepted: too few to test anything"
    );
    println!(
        "        {} chats ({tokens} tokens) compared with the unpatched server's, all equal; {accepted} of {drafts} drafts \
         accepted",
        questions.len()
    );
    Ok(())
}
