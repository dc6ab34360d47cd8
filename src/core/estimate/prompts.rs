// SPDX-License-Identifier: Apache-2.0

//! The host's prompt rows, as far as they run in windows: those between two
//! windows of a pass, and how many come for each token.

/// Tokens and prompt rows that are remembered: so many carriers' worth.
const CARRIERS: f64 = 64.0;
/// And so many tokens' worth, which forgets prompts that have stopped coming.
const TOKENS: f64 = 4096.0;

/// Prompt rows that a window left at a ramp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transit {
    pub ramp: usize,
    pub rows: u32,
}

#[derive(Debug, Clone, Default)]
pub struct Prompts {
    /// On their way: the next window takes them on.
    pub transit: Option<Transit>,
    /// The host has reported prompt rows: it runs no prompts between windows.
    pub carried: bool,
    rows: f64,
    carriers: f64,
    tokens: f64,
}

impl Prompts {
    /// A window from layer 0 had so many prompt rows.
    pub fn ran(&mut self, rows: u32) {
        let keep = 1.0 - 1.0 / CARRIERS;
        self.rows = self.rows * keep + f64::from(rows);
        self.carriers = self.carriers * keep + 1.0;
        self.tokens *= keep;
    }

    /// A window made so many tokens.
    pub fn made(&mut self, tokens: u64) {
        let tokens = tokens as f64;
        let keep = (1.0 - tokens / TOKENS).max(0.0);
        self.rows *= keep;
        self.carriers *= keep;
        self.tokens = self.tokens * keep + tokens;
    }

    /// Prompt rows for each token made.
    pub fn per_token(&self) -> f64 {
        match self.tokens > 0.0 {
            true => self.rows / self.tokens,
            false => 0.0,
        }
    }

    /// Prompt rows of a carrier.
    pub fn chunk(&self) -> f64 {
        match self.carriers > 0.0 {
            true => self.rows / self.carriers,
            false => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_are_those_of_late() {
        let mut p = Prompts::default();
        assert_eq!((p.per_token(), p.chunk()), (0.0, 0.0));
        for _ in 0..500 {
            p.ran(300);
            for _ in 0..20 {
                p.made(5);
            }
        }
        assert!((p.per_token() / 3.0 - 1.0).abs() < 0.05, "{p:?}");
        assert!((p.chunk() / 300.0 - 1.0).abs() < 0.01, "{p:?}");
        for _ in 0..500 {
            p.ran(50);
            p.made(100);
        }
        assert!((p.per_token() / 0.5 - 1.0).abs() < 0.05, "{p:?}");
        assert!((p.chunk() / 50.0 - 1.0).abs() < 0.01, "{p:?}");
        for _ in 0..5000 {
            p.made(10);
        }
        assert!(p.per_token() < 1e-3, "{p:?}");
    }
}
