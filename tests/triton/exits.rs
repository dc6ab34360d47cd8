// SPDX-License-Identifier: Apache-2.0
//! Exits in a file beside the model: the parameter `exits`.
//!
//! The exits here are the bundled model's own final norm: it was trained to exit through it, so its rows do leave.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use drex_harness::exits;
use serde_json::{Value, json};

use super::{
    Bench, PARAMETERS, Test, parameters, quiet,
    refusals::refuse,
    request, requests,
    same_as_llama_server::{equal, expected},
    whole,
};
use crate::{
    Llama, cache,
    metrics::Metrics,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    (
        "64 streams equal the unpatched llama-server's, fill verify through fitted exits",
        lossless,
    ),
    (
        "rows leave with tokens of the fitted exits' head alone",
        head_of_two,
    ),
    (
        "calibrated confidences of fitted exits meet the thresholds",
        calibrated,
    ),
    (
        "fitted exits that do not fit are refused at load",
        files_that_do_not_fit,
    ),
];

/// Writes exits of the bundled model, as `exits::own` says.
fn write(bench: &Bench, file: &Path, layers: &str, tokens: &str, shift: Option<f32>) -> Result<()> {
    let llama = Llama::open(&bench.cache, bench.source.llama_src.as_deref())?;
    let mut programs = llama.tools(&bench.patched)?.into_iter();
    let exits_test = programs.find(|program| program.ends_with("exits-test"));
    let exits_test = exits_test.context("no exits-test")?;
    let model = cache::bundled_model()?;
    exits::own(&exits_test, &model, file, layers, tokens, shift)
}

