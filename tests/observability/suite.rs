// SPDX-License-Identifier: Apache-2.0

//! What observability costs while nobody has asked for it, in instructions counted by callgrind: of the hooks' own lines,
//! and of the whole against a build of the same source without hooks. And whether the profiler that the tests of the ranges
//! make up is one for NVIDIA's own header too.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache, TempDir},
    cargo::{cargo, target_dir},
    fetch::Python,
    process,
};
use drex_harness::suite;

/// What a step (plan, ramp, complete) may spend on the hooks' own lines.
const MOST_OWN: f64 = 60.0;
/// What it may cost more than without hooks, in parts of it. More than the hooks' lines: the compiler arranges the same
/// loops in other ways, and that goes both ways.
const MOST_MORE: f64 = 0.005;
/// What it spends there with a log and a trace, at the least: a count that does not see this sees nothing.
const LEAST_WATCHED: f64 = 2000.0;

const STEPS: [u32; 2] = [100, 300];

type Test = (&'static str, fn() -> Result<()>);

const TESTS: [Test; 4] = [
    (
        "what callgrind says is added up",
        adds_up_what_callgrind_says,
    ),
    ("the hooks' lines are found", finds_the_hooks),
    (
        "nvtx: NVIDIA's own header meets the tests' profiler as drex does",
        fake_profiler_is_true,
    ),
    ("observability costs nothing when off", off_costs_nothing),
];

fn main() -> ExitCode {
    let about = "What observability costs while it is off";
    suite::plain("observability", about, |run| {
        for (name, test) in TESTS {
            run.test(name, test);
        }
    })
}

fn off_costs_nothing() -> Result<()> {
    ensure!(
        process::find_program("valgrind").is_some(),
        "the count needs valgrind, which is not here (Debian, Ubuntu: apt-get install valgrind)"
    );
    let dir = TempDir::unlocked("observe")?;
    let lines = hook_lines(&cache::repo())?;
    ensure!(lines.len() > 20, "only {} lines of hooks", lines.len());
    let hooks = build(dir.path(), "hooks", &[])?;
    let without = build(dir.path(), "without", &["--", "--cfg", "drex_unwatched"])?;
    let program = dir.path().join("instructions");
    let mut cc = Command::new("cc");
    cc.current_dir(cache::repo())
        .args(["-O1", "-Wall", "-Wextra", "-Werror", "-Iinclude"])
        .args(["benches/instructions.c", "-ldrex", "-o"])
        .arg(&program)
        .arg("-L")
        .arg(&hooks);
    process::output(&mut cc)?;
    let step = |library: &Path, args: &[&str]| -> Result<Count> {
        let count = |steps| run(dir.path(), &program, library, steps, args, &lines);
        let (short, long) = (count(STEPS[0])?, count(STEPS[1])?);
        let steps = f64::from(STEPS[1] - STEPS[0]);
        Ok(Count {
            all: (long.all - short.all) / steps,
            own: (long.own - short.own) / steps,
        })
    };
    let off = step(&hooks, &[])?;
    let bare = step(&without, &[])?;
    let watched = step(&hooks, &["watched"])?;
    let more = off.all / bare.all - 1.0;
    println!("        instructions per step     in all    of hooks");
    for (name, c) in [
        ("without hooks", &bare),
        ("nothing asked for", &off),
        ("log and trace", &watched),
    ] {
        println!("        {name:<20} {:>12.0} {:>11.1}", c.all, c.own);
    }
    println!("        nothing asked for: {:+.2} %", 100.0 * more);
    ensure!(
        watched.own > LEAST_WATCHED && bare.own < off.own && off.own > 0.0,
        "the count does not see the hooks"
    );
    ensure!(
        off.own <= MOST_OWN,
        "the hooks cost {:.1} instructions per step when off, expected at most {MOST_OWN}",
        off.own
    );
    ensure!(
        more <= MOST_MORE,
        "a step costs {:.2} % more with the hooks than without, expected at most {:.2} %",
        100.0 * more,
        100.0 * MOST_MORE
    );
    Ok(())
}

/// NVTX as NVIDIA publishes it for C.
const NVTX: &str = "nvidia-nvtx==13.5.25";
const NVTX_HEADERS: &str = "nvidia/cu13/include";

/// `tests/nvtx.rs` expects these lines of drex.
const RANGE: [&str; 6] = [
    "initialize",
    "attached",
    "domain drex",
    "string plan",
    "push plan",
    "pop drex",
];

fn fake_profiler_is_true() -> Result<()> {
    let headers = nvtx_headers()?;
    let dir = TempDir::unlocked("nvtx")?;
    let [client, fake] = ["client", "fake.so"].map(|name| dir.path().join(name));
    let cc = |source: &str, out: &Path, flags: &[&str]| {
        let mut command = Command::new("cc");
        command
            .args(["-Wall", "-Wextra", "-Werror", "-isystem"])
            .arg(&headers)
            .arg(cache::repo().join("tests/c").join(source))
            .args(flags)
            .arg("-o")
            .arg(out);
        process::output(&mut command)
    };
    cc("nvtx_client.c", &client, &["-ldl"])?;
    cc("nvtx_injection.c", &fake, &["-fPIC", "-shared", "-pthread"])?;
    let out = Command::new(&client)
        .env("NVTX_INJECTION64_PATH", &fake)
        .env("FAKE_NVTX_PRINT", "1")
        .output()?;
    let notes = String::from_utf8_lossy(&out.stderr);
    let lines: Vec<&str> = notes.lines().skip(1).map(str::trim).collect();
    ensure!(
        out.status.success() && lines == RANGE,
        "the header's range is {lines:?}, expected {RANGE:?}"
    );
    Ok(())
}

fn nvtx_headers() -> Result<PathBuf> {
    let cache = Cache::open()?;
    let dir = cache.path(NVTX);
    let headers = dir.join(NVTX_HEADERS);
    if !dir.is_dir() {
        let _lock = cache.lock()?;
        let python = Python::find(&cache)?;
        let (log, temp) = (cache.log("nvtx")?, cache.temp_dir()?);
        let mut command = python.wheels(&temp.path().join("nvtx"));
        command.args(["--no-deps", NVTX]);
        process::logged(&mut command, "fetching NVIDIA's header", &log, false)?;
        temp.publish("nvtx", &dir)?;
    }
    ensure!(
        headers.join("nvtx3/nvToolsExt.h").is_file(),
        "{NVTX} has no nvtx3/nvToolsExt.h"
    );
    Ok(headers)
}

struct Count {
    all: f64,
    own: f64,
}

/// A folder with the library in it. In a target folder of its own, since the library without hooks must not be found
/// where others look for libdrex.
fn build(dir: &Path, name: &str, flags: &[&str]) -> Result<PathBuf> {
    let target = target_dir()?.join("observe");
    let mut command = cargo();
    command
        .args(["rustc", "--quiet", "--release", "--package", "drex"])
        .args(["--lib", "--crate-type", "cdylib", "--target-dir"])
        .arg(&target)
        .args(flags);
    process::output(&mut command)?;
    let to = dir.join(name);
    fs::create_dir(&to)?;
    for file in ["libdrex.so", "libdrex.so.0"] {
        fs::copy(target.join("release/libdrex.so"), to.join(file)).context("no libdrex.so")?;
    }
    Ok(to)
}

type Lines = HashSet<(String, u32)>;

/// All of `src/observe`, and what elsewhere in `src` speaks of a watch or a range.
fn hook_lines(repo: &Path) -> Result<Lines> {
    let mut lines = Lines::new();
    let mut dirs = vec![repo.join("src")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let name = path.strip_prefix(repo)?.to_string_lossy().into_owned();
            let all = name.starts_with("src/observe/");
            if all {
                // Where the compiler names no line.
                lines.insert((name.clone(), 0));
            }
            for (i, line) in fs::read_to_string(&path)?.lines().enumerate() {
                if all || line.contains(".watch.") || line.contains("let _range") {
                    lines.insert((name.clone(), i as u32 + 1));
                }
            }
        }
    }
    Ok(lines)
}

