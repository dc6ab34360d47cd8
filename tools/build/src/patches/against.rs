// SPDX-License-Identifier: Apache-2.0

//! Applies the series to a copy of another llama.cpp as far as it goes.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Patch;
use crate::{
    cache::{Cache, TempDir, copy_if_different, files},
    llama::{Llama, added, added_dir},
    process,
};

/// How one file's hunks went.
#[derive(Debug, Default, PartialEq)]
struct Applied {
    hunks: usize,
    /// Lines that the place of a hunk is away from where it was, by the hunk's number. Fuzzy hunks are not among them: git
    /// counts the context that it leaves out.
    moved: BTreeMap<usize, i64>,
    /// Hunks that were placed with less context.
    fuzzy: usize,
    failed: Vec<usize>,
    /// There is no such file.
    missing: bool,
}

pub struct Port {
    /// By patch and file.
    files: Vec<(String, String, Applied)>,
    /// Files of ours, and those of them that upstream has too.
    own: usize,
    clashes: Vec<String>,
    /// Where it was compiled.
    errors: Option<Vec<String>>,
}

pub fn run(series: &[Patch], tree: &Path, compile: bool) -> Result<Port> {
    ensure!(
        tree.join("CMakeLists.txt").is_file() && tree.join("src/llama-model.cpp").is_file(),
        "--against {}: not a checkout of llama.cpp",
        tree.display()
    );
    let temp = TempDir::unlocked("patches")?;
    let stage = temp.path().join("stage");
    let mut port = stage_series(series, tree, &stage)?;
    for path in added()? {
        if tree.join(&path).exists() {
            port.clashes.push(path.display().to_string());
        }
        copy_if_different(&added_dir().join(&path), &stage.join(&path))?;
        port.own += 1;
    }
    if compile {
        let cache = Cache::open()?;
        let (log, result) = Llama::open(&cache, Some(tree))?.compile_anyway(&stage)?;
        let mut found = errors(&fs::read_to_string(&log)?);
        if let (Err(error), true) = (result, found.is_empty()) {
            found.push(format!("{error:#}"));
        }
        port.errors = Some(found);
    }
    Ok(port)
}

/// Copies what the series touches, and applies it there.
fn stage_series(series: &[Patch], tree: &Path, stage: &Path) -> Result<Port> {
    fs::create_dir_all(stage)?;
    for file in series.iter().flat_map(|patch| &patch.files) {
        let from = tree.join(&file.path);
        if from.is_file() {
            copy_if_different(&from, &stage.join(&file.path))?;
        }
    }
    let mut port = Port {
        files: Vec::new(),
        own: 0,
        clashes: Vec::new(),
        errors: None,
    };
    for patch in series {
        let mut applied = apply(&patch.path, stage)?;
        for file in &patch.files {
            let mut of = applied.remove(&file.path).unwrap_or_default();
            of.hunks = file.hunks;
            if of.missing {
                of.failed = (1..=file.hunks).collect();
            }
            port.files.push((patch.name.clone(), file.path.clone(), of));
        }
    }
    // Rejected hunks are named in the report.
    for path in files(stage, &|_| false)? {
        if path.extension().is_some_and(|e| e == "rej") {
            fs::remove_file(stage.join(path))?;
        }
    }
    Ok(port)
}

/// What git says of each file. Each hunk is applied that finds its place, with one line of context at the least.
fn apply(patch: &Path, stage: &Path) -> Result<BTreeMap<String, Applied>> {
    ensure!(
        process::find_program("git").is_some(),
        "git is not on PATH (Debian, Ubuntu: apt-get install git)"
    );
    let out = Command::new("git")
        .args([
            "apply",
            "--reject",
            "--verbose",
            "-C1",
            "--whitespace=nowarn",
        ])
        .arg(patch)
        .current_dir(stage)
        // Inside of a repository git leaves out what that does not track.
        .env("GIT_CEILING_DIRECTORIES", stage.parent().unwrap_or(stage))
        .env_remove("GIT_DIR")
        .env("LC_ALL", "C")
        .output()
        .context("cannot run git")?;
    let said = String::from_utf8_lossy(&out.stderr);
    let applied = read(&said);
    ensure!(
        out.status.success() || applied.values().any(|a| a.missing || !a.failed.is_empty()),
        "{}: git apply: {said}",
        patch.display()
    );
    Ok(applied)
}

