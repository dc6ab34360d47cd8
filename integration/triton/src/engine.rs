// SPDX-License-Identifier: Apache-2.0
//! Runs requests: prompts through all layers, then one layer window after another over the rows that drex names.
//!
//! Knows nothing of Triton; what becomes of a request goes out as `Event`s.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drex::ffi::functions::*;
use drex::ffi::types::*;

use crate::llama::{Llama, Row, Sampler, SamplerParams};
use crate::sampling::Sampling;
use crate::settings::Settings;
use crate::text::Text;
use crate::triton::error::Failure;

/// A request before it runs.
pub struct Job {
    pub id: u64,
    pub prompt: String,
    pub sampling: Sampling,
    /// Set by whoever sees the client go.
    pub cancelled: Arc<AtomicBool>,
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

struct Slot {
    id: u64,
    cancelled: Arc<AtomicBool>,
    sampling: Sampling,
    fill: u32,
    sampler: Option<Sampler>,
    text: Text,
    prompt: Vec<i32>,
    /// Tokens that went into the KV cache.
    n_past: u32,
    n_out: u32,
    /// The token to run next.
    next: i32,
    /// drex has it: ready, running or held.
    busy: bool,
}

impl Slot {
    fn in_prompt(&self) -> bool {
        (self.n_past as usize) < self.prompt.len()
    }
}

struct Step {
    info: drex_step,
    /// Of each row: its slot here.
    slots: Vec<usize>,
    rows: Vec<Row>,
    arena: Vec<i32>,
}

/// Rows that left with fill propagate: their K and V are projected before the next window.
struct Leaver {
    slot: usize,
    row: Row,
    arena: i32,
    begin: u32,
}

pub struct Engine {
    llama: Llama,
    drex: *mut drex_engine,
    settings: Settings,
    pub ramps: Vec<u32>,
    max_batch: u32,
    /// Index: the sequence in the KV cache.
    slots: Vec<Option<Slot>>,
    /// Free slots, the one that was freed first at the front. Its cells stay until it is used again: attention adds up in
    /// the order of the cells, and a request that got another's would have some that are out of order.
    free: VecDeque<usize>,
    queue: VecDeque<Job>,
    leavers: Vec<Leaver>,
    plan: Vec<drex_row>,
    verdicts: Vec<drex_verdict>,
    out: Out,
    pub window_ns: u64,
}

// SAFETY: an engine of drex may be used from any thread, by one at a time.
unsafe impl Send for Engine {}

fn now_ns() -> u64 {
    crate::clock::now_ns()
}

fn check(status: drex_status) -> Result<(), Failure> {
    if status == DREX_OK {
        return Ok(());
    }
    // SAFETY: never NULL, valid until the thread's next failure.
    let text = unsafe { CStr::from_ptr(drex_last_error()) }.to_string_lossy();
    Err(Failure::invalid(text.into_owned()))
}

/// A struct of drex.h with all fields 0, which is valid for each of them.
fn zeroed<T: Copy>() -> T {
    // SAFETY: only used for the plain structs of drex.h, whose pointers may be NULL.
    unsafe { std::mem::zeroed() }
}

fn nanoseconds(ms: f64) -> u64 {
    (ms * 1e6) as u64
}

impl Engine {
    pub fn new(llama: Llama, settings: Settings, out: Out) -> Result<Self, Failure> {
        let ramps = if settings.exit_layers.is_empty() {
            llama.exit_layers()
        } else {
            settings.exit_layers.clone()
        };
        if ramps.is_empty() {
            return Err(Failure::invalid(
                "the model has no early_exit.layers in its metadata: it was not trained for early exit, or name the \
                 layers with the parameter exit_layers",
            ));
        }
        let head = llama.exit_head();
        if head != "shared" {
            return Err(Failure::unsupported(format!(
                "early_exit.head is {head}, must be shared"
            )));
        }
        let thresholds = &settings.threshold;
        if thresholds.len() != 1 && thresholds.len() != ramps.len() {
            return Err(Failure::invalid(format!(
                "parameters: threshold has {} values, must have 1 or one for each of the {} exit layers",
                thresholds.len(),
                ramps.len()
            )));
        }
        let name = |text: &str| CString::new(text).unwrap_or_default();
        let arena = settings.slots * (1 + settings.max_pending);
        let most = if settings.max_batch > 0 {
            settings.max_batch
        } else {
            settings.batch
        };
        let max_batch = most.min(arena);
        let mut config: drex_config = zeroed();
        config.size = size_of::<drex_config>() as u32;
        config.abi_version = DREX_ABI_VERSION;
        config.n_layers = llama.n_layer;
        config.n_ramps = ramps.len() as u32;
        config.ramp_layers = ramps.as_ptr();
        config.n_slots = arena;
        config.max_requests = settings.slots;
        config.max_batch = max_batch;
        config.fill = settings.fill;
        config.device = DREX_DEVICE_HOST;
        config.threshold = thresholds[0];
        if thresholds.len() > 1 {
            config.ramp_thresholds = thresholds.as_ptr();
        }
        config.flush_rows = settings.flush_rows;
        config.min_ready = settings.min_ready;
        config.max_hold_ns = nanoseconds(settings.max_hold_ms);
        config.token_deadline_ns = nanoseconds(settings.deadline_ms);
        config.art_ratio = settings.art_ratio;
        config.max_pending = settings.max_pending;
        let mut engine = null_mut();
        // SAFETY: what the structs point to lives during the calls.
        unsafe {
            check(drex_policy_from_name(
                name(&settings.policy).as_ptr(),
                &mut config.policy,
            ))?;
            check(drex_metric_from_name(
                name(&settings.metric).as_ptr(),
                &mut config.metric,
            ))?;
            check(drex_create(&config, &mut engine))?;
        }
        let mut this = Self {
            drex: engine,
            ramps,
            max_batch,
            slots: (0..settings.slots).map(|_| None).collect(),
            free: (0..settings.slots as usize).collect(),
            queue: VecDeque::new(),
            leavers: Vec::new(),
            plan: vec![zeroed(); max_batch as usize],
            verdicts: vec![zeroed(); max_batch as usize],
            out,
            window_ns: 0,
            settings,
            llama,
        };
        this.llama.windows(arena, this.settings.graphs)?;
        this.bind()?;
        Ok(this)
    }

