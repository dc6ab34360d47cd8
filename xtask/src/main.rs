//! `cargo xtask`: fetches and builds llama.cpp with the drex patches, serves, measures and tests it.
//!
//! Needs Rust, a C++ compiler and Python 3; everything else is fetched into a cache folder outside of the clone.

mod architectures;
mod bench;
mod book;
mod cache;
mod cargo;
mod consumers;
mod demo;
mod devices;
mod examples;
mod fetch;
mod gguf;
mod gpu;
mod install;
mod kernels;
mod llama;
mod observe;
mod python;
mod score;
mod serve;
mod server_tests;
mod sim;
mod test;
mod tools;
mod triton;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use drex_harness::{client, http, load, process, server};

use crate::{
    cache::Cache,
    llama::{Kind, Llama},
};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Builds, serves, measures and tests drex in llama.cpp",
    after_help = "Sources and builds of llama.cpp live in ${XDG_CACHE_HOME:-~/.cache}/drex (DREX_CACHE overrides), \
                  never in the clone. The first build fetches 77 MB and takes about ten minutes on two cores; \
                  later ones rebuild only what changed.\n\n\
                  Exit status: 0 success, 1 something failed, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Args, Clone)]
pub struct Source {
    /// A checkout of llama.cpp to use instead of the pinned source.
    ///
    /// It is copied into the cache and patched there; the checkout itself is never changed.
    #[arg(long, value_name = "DIR")]
    llama_src: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Cmd {
    /// Fetch llama.cpp, apply the patches, build both the unpatched and the patched llama-server
    Build {
        /// Also build the variants whose results do not depend on the batch size
        #[arg(long)]
        exact: bool,
        /// Build the unpatched server only
        #[arg(long)]
        reference_only: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Run the patched llama-server in the foreground
    ///
    /// Without -m/--model the bundled early-exit model is served; without --drex-policy the policy is `auto`.
    #[command(after_help = serve::EXAMPLE)]
    Serve {
        #[command(flatten)]
        source: Source,
        /// Arguments for llama-server
        #[arg(last = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Compare the exit policies on the bundled model and write a report
    Demo(demo::Options),
    /// Simulate the scheduler: policies side by side, the whole grid, or a recording of your traffic
    ///
    /// All arguments go to drex-sim; see `cargo xtask sim --help`.
    #[command(disable_help_flag = true)]
    Sim {
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "ARGS"
        )]
        args: Vec<OsString>,
    },
    /// Prepare a run on a GPU machine, see tools/gpu/README.md
    Gpu {
        /// Write what that machine needs into .gpu/
        #[arg(value_parser = ["pack"])]
        what: String,
        #[command(flatten)]
        source: Source,
    },
    /// Measure the calls of the core, or servers against each other
    #[command(arg_required_else_help = true)]
    Bench {
        #[command(subcommand)]
        what: bench::Bench,
    },
    /// Build the book in docs/ into target/book, with dead links as errors
    Docs,
    /// Compile the CUDA kernels to kernels/prebuilt; needs neither CUDA nor a GPU
    ///
    /// The compiler is fetched with pip into the cache, 105 MB, pinned by hash. Only a change of a kernel needs this
    /// command: a build of drex takes the committed artefacts, or an nvcc where there is one. DREX_NVCC names the nvcc;
    /// an empty DREX_NVCC means none.
    Kernels(kernels::Options),
    /// Install the libraries, the headers, drex.pc and the CMake package below a prefix
    #[command(
        after_help = "Example: cargo xtask install --prefix ~/.local\n\nSee docs/install.md for how programs find it."
    )]
    Install(install::Options),
    /// Build the Debian packages libdrex0 and libdrex-dev
    Deb(install::deb::Options),
    /// Run Triton Inference Server with the drex backend on the bundled model, and stream from it
    Triton(triton::Options),
    /// Run every check that CI runs: formatting, lints, Rust tests, llama.cpp builds, server tests
    Test(test::Options),
}

fn main() -> ExitCode {
    // A reader that goes away (`cargo xtask demo | head`) should end us quietly, as it does any other filter.
    // SAFETY: sets a signal's disposition to its default before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let result = match Cli::parse().command {
        Cmd::Build {
            exact,
            reference_only,
            source,
        } => build(exact, reference_only, &source).map(|()| true),
        Cmd::Serve { source, args } => serve::run(source.llama_src.as_deref(), args).map(|()| true),
        Cmd::Demo(options) => demo::run(&options).map(|()| true),
        Cmd::Sim { args } => sim::sim(args).map(|()| true),
        Cmd::Gpu { source, .. } => gpu::pack(&source).map(|()| true),
        Cmd::Bench { what } => bench::run(&what).map(|()| true),
        Cmd::Docs => book::print().map(|()| true),
        Cmd::Kernels(options) => kernels::run(&options),
        Cmd::Install(options) => install::run(&options).map(|()| true),
        Cmd::Deb(options) => install::deb::run(&options).map(|()| true),
        Cmd::Triton(options) => triton::run(&options).map(|()| true),
        Cmd::Test(options) => test::run(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build(exact: bool, reference_only: bool, source: &Source) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source.llama_src.as_deref())?;
    let mut kinds = vec![Kind::Reference, Kind::Patched];
    if exact {
        kinds.extend([Kind::ReferenceExact, Kind::PatchedExact]);
    }
    kinds.retain(|kind| !(reference_only && kind.is_patched()));
    for runtime in llama.ensure(&kinds)? {
        println!("{:16} {}", runtime.kind.name(), runtime.server().display());
        for tool in llama.tools(&runtime)? {
            println!("{:16} {}", "", tool.display());
        }
    }
    Ok(())
}
