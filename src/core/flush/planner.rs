// SPDX-License-Identifier: Apache-2.0

//! The choice of the next window, and of its rows. Every policy comes down to the same
//! three numbers: the ramps that are looked at, the held rows that make a
//! queue due, and the ready rows below which held ones go first.

use crate::core::config::Config;
use crate::core::counters::Reason;
use crate::core::error::Result;
use crate::core::estimate::carrier::Carrier;
use crate::core::estimate::cost::CostModel;
use crate::core::policy::rule::{self, RowRule};
use crate::core::rows::buffer::{Buffer, READY, held_queue, stay_queue};
use crate::core::{MAX_RAMPS, memory};

/// A row passed over by this many plans of its queue is taken before urgency
/// and priority. See [`Planner::pick`] for the bound that follows.
pub const STARVE_AFTER: u64 = 8;
/// A held row is flushed when it has waited for this many times the predicted
/// time of its remaining layers at the latest, where `max_hold_ns` is 0: with
/// requests that always exit, it would wait for ever.
pub const HOLD_TIMES: f64 = 8.0;
/// [`HOLD_TIMES`] in plans of any kind, while no time is known.
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

impl Choice {
    /// Where its rows wait, if not at layer 0.
    pub fn ramp(self) -> Option<usize> {
        match self {
            Choice::Flush(ramp, _) => Some(ramp),
            Choice::Nothing | Choice::Ready => None,
        }
    }

    pub fn reason(self) -> Reason {
        match self {
            Choice::Flush(_, reason) => reason,
            Choice::Nothing | Choice::Ready => Reason::None,
        }
    }

    /// The queue whose rows are passed over if they are not taken.
    fn queue(self) -> Option<usize> {
        match self {
            Choice::Nothing => None,
            Choice::Ready => Some(READY),
            Choice::Flush(ramp, _) => Some(held_queue(ramp)),
        }
    }
}

pub struct View<'a> {
    pub config: &'a Config,
    pub buffer: &'a mut Buffer,
    pub cost: &'a CostModel,
    pub row_rule: RowRule,
    /// Rows of a request in a deep window, pending ones included.
    pub rows_each: f64,
    /// The pass that prompt rows wait for.
    pub carrier: Option<Carrier>,
}

impl View<'_> {
    /// Rows of a window from `layer` on over so many requests.
    fn deep_rows(&self, requests: usize, layer: u32) -> u32 {
        match layer {
            0 => requests as u32,
            _ => (requests as f64 * self.rows_each).round() as u32,
        }
    }
}

pub struct Planner {
    /// Plans that had rows.
    pub plans: u64,
    picked: Vec<u32>,
}

impl Planner {
    pub fn new(config: &Config) -> Result<Self> {
        Ok(Planner {
            plans: 0,
            picked: memory::room(config.batch())?,
        })
    }

    /// Rows that go on at once come first, then what is due by its deadline
    /// or its age, then prompt rows, then what the rule says.
    pub fn choose(&self, v: &View, now_ns: u64, limit: usize) -> Choice {
        let ramps = v.config.n_ramps();
        for r in (0..ramps).rev() {
            if v.buffer.stays_at(r) > 0 {
                return Choice::Flush(r, Reason::Stay);
            }
        }
        let ready = v.buffer.ready_rows();
        if v.buffer.held() == 0 {
            return if ready == 0 && v.carrier.is_none() {
                Choice::Nothing
            } else {
                Choice::Ready
            };
        }
        // Deepest first: its rows are the closest to a token.
        let mut aged = None;
        for r in (0..ramps).rev() {
            match self.due(v, r, now_ns, limit) {
                Some(Reason::Deadline) => return Choice::Flush(r, Reason::Deadline),
                Some(reason) => aged = aged.or(Some((r, reason))),
                None => {}
            }
        }
        if let Some((r, reason)) = aged {
            return Choice::Flush(r, reason);
        }
        if v.carrier.is_some() {
            return Choice::Ready;
        }
        let m = v.row_rule;
        let mut held = [0; MAX_RAMPS + 1];
        for r in (0..ramps).rev() {
            held[r + 1] = v.buffer.held_at(r);
            // An earlier rule held these rows; the rule in force sends no others here.
            if held[r + 1] > 0 && m.ramps >> r & 1 == 0 {
                return Choice::Flush(r, Reason::Idle);
            }
        }
        let all = v.buffer.held();
        match rule::choose(
            &held[..=ramps],
            all,
            ready as u32,
            m.hold_rows,
            m.ready_rows,
        ) {
            0 => Choice::Ready,
            k if held[k] >= m.hold_rows => Choice::Flush(k - 1, Reason::Full),
            k => Choice::Flush(k - 1, Reason::Idle),
        }
    }

    fn due(&self, v: &View, ramp: usize, now_ns: u64, limit: usize) -> Option<Reason> {
        let q = held_queue(ramp);
        let oldest = v.buffer.queues().oldest(q)?;
        if let Some((_, due)) = v.buffer.queues().nearest(q)
            && due <= horizon(v, Some(ramp), now_ns, limit)
        {
            return Some(Reason::Deadline);
        }
        if v.carrier.is_some_and(|c| c.cut == Some(ramp)) {
            // Taken along right after the next window.
            return None;
        }
        let row = v.buffer.node(oldest);
        let aged = match v.config.max_hold_ns {
            0 => {
                let layer = v.config.ramp_layers[ramp];
                let rows = v.deep_rows(v.buffer.held_at(ramp) as usize, layer);
                let deep = v.cost.remaining(layer, rows);
                deep.map(|ns| (ns * HOLD_TIMES) as u64)
            }
            ns => Some(ns),
        };
        let late = match aged {
            None => self.plans.saturating_sub(row.plans) >= HOLD_PLANS_MAX,
            Some(ns) => now_ns.saturating_sub(row.since_ns) >= ns,
        };
        late.then_some(Reason::Age)
    }

