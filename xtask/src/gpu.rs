// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask gpu pack`: what a machine with a GPU is given. See tools/gpu/README.md.

use std::fs;

use anyhow::Result;
use drex_build::{
    Source,
    cache::{self, Cache},
    llama::Llama,
};

/// Writes `.gpu/` into the clone, which git ignores.
pub fn pack(source: &Source) -> Result<()> {
    let cache = Cache::open()?;
    let to = cache::repo().join(".gpu");
    Llama::open(&cache, source.llama_src.as_deref())?.pack(&to)?;
    let mut bytes = 0;
    for entry in fs::read_dir(&to)? {
        let entry = entry?;
        let size = entry.metadata()?.len();
        println!("{:6.1} MB  {}", size as f64 / 1e6, entry.path().display());
        bytes += size;
    }
    println!(
        "{:6.1} MB in all; on the GPU machine, in a copy of this clone: tools/gpu/run.sh",
        bytes as f64 / 1e6
    );
    Ok(())
}
