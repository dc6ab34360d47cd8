// SPDX-License-Identifier: Apache-2.0

//! Prompts are carriers: which windows prompt rows run in, and who goes along.

mod common;

use common::*;

const RAMPS: [u32; 2] = [4, 8];
const MS: u64 = 1_000_000;

struct Host {
    e: Engine,
    now: u64,
    /// Prompt rows that wait at layer 0.
    waiting: u32,
}

/// layers, reason, prompt rows, requests.
type Window = (u32, u32, drex_flush_reason, u32, Vec<u64>);

impl Host {
    fn new(n: u64, policy: drex_policy, set: impl FnOnce(&mut drex_config)) -> Host {
        let mut c = config(&RAMPS, n as u32, n as u32, policy);
        c.max_pass_rows = 64;
        set(&mut c);
        let e = Engine::new(&c);
        for id in 0..n {
            e.add(id).unwrap();
        }
        Host {
            e,
            now: 0,
            waiting: 0,
        }
    }

    fn ready(&self, ids: impl IntoIterator<Item = u64>) {
        for id in ids {
            self.e.ready(id, self.now).unwrap();
        }
    }

    fn plan(&mut self) -> Planned {
        let p = self.e.plan_with(self.now, 64, self.waiting).unwrap();
        if p.step.layer_begin == 0 {
            self.waiting -= p.step.n_prompt_rows;
        }
        p
    }

    /// Runs one step, 1 ms long; rows below the id are confident.
    fn window(&mut self, confident_below: u64) -> Window {
        let p = self.plan();
        let s = p.step;
        let ids = p.ids();
        if s.n_rows + s.n_prompt_rows > 0 {
            if s.ramp != DREX_NO_RAMP && s.n_rows > 0 {
                let c = ids.iter().map(|&id| match id < confident_below {
                    true => 0.9,
                    false => 0.1,
                });
                self.e.ramp(&c.collect::<Vec<_>>()).unwrap();
            }
            self.now += MS;
            self.e.complete(self.now, MS).unwrap();
        }
        (s.layer_begin, s.layer_end, s.reason, s.n_prompt_rows, ids)
    }
}

const NONE: drex_flush_reason = DREX_FLUSH_NONE;
const PROMPT: drex_flush_reason = DREX_FLUSH_PROMPT;

