// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask test`: every check, in order. CI runs this and nothing else.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result};
use clap::Args;

use crate::{
    Source, book, cache,
    cache::Cache,
    cargo::cargo,
    consumers, examples, kernels,
    llama::{Kind, Llama},
    observe, python,
    server_tests::{self, Suite},
    triton,
};

#[derive(Args)]
pub struct Options {
    /// Only the bit-exact comparison of the patched server with the unpatched one
    #[arg(long, group = "part")]
    exact: bool,
    /// Only the comparison of fill `verify` with the unpatched server
    #[arg(long, group = "part")]
    lossless: bool,
    /// Only the CUDA kernels and the CUDA device, on the CPU, and the comparison of their compiled artefacts
    #[arg(long, group = "part")]
    kernels: bool,
    /// Only the dry run of tools/gpu/run.sh: what a GPU machine does, on this machine's CPU
    #[arg(long, group = "part")]
    gpu_dry_run: bool,
    /// Only programs built against an installed drex: make, CMake, plain cc, static, Debian packages, sanitizers; and
    /// cargo-c, which everything together leaves out: it is compiled first, for a quarter of an hour
    #[arg(long, group = "part")]
    consumers: bool,
    /// Only the programs in examples/, built and run, and compared with llama.cpp
    #[arg(long, group = "part")]
    examples: bool,
    /// Only the cost of observability while it is off, counted by callgrind, and NVIDIA's header against the tests' profiler
    #[arg(long, group = "part")]
    observe: bool,
    /// Only the Python package
    #[arg(long, group = "part")]
    python: bool,
    /// Only the backend in Triton Inference Server, or those tests of it whose names contain a text
    #[arg(long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "", group = "part")]
    triton: Option<String>,
    /// With AIPerf too, which fetches 1.2 GB once
    #[arg(long, requires = "triton")]
    load: bool,
    /// Only the tests of the patched llama-server, without other programs
    #[arg(long, group = "part")]
    server: bool,
    /// Only the server tests whose names contain this
    #[arg(long, value_name = "TEXT", group = "part")]
    only: Option<String>,
    /// Leave out the slow server tests, the exact builds, the consumers, the examples, Triton and the book
    #[arg(long, conflicts_with = "part")]
    quick: bool,
    #[command(flatten)]
    source: Source,
}

impl Options {
    /// One part was asked for.
    fn part(&self) -> bool {
        self.of_server()
            || self.kernels
            || self.consumers
            || self.examples
            || self.observe
            || self.python
            || self.triton.is_some()
    }

    fn of_server(&self) -> bool {
        self.exact || self.lossless || self.gpu_dry_run || self.server || self.only.is_some()
    }
}

#[derive(Default)]
struct Count {
    passed: u64,
    failed: u64,
}

impl Count {
    fn one(&mut self, name: &str, result: Result<()>, start: Instant) {
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("ok      {name} ({seconds:.1} s)");
            }
            Err(error) => {
                self.failed += 1;
                println!("FAILED  {name} ({seconds:.1} s)");
                for line in format!("{error:#}").lines() {
                    println!("        {line}");
                }
            }
        }
    }

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Whether everything passed.
pub fn run(options: &Options) -> Result<bool> {
    let mut count = Count::default();
    let all = !options.part();
    let long = all && !options.quick;
    if all {
        rust(&mut count);
    }
    if options.kernels {
        // The cases are worth seeing where they are asked for.
        let tests = [
            "test",
            "-p",
            "drex",
            "--release",
            "--test",
            "kernels",
            "--test",
            "cuda",
        ];
        let tests = [&tests[..], &["--", "--nocapture"]].concat();
        cargo_test(&mut count, "cargo test, kernels", &tests);
    }
    if all || options.kernels {
        compiled_kernels(&mut count);
    }
    if long || options.consumers {
        consumers::run(options.consumers, &mut |name, result, start| {
            count.one(name, result, start)
        });
    }
    if long || options.examples {
        examples(&mut count);
    }
    if long || options.observe {
        println!("== observability");
        for test in observe::TESTS {
            let start = Instant::now();
            count.one(test.0, (test.1)(), start);
        }
    }
    if all || options.python {
        python_tests(&mut count);
    }
    if long || options.triton.is_some() {
        triton(options, &mut count);
    }
    if long {
        println!("== the book");
        let start = Instant::now();
        let built = book::build().map(drop);
        count.one("the book builds, and no link is dead", built, start);
    }
    if all || options.of_server() {
        server(options, &mut count);
    }
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(count.failed == 0)
}

fn rust(count: &mut Count) {
    let steps: [(&str, &[&str]); 2] = [
        ("cargo fmt --check", &["fmt", "--all", "--check"]),
        (
            "cargo clippy",
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        ),
    ];
    for (name, args) in steps {
        println!("== {name}");
        let start = Instant::now();
        count.one(name, succeed(cargo().args(args)), start);
    }
    // The library is tested the way it is used, and built once for that; xtask as it is built already.
    let tests: [(&str, &[&str]); 2] = [
        (
            "cargo test, the library",
            &[
                "test",
                "--workspace",
                "--exclude",
                "xtask",
                "--release",
                "--no-fail-fast",
            ],
        ),
        ("cargo test, xtask", &["test", "--package", "xtask"]),
    ];
    for (name, args) in tests {
        cargo_test(count, name, args);
    }
}

