// SPDX-License-Identifier: Apache-2.0

//! What to run next, and over which rows.

use super::buffer::Buffer;
use super::config::Config;
use super::cost::CostModel;
use super::counters::Reason;
use super::policy::Policy;
use super::request::Requests;

/// A row passed over by this many plans of its queue is taken before urgency
/// and priority. See [`Planner::pick`] for the bound that follows.
pub const STARVE_AFTER: u64 = 8;
/// A held row is flushed after this many plans at the latest, even when
/// nothing else makes its queue due: with `max_hold_ns` 0 and requests that
/// always exit, it would wait for ever.
pub const HOLD_PLANS_MAX: u64 = 256;
/// A flush that must meet a deadline starts this much earlier than predicted.
const MARGIN: f64 = 1.1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Nothing,
    /// Ready rows through the first window.
    Ready,
    /// Rows that wait at a ramp through the next window.
    Flush(usize, Reason),
}

/// A row that could be taken: a ready request, or a slot in a queue.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    pub index: u32,
    pub seq: u64,
    pub class: Class,
    pub priority: i32,
    pub due_ns: u64,
}

/// In the order in which rows are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    Stay,
    Starved,
    Urgent,
    Rest,
}

impl Candidate {
    fn key(&self) -> (Class, u64, i64, u64) {
        let c = self.class;
        match c {
            Class::Stay | Class::Starved => (c, 0, 0, self.seq),
            Class::Urgent => (c, self.due_ns, -i64::from(self.priority), self.seq),
            Class::Rest => (c, 0, -i64::from(self.priority), self.seq),
        }
    }
}

pub struct View<'a> {
    pub config: &'a Config,
    pub requests: &'a Requests,
    pub buffer: &'a Buffer,
    pub cost: &'a CostModel,
    /// Ready requests.
    pub ready: &'a [u32],
    /// Requests alive that have had a token to run.
    pub decoding: usize,
}

pub struct Planner {
    /// Plans that had rows.
    pub plans: u64,
    /// Plans through the first window.
    pub first: u64,
    /// Plans over each ramp's queue.
    pub flushes: Vec<u64>,
    candidates: Vec<Candidate>,
}

/// ceil(0.6 * n), exactly.
fn six_tenths(n: usize) -> usize {
    (n * 3).div_ceil(5)
}

impl Planner {
    pub fn new(config: &Config) -> Self {
        Planner {
            plans: 0,
            first: 0,
            flushes: vec![0; config.n_ramps()],
            candidates: Vec::with_capacity(config.n_slots.max(config.max_requests) as usize),
        }
    }

    /// Held rows that make a queue due by their number.
    fn fill_rows(v: &View) -> usize {
        if v.config.flush_rows > 0 {
            return v.config.flush_rows as usize;
        }
        match v.config.policy {
            Policy::Art => v.config.batch(),
            _ => six_tenths(v.decoding.min(v.config.batch())).max(1),
        }
    }

    /// Rows that go on at once come first, then what is due, then new rows.
    pub fn choose(&self, v: &View, now_ns: u64, limit: usize) -> Choice {
        let ramps = v.config.n_ramps();
        for r in (0..ramps).rev() {
            if v.buffer.stays_at(r) > 0 {
                return Choice::Flush(r, Reason::Stay);
            }
        }
        if v.buffer.held() > 0 {
            let mut due: Option<(u8, usize, Reason)> = None;
            // Deepest first among equals: its rows are the closest to a token.
            for r in (0..ramps).rev() {
                if let Some((rank, reason)) = self.due(v, r, now_ns, limit) {
                    if due.is_none_or(|(best, ..)| rank < best) {
                        due = Some((rank, r, reason));
                    }
                }
            }
            if let Some((_, r, reason)) = due {
                return Choice::Flush(r, reason);
            }
        }
        if v.ready.is_empty() {
            Choice::Nothing
        } else {
            Choice::Ready
        }
    }

    fn due(&self, v: &View, ramp: usize, now_ns: u64, limit: usize) -> Option<(u8, Reason)> {
        let held = v.buffer.held_at(ramp) as usize;
        if held == 0 {
            return None;
        }
        let ahead = self.time_to_token(v, ramp, held.min(limit), limit);
        let mut aged = false;
        for &slot in v.buffer.queue(ramp) {
            let row = v.buffer.row(slot);
            if let Some(due) = v.requests.get(row.request).due_ns() {
                if now_ns.saturating_add(ahead) >= due {
                    return Some((0, Reason::Deadline));
                }
            }
            let max = v.config.max_hold_ns;
            aged |= max > 0 && now_ns.saturating_sub(row.since_ns) >= max;
            aged |= self.plans - row.plans >= HOLD_PLANS_MAX;
        }
        if aged {
            return Some((1, Reason::Age));
        }
        if held >= Self::fill_rows(v) {
            return Some((2, Reason::Fill));
        }
        let min_ready = match v.config.policy {
            Policy::Hold => v.config.min_ready.max(1) as usize,
            _ => 1,
        };
        (v.ready.len() < min_ready).then_some((3, Reason::Idle))
    }

