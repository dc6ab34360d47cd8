// SPDX-License-Identifier: Apache-2.0

//! The requests alive, found by the host's id. Storage and index are made
//! once; adding, finding and removing touch no allocator.

use crate::core::config::{Fill, Quality};
use crate::core::counters::TimeIn;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};
use crate::core::estimate::agreement::Terms;
use crate::core::estimate::exit_rate::Habit;
use crate::core::metric::Metric;
use crate::core::rows::pending::Chain;
use crate::core::{MAX_RAMPS, NONE, memory};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No token to run.
    Idle,
    /// A token waits for the first window.
    Ready,
    /// Its row is in the planned step, or goes on in the next one.
    Running,
    /// Its row waits in the rebatching buffer.
    Held,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Idle => "idle",
            State::Ready => "ready",
            State::Running => "running",
            State::Held => "held",
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct RequestConfig {
    pub id: u64,
    /// `None`: the engine's.
    pub metric: Option<Metric>,
    /// `None`: the engine's, per ramp.
    pub threshold: Option<f32>,
    /// `None`: the engine's.
    pub fill: Option<Fill>,
    /// `None`: the engine's.
    pub quality: Option<Quality>,
    /// 0: the engine's.
    pub token_deadline_ns: u64,
    /// From the first time that it is ready to its last token; 0: none.
    pub request_deadline_ns: u64,
    /// Tokens that it will make at most, 0 if unknown: its deadline is spread
    /// over them.
    pub max_tokens: u64,
    pub priority: i32,
}

/// In the order of use: what every ramp touches lies in the first cache line,
/// what every token touches in the second.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Request {
    pub state: State,
    pub metric: Metric,
    /// Has had a token to run: it counts as decoding from then on.
    pub started: bool,
    /// Its thresholds are those that the rule finds.
    pub learns: bool,
    pub threshold: Option<f32>,
    /// Bit r: a row of this request may exit at ramp r.
    pub may_exit: u32,
    /// Ramp where its row is held, else `NONE`.
    pub ramp: u32,
    pub slot: u32,
    /// Index of its first row in the planned step, else `NONE`.
    pub in_step: u32,
    pub last_confidence: f32,
    pub habit: Habit,
    pub priority: i32,
    pub fill: Fill,
    /// Its newest pending row is on its way to the last layer, without a
    /// newer row.
    pub settling: bool,
    pub tokens: u64,
    pub id: u64,

    pub last_token_ns: u64,
    /// Where the time since its last token went: the host's part, waiting for
    /// the first window, held.
    pub spent_ns: [u64; 3],
    /// When its next token is due; 0: it has no deadline.
    pub due_ns: u64,
    pub deadline_ns: u64,
    pub request_deadline_ns: u64,
    pub max_tokens: u64,

    pub pending: Chain,
    /// When its last row left, whether with a token or with a draft.
    pub left_ns: u64,
    pub held_ns: u64,
    pub started_ns: u64,
    pub involuntary_exits: u64,
    pub involuntary_stays: u32,
    pub deadline_misses: u32,
    /// Of its last pending draft, see [`Request::survival`].
    pub survival: f32,
    /// By how much ramps have of late been right more often than predicted.
    pub luck: f32,
    pub exits: [u64; MAX_RAMPS],

    /// With a target agreement: how it is served.
    pub terms: Option<Terms>,
    /// Tokens that were audited, and those that differed.
    pub audited: Option<(u64, u64)>,
    /// Nothing of its answer differs from the full model's.
    pub lossless: bool,
}

const _: () = assert!(size_of::<Request>() == 6 * 64);
const _: () = assert!(std::mem::offset_of!(Request, last_token_ns) == 64);
const _: () = assert!(std::mem::offset_of!(Request, pending) == 128);

/// Twice the standard deviation of the luck of a request whose tokens are right half of
/// the time, as predicted.
const CHANCE: f32 = 0.18;

impl Request {
    pub fn spend(&mut self, on: TimeIn, ns: u64) {
        let spent = &mut self.spent_ns[on as usize];
        *spent = spent.saturating_add(ns);
    }

    /// The chance that all its pending drafts stand.
    pub fn survival(&self) -> f32 {
        match self.pending.is_empty() {
            true => 1.0,
            false => self.survival,
        }
    }

    /// Its luck, as far as it is more than chance.
    pub fn known_luck(&self) -> f32 {
        self.luck - self.luck.clamp(-CHANCE, CHANCE)
    }

    /// Starts the clock of the next token, at `now_ns`. It is due after the token
    /// deadline, or after an even share of the time left to the request's deadline,
    /// whichever is sooner.
    pub fn restart(&mut self, now_ns: u64) {
        self.last_token_ns = now_ns;
        self.spent_ns = [0; 3];
        let own =
            (self.deadline_ns > 0).then(|| self.last_token_ns.saturating_add(self.deadline_ns));
        let share = (self.request_deadline_ns > 0).then(|| {
            let end = self.started_ns.saturating_add(self.request_deadline_ns);
            let left = self.max_tokens.saturating_sub(self.tokens).max(1);
            self.last_token_ns + end.saturating_sub(self.last_token_ns) / left
        });
        self.due_ns = [own, share].into_iter().flatten().min().unwrap_or(0);
    }