fn folder(bench: &Bench, test: &str) -> Result<PathBuf> {
    let folder = bench.installed.scratch().join(test);
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn lossless(bench: &Bench) -> Result<()> {
    let file = folder(bench, "exits-lossless")?.join("own.gguf");
    write(bench, &file, "4,8", "all-5", None)?;
    equal(bench, "verify", &[("exits", &file.to_string_lossy())])
}

/// Every row leaves at the first ramp, whose head has two tokens: no other can be emitted. The file is beside the model.
fn head_of_two(bench: &Bench) -> Result<()> {
    let mut two: Vec<i64> = Vec::new();
    for token in expected(bench, "verify")?[0]["tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_i64)
    {
        if two.len() < 2 && !two.contains(&token) {
            two.push(token);
        }
    }
    two.sort_unstable();
    let [a, b] = two[..] else {
        bail!("the model repeats one token")
    };
    let repository = bench.installed.repository(&parameters(&[
        ("exits", "model.exits.gguf"),
        ("policy", "latency"),
        ("threshold", "0"),
    ]))?;
    let file = repository.join(MODEL).join("1/model.exits.gguf");
    write(bench, &file, "4", &format!("{a},{b}"), None)?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;

    const TOKENS: u32 = 24;
    let ask = |change: &dyn Fn(&mut Value), among: &[i64]| -> Result<()> {
        let requests: Vec<_> = (0..8)
            .map(|i| {
                let mut request = request(i, TOKENS);
                change(&mut request["sampling"]);
                request
            })
            .collect();
        let answers = bench.stream(&server, &requests)?;
        whole(&answers, |_| TOKENS as usize)?;
        for answer in answers {
            // The first token is the prompt's, from the last layer.
            let mut rest = answer["tokens"].as_array().into_iter().flatten().skip(1);
            ensure!(
                rest.all(|token| token.as_i64().is_some_and(|t| among.contains(&t))),
                "not all among {among:?}: {answer}"
            );
        }
        Ok(())
    };
    let asks = 4.0;
    ask(&|_| (), &two)?;
    ask(
        &|sampling| {
            sampling["temperature"] = json!(1.0);
            sampling["seed"] = json!(7);
        },
        &two,
    )?;
    // What cannot be emitted has no logit at the ramp, wherever its token stands in the head.
    let ban = |token: i64| {
        move |sampling: &mut Value| {
            sampling["stop_token_ids"] = json!([token]);
            sampling["min_tokens"] = json!(TOKENS);
        }
    };
    ask(&ban(a), &[b])?;
    ask(&ban(b), &[a])?;
    let all = asks * 8.0 * f64::from(TOKENS - 1);
    let metrics = server.metrics_with("drex_exits_total", |exits| exits >= all)?;
    let exits = Metrics::parse(&metrics).get("drex_exits_total");
    ensure!(exits == Some(all), "{exits:?} rows left, expected {all}");
    quiet(&server)
}

/// The second of the file's exits, with a calibration that makes every token sure, and with one that makes none.
fn calibrated(bench: &Bench) -> Result<()> {
    let file = folder(bench, "exits-calibrated")?.join("own.gguf");
    let path = file.to_string_lossy();
    for (shift, threshold, expected) in [(20.0, "0.99", 4 * 23), (-20.0, "0.01", 0)] {
        write(bench, &file, "4,8", "all", Some(shift))?;
        let server = bench.start_with(&[
            ("exits", &path),
            ("exit_layers", "8"),
            ("policy", "latency"),
            ("threshold", threshold),
        ])?;
        whole(&bench.stream(&server, &requests(4, 24))?, |_| 24)?;
        let metrics = server.metrics_with("drex_tokens_total", |tokens| tokens >= 4.0 * 24.0)?;
        let exits = Metrics::parse(&metrics).by_label("drex_exits_total", "layer");
        ensure!(
            exits == [("8".to_owned(), f64::from(expected))],
            "with shift {shift} and threshold {threshold} rows left at {exits:?}, expected {expected} after layer 8"
        );
    }
    Ok(())
}

fn files_that_do_not_fit(bench: &Bench) -> Result<()> {
    let folder = folder(bench, "exits-refused")?;
    let good = folder.join("good.gguf");
    write(bench, &good, "4,8", "all-5", None)?;
    let bytes = fs::read(&good)?;
    // The first digit of the hash, behind the key, the type of the value and its length.
    let key = b"exits.model.hash";
    let mut at = bytes.windows(key.len());
    let at = at.position(|w| w == key).context("no hash")?;
    let mut hash = bytes.clone();
    hash[at + key.len() + 4 + 8] ^= 1;
    for (name, bytes) in [
        ("hash.gguf", &hash[..]),
        ("short.gguf", &bytes[..bytes.len() - 4096]),
        ("text.gguf", b"no such thing"),
    ] {
        fs::write(folder.join(name), bytes)?;
    }
    let nan = folder.join("nan.gguf");
    write(bench, &nan, "4,8", "all-5", Some(f32::NAN))?;

    let repository = bench.installed.repository(PARAMETERS)?;
    let mut cases = Vec::new();
    for (name, file, layers, part) in [
        ("missing", "none.gguf", "", "/none.gguf: No such file"),
        ("folder", "", "", "is not a file"),
        ("text", "text.gguf", "", "/text.gguf is no GGUF file"),
        ("short", "short.gguf", "", "ends behind the file's end"),
        (
            "hash",
            "hash.gguf",
            "",
            "is for another model: its exits.model.hash is",
        ),
        ("nan", "nan.gguf", "", "exits.calibration has the scale"),
        (
            "layer",
            "good.gguf",
            "4,5",
            "/good.gguf has no exit after layer 5 of parameters: exit_layers",
        ),
    ] {
        let file = folder.join(file);
        let file = file.to_string_lossy();
        let mut given = vec![("exits", &*file)];
        if !layers.is_empty() {
            given.push(("exit_layers", layers));
        }
        bench.installed.model(&repository, name, "", &given)?;
        cases.push((name.to_owned(), "parameters: exits "));
        cases.push((name.to_owned(), part));
    }
    let beside = [("exits", "none.gguf")];
    bench.installed.model(&repository, "beside", "", &beside)?;
    cases.push(("beside".into(), "/beside/1/none.gguf: No such file"));
    let good = good.to_string_lossy();
    let one = [("exits", &*good), ("exit_layers", "8")];
    bench.installed.model(&repository, "one", "", &one)?;

    let server = refuse(bench, repository, &cases)?;
    let load = "/v2/repository/models/one/load";
    server.http.post(load, &json!({}))?.ok()?;
    let text = json!({"text_input": "Returns the", "max_tokens": 8, "temperature": 0});
    server.http.post("/v2/models/one/generate", &text)?.ok()?;
    Ok(())
}
