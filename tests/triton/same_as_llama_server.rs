// SPDX-License-Identifier: Apache-2.0
//! Each token stream is llama-server's for the same request: in the exact builds no row depends on its company.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::{Bench, Test, one_final, parameters, quiet};
use crate::{
    EXACT_ARGS as EXACT, cache, metrics::Metrics, prompt, score::Scorer, server::Server,
    triton::server::Triton,
};

pub const TESTS: &[Test] = &[
    ("64 streams equal llama-server's, fill copy", |bench| {
        equal(bench, "copy", &[])
    }),
    ("64 streams equal llama-server's, fill postfill", |bench| {
        equal(bench, "postfill", &[])
    }),
    ("64 streams equal llama-server's, fill propagate", |bench| {
        equal(bench, "propagate", &[])
    }),
    (
        "64 streams equal the unpatched llama-server's, fill verify",
        |bench| equal(bench, "verify", &[]),
    ),
    (
        "64 streams equal the unpatched llama-server's, quality lossless and policy auto",
        |bench| {
            equal(
                bench,
                "verify",
                &[("policy", "auto"), ("quality", "lossless")],
            )
        },
    ),
    (
        "32 streams equal llama-server's while 32 others are cancelled",
        cancelled_neighbours,
    ),
    ("64 streams through 16 slots keep to themselves", few_slots),
];

pub const COUNT: usize = 64;
/// For a whole answer, on a machine that does something else meanwhile.
const SILENCE: Duration = Duration::from_secs(600);
/// Of the exact comparison, which sees each fill's own path only if many rows leave early.
const MIN_EXITS: f64 = 500.0;

/// What request `i` asks for, beside its prompt: greedy, sampled with a seed, until the end of the text, until a text.
struct Asked {
    tokens: u32,
    seed: Option<usize>,
    ignore_eos: bool,
    stop: Option<&'static str>,
}

/// With each fill some of these prompts come to the end of the text, which the model seldom does.
const LONG: [usize; 5] = [18, 34, 50, 54, 62];

fn asked(i: usize) -> Asked {
    Asked {
        tokens: if LONG.contains(&i) {
            260
        } else {
            24 + (i as u32 % 5) * 12
        },
        seed: (i % 4 == 1).then_some(i),
        ignore_eos: i % 4 != 2,
        stop: (i % 8 == 3).then_some("."),
    }
}

/// For llama-server.
fn completion(i: usize) -> Value {
    let asked = asked(i);
    let mut request = json!({"prompt": prompt(i), "n_predict": asked.tokens, "temperature": 0, "cache_prompt": false,
        "ignore_eos": asked.ignore_eos, "return_tokens": true});
    if let Some(seed) = asked.seed {
        request["temperature"] = json!(0.8);
        request["seed"] = json!(seed);
        request["top_k"] = json!(40);
        request["top_p"] = json!(0.95);
        request["min_p"] = json!(0.05);
    }
    if let Some(stop) = asked.stop {
        request["stop"] = json!([stop]);
    }
    request
}

/// The same for Triton.
fn request(i: usize, fill: &str) -> Value {
    let asked = asked(i);
    let mut sampling = json!({"max_tokens": asked.tokens, "temperature": 0, "ignore_eos": asked.ignore_eos,
        "drex_fill": fill});
    if let Some(seed) = asked.seed {
        sampling["temperature"] = json!(0.8);
        sampling["seed"] = json!(seed);
        sampling["top_k"] = json!(40);
        sampling["top_p"] = json!(0.95);
        sampling["min_p"] = json!(0.05);
    }
    if let Some(stop) = asked.stop {
        sampling["stop"] = json!(stop);
    }
    json!({"prompt": prompt(i), "sampling": sampling})
}

