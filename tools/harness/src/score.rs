// SPDX-License-Identifier: Apache-2.0

//! Teacher-forced scoring of finished streams with the unpatched library (`drex-score`).

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use drex_build::process;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

/// What the full model says about one stream.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Score {
    /// Tokens of the stream.
    pub n: u64,
    /// Those that are the full model's own choice.
    pub agree: u64,
    /// Their negative log likelihood in all.
    pub nll: f64,
}

/// Scores `(prompt, output)` pairs with a KV cache of type `kv`. Pairs that are alike are scored once.
pub fn score(
    tool: &Path,
    model: &Path,
    threads: usize,
    kv: &str,
    streams: &[(Vec<i64>, Vec<i64>)],
) -> Result<Vec<Score>> {
    let threads = threads.to_string();
    run(tool, model, &["-t", &threads, "-ctk", kv], streams)
}

fn run<T: DeserializeOwned + Clone>(
    tool: &Path,
    model: &Path,
    args: &[&str],
    streams: &[(Vec<i64>, Vec<i64>)],
) -> Result<Vec<T>> {
    #[derive(Deserialize)]
    struct Line<T> {
        id: usize,
        #[serde(flatten)]
        score: T,
    }
    let mut unique: HashMap<&(Vec<i64>, Vec<i64>), usize> = HashMap::new();
    let mut input = String::new();
    for stream in streams {
        let next = unique.len();
        unique.entry(stream).or_insert_with(|| {
            // The streams were made with `ignore_eos`: an end of text was no choice, neither then nor now.
            let line =
                json!({"id": next, "prompt": stream.0, "output": stream.1, "ignore_eos": true});
            input.push_str(&line.to_string());
            input.push('\n');
            next
        });
    }
    let mut child = process::spin_briefly(&mut Command::new(tool))
        .arg("-m")
        .arg(model)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", tool.display()))?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    // Its own thread: the tool answers while it reads, and two full pipes would wait for each other.
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let mut scores: Vec<Option<T>> = vec![None; unique.len()];
    for line in BufReader::new(child.stdout.take().context("no stdout")?).lines() {
        let line: Line<T> = serde_json::from_str(&line?).context("drex-score printed no JSON")?;
        *scores
            .get_mut(line.id)
            .context("drex-score printed an unknown id")? = Some(line.score);
    }
    let status = child.wait()?;
    let written = writer.join();
    if !status.success() || !matches!(written, Ok(Ok(()))) {
        bail!("drex-score failed ({status})");
    }
    streams
        .iter()
        .map(|stream| {
            scores[unique[stream]]
                .clone()
                .context("drex-score left a line out")
        })
        .collect()
}

/// What a model would choose at each token of a stream, and how sure it is (the gap between its two best probabilities).
#[derive(Clone, Debug, Deserialize)]
pub struct Choices {
    pub choices: Vec<i64>,
    pub gaps: Vec<f64>,
}

/// `kv` is the type of the KV cache.
pub fn choices(
    tool: &Path,
    model: &Path,
    kv: &str,
    streams: &[(Vec<i64>, Vec<i64>)],
) -> Result<Vec<Choices>> {
    run(tool, model, &["--choices", "-ctk", kv], streams)
}

/// As `Score`, and by how much the logit of the model's own choice exceeds each token's; 0: they are the same.
#[derive(Clone, Debug, Deserialize)]
pub struct Margins {
    pub n: u64,
    pub agree: u64,
    pub nll: f64,
    pub margins: Vec<f64>,
}

/// `kv` is the type of the KV cache.
pub fn margins(
    tool: &Path,
    model: &Path,
    kv: &str,
    streams: &[(Vec<i64>, Vec<i64>)],
) -> Result<Vec<Margins>> {
    run(tool, model, &["--margins", "-ctk", kv], streams)
}
