//! Tests of the patched llama-server, against the unpatched one where it says what is right.
//!
//! A test is a function from the suite to a result; what it returns as an error is why it failed. To add one, write it
//! in a module here and name it in that module's `TESTS`.

mod adapters;
mod bad_input;
mod basic;
mod counts;
mod emitted;
mod exact;
mod files;
mod fills;
mod first_ramp;
mod lifecycle;
mod programs;
mod race;
mod requests;
mod scheduler;
mod transparency;
mod turns;

pub use exact::EXACT;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use crate::{
    client::Client,
    llama::Runtime,
    load::{self, Generation},
    server::Server,
};

/// A build and the programs of ours that were compiled for it.
pub type Build = (Runtime, Vec<PathBuf>);

/// What tests work with.
pub struct Suite {
    pub reference: Build,
    pub patched: Build,
    /// The unpatched and the patched build whose results do not depend on the batch size; none with `--quick`.
    pub exact: Option<(Build, Build)>,
    /// The bundled model.
    pub model: PathBuf,
}

pub const GPU_DRY_RUN: &str = "what a GPU machine runs, on the CPU";

pub struct Test {
    pub name: &'static str,
    pub run: fn(&Suite) -> Result<()>,
    /// Left out with `--quick`.
    pub slow: bool,
    /// Needs the exact builds; what `--exact` runs.
    pub exact: bool,
}

impl Test {
    pub const fn new(name: &'static str, run: fn(&Suite) -> Result<()>) -> Test {
        Test {
            name,
            run,
            slow: false,
            exact: false,
        }
    }

    #[allow(dead_code, reason = "for the tests to come")]
    pub const fn slow(self) -> Test {
        Test { slow: true, ..self }
    }

    pub const fn exact(self) -> Test {
        Test {
            exact: true,
            ..self
        }
    }
}

/// In the order in which they run: what everything else relies on comes first.
pub fn all() -> Vec<Test> {
    [
        programs::TESTS,
        basic::TESTS,
        bad_input::TESTS,
        requests::TESTS,
        lifecycle::TESTS,
        files::TESTS,
        counts::TESTS,
        emitted::TESTS,
        adapters::TESTS,
        scheduler::TESTS,
        exact::TESTS,
        fills::TESTS,
        transparency::TESTS,
        turns::TESTS,
        first_ramp::TESTS,
        race::TESTS,
    ]
    .into_iter()
    .flat_map(|tests| tests())
    .collect()
}

/// Runs a test; a panic in it is its failure only.
pub fn guarded(test: &Test, suite: &Suite) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| (test.run)(suite))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_default();
        Err(anyhow!("panicked: {text}"))
    })
}

impl Suite {
    /// A server on the bundled model with `slots` places for requests of up to 512 tokens.
    pub fn start(&self, build: &Build, slots: usize, args: &[&str]) -> Result<Server> {
        let (slots_text, ctx) = (slots.to_string(), (slots * 512).to_string());
        let model = self.model.to_string_lossy();
        let common = [
            "-m",
            &model,
            "-np",
            &slots_text,
            "-c",
            &ctx,
            "-t",
            "2",
            "--cache-ram",
            "0",
            "-fa",
            "on",
        ];
        let flags = ["--metrics", "--slots", "--no-webui"];
        Server::start(&build.0, common.iter().chain(&flags).chain(args))
    }
}

/// One of our own programs.
pub fn program<'a>(build: &'a Build, name: &str) -> Result<&'a Path> {
    let found = build
        .1
        .iter()
        .find(|path| path.file_name().is_some_and(|n| n == name));
    found.map(PathBuf::as_path).with_context(|| {
        format!(
            "there is no program {name} for the {} build",
            build.0.kind.name()
        )
    })
}

/// Prompts in the manner of the bundled model's training text; `i` makes each a different one.
pub fn prompt(i: usize) -> String {
    const STARTS: [&str; 8] = [
        "Returns the",
        "# Examples\n\nBasic usage:\n\n```\nlet x =",
        "A closure can",
        "impl Display for",
        "The borrow checker ensures that",
        "fn main() {\n    let mut v = vec![",
        "An iterator over the",
        "This function will panic if",
    ];
    format!("{} {i}", STARTS[i % STARTS.len()])
}

/// The exits per ramp that a finished request reports.
pub fn exits(generation: &Generation) -> Vec<u64> {
    let list = generation.last["timings"]["drex_exits"].as_array();
    list.into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect()
}

/// A greedy request for so many tokens, in the form that `generate` takes.
pub fn greedy(prompt: &str, tokens: u32) -> Value {
    json!({"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": true, "cache_prompt": false})
}

/// Sends requests to `/completion` as streams with token ids, so many at a time; the answers are in the requests' order.
pub fn generate(client: Client, requests: &[Value], concurrency: usize) -> Result<Vec<Generation>> {
    let bodies: Vec<_> = requests
        .iter()
        .map(|request| {
            let mut request = request.clone();
            request["stream"] = json!(true);
            request["return_tokens"] = json!(true);
            request.to_string().into_bytes()
        })
        .collect();
    let outcome = load::closed_loop(
        client.addr,
        "/completion",
        &bodies,
        concurrency,
        load::Limits::silence(crate::client::TIMEOUT),
    )?;
    let mut out = vec![Generation::default(); requests.len()];
    for finished in &outcome.finished {
        out[finished.job] = finished
            .generation()
            .with_context(|| format!("request {}", finished.job))?;
    }
    Ok(out)
}