#[test]
fn a_cut_pass_takes_along_what_was_held_and_what_was_just_held() {
    let mut h = Host::new(4, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    h.ready(0..2);
    assert_eq!(h.window(1), (0, 4, NONE, 0, vec![0, 1]));
    // 1 is held. A prompt of 100 comes, and 61 of it fit beside three rows.
    h.waiting = 100;
    h.ready([0, 2]);
    assert_eq!(h.window(1), (0, 4, NONE, 61, vec![0, 2]));
    // 1, then 2: from the ramp on, where both exit.
    h.ready([0]);
    assert_eq!(h.window(3), (4, 8, PROMPT, 61, vec![1, 2]));
    // None is left to meet a ramp, and no row is held.
    assert_eq!(h.window(3), (8, 12, PROMPT, 61, vec![]));
    h.ready([1, 2]);
    assert_eq!(h.window(3), (0, 4, NONE, 39, vec![0, 1, 2]));
    assert_eq!(h.window(3), (4, 12, PROMPT, 39, vec![]));
    assert!(h.window(3).4.is_empty());
    let s = h.e.stats();
    assert_eq!(s.flushes[PROMPT as usize], 3);
    assert_eq!((s.held_rows, s.involuntary_stays), (0, 0));
    assert_eq!((s.steps, s.step_rows, s.tokens), (6, 9, 7));
    // Five windows, and 61 rows in three of them, 39 in two.
    assert_eq!((s.prompt_steps, s.prompt_rows), (5, 3 * 61 + 2 * 39));
}

/// Without decode rows there is nothing to look at, and nothing to call.
#[test]
fn a_prompt_alone_runs_whole_but_for_held_rows() {
    let mut h = Host::new(2, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    h.waiting = 10;
    assert_eq!(h.window(0), (0, 12, NONE, 10, vec![]));
    h.ready(0..2);
    assert_eq!(h.window(0), (0, 4, NONE, 0, vec![0, 1]));
    h.waiting = 10;
    // Cut where rows are held, though nobody is ready.
    let p = h.plan();
    assert_eq!((p.step.n_rows, p.step.n_prompt_rows), (0, 10));
    assert_eq!((p.step.layer_end, p.step.ramp), (4, 0));
    // A ramp of no rows is allowed, and asks for nothing.
    assert!(h.e.ramp(&[]).unwrap().is_empty());
    h.e.complete(h.now, MS).unwrap();
    assert_eq!(h.window(2), (4, 8, PROMPT, 10, vec![0, 1]));
    assert_eq!(h.window(2), (8, 12, PROMPT, 10, vec![]));
}

#[test]
fn off_never_cuts_and_ready_rows_ride_along() {
    let mut h = Host::new(3, DREX_POLICY_OFF, |_| {});
    h.ready(0..3);
    h.waiting = 30;
    assert_eq!(h.window(3), (0, 12, NONE, 30, vec![0, 1, 2]));
    let s = h.e.stats();
    assert_eq!((s.tokens, s.involuntary_stays), (3, 0));
    assert_eq!(s.exits, [0; DREX_MAX_RAMPS]);
}

#[test]
fn rows_that_stay_go_along_with_the_prompt() {
    for policy in [DREX_POLICY_LATENCY, DREX_POLICY_LAZY] {
        let mut h = Host::new(3, policy, |_| {});
        h.ready(0..3);
        h.waiting = 30;
        assert_eq!(h.window(1).3, 30);
        let left: &[u64] = if policy == DREX_POLICY_LAZY {
            &[0, 1, 2]
        } else {
            &[1, 2]
        };
        assert_eq!(h.window(0), (4, 8, PROMPT, 30, left.to_vec()));
        assert_eq!(h.window(0), (8, 12, PROMPT, 30, left.to_vec()));
        assert_eq!(h.e.stats().flushes[DREX_FLUSH_STAY as usize], 0);
    }
}

/// Rows that were told to stay before the prompt came go first.
#[test]
fn a_row_that_stays_comes_before_a_prompt() {
    let mut h = Host::new(2, DREX_POLICY_LATENCY, |_| {});
    h.ready(0..2);
    assert_eq!(h.window(0), (0, 4, NONE, 0, vec![0, 1]));
    h.waiting = 5;
    assert_eq!(h.window(2), (4, 8, DREX_FLUSH_STAY, 0, vec![0, 1]));
    assert_eq!(h.window(2), (0, 12, NONE, 5, vec![]));
}

/// Decode rows come first, but for an eighth of the places.
#[test]
fn room_is_shared() {
    let room = |rows: u32, all: u32, held: u64, waiting: u32| {
        let mut h = Host::new(32, DREX_POLICY_HOLD, |c| {
            c.max_batch = 16;
            c.max_pass_rows = all;
            c.flush_rows = 100;
        });
        h.ready(0..held);
        h.window(0);
        h.ready(held..held + u64::from(rows));
        h.waiting = waiting;
        let (begin, end, _, prompts, ids) = h.window(0);
        assert_eq!((begin, end), (0, 4));
        let (_, _, reason, deep, along) = h.window(0);
        assert_eq!((reason, deep), (PROMPT, prompts));
        assert!(along.len() + deep as usize <= all as usize);
        (ids.len(), prompts, along.len())
    };
    // All rows, and behind the cut room for the four that are held.
    assert_eq!(room(8, 32, 4, 100), (8, 20, 12));
    assert_eq!(room(8, 32, 0, 100), (8, 24, 8));
    assert_eq!(room(8, 32, 4, 6), (8, 6, 12));
    // At most max_batch go deep.
    assert_eq!(room(8, 32, 16, 100), (8, 16, 16));
    // Two of 16 places are the prompt's.
    assert_eq!(room(16, 16, 0, 100), (14, 2, 14));
    assert_eq!(room(16, 16, 0, 1), (15, 1, 15));
}

#[test]
fn an_abandoned_step_forgets_its_prompt_rows() {
    let mut h = Host::new(3, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
    h.ready(0..3);
    h.waiting = 20;
    // From layer 0.
    h.plan();
    h.e.abandon().unwrap();
    h.waiting = 20;
    assert_eq!(h.window(0), (0, 4, NONE, 20, vec![0, 1, 2]));
    // On the way.
    let p = h.plan();
    assert_eq!((p.step.layer_begin, p.step.n_prompt_rows), (4, 20));
    h.e.abandon().unwrap();
    assert_eq!(h.e.stats().held_rows, 3);
    // They wait at layer 0 again, where the host says so.
    assert_eq!(h.window(0).3, 0);
    h.waiting = 20;
    assert_eq!(h.window(0).3, 20);
}

/// A host of an earlier header names prompt rows, and cannot be told of any.
#[test]
fn a_step_without_the_field_has_no_prompt_rows() {
    let h = Host::new(1, DREX_POLICY_OFF, |_| {});
    let mut input = sized!(drex_plan_input);
    input.n_prompt_rows = 50;
    let mut step = sized!(drex_step);
    step.size = 24;
    step.n_prompt_rows = 7;
    let mut rows = Vec::with_capacity(1);
    // SAFETY: room for a row.
    let plan = |step: &mut drex_step, rows: &mut Vec<drex_row>| unsafe {
        drex_plan(h.e.raw, &input, rows.as_mut_ptr(), 1, step)
    };
    assert_eq!(plan(&mut step, &mut rows), DREX_OK);
    assert_eq!((step.n_rows, step.n_prompt_rows), (0, 7));
    h.ready([0]);
    assert_eq!(plan(&mut step, &mut rows), DREX_OK);
    assert_eq!((step.n_rows, step.n_prompt_rows), (1, 7));
    h.e.complete(1, 1).unwrap();
    // The same with the whole struct.
    step.size = size_of::<drex_step>() as u32;
    assert_eq!(plan(&mut step, &mut rows), DREX_OK);
    assert_eq!((step.n_rows, step.n_prompt_rows), (0, 50));
}

#[test]
fn more_rows_than_decode_rows_is_all_that_fits() {
    let mut c = config(&RAMPS, 4, 4, DREX_POLICY_HOLD);
    c.max_pass_rows = 3;
    assert_eq!(
        Engine::try_new(&c).err(),
        Some(Failed(DREX_ERROR_INVALID_ARGUMENT))
    );
    let text = text();
    assert!(
        text.contains("max_pass_rows is 3") && text.contains("max_batch") && text.contains('4'),
        "{text}"
    );
    c.max_pass_rows = 1 << 21;
    assert!(Engine::try_new(&c).is_err());
    for rows in [0, 4, 1 << 20] {
        c.max_pass_rows = rows;
        Engine::new(&c);
    }
    c.reserved = 9;
    assert!(Engine::try_new(&c).is_err());
}

/// What the engine is told of a machine: `t0` ms a pass, `t1` and `t2` ms a row
/// and a prompt row, a head of 2 % of t0.
fn teach(h: &Host, t0: f64, t1: f64, t2: f64) {
    let mut o = sized!(drex_observation);
    for i in 0..300u32 {
        for (begin, end) in [(0, 4), (4, 12), (0, 12)] {
            (o.layer_begin, o.layer_end) = (begin, end);
            (o.n_rows, o.n_prompt_rows) = (1 + i % 8, i % 3 * 20);
            let work = t0 + t1 * f64::from(o.n_rows) + t2 * f64::from(o.n_prompt_rows);
            let head = if end == 4 { 0.02 * t0 } else { 0.0 };
            let ms = work * f64::from(end - begin) / 12.0 + head;
            o.duration_ns = (ms * MS as f64) as u64;
            // SAFETY: valid pointers.
            ok(unsafe { drex_observe(h.e.raw, &o) }).unwrap();
        }
    }
}

/// Under `auto` a cut is a matter of time: nobody is held, so it pays where rows
/// cost and exit, and not where weights bound the time.
#[test]
fn auto_cuts_where_it_saves_time() {
    let cut = |t0: f64, t1: f64, sure: u64| {
        let ramps = [4u32];
        let mut c = config(&ramps, 8, 8, DREX_POLICY_AUTO);
        c.n_layers = 12;
        c.max_pass_rows = 64;
        let e = Engine::new(&c);
        for id in 0..8 {
            e.add(id).unwrap();
        }
        let mut h = Host {
            e,
            now: 0,
            waiting: 0,
        };
        let mut cuts = (0, 0);
        teach(&h, t0, t1, 0.1 * t1);
        for i in 0..600 {
            for id in 0..8 {
                let _ = h.e.ready(id, h.now);
            }
            h.waiting = if i % 4 == 0 { 40 } else { 0 };
            let p = h.plan();
            let s = p.step;
            let rows = f64::from(s.n_rows) * t1 + f64::from(s.n_prompt_rows) * 0.1 * t1;
            let mut ms = (t0 + rows) * f64::from(s.layer_end - s.layer_begin) / 12.0;
            if s.ramp != DREX_NO_RAMP && s.n_rows > 0 {
                ms += 0.02 * t0;
                let c: Vec<f32> = p
                    .ids()
                    .iter()
                    .map(|id| if id + i % 8 < 4 + sure { 0.9 } else { 0.1 })
                    .collect();
                h.e.ramp(&c).unwrap();
            }
            if i >= 200 && s.n_prompt_rows > 0 && s.layer_begin == 0 {
                cuts.0 += u32::from(s.ramp != DREX_NO_RAMP);
                cuts.1 += 1;
            }
            h.now += (ms * MS as f64) as u64;
            h.e.complete(h.now, (ms * MS as f64) as u64).unwrap();
        }
        f64::from(cuts.0) / f64::from(cuts.1)
    };
    // Rows cost as much as a fifth of a pass each, and most exit.
    let dear = cut(2.0, 0.4, 4);
    assert!(dear > 0.9, "{dear}");
    // Nothing but the weights costs, and few exit: the rule is `off`.
    let flat = cut(10.0, 0.002, 0);
    assert!(flat < 0.2, "{flat}");
}

/// A flush of its own meets the deadline, the carrier would not; and the other
/// way round.
#[test]
fn a_deadline_chooses_between_a_flush_and_a_carrier() {
    for (deadline, reason) in [(40 * MS, NONE), (8 * MS, DREX_FLUSH_DEADLINE)] {
        let mut h = Host::new(2, DREX_POLICY_HOLD, |c| c.flush_rows = 100);
        let mut o = sized!(drex_observation);
        for i in 0..100 {
            // 1 ms a segment, 0.1 ms a prompt row in all.
            o.n_rows = 1 + i % 2;
            o.n_prompt_rows = i % 5 * 20;
            for l in 0..3 {
                (o.layer_begin, o.layer_end) = (4 * l, 4 * l + 4);
                o.duration_ns = MS + u64::from(o.n_prompt_rows) * MS / 30;
                // SAFETY: valid pointers.
                ok(unsafe { drex_observe(h.e.raw, &o) }).unwrap();
            }
        }
        h.e.remove(1).unwrap();
        h.e.add_with(1, |c| c.token_deadline_ns = deadline).unwrap();
        h.ready([1]);
        assert_eq!(h.window(0).4, [1]);
        h.waiting = 63;
        h.ready([0]);
        // The carrier needs 3 + 6.3 ms, the flush 2 ms.
        let (_, _, why, prompts, _) = h.window(0);
        assert_eq!(why, reason, "{deadline}");
        assert_eq!(prompts > 0, reason == NONE);
    }
}
