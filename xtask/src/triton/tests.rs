// SPDX-License-Identifier: Apache-2.0
//! The backend in the real server, with the real clients: `cargo xtask test --triton`.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::setup::{self, Installed, MODEL, Triton};
use crate::{
    cache::{self, Cache},
    client::Metrics,
    llama::{Kind, Llama, Runtime},
    server::Server,
    server_tests::{EXACT, greedy, prompt},
};

struct Bench {
    installed: Installed,
    runtime: Runtime,
}

type Test = (&'static str, fn(&Bench) -> Result<()>);

const TESTS: [Test; 9] = [
    ("64 streams equal llama-server's", equal),
    (
        "/generate, /generate_stream and a decoupled: false model",
        http,
    ),
    ("two models, one with two instances", several),
    ("malformed requests", malformed),
    ("configurations that cannot be", configurations),
    ("cancelled, disconnected and killed clients", leaving),
    ("unload with 32 requests in flight, and load again", unload),
    ("shutdown under load", shutdown),
    ("memory over 2000 requests", memory),
];

/// Runs each test and tells `one` how it went.
pub fn run(
    source: Option<&std::path::Path>,
    one: &mut dyn FnMut(&str, Result<()>, Instant),
) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source)?;
    let runtime = llama.ensure_one(Kind::PatchedExact)?;
    let installed = setup::install(&cache, &runtime)?;
    let _machine = cache.lock_machine()?;
    let bench = Bench { installed, runtime };
    for (name, test) in TESTS {
        let start = Instant::now();
        one(&format!("triton: {name}"), test(&bench), start);
    }
    Ok(())
}

const PARAMETERS: &[(&str, &str)] = &[
    ("policy", "hold"),
    ("kv_type", "q8_0"),
    ("slots", "64"),
    ("context", "512"),
    ("threads", "2"),
];

impl Bench {
    fn start(&self, args: &[&str]) -> Result<Triton> {
        let repository = self.installed.repository(PARAMETERS)?;
        Triton::start(&self.installed, repository, 0, args)
    }
}

fn request(i: usize, tokens: u32) -> Value {
    json!({"prompt": prompt(i), "sampling": {"temperature": 0, "max_tokens": tokens, "ignore_eos": true}})
}

/// Each answer came whole: all tokens, one final flag, nothing after it.
fn whole(answers: &[Value], tokens: impl Fn(usize) -> usize) -> Result<()> {
    for (i, answer) in answers.iter().enumerate() {
        ensure!(answer["errors"] == json!([]), "request {i}: {answer}");
        ensure!(
            answer["finals"] == 1 && answer["after_final"] == 0,
            "request {i}: {answer}"
        );
        let got = answer["tokens"].as_array().map_or(0, Vec::len);
        ensure!(
            got == tokens(i),
            "request {i} has {got} tokens, expected {}",
            tokens(i)
        );
        // one response for each token
        ensure!(answer["responses"] == got, "request {i}: {answer}");
        ensure!(answer["reason"] == "length", "request {i}: {answer}");
    }
    Ok(())
}

/// Nothing is left of any request.
fn quiet(server: &Triton) -> Result<()> {
    server.metrics_with("drex_requests_running", |running| running == 0.0)?;
    let metrics = server.metrics_with("drex_requests_waiting", |waiting| waiting == 0.0)?;
    let metrics = Metrics::parse(&metrics);
    for name in ["drex_held_rows", "drex_pending_rows"] {
        let value = metrics.get(name);
        ensure!(value == Some(0.0), "{name} is {value:?}");
    }
    Ok(())
}

fn equal(bench: &Bench) -> Result<()> {
    let count = 64;
    let length = |i: usize| 24 + (i % 5) * 12;
    for fill in ["copy", "postfill", "propagate"] {
        let requests: Vec<_> = (0..count)
            .map(|i| greedy(&prompt(i), length(i) as u32))
            .collect();
        let model = cache::bundled_model()?;
        let (np, ctx) = (count.to_string(), (count * 512).to_string());
        let model = model.to_string_lossy();
        let args = [
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
            "--kv-unified",
            "--no-webui",
            "--drex-policy",
            "hold",
            "--drex-fill",
            fill,
        ];
        let llama = Server::start(&bench.runtime, args.iter().chain(EXACT))?;
        // Not as streams: those leave out the ids of tokens that end within a character.
        let expected: Vec<Value> = std::thread::scope(|scope| {
            let client = &llama.client;
            let threads: Vec<_> = requests
                .iter()
                .map(|request| {
                    let mut request = request.clone();
                    request["return_tokens"] = json!(true);
                    scope.spawn(move || client.post("/completion", &request)?.ok()?.json())
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .map_err(|_| anyhow::anyhow!("a client panicked"))?
                })
                .collect::<Result<_>>()
        })?;
        drop(llama);

        let server = bench.start(&[])?;
        let requests: Vec<_> = (0..count)
            .map(|i| {
                let mut request = request(i, length(i) as u32);
                request["sampling"]["drex_fill"] = json!(fill);
                request
            })
            .collect();
        let got = server.stream(&bench.installed, &requests, json!({"linger": 0.2}))?;
        whole(&got, length)?;
        let mut tokens = 0;
        for (i, (a, b)) in expected.iter().zip(&got).enumerate() {
            let ids = b["tokens"].as_array().context("no tokens")?;
            ensure!(
                a["tokens"] == b["tokens"] && a["content"] == b["text"],
                "fill {fill}, request {i} differs:\n  llama-server {} {}\n  Triton       {} {}",
                a["content"],
                a["tokens"],
                b["text"],
                b["tokens"]
            );
            tokens += ids.len();
        }
        let metrics = server.metrics_with("drex_exits_total", |exits| exits > 100.0)?;
        let metrics = Metrics::parse(&metrics);
        let exits = metrics.get("drex_exits_total").unwrap_or(0.0);
        ensure!(
            metrics.get("drex_involuntary_exits_total") == Some(0.0),
            "involuntary exits"
        );
        println!(
            "        fill {fill}: {count} streams, {tokens} tokens, {exits} early exits, all equal"
        );
    }
    Ok(())
}