    fn bind(&mut self) -> Result<(), Failure> {
        let mut layers: Vec<drex_kv_layer> = Vec::new();
        for layer in 0..self.llama.n_layer {
            let kv = self.llama.layer(layer).ok_or_else(|| {
                Failure::unsupported(format!("layer {layer} has no K/V in host memory"))
            })?;
            let mut one: drex_kv_layer = zeroed();
            one.size = size_of::<drex_kv_layer>() as u32;
            one.n_cells = kv.n_cells;
            one.k = kv.k;
            one.v = kv.v;
            one.k_row_bytes = kv.k_row_bytes;
            one.k_cell_stride = kv.k_cell_stride;
            one.v_row_bytes = kv.v_row_bytes;
            one.v_cell_stride = kv.v_cell_stride;
            one.v_elem_bytes = kv.v_elem_bytes;
            one.v_elem_stride = kv.v_elem_stride;
            layers.push(one);
        }
        // SAFETY: the tensors live as long as the context, which is closed after the engine.
        unsafe {
            check(drex_bind_kv(
                self.drex,
                layers.as_ptr(),
                layers.len() as u32,
            ))
        }
    }

    pub fn push(&mut self, job: Job) {
        // Higher priority first, the older first among equals.
        let at = self
            .queue
            .iter()
            .position(|other| other.sampling.drex_priority < job.sampling.drex_priority)
            .unwrap_or(self.queue.len());
        self.queue.insert(at, job);
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
        self.llama.perf()
    }

