//! The test programs of `integration/llama.cpp/tests`, which use the patched library without a server.

use std::process::Command;

use anyhow::Result;

use super::{Build, Suite, Test, program};
use crate::process;

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("layer windows equal full passes", |suite| {
            windows(suite, &suite.patched, &[])
        }),
        Test::new(
            "exact: regrouped layer windows equal full passes",
            |suite| windows(suite, &super::exact::builds(suite)?.1, &["--regroup"]),
        )
        .exact(),
    ]
};

fn windows(suite: &Suite, build: &Build, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program(build, "window-test")?);
    process::output(
        process::spin_briefly(&mut command)
            .arg(&suite.model)
            .args(args),
    )
    .map(drop)
}
