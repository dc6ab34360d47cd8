// SPDX-License-Identifier: Apache-2.0
//! The ways in: HTTP with curl and without, Triton's own clients, models with one response for a request.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, PARAMETERS, Test, one_final, parameters, quiet, request};
use crate::{
    process, prompt,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    (
        "/generate, /generate_stream and a decoupled: false model",
        http,
    ),
    ("tritonclient: gRPC streams, unary gRPC, HTTP", tritonclient),
];

/// Adds a model with one response for a request.
pub fn single(bench: &Bench, repository: &Path) -> Result<()> {
    bench.installed.model(
        repository,
        "single",
        "model_transaction_policy { decoupled: false }\n",
        &parameters(&[("slots", "16")]),
    )
}

/// The text of a stream of events.
fn joined(stream: &str, count: usize) -> Result<String> {
    let events: Vec<Value> = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    ensure!(events.len() == count, "{} events: {stream}", events.len());
    Ok(events
        .iter()
        .filter_map(|event| event["text_output"].as_str())
        .collect())
}

/// What curl prints; none where there is no curl.
fn curl(url: &str, body: &Value) -> Result<Option<String>> {
    let Some(curl) = process::find_program("curl") else {
        return Ok(None);
    };
    let mut command = Command::new(curl);
    command
        .args([
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--no-buffer",
        ])
        .args(["--noproxy", "*", "--max-time", "120", "--data"])
        .arg(body.to_string())
        .arg(url);
    process::output(&mut command).map(Some)
}

fn http(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    single(bench, &repository)?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let body = json!({"text_input": prompt(0), "temperature": 0, "max_tokens": 12, "ignore_eos": true,
        "exclude_input_in_output": true, "return_finish_reason": true, "return_num_input_tokens": true,
        "return_num_output_tokens": true});
    let mut texts = Vec::new();
    for model in [MODEL, "single"] {
        let answer = server
            .http
            .post(&format!("/v2/models/{model}/generate"), &body)?
            .ok()?
            .json()?;
        ensure!(
            answer["finish_reason"] == "length" && answer["num_output_tokens"] == 12,
            "{answer}"
        );
        ensure!(
            answer["num_input_tokens"].as_u64().is_some_and(|n| n > 0),
            "{answer}"
        );
        ensure!(answer["drex_exits"].is_string(), "{answer}");
        texts.push(
            answer["text_output"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        );
    }
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let stream = server
        .http
        .post(&format!("/v2/models/{MODEL}/generate_stream"), &streamed)?
        .ok()?
        .text();
    texts.push(joined(&stream, 12)?);
    for (path, body) in [("generate", &body), ("generate_stream", &streamed)] {
        let url = format!("http://{}/v2/models/{MODEL}/{path}", server.http.addr);
        let Some(said) = curl(&url, body)? else {
            println!("        curl is not on PATH: /{path} was asked by drex's own client alone");
            continue;
        };
        texts.push(if path == "generate" {
            let answer: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
            answer["text_output"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        } else {
            joined(&said, 12)?
        });
    }
    ensure!(
        !texts[0].is_empty() && texts.iter().all(|text| *text == texts[0]),
        "{texts:?}"
    );

    let mut stopped = body.clone();
    stopped["ignore_eos"] = json!(false);
    let stop: String = texts[0].chars().skip(3).take(4).collect();
    stopped["stop"] = json!(stop);
    let answer = server
        .http
        .post(&format!("/v2/models/{MODEL}/generate"), &stopped)?
        .ok()?
        .json()?;
    let before = texts[0].split(&stop).next().unwrap_or_default();
    ensure!(
        answer["text_output"] == before && answer["finish_reason"] == "stop",
        "{answer}, {stop:?}"
    );
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let answer = server.http.post("/v2/models/single/generate", &streamed)?;
    ensure!(
        answer.status != 200 && answer.text().contains("decoupled"),
        "{}",
        answer.text()
    );
    quiet(&server)
}

fn tritonclient(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    single(bench, &repository)?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let count = 16;
    // Of each client as many, all at once.
    let mut requests = Vec::new();
    for how in ["stream", "library", "unary", "http"] {
        for i in 0..count {
            let mut request = request(i, 12 + i as u32);
            request["how"] = json!(how);
            if matches!(how, "unary" | "http") {
                request["model"] = json!("single");
                request["inputs"] = json!({"exclude_input_in_output": true});
            }
            requests.push(request);
        }
    }
    let answers = bench.stream(&server, &requests)?;
    for (at, (request, answer)) in requests.iter().zip(&answers).enumerate() {
        let (i, how) = (at % count, request["how"].as_str().unwrap_or_default());
        ensure!(
            answer["errors"] == json!([]) && answer["after_final"] == 0,
            "{how} {i}: {answer}"
        );
        ensure!(
            answer["tokens"].as_array().map_or(0, Vec::len) == 12 + i
                && answer["reason"] == "length",
            "{how} {i}: {answer}"
        );
        for same in ["text", "tokens"] {
            ensure!(
                answer[same] == answers[i][same],
                "{how} {i}: {answer}, and as a raw stream {}",
                answers[i]
            );
        }
        match how {
            "stream" | "library" => one_final(answer)?,
            _ => ensure!(answer["responses"] == 1, "{how} {i}: {answer}"),
        }
        // An integer parameter too came through whatever it was sent by.
        ensure!(
            answer["parameters"]["drex_output_tokens"] == 12 + i,
            "{how} {i}: {answer}"
        );
    }
    // A model with several responses for a request is for streams alone; the server says so.
    for how in ["unary", "http"] {
        let mut request = requests[0].clone();
        request["how"] = json!(how);
        request["inputs"] = json!({"stream": false});
        let answers = bench.stream(&server, &[request])?;
        let text = answers[0]["errors"][0].as_str().unwrap_or_default();
        ensure!(text.contains("decoupled"), "{how}: {}", answers[0]);
    }
    println!("        {} requests, four clients", requests.len());
    quiet(&server)
}
