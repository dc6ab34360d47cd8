// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask gauntlet`: runs the parts one after the other, and says what each found.

mod address;
mod fuzz;

use std::{process::ExitCode, time::Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use drex_build::process;
use serde::Serialize;

#[derive(Parser)]
#[command(
    name = "cargo xtask gauntlet",
    bin_name = "cargo xtask gauntlet",
    about = "Fuzz the C ABI with coverage, and run the library's tests under a sanitiser",
    after_help = "Parts: fuzz-engine, fuzz-pages, fuzz-texts (libFuzzer with AddressSanitizer), address (the library's \
                  tests under AddressSanitizer).\n\n\
                  What is found goes to target/gauntlet/found; a file of it is run again with\n  \
                  target/gauntlet/fuzz/x86_64-unknown-linux-gnu/release/engine FILE\n\n\
                  Exit status: 0 nothing found, 1 something found, 2 wrong usage."
)]
struct Options {
    /// Parts to run [default: all]
    #[arg(value_name = "PART", value_parser = PARTS)]
    parts: Vec<String>,
    /// Seconds of each fuzzed part
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1200,
        conflicts_with = "quick"
    )]
    seconds: u64,
    /// Twenty seconds of each fuzzed part
    #[arg(long)]
    quick: bool,
    /// Progress on stderr, and the results as one line of JSON
    #[arg(long)]
    json: bool,
    /// Add what the fuzzing found new ways with to tests/fuzz/corpus, as few files as have them
    #[arg(long)]
    keep: bool,
}

const PARTS: [&str; 4] = ["fuzz-engine", "fuzz-pages", "fuzz-texts", "address"];

/// What a part did.
#[derive(Debug, Serialize)]
struct Outcome {
    part: String,
    seconds: f64,
    /// Runs of a target, or tests.
    cases: u64,
    /// Files that a target fails on, leaks among them, or names of tests that failed.
    findings: Vec<String>,
    /// Those of them that are leaks.
    leaks: usize,
    /// Edges of the library's control flow that were taken, of fuzzed parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    edges: Option<u64>,
}

fn main() -> ExitCode {
    process::main(|| run(&Options::parse()))
}

fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "the sanitisers are set up for x86_64 Linux only"
    );
    let seconds = if options.quick { 20 } else { options.seconds };
    let wanted = |part: &str| options.parts.is_empty() || options.parts.iter().any(|p| p == part);
    let mut outcomes = Vec::new();
    for part in PARTS.into_iter().filter(|part| wanted(part)) {
        let start = Instant::now();
        let mut outcome = match part.strip_prefix("fuzz-") {
            Some(target) => fuzz::run(target, seconds, options.keep)?,
            None => address::run()?,
        };
        outcome.part = part.to_owned();
        outcome.seconds = start.elapsed().as_secs_f64();
        if !options.json {
            println!("{}", line(&outcome));
        }
        outcomes.push(outcome);
    }
    if options.json {
        println!("{}", serde_json::to_string(&outcomes)?);
    }
    let found = outcomes.iter().any(|o| !o.findings.is_empty());
    Ok(ExitCode::from(u8::from(found)))
}

fn line(o: &Outcome) -> String {
    let edges = o.edges.map_or(String::new(), |n| format!(", {n} edges"));
    let mut text = format!(
        "{:12} {:6.0} s  {:>10} cases{edges}, {} found, {} of them leaks",
        o.part,
        o.seconds,
        o.cases,
        o.findings.len(),
        o.leaks
    );
    for finding in &o.findings {
        text += &format!("\n             {finding}");
    }
    text
}
