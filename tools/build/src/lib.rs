// SPDX-License-Identifier: Apache-2.0

//! What `cargo xtask` does: fetches, builds, runs and packages drex and the programs that it goes into. A library, since the
//! tools and the suites of tests need the same builds.

pub mod cache;
pub mod cargo;
pub mod fetch;
pub mod install;
pub mod kernels;
pub mod llama;
pub mod models;
pub mod patches;
pub mod process;
pub mod python;
pub mod serve;
pub mod tools;

use std::path::PathBuf;

use clap::Args;

/// Which llama.cpp.
#[derive(Args, Clone, Default)]
pub struct Source {
    /// A checkout of llama.cpp to use instead of the pinned source.
    ///
    /// It is copied into the cache and patched there; the checkout itself is never changed.
    #[arg(long, value_name = "DIR")]
    pub llama_src: Option<PathBuf>,
}
