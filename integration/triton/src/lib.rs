// SPDX-License-Identifier: Apache-2.0
//! A backend for Triton Inference Server.
//!
//! Functions of Triton come from the process that loads the library: nothing is linked by name. In unit tests they are
//! those of a fake host.

pub mod clock;
pub mod engine;
pub mod entry;
pub mod exit;
pub mod families;
pub mod instance;
pub mod intake;
pub mod llama;
pub mod load;
pub mod loader;
pub mod metrics;
pub mod model;
pub mod registry;
pub mod request;
pub mod sampling;
pub mod sender;
pub mod settings;
pub mod text;
pub mod triton;
