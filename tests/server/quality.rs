// SPDX-License-Identifier: Apache-2.0

//! Quality `lossless`, which needs no other flag: the unpatched server's answers, with thresholds that are learned.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::bad_input::refused;
use super::{
    EXACT, Suite, Test, drafts, equal, exact::builds, exits, generate, greedy, program, prompt,
};
use crate::score::Scorer;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("quality: what is named is kept to", named),
        Test::new("quality: what cannot be is refused", refusals),
        Test::new("exact: --drex on equals unpatched", lossless).exact(),
        Test::new(
            "exact: an agreement's audits count what the full model says",
            audits,
        )
        .exact(),
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

/// One request at a time, so that the counters tell whether it was audited, and with what result. The unpatched library reads
/// the same answers.
fn audits(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let flags = [
        "--drex-policy",
        "latency",
        "--drex-quality",
        "0.9",
        "--drex-fill",
        "copy",
        "--drex-exit-layers",
        "4",
    ];
    let server = suite.start(patched, 1, &[EXACT, &flags].concat())?;
    let client = server.client;
    let counters = || -> Result<[u64; 3]> {
        let metrics = client.metrics()?;
        let names = [
            "drex_audits_total",
            "drex_audited_tokens_total",
            "drex_audited_differing_total",
        ];
        let mut all = [0; 3];
        for (n, name) in all.iter_mut().zip(names) {
            *n = metrics.get(name).with_context(|| format!("no {name}"))? as u64;
        }
        Ok(all)
    };
    let (mut streams, mut found, mut served) = (Vec::new(), Vec::new(), [0, 0]);
    let mut before = counters()?;
    for i in 0..400 {
        // Longer ones take an audit of several passes.
        let mut request = greedy(&prompt(i), 12 + 60 * u32::from(i % 20 == 0));
        if i % 6 == 5 {
            (request["temperature"], request["seed"]) = (json!(0.8), json!(i));
        }
        let answer = generate(client, std::slice::from_ref(&request), 1)?.remove(0);
        let now = counters()?;
        let [audits, tokens, differing] = [0, 1, 2].map(|k| now[k] - before[k]);
        before = now;
        let quality = &answer.last["timings"]["drex_quality"];
        served[usize::from(quality == "lossless")] += 1;
        if i % 6 == 5 {
            ensure!(
                quality == "lossless",
                "request {i} draws its tokens, and has quality {quality}"
            );
        }
        ensure!(
            audits == 0 || *quality == json!(0.9),
            "request {i}: an audit, and quality {quality}"
        );
        if audits > 0 {
            // The first token is the prompt's.
            ensure!(
                audits == 1 && tokens == answer.tokens.len() as u64 - 1,
                "request {i}: {audits} audits of {tokens} tokens"
            );
            let text = request["prompt"].as_str().unwrap_or_default();
            streams.push((client.tokenize(text)?, answer.tokens));
            found.push((i, differing));
        }
    }
    ensure!(
        served[0] >= 5 && served[1] > 100,
        "lossless and not: {served:?}"
    );
    let scorer = Scorer {
        tool: program(reference, "drex-score")?,
        model: &suite.model,
        threads: 2,
        kv: "q8_0",
        ignore_eos: true,
    };
    let mut all = 0;
    for (score, (i, differing)) in scorer.scores(&streams)?.iter().zip(&found) {
        ensure!(
            score.n - score.agree == *differing,
            "request {i}: an audit found {differing} of {} tokens, the unpatched library {}",
            score.n,
            score.n - score.agree
        );
        all += differing;
    }
    ensure!(all > 0, "nothing differs");
    let missed = client.metrics()?.get("drex_audits_missed_total");
    ensure!(missed == Some(0.0), "{missed:?} audits missed");
    println!("    {} answers audited, {all} tokens differ", found.len());
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
        (
            &["--drex", "on", "--drex-quality", "0.99"],
            "auto",
            "as audits allow for an agreement of 0.99",
            "propagate",
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
            &["--drex-quality", "0.3"],
            &["--drex-quality", "[0.5, 1]", "0.3"],
        ),
        (
            &["--drex-quality", "much"],
            &["--drex-quality", "[0.5, 1]", "much"],
        ),
        (
            &[
                "--drex",
                "on",
                "--drex-quality",
                "0.99",
                "--drex-threshold",
                "0.5",
            ],
            &["--drex-quality 0.99", "--drex-threshold"],
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
            json!({ "drex_quality": 0.2 }),
            "expected lossless or a number in [0.5, 1], got 0.2",
        ),
        (
            json!({ "drex_quality": 0.99, "drex_threshold": 0.5 }),
            "'drex_quality': 0.99 cannot be combined with 'drex_threshold'",
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
