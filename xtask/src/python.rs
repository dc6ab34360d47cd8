//! Tests of `bindings/python`: with Python's standard library alone, and with numpy.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

use crate::{
    cache::{self, Cache},
    cargo,
    fetch::Python,
    process,
};

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

/// For `tools/model/tiny.py`.
pub const GGUF: Package = Package {
    name: "gguf",
    module: "gguf",
    pinned: "gguf==0.19.0",
    wide: "gguf>=0.17",
};

/// For llama.cpp's converter, and for the checkpoint that it is tried with.
pub const CONVERTER: Package = Package {
    name: "converter",
    module: "torch, transformers, sentencepiece",
    pinned: "torch==2.15.0 transformers==5.24.0 sentencepiece==0.2.3",
    wide: "torch transformers sentencepiece",
};

pub struct Package {
    name: &'static str,
    module: &'static str,
    pub pinned: &'static str,
    wide: &'static str,
}

/// Runs them all and returns how many there were.
pub fn test() -> Result<u32> {
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
fn counted(command: &mut Command) -> Result<u32> {
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

/// Where a package is; nothing where Python has it already.
pub fn package(cache: &Cache, python: &Python, package: &Package) -> Result<Option<PathBuf>> {
    let name = package.name;
    let import = format!("import {}", package.module);
    let has = |path: Option<&PathBuf>| {
        let mut command = python.command();
        command.args(["-c", &import]);
        if let Some(path) = path {
            command.env("PYTHONPATH", path);
        }
        process::output(&mut command).is_ok()
    };
    if has(None) {
        return Ok(None);
    }
    // An extension module is made for one version of Python.
    let version = process::output(
        python
            .command()
            .args(["-c", "import sys; print(sys.implementation.cache_tag)"]),
    )?;
    let dir = cache.path(format!("{name}-{version}"));
    if has(Some(&dir)) {
        return Ok(Some(dir));
    }
    let lock = cache.lock()?;
    let log = cache.log(name)?;
    let temp = cache.temp_dir()?;
    let install = |requirement: &str, target: &str| {
        let mut command = python.pip();
        command
            .args([
                "install",
                "--only-binary",
                ":all:",
                "--progress-bar",
                "off",
                "--target",
            ])
            .arg(temp.path().join(target))
            .args(requirement.split(' '));
        process::logged(&mut command, &format!("installing {name}"), &log, false)
    };
    let mut target = "pinned";
    if install(package.pinned, target).is_err() {
        target = "wide";
        install(package.wide, target).with_context(|| {
            format!("cannot install {name} with pip; install it yourself (Debian, Ubuntu: apt-get install python3-{name})")
        })?;
    }
    temp.publish(target, &dir)?;
    drop(lock);
    ensure!(
        has(Some(&dir)),
        "{name} was installed with pip but cannot be imported from {}",
        dir.display()
    );
    Ok(Some(dir))
}
