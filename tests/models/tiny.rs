// SPDX-License-Identifier: Apache-2.0

//! The models that stand for architectures: tiny and random, written by `tools/model/tiny.py` into the cache.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use drex_build::{
    cache::{self, Cache, Key},
    fetch::Python,
    process,
    python::{self, Package},
};
use drex_harness::gguf;

/// For `tools/model/tiny.py`.
const GGUF: Package = Package {
    name: "gguf",
    module: "gguf",
    pinned: "gguf==0.19.0",
    wide: "gguf>=0.17",
};

/// What is expected of a model.
pub struct Case {
    pub name: &'static str,
    /// The layers behind which it is cut.
    pub ramps: [u32; 2],
    /// Why it cannot be cut.
    pub refused: Option<&'static str>,
    /// Why fill `copy` cannot be used.
    pub no_copy: Option<&'static str>,
    /// Tried by `cargo xtask test` too.
    pub short: bool,
}

impl Case {
    const fn new(name: &'static str) -> Case {
        Case {
            name,
            ramps: [2, 5],
            refused: None,
            no_copy: None,
            short: false,
        }
    }

    const fn short(self) -> Case {
        Case {
            short: true,
            ..self
        }
    }

    /// Where a range of one layer has no RoPE, or nothing but a full or a sliding window.
    const fn behind(self, ramps: [u32; 2]) -> Case {
        Case { ramps, ..self }
    }

    const fn no_copy(self, why: &'static str) -> Case {
        Case {
            no_copy: Some(why),
            ..self
        }
    }

    const fn refused(self, why: &'static str) -> Case {
        Case {
            refused: Some(why),
            ..self
        }
    }
}

pub const WINDOWS: &str = "some layers have a sliding window and others have none";
const POSITIONS: &str = "layers encode positions in different ways";
const RECURRENT: &str =
    "it has recurrent layers, whose state cannot be taken back to an earlier token";

pub static CASES: [Case; 20] = [
    Case::new("llama"),
    Case::new("qwen2"),
    Case::new("qwen2-q4_k").short(),
    Case::new("qwen3"),
    Case::new("qwen3moe").short(),
    Case::new("gemma2").behind([3, 4]).no_copy(WINDOWS),
    Case::new("gemma3").behind([2, 3]).no_copy(WINDOWS).short(),
    Case::new("gemma4").behind([3, 5]).no_copy(WINDOWS),
    Case::new("cohere2").behind([3, 4]).no_copy(WINDOWS),
    Case::new("phi3"),
    Case::new("mistral3"),
    Case::new("granite"),
    Case::new("olmo2"),
    Case::new("smollm3")
        .behind([3, 4])
        .no_copy(POSITIONS)
        .short(),
    Case::new("gpt-oss").no_copy(WINDOWS).short(),
    Case::new("deepseek2").refused("its cache holds no V (multi-head latent attention, MLA)"),
    Case::new("gemma3n")
        .refused("a layer ends in another shape than one row for each token")
        .short(),
    Case::new("gemma4-shared").refused("layer 6 reads the K and V of an earlier layer"),
    Case::new("lfm2").refused(RECURRENT),
    Case::new("mamba").refused(RECURRENT),
];

/// The folder with all of them, and with what is left of each where its layers end behind the first ramp.
pub fn ensure(cache: &Cache) -> Result<PathBuf> {
    let script = cache::repo().join("tools/model/tiny.py");
    let bundled = cache::bundled_model()?;
    let mut key = Key::default()
        .with(fs::read(&script)?)
        .with(GGUF.pinned)
        .with(cache::sha256_file(&bundled)?);
    for case in &CASES {
        key = key.with(format!("{} {}", case.name, case.ramps[0]));
    }
    let dir = cache.path(format!("tiny-{}", key.short()));
    if dir.is_dir() {
        return Ok(dir);
    }
    let python = Python::find(cache)?;
    let gguf = python::package(cache, &python, &GGUF)?;
    let _lock = cache.lock()?;
    let temp = cache.temp_dir()?;
    let made = temp.path().join("tiny");
    let mut command = python.command();
    command
        .arg(&script)
        .arg("--tokenizer")
        .arg(&bundled)
        .arg("--out")
        .arg(&made);
    if let Some(path) = gguf {
        command.env("PYTHONPATH", path);
    }
    process::output(&mut command).context("tools/model/tiny.py")?;
    for case in CASES.iter().filter(|case| case.refused.is_none()) {
        gguf::rewrite(
            &path(&made, case),
            &first(&made, case),
            &gguf::Edit {
                layers: Some(case.ramps[0]),
                ..Default::default()
            },
        )?;
    }
    temp.publish("tiny", &dir)?;
    Ok(dir)
}

pub fn find(name: &str) -> Result<&'static Case> {
    let found = CASES.iter().find(|case| case.name == name);
    found.with_context(|| format!("no tiny model {name}"))
}

pub fn path(dir: &Path, case: &Case) -> PathBuf {
    dir.join(format!("{}.gguf", case.name))
}

/// The model without the layers behind its first ramp.
pub fn first(dir: &Path, case: &Case) -> PathBuf {
    dir.join(format!("{}-first.gguf", case.name))
}
