// SPDX-License-Identifier: Apache-2.0

//! Work on a CUDA device that is started apart from its call. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::c_void;

use super::engine::drex_engine;
use super::entry::{self, with};
use super::ramp::{convert_logits, drex_logits};
use super::status::drex_status;
use crate::core::error::Error;
use crate::engine::Launch;

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
    with("drex_ramp_enqueue", engine, |engine| {
        // SAFETY: the caller's contract.
        let l = unsafe { entry::read("logits", logits)? };
        if l.n_rows == 0 {
            return Err(Error::int("logits.n_rows", 0u32, "at least 1").into());
        }
        let converted = convert_logits(&l)?;
        // SAFETY: the caller's contract.
        unsafe { engine.enqueue(&converted, l.n_rows as usize)? };
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
    with("drex_fill_enqueue", engine, |engine| {
        // SAFETY: the caller's contract.
        unsafe { engine.enqueue_fill(stream)? };
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
    with("drex_fill_plan", engine, |engine| {
        Ok(engine.fill(Launch::Replay)?)
    })
}
