// SPDX-License-Identifier: Apache-2.0

//! Early exit in models of every architecture, and where a model lies on several devices.
//!
//! Everything is compared to the bit, in the builds whose results do not depend on the batch size.

mod architectures;
mod checkpoint;
mod devices;
mod own;
mod remote;
mod streams;
mod tiny;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::Parser;
use drex_build::{
    Source,
    cache::Cache,
    llama::{EXACT_ARGS, Kind, Llama, Runtime},
};
use drex_harness::{
    server::Server,
    suite::{self, Choice},
};

#[derive(Parser)]
#[command(
    name = "models",
    about = "Early exit in models of every architecture, on one device and on several"
)]
struct Options {
    #[command(flatten)]
    choice: Choice,
    /// Every architecture, and nothing else; the default
    #[arg(long, group = "part")]
    architectures: bool,
    /// A few architectures, which stand for the others
    #[arg(long, group = "part")]
    few: bool,
    /// Layers, cache or head on several devices; builds the RPC backend first
    #[arg(long, group = "part")]
    devices: bool,
    /// A checkpoint as LayerSkip's are, made, converted and served; torch, which the converter needs, is 3 GB to fetch
    #[arg(long, group = "part")]
    checkpoint: bool,
    /// A GGUF of one's own: verify against the unpatched server, the other fills alone and in company
    #[arg(long, value_name = "FILE", group = "part")]
    model: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
}

fn main() -> ExitCode {
    let options = Options::parse();
    suite::main(&options.choice, |run| {
        if let Some(model) = &options.model {
            own::tests(&options.source, model, run);
        } else if options.devices {
            devices::tests(&options.source, run);
        } else if options.checkpoint {
            checkpoint::tests(&options.source, run);
        } else {
            architectures::tests(&options.source, options.few, run);
        }
    })
}

/// A build and the programs of ours that were compiled for it.
pub struct Build {
    pub runtime: Runtime,
    pub programs: Vec<PathBuf>,
}

/// The unpatched exact build and a patched one.
pub fn builds(cache: &Cache, source: &Source, patched: Kind) -> Result<[Build; 2]> {
    let llama = Llama::open(cache, source.llama_src.as_deref())?;
    let mut out = Vec::new();
    for runtime in llama.ensure(&[Kind::ReferenceExact, patched])? {
        let programs = llama.tools(&runtime)?;
        out.push(Build { runtime, programs });
    }
    out.try_into()
        .map_err(|_| anyhow::anyhow!("there are not two builds"))
}

/// A server with `slots` places for requests of up to 512 tokens.
pub fn start(build: &Build, model: &Path, slots: usize, args: &[&str]) -> Result<Server> {
    let (np, ctx) = (slots.to_string(), (slots * 512).to_string());
    let model = model.to_string_lossy();
    let common = ["-m", &model, "-np", &np, "-c", &ctx, "-fa", "on"];
    let more = ["--cache-ram", "0", "--no-webui"];
    let all = common.iter().chain(&more).chain(EXACT_ARGS).chain(args);
    Server::start(&build.runtime, all)
}
