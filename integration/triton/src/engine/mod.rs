// SPDX-License-Identifier: Apache-2.0
//! Runs requests: prompts through all layers, then one layer window after another over the rows that drex names.
//!
//! Knows nothing of Triton; what becomes of a request goes out as `Event`s.

mod calibrate;
pub mod decoder;
mod emit;
#[cfg(test)]
mod fake;
mod prompts;
mod queue;
mod setup;
#[cfg(test)]
mod tests;
mod verify;
mod window;

use std::collections::VecDeque;
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drex::ffi::functions::*;
use drex::ffi::types::*;

use crate::clock::now_ns;
use crate::llama::{Llama, Row, SamplerParams, Vocab};
use crate::sampling::Sampling;
use crate::settings::Settings;
use crate::text::Text;
use crate::triton::abi;
use crate::triton::error::Failure;
use decoder::{Decoder, Device};
use queue::Queue;

/// A request before it runs.
pub struct Job {
    pub id: u64,
    pub prompt: Vec<i32>,
    /// Sequences of tokens that the answer must not have.
    pub bad: Vec<Vec<i32>>,
    pub sampling: Sampling,
    pub arrived_ns: u64,
    /// Set by whoever sees the client go.
    pub cancelled: Arc<AtomicBool>,
}

impl Job {
    /// Reads the text, on the caller's thread: a long one takes a while. `context` as `Engine::context` says.
    pub fn new(
        vocab: &Vocab,
        context: u32,
        id: u64,
        prompt: &str,
        sampling: Sampling,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Self, Failure> {
        let arrived_ns = now_ns();
        let most = vocab.longest().saturating_mul(context as usize);
        if prompt.len() > most {
            return Err(Failure::invalid(format!(
                "text_input has {} bytes, the context holds {context} tokens, which are at most {most} bytes",
                prompt.len()
            )));
        }
        let prompt = vocab.tokenize(prompt, true)?;
        if prompt.is_empty() {
            return Err(Failure::invalid("text_input is empty"));
        }
        if prompt.len() >= context as usize {
            return Err(Failure::invalid(format!(
                "text_input has {} tokens, the context holds {context} with at least one for the answer",
                prompt.len()
            )));
        }
        let mut bad = Vec::new();
        for word in &sampling.bad_words {
            // At the beginning of a line, and within.
            for text in [word.clone(), format!(" {}", word.trim_start())] {
                let tokens = vocab.tokenize(&text, false)?;
                if !tokens.is_empty() && !bad.contains(&tokens) {
                    bad.push(tokens);
                }
            }
        }
        Ok(Self {
            id,
            prompt,
            bad,
            sampling,
            arrived_ns,
            cancelled,
        })
    }

    /// When its timeout is over.
    fn deadline_ns(&self) -> Option<u64> {
        let timeout = self.sampling.timeout_us.saturating_mul(1000);
        (timeout > 0).then(|| self.arrived_ns.saturating_add(timeout))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
    Cancelled,
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

/// Where events go: the request's id, and what happened.
pub type Out = Box<dyn Fn(u64, Event) + Send>;

struct Slot<S> {
    id: u64,
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

pub struct Engine<D: Decoder = Llama> {
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
    queue: Queue,
    admitted: u64,
    leavers: Vec<window::Leaver>,
    plan: Vec<drex_row>,
    verdicts: Vec<drex_verdict>,
    out: Out,
    pub window_ns: u64,
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
        DREX_ERROR_CAPACITY => abi::ERROR_UNAVAILABLE,
        // not the request's fault
        _ => abi::ERROR_INTERNAL,
    };
    Err(Failure {
        code,
        text: text.into_owned(),
    })
}

fn unavailable(text: impl Into<String>) -> Failure {
    Failure {
        code: abi::ERROR_UNAVAILABLE,
        text: text.into(),
    }
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

    /// Queues a request, or ends it where too many wait.
    pub fn push(&mut self, job: Job) {
        if let Err(job) = self.queue.push(job) {
            let failure = unavailable(format!(
                "{} requests wait, which is max_queue; try again later",
                self.settings.max_queue
            ));
            (self.out)(job.id, Event::Failed(failure));
        }
    }

    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.slots.iter().all(Option::is_none)
    }

    /// Requests that wait, and requests that run.
    pub fn load(&self) -> (usize, usize) {
        (self.queue.len(), self.slots.iter().flatten().count())
    }

    pub fn stats(&self) -> drex_stats {
        let mut stats: drex_stats = zeroed();
        stats.size = size_of::<drex_stats>() as u32;
        // SAFETY: a struct with its size.
        unsafe { drex_stats_get(self.drex, &mut stats) };
        stats
    }

    pub fn graphs(&self) -> (u64, u64) {
        self.decoder.perf()
    }

    /// Ends every request with an error, as after a panic.
    pub fn fail_all(&mut self, failure: &Failure) {
        // SAFETY: allowed at any time; without a step it says so and does nothing.
        unsafe { drex_abandon(self.drex) };
        self.leavers.clear();
        for at in 0..self.slots.len() {
            self.fail(at, failure.clone());
        }
        for job in self.queue.drain() {
            (self.out)(job.id, Event::Failed(failure.clone()));
        }
    }

    /// Takes in what waits, runs prompts, runs one window.
    pub fn step(&mut self) -> Result<(), Failure> {
        self.cancel();
        self.admit();
        self.prompts()?;
        self.window()
    }

    fn cancel(&mut self) {
        let gone = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        for job in self.queue.take(|job| gone(&job.cancelled)) {
            let end = Some((Finish::Cancelled, Figures::default()));
            let event = Event::Token {
                token: None,
                text: String::new(),
                end,
            };
            (self.out)(job.id, event);
        }
        let now = now_ns();
        for job in self
            .queue
            .take(|job| job.deadline_ns().is_some_and(|deadline| now >= deadline))
        {
            let failure = unavailable(format!(
                "the timeout of {} us is over and the request has not begun",
                job.sampling.timeout_us
            ));
            (self.out)(job.id, Event::Failed(failure));
        }
        for at in 0..self.slots.len() {
            let slot = self.slots[at].as_ref();
            if slot.is_some_and(|slot| gone(&slot.cancelled)) {
                self.finish(at, None, String::new(), Finish::Cancelled);
            }
        }
    }

    fn admit(&mut self) {
        while let Some(&at) = self.free.front() {
            let Some(job) = self.queue.pop() else {
                return;
            };
            let id = job.id;
            match self.slot(job) {
                Ok(slot) => {
                    let prompt_tokens = slot.prompt.len() as u32;
                    (self.out)(id, Event::Started { prompt_tokens });
                    // Whoever is alone does not look at the cells of those that were.
                    let alone = self.free.len() == self.slots.len();
                    self.decoder.forget((!alone).then_some(at as i32));
                    self.free.pop_front();
                    self.slots[at] = Some(slot);
                }
                Err(failure) => (self.out)(id, Event::Failed(failure)),
            }
        }
    }

    fn slot(&mut self, job: Job) -> Result<Slot<D::Sampler>, Failure> {
        let deadline_ns = job.deadline_ns();
        let Job {
            id,
            prompt,
            bad,
            sampling,
            cancelled,
            ..
        } = job;
        let penalties = sampling.repetition_penalty != 1.0
            || sampling.frequency_penalty != 0.0
            || sampling.presence_penalty != 0.0;
        let sampler = if sampling.temperature > 0.0 || penalties {
            let seed = sampling
                .seed
                .unwrap_or_else(|| (now_ns() ^ id.wrapping_mul(0x9e37_79b9)) as u32);
            let params = SamplerParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                frequency_penalty: sampling.frequency_penalty,
                presence_penalty: sampling.presence_penalty,
                seed,
            };
            Some(self.decoder.sampler(&params, &prompt)?)
        } else {
            None
        };
        self.admitted += 1;
        Ok(Slot {
            id,
            cancelled,
            reshaped: penalties || !bad.is_empty(),
            bad,
            fill: sampling.drex_fill.unwrap_or(self.settings.fill),
            sampler,
            text: Text::new(&sampling.stop, sampling.include_stop),
            sampling,
            prompt,
            deadline_ns,
            order: self.admitted,
            n_past: 0,
            ahead: Vec::new(),
            n_drafts: 0,
            output: Vec::new(),
            next: 0,
            busy: false,
            drafts: 0,
            drafts_accepted: 0,
        })
    }

    /// Makes a request known to drex, at the end of its prompt.
    fn register(&mut self, at: usize) -> Result<(), Failure> {
        let Some(slot) = &self.slots[at] else {
            return Ok(());
        };
        let sampling = &slot.sampling;
        let mut config: drex_request_config = zeroed();
        config.size = size_of::<drex_request_config>() as u32;
        config.metric = sampling.drex_metric.unwrap_or(DREX_METRIC_DEFAULT);
        config.id = slot.id;
        // Confidence is that of the model's own distribution: where that is changed, a ramp says nothing about the token,
        // and such a request exits early only if it names a threshold itself.
        let threshold = if slot.reshaped { 2.0 } else { f32::NAN };
        config.threshold = sampling.drex_threshold.unwrap_or(threshold);
        config.fill = sampling.drex_fill.unwrap_or(DREX_FILL_DEFAULT);
        config.token_deadline_ns = nanoseconds(sampling.drex_deadline_ms.into());
        config.priority = sampling.drex_priority;
        let deadline = if sampling.drex_request_deadline_ms > 0.0 {
            sampling.drex_request_deadline_ms.into()
        } else {
            self.settings.request_deadline_ms
        };
        config.request_deadline_ns = nanoseconds(deadline);
        // The timeout counts from the arrival; of one that is over, the least is left.
        if let Some(end) = slot.deadline_ns {
            let left = end.saturating_sub(now_ns()).max(1);
            config.request_deadline_ns = match config.request_deadline_ns {
                0 => left,
                other => other.min(left),
            };
        }
        config.max_tokens = sampling.max_tokens.into();
        // SAFETY: the struct lives during the call.
        unsafe { check(drex_request_add(self.drex, &config)) }
    }

    fn finish(&mut self, at: usize, token: Option<i32>, text: String, end: Finish) {
        let Some(slot) = &self.slots[at] else {
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
        };
        self.free(at);
        let event = Event::Token {
            token,
            text,
            end: Some((end, figures)),
        };
        (self.out)(id, event);
    }

    fn fail(&mut self, at: usize, failure: Failure) {
        if let Some(id) = self.slots[at].as_ref().map(|slot| slot.id) {
            self.free(at);
            (self.out)(id, Event::Failed(failure));
        }
    }

    /// The request leaves drex, a held row of it too.
    fn free(&mut self, at: usize) {
        if let Some(slot) = self.slots[at].take() {
            // SAFETY: removes a request by its id.
            unsafe { drex_request_remove(self.drex, slot.id) };
            self.leavers.retain(|leaver| leaver.slot != at);
            self.free.push_back(at);
        }
    }
}

impl<D: Decoder> Drop for Engine<D> {
    fn drop(&mut self) {
        self.save_profile();
        // SAFETY: before the context, whose tensors it has.
        unsafe { drex_destroy(self.drex) };
    }
}
