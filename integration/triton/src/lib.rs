// SPDX-License-Identifier: Apache-2.0
//! Parts of a backend for Triton Inference Server.
//!
//! Symbols of Triton come from the process that loads the library: nothing is linked by name. In unit tests a fake host
//! defines them.

pub mod sampling;
pub mod text;
pub mod triton;