    /// Ends every request with an error, as after a panic.
    pub fn fail_all(&mut self, failure: &Failure) {
        // SAFETY: allowed at any time; without a step it says so and does nothing.
        unsafe { drex_abandon(self.drex) };
        self.leavers.clear();
        for at in 0..self.slots.len() {
            if let Some(slot) = self.slots[at].take() {
                // SAFETY: removes a request by its id.
                unsafe { drex_request_remove(self.drex, slot.id) };
                self.free.push_back(at);
                (self.out)(slot.id, Event::Failed(failure.clone()));
            }
        }
        for job in self.queue.drain(..) {
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
        let out = &self.out;
        self.queue.retain(|job| {
            let stays = !gone(&job.cancelled);
            if !stays {
                let end = Some((Finish::Cancelled, Figures::default()));
                out(
                    job.id,
                    Event::Token {
                        token: None,
                        text: String::new(),
                        end,
                    },
                );
            }
            stays
        });
        for at in 0..self.slots.len() {
            if self.slots[at]
                .as_ref()
                .is_some_and(|slot| gone(&slot.cancelled))
            {
                self.finish(at, None, String::new(), Finish::Cancelled);
            }
        }
    }

    fn admit(&mut self) {
        while let Some(&at) = self.free.front() {
            let Some(job) = self.queue.pop_front() else {
                return;
            };
            let id = job.id;
            match self.admitted(job) {
                Ok(slot) => {
                    (self.out)(
                        id,
                        Event::Started {
                            prompt_tokens: slot.prompt.len() as u32,
                        },
                    );
                    self.free.pop_front();
                    self.llama.forget(at as i32);
                    self.slots[at] = Some(slot);
                }
                Err(failure) => (self.out)(id, Event::Failed(failure)),
            }
        }
    }

    fn admitted(&mut self, job: Job) -> Result<Slot, Failure> {
        let Job {
            id,
            prompt,
            sampling,
            cancelled,
        } = job;
        let prompt = self.llama.tokenize(&prompt)?;
        if prompt.is_empty() {
            return Err(Failure::invalid("text_input is empty"));
        }
        if prompt.len() as u32 >= self.settings.context {
            return Err(Failure::invalid(format!(
                "text_input has {} tokens, the context holds {} with at least one for the answer",
                prompt.len(),
                self.settings.context
            )));
        }
        let penalties = sampling.repetition_penalty != 1.0
            || sampling.frequency_penalty != 0.0
            || sampling.presence_penalty != 0.0;
        let sampler = if sampling.temperature > 0.0 || penalties {
            let seed = sampling
                .seed
                .unwrap_or_else(|| (now_ns() ^ id.wrapping_mul(0x9e37_79b9)) as u32);
            Some(self.llama.sampler(&SamplerParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                frequency_penalty: sampling.frequency_penalty,
                presence_penalty: sampling.presence_penalty,
                seed,
                ignore_eos: i32::from(sampling.ignore_eos),
            })?)
        } else {
            None
        };
        let mut config: drex_request_config = zeroed();
        config.size = size_of::<drex_request_config>() as u32;
        config.metric = DREX_METRIC_DEFAULT;
        config.id = id;
        // Confidence is that of the model's own distribution: where penalties change it, a ramp says nothing about the
        // token, and such a request exits early only if it names a threshold itself.
        config.threshold =
            sampling
                .drex_threshold
                .unwrap_or(if penalties { 2.0 } else { f32::NAN });
        config.fill = sampling.drex_fill.unwrap_or(DREX_FILL_DEFAULT);
        config.token_deadline_ns = nanoseconds(sampling.drex_deadline_ms.into());
        config.priority = sampling.drex_priority;
        let deadline = if sampling.drex_request_deadline_ms > 0.0 {
            sampling.drex_request_deadline_ms.into()
        } else {
            self.settings.request_deadline_ms
        };
        config.request_deadline_ns = nanoseconds(deadline);
        config.max_tokens = sampling.max_tokens.into();
        // SAFETY: the struct lives during the call.
        unsafe { check(drex_request_add(self.drex, &config))? };
        Ok(Slot {
            id,
            cancelled,
            fill: sampling.drex_fill.unwrap_or(self.settings.fill),
            sampler,
            text: Text::new(&sampling.stop),
            sampling,
            prompt,
            n_past: 0,
            n_out: 0,
            next: 0,
            busy: false,
        })
    }

