// SPDX-License-Identifier: Apache-2.0

//! Policy `auto` in the server: what it learns survives a restart, what it saw can be replayed, deadlines and priorities
//! are counted and kept.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Suite, Test, exits, generate, greedy, prompt};
use crate::cargo::cargo;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("auto shows its rule; a recording of it replays", record),
        Test::new("a recording of verified drafts replays", record_drafts),
        Test::new("learned costs are kept, broken ones refused", profile),
        Test::new("late tokens are counted, by where the time went", deadlines),
        Test::new("a request of high priority is done sooner", priority),
    ]
};

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("drex-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The file's tokens, drafts taken back and all, are those that the clients got.
fn record_drafts(suite: &Suite) -> Result<()> {
    let folder = Folder::new("record-drafts")?;
    let path = folder.file("traffic.jsonl");
    let flags = [
        "--drex-policy",
        "hold",
        "--drex-exit-layers",
        "4,8",
        "--drex-threshold",
        "0.4",
        "--drex-fill",
        "verify",
        "--drex-record",
        &path,
    ];
    let server = suite.start(&suite.patched, 4, &flags)?;
    let requests: Vec<_> = (0..16).map(|i| greedy(&prompt(i), 40 + i as u32)).collect();
    let done = generate(server.client, &requests, 4)?;
    let metrics = server.client.metrics()?;
    let get = |name: &str| metrics.get(name).with_context(|| format!("no {name}"));
    let share = 100.0 * get("drex_drafts_accepted_total")? / get("drex_drafts_total")?;
    let tokens: u64 = done
        .iter()
        .filter_map(|g| g.last["tokens_predicted"].as_u64())
        .map(|n| n - 1)
        .sum();
    ensure!(server.stop(Duration::from_secs(10))?.success());
    let sim = cargo()
        .args(["run", "--quiet", "--release", "--package", "drex-sim", "--"])
        .args(["--replay", &path, "--policies", "off,hold", "--json"])
        .args(["--fill", "verify", "--tokens", "400"])
        .output()
        .context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&sim.stderr);
    ensure!(sim.status.success(), "drex-sim: {said}");
    for words in [
        " 16 requests, ".to_owned(),
        format!(" {tokens} tokens,"),
        format!("{share:.1} % of the drafts were right"),
    ] {
        ensure!(said.contains(&words), "no '{words}' in: {said}");
    }
    let runs: Value = serde_json::from_slice(&sim.stdout).context("drex-sim --json")?;
    let run = &runs["runs"][1];
    ensure!(
        run["drafts"].as_u64() > Some(50) && run["tokens_per_s"].as_f64() > Some(0.0),
        "{run}"
    );
    Ok(())
}

fn record(suite: &Suite) -> Result<()> {
    let folder = Folder::new("record")?;
    let path = folder.file("traffic.jsonl");
    let flags = [
        "--drex-policy",
        "auto",
        "--drex-exit-layers",
        "8",
        "--drex-threshold",
        "0.6",
        "--drex-record",
        &path,
    ];
    let server = suite.start(&suite.patched, 4, &flags)?;
    let requests: Vec<_> = (0..24).map(|i| greedy(&prompt(i), 48)).collect();
    let done = generate(server.client, &requests, 4)?;
    let exited: u64 = done.iter().flat_map(exits).sum();

    let metrics = server.client.metrics()?;
    for name in [
        "drex_rule_hold_rows",
        "drex_rule_ready_rows",
        "drex_rule_survival",
        "drex_rule_drafts",
        "drex_searches_total",
        "drex_exit_share",
    ] {
        ensure!(metrics.get(name).is_some(), "no {name} in /metrics");
    }
    ensure!(
        metrics.get("drex_searches_total").is_some_and(|n| n >= 1.0),
        "auto never searched"
    );
    let ramps = metrics.by_label("drex_rule_ramp", "ramp");
    ensure!(ramps.len() == 1, "{ramps:?}");
    let predicted = metrics.by_label("drex_predicted_tokens_per_second", "rule");
    ensure!(
        predicted.len() == 2 && predicted.iter().all(|p| p.1 > 0.0),
        "{predicted:?}"
    );
    ensure!(server.stop(Duration::from_secs(10))?.success());

    // Counted by hand from the file, and by the simulator that replays it.
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let (mut tokens, mut out) = (0, 0);
    for (n, line) in text.lines().enumerate().skip(1) {
        let v: Value = serde_json::from_str(line).with_context(|| format!("{path}:{}", n + 1))?;
        if v["e"] != "step" {
            continue;
        }
        let rows = v["ids"].as_array().map_or(0, Vec::len);
        let exit = v["exit"].as_array().into_iter().flatten();
        let exit = exit.filter(|e| e.as_u64() == Some(1)).count();
        out += exit;
        tokens += if v["end"] == 16 { rows } else { exit };
    }
    ensure!(
        out as u64 == exited && tokens >= 24 * 47,
        "the file tells of {tokens} tokens, {out} of them early; the answers of {exited}"
    );
    let sim = cargo()
        .args(["run", "--quiet", "--release", "--package", "drex-sim", "--"])
        .args(["--replay", &path, "--policies", "off,auto", "--json"])
        .output()
        .context("cannot run cargo")?;
    ensure!(
        sim.status.success(),
        "drex-sim: {}",
        String::from_utf8_lossy(&sim.stderr)
    );
    let runs: Value = serde_json::from_slice(&sim.stdout).context("drex-sim --json")?;
    let text = runs.to_string();
    let runs = runs["runs"].as_array().context(text.clone())?;
    ensure!(runs.len() == 2, "{text}");
    for run in runs {
        ensure!(
            run["finished"] == 24 && run["tokens"] == tokens as u64,
            "{text}"
        );
    }
    Ok(())
}

