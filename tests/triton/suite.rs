// SPDX-License-Identifier: Apache-2.0
//! The backend in the real server, with the real clients: `cargo xtask test --triton`.

mod backend_api_versions;
mod bad_input;
mod clients;
mod clients_go_away;
mod examples;
mod exits;
mod figures;
mod formats;
mod load_and_unload;
mod memory;
mod names_of_metrics;
mod queue;
mod refusals;
mod same_as_llama_server;
mod statistics;

use std::{cell::RefCell, collections::BTreeMap, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use drex_build::{
    Source,
    cache::{self, Cache, Lock},
    llama::{EXACT_ARGS, Kind, Llama, Runtime},
    process, tools,
};
use drex_harness::{
    families, generate, http,
    metrics::{self, Metrics},
    prompts::prompt,
    score, server,
    suite::{self, Choice},
};
use drex_triton_server::{
    self as triton,
    load::{self, Load},
    server::Triton,
    setup::{self, Installed},
};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(name = "triton", about = "The backend in Triton Inference Server")]
struct Options {
    #[command(flatten)]
    choice: Choice,
    /// With AIPerf too, which fetches 1.2 GB once
    #[arg(long)]
    load: bool,
    #[command(flatten)]
    source: Source,
}

struct Bench {
    cache: Cache,
    source: Source,
    /// Nobody else's meanwhile.
    machine: RefCell<Option<Lock>>,
    installed: Installed,
    reference: Runtime,
    patched: Runtime,
    /// Patched, and built as users get it.
    usual: Runtime,
    /// `drex-score` in the reference build.
    score: PathBuf,
    /// What llama-server answered, by fill: it is asked once.
    expected: RefCell<BTreeMap<&'static str, Vec<Value>>>,
}

type Test = suite::Test<Bench>;

/// In the order in which they run.
fn all() -> Vec<Test> {
    [
        same_as_llama_server::TESTS,
        exits::TESTS,
        clients::TESTS,
        load_and_unload::TESTS,
        bad_input::TESTS,
        clients_go_away::TESTS,
        statistics::TESTS,
        queue::TESTS,
        formats::TESTS,
        refusals::TESTS,
        figures::TESTS,
        names_of_metrics::TESTS,
        examples::TESTS,
        backend_api_versions::TESTS,
        memory::TESTS,
    ]
    .concat()
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut tests = all();
    if options.load {
        // The last one: it takes the machine for itself.
        tests.push(("AIPerf, 64 requests at 16 at a time", aiperf));
    }
    suite::main(&options.choice, |run| {
        run.tests("Triton is laid out", || Bench::new(&options.source), &tests);
    })
}

fn aiperf(bench: &Bench) -> Result<()> {
    drop(bench.machine.take());
    let load = Load {
        requests: 64,
        concurrency: vec![16],
        rounds: 1,
    };
    let llama = Llama::open(&bench.cache, bench.source.llama_src.as_deref())?;
    let reference = llama.ensure_one(Kind::Reference)?;
    load::run(&bench.cache, &bench.installed, &reference, &load, false).map(drop)
}

const PARAMETERS: &[(&str, &str)] = &[
    ("policy", "hold"),
    ("kv_type", "q8_0"),
    ("slots", "64"),
    ("context", "512"),
    ("threads", "2"),
];

/// `PARAMETERS` with others, or with other values.
fn parameters<'a>(other: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut all: Vec<(&str, &str)> = PARAMETERS
        .iter()
        .filter(|(name, _)| other.iter().all(|(o, _)| o != name))
        .copied()
        .collect();
    all.extend(other);
    all
}

impl Bench {
    fn new(source: &Source) -> Result<Bench> {
        let cache = Cache::open()?;
        let llama = Llama::open(&cache, source.llama_src.as_deref())?;
        let kinds = [Kind::ReferenceExact, Kind::PatchedExact, Kind::Patched];
        let mut runtimes = llama.ensure(&kinds)?.into_iter();
        let reference = runtimes.next().context("no reference build")?;
        let patched = runtimes.next().context("no patched build")?;
        let usual = runtimes.next().context("no usual build")?;
        let mut programs = llama.tools(&reference)?.into_iter();
        let score = programs.find(|program| program.ends_with("drex-score"));
        Ok(Bench {
            score: score.context("no score tool")?,
            installed: setup::install(&cache, &patched)?,
            machine: RefCell::new(Some(cache.lock_machine()?)),
            source: source.clone(),
            reference,
            patched,
            usual,
            expected: RefCell::default(),
            cache,
        })
    }

    fn start(&self, args: &[&str]) -> Result<Triton> {
        let repository = self.installed.repository(PARAMETERS)?;
        Triton::start(&self.installed, repository, 0, args)
    }

    fn start_with(&self, other: &[(&str, &str)]) -> Result<Triton> {
        let repository = self.installed.repository(&parameters(other))?;
        Triton::start(&self.installed, repository, 0, &[])
    }

    fn stream(&self, server: &Triton, requests: &[Value]) -> Result<Vec<Value>> {
        server.stream(&self.installed, requests, json!({}))
    }
}

fn request(i: usize, tokens: u32) -> Value {
    json!({"prompt": prompt(i), "sampling": {"temperature": 0, "max_tokens": tokens, "ignore_eos": true}})
}

fn requests(count: usize, tokens: u32) -> Vec<Value> {
    (0..count).map(|i| request(i, tokens)).collect()
}

/// Each answer came whole: all tokens, one final flag, nothing after it, and the server ended the stream.
fn whole(answers: &[Value], tokens: impl Fn(usize) -> usize) -> Result<()> {
    for (i, answer) in answers.iter().enumerate() {
        one_final(answer).with_context(|| format!("request {i}"))?;
        ensure!(answer["errors"] == json!([]), "request {i}: {answer}");
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

/// However a request ended: one final flag, nothing after it, and then the server ended the stream.
fn one_final(answer: &Value) -> Result<()> {
    ensure!(
        answer["finals"] == 1 && answer["after_final"] == 0 && answer["ended"] == true,
        "{} final flags, {} responses after the first, stream ended: {}; {answer}",
        answer["finals"],
        answer["after_final"],
        answer["ended"]
    );
    Ok(())
}

/// Who refused a request.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// The backend, with the final flag.
    Backend,
    /// The server, before the backend sees it: with an error that has no flag at all.
    Server,
}

/// The error is all that a request was answered with.
fn refused(answer: &Value, by: By, part: &str) -> Result<()> {
    let finals = u32::from(by == By::Backend);
    ensure!(
        answer["finals"] == finals && answer["after_final"] == 0 && answer["ended"] == true,
        "{} final flags, not {finals}: {answer}",
        answer["finals"]
    );
    let text = answer["errors"][0].as_str().unwrap_or_default();
    ensure!(
        answer["errors"].as_array().is_some_and(|e| e.len() == 1) && text.contains(part),
        "expected {part:?}, got {}",
        answer["errors"]
    );
    ensure!(answer["responses"] == 0, "responses too: {answer}");
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
