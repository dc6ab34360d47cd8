// SPDX-License-Identifier: Apache-2.0

//! Texts that a host hands over: profiles, names, labels of metrics.

use std::ffi::CString;
use std::ptr::null_mut;

use drex::ffi::*;

use crate::{sized, succeeded};

/// The first byte chooses the function, the others are its text up to a NUL.
pub fn run(data: &[u8]) {
    let Some((&kind, bytes)) = data.split_first() else {
        return;
    };
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = CString::new(&bytes[..end]).expect("a NUL was cut off");
    match kind % 5 {
        0 => name("drex_policy_from_name", drex_policy_from_name, &text),
        1 => name("drex_metric_from_name", drex_metric_from_name, &text),
        2 => name("drex_fill_from_name", drex_fill_from_name, &text),
        3 => labels(&text),
        _ => profile(&text),
    }
}

type FromName = unsafe extern "C" fn(*const std::ffi::c_char, *mut u32) -> drex_status;

fn name(function: &str, call: FromName, text: &CString) {
    let mut out = 77;
    // SAFETY: valid pointers.
    let status = unsafe { call(text.as_ptr(), &mut out) };
    assert_eq!(succeeded(function, status), out != 77, "{text:?}");
}

fn engine() -> *mut drex_engine {
    let ramps = [4, 8];
    let mut c = sized!(drex_config);
    c.abi_version = DREX_ABI_VERSION;
    (c.n_layers, c.n_ramps, c.ramp_layers) = (12, 2, ramps.as_ptr());
    (c.n_slots, c.max_requests, c.max_batch) = (4, 4, 4);
    (c.policy, c.threshold, c.art_ratio) = (DREX_POLICY_AUTO, 0.5, f32::NAN);
    let mut engine = null_mut();
    // SAFETY: valid pointers.
    assert_eq!(unsafe { drex_create(&c, &mut engine) }, DREX_OK);
    engine
}

fn save(engine: *mut drex_engine) -> Option<Vec<u8>> {
    let (mut text, mut n) = (vec![0u8; 1 << 14], 0);
    // SAFETY: as much room as is said.
    let status = unsafe { drex_profile_save(engine, text.as_mut_ptr().cast(), text.len(), &mut n) };
    succeeded("drex_profile_save", status).then(|| text[..n].to_vec())
}

/// A profile is taken whole or not at all, and what was taken can be saved and taken again.
fn profile(text: &CString) {
    let engine = engine();
    let before = save(engine);
    // SAFETY: a handle and a text.
    let status = unsafe { drex_profile_load(engine, text.as_ptr()) };
    if succeeded("drex_profile_load", status) {
        let saved = save(engine).expect("what was loaded cannot be saved");
        let saved = CString::new(saved).expect("a profile has no NUL");
        // SAFETY: as above.
        let status = unsafe { drex_profile_load(engine, saved.as_ptr()) };
        assert!(
            succeeded("drex_profile_load", status),
            "{saved:?} was saved and is refused"
        );
    } else {
        assert_eq!(before, save(engine), "a profile was half taken");
    }
    // The engine goes on to work: a window is planned and timed.
    let mut r = sized!(drex_request_config);
    (r.id, r.metric, r.fill) = (1, DREX_METRIC_DEFAULT, DREX_FILL_DEFAULT);
    r.threshold = f32::NAN;
    let mut input = sized!(drex_plan_input);
    input.now_ns = 1000;
    let mut step = sized!(drex_step);
    let mut rows = [drex_row {
        request: 0,
        slot: 0,
        back: 0,
    }; 4];
    // SAFETY: valid pointers, and as much room as is said.
    unsafe {
        assert_eq!(drex_request_add(engine, &r), DREX_OK);
        assert_eq!(drex_request_ready(engine, 1, 1, 500), DREX_OK);
        assert_eq!(
            drex_plan(engine, &input, rows.as_mut_ptr(), 4, &mut step),
            DREX_OK
        );
        assert_eq!(step.n_rows, 1);
        assert_eq!(drex_abandon(engine), DREX_OK);
        assert_eq!(drex_destroy(engine), DREX_OK);
    }
}

/// Whatever the labels, the text of the metrics has lines that begin with `#` or `drex_`.
fn labels(text: &CString) {
    let engine = engine();
    let (mut out, mut n) = (vec![0u8; 1 << 16], 0);
    // SAFETY: valid pointers, and as much room as is said.
    let status = unsafe {
        drex_metrics_text(
            engine,
            text.as_ptr(),
            out.as_mut_ptr().cast(),
            out.len(),
            &mut n,
        )
    };
    if succeeded("drex_metrics_text", status) {
        let out = std::str::from_utf8(&out[..n]).expect("metrics are no UTF-8");
        for line in out.lines() {
            assert!(
                line.starts_with("# ") || line.starts_with("drex_"),
                "{line}"
            );
        }
    }
    // SAFETY: a handle.
    assert_eq!(unsafe { drex_destroy(engine) }, DREX_OK);
}