    /// Predicted time until rows held at `ramp` have their tokens if they are
    /// passed over once more. 0 while nothing is known.
    fn time_to_token(&self, v: &View, ramp: usize, rows: usize, limit: usize) -> u64 {
        let layers = &v.config.ramp_layers;
        let deep = v.cost.remaining(layers[ramp], rows as u32).unwrap_or(0.0);
        let shallow = match v.ready.len().min(limit) {
            0 => 0.0,
            n => v.cost.predict(0, layers[0], n as u32).unwrap_or(0.0),
        };
        (deep * MARGIN + shallow) as u64
    }

    /// Takes up to `limit` rows for a choice, in the order in which they run.
    ///
    /// Rows that go on at once first; then rows passed over `STARVE_AFTER`
    /// times or more, in the order of their arrival, in at most half of the
    /// places; then those whose deadline is at stake, the nearest first; then
    /// by priority; equals in the order of their arrival.
    ///
    /// So no row starves: with `k` places a plan, a row with `q` older ones
    /// before it in its queue is taken at the latest by the queue's plan
    /// number `STARVE_AFTER + 1 + q / ceil(k / 2)`, whatever comes after it.
    pub fn pick(&mut self, v: &View, choice: Choice, now_ns: u64, limit: usize) -> &[Candidate] {
        self.candidates.clear();
        match choice {
            Choice::Nothing => {}
            Choice::Ready => {
                let n = v.ready.len().min(limit) as u32;
                let ahead = v.cost.remaining(0, n).unwrap_or(0.0) * MARGIN;
                for &i in v.ready {
                    let r = v.requests.get(i);
                    let passed = self.first - r.ready_mark;
                    self.candidates.push(candidate(
                        v,
                        i,
                        i,
                        r.ready_seq,
                        passed,
                        now_ns.saturating_add(ahead as u64),
                    ));
                }
                self.first += 1;
            }
            Choice::Flush(ramp, _) => {
                let queue = v.buffer.queue(ramp);
                let n = queue.len().min(limit) as u32;
                let ahead = v
                    .cost
                    .remaining(v.config.ramp_layers[ramp], n)
                    .unwrap_or(0.0)
                    * MARGIN;
                for &slot in queue {
                    let row = v.buffer.row(slot);
                    let passed = self.flushes[ramp] - row.flushes;
                    let mut c = candidate(
                        v,
                        slot,
                        row.request,
                        row.seq,
                        passed,
                        now_ns.saturating_add(ahead as u64),
                    );
                    if row.stay {
                        c.class = Class::Stay;
                    }
                    self.candidates.push(c);
                }
                self.flushes[ramp] += 1;
            }
        }
        if self.candidates.is_empty() {
            return &[];
        }
        self.plans += 1;
        self.cap_starved(limit);
        let n = self.candidates.len().min(limit);
        if n < self.candidates.len() {
            self.candidates
                .select_nth_unstable_by_key(n, Candidate::key);
        }
        self.candidates[..n].sort_unstable_by_key(Candidate::key);
        &self.candidates[..n]
    }

    /// Under steady overload every row has been passed over often, and age
    /// would be all that counts: half of the places stay with priority.
    fn cap_starved(&mut self, limit: usize) {
        let share = limit.div_ceil(2);
        let starved = |c: &Candidate| c.class == Class::Starved;
        let n = self.candidates.iter().filter(|c| starved(c)).count();
        if n <= share || self.candidates.len() <= limit {
            return;
        }
        let order = |c: &Candidate| (c.class != Class::Starved, c.seq);
        self.candidates.select_nth_unstable_by_key(share, order);
        for c in &mut self.candidates[share..] {
            if starved(c) {
                c.class = if c.due_ns == 0 {
                    Class::Rest
                } else {
                    Class::Urgent
                };
            }
        }
    }
}

fn candidate(
    v: &View,
    index: u32,
    request: u32,
    seq: u64,
    passed: u64,
    horizon_ns: u64,
) -> Candidate {
    let r = v.requests.get(request);
    let at_stake = r.due_ns().filter(|&due| horizon_ns >= due);
    Candidate {
        index,
        seq,
        class: if passed >= STARVE_AFTER {
            Class::Starved
        } else if at_stake.is_some() {
            Class::Urgent
        } else {
            Class::Rest
        },
        priority: r.priority,
        due_ns: at_stake.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_tenths_rounds_up() {
        let got: Vec<usize> = (0..=10).map(six_tenths).collect();
        assert_eq!(got, [0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6]);
    }
}
