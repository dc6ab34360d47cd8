// SPDX-License-Identifier: Apache-2.0

//! What drex does with the host's tensors, on whatever device they lie.

use std::ffi::c_void;

use crate::core::error::Result;
use crate::core::metric::{Metric, Score};

pub mod host;
pub mod kv;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// The logits at a ramp: row i begins at `data + i * row_stride`.
#[derive(Debug, Clone, Copy)]
pub struct Logits {
    pub data: *const u8,
    pub dtype: Dtype,
    pub row_stride: usize,
    pub n_vocab: usize,
    /// The host's stream; unused on the host device.
    pub stream: *mut c_void,
}

/// A row whose K/V stops at a ramp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    pub cell: u32,
}

pub trait Device: Send {
    /// Scores row i of the logits under `metrics[i]` into `out[i]`; `None`
    /// leaves a row out. A row's score depends on nothing but that row.
    ///
    /// # Safety
    /// Every row that is scored has `n_vocab` elements that may be read.
    unsafe fn score(
        &mut self,
        logits: &Logits,
        metrics: &[Option<Metric>],
        out: &mut [Score],
    ) -> Result<()>;

    /// Copies the K/V of layer `layer - 1` at every hole to all layers from
    /// `layer` on.
    ///
    /// # Safety
    /// The layers' pointers are valid for all their cells, nobody else
    /// touches the holes' cells meanwhile, and every hole's cell is below
    /// [`kv::Kv::n_cells`].
    unsafe fn fill(&mut self, kv: &kv::Kv, layer: u32, holes: &[Hole]) -> Result<()>;
}
