// SPDX-License-Identifier: Apache-2.0

//! Names of numbers, as C programs get and give them.

use std::ffi::{CStr, c_char};

use super::fault::Fault;

pub fn name(name: Option<&'static CStr>) -> *const c_char {
    name.map_or(std::ptr::null(), CStr::as_ptr)
}

/// # Safety
/// `name` is NULL or a C string; `out` is NULL or can be written.
pub unsafe fn from_name(
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