fn examples(count: &mut Count) {
    println!("== examples");
    let start = Instant::now();
    let kit = match examples::Kit::build() {
        Ok(kit) => kit,
        Err(error) => return count.one("build the examples", Err(error), start),
    };
    count.one("build the examples", Ok(()), start);
    for test in examples::TESTS {
        let start = Instant::now();
        count.one(test.name, (test.run)(&kit), start);
    }
}

fn triton(options: &Options, count: &mut Count) {
    println!("== Triton");
    let start = Instant::now();
    let only = options.triton.as_deref().unwrap_or_default();
    let mut tests = 0;
    let mut one = |name: &str, result, start| {
        tests += 1;
        count.one(name, result, start);
    };
    let source = options.source.llama_src.as_deref();
    match triton::tests::run(source, only, options.load, &mut one) {
        Err(error) => one("triton: the server starts", Err(error), start),
        // Nothing that ran is nothing that passed.
        Ok(0) => one(
            "triton: tests",
            Err(anyhow::anyhow!("none was chosen")),
            start,
        ),
        Ok(_) => {}
    }
    println!(
        "{tests} tests in Triton, {:.0} s",
        start.elapsed().as_secs_f64()
    );
}

fn python_tests(count: &mut Count) {
    println!("== python");
    let start = Instant::now();
    match python::test() {
        Ok(tests) => {
            count.passed += u64::from(tests);
            let seconds = start.elapsed().as_secs_f64();
            println!("ok      {tests} tests of bindings/python ({seconds:.1} s)");
        }
        Err(error) => count.one("bindings/python", Err(error), start),
    }
}

fn cargo_test(count: &mut Count, name: &str, args: &[&str]) {
    println!("== {name}");
    let start = Instant::now();
    let mut command = cargo();
    match counted(command.args(args)) {
        // What does not even build reports no test, but has failed all the same.
        Ok((tests, false)) if tests.failed == 0 => {
            count.add(tests);
            count.one(name, Err(anyhow::anyhow!("{name} failed")), start);
        }
        Ok((tests, _)) => count.add(tests),
        Err(error) => count.one(name, Err(error), start),
    }
}

fn compiled_kernels(count: &mut Count) {
    println!("== compiled kernels");
    let start = Instant::now();
    let result = kernels::run(&kernels::Options { check: true }).and_then(|same| {
        anyhow::ensure!(
            same,
            "the committed kernels are not what their sources give"
        );
        Ok(())
    });
    count.one("cargo xtask kernels --check", result, start);
    let start = Instant::now();
    count.one("tools/gpu/kernels.sh --dry-run", kernels::dry_run(), start);
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().context("cannot run cargo")?;
    anyhow::ensure!(status.success(), "{status}");
    Ok(())
}

/// Runs a `cargo test`, shows what it prints, and adds up its results.
fn counted(command: &mut Command) -> Result<(Count, bool)> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut count = Count::default();
    for line in BufReader::new(child.stdout.take().context("no stdout")?).lines() {
        let line = line?;
        println!("{line}");
        if let Some((passed, failed)) = result_line(&line) {
            count.passed += passed;
            count.failed += failed;
        }
    }
    Ok((count, child.wait()?.success()))
}

/// `test result: ok. 12 passed; 0 failed; ...`
fn result_line(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line
        .trim()
        .strip_prefix("test result: ")?
        .split_once(". ")?;
    let number = |what: &str| {
        counts
            .split(';')
            .find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
            .unwrap_or(0)
    };
    Some((number("passed"), number("failed")))
}

fn server(options: &Options, count: &mut Count) {
    let start = Instant::now();
    println!("== llama.cpp");
    let suite = match suite(options) {
        Ok(suite) => suite,
        Err(error) => return count.one("build llama.cpp", Err(error), start),
    };
    if options.only.is_none() {
        count.one("build llama.cpp", Ok(()), start);
    }
    println!("== server tests");
    let _machine = match Cache::open().and_then(|cache| cache.lock_machine()) {
        Ok(lock) => lock,
        Err(error) => return count.one("lock the machine", Err(error), start),
    };
    let mut chosen = 0;
    for test in server_tests::all() {
        let wanted = match (&options.only, options.exact) {
            _ if options.gpu_dry_run => test.name == server_tests::GPU_DRY_RUN,
            _ if options.lossless => test.name.contains("lossless"),
            (Some(text), _) => test.name.contains(text.as_str()),
            (None, true) => test.exact,
            (None, false) => !(options.quick && (test.slow || test.exact)),
        };
        if wanted && (suite.exact.is_some() || !test.exact) {
            chosen += 1;
            let start = Instant::now();
            count.one(test.name, server_tests::guarded(&test, &suite), start);
        }
    }
    if chosen == 0 {
        // Nothing that ran is nothing that passed.
        let none = Err(anyhow::anyhow!("no server test was chosen"));
        count.one("server tests", none, start);
    }
}

fn suite(options: &Options) -> Result<Suite> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let mut kinds = vec![Kind::Reference, Kind::Patched];
    if !options.quick && !options.gpu_dry_run {
        kinds.extend([Kind::ReferenceExact, Kind::PatchedExact]);
    }
    let mut runtimes = Vec::new();
    for runtime in llama.ensure(&kinds)? {
        let tools = llama.tools(&runtime)?;
        runtimes.push((runtime, tools));
    }
    let mut runtimes = runtimes.into_iter();
    let mut next = || runtimes.next();
    Ok(Suite {
        reference: next().context("no reference build")?,
        patched: next().context("no patched build")?,
        exact: next().zip(next()),
        model: cache::bundled_model()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_result_lines() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(result_line(line), Some((12, 3)));
        assert_eq!(result_line("test a ... ok"), None);
    }
}
