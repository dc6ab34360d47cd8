// SPDX-License-Identifier: Apache-2.0

//! The window that runs next, and its rows: held rows that are flushed, ready rows,
//! and rows that ride along with prompts.

pub mod planner;
