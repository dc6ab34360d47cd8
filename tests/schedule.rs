// SPDX-License-Identifier: Apache-2.0

//! The order of windows: each rule of the planner on its own.

mod common;

use common::*;

const RAMPS: [u32; 2] = [4, 8];
const MS: u64 = 1_000_000;

struct Host {
    e: Engine,
    now: u64,
    /// The engine is told what windows take.
    timed: bool,
}

impl Host {
    fn new(n: u64, batch: u32, policy: drex_policy, set: impl FnOnce(&mut drex_config)) -> Host {
        let mut c = config(&RAMPS, n as u32, batch, policy);
        set(&mut c);
        let e = Engine::new(&c);
        for id in 0..n {
            e.add(id).unwrap();
        }
        Host {
            e,
            now: 0,
            timed: true,
        }
    }

    fn ready(&self, ids: impl IntoIterator<Item = u64>) {
        for id in ids {
            self.e.ready(id, self.now).unwrap();
        }
    }

    /// Runs one step, 1 ms long; rows below the id are confident.
    fn step(&mut self, confident_below: u64) -> Planned {
        let plan = self.e.plan(self.now, 64).unwrap();
        if plan.step.n_rows > 0 {
            if plan.step.ramp != DREX_NO_RAMP {
                let c: Vec<f32> = plan
                    .ids()
                    .iter()
                    .map(|&id| if id < confident_below { 0.9 } else { 0.1 })
                    .collect();
                self.e.ramp(&c).unwrap();
            }
            self.now += MS;
            let ns = if self.timed { MS } else { 0 };
            self.e.complete(self.now, ns).unwrap();
        }
        plan
    }

    fn window(&mut self, confident_below: u64) -> (u32, u32, drex_flush_reason, Vec<u64>) {
        let p = self.step(confident_below);
        let s = p.step;
        (s.layer_begin, s.layer_end, s.reason, p.ids())
    }
}

#[test]
fn off_runs_full_passes() {
    let mut h = Host::new(3, 2, DREX_POLICY_OFF, |_| {});
    h.ready(0..3);
    assert_eq!(h.window(9), (0, 12, DREX_FLUSH_NONE, vec![0, 1]));
    assert_eq!(h.window(9), (0, 12, DREX_FLUSH_NONE, vec![2]));
    assert_eq!(h.e.plan(0, 1).unwrap().step.n_rows, 0);
    assert_eq!(h.e.stats().tokens, 3);
}

#[test]
fn rows_that_never_exit_run_full_passes() {
    let mut h = Host::new(2, 4, DREX_POLICY_HOLD, |c| c.threshold = 1.01);
    h.ready(0..2);
    assert_eq!(h.window(9), (0, 12, DREX_FLUSH_NONE, vec![0, 1]));
    // One that may exit takes the others along through the windows.
    h.e.remove(1).unwrap();
    h.e.add_with(1, |c| c.threshold = 0.5).unwrap();
    h.ready(0..2);
    assert_eq!(h.window(9), (0, 4, DREX_FLUSH_NONE, vec![0, 1]));
    assert_eq!(h.e.info(0).unwrap().state, DREX_REQUEST_HELD);
    assert_eq!(h.e.info(1).unwrap().tokens, 2 - 1);
    // On its own again it passes the second ramp by.
    assert_eq!(h.window(9), (4, 12, DREX_FLUSH_IDLE, vec![0]));
}

#[test]
fn a_ramp_that_nobody_can_use_is_passed_by() {
    let thresholds = [1.5f32, 0.5];
    let mut h = Host::new(1, 4, DREX_POLICY_HOLD, |c| {
        c.ramp_thresholds = thresholds.as_ptr();
    });
    h.ready([0]);
    assert_eq!(h.window(0), (0, 8, DREX_FLUSH_NONE, vec![0]));
    // One of the one request that decodes is held: that is enough.
    assert_eq!(h.window(0), (8, 12, DREX_FLUSH_FILL, vec![0]));
}

#[test]
fn hold_flushes_at_flush_rows() {
    let mut h = Host::new(8, 8, DREX_POLICY_HOLD, |c| c.flush_rows = 3);
    h.ready(0..8);
    // 6 and 7 are held: too few. The others go on emitting.
    assert_eq!(h.window(6).3.len(), 8);
    h.ready(0..6);
    assert_eq!(h.window(5), (0, 4, DREX_FLUSH_NONE, (0..6).collect()));
    h.ready(0..5);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_FILL, vec![6, 7, 5]));
    // They are three at the second ramp now: due again, and deeper than all.
    assert_eq!(h.window(0), (8, 12, DREX_FLUSH_FILL, vec![6, 7, 5]));
    assert_eq!(h.window(9), (0, 4, DREX_FLUSH_NONE, (0..5).collect()));
    assert_eq!(h.e.stats().flushes[..6], [3, 2, 0, 0, 0, 0]);
}

