// SPDX-License-Identifier: Apache-2.0

//! The structs that begin with their size, and what their first versions had.

use super::arena::drex_arena;
use super::complete::drex_completion;
use super::engine::drex_config;
use super::entry::Sized32;
use super::kv::drex_kv_layer;
use super::learn::drex_observation;
use super::pages::{drex_pages_config, drex_pages_stats};
use super::plan::{drex_plan_input, drex_step};
use super::ramp::drex_logits;
use super::requests::{drex_request_config, drex_request_info};
use super::stats::drex_stats;

macro_rules! sized {
    ($($t:ident = $first:expr),* $(,)?) => {
        $(
            // SAFETY: as the trait asks; see their definitions.
            unsafe impl Sized32 for $t {
                const FIRST: usize = $first;
            }
            const _: () = assert!($first <= size_of::<$t>());
        )*
        /// All of them, for the test that holds them against the releases.
        pub const FIRST: &[(&str, usize)] = &[$((stringify!($t), $first)),*];
    };
}
sized!(
    drex_config = 120,
    drex_kv_layer = 72,
    drex_request_config = 56,
    drex_request_info = 192,
    drex_plan_input = 16,
    drex_step = 24,
    drex_logits = 48,
    drex_arena = 56,
    drex_completion = 32,
    drex_observation = 32,
    drex_stats = 1040,
    drex_pages_config = 16,
    drex_pages_stats = 56,
);
