// SPDX-License-Identifier: Apache-2.0

//! Functions of any bytes. Each reads a story of calls from them, makes the calls on the C ABI, and panics where the
//! header's promises do not hold. `../runner` has them fuzzed with coverage; `../suite.rs` runs the corpus.

pub mod engine;
pub mod pages;
pub mod texts;

use std::ffi::CStr;

use drex::ffi::*;

pub type Target = fn(&[u8]);

pub const TARGETS: [(&str, Target); 3] = [
    ("engine", engine::run),
    ("pages", pages::run),
    ("texts", texts::run),
];

/// A struct of the ABI, zero but for its size.
macro_rules! sized {
    ($t:ty) => {{
        // SAFETY: a struct of numbers and pointers, for which 0 is a value.
        #[allow(unused_unsafe)] // also used inside unsafe blocks
        let mut v: $t = unsafe { std::mem::zeroed() };
        v.size = std::mem::size_of::<$t>() as u32;
        v
    }};
}
pub(crate) use sized;

/// Holds a status to the promises that all functions share: it has a name, it is no panic, and a failure has a text that
/// begins with the function's name. Returns whether the call succeeded.
pub(crate) fn succeeded(function: &str, status: drex_status) -> bool {
    if status == DREX_OK {
        return true;
    }
    let text = last_error();
    assert!(
        (DREX_OK..=DREX_ERROR_MEMORY).contains(&status) && status != DREX_ERROR_PANIC,
        "{function}: status {status}: {text}"
    );
    assert!(
        text.starts_with(&format!("{function}: ")),
        "{function}: {text}"
    );
    false
}

/// The text of this thread's last failed call.
pub(crate) fn last_error() -> String {
    // SAFETY: the thread's own text.
    let text = unsafe { CStr::from_ptr(drex::ffi::drex_last_error()) };
    text.to_str().expect("an error text is no UTF-8").to_owned()
}
