// SPDX-License-Identifier: Apache-2.0

//! Queues of rows that wait, in three orders at once: of arrival, of priority
//! and of deadline. Adding, taking and removing a row cost the same however
//! many wait.

use super::error::Result;
use super::{NONE, memory};

/// Different priorities that a queue tells apart at one time; a row with yet
/// another one counts as the nearest lower one's, or the lowest's.
pub const LEVELS: usize = 64;

#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// The queue it is in, or `NONE`.
    queue: u32,
    /// Order of arrival; kept when a failed step puts it back.
    pub seq: u64,
    /// Since when it waits.
    pub since_ns: u64,
    /// When its token is due; 0: no deadline.
    pub due_ns: u64,
    pub priority: i32,
    /// Plans of any kind made before it was queued.
    pub plans: u64,
    /// Plans over its queue made before it was queued.
    pub taken: u64,
    /// The priority whose list it is in.
    level: i32,
    all: Link,
    same: Link,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    before: u32,
    after: u32,
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    first: u32,
    last: u32,
}

const EMPTY: Ends = Ends {
    first: NONE,
    last: NONE,
};

#[derive(Debug, Clone, Copy)]
struct Level {
    priority: i32,
    ends: Ends,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    due_ns: u64,
    /// Higher priority first.
    rank: i64,
    seq: u64,
    handle: u32,
}

#[derive(Debug)]
struct Queue {
    len: u32,
    /// Plans made over this queue.
    taken: u64,
    all: Ends,
    /// Highest priority first.
    levels: Vec<Level>,
    /// A heap, the nearest deadline first; rows that have left stay in it
    /// until they come up or are swept out.
    dues: Vec<Due>,
    with_due: u32,
}

pub struct Queues {
    nodes: Vec<Node>,
    queues: Vec<Queue>,
}

/// What a row brings along.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub seq: u64,
    pub since_ns: u64,
    pub due_ns: u64,
    pub priority: i32,
    pub plans: u64,
}

impl Queues {
    /// Rows are named by handles below `handles`; a row is in one queue at
    /// most.
    pub fn new(handles: usize, queues: usize) -> Result<Self> {
        let none = Link {
            before: NONE,
            after: NONE,
        };
        let vacant = Node {
            queue: NONE,
            seq: 0,
            since_ns: 0,
            due_ns: 0,
            priority: 0,
            plans: 0,
            taken: 0,
            level: 0,
            all: none,
            same: none,
        };
        let queue = |_| {
            Ok(Queue {
                len: 0,
                taken: 0,
                all: EMPTY,
                levels: memory::room(LEVELS)?,
                dues: memory::room(2 * handles + 64)?,
                with_due: 0,
            })
        };
        Ok(Queues {
            nodes: memory::filled(vacant, handles)?,
            queues: (0..queues).map(queue).collect::<Result<_>>()?,
        })
    }

    pub fn len(&self, q: usize) -> usize {
        self.queues[q].len as usize
    }

    pub fn is_empty(&self, q: usize) -> bool {
        self.queues[q].len == 0
    }

    pub fn node(&self, handle: u32) -> &Node {
        &self.nodes[handle as usize]
    }

    /// The row that has waited longest.
    pub fn oldest(&self, q: usize) -> Option<u32> {
        let first = self.queues[q].all.first;
        (first != NONE).then_some(first)
    }

    /// Counts a plan over this queue.
    pub fn count_plan(&mut self, q: usize) {
        self.queues[q].taken += 1;
    }

    /// Plans over its queue that passed this row by.
    pub fn passed(&self, handle: u32) -> u64 {
        let n = self.node(handle);
        self.queues[n.queue as usize].taken - n.taken
    }

    pub fn push(&mut self, q: usize, handle: u32, e: Entry) {
        let node = &mut self.nodes[handle as usize];
        node.seq = e.seq;
        node.since_ns = e.since_ns;
        node.due_ns = e.due_ns;
        node.priority = e.priority;
        node.plans = e.plans;
        node.taken = self.queues[q].taken;
        self.insert(q, handle);
    }

    /// Puts a row back that a failed step took, at its old place.
    pub fn restore(&mut self, q: usize, handle: u32) {
        // An entry of its own may be left from before.
        sweep(&self.nodes, &mut self.queues[q].dues, q as u32);
        self.insert(q, handle);
    }

