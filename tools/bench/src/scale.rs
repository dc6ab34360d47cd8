// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench scale`: windows and serving on a model of random weights that is large enough for its weights to bound
//! the time, on the CPU (`tools/gpu/serve.cpp`).

use std::{
    ffi::CString,
    fmt::Write,
    fs,
    io::{BufRead, BufReader},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use drex_harness::stats::{median, ratio_interval, rounded};
use serde_json::{Value, json};

use crate::{command_line, known_threads, parsed, show, today, unique};
use drex_build::{
    Source,
    cache::{self, Cache},
    llama::{Kind, Llama, Runtime},
    process,
};
use drex_harness::machine;

pub const HELP: &str = "Layers, ramps and scoring really run; whether a token leaves comes from a mask that is drawn once. The \
    baseline is the fastest of stock passes in both layouts of the cache and of windows over all layers. `cold` is the whole \
    run from the first plan on, `after 10` what comes after the time of ten full passes.\n\n\
    7b writes 7.2 GB into the cache folder, once, and takes about ten minutes a round on two cores; tiny takes seconds, and \
    its figures mean nothing.";

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    Tiny,
    #[value(name = "1b")]
    Small,
    #[value(name = "7b")]
    Large,
}

impl Size {
    /// Of `make_model.py`, and so many bytes in Q8_0.
    fn shape(self) -> (&'static str, u64) {
        match self {
            Size::Tiny => ("tiny", 7_000_000),
            Size::Small => ("tinyllama-1b", 1_170_000_000),
            Size::Large => ("llama-2-7b", 7_160_000_000),
        }
    }

    fn layers(self) -> u32 {
        match self {
            Size::Tiny => 8,
            Size::Small => 22,
            Size::Large => 32,
        }
    }

    fn tokens(self) -> u32 {
        match self {
            Size::Tiny => 40,
            Size::Small => 32,
            Size::Large => 24,
        }
    }

    fn rounds(self) -> u32 {
        match self {
            Size::Tiny => 4,
            Size::Small => 3,
            Size::Large => 2,
        }
    }
}

#[derive(Args)]
pub struct Options {
    /// Progress on stderr, and the results as one line of JSON
    #[arg(long)]
    json: bool,
    /// The model's shape
    #[arg(long, value_enum, default_value = "7b")]
    size: Size,
    /// Requests and the rows of a batch, as in 8/4
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "8/4,4/4,1/1"
    )]
    loads: Vec<String>,
    /// Shares of the tokens that leave
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "0.5,0.8"
    )]
    p: Vec<f64>,
    /// Layers after which these tokens leave [default: a quarter of the model's]
    #[arg(long, value_name = "N")]
    exit_layer: Option<u32>,
    /// Tokens of each request
    #[arg(long, value_parser = clap::value_parser!(u32).range(4..=512))]
    tokens: Option<u32>,
    /// Tokens of each request that are in the cache at the start
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    prompt: u32,
    /// How often everything is measured
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Threads that compute [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Where report.json goes
    #[arg(long, value_name = "DIR", default_value = "target/bench-scale")]
    out: PathBuf,
    #[command(flatten)]
    source: Source,
}

fn checked(options: &Options) -> Result<()> {
    unique("--loads", &options.loads)?;
    for load in &options.loads {
        let numbers = load
            .split_once('/')
            .and_then(|(n, b)| Some((n.parse::<u32>().ok()?, b.parse::<u32>().ok()?)));
        let Some((requests, batch)) = numbers else {
            bail!("--loads {load}: not REQUESTS/BATCH");
        };
        ensure!(
            (1..=256).contains(&batch) && requests <= 1024,
            "--loads {load}: at most 1024 requests in batches of 1 to 256"
        );
        ensure!(
            requests >= batch && requests % batch == 0,
            "--loads {load}: requests that fill whole batches"
        );
    }
    unique("--p", &options.p)?;
    for p in &options.p {
        ensure!((0.0..=1.0).contains(p), "--p {p}: a share is from 0 to 1");
    }
    let layers = options.size.layers();
    if let Some(layer) = options.exit_layer {
        ensure!(
            (1..layers).contains(&layer),
            "--exit-layer {layer}: the model has {layers} layers"
        );
    }
    known_threads(threads(options))?;
    Ok(())
}

