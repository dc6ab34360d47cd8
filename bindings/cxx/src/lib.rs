// SPDX-License-Identifier: Apache-2.0

//! drex for servers in Rust whose model is in C++.
//!
//! A C++ class derives from `drex::model::Model` (include/model.hpp); Rust owns
//! it and runs the host's loop of drex.h over it. The bridge carries what C
//! cannot: slices, a C++ object that Rust owns, and exceptions, which become
//! errors here. Fill mode `copy`, one thread.

use std::ffi::CStr;
use std::fmt;
use std::mem::zeroed;

use cxx::UniquePtr;
use drex::ffi::*;

pub use bridge::{Kv, Model, Row};

#[cxx::bridge(namespace = "drex::model")]
mod bridge {
    /// A row of the planned step.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    struct Row {
        request: u64,
        slot: u32,
        back: u32,
    }

    /// One layer's K/V cache: cell `c` of K is `row_bytes` bytes at `k + c * row_bytes`; V likewise.
    struct Kv {
        k: *mut u8,
        v: *mut u8,
        n_cells: u32,
        row_bytes: u64,
    }

    unsafe extern "C++" {
        include!("drex-cxx/include/model.hpp");

        type Model;
        fn n_layers(&self) -> u32;
        fn n_vocab(&self) -> u32;
        fn ramp_layers(&self) -> Vec<u32>;
        fn kv(self: Pin<&mut Model>, layer: u32) -> Result<Kv>;
        fn cell(&self, row: &Row) -> u32;
        fn run(
            self: Pin<&mut Model>,
            layer_begin: u32,
            layer_end: u32,
            rows: &[Row],
            logits: &mut [f32],
        ) -> Result<()>;
        fn sample(self: Pin<&mut Model>, row: &Row, logits: &[f32]) -> Result<i32>;
    }

    impl UniquePtr<Model> {}
}

/// Why a call failed.
#[derive(Debug)]
pub enum Error {
    /// A call of drex failed: `DREX_ERROR_*` and its text.
    Drex(i32, String),
    /// The model threw.
    Model(cxx::Exception),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Drex(_, text) => f.write_str(text),
            Error::Model(e) => write!(f, "the model: {e}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<cxx::Exception> for Error {
    fn from(e: cxx::Exception) -> Self {
        Error::Model(e)
    }
}

fn ok(status: drex_status) -> Result<(), Error> {
    if status == DREX_OK {
        return Ok(());
    }
    // SAFETY: never NULL, and this thread's until its next failure.
    let text = unsafe { CStr::from_ptr(drex_last_error()) };
    Err(Error::Drex(status, text.to_string_lossy().into_owned()))
}

macro_rules! sized {
    ($t:ty) => {{
        // SAFETY: a struct of numbers and pointers, for which 0 is a value.
        let mut value: $t = unsafe { zeroed() };
        value.size = size_of::<$t>() as u32;
        value
    }};
}

/// A token that a request got.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    pub request: u64,
    pub token: i32,
    /// The ramp where the token left. None: it ran through all layers.
    pub ramp: Option<u32>,
}

/// A model with an engine that schedules it.
pub struct Host {
    engine: *mut drex_engine,
    model: UniquePtr<Model>,
    n_vocab: usize,
    rows: Vec<drex_row>,
    verdicts: Vec<drex_verdict>,
    logits: Vec<f32>,
}

