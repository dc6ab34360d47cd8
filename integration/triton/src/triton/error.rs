// SPDX-License-Identifier: Apache-2.0
//! Errors of Triton as values of Rust, and back.

use std::ffi::{CStr, CString};

use super::abi;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// `TRITONSERVER_Error_Code`
    pub code: u32,
    pub text: String,
}

impl Failure {
    pub fn invalid(text: impl Into<String>) -> Self {
        Self {
            code: abi::ERROR_INVALID_ARG,
            text: text.into(),
        }
    }

    pub fn unsupported(text: impl Into<String>) -> Self {
        Self {
            code: abi::ERROR_UNSUPPORTED,
            text: text.into(),
        }
    }

    pub fn unavailable(text: impl Into<String>) -> Self {
        Self {
            code: abi::ERROR_UNAVAILABLE,
            text: text.into(),
        }
    }

    pub fn internal(text: impl Into<String>) -> Self {
        Self {
            code: abi::ERROR_INTERNAL,
            text: text.into(),
        }
    }

    /// A new error of Triton; whoever gets it deletes it.
    pub fn into_raw(self) -> *mut abi::Error {
        let text = CString::new(self.text.replace('\0', " ")).unwrap_or_default();
        // SAFETY: Triton copies the text.
        unsafe { abi::TRITONSERVER_ErrorNew(self.code, text.as_ptr()) }
    }
}

/// Takes an error that a call returned; it is ours to delete.
///
/// # Safety
/// `error` is NULL or an error that nobody else deletes.
pub unsafe fn check(error: *mut abi::Error) -> Result<(), Failure> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: by the caller; the text lives as long as the error.
    unsafe {
        let code = abi::TRITONSERVER_ErrorCode(error);
        let text = CStr::from_ptr(abi::TRITONSERVER_ErrorMessage(error))
            .to_string_lossy()
            .into_owned();
        abi::TRITONSERVER_ErrorDelete(error);
        Err(Failure { code, text })
    }
}
