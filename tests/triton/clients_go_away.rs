// SPDX-License-Identifier: Apache-2.0
//! Clients that go away: cancelled, disconnected, killed, while they wait, while a row of theirs is held.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, PARAMETERS, Test, clients::single, quiet, request, requests, whole};
use crate::{
    metrics::Metrics,
    prompt,
    triton::{server::Triton, setup::MODEL},
};

pub const TESTS: &[Test] = &[
    ("cancelled, disconnected and killed clients", leaving),
    ("cancelled while they wait for a slot", waiting),
    ("cancelled while a row is held, with each fill", held),
    (
        "HTTP clients that hang up, unary calls cancelled",
        one_response,
    ),
    (
        "one client goes from a fresh server, which ends well",
        fresh,
    ),
];

/// From a client's going to the server's knowing nothing of it any more. Generous: metrics come four times a second, and
/// the clients are on the same two cores.
const GONE: Duration = Duration::from_secs(10);

/// Waits until a value at /metrics is as it should be, and no longer than `GONE`.
fn soon(server: &Triton, name: &str, good: impl Fn(f64) -> bool) -> Result<Duration> {
    let start = Instant::now();
    server.metrics_with(name, good)?;
    let took = start.elapsed();
    ensure!(took < GONE, "{name}: {took:?} after the clients went");
    Ok(took)
}

fn ends_well(server: Triton) -> Result<()> {
    let (status, time) = server.stop(Duration::from_secs(40))?;
    ensure!(
        status.success() && time < Duration::from_secs(5),
        "ended with {status} after {time:?}"
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
            let answers = bench.stream(&server, &requests)?;
            let stayed: Vec<_> = answers.into_iter().step_by(4).collect();
            whole(&stayed, |_| 20).with_context(|| format!("{how}: those who stayed"))?;
            quiet(&server)?;
        }
    }
    let killed = server.spawn(&bench.installed, &requests(16, 400), json!({}))?;
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
    whole(&bench.stream(&server, &requests(1, 8))?, |_| 8)?;
    println!(
        "        {} tokens made for 176 requests",
        tokens.unwrap_or(0.0)
    );
    ends_well(server)
}

fn waiting(bench: &Bench) -> Result<()> {
    let server = bench.start_with(&[("slots", "4")])?;
    let all: Vec<Value> = (0..24)
        .map(|i| {
            let mut request = request(i, 450);
            request["cancel_on_line"] = json!(i >= 4);
            // Those that are to stay are taken first.
            request["sampling"]["drex_priority"] = json!(if i < 4 { 1 } else { 0 });
            request
        })
        .collect();
    let (first, second) = all.split_at(4);
    let stay = server.spawn(&bench.installed, first, json!({}))?;
    server.metrics_with("drex_requests_running", |running| running == 4.0)?;
    let mut go = server.spawn(&bench.installed, second, json!({}))?;
    server.metrics_with("drex_requests_waiting", |waiting| waiting == 20.0)?;
    go.cancel()?;
    let took = soon(&server, "drex_requests_waiting", |waiting| waiting == 0.0)?;
    let running = Metrics::parse(&server.metrics()?).get("drex_requests_running");
    ensure!(running == Some(4.0), "{running:?} requests run, not 4");
    for (i, answer) in go.finish()?.iter().enumerate() {
        ensure!(
            answer["cancelled"] == true && answer["responses"] == 0,
            "request {i}: {answer}"
        );
    }
    whole(&stay.finish()?, |_| 450)?;
    println!(
        "        20 of 24 cancelled in the queue, gone after {:.2} s",
        took.as_secs_f64()
    );
    quiet(&server)?;
    ends_well(server)
}

/// Requests that exit now and then, beside some that always do at once and are never held: a row that is held is one of the
/// first, and so is one that has left layers to run later. They are cancelled when there is one of each.
fn held(bench: &Bench) -> Result<()> {
    for fill in FILLS {
        let server = bench.start_with(&[("slots", "16")])?;
        let free = |server: &Triton| -> Result<Option<f64>> {
            Ok(Metrics::parse(&server.metrics()?).get("drex_slots_free"))
        };
        let all_free = free(&server)?;
        // More of them than run at once, so that some are there for as long as it takes, and of different lengths, so that
        // they do not end together.
        let spawn = |threshold: f64, fill: &str| {
            let requests: Vec<_> = (0..200)
                .map(|i| {
                    let mut request = request(i, 360 + 20 * (i as u32 % 7));
                    request["sampling"]["drex_threshold"] = json!(threshold);
                    request["sampling"]["drex_fill"] = json!(fill);
                    request["cancel_on_line"] = json!(true);
                    request
                })
                .collect();
            let more = json!({"at_once": 7, "drain": 0});
            server.spawn(&bench.installed, &requests, more)
        };
        let mut movers = spawn(0.0, "copy")?;
        server.metrics_with("drex_requests_running", |running| running == 7.0)?;
        let mut held = spawn(0.7, fill)?;
        let keeps = ["postfill", "verify"].contains(&fill);
        let start = Instant::now();
        let (rows, pending) = loop {
            let now = Metrics::parse(&server.metrics()?);
            let of = |name: &str| now.get(name).unwrap_or(0.0);
            let (rows, pending) = (of("drex_held_rows"), of("drex_pending_rows"));
            if rows > 0.0 && (pending > 0.0 || !keeps) {
                break (rows, pending);
            }
            ensure!(
                start.elapsed() < GONE * 3,
                "{rows} rows held, {pending} pending"
            );
            std::thread::sleep(Duration::from_millis(10));
        };
        let tokens = || -> Result<f64> {
            let now = Metrics::parse(&server.metrics()?);
            now.get("drex_tokens_total").context("no drex_tokens_total")
        };
        let before = tokens()?;
        held.cancel()?;
        let took = soon(&server, "drex_requests_running", |running| running <= 7.0)?;
        // Had they not been cancelled, seven of them and as many others would have had to run to their ends.
        let made = tokens()? - before;
        ensure!(made < 2000.0, "{made} tokens until they had gone");
        for answer in held.finish()? {
            ensure!(
                answer["cancelled"] == true || answer["finals"] == 1,
                "{answer}"
            );
        }
        // The others go on.
        let before = tokens()?;
        server.metrics_with("drex_tokens_total", |now| now > before)?;
        movers.cancel()?;
        movers.finish()?;
        quiet(&server)?;
        let still = free(&server)?;
        ensure!(
            still.is_some() && still == all_free,
            "{still:?} rows of the arena are free, {all_free:?} were"
        );
        // The slots serve others.
        whole(&bench.stream(&server, &requests(16, 40))?, |_| 40)?;
        println!(
            "        fill {fill}: cancelled with {rows} rows held and {pending} pending, gone after {:.2} s",
            took.as_secs_f64()
        );
    }
    Ok(())
}

