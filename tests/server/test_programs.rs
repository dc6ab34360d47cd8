// SPDX-License-Identifier: Apache-2.0

//! The test programs of `integration/llama.cpp/tests`, which use the patched library without a server.

use std::process::Command;

use anyhow::Result;

use super::{Build, Suite, Test, program};
use crate::process;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("layer windows equal full passes", |suite| {
            run(suite, &suite.patched, "range-test", &[])
        }),
        Test::new(
            "K/V of rows that go deep later equal those of full passes",
            |suite| run(suite, &suite.patched, "postfill-test", &[]),
        ),
        Test::new(
            "exact: regrouped layer windows equal full passes",
            |suite| {
                let build = &super::exact::builds(suite)?.1;
                run(suite, build, "range-test", &["--regroup"])
            },
        )
        .exact(),
        Test::new(
            "exact: K/V of rows that go deep later equal those of full passes",
            |suite| {
                let build = &super::exact::builds(suite)?.1;
                run(suite, build, "postfill-test", &["--exact"])
            },
        )
        .exact(),
    ]
};

fn run(suite: &Suite, build: &Build, name: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program(build, name)?);
    let text = process::output(
        process::spin_briefly(&mut command)
            .arg(&suite.model)
            .args(args),
    )?;
    // The last line says how much was compared.
    println!("        {}", text.lines().last().unwrap_or_default());
    Ok(())
}
