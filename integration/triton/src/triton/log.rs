// SPDX-License-Identifier: Apache-2.0
//! Triton's log.

use std::ffi::CString;
use std::panic::Location;

use super::abi;
use super::error::check;

#[track_caller]
pub fn info(text: &str) {
    write(abi::LOG_INFO, text);
}

#[track_caller]
pub fn warning(text: &str) {
    write(abi::LOG_WARN, text);
}

#[track_caller]
pub fn error(text: &str) {
    write(abi::LOG_ERROR, text);
}

#[track_caller]
fn write(level: u32, text: &str) {
    let place = Location::caller();
    let file = place.file().rsplit('/').next().unwrap_or_default();
    let c = |text: &str| CString::new(text.replace('\0', " ")).unwrap_or_default();
    let (file, text) = (c(file), c(&format!("drex: {text}")));
    // SAFETY: Triton copies the texts.
    let _ = unsafe {
        check(abi::TRITONSERVER_LogMessage(
            level,
            file.as_ptr(),
            place.line() as i32,
            text.as_ptr(),
        ))
    };
}

/// What a panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a text")
}
