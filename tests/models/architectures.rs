// SPDX-License-Identifier: Apache-2.0

//! Every architecture that a model can have: cut, regrouped and filled in each way, in the exact builds.
//!
//! A tiny random model stands for each. `arch-test` compares logits of layer ranges with those of full passes, and the
//! first ramp's with those of the model without the later layers. Then the server's tokens are compared: under fill
//! `verify` with the unpatched server's, under the other fills among requests alone with those among others.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::{
    Source,
    cache::{self, Cache, Lock},
    llama::Kind,
    process,
};
use drex_harness::{generate::generate, suite::Run};

use crate::{
    Build, builds, start,
    streams::{self, Streams},
    tiny::{self, CASES, Case},
};

struct Kit {
    reference: Build,
    patched: Build,
    models: PathBuf,
    page: String,
    /// The machine is nobody else's meanwhile.
    _machine: Lock,
}

impl Kit {
    fn build(source: &Source) -> Result<Kit> {
        let cache = Cache::open()?;
        let [reference, patched] = builds(&cache, source, Kind::PatchedExact)?;
        let page = cache::repo().join("docs/architectures.md");
        Ok(Kit {
            reference,
            patched,
            models: tiny::ensure(&cache)?,
            page: fs::read_to_string(&page).with_context(|| page.display().to_string())?,
            _machine: cache.lock_machine()?,
        })
    }
}

pub fn tests(source: &Source, few: bool, run: &mut Run) {
    let (mut cut, mut refused, mut rows, mut tokens) = (0, 0, 0, 0);
    let mut kit = None;
    for case in CASES.iter().filter(|case| case.short || !few) {
        run.tell(&format!("architecture {}", case.name), || {
            if kit.is_none() {
                kit = Some(Kit::build(source)?);
            }
            let kit = kit.as_ref().context("no builds")?;
            let found = try_model(case, kit)?;
            let line = found.line(case);
            ensure!(
                kit.page.lines().any(|l| l == line),
                "docs/architectures.md has no line\n{line}"
            );
            match &found {
                Found::Cut(c) => {
                    cut += 1;
                    rows += c.rows;
                    tokens += c.streams.tokens;
                }
                Found::Refused(_) => refused += 1,
            }
            Ok(found.text(case))
        });
    }
    run.say(&format!(
        "{cut} architectures cut, {refused} refused; {rows} rows of logits and {tokens} tokens compared"
    ));
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
                "cut behind layers {} and {}, {} rows of logits equal; verify as unpatched ({} of {} drafts accepted), \
                 {} in company as alone, {} tokens{}",
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
            Found::Refused(why) => format!("refused: {why}"),
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

fn try_model(case: &Case, kit: &Kit) -> Result<Found> {
    let model = tiny::path(&kit.models, case);
    if let Some(why) = case.refused {
        let said = match serve(case, &kit.patched, &model, 1, Some("verify")) {
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

    let programs = &kit.patched.programs;
    let program = programs.iter().find(|p| p.ends_with("arch-test"));
    let mut command = Command::new(program.context("there is no arch-test")?);
    let said = process::output(
        process::spin_briefly(&mut command)
            .envs(kit.patched.runtime.env().iter().copied())
            .arg(&model)
            .arg(tiny::first(&kit.models, case))
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
    let unpatched = {
        let server = serve(case, &kit.reference, &model, 1, None)?;
        generate(server.client, &streams::requests(""), 1)?
    };
    let fills = cut.fills();
    let slots = streams::slots(&fills);
    let server = serve(case, &kit.patched, &model, slots, Some("verify"))?;
    cut.streams = streams::compare(&unpatched, &server, &fills, case.no_copy, streams::ACCEPTED)?;
    drop(server);
    if let Some(why) = case.no_copy {
        let expected = format!(
            "--drex-fill copy cannot be used with this model, {why}; the other fills are propagate, postfill and verify"
        );
        match serve(case, &kit.patched, &model, 1, Some("copy")) {
            Ok(_) => bail!("the server starts with --drex-fill copy"),
            Err(error) => {
                let said = format!("{error:#}");
                ensure!(said.contains(&expected), "no {expected:?} in: {said}");
            }
        }
    }
    Ok(Found::Cut(cut))
}

/// With a fill: a server with early exit. A micro-batch is small, so that the cells of a sliding window are few and are used
/// again.
fn serve(
    case: &Case,
    build: &Build,
    model: &Path,
    slots: usize,
    fill: Option<&str>,
) -> Result<drex_harness::server::Server> {
    let layers = format!("{},{}", case.ramps[0], case.ramps[1]);
    let batch = ["-b", "64", "-ub", "64", "-t", "2"];
    let policy = ["--drex-policy", "hold", "--drex-exit-layers", &layers];
    let mut args = batch.to_vec();
    if let Some(fill) = fill {
        args.extend(policy);
        args.extend(["--drex-threshold", "0.05", "--drex-fill", fill]);
    }
    start(build, model, slots, &args)
}
