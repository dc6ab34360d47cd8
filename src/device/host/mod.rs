// SPDX-License-Identifier: Apache-2.0

//! Tensors in the host's memory.

use super::kv::Kv;
use super::{Device, Hole, Logits};
use crate::core::error::Result;
use crate::core::metric::{Metric, Score};

pub mod kv;
pub mod ramp;

/// Runs on the calling thread, in the instruction set found when it was made.
pub struct Host {
    isa: ramp::Isa,
}

impl Host {
    pub fn new() -> Self {
        Host {
            isa: ramp::Isa::best(),
        }
    }

    pub fn isa(&self) -> ramp::Isa {
        self.isa
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Host {
    unsafe fn score(
        &mut self,
        logits: &Logits,
        metrics: &[Option<Metric>],
        out: &mut [Score],
    ) -> Result<()> {
        for (i, (metric, out)) in metrics.iter().zip(out).enumerate() {
            if let Some(metric) = *metric {
                // SAFETY: the caller vouches for `n_vocab` readable elements
                // of every scored row.
                *out = unsafe {
                    let row = logits.data.add(i * logits.row_stride);
                    ramp::score(self.isa, row, logits.n_vocab, logits.dtype, metric)
                };
            }
        }
        Ok(())
    }

    unsafe fn fill(&mut self, kv: &Kv, layer: u32, holes: &[Hole]) -> Result<()> {
        // SAFETY: the same contract.
        unsafe { kv::fill(kv, layer, holes) };
        Ok(())
    }
}
