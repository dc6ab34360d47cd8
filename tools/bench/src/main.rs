// SPDX-License-Identifier: Apache-2.0

use std::process::ExitCode;

use clap::Parser;
use drex_build::process;

#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Cli {
    #[command(subcommand)]
    what: drex_bench::Bench,
}

fn main() -> ExitCode {
    process::main(|| drex_bench::run(&Cli::parse().what))
}
