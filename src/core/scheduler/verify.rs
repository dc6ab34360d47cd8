// SPDX-License-Identifier: Apache-2.0

//! The full model's verdicts on drafts.

use super::{Agrees, Scheduler};
use crate::core::NONE;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};

impl Scheduler {
    /// Whether [`Scheduler::verify`] may be called now, with so many rows.
    pub fn expect_verify(&self, n_rows: usize) -> Result<()> {
        match &self.step {
            None => {
                return Err(Error::CallOrder(
                    "no step is planned; expected drex_plan first",
                ));
            }
            Some(step) if step.ramp.is_some() => {
                return Err(Error::CallOrder(
                    "the planned window ends at a ramp; expected drex_ramp",
                ));
            }
            Some(_) if self.verified => {
                return Err(Error::CallOrder(
                    "the planned step is verified; expected drex_complete",
                ));
            }
            Some(_) => {}
        }
        self.check_rows(n_rows, "every planned row has one answer")
    }

    /// In a step that ends at the last layer: `agrees` says of a row whether
    /// the full model's token is the one that it emitted as a draft. It is
    /// asked about drafts only, and not about those after one that does not
    /// stand. The verdicts are in [`Scheduler::step_rows`].
    pub fn verify(
        &mut self,
        n_rows: usize,
        mut agrees: impl FnMut(usize) -> Result<Agrees>,
    ) -> Result<()> {
        self.expect_verify(n_rows)?;
        // A request's rows stand together, the oldest first. What follows one
        // that was replaced, or that ends the request, is void. Verdicts of a
        // call that fails mean nothing, and nobody looks at them.
        let mut replaced = NONE;
        for (i, row) in self.rows.iter_mut().enumerate() {
            row.decision = if row.gone {
                Decision::Gone
            } else if replaced == row.request {
                Decision::Drop
            } else if !row.is_draft() {
                if row.back > 0 {
                    Decision::Pending
                } else {
                    Decision::Exit
                }
            } else {
                let agrees = agrees(i)?;
                if agrees != Agrees::Yes {
                    replaced = row.request;
                }
                match agrees {
                    Agrees::No => Decision::Replace,
                    Agrees::Yes | Agrees::AndEnds => Decision::Accept,
                }
            };
        }
        self.verified = true;
        Ok(())
    }
}
