// SPDX-License-Identifier: Apache-2.0

//! What the C ABI says of devices: logits, arena rows, graphs.

#![allow(clippy::missing_safety_doc)] // the header states each contract, for C

use std::ffi::c_void;

use super::entry::{self, with};
use super::error::Fault;
use super::types::*;
use crate::core::error::Error;
use crate::device::{Arena, Dtype, Limits, Logits, MAX_TOP, Top};
use crate::instance::{Launch, Place};

const _: () = assert!(DREX_MAX_TOP == MAX_TOP);

pub(super) fn convert(c: &drex_config) -> Result<(Place, Limits), Fault> {
    let place = match c.device {
        DREX_DEVICE_HOST => Place::Host,
        DREX_DEVICE_CUDA => Place::Cuda,
        other => return Err(Error::int("device", other, "DREX_DEVICE_* (0..1)").into()),
    };
    if c.n_vocab > i32::MAX as u32 {
        return Err(Error::int("n_vocab", c.n_vocab, "0..2147483647").into());
    }
    if c.n_top > DREX_MAX_TOP as u32 {
        return Err(Error::int("n_top", c.n_top, "0..64").into());
    }
    let limits = Limits {
        rows: 0,
        n_vocab: c.n_vocab,
        n_top: c.n_top,
    };
    Ok((place, limits))
}

fn flag(field: &'static str, value: u32) -> Result<bool, Error> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::int(field, value, "0 or 1")),
    }
}

pub(super) fn convert_logits(l: &drex_logits) -> Result<Logits, Fault> {
    let dtype = match l.dtype {
        DREX_DTYPE_F32 => Dtype::F32,
        DREX_DTYPE_F16 => Dtype::F16,
        DREX_DTYPE_BF16 => Dtype::Bf16,
        other => return Err(Error::int("logits.dtype", other, "DREX_DTYPE_* (0..2)").into()),
    };
    if l.data.is_null() {
        return Err(Fault::Null("logits.data"));
    }
    if l.n_vocab == 0 || i32::try_from(l.n_vocab).is_err() {
        return Err(Error::int("logits.n_vocab", l.n_vocab, "1..2147483647").into());
    }
    let row = l.n_vocab as usize * dtype.bytes();
    if l.row_stride_bytes < row as u64 {
        return Err(Error::Conflict {
            field: "logits.row_stride_bytes",
            index: None,
            value: l.row_stride_bytes,
            other: "n_vocab",
            other_value: l.n_vocab.into(),
            why: "rows would overlap",
        }
        .into());
    }
    let span = l.row_stride_bytes.checked_mul(l.n_rows.into());
    if span.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Error::int(
            "logits.row_stride_bytes",
            l.row_stride_bytes,
            "a stride that keeps the rows within the address space",
        )
        .into());
    }
    Ok(Logits {
        data: l.data.cast(),
        dtype,
        row_stride: l.row_stride_bytes as usize,
        n_vocab: l.n_vocab as usize,
        stream: l.stream,
        n_top: l.n_top as usize,
        enqueued: flag("logits.enqueued", l.enqueued)?,
    })
}

/// CUDA: starts what drex_ramp() waits for, on the logits' stream, and returns
/// at once. Say drex_ramp() with the same logits and enqueued = 1 later; what
/// is between them, such as drex_replan(), runs beside the device. May be
/// captured into a graph, see chapter 7; if that was not launched, no row has a
/// confidence and none leaves.
///
/// logits  as for drex_ramp(); n_rows may be any number up to the rows of the
///         largest step. They must stay as they are until drex_ramp() returns.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CAPACITY; DEVICE;
/// UNSUPPORTED on the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_ramp_enqueue(
    engine: *mut drex_engine,
    logits: *const drex_logits,
) -> drex_status {
    with("drex_ramp_enqueue", engine, |instance| {
        // SAFETY: the caller's contract.
        let l = unsafe { entry::read("logits", logits)? };
        if l.n_rows == 0 {
            return Err(Error::int("logits.n_rows", 0u32, "at least 1").into());
        }
        let converted = convert_logits(&l)?;
        // SAFETY: the caller's contract.
        unsafe { instance.enqueue(&converted, l.n_rows as usize)? };
        Ok(())
    })
}

