// SPDX-License-Identifier: Apache-2.0
//! One layer window over the rows that drex plans, decode rows and prompt rows, and what comes of it.

use drex::ffi::*;

use super::decoder::{Decoder, Row};
use super::{Engine, check, now_ns, zeroed};
use crate::triton::error::Failure;

/// A planned window. Its prompt rows stand behind its decode rows.
pub(super) struct Step {
    pub info: drex_step,
    /// Of each row: its slot here.
    pub slots: Vec<usize>,
    pub rows: Vec<Row>,
    pub arena: Vec<i32>,
    /// Rows whose logits are wanted.
    pub outputs: Vec<bool>,
}

impl Step {
    pub fn add(&mut self, slot: usize, row: Row, arena: i32, output: bool) {
        self.slots.push(slot);
        self.rows.push(row);
        self.arena.push(arena);
        self.outputs.push(output);
    }

    pub fn at_ramp(&self) -> bool {
        self.info.ramp != DREX_NO_RAMP
    }

    pub fn n_decode(&self) -> usize {
        self.info.n_rows as usize
    }

    /// Where its prompt rows are. A request that ended has none.
    pub fn prompts(&self) -> std::ops::Range<usize> {
        self.n_decode()..self.rows.len()
    }
}

/// Most rows of a window: fewer than there could be where the last try found no room.
#[derive(Clone, Copy)]
struct Most {
    decode: u32,
    prompts: u32,
}

/// A row that left with fill propagate: its K and V are projected before the next window.
pub(super) struct Leaver {
    pub slot: usize,
    pub row: Row,
    pub arena: i32,
    pub begin: u32,
}

impl<D: Decoder> Engine<D> {
    pub(super) fn window(&mut self) -> Result<(), Failure> {
        // Those that waited for prompt rows, which may be gone without a window.
        self.audit();
        self.ready()?;
        let mut most = Most {
            decode: self.max_batch,
            prompts: u32::MAX,
        };
        loop {
            let Some(step) = self.plan(most)? else {
                return Ok(());
            };
            if step.info.n_prompt_rows > 0 && step.prompts().is_empty() {
                // The requests of all prompt rows at a ramp have ended.
                self.abandon()?;
                continue;
            }
            let start = now_ns();
            let code = self.project();
            if code != 0 {
                self.abandon()?;
                self.restart_prompts();
                for leaver in std::mem::take(&mut self.leavers) {
                    let text = format!("llama.cpp failed to project K and V ({code})");
                    self.fail(leaver.slot, Failure::internal(text));
                }
                return Ok(());
            }
            let (begin, end) = (step.info.layer_begin, step.info.layer_end);
            let code = self
                .decoder
                .window(&step.rows, &step.arena, &step.outputs, begin, end);
            if code == 0 {
                return self.complete(&step, start);
            }
            self.abandon()?;
            // Room in the KV cache may do for fewer rows. Only windows from layer 0 take any.
            let (decode, prompts) = (step.info.n_rows, step.prompts().len() as u32);
            if code == 1 && begin == 0 && decode + prompts > 1 {
                if decode > 0 {
                    most.decode = decode.div_ceil(2);
                }
                most.prompts = prompts / 2;
                continue;
            }
            self.transit.clear();
            for (i, &at) in step.slots.iter().enumerate() {
                let what = if step.prompts().contains(&i) {
                    "the prompt"
                } else {
                    "a layer window"
                };
                let text = format!("llama.cpp failed on {what} ({code})");
                self.fail(at, Failure::internal(text));
            }
            return Ok(());
        }
    }

    /// The rows of the planned step go back to where they were.
    fn abandon(&mut self) -> Result<(), Failure> {
        // SAFETY: a step is planned.
        unsafe { check(drex_abandon(self.drex)) }
    }

    /// Tells drex whose next token can run.
    fn ready(&mut self) -> Result<(), Failure> {
        for slot in self.slots.iter_mut().flatten() {
            if slot.in_prompt() || slot.busy || slot.over {
                continue;
            }
            let left = slot.sampling.max_tokens - slot.output.len() as u32;
            let ran = slot.n_ran();
            // Drafts that cannot go on are verified first: at the end of the text, of the budget, of the context.
            let stuck = self.decoder.is_end(slot.next)
                || slot.n_drafts >= left
                || ran >= self.settings.context;
            // SAFETY: a request that was added, and is idle.
            unsafe {
                if slot.n_drafts > 0 && stuck {
                    let mut pending = 0;
                    let settled = drex_request_settle(self.drex, slot.id, now_ns(), &mut pending);
                    check(settled)?;
                    if pending == 0 {
                        return Err(Failure::internal("drafts without pending rows"));
                    }
                } else {
                    check(drex_request_ready(self.drex, slot.id, ran + 1, now_ns()))?;
                }
            }
            slot.busy = true;
        }
        Ok(())
    }

