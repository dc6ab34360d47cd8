// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask test`: every check, in order. CI runs this and nothing else.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result};
use clap::Args;
use drex_build::{Source, cargo::cargo, kernels};

use crate::book;

/// Built without optimisation.
const TOOLS: [&str; 7] = [
    "xtask",
    "drex-bench",
    "drex-build",
    "drex-demo",
    "drex-gauntlet",
    "drex-harness",
    "drex-triton-server",
];

#[derive(Args)]
pub struct Options {
    /// Only the bit-exact comparison of the patched server with the unpatched one, in its long form
    #[arg(long, group = "part")]
    exact: bool,
    /// Only the comparison of fill `verify` with the unpatched server, in its long form
    #[arg(long, group = "part")]
    lossless: bool,
    /// Only the architectures of models: each cut, regrouped and filled in every way. Everything together tries a few of them
    #[arg(long, group = "part")]
    architectures: bool,
    /// Only a checkpoint as LayerSkip's are, made, converted and served; everything together leaves it out: torch, which the
    /// converter needs, is 3 GB to fetch
    #[arg(long, group = "part")]
    checkpoint: bool,
    /// Only models whose layers, cache or head lie on several devices; everything together leaves it out: it builds the RPC
    /// backend first
    #[arg(long, group = "part")]
    devices: bool,
    /// Only a GGUF of one's own: verify against the unpatched server, the other fills alone and in company
    #[arg(long, value_name = "FILE", group = "part")]
    model: Option<PathBuf>,
    /// Only the CUDA kernels and the CUDA device, on the CPU, and the comparison of their compiled artefacts
    #[arg(long, group = "part")]
    kernels: bool,
    /// Only the dry run of tools/gpu/run.sh: what a GPU machine does, on this machine's CPU
    #[arg(long, group = "part")]
    gpu_dry_run: bool,
    /// Only programs built against an installed drex: make, CMake, plain cc, static, Debian packages, sanitizers; and
    /// cargo-c, which only this option tests, since compiling it takes a quarter of an hour
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
    /// Only the files for containers and clusters in packaging/deploy
    #[arg(long, group = "part")]
    deploy: bool,
    /// Only the pages: the book builds, no link is dead, code and commands on them run as printed, they fit into three widths
    /// of a browser, light and dark, and the page of llama-server answers to clicks
    #[arg(long, group = "part")]
    docs: bool,
    /// Only the backend in Triton Inference Server, or those tests of it whose names contain a text
    #[arg(long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "", group = "part")]
    triton: Option<String>,
    /// With --triton: run AIPerf too, which fetches 1.2 GB once
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
            || self.of_models()
            || self.kernels
            || self.consumers
            || self.examples
            || self.observe
            || self.python
            || self.deploy
            || self.docs
            || self.triton.is_some()
    }

    fn of_models(&self) -> bool {
        self.architectures || self.checkpoint || self.devices || self.model.is_some()
    }

    /// A part of the suite of models; nothing of the kind: few architectures.
    fn of_models_tests(&self) -> Result<Vec<String>> {
        if let Some(model) = &self.model {
            return path_option("--model", model);
        }
        let part = if self.architectures {
            "--architectures"
        } else if self.checkpoint {
            "--checkpoint"
        } else if self.devices {
            "--devices"
        } else {
            "--few"
        };
        Ok(vec![part.into()])
    }

    /// What the names of the chosen tests of the server contain; nothing: all of them.
    fn of_server_tests(&self) -> Option<String> {
        let text = if self.exact {
            "exact"
        } else if self.lossless {
            "lossless"
        } else if self.gpu_dry_run {
            "what a GPU machine runs"
        } else {
            return self.only.clone();
        };
        Some(text.into())
    }

    /// For suites that build llama.cpp, and run in another folder.
    fn source(&self) -> Result<Vec<String>> {
        match &self.source.llama_src {
            Some(dir) => path_option("--llama-src", dir),
            None => Ok(Vec::new()),
        }
    }

    fn of_server(&self) -> bool {
        self.exact || self.lossless || self.gpu_dry_run || self.server || self.only.is_some()
    }
}

/// An option that names a path, for a suite that runs in another folder.
fn path_option(option: &str, path: &Path) -> Result<Vec<String>> {
    let path = path
        .canonicalize()
        .with_context(|| format!("{option} {}", path.display()))?;
    Ok(vec![option.into(), path.display().to_string()])
}

/// How many lines of a failure's reason are said again at the end.
const REASON: usize = 8;
/// What a suite prints before each line of a reason.
const INDENT: &str = "        ";

#[derive(Default)]
struct Count {
    passed: u64,
    failed: u64,
    /// What failed, by name and with the first lines that say why: long runs scroll away.
    failures: Vec<String>,
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
                let text = format!("{error:#}");
                for line in text.lines() {
                    println!("        {line}");
                }
                let why = text
                    .lines()
                    .take(REASON)
                    .map(|line| format!("{INDENT}{line}"));
                self.failures.push(name.to_owned());
                self.failures.extend(why);
            }
        }
    }

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend(other.failures);
    }
}

