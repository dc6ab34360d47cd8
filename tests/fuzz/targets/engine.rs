// SPDX-License-Identifier: Apache-2.0

//! An engine and a host that may do anything: calls in any order, with any values in their structs. Pointers have the room
//! that the host says, as the header asks; everything else is free.

use std::collections::BTreeSet;
use std::ffi::{c_char, c_void};
use std::ptr::{null, null_mut};

use arbitrary::{Arbitrary, Result, Unstructured};
use drex::ffi::*;

use crate::{sized, succeeded};

/// Rows that the host has room for.
const ROOM: usize = 40;
/// Most slots of an engine here.
const SLOTS: usize = 64;
const CELLS: u32 = 8;
const LAYERS: usize = 12;
/// Bytes of a row of the arena, and most bytes between two.
const ROW: usize = 16;
const STRIDE: usize = 32;
/// Most bytes of a row of logits.
const LOGITS: usize = 512;

pub fn run(data: &[u8]) {
    // An end of the bytes is the end of the story.
    let _ = story(&mut Unstructured::new(data));
}

fn story(u: &mut Unstructured) -> Result<()> {
    let Some(mut host) = Host::new(u)? else {
        return Ok(());
    };
    let told = host.calls(u);
    host.end();
    told
}

/// A value that is right in 15 of 16 cases, and any value else.
fn mostly<'a, T: Arbitrary<'a>>(
    u: &mut Unstructured<'a>,
    right: impl FnOnce(&mut Unstructured<'a>) -> Result<T>,
) -> Result<T> {
    match u.ratio(1, 16)? {
        true => u.arbitrary(),
        false => right(u),
    }
}

/// A struct with as much room behind it as a library looks at that takes the struct for a longer one.
#[repr(C)]
struct Long<T> {
    value: T,
    tail: [u8; 4096],
}

impl<T> Long<T> {
    /// Whose size, the first field of all, is mostly right.
    fn new(u: &mut Unstructured, value: T) -> Result<Long<T>> {
        let tail = [u8::from(u.ratio(1, 4)?); 4096];
        let mut long = Long { value, tail };
        let size: u32 = mostly(u, |_| Ok(size_of::<T>() as u32))?;
        // SAFETY: structs of the ABI begin with their size.
        unsafe { long.at().cast::<u32>().write(size) };
        Ok(long)
    }

    fn at(&mut self) -> *mut T {
        (&raw mut *self).cast()
    }
}

struct Host {
    engine: *mut drex_engine,
    config: drex_config,
    requests: BTreeSet<u64>,
    now: u64,
    /// The step that is planned and not over.
    step: Option<drex_step>,
    rows: [drex_row; ROOM],
    logits: Vec<u8>,
    memory: Vec<[u8; 2 * ROW * CELLS as usize]>,
    arena: Vec<u8>,
    dense: Vec<u8>,
}

const NO_ROW: drex_row = drex_row {
    request: u64::MAX,
    slot: u32::MAX,
    back: u32::MAX,
};

impl Host {
    fn new(u: &mut Unstructured) -> Result<Option<Host>> {
        let mut ramps = [0u32; DREX_MAX_RAMPS];
        let mut at = 0;
        let n_ramps = u.int_in_range(0..=3u32)?;
        for ramp in &mut ramps[..n_ramps as usize] {
            at += u.int_in_range(1..=3)?;
            *ramp = mostly(u, |_| Ok(at))?;
        }
        let thresholds: [f32; DREX_MAX_RAMPS] = u.arbitrary()?;
        let mut c = sized!(drex_config);
        c.abi_version = DREX_ABI_VERSION;
        c.n_layers = mostly(u, |_| Ok(LAYERS as u32))?;
        c.n_ramps = n_ramps;
        c.ramp_layers = ramps.as_ptr();
        if u.arbitrary()? {
            c.ramp_thresholds = thresholds.as_ptr();
        }
        c.max_requests = u.int_in_range(0..=12)?;
        c.n_slots = u.int_in_range(0..=SLOTS as u32)?;
        c.max_batch = u.int_in_range(0..=16)?;
        c.policy = mostly(u, |u| u.int_in_range(DREX_POLICY_OFF..=DREX_POLICY_AUTO))?;
        c.metric = mostly(u, |u| u.int_in_range(0..=2))?;
        c.fill = mostly(u, |u| u.int_in_range(0..=3))?;
        c.threshold = mostly(u, |_| Ok(0.5))?;
        c.flush_rows = mostly(u, |u| u.int_in_range(0..=4))?;
        c.min_ready = mostly(u, |u| u.int_in_range(0..=4))?;
        c.max_hold_ns = u.arbitrary()?;
        c.token_deadline_ns = mostly(u, |u| u.int_in_range(0..=100_000))?;
        c.art_ratio = mostly(u, |_| Ok(f32::NAN))?;
        c.reserved = mostly(u, |_| Ok(0))?;
        c.quality = mostly(u, |u| Ok([0.0, 1.0, 0.9, 0.99][u.choose_index(4)?]))?;
        c.seed = u.arbitrary()?;
        c.max_pending = mostly(u, |u| u.int_in_range(0..=4))?;
        c.n_top = u.int_in_range(0..=9)?;
        c.max_pass_rows = u.int_in_range(0..=ROOM as u32)?;
        let mut engine = null_mut();
        let mut long = Long::new(u, c)?;
        // SAFETY: valid pointers, whose arrays have as many elements as may be told.
        let status = unsafe { drex_create(long.at(), &mut engine) };
        if !succeeded("drex_create", status) {
            assert!(engine.is_null(), "a failed call has an output");
            return Ok(None);
        }
        (c.ramp_layers, c.ramp_thresholds) = (null(), null());
        Ok(Some(Host {
            engine,
            config: c,
            requests: BTreeSet::new(),
            now: 0,
            step: None,
            rows: [NO_ROW; ROOM],
            logits: vec![0; ROOM * LOGITS + LOGITS],
            memory: vec![[7; _]; 2 * LAYERS],
            arena: vec![1; SLOTS * STRIDE],
            dense: vec![2; ROOM * STRIDE],
        }))
    }

    fn calls(&mut self, u: &mut Unstructured) -> Result<()> {
        while !u.is_empty() {
            match u.int_in_range(0..=23u8)? {
                0..=1 => self.add(u)?,
                2..=4 => self.ready(u)?,
                5 => self.remove(u)?,
                6 if u.arbitrary()? => self.audit(u)?,
                6 => self.settle(u)?,
                7..=9 => self.plan(u)?,
                10..=12 => self.ramp(u)?,
                13 => self.verify(u)?,
                14 => self.fill(u)?,
                15..=17 => self.complete(u)?,
                18 => self.abandon(),
                19 => self.observe(u)?,
                20 => self.bind(u)?,
                21 => self.copy_rows(u)?,
                22 => self.look(u)?,
                _ => self.speculate(u)?,
            }
            self.check();
        }
        Ok(())
    }

    fn id(&self, u: &mut Unstructured) -> Result<u64> {
        mostly(u, |u| u.int_in_range(0..=9))
    }

    /// Time goes on, and sometimes jumps, back as well.
    fn time(&mut self, u: &mut Unstructured) -> Result<u64> {
        self.now = match u.ratio(1, 32)? {
            true => u.arbitrary()?,
            false => self.now.saturating_add(u.int_in_range(0..=5000)?),
        };
        Ok(self.now)
    }

    fn add(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut c = sized!(drex_request_config);
        c.id = self.id(u)?;
        c.metric = mostly(u, |_| Ok(DREX_METRIC_DEFAULT))?;
        c.fill = mostly(u, |u| {
            Ok([0, 1, 2, 3, DREX_FILL_DEFAULT][u.choose_index(5)?])
        })?;
        c.threshold = mostly(u, |_| Ok(f32::NAN))?;
        c.token_deadline_ns = u.arbitrary::<u16>()?.into();
        c.priority = mostly(u, |u| u.int_in_range(-2..=2))?;
        c.reserved = mostly(u, |_| Ok(0))?;
        c.quality = mostly(u, |u| Ok([0.0, 1.0, 0.9, 0.99][u.choose_index(4)?]))?;
        c.request_deadline_ns = u.arbitrary::<u32>()?.into();
        c.max_tokens = u.arbitrary()?;
        let mut long = Long::new(u, c)?;
        // SAFETY: valid pointers.
        let status = unsafe { drex_request_add(self.engine, long.at()) };
        if succeeded("drex_request_add", status) {
            assert!(self.requests.insert(c.id), "id {} twice", c.id);
        } else if status == DREX_ERROR_DUPLICATE_REQUEST {
            assert!(self.requests.contains(&c.id));
        }
        Ok(())
    }

    fn ready(&mut self, u: &mut Unstructured) -> Result<()> {
        let (id, now) = (self.id(u)?, self.time(u)?);
        // SAFETY: a handle.
        let status = unsafe { drex_request_ready(self.engine, id, u.arbitrary()?, now) };
        self.knows(id, "drex_request_ready", status);
        Ok(())
    }

    /// A request is unknown to the engine exactly if it is to the host.
    fn knows(&self, id: u64, function: &str, status: drex_status) -> bool {
        let unknown = status == DREX_ERROR_UNKNOWN_REQUEST;
        assert_eq!(unknown, !self.requests.contains(&id), "{function}({id})");
        succeeded(function, status)
    }

    fn remove(&mut self, u: &mut Unstructured) -> Result<()> {
        let id = self.id(u)?;
        // SAFETY: a handle.
        let status = unsafe { drex_request_remove(self.engine, id) };
        assert_eq!(
            self.knows(id, "drex_request_remove", status),
            self.requests.remove(&id)
        );
        Ok(())
    }

    fn settle(&mut self, u: &mut Unstructured) -> Result<()> {
        let (id, now) = (self.id(u)?, self.time(u)?);
        let mut n = u32::MAX;
        // SAFETY: valid pointers.
        let status = unsafe { drex_request_settle(self.engine, id, now, &mut n) };
        let settled = self.knows(id, "drex_request_settle", status);
        assert_eq!(settled, n != u32::MAX);
        Ok(())
    }

    fn audit(&mut self, u: &mut Unstructured) -> Result<()> {
        let id = self.id(u)?;
        let (tokens, differing) = (u.arbitrary()?, u.arbitrary()?);
        let mut info = sized!(drex_request_info);
        // SAFETY: valid pointers.
        let due = unsafe { drex_request_get(self.engine, id, &mut info) } == DREX_OK
            && info.audit_due == 1;
        // SAFETY: any numbers may come.
        let status = unsafe { drex_request_audit(self.engine, id, tokens, differing) };
        if self.knows(id, "drex_request_audit", status) {
            assert!(due && differing <= tokens);
        }
        Ok(())
    }

    fn plan(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut input = sized!(drex_plan_input);
        input.now_ns = self.time(u)?;
        input.n_prompt_rows = match u.ratio(1, 3)? {
            true => mostly(u, |u| u.int_in_range(1..=50))?,
            false => 0,
        };
        let capacity = u.int_in_range(0..=ROOM as u32)?;
        let mut step = sized!(drex_step);
        step.n_rows = u32::MAX;
        self.rows = [NO_ROW; ROOM];
        let (mut input, mut step) = (Long::new(u, input)?, Long::new(u, step)?);
        // SAFETY: room for `capacity` rows.
        let status = unsafe {
            let rows = self.rows.as_mut_ptr();
            drex_plan(self.engine, input.at(), rows, capacity, step.at())
        };
        let step = step.value;
        let unwritten = |row: &drex_row| row.slot == u32::MAX;
        if !succeeded("drex_plan", status) {
            assert_eq!(step.n_rows, u32::MAX, "a failed plan has an output");
            assert!(self.rows.iter().all(unwritten), "a failed plan has rows");
            return Ok(());
        }
        assert!(self.step.is_none(), "a step was planned within a step");
        let n = step.n_rows as usize;
        assert!(n <= capacity as usize && self.rows[n..].iter().all(unwritten));
        let slots: BTreeSet<u32> = self.rows[..n].iter().map(|r| r.slot).collect();
        assert_eq!(slots.len(), n, "an arena row twice in a step");
        assert!(slots.iter().all(|&s| s < self.config.n_slots));
        for row in &self.rows[..n] {
            assert!(self.requests.contains(&row.request));
        }
        if n > 0 || step.n_prompt_rows > 0 {
            assert!(step.layer_begin < step.layer_end && step.layer_end <= self.config.n_layers);
            self.step = Some(step);
        }
        Ok(())
    }

    fn n_rows(&self) -> u32 {
        self.step.map_or(0, |s| s.n_rows)
    }

    fn ramp(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut l = sized!(drex_logits);
        l.dtype = mostly(u, |u| u.int_in_range(0..=2))?;
        let bytes = if l.dtype == DREX_DTYPE_F32 { 4 } else { 2 };
        l.n_vocab = u.int_in_range(0..=(LOGITS / 4) as u32)?;
        l.row_stride_bytes = match u.ratio(1, 16)? {
            true => u.int_in_range(0..=LOGITS as u64)?,
            false => bytes * u64::from(l.n_vocab),
        };
        let right = self.n_rows();
        l.n_rows = match u.ratio(1, 16)? {
            true => u.int_in_range(0..=ROOM as u32)?,
            false => right,
        };
        l.n_top = u.int_in_range(0..=9)?;
        l.enqueued = u.ratio(1, 16)?.into();
        // One value of each row differs, so that rows are sure, unsure, or not finite.
        self.logits.fill(0);
        if l.dtype == DREX_DTYPE_F32 && l.n_vocab > 0 {
            for row in 0..ROOM {
                let value: f32 = match u.int_in_range(0..=9u8)? {
                    0 => u.arbitrary()?,
                    n if n % 2 == 0 => 20.0,
                    _ => 0.5,
                };
                let at = row * 4 * l.n_vocab as usize;
                self.logits[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            }
        }
        l.data = self.logits.as_ptr().cast();
        if u.ratio(1, 4)? {
            l.confirm = Some(confirm);
        }
        let mut cells = [0u32; ROOM];
        for cell in &mut cells {
            *cell = mostly(u, |u| u.int_in_range(0..=CELLS - 1))?;
        }
        let cells = match u.ratio(1, 8)? {
            true => null(),
            false => cells.as_ptr(),
        };
        let capacity = u.int_in_range(0..=ROOM as u32)?.max(right);
        let mut out = [drex_verdict {
            decision: u32::MAX,
            token: 0,
            confidence: 0.0,
            forced: 0,
        }; ROOM];
        let mut long = Long::new(u, l)?;
        // SAFETY: `logits` has ROOM rows of LOGITS bytes and a row more, `cells` and `out` have ROOM elements.
        let status =
            unsafe { drex_ramp(self.engine, long.at(), cells, out.as_mut_ptr(), capacity) };
        let written = out.iter().filter(|v| v.decision != u32::MAX).count();
        if !succeeded("drex_ramp", status) {
            assert_eq!(written, 0, "a failed ramp has verdicts");
            return Ok(());
        }
        assert_eq!(written, right as usize);
        for (v, row) in out.iter().zip(&self.rows).take(written) {
            let gone = v.decision == DREX_DECISION_GONE;
            assert!(v.decision <= DREX_DECISION_PENDING);
            assert!(gone || self.requests.contains(&row.request));
            assert!(v.forced <= 1);
            if v.decision == DREX_DECISION_EXIT {
                assert!(v.token >= 0 && (v.token as u32) < l.n_vocab);
            }
        }
        Ok(())
    }

    fn verify(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut agrees = [0u8; ROOM];
        for a in &mut agrees {
            *a = mostly(u, |u| u.int_in_range(0..=2))?;
        }
        let right = self.n_rows();
        let n = match u.ratio(1, 16)? {
            true => u.int_in_range(0..=ROOM as u32)?,
            false => right,
        };
        let mut out = [u32::MAX; ROOM];
        // SAFETY: both arrays have ROOM elements.
        let status = unsafe {
            drex_verify(
                self.engine,
                agrees.as_ptr(),
                n,
                out.as_mut_ptr(),
                u.int_in_range(0..=ROOM as u32)?,
            )
        };
        let written = out.iter().filter(|&&d| d != u32::MAX).count();
        let expected = if succeeded("drex_verify", status) {
            right as usize
        } else {
            0
        };
        assert_eq!(written, expected);
        Ok(())
    }

    fn fill(&mut self, u: &mut Unstructured) -> Result<()> {
        // SAFETY: a handle; the bound tensors live as long as the engine.
        unsafe {
            match u.int_in_range(0..=3u8)? {
                0 => succeeded("drex_fill_plan", drex_fill_plan(self.engine)),
                1 => {
                    let status = drex_fill_enqueue(self.engine, null_mut());
                    succeeded("drex_fill_enqueue", status)
                }
                _ => succeeded("drex_fill", drex_fill(self.engine)),
            }
        };
        Ok(())
    }

    fn complete(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut c = sized!(drex_completion);
        c.reserved = mostly(u, |_| Ok(0))?;
        c.now_ns = self.time(u)?;
        c.duration_ns = mostly(u, |u| u.int_in_range(0..=1_000_000))?;
        c.n_kv = mostly(u, |u| u.int_in_range(0..=4096))?;
        let mut long = Long::new(u, c)?;
        // SAFETY: valid pointers.
        let status = unsafe { drex_complete(self.engine, long.at()) };
        if succeeded("drex_complete", status) {
            assert!(self.step.take().is_some(), "there was no step to complete");
        }
        Ok(())
    }

    fn abandon(&mut self) {
        // SAFETY: a handle.
        let status = unsafe { drex_abandon(self.engine) };
        let abandoned = succeeded("drex_abandon", status);
        assert_eq!(abandoned, self.step.take().is_some());
    }

    fn observe(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut o = sized!(drex_observation);
        o.n_rows = mostly(u, |u| u.int_in_range(1..=8))?;
        o.layer_begin = mostly(u, |_| Ok(0))?;
        o.layer_end = mostly(u, |_| Ok(LAYERS as u32))?;
        o.duration_ns = u.arbitrary()?;
        o.n_kv = u.arbitrary()?;
        o.n_prompt_rows = mostly(u, |_| Ok(0))?;
        let mut done = u32::MAX;
        let mut long = Long::new(u, o)?;
        // SAFETY: valid pointers.
        unsafe {
            succeeded("drex_observe", drex_observe(self.engine, long.at()));
            let windows = u.int_in_range(0..=200)?;
            let status = drex_replan(self.engine, windows, &mut done);
            assert_eq!(succeeded("drex_replan", status), done != u32::MAX);
        }
        Ok(())
    }

    fn bind(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut layers = [sized!(drex_kv_layer); LAYERS];
        let stride: u64 = mostly(u, |_| Ok(ROW as u64))?;
        for (i, layer) in layers.iter_mut().enumerate() {
            layer.n_cells = CELLS;
            layer.k = self.memory[2 * i].as_mut_ptr().cast();
            layer.v = self.memory[2 * i + 1].as_mut_ptr().cast();
            // Tensors stay within their memory: a stride may be short or odd, not long.
            layer.k_row_bytes = mostly(u, |_| Ok(ROW as u64))?;
            layer.k_cell_stride = stride.min(2 * ROW as u64);
            layer.v_row_bytes = ROW as u64;
            layer.v_cell_stride = ROW as u64;
            if u.ratio(1, 8)? {
                (layer.v_elem_bytes, layer.v_elem_stride) = (2, 2 * u64::from(CELLS));
                layer.v_cell_stride = 0;
            }
            if layer.k_row_bytes > ROW as u64 {
                layer.k_row_bytes %= 2 * ROW as u64;
                layer.k_cell_stride = layer.k_cell_stride.min(ROW as u64);
            }
        }
        let n = match u.ratio(1, 8)? {
            true => u.int_in_range(0..=LAYERS as u32)?,
            false => self.config.n_layers.min(LAYERS as u32),
        };
        let at = match n {
            0 => null(),
            _ => layers.as_ptr(),
        };
        // SAFETY: n layers, whose tensors live as long as the engine.
        let status = unsafe { drex_bind_kv(self.engine, at, n) };
        if succeeded("drex_bind_kv", status) {
            assert!(self.step.is_none(), "tensors were bound within a step");
        }
        Ok(())
    }

    fn copy_rows(&mut self, u: &mut Unstructured) -> Result<()> {
        let mut a = sized!(drex_arena);
        a.reserved = mostly(u, |_| Ok(0))?;
        a.arena = self.arena.as_mut_ptr().cast();
        a.dense = self.dense.as_mut_ptr().cast();
        a.row_bytes = u.int_in_range(0..=ROW as u64)?;
        a.arena_stride_bytes = u.int_in_range(0..=STRIDE as u64)?;
        a.dense_stride_bytes = u.int_in_range(0..=STRIDE as u64)?;
        let mut long = Long::new(u, a)?;
        // SAFETY: arena and dense rows lie STRIDE apart at most, for as many rows as there can be.
        unsafe {
            match u.arbitrary()? {
                true => succeeded("drex_gather", drex_gather(self.engine, long.at())),
                false => succeeded("drex_scatter", drex_scatter(self.engine, long.at())),
            }
        };
        Ok(())
    }

    fn look(&mut self, u: &mut Unstructured) -> Result<()> {
        let (mut text, mut n) = (vec![0u8; 1 << 15], 0usize);
        let room = mostly(u, |_| Ok(text.len() as u16))? as usize;
        let out = text.as_mut_ptr().cast();
        let e = self.engine;
        // SAFETY: as much room as is said.
        unsafe {
            match u.int_in_range(0..=6u8)? {
                0 => succeeded("drex_snapshot", drex_snapshot(e, out, room, &mut n)),
                1 => {
                    let status = drex_metrics_text(e, null(), out, room, &mut n);
                    succeeded("drex_metrics_text", status)
                }
                2 => {
                    let status = drex_profile_save(e, out, room, &mut n);
                    let saved = succeeded("drex_profile_save", status) && n < room;
                    if saved {
                        text[n] = 0;
                        let status = drex_profile_load(e, text.as_ptr().cast());
                        assert!(
                            succeeded("drex_profile_load", status),
                            "what was saved is refused: {}",
                            crate::last_error()
                        );
                    }
                    saved
                }
                3 => {
                    let id = self.id(u)?;
                    let mut info = sized!(drex_request_info);
                    let status = drex_request_get(e, id, &mut info);
                    self.knows(id, "drex_request_get", status)
                }
                4 => {
                    let status = drex_trace_start(e, u.arbitrary::<u8>()?.into());
                    succeeded("drex_trace_start", status)
                }
                5 => {
                    let status = drex_trace_write(e, Some(sink), null_mut());
                    succeeded("drex_trace_write", status);
                    u.arbitrary()? && succeeded("drex_trace_stop", drex_trace_stop(e))
                }
                _ => {
                    let mut top = [drex_top {
                        logit: 0.0,
                        token: -1,
                    }; 16];
                    let mut n = u32::MAX;
                    let (row, room) = (u.arbitrary::<u8>()?, u.int_in_range(0..=16)?);
                    let status = drex_top_get(e, row.into(), top.as_mut_ptr(), room, &mut n);
                    let got = succeeded("drex_top_get", status);
                    assert!(!got || n <= room);
                    got
                }
            }
        };
        Ok(())
    }

    fn speculate(&mut self, u: &mut Unstructured) -> Result<()> {
        let (deep, draft): ([f32; 4], [f32; 4]) = (u.arbitrary()?, u.arbitrary()?);
        let mut token = i32::MIN;
        let draft = match u.arbitrary()? {
            true => draft.as_ptr(),
            false => null(),
        };
        let n = u.int_in_range(0..=4)?;
        // SAFETY: n probabilities each.
        let status = unsafe {
            drex_speculate(
                deep.as_ptr(),
                draft,
                n,
                mostly(u, |u| u.int_in_range(-1..=4))?,
                u.arbitrary()?,
                u.arbitrary()?,
                &mut token,
            )
        };
        match succeeded("drex_speculate", status) {
            true => assert!(token >= -1 && token < n as i32, "{token} of {n}"),
            false => assert_eq!(token, i32::MIN),
        }
        Ok(())
    }

    fn stats(&self) -> drex_stats {
        let mut s = sized!(drex_stats);
        // SAFETY: valid pointers.
        let status = unsafe { drex_stats_get(self.engine, &mut s) };
        assert!(succeeded("drex_stats_get", status));
        s
    }

    fn check(&self) {
        let s = self.stats();
        assert_eq!(s.requests, self.requests.len() as u64);
        assert!(s.slots_free <= u64::from(self.config.n_slots));
        assert_eq!(s.held_rows, s.held_rows_at.iter().sum::<u64>());
        assert!(s.drafts_accepted <= s.drafts);
        let forces = [DREX_POLICY_EAGER, DREX_POLICY_MEDIAN, DREX_POLICY_MEAN];
        assert!(forces.contains(&self.config.policy) || s.involuntary_exits == 0);
    }

    /// Every request goes, and everything is as it was at the start.
    fn end(mut self) {
        if self.step.is_some() {
            self.abandon();
        }
        for id in std::mem::take(&mut self.requests) {
            // SAFETY: a handle.
            let status = unsafe { drex_request_remove(self.engine, id) };
            assert!(succeeded("drex_request_remove", status));
        }
        let s = self.stats();
        assert_eq!(s.slots_free, u64::from(self.config.n_slots));
        assert_eq!((s.held_rows, s.pending_rows, s.requests), (0, 0, 0));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: a handle.
        unsafe { drex_destroy(self.engine) };
    }
}

unsafe extern "C" fn confirm(_: *mut c_void, row: u32, token: i32) -> u32 {
    (row + token as u32) % 3
}

unsafe extern "C" fn sink(_: *mut c_void, bytes: *const c_char, n: usize) {
    // SAFETY: the library says how many bytes there are.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), n) };
    std::hint::black_box(bytes.iter().map(|&b| u64::from(b)).sum::<u64>());
}
