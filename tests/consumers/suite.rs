// SPDX-License-Identifier: Apache-2.0

//! drex as those meet it who only have a compiler and the installed package. Programs are built against an installation in
//! an empty prefix, never against the checkout, and run.

mod checks;
mod kit;
mod programs;

use std::process::ExitCode;

use clap::Parser;
use drex_harness::suite::{self, Choice};

use kit::Kit;

#[derive(Parser)]
#[command(
    name = "consumers",
    about = "Programs built against an installed drex: make, CMake, plain cc, static, Debian packages, sanitizers"
)]
struct Options {
    #[command(flatten)]
    choice: Choice,
    /// With cargo-c too, which is compiled first, for a quarter of an hour
    #[arg(long)]
    cargo_c: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut tests = checks::ALL.to_vec();
    if options.cargo_c {
        tests.push(checks::CARGO_C);
    }
    suite::main(&options.choice, |run| {
        if let Some(kit) = run.tests("drex is installed", Kit::new, &tests) {
            println!("{}", kit.tally());
        }
    })
}