    fn insert(&mut self, q: usize, handle: u32) {
        let level = self.queues[q].level(self.nodes[handle as usize].priority);
        let queue = &mut self.queues[q];
        let priority = queue.levels[level].priority;
        let node = &mut self.nodes[handle as usize];
        node.queue = q as u32;
        node.level = priority;
        let due = Due {
            due_ns: node.due_ns,
            rank: -i64::from(node.priority),
            seq: node.seq,
            handle,
        };
        link(&mut self.nodes, &mut queue.all, handle, |n| &mut n.all);
        link(
            &mut self.nodes,
            &mut queue.levels[level].ends,
            handle,
            |n| &mut n.same,
        );
        queue.len += 1;
        if due.due_ns > 0 {
            queue.with_due += 1;
            if queue.dues.len() > 2 * queue.with_due as usize + 32 {
                sweep(&self.nodes, &mut queue.dues, q as u32);
            }
            queue.dues.push(due);
            up(&mut queue.dues);
        }
    }

    pub fn remove(&mut self, handle: u32) {
        let node = self.nodes[handle as usize];
        let queue = &mut self.queues[node.queue as usize];
        let level = queue.level(node.level);
        unlink(&mut self.nodes, &mut queue.all, handle, |n| &mut n.all);
        unlink(
            &mut self.nodes,
            &mut queue.levels[level].ends,
            handle,
            |n| &mut n.same,
        );
        if queue.levels[level].ends.first == NONE {
            queue.levels.remove(level);
        }
        queue.len -= 1;
        if node.due_ns > 0 {
            queue.with_due -= 1;
            if queue.with_due == 0 {
                queue.dues.clear();
            }
        }
        self.nodes[handle as usize].queue = NONE;
    }

    /// The row whose deadline is the nearest, and that deadline.
    pub fn nearest(&mut self, q: usize) -> Option<(u32, u64)> {
        let queue = &mut self.queues[q];
        while let Some(&top) = queue.dues.first() {
            if current(&self.nodes, &top, q as u32) {
                return Some((top.handle, top.due_ns));
            }
            // One by one, or all that have left at once, whichever is less.
            let n = queue.dues.len();
            if (n - queue.with_due as usize) * 16 > n {
                sweep(&self.nodes, &mut queue.dues, q as u32);
            } else {
                pop(&mut queue.dues);
            }
        }
        None
    }

    /// Takes the `n` oldest rows at once, where that is the order anyway: all
    /// have one priority, and no deadline lies before `horizon_ns`. False,
    /// and nothing taken, where it is not.
    pub fn take_oldest(&mut self, q: usize, n: usize, horizon_ns: u64, out: &mut Vec<u32>) -> bool {
        if self.queues[q].levels.len() > 1
            || self.nearest(q).is_some_and(|(_, due)| due <= horizon_ns)
        {
            return false;
        }
        let queue = &mut self.queues[q];
        let mut at = queue.all.first;
        for _ in 0..n {
            if at == NONE {
                break;
            }
            let node = &mut self.nodes[at as usize];
            out.push(at);
            node.queue = NONE;
            queue.len -= 1;
            queue.with_due -= u32::from(node.due_ns > 0);
            at = node.all.after;
        }
        // With one priority, both lists are the same.
        if at == NONE {
            queue.all = EMPTY;
            queue.levels.clear();
        } else {
            queue.all.first = at;
            queue.levels[0].ends.first = at;
            let node = &mut self.nodes[at as usize];
            node.all.before = NONE;
            node.same.before = NONE;
        }
        if queue.with_due == 0 {
            queue.dues.clear();
        }
        true
    }

    /// The oldest row of the highest priority.
    pub fn foremost(&self, q: usize) -> Option<u32> {
        self.queues[q].levels.first().map(|l| l.ends.first)
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
                self.levels.insert(
                    at,
                    Level {
                        priority,
                        ends: EMPTY,
                    },
                );
                at
            }
        }
    }
}

