//! Bit-exact comparison: in the exact builds the result for a row does not depend on the batch it is in, so that streams
//! can be compared token for token.

use std::fs;

use anyhow::{Context, Result, ensure};

use serde_json::json;

use super::{Build, Suite, Test, generate, greedy, program, prompt};
use crate::score;

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

/// What else it takes that a row's result does not depend on its company. A quantised KV cache: with F16 the engine's flash
/// attention takes other paths for one row over many cells, and for many rows. And no slot that serves twice: attention adds
/// up in the order of the cells, and a cell that is used again can hold a later token than its neighbour (`-sps 0` makes the
/// server take an unused slot first; `slots` below counts them).
pub const EXACT: &[&str] = &["-ctk", "q8_0", "-ctv", "q8_0", "-sps", "0"];

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
    let mut tokens = 0;
    for (i, (a, b)) in alone.iter().zip(&together).enumerate() {
        let at = a.tokens.iter().zip(&b.tokens).position(|(a, b)| a != b);
        ensure!(
            a.tokens == b.tokens && a.text == b.text,
            "request {i} differs from token {at:?} on:\n  alone    {:?}\n  together {:?}",
            a.text,
            b.text
        );
        tokens += a.tokens.len();
    }
    println!(
        "        {what}: {} requests, {tokens} tokens compared, all equal",
        alone.len()
    );
    Ok(())
}

/// Fill `verify`: whatever leaves early, the output is the unpatched server's.
///
/// One at a time, stream by stream, greedy or sampled with a seed. Several at a time, a draft that is taken back frees KV
/// cells that other requests get, so that attention adds up in another order: there each token is compared with the full
/// model's choice after the same text, and may differ only where its two best are close.
fn lossless(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let requests = |sampled: bool| -> Vec<_> {
        let all = (0..40).map(|i| {
            let mut request = greedy(&prompt(i), 24 + (i as u32 % 5) * 12);
            match i % 4 {
                1 if sampled => {
                    request["temperature"] = json!(0.8);
                    request["seed"] = json!(i);
                }
                2 if sampled => request["ignore_eos"] = json!(false),
                _ => {}
            }
            request
        });
        all.collect()
    };
    let (mut drafts, mut accepted) = (0, 0);
    let mut serve = |n: usize, policy: &str, threshold: &str, sampled: bool| -> Result<_> {
        let flags = [
            "--drex-policy",
            policy,
            "--drex-threshold",
            threshold,
            "--drex-fill",
            "verify",
        ];
        let server = suite.start(patched, 40, &[EXACT, &flags].concat())?;
        let got = generate(server.client, &requests(sampled), n)?;
        for g in &got {
            let count = |name: &str| g.last["timings"][name].as_u64().unwrap_or(0);
            drafts += count("drex_drafts");
            accepted += count("drex_drafts_accepted");
        }
        let pairs = got
            .iter()
            .enumerate()
            .map(|(i, g)| Ok((server.client.tokenize(&prompt(i))?, g.tokens.clone())));
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        Ok((got, pairs))
    };

    let alone = generate(suite.start(reference, 1, EXACT)?.client, &requests(true), 1)?;
    let (mut streams, mut tokens) = (0, 0);
    for threshold in ["0.3", "0.5", "0.7", "0.9", "0.99"] {
        let (got, _) = serve(1, "hold", threshold, true)?;
        for (i, (a, b)) in alone.iter().zip(&got).enumerate() {
            let at = a.tokens.iter().zip(&b.tokens).position(|(a, b)| a != b);
            ensure!(
                a.tokens == b.tokens && a.text == b.text,
                "threshold {threshold}: request {i} differs from token {at:?} on:\n  {:?}\n  {:?}",
                a.text,
                b.text
            );
            streams += 1;
            tokens += a.tokens.len();
        }
    }
    let (mut compared, mut near) = (0, 0);
    for (n, policy, threshold) in [
        (8, "auto", "0.3"),
        (8, "latency", "0.7"),
        (32, "hold", "0.3"),
        (32, "art", "0.7"),
        (32, "hold", "0.99"),
    ] {
        let (got, pairs) = serve(n, policy, threshold, false)?;
        let scorer = program(reference, "drex-score")?;
        let choices = score::choices(scorer, &suite.model, "q8_0", &pairs)?;
        for (i, (g, choice)) in got.iter().zip(&choices).enumerate() {
            for (t, &token) in g.tokens.iter().enumerate() {
                if token == choice.choices[t] {
                    compared += 1;
                } else {
                    ensure!(
                        choice.gaps[t] < 0.05,
                        "threshold {threshold}, {n} at a time, {policy}: request {i}, token {t}: {token}, but the full \
                         model says {} by {}",
                        choice.choices[t],
                        choice.gaps[t]
                    );
                    near += 1;
                }
            }
        }
    }
    ensure!(
        near * 200 < compared,
        "{near} of {compared} tokens are close calls that went the other way"
    );
    ensure!(
        drafts > 2000 && accepted > drafts / 2 && accepted < drafts,
        "{accepted} of {drafts} drafts accepted: too few to test anything"
    );
    println!(
        "        {streams} requests, {tokens} tokens compared with the unpatched server, all equal; {compared} at 8 and 32 in \
         flight equal to the full model's choice, {near} close calls; {accepted} of {drafts} drafts accepted"
    );
    Ok(())
}