fn read(said: &str) -> BTreeMap<String, Applied> {
    let mut files: BTreeMap<String, Applied> = BTreeMap::new();
    let mut at = String::new();
    for line in said.lines() {
        let name = |before: &str| line.strip_prefix(before).map(str::to_owned);
        if let Some(file) = name("Checking patch ") {
            at = file.trim_end_matches("...").to_owned();
            files.entry(at.clone()).or_default();
        } else if let Some(rest) = name("Applying patch ") {
            // `Applying patch FILE cleanly.` or `Applying patch FILE with 2 rejects...`
            let end = rest.rfind(" cleanly.").or_else(|| rest.rfind(" with "));
            at = rest[..end.unwrap_or(rest.len())].to_owned();
        } else if let Some(rest) = name("Hunk #") {
            let mut words = rest.split([' ', '(']);
            let number = words.next().and_then(|n| n.parse().ok());
            let offset = rest
                .split_once("(offset ")
                .and_then(|(_, n)| n.split(' ').next()?.parse().ok());
            if let (Some(number), Some(offset)) = (number, offset) {
                files
                    .entry(at.clone())
                    .or_default()
                    .moved
                    .insert(number, offset);
            }
        } else if line.starts_with("Context reduced to ") {
            // Follows the line of its hunk.
            let of = files.entry(at.clone()).or_default();
            of.fuzzy += 1;
            of.moved.pop_last();
        } else if let Some(rest) = name("Rejected hunk #") {
            let number = rest.trim_end_matches('.').parse().unwrap_or(0);
            files.entry(at.clone()).or_default().failed.push(number);
        } else if line.ends_with(": No such file or directory") {
            files.entry(at.clone()).or_default().missing = true;
        }
    }
    files
}

/// Each error of the compiler, the linker, cmake and ninja, once.
fn errors(log: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in log.lines() {
        let is_error = [": error: ", ": fatal error: ", "undefined reference to "]
            .iter()
            .any(|mark| line.contains(mark))
            || line.starts_with("CMake Error");
        if is_error && !found.iter().any(|old| old == line.trim()) {
            found.push(line.trim().to_owned());
        }
    }
    found
}

impl Port {
    fn sum(&self, of: fn(&Applied) -> usize) -> usize {
        self.files.iter().map(|(_, _, applied)| of(applied)).sum()
    }

    pub fn is_well(&self) -> bool {
        self.sum(|a| a.failed.len()) == 0
            && self.clashes.is_empty()
            && self.errors.as_ref().is_none_or(Vec::is_empty)
    }

    pub fn json(&self) -> Value {
        let files: Vec<Value> = self
            .files
            .iter()
            .map(|(patch, file, a)| {
                let moved: Vec<Value> = a
                    .moved
                    .iter()
                    .map(|(hunk, lines)| json!({"hunk": hunk, "lines": lines}))
                    .collect();
                json!({
                    "patch": patch, "file": file, "hunks": a.hunks, "moved": moved, "fuzzy": a.fuzzy, "failed": a.failed,
                    "missing": a.missing,
                })
            })
            .collect();
        json!({
            "files": files,
            "hunks": self.sum(|a| a.hunks),
            "moved": self.sum(|a| a.moved.len()),
            "fuzzy": self.sum(|a| a.fuzzy),
            "failed": self.sum(|a| a.failed.len()),
            "own_files": self.own,
            "clashes": self.clashes,
            "compile_errors": self.errors,
            "ok": self.is_well(),
        })
    }

