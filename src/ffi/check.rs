// SPDX-License-Identifier: Apache-2.0

//! Fields that may have few values.

use crate::core::error::Error;

pub fn reserved(value: u32) -> Result<(), Error> {
    match value {
        0 => Ok(()),
        _ => Err(Error::int("reserved", value, "0")),
    }
}

pub fn flag(field: &'static str, value: u32) -> Result<bool, Error> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::int(field, value, "0 or 1")),
    }
}
