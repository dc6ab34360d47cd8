// SPDX-License-Identifier: Apache-2.0

//! Queues of rows that wait, in three orders at once: of arrival, of priority
//! and of deadline. Adding, taking, removing and putting back a row cost the same
//! however many wait; a deadline costs their logarithm.

use crate::core::error::Result;
use crate::core::rows::deadlines::{Heap, Nodes, Place};
use crate::core::{NONE, memory};

/// Different priorities that a queue tells apart at one time; a row with yet
/// another one counts as the nearest lower one's, or the lowest's.
pub const LEVELS: usize = 64;

#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// The queue it is in, or `NONE`.
    queue: u32,
    /// The priority whose list it is in.
    level: i32,
    /// Order of arrival; kept when a failed step puts it back.
    pub seq: u64,
    /// Since when it waits.
    pub since_ns: u64,
    /// When its token is due; 0: no deadline.
    pub due_ns: u64,
    pub priority: i32,
    /// Neighbours in its list. Those of a row that was taken say where it was.
    link: Link,
    due: Place,
    /// Plans of any kind made before it was queued.
    pub plans: u64,
    /// Plans over its queue made before it was queued.
    queue_plans: u64,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    before: u32,
    after: u32,
}

/// Rows of one priority, in the order of their arrival.
#[derive(Debug, Clone, Copy)]
struct Level {
    priority: i32,
    first: u32,
    last: u32,
}

#[derive(Debug)]
struct Queue {
    len: u32,
    /// Plans made over this queue.
    plans: u64,
    /// Highest priority first; none is empty.
    levels: Vec<Level>,
    dues: Heap,
    with_due: u32,
}

pub struct Queues {
    nodes: Rows,
    queues: Vec<Queue>,
}

struct Rows(Vec<Node>);

/// A row's own part of its [`Node`].
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub seq: u64,
    pub since_ns: u64,
    pub due_ns: u64,
    pub priority: i32,
    pub plans: u64,
}

impl Nodes for Rows {
    /// Nearest deadline, higher priority, older row.
    type Key = (u64, i64, u64);

    fn key(&self, node: u32) -> Self::Key {
        let n = &self.0[node as usize];
        (n.due_ns, -i64::from(n.priority), n.seq)
    }

    fn place(&mut self, node: u32) -> &mut Place {
        &mut self.0[node as usize].due
    }
}

impl Queues {
    /// Rows are named by handles below `handles`; a row is in one queue at
    /// most.
    pub fn new(handles: usize, queues: usize) -> Result<Self> {
        let vacant = Node {
            queue: NONE,
            level: 0,
            seq: 0,
            since_ns: 0,
            due_ns: 0,
            priority: 0,
            link: Link {
                before: NONE,
                after: NONE,
            },
            due: Place::NOWHERE,
            plans: 0,
            queue_plans: 0,
        };
        let queue = |_| {
            Ok(Queue {
                len: 0,
                plans: 0,
                levels: memory::room(LEVELS)?,
                dues: Heap::EMPTY,
                with_due: 0,
            })
        };
        Ok(Queues {
            nodes: Rows(memory::filled(vacant, handles)?),
            queues: (0..queues).map(queue).collect::<Result<_>>()?,
        })
    }

    pub fn len(&self, q: usize) -> usize {
        self.queues[q].len as usize
    }

    pub fn node(&self, handle: u32) -> &Node {
        &self.nodes.0[handle as usize]
    }

    /// The row that has waited longest.
    pub fn oldest(&self, q: usize) -> Option<u32> {
        let heads = self.queues[q].levels.iter().map(|l| l.first);
        heads.min_by_key(|&h| self.node(h).seq)
    }

    /// Counts a plan over this queue.
    pub fn count_plan(&mut self, q: usize) {
        self.queues[q].plans += 1;
    }

    /// Takes back what [`Queues::count_plan`] counted last.
    pub fn uncount_plan(&mut self, q: usize) {
        self.queues[q].plans -= 1;
    }

