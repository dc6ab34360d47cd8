// SPDX-License-Identifier: Apache-2.0

//! Exits that `cargo xtask tune` fits to the bundled model: what it says of them is what they do in the engine.
//!
//! The tuner computes agreement with arithmetic of its own, from states that were harvested. Here the engine runs text that
//! the tuner did not fit on through the exits of the file.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Llama, Suite, Test, exits, generate, greedy, prompt};
use crate::{
    cache::{self, Cache},
    cargo::cargo,
    process,
};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![Test::new(
        "exits: fitted ones do in the engine what the tuner says of them",
        fitted,
    )]
};

/// Text of the bundled model's kind, and text to judge on.
fn texts() -> Result<(String, String)> {
    let path = cache::repo().join("demo/corpus.txt");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let most = text.len() * 3 / 4;
    let at = (0..=most).rev().find(|&i| text.is_char_boundary(i));
    let (fit, other) = text.split_at(at.unwrap_or_default());
    Ok((fit.to_owned(), other.to_owned()))
}

fn tune(suite: &Suite, engine: &Path, folder: &Path) -> Result<(PathBuf, Value)> {
    let (fit, other) = texts()?;
    fs::write(folder.join("fit.txt"), fit)?;
    fs::write(folder.join("other.txt"), other)?;
    let file = folder.join("model.exits.gguf");
    let mut command = cargo();
    command
        .args([
            "run",
            "--quiet",
            "--release",
            "--package",
            "drex-tune",
            "--",
        ])
        .arg("--engine")
        .arg(engine)
        .arg("-m")
        .arg(&suite.model)
        .arg("--text")
        .arg(folder.join("fit.txt"))
        .arg("--held-out")
        .arg(folder.join("other.txt"))
        .arg("--work")
        .arg(folder.join("work"))
        .arg("-o")
        .arg(&file)
        .args(["--tokens", "8000", "--layers", "8", "--refine", "1"])
        .args(["--passes", "1", "--head-tokens", "1024", "--json"]);
    let out = process::output(&mut command)?;
    let last = out.lines().last().context("the tuner printed nothing")?;
    let said = serde_json::from_str(last).context("the tuner's last line is no JSON")?;
    Ok((file, said))
}

/// Runs a subcommand of the engine's program over a text.
fn ask(engine: &Path, args: &[&str], model: &Path, input: Vec<u8>) -> Result<String> {
    let mut child = Command::new(engine)
        .arg(args[0])
        .arg("-m")
        .arg(model)
        .args(&args[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let out = child.wait_with_output()?;
    let _ = writer.join();
    ensure!(out.status.success(), "{args:?} failed ({})", out.status);
    Ok(String::from_utf8(out.stdout)?)
}

fn fitted(suite: &Suite) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("drex-tuner-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let result = fitted_in(suite, &folder);
    fs::remove_dir_all(&folder)?;
    result
}

fn fitted_in(suite: &Suite, folder: &Path) -> Result<()> {
    let cache = Cache::open()?;
    let engine = Llama::open(&cache, None)?.tune_engine(&suite.patched.0)?;
    let (file, said) = tune(suite, &engine, folder)?;

    let text = fs::read(folder.join("other.txt"))?;
    let lines = ask(&engine, &["tokens"], &suite.model, text)?;
    // As many as an eighth of the tokens takes.
    let few: String = lines.split_inclusive('\n').take(2).collect();
    let path = file.to_string_lossy();
    let scores = ask(
        &engine,
        &["score", "--exits", &path],
        &suite.model,
        few.into_bytes(),
    )?;
    let listed = said["exits"].as_array().context("no exits")?;
    ensure!(!listed.is_empty(), "no exits in {said}");
    for exit in listed {
        let layer = exit["layer"].to_string();
        let of: Vec<bool> = scores
            .lines()
            .filter_map(|l| l.strip_prefix(&format!("{layer} ")))
            .map(|l| l.starts_with('1'))
            .collect();
        let right = of.iter().filter(|r| **r).count() as f64 / of.len().max(1) as f64;
        let number = |name: &str| exit[name].as_f64().with_context(|| format!("no {name}"));
        let (told, ece) = (number("held_out_agreement")?, number("held_out_ece")?);
        ensure!(
            of.len() > 1000 && (right - told).abs() < 0.05 && right > 0.4,
            "after {layer} the engine agrees in {right:.3} of {} tokens, the tuner said {told:.3}",
            of.len()
        );
        ensure!(ece < 0.06, "after {layer} the calibration error is {ece}");
        println!(
            "        after {layer}: agreement {right:.3} in the engine, {told:.3} said, calibration error {ece:.3}"
        );
    }
    // A server takes the file, and rows leave through it.
    let flags = ["--drex-policy", "hold", "--drex-fill", "verify"];
    let with = ["--drex-exits", &path, "--drex-threshold", "0.7"];
    let server = suite.start(&suite.patched, 4, &[&flags[..], &with].concat())?;
    let requests: Vec<_> = (0..8).map(|i| greedy(&prompt(i), 40)).collect();
    let done = generate(server.client, &requests, 4)?;
    let left: u64 = done.iter().flat_map(exits).sum();
    let metrics = server.client.metrics()?;
    let accepted = metrics.get("drex_drafts_accepted_total").unwrap_or(0.0);
    ensure!(
        left > 40 && accepted > 20.0,
        "{left} rows left early, {accepted} drafts accepted"
    );
    Ok(())
}
