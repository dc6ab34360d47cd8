// SPDX-License-Identifier: Apache-2.0

//! Every architecture that a model can have: cut, regrouped and filled in each way, in the exact builds.
//!
//! A tiny random model stands for each. `arch-test` compares logits of layer ranges with those of full passes, and the
//! first ramp's with those of the model without the later layers. Then the server's tokens are compared: under fill
//! `verify` with the unpatched server's, under the other fills among requests alone with those among others.

pub mod checkpoint;
pub mod models;
pub mod streams;

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    Source,
    cache::{self, Cache},
    llama::{Kind, Llama},
    process,
    server::Server,
    server_tests::{Build, EXACT, generate, program},
};

use models::{CASES, Case};
use streams::Streams;

/// What `cargo xtask test` prints for one model: its name, what was found, and since when.
pub type One<'a> = dyn FnMut(&str, Result<()>, Instant) + 'a;

/// Few models where `short` is set.
pub fn run(source: &Source, short: bool, one: &mut One) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source.llama_src.as_deref())?;
    let mut builds = Vec::new();
    for runtime in llama.ensure(&[Kind::ReferenceExact, Kind::PatchedExact])? {
        let tools = llama.tools(&runtime)?;
        builds.push((runtime, tools));
    }
    let [reference, patched] = &builds[..] else {
        bail!("two builds, not {}", builds.len());
    };
    let dir = models::ensure(&cache)?;
    let page = std::fs::read_to_string(cache::repo().join("docs/architectures.md"))
        .context("docs/architectures.md")?;
    let _machine = cache.lock_machine()?;

    let (mut cut, mut refused, mut rows, mut tokens) = (0, 0, 0, 0);
    for case in CASES.iter().filter(|case| case.short || !short) {
        let start = Instant::now();
        let found = try_model(case, &dir, reference, patched).and_then(|found| {
            let line = found.line(case);
            ensure!(
                page.lines().any(|l| l == line),
                "docs/architectures.md has no line\n{line}"
            );
            Ok(found)
        });
        match found {
            Ok(found) => {
                match &found {
                    Found::Cut(c) => {
                        cut += 1;
                        rows += c.rows;
                        tokens += c.streams.tokens;
                    }
                    Found::Refused(_) => refused += 1,
                }
                one(&found.text(case), Ok(()), start);
            }
            Err(error) => one(case.name, Err(error), start),
        }
    }
    println!(
        "{cut} architectures cut, {refused} refused; {rows} rows of logits and {tokens} tokens compared"
    );
    Ok(())
}

enum Found {
    Cut(Cut),
    Refused(String),
}

struct Cut {
    /// Rows of logits that were compared.
    rows: u64,
    streams: Streams,
    no_copy: Option<String>,
}

impl Found {
    fn text(&self, case: &Case) -> String {
        match self {
            Found::Cut(c) => format!(
                "{}: cut behind layers {} and {}, {} rows of logits equal; verify as unpatched ({} of {} drafts accepted), \
                 {} in company as alone, {} tokens{}",
                case.name,
                case.ramps[0],
                case.ramps[1],
                c.rows,
                c.streams.accepted,
                c.streams.drafts,
                c.fills().join(", "),
                c.streams.tokens,
                match &c.no_copy {
                    Some(why) => format!("; copy refused: {why}"),
                    None => String::new(),
                }
            ),
            Found::Refused(why) => format!("{}: refused: {why}", case.name),
        }
    }

    /// The model's line in docs/architectures.md.
    fn line(&self, case: &Case) -> String {
        let (fills, why) = match self {
            Found::Cut(c) => (
                [c.fills(), vec!["verify"]].concat().join(", "),
                c.no_copy
                    .as_ref()
                    .map_or(String::new(), |why| format!("no `copy`: {why}")),
            ),
            Found::Refused(why) => ("none".to_owned(), format!("refused: {why}")),
        };
        format!("| {} | {fills} | {why} |", case.name)
    }
}

impl Cut {
    fn fills(&self) -> Vec<&'static str> {
        let all = ["copy", "propagate", "postfill"];
        all[usize::from(self.no_copy.is_some())..].to_vec()
    }
}

fn try_model(case: &Case, dir: &Path, reference: &Build, patched: &Build) -> Result<Found> {
    let model = models::path(dir, case);
    if let Some(why) = case.refused {
        let said = match start(patched, &model, 1, &early_exit(case)) {
            Ok(_) => bail!("the server starts"),
            Err(error) => format!("{error:#}"),
        };
        let expected = format!("cannot run layer ranges: {why}");
        ensure!(
            said.contains("the architecture ") && said.contains(&expected),
            "expected {expected:?}, the server said: {said}"
        );
        return Ok(Found::Refused(why.to_owned()));
    }

    let mut command = Command::new(program(patched, "arch-test")?);
    let said = process::output(
        process::spin_briefly(&mut command)
            .arg(&model)
            .arg(models::first(dir, case))
            .args(case.ramps.map(|r| r.to_string())),
    )?;
    let compared = said
        .lines()
        .find_map(|l| l.strip_prefix("compared ")?.split(' ').next()?.parse().ok());
    let copy = said.lines().find_map(|l| l.strip_prefix("copy: "));
    let copy = copy.context("arch-test says nothing about copy")?;
    ensure!(
        copy == case.no_copy.unwrap_or("possible"),
        "copy: {copy}, expected {:?}",
        case.no_copy
    );

    let mut cut = Cut {
        rows: compared.context("arch-test compared nothing")?,
        streams: Streams::default(),
        no_copy: case.no_copy.map(str::to_owned),
    };
    serve(case, &model, reference, patched, &mut cut)?;
    Ok(Found::Cut(cut))
}

fn early_exit(case: &Case) -> Vec<String> {
    let layers = format!("{},{}", case.ramps[0], case.ramps[1]);
    ["--drex-policy", "hold", "--drex-exit-layers", &layers]
        .into_iter()
        .chain(["--drex-threshold", "0.05", "--drex-fill", "verify"])
        .map(str::to_owned)
        .collect()
}

/// A micro-batch is small, so that the cells of a sliding window are few and are used again.
fn start(build: &Build, model: &Path, slots: usize, args: &[String]) -> Result<Server> {
    let (np, ctx) = (slots.to_string(), (slots * 512).to_string());
    let model = model.to_string_lossy();
    let common = ["-m", &model, "-np", &np, "-c", &ctx, "-t", "2", "-fa", "on"];
    let more = ["-b", "64", "-ub", "64", "--cache-ram", "0", "--no-webui"];
    let flags = [&common[..], &more, EXACT].concat();
    Server::start(
        &build.0,
        flags
            .into_iter()
            .map(str::to_owned)
            .chain(args.iter().cloned()),
    )
}

fn serve(
    case: &Case,
    model: &Path,
    reference: &Build,
    patched: &Build,
    cut: &mut Cut,
) -> Result<()> {
    let unpatched = {
        let server = start(reference, model, 1, &[])?;
        generate(server.client, &streams::requests(""), 1)?
    };
    let fills = cut.fills();
    let slots = streams::slots(&fills);
    let server = start(patched, model, slots, &early_exit(case))?;
    cut.streams = streams::compare(&unpatched, &server, &fills, cut.no_copy.as_deref())?;
    Ok(())
}
