// SPDX-License-Identifier: Apache-2.0

//! Costs of windows, and the search for a rule. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::{CStr, c_char};

use super::check::reserved;
use super::engine::drex_engine;
use super::entry::{self, with};
use super::fault::Fault;
use super::status::drex_status;
use crate::core::error::Error;

/// A timing of a pass that drex did not plan: calibration, full passes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_observation {
    /// sizeof(drex_observation)
    pub size: u32,
    /// Decode rows; at least 1 where n_prompt_rows is 0.
    pub n_rows: u32,
    /// The pass's first layer.
    pub layer_begin: u32,
    /// Above layer_begin, at most n_layers.
    pub layer_end: u32,
    /// At least 1; nothing is learned from more than 1e15 (eleven days).
    pub duration_ns: u64,
    /// As drex_completion.n_kv.
    pub n_kv: u64,
    /// Prompt rows beside them.
    /// Since 0.2.
    pub n_prompt_rows: u32,
    /// 0
    /// Since 0.2.
    pub reserved: u32,
}

/// Tells the cost model of a pass that drex did not plan, at any time.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_observe(
    engine: *mut drex_engine,
    observation: *const drex_observation,
) -> drex_status {
    with("drex_observe", engine, |engine| {
        // SAFETY: the caller's contract.
        let o = unsafe { entry::read("observation", observation)? };
        reserved(o.reserved)?;
        Ok(engine.scheduler.observe(
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
    with("drex_replan", engine, |engine| {
        let finished = engine.scheduler.replan(max_windows);
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
    with("drex_profile_save", engine, |engine| {
        let cost = engine.scheduler.cost();
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
    with("drex_profile_load", engine, |engine| {
        if text.is_null() {
            return Err(Fault::Null("text"));
        }
        // SAFETY: the caller passes a C string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        let profile = crate::profile::from_json(&text).map_err(Fault::Profile)?;
        engine.scheduler.load_profile(&profile)?;

        Ok(())
    })
}
