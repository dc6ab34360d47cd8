// SPDX-License-Identifier: Apache-2.0

//! Texts of fixed size for C: making one allocates nothing.

use std::ffi::{CStr, c_char};
use std::fmt;

const CAPACITY: usize = 512;

/// A text that ends with a 0 byte, cut to its capacity. The bytes come first:
/// readers get its address.
#[repr(C)]
pub struct Text {
    bytes: [u8; CAPACITY],
    len: usize,
}

impl Text {
    pub const EMPTY: Text = Text {
        bytes: [0; CAPACITY],
        len: 0,
    };

    pub fn clear(&mut self) {
        self.len = 0;
        self.bytes[0] = 0;
    }

    pub fn as_ptr(&self) -> *const c_char {
        self.bytes.as_ptr().cast()
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let mut n = s.len().min(CAPACITY - 1 - self.len);
        while !s.is_char_boundary(n) {
            n -= 1;
        }
        // A 0 byte inside would end the text for its reader.
        for (to, &from) in self.bytes[self.len..].iter_mut().zip(&s.as_bytes()[..n]) {
            *to = if from == 0 { b'?' } else { from };
        }
        self.len += n;
        self.bytes[self.len] = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    #[test]
    fn long_texts_are_cut_between_characters() {
        let mut text = Text::EMPTY;
        let _ = write!(text, "f: {}", "é".repeat(1000));
        let seen = text.as_c_str().to_str().unwrap();
        assert!(seen.starts_with("f: é") && seen.len() >= CAPACITY - 3);
        text.clear();
        assert_eq!(text.as_c_str(), c"");
        let _ = write!(text, "a\0b");
        assert_eq!(text.as_c_str(), c"a?b");
    }
}
