// SPDX-License-Identifier: Apache-2.0

//! drex gives a serving engine early exit with dynamic rebatching.
//!
//! The public interface is the C ABI in `include/drex.h`, generated from
//! [`ffi`]. [`core`] makes the decisions, [`device`] touches the host's
//! tensors, [`engine`] joins the two.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod core;
pub mod device;
pub mod engine;
pub mod ffi;
pub mod observe;
pub mod profile;
pub mod text;
