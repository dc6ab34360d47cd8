// SPDX-License-Identifier: Apache-2.0

//! The places where rows wait, and their owners: requests, arena slots, queues,
//! deadlines, pending rows.

pub mod buffer;
pub mod deadlines;
pub mod pending;
pub mod queue;
pub mod requests;
