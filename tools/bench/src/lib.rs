// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench serve` and `scale`: servers against each other, and a model whose weights bound the time.

pub mod scale;
pub mod serve;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Command, FromArgMatches, Subcommand};
use drex_harness::race::{self, Report};
use serde::Serialize;

#[derive(Subcommand)]
pub enum Bench {
    /// Race the patched llama-server against the unpatched one, as a client sees them
    #[command(after_help = serve::HELP)]
    Serve(serve::Options),
    /// Measure windows and policies on a large model of random weights, where reading them bounds the time
    #[command(after_help = scale::HELP)]
    Scale(scale::Options),
    /// Write the figures of a report between the marks of a Markdown page
    Page {
        /// Every report.json of `bench serve`, the later one for loads that two have; then the page, with the lines
        /// `<!-- figures begin -->` and `<!-- figures end -->`
        #[arg(required = true, num_args = 2.., value_names = ["REPORT", "PAGE"])]
        files: Vec<PathBuf>,
    },
}

pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Serve(options) => serve::run(options),
        Bench::Scale(options) => scale::run(options),
        Bench::Page { files } => {
            let (page, reports) = files.split_last().context("no page is named")?;
            fill_page(reports, page)
        }
    }
}

fn fill_page(reports: &[PathBuf], page: &Path) -> Result<()> {
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let parsed = reports
        .iter()
        .map(|report| {
            serde_json::from_str(&read(report)?)
                .with_context(|| format!("{}: not a report of `bench serve`", report.display()))
        })
        .collect::<Result<Vec<Report>>>()?;
    let text = race::splice(&read(page)?, &Report::joined(parsed)?.markdown())
        .with_context(|| page.display().to_string())?;
    fs::write(page, text).with_context(|| format!("cannot write {}", page.display()))
}

/// As many threads as this machine has cores, at the most.
fn known_threads(threads: usize) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    ensure!(
        (1..=cores).contains(&threads),
        "--threads {threads}: there are {cores} cores"
    );
    Ok(())
}

/// Options from a line as it would be typed.
fn parsed<T: Args + FromArgMatches>(line: &str) -> Result<T> {
    let command = T::augment_args(Command::new("bench").no_binary_name(true));
    let matches = command.try_get_matches_from(line.split_whitespace())?;
    Ok(T::from_arg_matches(&matches)?)
}

/// Leaves report.json in a folder, and prints the table; with `json` on stderr, and the report as one line on stdout.
fn show(out: &Path, json: bool, table: &str, report: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(report)? + "\n";
    fs::write(out.join("report.json"), text)?;
    if json {
        eprint!("{table}");
        println!("{}", serde_json::to_string(report)?);
    } else {
        print!("{table}");
    }
    Ok(())
}

/// The command as it was typed, for the report.
fn command_line() -> String {
    // Where the report went is nobody else's.
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = args.iter().position(|arg| arg == "--out") {
        args.drain(at..(at + 2).min(args.len()));
    }
    args.retain(|arg| !arg.starts_with("--out="));
    format!("cargo xtask bench {}", args.join(" "))
}

/// Today in UTC, as in 2026-11-28.
fn today() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    date((now.unwrap_or_default().as_secs() / 86_400) as i64)
}

/// The date so many days after 1970-01-01, in the Gregorian calendar.
fn date(days: i64) -> String {
    // Years begin in March here, so that the day that some years have more is a year's last one.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day = days.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, late) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", year + era * 400 + late)
}

/// No name twice in a list.
fn unique<T: PartialEq + std::fmt::Display>(what: &str, list: &[T]) -> Result<()> {
    for (i, item) in list.iter().enumerate() {
        if list[..i].contains(item) {
            bail!("{what} {item}: named twice");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against `date -u -d @$((86400*days)) +%F`.
    #[test]
    fn dates() {
        for (days, text) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_785, "2026-11-28"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(days), text);
        }
    }

    #[test]
    fn names_that_come_twice_are_refused() {
        assert!(unique("--policies", &["auto", "off"]).is_ok());
        let error = unique("--policies", &["auto", "off", "auto"]).unwrap_err();
        assert_eq!(error.to_string(), "--policies auto: named twice");
    }
}
