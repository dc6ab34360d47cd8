// SPDX-License-Identifier: Apache-2.0

//! An adapter that all requests share works with early exit; what would differ between rows of a window is refused.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{EXACT, Suite, Test, equal, exact::builds, exits, generate, greedy, prompt};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "exact: lossless: an adapter for all requests equals unpatched",
            adapter,
        )
        .exact(),
    ]
};

/// A LoRA of rank 2 for two matrices of each layer of the bundled model, whose numbers depend on nothing.
pub fn write_adapter(path: &Path) -> Result<()> {
    const WIDTH: usize = 192;
    const RANK: usize = 2;
    let mut tensors: Vec<(String, [usize; 2])> = Vec::new();
    for layer in 0..16 {
        for matrix in ["attn_q", "attn_output"] {
            tensors.push((format!("blk.{layer}.{matrix}.weight.lora_a"), [WIDTH, RANK]));
            tensors.push((format!("blk.{layer}.{matrix}.weight.lora_b"), [RANK, WIDTH]));
        }
    }
    let mut out = b"GGUF".to_vec();
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(4u64.to_le_bytes());
    for (key, value) in [
        ("general.type", "adapter"),
        ("general.architecture", "llama"),
        ("adapter.type", "lora"),
    ] {
        text(&mut out, key);
        out.extend(8u32.to_le_bytes());
        text(&mut out, value);
    }
    text(&mut out, "adapter.lora.alpha");
    out.extend(6u32.to_le_bytes());
    out.extend(2f32.to_le_bytes());
    let mut offset = 0u64;
    for (name, shape) in &tensors {
        text(&mut out, name);
        out.extend(2u32.to_le_bytes());
        for n in shape {
            out.extend((*n as u64).to_le_bytes());
        }
        out.extend(0u32.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (4 * WIDTH * RANK) as u64; // a multiple of the alignment
    }
    out.resize(out.len().next_multiple_of(32), 0);
    for i in 0..tensors.len() * WIDTH * RANK {
        let value = ((i * 7919) % 1000) as f32 / 1000.0 - 0.5;
        out.extend((0.5 * value).to_le_bytes());
    }
    fs::write(path, out).context("writing an adapter")
}

fn adapter(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let path = std::env::temp_dir().join(format!("drex-adapter-{}.gguf", std::process::id()));
    write_adapter(&path)?;
    let file = path.to_string_lossy().into_owned();
    let result = (|| {
        let requests: Vec<_> = (0..16).map(|i| greedy(&prompt(i), 40)).collect();
        let lora = ["--lora", &file];
        let plain = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1)?;
        let alone = suite.start(reference, 1, &[EXACT, &lora].concat())?;
        let alone = generate(alone.client, &requests, 1)?;
        let differ = plain
            .iter()
            .zip(&alone)
            .filter(|(a, b)| a.tokens != b.tokens)
            .count();
        ensure!(
            differ > 8,
            "the adapter changes {differ} of 16 answers: it tests nothing"
        );

        let verify = [
            "--drex-policy",
            "hold",
            "--drex-fill",
            "verify",
            "--drex-threshold",
            "0.4",
        ];
        let server = suite.start(patched, requests.len(), &[EXACT, &lora, &verify].concat())?;
        let client = server.client;
        let got = generate(client, &requests, 8)?;
        let mut exited = 0;
        equal("one adapter", &alone, &got)?;
        exited += got.iter().flat_map(exits).sum::<u64>();
        ensure!(exited > 50, "{exited} exits");

        // Another scale for one request is refused, the same one is not.
        for (scale, status) in [(1.0, 200), (0.5, 400)] {
            let mut body = greedy(&prompt(0), 4);
            body["lora"] = json!([{"id": 0, "scale": scale}]);
            let answer = client.post("/completion", &body)?;
            ensure!(
                answer.status == status && (status == 200 || answer.text().contains("'lora'")),
                "scale {scale}: HTTP {} {}",
                answer.status,
                answer.text()
            );
        }
        // Scales change while nobody runs, and then for all.
        let scale = |scale: f64| client.post("/lora-adapters", &json!([{"id": 0, "scale": scale}]));
        let mut body = greedy(&prompt(1), 450);
        body["stream"] = json!(true);
        let mut stream = client.stream("/completion", &body)?;
        stream.next().context("no event")??;
        let answer = scale(0.0)?;
        ensure!(
            answer.status == 503 && answer.text().contains("adapters"),
            "HTTP {} {}",
            answer.status,
            answer.text()
        );
        stream.count();
        scale(0.0)?.ok()?;
        let got = generate(client, &requests[..4], 4)?;
        ensure!(
            got.iter().zip(&plain).all(|(a, b)| a.tokens == b.tokens),
            "an adapter with scale 0 changes answers"
        );
        Ok(())
    })();
    fs::remove_file(&path)?;
    result
}
