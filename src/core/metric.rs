// SPDX-License-Identifier: Apache-2.0

//! From the moments of one row of logits to its confidence.

use crate::core::names::named;

named! {
    /// How sure a row is, as a number in [0, 1].
    Metric {
        /// p(top 1) - p(top 2)
        Gap = c"gap",
        /// p(top 1)
        MaxProb = c"maxprob",
        /// 1 - H / ln(n_vocab)
        Entropy = c"entropy",
    }
}

/// Sums over one row's logits, whatever device looked at them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments {
    /// The greatest logit.
    pub top: f32,
    /// The second greatest; equal to `top` on a tie, -Inf in a row of one.
    pub second: f32,
    /// sum of exp(x - top)
    pub sum: f64,
    /// sum of (x - top) * exp(x - top)
    pub weighted: f64,
    /// A NaN was among the logits.
    pub nan: bool,
}

/// A ramp's finding about one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// In [0, 1], or NaN: then the row must not exit.
    pub confidence: f32,
    /// The lowest index among the greatest logits; -1 when there is none.
    pub token: i32,
}

impl Score {
    pub const NONE: Score = Score {
        confidence: f32::NAN,
        token: -1,
    };
}

impl Moments {
    /// NaN where the row has no distribution: a NaN or +Inf among the logits,
    /// or nothing but -Inf.
    pub fn confidence(&self, metric: Metric, n_vocab: usize) -> f32 {
        if self.nan || !self.top.is_finite() {
            return f32::NAN;
        }
        let c = match metric {
            Metric::MaxProb => 1.0 / self.sum,
            Metric::Gap => {
                let second = f64::from(self.second) - f64::from(self.top);
                -second.exp_m1() / self.sum
            }
            Metric::Entropy if n_vocab == 1 => 1.0,
            Metric::Entropy => {
                let h = self.sum.ln() - self.weighted / self.sum;
                1.0 - h / (n_vocab as f64).ln()
            }
        };
        c.clamp(0.0, 1.0) as f32
    }
}
