// SPDX-License-Identifier: Apache-2.0
//! Fill verify, after the last layer: what the full model says of the drafts.

use drex::ffi::drex_verify;

use super::decoder::Decoder;
use super::emit::Emitted;
use super::window::Step;
use super::{Engine, check};
use crate::triton::error::Failure;

impl<D: Decoder> Engine<D> {
    /// Gives out what the full model says, row by row, up to the first draft that it does not confirm. Each token is
    /// chosen as if the one before it had just been decoded, so that sampled requests are lossless too. What ended is
    /// put into `given`.
    pub(super) fn verify(
        &mut self,
        step: &Step,
        given: &mut Vec<(usize, Emitted)>,
    ) -> Result<(), Failure> {
        let n = step.n_decode();
        self.agrees[..n].fill(0);
        self.chosen[..n].fill(-1);
        let mut any = false;
        let mut first = 0;
        while first < n {
            let at = step.slots[first];
            let begin = first;
            while first < n && step.slots[first] == at {
                first += 1;
            }
            let Some(slot) = self.slots[at].as_ref().filter(|slot| slot.verifies()) else {
                continue;
            };
            // The drafts after each row; the last is what would run next.
            let mut drafts = slot.ahead.get(1..).unwrap_or_default().to_vec();
            drafts.push(slot.next);
            for row in begin..first {
                let draft = self.plan[row].back > 0;
                if let Some(slot) = &mut self.slots[at] {
                    slot.n_drafts = 0;
                    slot.n_past += 1;
                    slot.ahead.remove(0);
                }
                let how = self.emit(at, row, None);
                let last = !matches!(how, Ok(None));
                if last {
                    given.push((at, how));
                }
                let Some(slot) = &mut self.slots[at] else {
                    break;
                };
                if !draft {
                    self.chosen[row] = slot.next;
                    break;
                }
                let same = slot.next == drafts[row - begin];
                self.agrees[row] = u8::from(same) * (1 + u8::from(last));
                any = true;
                slot.drafts += 1;
                slot.drafts_accepted += u64::from(same);
                if last {
                    break;
                }
                if !same {
                    // Nothing is left of what was run ahead.
                    slot.ahead.clear();
                    let position = slot.n_past;
                    self.decoder.rollback(at as i32, position);
                    break;
                }
            }
        }
        if any {
            // SAFETY: as many as the step has rows.
            unsafe {
                check(drex_verify(
                    self.drex,
                    self.agrees.as_ptr(),
                    n as u32,
                    self.decisions.as_mut_ptr(),
                    n as u32,
                ))?
            };
        }
        Ok(())
    }
}
