// SPDX-License-Identifier: Apache-2.0

//! Tests of `examples/`: the programs are built as their users would build them, and the decoder of `host.cpp` is held
//! against llama.cpp, which shares no line with it.

mod host;
mod reference;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache},
    cargo,
    fetch::Python,
    process,
};
use drex_harness::suite;

/// What the tests share: the compiled programs.
pub struct Kit {
    dir: PathBuf,
}

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];
const SANITIZE: [&str; 4] = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
];

const TESTS: [suite::Test<Kit>; 10] = [
    (
        "minimal.c runs, fills every hole and forces nobody out",
        minimal,
    ),
    (
        "verify.cpp and verify.py give the full model's output, and drafts of each kind",
        verify,
    ),
    (
        "host.cpp, rebatched is as alone in every fill mode",
        host::rebatched_is_alone,
    ),
    (
        "host.cpp, verify gives the full model's output",
        host::verify_is_lossless,
    ),
    (
        "host.cpp, a request that goes away leaves nothing and disturbs nobody",
        host::cancel,
    ),
    (
        "host.cpp, windows that fail are given up, and the output is the same",
        host::failing_windows,
    ),
    ("host.cpp, bad input has a sentence", host::bad_input),
    (
        "the programs are clean under ASan and UBSan, which are active",
        sanitized,
    ),
    (
        "host.cpp without exits chooses as llama.cpp does",
        reference::full_model,
    ),
    (
        "host.cpp exits where llama.cpp's cut model is confident",
        reference::first_ramp,
    ),
];

fn main() -> ExitCode {
    let about = "The programs in examples/, built, run and compared with llama.cpp";
    suite::plain("examples", about, |run| {
        run.tests("build the examples", Kit::build, &TESTS);
    })
}

impl Kit {
    /// Lays the library out as an installation would, and compiles the examples.
    fn build() -> Result<Kit> {
        let library = cargo::build_library()?;
        let target = library.parent().and_then(Path::parent);
        let dir = target.context("no target folder")?.join("examples-test");
        cache::remove(&dir)?;
        fs::create_dir_all(&dir)?;
        for name in ["libdrex.so", "libdrex.so.0"] {
            std::os::unix::fs::symlink(&library, dir.join(name))?;
        }
        let kit = Kit { dir };
        kit.c("examples/minimal.c", "minimal", &["-O2"])?;
        kit.cxx("examples/host.cpp", "host", &["-O3"])?;
        kit.cxx("examples/verify.cpp", "verify", &["-O2"])?;
        Ok(kit)
    }

    fn compile(&self, compiler: &str, source: &Path, name: &str, flags: &[&str]) -> Result<()> {
        let mut command = Command::new(compiler);
        command.args(WARNINGS).args(flags);
        for folder in ["include", "bindings/cpp/include"] {
            command.arg("-I").arg(cache::repo().join(folder));
        }
        command.arg(source).arg("-L").arg(&self.dir);
        command
            .args(["-ldrex", "-lm", "-o"])
            .arg(self.dir.join(name));
        process::output(&mut command).map(drop)
    }

    fn c(&self, source: &str, name: &str, flags: &[&str]) -> Result<()> {
        let flags = [&["-std=c99"], flags].concat();
        self.compile("cc", &cache::repo().join(source), name, &flags)
    }

    fn cxx(&self, source: &str, name: &str, flags: &[&str]) -> Result<()> {
        let flags = [&["-std=c++17"], flags].concat();
        self.compile("c++", &cache::repo().join(source), name, &flags)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.dir.join(name));
        command
            .current_dir(cache::repo())
            .env("LD_LIBRARY_PATH", &self.dir);
        command
    }
}

fn minimal(kit: &Kit) -> Result<()> {
    let text = process::output(&mut kit.command("minimal"))?;
    check_minimal(&text)
}