#[test]
fn hold_by_itself_waits_for_six_tenths_of_those_that_decode() {
    let mut h = Host::new(8, 4, DREX_POLICY_HOLD, |_| {});
    // Five decode, three have not begun; a batch takes four: ceil(2.4) = 3.
    h.ready(0..4);
    h.window(2);
    h.ready([0, 1, 4]);
    assert_eq!(h.window(2), (0, 4, DREX_FLUSH_NONE, vec![0, 1, 4]));
    h.ready([0, 1]);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_FILL, vec![2, 3, 4]));
}

#[test]
fn hold_flushes_when_few_are_ready() {
    let mut h = Host::new(8, 8, DREX_POLICY_HOLD, |c| {
        c.flush_rows = 8;
        c.min_ready = 3;
    });
    h.ready(0..5);
    h.window(4);
    h.ready(0..3);
    assert_eq!(h.window(4), (0, 4, DREX_FLUSH_NONE, vec![0, 1, 2]));
    h.ready(0..2);
    assert_eq!(h.window(9), (4, 8, DREX_FLUSH_IDLE, vec![4]));
    assert_eq!(h.window(9), (0, 4, DREX_FLUSH_NONE, vec![0, 1]));
}

#[test]
fn the_deepest_queue_goes_first() {
    let mut h = Host::new(4, 4, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    h.ready([0]);
    h.window(0);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_IDLE, vec![0]));
    h.ready([1]);
    h.window(0);
    // 0 is held at the second ramp, 1 at the first; nothing is ready.
    assert_eq!(h.window(0), (8, 12, DREX_FLUSH_IDLE, vec![0]));
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_IDLE, vec![1]));
}

#[test]
fn age_flushes() {
    let mut h = Host::new(4, 4, DREX_POLICY_HOLD, |c| {
        c.flush_rows = 100;
        c.max_hold_ns = 3 * MS;
    });
    h.ready(0..4);
    h.window(3);
    for _ in 0..3 {
        h.ready(0..3);
        assert_eq!(h.window(3).2, DREX_FLUSH_NONE);
    }
    h.ready(0..3);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_AGE, vec![3]));
    let stats = h.e.stats();
    // 3000 us: bucket 12 is [2048, 4096).
    assert_eq!(stats.wait_us_buckets[12], 1);
    assert_eq!(stats.wait_us_sum, 3000);
    assert_eq!(h.e.info(3).unwrap().held_ns, 3 * MS);
}

/// Windows of unknown time: the wait is counted in steps.
#[test]
fn while_no_time_is_known_a_row_is_held_for_256_steps_at_most() {
    let mut h = Host::new(2, 2, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    h.timed = false;
    h.ready(0..2);
    h.window(1);
    for _ in 0..256 {
        h.ready([0]);
        assert_eq!(h.window(1).2, DREX_FLUSH_NONE);
    }
    h.ready([0]);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_AGE, vec![1]));
}

