// SPDX-License-Identifier: Apache-2.0

//! The next window and its rows. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::c_char;
use std::mem::{offset_of, size_of};

use super::engine::{DREX_NO_RAMP, drex_engine};
use super::entry::{self, with};
use super::fault::Fault;
use super::names::name;
use super::status::drex_status;
use crate::core::counters::Reason;

/// Why a step runs: DREX_FLUSH_*.
pub type drex_flush_reason = u32;

/// Ready rows and prompt rows run through the first window.
pub const DREX_FLUSH_NONE: drex_flush_reason = 0;
/// Enough rows were held.
pub const DREX_FLUSH_FILL: drex_flush_reason = 1;
/// A row was held for as long as drex_config.max_hold_ns says.
pub const DREX_FLUSH_AGE: drex_flush_reason = 2;
/// A held row's token would have missed its deadline.
pub const DREX_FLUSH_DEADLINE: drex_flush_reason = 3;
/// Nothing else is left to run; under HOLD, fewer than min_ready rows.
pub const DREX_FLUSH_IDLE: drex_flush_reason = 4;
/// Rows that a ramp told to go on at once.
pub const DREX_FLUSH_STAY: drex_flush_reason = 5;
/// Prompt rows go on from a ramp, and take along what waits there.
/// Since 0.2.
pub const DREX_FLUSH_PROMPT: drex_flush_reason = 6;
/// How many reasons there are; a later version may have more, up to
/// DREX_MAX_FLUSH_REASONS.
pub const DREX_FLUSH_REASONS: usize = 7;

/// The input of drex_plan().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_plan_input {
    /// sizeof(drex_plan_input)
    pub size: u32,
    /// Prompt rows that wait at layer 0 and could run now, without those that a
    /// window left at a ramp. 0, always: the host runs prompts between steps, and
    /// what they cost is learned from the time between steps. Taken for 0 where
    /// drex_plan()'s out is too small for drex_step.n_prompt_rows.
    pub n_prompt_rows: u32,
    /// Now, in ns of any monotonic clock; the same clock in all calls.
    pub now_ns: u64,
}

/// A row of the planned step.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct drex_row {
    /// The request's id.
    pub request: u64,
    /// The row of the hidden-state arena, below n_slots. A window that begins
    /// above layer 0 reads its input there; a window that ends at a ramp
    /// leaves its last hidden state there.
    pub slot: u32,
    /// 0: the request's own row, of its newest token. n: a pending row, n
    /// tokens before that one, or before the next one when the request has no
    /// row of its own here. A request's rows stand together, the oldest first.
    pub back: u32,
}

/// The window that drex_plan() chose: run layers [layer_begin, layer_end) over the
/// rows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_step {
    /// sizeof(drex_step), set by the caller
    pub size: u32,
    /// Decode rows. 0, and n_prompt_rows 0 too: there is nothing to run, and the
    /// other fields mean nothing.
    pub n_rows: u32,
    /// 0, or a ramp's layer.
    pub layer_begin: u32,
    /// A ramp's layer, or n_layers. A window may pass ramps where none of its
    /// rows may exit, and with prompt rows any ramp.
    pub layer_end: u32,
    /// The ramp at the window's end: call drex_ramp() if n_rows is not 0.
    /// DREX_NO_RAMP: the window ends at n_layers; the host samples every row whose
    /// request it has not removed.
    pub ramp: u32,
    /// Why it runs.
    pub reason: drex_flush_reason,
    /// Prompt rows that run along. From layer 0: so many of those that wait, which
    /// the host chooses, in its own order. From another layer: exactly those that
    /// the last window with prompt rows left there. They are the host's: not
    /// among `rows`, without verdicts, in arena rows of the host's own beyond
    /// n_slots. It may run fewer, where a request has ended.
    /// Since 0.2.
    pub n_prompt_rows: u32,
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
/// drex_abandon() ends it. Chapter 2 has a table of what is allowed meanwhile, and
/// of what must come before drex_complete().
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
    with("drex_plan", engine, |engine| {
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
        if let Some(s) = engine.plan(input.now_ns, capacity as usize, prompts)? {
            let planned = engine.scheduler.step_rows();
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

/// A flush reason's name in lower case, such as "deadline"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_flush_reason_name(reason: drex_flush_reason) -> *const c_char {
    name(Reason::from_number(reason).map(Reason::c_name))
}

const _: () = assert!(DREX_FLUSH_PROMPT == Reason::Prompt as u32);