impl Host {
    /// A host for `max_batch` requests at once; `policy` is one of `DREX_POLICY_*`.
    ///
    /// # Panics
    /// Where `model` is null.
    pub fn new(
        mut model: UniquePtr<Model>,
        policy: u32,
        threshold: f32,
        max_batch: u32,
    ) -> Result<Host, Error> {
        let ramps = model.ramp_layers();
        let n_layers = model.n_layers();
        let mut config = sized!(drex_config);
        config.abi_version = DREX_ABI_VERSION;
        config.n_layers = n_layers;
        config.n_ramps = ramps.len() as u32;
        config.ramp_layers = ramps.as_ptr();
        config.n_slots = max_batch;
        config.max_requests = max_batch;
        config.max_batch = max_batch;
        config.policy = policy;
        config.threshold = threshold;
        config.art_ratio = f32::NAN;
        let mut engine = std::ptr::null_mut();
        // SAFETY: the ramps are as many as it says.
        ok(unsafe { drex_create(&config, &mut engine) })?;
        let n_vocab = model.n_vocab() as usize;
        let batch = max_batch as usize;
        let mut host = Host {
            engine,
            rows: Vec::with_capacity(batch),
            verdicts: Vec::with_capacity(batch),
            logits: vec![0.0; batch * n_vocab],
            n_vocab,
            model: UniquePtr::null(),
        };
        let mut layers = Vec::new();
        for l in 0..n_layers {
            let kv = model.pin_mut().kv(l)?;
            let mut layer = sized!(drex_kv_layer);
            layer.n_cells = kv.n_cells;
            layer.k = kv.k.cast();
            layer.v = kv.v.cast();
            layer.k_row_bytes = kv.row_bytes;
            layer.k_cell_stride = kv.row_bytes;
            layer.v_row_bytes = kv.row_bytes;
            layer.v_cell_stride = kv.row_bytes;
            layers.push(layer);
        }
        // SAFETY: the model keeps its cache where it is, and lives as long as
        // the engine.
        ok(unsafe { drex_bind_kv(host.engine, layers.as_ptr(), n_layers) })?;
        host.model = model;
        Ok(host)
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// A request whose prompt the model has run; its first token can run.
    pub fn add(&mut self, id: u64, now_ns: u64) -> Result<(), Error> {
        let mut request = sized!(drex_request_config);
        request.id = id;
        request.metric = DREX_METRIC_DEFAULT;
        request.fill = DREX_FILL_DEFAULT;
        request.threshold = f32::NAN;
        // SAFETY: an engine of ours and a whole struct.
        ok(unsafe { drex_request_add(self.engine, &request) })?;
        self.ready(id, now_ns)
    }

    /// The next token of a request can run.
    pub fn ready(&mut self, id: u64, now_ns: u64) -> Result<(), Error> {
        // SAFETY: an engine of ours.
        ok(unsafe { drex_request_ready(self.engine, id, 0, now_ns) })
    }

    pub fn remove(&mut self, id: u64) -> Result<(), Error> {
        // SAFETY: an engine of ours.
        ok(unsafe { drex_request_remove(self.engine, id) })
    }

    /// Runs one step and appends what it emitted. `false`: there was nothing to run.
    /// After an error the step's rows are back where they were.
    pub fn step(
        &mut self,
        mut now_ns: impl FnMut() -> u64,
        emitted: &mut Vec<Token>,
    ) -> Result<bool, Error> {
        let mut input = sized!(drex_plan_input);
        let mut step = sized!(drex_step);
        input.now_ns = now_ns();
        let capacity = self.rows.capacity() as u32;
        // SAFETY: room for `capacity` rows, of which n_rows are written.
        unsafe {
            let rows = self.rows.as_mut_ptr();
            ok(drex_plan(self.engine, &input, rows, capacity, &mut step))?;
            self.rows.set_len(step.n_rows as usize);
        }
        if step.n_rows == 0 {
            return Ok(false);
        }
        let before = emitted.len();
        let result = self.window(&step, input.now_ns, &mut now_ns, emitted);
        if result.is_err() {
            // Rows that left at a ramp have given their tokens; those of a deep window
            // will be run again.
            if step.ramp == DREX_NO_RAMP {
                emitted.truncate(before);
            }
            // SAFETY: an engine of ours, with a step.
            unsafe { drex_abandon(self.engine) };
        }
        result.map(|()| true)
    }

    fn window(
        &mut self,
        step: &drex_step,
        begin: u64,
        now_ns: &mut dyn FnMut() -> u64,
        emitted: &mut Vec<Token>,
    ) -> Result<(), Error> {
        let rows: Vec<Row> = self
            .rows
            .iter()
            .map(|r| Row {
                request: r.request,
                slot: r.slot,
                back: r.back,
            })
            .collect();
        let logits = &mut self.logits[..rows.len() * self.n_vocab];
        let model = self.model.pin_mut();
        model.run(step.layer_begin, step.layer_end, &rows, logits)?;
        if step.ramp == DREX_NO_RAMP {
            for (row, logits) in rows.iter().zip(logits.chunks(self.n_vocab)) {
                emitted.push(Token {
                    request: row.request,
                    token: self.model.pin_mut().sample(row, logits)?,
                    ramp: None,
                });
            }
        } else {
            let cells: Vec<u32> = rows.iter().map(|r| self.model.cell(r)).collect();
            let mut at = sized!(drex_logits);
            at.data = logits.as_ptr().cast();
            at.row_stride_bytes = (self.n_vocab * size_of::<f32>()) as u64;
            at.n_rows = step.n_rows;
            at.n_vocab = self.n_vocab as u32;
            let room = self.verdicts.capacity() as u32;
            // SAFETY: as many rows of logits, cells and verdicts as it says.
            unsafe {
                let verdicts = self.verdicts.as_mut_ptr();
                ok(drex_ramp(self.engine, &at, cells.as_ptr(), verdicts, room))?;
                self.verdicts.set_len(rows.len());
            }
            for (row, verdict) in rows.iter().zip(&self.verdicts) {
                if verdict.decision == DREX_DECISION_EXIT {
                    emitted.push(Token {
                        request: row.request,
                        token: verdict.token,
                        ramp: Some(step.ramp),
                    });
                }
            }
            // SAFETY: an engine of ours; the model's cache stays where it is.
            ok(unsafe { drex_fill(self.engine) })?;
        }
        let mut completion = sized!(drex_completion);
        completion.now_ns = now_ns();
        completion.duration_ns = completion.now_ns.saturating_sub(begin);
        // SAFETY: an engine of ours and a whole struct.
        ok(unsafe { drex_complete(self.engine, &completion) })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Before the model, whose tensors it may touch.
        // SAFETY: made by drex_create(), destroyed here only.
        unsafe { drex_destroy(self.engine) };
    }
}
