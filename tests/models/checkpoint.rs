// SPDX-License-Identifier: Apache-2.0

//! A checkpoint as LayerSkip's are on Hugging Face, by the way that the README describes: llama.cpp's own converter, then
//! the server with `--drex-exit-layers`.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use drex_build::{
    Source,
    cache::{self, Cache, TempDir},
    fetch::Python,
    llama::{Kind, Llama},
    process,
    python::{self, Package},
};
use drex_harness::{generate::generate, suite::Run};

use crate::{builds, start, streams};

/// For llama.cpp's converter, and for the checkpoint that it is tried with.
const CONVERTER: Package = Package {
    name: "converter",
    module: "torch, transformers, sentencepiece",
    pinned: "torch==2.15.0 transformers==5.24.0 sentencepiece==0.2.3",
    wide: "torch transformers sentencepiece",
};

pub fn tests(source: &Source, run: &mut Run) {
    run.tell("a checkpoint as LayerSkip's, converted", || {
        converted(source)
    });
}

fn converted(source: &Source) -> Result<String> {
    let cache = Cache::open()?;
    let [reference, patched] = builds(&cache, source, Kind::PatchedExact)?;
    let python = Python::find(&cache)?;
    let packages = python::package(&cache, &python, &CONVERTER)?;
    let command = |script: &Path| -> Command {
        let mut command = python.command();
        command.arg("-B").arg(script);
        if let Some(path) = &packages {
            command.env("PYTHONPATH", path);
        }
        command
    };

    let temp = TempDir::unlocked("layerskip")?;
    let (folder, model) = (temp.path().join("hf"), temp.path().join("model.gguf"));
    process::output(
        command(&cache::repo().join("tools/model/layerskip.py"))
            .arg("--text")
            .arg(cache::repo().join("README.md"))
            .arg("--out")
            .arg(&folder),
    )?;
    let llama = Llama::open(&cache, source.llama_src.as_deref())?;
    process::output(
        command(&llama.source()?.join("convert_hf_to_gguf.py"))
            .arg(&folder)
            .arg("--outfile")
            .arg(&model)
            .args(["--outtype", "q8_0"]),
    )
    .context("llama.cpp's converter")?;

    let _machine = cache.lock_machine()?;
    let unpatched = {
        let server = start(&reference, &model, 1, &["-t", "2"])?;
        generate(server.client, &streams::requests(""), 1)?
    };
    let fills = ["copy", "propagate", "postfill"];
    let exits = [
        "--drex-policy",
        "hold",
        "--drex-exit-layers",
        "2,5",
        "-t",
        "2",
    ];
    let fill = ["--drex-fill", "verify", "--drex-threshold", "0.05"];
    let slots = streams::slots(&fills);
    let server = start(&patched, &model, slots, &[&exits[..], &fill].concat())?;
    let found = streams::compare(&unpatched, &server, &fills, None, streams::ACCEPTED)?;
    Ok(format!(
        "cut behind layers 2 and 5; verify as unpatched ({} of {} drafts accepted), {} in company as alone, {} tokens",
        found.accepted,
        found.drafts,
        fills.join(", "),
        found.tokens
    ))
}
