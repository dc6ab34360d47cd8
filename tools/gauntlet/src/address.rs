// SPDX-License-Identifier: Apache-2.0

//! The library's tests under AddressSanitizer, leaks included. One program of it all reads freed memory on purpose: the
//! part is worth nothing where that passes.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use drex_build::cargo::{self, cargo};

use crate::{Outcome, fuzz::TRIPLE};

/// Tests with unsafe code beneath them. `nvtx` and `no_alloc` load a library and seal a process: both are about what the
/// sanitiser's own runtime does too.
const TESTS: [&str; 12] = [
    "abi",
    "abi_every",
    "abi_boundary",
    "confidence",
    "confirm",
    "cuda",
    "fill",
    "kernels",
    "model",
    "observe",
    "pages",
    "pending",
];

fn instrumented(arguments: &[&str]) -> Result<Command> {
    let mut command = cargo();
    command
        .args(arguments)
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(cargo::target_dir()?.join("gauntlet/address"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address");
    Ok(command)
}

pub fn run() -> Result<Outcome> {
    let mut command = instrumented(&["test", "--package", "drex", "--no-fail-fast"])?;
    for test in TESTS {
        command.args(["--test", test]);
    }
    let out = command.output().context("cannot run cargo")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr).into_owned();
    let passed = text
        .lines()
        .filter(|l| l.starts_with("test ") && l.ends_with("... ok"));
    let mut findings: Vec<String> = text
        .lines()
        .filter_map(|l| l.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .map(str::to_owned)
        .collect();
    let said = errors.lines().chain(text.lines());
    findings.extend(
        said.filter(|l| l.starts_with("SUMMARY: AddressSanitizer"))
            .map(str::to_owned),
    );
    if !out.status.success() && findings.is_empty() {
        findings.push(errors.lines().last().unwrap_or("no word").to_owned());
    }
    ensure!(
        sees_a_fault()?,
        "AddressSanitizer lets a read of freed memory pass: this part says nothing"
    );
    Ok(Outcome {
        part: String::new(),
        seconds: 0.0,
        cases: passed.count() as u64,
        leaks: findings.iter().filter(|f| f.contains("leaked")).count(),
        findings,
        edges: None,
    })
}

fn sees_a_fault() -> Result<bool> {
    let mut command = instrumented(&["run", "--package", "drex-gauntlet", "--bin", "fault"])?;
    let out = command.output().context("cannot run cargo")?;
    Ok(String::from_utf8_lossy(&out.stderr).contains("heap-use-after-free"))
}
