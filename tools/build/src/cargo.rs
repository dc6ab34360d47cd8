// SPDX-License-Identifier: Apache-2.0

//! Cargo, called from a program that cargo runs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    cache::{self, Cache},
    process,
};

pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(cache::repo());
    command
}

/// Builds the library and returns where its shared object is.
pub fn build_library() -> Result<PathBuf> {
    build("so")
}

/// Builds the library and returns where its archive is.
pub fn build_archive() -> Result<PathBuf> {
    build("a")
}

/// Cargo's target folder.
pub fn target_dir() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["metadata", "--format-version", "1", "--no-deps"]);
    let text = crate::process::output(&mut command)?;
    let metadata: Value = serde_json::from_str(&text)?;
    let dir = metadata["target_directory"].as_str();
    Ok(dir.context("cargo names no target folder")?.into())
}

fn build(extension: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args([
        "build",
        "--release",
        "--package",
        "drex",
        "--lib",
        "--message-format",
        "json-render-diagnostics",
    ]);
    let out = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !out.status.success() {
        bail!("the drex library does not build");
    }
    // Asked instead of assumed: the target folder may be anywhere.
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| {
            message["reason"] == "compiler-artifact" && message["target"]["name"] == "drex"
        })
        .flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default())
        .filter_map(|name| name.as_str().map(PathBuf::from))
        .find(|name| name.extension().is_some_and(|e| e == extension))
        .with_context(|| format!("cargo built no libdrex.{extension}"))
}

/// A program of a package, built once into the cache, without optimisation.
pub fn tool(
    cache: &Cache,
    package: &str,
    version: &str,
    program: &str,
    args: &[&str],
) -> Result<PathBuf> {
    let dir = cache.path(format!("{package}-{version}"));
    let at = dir.join("bin").join(program);
    let works = |at: &Path| process::output(Command::new(at).arg("--version")).is_ok();
    if works(&at) {
        return Ok(at);
    }
    let _lock = cache.lock()?;
    if works(&at) {
        return Ok(at);
    }
    let temp = cache.temp_dir()?;
    let mut command = cargo();
    command
        .args(["install", package, "--version"])
        .arg(format!("={version}"))
        .args(["--locked", "--debug", "--bin", program])
        .args(["--config", "profile.dev.debug=false"])
        .args(args)
        .arg("--root")
        .arg(temp.path().join("root"))
        .arg("--target-dir")
        .arg(temp.path().join("target"))
        // Outside of this workspace and its settings.
        .current_dir(temp.path());
    let log = cache.log(package)?;
    process::logged(&mut command, &format!("building {package}"), &log, false)?;
    temp.publish("root", &dir)?;
    ensure!(works(&at), "{program} was built but does not run");
    Ok(at)
}
