// SPDX-License-Identifier: Apache-2.0
//! Servers whose backend API is newer, older, or another one.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail, ensure};

use super::{Bench, PARAMETERS, Test, requests, whole};
use crate::{
    cache, process,
    tools::Tools,
    triton::server::{Start, Triton},
};

pub const TESTS: &[Test] = &[(
    "backend API 1.99 is taken, 1.15 and 2.0 are refused",
    versions,
)];

/// Compiles a source of ours beside the model repositories.
fn compile(bench: &Bench, source: &str, name: &str, flags: &[&str]) -> Result<PathBuf> {
    let lock = bench.cache.lock()?;
    let tools = Tools::find(&bench.cache, &lock)?;
    drop(lock);
    let out = bench.installed.scratch().join(name);
    let source: &Path = &cache::repo().join("integration/triton/tests").join(source);
    process::output(
        Command::new(&tools.cxx)
            .args(["-x", "c", "-O1", "-Wall", "-Werror"])
            .arg(source)
            .args(flags)
            .arg("-o")
            .arg(&out),
    )?;
    Ok(out)
}

fn versions(bench: &Bench) -> Result<()> {
    for (major, minor, taken) in [(1, 99, true), (1, 16, true), (1, 15, false), (2, 0, false)] {
        let library = compile(
            bench,
            "api_version.c",
            &format!("libapi-{major}.{minor}.so"),
            &[
                "-shared",
                "-fPIC",
                &format!("-DMAJOR={major}"),
                &format!("-DMINOR={minor}"),
            ],
        )?;
        let repository = bench.installed.repository(PARAMETERS)?;
        let server = Triton::start_with(
            &bench.installed,
            &Start {
                backends: &bench.installed.backends,
                repository: &repository,
                port: 0,
                args: &[],
                preload: Some(&library),
            },
        );
        match (server, taken) {
            (Ok(server), true) => {
                whole(&bench.stream(&server, &requests(4, 16))?, |_| 16)?;
                println!("        {major}.{minor}: serves");
            }
            (Err(error), true) => return Err(error),
            (Ok(_), false) => bail!("a server with backend API {major}.{minor} is not refused"),
            (Err(error), false) => {
                let text = format!("{error:#}");
                let wanted = format!(
                    "drex needs Triton's backend API 1.16 or a newer 1.x, this server has {major}.{minor}"
                );
                ensure!(text.contains(&wanted), "{major}.{minor}: {text}");
                println!("        {major}.{minor}: refused");
            }
        }
    }
    Ok(())
}