/// Requests that always exit in front: a row that does not waits for 8 times the
/// time of its two remaining windows, and no more than a window longer.
#[test]
fn without_a_limit_a_row_is_held_for_a_multiple_of_its_deep_time() {
    let mut h = Host::new(2, 2, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    for _ in 0..50 {
        // Layers 4 to 12 in two windows: 6 ms.
        for (begin, end, ns) in [(0, 4, MS), (4, 8, 2 * MS), (8, 12, 4 * MS)] {
            h.e.observe(begin, end, 1, ns).unwrap();
        }
    }
    for round in 0..3 {
        h.ready(0..2);
        assert_eq!(h.window(1).2, DREX_FLUSH_NONE);
        let held = h.now;
        loop {
            h.ready([0]);
            let (begin, _, reason, ids) = h.window(1);
            if reason == DREX_FLUSH_NONE {
                continue;
            }
            assert_eq!((begin, reason, ids), (4, DREX_FLUSH_AGE, vec![1]));
            break;
        }
        // The window itself took a millisecond.
        let waited = (h.now - MS - held) as f64 / MS as f64;
        assert!((waited - 48.0).abs() < 3.0, "round {round}: {waited} ms");
        // From ramp 1 on: nobody else is ready.
        h.e.remove(0).unwrap();
        while h.step(0).step.n_rows > 0 {}
        h.e.add(0).unwrap();
        for _ in 0..20 {
            for (begin, end, ns) in [(0, 4, MS), (4, 8, 2 * MS), (8, 12, 4 * MS)] {
                h.e.observe(begin, end, 1, ns).unwrap();
            }
        }
    }
}

#[test]
fn a_deadline_flushes_in_time_and_a_miss_is_counted() {
    let mut h = Host::new(4, 4, DREX_POLICY_HOLD, |c| {
        c.flush_rows = 100;
    });
    h.e.remove(3).unwrap();
    h.e.add_with(3, |c| c.token_deadline_ns = 10 * MS).unwrap();
    for (begin, end) in [(0, 4), (4, 8), (8, 12)] {
        h.e.observe(begin, end, 1, MS).unwrap();
    }
    h.ready(0..4);
    h.window(3);
    // From the first ramp to the end: 2 ms and 10 %, and 1 ms for the step
    // that would run before. Due at 10 ms: flushed at 7 ms.
    while h.now < 7 * MS {
        h.ready(0..3);
        assert_eq!(h.window(3).2, DREX_FLUSH_NONE, "{}", h.now);
    }
    h.ready(0..3);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_DEADLINE, vec![3]));
    assert_eq!(h.window(0), (8, 12, DREX_FLUSH_DEADLINE, vec![3]));
    assert_eq!(h.e.info(3).unwrap().deadline_misses, 0);
    h.now += 20 * MS;
    h.ready([3]);
    for _ in 0..9 {
        h.window(0);
    }
    assert_eq!(h.e.info(3).unwrap().tokens, 2);
    assert_eq!(h.e.info(3).unwrap().deadline_misses, 1);
    assert_eq!(h.e.stats().deadline_misses, 1);
}

/// Ready before the step is complete, as in the header's loop: the time until then is the window's.
#[test]
fn a_late_token_is_its_windows_and_not_the_hosts() {
    let e = Engine::new(&config(&RAMPS, 1, 1, DREX_POLICY_LATENCY));
    e.add_with(0, |c| c.token_deadline_ns = 50).unwrap();
    e.ready(0, 1).unwrap();
    for (begin, end) in [(2, 60), (62, 130)] {
        e.plan(begin, 1).unwrap();
        assert_eq!(e.ramp(&[0.9]).unwrap()[0].decision, DREX_DECISION_EXIT);
        e.ready(0, end).unwrap();
        e.complete(end, end - begin).unwrap();
    }
    let misses = e.stats().misses;
    assert_eq!(misses[DREX_MISS_RUN as usize], 2, "{misses:?}");
    // Later, it is the host's.
    e.plan(131, 1).unwrap();
    e.ramp(&[0.9]).unwrap();
    e.complete(140, 9).unwrap();
    e.ready(0, 200).unwrap();
    e.plan(201, 1).unwrap();
    e.ramp(&[0.9]).unwrap();
    e.complete(210, 9).unwrap();
    let misses = e.stats().misses;
    assert_eq!(misses[DREX_MISS_HOST as usize], 1, "{misses:?}");
}

/// It is out: the next one's deadline counts from it, and it may be late itself.
#[test]
fn a_token_counts_though_its_step_is_given_up() {
    let e = Engine::new(&config(&RAMPS, 1, 1, DREX_POLICY_LATENCY));
    e.add_with(0, |c| c.token_deadline_ns = 50).unwrap();
    e.ready(0, 0).unwrap();
    e.plan(30, 1).unwrap();
    e.ramp(&[0.9]).unwrap();
    e.abandon().unwrap();
    e.ready(0, 31).unwrap();
    e.plan(32, 1).unwrap();
    e.ramp(&[0.9]).unwrap();
    e.complete(70, 30).unwrap();
    assert_eq!(e.stats().deadline_misses, 0);
    e.ready(0, 71).unwrap();
    e.plan(140, 1).unwrap();
    e.ramp(&[0.9]).unwrap();
    e.abandon().unwrap();
    let s = e.stats();
    assert_eq!(
        (s.deadline_misses, s.misses[DREX_MISS_QUEUE as usize]),
        (1, 1)
    );
}

