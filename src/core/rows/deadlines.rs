// SPDX-License-Identifier: Apache-2.0

//! The rows of a queue by deadline: a pairing heap (Fredman, Sedgewick, Sleator,
//! Tarjan 1986) whose links lie in the rows' own nodes. A row is in one queue at
//! most, so all heaps together need no memory but that.

use crate::core::NONE;

/// Place of a row in its heap.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    child: u32,
    next: u32,
    /// The parent of a first child, the sibling before of any other.
    before: u32,
}

impl Place {
    pub const NOWHERE: Place = Place {
        child: NONE,
        next: NONE,
        before: NONE,
    };
}

/// A heap's access to its nodes.
pub trait Nodes {
    type Key: Ord;
    fn key(&self, node: u32) -> Self::Key;
    fn place(&mut self, node: u32) -> &mut Place;
}

/// One heap, by its root: the row that comes first, or `NONE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heap {
    root: u32,
}

impl Heap {
    pub const EMPTY: Heap = Heap { root: NONE };

    pub fn first(self) -> Option<u32> {
        (self.root != NONE).then_some(self.root)
    }

    pub fn push(&mut self, nodes: &mut impl Nodes, node: u32) {
        *nodes.place(node) = Place::NOWHERE;
        self.root = meld(nodes, self.root, node);
    }

    pub fn remove(&mut self, nodes: &mut impl Nodes, node: u32) {
        let Place {
            child,
            next,
            before,
        } = *nodes.place(node);
        let below = join(nodes, child);
        if node == self.root {
            self.root = below;
            return;
        }
        let link = nodes.place(before);
        if link.child == node {
            link.child = next;
        } else {
            link.next = next;
        }
        if next != NONE {
            nodes.place(next).before = before;
        }
        self.root = meld(nodes, self.root, below);
    }
}

/// Makes one heap of two; a root has no siblings.
fn meld(nodes: &mut impl Nodes, a: u32, b: u32) -> u32 {
    let (top, below) = match (a, b) {
        (NONE, _) => return b,
        (_, NONE) => return a,
        _ if nodes.key(b) < nodes.key(a) => (b, a),
        _ => (a, b),
    };
    let next = std::mem::replace(&mut nodes.place(top).child, below);
    let place = nodes.place(below);
    (place.next, place.before) = (next, top);
    if next != NONE {
        nodes.place(next).before = below;
    }
    top
}

/// Makes one heap of siblings: in pairs from the first on, then the pairs from the
/// last back.
fn join(nodes: &mut impl Nodes, first: u32) -> u32 {
    let alone = |nodes: &mut _, node| {
        let place = Nodes::place(nodes, node);
        place.before = NONE;
        std::mem::replace(&mut place.next, NONE)
    };
    let (mut a, mut pairs) = (first, NONE);
    while a != NONE {
        let b = alone(nodes, a);
        let rest = if b == NONE { NONE } else { alone(nodes, b) };
        let pair = meld(nodes, a, b);
        nodes.place(pair).before = pairs;
        (a, pairs) = (rest, pair);
    }
    let mut root = NONE;
    while pairs != NONE {
        let before = std::mem::replace(&mut nodes.place(pairs).before, NONE);
        root = meld(nodes, root, pairs);
        pairs = before;
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    struct List(Vec<(u64, Place)>);

    impl Nodes for List {
        type Key = (u64, u32);
        fn key(&self, node: u32) -> (u64, u32) {
            (self.0[node as usize].0, node)
        }
        fn place(&mut self, node: u32) -> &mut Place {
            &mut self.0[node as usize].1
        }
    }

    #[test]
    fn a_heap_agrees_with_a_sorted_set() {
        let mut rng = fastrand::Rng::with_seed(3);
        let mut nodes = List(vec![(0, Place::NOWHERE); 100]);
        let (mut heap, mut set) = (Heap::EMPTY, BTreeSet::new());
        for _ in 0..50_000 {
            let node = rng.u32(..100);
            let key = nodes.key(node);
            if set.remove(&key) {
                heap.remove(&mut nodes, node);
            } else if rng.u8(..3) > 0 {
                nodes.0[node as usize].0 = rng.u64(..50);
                set.insert(nodes.key(node));
                heap.push(&mut nodes, node);
            }
            assert_eq!(heap.first(), set.first().map(|k| k.1));
        }
    }
}