    /// A ramp decided its row.
    pub fn decided(&mut self, decision: Decision, ramp: usize, forced: bool, confidence: f32) {
        self.last_confidence = confidence;
        match decision {
            Decision::Exit => {
                self.state = State::Idle;
                self.slot = NONE;
                // A draft becomes a token when it is verified.
                self.tokens += u64::from(self.fill != Fill::Verify);
                self.exits[ramp] += 1;
                self.involuntary_exits += u64::from(forced);
            }
            Decision::Hold => {
                self.state = State::Held;
                self.ramp = ramp as u32;
                self.involuntary_stays += u32::from(forced);
            }
            Decision::Stay => self.involuntary_stays += u32::from(forced),
            _ => {}
        }
    }
}

pub struct Requests {
    items: Vec<Request>,
    free: Vec<u32>,
    /// Open addressing with linear probing: index + 1, or 0 for empty.
    table: Vec<u32>,
    mask: usize,
}

const VACANT: Request = Request {
    id: 0,
    metric: Metric::Gap,
    learns: false,
    threshold: None,
    deadline_ns: 0,
    request_deadline_ns: 0,
    max_tokens: 0,
    priority: 0,
    may_exit: 0,
    state: State::Idle,
    ramp: NONE,
    slot: NONE,
    in_step: NONE,
    started: false,
    started_ns: 0,
    last_token_ns: 0,
    due_ns: 0,
    left_ns: 0,
    spent_ns: [0; 3],
    tokens: 0,
    exits: [0; MAX_RAMPS],
    involuntary_exits: 0,
    involuntary_stays: 0,
    held_ns: 0,
    deadline_misses: 0,
    last_confidence: f32::NAN,
    habit: Habit::NEW,
    fill: Fill::Copy,
    settling: false,
    pending: Chain::EMPTY,
    survival: 1.0,
    luck: 0.0,
    terms: None,
    audited: None,
    lossless: false,
};

impl Requests {
    pub fn new(max: usize) -> Result<Self> {
        let cells = (max * 2).next_power_of_two();
        Ok(Requests {
            items: memory::filled(VACANT, max)?,
            free: memory::free_list(max as u32)?,
            table: memory::filled(0, cells)?,
            mask: cells - 1,
        })
    }

    /// The requests alive, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Request> {
        let taken = self.table.iter().filter(|&&i| i != 0);
        taken.map(|&i| &self.items[i as usize - 1])
    }

    pub fn alive(&self) -> usize {
        self.items.len() - self.free.len()
    }

    /// Hosts count ids up, or draw them: a mix of all bits serves both.
    fn home(&self, id: u64) -> usize {
        let mut z = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize & self.mask
    }

    /// The cell that holds `id`, or the empty one where it would go.
    fn cell(&self, id: u64) -> usize {
        let mut c = self.home(id);
        while self.table[c] != 0 && self.items[self.table[c] as usize - 1].id != id {
            c = (c + 1) & self.mask;
        }
        c
    }

    pub fn find(&self, id: u64) -> Result<u32> {
        match self.table[self.cell(id)] {
            0 => Err(Error::UnknownRequest { id }),
            i => Ok(i - 1),
        }
    }

    pub fn add(&mut self, id: u64) -> Result<u32> {
        let cell = self.cell(id);
        if self.table[cell] != 0 {
            return Err(Error::DuplicateRequest { id });
        }
        let max = self.items.len() as u64;
        let i = self.free.pop().ok_or(Error::Capacity {
            field: "max_requests",
            value: max,
            need: max + 1,
            why: "every request slot is taken; remove one first",
        })?;
        self.items[i as usize] = Request { id, ..VACANT };
        self.table[cell] = i + 1;
        Ok(i)
    }

    pub fn remove(&mut self, i: u32) {
        let mut hole = self.cell(self.items[i as usize].id);
        self.free.push(i);
        // Close the gap, so that no probe sequence breaks and no tombstones
        // pile up over a server's life.
        let mut c = hole;
        loop {
            c = (c + 1) & self.mask;
            if self.table[c] == 0 {
                break;
            }
            let home = self.home(self.items[self.table[c] as usize - 1].id);
            let from_home = c.wrapping_sub(home) & self.mask;
            let from_hole = c.wrapping_sub(hole) & self.mask;
            if from_home >= from_hole {
                self.table[hole] = self.table[c];
                hole = c;
            }
        }
        self.table[hole] = 0;
    }

    pub fn get(&self, i: u32) -> &Request {
        &self.items[i as usize]
    }

    pub fn get_mut(&mut self, i: u32) -> &mut Request {
        &mut self.items[i as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn the_table_agrees_with_a_map() {
        let mut table = Requests::new(13).unwrap();
        let mut map: HashMap<u64, u32> = HashMap::new();
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..100_000 {
            let x = rng.u64(..);
            let id = (x >> 33) % 40;
            match map.get(&id) {
                Some(&i) if x >> 63 == 0 => {
                    assert_eq!(table.find(id), Ok(i));
                    table.remove(i);
                    map.remove(&id);
                }
                Some(_) => assert_eq!(table.add(id), Err(Error::DuplicateRequest { id })),
                None => {
                    assert_eq!(table.find(id), Err(Error::UnknownRequest { id }));
                    match table.add(id) {
                        Ok(i) => assert_eq!(map.insert(id, i), None),
                        Err(e) => {
                            assert!(matches!(e, Error::Capacity { .. }));
                            assert_eq!(map.len(), 13);
                        }
                    }
                }
            }
            assert_eq!(table.alive(), map.len());
        }
        for (id, i) in map {
            assert_eq!(table.find(id), Ok(i));
        }
    }
}
