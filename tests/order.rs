// SPDX-License-Identifier: Apache-2.0

//! Which rows run when more wait than fit, against the order as the header has it:
//! passed over 8 times, deadline at stake, priority, age.

mod common;

use common::*;

const MS: u64 = 1_000_000;

/// A row that waits, as the header's reader sees it.
#[derive(Clone, Copy, Debug)]
struct Row {
    id: u64,
    /// Order of arrival.
    seq: u64,
    due: Option<u64>,
    priority: i32,
    /// Plans of its queue that passed it by.
    passed: u32,
}

/// The rows that a step over this queue takes, in their order.
fn expect(queue: &[Row], places: usize, horizon: u64) -> Vec<u64> {
    let mut left = queue.to_vec();
    let n = places.min(left.len());
    let mut for_starved = if left.len() <= places {
        n
    } else {
        places.div_ceil(2)
    };
    let mut out = Vec::new();
    while out.len() < n {
        left.sort_by_key(|r| r.seq);
        let starved = left.iter().position(|r| r.passed >= 8);
        let at_stake = |r: &&Row| r.due.is_some_and(|d| d <= horizon);
        let due = left.iter().filter(at_stake);
        let due = due.min_by_key(|r| (r.due, -i64::from(r.priority), r.seq));
        let first = left.iter().min_by_key(|r| (-i64::from(r.priority), r.seq));
        let id = match (starved, due, first) {
            (Some(i), ..) if for_starved > 0 => {
                for_starved -= 1;
                left[i].id
            }
            (_, Some(r), _) | (_, _, Some(r)) => r.id,
            _ => unreachable!(),
        };
        left.retain(|r| r.id != id);
        out.push(id);
    }
    out
}

struct Host {
    e: Engine,
    now: u64,
    seq: u64,
    ready: Vec<Row>,
    held: Vec<Row>,
    rng: fastrand::Rng,
}

impl Host {
    fn draw(&mut self, n: u64) -> u64 {
        self.rng.u64(..n)
    }

    fn arrive(&mut self, held: bool, mut row: Row) {
        self.seq += 1;
        (row.seq, row.passed) = (self.seq, 0);
        let to = if held {
            &mut self.held
        } else {
            &mut self.ready
        };
        to.push(row);
    }

    /// One step, whose rows must be the expected ones. True: it was a flush.
    fn step(&mut self, places: u32) -> Option<bool> {
        let plan = self.e.plan(self.now, places).unwrap();
        if plan.step.n_rows == 0 {
            return None;
        }
        let flush = plan.step.layer_begin > 0;
        let queue = if flush {
            &mut self.held
        } else {
            &mut self.ready
        };
        // No time is known: at stake is what is late now.
        let want = expect(queue, places as usize, self.now);
        assert_eq!(plan.ids(), want, "{places} of {queue:?} at {}", self.now);
        let mut taken = Vec::new();
        for id in want {
            let at = queue.iter().position(|r| r.id == id).unwrap();
            taken.push(queue.remove(at));
        }
        for r in queue {
            r.passed += 1;
        }
        if plan.step.ramp != DREX_NO_RAMP {
            let confidences: Vec<f32> = taken
                .iter()
                .map(|_| [0.1, 0.9][self.draw(2) as usize])
                .collect();
            self.e.ramp(&confidences).unwrap();
            self.now += 1;
            self.e.complete(self.now, 0).unwrap();
            for (row, c) in taken.into_iter().zip(confidences) {
                if c < 0.5 {
                    self.arrive(true, row);
                }
            }
        } else {
            self.now += 1;
            self.e.complete(self.now, 0).unwrap();
        }
        Some(flush)
    }
}