/// llama-server's answers: the patched one's with this fill, all at once and each in a slot of its own.
pub fn expected(bench: &Bench, fill: &'static str) -> Result<Vec<Value>> {
    if let Some(known) = bench.expected.borrow().get(fill) {
        return Ok(known.clone());
    }
    let model = cache::bundled_model()?;
    let (np, ctx) = (COUNT.to_string(), (COUNT * 512).to_string());
    let model = model.to_string_lossy();
    let mut args = vec![
        "-m",
        &model,
        "-np",
        &np,
        "-c",
        &ctx,
        "-t",
        "2",
        "--cache-ram",
        "0",
        "-fa",
        "on",
        "--no-webui",
    ];
    // Verified output is that of a model without early exit.
    let runtime = if fill == "verify" {
        &bench.reference
    } else {
        args.extend(["--drex-policy", "hold", "--drex-fill", fill]);
        &bench.patched
    };
    let llama = Server::start(runtime, args.iter().chain(EXACT))?;
    // Not as streams: those leave out the ids of tokens that end within a character.
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let client = &llama.client;
        let threads: Vec<_> = (0..COUNT)
            .map(|i| {
                scope.spawn(move || {
                    let answer =
                        client.call("POST", "/completion", Some(&completion(i)), SILENCE)?;
                    let mut answer = answer.ok()?.json()?;
                    answer["prompt_tokens"] = json!(client.tokenize(&prompt(i))?);
                    Ok(answer)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))?)
            .collect::<Result<_>>()
    })?;
    // What these streams are to test must be in them.
    for how in ["eos", "word"] {
        let count = answers.iter().filter(|a| a["stop_type"] == how).count();
        ensure!(count > 0, "none of llama-server's answers ends with {how}");
    }
    bench.expected.borrow_mut().insert(fill, answers.clone());
    Ok(answers)
}

/// A request's answer against llama-server's: tokens, text, why it ended, one final flag. Returns how many tokens.
fn same(what: &str, i: usize, a: &Value, b: &Value) -> Result<usize> {
    one_final(b).with_context(|| format!("{what}, request {i}"))?;
    let reason = if a["stop_type"] == "limit" {
        "length"
    } else {
        "stop"
    };
    ensure!(
        b["errors"] == json!([])
            && a["tokens"] == b["tokens"]
            && a["content"] == b["text"]
            && b["reason"] == reason,
        "{what}, request {i} ({}) differs:\n  llama-server {} {} {}\n  Triton       {} {} {} {}",
        completion(i),
        a["stop_type"],
        a["content"],
        a["tokens"],
        b["reason"],
        b["text"],
        b["tokens"],
        b["errors"]
    );
    let tokens = b["tokens"].as_array().map_or(0, Vec::len);
    ensure!(
        b["responses"] == tokens,
        "{what}, request {i}: {tokens} tokens in {} responses",
        b["responses"]
    );
    Ok(tokens)
}

fn early_exits(server: &Triton, what: &str, tokens: usize, min: f64) -> Result<()> {
    let metrics = server.metrics_with("drex_exits_total", |exits| exits >= min)?;
    let metrics = Metrics::parse(&metrics);
    ensure!(
        metrics.get("drex_involuntary_exits_total") == Some(0.0),
        "involuntary exits"
    );
    println!(
        "        {what}: {tokens} tokens, {} early exits, all equal",
        metrics.get("drex_exits_total").unwrap_or(0.0)
    );
    Ok(())
}

/// With other parameters than usual.
pub fn equal(bench: &Bench, fill: &'static str, other: &[(&str, &str)]) -> Result<()> {
    let expected = expected(bench, fill)?;
    let server = bench.start_with(other)?;
    let parameters = parameters(other);
    let lossless = parameters.iter().any(|(name, _)| *name == "quality");
    let mut requests: Vec<_> = (0..COUNT).map(|i| request(i, fill)).collect();
    // Where the model's quality is lossless a request need not say so, and may.
    for (i, request) in requests.iter_mut().enumerate().filter(|_| lossless) {
        request["sampling"]["drex_fill"] = json!(null);
        if i % 2 == 0 {
            request["sampling"]["drex_quality"] = json!("lossless");
        }
    }
    let got = bench.stream(&server, &requests)?;
    let given = |name: &str| parameters.iter().find(|(n, _)| *n == name);
    let policy = given("policy").map_or("auto", |(_, policy)| policy);
    let through = given("exits").map_or("", |_| ", through fitted exits");
    let what = format!("policy {policy}, fill {fill}{through}");
    let mut tokens = 0;
    for (i, (a, b)) in expected.iter().zip(&got).enumerate() {
        tokens += same(&what, i, a, b)?;
    }
    // auto may find that early exit does not pay.
    let min = if policy == "auto" { 0.0 } else { MIN_EXITS };
    early_exits(&server, &what, tokens, min)?;
    quiet(&server)
}

