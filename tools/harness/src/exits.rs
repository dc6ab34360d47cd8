// SPDX-License-Identifier: Apache-2.0
//! Files of exits for tests.

use std::{path::Path, process::Command};

use anyhow::Result;
use drex_build::process;

/// Writes exits that are the model's own final norm, with the program `exits-test`: after these layers, with a head over
/// these tokens (`all`, `all-5` without each fifth, or numbers). `shift`: of their calibration, else they have none.
pub fn own(
    exits_test: &Path,
    model: &Path,
    file: &Path,
    layers: &str,
    tokens: &str,
    shift: Option<f32>,
) -> Result<()> {
    let mut command = Command::new(exits_test);
    command
        .arg("--own")
        .args([model, file])
        .args([layers, tokens])
        .args(shift.map(|s| s.to_string()));
    process::output(&mut command).map(drop)
}
