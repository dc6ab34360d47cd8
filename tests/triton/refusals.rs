// SPDX-License-Identifier: Apache-2.0
//! Configurations that would have no effect, or a wrong one, and files that are none: each is refused by name when it is loaded.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Bench, PARAMETERS, Test};
use crate::triton::server::Triton;

pub const TESTS: &[Test] = &[("what would have no effect is refused at load", refusals)];

/// Text of config.pbtxt, parameters, and what the error says.
type Case = (
    &'static str,
    &'static [(&'static str, &'static str)],
    &'static str,
);

const CASES: &[Case] = &[
    (
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 }\n",
        &[],
        "dynamic_batching is {",
    ),
    ("dynamic_batching { }\n", &[], "dynamic_batching is {"),
    ("sequence_batching { }\n", &[], "sequence_batching is {"),
    (
        "response_cache { enable: true }\n",
        &[],
        "response_cache: enable is true, must be left out",
    ),
    (
        "optimization { priority: PRIORITY_MAX }\n",
        &[],
        "optimization: priority is \"PRIORITY_MAX\"",
    ),
    (
        "optimization { cuda { graphs: true } }\n",
        &[],
        "optimization: cuda is {",
    ),
    (
        "instance_group { count: 1 kind: KIND_CPU rate_limiter { resources { name: \"R\" count: 1 } } }\n",
        &[],
        "rate_limiter is {",
    ),
    (
        "",
        &[("profile", "/proc/none/profile.json")],
        "profile /proc/none/profile.json: cannot be written",
    ),
    ("", &[("gpu_layers", "all")], "gpu_layers is all, must be 0"),
    ("", &[("gpu_layers", "7")], "gpu_layers is 7, must be 0"),
    (
        "default_model_filename: \"other.gguf\"\n",
        &[],
        "other.gguf: No such file",
    ),
];

fn refusals(bench: &Bench) -> Result<()> {
    let repository = bench.installed.repository(PARAMETERS)?;
    let mut cases = Vec::new();
    for (i, (more, parameters, part)) in CASES.iter().enumerate() {
        let name = format!("bad{i}");
        bench
            .installed
            .model(&repository, &name, more, parameters)?;
        cases.push((name, *part));
    }
    let dangling = repository.join("dangling/1");
    fs::create_dir_all(&dangling)?;
    symlink("nowhere.gguf", dangling.join("model.gguf"))?;
    fs::write(dangling.join("../config.pbtxt"), "backend: \"drex\"\n")?;
    cases.push((
        "dangling".into(),
        "is a link to nowhere.gguf: No such file or directory",
    ));
    refuse(bench, repository, &cases).map(drop)
}

/// Starts a server, and has it refuse models of its repository for what the error says.
pub fn refuse(bench: &Bench, repository: PathBuf, cases: &[(String, &str)]) -> Result<Triton> {
    let server = Triton::start(
        &bench.installed,
        repository,
        0,
        &["--exit-on-error=false", "--strict-readiness=false"],
    )?;
    for (name, part) in cases {
        let path = format!("/v2/repository/models/{name}/load");
        let answer = server.http.post(&path, &json!({}))?;
        let said = answer.json()?;
        let text = said["error"].as_str().unwrap_or_default();
        ensure!(
            answer.status != 200 && text.contains(part),
            "{name}: expected {part:?}: {} {text}",
            answer.status
        );
    }
    println!("        {} configurations refused", cases.len());
    Ok(server)
}
