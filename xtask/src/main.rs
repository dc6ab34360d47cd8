// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask`: fetches and builds llama.cpp with the drex patches, serves, measures and tests it.
//!
//! Needs Rust, a C++ compiler and Python 3; everything else is fetched into a cache folder outside of the clone.

mod book;
mod gpu;
mod sim;
mod test;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use drex_build::{
    Source,
    cache::Cache,
    install, kernels,
    llama::{Kind, Llama},
    patches, process, serve,
};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Builds, serves, measures and tests drex in llama.cpp",
    after_help = "Sources and builds of llama.cpp live in ${XDG_CACHE_HOME:-~/.cache}/drex (DREX_CACHE overrides), \
                  never in the clone. The first build fetches 77 MB and takes minutes; \
                  later ones rebuild only what changed.\n\n\
                  Exit status: 0 success, 1 something failed, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

/// Arguments that go to a tool, `--help` among them.
#[derive(Args)]
struct Forwarded {
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    args: Vec<OsString>,
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
    /// Without -m/--model the bundled early-exit model is served; without --drex or --drex-policy it is `--drex on`.
    #[command(after_help = serve::EXAMPLE)]
    Serve {
        #[command(flatten)]
        source: Source,
        /// Arguments for llama-server
        #[arg(last = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Compare the exit policies on the bundled model and write a report
    #[command(disable_help_flag = true)]
    Demo(Forwarded),
    /// Simulate the scheduler: policies side by side, the whole grid, or a recording of your traffic
    ///
    /// All arguments go to drex-sim; see `cargo xtask sim --help`.
    #[command(disable_help_flag = true)]
    Sim(Forwarded),
    /// Fit exits to a model that was not trained for them, and say what they bring
    #[command(disable_help_flag = true)]
    Tune(Forwarded),
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
        what: Bench,
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
    /// Count the upstream lines that the patches touch, or apply them to another llama.cpp
    Patches(patches::Options),
    /// Run Triton Inference Server with the drex backend on the bundled model, and stream from it
    #[command(disable_help_flag = true)]
    Triton(Forwarded),
    /// Fuzz the C ABI with coverage, and run the library's tests under a sanitiser
    #[command(disable_help_flag = true)]
    Gauntlet(Forwarded),
    /// Run every check that CI runs: formatting, lints, Rust tests, llama.cpp builds, server tests
    Test(test::Options),
}

#[derive(Subcommand)]
enum Bench {
    /// Time the core's calls with criterion
    Core {
        /// One line of JSON: the median of each benchmark in ns
        #[arg(long)]
        json: bool,
        /// Shorter runs
        #[arg(long)]
        quick: bool,
    },
    /// Race the patched llama-server against the unpatched one, as a client sees them
    #[command(disable_help_flag = true)]
    Serve(Forwarded),
    /// Measure windows and policies on a large model of random weights, where reading them bounds the time
    #[command(disable_help_flag = true)]
    Scale(Forwarded),
    /// Write the figures of a report between the marks of a Markdown page
    #[command(disable_help_flag = true)]
    Page(Forwarded),
}

fn main() -> ExitCode {
    process::main(|| run(Cli::parse().command))
}

/// Fails where a command that checks something finds that it is not well.
fn run(command: Cmd) -> Result<ExitCode> {
    let well = |well: bool| ExitCode::from(u8::from(!well));
    match command {
        Cmd::Build {
            exact,
            reference_only,
            source,
        } => build(exact, reference_only, &source),
        Cmd::Serve { source, args } => serve::run(source.llama_src.as_deref(), args),
        Cmd::Demo(to) => sim::tool("drex-demo", to.args),
        Cmd::Sim(to) => sim::sim(to.args),
        Cmd::Tune(to) => sim::tune(to.args),
        Cmd::Gpu { source, .. } => gpu::pack(&source),
        Cmd::Bench { what } => bench(what),
        Cmd::Docs => book::print(),
        Cmd::Kernels(options) => return kernels::run(&options).map(well),
        Cmd::Install(options) => install::run(&options),
        Cmd::Deb(options) => install::deb::run(&options),
        Cmd::Patches(options) => return patches::run(&options).map(well),
        Cmd::Triton(to) => sim::tool("drex-triton-server", to.args),
        Cmd::Gauntlet(to) => sim::tool("drex-gauntlet", to.args),
        Cmd::Test(options) => return test::run(&options).map(well),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn bench(what: Bench) -> Result<()> {
    let (name, to) = match what {
        Bench::Core { json, quick } => return sim::bench(json, quick),
        Bench::Serve(to) => ("serve", to),
        Bench::Scale(to) => ("scale", to),
        Bench::Page(to) => ("page", to),
    };
    let args = [OsString::from(name)].into_iter().chain(to.args);
    sim::tool("drex-bench", args.collect())
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
