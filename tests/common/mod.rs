// SPDX-License-Identifier: Apache-2.0

//! A host in a few lines: the C functions with Rust manners.

#![allow(dead_code)] // every test file uses its own part

use std::ffi::{CStr, c_void};
use std::ptr;
use std::time::Duration;

pub use drex::ffi::*;

macro_rules! sized {
    ($t:ty) => {{
        // SAFETY: a struct of numbers and pointers, for which 0 is a value.
        #[allow(unused_unsafe)] // also used inside unsafe blocks
        let mut v: $t = unsafe { std::mem::zeroed() };
        v.size = std::mem::size_of::<$t>() as u32;
        v
    }};
}
#[allow(unused_imports)]
pub(crate) use sized;

/// Four layers per segment, the threshold 0.5.
pub fn config(ramps: &[u32], requests: u32, batch: u32, policy: drex_policy) -> drex_config {
    let mut c = sized!(drex_config);
    c.abi_version = DREX_ABI_VERSION;
    c.n_layers = ramps[ramps.len() - 1] + 4;
    c.n_ramps = ramps.len() as u32;
    c.ramp_layers = ramps.as_ptr();
    c.n_slots = requests;
    c.max_requests = requests;
    c.max_batch = batch;
    c.policy = policy;
    c.metric = DREX_METRIC_MAXPROB;
    c.threshold = 0.5;
    c.art_ratio = f32::NAN;
    c
}

pub fn text() -> String {
    // SAFETY: the thread's own text.
    let text = unsafe { CStr::from_ptr(drex_last_error()) };
    text.to_str().unwrap().to_owned()
}

/// Of this thread: a noisy machine takes longer, but does no more work.
pub fn cpu_time() -> Duration {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the time.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed(pub drex_status);

pub fn ok(status: drex_status) -> Result<(), Failed> {
    match status {
        DREX_OK => Ok(()),
        _ => Err(Failed(status)),
    }
}

pub struct Pages {
    raw: *mut drex_pages,
    layers: usize,
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: a handle.
        unsafe { drex_pages_destroy(self.raw) };
    }
}

impl Pages {
    pub fn new(n_layers: u32, page_tokens: u32, n_pages: u32) -> Result<Pages, Failed> {
        let mut c = sized!(drex_pages_config);
        (c.n_layers, c.page_tokens, c.n_pages) = (n_layers, page_tokens, n_pages);
        let mut raw = ptr::null_mut();
        // SAFETY: valid pointers.
        ok(unsafe { drex_pages_create(&c, &mut raw) })?;
        let layers = n_layers as usize;
        Ok(Pages { raw, layers })
    }

    pub fn raw(&self) -> *mut drex_pages {
        self.raw
    }

    fn copies(
        &self,
        call: impl FnOnce(*mut drex_page_copy, u32, *mut u32) -> drex_status,
    ) -> Result<Vec<drex_page_copy>, Failed> {
        let mut out = Vec::with_capacity(2 * self.layers);
        let mut n = 0;
        ok(call(out.as_mut_ptr(), out.capacity() as u32, &mut n))?;
        // SAFETY: the call has written `n` of them.
        unsafe { out.set_len(n as usize) };
        Ok(out)
    }

    pub fn write(
        &self,
        table: &mut [u32],
        blocks: usize,
        pos: usize,
        begin: usize,
        end: usize,
    ) -> Result<Vec<drex_page_copy>, Failed> {
        let (blocks, begin, end) = (blocks as u32, begin as u32, end as u32);
        // SAFETY: the table has layers * blocks entries.
        self.copies(|out, max, n| unsafe {
            let table = table.as_mut_ptr();
            drex_pages_write(self.raw, table, blocks, pos as u64, begin, end, out, max, n)
        })
    }

    pub fn exit(
        &self,
        table: &mut [u32],
        blocks: usize,
        pos: usize,
        layer: usize,
    ) -> Result<Vec<drex_page_copy>, Failed> {
        let (blocks, layer) = (blocks as u32, layer as u32);
        // SAFETY: as above.
        self.copies(|out, max, n| unsafe {
            let table = table.as_mut_ptr();
            drex_pages_exit(self.raw, table, blocks, pos as u64, layer, out, max, n)
        })
    }

    pub fn fork(&self, table: &[u32], blocks: usize, first: usize, n: usize) -> Result<(), Failed> {
        let (blocks, first, n) = (blocks as u32, first as u32, n as u32);
        // SAFETY: as above.
        ok(unsafe { drex_pages_fork(self.raw, table.as_ptr(), blocks, first, n) })
    }

    pub fn release(
        &self,
        table: &mut [u32],
        blocks: usize,
        first: usize,
        n: usize,
    ) -> Result<(), Failed> {
        let (blocks, first, n) = (blocks as u32, first as u32, n as u32);
        // SAFETY: as above.
        ok(unsafe { drex_pages_release(self.raw, table.as_mut_ptr(), blocks, first, n) })
    }

    pub fn stats(&self) -> drex_pages_stats {
        let mut s = sized!(drex_pages_stats);
        // SAFETY: valid pointers.
        ok(unsafe { drex_pages_stats_get(self.raw, &mut s) }).unwrap();
        s
    }
}

#[derive(Debug, Clone)]
pub struct Planned {
    pub step: drex_step,
    pub rows: Vec<drex_row>,
}

impl Planned {
    pub fn ids(&self) -> Vec<u64> {
        self.rows.iter().map(|r| r.request).collect()
    }
}

pub struct Engine {
    pub raw: *mut drex_engine,
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: a handle.
        unsafe { drex_destroy(self.raw) };
    }
}

