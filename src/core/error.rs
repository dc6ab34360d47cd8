// SPDX-License-Identifier: Apache-2.0

//! Errors carry values, not strings, so that failing allocates nothing; the text
//! is made where it is asked for.

use std::fmt;

/// A number that an error text shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    Int(u64),
    Signed(i64),
    Float(f32),
    /// An address.
    Pointer(u64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Int(v) => write!(f, "{v}"),
            Value::Signed(v) => write!(f, "{v}"),
            Value::Float(v) => write!(f, "{v}"),
            Value::Pointer(0) => f.write_str("NULL"),
            Value::Pointer(v) => write!(f, "{v:#x}"),
        }
    }
}

/// The class of an error: what the caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Invalid,
    UnknownRequest,
    DuplicateRequest,
    CallOrder,
    Capacity,
    Unsupported,
    Device,
    Memory,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Error {
    /// A field or argument has a value that it may not have.
    Invalid {
        field: &'static str,
        /// The element, where the field is an array.
        index: Option<usize>,
        value: Value,
        expected: &'static str,
    },
    /// A field's value clashes with another field's.
    Conflict {
        field: &'static str,
        index: Option<usize>,
        value: u64,
        other: &'static str,
        other_value: u64,
        why: &'static str,
    },
    UnknownRequest {
        id: u64,
    },
    DuplicateRequest {
        id: u64,
    },
    /// `ready` for a request that already has a token on its way.
    NotIdle {
        id: u64,
        state: &'static str,
    },
    /// A call that does not fit what was called before.
    CallOrder(&'static str),
    /// A field has another value than in the call that this one ends.
    Changed {
        field: &'static str,
        value: u64,
        call: &'static str,
        before: u64,
    },
    /// Something preallocated is full, or an array is too short.
    Capacity {
        field: &'static str,
        value: u64,
        need: u64,
        why: &'static str,
    },
    Unsupported {
        field: &'static str,
        value: u64,
        why: &'static str,
    },
    /// Two KV layers between which no row can be copied.
    KvLayers {
        field: &'static str,
        source: usize,
        source_value: Value,
        target: usize,
        target_value: Value,
        why: &'static str,
    },
    Device(&'static str),
    /// The allocator refused so many bytes.
    Memory {
        bytes: u64,
    },
    /// A device's driver refused a call.
    Driver {
        call: &'static str,
        code: i32,
        name: &'static str,
        /// The driver's own text.
        text: &'static str,
    },
}

impl Error {
    pub fn int(field: &'static str, value: impl Into<u64>, expected: &'static str) -> Self {
        Error::Invalid {
            field,
            index: None,
            value: Value::Int(value.into()),
            expected,
        }
    }

    pub fn signed(field: &'static str, value: impl Into<i64>, expected: &'static str) -> Self {
        Error::Invalid {
            field,
            index: None,
            value: Value::Signed(value.into()),
            expected,
        }
    }

    pub fn float(field: &'static str, value: f32, expected: &'static str) -> Self {
        Error::Invalid {
            field,
            index: None,
            value: Value::Float(value),
            expected,
        }
    }

    pub fn pointer(field: &'static str, address: u64, expected: &'static str) -> Self {
        Error::Invalid {
            field,
            index: None,
            value: Value::Pointer(address),
            expected,
        }
    }

    #[must_use]
    pub fn at(mut self, i: usize) -> Self {
        if let Error::Invalid { index, .. } | Error::Conflict { index, .. } = &mut self {
            *index = Some(i);
        }
        self
    }

    /// As [`Error::at`], where the index so far counts from `by`.
    #[must_use]
    pub fn moved(mut self, by: usize) -> Self {
        if let Error::Invalid { index, .. } | Error::Conflict { index, .. } = &mut self {
            *index = index.map(|i| i + by);
        }
        self
    }

    pub fn kind(&self) -> Kind {
        match self {
            Error::Invalid { .. } | Error::Conflict { .. } => Kind::Invalid,
            Error::UnknownRequest { .. } => Kind::UnknownRequest,
            Error::DuplicateRequest { .. } => Kind::DuplicateRequest,
            Error::NotIdle { .. } | Error::CallOrder(_) | Error::Changed { .. } => Kind::CallOrder,
            Error::Capacity { .. } => Kind::Capacity,
            Error::Unsupported { .. } | Error::KvLayers { .. } => Kind::Unsupported,
            Error::Device(_) | Error::Driver { .. } => Kind::Device,
            Error::Memory { .. } => Kind::Memory,
        }
    }
}

/// A field's name with its index, where it has one: of an array, or of its struct in an array of them (`layers[3].k`).
pub struct Name(pub &'static str, pub Option<usize>);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.1, self.0.rsplit_once('.')) {
            (Some(i), Some((array, field))) => write!(f, "{array}[{i}].{field}"),
            (Some(i), None) => write!(f, "{}[{i}]", self.0),
            (None, _) => f.write_str(self.0),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::Invalid {
                field,
                index,
                value,
                expected,
            } => write!(f, "{} is {value}; expected {expected}", Name(field, index)),
            Error::Conflict {
                field,
                index,
                value,
                other,
                other_value,
                why,
            } => write!(
                f,
                "{} is {value}, but {} is {other_value}: {why}",
                Name(field, index),
                // A field with a dot is one of the same element.
                Name(other, index.filter(|_| other.contains('.')))
            ),
            Error::UnknownRequest { id } => write!(f, "no request has id {id}"),
            Error::DuplicateRequest { id } => {
                write!(f, "a request with id {id} is alive already")
            }
            Error::NotIdle { id, state } => {
                write!(f, "request {id} is {state}; expected it to be idle")
            }
            Error::CallOrder(text) => f.write_str(text),
            Error::Changed {
                field,
                value,
                call,
                before,
            } => write!(f, "{field} is {value}, but in {call} it was {before}"),
            Error::Capacity {
                field,
                value,
                need,
                why,
            } => write!(f, "{field} is {value}, but {need} needed: {why}"),
            Error::Unsupported { field, value, why } => {
                write!(f, "{field} is {value}, which is not supported: {why}")
            }
            Error::KvLayers {
                field,
                source,
                source_value,
                target,
                target_value,
                why,
            } => write!(
                f,
                "layers[{target}].{field} is {target_value}, but layers[{source}].{field} is \
                 {source_value}: {why}"
            ),
            Error::Device(text) => f.write_str(text),
            Error::Memory { bytes } => write!(f, "{bytes} bytes of memory were refused"),
            Error::Driver {
                call,
                code,
                name,
                text,
            } => write!(f, "{call} failed with {name} ({code}): {text}"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_field_and_value() {
        let e = Error::float("threshold", f32::NAN, "a finite number >= 0");
        assert_eq!(
            e.to_string(),
            "threshold is NaN; expected a finite number >= 0"
        );
        let e = Error::int("ramp_layers", 3u32, "more than the one before").at(2);
        assert_eq!(
            e.to_string(),
            "ramp_layers[2] is 3; expected more than the one before"
        );
        let e = Error::pointer("layers.k", 0x1f00, "memory").at(3);
        assert_eq!(e.to_string(), "layers[3].k is 0x1f00; expected memory");
        let e = Error::pointer("table", 0, "an address");
        assert_eq!(e.to_string(), "table is NULL; expected an address");
        let e = Error::Conflict {
            field: "layers.k_cell_stride",
            index: Some(1),
            value: 3,
            other: "layers.k_row_bytes",
            other_value: 4,
            why: "cells would overlap",
        };
        assert_eq!(
            e.to_string(),
            "layers[1].k_cell_stride is 3, but layers[1].k_row_bytes is 4: cells would overlap"
        );
    }
}
