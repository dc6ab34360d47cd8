// SPDX-License-Identifier: Apache-2.0

//! Work on the host's tensors, on whatever device they lie.

use std::ffi::c_void;

use crate::core::calibration::Calibration;
use crate::core::error::Result;
use crate::core::metric::{Metric, Score};

pub mod cuda;
pub mod host;
pub mod kv;

/// Most of the greatest logits of a row that a ramp lists.
pub const MAX_TOP: usize = 64;

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
    /// Greatest logits of each row to list, at most [`Limits::n_top`].
    pub n_top: usize,
    /// The device was told of them before, see [`Device::enqueue`].
    pub enqueued: bool,
    /// `n_vocab` tokens that the logits are of; null: logit i is of token i.
    pub token_ids: *const i32,
    /// Turns the ramp's confidences into chances.
    pub calibration: Option<Calibration>,
}

/// The token of logit `i`; -1 stays -1.
///
/// # Safety
/// `ids` is null, or has an entry `i` that may be read.
pub unsafe fn token_of(ids: *const i32, i: i32) -> i32 {
    match usize::try_from(i) {
        // SAFETY: by this function's contract.
        Ok(at) if !ids.is_null() => unsafe { ids.add(at).read_unaligned() },
        _ => i,
    }
}

impl Logits {
    /// Turns what a device scored into tokens and chances.
    ///
    /// # Safety
    /// `token_ids` is null, or has `n_vocab` entries that may be read.
    pub unsafe fn finish(&self, metrics: &[Option<Metric>], scores: &mut [Score]) {
        if self.token_ids.is_null() && self.calibration.is_none() {
            return;
        }
        for (metric, score) in metrics.iter().zip(scores) {
            let Some(metric) = *metric else { continue };
            // SAFETY: by this function's contract.
            score.token = unsafe { token_of(self.token_ids, score.token) };
            if let Some(calibration) = &self.calibration {
                score.confidence = calibration.apply(metric, score.confidence);
            }
            if score.token < 0 {
                *score = Score::NONE;
            }
        }
    }
}

/// The sizes that a device's scratch memory is made for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Most rows of a step.
    pub rows: usize,
    /// Most logits of a row; 0: the device's own limit.
    pub n_vocab: u32,
    /// Most of the greatest logits, up to [`MAX_TOP`].
    pub n_top: u32,
}

/// One of the greatest logits of a row.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Top {
    pub logit: f32,
    /// -1: there is none.
    pub token: i32,
}

impl Top {
    pub const NONE: Top = Top {
        logit: f32::NEG_INFINITY,
        token: -1,
    };
}

/// Rows of `row_bytes` bytes: an arena of them, and a dense batch.
#[derive(Debug, Clone, Copy)]
pub struct Arena {
    pub arena: *mut u8,
    pub dense: *mut u8,
    pub arena_stride: usize,
    pub dense_stride: usize,
    pub row_bytes: usize,
    /// The host's stream; unused on the host device.
    pub stream: *mut c_void,
}

/// A row whose K/V stops at a ramp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    pub cell: u32,
}

/// A device does what it is told, in order, on the stream that the last ramp's
/// logits name; only [`Device::score`] waits.
pub trait Device: Send {
    /// The layers that [`Device::fill`] will be called with; `None`: no more.
    fn bind(&mut self, kv: Option<&kv::Kv>) -> Result<()>;

    /// Starts scoring `n_rows` rows, whatever their metrics will be. May be called
    /// in a stream capture; then each replay starts it.
    ///
    /// # Safety
    /// The rows may be read until they were scored.
    unsafe fn enqueue(&mut self, logits: &Logits, n_rows: usize) -> Result<()>;

    /// Scores row i of the logits under `metrics[i]` into `out[i]`; `None`
    /// leaves a row out. A row's score depends on nothing but that row.
    ///
    /// # Safety
    /// Every row has `n_vocab` elements that may be read.
    unsafe fn score(
        &mut self,
        logits: &Logits,
        metrics: &[Option<Metric>],
        out: &mut [Score],
    ) -> Result<()>;

    /// The first of the `n_top` greatest logits that the last
    /// [`Device::score`] found in a row, the greatest first, the lower index
    /// before an equal one.
    fn top(&self, row: usize, n_top: usize, out: &mut [Top]);

    /// Copies the K/V of layer `layer - 1` at every hole to all layers from
    /// `layer` on.
    ///
    /// # Safety
    /// The layers, which are the bound ones, have valid pointers for all their
    /// cells, nobody else touches the holes' cells meanwhile, and every hole's
    /// cell is below [`kv::Kv::n_cells`].
    unsafe fn fill(&mut self, kv: &kv::Kv, layer: u32, holes: &[Hole]) -> Result<()>;

    /// Names the holes that launches of [`Device::enqueue_fill`] fill when
    /// they next run.
    fn plan_fill(&mut self, layer: u32, holes: &[Hole]) -> Result<()>;

    /// Fills the holes that [`Device::plan_fill`] names last before this runs:
    /// for a stream capture.
    ///
    /// # Safety
    /// As [`Device::fill`], whenever it runs.
    unsafe fn enqueue_fill(&mut self, stream: *mut c_void) -> Result<()>;

    /// The next step's rows, for captured launches of [`Device::copy_rows`].
    fn plan_rows(&mut self, slots: &mut dyn ExactSizeIterator<Item = u32>) -> Result<()>;

    /// Copies arena row `slots[i]` to dense row i, or back.
    ///
    /// # Safety
    /// The rows may be read and written, and do not overlap.
    unsafe fn copy_rows(
        &mut self,
        arena: &Arena,
        to_arena: bool,
        slots: &mut dyn ExactSizeIterator<Item = u32>,
    ) -> Result<()>;
}
