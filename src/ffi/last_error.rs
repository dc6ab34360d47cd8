// SPDX-License-Identifier: Apache-2.0

//! The calling thread's last error text.

use std::cell::UnsafeCell;
use std::ffi::c_char;
use std::fmt::{self, Write};

use crate::text::Text;

thread_local! {
    // Constant and without a destructor: neither the first use nor a use
    // while the thread ends allocates or fails.
    static LAST: UnsafeCell<Text> = const { UnsafeCell::new(Text::EMPTY) };
}

/// Replaces the thread's text by "function: text".
pub fn set(function: &str, text: fmt::Arguments<'_>) {
    LAST.with(|last| {
        // SAFETY: the cell is this thread's own, and formatting our own types
        // does not come back here.
        let last = unsafe { &mut *last.get() };
        last.clear();
        let _ = last.write_str(function);
        let _ = last.write_str(": ");
        let _ = last.write_fmt(text);
    });
}

pub fn get() -> *const c_char {
    LAST.with(|last| last.get().cast_const().cast())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn text() -> &'static str {
        // SAFETY: the text is this thread's, ends with 0, is UTF-8, and does not
        // change while the test looks at it.
        unsafe { CStr::from_ptr(get()) }.to_str().unwrap()
    }

    #[test]
    fn threads_have_their_own() {
        set("here", format_args!("x"));
        std::thread::spawn(|| assert_eq!(text(), ""))
            .join()
            .unwrap();
        assert_eq!(text(), "here: x");
    }
}
