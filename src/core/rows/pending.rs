// SPDX-License-Identifier: Apache-2.0

//! Pending rows: tokens that left at a ramp, whose hidden rows stay in the
//! arena until a deep window of their request takes them along.
//!
//! A request's pending rows are the tokens right before its next one, the
//! newest last. A newer one never waits at a deeper ramp than an older one:
//! when a row enters a window, those that wait where it begins go with it, so
//! what a token attends to is always there. Hence the rows that a window takes
//! along are the newest ones, and at the last layer they are all of them.

use crate::core::error::Result;
use crate::core::{NONE, memory};

/// The pending rows of one request.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    oldest: u32,
    newest: u32,
    len: u32,
}

impl Chain {
    pub const EMPTY: Chain = Chain {
        oldest: NONE,
        newest: NONE,
        len: 0,
    };

    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slot of the newest.
    pub fn newest(&self) -> Option<u32> {
        (self.len > 0).then_some(self.newest)
    }
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// The next newer one.
    newer: u32,
    /// Where it waits.
    ramp: u32,
    /// Where it left.
    left_at: u32,
}

/// The pending rows of all requests, by slot.
pub struct Pending {
    nodes: Vec<Node>,
    total: u32,
    /// Slots that may be taken by pending rows: every request keeps one for
    /// the row that it runs.
    most: u32,
}

impl Pending {
    pub fn new(n_slots: u32, max_requests: u32) -> Result<Self> {
        let node = Node {
            newer: NONE,
            ramp: NONE,
            left_at: NONE,
        };
        Ok(Pending {
            nodes: memory::filled(node, n_slots as usize)?,
            total: 0,
            most: n_slots - max_requests,
        })
    }

    pub fn total(&self) -> u32 {
        self.total
    }

    pub fn full(&self) -> bool {
        self.total >= self.most
    }

    /// The row in `slot` left at `ramp`.
    pub fn push(&mut self, chain: &mut Chain, slot: u32, ramp: usize) {
        debug_assert!(!self.full());
        let ramp = ramp as u32;
        self.nodes[slot as usize] = Node {
            newer: NONE,
            ramp,
            left_at: ramp,
        };
        match chain.newest() {
            Some(newest) => self.nodes[newest as usize].newer = slot,
            None => chain.oldest = slot,
        }
        chain.newest = slot;
        chain.len += 1;
        self.total += 1;
    }

    /// Takes the oldest out.
    pub fn pop(&mut self, chain: &mut Chain) -> Option<u32> {
        if chain.is_empty() {
            return None;
        }
        let slot = chain.oldest;
        chain.oldest = self.nodes[slot as usize].newer;
        chain.len -= 1;
        self.total -= 1;
        if chain.len == 0 {
            *chain = Chain::EMPTY;
        }
        Some(slot)
    }

    /// The oldest first.
    pub fn iter(&self, chain: &Chain) -> impl Iterator<Item = u32> + '_ {
        let mut at = chain.oldest;
        (0..chain.len).map(move |_| {
            let slot = at;
            at = self.nodes[at as usize].newer;
            slot
        })
    }

    /// The ramp at which the row in `slot` waits.
    pub fn ramp(&self, slot: u32) -> usize {
        self.nodes[slot as usize].ramp as usize
    }

    /// The ramp at which it left.
    pub fn left_at(&self, slot: u32) -> usize {
        self.nodes[slot as usize].left_at as usize
    }

    pub fn advance(&mut self, slot: u32, ramp: usize) {
        self.nodes[slot as usize].ramp = ramp as u32;
    }

    /// How many rows wait at `ramp`: the newest so many.
    pub fn at(&self, chain: &Chain, ramp: usize) -> u32 {
        self.iter(chain).filter(|&s| self.ramp(s) == ramp).count() as u32
    }

    /// The first ramp at or behind `first` where rows wait: a window may not
    /// pass it, since they have to come along from there.
    pub fn stop(&self, chain: &Chain, first: usize) -> Option<usize> {
        let ramps = self.iter(chain).map(|s| self.ramp(s));
        ramps.filter(|&r| r >= first).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_first_in_first_out() {
        let mut p = Pending::new(8, 4).unwrap();
        let (mut a, mut b) = (Chain::EMPTY, Chain::EMPTY);
        p.push(&mut a, 5, 2);
        p.push(&mut a, 3, 1);
        p.push(&mut b, 0, 0);
        p.push(&mut a, 7, 1);
        assert!(p.full());
        assert_eq!(p.iter(&a).collect::<Vec<_>>(), [5, 3, 7]);
        assert_eq!((p.at(&a, 1), p.at(&a, 2), p.at(&a, 0)), (2, 1, 0));
        assert_eq!(
            (p.stop(&a, 0), p.stop(&a, 2), p.stop(&a, 3)),
            (Some(1), Some(2), None)
        );
        assert_eq!(a.newest(), Some(7));
        assert_eq!(
            [p.pop(&mut a), p.pop(&mut a), p.pop(&mut a), p.pop(&mut a)],
            [Some(5), Some(3), Some(7), None]
        );
        assert_eq!((p.total(), b.len()), (1, 1));
        assert!(p.iter(&a).next().is_none());
    }
}
