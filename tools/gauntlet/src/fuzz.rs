// SPDX-License-Identifier: Apache-2.0

//! libFuzzer over `tests/fuzz`: the library and the targets are compiled with counters at each edge of their control flow,
//! and with AddressSanitizer. The stable compiler does that once it is told to take its unstable flags.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache,
    cargo::{self, cargo},
    process::Progress,
};

use crate::Outcome;

pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// As `cargo fuzz` sets them.
const FLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Ccodegen-units=1 \
                     -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";

pub fn run(target: &str, seconds: u64, keep: bool) -> Result<Outcome> {
    let program = build(target)?;
    let corpus = cache::repo().join("tests/fuzz/corpus").join(target);
    let folder = cargo::target_dir()?.join("gauntlet");
    // Inputs with new edges stay from one run to the next; the committed ones are only read.
    let (grown, found) = (folder.join("corpus").join(target), folder.join("found"));
    fs::create_dir_all(&grown)?;
    fs::create_dir_all(&found)?;
    let before = artifacts(&found, target)?;

    let log = folder.join(format!("{target}.log"));
    let mut progress = Progress::new(&format!("fuzzing {target}"));
    let status = Command::new(&program)
        .arg(&grown)
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/{target}-", found.display()))
        .args([
            "-print_final_stats=1",
            "-timeout=20",
            "-rss_limit_mb=2048",
            "-max_len=4096",
        ])
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?)
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let mut findings = artifacts(&found, target)?;
    findings.retain(|file| !before.contains(file));
    if !status.success() && findings.is_empty() {
        findings.push(format!("{status}, see {}", log.display()));
    }
    progress.finish(&format!("{} found", findings.len()));
    if keep {
        merge(&program, &corpus, &grown)?;
    }
    let names = findings.iter().map(|f| f.to_ascii_lowercase());
    Ok(Outcome {
        part: String::new(),
        seconds: 0.0,
        cases: number(&text, "stat::number_of_executed_units:").unwrap_or(0),
        leaks: names.filter(|f| f.contains("leak-")).count(),
        findings,
        edges: number(&text, " cov: "),
    })
}

fn build(target: &str) -> Result<PathBuf> {
    let folder = cargo::target_dir()?.join("gauntlet/fuzz");
    let runner = cache::repo().join("tests/fuzz/runner");
    // The library under test has the dependencies that it is shipped with; cargo adds libFuzzer.
    cache::copy_if_different(
        &cache::repo().join("Cargo.lock"),
        &runner.join("Cargo.lock"),
    )?;
    let status = cargo()
        .current_dir(&runner)
        .args([
            "build",
            "--release",
            "--quiet",
            "--target",
            TRIPLE,
            "--bin",
            target,
        ])
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", FLAGS)
        .status()
        .context("cannot run cargo")?;
    ensure!(
        status.success(),
        "the fuzzing target {target} does not build"
    );
    Ok(folder.join(TRIPLE).join("release").join(target))
}

/// Files in `folder` that a target failed on.
fn artifacts(folder: &Path, target: &str) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with(&format!("{target}-")) {
            files.push(path.display().to_string());
        }
    }
    files.sort();
    Ok(files)
}

/// Adds to the corpus the fewest files that have the edges which the corpus has not.
fn merge(program: &Path, corpus: &Path, grown: &Path) -> Result<()> {
    let status = Command::new(program)
        .args(["-merge=1", "-use_counters=0", "-max_len=4096"])
        .arg(corpus)
        .arg(grown)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "the corpus cannot be merged");
    Ok(())
}

/// The last number behind `what`.
fn number(text: &str, what: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(what)?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libfuzzer_says() {
        let text = "#12\tNEW    cov: 3 ft: 4 corp: 2/3b\n#90\tDONE   cov: 17 ft: 20 corp: 2/3b\n\
                    stat::number_of_executed_units: 1234\nstat::average_exec_per_sec:     5\n";
        assert_eq!(number(text, " cov: "), Some(17));
        assert_eq!(number(text, "stat::number_of_executed_units:"), Some(1234));
        assert_eq!(number(text, "stat::peak_rss_mb:"), None);
    }
}
