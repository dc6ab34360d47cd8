// SPDX-License-Identifier: Apache-2.0

//! The functions of the C ABI. Their documentation is the header's.

#![allow(clippy::missing_safety_doc)] // the header states each contract, for C

use std::ffi::{CStr, c_char};
use std::mem::{offset_of, size_of};

use super::device::{self, convert_logits};
use super::entry::{self, call, with};
use super::error::{self, Fault};
use super::handle;
use super::types::*;
use crate::core::config::{Config, Fill};
use crate::core::counters::{Miss, Reason};
use crate::core::engine::Agrees;
use crate::core::error::Error;
use crate::core::memory;
use crate::core::metric::Metric;
use crate::core::policy::{Decision, Policy};
use crate::core::request::{RequestConfig, State};
use crate::core::speculate::speculate;
use crate::device::kv::{Layer, Layout, Side};
use crate::instance::{Instance, Launch};

const STATUS_NAMES: [&CStr; 15] = [
    c"DREX_OK",
    c"DREX_ERROR_NULL_ARGUMENT",
    c"DREX_ERROR_INVALID_ARGUMENT",
    c"DREX_ERROR_ABI_MISMATCH",
    c"DREX_ERROR_STRUCT_SIZE",
    c"DREX_ERROR_INVALID_HANDLE",
    c"DREX_ERROR_HANDLE_BUSY",
    c"DREX_ERROR_UNKNOWN_REQUEST",
    c"DREX_ERROR_DUPLICATE_REQUEST",
    c"DREX_ERROR_CALL_ORDER",
    c"DREX_ERROR_CAPACITY",
    c"DREX_ERROR_UNSUPPORTED",
    c"DREX_ERROR_DEVICE",
    c"DREX_ERROR_PANIC",
    c"DREX_ERROR_MEMORY",
];

const STATUS_TEXTS: [&CStr; 15] = [
    c"success",
    c"a pointer that may not be NULL is NULL",
    c"a value is out of range, or clashes with another one",
    c"the program was built for another version of the interface",
    c"a struct's size is too small, or it uses fields that this library does not know",
    c"the handle was never created, or has been destroyed",
    c"another thread is inside a call on this handle",
    c"no request alive has this id",
    c"a request with this id is alive already",
    c"the call does not fit the calls before it",
    c"something of fixed size is full, or an array is too short",
    c"the value is known, and this version cannot serve it",
    c"the device failed",
    c"a bug in drex was caught; destroy the handle",
    c"there is not as much memory as the call asked for",
];

/// The library's version, such as "0.1.0". Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn drex_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The library's DREX_ABI_VERSION, to compare with the header's.
#[unsafe(no_mangle)]
pub extern "C" fn drex_abi_version() -> u32 {
    DREX_ABI_VERSION
}

/// A status by its name, such as "DREX_ERROR_CAPACITY"; "DREX_ERROR_UNKNOWN"
/// for a number that this version does not know. Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn drex_status_name(status: drex_status) -> *const c_char {
    usize::try_from(status)
        .ok()
        .and_then(|i| STATUS_NAMES.get(i))
        .unwrap_or(&c"DREX_ERROR_UNKNOWN")
        .as_ptr()
}

/// The general meaning of a status, such as "another thread is inside a call on
/// this handle"; "unknown status" for a number that this version does not
/// know. drex_last_error() says what it was in particular. Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn drex_status_text(status: drex_status) -> *const c_char {
    usize::try_from(status)
        .ok()
        .and_then(|i| STATUS_TEXTS.get(i))
        .unwrap_or(&c"unknown status")
        .as_ptr()
}

/// The text of the last call that failed on the calling thread, in UTF-8,
/// such as "drex_create: threshold is NaN; expected a finite number >= 0".
/// Empty before the first; a call that succeeds leaves it alone. Valid until
/// the next failure on this thread, or the thread's end. Never NULL; not to
/// be freed.
#[unsafe(no_mangle)]
pub extern "C" fn drex_last_error() -> *const c_char {
    error::last()
}

/// A policy's name in lower case, such as "hold"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_policy_name(policy: drex_policy) -> *const c_char {
    name(Policy::from_number(policy).map(Policy::c_name))
}

/// A metric's name in lower case, such as "gap"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_metric_name(metric: drex_metric) -> *const c_char {
    name(Metric::from_number(metric).map(Metric::c_name))
}

/// A fill mode's name in lower case, such as "copy"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_fill_name(fill: drex_fill_mode) -> *const c_char {
    name(Fill::from_number(fill).map(Fill::c_name))
}

/// A decision's name in lower case, such as "exit"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_decision_name(decision: drex_decision) -> *const c_char {
    name(Decision::from_number(decision).map(Decision::c_name))
}

/// A flush reason's name in lower case, such as "deadline"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_flush_reason_name(reason: drex_flush_reason) -> *const c_char {
    name(Reason::from_number(reason).map(Reason::c_name))
}

/// A miss reason's name in lower case, such as "queue"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_miss_reason_name(reason: drex_miss_reason) -> *const c_char {
    name(Miss::from_number(reason).map(Miss::c_name))
}

