// SPDX-License-Identifier: Apache-2.0
//! Prompts: their rows run along in windows, and pass every layer.
//!
//! A prompt runs whole or in parts. Rows of a part that a window leaves at a ramp go on in the next window; a part has
//! passed all layers before the next one begins.

use super::decoder::Decoder;
use super::window::Step;
use super::{Engine, Row};
use crate::triton::error::Failure;

/// A prompt's row that a window left at a ramp.
pub(super) struct Transit {
    pub slot: usize,
    pub row: Row,
    pub arena: i32,
}

impl<D: Decoder> Engine<D> {
    /// Prompt rows at layer 0. Rows at a ramp are not among them.
    pub(super) fn waiting(&self) -> u32 {
        let slots = self.slots.iter().flatten();
        let rest = slots.map(|slot| slot.prompt.len().saturating_sub(slot.n_past as usize));
        (rest.sum::<usize>() - self.transit.len()) as u32
    }

    /// The prompt rows of a planned step, behind its decode rows.
    pub(super) fn take_prompts(&mut self, step: &mut Step) -> Result<(), Failure> {
        let last = step.info.layer_end == self.decoder.n_layer();
        if step.info.layer_begin > 0 {
            if step.info.n_prompt_rows > 0 {
                for one in &self.transit {
                    let ends = self.ends_prompt(one.slot, &one.row);
                    step.add(one.slot, one.row, one.arena, last && ends);
                }
            }
            return Ok(());
        }
        if !self.transit.is_empty() {
            return Err(Failure::internal("drex left prompt rows at a ramp"));
        }
        let mut waiting: Vec<usize> = Vec::new();
        for (at, slot) in self.slots.iter().enumerate() {
            if slot.as_ref().is_some_and(|slot| slot.in_prompt()) {
                waiting.push(at);
            }
        }
        // Higher priority first, the older first among equals.
        waiting.sort_by_key(|&at| {
            let slot = self.slots[at].as_ref();
            slot.map(|slot| (std::cmp::Reverse(slot.sampling.drex_priority), slot.order))
        });
        // Arena rows behind those that drex has.
        let mut arena = self.n_arena as i32;
        let mut left = step.info.n_prompt_rows as usize;
        for at in waiting {
            let Some(slot) = &self.slots[at] else {
                continue;
            };
            let begin = slot.n_past as usize;
            let part = &slot.prompt[begin..];
            for (k, &token) in part.iter().take(left).enumerate() {
                let row = Row {
                    token,
                    position: (begin + k) as i32,
                    sequence: at as i32,
                };
                step.add(at, row, arena, last && k + 1 == part.len());
                arena += 1;
                left -= 1;
            }
        }
        Ok(())
    }

    fn ends_prompt(&self, at: usize, row: &Row) -> bool {
        let slot = self.slots[at].as_ref();
        slot.is_some_and(|slot| row.position as usize + 1 == slot.prompt.len())
    }

    /// A window ran: its prompt rows wait at its ramp, or have passed all layers.
    pub(super) fn advance_prompts(&mut self, step: &Step) {
        self.transit.clear();
        for i in step.prompts() {
            let (slot, row, arena) = (step.slots[i], step.rows[i], step.arena[i]);
            if step.at_ramp() {
                self.transit.push(Transit { slot, row, arena });
            } else if let Some(slot) = &mut self.slots[slot] {
                slot.n_past += 1;
            }
        }
    }

    /// Prompts that are over get their first token.
    pub(super) fn end_prompts(&mut self, step: &Step) {
        for i in step.prompts() {
            let at = step.slots[i];
            if step.at_ramp() || !step.outputs[i] {
                continue;
            }
            match self.register(at) {
                Ok(()) => {
                    let how = self.emit(at, i, None);
                    self.end(at, how);
                }
                Err(failure) => self.fail(at, failure),
            }
        }
    }

    /// Prompt rows at a ramp begin again at layer 0, in the cells that they have.
    pub(super) fn restart_prompts(&mut self) {
        let mut before = None;
        for one in std::mem::take(&mut self.transit) {
            // The first of a sequence's rows is its oldest.
            if before != Some(one.slot) {
                let position = one.row.position as u32;
                self.decoder.rollback(one.row.sequence, position);
            }
            before = Some(one.slot);
        }
    }
}