    /// Plans over its queue that passed this row by.
    pub fn passed(&self, handle: u32) -> u64 {
        let n = self.node(handle);
        let plans = self.queues[n.queue as usize].plans;
        // A row that came during a step that failed may be ahead.
        plans.saturating_sub(n.queue_plans)
    }

    /// `e.seq` is greater than that of any row before.
    pub fn push(&mut self, q: usize, handle: u32, e: Entry) {
        let node = &mut self.nodes.0[handle as usize];
        node.seq = e.seq;
        node.since_ns = e.since_ns;
        node.due_ns = e.due_ns;
        node.priority = e.priority;
        node.plans = e.plans;
        node.queue_plans = self.queues[q].plans;
        let level = self.queues[q].level(e.priority);
        let before = self.queues[q].levels[level].last;
        self.link(q, level, handle, before);
    }

    /// Puts a row back that a failed step took, at its old place. Rows that were
    /// taken together go back last first: each then finds its old neighbours.
    pub fn restore(&mut self, q: usize, handle: u32) {
        let priority = self.node(handle).priority;
        let level = self.queues[q].level(priority);
        let before = self.old_place(q, level, handle);
        self.link(q, level, handle, before);
    }

    /// The row after which a restored one belongs, or `NONE`: from the neighbours
    /// that it had, as far as they are in the list.
    fn old_place(&self, q: usize, level: usize, handle: u32) -> u32 {
        let list = &self.queues[q].levels[level];
        let node = self.node(handle);
        let seq = |h: u32| self.node(h).seq;
        let here = |h: u32| {
            let there = |n: &Node| n.queue == q as u32 && n.level == list.priority;
            h != NONE && there(self.node(h))
        };
        let Link { before, after } = node.link;
        if list.first == NONE || seq(list.first) > node.seq {
            return NONE;
        }
        let mut at = if here(before) && seq(before) < node.seq {
            before
        } else if here(after) {
            self.node(after).link.before
        } else {
            list.last
        };
        while at != NONE && seq(at) > node.seq {
            at = self.node(at).link.before;
        }
        loop {
            let next = if at == NONE {
                list.first
            } else {
                self.node(at).link.after
            };
            if next == NONE || seq(next) > node.seq {
                return at;
            }
            at = next;
        }
    }

    fn link(&mut self, q: usize, level: usize, handle: u32, before: u32) {
        let queue = &mut self.queues[q];
        let list = &mut queue.levels[level];
        let nodes = &mut self.nodes.0;
        let after = match before {
            NONE => std::mem::replace(&mut list.first, handle),
            b => std::mem::replace(&mut nodes[b as usize].link.after, handle),
        };
        match after {
            NONE => list.last = handle,
            a => nodes[a as usize].link.before = handle,
        }
        let node = &mut nodes[handle as usize];
        node.link = Link { before, after };
        node.queue = q as u32;
        node.level = list.priority;
        queue.len += 1;
        if node.due_ns > 0 {
            queue.with_due += 1;
            queue.dues.push(&mut self.nodes, handle);
        }
    }

    pub fn remove(&mut self, handle: u32) {
        let node = *self.node(handle);
        let queue = &mut self.queues[node.queue as usize];
        let nodes = &mut self.nodes.0;
        let level = queue.level(node.level);
        let list = &mut queue.levels[level];
        let Link { before, after } = node.link;
        match before {
            NONE => list.first = after,
            b => nodes[b as usize].link.after = after,
        }
        match after {
            NONE => list.last = before,
            a => nodes[a as usize].link.before = before,
        }
        if list.first == NONE {
            queue.levels.remove(level);
        }
        queue.len -= 1;
        nodes[handle as usize].queue = NONE;
        if node.due_ns > 0 {
            queue.with_due -= 1;
            queue.dues.remove(&mut self.nodes, handle);
        }
    }

