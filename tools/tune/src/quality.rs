// SPDX-License-Identifier: Apache-2.0

//! How often an exit says what the full model says, and whether it knows how often.

use ndarray::ArrayView2;

use crate::{head::Head, refine::softmax, states::Row};

/// What an exit says at a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Said {
    /// Its first choice is the full model's.
    pub right: bool,
    /// The probability of its first choice.
    pub max_prob: f32,
    /// That, less the probability of its second choice.
    pub gap: f32,
    /// 1 - entropy / ln(tokens)
    pub entropy: f32,
}

/// Rows scored at once.
const CHUNK: usize = 256;

/// What an exit says whose states `y` enter the head.
pub fn said(head: &Head, y: ArrayView2<f32>, rows: &[Row]) -> Vec<Said> {
    let mut all = Vec::with_capacity(rows.len());
    let most = (head.len() as f32).ln();
    for (part, rows) in y
        .axis_chunks_iter(ndarray::Axis(0), CHUNK)
        .zip(rows.chunks(CHUNK))
    {
        let mut p = head.logits(part);
        for (mut p, row) in p.outer_iter_mut().zip(rows) {
            softmax(p.view_mut());
            let (mut first, mut second) = ((0, 0.0f32), 0.0f32);
            let mut entropy = 0.0;
            for (i, &v) in p.iter().enumerate() {
                if v > first.1 {
                    second = first.1;
                    first = (i, v);
                } else if v > second {
                    second = v;
                }
                if v > 0.0 {
                    entropy -= v * v.ln();
                }
            }
            all.push(Said {
                right: head.tokens[first.0] == row.top,
                max_prob: first.1,
                gap: first.1 - second,
                entropy: 1.0 - entropy / most,
            });
        }
    }
    all
}

pub fn agreement(said: &[Said]) -> f64 {
    let n = said.iter().filter(|s| s.right).count();
    n as f64 / said.len().max(1) as f64
}

/// Expected calibration error over 15 bins of equal width: the mean distance of confidence and share of right ones.
pub fn calibration_error(pairs: impl Iterator<Item = (f32, bool)>) -> f64 {
    const BINS: usize = 15;
    let mut bins = [(0.0f64, 0.0f64); BINS];
    let mut n = 0u64;
    for (confidence, right) in pairs {
        let bin = ((f64::from(confidence) * BINS as f64) as usize).min(BINS - 1);
        bins[bin].0 += f64::from(confidence);
        bins[bin].1 += f64::from(u8::from(right));
        n += 1;
    }
    let off: f64 = bins.iter().map(|b| (b.0 - b.1).abs()).sum();
    off / n.max(1) as f64
}

/// Of the rows at least so confident: their share of all, and the share of right ones among them.
pub fn leaving(pairs: impl Iterator<Item = (f32, bool)>, threshold: f32) -> (f64, f64) {
    let (mut all, mut left, mut right) = (0u64, 0u64, 0u64);
    for (confidence, is_right) in pairs {
        all += 1;
        if confidence >= threshold {
            left += 1;
            right += u64::from(is_right);
        }
    }
    (
        left as f64 / all.max(1) as f64,
        right as f64 / left.max(1) as f64,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn errors_by_hand() {
        // One bin: mean confidence 0.9, half of them right.
        let one = [(0.88, true), (0.92, false)];
        assert!((calibration_error(one.into_iter()) - 0.4).abs() < 1e-6);
        let two = [(1.0, true), (0.0, false)];
        assert_eq!(calibration_error(two.into_iter()), 0.0);
        assert_eq!(leaving(one.into_iter(), 0.9), (0.5, 0.0));
        assert_eq!(leaving(one.into_iter(), 0.5), (1.0, 0.5));
    }

    #[test]
    fn an_exit_says_a_token() {
        let head = Head::new(vec![3, 8], array![[1.0, 0.0], [0.0, 1.0]]);
        let row = |top| Row {
            token: 0,
            top,
            p_top: 1.0,
            log_sum: 0.0,
        };
        let said = said(&head, array![[0.0, 3.0f32.ln()]].view(), &[row(8)]);
        assert!(said[0].right);
        assert!((said[0].max_prob - 0.75).abs() < 1e-6);
        assert!((said[0].gap - 0.5).abs() < 1e-6);
        let h = -(0.75f32 * 0.75f32.ln() + 0.25 * 0.25f32.ln());
        assert!((said[0].entropy - (1.0 - h / 2.0f32.ln())).abs() < 1e-5);
    }
}
