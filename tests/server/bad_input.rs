// SPDX-License-Identifier: Apache-2.0

//! What cannot work is refused with a sentence that names it, and the server stays up.

use std::fs;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::{Suite, Test, generate, greedy, prompt};
use crate::{gguf, server::Server};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("flags that cannot work are refused at start", flags),
        Test::new("models that cannot work are refused at start", models),
        Test::new("requests that cannot work get HTTP 400", requests),
    ]
};

/// The server must not start, and its log must hold every one of the texts.
pub fn refused(server: Result<Server>, what: &str, texts: &[&str]) -> Result<()> {
    let Err(error) = server else {
        bail!("{what}: the server started");
    };
    let error = format!("{error:#}");
    ensure!(
        !error.contains("signal"),
        "{what}: the server crashed: {error}"
    );
    for text in texts {
        ensure!(error.contains(text), "{what}: no '{text}' in: {error}");
    }
    Ok(())
}

fn flags(suite: &Suite) -> Result<()> {
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["--drex-exit-layers", "0"],
            &["--drex-exit-layers", "\"0\""],
        ),
        // junk behind a number is no number
        (
            &["--drex-exit-layers", "4 8"],
            &["--drex-exit-layers", "4 8"],
        ),
        (
            &["--drex-exit-layers", "4.5"],
            &["--drex-exit-layers", "4.5"],
        ),
        (
            &["--drex-threshold", "0.5;0.6"],
            &["--drex-threshold", "0.5;0.6"],
        ),
        (
            &["--drex-max-hold-ms", "5abc"],
            &["--drex-max-hold-ms", "5abc"],
        ),
        (&["--drex-exit-layers", "16"], &["ramp_layers", "16"]),
        (&["--drex-exit-layers", "8,4"], &["ramp_layers", "4"]),
        (&["--drex-exit-layers", "x"], &["--drex-exit-layers"]),
        (&["--drex-threshold", "nan"], &["--drex-threshold", "nan"]),
        (&["--drex-threshold", "-1"], &["threshold", "-1"]),
        (
            &["--drex-threshold", "0.5,0.6"],
            &["--drex-threshold has 2 values", "3 exit layers"],
        ),
        (
            &["--drex-threshold", "0.5,0.6,-2"],
            &["--drex-threshold", "\"-2\""],
        ),
        (&["--drex-metric", "vibes"], &["vibes"]),
        (
            &["--drex-fill", "guess"],
            &["--drex-fill", "copy, propagate, postfill, verify", "guess"],
        ),
        (
            &["--drex-slots", "2"],
            &["n_slots is 2", "max_requests is 4"],
        ),
        (
            &["--drex-fill", "verify", "--drex-slots", "4"],
            &["n_slots is 4", "VERIFY"],
        ),
        (
            &["--drex-max-pending", "-1"],
            &["--drex-max-pending", "\"-1\""],
        ),
        (
            &["--drex-max-batch", "4096"],
            &["--drex-max-batch 4096", "--ubatch-size 512"],
        ),
        (
            &["--drex-max-batch", "128", "--batch-size", "64"],
            &["--drex-max-batch 128", "--batch-size 64"],
        ),
        (&["--drex-art-ratio", "-0.5"], &["--drex-art-ratio", "-0.5"]),
        (
            &["--drex-flush-rows", "-1"],
            &["--drex-flush-rows", "\"-1\""],
        ),
        (
            &["--drex-max-hold-ms", "-3"],
            &["--drex-max-hold-ms", "\"-3\""],
        ),
        (
            &["--drex-deadline-ms", "nan"],
            &["--drex-deadline-ms", "\"nan\""],
        ),
        (
            &["--drex-request-deadline-ms", "-7"],
            &["--drex-request-deadline-ms", "\"-7\""],
        ),
        (&["--drex-graphs", "0"], &["--drex-graphs", "\"0\""]),
        (&["--context-shift"], &["--context-shift"]),
        (&["--backend-sampling"], &["--backend-sampling"]),
        (&["--no-cont-batching"], &["--no-cont-batching"]),
        (&["--embedding"], &["--embedding"]),
    ];
    for (args, texts) in cases {
        let server = suite.start(
            &suite.patched,
            4,
            &[&["--drex-policy", "hold"], *args].concat(),
        );
        refused(server, &args.join(" "), texts)?;
    }
    // Larger than it need be is no mistake.
    drop(suite.start(
        &suite.patched,
        4,
        &[
            "--drex-policy",
            "art",
            "--drex-max-batch",
            "64",
            "--drex-slots",
            "9",
        ],
    )?);
    // What is given is checked even where no policy uses it.
    refused(
        suite.start(&suite.patched, 1, &["--drex-fill", "foo"]),
        "--drex-fill foo without a policy",
        &["--drex-fill", "foo"],
    )?;
    refused(
        suite.start(&suite.patched, 4, &["--drex-policy", "rebatch"]),
        "--drex-policy rebatch",
        &["rebatch"],
    )
}