    /// Changes the deadline of a row that waits; 0: none.
    pub fn set_due(&mut self, handle: u32, due_ns: u64) {
        let node = self.node(handle);
        let (old, q) = (node.due_ns, node.queue as usize);
        if old == due_ns {
            return;
        }
        let queue = &mut self.queues[q];
        if old > 0 {
            queue.with_due -= 1;
            queue.dues.remove(&mut self.nodes, handle);
        }
        self.nodes.0[handle as usize].due_ns = due_ns;
        if due_ns > 0 {
            queue.with_due += 1;
            queue.dues.push(&mut self.nodes, handle);
        }
    }

    /// The row whose deadline is the nearest, and that deadline.
    pub fn nearest(&self, q: usize) -> Option<(u32, u64)> {
        let first = self.queues[q].dues.first()?;
        Some((first, self.node(first).due_ns))
    }

    /// Takes the oldest rows at once, where that is the order anyway: all have one
    /// priority, and no deadline lies before `horizon_ns`. At most `n` of them, up
    /// to the first that does not fit. False, and nothing taken, where it is not.
    pub fn take_oldest(
        &mut self,
        q: usize,
        n: usize,
        horizon_ns: u64,
        out: &mut Vec<u32>,
        mut fits: impl FnMut(u32) -> bool,
    ) -> bool {
        if self.queues[q].levels.len() > 1
            || self.nearest(q).is_some_and(|(_, due)| due <= horizon_ns)
        {
            return false;
        }
        let queue = &mut self.queues[q];
        let Some(list) = queue.levels.first_mut() else {
            return true;
        };
        let before = out.len();
        let mut with_due = 0;
        let mut at = list.first;
        while out.len() - before < n && at != NONE && fits(at) {
            let node = &mut self.nodes.0[at as usize];
            out.push(at);
            node.queue = NONE;
            with_due += u32::from(node.due_ns > 0);
            at = node.link.after;
        }
        queue.len -= (out.len() - before) as u32;
        if at == NONE {
            queue.levels.clear();
        } else {
            list.first = at;
            self.nodes.0[at as usize].link.before = NONE;
        }
        queue.with_due -= with_due;
        if queue.with_due == 0 {
            queue.dues = Heap::EMPTY;
        } else if with_due > 0 {
            // The last first: most have nothing below them by then.
            for &handle in out[before..].iter().rev() {
                if self.nodes.0[handle as usize].due_ns > 0 {
                    queue.dues.remove(&mut self.nodes, handle);
                }
            }
        }
        true
    }

    /// The oldest row of the highest priority.
    pub fn foremost(&self, q: usize) -> Option<u32> {
        self.queues[q].levels.first().map(|l| l.first)
    }
}

