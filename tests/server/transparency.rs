// SPDX-License-Identifier: Apache-2.0

//! Rebatching changes when a row runs, never what it says: a request's tokens and exits are those it has when it is served
//! alone under the same rule. In the exact builds that holds bit for bit.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{EXACT, Suite, Test, equal, exact::builds, exits, generate, greedy, prompt};
use crate::{client::Client, load::Generation};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "exact: windows that nobody leaves equal unpatched",
            no_exits,
        )
        .exact(),
        Test::new("exact: a threshold above 1 equals unpatched", above_one).exact(),
        Test::new("exact: rebatched equals served alone", rebatched).exact(),
    ]
};

const CANCELS: usize = 12;

const CONCURRENCY: [usize; 4] = [1, 2, 8, 32];

/// Requests of different lengths, so that they come and go at different times.
fn requests(n: usize) -> Vec<Value> {
    (0..n)
        .map(|i| greedy(&prompt(i), 16 + (i as u32 * 7 % 5) * 16))
        .collect()
}

/// Confidence 1.0 by entropy is out of reach, so that every row goes through every window and nobody exits.
fn no_exits(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let requests = requests(40);
    let unpatched = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1)?;
    let mut tokens = 0;
    for n in CONCURRENCY {
        for policy in ["hold", "latency"] {
            let flags = [
                "--drex-policy",
                policy,
                "--drex-threshold",
                "1",
                "--drex-metric",
                "entropy",
            ];
            let server = suite.start(patched, requests.len(), &[EXACT, &flags].concat())?;
            let got = generate(server.client, &requests, n)?;
            tokens += equal(&format!("{policy}, {n} at a time"), &unpatched, &got)?;
            let metrics = server.client.metrics()?;
            ensure!(metrics.get("drex_exits_total") == Some(0.0), "rows exited");
            let steps = metrics.get("drex_steps_total").unwrap_or(0.0);
            let rows = metrics.get("drex_step_rows_total").unwrap_or(0.0);
            // The first token of each request comes with its prompt.
            let tokens = metrics.get("drex_tokens_total").unwrap_or(0.0);
            let decoded = tokens - requests.len() as f64;
            ensure!(
                rows == 4.0 * decoded && steps > 0.0,
                "{rows} rows in windows for {decoded} tokens, expected 4 each"
            );
        }
    }
    println!(
        "        {} requests and {tokens} tokens compared with the unpatched server, all equal",
        8 * requests.len()
    );
    Ok(())
}

fn above_one(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let requests = requests(40);
    let unpatched = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1)?;
    let mut tokens = 0;
    for n in CONCURRENCY {
        let server = suite.start(
            patched,
            requests.len(),
            &[EXACT, &["--drex-policy", "art", "--drex-threshold", "1.01"]].concat(),
        )?;
        tokens += equal(
            &format!("{n} at a time"),
            &unpatched,
            &generate(server.client, &requests, n)?,
        )?;
    }
    println!(
        "        {} requests and {tokens} tokens compared with the unpatched server, all equal",
        4 * requests.len()
    );
    Ok(())
}

/// Requests with rules of their own among those with the server's.
fn mixed(n: usize) -> Vec<Value> {
    let mut requests = requests(n);
    for (i, request) in requests.iter_mut().enumerate() {
        match i % 6 {
            1 => request["drex_threshold"] = json!(0.3),
            2 => request["drex_threshold"] = json!(0.9),
            3 => request["drex_metric"] = json!("maxprob"),
            4 => request["drex_threshold"] = json!(2),
            _ => {}
        }
    }
    requests
}

/// Starts requests and goes away in the middle of them, for as long as `load` runs.
fn with_cancels<T>(client: Client, load: impl FnOnce() -> T) -> T {
    use std::sync::atomic::{AtomicBool, Ordering};
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..CANCELS {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let mut body = greedy(&prompt(1000 + i), 200);
                body["stream"] = json!(true);
                if let Ok(stream) = client.stream("/completion", &body) {
                    stream.take(i % 7).for_each(drop);
                }
            }
        });
        let out = load();
        done.store(true, Ordering::Relaxed);
        out
    })
}

fn rebatched(suite: &Suite) -> Result<()> {
    let (_, patched) = builds(suite)?;
    let policies: &[&[&str]] = &[
        &["--drex-policy", "hold"],
        &["--drex-policy", "hold", "--drex-flush-rows", "1"],
        &[
            "--drex-policy",
            "hold",
            "--drex-flush-rows",
            "5",
            "--drex-max-hold-ms",
            "2",
            "--drex-max-batch",
            "6",
        ],
        &[
            "--drex-policy",
            "hold",
            "--drex-exit-layers",
            "8",
            "--drex-deadline-ms",
            "5",
        ],
        &["--drex-policy", "latency"],
        &["--drex-policy", "art", "--drex-art-ratio", "0"],
    ];
    let requests = mixed(36);
    let (mut tokens, mut compared, mut exited) = (0, 0, 0);
    let mut alone: Option<(bool, Vec<Generation>)> = None;
    for (k, flags) in policies.iter().enumerate() {
        // What a request says alone depends on the ramps, not on the policy.
        let one_ramp = flags.contains(&"--drex-exit-layers");
        if alone.as_ref().is_none_or(|(ramps, _)| *ramps != one_ramp) {
            let mut args = [EXACT, &["--drex-policy", "latency"]].concat();
            if one_ramp {
                args.extend(["--drex-exit-layers", "8"]);
            }
            alone = Some((
                one_ramp,
                generate(suite.start(patched, 1, &args)?.client, &requests, 1)?,
            ));
        }
        let Some((_, alone)) = &alone else {
            unreachable!()
        };
        // One number in flight for each policy, or all.
        let all = &CONCURRENCY[1..];
        let few = [all[k % all.len()]];
        for n in if suite.long { all } else { &few } {
            let what = format!("{}, {n} at a time", flags.join(" "));
            // A slot for each request, and for each of those who go away.
            let server =
                suite.start(patched, requests.len() + CANCELS, &[EXACT, flags].concat())?;
            let got = with_cancels(server.client, || generate(server.client, &requests, *n))?;
            tokens += equal(&what, alone, &got)?;
            compared += got.len();
            for (i, (a, b)) in alone.iter().zip(&got).enumerate() {
                ensure!(
                    exits(a) == exits(b),
                    "{what}: request {i} exits {:?} alone and {:?} here",
                    exits(a),
                    exits(b)
                );
                exited += exits(b).iter().sum::<u64>();
            }
            let metrics = server.client.metrics()?;
            for name in [
                "drex_involuntary_exits_total",
                "drex_involuntary_stays_total",
            ] {
                ensure!(
                    metrics.get(name) == Some(0.0),
                    "{what}: {name} is {:?}",
                    metrics.get(name)
                );
            }
        }
    }
    ensure!(exited > 0, "nobody exited, nothing was tested");
    println!(
        "        {compared} requests and {tokens} tokens compared with those served alone, {exited} of them exited, all equal"
    );
    Ok(())
}
