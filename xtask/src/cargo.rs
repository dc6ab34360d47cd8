//! Cargo, called from a program that cargo runs.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cache;

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