fn name(name: Option<&'static CStr>) -> *const c_char {
    name.map_or(std::ptr::null(), CStr::as_ptr)
}

/// The policy of a name, exactly as drex_policy_name() writes it.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_policy_from_name(
    name: *const c_char,
    out: *mut drex_policy,
) -> drex_status {
    call("drex_policy_from_name", || {
        let names = Policy::ALL.map(Policy::c_name);
        // SAFETY: the caller's contract.
        unsafe { from_name(&names, name, out) }
    })
}

/// The metric of a name, exactly as drex_metric_name() writes it.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_metric_from_name(
    name: *const c_char,
    out: *mut drex_metric,
) -> drex_status {
    call("drex_metric_from_name", || {
        let names = Metric::ALL.map(Metric::c_name);
        // SAFETY: the caller's contract.
        unsafe { from_name(&names, name, out) }
    })
}

/// The fill mode of a name, exactly as drex_fill_name() writes it.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_fill_from_name(
    name: *const c_char,
    out: *mut drex_fill_mode,
) -> drex_status {
    call("drex_fill_from_name", || {
        let names = Fill::ALL.map(Fill::c_name);
        // SAFETY: the caller's contract.
        unsafe { from_name(&names, name, out) }
    })
}

unsafe fn from_name(
    names: &[&'static CStr],
    name: *const c_char,
    out: *mut u32,
) -> Result<(), Fault> {
    if name.is_null() {
        return Err(Fault::Null("name"));
    }
    if out.is_null() {
        return Err(Fault::Null("out"));
    }
    // SAFETY: the caller passes a C string.
    let name = unsafe { CStr::from_ptr(name) };
    match names.iter().position(|n| *n == name) {
        Some(i) => {
            // SAFETY: not NULL.
            unsafe { out.write_unaligned(i as u32) };
            Ok(())
        }
        None => {
            let names: Vec<_> = names.iter().map(|n| n.to_string_lossy()).collect();
            Err(Fault::Name {
                what: "name",
                got: name.to_string_lossy().chars().take(64).collect(),
                expected: names.join(", "),
            })
        }
    }
}

fn metric(value: u32, expected: &'static str) -> Result<Metric, Error> {
    Metric::from_number(value).ok_or(Error::int("metric", value, expected))
}

fn fill(value: u32, expected: &'static str) -> Result<Fill, Error> {
    Fill::from_number(value).ok_or(Error::int("fill", value, expected))
}

fn reserved(value: u32) -> Result<(), Error> {
    match value {
        0 => Ok(()),
        _ => Err(Error::int("reserved", value, "0")),
    }
}

/// Makes an engine. What serving needs is allocated here; chapter 3 says which
/// calls allocate nothing.
///
/// config  copied, with what it points to
/// out     receives the engine; the caller owns it and ends it with
///         drex_destroy()
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, ABI_MISMATCH, INVALID_ARGUMENT; MEMORY;
/// CAPACITY when 256 engines are alive in this process; with DREX_DEVICE_CUDA also
/// UNSUPPORTED where there is no CUDA driver, CALL_ORDER where no context is
/// current, and DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_create(
    config: *const drex_config,
    out: *mut *mut drex_engine,
) -> drex_status {
    call("drex_create", || {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("config", config)? };
        if out.is_null() {
            return Err(Fault::Null("out"));
        }
        if c.abi_version != DREX_ABI_VERSION {
            return Err(Fault::Abi(c.abi_version));
        }
        // SAFETY: the caller's contract.
        let config = unsafe { convert(&c)? };
        let (place, limits) = device::convert(&c)?;
        let instance = Instance::on(place, config, limits)?;
        if instance.watch.on() {
            instance.watch.created(&instance.engine);
        }
        let handle = handle::ENGINES.insert(instance)?;
        // SAFETY: not NULL.
        unsafe { out.write_unaligned(handle) };
        Ok(())
    })
}

/// # Safety
/// The arrays are as long as the fields say.
unsafe fn convert(c: &drex_config) -> Result<Config, Fault> {
    if c.ramp_layers.is_null() {
        return Err(Fault::Null("ramp_layers"));
    }
    if !(1..=DREX_MAX_RAMPS as u32).contains(&c.n_ramps) {
        return Err(Error::int("n_ramps", c.n_ramps, "1..16").into());
    }
    let n = c.n_ramps as usize;
    // SAFETY: `n_ramps` numbers, by the caller's contract.
    let ramp_layers = (0..n).map(|i| unsafe { c.ramp_layers.add(i).read_unaligned() });
    crate::core::config::check_threshold("threshold", c.threshold)?;
    let thresholds = if c.ramp_thresholds.is_null() {
        vec![c.threshold; n]
    } else {
        // SAFETY: as above.
        let at = |i| unsafe { c.ramp_thresholds.add(i).read_unaligned() };
        (0..n).map(at).collect()
    };
    let policy = Policy::from_number(c.policy);
    reserved(c.reserved)?;
    Ok(Config {
        n_layers: c.n_layers,
        ramp_layers: ramp_layers.collect(),
        thresholds,
        n_slots: c.n_slots,
        max_requests: c.max_requests,
        max_batch: c.max_batch,
        max_pass_rows: c.max_pass_rows,
        policy: policy.ok_or(Error::int("policy", c.policy, "DREX_POLICY_* (0..8)"))?,
        metric: metric(c.metric, "DREX_METRIC_* (0..2)")?,
        fill: fill(c.fill, "DREX_FILL_* (0..3)")?,
        max_pending: c.max_pending,
        flush_rows: c.flush_rows,
        min_ready: c.min_ready,
        max_hold_ns: c.max_hold_ns,
        token_deadline_ns: c.token_deadline_ns,
        seed: c.seed,
        art_ratio: (!c.art_ratio.is_nan()).then_some(c.art_ratio),
    })
}

