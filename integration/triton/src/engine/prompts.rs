// SPDX-License-Identifier: Apache-2.0
//! Prompts: as many tokens as fit into a batch, through all layers.

use super::decoder::Decoder;
use super::{Engine, Row};
use crate::triton::error::Failure;

/// How many rows each of the waiting prompts gets: as many for each, what is left over for the first ones.
pub(super) fn shares(waiting: &[usize], room: usize) -> Vec<usize> {
    let each = (room / waiting.len().max(1)).max(1);
    let mut left = room;
    let mut shares: Vec<usize> = waiting
        .iter()
        .map(|&n| {
            let share = n.min(each).min(left);
            left -= share;
            share
        })
        .collect();
    for (share, &n) in shares.iter_mut().zip(waiting) {
        let more = (n - *share).min(left);
        *share += more;
        left -= more;
    }
    shares
}

impl<D: Decoder> Engine<D> {
    pub(super) fn prompts(&mut self) -> Result<(), Failure> {
        let mut room = self.settings.batch as usize;
        while let Some(less) = self.prompt_batch(room)? {
            room = less;
        }
        Ok(())
    }

    /// Gives a smaller number of rows to try again with.
    fn prompt_batch(&mut self, room: usize) -> Result<Option<usize>, Failure> {
        let mut waiting: Vec<(usize, usize)> = Vec::new();
        for (at, slot) in self.slots.iter().enumerate() {
            if let Some(slot) = slot.as_ref().filter(|slot| slot.in_prompt()) {
                waiting.push((at, slot.prompt.len() - slot.n_past as usize));
            }
        }
        // Higher priority first, the older first among equals: one that is long does not keep the others waiting.
        waiting.sort_by_key(|&(at, _)| {
            let slot = self.slots[at].as_ref();
            slot.map(|slot| (std::cmp::Reverse(slot.sampling.drex_priority), slot.order))
        });
        let lengths: Vec<usize> = waiting.iter().map(|&(_, n)| n).collect();

        let (mut rows, mut outputs) = (Vec::new(), Vec::new());
        let (mut parts, mut ends) = (Vec::new(), Vec::new());
        for (&(at, _), count) in waiting.iter().zip(shares(&lengths, room)) {
            let Some(slot) = self.slots[at].as_ref().filter(|_| count > 0) else {
                continue;
            };
            let begin = slot.n_past as usize;
            for position in begin..begin + count {
                let last = position + 1 == slot.prompt.len();
                if last {
                    ends.push((at, rows.len()));
                }
                outputs.push(last);
                rows.push(Row {
                    token: slot.prompt[position],
                    position: position as i32,
                    sequence: at as i32,
                });
            }
            parts.push((at, count as u32));
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let code = self.decoder.decode(&rows, &outputs);
        if code == 1 && rows.len() > 1 {
            return Ok(Some(rows.len() / 2));
        }
        if code != 0 {
            for (at, _) in parts {
                let text = format!("llama.cpp failed on the prompt ({code})");
                self.fail(at, Failure::internal(text));
            }
            return Ok(None);
        }
        for (at, count) in parts {
            if let Some(slot) = &mut self.slots[at] {
                slot.n_past += count;
            }
        }
        for (at, row) in ends {
            match self.register(at) {
                Ok(()) => {
                    let how = self.emit(at, row, false, None);
                    self.end(at, how);
                }
                Err(failure) => self.fail(at, failure),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn a_long_prompt_leaves_room_for_short_ones() {
        assert_eq!(shares(&[1000, 10, 10], 100), [80, 10, 10]);
        assert_eq!(shares(&[1000, 1000], 101), [51, 50]);
        assert_eq!(shares(&[3, 5], 100), [3, 5]);
        assert_eq!(shares(&[7, 7, 7], 2), [1, 1, 0]);
        assert_eq!(shares(&[], 5), [0; 0]);
    }
}
