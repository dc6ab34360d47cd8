// SPDX-License-Identifier: Apache-2.0
//! Triton's side: declarations, and types whose drop gives Triton back what is its own.

pub mod abi;
pub mod error;
pub mod log;
pub mod memory;
pub mod reply;
pub mod statistics;
pub mod tensor;
pub mod version;

#[cfg(test)]
pub mod fake_host;