/// Ends an engine, in any state, and frees what it holds. The host's tensors
/// are not touched. NULL is fine.
///
/// Errors: INVALID_HANDLE for one that is destroyed already; HANDLE_BUSY
/// while another thread is inside, and then the engine lives on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_destroy(engine: *mut drex_engine) -> drex_status {
    call("drex_destroy", || {
        if engine.is_null() {
            return Ok(());
        }
        let instance = handle::ENGINES.remove(engine)?;
        if instance.watch.on() {
            instance.watch.destroyed(&instance.engine);
        }
        Ok(())
    })
}

/// Names the K/V cache that drex_fill() works on. Binding again replaces it.
///
/// Without it, filling the holes of exited rows is the host's business.
///
/// layers    [n_layers] copied; the tensors stay the host's. The size of the
///           first element is the distance to the next. NULL with n_layers =
///           0 unbinds.
/// n_layers  drex_config.n_layers
///
/// Layers before the first ramp's last one are not looked at. The others need
/// K rows of one size and V rows of one size and layout, and tensors of their
/// own.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; MEMORY; UNSUPPORTED,
/// with the layers named, where state-copy cannot work; CALL_ORDER while a step
/// is planned; DEVICE. After a failure, what was bound before still is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_bind_kv(
    engine: *mut drex_engine,
    layers: *const drex_kv_layer,
    n_layers: u32,
) -> drex_status {
    with("drex_bind_kv", engine, |instance| {
        if layers.is_null() {
            if n_layers != 0 {
                return Err(Fault::Null("layers"));
            }
            return Ok(instance.bind_kv(None)?);
        }
        let expected = instance.engine.config().n_layers;
        if n_layers != expected {
            return Err(Error::Conflict {
                field: "n_layers",
                index: None,
                value: n_layers.into(),
                other: "the engine's n_layers",
                other_value: expected.into(),
                why: "every layer has one element",
            }
            .into());
        }
        // SAFETY: there is at least one element, which begins with its size.
        let first = unsafe { entry::read("layers", layers) }.map_err(|e| e.at(0))?;
        let stride = first.size as usize;
        let mut converted = memory::room(n_layers as usize)?;
        for i in 0..n_layers as usize {
            // SAFETY: `n_layers` elements, `stride` bytes apart.
            let layer = unsafe { entry::read("layers", layers.byte_add(i * stride)) };
            let layer = layer.map_err(|e| e.at(i))?;
            converted.push(kv_layer(&layer).map_err(|e| e.at(i))?);
        }
        Ok(instance.bind_kv(Some(converted))?)
    })
}

fn kv_layer(l: &drex_kv_layer) -> Result<Layer, Error> {
    let int = |field, value: u64| {
        usize::try_from(value).map_err(|_| Error::int(field, value, "a number of bytes"))
    };
    let v = if l.v_elem_bytes == 0 {
        Layout::Rows {
            bytes: int("layers.v_row_bytes", l.v_row_bytes)?,
            stride: int("layers.v_cell_stride", l.v_cell_stride)?,
        }
    } else {
        if !l.v_row_bytes.is_multiple_of(l.v_elem_bytes) {
            return Err(Error::Conflict {
                field: "layers.v_row_bytes",
                index: None,
                value: l.v_row_bytes,
                other: "v_elem_bytes",
                other_value: l.v_elem_bytes,
                why: "a row is a whole number of elements",
            });
        }
        Layout::Transposed {
            n: int("layers.v_row_bytes", l.v_row_bytes / l.v_elem_bytes)?,
            elem: int("layers.v_elem_bytes", l.v_elem_bytes)?,
            stride: int("layers.v_elem_stride", l.v_elem_stride)?,
        }
    };
    Ok(Layer {
        n_cells: l.n_cells,
        k: Side {
            data: l.k.cast(),
            layout: Layout::Rows {
                bytes: int("layers.k_row_bytes", l.k_row_bytes)?,
                stride: int("layers.k_cell_stride", l.k_cell_stride)?,
            },
        },
        v: Side {
            data: l.v.cast(),
            layout: v,
        },
    })
}

