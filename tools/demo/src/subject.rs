// SPDX-License-Identifier: Apache-2.0

//! The models of the demo, and what they are asked.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache},
    models,
};
use drex_harness::{client::Client, load::Limits};
use serde_json::json;

use crate::{
    measure::{CHAT_LIMITS, LIMITS, Repeat},
    options::SMOLLM2,
};

pub struct Subject {
    pub model: PathBuf,
    /// Exits that were fitted to it.
    pub exits: Option<PathBuf>,
    /// What it is, in sentences for the report.
    pub is: &'static str,
    /// One per request of the `short` traffic.
    pub short: Vec<String>,
    /// What those are.
    pub short_is: &'static str,
    /// Rounds end here even if some are still to come.
    pub budget: Duration,
    /// Of each measurement.
    pub limits: Limits,
    /// How much is repeated in the exact builds; none: every load as it was measured.
    pub repeat: Option<Repeat>,
    /// Text that the long prompts are taken from.
    pub corpus: String,
    /// Prompts are messages of a chat.
    chat: bool,
}

const TOY: &str = "The model is a toy: 16 layers and 6.7 million parameters, trained for early exit on Rust documentation. \
                   Other models have other figures.";
const CHAT: &str = "The model is SmolLM2-135M-Instruct, Q4_1: 30 layers, not trained for early exit. Its exits were fitted by \
                    cargo xtask tune; its weights are untouched.";

impl Subject {
    pub fn of(cache: &Cache, name: &str) -> Result<Subject> {
        let corpus = read(&cache::repo().join("demo/corpus.txt"))?;
        if name == SMOLLM2 {
            return Ok(Subject {
                model: models::smollm2(cache)?,
                exits: Some(cache::repo().join("demo/smollm2.exits.gguf")),
                is: CHAT,
                short: lines("chat.txt")?,
                short_is: "questions of a chat, of about 45 tokens with the model's template",
                budget: Duration::from_secs(1200),
                limits: CHAT_LIMITS,
                repeat: Some(Repeat {
                    requests: 20,
                    tokens: 32,
                }),
                corpus,
                chat: true,
            });
        }
        Ok(Subject {
            model: cache::bundled_model()?,
            exits: None,
            is: TOY,
            short: lines("prompts.txt")?,
            short_is: "prompts of a dozen tokens",
            // The whole demo should take about four minutes.
            budget: Duration::from_secs(180),
            limits: LIMITS,
            repeat: None,
            corpus,
            chat: false,
        })
    }

    /// So many requests are enough of a model that takes its time.
    pub fn most(&self, concurrency: usize) -> usize {
        match self.chat {
            true => (concurrency * 3 / 2).max(8),
            false => usize::MAX,
        }
    }

    /// The tokens of a short prompt.
    pub fn tokens(&self, client: Client, text: &str) -> Result<Vec<i64>> {
        if !self.chat {
            return client.tokenize(text);
        }
        let body = json!({"messages": [{"role": "user", "content": text}]});
        let answer = client.post("/apply-template", &body)?.ok()?.json()?;
        client.tokenize(answer["prompt"].as_str().context("no prompt")?)
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// One per line, with `\n` for a line's end in the prompt.
fn lines(name: &str) -> Result<Vec<String>> {
    let path = cache::repo().join("demo").join(name);
    let text = read(&path)?;
    let prompts: Vec<_> = text
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| line.replace("\\n", "\n"))
        .collect();
    ensure!(!prompts.is_empty(), "{} is empty", path.display());
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompts_are_there() -> Result<()> {
        assert_eq!(lines("prompts.txt")?.len(), 40);
        assert_eq!(lines("chat.txt")?.len(), 40);
        Ok(())
    }
}
