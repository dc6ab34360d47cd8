// SPDX-License-Identifier: Apache-2.0
//! Servers as children, an HTTP client, load of many kinds, and a fair comparison of servers under it.

pub mod browser;
pub mod client;
pub mod exits;
pub mod families;
pub mod generate;
pub mod gguf;
pub mod http;
pub mod load;
pub mod machine;
pub mod metrics;
pub mod prompts;
pub mod race;
pub mod score;
pub mod server;
pub mod stats;
pub mod suite;
pub mod traffic;

/// Whether a text is a quality as llama-server's `--drex-quality` takes it: `lossless`, or an agreement.
pub fn is_quality(text: &str) -> bool {
    text == "lossless"
        || text
            .parse()
            .is_ok_and(|share| (0.5..=1.0).contains::<f64>(&share))
}