/// Makes a request known. It is IDLE: say drex_request_ready() when its
/// prompt is done and its first token can run.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE; INVALID_ARGUMENT, also for a fill mode
/// that n_slots or max_batch leave no room for; DUPLICATE_REQUEST; CAPACITY
/// when max_requests are alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_add(
    engine: *mut drex_engine,
    request: *const drex_request_config,
) -> drex_status {
    with("drex_request_add", engine, |instance| {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("request", request)? };
        let metric = match c.metric {
            DREX_METRIC_DEFAULT => None,
            m => Some(metric(m, "DREX_METRIC_* (0..2) or DREX_METRIC_DEFAULT")?),
        };
        let fill = match c.fill {
            DREX_FILL_DEFAULT => None,
            f => Some(fill(f, "DREX_FILL_* (0..3) or DREX_FILL_DEFAULT")?),
        };
        reserved(c.reserved)?;
        instance.engine.add(RequestConfig {
            id: c.id,
            metric,
            threshold: (!c.threshold.is_nan()).then_some(c.threshold),
            fill,
            token_deadline_ns: c.token_deadline_ns,
            request_deadline_ns: c.request_deadline_ns,
            max_tokens: c.max_tokens,
            priority: c.priority,
        })?;
        if instance.watch.on() {
            instance.watch.request(c.id, "added");
        }
        Ok(())
    })
}

/// The request's next token can run: IDLE becomes READY.
///
/// id      of a request alive and IDLE
/// n_kv    KV cells that the row attends over, 0 if unknown; a hint that this
///         version does not use: see drex_completion.n_kv
/// now_ns  now; the first call starts the clock of the request's deadline
///
/// A row that exited may be made ready again before drex_complete().
///
/// Errors: UNKNOWN_REQUEST; CALL_ORDER when it is not IDLE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_ready(
    engine: *mut drex_engine,
    id: u64,
    n_kv: u32,
    now_ns: u64,
) -> drex_status {
    with("drex_request_ready", engine, |instance| {
        let _ = n_kv;
        Ok(instance.engine.ready(id, now_ns)?)
    })
}

/// Forgets a request: finished, or cancelled, in any state, also between plan
/// and complete. Its id is free at once. A held row leaves the buffer and its
/// arena row is free at once; the arena row of a row in the planned step is
/// free when the step ends, and drex_ramp() and drex_verify() say
/// DREX_DECISION_GONE for it. Where neither is called, because the window ends at
/// n_layers and has no drafts, the host passes over its logits by itself.
/// The hole of a row that exited and was not filled yet is not filled.
///
/// Errors: UNKNOWN_REQUEST.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_remove(engine: *mut drex_engine, id: u64) -> drex_status {
    with("drex_request_remove", engine, |instance| {
        Ok(instance.remove(id)?)
    })
}

/// A request's state and counters.
///
/// out  its size is set by the caller
///
/// Errors: UNKNOWN_REQUEST, NULL_ARGUMENT, STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_get(
    engine: *const drex_engine,
    id: u64,
    out: *mut drex_request_info,
) -> drex_status {
    with("drex_request_get", engine, |instance| {
        // SAFETY: the caller's contract.
        let size = unsafe { entry::writable("out", out)? };
        let r = instance.engine.request(id)?;
        let info = drex_request_info {
            size,
            state: match r.state {
                State::Idle => DREX_REQUEST_IDLE,
                State::Ready => DREX_REQUEST_READY,
                State::Running => DREX_REQUEST_RUNNING,
                State::Held => DREX_REQUEST_HELD,
            },
            ramp: if r.state == State::Held {
                r.ramp
            } else {
                DREX_NO_RAMP
            },
            slot: r.slot,
            tokens: r.tokens,
            exits: r.exits,
            involuntary_exits: r.involuntary_exits,
            involuntary_stays: r.involuntary_stays.into(),
            held_ns: r.held_ns,
            deadline_misses: r.deadline_misses.into(),
            last_confidence: r.last_confidence,
            n_pending: r.pending.len(),
        };
        // SAFETY: checked above.
        unsafe { entry::write(out, &info) };
        Ok(())
    })
}

