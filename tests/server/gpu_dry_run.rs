// SPDX-License-Identifier: Apache-2.0

//! `tools/gpu/run.sh`, what a machine with a GPU runs, without one. See tools/gpu/README.md.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache, TempDir},
    kernels,
    llama::{Llama, Runtime},
    tools::Tools,
};
use serde_json::Value;

use super::{Test, process};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![Test::new("what a GPU machine runs, on the CPU", |suite| {
        dry_run(&suite.patched.0)
    })]
};

/// What tools/gpu/README.md says that a GPU machine has, but for nvcc.
const PROGRAMS: [&str; 45] = [
    "bash",
    "sh",
    "env",
    "python3",
    "g++",
    "c++",
    "gcc",
    "cc",
    "as",
    "ld",
    "ar",
    "ranlib",
    "nm",
    "awk",
    "sed",
    "grep",
    "basename",
    "cat",
    "chmod",
    "cmp",
    "cp",
    "cut",
    "date",
    "df",
    "dirname",
    "echo",
    "head",
    "id",
    "ln",
    "ls",
    "mkdir",
    "mktemp",
    "nice",
    "nproc",
    "readlink",
    "rm",
    "sha256sum",
    "sleep",
    "sort",
    "tail",
    "tee",
    "timeout",
    "touch",
    "tr",
    "uname",
];

/// `tools/gpu/run.sh --dry-run`: every step but the compiling of llama.cpp, on a CPU, with nothing on `PATH` but what
/// is said to be needed.
fn dry_run(runtime: &Runtime) -> Result<()> {
    let cache = Cache::open()?;
    let cuda = kernels::cuda_home(&cache)?;
    let temp = TempDir::unlocked("gpu-dry-run")?;
    let path = temp.path().join("path");
    fs::create_dir(&path)?;
    for name in PROGRAMS {
        let program = process::find_program(name).with_context(|| format!("no {name}"))?;
        std::os::unix::fs::symlink(program, path.join(name))?;
    }
    {
        let lock = cache.lock()?;
        let tools = Tools::find(&cache, &lock)?;
        std::os::unix::fs::symlink(tools.cmake, path.join("cmake"))?;
        std::os::unix::fs::symlink(tools.ninja, path.join("ninja"))?;
    }
    let pack = temp.path().join("pack");
    Llama::open(&cache, None)?.pack(&pack)?;
    let out = temp.path().join("out");
    let run = |only: &str| {
        let mut command = Command::new(cache::repo().join("tools/gpu/run.sh"));
        command
            .arg("--dry-run")
            .arg(&runtime.dir)
            .args(["--only", only])
            .env("PATH", &path)
            .env("OUT", &out)
            .env("CUDA_HOME", &cuda)
            .env("DREX_GPU_PACK", &pack)
            .env("DREX_GPU_WORK", temp.path().join("work"));
        process::output(&mut command)
    };
    // In two runs, the second of which goes on where the first one was.
    run("build,kernels")?;
    let text = run("serve,server")?;
    let mut names = Vec::new();
    for entry in fs::read_dir(&out)? {
        names.push(entry?.file_name());
    }
    names.sort();
    ensure!(
        names == ["log.txt", "results.json"],
        "left behind: {names:?}"
    );
    let log = fs::read_to_string(out.join("log.txt"))?;
    ensure!(log.contains("unpacked before"), "the second run began anew");
    let cells = check(&out)?;
    let end = text.lines().last().unwrap_or_default().split(':').next();
    println!("        {cells} cells, {}", end.unwrap_or_default());
    Ok(())
}

/// Whether the results hold what a run on a GPU is to bring back: the number of cells.
fn check(out: &Path) -> Result<usize> {
    let text = fs::read_to_string(out.join("results.json")).context("results.json")?;
    let results: Value = serde_json::from_str(&text).context("results.json")?;
    ensure!(results["ok"] == true, "a step failed: {}", results["steps"]);
    let kernels = results["results"]["kernels"]["results"].as_array();
    ensure!(
        kernels.is_some_and(|r| r.len() > 20),
        "the kernels' times: {kernels:?}"
    );
    // Three of the kernels, four of the model.
    let aims = results["aims"].as_array().context("no aims")?;
    ensure!(aims.len() == 7, "{} aims instead of 7", aims.len());
    let grid = &results["results"]["tiny"];
    ensure!(grid["split_identical"] == true, "the split differs");
    let cells = grid["cells"].as_array().context("no cells")?;
    // Two batches, two exits, two shares with `hold`, three cells with `auto`.
    ensure!(cells.len() == 20, "{} cells instead of 20", cells.len());
    for cell in cells {
        let number = |name: &str| {
            cell[name]
                .as_f64()
                .with_context(|| format!("{name} in {cell}"))
        };
        ensure!(cell["counts_agree"] == true, "the counts differ: {cell}");
        let holds = cell["policy"] == "hold";
        ensure!(
            !holds || number("exits")? == number("exits_of_mask")?,
            "not the mask's exits: {cell}"
        );
        ensure!(
            number("involuntary_exits")? == 0.0,
            "rows were forced out: {cell}"
        );
        ensure!(
            !holds || number("rows_per_window")? == number("batch")?,
            "windows are not dense: {cell}"
        );
        for name in [
            "t_f_ms",
            "t_s_ms",
            "t_s_scored_ms",
            "t_d_ms",
            "t_head_ms",
            "tokens_per_s",
            "off_tokens_per_s",
            "stock_tokens_per_s",
            "stock_streams_tokens_per_s",
            "submit_f_ms",
        ] {
            ensure!(number(name)? > 0.0, "{name}: {cell}");
        }
    }
    ensure!(
        results["results"]["server"]["ok"] == true,
        "the server's checks: {}",
        results["results"]["server"]
    );
    Ok(cells.len())
}
