// SPDX-License-Identifier: Apache-2.0

//! Tests of `bindings/python`: with Python's standard library alone, and with numpy.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache, TempDir},
    cargo,
    fetch::Python,
    install, process,
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
        run.test(
            "pip installs a wheel with the library, and one without",
            wheel,
        );
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

/// What the installed package says, from a folder where nothing else is.
fn wheel() -> Result<()> {
    let library = cargo::build_library()?;
    let python = Python::find(&Cache::open()?)?;
    let version = install::version()?;
    let dir = TempDir::unlocked("wheel")?;
    for (kind, more) in [("own", &[][..]), ("none", &["-C", "library=none"])] {
        let target = dir.path().join(kind);
        let mut pip = python.pip();
        pip.args([
            "install",
            "--no-index",
            "--no-cache-dir",
            "--quiet",
            "--target",
        ])
        .arg(&target)
        .args(more)
        .arg(cache::repo().join("bindings/python"))
        .env("DREX_LIBRARY", &library);
        process::output(&mut pip)?;
        let mut program = python.command();
        program
            .args(["-B", "-W", "error", "-c", ABOUT])
            .current_dir(dir.path())
            .env("PYTHONPATH", &target)
            .env_remove("DREX_LIBRARY");
        if kind == "none" {
            program.env("DREX_LIBRARY", &library);
        }
        let said = process::output(&mut program)?;
        let beside = if kind == "own" { "True" } else { "False" };
        let wanted = format!("{version} {version} Apache-2.0 >=3.8 True {beside}");
        ensure!(said.trim() == wanted, "library={kind}: {said}");
    }
    Ok(())
}

/// Versions, what the metadata has, whether the module is the installed one, and whether a library lies beside it.
const ABOUT: &str = r##"
import drex, os
from importlib.metadata import metadata
from pathlib import Path
about, module = metadata("drex"), Path(drex.__file__)
assert about["Summary"] and "# drex for Python" in about.get_payload()
print(drex.version(), about["Version"], about["License"], about["Requires-Python"],
      str(module).startswith(os.environ["PYTHONPATH"]), module.with_name("libdrex.so.0").exists())
"##;

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