/// Chooses what to run next: a window of layers and its rows.
///
/// input     the clock, and the prompt rows that wait
/// rows      [capacity] receives drex_step.n_rows rows, in the order in which
///           the host must run them; the rest is not written
/// capacity  at least 1; give max_batch. Less cuts the step short.
/// out       its size is set by the caller
///
/// In this order: prompt rows that the window before left at a ramp, together
/// with the rows that wait there, those that were told to stay before those that
/// are held, as many as fit; rows that a ramp told to stay, together with as
/// many held at the same ramp as fit; a queue of held rows that is due for a
/// deadline or for age; prompt rows that wait at layer 0, together with ready
/// rows; a queue of held rows that is due for its fill or because nothing else is
/// left, the deepest among equals; ready rows through the first window.
///
/// A window with prompt rows from layer 0 has as many of them as fit into
/// drex_config.max_pass_rows beside the ready rows, and beside the rows held at
/// the ramp where it ends: decode rows come first, but for an eighth of the
/// places. It ends at the first ramp that the policy looks at where a ready row
/// may exit or rows are held, under OFF at none; under AUTO only where that is
/// predicted to be faster than the whole pass and a flush of the held rows' own.
/// A step with prompt rows may have n_rows = 0.
///
/// When more rows wait than fit, those whose deadline is at stake come first,
/// the nearest before the others; then higher priority; then the older row. A
/// row passed over 8 times goes before all of these, in at most half of the
/// places, so that none starves: with k places, a ready row with q older ones
/// before it runs at the latest in the (9 + q / ceil(k / 2))th step of ready
/// rows.
///
/// After out->n_rows = 0 and out->n_prompt_rows = 0 there is no step, and
/// nothing to complete. Any other step goes on until drex_complete() or
/// drex_abandon() ends it. What must come before drex_complete() is drex_ramp()
/// where the window ends at a ramp, then drex_fill() where K/V is bound, both only
/// where n_rows is not 0; drex_verify() where the window ends at n_layers and has
/// drafts. Meanwhile drex_plan() and drex_bind_kv() are CALL_ORDER, and all other
/// calls are allowed: requests come and go, rows are gathered and scattered, a
/// rule is searched for, statistics are read.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE; CAPACITY when capacity is 0, or has no
/// room for the pending rows of the request that comes first; CALL_ORDER while
/// a step is planned; DEVICE, and then no step is planned, and prompt rows that
/// were on their way start again, as after drex_abandon().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_plan(
    engine: *mut drex_engine,
    input: *const drex_plan_input,
    rows: *mut drex_row,
    capacity: u32,
    out: *mut drex_step,
) -> drex_status {
    with("drex_plan", engine, |instance| {
        // SAFETY: the caller's contract.
        let (input, size) = unsafe { (entry::read("input", input)?, entry::writable("out", out)?) };
        if rows.is_null() {
            return Err(Fault::Null("rows"));
        }
        let mut step = drex_step {
            size,
            n_rows: 0,
            layer_begin: 0,
            layer_end: 0,
            ramp: DREX_NO_RAMP,
            reason: DREX_FLUSH_NONE,
            n_prompt_rows: 0,
        };
        // A program that cannot be told of prompt rows runs them by itself.
        let told = offset_of!(drex_step, n_prompt_rows) + size_of::<u32>();
        let prompts = match size as usize >= told {
            true => input.n_prompt_rows,
            false => 0,
        };
        if let Some(s) = instance.plan(input.now_ns, capacity as usize, prompts)? {
            let planned = instance.engine.step_rows();
            step.n_rows = planned.len() as u32;
            step.layer_begin = s.layer_begin;
            step.layer_end = s.layer_end;
            step.ramp = s.ramp.map_or(DREX_NO_RAMP, |r| r as u32);
            step.reason = s.reason as u32;
            step.n_prompt_rows = s.prompt_rows;
            for (i, row) in planned.iter().enumerate() {
                let row = drex_row {
                    request: row.id,
                    slot: row.slot,
                    back: row.back,
                };
                // SAFETY: at most `capacity` rows are planned.
                unsafe { rows.add(i).write_unaligned(row) };
            }
        }
        // SAFETY: checked above.
        unsafe { entry::write(out, &step) };
        Ok(())
    })
}

/// At the end of a window that ends at a ramp: scores every row's logits and
/// decides what becomes of it. The logits must be complete, or on a CUDA device
/// enqueued on their stream, and stay unchanged during the call. A row's
/// confidence and token depend on nothing but its own logits.
///
/// logits    the window's logits
/// cells     [n_rows] the KV cell of each row, below n_cells of every bound
///           layer; for a row whose request was removed, any number. NULL only
///           when no K/V is bound. Copied.
/// verdicts  [capacity] receives one per row, in their order
/// capacity  at least n_rows
///
/// A request whose row says EXIT is IDLE from here on.
///
/// Not needed in a step with n_rows = 0, which only prompt rows pass; allowed
/// there with logits.n_rows = 0, and then no other field is looked at.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CAPACITY;
/// CALL_ORDER when no step is planned, when it ends at the last layer, when
/// it had its verdicts, when cells are missing, or when logits.enqueued is 1
/// and nothing was enqueued, or other logits were; DEVICE. After a failure, the
/// call may be made again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_ramp(
    engine: *mut drex_engine,
    logits: *const drex_logits,
    cells: *const u32,
    verdicts: *mut drex_verdict,
    capacity: u32,
) -> drex_status {
    with("drex_ramp", engine, |instance| {
        // SAFETY: the caller's contract.
        let l = unsafe { entry::read("logits", logits)? };
        if verdicts.is_null() {
            return Err(Fault::Null("verdicts"));
        }
        instance.engine.expect_ramp()?;
        let n = instance.engine.step_rows().len() as u32;
        if l.n_rows != n {
            return Err(Error::Conflict {
                field: "logits.n_rows",
                index: None,
                value: l.n_rows.into(),
                other: "the planned step's n_rows",
                other_value: n.into(),
                why: "every planned row has one row of logits",
            }
            .into());
        }
        if capacity < n {
            return Err(Error::Capacity {
                field: "capacity",
                value: capacity.into(),
                need: n.into(),
                why: "every row has a verdict",
            }
            .into());
        }
        if n == 0 {
            return Ok(instance.ramp_without_rows()?);
        }
        let logits = convert_logits(&l)?;
        let confirm = l.confirm.map(|ask| {
            // SAFETY: the caller's contract.
            move |row, token| unsafe { ask(l.confirm_data, row, token) } != 0
        });
        // SAFETY: checked above, and the caller's contract.
        unsafe { instance.ramp(&logits, cells, confirm)? };
        for (i, row) in instance.engine.step_rows().iter().enumerate() {
            let verdict = drex_verdict {
                decision: row.decision as drex_decision,
                token: row.score.token,
                confidence: row.score.confidence,
                forced: row.forced.into(),
            };
            // SAFETY: `capacity` is at least the number of rows.
            unsafe { verdicts.add(i).write_unaligned(verdict) };
        }
        Ok(())
    })
}

