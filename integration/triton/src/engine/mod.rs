// SPDX-License-Identifier: Apache-2.0
//! Runs requests: one layer window after another over the rows that drex names, with the prompt rows that it gives room.
//!
//! Knows nothing of Triton; what becomes of a request goes out as `Event`s.

mod admission;
pub mod answer;
mod audit;
mod calibrate;
pub mod decoder;
mod emit;
#[cfg(test)]
mod fake;
pub mod pool;
mod prompts;
pub mod queue;
mod setup;
#[cfg(test)]
mod tests;
mod verify;
mod window;

use std::collections::VecDeque;
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use drex::ffi::*;

use crate::clock::now_ns;
use crate::families::Graphs;
use crate::sampling::Sampling;
use crate::settings::Settings;
use crate::text::Text;
use crate::triton::abi;
use crate::triton::error::Failure;
use answer::Answer;
use decoder::{Decoder, Device};
use pool::Seat;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
    Cancelled,
}

impl Finish {
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What drex knows of a request at its end.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub exits: Vec<u64>,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub held_ns: u64,
    pub deadline_misses: u64,
    /// With fill verify: drafts that the full model judged, and those it confirmed.
    pub drafts: u64,
    pub drafts_accepted: u64,
    /// 1: lossless; below: the agreement that it was served with; 0: as thresholds and fill said.
    pub quality: f64,
}

pub enum Event {
    /// The prompt begins to run; it has so many tokens.
    Started {
        prompt_tokens: u32,
    },
    /// A token, and the text that is certain by it. `end`: it was the last one.
    Token {
        token: Option<i32>,
        text: String,
        end: Option<(Finish, Figures)>,
    },
    Failed(Failure),
}

struct Slot<S> {
    id: u64,
    answer: Answer,
    cancelled: Arc<AtomicBool>,
    sampling: Sampling,
    /// `sampling` makes a ramp's confidence say nothing about the token.
    reshaped: bool,
    bad: Vec<Vec<i32>>,
    fill: u32,
    sampler: Option<S>,
    text: Text,
    prompt: Vec<i32>,
    deadline_ns: Option<u64>,
    /// How many were admitted before it.
    order: u64,
    /// Tokens that went into the KV cache. With fill verify, those that the full model has seen.
    n_past: u32,
    /// With fill verify: the tokens after them, which ran and are not verified.
    ahead: Vec<i32>,
    /// How many tokens are drafts that the client does not know of, the one to run next included.
    n_drafts: u32,
    /// What the client knows of.
    output: Vec<i32>,
    /// The token to run next.
    next: i32,
    /// drex has it: ready, running or held.
    busy: bool,
    drafts: u64,
    drafts_accepted: u64,
    /// The client has its answer, which is still to be audited.
    over: bool,
}

impl<S> Slot<S> {
    fn in_prompt(&self) -> bool {
        (self.n_past as usize) < self.prompt.len()
    }

    fn verifies(&self) -> bool {
        self.fill == DREX_FILL_VERIFY
    }

    /// Tokens that ran.
    fn n_ran(&self) -> u32 {
        self.n_past + self.ahead.len() as u32
    }
}

pub struct Engine<D: Decoder> {
    decoder: D,
    drex: *mut drex_engine,
    settings: Settings,
    device: Device,
    pub ramps: Vec<u32>,
    max_batch: u32,
    /// Tokens that end a text.
    ends: Vec<i32>,
    /// Index: the sequence in the KV cache.
    slots: Vec<Option<Slot<D::Sampler>>>,
    /// Free slots, the one that was freed first at the front. Its cells stay until it is used again, or nothing runs:
    /// attention adds up in the order of the cells, and a request that got another's would have some that are out of
    /// order.
    free: VecDeque<usize>,
    /// Where its requests come from.
    seat: Seat,
    admitted: u64,
    leavers: Vec<window::Leaver>,
    /// Slots whose answers are to be audited when nobody needs the window's logits any more.
    audits: Vec<usize>,
    /// Prompt rows at a ramp: the next window is theirs.
    transit: Vec<prompts::Transit>,
    /// Why nobody may have fill copy; `None`: drex has K and V.
    no_copy: Option<String>,
    /// Arena rows that drex has; those of prompt rows follow.
    n_arena: u32,
    plan: Vec<drex_row>,
    verdicts: Vec<drex_verdict>,
    /// Of the rows of a window that ends at the last layer: whether the full model agrees with a draft, the token that it
    /// chose for a row that is none, and what becomes of them.
    agrees: Vec<u8>,
    chosen: Vec<i32>,
    decisions: Vec<drex_decision>,
    /// Of the row that is looked at.
    banned: Vec<i32>,
    pub window_ns: u64,
    /// Given to requests, the first one of each included.
    pub tokens: u64,
}

