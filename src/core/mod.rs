// SPDX-License-Identifier: Apache-2.0

//! The decisions, and nothing else: no FFI, no device, no clock, no threads.
//! Time comes in as nanoseconds of whatever monotonic clock the caller reads.
//! Everything is allocated in [`engine::Engine::new`]; no later call allocates.

pub mod auto;
pub mod buffer;
pub mod carrier;
pub mod config;
pub mod cost;
pub mod counters;
pub mod drafts;
pub mod dues;
pub mod engine;
pub mod error;
pub mod exits;
pub mod gaps;
pub mod memory;
pub mod metric;
pub mod names;
pub mod pages;
pub mod pending;
pub mod planner;
pub mod policy;
pub mod profile;
pub mod prompts;
pub mod queue;
pub mod request;
pub mod rollout;
pub mod speculate;

/// Most exit ramps that one model may have.
pub const MAX_RAMPS: usize = 16;
/// "No slot", "no ramp", "not in a list".
pub const NONE: u32 = u32::MAX;