/// Bytes that a user may still write below a folder.
fn free_disk(folder: &Path) -> Result<u64> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    // SAFETY: a path that ends in a zero byte, and plain data that the call fills.
    let (result, info) = unsafe {
        let mut info: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut info), info)
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| folder.display().to_string());
    }
    #[allow(
        clippy::unnecessary_cast,
        reason = "the types differ between platforms"
    )]
    Ok(info.f_bavail as u64 * info.f_frsize as u64)
}

/// Bytes of memory that programs can have, the file cache included; none where the system does not say.
fn free_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The model's file in a folder, made if there is none.
fn model(folder: &Path, size: Size) -> Result<PathBuf> {
    let (shape, bytes) = size.shape();
    let gb = |bytes: u64| bytes as f64 / 1e9;
    if let Some(free) = free_memory() {
        // All weights are read for each token: from the disk that would be another benchmark.
        ensure!(
            free > bytes + (1 << 30),
            "--size: the weights take {:.1} GB of memory and 1.1 GB more, and {:.1} GB are free",
            gb(bytes),
            gb(free)
        );
    }
    let path = folder.join(format!("{shape}-q8_0.gguf"));
    if path.is_file() {
        return Ok(path);
    }
    fs::create_dir_all(folder)?;
    let free = free_disk(folder)?;
    ensure!(
        free > bytes + (1 << 30),
        "{}: the model takes {:.1} GB and {:.1} GB are free",
        folder.display(),
        gb(bytes),
        gb(free)
    );
    let python = process::find_program("python3").context("python3 is not on PATH")?;
    let mut child = Command::new(python)
        .arg(cache::repo().join("tools/gpu/make_model.py"))
        .args([shape, "--type", "q8_0"])
        .arg(&path)
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run python3")?;
    let title = format!("writing {:.2} GB of random weights", gb(bytes));
    let mut progress = process::Progress::new(&title);
    let part = folder.join(format!("{shape}-q8_0.gguf.tmp"));
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let done = fs::metadata(&part).map_or(0, |meta| meta.len());
        progress.update(&format!("{:.1} GB", gb(done)));
        std::thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        progress.finish("FAILED");
        let _ = cache::remove(&part);
        bail!("make_model.py failed ({status})");
    }
    progress.finish("done");
    Ok(path)
}

/// Compiles what measures. Not under the machine's lock: it takes the cache's.
fn program(llama: &Llama, runtime: &Runtime) -> Result<PathBuf> {
    let source = cache::repo().join("tools/gpu/serve.cpp");
    llama.program(runtime, &source, "drex-serve")
}

fn threads(options: &Options) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    options.threads.unwrap_or(cores)
}

