// SPDX-License-Identifier: Apache-2.0
//! `integration/triton/examples`: several models, an ensemble of them, and shared memory.

use std::{fs, os::unix::fs::symlink};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Bench, Test, quiet};
use crate::{cache, metrics::Metrics, process, prompt, triton::server::Triton};

pub const TESTS: &[Test] = &[(
    "the examples: several models, an ensemble, shared memory",
    examples,
)];

fn examples(bench: &Bench) -> Result<()> {
    let folder = cache::repo().join("integration/triton/examples");
    let repository = bench.installed.repository(&[])?;
    fs::remove_dir_all(&repository)?;
    for name in ["first", "second", "chain"] {
        let version = repository.join(name).join("1");
        fs::create_dir_all(&version)?;
        let config = format!("{name}/config.pbtxt");
        fs::copy(
            folder.join("models").join(&config),
            repository.join(&config),
        )?;
        if name != "chain" {
            symlink(cache::bundled_model()?, version.join("model.gguf"))?;
        }
    }
    let server = Triton::start(&bench.installed, repository, 0, &[])?;
    let sampling = json!({"temperature": 0, "max_tokens": 16});
    let alone = |model: &str, text: &str| -> Result<String> {
        let body = json!({"text_input": text, "sampling_parameters": sampling.to_string()});
        let path = format!("/v2/models/{model}/generate");
        let answer = server.http.post(&path, &body)?.ok()?.json()?;
        Ok(answer["text_output"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    };
    let prompt = prompt(0);
    // A policy that exits early may choose other tokens from one time to the next; full passes do not.
    let text = |name: &str, value: &str| json!({"name": name, "shape": [1], "datatype": "BYTES", "data": [value]});
    let answer = server
        .http
        .post(
            "/v2/models/chain/infer",
            &json!({"inputs": [text("PROMPT", &prompt), text("SAMPLING", &sampling.to_string())]}),
        )?
        .ok()?
        .json()?;
    let output = |name: &str| {
        let all = answer["outputs"].as_array().into_iter().flatten();
        let one = all
            .filter(|o| o["name"] == name)
            .find_map(|o| o["data"][0].as_str());
        one.unwrap_or_default().to_owned()
    };
    let (first, both) = (output("FIRST"), output("BOTH"));
    ensure!(
        first.starts_with(&prompt)
            && first.len() > prompt.len()
            && both == alone("second", &first)?,
        "{answer}"
    );
    let mut command = bench.installed.python.command();
    command
        .arg(folder.join("shared_memory.py"))
        .args([&server.http.addr.to_string(), "second", &prompt])
        .env("PYTHONPATH", &bench.installed.client);
    let said = process::output(&mut command)?;
    ensure!(
        said.trim_end_matches('\n') == alone("second", &prompt)?,
        "shared memory: {said}"
    );
    let models = Metrics::parse(&server.metrics()?);
    let models = models.by_label("drex_requests_waiting", "model");
    ensure!(models.len() == 2, "{models:?}");
    quiet(&server)
}
