// SPDX-License-Identifier: Apache-2.0

//! The reasons why a call fails.

use std::fmt;

use super::status::*;
use crate::core::error::{Error, Kind, Name};

/// The ways in which a call can fail.
#[derive(Debug)]
pub enum Fault {
    Core(Error),
    Null(&'static str),
    /// A struct is smaller than its first version.
    Small {
        what: &'static str,
        /// The element, where it is an array.
        index: Option<usize>,
        size: u32,
        least: usize,
    },
    /// So large that it is no size.
    Large {
        what: &'static str,
        index: Option<usize>,
        size: u32,
    },
    /// A struct is larger than ours and says something in the part that we do
    /// not know.
    Newer {
        what: &'static str,
        index: Option<usize>,
        size: u32,
        known: usize,
    },
    /// A cost profile that cannot be read.
    Profile(String),
    Abi(u32),
    /// The argument's name, here and in the next two.
    Handle(&'static str),
    Busy(&'static str),
    Poisoned(&'static str),
    /// There are as many of them (plural) as the process may have.
    Full(&'static str, usize),
    Name {
        what: &'static str,
        got: String,
        expected: String,
    },
    Panic,
}

impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        Fault::Core(e)
    }
}

impl Fault {
    /// The struct is the i-th of an array.
    #[must_use]
    pub fn at(mut self, i: usize) -> Self {
        if let Fault::Small { index, .. }
        | Fault::Large { index, .. }
        | Fault::Newer { index, .. } = &mut self
        {
            *index = Some(i);
        }
        self
    }

    pub fn status(&self) -> drex_status {
        match self {
            Fault::Core(e) => match e.kind() {
                Kind::Invalid => DREX_ERROR_INVALID_ARGUMENT,
                Kind::UnknownRequest => DREX_ERROR_UNKNOWN_REQUEST,
                Kind::DuplicateRequest => DREX_ERROR_DUPLICATE_REQUEST,
                Kind::CallOrder => DREX_ERROR_CALL_ORDER,
                Kind::Capacity => DREX_ERROR_CAPACITY,
                Kind::Unsupported => DREX_ERROR_UNSUPPORTED,
                Kind::Device => DREX_ERROR_DEVICE,
                Kind::Memory => DREX_ERROR_MEMORY,
            },
            Fault::Null(_) => DREX_ERROR_NULL_ARGUMENT,
            Fault::Small { .. } | Fault::Large { .. } | Fault::Newer { .. } => {
                DREX_ERROR_STRUCT_SIZE
            }
            Fault::Profile(_) => DREX_ERROR_INVALID_ARGUMENT,
            Fault::Abi(_) => DREX_ERROR_ABI_MISMATCH,
            Fault::Handle(_) => DREX_ERROR_INVALID_HANDLE,
            Fault::Busy(_) => DREX_ERROR_HANDLE_BUSY,
            Fault::Full(..) => DREX_ERROR_CAPACITY,
            Fault::Name { .. } => DREX_ERROR_INVALID_ARGUMENT,
            Fault::Poisoned(_) | Fault::Panic => DREX_ERROR_PANIC,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Fault::Core(ref e) => e.fmt(f),
            Fault::Null(what) => write!(f, "{what} is NULL"),
            Fault::Small {
                what,
                index,
                size,
                least,
            } => write!(
                f,
                "{}.size is {size}; expected at least {least} (use the struct's INITIALIZER)",
                Name(what, index)
            ),
            Fault::Large { what, index, size } => write!(
                f,
                "{}.size is {size}; expected at most 4096",
                Name(what, index)
            ),
            Fault::Newer {
                what,
                index,
                size,
                known,
            } => write!(
                f,
                "{}.size is {size}, from a newer version than this library, which knows \
                 {known} bytes, and fields unknown here are in use",
                Name(what, index)
            ),
            Fault::Profile(ref text) => f.write_str(text),
            Fault::Abi(got) => write!(
                f,
                "config.abi_version is {got}; this library has ABI version {DREX_ABI_VERSION}"
            ),
            Fault::Handle(what) => write!(
                f,
                "{what} is not a live handle: never created, or destroyed"
            ),
            Fault::Busy(what) => write!(f, "another thread is inside a call on this {what}"),
            Fault::Poisoned(what) => write!(
                f,
                "an earlier call on this {what} panicked; expected its destruction and nothing else"
            ),
            Fault::Full(plural, max) => {
                write!(f, "{max} {plural} are alive, and there is no room for more")
            }
            Fault::Name {
                what,
                ref got,
                ref expected,
            } => write!(f, "{what} is \"{got}\"; expected one of {expected}"),
            Fault::Panic => f.write_str("internal error"),
        }
    }
}
