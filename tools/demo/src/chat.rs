// SPDX-License-Identifier: Apache-2.0

//! A chat with the patched server through OpenAI's own client, as programs have it.

use std::path::Path;

use anyhow::{Context, Result};
use drex_build::{
    cache::Cache,
    fetch::Python,
    llama::Runtime,
    process,
    python::{Package, package},
};
use drex_harness::server::Server;
use serde::Serialize;
use serde_json::Value;

use crate::options::Options;

const CLIENT: Package = Package {
    name: "openai",
    module: "openai",
    pinned: "openai==1.109.1",
    wide: "openai",
};

const QUESTION: &str = "What is the capital of France, and what is it known for?";

/// Asks with the client, streaming; prints a line of JSON.
const PROGRAM: &str = r#"
import json, sys, openai
url, question = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none")
stream = client.chat.completions.create(model="any", messages=[{"role": "user", "content": question}], stream=True,
    temperature=0, max_tokens=80, stream_options={"include_usage": True}, extra_body={"timings_per_token": True})
text, timings = "", {}
for chunk in stream:
    timings = getattr(chunk, "timings", None) or timings
    for choice in chunk.choices:
        text += choice.delta.content or ""
print(json.dumps({"answer": text, "timings": timings}))
"#;

/// What was asked and answered, and what became of the drafts.
#[derive(Clone, Default, Serialize)]
pub struct Chat {
    pub question: &'static str,
    pub answer: String,
    pub tokens: u64,
    /// Those that left early, drafts among them.
    pub exits: u64,
    pub drafts: u64,
    pub drafts_accepted: u64,
}

impl Chat {
    pub fn drafts_in_words(&self) -> String {
        let did = match self.drafts {
            0 => format!("{} left at an exit.", self.exits),
            n => format!(
                "exits proposed {n}, of which the full model took {}.",
                self.drafts_accepted
            ),
        };
        format!("{} tokens through OpenAI's client; {did}", self.tokens)
    }
}

pub fn chat(
    cache: &Cache,
    runtime: &Runtime,
    options: &Options,
    model: &Path,
    exits: &Path,
) -> Result<Chat> {
    let python = Python::find(cache)?;
    let client = package(cache, &python, &CLIENT)?;
    let threads = options.threads.to_string();
    let (model, exits) = (model.to_string_lossy(), exits.to_string_lossy());
    let mut args = vec!["-m", &model, "-np", "1", "-c", "1024", "-t", &threads];
    args.extend(["-fa", "on", "--no-webui", "--jinja"]);
    args.extend(["--drex-policy", "hold", "--drex-fill", &options.fill]);
    args.extend(["--drex-exits", &exits]);
    let threshold = options.threshold.to_string();
    args.extend(["--drex-threshold", &threshold]);
    if options.exit_layers != "model" {
        args.extend(["--drex-exit-layers", &options.exit_layers]);
    }
    let server = Server::start(runtime, args)?;
    let mut command = python.command();
    if let Some(path) = client {
        command.env("PYTHONPATH", path);
    }
    let url = format!("http://{}/v1", server.client.addr);
    command.args(["-c", PROGRAM, &url, QUESTION]);
    let out = process::output(&mut command).context("the OpenAI client failed")?;
    let said: Value = serde_json::from_str(out.trim()).context("the client printed no JSON")?;
    let count = |name: &str| {
        said["timings"][name]
            .as_u64()
            .with_context(|| format!("no {name} in {said}"))
    };
    Ok(Chat {
        question: QUESTION,
        answer: said["answer"].as_str().context("no answer")?.to_owned(),
        tokens: count("predicted_n")?,
        exits: exits_of(&said["timings"]),
        drafts: count("drex_drafts")?,
        drafts_accepted: count("drex_drafts_accepted")?,
    })
}

fn exits_of(timings: &Value) -> u64 {
    let ramps = timings["drex_exits"].as_array();
    ramps.into_iter().flatten().filter_map(Value::as_u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_and_drafts_are_told_apart() {
        let timings = serde_json::json!({"drex_exits": [2, 3]});
        let mut chat = Chat {
            tokens: 9,
            exits: exits_of(&timings),
            ..Chat::default()
        };
        assert!(chat.drafts_in_words().ends_with("; 5 left at an exit."));
        (chat.drafts, chat.drafts_accepted) = (4, 3);
        let says =
            "9 tokens through OpenAI's client; exits proposed 4, of which the full model took 3.";
        assert_eq!(chat.drafts_in_words(), says);
    }
}