    pub fn table(&self) -> String {
        let mut out = format!(
            "{:>6}{:>7}{:>12}{:>7}{:>8}  upstream file\n",
            "hunks", "moved", "by at most", "fuzzy", "failed"
        );
        let mut last = "";
        for (patch, file, a) in &self.files {
            if last != patch {
                out += &format!("{patch}\n");
                last = patch;
            }
            let most = a.moved.values().map(|lines| lines.abs()).max().unwrap_or(0);
            let mut row = format!(
                "{:6}{:7}{most:12}{:7}{:8}  {file}",
                a.hunks,
                a.moved.len(),
                a.fuzzy,
                a.failed.len()
            );
            if a.missing {
                row += ", which is not there";
            } else if !a.failed.is_empty() {
                row += &format!(", hunks {:?}", a.failed);
            }
            out += &format!("{row}\n");
        }
        out += &format!(
            "{:6}{:7}{:12}{:7}{:8}  in all\n",
            self.sum(|a| a.hunks),
            self.sum(|a| a.moved.len()),
            "",
            self.sum(|a| a.fuzzy),
            self.sum(|a| a.failed.len())
        );
        out += &format!("{} files of ours", self.own);
        out += &match self.clashes.len() {
            0 => ", none of which is there\n".to_owned(),
            _ => format!(", there already: {}\n", self.clashes.join(", ")),
        };
        if let Some(errors) = &self.errors {
            out += &format!("{} errors while compiling\n", errors.len());
            for error in errors {
                out += &format!("  {error}\n");
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    use crate::patches::diff;

    fn lines(change: &[(usize, &str)]) -> String {
        let mut all: Vec<String> = (1..=60).map(|i| format!("line {i}")).collect();
        for (number, text) in change {
            all[number - 1] = (*text).to_owned();
        }
        all.join("\n") + "\n"
    }

    /// A patch of four hunks for one file, and of one for another.
    fn patch(dir: &Path) -> Result<Patch> {
        let hunk = |at: usize| {
            let context = |from: usize, to: usize| -> String {
                (from..=to).map(|i| format!(" line {i}\n")).collect()
            };
            format!(
                "@@ -{0},7 +{0},7 @@\n{1}-line {at}\n+changed {at}\n{2}",
                at - 3,
                context(at - 3, at - 1),
                context(at + 1, at + 3)
            )
        };
        let file =
            |name: &str| format!("diff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n");
        let hunks: String = [10, 20, 30, 50].map(hunk).concat();
        let text = format!("{}{hunks}{}{}", file("src/a.c"), file("b.c"), hunk(20));
        let path = dir.join("0001.patch");
        fs::write(&path, &text)?;
        Ok(Patch {
            name: "0001.patch".into(),
            files: diff::parse(&text)?,
            path,
        })
    }

    #[test]
    fn says_what_moved_what_is_fuzzy_what_failed_and_what_is_not_there() -> Result<()> {
        let temp = TempDir::unlocked("patches-test")?;
        let (tree, stage) = (temp.path().join("tree"), temp.path().join("stage"));
        fs::create_dir_all(tree.join("src"))?;
        let patch = patch(temp.path())?;
        // Two lines more after the first hunk, another context of the third one, and the fourth one's line is gone.
        let other = lines(&[(27, "other"), (50, "gone")]).replace("line 15\n", "line 15\nx\ny\n");
        fs::write(tree.join("src/a.c"), &other)?;
        let port = stage_series(&[patch], &tree, &stage)?;
        let of = |file: &str| {
            let found = port.files.iter().find(|(_, name, _)| name == file);
            &found.expect(file).2
        };
        let a = of("src/a.c");
        assert_eq!(a.moved, BTreeMap::from([(2, 2)]));
        assert_eq!(
            (a.hunks, a.fuzzy, &a.failed, a.missing),
            (4, 1, &vec![4], false)
        );
        let b = of("b.c");
        assert_eq!((b.hunks, &b.failed, b.missing), (1, &vec![1], true));
        assert!(!port.is_well());
        let wanted = other
            .replace("line 10\n", "changed 10\n")
            .replace("line 20\n", "changed 20\n")
            .replace("line 30\n", "changed 30\n");
        assert_eq!(fs::read_to_string(stage.join("src/a.c"))?, wanted);
        assert_eq!(files(&stage, &|_| false)?, [PathBuf::from("src/a.c")]);
        let json = port.json();
        assert_eq!(
            (&json["hunks"], &json["failed"], &json["fuzzy"]),
            (&json!(5), &json!(2), &json!(1))
        );
        let table = port.table();
        assert!(
            table.contains("src/a.c, hunks [4]") && table.contains("b.c, which is not there"),
            "{table}"
        );
        Ok(())
    }

    #[test]
    fn what_applies_as_it_is_is_well() -> Result<()> {
        let temp = TempDir::unlocked("patches-well")?;
        let (tree, stage) = (temp.path().join("tree"), temp.path().join("stage"));
        fs::create_dir_all(tree.join("src"))?;
        let patch = patch(temp.path())?;
        fs::write(tree.join("src/a.c"), lines(&[]))?;
        fs::write(tree.join("b.c"), lines(&[]))?;
        let port = stage_series(&[patch], &tree, &stage)?;
        assert!(port.is_well(), "{}", port.table());
        assert_eq!(port.sum(|a| a.moved.len() + a.fuzzy), 0);
        Ok(())
    }

    #[test]
    fn errors_are_named_once() {
        let log = "[1/2] cc a.c\na.c:3:1: error: no 'x'\na.c:3:1: error: no 'x'\nld: a.o: undefined reference to `y'\n\
                   a.c:4:1: warning: z\nninja: build stopped\n";
        assert_eq!(
            errors(log),
            [
                "a.c:3:1: error: no 'x'",
                "ld: a.o: undefined reference to `y'"
            ]
        );
    }
}