impl Engine {
    pub fn try_new(config: &drex_config) -> Result<Engine, Failed> {
        let mut raw = ptr::null_mut();
        // SAFETY: valid pointers.
        ok(unsafe { drex_create(config, &mut raw) })?;
        Ok(Engine { raw })
    }

    pub fn new(config: &drex_config) -> Engine {
        Engine::try_new(config).unwrap_or_else(|e| panic!("{e:?}: {}", text()))
    }

    pub fn add(&self, id: u64) -> Result<(), Failed> {
        self.add_with(id, |_| {})
    }

    pub fn add_with(
        &self,
        id: u64,
        set: impl FnOnce(&mut drex_request_config),
    ) -> Result<(), Failed> {
        let mut c = sized!(drex_request_config);
        c.metric = DREX_METRIC_DEFAULT;
        c.id = id;
        c.threshold = f32::NAN;
        c.fill = DREX_FILL_DEFAULT;
        set(&mut c);
        // SAFETY: valid pointers.
        ok(unsafe { drex_request_add(self.raw, &c) })
    }

    pub fn ready(&self, id: u64, now: u64) -> Result<(), Failed> {
        // SAFETY: a handle.
        ok(unsafe { drex_request_ready(self.raw, id, 1, now) })
    }

    pub fn remove(&self, id: u64) -> Result<(), Failed> {
        // SAFETY: a handle.
        ok(unsafe { drex_request_remove(self.raw, id) })
    }

    pub fn info(&self, id: u64) -> Result<drex_request_info, Failed> {
        let mut info = sized!(drex_request_info);
        // SAFETY: valid pointers.
        ok(unsafe { drex_request_get(self.raw, id, &mut info) })?;
        Ok(info)
    }

    pub fn stats(&self) -> drex_stats {
        let mut stats = sized!(drex_stats);
        // SAFETY: valid pointers.
        ok(unsafe { drex_stats_get(self.raw, &mut stats) }).unwrap();
        stats
    }

    pub fn plan(&self, now: u64, capacity: u32) -> Result<Planned, Failed> {
        self.plan_with(now, capacity, 0)
    }

    pub fn plan_with(&self, now: u64, capacity: u32, prompts: u32) -> Result<Planned, Failed> {
        let mut input = sized!(drex_plan_input);
        input.now_ns = now;
        input.n_prompt_rows = prompts;
        let mut step = sized!(drex_step);
        let mut rows = Vec::with_capacity(capacity as usize + 1);
        // SAFETY: room for `capacity` rows.
        ok(unsafe { drex_plan(self.raw, &input, rows.as_mut_ptr(), capacity, &mut step) })?;
        // SAFETY: the engine wrote that many.
        unsafe { rows.set_len(step.n_rows as usize) };
        Ok(Planned { step, rows })
    }

    /// One row of logits per confidence, under the metric MAXPROB.
    pub fn ramp(&self, confidences: &[f32]) -> Result<Vec<drex_verdict>, Failed> {
        self.ramp_at(confidences, ptr::null())
    }

    pub fn ramp_at(
        &self,
        confidences: &[f32],
        cells: *const u32,
    ) -> Result<Vec<drex_verdict>, Failed> {
        let data: Vec<[f32; VOCAB]> = confidences.iter().map(|&c| row_of(c)).collect();
        let mut logits = sized!(drex_logits);
        logits.data = data.as_ptr().cast::<c_void>();
        logits.row_stride_bytes = size_of::<[f32; VOCAB]>() as u64;
        logits.n_rows = confidences.len() as u32;
        logits.n_vocab = VOCAB as u32;
        let mut verdicts = Vec::with_capacity(confidences.len());
        // SAFETY: room for a verdict per row; the rows are in `data`.
        ok(unsafe {
            drex_ramp(
                self.raw,
                &logits,
                cells,
                verdicts.as_mut_ptr(),
                confidences.len() as u32,
            )
        })?;
        // SAFETY: the engine wrote one per row.
        unsafe { verdicts.set_len(confidences.len()) };
        Ok(verdicts)
    }

    pub fn fill(&self) -> Result<(), Failed> {
        // SAFETY: a handle.
        ok(unsafe { drex_fill(self.raw) })
    }

    pub fn complete(&self, now: u64, duration: u64) -> Result<(), Failed> {
        let mut c = sized!(drex_completion);
        c.now_ns = now;
        c.duration_ns = duration;
        // SAFETY: valid pointers.
        ok(unsafe { drex_complete(self.raw, &c) })
    }

    pub fn abandon(&self) -> Result<(), Failed> {
        // SAFETY: a handle.
        ok(unsafe { drex_abandon(self.raw) })
    }

    pub fn observe(&self, begin: u32, end: u32, rows: u32, ns: u64) -> Result<(), Failed> {
        let mut o = sized!(drex_observation);
        o.layer_begin = begin;
        o.layer_end = end;
        o.n_rows = rows;
        o.duration_ns = ns;
        // SAFETY: valid pointers.
        ok(unsafe { drex_observe(self.raw, &o) })
    }
}

pub const VOCAB: usize = 1001;

/// Logits with this greatest probability (1/VOCAB at least), at index 3; NaN
/// gives a row with a NaN.
pub fn row_of(confidence: f32) -> [f32; VOCAB] {
    let mut row = [0.0; VOCAB];
    let p = f64::from(confidence).min(1.0 - 1e-9);
    row[3] = if confidence.is_nan() {
        f32::NAN
    } else {
        (p * (VOCAB as f64 - 1.0) / (1.0 - p)).ln() as f32
    };
    row
}