fn http(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    bench.installed.model(
        &repository,
        "single",
        "model_transaction_policy { decoupled: false }\n",
        &[
            ("policy", "hold"),
            ("kv_type", "q8_0"),
            ("slots", "4"),
            ("context", "256"),
        ],
    )?;
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
    let events: Vec<Value> = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    ensure!(events.len() == 12, "{} events", events.len());
    texts.push(
        events
            .iter()
            .filter_map(|event| event["text_output"].as_str())
            .collect(),
    );
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

fn several(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    bench.installed.model(
        &repository,
        "other",
        "instance_group { count: 2 kind: KIND_CPU }\n",
        &[
            ("policy", "latency"),
            ("slots", "4"),
            ("context", "256"),
            ("kv_type", "q8_0"),
        ],
    )?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let requests: Vec<_> = (0..16).map(|i| request(i, 16)).collect();
    let other = server.spawn(&bench.installed, &requests, json!({"model": "other"}))?;
    whole(
        &server.stream(&bench.installed, &requests, json!({}))?,
        |_| 16,
    )?;
    whole(&other.finish()?, |_| 16)?;
    let text = server.metrics_with("drex_tokens_total", |tokens| tokens >= 32.0 * 15.0)?;
    let labels = Metrics::parse(&text).labels("drex_tokens_total", ["model", "instance"]);
    ensure!(labels.len() == 3, "{labels:?}");
    quiet(&server)
}

fn malformed(bench: &Bench) -> Result<()> {
    let mut server = bench.start(&[])?;
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
            json!({"text_input": "a", "max_tokens": "many"}),
            "max_tokens",
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
        (json!({"text_input": ["a", "b"]}), ""),
    ];
    let others = server.spawn(
        &bench.installed,
        &(0..8).map(|i| request(i, 200)).collect::<Vec<_>>(),
        json!({}),
    )?;
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
    // A length inside the string tensor that points beyond it: only the backend can see that.
    for length in [0xffff_ffffu32, 6, 0] {
        let mut tensor = length.to_le_bytes().to_vec();
        tensor.extend(b"hello");
        let head = json!({"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES",
            "parameters": {"binary_data_size": tensor.len()}}]})
        .to_string();
        let answer = raw_infer(&server, &head, &tensor)?;
        ensure!(!answer.contains(" 200 "), "length {length}: {answer}");
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
        "POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nInference-Header-Content-Length: {}\r\n\
         Content-Length: {}\r\n\r\n{head}",
        head.len(),
        head.len() + tensor.len()
    )?;
    socket.write_all(tensor)?;
    let mut answer = [0; 4096];
    let n = socket.read(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..n]).into_owned())
}

