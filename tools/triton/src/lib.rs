// SPDX-License-Identifier: Apache-2.0

//! Triton Inference Server with the drex backend, on loopback: fetched, laid out, started, and asked.

pub mod load;
pub mod server;
pub mod setup;
