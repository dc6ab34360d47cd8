// SPDX-License-Identifier: Apache-2.0

//! Programs compiled in every way, and under tools that see what they do wrong.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::kit::Kit;
use crate::programs::{BAD, CPP11, CPP17, HOST, MINIMAL, OBSERVE, Program, SMOKE};

const COMPILERS: [(&str, &str); 2] = [("gcc", "g++"), ("clang", "clang++")];

pub fn matrix(kit: &Kit) -> Result<()> {
    let plain = ["-fno-exceptions", "-fno-rtti"];
    for (c, cpp) in COMPILERS {
        let each = |compiler, program: Program, standard, more: &[&str]| {
            let flags = [&[standard, "-O1"], more].concat();
            let exe = kit.compile(compiler, &flags, program)?;
            kit.run(&[], &exe, program)
        };
        for program in [SMOKE, OBSERVE, MINIMAL] {
            each(c, program, "-std=c99", &[])?;
            each(c, program, "-std=c11", &[])?;
        }
        each(cpp, CPP11, "-std=c++11", &[])?;
        each(cpp, CPP17, "-std=c++17", &plain)?;
        each(cpp, HOST, "-std=c++17", &[])?;
    }
    Ok(())
}

/// The texts that observe.c leaves, read by others than itself, and held against each other.
pub fn observed(kit: &Kit) -> Result<()> {
    let exe = kit.compile("gcc", &["-std=c99"], OBSERVE)?;
    let dir = kit.scratch("observed")?;
    let mut command = kit.command(&exe);
    command.arg(&dir).env("LD_LIBRARY_PATH", kit.lib());
    kit.succeed(&mut command)?;
    kit.count(0, 1, 0);
    let read = |name: &str| fs::read_to_string(dir.join(name)).context(name.to_owned());
    let json = |name: &str| -> Result<Value> { Ok(serde_json::from_str(&read(name)?)?) };

    let snapshot = json("snapshot.json")?;
    ensure!(
        snapshot["counters"]["tokens"] == 12 && snapshot["ramps"][0]["exits"] == 8,
        "snapshot.json: {snapshot}"
    );
    let trace = json("trace.json")?;
    let events = trace["traceEvents"].as_array().context("no traceEvents")?;
    let mut phases: BTreeMap<&str, u32> = BTreeMap::new();
    for event in events {
        *phases
            .entry(event["ph"].as_str().context("no ph")?)
            .or_default() += 1;
    }
    let n = |phase| phases.get(phase).copied().unwrap_or(0);
    ensure!(
        (n("X"), n("i"), n("b"), n("e")) == (8, 8, 4, 4),
        "8 windows, 8 exits, 4 rows held; trace.json has {phases:?}"
    );
    // Prometheus: each line a comment or a sample with our label and a number.
    let text = read("metrics.txt")?;
    let mut exits = None;
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').context("a line without a value")?;
        let value: f64 = value.parse().with_context(|| line.to_owned())?;
        ensure!(series.contains("{host=\"c\""), "{line}");
        if series.starts_with("drex_exits_total{") {
            exits = Some(value);
        }
    }
    ensure!(exits == Some(8.0), "metrics.txt: {exits:?} exits\n{text}");
    Ok(())
}

/// They see what the programs and their compilers made, the templates of drex.hpp included; not into the library, which
/// no sanitizer of stable Rust has instrumented. For that there is valgrind.
pub fn sanitizers(kit: &Kit) -> Result<()> {
    let sanitize = [
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ];
    for (c, cpp) in COMPILERS {
        let compile = |compiler, program, first: &[&str]| {
            kit.compile(compiler, &[first, &sanitize].concat(), program)
        };
        for program in [SMOKE, OBSERVE, MINIMAL] {
            let exe = compile(c, program, &["-std=c99"])?;
            kit.run(&[], &exe, program)?;
        }
        let exe = compile(cpp, CPP17, &["-std=c++17", "-DDREX_HPP_EXCEPTIONS"])?;
        kit.run(&[], &exe, CPP17)?;
        // They were there: the same flags find what is wrong.
        let bad = compile(c, BAD, &["-std=c99"])?;
        for (what, words) in [
            ("overflow", "AddressSanitizer: heap-buffer-overflow"),
            ("leak", "LeakSanitizer: detected memory leaks"),
            ("undefined", "runtime error: signed integer overflow"),
        ] {
            kit.catch(&[], &bad, what, words)?;
        }
    }
    Ok(())
}

/// Unlike the sanitizers it sees into the library, which they have not compiled.
pub fn valgrind(kit: &Kit) -> Result<()> {
    let valgrind = [
        "valgrind",
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite,indirect,possible",
    ];
    for (compiler, standard, program) in [
        ("gcc", "-std=c99", SMOKE),
        ("gcc", "-std=c99", OBSERVE),
        ("gcc", "-std=c99", MINIMAL),
        ("g++", "-std=c++17", CPP17),
        ("g++", "-std=c++17", HOST),
    ] {
        let exe = kit.compile(compiler, &[standard, "-g", "-O1"], program)?;
        kit.run(&valgrind, &exe, program)?;
    }
    let bad = kit.compile("gcc", &["-std=c99", "-g"], BAD)?;
    kit.catch(&valgrind, &bad, "short-logits", "Invalid read of size")?;
    kit.catch(&valgrind, &bad, "leak", "definitely lost")
}