/// The toy recites known lines, so what must come out is known.
fn check_minimal(text: &str) -> Result<()> {
    let letters = |column: usize| -> String {
        // Each request has five characters of a line, after the step and its layers.
        text.lines()
            .filter(|line| line.contains("0-3  ") || line.contains("4-7  "))
            .filter_map(|line| line.get(15 + 5 * column..18 + 5 * column))
            .map(|cell| cell.trim_matches([' ', '[', ']']))
            .filter(|cell| *cell != ".")
            .collect()
    };
    let lines = [
        "no_row_is_made_to_exit",
        "rows_that_must_go_on_are_held",
        "dense_deep_batches",
        "and_nothing_is_copied_to_regroup_them",
    ];
    for (i, line) in lines.iter().enumerate() {
        ensure!(
            letters(i) == *line,
            "request {i} recited {:?}:\n{text}",
            letters(i)
        );
    }
    // A word's first letter goes deep, but where it is an `e`: 22 of 23.
    for expected in [
        "106 tokens",
        "84 left after",
        "involuntary exits 0",
        "filled 84, missing 0",
    ] {
        ensure!(
            text.contains(expected),
            "minimal did not print {expected:?}:\n{text}"
        );
    }
    Ok(())
}

fn verify(kit: &Kit) -> Result<()> {
    let text = process::output(&mut kit.command("verify"))?;
    check_verify(&text)?;
    let python = Python::find(&Cache::open()?)?;
    let mut command = python.command();
    command
        .args(["-B", "-W", "error", "examples/verify.py"])
        .current_dir(cache::repo())
        .env("PYTHONPATH", cache::repo().join("bindings/python"))
        .env("DREX_LIBRARY", kit.dir.join("libdrex.so.0"));
    let other = process::output(&mut command)?;
    ensure!(
        other == text,
        "verify.py prints\n{other}and verify.cpp\n{text}"
    );
    Ok(())
}

/// The toy counts without multiples of five; its shallow half drafts them all the same.
fn check_verify(text: &str) -> Result<()> {
    let mut lines = text.lines();
    for first in [1, 11, 31] {
        let numbers = (first..).filter(|n| n % 5 != 0).take(16);
        let wanted: Vec<String> = numbers.map(|n| n.to_string()).collect();
        let got = lines.next().unwrap_or_default();
        ensure!(got == wanted.join(" "), "{got}, not {wanted:?}");
    }
    let last = lines.next().unwrap_or_default();
    let mut words = last.split(' ').filter_map(|word| word.parse::<u32>().ok());
    let (drafts, accepted) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
    ensure!(
        0 < accepted && accepted < drafts && last.ends_with("; the full model's output"),
        "{last}"
    );
    Ok(())
}

/// What each sanitizer must find: one that does not see this sees nothing.
const BROKEN: [(&str, &str); 2] = [
    (
        "#include <stdlib.h>\nint main(int n, char **v) {\n  char *volatile p = malloc(8);\n  (void)v;\n  p[7 + n] = 1;\n  return p[7 + n];\n}\n",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    (
        "int main(int n, char **v) {\n  volatile int most = 2147483647;\n  (void)v;\n  return most + n == 0;\n}\n",
        "signed integer overflow",
    ),
];

fn sanitized(kit: &Kit) -> Result<()> {
    for (program, finding) in BROKEN {
        let broken = kit.dir.join("broken.c");
        fs::write(&broken, program)?;
        kit.compile(
            "cc",
            &broken,
            "broken",
            &[&["-std=c99"], &SANITIZE[..]].concat(),
        )?;
        let out = kit.command("broken").output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(
            !out.status.success() && said.contains(finding),
            "the sanitizer let a broken program pass, expected {finding:?}: {said}"
        );
    }
    kit.c("examples/minimal.c", "minimal-san", &SANITIZE)?;
    kit.cxx("examples/host.cpp", "host-san", &SANITIZE)?;
    kit.cxx("examples/verify.cpp", "verify-san", &SANITIZE)?;
    check_verify(&process::output(&mut kit.command("verify-san"))?)?;
    check_minimal(&process::output(&mut kit.command("minimal-san"))?)?;
    host::sanitized(kit)
}
