// SPDX-License-Identifier: Apache-2.0
//! What other backends' clients send: the requests of Triton's OpenAI frontend in both of its formats, a leading dimension, and
//! what the generate extension allows.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, By, PARAMETERS, Test, one_final, parameters, quiet, refused};
use crate::{
    prompt,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    (
        "the OpenAI frontend's requests, in vLLM's and in TensorRT-LLM's format",
        frontend,
    ),
    ("a leading dimension of 1", leading),
    ("id, null and names of the generate extension", generate),
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn tensor(datatype: &str, shape: &[usize], bytes: &[u8]) -> Value {
    json!({"datatype": datatype, "shape": shape, "hex": hex(bytes)})
}

fn texts(shape: &[usize], texts: &[&str]) -> Value {
    let each = texts.iter().map(|text| {
        let length = (text.len() as u32).to_le_bytes();
        [&length[..], text.as_bytes()].concat()
    });
    tensor("BYTES", shape, &each.collect::<Vec<_>>().concat())
}

const ANSWER: u32 = 20;

/// As the frontend makes it of a chat or a completion for a backend that is called vllm, or with `--backend vllm`.
fn vllm(prompt: &str, stream: bool) -> Value {
    let sampling = json!({"frequency_penalty": 0.0, "n": 1, "presence_penalty": 0.0, "temperature": 0.0, "top_p": 1.0,
        "seed": 7, "stop": ["~~"], "max_tokens": ANSWER});
    json!({
        "text_input": texts(&[1], &[prompt]),
        "stream": tensor("BOOL", &[1], &[u8::from(stream)]),
        "exclude_input_in_output": tensor("BOOL", &[1], &[1]),
        "sampling_parameters": texts(&[1], &[&sampling.to_string()]),
        "return_logprobs": tensor("BOOL", &[1], &[0]),
        "return_num_input_tokens": tensor("BOOL", &[1], &[1]),
        "return_num_output_tokens": tensor("BOOL", &[1], &[1]),
    })
}

/// As it makes it for every other backend.
fn tensorrt_llm(prompt: &str, stream: bool) -> Value {
    let one: &[usize] = &[1, 1];
    let float = |x: f32| tensor("FP32", one, &x.to_le_bytes());
    json!({
        "text_input": texts(one, &[prompt]),
        "stream": tensor("BOOL", one, &[u8::from(stream)]),
        "max_tokens": tensor("INT32", one, &ANSWER.to_le_bytes()),
        "stop_words": texts(&[1, 2], &["~~", "``~"]),
        "top_p": float(1.0),
        "frequency_penalty": float(0.0),
        "presence_penalty": float(0.0),
        "temperature": float(0.0),
        "seed": tensor("UINT64", one, &7u64.to_le_bytes()),
        "exclude_input_in_output": tensor("BOOL", one, &[1]),
        "return_num_input_tokens": tensor("BOOL", one, &[1]),
        "return_num_output_tokens": tensor("BOOL", one, &[1]),
    })
}

/// Adds a model whose tensors have a leading dimension.
fn with_leading(bench: &Bench, repository: &std::path::Path, name: &str, more: &str) -> Result<()> {
    let more = format!("max_batch_size: 4\n{more}");
    bench
        .installed
        .model(repository, name, &more, &parameters(&[("slots", "8")]))
}

/// The frontend's own inputs, and none of those that the client adds.
fn request(inputs: Value, model: &str, prompt: &str) -> Value {
    let mut inputs = inputs;
    for name in [
        "sampling_parameters",
        "return_token_ids",
        "return_finish_reason",
    ] {
        if inputs[name].is_null() {
            inputs[name] = Value::Null;
        }
    }
    json!({"prompt": prompt, "sampling": {}, "model": model, "inputs": inputs})
}

fn frontend(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    with_leading(bench, &repository, "leading", "")?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let mut requests = Vec::new();
    for i in 0..4 {
        for stream in [true, false] {
            let prompt = prompt(i);
            requests.push(request(vllm(&prompt, stream), MODEL, &prompt));
            requests.push(request(tensorrt_llm(&prompt, stream), "leading", &prompt));
        }
    }
    let answers = bench.stream(&server, &requests)?;
    for (i, four) in answers.chunks(4).enumerate() {
        for (k, answer) in four.iter().enumerate() {
            one_final(answer).with_context(|| format!("{}", requests[4 * i + k]))?;
            ensure!(
                answer["errors"] == json!([])
                    && answer["text"] == four[0]["text"]
                    && answer["text"] != "",
                "{answer}"
            );
            // A response for each token, or one in all; the frontend adds up what they count.
            let responses = if k < 2 { ANSWER } else { 1 };
            ensure!(
                answer["responses"] == responses && answer["counted"] == ANSWER,
                "request {i}, {k}: {answer}"
            );
        }
    }
    println!("        {} requests", requests.len());
    quiet(&server)
}

fn leading(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    let single = "model_transaction_policy { decoupled: false }\n";
    with_leading(bench, &repository, "single", single)?;
    with_leading(bench, &repository, "leading", "")?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let one = |name: &str, datatype: &str, data: Value| json!({"name": name, "shape": [1, 1], "datatype": datatype, "data": data});
    let answer = server
        .http
        .post(
            "/v2/models/single/infer",
            &json!({"id": "seven", "inputs": [
                one("text_input", "BYTES", json!([prompt(0)])),
                one("max_tokens", "INT32", json!([5])),
                one("temperature", "FP32", json!([0.0])),
                {"name": "stop_words", "shape": [1, 2], "datatype": "BYTES", "data": ["~~", "``~"]},
            ], "outputs": [{"name": "text_output"}, {"name": "token_ids"}, {"name": "finish_reason"}]}),
        )?
        .ok()?
        .json()?;
    ensure!(answer["id"] == "seven", "{answer}");
    let shapes: Vec<(&Value, &Value)> = answer["outputs"]
        .as_array()
        .context("no outputs")?
        .iter()
        .map(|output| (&output["name"], &output["shape"]))
        .collect();
    // Outputs that were named are sent, whatever the flags.
    for (name, shape) in [
        ("text_output", json!([1, 1])),
        ("token_ids", json!([1, 5])),
        ("finish_reason", json!([1, 1])),
    ] {
        ensure!(
            shapes.contains(&(&json!(name), &shape)),
            "{name} is not {shape}: {answer}"
        );
    }
    // /generate needs to know nothing of it.
    let body = json!({"text_input": prompt(0), "max_tokens": 5, "temperature": 0, "exclude_input_in_output": true});
    let mut said = Vec::new();
    for model in ["leading", "single", MODEL] {
        let path = format!("/v2/models/{model}/generate");
        let answer = server.http.post(&path, &body)?.ok()?.json()?;
        said.push(answer["text_output"].clone());
    }
    ensure!(said.iter().all(|text| *text == said[0]), "{said:?}");
    // Two prompts in one request are two answers, which there are not.
    let mut inputs = json!({"text_input": texts(&[2, 1], &["a", "b"])});
    for name in [
        "stream",
        "sampling_parameters",
        "return_token_ids",
        "return_finish_reason",
    ] {
        inputs[name] = Value::Null;
    }
    let two = json!({"prompt": "", "sampling": {}, "model": "leading", "inputs": inputs});
    let answers = bench.stream(&server, &[two])?;
    refused(
        &answers[0],
        By::Backend,
        "text_input: has shape [2, 1], must have one element",
    )?;
    quiet(&server)
}

fn generate(bench: &Bench) -> Result<()> {
    let server = bench.start(&[])?;
    let path = format!("/v2/models/{MODEL}/generate");
    let ask = |more: Value| -> Result<Value> {
        let mut body = json!({"text_input": prompt(0), "temperature": 0, "exclude_input_in_output": true,
            "return_num_output_tokens": true, "ignore_eos": true});
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name.as_str()] = value.clone();
        }
        let answer = server.http.post(&path, &body)?;
        let text = answer.text();
        answer
            .ok()
            .with_context(|| format!("{more}: {text}"))?
            .json()
    };
    // null is what was left out, wherever it stands.
    let nothing = json!({"max_tokens": null, "temperature": null, "seed": null}).to_string();
    let greedy = ask(json!({"max_tokens": 3}))?;
    for more in [
        json!({"max_tokens": 3, "sampling_parameters": nothing}),
        json!({"max_tokens": 3, "id": "seven"}),
        json!({"sampling_parameters": "{\"max_tokens\": 3}", "max_tokens": 9}),
    ] {
        let answer = ask(more.clone())?;
        ensure!(
            answer["num_output_tokens"] == 3 && answer["text_output"] == greedy["text_output"],
            "{more}: {answer}, {greedy}"
        );
    }
    // A value is blamed on where it stands.
    for (more, part) in [
        (json!({"max_tokens": 0}), "input max_tokens is 0, must be"),
        (json!({"min_p": 2}), "parameter min_p is 2, must be"),
        (
            json!({"sampling_parameters": "{\"min_p\": 2}"}),
            "sampling_parameters: min_p is 2, must be",
        ),
        (json!({"max_tokens": 4000}), "max_tokens is 4000, must be 5"),
    ] {
        let error = ask(more.clone()).err().map(|e| format!("{e:#}"));
        let error = error.unwrap_or_default();
        ensure!(error.contains(part), "{more}: expected {part:?}: {error}");
    }
    // Without a wish of its own, an answer ends where the context does.
    let long = "word ".repeat(400);
    let answer = ask(json!({"text_input": long, "return_num_input_tokens": true}));
    if let Ok(answer) = answer {
        let (n_in, n_out) = (&answer["num_input_tokens"], &answer["num_output_tokens"]);
        let all = n_in.as_u64().unwrap_or(0) + n_out.as_u64().unwrap_or(0);
        ensure!(all <= 512, "{answer}");
    }
    quiet(&server)?;
    let log = fs::read_to_string(server.log())?;
    ensure!(!log.contains("panic"), "{log}");
    Ok(())
}
