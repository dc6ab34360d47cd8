// SPDX-License-Identifier: Apache-2.0

//! The end of a step, and a step that is given up. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use super::check::reserved;
use super::engine::drex_engine;
use super::entry::{self, with};
use super::status::drex_status;

/// The input of drex_complete().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_completion {
    /// sizeof(drex_completion)
    pub size: u32,
    /// 0
    pub reserved: u32,
    /// Now, in ns; when the step's tokens were emitted.
    pub now_ns: u64,
    /// Time that the window took on the device, in ns; 0: unknown, and
    /// nothing is learned from it, nor from more than 1e15 (eleven days).
    pub duration_ns: u64,
    /// KV cells that the decode rows attended over, summed, without those of
    /// prompt rows; what a cell costs is learned from it. 0: unknown, and then the
    /// cells' share is taken for the rows'. Give it always or never.
    pub n_kv: u64,
    /// In a step that ends at n_layers, [n_rows of it]: the token that the full
    /// model chose from each row's logits, for the request's own rows that emitted
    /// one; -1: not known. Other rows, those behind a replaced draft among them, are
    /// not looked at. Ramps learn from it how often they are right where rows were
    /// held, for requests whose thresholds are learned. NULL: not known; then they
    /// learn from drafts alone.
    /// Since 0.2.
    pub tokens: *const i32,
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
    with("drex_complete", engine, |engine| {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("completion", completion)? };
        reserved(c.reserved)?;
        // SAFETY: the caller's contract.
        let tokens =
            (!c.tokens.is_null()).then_some(|i| unsafe { c.tokens.add(i).read_unaligned() });
        Ok(engine.complete(c.now_ns, c.duration_ns, c.n_kv, tokens)?)
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
    with("drex_abandon", engine, |engine| Ok(engine.abandon()?))
}
