// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask patches`: how much of upstream the series touches, and how it applies to another llama.cpp.

mod against;
mod diff;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::llama::patches;
use diff::Touched;

#[derive(Args)]
pub struct Options {
    /// One line of JSON
    #[arg(long)]
    json: bool,
    /// Apply the series to a copy of this llama.cpp, and say what moved, what needed less context and what failed
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    /// Compile that copy too, and name the errors
    #[arg(long, requires = "against")]
    compile: bool,
}

/// One patch of the series.
struct Patch {
    name: String,
    path: PathBuf,
    files: Vec<Touched>,
}

fn series() -> Result<Vec<Patch>> {
    let mut all = Vec::new();
    for path in patches()? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        all.push(Patch {
            name: name.into_owned(),
            files: diff::parse(&text).with_context(|| path.display().to_string())?,
            path,
        });
    }
    ensure!(!all.is_empty(), "there are no patches");
    Ok(all)
}

/// Whether everything applied and compiled, where that was asked for.
pub fn run(options: &Options) -> Result<bool> {
    let series = series()?;
    let Some(tree) = &options.against else {
        if options.json {
            println!("{}", counted(&series));
        } else {
            print!("{}", table(&series));
        }
        return Ok(true);
    };
    let port = against::run(&series, tree, options.compile)?;
    if options.json {
        println!("{}", port.json());
    } else {
        print!("{}", port.table());
    }
    Ok(port.is_well())
}

fn total(series: &[Patch], of: fn(&Touched) -> usize) -> usize {
    series.iter().flat_map(|patch| &patch.files).map(of).sum()
}

fn counted(series: &[Patch]) -> Value {
    let files: Vec<Value> = series
        .iter()
        .flat_map(|patch| {
            patch.files.iter().map(|file| {
                json!({"patch": patch.name, "file": file.path, "added": file.added, "removed": file.removed})
            })
        })
        .collect();
    json!({"files": files, "added": total(series, |f| f.added), "removed": total(series, |f| f.removed)})
}

fn table(series: &[Patch]) -> String {
    let mut out = format!("{:>7}{:>9}  upstream file\n", "added", "removed");
    for patch in series {
        out += &format!("{}\n", patch.name);
        for file in &patch.files {
            out += &format!("{:7}{:9}  {}\n", file.added, file.removed, file.path);
        }
    }
    out += &format!(
        "{:7}{:9}  in all\n",
        total(series, |f| f.added),
        total(series, |f| f.removed)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn counts_what_git_counts() -> Result<()> {
        let series = series()?;
        let json = counted(&series);
        let mut lines = Vec::new();
        for patch in &series {
            let mut git = Command::new("git");
            // In a folder outside of the repository: inside, git counts what lies below the folder only.
            git.args(["apply", "--numstat"])
                .arg(&patch.path)
                .current_dir("/")
                .env("GIT_CEILING_DIRECTORIES", "/")
                .env_remove("GIT_DIR");
            for line in crate::process::output(&mut git)?.lines() {
                lines.push(format!("{} {line}", patch.name));
            }
        }
        let ours: Vec<String> = json["files"]
            .as_array()
            .context("no files")?
            .iter()
            .map(|f| {
                let text = |name: &str| f[name].as_str().unwrap_or_default().to_owned();
                format!(
                    "{} {}\t{}\t{}",
                    text("patch"),
                    f["added"],
                    f["removed"],
                    text("file")
                )
            })
            .collect();
        lines.sort();
        let mut sorted = ours.clone();
        sorted.sort();
        assert_eq!(sorted, lines);
        let sum = |name: &str| -> u64 {
            let files = json["files"].as_array().into_iter().flatten();
            files.filter_map(|f| f[name].as_u64()).sum()
        };
        assert_eq!(json["added"], sum("added"));
        assert_eq!(json["removed"], sum("removed"));
        assert!(table(&series).ends_with(&format!(
            "{:7}{:9}  in all\n",
            sum("added"),
            sum("removed")
        )));
        Ok(())
    }
}