/// Fills the holes of the rows that the last drex_ramp() let out and whose
/// requests have DREX_FILL_COPY: for each,
/// K and V of the window's last layer at the row's cell are copied to all
/// layers from layer_end on. Does nothing when none exited, or when done
/// already. Nothing else may touch these cells during the call.
///
/// On a CUDA device it is enqueued on the stream of that ramp's logits, in one
/// launch, and not waited for.
///
/// Errors: CALL_ORDER when no K/V is bound, or when drex_ramp() was not
/// called since the last plan; DEVICE, and CAPACITY for more memory than one
/// launch can move.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_fill(engine: *mut drex_engine) -> drex_status {
    with("drex_fill", engine, |instance| {
        Ok(instance.fill(Launch::Now)?)
    })
}

/// At the end of a window that ends at n_layers and has drafts: says which of
/// them stand. A draft is the token that a row of a request with
/// DREX_FILL_VERIFY emitted at a ramp; the row is in the step as a pending
/// one. Allowed, and without consequence, in a step without drafts.
///
/// For each request, going through its rows in their order (the oldest first):
/// choose a token from the row's logits, and compare it with the draft. After
/// the first that differs, the request's later rows are void. Hosts that sample
/// choose by drex_speculate().
///
/// agrees     [n_rows] 1: the token chosen from the row's logits is its draft;
///            2: the same, and it is the request's last token; 0: it is
///            another. Looked at for drafts only, up to the first 0 or 2 of
///            each request.
/// n_rows     drex_step.n_rows
/// decisions  [capacity] receives one per row: ACCEPT or REPLACE for drafts,
///            PENDING for pending rows without, EXIT for the request's own row:
///            emit the token chosen from its logits; DROP for what follows a
///            draft that was replaced or was the last token; GONE
/// capacity   at least n_rows
///
/// After REPLACE, the request's next token is the one chosen; the rows after it
/// never were: the host takes their tokens back and frees their KV cells. The
/// request is IDLE after drex_complete() in any case. Until then the verdicts
/// can be lost by drex_abandon(): give their tokens to clients after it.
///
/// Errors: NULL_ARGUMENT, INVALID_ARGUMENT, CAPACITY; CALL_ORDER when no step is
/// planned, when it ends at a ramp, or when it is verified already.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_verify(
    engine: *mut drex_engine,
    agrees: *const u8,
    n_rows: u32,
    decisions: *mut drex_decision,
    capacity: u32,
) -> drex_status {
    with("drex_verify", engine, |instance| {
        if agrees.is_null() {
            return Err(Fault::Null("agrees"));
        }
        if decisions.is_null() {
            return Err(Fault::Null("decisions"));
        }
        let n = n_rows as usize;
        instance.engine.expect_verify(n)?;
        if capacity < n_rows {
            return Err(Error::Capacity {
                field: "capacity",
                value: capacity.into(),
                need: n_rows.into(),
                why: "every row has a decision",
            }
            .into());
        }
        instance.engine.verify(n, |i| {
            // SAFETY: the caller's contract.
            match unsafe { agrees.add(i).read() } {
                0 => Ok(Agrees::No),
                1 => Ok(Agrees::Yes),
                2 => Ok(Agrees::AndEnds),
                other => Err(Error::int("agrees", other, "0, 1 or 2").at(i)),
            }
        })?;
        for (i, row) in instance.engine.step_rows().iter().enumerate() {
            // SAFETY: `capacity` is at least the number of rows.
            unsafe {
                decisions
                    .add(i)
                    .write_unaligned(row.decision as drex_decision)
            };
        }
        Ok(())
    })
}

/// Sends an IDLE request's pending rows to the last layer without a newer
/// row, in the next steps: at the request's end under DREX_FILL_VERIFY, or
/// wherever its K/V must be whole (before it is saved or shared). The request
/// is RUNNING until the last of them is through, then IDLE.
///
/// now_ns   now
/// pending  receives how many rows; 0: there is none, and the request stays
///          IDLE; may be NULL
///
/// Errors: UNKNOWN_REQUEST; CALL_ORDER when it is not IDLE, or when a row of it
/// is in a step that is not complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_settle(
    engine: *mut drex_engine,
    id: u64,
    now_ns: u64,
    pending: *mut u32,
) -> drex_status {
    with("drex_request_settle", engine, |instance| {
        let n = instance.engine.request(id)?.pending.len();
        instance.engine.settle(id, now_ns)?;
        if !pending.is_null() {
            // SAFETY: not NULL.
            unsafe { pending.write_unaligned(n) };
        }
        Ok(())
    })
}

