// SPDX-License-Identifier: Apache-2.0

//! What the engine harvested: a row of each file for each token.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use half::{f16, slice::HalfFloatSliceExt};
use ndarray::Array2;

/// What the full model says at a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    pub token: i32,
    /// The full model's first choice.
    pub top: i32,
    pub p_top: f32,
    /// Logarithm of the sum of exp(logit).
    pub log_sum: f32,
}

pub const ROW_BYTES: usize = 16;

/// Rows that follow each other in the files.
pub type Range = std::ops::Range<usize>;

pub struct States {
    dir: PathBuf,
    pub width: usize,
    pub rows: Vec<Row>,
    /// The model's logits are its head's product with the last state, times this.
    pub factor: f32,
}

impl States {
    pub fn open(dir: &Path, width: usize) -> Result<States> {
        let path = dir.join("rows.bin");
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let rows = bytes
            .chunks_exact(ROW_BYTES)
            .map(|b| {
                let word = |i: usize| [b[i], b[i + 1], b[i + 2], b[i + 3]];
                Row {
                    token: i32::from_le_bytes(word(0)),
                    top: i32::from_le_bytes(word(4)),
                    p_top: f32::from_le_bytes(word(8)),
                    log_sum: f32::from_le_bytes(word(12)),
                }
            })
            .collect();
        Ok(States {
            dir: dir.to_owned(),
            width,
            rows,
            factor: 1.0,
        })
    }

    pub fn all(&self) -> Range {
        0..self.rows.len()
    }

    /// Differs with what the rows say, not with the states: these follow from the same texts.
    pub fn fingerprint(&self) -> u64 {
        let words = self
            .rows
            .iter()
            .flat_map(|r| [r.token as u32, r.top as u32]);
        fnv(words.flat_map(u32::to_le_bytes))
    }

    /// The states that leave a layer, in units of their root mean square.
    pub fn layer(&self, layer: u32, range: Range) -> Result<Array2<f32>> {
        self.read(&layer_file(layer), range)
    }

    /// The states that enter the head, so scaled that the head's product with them is the model's logits.
    pub fn last(&self, range: Range) -> Result<Array2<f32>> {
        let mut all = self.read("final.f16", range)?;
        if self.factor != 1.0 {
            all *= self.factor;
        }
        Ok(all)
    }

    fn read(&self, name: &str, range: Range) -> Result<Array2<f32>> {
        let path = self.dir.join(name);
        let row = 2 * self.width;
        let mut file =
            fs::File::open(&path).with_context(|| format!("reading {}", path.display()))?;
        let has = file.metadata()?.len();
        ensure!(
            has >= (range.end * row) as u64,
            "{} has {has} bytes, {} rows of {row} were expected",
            path.display(),
            range.end
        );
        file.seek(SeekFrom::Start((range.start * row) as u64))?;
        let mut bytes = vec![0; range.len() * row];
        file.read_exact(&mut bytes)?;
        let half: Vec<f16> = bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]))
            .collect();
        let mut all = vec![0.0; half.len()];
        half.convert_to_f32_slice(&mut all);
        Ok(Array2::from_shape_vec((range.len(), self.width), all)?)
    }
}

/// FNV-1a.
pub fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

pub fn layer_file(layer: u32) -> String {
    format!("layer-{layer}.f16")
}
