// SPDX-License-Identifier: Apache-2.0

//! Tests of the patched llama-server, against the unpatched one where it says what is right.
//!
//! A test is a function from the suite to a result; what it returns as an error is why it failed. To add one, write it
//! in a module here and name it in that module's `TESTS`.

mod bad_input;
mod banned_tokens_and_grammars;
mod benchmarks;
mod clients_go_away;
mod counts;
mod exact;
mod exits;
mod fills;
mod first_ramp;
mod gpu_dry_run;
mod lora_adapters;
mod modes;
mod page;
mod profile_and_record;
mod quality;
mod request_options;
mod scheduler;
mod slots_taken_over;
mod start_and_answer;
mod test_programs;
mod token_figures;
mod transparency;
mod tuner;
mod waiting_requests;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Parser;
use drex_bench as bench;
use drex_build::{
    Source,
    cache::{self, Cache, Lock},
    cargo,
    llama::{EXACT_ARGS as EXACT, Kind, Llama, Runtime},
    process, serve,
};
use drex_harness::{
    browser, client,
    generate::{drafts, equal, exits, generate},
    gguf,
    load::{self, Generation},
    metrics,
    prompts::prompt,
    score,
    server::{self, Server},
    suite::{self, Choice, Run},
};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(
    name = "server",
    about = "The patched llama-server against the unpatched one"
)]
struct Options {
    #[command(flatten)]
    choice: Choice,
    /// Leave out the builds whose results do not depend on the batch size
    #[arg(long)]
    quick: bool,
    /// Every combination of thresholds, policies and numbers in flight, where each is otherwise tried once; and tests that
    /// have a long form only
    #[arg(long)]
    long: bool,
    #[command(flatten)]
    source: Source,
}

fn main() -> ExitCode {
    let options = Options::parse();
    suite::main(&options.choice, |run| tests(&options, run))
}

fn tests(options: &Options, run: &mut Run) {
    let all: Vec<Test> = all()
        .into_iter()
        .filter(|test| !(options.quick && test.exact) && (options.long || !test.long))
        .collect();
    let exact = all
        .iter()
        .any(|test| test.exact && options.choice.wants(test.name));
    let tests: Vec<_> = all.iter().map(|test| (test.name, test.run)).collect();
    let build = || Suite::build(options, exact);
    if browser::program().is_none() && options.choice.wants(page::IN_BROWSER) {
        println!("no Chromium: {} was not looked at", page::IN_BROWSER);
    }
    run.tests("build llama.cpp", build, &tests);
}

/// A build and the programs of ours that were compiled for it.
pub type Build = (Runtime, Vec<PathBuf>);

/// What tests work with.
pub struct Suite {
    pub reference: Build,
    pub patched: Build,
    /// The unpatched and the patched build whose results do not depend on the batch size, where a chosen test needs them.
    pub exact: Option<(Build, Build)>,
    /// The bundled model.
    pub model: PathBuf,
    pub cache: Cache,
    /// Every combination is tried.
    pub long: bool,
    /// The machine is nobody else's meanwhile.
    _machine: Lock,
}

pub struct Test {
    pub name: &'static str,
    pub run: fn(&Suite) -> Result<()>,
    /// Needs the exact builds; left out with `--quick`.
    pub exact: bool,
    /// Has a long form only: left out without `--long`.
    pub long: bool,
}

impl Test {
    pub const fn new(name: &'static str, run: fn(&Suite) -> Result<()>) -> Test {
        Test {
            name,
            run,
            exact: false,
            long: false,
        }
    }

    pub const fn exact(self) -> Test {
        Test {
            exact: true,
            ..self
        }
    }

    pub const fn long(self) -> Test {
        Test { long: true, ..self }
    }
}

/// In the order in which they run: what everything else relies on comes first.
pub fn all() -> Vec<Test> {
    [
        test_programs::TESTS,
        gpu_dry_run::TESTS,
        start_and_answer::TESTS,
        bad_input::TESTS,
        request_options::TESTS,
        token_figures::TESTS,
        page::TESTS,
        clients_go_away::TESTS,
        waiting_requests::TESTS,
        modes::TESTS,
        profile_and_record::TESTS,
        quality::TESTS,
        counts::TESTS,
        banned_tokens_and_grammars::TESTS,
        lora_adapters::TESTS,
        scheduler::TESTS,
        exact::TESTS,
        fills::TESTS,
        exits::TESTS,
        tuner::TESTS,
        transparency::TESTS,
        slots_taken_over::TESTS,
        first_ramp::TESTS,
        benchmarks::TESTS,
    ]
    .into_iter()
    .flat_map(|tests| tests())
    .collect()
}

impl Suite {
    fn build(options: &Options, exact: bool) -> Result<Suite> {
        let cache = Cache::open()?;
        let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
        let mut kinds = vec![Kind::Reference, Kind::Patched];
        if exact {
            kinds.extend([Kind::ReferenceExact, Kind::PatchedExact]);
        }
        let mut builds = Vec::new();
        for runtime in llama.ensure(&kinds)? {
            let programs = llama.tools(&runtime)?;
            builds.push((runtime, programs));
        }
        let mut builds = builds.into_iter();
        Ok(Suite {
            reference: builds.next().context("no reference build")?,
            patched: builds.next().context("no patched build")?,
            exact: builds.next().zip(builds.next()),
            model: cache::bundled_model()?,
            long: options.long,
            _machine: cache.lock_machine()?,
            cache,
        })
    }

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

/// A greedy request for so many tokens, in the form that `generate` takes.
pub fn greedy(prompt: &str, tokens: u32) -> Value {
    json!({"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": true, "cache_prompt": false})
}