/// Runs it, with its words on stderr, and returns the report.
fn measure(options: &Options, program: &Path, model: &Path, out: &Path) -> Result<Value> {
    let raw = out.join("serve.json");
    let list = |values: &[f64]| {
        let texts: Vec<String> = values.iter().map(f64::to_string).collect();
        texts.join(",")
    };
    let tokens = options.tokens.unwrap_or(options.size.tokens());
    let rounds = options.rounds.unwrap_or(options.size.rounds());
    let mut command = Command::new(program);
    process::spin_briefly(&mut command)
        .arg("--model")
        .arg(model)
        .arg("--json")
        .arg(&raw)
        .args(["--ngl", "0", "--grid", &options.loads.join(",")])
        .args(["--p", &list(&options.p)])
        .args([
            "--exit-layers",
            &options.exit_layer.unwrap_or(0).to_string(),
        ])
        .args(["--prompt", &options.prompt.to_string()])
        .args(["--tokens", &tokens.to_string()])
        .args(["--rounds", &rounds.to_string()])
        .args(["--reps", "6", "--threads", &threads(options).to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot run drex-serve")?;
    for line in BufReader::new(child.stdout.take().context("no stdout")?).lines() {
        eprintln!("{}", line?);
    }
    let status = child.wait()?;
    let text = fs::read_to_string(&raw)
        .with_context(|| format!("drex-serve ({status}) left no {}", raw.display()))?;
    let results: Value = serde_json::from_str(&text).with_context(|| raw.display().to_string())?;
    let mut report = report(&results)?;
    let fields = report.as_object_mut().context("no report")?;
    for (name, value) in [
        ("machine", json!(machine::name())),
        ("threads", json!(threads(options))),
        ("command", json!(command_line())),
        ("date", json!(today())),
    ] {
        fields.insert(name.to_owned(), value);
    }
    Ok(report)
}

pub fn run(options: &Options) -> Result<()> {
    checked(options)?;
    let out = cache::out_dir(&options.out)?;
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let runtime = llama.ensure_one(Kind::Patched)?;
    let program = program(&llama, &runtime)?;
    let _machine = cache.lock_machine()?;
    let model = model(&cache.path("models"), options.size)?;
    machine::warn_if_busy();
    let report = measure(options, &program, &model, &out)?;
    show(&out, options.json, &table(&report), &report)?;
    ensure!(report["ok"] == true, "a check of drex-serve failed");
    Ok(())
}

/// The whole with a tiny model in a folder: its report, whose figures mean nothing.
pub fn small(runtime: &Runtime, folder: &Path) -> Result<Value> {
    let line = "--size tiny --rounds 2 --tokens 12 --threads 1";
    let options: Options = parsed(line)?;
    checked(&options)?;
    let cache = Cache::open()?;
    let program = program(&Llama::open(&cache, None)?, runtime)?;
    let model = model(folder, options.size)?;
    measure(&options, &program, &model, folder)
}

/// The results with intervals of their ratios, and what they come to.
fn report(results: &Value) -> Result<Value> {
    let mut cells = Vec::new();
    let mut auto = Vec::new();
    for cell in results["cells"].as_array().context("no cells")? {
        let mut cell = cell.clone();
        let ratios: Vec<f64> = cell["ratio_rounds"]
            .as_array()
            .context("no ratio_rounds")?
            .iter()
            .filter_map(Value::as_f64)
            .collect();
        let interval = ratio_interval(&ratios);
        cell["ratio_low"] = json!(interval.map(|i| rounded(i.0, 4)));
        cell["ratio_high"] = json!(interval.map(|i| rounded(i.1, 4)));
        if cell["policy"] == "auto" {
            auto.extend(cell["ratio_to_stock"].as_f64());
        }
        cells.push(cell);
    }
    Ok(json!({
        "cells": cells,
        "worst_auto": auto.iter().copied().reduce(f64::min),
        "median_auto": (!auto.is_empty()).then(|| median(&auto)),
        "model": results["model"],
        "n_prompt": results["n_prompt"],
        "n_tokens": results["n_tokens"],
        "split_identical": results["split_identical"],
        "ok": results["ok"],
    }))
}

fn table(report: &Value) -> String {
    let mut out = format!(
        "{}, {} threads\n{:>9}{:>6}{:>7}{:>9}{:>9}{:>9}{:>7}{:>6}  {:6}{:>9}{:>9}{:>16}{:>8}{:>8}{:>9}\n",
        report["model"].as_str().unwrap_or_default(),
        report["threads"],
        "requests",
        "batch",
        "exit",
        "t_f ms",
        "t_s ms",
        "t_d ms",
        "c/t_d",
        "p",
        "policy",
        "tokens/s",
        "x stock",
        "interval",
        "/limit",
        "cold",
        "after 10"
    );
    for cell in report["cells"].as_array().into_iter().flatten() {
        let text = |name: &str, digits: usize| {
            cell[name]
                .as_f64()
                .map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let interval = match (cell["ratio_low"].as_f64(), cell["ratio_high"].as_f64()) {
            (Some(low), Some(high)) => format!("{low:.2} to {high:.2}"),
            _ => "-".into(),
        };
        let loses = cell["ratio_to_stock"].as_f64().is_some_and(|r| r < 0.99);
        let _ = writeln!(
            out,
            "{:>9}{:>6}{:>7}{:>9}{:>9}{:>9}{:>7}{:>6}  {:6}{:>9}{:>9}{interval:>16}{:>8}{:>8}{:>9}{}",
            text("requests", 0),
            text("batch", 0),
            text("exit_layer", 0),
            text("t_f_ms", 1),
            text("t_s_scored_ms", 1),
            text("t_d_ms", 1),
            text("c_over_t_d_with_head", 3),
            text("p", 1),
            cell["policy"].as_str().unwrap_or_default(),
            text("tokens_per_s", 2),
            text("ratio_to_stock", 3),
            text("of_limit", 2),
            text("cold_ratio", 2),
            text("after_ten_passes_ratio", 2),
            if loses { "  loses" } else { "" }
        );
    }
    let of = |name: &str| {
        report[name]
            .as_f64()
            .map_or_else(|| "-".into(), |r| format!("{r:.3}"))
    };
    let _ = writeln!(
        out,
        "auto: worst cell {}, median cell {}",
        of("worst_auto"),
        of("median_auto")
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (args, says) in [
            ("--loads 8", "--loads 8: not REQUESTS/BATCH"),
            (
                "--loads 8/3",
                "--loads 8/3: requests that fill whole batches",
            ),
            (
                "--loads 4/8",
                "--loads 4/8: requests that fill whole batches",
            ),
            ("--loads 4/0", "--loads 4/0: at most 1024"),
            ("--loads 4/4,4/4", "--loads 4/4: named twice"),
            ("--p 1.5", "--p 1.5: a share"),
            ("--p NaN", "--p NaN: a share"),
            (
                "--exit-layer 32",
                "--exit-layer 32: the model has 32 layers",
            ),
            (
                "--size tiny --exit-layer 8",
                "--exit-layer 8: the model has 8 layers",
            ),
            ("--threads 0", "--threads 0: there are"),
            ("--tokens 3", "3 is not in 4..=512"),
            ("--size 3b", "invalid value '3b'"),
        ] {
            let result = parsed(args).and_then(|options| checked(&options));
            let error = format!("{:#}", result.expect_err(args));
            assert!(error.contains(says), "{args}: {error}");
        }
    }

    #[test]
    fn the_report_has_intervals_and_a_summary() {
        let cell = |policy: &str, ratio: f64| {
            json!({"requests": 8, "batch": 4, "policy": policy, "p": 0.5, "ratio_to_stock": ratio,
                "ratio_rounds": [ratio * 0.99, ratio, ratio * 1.01], "tokens_per_s": 4.0, "cold_ratio": null})
        };
        let cells = [
            cell("hold", 1.5),
            cell("auto", 0.9),
            cell("auto", 1.2),
            cell("auto", 1.3),
        ];
        let report = report(&json!({"model": "m", "ok": true, "cells": cells})).unwrap();
        assert_eq!(report["worst_auto"], 0.9);
        assert_eq!(report["median_auto"], 1.2);
        let first = &report["cells"][0];
        assert!(
            first["ratio_low"].as_f64().unwrap() < 1.485
                && first["ratio_high"].as_f64().unwrap() > 1.515
        );
        let table = table(&report);
        assert_eq!(table.matches("loses").count(), 1, "{table}");
        assert!(table.contains("auto: worst cell 0.900, median cell 1.200"));
        assert!(super::report(&json!({"ok": true})).is_err());
    }

    #[test]
    fn what_is_free_is_known() {
        assert!(free_disk(&std::env::temp_dir()).unwrap() > 0);
        assert!(free_memory().unwrap() > 1 << 20);
        assert!(free_disk(Path::new("/nowhere")).is_err());
    }
}