fn configurations(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    let mut cases = Vec::new();
    for (i, (more, parameters, part)) in [
        ("", &[("polizy", "hold")][..], "polizy"),
        ("", &[("policy", "hope")], "hope"),
        ("", &[("slots", "0")], "slots"),
        ("", &[("exit_layers", "4,99")], "ramp_layers"),
        ("", &[("threshold", "0.5,0.5")], "threshold has 2 values"),
        ("", &[("kv_type", "q9_9")], "q9_9"),
        ("", &[("model_file", "no.gguf")], "no.gguf"),
        ("max_batch_size: 8\n", &[], "max_batch_size"),
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
    for (name, part) in &cases {
        let answer = server
            .http
            .post(&format!("/v2/repository/models/{name}/load"), &json!({}))?;
        let text = answer.text();
        ensure!(
            answer.status != 200 && text.contains(part),
            "{name}: expected {part:?}: {} {text}",
            answer.status
        );
    }
    whole(
        &server.stream(&bench.installed, &[request(0, 8)], json!({}))?,
        |_| 8,
    )?;
    println!(
        "        {} configurations refused, the good model serves",
        cases.len()
    );
    Ok(())
}

fn leaving(bench: &Bench) -> Result<()> {
    let mut server = bench.start(&[])?;
    for (how, rounds) in [("cancel_after", 3), ("disconnect_after", 2)] {
        for round in 0..rounds {
            let requests: Vec<_> = (0..32)
                .map(|i| {
                    let mut request = request(i, 400);
                    if i % 4 != 0 {
                        request[how] = json!((i + round) % 7);
                    } else {
                        request["sampling"]["max_tokens"] = json!(20);
                    }
                    request
                })
                .collect();
            let answers = server.stream(&bench.installed, &requests, json!({}))?;
            let stayed: Vec<_> = answers.into_iter().step_by(4).collect();
            whole(&stayed, |_| 20).with_context(|| format!("{how}: those who stayed"))?;
            quiet(&server)?;
        }
    }
    let killed = server.spawn(
        &bench.installed,
        &(0..16).map(|i| request(i, 400)).collect::<Vec<_>>(),
        json!({}),
    )?;
    server.metrics_with("drex_requests_running", |running| running > 0.0)?;
    killed.kill()?;
    quiet(&server)?;
    // Had they all gone on to their end, it would be 54000.
    let tokens = Metrics::parse(&server.metrics()?).get("drex_tokens_total");
    ensure!(
        tokens.is_some_and(|tokens| tokens < 10_000.0),
        "{tokens:?} tokens were made"
    );
    ensure!(server.is_running(), "the server has ended");
    whole(
        &server.stream(&bench.installed, &[request(0, 8)], json!({}))?,
        |_| 8,
    )?;
    println!(
        "        {} tokens made for 176 requests",
        tokens.unwrap_or(0.0)
    );
    let (status, time) = server.stop(Duration::from_secs(20))?;
    ensure!(
        status.success() && time < Duration::from_secs(5),
        "ended with {status} after {time:?}"
    );
    Ok(())
}

fn unload(bench: &Bench) -> Result<()> {
    let server = bench.start(&[])?;
    for _ in 0..3 {
        let requests: Vec<_> = (0..32).map(|i| request(i, 100)).collect();
        let streams = server.spawn(&bench.installed, &requests, json!({}))?;
        server.metrics_with("drex_requests_running", |running| running >= 32.0)?;
        let model = |what: &str| format!("/v2/repository/models/{MODEL}/{what}");
        server.http.post(&model("unload"), &json!({}))?.ok()?;
        whole(&streams.finish()?, |_| 100)?;
        // What is unloaded is gone from /metrics too.
        let start = Instant::now();
        while Metrics::parse(&server.metrics()?)
            .get("drex_tokens_total")
            .is_some()
        {
            ensure!(
                start.elapsed() < Duration::from_secs(10),
                "metrics of a model that is unloaded"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        server.http.post(&model("load"), &json!({}))?.ok()?;
    }
    // Load while it is loaded and busy: a new one takes over.
    let requests: Vec<_> = (0..32).map(|i| request(i, 100)).collect();
    let streams = server.spawn(&bench.installed, &requests, json!({}))?;
    server.metrics_with("drex_requests_running", |running| running > 0.0)?;
    server
        .http
        .post(&format!("/v2/repository/models/{MODEL}/load"), &json!({}))?
        .ok()?;
    whole(&streams.finish()?, |_| 100)?;
    quiet(&server)
}

fn shutdown(bench: &Bench) -> Result<()> {
    for (tokens, limit) in [(60, 15), (400, 40)] {
        let server = bench.start(&[])?;
        let requests: Vec<_> = (0..32).map(|i| request(i, tokens)).collect();
        let streams = server.spawn(&bench.installed, &requests, json!({}))?;
        server.metrics_with("drex_requests_running", |running| running >= 16.0)?;
        let (status, time) = server.stop(Duration::from_secs(limit))?;
        let answers = streams.finish()?;
        let finals = answers
            .iter()
            .filter(|answer| answer["finals"] == 1)
            .count();
        let more = answers
            .iter()
            .filter(|answer| answer["finals"].as_u64() > Some(1))
            .count();
        ensure!(status.success(), "ended with {status} after {time:?}");
        ensure!(more == 0, "{more} requests with several final flags");
        println!(
            "        {tokens} tokens each: ended after {:.1} s, {finals} of 32 had their final flag",
            time.as_secs_f64()
        );
    }
    Ok(())
}

fn memory(bench: &Bench) -> Result<()> {
    let server = bench.start(&[])?;
    let run = |count: usize| {
        let requests: Vec<_> = (0..count).map(|i| request(i, 2 + i as u32 % 4)).collect();
        let answers = server.stream(&bench.installed, &requests, json!({"at_once": 32}))?;
        whole(&answers, |i| 2 + i % 4)
    };
    // until graphs and pools have grown to what this load needs
    run(2000)?;
    let before = server.resident()?;
    run(2000)?;
    let after = server.resident()?;
    let grown = after as i64 - before as i64;
    println!(
        "        {:.1} MB before, {:+.1} MB after",
        before as f64 / 1e6,
        grown as f64 / 1e6
    );
    ensure!(
        grown < 24_000_000,
        "grew by {grown} bytes over 2000 requests"
    );
    quiet(&server)
}
