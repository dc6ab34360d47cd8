// SPDX-License-Identifier: Apache-2.0

//! The host refuses tokens at a ramp: rows that would exit with one of them
//! go on, and only those.

use std::cell::RefCell;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::null;

mod common;
use common::*;

/// What the callback was asked, and which token it refuses.
struct Asked {
    engine: *mut drex_engine,
    refuses: i32,
    rows: RefCell<Vec<(u32, i32)>>,
}

unsafe extern "C" fn ask(data: *mut c_void, row: u32, token: i32) -> u32 {
    // SAFETY: what the test passes.
    let asked = unsafe { &*data.cast::<Asked>() };
    asked.rows.borrow_mut().push((row, token));
    let mut stats = sized!(drex_stats);
    // SAFETY: a struct with its size.
    let status = unsafe { drex_stats_get(asked.engine, &mut stats) };
    assert_eq!(status, DREX_ERROR_HANDLE_BUSY);
    u32::from(token != asked.refuses)
}

/// Logits with so much between the best token and the others.
fn row(best: usize, margin: f32) -> [f32; 8] {
    let mut row = [0.0; 8];
    row[best] = margin;
    row
}

#[test]
fn a_refused_token_does_not_exit_and_its_neighbours_do() {
    // Heads whose logit i is that of token `first + i`.
    for (threshold, first) in [(0.0, 0), (0.5, 0), (0.5, 100)] {
        let ids: Vec<i32> = (first..first + 8).collect();
        let mut config = config(&[1], 4, 4, DREX_POLICY_HOLD);
        config.metric = DREX_METRIC_MAXPROB;
        config.threshold = threshold;
        let e = Engine::new(&config);
        for id in 0..3 {
            e.add(id).unwrap();
            e.ready(id, 0).unwrap();
        }
        e.plan(0, 4).unwrap();
        let data = [row(3, 9.0), row(5, 9.0), row(3, 0.1)];
        let asked = Asked {
            engine: e.raw,
            refuses: first + 3,
            rows: RefCell::default(),
        };
        let mut logits = sized!(drex_logits);
        logits.data = data.as_ptr().cast();
        (logits.n_rows, logits.n_vocab, logits.row_stride_bytes) = (3, 8, 32);
        if first > 0 {
            logits.token_ids = ids.as_ptr();
        }
        logits.confirm = Some(ask);
        logits.confirm_data = (&raw const asked).cast_mut().cast();
        let mut verdicts = [const { MaybeUninit::<drex_verdict>::uninit() }; 3];
        // SAFETY: three rows and three verdicts.
        ok(unsafe { drex_ramp(e.raw, &logits, null(), verdicts.as_mut_ptr().cast(), 3) }).unwrap();
        // SAFETY: written on success.
        let verdicts = verdicts.map(|v| unsafe { v.assume_init() });
        let decisions = verdicts.map(|v| v.decision);
        assert_eq!(
            decisions,
            [DREX_DECISION_HOLD, DREX_DECISION_EXIT, DREX_DECISION_HOLD]
        );
        assert_eq!(verdicts.map(|v| v.token - first), [3, 5, 3]);
        assert!(verdicts[0].confidence < threshold && verdicts[0].confidence > threshold - 1e-6);
        // Rows that are not confident are not asked about.
        let sure: &[(u32, i32)] = if threshold > 0.0 {
            &[(0, first + 3), (1, first + 5)]
        } else {
            &[(0, first + 3), (1, first + 5), (2, first + 3)]
        };
        assert_eq!(*asked.rows.borrow(), sure);
        let stats = e.stats();
        assert_eq!((stats.exits[0], stats.tokens), (1, 1));
        assert_eq!((stats.nonfinite_rows, stats.involuntary_stays), (0, 0));
        e.complete(0, 0).unwrap();
    }
}