    /// As many tokens of prompts as fit into a batch, through all layers.
    fn prompts(&mut self) -> Result<(), Failure> {
        let (mut rows, mut outputs, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        let mut parts = Vec::new();
        for (at, slot) in self.slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            let room = self.settings.batch as usize - rows.len();
            let begin = slot.n_past as usize;
            let count = room.min(slot.prompt.len().saturating_sub(begin));
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
            if count > 0 {
                parts.push((at, count as u32));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let code = self.llama.decode(&rows, &outputs);
        if code != 0 {
            for (at, _) in parts {
                self.fail(
                    at,
                    Failure::internal(format!("llama.cpp failed on the prompt ({code})")),
                );
            }
            return Ok(());
        }
        for (at, count) in parts {
            if let Some(slot) = &mut self.slots[at] {
                slot.n_past += count;
            }
        }
        for (at, row) in ends {
            self.emit(at, row, false);
        }
        Ok(())
    }

    fn window(&mut self) -> Result<(), Failure> {
        for slot in self.slots.iter_mut().flatten() {
            if !slot.in_prompt() && !slot.busy {
                // SAFETY: a request that was added.
                unsafe {
                    check(drex_request_ready(
                        self.drex,
                        slot.id,
                        slot.n_past + 1,
                        now_ns(),
                    ))?
                };
                slot.busy = true;
            }
        }
        let Some(step) = self.plan()? else {
            return Ok(());
        };
        let info = step.info;
        let start = now_ns();
        let mut code = self.project();
        if code == 0 {
            code = self
                .llama
                .window(&step.rows, &step.arena, info.layer_begin, info.layer_end);
        }
        if code != 0 {
            // SAFETY: a step is planned.
            unsafe { check(drex_abandon(self.drex))? };
            for at in step.slots {
                self.fail(
                    at,
                    Failure::internal(format!("llama.cpp failed on a layer window ({code})")),
                );
            }
            return Ok(());
        }
        if info.layer_begin == 0 {
            for &at in &step.slots {
                if let Some(slot) = &mut self.slots[at] {
                    slot.n_past += 1;
                }
            }
        }
        self.complete(&step, start)
    }

    fn plan(&mut self) -> Result<Option<Step>, Failure> {
        let mut input: drex_plan_input = zeroed();
        input.size = size_of::<drex_plan_input>() as u32;
        input.n_prompt_rows = self
            .slots
            .iter()
            .flatten()
            .map(|s| s.prompt.len() as u32 - s.n_past.min(s.prompt.len() as u32))
            .sum();
        input.now_ns = now_ns();
        let mut info: drex_step = zeroed();
        info.size = size_of::<drex_step>() as u32;
        // SAFETY: room for max_batch rows.
        unsafe {
            check(drex_plan(
                self.drex,
                &input,
                self.plan.as_mut_ptr(),
                self.max_batch,
                &mut info,
            ))?
        };
        let n = info.n_rows as usize;
        if n == 0 {
            return Ok(None);
        }
        let mut step = Step {
            info,
            slots: Vec::with_capacity(n),
            rows: Vec::with_capacity(n),
            arena: Vec::with_capacity(n),
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
            step.slots.push(at);
            step.arena.push(row.slot as i32);
            step.rows.push(Row {
                token: slot.next,
                position: slot.n_past as i32 - i32::from(ran) - row.back as i32,
                sequence: at as i32,
            });
        }
        Ok(Some(step))
    }

    /// Fill propagate, for the rows that left in the last window.
    fn project(&mut self) -> i32 {
        let Some(first) = self.leavers.first() else {
            return 0;
        };
        let begin = first.begin;
        let rows: Vec<Row> = self.leavers.iter().map(|l| l.row).collect();
        let arena: Vec<i32> = self.leavers.iter().map(|l| l.arena).collect();
        let code = self.llama.project(&rows, &arena, begin);
        if code == 0 {
            self.leavers.clear();
        }
        code
    }

    fn complete(&mut self, step: &Step, start: u64) -> Result<(), Failure> {
        let info = step.info;
        let n = info.n_rows as usize;
        let ramp = info.ramp != DREX_NO_RAMP;
        if ramp {
            let mut logits: drex_logits = zeroed();
            logits.size = size_of::<drex_logits>() as u32;
            logits.dtype = DREX_DTYPE_F32;
            logits.row_stride_bytes = u64::from(self.llama.n_vocab) * 4;
            logits.n_rows = info.n_rows;
            logits.n_vocab = self.llama.n_vocab;
            logits.data = self
                .llama
                .window_logits()
                .ok_or_else(|| Failure::internal("the window gave no logits in host memory"))?
                .cast();
            // SAFETY: all rows of a window are outputs, so that the logits of n rows lie one after another.
            unsafe {
                check(drex_ramp(
                    self.drex,
                    &logits,
                    self.llama.cells(),
                    self.verdicts.as_mut_ptr(),
                    self.max_batch,
                ))?;
                check(drex_fill(self.drex))?;
            }
        }
        let end = now_ns();
        self.window_ns += end - start;
        let mut emits = Vec::new();
        for i in 0..n {
            let done = !ramp || self.verdicts[i].decision == DREX_DECISION_EXIT;
            let own = self.plan[i].back == 0;
            let at = step.slots[i];
            let Some(slot) = &mut self.slots[at] else {
                continue;
            };
            if !(done && own) {
                continue;
            }
            slot.busy = false;
            if ramp && slot.fill == DREX_FILL_PROPAGATE {
                self.leavers.push(Leaver {
                    slot: at,
                    row: step.rows[i],
                    arena: step.arena[i],
                    begin: info.layer_end,
                });
            }
            emits.push((at, i));
        }
        let mut done: drex_completion = zeroed();
        done.size = size_of::<drex_completion>() as u32;
        done.now_ns = end;
        done.duration_ns = end - start;
        done.n_kv = step.rows.iter().map(|r| r.position as u64 + 1).sum();
        // SAFETY: a step is planned, and its ramp was called.
        unsafe { check(drex_complete(self.drex, &done))? };
        for (at, row) in emits {
            self.emit(at, row, true);
        }
        Ok(())
    }

    /// Chooses the token of a row, of a window or of a prompt, and gives it out.
    fn emit(&mut self, at: usize, row: usize, window: bool) {
        let Some(slot) = &mut self.slots[at] else {
            return;
        };
        let token = match &mut slot.sampler {
            Some(sampler) => self.llama.sample(sampler, row, window),
            None => greedy(&mut self.llama, row, window, slot.sampling.ignore_eos),
        };
        let Some(token) = token else {
            return self.fail(at, Failure::internal("a row gave no logits"));
        };
        slot.next = token;
        slot.n_out += 1;
        if self.llama.is_end(token) {
            let rest = slot.text.finish();
            return self.finish(at, Some(token), rest, Finish::Stop);
        }
        let text = slot.text.push(&self.llama.piece(token));
        let end = if slot.text.stopped() {
            Some(Finish::Stop)
        } else if slot.n_out >= slot.sampling.max_tokens || slot.n_past + 1 > self.settings.context
        {
            Some(Finish::Length)
        } else {
            None
        };
        match end {
            Some(end) => {
                let rest = slot.text.finish();
                self.finish(at, Some(token), text + &rest, end);
            }
            None => (self.out)(
                slot.id,
                Event::Token {
                    token: Some(token),
                    text,
                    end: None,
                },
            ),
        }
    }

    fn finish(&mut self, at: usize, token: Option<i32>, text: String, end: Finish) {
        let Some(id) = self.slots[at].as_ref().map(|slot| slot.id) else {
            return;
        };
        let mut info: drex_request_info = zeroed();
        info.size = size_of::<drex_request_info>() as u32;
        // SAFETY: a struct with its size.
        unsafe { drex_request_get(self.drex, id, &mut info) };
        let figures = Figures {
            exits: info.exits[..self.ramps.len()].to_vec(),
            involuntary_exits: info.involuntary_exits,
            involuntary_stays: info.involuntary_stays,
            held_ns: info.held_ns,
            deadline_misses: info.deadline_misses,
        };
        self.free(at);
        (self.out)(
            id,
            Event::Token {
                token,
                text,
                end: Some((end, figures)),
            },
        );
    }

    fn fail(&mut self, at: usize, failure: Failure) {
        if let Some(id) = self.slots[at].as_ref().map(|slot| slot.id) {
            self.free(at);
            (self.out)(id, Event::Failed(failure));
        }
    }

    /// The request leaves drex and the KV cache, a held row of it too.
    fn free(&mut self, at: usize) {
        if let Some(slot) = self.slots[at].take() {
            // SAFETY: removes a request by its id.
            unsafe { drex_request_remove(self.drex, slot.id) };
            self.leavers.retain(|leaver| leaver.slot != at);
            self.free.push_back(at);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: before the context, whose tensors it has.
        unsafe { drex_destroy(self.drex) };
    }
}

/// The most likely token, the lowest number among equals.
fn greedy(llama: &mut Llama, row: usize, window: bool, ignore_eos: bool) -> Option<i32> {
    let mut best = argmax(llama.logits(row, window)?, |_| false)?;
    if ignore_eos && llama.is_end(best) {
        let ends: Vec<bool> = (0..llama.n_vocab as i32)
            .map(|token| llama.is_end(token))
            .collect();
        best = argmax(llama.logits(row, window)?, |token| ends[token])?;
    }
    Some(best)
}

fn argmax(logits: &[f32], banned: impl Fn(usize) -> bool) -> Option<i32> {
    let mut best: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if best.is_none_or(|(_, top)| logit > top) && !banned(token) {
            best = Some((token, logit));
        }
    }
    best.map(|(token, _)| token as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_equals_is_chosen() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0, 1.0], |_| false), Some(1));
        assert_eq!(argmax(&[0.0, 2.0, 2.0, 1.0], |t| t == 1), Some(2));
        assert_eq!(argmax(&[], |_| false), None);
    }
}