#[test]
fn the_order_is_the_headers() {
    let (mut flushes, mut steps) = (0, 0);
    for seed in 0..12 {
        let n = 40;
        let mut c = config(&[4], n, 8, DREX_POLICY_HOLD);
        c.flush_rows = 12;
        c.max_hold_ns = 1 << 60;
        let mut h = Host {
            e: Engine::new(&c),
            now: 1,
            seq: 0,
            ready: Vec::new(),
            held: Vec::new(),
            rng: fastrand::Rng::with_seed(seed),
        };
        // Deadlines and priorities each in some engines only: the fast ways too.
        let (deadlines, priorities) = (seed % 2 == 1, seed % 4 > 1);
        let mut rows = Vec::new();
        for id in 0..u64::from(n) {
            let priority = if priorities { h.draw(4) as i32 } else { 0 };
            let deadline = if deadlines && h.draw(2) == 0 {
                20 + h.draw(60)
            } else {
                0
            };
            h.e.add_with(id, |c| {
                c.priority = priority;
                c.token_deadline_ns = deadline;
            })
            .unwrap();
            let row = Row {
                id,
                seq: 0,
                due: None,
                priority,
                passed: 0,
            };
            rows.push((row, deadline, None));
        }
        for _ in 0..1500 {
            for (k, one) in rows.iter_mut().enumerate() {
                let id = k as u64;
                let state = h.e.info(id).unwrap().state;
                if state == DREX_REQUEST_IDLE && h.draw(3) > 0 {
                    h.e.ready(id, h.now).unwrap();
                    let (mut row, deadline, last) = *one;
                    // A deadline runs from the last token, or the first start.
                    let from = last.unwrap_or(h.now);
                    row.due = (deadline > 0).then_some(from + deadline);
                    one.2 = Some(from);
                    h.arrive(false, row);
                }
            }
            h.now += h.draw(4);
            let tokens: Vec<u64> = (0..u64::from(n))
                .map(|id| h.e.info(id).unwrap().tokens)
                .collect();
            let places = 1 + h.draw(8) as u32;
            let step = h.step(places);
            for (k, before) in tokens.into_iter().enumerate() {
                if h.e.info(k as u64).unwrap().tokens > before {
                    rows[k].2 = Some(h.now);
                }
            }
            steps += u32::from(step.is_some());
            flushes += u32::from(step == Some(true));
        }
    }
    assert!(flushes > 2000 && steps > 10_000, "{flushes} of {steps}");
}

/// A shallow window takes 2 ms, a deep one 6, and five rows wait for two places. One
/// is due in time for one more window, and not for two.
#[test]
fn the_row_that_a_flush_is_for_goes_along() {
    for late in 0..5u64 {
        let mut c = config(&[4], 8, 2, DREX_POLICY_HOLD);
        c.flush_rows = 100;
        c.max_hold_ns = 1 << 60;
        let e = Engine::new(&c);
        for _ in 0..50 {
            for rows in 1..=2 {
                e.observe(0, 4, rows, 2 * MS).unwrap();
                e.observe(4, 8, rows, 6 * MS).unwrap();
                e.observe(0, 8, rows, 8 * MS).unwrap();
            }
        }
        let mut now = 0;
        for id in 0..8u64 {
            e.add_with(id, |c| {
                if id == late {
                    c.token_deadline_ns = 30 * MS;
                }
            })
            .unwrap();
        }
        let mut out = None;
        // Those to be held come first, then others that exit keep the engine busy.
        let mut ready: Vec<u64> = (0..5).collect();
        for &id in &ready {
            e.ready(id, now).unwrap();
        }
        while out.is_none() {
            assert!(now < 100 * MS, "{late} is lost");
            let plan = e.plan(now, 2).unwrap();
            assert!(plan.step.n_rows > 0);
            if plan.step.layer_begin == 4 {
                now += 6 * MS;
                e.complete(now, 6 * MS).unwrap();
                if plan.ids().contains(&late) {
                    out = Some(now);
                }
                continue;
            }
            now += 2 * MS;
            let confidences: Vec<f32> = plan
                .ids()
                .iter()
                .map(|&id| if id < 5 { 0.1 } else { 0.9 })
                .collect();
            e.ramp(&confidences).unwrap();
            e.complete(now, 2 * MS).unwrap();
            ready.retain(|id| !plan.ids().contains(id));
            if ready.is_empty() {
                for id in 5..7 {
                    if e.info(id).unwrap().state == DREX_REQUEST_IDLE {
                        e.ready(id, now).unwrap();
                    }
                }
            }
        }
        assert_eq!(e.stats().deadline_misses, 0, "row {late} came at {out:?}");
    }
}