// SAFETY: an engine of drex may be used from any thread, by one at a time.
unsafe impl<D: Decoder + Send> Send for Engine<D> where D::Sampler: Send {}

fn check(status: drex_status) -> Result<(), Failure> {
    if status == DREX_OK {
        return Ok(());
    }
    // SAFETY: never NULL, valid until the thread's next failure.
    let text = unsafe { CStr::from_ptr(drex_last_error()) }.to_string_lossy();
    let code = match status {
        DREX_ERROR_INVALID_ARGUMENT => abi::ERROR_INVALID_ARG,
        DREX_ERROR_UNSUPPORTED => abi::ERROR_UNSUPPORTED,
        DREX_ERROR_CAPACITY | DREX_ERROR_MEMORY => abi::ERROR_UNAVAILABLE,
        // not the request's fault
        _ => abi::ERROR_INTERNAL,
    };
    Err(Failure {
        code,
        text: text.into_owned(),
    })
}

/// A struct of drex.h with all fields 0, which is valid for each of them.
fn zeroed<T: Copy>() -> T {
    // SAFETY: only used for the plain structs of drex.h, whose pointers may be NULL.
    unsafe { std::mem::zeroed() }
}

fn nanoseconds(ms: f64) -> u64 {
    (ms * 1e6) as u64
}

impl<D: Decoder> Engine<D> {
    /// Tokens of a request, prompt and answer together.
    pub fn context(&self) -> u32 {
        self.settings.context
    }

    pub fn is_idle(&self) -> bool {
        self.running() == 0 && !self.seat.has()
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    pub fn stats(&self) -> drex_stats {
        let mut stats: drex_stats = zeroed();
        stats.size = size_of::<drex_stats>() as u32;
        // SAFETY: a struct with its size.
        unsafe { drex_stats_get(self.drex, &mut stats) };
        stats
    }

    pub fn graphs(&self) -> Graphs {
        self.decoder.perf()
    }

    /// Ends every request that runs with an error, as after a panic.
    pub fn fail_all(&mut self, failure: &Failure) {
        // SAFETY: allowed at any time; without a step it says so and does nothing.
        unsafe { drex_abandon(self.drex) };
        self.leavers.clear();
        self.transit.clear();
        for at in 0..self.slots.len() {
            self.fail(at, failure.clone());
        }
        self.seat.emptied(self.slots.len());
    }

    /// Takes in what waits, runs one window.
    pub fn step(&mut self) -> Result<(), Failure> {
        self.cancel();
        self.admit()?;
        self.window()
    }

    fn finish(&mut self, at: usize, token: Option<i32>, text: String, end: Finish) {
        let Some(slot) = self.slots[at].as_ref().filter(|slot| !slot.over) else {
            return;
        };
        let id = slot.id;
        let mut info: drex_request_info = zeroed();
        info.size = size_of::<drex_request_info>() as u32;
        // SAFETY: a struct with its size; one that is still in its prompt is not known, and all is 0.
        unsafe { drex_request_get(self.drex, id, &mut info) };
        let figures = Figures {
            exits: info.exits[..self.ramps.len()].to_vec(),
            involuntary_exits: info.involuntary_exits,
            involuntary_stays: info.involuntary_stays,
            held_ns: info.held_ns,
            deadline_misses: info.deadline_misses,
            drafts: slot.drafts,
            drafts_accepted: slot.drafts_accepted,
            quality: info.quality,
        };
        let audit = info.audit_due == 1 && end != Finish::Cancelled;
        if let Some(slot) = &mut self.slots[at] {
            slot.over = true;
            slot.answer.send(Event::Token {
                token,
                text,
                end: Some((end, figures)),
            });
        }
        if audit {
            self.audits.push(at);
        } else {
            self.free(at);
        }
    }

    fn fail(&mut self, at: usize, failure: Failure) {
        if let Some(mut slot) = self.free(at)
            && !slot.over
        {
            slot.answer.fail(failure);
        }
    }

    /// The request leaves drex, a held row of it too.
    fn free(&mut self, at: usize) -> Option<Slot<D::Sampler>> {
        let slot = self.slots[at].take()?;
        // SAFETY: removes a request by its id.
        unsafe { drex_request_remove(self.drex, slot.id) };
        self.leavers.retain(|leaver| leaver.slot != at);
        self.audits.retain(|&slot| slot != at);
        self.transit.retain(|one| one.slot != at);
        self.free.push_back(at);
        self.seat.freed();
        Some(slot)
    }
}

impl<D: Decoder> Drop for Engine<D> {
    fn drop(&mut self) {
        self.save_profile();
        // SAFETY: before the context, whose tensors it has.
        unsafe { drex_destroy(self.drex) };
    }
}
