// SPDX-License-Identifier: Apache-2.0

//! Quality `lossless`, which needs no other flag: the unpatched server's answers, with thresholds that are learned.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bad_input::refused;
use super::{EXACT, Suite, Test, drafts, equal, exact::builds, exits, generate, greedy, prompt};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("quality: what is named is kept to", named),
        Test::new("quality: what cannot be is refused", refusals),
        Test::new("exact: --drex on equals unpatched", lossless).exact(),
    ]
};

/// Greedy and seeded ones, some of which go on where another ended.
fn requests(n: usize) -> Vec<Value> {
    (0..n)
        .map(|i| {
            let mut request = greedy(&prompt(i), 24 + (i as u32 * 7 % 5) * 16);
            if i % 3 == 2 {
                request["temperature"] = json!(0.8);
                request["seed"] = json!(i);
            }
            request
        })
        .collect()
}

fn lossless(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let requests = requests(48);
    let expected = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1)?;
    let mut tokens = 0;
    // auto may find that no draft pays; latency makes each that is likely to stand.
    for (n, more) in [(1, &["--drex-policy", "latency"][..]), (8, &[])] {
        let server = suite.start(patched, n, &[EXACT, &["--drex", "on"], more].concat())?;
        let got = generate(server.client, &requests, n)?;
        tokens += equal(&format!("{n} at a time"), &expected, &got)?;
        let metrics = server.client.metrics()?;
        let get = |name: &str| metrics.get(name).with_context(|| format!("no {name}"));
        if !more.is_empty() {
            ensure!(get("drex_drafts_total")? > 100.0, "hardly a draft");
            continue;
        }
        let survival = get("drex_rule_survival")?;
        ensure!(
            survival > 0.0 && survival < 1.0,
            "drex_rule_survival is {survival}"
        );
    }
    println!("    {tokens} tokens");
    Ok(())
}

fn named(suite: &Suite) -> Result<()> {
    let request = |i: usize, more: Value| {
        let mut request = greedy(&prompt(i), 40);
        for (key, value) in more.as_object().into_iter().flatten() {
            request[key] = value.clone();
        }
        request
    };
    // Flags, and the words of the log.
    for (flags, policy, threshold, fill) in [
        (&["--drex", "on"][..], "auto", "as learned", "verify"),
        (
            &["--drex", "on", "--drex-policy", "hold"],
            "hold",
            "as learned",
            "verify",
        ),
        (
            &["--drex-threshold", "0.4", "--drex", "on"],
            "auto",
            "0.4",
            "verify",
        ),
        (
            &["--drex", "on", "--drex-fill", "propagate"],
            "auto",
            "0.7",
            "propagate",
        ),
        (
            &["--drex-policy", "latency", "--drex-quality", "lossless"],
            "latency",
            "as learned",
            "verify",
        ),
        (&["--drex-policy", "hold"], "hold", "0.7", "copy"),
    ] {
        let server = suite.start(&suite.patched, 4, flags)?;
        let log = server.log();
        let line = log.lines().find(|l| l.contains("early exit: policy"));
        let line = line.with_context(|| format!("{flags:?}: the log does not say what is on"))?;
        for words in [
            format!("policy {policy},"),
            format!("threshold {threshold} "),
            format!("fill {fill},"),
        ] {
            ensure!(line.contains(&words), "{flags:?}: no '{words}' in {line}");
        }
        if policy != "auto" {
            // A request has what it names, beside others that name nothing.
            let all: Vec<_> = (0..12)
                .map(|i| match i % 3 {
                    0 => request(i, json!({})),
                    1 => request(i, json!({ "drex_quality": "lossless" })),
                    _ => request(i, json!({ "drex_fill": "copy", "drex_threshold": 0.3 })),
                })
                .collect();
            for (i, g) in generate(server.client, &all, 4)?.iter().enumerate() {
                let verified = i % 3 == 1 || i % 3 == 0 && fill == "verify";
                let (judged, _) = drafts(std::slice::from_ref(g));
                ensure!(
                    verified == (judged > 0),
                    "{flags:?}, request {i}: {judged} drafts, exits {:?}",
                    exits(g)
                );
            }
        }
    }
    Ok(())
}

fn refusals(suite: &Suite) -> Result<()> {
    for (flags, texts) in [
        (
            &[
                "--drex-quality",
                "lossless",
                "--drex-policy",
                "auto",
                "--drex-fill",
                "copy",
            ][..],
            &["--drex-quality lossless", "--drex-fill copy"][..],
        ),
        (
            &["--drex-quality", "0.99"],
            &["--drex-quality", "lossless", "0.99"],
        ),
        (&["--drex", "yes"], &["--drex", "on, off", "yes"]),
    ] {
        refused(
            suite.start(&suite.patched, 4, flags),
            &format!("{flags:?}"),
            texts,
        )?;
    }
    let server = suite.start(&suite.patched, 4, &["--drex", "on"])?;
    for (more, text) in [
        (
            json!({ "drex_quality": 0.99 }),
            "expected lossless, got 0.99",
        ),
        (
            json!({ "drex_quality": "lossless", "drex_fill": "copy" }),
            "'drex_quality': lossless cannot be combined with 'drex_fill' copy",
        ),
        (
            json!({ "drex_qualty": "lossless" }),
            "did you mean 'drex_quality'?",
        ),
    ] {
        let mut request = greedy(&prompt(0), 4);
        for (key, value) in more.as_object().into_iter().flatten() {
            request[key] = value.clone();
        }
        let answer = server.client.post("/completion", &request)?;
        ensure!(
            answer.status == 400 && answer.text().contains(text),
            "{more}: {} {}",
            answer.status,
            answer.text()
        );
    }
    Ok(())
}