const FILLS: [&str; 4] = ["copy", "postfill", "verify", "propagate"];

fn generate(i: usize, stream: bool) -> Value {
    json!({"text_input": prompt(i), "stream": stream, "temperature": 0, "max_tokens": 450, "ignore_eos": true})
}

/// Sends a request over HTTP and hangs up: a stream after its first event, a single answer while it is being made.
fn hang_up(server: &Triton, i: usize, stream: bool) -> Result<()> {
    use std::io::Write;
    if stream {
        let mut events = server.http.stream(
            &format!("/v2/models/{MODEL}/generate_stream"),
            &generate(i, true),
        )?;
        events.next().context("no event")??;
        return Ok(());
    }
    let mut socket = std::net::TcpStream::connect(server.http.addr)?;
    let body = generate(i, false).to_string();
    let path = format!("/v2/models/{MODEL}/generate");
    socket.write_all(&crate::http::request("POST", &path, Some(body.as_bytes())))?;
    server.metrics_with("drex_requests_running", |running| running > 0.0)?;
    Ok(())
}

fn one_response(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    single(bench, &repository)?;
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    for round in 0..4 {
        for stream in [true, false] {
            hang_up(&server, round, stream)?;
            soon(&server, "drex_requests_running", |running| running == 0.0)
                .with_context(|| format!("/generate, stream: {stream}"))?;
        }
    }
    let calls: Vec<Value> = (0..16)
        .map(|i| {
            let mut request = request(i, 450);
            request["how"] = json!("unary");
            request["model"] = json!("single");
            request["cancel_on_line"] = json!(true);
            request
        })
        .collect();
    let mut calls = server.spawn(&bench.installed, &calls, json!({}))?;
    server.metrics_with("drex_requests_running", |running| running == 16.0)?;
    calls.cancel()?;
    soon(&server, "drex_requests_running", |running| running == 0.0)?;
    for (i, answer) in calls.finish()?.iter().enumerate() {
        let text = answer["errors"][0].as_str().unwrap_or_default();
        ensure!(
            text.to_lowercase().contains("cancel") && answer["responses"] == 0,
            "request {i}: {answer}"
        );
    }
    let tokens = Metrics::parse(&server.metrics()?).get("drex_tokens_total");
    // Had they all gone on to their end, it would be 10,800.
    ensure!(
        tokens.is_some_and(|tokens| tokens < 5000.0),
        "{tokens:?} tokens were made"
    );
    println!(
        "        {} tokens made for 24 requests of 450",
        tokens.unwrap_or(0.0)
    );
    quiet(&server)?;
    ends_well(server)
}

fn fresh(bench: &Bench) -> Result<()> {
    for how in [
        "cancel_after",
        "disconnect_after",
        "unary",
        "hang up",
        "hang up in a stream",
    ] {
        let repository = bench.installed.repository(PARAMETERS)?;
        single(bench, &repository)?;
        let server = Triton::start(&bench.installed, repository, 0, &[])?;
        match how {
            "unary" => {
                let mut request = request(0, 450);
                request["how"] = json!("unary");
                request["model"] = json!("single");
                request["cancel_on_line"] = json!(true);
                let mut call = server.spawn(&bench.installed, &[request], json!({}))?;
                server.metrics_with("drex_requests_running", |running| running == 1.0)?;
                call.cancel()?;
                call.finish()?;
            }
            "hang up" => hang_up(&server, 0, false)?,
            "hang up in a stream" => {
                hang_up(&server, 0, true)?;
                soon(&server, "drex_requests_running", |running| running == 0.0)?;
                // The server frees the request on a thread of its own, which a signal would end before (docs/triton.md,
                // limits). Nothing shows when it has.
                std::thread::sleep(Duration::from_secs(1));
            }
            _ => {
                let mut request = request(0, 450);
                request[how] = json!(3);
                bench.stream(&server, &[request])?;
            }
        }
        let (status, time) = server.stop(Duration::from_secs(40))?;
        println!("        {how}: ended after {:.2} s", time.as_secs_f64());
        // The server may not see before the answer that nobody waits for it over HTTP any more: 450 tokens.
        let limit = if how == "hang up" { 25 } else { 5 };
        ensure!(
            status.success() && time < Duration::from_secs(limit),
            "{how}: ended with {status} after {time:?}"
        );
    }
    Ok(())
}