    /// Takes up to `limit` rows for a choice, in the order in which they run, up
    /// to the first whose request does not fit. They are named by handle, and
    /// leave their queue.
    ///
    /// Rows that go on at once first; then rows passed over `STARVE_AFTER`
    /// times or more, in the order of their arrival, in at most half of the
    /// places where not all fit; then those whose deadline is at stake, the
    /// nearest first; then by priority; equals in the order of their arrival.
    ///
    /// So no row starves: with `k` places a plan, a row with `q` older ones
    /// before it in its queue is taken at the latest by the queue's plan
    /// number `STARVE_AFTER + 1 + q / ceil(k / 2)`, whatever comes after it.
    pub fn pick(
        &mut self,
        v: &mut View,
        choice: Choice,
        now_ns: u64,
        limit: usize,
        fits: &mut dyn FnMut(u32) -> bool,
    ) -> &[u32] {
        self.picked.clear();
        let Some(q) = choice.queue() else { return &[] };
        let mut limit = limit;
        let mut ramp = None;
        if let Choice::Flush(at, _) = choice {
            ramp = Some(at);
            while limit > 0 {
                let Some(h) = v.buffer.queues().oldest(stay_queue(at)) else {
                    break;
                };
                if !fits(v.buffer.owner(h).0) {
                    return &self.picked;
                }
                v.buffer.remove(h, true);
                self.picked.push(h);
                limit -= 1;
            }
        }
        let waiting = v.buffer.queues().len(q);
        let horizon = horizon(v, ramp, now_ns, limit);
        let places = limit.min(waiting);
        if v.buffer
            .take_oldest(q, places, horizon, &mut self.picked, fits)
        {
            return &self.picked;
        }
        // Under steady overload every row has been passed over often, and age
        // would be all that counts: half of the places stay with priority.
        let mut starved = if waiting <= limit {
            places
        } else {
            limit.div_ceil(2)
        };
        for _ in 0..places {
            let queues = v.buffer.queues();
            let oldest = match starved {
                0 => None,
                _ => queues
                    .oldest(q)
                    .filter(|&h| queues.passed(h) >= STARVE_AFTER),
            };
            // The oldest has been passed over most.
            starved = if oldest.is_some() { starved - 1 } else { 0 };
            let due = || queues.nearest(q).filter(|n| n.1 <= horizon).map(|n| n.0);
            let Some(h) = oldest.or_else(due).or_else(|| queues.foremost(q)) else {
                break;
            };
            if !fits(v.buffer.owner(h).0) {
                break;
            }
            match ramp {
                None => v.buffer.pop_ready(v.buffer.owner(h).0),
                Some(_) => v.buffer.remove(h, false),
            }
            self.picked.push(h);
        }
        &self.picked
    }

    /// Counts a plan that had rows.
    pub fn count(&mut self, buffer: &mut Buffer, choice: Choice) {
        if let Some(q) = choice.queue() {
            buffer.queues_mut().count_plan(q);
            self.plans += 1;
        }
    }

    /// Takes back what [`Planner::count`] counted last.
    pub fn uncount(&mut self, buffer: &mut Buffer, choice: Choice) {
        if let Some(q) = choice.queue() {
            buffer.queues_mut().uncount_plan(q);
            self.plans -= 1;
        }
    }
}

/// The latest deadline at stake: a row that is due by this time is late if it is
/// passed over once more (held at `ramp`; a ready row where that is `None`).
fn horizon(v: &View, ramp: Option<usize>, now_ns: u64, limit: usize) -> u64 {
    let ns = match ramp {
        Some(ramp) => {
            let held = v.buffer.held_at(ramp) as usize;
            time_to_token(v, ramp, held.min(limit), limit)
        }
        None => {
            let n = v.buffer.ready_rows().min(limit) as u32;
            let (all, shallow) = (
                v.cost.remaining(0, n),
                v.cost.predict(0, v.config.ramp_layers[0], n),
            );
            (all.unwrap_or(0.0) * MARGIN + shallow.unwrap_or(0.0)) as u64
        }
    };
    now_ns.saturating_add(ns)
}

/// Predicted time until rows held at `ramp` have their tokens if they are
/// passed over once more. 0 while nothing is known.
fn time_to_token(v: &View, ramp: usize, rows: usize, limit: usize) -> u64 {
    let layers = &v.config.ramp_layers;
    let rows = v.deep_rows(rows, layers[ramp]);
    if let Some(c) = v.carrier {
        // Along with the carrier if it is cut here, else in a flush after it.
        let cut = c.cut == Some(ramp);
        let end = if cut { layers[ramp] } else { v.config.n_layers };
        let prompts = if cut { c.prompts } else { 0 };
        let first = v.cost.predict_mixed(0, end, c.rows, c.prompts);
        let rows = if cut { rows + c.rows } else { rows };
        let deep = v.cost.remaining_mixed(layers[ramp], rows, prompts);
        return (deep.unwrap_or(0.0) * MARGIN + first.unwrap_or(0.0)) as u64;
    }
    let deep = v.cost.remaining(layers[ramp], rows).unwrap_or(0.0);
    let shallow = match v.buffer.ready_rows().min(limit) {
        0 => 0.0,
        n => v.cost.predict(0, layers[0], n as u32).unwrap_or(0.0),
    };
    (deep * MARGIN + shallow) as u64
}