    fn plan(&mut self, most: Most) -> Result<Option<Step>, Failure> {
        let mut input: drex_plan_input = zeroed();
        input.size = size_of::<drex_plan_input>() as u32;
        input.n_prompt_rows = self.waiting().min(most.prompts);
        input.now_ns = now_ns();
        let mut info: drex_step = zeroed();
        info.size = size_of::<drex_step>() as u32;
        let rows = self.plan.as_mut_ptr();
        // SAFETY: room for max_batch rows.
        unsafe {
            let mut status = drex_plan(self.drex, &input, rows, most.decode, &mut info);
            if status == DREX_ERROR_CAPACITY && most.decode < self.max_batch {
                // a deep window with many rows of one request; it needs no cells
                status = drex_plan(self.drex, &input, rows, self.max_batch, &mut info);
            }
            check(status)?;
        };
        let n = info.n_rows as usize;
        let all = n + info.n_prompt_rows as usize;
        if all == 0 {
            return Ok(None);
        }
        let mut step = Step {
            info,
            slots: Vec::with_capacity(all),
            rows: Vec::with_capacity(all),
            arena: Vec::with_capacity(all),
            outputs: Vec::with_capacity(all),
        };
        for (i, row) in self.plan[..n].iter().enumerate() {
            let at = self
                .slots
                .iter()
                .position(|slot| slot.as_ref().is_some_and(|slot| slot.id == row.request))
                .ok_or_else(|| Failure::internal("drex planned a request that is gone"))?;
            let slot = self.slots[at].as_ref().expect("found just now");
            // Pending rows count back from the request's own row, its last one here, or from where the next one will be.
            let own = self.plan[i..n]
                .iter()
                .take_while(|other| other.request == row.request)
                .last()
                .is_some_and(|last| last.back == 0);
            let ran = own && info.layer_begin > 0;
            let output = step.at_ramp() || row.back == 0 || slot.verifies();
            let one = Row {
                // only first windows look at it
                token: slot.next,
                position: slot.n_ran() as i32 - i32::from(ran) - row.back as i32,
                sequence: at as i32,
            };
            step.add(at, one, row.slot as i32, output);
        }
        self.take_prompts(&mut step)?;
        Ok(Some(step))
    }

    /// Fill propagate, for the rows that left in the last window. The time that it takes is part of the next one's.
    fn project(&mut self) -> i32 {
        let Some(first) = self.leavers.first() else {
            return 0;
        };
        let begin = first.begin;
        let rows: Vec<Row> = self.leavers.iter().map(|l| l.row).collect();
        let arena: Vec<i32> = self.leavers.iter().map(|l| l.arena).collect();
        let code = self.decoder.project(&rows, &arena, begin);
        if code == 0 {
            self.leavers.clear();
        }
        code
    }

    fn complete(&mut self, step: &Step, start: u64) -> Result<(), Failure> {
        let info = step.info;
        let n = step.n_decode();
        if info.layer_begin == 0 {
            for &at in &step.slots[..n] {
                if let Some(slot) = &mut self.slots[at] {
                    if slot.verifies() {
                        slot.ahead.push(slot.next);
                    } else {
                        slot.n_past += 1;
                    }
                }
            }
        }
        self.advance_prompts(step);
        let ramp = step.at_ramp();
        if ramp && n > 0 {
            self.ban(&step.slots[..n])?;
            self.score(&info)?;
        }
        let end = now_ns();
        self.window_ns += end - start;
        // Nothing is removed from drex before the step is complete: the last tokens are to be counted.
        let mut given = Vec::new();
        if !ramp {
            self.verify(step, &mut given)?;
        }
        for i in 0..n {
            let at = step.slots[i];
            let Some(slot) = &mut self.slots[at] else {
                continue;
            };
            let verdict = self.verdicts[i];
            if ramp && verdict.decision != DREX_DECISION_EXIT {
                continue;
            }
            slot.busy = false;
            if slot.verifies() {
                // A draft runs next; the client gets it when it is verified.
                if ramp {
                    slot.next = verdict.token;
                    slot.n_drafts += 1;
                }
                continue;
            }
            if self.plan[i].back > 0 {
                continue;
            }
            if ramp && slot.fill == DREX_FILL_PROPAGATE {
                self.leavers.push(Leaver {
                    slot: at,
                    row: step.rows[i],
                    arena: step.arena[i],
                    begin: info.layer_end,
                });
            }
            let known = (ramp && verdict.token >= 0).then_some(verdict.token);
            given.push((at, self.emit(at, i, known)));
        }
        let mut done: drex_completion = zeroed();
        done.size = size_of::<drex_completion>() as u32;
        done.now_ns = now_ns();
        // The time of fewer rows than were planned says nothing of those.
        if step.prompts().len() == info.n_prompt_rows as usize {
            done.duration_ns = end - start;
        }
        done.n_kv = step.rows[..n].iter().map(|r| r.position as u64 + 1).sum();
        if !ramp {
            done.tokens = self.chosen.as_ptr();
        }
        // SAFETY: a step is planned, and its ramp was called; there is a token for each row.
        unsafe { check(drex_complete(self.drex, &done))? };
        for (at, how) in given {
            self.end(at, how);
        }
        self.end_prompts(step);
        self.audit();
        Ok(())
    }

    /// The verdicts of the rows at a ramp, and the holes of those that leave.
    fn score(&mut self, info: &drex_step) -> Result<(), Failure> {
        let mut logits: drex_logits = zeroed();
        logits.size = size_of::<drex_logits>() as u32;
        logits.dtype = DREX_DTYPE_F32;
        logits.n_rows = info.n_rows;
        logits.stream = self.device.stream;
        if !self.decoder.ramp_logits(info.ramp, &mut logits) {
            return Err(Failure::internal("the window gave no logits"));
        }
        // SAFETY: the window's first rows are outputs, so that the logits of n rows lie one after another.
        unsafe {
            check(drex_ramp(
                self.drex,
                &logits,
                self.decoder.cells(),
                self.verdicts.as_mut_ptr(),
                self.max_batch,
            ))?;
            // Without K and V nobody has fill copy, and nothing is drex's to fill.
            match self.no_copy {
                Some(_) => Ok(()),
                None => check(drex_fill(self.drex)),
            }
        }
    }
}
