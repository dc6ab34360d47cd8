// SPDX-License-Identifier: Apache-2.0

//! The rows that a policy waits for before a flush.

use crate::core::config::Config;
use crate::core::policy::Policy;
use crate::core::policy::auto::rollout::Rule;

/// A policy's rule, in rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRule {
    /// Bit r: ramp r is looked at.
    pub ramps: u32,
    /// Held rows at a ramp that make it flush.
    pub hold_rows: u32,
    /// Held rows flush when fewer rows than this are ready.
    pub ready_rows: u32,
}

impl RowRule {
    /// `decoding`: requests alive that have had a token to run. `rule` is
    /// what `auto` follows.
    pub fn new(config: &Config, decoding: usize, rule: Rule) -> Self {
        let ramps = match config.policy {
            Policy::Off => 0,
            Policy::Auto => rule.ramps,
            _ => u32::MAX,
        };
        let scale = Rule::scale(decoding, config.batch());
        let hold_rows = match config.policy {
            Policy::Auto => rule.hold_rows(scale),
            _ if config.flush_rows > 0 => config.flush_rows,
            Policy::Art => config.batch() as u32,
            _ => six_tenths(decoding.min(config.batch())).max(1) as u32,
        };
        let ready_rows = match config.policy {
            Policy::Auto => rule.ready_rows(scale),
            Policy::Hold => config.min_ready.max(1),
            _ => 1,
        };
        RowRule {
            ramps,
            hold_rows,
            ready_rows,
        }
    }
}

/// ceil(0.6 * n), exactly.
fn six_tenths(n: usize) -> usize {
    (n * 3).div_ceil(5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_tenths_rounds_up() {
        let got: Vec<usize> = (0..=10).map(six_tenths).collect();
        assert_eq!(got, [0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6]);
    }
}
