// SPDX-License-Identifier: Apache-2.0

//! Bit-exact comparison: in the exact builds the result for a row does not depend on the batch it is in, so that streams
//! can be compared token for token.

use std::fs;

use anyhow::{Context, Result, ensure};

use serde_json::json;

use super::{Build, EXACT, Suite, Test, drafts, equal, generate, greedy, prompt};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "exact builds load the exact libggml-cpu",
            loads_exact_library,
        )
        .exact(),
        Test::new("exact: unpatched batched equals unpatched alone", |suite| {
            let (reference, _) = builds(suite)?;
            compare(suite, reference, &[], "unpatched")
        })
        .exact(),
        Test::new("exact: patched without exits equals unpatched", |suite| {
            compare(
                suite,
                &builds(suite)?.1,
                &["--drex-policy", "off"],
                "policy off",
            )
        })
        .exact(),
        Test::new(
            "exact: lossless: verified output equals unpatched",
            lossless,
        )
        .exact(),
    ]
};

pub fn builds(suite: &Suite) -> Result<&(Build, Build)> {
    suite
        .exact
        .as_ref()
        .ok_or_else(|| anyhow::anyhow!("there are no exact builds"))
}

/// The runtime folders are mixed from two builds: make sure that it is the right library that a server has mapped.
fn loads_exact_library(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    for build in [reference, patched] {
        // What it was built with is said at a higher verbosity than the usual one.
        let server = suite.start(build, 1, &["-lv", "4"])?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", server.pid()))?;
        let libraries: Vec<_> = maps
            .lines()
            .filter_map(|l| l.find('/').map(|at| &l[at..]))
            .collect();
        let cpu: Vec<_> = libraries
            .iter()
            .filter(|l| l.contains("/libggml-cpu.so"))
            .collect();
        ensure!(
            !cpu.is_empty()
                && cpu
                    .iter()
                    .all(|l| l.starts_with(&*build.0.dir.to_string_lossy())),
            "{cpu:?}"
        );
        let log = server.log();
        let info = log.lines().find(|line| line.contains("system_info"));
        let info = info.context("the server does not say what it was built with")?;
        // The names alone are in every build's library; what counts is what it says that it has.
        ensure!(
            !info.contains("LLAMAFILE = 1") && !info.contains("REPACK = 1"),
            "{}: {info}",
            build.0.kind.name()
        );
    }
    Ok(())
}

/// The same requests to the unpatched server, one at a time, and to this one, eight at a time.
fn compare(suite: &Suite, build: &Build, args: &[&str], what: &str) -> Result<()> {
    let (reference, _) = builds(suite)?;
    let count = 64;
    let starts = [
        "Returns the",
        "# Examples\n\n",
        "A closure can",
        "impl Display for",
        "The compiler",
        "fn main() {\n",
    ];
    let requests: Vec<_> = (0..count)
        .map(|i| {
            greedy(
                &format!("{} {i}", starts[i % starts.len()]),
                32 + (i as u32 % 5) * 16,
            )
        })
        .collect();
    let alone = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1);
    let alone = alone?;
    let server = suite.start(build, requests.len(), &[EXACT, args].concat())?;
    let together = generate(server.client, &requests, 8)?;
    let tokens = equal(what, &alone, &together)?;
    println!(
        "        {what}: {} requests, {tokens} tokens compared, all equal",
        alone.len()
    );
    Ok(())
}

/// Fill `verify`: whatever leaves early, every stream is the unpatched server's, greedy or sampled with a seed, one at a
/// time or 32.
fn lossless(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let requests = || -> Vec<_> {
        let all = (0..40).map(|i| {
            let mut request = greedy(&prompt(i), 24 + (i as u32 % 5) * 12);
            match i % 4 {
                1 => {
                    request["temperature"] = json!(0.8);
                    request["seed"] = json!(i);
                }
                2 => request["ignore_eos"] = json!(false),
                _ => {}
            }
            request
        });
        all.collect()
    };
    let requests = requests();
    let alone = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1)?;
    let (mut streams, mut tokens, mut all, mut accepted) = (0, 0, 0, 0);
    let loads = [(1, "hold"), (8, "auto"), (32, "art")];
    for (k, threshold) in ["0.3", "0.5", "0.7", "0.9", "0.99"].iter().enumerate() {
        // One load for each threshold, or all.
        let few = [loads[k % loads.len()]];
        for &(n, policy) in if suite.long { &loads[..] } else { &few } {
            let flags = [
                "--drex-policy",
                policy,
                "--drex-threshold",
                threshold,
                "--drex-fill",
                "verify",
            ];
            // slots enough that no request gets a cell that another had
            let server = suite.start(patched, requests.len(), &[EXACT, &flags].concat())?;
            let got = generate(server.client, &requests, n)?;
            let what = format!("threshold {threshold}, {n} at a time, {policy}");
            tokens += equal(&what, &alone, &got)?;
            streams += got.len();
            let (judged, stood) = drafts(&got);
            all += judged;
            accepted += stood;
        }
    }
    ensure!(
        all > 700 && accepted > all / 2 && accepted < all,
        "{accepted} of {all} drafts accepted: too few to test anything"
    );
    println!(
        "        {streams} requests, {tokens} tokens at 1, 8 and 32 in flight compared with the unpatched server, all equal; \
         {accepted} of {all} drafts accepted"
    );
    Ok(())
}
