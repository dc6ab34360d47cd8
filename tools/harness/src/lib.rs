// SPDX-License-Identifier: Apache-2.0
//! Programs as children, an HTTP client, load of many kinds, and a fair comparison of servers under it.

pub mod client;
pub mod http;
pub mod load;
pub mod process;
pub mod race;
pub mod server;
pub mod stats;
pub mod traffic;
