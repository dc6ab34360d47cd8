// SPDX-License-Identifier: Apache-2.0
//! A backend for Triton Inference Server.
//!
//! Symbols of Triton come from the process that loads the library: nothing is linked by name. In unit tests a fake host
//! defines those that the tested parts need.

pub mod clock;
pub mod engine;
pub mod llama;
pub mod sampling;
pub mod settings;
pub mod text;
pub mod triton;

// Made of calls of Triton, which the fake host does not have; tested with the real server.
#[cfg(not(test))]
pub mod entry;
#[cfg(not(test))]
pub mod instance;
#[cfg(not(test))]
pub mod metrics;
#[cfg(not(test))]
pub mod model;
#[cfg(not(test))]
pub mod request;
#[cfg(not(test))]
pub mod sender;