fn profile(suite: &Suite) -> Result<()> {
    let folder = Folder::new("profile")?;
    let path = folder.file("costs.json");
    let flags = ["--drex-policy", "auto", "--drex-profile", &path];
    let requests: Vec<_> = (0..12).map(|i| greedy(&prompt(i), 32)).collect();
    let mut before = Value::Null;
    for round in 0..2 {
        let server = suite.start(&suite.patched, 4, &flags)?;
        generate(server.client, &requests, 4)?;
        ensure!(server.stop(Duration::from_secs(10))?.success());
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        let v: Value = serde_json::from_str(&text).context(text)?;
        ensure!(
            v["n_layers"] == 16 && v["segments"].as_array().is_some_and(|s| s.len() == 4),
            "round {round}: {v}"
        );
        ensure!(v != before, "round {round}: nothing was learned");
        before = v;
    }
    let good = before;
    let mut wrong = good.clone();
    wrong["segments"][1]["ns_per_row"] = json!(-1);
    let mut other = good;
    other["n_layers"] = json!(24);
    for (text, expect) in [
        ("{".to_owned(), "JSON"),
        (wrong.to_string(), "ns_per_row"),
        (other.to_string(), "n_layers"),
    ] {
        fs::write(&path, &text)?;
        let Err(error) = suite.start(&suite.patched, 4, &flags) else {
            anyhow::bail!("the server started with {text}");
        };
        let error = format!("{error:#}");
        ensure!(
            error.contains("--drex-profile") && error.contains(expect),
            "{error}"
        );
        ensure!(fs::read_to_string(&path)? == text, "the file was changed");
    }
    let nowhere = folder.file("no/such/folder");
    let started = suite.start(
        &suite.patched,
        4,
        &["--drex-policy", "auto", "--drex-record", &nowhere],
    );
    ensure!(
        started.is_err_and(|e| format!("{e:#}").contains("--drex-record")),
        "the server started with a record file that cannot be"
    );
    Ok(())
}

fn deadlines(suite: &Suite) -> Result<()> {
    let server = suite.start(&suite.patched, 8, &["--drex-policy", "auto"])?;
    // Nobody makes a token in a microsecond, or a request of 32 in a millisecond; an hour is enough for all.
    for (key, value, late) in [
        ("drex_deadline_ms", 0.001, true),
        ("drex_request_deadline_ms", 0.5, true),
        ("drex_deadline_ms", 3.6e6, false),
        ("drex_request_deadline_ms", 3.6e6, false),
    ] {
        let count = || -> Result<(f64, usize)> {
            let m = server.client.metrics()?;
            let all = m.by_label("drex_deadline_misses_total", "reason");
            Ok((all.iter().map(|m| m.1).sum(), all.len()))
        };
        let (before, reasons) = count()?;
        ensure!(reasons == 4, "{reasons} reasons");
        let requests: Vec<_> = (0..16)
            .map(|i| {
                let mut body = greedy(&prompt(i), 32);
                body[key] = json!(value);
                body
            })
            .collect();
        let done = generate(server.client, &requests, 8)?;
        let told: f64 = done
            .iter()
            .filter_map(|g| g.last["timings"]["drex_deadline_misses"].as_f64())
            .sum();
        let missed = count()?.0 - before;
        // The first token comes with the prompt; a request deadline is missed once or for each token that comes after it.
        let expect = 16.0 * 31.0;
        ensure!(
            missed == told
                && if late {
                    missed >= 16.0 && missed <= expect
                } else {
                    missed == 0.0
                },
            "{key} = {value}: {missed} late tokens counted, {told} told"
        );
        if key == "drex_deadline_ms" && late {
            ensure!(missed == expect, "{missed} of {expect} tokens late");
        }
    }
    Ok(())
}

/// Windows of two rows for eight requests: four of them are in a hurry.
fn priority(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "auto", "--drex-max-batch", "2"];
    let server = suite.start(&suite.patched, 8, &flags)?;
    let requests: Vec<_> = (0..8)
        .map(|i| {
            let mut body = greedy(&prompt(i), 96);
            body["drex_priority"] = json!(if i % 2 == 0 { 5 } else { 0 });
            body
        })
        .collect();
    let done = generate(server.client, &requests, 8)?;
    let mean = |rest: usize| -> f64 {
        let own = done.iter().skip(rest).step_by(2);
        own.filter_map(|g| g.last["timings"]["predicted_ms"].as_f64())
            .sum::<f64>()
            / 4.0
    };
    ensure!(
        mean(0) < 0.9 * mean(1),
        "{:.0} ms with priority, {:.0} ms without",
        mean(0),
        mean(1)
    );
    Ok(())
}