/// The greatest logits of a row, the greatest first and the lower index before
/// an equal one: candidates for hosts that sample, without the whole row. After
/// a drex_ramp() whose logits had n_top > 0, until its step ends.
///
/// row       of the planned step, from 0
/// top       [capacity] receives them; may be NULL with capacity 0
/// capacity  entries at top; no more are written
/// n         receives how many: the lesser of capacity and n_top, or 0 for a
///           row without a verdict of its own (GONE, PENDING)
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT; CALL_ORDER without such a ramp.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_top_get(
    engine: *const drex_engine,
    row: u32,
    top: *mut drex_top,
    capacity: u32,
    n: *mut u32,
) -> drex_status {
    with("drex_top_get", engine, |instance| {
        if top.is_null() && capacity > 0 {
            return Err(Fault::Null("top"));
        }
        if n.is_null() {
            return Err(Fault::Null("n"));
        }
        let mut found = [Top::NONE; DREX_MAX_TOP];
        let most = DREX_MAX_TOP.min(capacity as usize);
        let len = instance.top(row as usize, &mut found[..most])?;
        for (i, t) in found[..len].iter().enumerate() {
            let t = drex_top {
                logit: t.logit,
                token: t.token,
            };
            // SAFETY: `capacity` entries, by the caller's contract.
            unsafe { top.add(i).write_unaligned(t) };
        }
        // SAFETY: not NULL.
        unsafe { n.write_unaligned(len as u32) };
        Ok(())
    })
}

/// Gathers the planned step's hidden rows: arena row rows[i].slot to row i of
/// a dense batch, for hosts whose engine has no gather by index. On a CUDA
/// device in one launch on arena->stream; may be captured.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CALL_ORDER when no
/// step is planned; DEVICE, and CAPACITY for more memory than one launch can
/// move.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_gather(
    engine: *mut drex_engine,
    arena: *const drex_arena,
) -> drex_status {
    // SAFETY: the caller's contract.
    unsafe { copy_rows("drex_gather", engine, arena, false) }
}

/// The way back: row i of the dense batch to arena row rows[i].slot.
///
/// Errors: as drex_gather().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_scatter(
    engine: *mut drex_engine,
    arena: *const drex_arena,
) -> drex_status {
    // SAFETY: the caller's contract.
    unsafe { copy_rows("drex_scatter", engine, arena, true) }
}

/// # Safety
/// As drex_gather().
unsafe fn copy_rows(
    function: &str,
    engine: *mut drex_engine,
    arena: *const drex_arena,
    to_arena: bool,
) -> drex_status {
    with(function, engine, |instance| {
        // SAFETY: the caller's contract.
        let a = unsafe { entry::read("arena", arena)? };
        for (what, pointer) in [("arena.arena", a.arena), ("arena.dense", a.dense)] {
            if pointer.is_null() {
                return Err(Fault::Null(what));
            }
        }
        if a.reserved != 0 {
            return Err(Error::int("arena.reserved", a.reserved, "0").into());
        }
        if a.row_bytes == 0 || u32::try_from(a.row_bytes).is_err() {
            return Err(Error::int("arena.row_bytes", a.row_bytes, "1..4294967295").into());
        }
        for (field, stride) in [
            ("arena.arena_stride_bytes", a.arena_stride_bytes),
            ("arena.dense_stride_bytes", a.dense_stride_bytes),
        ] {
            if stride < a.row_bytes || stride > isize::MAX as u64 >> 20 {
                return Err(Error::Conflict {
                    field,
                    index: None,
                    value: stride,
                    other: "row_bytes",
                    other_value: a.row_bytes,
                    why: "rows would overlap, or leave the address space",
                }
                .into());
            }
        }
        let arena = Arena {
            arena: a.arena.cast(),
            dense: a.dense.cast(),
            arena_stride: a.arena_stride_bytes as usize,
            dense_stride: a.dense_stride_bytes as usize,
            row_bytes: a.row_bytes as usize,
            stream: a.stream,
        };
        // SAFETY: the caller's contract.
        unsafe { instance.copy_rows(&arena, to_arena)? };
        Ok(())
    })
}

/// CUDA: enqueues, for a graph capture, the fill of the holes that
/// drex_fill_plan() names last before the graph is launched. See chapter 7.
///
/// stream  the CUstream that is being captured
///
/// Errors: CALL_ORDER when no K/V is bound; DEVICE, and CAPACITY as for
/// drex_fill(); UNSUPPORTED on the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_fill_enqueue(
    engine: *mut drex_engine,
    stream: *mut c_void,
) -> drex_status {
    with("drex_fill_enqueue", engine, |instance| {
        // SAFETY: the caller's contract.
        unsafe { instance.enqueue_fill(stream)? };
        Ok(())
    })
}

/// CUDA: in place of drex_fill(), for a host that will launch a graph which
/// captured drex_fill_enqueue(): names the holes, and launches nothing. The
/// graph must be launched before drex_complete(), on the stream of the last
/// ramp's logits or ordered behind it.
///
/// Errors: CALL_ORDER as for drex_fill(); DEVICE; UNSUPPORTED on the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_fill_plan(engine: *mut drex_engine) -> drex_status {
    with("drex_fill_plan", engine, |instance| {
        Ok(instance.fill(Launch::Replay)?)
    })
}
