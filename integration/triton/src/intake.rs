// SPDX-License-Identifier: Apache-2.0
//! From what a request asks for to what an engine runs.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::clock::now_ns;
use crate::engine::answer::Answer;
use crate::engine::queue::Job;
use crate::llama::Vocab;
use crate::sampling::Sampling;
use crate::triton::error::Failure;

/// A request's tokens, and what else is found out before it waits for a slot.
pub struct Read {
    prompt: Vec<i32>,
    bad: Vec<Vec<i32>>,
    sampling: Sampling,
    pub arrived_ns: u64,
}

impl Read {
    /// Reads the text, on the caller's thread: a long one takes a while. `context` as `Engine::context` says.
    pub fn new(
        vocab: &Vocab,
        context: u32,
        prompt: &str,
        mut sampling: Sampling,
    ) -> Result<Self, Failure> {
        let arrived_ns = now_ns();
        let most = vocab.longest().saturating_mul(context as usize);
        if prompt.len() > most {
            return Err(Failure::invalid(format!(
                "text_input has {} bytes, the context holds {context} tokens, which are at most {most} bytes",
                prompt.len()
            )));
        }
        let prompt = vocab.tokenize("text_input", prompt, true)?;
        if prompt.is_empty() {
            return Err(Failure::invalid("text_input is empty"));
        }
        if prompt.len() >= context as usize {
            return Err(Failure::invalid(format!(
                "text_input has {} tokens, the context holds {context} with at least one for the answer",
                prompt.len()
            )));
        }
        let left = context - prompt.len() as u32;
        if sampling.max_tokens > left {
            if sampling.max_tokens_said {
                return Err(Failure::invalid(format!(
                    "max_tokens is {}, must be {left} or less: the context holds {context} tokens, and text_input has {}",
                    sampling.max_tokens,
                    prompt.len()
                )));
            }
            sampling.max_tokens = left;
            sampling.min_tokens = sampling.min_tokens.min(left);
        }
        let mut bad = Vec::new();
        for word in &sampling.bad_words {
            // At the beginning of a line, and within.
            for text in [word.clone(), format!(" {}", word.trim_start())] {
                let tokens = vocab.tokenize("bad_words", &text, false)?;
                if !tokens.is_empty() && !bad.contains(&tokens) {
                    bad.push(tokens);
                }
            }
        }
        Ok(Self {
            prompt,
            bad,
            sampling,
            arrived_ns,
        })
    }

    pub fn job(self, id: u64, cancelled: Arc<AtomicBool>, answer: Answer) -> Job {
        Job {
            id,
            prompt: self.prompt,
            bad: self.bad,
            sampling: self.sampling,
            arrived_ns: self.arrived_ns,
            cancelled,
            answer,
        }
    }
}