/// Links a row in by its order of arrival: nearly always last.
fn link(nodes: &mut [Node], ends: &mut Ends, handle: u32, side: impl Fn(&mut Node) -> &mut Link) {
    let seq = nodes[handle as usize].seq;
    let mut before = ends.last;
    if ends.first != NONE && nodes[ends.first as usize].seq > seq {
        before = NONE;
    }
    while before != NONE && nodes[before as usize].seq > seq {
        before = side(&mut nodes[before as usize]).before;
    }
    let after = if before == NONE {
        ends.first
    } else {
        side(&mut nodes[before as usize]).after
    };
    *side(&mut nodes[handle as usize]) = Link { before, after };
    match before {
        NONE => ends.first = handle,
        b => side(&mut nodes[b as usize]).after = handle,
    }
    match after {
        NONE => ends.last = handle,
        a => side(&mut nodes[a as usize]).before = handle,
    }
}

fn unlink(nodes: &mut [Node], ends: &mut Ends, handle: u32, side: impl Fn(&mut Node) -> &mut Link) {
    let Link { before, after } = *side(&mut nodes[handle as usize]);
    match before {
        NONE => ends.first = after,
        b => side(&mut nodes[b as usize]).after = after,
    }
    match after {
        NONE => ends.last = before,
        a => side(&mut nodes[a as usize]).before = before,
    }
}

fn current(nodes: &[Node], due: &Due, q: u32) -> bool {
    let n = &nodes[due.handle as usize];
    n.queue == q && n.seq == due.seq && n.due_ns == due.due_ns
}

fn up(heap: &mut [Due]) {
    let mut i = heap.len() - 1;
    while i > 0 && heap[i] < heap[(i - 1) / 2] {
        heap.swap(i, (i - 1) / 2);
        i = (i - 1) / 2;
    }
}

fn down(heap: &mut [Due], mut i: usize) {
    loop {
        let mut least = i;
        for child in [2 * i + 1, 2 * i + 2] {
            if child < heap.len() && heap[child] < heap[least] {
                least = child;
            }
        }
        if least == i {
            return;
        }
        heap.swap(i, least);
        i = least;
    }
}

fn pop(heap: &mut Vec<Due>) {
    heap.swap_remove(0);
    down(heap, 0);
}

fn sweep(nodes: &[Node], heap: &mut Vec<Due>, q: u32) {
    heap.retain(|d| current(nodes, d, q));
    for i in (0..heap.len() / 2).rev() {
        down(heap, i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the plainest thing that could be right.
    #[test]
    fn every_order_agrees_with_a_list() {
        let handles = 40;
        let mut queues = Queues::new(handles, 2).unwrap();
        let mut list: Vec<(usize, u32, Entry)> = Vec::new();
        let mut x = 11u64;
        let mut draw = |n: u64| {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (x >> 33) % n
        };
        for seq in 0..60_000u64 {
            let handle = draw(handles as u64) as u32;
            match list.iter().position(|l| l.1 == handle) {
                Some(i) => {
                    let (q, _, e) = list[i];
                    queues.remove(handle);
                    if draw(4) == 0 {
                        // back to where it was
                        queues.restore(q, handle);
                        assert_eq!(queues.node(handle).seq, e.seq);
                    } else {
                        list.remove(i);
                    }
                }
                None => {
                    let e = Entry {
                        seq,
                        since_ns: seq,
                        due_ns: if draw(3) == 0 || seq / 10000 % 2 == 0 {
                            0
                        } else {
                            1 + draw(1000)
                        },
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
            }
            if seq % 7 == 0 {
                let (q, n, horizon) = (draw(2) as usize, draw(6) as usize, draw(1000));
                let mut here: Vec<_> = list
                    .iter()
                    .filter(|l| l.0 == q)
                    .map(|l| (l.2.seq, l.1, l.2))
                    .collect();
                here.sort_by_key(|l| l.0);
                let plain = here.windows(2).all(|w| w[0].2.priority == w[1].2.priority)
                    && here.iter().all(|l| l.2.due_ns == 0 || l.2.due_ns > horizon);
                let mut out = Vec::new();
                assert_eq!(queues.take_oldest(q, n, horizon, &mut out), plain);
                if plain {
                    let expect: Vec<u32> = here.iter().take(n).map(|l| l.1).collect();
                    assert_eq!(out, expect);
                    list.retain(|l| !out.contains(&l.1));
                } else {
                    assert!(out.is_empty());
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
        }
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
