// SPDX-License-Identifier: Apache-2.0

//! The engine: a program of ours on the patched llama.cpp.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::process;
use ndarray::Array2;
use serde::Deserialize;

pub struct Engine {
    pub program: PathBuf,
    pub model: PathBuf,
    pub threads: usize,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Info {
    pub architecture: String,
    pub name: String,
    pub block_count: u32,
    pub embedding_length: u32,
    pub vocab_size: u32,
    pub hash: String,
    pub head_type: String,
    /// It has a chat template.
    pub template: bool,
}

/// A window's time.
#[derive(Debug, Clone, Deserialize)]
pub struct Cost {
    pub rows: u32,
    pub begin: u32,
    pub end: u32,
    /// none, own or exit
    pub head: String,
    /// The least of several: whatever else the machine does comes on top.
    #[serde(rename = "least_us")]
    pub us: f64,
}

/// Texts that were cut into tokens: `id n_given token token ...`.
pub type Line = String;

impl Engine {
    /// Runs a subcommand over `input` and hands each line of its answer on.
    pub fn run(
        &self,
        command: &str,
        args: &[OsString],
        input: Vec<u8>,
        mut on_line: impl FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let mut child = self
            .command(command, args)
            .spawn()
            .with_context(|| format!("running {}", self.program.display()))?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        // On a thread of its own: two full pipes would wait for each other.
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let mut result = Ok(());
        // A model's name may be anything.
        for line in BufReader::new(child.stdout.take().context("no stdout")?).split(b'\n') {
            result = line
                .map_err(Into::into)
                .and_then(|line| on_line(&String::from_utf8_lossy(&line)));
            if result.is_err() {
                let _ = child.kill();
                break;
            }
        }
        let status = child.wait()?;
        let _ = writer.join();
        result?;
        ensure!(
            status.success(),
            "drex-tune-engine {command} failed ({status})"
        );
        Ok(())
    }

    fn command(&self, command: &str, args: &[OsString]) -> Command {
        let mut c = Command::new(&self.program);
        process::spin_briefly(&mut c);
        c.arg(command)
            .arg("-m")
            .arg(&self.model)
            .arg("-t")
            .arg(self.threads.to_string())
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        c
    }

    pub fn info(&self) -> Result<Info> {
        let mut info = None;
        self.run("info", &[], Vec::new(), |line| {
            info = Some(serde_json::from_str(line).context("the engine's info is no JSON")?);
            Ok(())
        })?;
        info.context("the engine says nothing of the model")
    }

    pub fn tokens(&self, text: &[u8], chunk: u32) -> Result<Vec<Line>> {
        let mut all = Vec::new();
        let args = ["--chunk".into(), chunk.to_string().into()];
        self.run("tokens", &args, text.to_vec(), |line| {
            all.push(line.to_owned());
            Ok(())
        })?;
        Ok(all)
    }

    /// The head's rows of these tokens.
    pub fn head(&self, tokens: &[i32], width: usize) -> Result<Array2<f32>> {
        let mut input = String::from("0 1");
        for t in tokens {
            input += &format!(" {t}");
        }
        input.push('\n');
        let mut child = self.command("head", &[]).spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let mut bytes = Vec::new();
        child
            .stdout
            .take()
            .context("no stdout")?
            .read_to_end(&mut bytes)?;
        let status = child.wait()?;
        let _ = writer.join();
        if !status.success() {
            bail!("drex-tune-engine head failed ({status})");
        }
        let rows = bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        Array2::from_shape_vec((tokens.len(), width), rows)
            .context("the engine's head has other rows than were asked for")
    }

    pub fn costs(&self, layers: &[u32], rows: &[u32], exits: &Path) -> Result<Vec<Cost>> {
        let mut all = Vec::new();
        let args = [
            "--layers".into(),
            list(layers).into(),
            "--rows".into(),
            list(rows).into(),
            "--exits".into(),
            exits.into(),
        ];
        self.run("cost", &args, Vec::new(), |line| {
            all.push(serde_json::from_str(line).context("the engine's cost is no JSON")?);
            Ok(())
        })?;
        Ok(all)
    }
}

pub fn list(numbers: &[u32]) -> String {
    let all: Vec<String> = numbers.iter().map(u32::to_string).collect();
    all.join(",")
}

pub fn input(lines: &[Line]) -> Vec<u8> {
    let mut text = lines.join("\n");
    text.push('\n');
    text.into_bytes()
}
