// SPDX-License-Identifier: Apache-2.0

//! The rebatching buffer: the pool of arena slots, and the queues of rows
//! that wait for a window: new tokens for the first one, held rows for the
//! next. Rows that a ramp told to go on at once have a queue of their own at
//! each ramp.
//!
//! A slot belongs to a row, and a row names its request: when exited rows
//! stay in the arena until their holes are computed, one request owns
//! several.

use crate::core::error::Result;
use crate::core::rows::queue::{Entry, Node, Queues};
use crate::core::{NONE, memory};

/// The queue of new tokens.
pub const READY: usize = 0;

pub fn held_queue(ramp: usize) -> usize {
    1 + 2 * ramp
}

pub fn stay_queue(ramp: usize) -> usize {
    2 + 2 * ramp
}

pub struct Buffer {
    /// Owner of each slot.
    requests: Vec<u32>,
    free: Vec<u32>,
    queues: Queues,
    held: u32,
}

impl Buffer {
    pub fn new(n_slots: usize, max_requests: usize, ramps: usize) -> Result<Self> {
        Ok(Buffer {
            requests: memory::filled(NONE, n_slots)?,
            // The lowest slot first: a lightly loaded engine stays within
            // the arena's first rows.
            free: memory::free_list(n_slots as u32)?,
            queues: Queues::new(n_slots + max_requests, 1 + 2 * ramps)?,
            held: 0,
        })
    }

    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    pub fn take_slot(&mut self, request: u32) -> Option<u32> {
        let slot = self.free.pop()?;
        self.requests[slot as usize] = request;
        Some(slot)
    }

    pub fn return_slot(&mut self, slot: u32) {
        self.requests[slot as usize] = NONE;
        self.free.push(slot);
    }

    /// A new token has no slot yet: its handle comes after those of slots.
    fn ready_handle(&self, request: u32) -> u32 {
        self.requests.len() as u32 + request
    }

    /// The request of a handle, and its slot or `NONE`.
    pub fn owner(&self, handle: u32) -> (u32, u32) {
        match self.requests.get(handle as usize) {
            Some(&request) => (request, handle),
            None => (handle - self.requests.len() as u32, NONE),
        }
    }

    pub fn queues(&self) -> &Queues {
        &self.queues
    }

    pub fn queues_mut(&mut self) -> &mut Queues {
        &mut self.queues
    }

    pub fn node(&self, handle: u32) -> &Node {
        self.queues.node(handle)
    }

    pub fn ready_rows(&self) -> usize {
        self.queues.len(READY)
    }

    /// Rows at a ramp that wait, without those that go on at once.
    pub fn held_at(&self, ramp: usize) -> u32 {
        self.queues.len(held_queue(ramp)) as u32
    }

    pub fn stays_at(&self, ramp: usize) -> u32 {
        self.queues.len(stay_queue(ramp)) as u32
    }

    /// Rows held at all ramps.
    pub fn held(&self) -> u32 {
        self.held
    }

    pub fn push_ready(&mut self, request: u32, e: Entry) {
        let handle = self.ready_handle(request);
        self.queues.push(READY, handle, e);
    }

    pub fn restore_ready(&mut self, request: u32) {
        let handle = self.ready_handle(request);
        self.queues.restore(READY, handle);
    }

    pub fn pop_ready(&mut self, request: u32) {
        let handle = self.ready_handle(request);
        self.queues.remove(handle);
    }

    /// Changes the deadline of this request's token; 0: none.
    pub fn set_ready_due(&mut self, request: u32, due_ns: u64) {
        let handle = self.ready_handle(request);
        self.queues.set_due(handle, due_ns);
    }

    pub fn push(&mut self, ramp: usize, slot: u32, stay: bool, e: Entry) {
        let q = self.count(ramp, stay);
        self.queues.push(q, slot, e);
    }

    pub fn restore(&mut self, ramp: usize, slot: u32, stay: bool) {
        let q = self.count(ramp, stay);
        self.queues.restore(q, slot);
    }

    fn count(&mut self, ramp: usize, stay: bool) -> usize {
        if stay {
            stay_queue(ramp)
        } else {
            self.held += 1;
            held_queue(ramp)
        }
    }

    pub fn remove(&mut self, slot: u32, stay: bool) {
        if !stay {
            self.held -= 1;
        }
        self.queues.remove(slot);
    }

    /// See [`Queues::take_oldest`]; `fits` is asked of a row's request.
    pub fn take_oldest(
        &mut self,
        q: usize,
        n: usize,
        horizon_ns: u64,
        out: &mut Vec<u32>,
        fits: &mut dyn FnMut(u32) -> bool,
    ) -> bool {
        let before = out.len();
        let (requests, slots) = (&self.requests, self.requests.len() as u32);
        let fits = |handle: u32| {
            let request = requests.get(handle as usize).copied();
            fits(request.unwrap_or_else(|| handle - slots))
        };
        let taken = self.queues.take_oldest(q, n, horizon_ns, out, fits);
        if q != READY {
            self.held -= (out.len() - before) as u32;
        }
        taken
    }
}
