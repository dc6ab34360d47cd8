// SPDX-License-Identifier: Apache-2.0

//! Tensors in the host's memory.

use std::ffi::c_void;

use super::kv::Kv;
use super::{Arena, Device, Hole, Limits, Logits, Top};
use crate::core::error::{Error, Result};
use crate::core::memory;
use crate::core::metric::{Metric, Score};

pub mod kv;
pub mod ramp;
mod top;

/// Runs on the calling thread, in the instruction set found when it was made.
pub struct Host {
    isa: ramp::Isa,
    /// `n_top` for each row of the last ramp.
    tops: Vec<Top>,
}

impl Host {
    pub fn new(limits: Limits) -> Result<Self> {
        Ok(Host {
            isa: ramp::Isa::best(),
            tops: memory::filled(Top::NONE, limits.rows * limits.n_top as usize)?,
        })
    }

    pub fn isa(&self) -> ramp::Isa {
        self.isa
    }
}

const NO_GRAPHS: Error = Error::Unsupported {
    field: "device",
    value: 0,
    why: "there is nothing to enqueue or to capture on the host",
};

impl Device for Host {
    fn bind(&mut self, _kv: Option<&Kv>) -> Result<()> {
        Ok(())
    }

    /// The calling thread does it, in [`Device::score`].
    unsafe fn enqueue(&mut self, _: &Logits, _: usize) -> Result<()> {
        Err(NO_GRAPHS)
    }

    unsafe fn score(
        &mut self,
        logits: &Logits,
        metrics: &[Option<Metric>],
        out: &mut [Score],
    ) -> Result<()> {
        for (i, (metric, out)) in metrics.iter().zip(out).enumerate() {
            if let Some(metric) = *metric {
                // SAFETY: the caller vouches for `n_vocab` readable elements
                // of every row.
                unsafe {
                    let row = logits.data.add(i * logits.row_stride);
                    *out = ramp::score(self.isa, row, logits.n_vocab, logits.dtype, metric);
                    let tops = &mut self.tops[i * logits.n_top..][..logits.n_top];
                    top::list(row, logits.n_vocab, logits.dtype, tops);
                }
            }
        }
        Ok(())
    }

    fn top(&self, row: usize, n_top: usize, out: &mut [Top]) {
        let tops = &self.tops[row * n_top..][..n_top];
        for (out, top) in out.iter_mut().zip(tops) {
            *out = *top;
        }
    }

    unsafe fn fill(&mut self, kv: &Kv, layer: u32, holes: &[Hole]) -> Result<()> {
        // SAFETY: the same contract.
        unsafe { kv::fill(kv, layer, holes) };
        Ok(())
    }

    fn plan_fill(&mut self, _: u32, _: &[Hole]) -> Result<()> {
        Err(NO_GRAPHS)
    }

    unsafe fn enqueue_fill(&mut self, _: *mut c_void) -> Result<()> {
        Err(NO_GRAPHS)
    }

    fn plan_rows(&mut self, _: &mut dyn ExactSizeIterator<Item = u32>) -> Result<()> {
        Ok(())
    }

    unsafe fn copy_rows(
        &mut self,
        arena: &Arena,
        to_arena: bool,
        slots: &mut dyn ExactSizeIterator<Item = u32>,
    ) -> Result<()> {
        for (i, slot) in slots.enumerate() {
            // SAFETY: by this function's contract.
            unsafe {
                let inside = arena.arena.add(slot as usize * arena.arena_stride);
                let dense = arena.dense.add(i * arena.dense_stride);
                let (from, to) = if to_arena {
                    (dense, inside)
                } else {
                    (inside, dense)
                };
                std::ptr::copy_nonoverlapping(from, to, arena.row_bytes);
            }
        }
        Ok(())
    }
}