impl Queue {
    /// Place of a priority's list, made when it is not there.
    fn level(&mut self, priority: i32) -> usize {
        let at = self.levels.partition_point(|l| l.priority > priority);
        match self.levels.get(at) {
            Some(l) if l.priority == priority => at,
            Some(_) if self.levels.len() == LEVELS => at,
            None if self.levels.len() == LEVELS => at - 1,
            _ => {
                let list = Level {
                    priority,
                    first: NONE,
                    last: NONE,
                };
                self.levels.insert(at, list);
                at
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the plainest thing that could be right. Some rows are taken as a
    /// step takes them, and go back while others come and go.
    #[test]
    fn every_order_agrees_with_a_list() {
        let handles = 40;
        let mut queues = Queues::new(handles, 2).unwrap();
        let mut list: Vec<(usize, u32, Entry)> = Vec::new();
        let mut taken: Vec<(usize, u32, Entry)> = Vec::new();
        let mut rng = fastrand::Rng::with_seed(11);
        let mut draw = |n: u64| rng.u64(..n);
        let mut restored = 0;
        for seq in 0..60_000u64 {
            let handle = draw(handles as u64) as u32;
            if let Some(i) = taken.iter().position(|l| l.1 == handle) {
                // Its request goes away during the step.
                taken.remove(i);
            } else if let Some(i) = list.iter().position(|l| l.1 == handle) {
                queues.remove(handle);
                let row = list.remove(i);
                if draw(4) > 0 {
                    taken.push(row);
                }
            } else {
                let due = draw(3) > 0 && seq / 10000 % 2 == 1;
                let e = Entry {
                    seq,
                    since_ns: seq,
                    due_ns: if due { 1 + draw(1000) } else { 0 },
                    priority: if seq / 5000 % 2 == 0 {
                        0
                    } else {
                        draw(5) as i32 - 2
                    },
                    plans: 0,
                };
                let q = draw(2) as usize;
                queues.push(q, handle, e);
                list.push((q, handle, e));
            }
            if draw(9) == 0
                && let Some(&(q, handle, e)) = list.get(draw(40) as usize)
            {
                let due_ns = draw(1000);
                queues.set_due(handle, due_ns);
                list.retain(|l| l.1 != handle);
                list.push((q, handle, Entry { due_ns, ..e }));
            }
            if seq % 7 == 0 {
                let (q, n, horizon) = (draw(2) as usize, draw(6) as usize, draw(1000));
                let unfit = draw(handles as u64 + 40) as u32;
                let mut here: Vec<_> = list.iter().filter(|l| l.0 == q).copied().collect();
                here.sort_by_key(|l| l.2.seq);
                let plain = here.windows(2).all(|w| w[0].2.priority == w[1].2.priority)
                    && here.iter().all(|l| l.2.due_ns == 0 || l.2.due_ns > horizon);
                let mut out = Vec::new();
                let fits = |h| h != unfit;
                assert_eq!(queues.take_oldest(q, n, horizon, &mut out, fits), plain);
                if plain {
                    let expect = here.iter().take(n).take_while(|l| fits(l.1));
                    taken.extend(expect.clone());
                    assert_eq!(out, expect.map(|l| l.1).collect::<Vec<_>>());
                    list.retain(|l| !out.contains(&l.1));
                } else {
                    assert!(out.is_empty());
                }
            }
            if draw(12) == 0 {
                while let Some(row) = taken.pop() {
                    queues.restore(row.0, row.1);
                    assert_eq!(queues.node(row.1).seq, row.2.seq);
                    list.push(row);
                    restored += 1;
                }
            }
            for q in 0..2 {
                let here = || list.iter().filter(|l| l.0 == q);
                assert_eq!(queues.len(q), here().count());
                assert_eq!(
                    queues.oldest(q),
                    here().min_by_key(|l| l.2.seq).map(|l| l.1)
                );
                let first = here().min_by_key(|l| (-l.2.priority, l.2.seq)).map(|l| l.1);
                assert_eq!(queues.foremost(q), first);
                let due = here()
                    .filter(|l| l.2.due_ns > 0)
                    .min_by_key(|l| (l.2.due_ns, -l.2.priority, l.2.seq))
                    .map(|l| (l.1, l.2.due_ns));
                assert_eq!(queues.nearest(q), due);
            }
            if seq % 50 == 0 {
                // The lists from both ends.
                for queue in &queues.queues {
                    for list in &queue.levels {
                        let (mut at, mut before) = (list.first, NONE);
                        while at != NONE {
                            let link = queues.node(at).link;
                            assert_eq!(link.before, before);
                            assert!(
                                before == NONE || queues.node(before).seq < queues.node(at).seq
                            );
                            (before, at) = (at, link.after);
                        }
                        assert_eq!(before, list.last);
                    }
                }
            }
        }
        assert!(restored > 10_000, "{restored}");
    }

    #[test]
    fn more_priorities_than_levels() {
        let mut queues = Queues::new(200, 1).unwrap();
        for i in 0..200u32 {
            let e = Entry {
                seq: u64::from(i),
                since_ns: 0,
                due_ns: 0,
                priority: (i as i32 * 37) % 200,
                plans: 0,
            };
            queues.push(0, i, e);
        }
        let mut taken = 0;
        while let Some(h) = queues.foremost(0) {
            queues.remove(h);
            taken += 1;
        }
        assert_eq!((taken, queues.len(0)), (200, 0));
    }
}
