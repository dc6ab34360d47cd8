// SPDX-License-Identifier: Apache-2.0

//! The decisions, without FFI, device, clock or threads. Time comes in as
//! nanoseconds of whatever monotonic clock the caller reads. The scheduler
//! allocates in [`scheduler::Scheduler::new`], pages in [`pages::Pages::new`]; no
//! later call does.
//!
//! | module | holds |
//! | --- | --- |
//! | [`scheduler`] | the calls of a step, a file for each |
//! | [`policy`] | the policies: who exits at a ramp, how many rows a flush waits for, the search of `auto` |
//! | [`flush`] | the choice of the next window and of its rows |
//! | [`rows`] | the places where rows wait: requests, arena slots, queues, deadlines, pending rows |
//! | [`estimate`] | the numbers that are learned: times, exits, drafts, prompts; whether a pass over prompts is cut |
//! | [`config`], [`decision`], [`counters`], [`metric`], [`error`] | what goes in and what comes out |
//! | [`pages`], [`sampling`] | two services that need no scheduler: paged K/V, speculative sampling |
//! | [`names`], [`memory`], [`random`] | helpers |

pub mod calibration;
pub mod config;
pub mod counters;
pub mod decision;
pub mod error;
pub mod estimate;
pub mod flush;
pub mod memory;
pub mod metric;
pub mod names;
pub mod pages;
pub mod policy;
pub mod random;
pub mod rows;
pub mod sampling;
pub mod scheduler;

/// Most exit ramps that one model may have.
pub const MAX_RAMPS: usize = 16;
/// "No slot", "no ramp", "not in a list".
pub const NONE: u32 = u32::MAX;