fn models(suite: &Suite) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("drex-models-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let result = (|| {
        let start = |path: &std::path::Path, policy: &str| {
            let model = path.to_string_lossy();
            Server::start(
                &suite.patched.0,
                [
                    "-m",
                    &model,
                    "-np",
                    "2",
                    "-c",
                    "512",
                    "-t",
                    "2",
                    "--kv-unified",
                    "--drex-policy",
                    policy,
                ],
            )
        };

        let plain = folder.join("plain.gguf");
        let without = ["llama.early_exit.layers", "llama.early_exit.head"];
        gguf::rewrite(
            &suite.model,
            &plain,
            &gguf::Edit {
                without: &without,
                ..Default::default()
            },
        )?;
        refused(
            start(&plain, "hold"),
            "no metadata",
            &["early_exit.layers", "--drex-exit-layers"],
        )?;
        // It is the exits that are missing, not the model that is bad.
        drop(start(&plain, "off")?);

        let shallow = folder.join("shallow.gguf");
        gguf::rewrite(
            &suite.model,
            &shallow,
            &gguf::Edit {
                layers: Some(8),
                ..Default::default()
            },
        )?;
        refused(
            start(&shallow, "hold"),
            "exit layers of a deeper model",
            &["ramp_layers", "8"],
        )?;

        let truncated = folder.join("truncated.gguf");
        let bytes = fs::read(&suite.model)?;
        for n in [3, 100, 40_000, bytes.len() / 2] {
            fs::write(&truncated, &bytes[..n])?;
            refused(
                start(&truncated, "hold"),
                &format!("the first {n} bytes of a GGUF"),
                &["fail"],
            )?;
        }
        Ok(())
    })();
    fs::remove_dir_all(&folder)?;
    result
}

fn requests(suite: &Suite) -> Result<()> {
    let with = |key: &str, value: Value| {
        let mut body = greedy("fn main", 4);
        body[key] = value;
        body
    };
    let cases = [
        with("drex_threshold", json!(-1)),
        with("drex_threshold", json!("high")),
        with("drex_threshold", json!([0.5])),
        with("drex_metric", json!("vibes")),
        with("drex_metric", json!(3)),
        with("drex_fill", json!("guess")),
        with("drex_deadline_ms", json!(-5)),
        with("drex_request_deadline_ms", json!(-5)),
        with("drex_request_deadline_ms", json!("soon")),
        with("drex_priority", json!("first")),
        with("drex_priority", json!(true)),
        with("drex_priority", json!(1.9)),
        with("drex_priority", json!(1e20)),
        with("drex_priority", json!(1e300)),
        with("drex_treshold", json!(0.5)),
        with("drex_exit_layers", json!([4])),
        with("backend_sampling", json!(true)),
        with("lora", json!([{"id": 0, "scale": 0.5}])),
    ];
    let mut server = suite.start(&suite.patched, 4, &["--drex-policy", "hold"])?;
    for body in &cases {
        let key = [
            "drex_threshold",
            "drex_metric",
            "drex_fill",
            "drex_deadline_ms",
            "drex_request_deadline_ms",
            "drex_priority",
            "drex_treshold",
            "drex_exit_layers",
            "backend_sampling",
            "lora",
        ]
        .into_iter()
        .find(|key| body.get(key).is_some())
        .unwrap_or_default();
        let answer = server.client.post("/completion", body)?;
        let text = answer.text();
        ensure!(
            answer.status == 400,
            "{key} = {}: HTTP {} {text}",
            body[key],
            answer.status
        );
        ensure!(
            text.contains(key),
            "{key} = {}: the error does not name the field: {text}",
            body[key]
        );
    }
    let typo = server
        .client
        .post("/completion", &with("drex_treshold", json!(0.5)))?;
    ensure!(
        typo.text().contains("did you mean 'drex_threshold'"),
        "{}",
        typo.text()
    );
    // Nothing of them is left behind.
    let metrics = server.client.metrics()?;
    ensure!(
        metrics.get("drex_requests") == Some(0.0),
        "{:?} requests alive",
        metrics.get("drex_requests")
    );
    ensure!(
        generate(server.client, &[greedy(&prompt(0), 8)], 1)?[0]
            .tokens
            .len()
            == 8
    );
    ensure!(server.is_running());

    // Without early exit its fields are no silent no-op.
    let server = suite.start(&suite.patched, 1, &[])?;
    let answer = server
        .client
        .post("/completion", &with("drex_threshold", json!(0.5)))?;
    ensure!(
        answer.status == 400 && answer.text().contains("--drex on"),
        "HTTP {} {}",
        answer.status,
        answer.text()
    );
    Ok(())
}