#[test]
fn a_deadline_goes_before_age_and_depth() {
    let mut h = Host::new(2, 4, DREX_POLICY_HOLD, |c| {
        c.flush_rows = 5;
        c.max_hold_ns = 10 * MS;
    });
    h.e.remove(1).unwrap();
    h.e.add_with(1, |c| c.token_deadline_ns = 5 * MS).unwrap();
    h.ready([0]);
    h.window(0);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_IDLE, vec![0]));
    h.ready([1]);
    // Nothing is idle while 1 is ready.
    assert_eq!(h.window(0), (0, 4, DREX_FLUSH_NONE, vec![1]));
    h.now += 9 * MS + MS / 2;
    // 0 is deeper and due by its age, 1 is late.
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_DEADLINE, vec![1]));
    assert_eq!(h.window(0), (8, 12, DREX_FLUSH_DEADLINE, vec![1, 0]));
}

#[test]
fn priority_and_deadlines_order_what_does_not_fit() {
    let mut c = config(&RAMPS, 8, 2, DREX_POLICY_LATENCY);
    c.max_batch = 2;
    let e = Engine::new(&c);
    for (id, priority, deadline) in [(0, 0, 0), (1, 5, 0), (2, 0, 0), (3, -1, 100), (4, 0, 50)] {
        e.add_with(id, |c| {
            c.priority = priority;
            c.token_deadline_ns = deadline;
        })
        .unwrap();
        e.ready(id, 0).unwrap();
    }
    // The deadlines are at stake: nearest first, whatever the priority.
    assert_eq!(e.plan(1000, 8).unwrap().ids(), [4, 3]);
    e.ramp(&[0.9; 2]).unwrap();
    e.complete(1000, 0).unwrap();
    assert_eq!(e.plan(1000, 8).unwrap().ids(), [1, 0]);
    // A failed step changes nothing about the order.
    e.abandon().unwrap();
    assert_eq!(e.plan(1000, 8).unwrap().ids(), [1, 0]);
    e.ramp(&[0.9; 2]).unwrap();
    e.complete(1000, 0).unwrap();
    assert_eq!(e.plan(1000, 8).unwrap().ids(), [2]);
}

#[test]
fn rows_that_stay_go_on_with_held_ones() {
    let mut h = Host::new(6, 3, DREX_POLICY_ART, |c| c.art_ratio = 0.5);
    h.ready(0..3);
    // Two of three: more than half, so 2 is held.
    h.window(2);
    assert_eq!(h.e.info(2).unwrap().state, DREX_REQUEST_HELD);
    h.ready([0, 3]);
    // One of two is not more than half: both stay, and 2 comes along.
    let plan = h.step(1);
    assert_eq!(plan.ids(), [0, 3]);
    assert_eq!(h.e.stats().involuntary_stays, 1);
    assert_eq!(h.e.info(0).unwrap().state, DREX_REQUEST_RUNNING);
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_STAY, vec![0, 3, 2]));
    assert_eq!(h.window(0), (8, 12, DREX_FLUSH_STAY, vec![0, 3, 2]));
    assert_eq!(h.e.stats().involuntary_exits, 0);
}

#[test]
fn art_learns_its_ratio() {
    let mut h = Host::new(4, 4, DREX_POLICY_ART, |_| {});
    assert!(h.e.stats().art_ratio.is_nan());
    for _ in 0..200 {
        for (begin, end, ns) in [
            (0, 4, 400_000),
            (4, 8, 500_000),
            (8, 12, 500_000),
            (0, 12, 800_000),
        ] {
            h.e.observe(begin, end, 4, ns).unwrap();
        }
    }
    // c = 1400 - 800 = 600, t_d = 1000
    h.ready(0..4);
    let plan = h.e.plan(0, 4).unwrap();
    let ratio = h.e.stats().art_ratio;
    assert!((ratio - 0.6).abs() < 0.05, "{ratio}");
    // Two of four is not more than 0.6.
    let v = h.e.ramp(&[0.9, 0.9, 0.1, 0.1]).unwrap();
    assert!(v.iter().all(|v| v.decision == DREX_DECISION_STAY));
    assert_eq!(v.iter().map(|v| v.forced).collect::<Vec<_>>(), [1, 1, 0, 0]);
    h.e.abandon().unwrap();
    assert_eq!(h.e.stats().involuntary_stays, 0);
    assert_eq!(h.e.plan(0, 4).unwrap().ids(), plan.ids());
    let v = h.e.ramp(&[0.9, 0.9, 0.9, 0.1]).unwrap();
    let decisions: Vec<u32> = v.iter().map(|v| v.decision).collect();
    assert_eq!(decisions, [0, 0, 0, DREX_DECISION_HOLD]);
    h.e.complete(1, 0).unwrap();
    assert_eq!(h.window(0), (4, 8, DREX_FLUSH_IDLE, vec![3]));
}

