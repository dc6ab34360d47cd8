// SPDX-License-Identifier: Apache-2.0
//! Requests and configurations that cannot be: each is refused by what it says, and everything else goes on.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    Bench, By, PARAMETERS, Test, clients::single, quiet, refused, request, requests, whole,
};
use crate::triton::{server::Triton, setup::MODEL};

pub const TESTS: &[Test] = &[
    ("malformed requests over HTTP", malformed),
    ("malformed requests over gRPC", malformed_grpc),
    ("configurations that cannot be", configurations),
];

/// String tensors of one element by their shape, who refuses them, and how: the server counts the elements and sees that
/// the lengths are there, but not that the text is.
const STRINGS: [(&[u8], By, &str); 5] = [
    (
        b"\xff\xff\xff\xffhello",
        By::Backend,
        "text_input: element 0 says it has 4294967295 bytes, the tensor has 5 left",
    ),
    (
        b"\x06\0\0\0hello",
        By::Backend,
        "text_input: element 0 says it has 6 bytes, the tensor has 5 left",
    ),
    (
        b"\x02\0\0\0\xff\xfe",
        By::Backend,
        "text_input: element 0 is not UTF-8",
    ),
    (
        b"\x01\0\0\0a\x01\0\0\0b",
        By::Server,
        "unexpected number of string elements 2",
    ),
    (b"\x04\0", By::Server, "incomplete string length indicator"),
];

fn malformed(bench: &Bench) -> Result<()> {
    let mut server = {
        let repository = bench.installed.repository(PARAMETERS)?;
        single(bench, &repository)?;
        Triton::start(&bench.installed, repository, 0, &[])?
    };
    let path = format!("/v2/models/{MODEL}/generate");
    let long = "word ".repeat(3000);
    let cases = [
        (json!({"text_input": "a", "tempreature": 1}), "tempreature"),
        (
            json!({"text_input": "a", "sampling_parameters": "{"}),
            "not JSON",
        ),
        (
            json!({"text_input": "a", "sampling_parameters": "[1]"}),
            "not a JSON object",
        ),
        (
            json!({"text_input": "a", "sampling_parameters": "{\"top_p\": 2}"}),
            "top_p is 2",
        ),
        (
            json!({"text_input": "a", "max_tokens": 0}),
            "max_tokens is 0",
        ),
        (
            json!({"text_input": "a", "drex_priority": "many"}),
            "drex_priority is",
        ),
        (json!({"text_input": "a", "drex_fill": "pour"}), "drex_fill"),
        (json!({"text_input": long}), "the context holds 512"),
        (
            json!({"text_input": "a", "stream": true, "exclude_input_in_output": false}),
            "exclude_input_in_output",
        ),
        (json!({"stream": false}), "text_input"),
        // the server itself refuses these two
        (json!({"text_input": 5}), "as string"),
        (
            json!({"text_input": ["a", "b"]}),
            "can not convert input 'text_input' to tensor with proper shape",
        ),
    ];
    let others = server.spawn(&bench.installed, &requests(8, 200), json!({}))?;
    let mut count = 0;
    for _ in 0..3 {
        for (body, part) in &cases {
            let answer = server.http.post(&path, body)?;
            let text = answer.text();
            ensure!(
                answer.status != 200 && text.contains(part),
                "{body}: {} {text}",
                answer.status
            );
            count += 1;
        }
    }
    // Over HTTP a model with several responses for a request can only be asked for one: the server's own words, under 200.
    let answer = server.http.post(
        &path,
        &json!({"text_input": "a", "stream": true, "max_tokens": 4}),
    )?;
    ensure!(
        answer.json()?["error"]
            .as_str()
            .is_some_and(|text| text.contains("exactly 1 response")),
        "/generate with stream: {}",
        answer.text()
    );
    count += 1;
    // Lengths inside the string tensor that do not fit it. A model with one response for a request, since the server refuses
    // /infer of others.
    for (tensor, _, part) in STRINGS {
        let head = json!({"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES",
            "parameters": {"binary_data_size": tensor.len()}}]})
        .to_string();
        let answer = raw_infer(&server, &head, tensor)?;
        ensure!(
            !answer.contains(" 200 ") && answer.contains(part),
            "{tensor:?}: expected {part:?}: {answer}"
        );
        count += 1;
    }
    whole(&others.finish()?, |_| 200)?;
    ensure!(server.is_running(), "the server has ended");
    println!("        {count} requests refused, 8 others went on");
    quiet(&server)
}

