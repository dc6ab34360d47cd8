// SPDX-License-Identifier: Apache-2.0

//! The rebatching buffer: the pool of arena slots and one queue per ramp.
//!
//! A slot belongs to a row, and a row names its request: when exited rows
//! stay in the arena until their holes are computed, one request owns
//! several.

use super::NONE;

#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub request: u32,
    /// Order of arrival in a queue; kept when a failed step puts it back.
    pub seq: u64,
    /// Since when it has been held.
    pub since_ns: u64,
    /// Plans of any kind made before it was queued.
    pub plans: u64,
    /// Plans over its queue made before it was queued.
    pub flushes: u64,
    /// Goes on at once instead of waiting.
    pub stay: bool,
    /// Place in its queue.
    pos: u32,
}

pub struct Buffer {
    rows: Vec<Row>,
    free: Vec<u32>,
    queues: Vec<Vec<u32>>,
    stays: Vec<u32>,
    held: u32,
}

impl Buffer {
    pub fn new(n_slots: usize, n_ramps: usize) -> Self {
        let vacant = Row {
            request: NONE,
            seq: 0,
            since_ns: 0,
            plans: 0,
            flushes: 0,
            stay: false,
            pos: NONE,
        };
        Buffer {
            rows: vec![vacant; n_slots],
            // The lowest slot first: a lightly loaded engine stays within
            // the arena's first rows.
            free: (0..n_slots as u32).rev().collect(),
            queues: (0..n_ramps).map(|_| Vec::with_capacity(n_slots)).collect(),
            stays: vec![0; n_ramps],
            held: 0,
        }
    }

    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    pub fn take_slot(&mut self, request: u32) -> Option<u32> {
        let slot = self.free.pop()?;
        self.rows[slot as usize].request = request;
        self.rows[slot as usize].pos = NONE;
        Some(slot)
    }

    pub fn return_slot(&mut self, slot: u32) {
        self.rows[slot as usize].request = NONE;
        self.free.push(slot);
    }

    pub fn row(&self, slot: u32) -> &Row {
        &self.rows[slot as usize]
    }

    pub fn row_mut(&mut self, slot: u32) -> &mut Row {
        &mut self.rows[slot as usize]
    }

    pub fn queue(&self, ramp: usize) -> &[u32] {
        &self.queues[ramp]
    }

    /// Rows at a ramp that wait, without those that go on at once.
    pub fn held_at(&self, ramp: usize) -> u32 {
        self.queues[ramp].len() as u32 - self.stays[ramp]
    }

    pub fn stays_at(&self, ramp: usize) -> u32 {
        self.stays[ramp]
    }

    pub fn held(&self) -> u32 {
        self.held
    }

    /// Queues a row with the order and times that it carries.
    pub fn enqueue(&mut self, ramp: usize, slot: u32) {
        let row = &mut self.rows[slot as usize];
        row.pos = self.queues[ramp].len() as u32;
        if row.stay {
            self.stays[ramp] += 1;
        } else {
            self.held += 1;
        }
        self.queues[ramp].push(slot);
    }

    pub fn dequeue(&mut self, ramp: usize, slot: u32) {
        let row = self.rows[slot as usize];
        // The queue's order lies in `seq`, not in the vector.
        self.queues[ramp].swap_remove(row.pos as usize);
        if let Some(&moved) = self.queues[ramp].get(row.pos as usize) {
            self.rows[moved as usize].pos = row.pos;
        }
        self.rows[slot as usize].pos = NONE;
        if row.stay {
            self.stays[ramp] -= 1;
        } else {
            self.held -= 1;
        }
    }
}