/// Speculative sampling: makes a token that was drawn from the ramp's
/// distribution one of the full model's, by keeping or replacing it. For hosts
/// that sample (greedy ones compare). The result is distributed as `deep`,
/// whatever `draft` is; it equals draft_token as often as is possible.
/// Leviathan et al. 2023, arXiv 2211.17192, section 2.3.
///
/// deep         [n_vocab] probabilities by the full model, after temperature,
///              top-k and the like; finite, >= 0, not all 0; need not sum to 1
/// draft        the same, by the ramp, as draft_token was drawn from them; NULL:
///              draft_token was certain
/// draft_token  below n_vocab
/// u, v         two random numbers, uniform in [0, 1)
/// token        receives the token
///
/// Takes no engine. Errors: NULL_ARGUMENT, INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_speculate(
    deep: *const f32,
    draft: *const f32,
    n_vocab: u32,
    draft_token: i32,
    u: f64,
    v: f64,
    token: *mut i32,
) -> drex_status {
    call("drex_speculate", || {
        if deep.is_null() {
            return Err(Fault::Null("deep"));
        }
        if token.is_null() {
            return Err(Fault::Null("token"));
        }
        if n_vocab == 0 || i32::try_from(n_vocab).is_err() {
            return Err(Error::int("n_vocab", n_vocab, "1..2147483647").into());
        }
        let drafted = match u32::try_from(draft_token) {
            Ok(t) if t < n_vocab => t as usize,
            _ => {
                return Err(Error::signed("draft_token", draft_token, "0..n_vocab-1").into());
            }
        };
        for (name, x) in [("u", u), ("v", v)] {
            if !(0.0..1.0).contains(&x) {
                return Err(Error::float(name, x as f32, "a number in [0, 1)").into());
            }
        }
        let read = |name, p: *const f32| -> Result<&[f32], Fault> {
            if !p.is_aligned() {
                return Err(Error::int(name, p.addr() as u64, "an aligned pointer").into());
            }
            // SAFETY: the caller's contract.
            let all = unsafe { std::slice::from_raw_parts(p, n_vocab as usize) };
            let mut sum = 0.0f64;
            for (i, &x) in all.iter().enumerate() {
                if !(x.is_finite() && x >= 0.0) {
                    let e = Error::float(name, x, "a finite number >= 0");
                    return Err(e.at(i).into());
                }
                sum += f64::from(x);
            }
            if sum <= 0.0 {
                return Err(Error::float(name, 0.0, "a sum above 0").into());
            }
            Ok(all)
        };
        let p = read("deep", deep)?;
        let q = match draft.is_null() {
            true => None,
            false => Some(read("draft", draft)?),
        };
        let out = speculate(p, q, drafted, u, v);
        // SAFETY: not NULL.
        unsafe { token.write_unaligned(out as i32) };
        Ok(())
    })
}

/// The planned step ran, and its tokens are out. Rows of a window that ended
/// at n_layers have emitted theirs, and their requests are IDLE; held rows
/// enter the buffer; the arena rows of those that emitted are free.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CALL_ORDER when no
/// step is planned, when its ramp was not called, when it has drafts and
/// drex_verify() was not called, or when K/V is bound, rows exited with
/// DREX_FILL_COPY and drex_fill() was not called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_complete(
    engine: *mut drex_engine,
    completion: *const drex_completion,
) -> drex_status {
    with("drex_complete", engine, |instance| {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("completion", completion)? };
        reserved(c.reserved)?;
        Ok(instance.complete(c.now_ns, c.duration_ns, c.n_kv)?)
    })
}

/// The planned step failed. Its rows go back to where they were, in their old
/// order, and may be planned again; the step is not counted. Their arena rows
/// must be as they were when it was planned, where its window starts from them.
/// Rows that drex_ramp() let out before have given their token: they stay out,
/// and their holes stay open unless drex_fill() was called before this. Pending
/// rows that came along with one of these stay at this ramp: their arena rows
/// must be what the window left. What drex_verify() said is void: its tokens do
/// not count, and the rows come back with their drafts. Prompt rows of the step
/// are forgotten: the host starts them again at layer 0, by
/// drex_plan_input.n_prompt_rows, or ends their requests.
///
/// Errors: CALL_ORDER when no step is planned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_abandon(engine: *mut drex_engine) -> drex_status {
    with("drex_abandon", engine, |instance| Ok(instance.abandon()?))
}

/// Tells the cost model of a pass that drex did not plan, at any time.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_observe(
    engine: *mut drex_engine,
    observation: *const drex_observation,
) -> drex_status {
    with("drex_observe", engine, |instance| {
        // SAFETY: the caller's contract.
        let o = unsafe { entry::read("observation", observation)? };
        reserved(o.reserved)?;
        Ok(instance.engine.observe(
            o.layer_begin,
            o.layer_end,
            o.n_rows,
            o.n_kv,
            o.n_prompt_rows,
            o.duration_ns,
        )?)
    })
}

