// SPDX-License-Identifier: Apache-2.0
//! Prompts: their rows run along in windows, and pass every layer.
//!
//! A prompt runs whole or in parts. Rows of a part that a window leaves at a ramp go on in the next window; a part has
//! passed all layers before the next one begins.
//!
//! Where a window has no room for all, higher priority goes first. Among equals the oldest prompt has half of the rows, and the
//! shortest rests of the others have the other half: a short prompt does not wait for a long one, and the oldest takes at most
//! twice the windows that it would take alone.

use super::Engine;
use super::decoder::{Decoder, Row};
use super::window::Step;
use crate::triton::error::Failure;

/// A prompt's row that a window left at a ramp.
pub(super) struct Transit {
    pub slot: usize,
    pub row: Row,
    pub arena: i32,
}

/// A prompt at layer 0.
struct Waiting {
    slot: usize,
    priority: i32,
    order: u64,
    /// Rows that it has to go.
    rest: usize,
    /// Rows that it has in the window.
    rows: usize,
}

/// Shares out the rows of a window. Afterwards the prompts are in the order of their priority, then of their admission.
fn share(waiting: &mut [Waiting], mut room: usize) {
    waiting.sort_by_key(|w| (std::cmp::Reverse(w.priority), w.order));
    for equals in waiting.chunk_by_mut(|a, b| a.priority == b.priority) {
        let give = |to: &mut Waiting, most: usize| {
            let more = most.min(to.rest - to.rows);
            to.rows += more;
            more
        };
        let [oldest, others @ ..] = equals else {
            continue;
        };
        room -= give(oldest, room.div_ceil(2));
        let mut shortest: Vec<&mut Waiting> = others.iter_mut().collect();
        shortest.sort_by_key(|w| w.rest);
        for other in shortest {
            room -= give(other, room);
        }
        room -= give(oldest, room);
    }
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
        let mut waiting: Vec<Waiting> = Vec::new();
        for (at, slot) in self.slots.iter().enumerate() {
            if let Some(slot) = slot.as_ref().filter(|slot| slot.in_prompt()) {
                waiting.push(Waiting {
                    slot: at,
                    priority: slot.sampling.drex_priority,
                    order: slot.order,
                    rest: slot.prompt.len() - slot.n_past as usize,
                    rows: 0,
                });
            }
        }
        share(&mut waiting, step.info.n_prompt_rows as usize);
        // Arena rows behind those that drex has.
        let mut arena = self.n_arena as i32;
        for Waiting { slot: at, rows, .. } in waiting {
            let Some(slot) = &self.slots[at] else {
                continue;
            };
            let begin = slot.n_past as usize;
            let part = &slot.prompt[begin..];
            for (k, &token) in part.iter().take(rows).enumerate() {
                let row = Row {
                    token,
                    position: (begin + k) as i32,
                    sequence: at as i32,
                };
                step.add(at, row, arena, last && k + 1 == part.len());
                arena += 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Of prompts with these priorities and rests, the oldest first: how many rows each has.
    fn rows(prompts: &[(i32, usize)], room: usize) -> Vec<usize> {
        let prompts = prompts.iter().enumerate();
        let mut all: Vec<Waiting> = prompts
            .map(|(slot, &(priority, rest))| Waiting {
                slot,
                priority,
                order: slot as u64,
                rest,
                rows: 0,
            })
            .collect();
        share(&mut all, room);
        all.sort_by_key(|w| w.slot);
        all.iter().map(|w| w.rows).collect()
    }

    #[test]
    fn a_short_prompt_does_not_wait_for_a_long_one() {
        assert_eq!(rows(&[(0, 1000)], 512), [512]);
        assert_eq!(rows(&[(0, 1000), (0, 20)], 512), [492, 20]);
        assert_eq!(
            rows(&[(0, 1000), (0, 900), (0, 20), (0, 30)], 512),
            [256, 206, 20, 30]
        );
        // An oldest prompt that needs no half leaves it to the others.
        assert_eq!(rows(&[(0, 10), (0, 900)], 512), [10, 502]);
        assert_eq!(rows(&[(0, 7), (0, 8)], 1), [1, 0]);
        assert_eq!(rows(&[(0, 7), (0, 8)], 0), [0, 0]);
    }

    #[test]
    fn priority_goes_before_length() {
        assert_eq!(rows(&[(0, 5), (1, 1000)], 512), [0, 512]);
        assert_eq!(rows(&[(0, 5), (1, 500), (0, 600)], 512), [5, 500, 7]);
    }
}
