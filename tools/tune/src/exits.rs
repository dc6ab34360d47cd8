// SPDX-License-Identifier: Apache-2.0

//! The file of exits.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use drex::core::calibration::Platt;

use crate::{
    engine::Info,
    fit::Fitted,
    gguf::{Value, Writer},
};

/// For the gap, the greatest probability and the entropy.
pub type Calibrations = [Platt; 3];

/// `report` is kept in the file's metadata.
pub fn write(
    path: &Path,
    info: &Info,
    tokens: &[i32],
    exits: &[(Fitted, Calibrations)],
    report: &str,
) -> Result<()> {
    let mut w = Writer::default();
    let model = |key: &str| format!("exits.model.{key}");
    w.set("general.architecture", Value::Text("exits".into()));
    w.set("general.name", Value::Text(info.name.clone()));
    w.set("exits.version", Value::U32(1));
    w.set(
        &model("architecture"),
        Value::Text(info.architecture.clone()),
    );
    w.set(&model("block_count"), Value::U32(info.block_count));
    w.set(
        &model("embedding_length"),
        Value::U32(info.embedding_length),
    );
    w.set(&model("vocab_size"), Value::U32(info.vocab_size));
    w.set(&model("hash"), Value::Text(info.hash.clone()));
    w.set(
        "exits.layers",
        Value::U32s(exits.iter().map(|e| e.0.layer).collect()),
    );
    let numbers = exits.iter().flat_map(|e| &e.1);
    w.set(
        "exits.calibration",
        Value::F32s(numbers.flat_map(|c| [c.scale, c.shift]).collect()),
    );
    w.set("exits.report", Value::Text(report.into()));
    w.integers("tokens", tokens);
    for (fitted, _) in exits {
        let name = |part: &str| format!("exit.{}.{part}", fitted.layer);
        w.matrix(name("weight"), &fitted.map.affine.weight);
        w.vector(name("bias"), &fitted.map.affine.bias);
        if let Some(mlp) = &fitted.map.mlp {
            w.matrix(name("mlp_up"), &mlp.up.weight);
            w.vector(name("mlp_up_bias"), &mlp.up.bias);
            w.matrix(name("mlp_down"), &mlp.down);
        }
    }
    // Whoever reads a file that is being written would find half of it.
    let part = path.with_extension("part");
    fs::write(&part, w.bytes()).with_context(|| format!("writing {}", part.display()))?;
    fs::rename(&part, path).with_context(|| format!("writing {}", path.display()))
}