/// AUTO: works on the search for a better rule, on the calling thread. Call it
/// where the thread would wait for the device: after the window has been
/// launched, before its logits are waited for. From the first call on,
/// drex_complete() leaves this work to the host; without any, it does a part
/// of it each time, at most about 0.5 % of the window's time.
///
/// max_windows  about how much: simulated windows, some 40 ns each; 0: all
/// done         receives 1 when no search is under way any more, else 0; may
///              be NULL
///
/// Allowed between any two calls. Does nothing under other policies.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_replan(
    engine: *mut drex_engine,
    max_windows: u32,
    done: *mut u32,
) -> drex_status {
    with("drex_replan", engine, |instance| {
        let finished = instance.engine.replan(max_windows);
        if !done.is_null() {
            // SAFETY: the caller's contract.
            unsafe { done.write_unaligned(finished.into()) };
        }
        Ok(())
    })
}

/// The cost model's numbers as JSON, for drex_profile_load() and drex-sim.
///
/// text      [capacity] receives the text and a 0 byte; NULL with capacity 0
///           to ask for the length
/// capacity  bytes at text
/// length    receives the text's bytes without the 0 byte, also with CAPACITY
///
/// Allocates. Errors: NULL_ARGUMENT; CAPACITY when the text and its 0 byte do
/// not fit and capacity is not 0; CALL_ORDER before anything is known.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_profile_save(
    engine: *const drex_engine,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> drex_status {
    with("drex_profile_save", engine, |instance| {
        let cost = instance.engine.cost();
        if !cost.known() {
            return Err(Error::CallOrder(
                "no window has been timed yet; expected drex_complete or drex_observe first",
            )
            .into());
        }
        let json = crate::profile::to_json(cost.profile());
        // SAFETY: the caller's contract.
        unsafe { entry::give_text(&json, text, capacity, length) }
    })
}

/// Starts the cost model from numbers saved before, in place of what it has
/// learned. They are left behind where measurements contradict them.
///
/// text  JSON as drex_profile_save() writes it, of a model with the same
///       layers and ramps
///
/// Allocates. Errors: NULL_ARGUMENT; INVALID_ARGUMENT with the field named.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_profile_load(
    engine: *mut drex_engine,
    text: *const c_char,
) -> drex_status {
    with("drex_profile_load", engine, |instance| {
        if text.is_null() {
            return Err(Fault::Null("text"));
        }
        // SAFETY: the caller passes a C string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        let profile = crate::profile::from_json(&text).map_err(Fault::Profile)?;
        instance.engine.load_profile(&profile)?;

        Ok(())
    })
}

/// A snapshot of the engine's totals. Cheap enough for every step.
///
/// out  its size is set by the caller
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_stats_get(
    engine: *const drex_engine,
    out: *mut drex_stats,
) -> drex_status {
    with("drex_stats_get", engine, |instance| {
        // SAFETY: the caller's contract.
        let size = unsafe { entry::writable("out", out)? };
        let engine = &instance.engine;
        let c = engine.counters();
        let auto = engine.auto();
        let (marks, predicted) = (engine.chosen_marks(), auto.predicted());
        let mut exit_share = [f64::NAN; DREX_MAX_RAMPS];
        for (r, share) in exit_share
            .iter_mut()
            .enumerate()
            .take(engine.config().n_ramps())
        {
            let chance = engine.exits().chance(None, r);
            if chance.looks > 0.0 {
                *share = chance.p;
            }
        }
        let (mut flushes, mut misses) = ([0; DREX_MAX_FLUSH_REASONS], [0; DREX_MAX_MISS_REASONS]);
        flushes[..c.flushes.len()].copy_from_slice(&c.flushes);
        misses[..c.misses.len()].copy_from_slice(&c.misses);
        let stats = drex_stats {
            size,
            n_ramps: engine.config().n_ramps() as u32,
            tokens: c.tokens,
            exits: c.exits,
            involuntary_exits: c.involuntary_exits,
            involuntary_stays: c.involuntary_stays,
            flushes,
            held_rows: engine.buffer().held().into(),
            held_rows_at: engine.held_rows_at(),
            held_rows_max: c.held_rows_max,
            requests: engine.requests() as u64,
            slots_free: engine.buffer().free_slots() as u64,
            cells_filled: c.cells_filled,
            bytes_filled: c.bytes_filled,
            deadline_misses: c.deadline_misses,
            nonfinite_rows: c.nonfinite_rows,
            steps: c.steps,
            step_rows: c.step_rows,
            wait_us_buckets: c.wait_us_buckets,
            wait_us_sum: c.wait_us_sum,
            art_ratio: engine.art_ratio().unwrap_or(f64::NAN),
            misses,
            searches: auto.searches(),
            rule_ramps: marks.ramps,
            rule_hold_rows: marks.hold_rows,
            rule_ready_rows: marks.ready_rows,
            reserved: 0,
            predicted_tokens_per_s: predicted.0 * 1e9,
            predicted_off_tokens_per_s: predicted.1 * 1e9,
            exit_share,
            pending_rows: engine.pending_rows().into(),
            rows_filled: c.rows_filled,
            drafts: c.drafts,
            drafts_accepted: c.accepted,
            rows_dropped: c.dropped,
            prompt_rows: c.prompt_rows,
            prompt_steps: c.prompt_steps,
        };
        // SAFETY: checked above.
        unsafe { entry::write(out, &stats) };
        Ok(())
    })
}

// Padding would hand the caller whatever was on our stack.
const _: () = assert!(size_of::<drex_stats>().is_multiple_of(8));
