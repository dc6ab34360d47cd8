// SPDX-License-Identifier: Apache-2.0

//! What the system's loader says.

/// The loader's own words, which the error keeps behind its own.
pub fn reason(e: &libloading::Error) -> String {
    std::error::Error::source(e).map_or_else(|| e.to_string(), |s| s.to_string())
}
