// SPDX-License-Identifier: Apache-2.0

//! The C ABI: a thin shell that checks what comes in, finds the engine behind
//! a handle, and turns errors and panics into status codes and texts. The first
//! block of modules has the parts of the header, whose order is in
//! `tests/header.rs`; the second serves them.

pub mod arena;
pub mod complete;
pub mod engine;
pub mod graphs;
pub mod kv;
pub mod learn;
pub mod observe;
pub mod pages;
pub mod plan;
pub mod ramp;
pub mod requests;
pub mod stats;
pub mod status;
pub mod verify;

mod check;
pub mod entry;
mod fault;
pub mod handle;
mod last_error;
mod names;
pub mod sizes;

pub use arena::*;
pub use complete::*;
pub use engine::*;
pub use graphs::*;
pub use kv::*;
pub use learn::*;
pub use observe::*;
pub use pages::*;
pub use plan::*;
pub use ramp::*;
pub use requests::*;
pub use stats::*;
pub use status::*;
pub use verify::*;
