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

/// What a model would choose at each token of a stream, and how sure it is (the gap between its two best probabilities).
#[derive(Clone, Debug, Deserialize)]
pub struct Choices {
    pub choices: Vec<i64>,
    pub gaps: Vec<f64>,
}

/// As `Score`, and by how much the logit of the model's own choice exceeds each token's; 0: they are the same.
#[derive(Clone, Debug, Deserialize)]
pub struct Margins {
    pub n: u64,
    pub agree: u64,
    pub nll: f64,
    pub margins: Vec<f64>,
}

/// A stream: the tokens of its prompt, and of its output.
pub type Stream = (Vec<i64>, Vec<i64>);

/// How streams are scored, which is as they were made. Each call answers in the order of the streams, and runs the model
/// once for streams that are alike.
#[derive(Clone, Copy, Debug)]
pub struct Scorer<'a> {
    /// The program `drex-score`.
    pub tool: &'a Path,
    pub model: &'a Path,
    pub threads: usize,
    /// The type of the KV cache: `f16`, `q8_0` or `f32`.
    pub kv: &'a str,
    /// The streams were made with the request option of that name: an end of the text was no choice.
    pub ignore_eos: bool,
}

impl Scorer<'_> {
    pub fn scores(&self, streams: &[Stream]) -> Result<Vec<Score>> {
        self.run(&[], streams)
    }

    pub fn choices(&self, streams: &[Stream]) -> Result<Vec<Choices>> {
        self.run(&["--choices"], streams)
    }

    pub fn margins(&self, streams: &[Stream]) -> Result<Vec<Margins>> {
        self.run(&["--margins"], streams)
    }

    fn run<T: DeserializeOwned + Clone>(
        &self,
        args: &[&str],
        streams: &[Stream],
    ) -> Result<Vec<T>> {
        #[derive(Deserialize)]
        struct Line<T> {
            id: usize,
            #[serde(flatten)]
            score: T,
        }
        let mut unique: HashMap<&Stream, usize> = HashMap::new();
        let mut input = String::new();
        for stream in streams {
            let next = unique.len();
            unique.entry(stream).or_insert_with(|| {
                let (prompt, output) = stream;
                let line = json!({
                    "id": next, "prompt": prompt, "output": output, "ignore_eos": self.ignore_eos,
                });
                input.push_str(&line.to_string());
                input.push('\n');
                next
            });
        }
        let mut child = process::spin_briefly(&mut Command::new(self.tool))
            .arg("-m")
            .arg(self.model)
            .args(["-t", &self.threads.to_string(), "-ctk", self.kv])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", self.tool.display()))?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        // Its own thread: the tool answers while it reads, and two full pipes would wait for each other.
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let mut scores: Vec<Option<T>> = vec![None; unique.len()];
        for line in BufReader::new(child.stdout.take().context("no stdout")?).lines() {
            let line: Line<T> =
                serde_json::from_str(&line?).context("drex-score printed no JSON")?;
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
}
