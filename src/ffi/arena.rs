// SPDX-License-Identifier: Apache-2.0

//! Arena rows, for hosts without a gather by index. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::c_void;

use super::engine::drex_engine;
use super::entry::{self, with};
use super::fault::Fault;
use super::status::drex_status;
use crate::core::error::Error;
use crate::device::Arena;

/// Rows of an arena, and rows of a dense batch: row i of the batch belongs to
/// row i of the planned step.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_arena {
    /// sizeof(drex_arena)
    pub size: u32,
    /// 0
    pub reserved: u32,
    /// Row s at arena + s * arena_stride_bytes. Not NULL.
    pub arena: *mut c_void,
    /// Row i at dense + i * dense_stride_bytes. Not NULL.
    pub dense: *mut c_void,
    /// At least row_bytes.
    pub arena_stride_bytes: u64,
    /// At least row_bytes.
    pub dense_stride_bytes: u64,
    /// At least 1, below 2^32.
    pub row_bytes: u64,
    /// As drex_logits.stream.
    pub stream: *mut c_void,
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
    with(function, engine, |engine| {
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
        unsafe { engine.copy_rows(&arena, to_arena)? };
        Ok(())
    })
}
