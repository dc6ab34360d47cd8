// SPDX-License-Identifier: Apache-2.0

//! A checkpoint as LayerSkip's are on Hugging Face, by the way that the README describes: llama.cpp's own converter, then
//! the server with `--drex-exit-layers`.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::{
    Source,
    cache::{self, Cache},
    fetch::Python,
    llama::{Kind, Llama},
    process, python,
    server_tests::generate,
};

use super::{One, start, streams};

pub fn run(source: &Source, one: &mut One) {
    let start = Instant::now();
    match converted(source) {
        Ok(text) => one(&text, Ok(()), start),
        Err(error) => one("a checkpoint as LayerSkip's", Err(error), start),
    }
}

fn converted(source: &Source) -> Result<String> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source.llama_src.as_deref())?;
    let runtimes = llama.ensure(&[Kind::ReferenceExact, Kind::PatchedExact])?;
    let python = Python::find(&cache)?;
    let packages = python::package(&cache, &python, &python::CONVERTER)?;
    let command = |script: &std::path::Path| {
        let mut command = python.command();
        command.arg("-B").arg(script);
        if let Some(path) = &packages {
            command.env("PYTHONPATH", path);
        }
        command
    };

    let temp = cache::TempDir::unlocked("layerskip")?;
    let (folder, model) = (temp.path().join("hf"), temp.path().join("model.gguf"));
    process::output(
        command(&cache::repo().join("tools/model/layerskip.py"))
            .arg("--text")
            .arg(cache::repo().join("README.md"))
            .arg("--out")
            .arg(&folder),
    )?;
    process::output(
        command(&llama.source()?.join("convert_hf_to_gguf.py"))
            .arg(&folder)
            .arg("--outfile")
            .arg(&model)
            .args(["--outtype", "q8_0"]),
    )
    .context("llama.cpp's converter")?;

    let [reference, patched] = &runtimes[..] else {
        anyhow::bail!("two builds, not {}", runtimes.len());
    };
    let builds = [reference, patched].map(|r| (r.clone(), Vec::new()));
    let _machine = cache.lock_machine()?;
    let unpatched = {
        let server = start(&builds[0], &model, 1, &[])?;
        generate(server.client, &streams::requests(""), 1)?
    };
    let fills = ["copy", "propagate", "postfill"];
    let exits = ["--drex-policy", "hold", "--drex-exit-layers", "2,5"];
    let fill = ["--drex-fill", "verify", "--drex-threshold", "0.05"];
    let args: Vec<_> = exits.iter().chain(&fill).map(|&a| a.to_owned()).collect();
    let server = start(&builds[1], &model, streams::slots(&fills), &args)?;
    let found = streams::compare(&unpatched, &server, &fills, None)?;
    Ok(format!(
        "a checkpoint as LayerSkip's, converted: verify as unpatched ({} of {} drafts accepted), {} in company as alone, {} tokens",
        found.accepted,
        found.drafts,
        fills.join(", "),
        found.tokens
    ))
}
