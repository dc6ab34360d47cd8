// SPDX-License-Identifier: Apache-2.0

//! Drives drex's own engine, the same code that serves, with a virtual clock:
//! windows take what a cost profile says, rows exit as a workload says.

pub mod agreement;
pub mod draw;
pub mod grid;
pub mod plot;
pub mod profiles;
pub mod quality;
pub mod record;
pub mod report;
pub mod run;
pub mod scale;
pub mod workload;
