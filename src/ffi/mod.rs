// SPDX-License-Identifier: Apache-2.0

//! The C ABI: a thin shell that checks what comes in, finds the engine behind
//! a handle, and turns errors and panics into status codes and texts.

pub mod device;
pub mod entry;
pub mod error;
pub mod functions;
pub mod handle;
pub mod observe;
pub mod pages;
pub mod types;