fn cancelled_neighbours(bench: &Bench) -> Result<()> {
    let expected = expected(bench, "copy")?;
    let server = bench.start_with(&[])?;
    let requests: Vec<_> = (0..COUNT)
        .map(|i| {
            let mut request = request(i, "copy");
            if i % 8 >= 4 {
                request["sampling"]["max_tokens"] = json!(400);
                request["sampling"]["ignore_eos"] = json!(true);
                request["sampling"]["stop"] = json!([]);
                request["cancel_after"] = json!(1 + i % 23);
            }
            request
        })
        .collect();
    let got = bench.stream(&server, &requests)?;
    let mut tokens = 0;
    for (i, (a, b)) in expected.iter().zip(&got).enumerate() {
        if i % 8 < 4 {
            tokens += same("half cancelled", i, a, b)?;
        } else {
            ensure!(b["cancelled"] == true, "request {i} was not cancelled: {b}");
        }
    }
    early_exits(&server, "half cancelled", tokens, MIN_EXITS)?;
    quiet(&server)
}

/// A token's logit may be that far below the best one's in a full pass, where the order of the KV cells differs.
const NEAR: f64 = 0.1;

/// Slots, and with them cells of the KV cache, that had other requests' tokens before. Attention adds up in the order of the
/// cells, and a later token can get a lower one that was freed, so that some streams part at a near tie (see `EXACT`). That
/// it is one, the unpatched engine says: fed with the stream that came, it would choose each token of it, or nearly so. A
/// cell that kept what another request left in it would spoil all but the first 16.
fn few_slots(bench: &Bench) -> Result<()> {
    let expected = expected(bench, "verify")?;
    let server = bench.start_with(&[("slots", "16")])?;
    let requests: Vec<_> = (0..COUNT).map(|i| request(i, "verify")).collect();
    let got = bench.stream(&server, &requests)?;
    let (mut equal, mut parted) = (0, 0);
    let mut streams = Vec::new();
    for (i, (a, b)) in expected.iter().zip(&got).enumerate() {
        one_final(b).with_context(|| format!("16 slots, request {i}"))?;
        ensure!(b["errors"] == json!([]), "16 slots, request {i}: {b}");
        let same = same("16 slots", i, a, b).is_ok();
        equal += usize::from(same);
        // What a full pass would choose can be said of greedy streams that leave the end of the text out.
        if asked(i).seed.is_none() && asked(i).ignore_eos {
            parted += usize::from(!same);
            streams.push((ids(&a["prompt_tokens"])?, ids(&b["tokens"])?));
        }
    }
    let model = cache::bundled_model()?;
    let scorer = Scorer {
        tool: &bench.score,
        model: &model,
        threads: 2,
        kv: "q8_0",
        ignore_eos: true,
    };
    let scores = scorer.margins(&streams)?;
    let tokens: u64 = scores.iter().map(|s| s.n).sum();
    let margins = scores.iter().flat_map(|s| s.margins.iter().copied());
    let worst = margins.fold(0.0, f64::max);
    println!(
        "        16 slots: {equal} of {COUNT} streams equal; of {} greedy ones {parted} part, all {tokens} tokens within \
         {worst:.4} of a full pass's choice",
        streams.len()
    );
    ensure!(tokens > 1000, "only {tokens} tokens were looked at");
    ensure!(
        worst <= NEAR,
        "a token is {worst} below the full model's choice"
    );
    quiet(&server)
}

fn ids(tokens: &Value) -> Result<Vec<i64>> {
    let tokens = tokens.as_array().context("no tokens")?;
    let ids = tokens.iter().map(|t| t.as_i64().context("not a token"));
    ids.collect()
}
