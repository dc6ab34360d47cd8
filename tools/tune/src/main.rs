// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask tune`: fits exits to a model that was not trained for them, and says what they will bring, or that they will not.

mod calibrate;
mod choose;
mod engine;
mod exits;
mod fit;
mod gguf;
mod harvest;
mod head;
mod map;
mod measure;
mod prompts;
mod quality;
mod refine;
mod report;
mod ridge;
mod states;
mod tune;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{CommandFactory, Parser, error::ErrorKind};
use drex_build::{
    Source,
    cache::Cache,
    llama::{Kind, Llama},
};

use crate::{engine::Engine, fit::Schedule};

#[derive(Parser)]
#[command(
    name = "cargo xtask tune",
    bin_name = "cargo xtask tune",
    about = "Fits exits to a model that was not trained for them, and says what they bring",
    after_help = "The states of the texts and the maps are kept in --work: a run that was interrupted goes on there, and \
                  another with the same texts and --layers needs no harvest.\n\n\
                  Exit status: 0 exits were written, 1 something failed, 2 wrong usage."
)]
struct Cli {
    /// The model, a GGUF file
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// The file of exits to write [default: beside the model, MODEL.exits.gguf]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Texts to fit on, as they are; without any, what the model itself writes to a list of prompts
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// A text of another kind, on which agreement and calibration are measured too
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    /// Tokens to fit on, those held out included
    #[arg(long, value_name = "N", default_value_t = 60_000)]
    tokens: usize,
    /// Layers after which there may be an exit [default: a tenth of the model apart]
    #[arg(long, value_name = "L,L,...", value_delimiter = ',')]
    layers: Vec<u32>,
    /// Candidates that are refined, those that look best after regression
    #[arg(long, value_name = "N", default_value_t = 4)]
    refine: usize,
    /// Passes over the text while refining
    #[arg(long, value_name = "N", default_value_t = 4)]
    passes: usize,
    /// Size of the first steps, as a share of a map's numbers
    #[arg(long, value_name = "F", default_value_t = 0.05)]
    rate: f32,
    /// Width of a small network beside each affine map, 0: none
    #[arg(long, value_name = "N", default_value_t = 0)]
    mlp: usize,
    /// Tokens of the exits' head [default: by cost against coverage]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    head_tokens: usize,
    /// Most that map and head may cost, in layers
    #[arg(long, value_name = "F", default_value_t = 1.5)]
    ramp_layers: f64,
    /// Threads [default: as many as there are cores]
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// A folder for states and maps [default: beside the model, MODEL.tune]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The program drex-tune-engine [default: built as cargo xtask build builds llama-server]
    #[arg(long, value_name = "FILE")]
    engine: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// Measure in llama-server what the exits bring, some minutes more
    #[arg(long)]
    measure: bool,
    /// End with a line of JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let range = |what: &str, value: f64, low: f64, high: f64| {
        if !(low..=high).contains(&value) {
            let text = format!("--{what} is {value}, expected a number from {low} to {high}");
            Cli::command()
                .error(ErrorKind::ValueValidation, text)
                .exit();
        }
    };
    range("tokens", cli.tokens as f64, 1000.0, 1e8);
    let least = if cli.head_tokens == 0 { 0.0 } else { 2.0 };
    range("head-tokens", cli.head_tokens as f64, least, 1e7);
    range("passes", cli.passes as f64, 0.0, 1000.0);
    range("refine", cli.refine as f64, 1.0, 64.0);
    range("rate", cli.rate.into(), 0.0, 10.0);
    range("mlp", cli.mlp as f64, 0.0, 65_536.0);
    range("ramp-layers", cli.ramp_layers, 0.0, 1e3);
    let beside = |extension: &str| cli.model.with_extension(extension);
    let threads = match cli.threads {
        Some(n) => n,
        None => std::thread::available_parallelism()?.get(),
    };
    range("threads", threads as f64, 1.0, 512.0);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()?;
    let program = match cli.engine {
        Some(program) => program,
        None => {
            let cache = Cache::open()?;
            let llama = Llama::open(&cache, cli.source.llama_src.as_deref())?;
            llama.tune_engine(&llama.ensure_one(Kind::Patched)?)?
        }
    };
    let report = tune::tune(&tune::Options {
        output: cli.output.unwrap_or_else(|| beside("exits.gguf")),
        work: cli.work.unwrap_or_else(|| beside("tune")),
        engine: Engine {
            program,
            model: cli.model,
            threads,
        },
        texts: cli.text,
        held_out: cli.held_out,
        tokens: cli.tokens,
        layers: cli.layers,
        refine: cli.refine,
        schedule: Schedule {
            passes: cli.passes,
            batch: 256,
            rate: cli.rate,
            mlp: cli.mlp,
        },
        head_tokens: cli.head_tokens,
        ramp_layers: cli.ramp_layers,
        measure: cli.measure,
    })?;
    print!("{}", report.table());
    if cli.json {
        println!("{}", report.line());
    }
    Ok(())
}
