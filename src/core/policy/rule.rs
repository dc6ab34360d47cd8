// SPDX-License-Identifier: Apache-2.0

//! The rows that a policy waits for before a flush, and the window that runs
//! next by them.

use crate::core::config::{Config, Policy};

/// A threshold rule. Confident rows always exit, the others are held.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Bit r: ramp r is looked at. 0: no early exit.
    pub ramps: u32,
    /// theta: rows held at a ramp that make it flush, as a share of
    /// [`Rule::scale`].
    pub hold: f32,
    /// phi: held rows flush when fewer rows than this are ready, as a share
    /// of the same; at least one row.
    pub ready: f32,
    /// A draft of a request whose thresholds are learned is made only if it is
    /// emitted with this chance: it and all drafts before it are what the full
    /// model says.
    pub survival: f32,
    /// Most drafts of such a request.
    pub drafts: u32,
}

/// Drafts of a request that a rule tells apart.
pub const MOST_DRAFTS: u32 = 8;

/// [`Rule::survival`] before anything is known, and for policies other than `auto`.
pub const SURVIVAL: f32 = 0.5;

impl Rule {
    pub const OFF: Rule = Rule {
        ramps: 0,
        hold: 0.0,
        ready: 0.0,
        survival: SURVIVAL,
        drafts: MOST_DRAFTS,
    };

    /// Rows that the shares refer to: no more than two batches' worth of rows
    /// matter, however many requests there are.
    pub fn scale(requests: usize, batch: usize) -> f32 {
        requests.min(2 * batch) as f32
    }

    pub fn hold_rows(&self, scale: f32) -> u32 {
        ((self.hold * scale).round() as u32).max(1)
    }

    pub fn ready_rows(&self, scale: f32) -> u32 {
        ((self.ready * scale).round() as u32).max(1)
    }
}

/// A policy's rule, in rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowRule {
    /// Bit r: ramp r is looked at.
    pub ramps: u32,
    /// Held rows at a ramp that make it flush.
    pub hold_rows: u32,
    /// Held rows flush when fewer rows than this are ready.
    pub ready_rows: u32,
    /// See [`Rule::survival`], [`Rule::drafts`].
    pub survival: f32,
    /// `None`: no bound but that on pending rows.
    pub drafts: Option<u32>,
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
            survival: match config.policy {
                Policy::Auto => rule.survival,
                _ => SURVIVAL,
            },
            // What a rule does not tell apart, it does not forbid.
            drafts: (config.policy == Policy::Auto && rule.drafts < MOST_DRAFTS)
                .then_some(rule.drafts),
        }
    }
}

/// ceil(0.6 * n), exactly.
fn six_tenths(n: usize) -> usize {
    (n * 3).div_ceil(5)
}

/// The window to run next: the deepest that is due, the first one while
/// enough rows are ready, else the fullest, the deepest among equals.
/// `held[0]` is not looked at.
pub fn choose(held: &[u32], all_held: u32, waiting: u32, hold: u32, ready: u32) -> usize {
    if all_held == 0 {
        return 0;
    }
    for k in (1..held.len()).rev() {
        if held[k] >= hold {
            return k;
        }
    }
    if waiting >= ready {
        return 0;
    }
    let mut best = 0;
    for k in (1..held.len()).rev() {
        if held[k] > 0 && (best == 0 || held[k] > held[best]) {
            best = k;
        }
    }
    best
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
