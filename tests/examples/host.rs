// SPDX-License-Identifier: Apache-2.0

//! What `host.cpp` must do by its own arithmetic, which gives a row the same result in every batch: here equal means equal.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, ensure};
use drex_build::{cache, process};
use serde::Deserialize;

use super::Kit;

/// One request's line.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Stream {
    pub id: u64,
    pub cancelled: bool,
    pub prompt: Vec<i64>,
    pub output: Vec<i64>,
    /// How many layers each token saw.
    pub layers: Vec<u32>,
    /// At the first ramp; none where it met no ramp.
    pub confidence: Vec<Option<f64>>,
    pub nll: Vec<f64>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Totals {
    pub tokens: u64,
    pub exits: u64,
    pub held_max: u64,
    pub held: u64,
    pub slots: u64,
    pub slots_free: u64,
    pub involuntary_exits: u64,
    pub drafts: u64,
    pub drafts_accepted: u64,
    pub failed: u64,
    pub windows: u64,
}

/// Lengths that differ, so that requests come and go while others run.
const LENGTHS: &str = "24,8,16,20,12";

pub fn run(kit: &Kit, program: &str, args: &[&str]) -> Result<(Vec<Stream>, Totals)> {
    let prompts = cache::repo().join("demo/prompts.txt");
    run_with(kit, program, &prompts, args)
}

fn run_with(
    kit: &Kit,
    program: &str,
    prompts: &Path,
    args: &[&str],
) -> Result<(Vec<Stream>, Totals)> {
    let mut command = kit.command(program);
    command.arg("--json").arg("-f").arg(prompts).args(args);
    let text = process::output(&mut command)?;
    let mut lines: Vec<&str> = text.lines().collect();
    let totals: Totals = serde_json::from_str(lines.pop().context("host printed nothing")?)?;
    let streams = lines
        .iter()
        .map(|line| serde_json::from_str(line))
        .collect::<Result<Vec<Stream>, _>>()?;
    ensure!(
        totals.held == 0 && totals.slots_free == totals.slots,
        "rows or slots are left: {totals:?}"
    );
    ensure!(
        totals.involuntary_exits == 0,
        "forced exits under a policy that forces nobody: {totals:?}"
    );
    Ok((streams, totals))
}

pub fn rebatched_is_alone(kit: &Kit) -> Result<()> {
    let (mut tokens, mut exits) = (0, 0);
    let cases = [
        ("copy", "8"),
        ("copy", "4,8,12"),
        ("propagate", "4,8,12"),
        ("postfill", "4,8,12"),
        ("verify", "4,8,12"),
    ];
    for (fill, ramps) in cases {
        let common = [
            "--fill",
            fill,
            "--ramps",
            ramps,
            "-n",
            LENGTHS,
            "--threshold",
            "0.6",
        ];
        let (alone, _) = run(kit, "host", &[&common[..], &["-np", "1"]].concat())?;
        let (rebatched, totals) = run(kit, "host", &[&common[..], &["-np", "8"]].concat())?;
        ensure!(totals.held_max > 1, "nothing was held: {totals:?}");
        for (a, b) in alone.iter().zip(&rebatched) {
            ensure!(
                a == b,
                "{fill}, ramps {ramps}: alone {a:?}\nrebatched {b:?}"
            );
        }
        ensure!(alone.len() == rebatched.len(), "requests are missing");
        tokens += totals.tokens;
        exits += totals.exits;
    }
    println!(
        "        {tokens} tokens, {exits} rows left at a ramp, 8 at a time, equal to the last bit"
    );
    Ok(())
}

pub fn verify_is_lossless(kit: &Kit) -> Result<()> {
    let (full, _) = run(kit, "host", &["--policy", "off", "-n", LENGTHS])?;
    let (copied, _) = run(kit, "host", &["-n", LENGTHS, "--threshold", "0.3"])?;
    let outputs = |streams: &[Stream]| -> Vec<Vec<i64>> {
        streams.iter().map(|s| s.output.clone()).collect()
    };
    ensure!(
        outputs(&full) != outputs(&copied),
        "state-copy changed nothing: there is nothing to see here"
    );
    let mut replaced = 0;
    for threshold in ["0.2", "0.5", "0.8"] {
        let (streams, totals) = run(
            kit,
            "host",
            &[
                "--fill",
                "verify",
                "--ramps",
                "4,8",
                "--threshold",
                threshold,
                "-n",
                LENGTHS,
                "-np",
                "8",
            ],
        )?;
        for (a, b) in full.iter().zip(&streams) {
            ensure!(
                a.output == b.output,
                "threshold {threshold}: the full model's {:?}\nverify's {:?}",
                a.output,
                b.output
            );
        }
        replaced += totals.drafts - totals.drafts_accepted;
    }
    ensure!(replaced > 10, "only {replaced} drafts were ever wrong");
    println!("        {replaced} drafts were wrong, and replaced");
    Ok(())
}

