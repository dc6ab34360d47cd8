// SPDX-License-Identifier: Apache-2.0

//! Versions, status codes and error texts. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::{CStr, c_char};

use super::last_error;

/// The version of this interface. It changes only when something that worked
/// stops working; new functions, constants and fields at the end of structs
/// do not change it.
pub const DREX_ABI_VERSION: u32 = 1;

/// How a call went: DREX_OK (0) or one of DREX_ERROR_*. The numbers never
/// change their meaning; a later version may add more, so treat any number
/// but 0 as a failure. A call that fails changes nothing and writes none of
/// its outputs (chapter 5 has the one exception), and leaves a text that names
/// the function, the field and the value: see drex_last_error().
pub type drex_status = i32;

/// Done.
pub const DREX_OK: drex_status = 0;
/// A pointer that may not be NULL is.
pub const DREX_ERROR_NULL_ARGUMENT: drex_status = 1;
/// A value is out of range, or clashes with another one.
pub const DREX_ERROR_INVALID_ARGUMENT: drex_status = 2;
/// drex_config.abi_version is not the library's.
pub const DREX_ERROR_ABI_MISMATCH: drex_status = 3;
/// A struct's size field is too small, or the struct comes from a later
/// version and uses fields that this library does not know.
pub const DREX_ERROR_STRUCT_SIZE: drex_status = 4;
/// The handle was never given out, or what it stood for has been destroyed, or
/// is of the other kind (drex_engine, drex_pages).
pub const DREX_ERROR_INVALID_HANDLE: drex_status = 5;
/// Another thread is inside a call on this handle, or this one is, in a
/// callback.
pub const DREX_ERROR_HANDLE_BUSY: drex_status = 6;
/// No request alive has this id.
pub const DREX_ERROR_UNKNOWN_REQUEST: drex_status = 7;
/// A request with this id is alive already.
pub const DREX_ERROR_DUPLICATE_REQUEST: drex_status = 8;
/// The call does not fit the calls before it, such as ramp without plan.
pub const DREX_ERROR_CALL_ORDER: drex_status = 9;
/// Something of fixed size is full, or an array is too short.
pub const DREX_ERROR_CAPACITY: drex_status = 10;
/// The value is known, and this version cannot serve it.
pub const DREX_ERROR_UNSUPPORTED: drex_status = 11;
/// The device failed.
pub const DREX_ERROR_DEVICE: drex_status = 12;
/// A bug in drex was caught, or one in a Rust host's tracing subscriber. The
/// handle that the call was on is poisoned: every call on it but the one that
/// destroys it returns this again.
pub const DREX_ERROR_PANIC: drex_status = 13;
/// There is not as much memory as the call asked for. Only calls that name it
/// return this: see chapter 5.
pub const DREX_ERROR_MEMORY: drex_status = 14;

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
    last_error::get()
}
