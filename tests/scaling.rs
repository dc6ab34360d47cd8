// SPDX-License-Identifier: Apache-2.0

//! Every call of the loop costs what its rows cost, however many wait, whatever the
//! host's order of calls.

mod common;

use common::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    ready_first: bool,
    abandon: bool,
    deadlines: bool,
    priorities: bool,
    fill: drex_fill_mode,
}

/// Time of one row in a step, the least of many steps.
fn per_row(case: Case, batch: u32) -> f64 {
    let requests = 2 * batch;
    let mut c = config(&[4], requests, batch, DREX_POLICY_HOLD);
    c.threshold = 0.6;
    c.flush_rows = batch;
    c.max_hold_ns = u64::MAX;
    c.fill = case.fill;
    if case.fill != DREX_FILL_COPY {
        c.n_slots = 8 * requests;
    }
    if case.deadlines {
        c.token_deadline_ns = 1 << 40;
    }
    let e = Engine::new(&c);
    for id in 0..u64::from(requests) {
        e.add_with(id, |c| {
            c.priority = if case.priorities {
                id as i32 * 7 % 8
            } else {
                0
            };
        })
        .unwrap();
        e.ready(id, 0).unwrap();
    }
    let mut best = f64::INFINITY;
    let mut now = 0;
    for i in 0..40u64 {
        now += 1000;
        let begin = cpu_time();
        let mut plan = e.plan(now, batch).unwrap();
        if case.abandon {
            e.abandon().unwrap();
            plan = e.plan(now, batch).unwrap();
        }
        let mut spent = cpu_time() - begin;
        let ramp = plan.step.ramp != DREX_NO_RAMP;
        let own: Vec<_> = plan.rows.iter().filter(|r| r.back == 0).collect();
        let mut done: Vec<u64> = own.iter().map(|r| r.request).collect();
        if ramp {
            let out = |id: u64| !(id.wrapping_mul(0x9e37_79b9) + i).is_multiple_of(4);
            let logits: Vec<[f32; 2]> = plan
                .ids()
                .iter()
                .map(|&id| if out(id) { [9.0, 0.0] } else { [0.0; 2] })
                .collect();
            let verdicts = score(&e, &logits);
            let decided = plan.rows.iter().zip(&verdicts);
            let exits = decided.filter(|(r, v)| r.back == 0 && v.decision == DREX_DECISION_EXIT);
            done = exits.map(|(r, _)| r.request).collect();
        }
        now += 1000;
        let begin = cpu_time();
        let ready = || done.iter().for_each(|&id| e.ready(id, now).unwrap());
        if case.ready_first && ramp {
            ready();
        }
        e.complete(now, 900).unwrap();
        if !(case.ready_first && ramp) {
            ready();
        }
        spent += cpu_time() - begin;
        if plan.step.n_rows >= batch / 2 && i > 10 {
            best = best.min(spent.as_secs_f64() / f64::from(plan.step.n_rows));
        }
    }
    assert!(best.is_finite(), "{case:?}: no step had many rows");
    best
}

fn score(e: &Engine, rows: &[[f32; 2]]) -> Vec<drex_verdict> {
    let mut logits = sized!(drex_logits);
    logits.data = rows.as_ptr().cast();
    logits.row_stride_bytes = 8;
    (logits.n_rows, logits.n_vocab) = (rows.len() as u32, 2);
    let mut verdicts = Vec::with_capacity(rows.len());
    let (to, n) = (verdicts.as_mut_ptr(), logits.n_rows);
    // SAFETY: as many rows as are said, and room for a verdict of each.
    unsafe {
        ok(drex_ramp(e.raw, &logits, std::ptr::null(), to, n)).unwrap();
        verdicts.set_len(rows.len());
    }
    verdicts
}

#[test]
fn a_step_costs_its_rows() {
    for bits in 0..16 {
        for fill in [DREX_FILL_COPY, DREX_FILL_POSTFILL] {
            let case = Case {
                ready_first: bits & 1 > 0,
                abandon: bits & 2 > 0,
                deadlines: bits & 4 > 0,
                priorities: bits & 8 > 0,
                fill,
            };
            let (small, large) = (per_row(case, 64), per_row(case, 1024));
            // Sixteen times the rows; caches are allowed for.
            let grown = large / small;
            assert!(grown < 5.0, "{case:?}: {small} s a row, {large}");
        }
    }
}