/// Whether everything passed.
pub fn run(options: &Options) -> Result<bool> {
    let mut count = Count::default();
    let all = !options.part();
    let long = all && !options.quick;
    let source = options.source()?;
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
    if all {
        suite(&mut count, "fuzz", &[]);
    }
    if long || options.consumers {
        // Compiled first, for a quarter of an hour.
        let more = options.consumers.then(|| "--cargo-c".to_owned());
        suite(&mut count, "consumers", more.as_slice());
    }
    if options.docs {
        // What runs the blocks of the pages.
        let says = ["guide says", "port.md say", "README.md says", "pages say"];
        suite(&mut count, "consumers", &says.map(str::to_owned));
    }
    if long || options.examples {
        suite(&mut count, "examples", &[]);
    }
    if long || options.observe {
        suite(&mut count, "observability", &[]);
    }
    if all || options.python || options.docs {
        suite(&mut count, "python", &[]);
    }
    if all || options.deploy {
        suite(&mut count, "deploy", &[]);
    }
    if long || options.triton.is_some() {
        let mut args = source.clone();
        args.extend(options.load.then(|| "--load".into()));
        args.extend(options.triton.clone().filter(|text| !text.is_empty()));
        suite(&mut count, "triton", &args);
    }
    if long || options.docs {
        docs(&mut count, options.docs);
    }
    if long || options.of_models() {
        let mut args = source.clone();
        args.extend(options.of_models_tests()?);
        suite(&mut count, "models", &args);
    }
    if all || options.of_server() {
        let mut args = source.clone();
        args.extend(options.quick.then(|| "--quick".into()));
        args.extend((options.exact || options.lossless).then(|| "--long".into()));
        args.extend(options.of_server_tests());
        suite(&mut count, "server", &args);
    }
    if options.docs {
        // The browser is there now.
        let mut args = source;
        args.push("in a browser".into());
        suite(&mut count, "server", &args);
    }
    for line in &count.failures {
        let mark = if line.starts_with(INDENT) {
            ""
        } else {
            "failed: "
        };
        println!("{mark}{line}");
    }
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(count.failed == 0)
}

/// `fetch`: a browser is installed where there is none, and takes pictures; otherwise the pages are not looked at there.
fn docs(count: &mut Count, fetch: bool) {
    println!("== the book");
    let start = Instant::now();
    let mut folder = None;
    let built = book::build().map(|built| {
        built.say();
        folder = Some(built.folder().to_owned());
    });
    count.one("the book builds, and no link is dead", built, start);
    let Some(folder) = folder else { return };
    let start = Instant::now();
    let looked = if fetch {
        book::pages::install()
    } else {
        Ok(())
    };
    match looked.and_then(|()| book::pages::look(&folder, fetch)) {
        Ok(None) => println!("no Chromium: the pages were not looked at"),
        Ok(Some(looked)) => {
            println!("{} pages in {} views", looked.pages, looked.views);
            if fetch {
                println!("their pictures are in {}", looked.folder.display());
            }
            let well = match &looked.faults[..] {
                [] => Ok(()),
                faults => Err(anyhow::anyhow!("{}", faults.join("\n"))),
            };
            count.one("pages fit into three widths", well, start);
        }
        Err(error) => count.one("pages fit into three widths", Err(error), start),
    }
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
    // The library is tested the way it is used, and built once for that; tools as they are built already.
    let mut library = vec!["test", "--release", "--no-fail-fast", "--workspace"];
    library.extend(["--exclude", "*-tests"]);
    let mut tools = vec!["test", "--no-fail-fast"];
    for tool in TOOLS {
        library.extend(["--exclude", tool]);
        tools.extend(["--package", tool]);
    }
    cargo_test(count, "cargo test, the library", &library);
    cargo_test(count, "cargo test, the tools", &tools);
}

/// A suite of `tests/`, see its README.
fn suite(count: &mut Count, name: &str, args: &[String]) {
    let package = format!("{name}-tests");
    let mut all = vec!["test", "--quiet", "--package", &package, "--"];
    all.extend(args.iter().map(String::as_str));
    cargo_test(count, name, &all);
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
    let mut reasons = 0;
    for line in BufReader::new(child.stdout.take().context("no stdout")?).lines() {
        let line = line?;
        println!("{line}");
        if let Some(name) = failed_line(&line) {
            count.failures.push(name.to_owned());
            // Rust's own harness says why elsewhere.
            reasons = REASON;
        } else if reasons > 0 && line.starts_with(INDENT) {
            count.failures.push(line.clone());
            reasons -= 1;
        } else {
            reasons = 0;
        }
        if let Some((passed, failed)) = result_line(&line) {
            count.passed += passed;
            count.failed += failed;
        }
    }
    Ok((count, child.wait()?.success()))
}

/// The name in `test NAME ... FAILED`, of Rust's own harness, or in `FAILED  NAME (1.0 s)`, of the suites.
fn failed_line(line: &str) -> Option<&str> {
    let own = || line.strip_prefix("test ")?.strip_suffix(" ... FAILED");
    own().or_else(|| Some(line.strip_prefix("FAILED  ")?.rsplit_once(" (")?.0))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_result_lines() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(result_line(line), Some((12, 3)));
        assert_eq!(result_line("test a ... ok"), None);
    }

    #[test]
    fn reads_lines_of_what_failed() {
        assert_eq!(failed_line("test a::b ... FAILED"), Some("a::b"));
        assert_eq!(failed_line("FAILED  a (x), b (5.0 s)"), Some("a (x), b"));
        assert_eq!(failed_line("test a::b ... ok"), None);
        assert_eq!(failed_line("ok      a (5.0 s)"), None);
    }
}
