// SPDX-License-Identifier: Apache-2.0

//! A model of one's own: real weights, of any size and quantisation that the machine has room for.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use drex_build::{Source, cache::Cache, llama::Kind};
use drex_harness::{generate::generate, gguf, suite::Run};

use crate::{builds, start, streams};

pub fn tests(source: &Source, model: &Path, run: &mut Run) {
    let name = model.file_name().unwrap_or_default().to_string_lossy();
    run.tell(&format!("model {name}"), || own(source, model));
}

/// Cut behind a quarter and behind half of its layers, whatever it thinks there.
fn own(source: &Source, model: &Path) -> Result<String> {
    let layers = gguf::about(model)?.layers;
    ensure!(layers >= 4, "{layers} layers are too few to cut");
    let cuts = format!("{},{}", layers / 4, layers / 2);
    let cache = Cache::open()?;
    let [reference, patched] = builds(&cache, source, Kind::PatchedExact)?;
    let _machine = cache.lock_machine()?;
    let unpatched = {
        let server = start(&reference, model, 1, &["-t", "2"])?;
        generate(server.client, &streams::requests(""), 1)?
    };
    let all = ["copy", "propagate", "postfill"];
    let exits = ["--drex-policy", "hold", "--drex-exit-layers", &cuts];
    let fill = ["--drex-fill", "verify", "--drex-threshold", "0.05"];
    let threads = ["-t", "2"];
    let slots = streams::slots(&all) + 1;
    let args = [&exits[..], &fill, &threads].concat();
    let server = start(&patched, model, slots, &args)?;

    let mut request = streams::requests("copy").swap_remove(0);
    request["n_predict"] = 1.into();
    let answer = server.client.post("/completion", &request)?;
    let refused = (answer.status != 200).then(|| answer.text());
    let why = refused.as_deref().map(|text| {
        text.split_once("'drex_fill': copy ")
            .and_then(|(_, text)| text.split_once("; the other fills"))
            .map(|(why, _)| why)
            .with_context(|| format!("fill copy: HTTP {} {text}", answer.status))
    });
    let why = why.transpose()?;
    let fills = &all[usize::from(why.is_some())..];
    let found = streams::compare(&unpatched, &server, fills, why, 0)?;
    Ok(format!(
        "cut behind layers {cuts} of {layers}; verify as unpatched ({} of {} drafts accepted), {} in company as alone, {} \
         tokens{}",
        found.accepted,
        found.drafts,
        fills.join(", "),
        found.tokens,
        match why {
            Some(why) => format!("; copy refused: {why}"),
            None => String::new(),
        },
    ))
}
