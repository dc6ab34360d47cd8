// SPDX-License-Identifier: Apache-2.0

//! The head over the most frequent tokens.

use std::collections::HashMap;

use ndarray::{Array2, ArrayView2};

use crate::states::Row;

pub struct Head {
    /// Increasing.
    pub tokens: Vec<i32>,
    /// [tokens, width]
    pub rows: Array2<f32>,
    index: HashMap<i32, usize>,
}

impl Head {
    pub fn new(tokens: Vec<i32>, rows: Array2<f32>) -> Head {
        let index = tokens.iter().enumerate().map(|(i, &t)| (t, i)).collect();
        Head {
            tokens,
            rows,
            index,
        }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn find(&self, token: i32) -> Option<usize> {
        self.index.get(&token).copied()
    }

    pub fn logits(&self, states: ArrayView2<f32>) -> Array2<f32> {
        states.dot(&self.rows.t())
    }

    /// Share of rows whose first choice is among the tokens.
    pub fn coverage(&self, rows: &[Row]) -> f64 {
        let n = rows.iter().filter(|r| self.find(r.top).is_some()).count();
        n as f64 / rows.len().max(1) as f64
    }
}

/// The `size` most frequent tokens: what the model says most often, then what the texts have most often, then the first
/// of the vocabulary, which tokenizers sort by frequency.
pub fn frequent(rows: &[Row], n_vocab: usize, size: usize) -> Vec<i32> {
    let mut said = vec![0u32; n_vocab];
    let mut read = vec![0u32; n_vocab];
    for r in rows {
        for (count, token) in [(&mut said, r.top), (&mut read, r.token)] {
            if let Some(n) = usize::try_from(token).ok().and_then(|t| count.get_mut(t)) {
                *n += 1;
            }
        }
    }
    let mut all: Vec<usize> = (0..n_vocab).collect();
    all.sort_by_key(|&t| (std::cmp::Reverse(said[t]), std::cmp::Reverse(read[t]), t));
    let mut tokens: Vec<i32> = all.into_iter().take(size).map(|t| t as i32).collect();
    tokens.sort_unstable();
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_comes_before_what_is_read() {
        let row = |token, top| Row {
            token,
            top,
            p_top: 1.0,
            log_sum: 0.0,
        };
        let rows = [row(7, 9), row(7, 9), row(5, 8), row(6, 8), row(6, 8)];
        assert_eq!(frequent(&rows, 10, 1), [8]);
        assert_eq!(frequent(&rows, 10, 2), [8, 9]);
        assert_eq!(frequent(&rows, 10, 4), [6, 7, 8, 9]);
        assert_eq!(frequent(&rows, 10, 6), [0, 5, 6, 7, 8, 9]);
        let head = Head::new(vec![8], Array2::zeros((1, 2)));
        assert_eq!(head.coverage(&rows), 0.6);
    }
}
