//! What a machine with a GPU is given, and the same run without one. See tools/gpu/README.md.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    Source, cache,
    cache::{Cache, TempDir},
    kernels,
    llama::Llama,
    llama::Runtime,
    process,
};

/// Writes `.gpu/` into the clone, which git ignores.
pub fn pack(source: &Source) -> Result<()> {
    let cache = Cache::open()?;
    let to = cache::repo().join(".gpu");
    Llama::open(&cache, source.llama_src.as_deref())?.pack(&to)?;
    let mut bytes = 0;
    for entry in fs::read_dir(&to)? {
        let entry = entry?;
        let size = entry.metadata()?.len();
        println!("{:6.1} MB  {}", size as f64 / 1e6, entry.path().display());
        bytes += size;
    }
    println!(
        "{:6.1} MB in all; on the GPU machine, in a copy of this clone: tools/gpu/run.sh",
        bytes as f64 / 1e6
    );
    Ok(())
}

/// `tools/gpu/run.sh --dry-run`: every step but the CUDA build, on a CPU.
pub fn dry_run(runtime: &Runtime) -> Result<()> {
    let cache = Cache::open()?;
    let cuda = kernels::cuda_home(&cache)?;
    let temp = TempDir::unlocked("gpu-dry-run")?;
    let out = temp.path().join("out");
    let mut command = Command::new(cache::repo().join("tools/gpu/run.sh"));
    command
        .arg("--dry-run")
        .arg(&runtime.dir)
        .env("OUT", &out)
        .env("CUDA_HOME", cuda)
        .env("DREX_GPU_WORK", temp.path().join("work"));
    let text = process::output(&mut command)?;
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
    let grid = &results["results"]["tiny"];
    ensure!(grid["split_identical"] == true, "the split differs");
    let cells = grid["cells"].as_array().context("no cells")?;
    ensure!(cells.len() == 8, "{} cells instead of 8", cells.len());
    for cell in cells {
        let number = |name: &str| {
            cell[name]
                .as_f64()
                .with_context(|| format!("{name} in {cell}"))
        };
        ensure!(cell["counts_agree"] == true, "the counts differ: {cell}");
        ensure!(
            number("exits")? == number("exits_of_mask")?,
            "not the mask's exits: {cell}"
        );
        ensure!(
            number("involuntary_exits")? == 0.0,
            "rows were forced out: {cell}"
        );
        ensure!(
            number("rows_per_window")? == number("batch")?,
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