/// A request in the binary form of /infer, which no client of ours would send.
fn raw_infer(server: &Triton, head: &str, tensor: &[u8]) -> Result<String> {
    use std::io::{Read, Write};
    let mut socket = std::net::TcpStream::connect(server.http.addr)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(
        socket,
        "POST /v2/models/single/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nInference-Header-Content-Length: {}\r\n\
         Content-Length: {}\r\n\r\n{head}",
        head.len(),
        head.len() + tensor.len()
    )?;
    socket.write_all(tensor)?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// What `inputs` and `parameters` of a request over gRPC are, who refuses it, and a part of the error.
fn wrong_messages() -> Vec<(Value, Value, By, &'static str)> {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let tensor = |datatype: &str, shape: &[u32], bytes: &[u8]| json!({"datatype": datatype, "shape": shape, "hex": hex(bytes)});
    let strings = STRINGS.iter().map(|(bytes, by, part)| {
        (
            json!({"text_input": tensor("BYTES", &[1], bytes)}),
            json!({}),
            *by,
            *part,
        )
    });
    let two = b"\x01\0\0\0a\x01\0\0\0b";
    let by_server = [
        (
            json!({"text_input": tensor("INT32", &[1], &[5, 0, 0, 0])}),
            "data-type is 'INT32'",
        ),
        (
            json!({"text_input": tensor("BYTES", &[2], two)}),
            "Expected [1], got [2]",
        ),
        (
            json!({"text_input": tensor("BYTES", &[1, 1], b"\x01\0\0\0a")}),
            "Expected [1], got [1,1]",
        ),
        (
            json!({"stream": tensor("INT32", &[1], &[1, 0, 0, 0])}),
            "data-type is 'INT32'",
        ),
        (
            json!({"stream": tensor("BOOL", &[1], &[1, 1])}),
            "byte size mismatch for input 'stream'",
        ),
        (
            json!({"prompt": "a"}),
            "unexpected inference input 'prompt'",
        ),
    ];
    let by_backend = [
        (json!({"text_input": null}), "text_input is missing"),
        (
            json!({"sampling_parameters": "{"}),
            "sampling_parameters: not JSON",
        ),
        (
            json!({"sampling_parameters": "{\"n\": \u{7}}"}),
            "sampling_parameters: not JSON",
        ),
        (
            json!({"exclude_input_in_output": false}),
            "exclude_input_in_output is false",
        ),
    ];
    let parameters = [
        (
            json!({"tempreature": 1.5}),
            "parameter tempreature is an unknown name",
        ),
        (json!({"max_tokens": "many"}), "max_tokens is \"many\""),
        (json!({"max_tokens": -1}), "max_tokens is -1"),
        (json!({"temperature": true}), "temperature is true"),
        (json!({"drex_fill": "pour"}), "drex_fill is \"pour\""),
    ];
    strings
        .chain(by_server.map(|(inputs, part)| (inputs, json!({}), By::Server, part)))
        .chain(by_backend.map(|(inputs, part)| (inputs, json!({}), By::Backend, part)))
        .chain(parameters.map(|(parameters, part)| (json!({}), parameters, By::Backend, part)))
        .collect()
}

fn malformed_grpc(bench: &Bench) -> Result<()> {
    let mut server = bench.start(&[])?;
    let cases = wrong_messages();
    let mut requests: Vec<Value> = cases
        .iter()
        .map(|(inputs, parameters, ..)| {
            let mut request = request(0, 8);
            // What sampling_parameters says would win over the parameters.
            request["inputs"] = json!({"sampling_parameters": null});
            for (name, value) in inputs.as_object().into_iter().flatten() {
                request["inputs"][name.as_str()] = value.clone();
            }
            request["parameters"] = parameters.clone();
            request
        })
        .collect();
    // All at once, among good ones.
    requests.extend(super::requests(16, 100));
    let answers = bench.stream(&server, &requests)?;
    for ((inputs, parameters, by, part), answer) in cases.iter().zip(&answers) {
        refused(answer, *by, part).with_context(|| format!("{inputs} {parameters}"))?;
    }
    whole(&answers[cases.len()..], |_| 100)?;
    ensure!(server.is_running(), "the server has ended");
    println!(
        "        {} requests refused, 16 others went on",
        cases.len()
    );
    quiet(&server)
}

fn configurations(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    let mut cases = Vec::new();
    for (i, (more, parameters, part)) in [
        ("", &[("polizy", "hold")][..], "polizy"),
        ("", &[("policy", "hope")], "policy is \"hope\""),
        ("", &[("metric", "gab")], "metric is \"gab\""),
        ("", &[("slots", "0")], "slots"),
        ("", &[("exit_layers", "4,99")], "exit_layers is [4, 99]"),
        ("", &[("exit_layers", "8,4")], "exit_layers is [8, 4]"),
        ("", &[("exit_layers", "16")], "exit_layers is [16]"),
        ("", &[("threshold", "0.5,0.5")], "threshold has 2 values"),
        ("", &[("kv_type", "q9_9")], "q9_9"),
        // types of ggml that a KV cache cannot have
        ("", &[("kv_type", "i32")], "kv_type is \"i32\""),
        ("", &[("kv_type", "q8_1")], "kv_type is \"q8_1\""),
        ("", &[("slots", "300")], "slots is \"300\""),
        (
            "",
            &[("slots", "256"), ("context", "16777216")],
            "slots is 256 and context is 16777216",
        ),
        ("", &[("model_file", "no.gguf")], "no.gguf"),
        (
            "input { name: \"prompt\" data_type: TYPE_STRING dims: [1] }\n",
            &[],
            "unknown name prompt",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("bad{i}");
        bench
            .installed
            .model(&repository, &name, more, parameters)?;
        cases.push((name, part));
    }
    let empty = repository.join("empty");
    fs::create_dir_all(empty.join("1"))?;
    fs::write(empty.join("config.pbtxt"), "backend: \"drex\"\n")?;
    cases.push(("empty".into(), "0 files *.gguf"));
    let torn = repository.join("torn/1");
    fs::create_dir_all(&torn)?;
    fs::write(torn.join("model.gguf"), b"GGUF and nothing more")?;
    fs::write(torn.join("../config.pbtxt"), "backend: \"drex\"\n")?;
    cases.push(("torn".into(), "model.gguf"));
    let server = Triton::start(
        &bench.installed,
        repository,
        0,
        &["--exit-on-error=false", "--strict-readiness=false"],
    )?;
    let others = server.spawn(&bench.installed, &requests(16, 400), json!({}))?;
    server.metrics_with("drex_requests_running", |running| running >= 16.0)?;
    for (name, part) in &cases {
        let answer = server
            .http
            .post(&format!("/v2/repository/models/{name}/load"), &json!({}))?;
        // As it is said, without JSON's escapes.
        let said = answer.json()?;
        let text = said["error"].as_str().unwrap_or_default();
        ensure!(
            answer.status != 200 && text.contains(part),
            "{name}: expected {part:?}: {} {text}",
            answer.status
        );
    }
    whole(&others.finish()?, |_| 400)?;
    println!(
        "        {} configurations refused, 16 streams of the good model went on",
        cases.len()
    );
    Ok(())
}
