// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask test --consumers`: drex as those meet it who only have a compiler and the installed package. Programs are
//! built against an installation in an empty prefix, never against the checkout, and run.

mod checks;
mod kit;

use std::time::Instant;

use anyhow::Result;

use kit::Kit;

/// Runs all checks, or leaves out those that want long compilation before; `report` gets each one's name, result and start.
pub fn run(slow: bool, report: &mut dyn FnMut(&str, Result<()>, Instant)) {
    println!("== consumers");
    let start = Instant::now();
    let kit = match Kit::new() {
        Ok(kit) => kit,
        Err(error) => return report("consumers: set-up", Err(error), start),
    };
    let more = checks::SLOW.iter().filter(|_| slow);
    for (name, check) in checks::ALL.iter().chain(more) {
        let start = Instant::now();
        report(&format!("consumers: {name}"), check(&kit), start);
    }
    println!("consumers: {}", kit.tally());
}