fn run(
    dir: &Path,
    program: &Path,
    library: &Path,
    steps: u32,
    args: &[&str],
    lines: &Lines,
) -> Result<Count> {
    let out = dir.join("callgrind.out");
    let mut command = Command::new("valgrind");
    command
        .args(["-q", "--tool=callgrind", "--compress-pos=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .arg(steps.to_string())
        .args(args)
        .env("LD_LIBRARY_PATH", library)
        // Nothing that a subscriber or a profiler of this program's listens to.
        .env_remove("NVTX_INJECTION64_PATH");
    process::output(&mut command)?;
    count(&fs::read_to_string(&out)?, lines)
}

/// Adds up the costs in callgrind's format, version 1, with one number per line of source.
fn count(text: &str, lines: &Lines) -> Result<Count> {
    let mut files = HashMap::new();
    let mut file = String::new();
    let mut sum = Count { all: 0.0, own: 0.0 };
    let mut after_calls = false;
    for line in text.lines() {
        if let Some((key, value)) = line.split_once('=') {
            match key {
                // A name comes with its number the first time, and is the number from then on.
                "fl" | "fi" | "fe" => {
                    let (id, name) = value.split_once(' ').unwrap_or((value, ""));
                    if !name.is_empty() {
                        files.insert(id.to_owned(), name.to_owned());
                    }
                    file = files.get(id).cloned().unwrap_or_default();
                }
                "cfl" | "cfi" => {
                    if let Some((id, name)) = value.split_once(' ') {
                        files.insert(id.to_owned(), name.to_owned());
                    }
                }
                "calls" => after_calls = true,
                _ => {}
            }
        } else if line.starts_with(|c: char| c.is_ascii_digit()) {
            // The line after `calls` is what the callee cost, which is counted there.
            if std::mem::take(&mut after_calls) {
                continue;
            }
            let (at, cost) = line.split_once(' ').context("a line without a cost")?;
            let (at, cost): (u32, f64) = (at.parse()?, cost.trim().parse()?);
            sum.all += cost;
            let own = file
                .rfind("src/")
                .is_some_and(|i| lines.contains(&(file[i..].to_owned(), at)));
            if own {
                sum.own += cost;
            }
        }
    }
    ensure!(sum.all > 0.0, "callgrind counted nothing");
    Ok(sum)
}

fn adds_up_what_callgrind_says() -> Result<()> {
    let text = "version: 1\nevents: Ir\nfl=(1) /a/src/observe/mod.rs\nfn=(1) f\n3 10\n\
                fi=(2) /a/src/engine.rs\n7 5\n8 100\nfe=(1)\n4 2\ncfi=(3) x.c\ncfn=(2) g\n\
                calls=1 9\n3 5000\n\nfl=(3)\nfn=(2)\n9 5000\n";
    let lines = [
        ("src/observe/mod.rs", 3),
        ("src/observe/mod.rs", 4),
        ("src/engine.rs", 7),
    ];
    let lines = lines.iter().map(|&(f, n)| (f.to_owned(), n)).collect();
    let sum = count(text, &lines)?;
    assert_eq!((sum.all, sum.own), (5117.0, 17.0));
    Ok(())
}

fn finds_the_hooks() -> Result<()> {
    let lines = hook_lines(&cache::repo())?;
    let of = |file: &str| lines.iter().filter(|l| l.0 == file).count();
    assert!(of("src/engine.rs") > 10 && of("src/observe/mod.rs") > 100);
    assert_eq!(of("src/core/scheduler/complete.rs"), 0);
    Ok(())
}
