// SPDX-License-Identifier: Apache-2.0
//! Audits: the full model reads an answer once more, with whole K/V, and says which tokens it would have chosen otherwise.

use drex::ffi::drex_request_audit;

use super::Engine;
use super::decoder::{Decoder, Row};
use super::emit::{argmax, list_banned};
use crate::triton::error::Failure;

impl<D: Decoder> Engine<D> {
    /// Audits the answers that are due, and frees their slots. Waits while prompt rows lie in the arena at a ramp: an audit
    /// takes their places.
    pub(super) fn audit(&mut self) {
        if !self.transit.is_empty() {
            return;
        }
        for at in std::mem::take(&mut self.audits) {
            if let Ok((tokens, differing)) = self.read_again(at)
                && let Some(slot) = &self.slots[at]
            {
                // SAFETY: a request that is alive; what it refuses is as if it was not audited.
                unsafe { drex_request_audit(self.drex, slot.id, tokens, differing) };
            }
            self.free(at);
        }
    }

    /// Tokens of the answer that were compared, and those that the full model would have chosen otherwise.
    fn read_again(&mut self, at: usize) -> Result<(u64, u64), Failure> {
        self.leavers.retain(|leaver| leaver.slot != at);
        let Some(slot) = &mut self.slots[at] else {
            return Ok((0, 0));
        };
        let first = slot.prompt.len();
        let ran = (slot.n_past as usize).saturating_sub(first);
        let answer = std::mem::take(&mut slot.output);
        if answer.len() <= ran {
            return Err(Failure::internal("an answer is shorter than what ran"));
        }
        self.decoder.rollback(at as i32, first as u32);
        let mut differing = 0;
        for begin in (0..ran).step_by(self.max_batch as usize) {
            let n = (ran - begin).min(self.max_batch as usize);
            let rows: Vec<Row> = (begin..begin + n)
                .map(|i| Row {
                    token: answer[i],
                    position: (first + i) as i32,
                    sequence: at as i32,
                })
                .collect();
            let arena: Vec<i32> = (0..n as u32).map(|i| (self.n_arena + i) as i32).collect();
            let outputs = vec![true; n];
            let layers = self.decoder.n_layer();
            let code = self.decoder.window(&rows, &arena, &outputs, 0, layers);
            if code != 0 {
                return Err(Failure::internal(format!(
                    "llama.cpp failed on an audit ({code})"
                )));
            }
            for i in 0..n {
                let Some(slot) = &mut self.slots[at] else {
                    break;
                };
                // What may not come next depends on what came before.
                slot.output.push(answer[begin + i]);
                list_banned(slot, &self.ends, &mut self.banned);
                let logits = self.decoder.logits(i);
                let logits = logits.ok_or_else(|| Failure::internal("a row gave no logits"))?;
                let chosen = argmax(logits, &self.banned)?;
                differing += u64::from(chosen != answer[begin + i + 1]);
            }
        }
        Ok((ran as u64, differing))
    }
}
