// SPDX-License-Identifier: Apache-2.0

//! The numbers that are learned as serving goes on: times of windows and of the
//! host, how often rows exit, how often drafts stand, how many prompt rows come, how
//! far answers differ. Whether a pass over prompts is cut follows from the times.

pub mod acceptance;
pub mod agreement;
pub mod carrier;
pub mod cost;
pub mod exit_rate;
pub mod host_time;
pub mod profile;
pub mod prompts;
pub mod reliability;