pub fn cancel(kit: &Kit) -> Result<()> {
    for fill in ["copy", "verify"] {
        let common = ["-n", LENGTHS, "-np", "8", "--fill", fill];
        let (whole, _) = run(kit, "host", &common)?;
        let whole: BTreeMap<u64, Stream> = whole.into_iter().map(|s| (s.id, s)).collect();
        let leave = [
            "--cancel", "0:9", "--cancel", "2:1", "--cancel", "3:12", "--cancel", "7:5",
        ];
        let (streams, _) = run(kit, "host", &[&common[..], &leave].concat())?;
        ensure!(streams.len() == whole.len(), "requests are missing");
        for stream in streams {
            let all = &whole[&stream.id];
            if stream.cancelled {
                let n = stream.output.len();
                // What has left the model stands, but for drafts, which are nobody's before they are verified.
                ensure!(
                    n < all.output.len() && (fill == "verify" || stream.output == all.output[..n]),
                    "request {} went away after {n} tokens: {stream:?}",
                    stream.id
                );
            } else {
                ensure!(stream == *all, "request {} was disturbed", stream.id);
            }
            ensure!(
                stream.cancelled == [0, 2, 3, 7].contains(&stream.id),
                "request {}: cancelled is {}",
                stream.id,
                stream.cancelled
            );
        }
    }
    Ok(())
}

/// A step that is given up is as if it had never been planned.
pub fn failing_windows(kit: &Kit) -> Result<()> {
    let mut failed = 0;
    for fill in ["copy", "verify"] {
        let common = [
            "-n",
            LENGTHS,
            "-np",
            "8",
            "--ramps",
            "4,8",
            "--fill",
            fill,
            "--threshold",
            "0.6",
        ];
        let (whole, totals) = run(kit, "host", &common)?;
        // One at a time: windows from tokens and from arena rows, early and late. Then many in one run, some twice in a row.
        let last = totals.windows.to_string();
        let many: Vec<String> = (1..totals.windows)
            .filter(|n| n % 3 != 0)
            .map(|n| n.to_string())
            .collect();
        let mut cases: Vec<Vec<&str>> = ["1", "2", "3", "5", "12", &last]
            .iter()
            .map(|n| vec![*n])
            .collect();
        cases.push(many.iter().map(String::as_str).collect());
        for case in cases {
            let fail: Vec<&str> = case.iter().flat_map(|n| ["--fail", n]).collect();
            let (streams, again) = run(kit, "host", &[&common[..], &fail].concat())?;
            ensure!(
                again.failed == case.len() as u64,
                "{fill}, {fail:?}: {again:?}"
            );
            for (a, b) in whole.iter().zip(&streams) {
                ensure!(a == b, "{fill}, {fail:?}: without {a:?}\nwith {b:?}");
            }
            ensure!(whole.len() == streams.len(), "requests are missing");
            // Prompt rows of a window that failed start again at layer 0, so that later windows have other rows: at most one
            // more for each of the requests and each half of a pass.
            let more = again.windows.abs_diff(totals.windows);
            ensure!(
                again.tokens == totals.tokens && more <= 2 * totals.slots * again.failed,
                "{fill}, {fail:?}: {again:?}, without {totals:?}"
            );
            failed += again.failed;
        }
    }
    println!("        {failed} windows failed, and nothing came of it");
    Ok(())
}

pub fn bad_input(kit: &Kit) -> Result<()> {
    let model = fs::read(cache::bundled_model()?)?;
    let short = kit.dir.join("short.gguf");
    fs::write(&short, &model[..model.len() / 2])?;
    let short = short.to_string_lossy().into_owned();
    let cases: [(&[&str], i32, &str); 8] = [
        (&["-m", "nothing.gguf"], 1, "cannot read nothing.gguf"),
        (&["-m", &short], 1, "lies outside of the file"),
        (&["-m", "Cargo.toml"], 1, "not a GGUF file"),
        (&["--ramps", "16"], 1, "drex_create: ramp_layers"),
        (&["--threshold", "nan"], 1, "drex_create: threshold"),
        (&["-n", "600"], 1, "do not fit into a context of 512"),
        (&["--policy", "often"], 2, "--policy: there is no 'often'"),
        (&["-n", "0"], 2, "-n: expected at least 1"),
    ];
    for (args, code, text) in cases {
        let out = kit.command("host").args(args).output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(
            out.status.code() == Some(code) && said.contains(text),
            "host {args:?}: {} and {said:?}, expected {code} and {text:?}",
            out.status
        );
    }
    Ok(())
}

/// Every fill, and a request that goes away, in little.
pub fn sanitized(kit: &Kit) -> Result<()> {
    // The sanitizers are slow: six short prompts.
    let prompts = kit.dir.join("prompts.txt");
    fs::write(
        &prompts,
        "Returns a\nThe\n# Panics\nIf the\nThis is\nlet x\n",
    )?;
    for fill in ["copy", "propagate", "postfill", "verify"] {
        let args = [
            "--fill",
            fill,
            "-n",
            "6,3",
            "-np",
            "8",
            "--cancel",
            "2:2",
            "--fail",
            "2",
            "--fail",
            "9",
            "--threshold",
            "0.4",
        ];
        let (plain, _) = run_with(kit, "host", &prompts, &args)?;
        let (checked, _) = run_with(kit, "host-san", &prompts, &args)?;
        let tokens = |s: &[Stream]| s.iter().map(|s| s.output.clone()).collect::<Vec<_>>();
        ensure!(
            tokens(&plain) == tokens(&checked),
            "{fill}: another compiler flag, another output"
        );
    }
    Ok(())
}
