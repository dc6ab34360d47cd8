// SPDX-License-Identifier: Apache-2.0

//! Tools of the workspace, built and run, and the benchmarks of the core.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use drex_build::{cache, cargo::cargo};
use serde_json::{Map, Value, json};

/// Replaces this process by the simulator, which is worth an optimised build.
pub fn sim(args: Vec<OsString>) -> Result<()> {
    exec("drex-sim", &["--release"], args)
}

/// Replaces this process by the tuner, most of whose time goes into arithmetic.
pub fn tune(args: Vec<OsString>) -> Result<()> {
    exec("drex-tune", &["--release"], args)
}

/// Replaces this process by a program of the workspace.
pub fn tool(package: &str, args: Vec<OsString>) -> Result<()> {
    exec(package, &[], args)
}

fn exec(package: &str, profile: &[&str], args: Vec<OsString>) -> Result<()> {
    // In the folder where the user is: arguments may name files.
    let error = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["run", "--quiet", "--manifest-path"])
        .arg(cache::repo().join("Cargo.toml"))
        .args(profile)
        .args(["--package", package, "--"])
        .args(args)
        .exec();
    Err(error).context("cannot run cargo")
}

pub fn bench(json: bool, quick: bool) -> Result<()> {
    let home = criterion_home();
    let mut command = cargo();
    command
        .args(["bench", "--package", "drex", "--bench", "core", "--"])
        .env("CRITERION_HOME", &home)
        .stdout(Stdio::from(std::io::stderr()));
    if quick {
        command.args(["--warm-up-time", "0.2", "--measurement-time", "0.5"]);
    }
    if !command.status().context("cannot run cargo")?.success() {
        bail!("the benchmarks failed");
    }
    let steps = whole_steps()?;
    let mut all = Map::new();
    let core = home.join("core");
    let mut names: Vec<_> = std::fs::read_dir(&core)
        .with_context(|| format!("cannot read {}", core.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    names.sort_by_key(std::fs::DirEntry::file_name);
    for entry in names {
        let path = entry.path().join("new/estimates.json");
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue; // the folder of a report
        };
        let v: Value =
            serde_json::from_str(&text).with_context(|| format!("{}: not JSON", path.display()))?;
        let median = v["median"]["point_estimate"]
            .as_f64()
            .with_context(|| format!("{}: no median", path.display()))?;
        all.insert(
            entry.file_name().to_string_lossy().into_owned(),
            json!((median * 10.0).round() / 10.0),
        );
    }
    if json {
        let mut out = json!({"median_ns": all});
        for (key, value) in steps {
            out[key] = value;
        }
        println!("{out}");
    } else {
        for (name, ns) in &all {
            println!("{name:40} {:>12.1} ns", ns.as_f64().unwrap_or(f64::NAN));
        }
        for (name, us) in steps["step_us"].as_object().into_iter().flatten() {
            println!("{name:50} {:>8.2} us", us.as_f64().unwrap_or(f64::NAN));
        }
        println!("worst_ratio_to_linear {}", steps["worst_ratio_to_linear"]);
    }
    Ok(())
}

/// What a whole step costs through the C ABI: the last line of that benchmark.
fn whole_steps() -> Result<Map<String, Value>> {
    let output = cargo()
        .args(["bench", "--package", "drex", "--bench", "step"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the benchmark of whole steps failed");
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("not what the benchmark prints: {line}"))
}

/// Emptied of nothing: criterion compares with the run before.
fn criterion_home() -> PathBuf {
    cache::repo().join("target/criterion")
}