#[test]
fn a_short_array_cuts_a_step_short() {
    let mut h = Host::new(4, 4, DREX_POLICY_LATENCY, |_| {});
    h.ready(0..4);
    h.window(0);
    assert_eq!(h.e.plan(h.now, 3).unwrap().ids(), [0, 1, 2]);
    h.e.ramp(&[0.9; 3]).unwrap();
    h.e.complete(h.now, 0).unwrap();
    // The one that was cut off is still told to go on, and goes first.
    h.ready(0..3);
    assert_eq!(h.window(9), (4, 8, DREX_FLUSH_STAY, vec![3]));
}

#[test]
fn the_same_calls_give_the_same_results() {
    let run = || {
        let mut h = Host::new(16, 5, DREX_POLICY_HOLD, |_| {});
        let mut log = Vec::new();
        for i in 0..300u64 {
            for id in 0..16 {
                let _ = h.e.ready(id, h.now);
            }
            if i % 11 == 4 {
                h.e.remove(i % 16).unwrap();
                h.e.add_with(i % 16, |c| c.priority = (i % 3) as i32)
                    .unwrap();
            }
            let (begin, end, reason, ids) = h.window(i * 7 % 17);
            log.push((begin, end, reason, ids));
        }
        log
    };
    assert_eq!(run(), run());
}

/// The share of a request's deadline that a token has is known when the token
/// before it is out: 10 ms each of 100.
#[test]
fn a_token_later_than_its_share_is_a_miss() {
    let mut h = Host::new(1, 1, DREX_POLICY_OFF, |_| {});
    h.e.remove(0).unwrap();
    h.e.add_with(0, |c| {
        c.request_deadline_ns = 100 * MS;
        c.max_tokens = 10;
    })
    .unwrap();
    let mut misses = Vec::new();
    for (i, ms) in [11, 9, 11, 10].into_iter().enumerate() {
        h.e.ready(0, h.now).unwrap();
        assert_eq!(h.e.plan(h.now, 1).unwrap().step.n_rows, 1);
        h.now += ms * MS;
        h.e.complete(h.now, ms * MS).unwrap();
        assert_eq!(h.e.info(0).unwrap().tokens, i as u64 + 1);
        misses.push(h.e.info(0).unwrap().deadline_misses);
    }
    // 11 > 100/10; 9 < 89/9; 11 > 80/8; 10 > 69/7.
    assert_eq!(misses, [1, 1, 2, 3]);
}

/// A plan that is refused counts as none: no row ages by it.
#[test]
fn a_refused_plan_changes_nothing() {
    let mut h = Host::new(2, 2, DREX_POLICY_HOLD, |c| {
        c.n_slots = 4;
        c.fill = DREX_FILL_POSTFILL;
        c.flush_rows = 100;
        c.max_pending = 1;
    });
    h.timed = false;
    h.ready([0]);
    h.window(1);
    // 0 has left, and its row stays pending; then its next one is held.
    h.ready([0, 1]);
    h.window(0);
    let before = (h.e.stats(), h.e.info(0).unwrap(), h.e.info(1).unwrap());
    for capacity in (0..2).cycle().take(600) {
        let got = h.e.plan(h.now, capacity);
        assert_eq!(got.err(), Some(Failed(DREX_ERROR_CAPACITY)));
    }
    let after = (h.e.stats(), h.e.info(0).unwrap(), h.e.info(1).unwrap());
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
    let (.., reason, ids) = h.window(0);
    assert_eq!((reason, ids.len()), (DREX_FLUSH_IDLE, 2));
}

/// One wrong time, and the waits of others are what they were.
#[test]
fn a_wild_time_does_not_stay() {
    let mut h = Host::new(4, 4, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    h.ready(0..3);
    h.window(2);
    // Row 2 is held since 1 ms. A call names the end of all times.
    h.e.ready(3, u64::MAX).unwrap();
    h.e.plan(u64::MAX, 4).unwrap();
    h.e.abandon().unwrap();
    h.now = 5 * MS;
    h.e.ready(0, h.now).unwrap();
    h.e.remove(2).unwrap();
    assert_eq!(h.e.stats().wait_us_sum, 4000);
}
