// SPDX-License-Identifier: Apache-2.0

//! Tests of `bindings/python`: with Python's standard library alone, and with numpy.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache},
    cargo,
    fetch::Python,
    python::{Package, package},
};
use drex_harness::suite;

fn main() -> ExitCode {
    suite::plain("python", "Runs the tests of bindings/python", |run| {
        let mut count = 0;
        run.test("bindings/python", || {
            count = test()?;
            Ok(())
        });
        // One of them is counted already.
        run.add(count.saturating_sub(1));
    })
}

/// Pinned, or for a Python that it left behind.
const NUMPY: Package = Package {
    name: "numpy",
    module: "numpy",
    pinned: "numpy==2.3.5",
    wide: "numpy>=1.20",
};
const PROMETHEUS: Package = Package {
    name: "prometheus-client",
    module: "prometheus_client",
    pinned: "prometheus-client==0.23.1",
    wide: "prometheus-client>=0.9",
};

/// Runs them all and returns how many there were.
fn test() -> Result<usize> {
    let library = cargo::build_library()?;
    let cache = Cache::open()?;
    let python = Python::find(&cache)?;
    let numpy = package(&cache, &python, &NUMPY)?;
    let prometheus = package(&cache, &python, &PROMETHEUS)?;
    let bindings = cache::repo().join("bindings/python");
    let mut count = 0;
    // The tests of numpy.py would be left out by a discovery that cannot import it: they are named.
    for modules in [
        &["test_abi", "test_engine"][..],
        &["test_numpy"],
        &["test_observe"],
    ] {
        let mut command = python.command();
        command
            .args(["-B", "-W", "error", "-m", "unittest"])
            .args(modules);
        let mut path = vec![bindings.clone(), bindings.join("tests")];
        if modules.contains(&"test_numpy") {
            path.extend(numpy.clone());
        }
        if modules.contains(&"test_observe") {
            path.extend(prometheus.clone());
        }
        command
            .env("PYTHONPATH", std::env::join_paths(path)?)
            .env("DREX_LIBRARY", &library);
        count += counted(&mut command)?;
    }
    Ok(count)
}

/// `Ran 12 tests in 0.3s`, and all of them well.
fn counted(command: &mut Command) -> Result<usize> {
    let out = command.output().context("cannot run python3")?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{said}");
    let ran = said
        .lines()
        .find_map(|l| l.strip_prefix("Ran ")?.split(' ').next()?.parse().ok())
        .unwrap_or(0);
    ensure!(
        ran > 0 && !said.contains("skipped"),
        "tests are missing: {said}"
    );
    Ok(ran)
}
