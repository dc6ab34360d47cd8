// SPDX-License-Identifier: Apache-2.0

//! The C functions called as wrongly as C can call them.

mod common;

use std::ffi::CStr;
use std::mem::size_of;
use std::ptr::{null, null_mut};

use common::*;
use drex::ffi::drex_top_get;

const RAMPS: [u32; 2] = [4, 8];

fn engine() -> Engine {
    Engine::new(&config(&RAMPS, 4, 4, DREX_POLICY_HOLD))
}

fn fails<T>(result: Result<T, Failed>, status: drex_status, words: &str) {
    match result {
        Ok(_) => panic!("succeeded; expected status {status}: {words}"),
        Err(Failed(got)) => assert_eq!(got, status, "{}", text()),
    }
    for word in words.split('|') {
        assert!(text().contains(word), "no '{word}' in: {}", text());
    }
}

fn string(p: *const std::ffi::c_char) -> &'static str {
    assert!(!p.is_null());
    // SAFETY: static text.
    unsafe { CStr::from_ptr(p) }.to_str().unwrap()
}

#[test]
fn names() {
    assert_eq!(string(drex_version()), env!("CARGO_PKG_VERSION"));
    assert_eq!(drex_abi_version(), DREX_ABI_VERSION);
    assert_eq!(string(drex_status_name(DREX_OK)), "DREX_OK");
    assert_eq!(
        string(drex_status_name(DREX_ERROR_PANIC)),
        "DREX_ERROR_PANIC"
    );
    let texts: std::collections::BTreeSet<_> =
        (0..15).map(|i| string(drex_status_text(i))).collect();
    assert_eq!(texts.len(), 15, "every status has a text of its own");
    assert!(!texts.contains("unknown status"));
    for unknown in [-1, 15, i32::MIN, i32::MAX] {
        assert_eq!(string(drex_status_text(unknown)), "unknown status");
        assert_eq!(string(drex_status_name(unknown)), "DREX_ERROR_UNKNOWN");
    }
    let policies = [
        "off", "eager", "lazy", "median", "mean", "latency", "hold", "art",
    ];
    for (i, name) in policies.iter().enumerate() {
        assert_eq!(string(drex_policy_name(i as u32)), *name);
        let c = std::ffi::CString::new(*name).unwrap();
        let mut out = 99;
        // SAFETY: valid pointers.
        assert_eq!(
            unsafe { drex_policy_from_name(c.as_ptr(), &mut out) },
            DREX_OK
        );
        assert_eq!(out, i as u32);
    }
    for (i, name) in ["gap", "maxprob", "entropy"].iter().enumerate() {
        assert_eq!(string(drex_metric_name(i as u32)), *name);
        let c = std::ffi::CString::new(*name).unwrap();
        let mut out = 99;
        // SAFETY: valid pointers.
        assert_eq!(
            unsafe { drex_metric_from_name(c.as_ptr(), &mut out) },
            DREX_OK
        );
        assert_eq!(out, i as u32);
    }
    for (i, name) in ["copy", "postfill", "verify", "propagate"]
        .iter()
        .enumerate()
    {
        assert_eq!(string(drex_fill_name(i as u32)), *name);
        let c = std::ffi::CString::new(*name).unwrap();
        let mut out = 99;
        // SAFETY: valid pointers.
        let status = unsafe { drex_fill_from_name(c.as_ptr(), &mut out) };
        assert_eq!((status, out), (DREX_OK, i as u32));
    }
    for (number, name) in [
        (DREX_DECISION_EXIT, "exit"),
        (DREX_DECISION_HOLD, "hold"),
        (DREX_DECISION_STAY, "stay"),
        (DREX_DECISION_GONE, "gone"),
        (DREX_DECISION_PENDING, "pending"),
        (DREX_DECISION_ACCEPT, "accept"),
        (DREX_DECISION_REPLACE, "replace"),
        (DREX_DECISION_DROP, "drop"),
    ] {
        assert_eq!(string(drex_decision_name(number)), name);
    }
    for (number, name) in [
        (DREX_FLUSH_NONE, "none"),
        (DREX_FLUSH_FILL, "fill"),
        (DREX_FLUSH_AGE, "age"),
        (DREX_FLUSH_DEADLINE, "deadline"),
        (DREX_FLUSH_IDLE, "idle"),
        (DREX_FLUSH_STAY, "stay"),
        (DREX_FLUSH_PROMPT, "prompt"),
    ] {
        assert_eq!(string(drex_flush_reason_name(number)), name);
    }
    for (number, name) in [
        (DREX_MISS_HOST, "host"),
        (DREX_MISS_QUEUE, "queue"),
        (DREX_MISS_HELD, "held"),
        (DREX_MISS_RUN, "run"),
    ] {
        assert_eq!(string(drex_miss_reason_name(number)), name);
    }
    assert!(drex_fill_name(DREX_FILL_DEFAULT).is_null());
    assert!(drex_decision_name(8).is_null());
    assert!(drex_flush_reason_name(7).is_null());
    assert!(drex_miss_reason_name(4).is_null());
    assert!(drex_policy_name(9).is_null());
    assert!(drex_metric_name(3).is_null());
    assert!(drex_metric_name(DREX_METRIC_DEFAULT).is_null());
    let mut out = 99;
    for wrong in [c"", c"Hold", c"holds", c"\xff"] {
        // SAFETY: valid pointers.
        let status = unsafe { drex_policy_from_name(wrong.as_ptr(), &mut out) };
        fails(
            ok(status),
            DREX_ERROR_INVALID_ARGUMENT,
            "drex_policy_from_name: name|hold, art, auto",
        );
    }
    // SAFETY: NULL is found.
    unsafe {
        let null_argument = DREX_ERROR_NULL_ARGUMENT;
        fails(
            ok(drex_policy_from_name(null(), &mut out)),
            null_argument,
            "name is NULL",
        );
        fails(
            ok(drex_metric_from_name(c"gap".as_ptr(), null_mut())),
            null_argument,
            "out",
        );
    }
    assert_eq!(out, 99);
}

#[test]
fn every_wrong_config_is_named() {
    type Change = fn(&mut drex_config);
    let invalid: &[(Change, &str)] = &[
        (|c| c.n_layers = 0, "n_layers is 0"),
        (|c| c.n_layers = 1, "n_layers is 1"),
        (|c| c.n_layers = u32::MAX, "n_layers is 4294967295"),
        (|c| c.n_layers = 8, "ramp_layers[1] is 8, but n_layers is 8"),
        (|c| c.n_ramps = 0, "n_ramps is 0; expected 1..16"),
        (|c| c.n_ramps = 17, "n_ramps is 17; expected 1..16"),
        (|c| c.ramp_layers = [0, 4].as_ptr(), "ramp_layers[0] is 0"),
        (
            |c| c.ramp_layers = [4, 4].as_ptr(),
            "ramp_layers[1] is 4|strictly increasing",
        ),
        (
            |c| c.ramp_layers = [5, 4].as_ptr(),
            "ramp_layers[1] is 4|strictly increasing",
        ),
        (|c| c.n_slots = 0, "n_slots is 0"),
        (|c| c.max_requests = 0, "max_requests is 0"),
        (|c| c.max_batch = 0, "max_batch is 0"),
        (|c| c.max_requests = u32::MAX, "max_requests is 4294967295"),
        (
            |c| c.max_requests = 8,
            "n_slots is 4, but max_requests is 8: every request may hold one row",
        ),
        (|c| c.policy = 9, "policy is 9"),
        (|c| c.metric = 3, "metric is 3"),
        (|c| c.metric = DREX_METRIC_DEFAULT, "metric is 4294967295"),
        (|c| c.fill = 4, "fill is 4"),
        (|c| c.fill = 1, "n_slots is 4|max_requests is 4|POSTFILL"),
        (
            |c| (c.fill, c.n_slots, c.max_batch) = (2, 8, 1),
            "max_batch is 1|VERIFY",
        ),
        (|c| c.device = 2, "device is 2"),
        (
            |c| c.threshold = f32::NAN,
            "threshold is NaN; expected a finite number >= 0",
        ),
        (|c| c.threshold = -0.1, "threshold is -0.1"),
        (|c| c.threshold = f32::INFINITY, "threshold is inf"),
        (
            |c| c.ramp_thresholds = [0.5, f32::NAN].as_ptr(),
            "ramp_thresholds[1] is NaN",
        ),
        (
            |c| c.ramp_thresholds = [-1.0, 0.5].as_ptr(),
            "ramp_thresholds[0] is -1",
        ),
        (|c| c.art_ratio = -0.5, "art_ratio is -0.5"),
        (|c| c.art_ratio = f32::INFINITY, "art_ratio is inf"),
        (|c| c.reserved = 7, "reserved is 7"),
    ];
    let others: &[(Change, drex_status, &str)] = &[
        (|c| c.size = 0, DREX_ERROR_STRUCT_SIZE, "config.size is 0"),
        (
            |c| c.abi_version = 2,
            DREX_ERROR_ABI_MISMATCH,
            "abi_version is 2",
        ),
        (
            |c| c.abi_version = 0,
            DREX_ERROR_ABI_MISMATCH,
            "abi_version is 0",
        ),
        (
            |c| c.ramp_layers = null(),
            DREX_ERROR_NULL_ARGUMENT,
            "ramp_layers is NULL",
        ),
        (|c| c.device = 1, DREX_ERROR_UNSUPPORTED, "device is 1|CUDA"),
    ];
    let invalid = invalid
        .iter()
        .map(|&(change, words)| (change, DREX_ERROR_INVALID_ARGUMENT, words));
    for (change, status, words) in invalid.chain(others.iter().copied()) {
        let mut c = config(&RAMPS, 4, 4, DREX_POLICY_HOLD);
        change(&mut c);
        let poison = std::ptr::without_provenance_mut(0x5555);
        let mut raw = poison;
        // SAFETY: the arrays have two elements.
        let status_got = unsafe { drex_create(&c, &mut raw) };
        fails(ok(status_got), status, &format!("drex_create: |{words}"));
        assert_eq!(raw, poison, "an output was written");
    }
    // What looks odd and is right.
    for change in [
        (|c| c.threshold = 2.0) as Change,
        |c| c.threshold = 0.0,
        |c| c.max_batch = 1000,
        |c| c.n_slots = 1000,
        |c| c.flush_rows = 1000,
        |c| c.art_ratio = 3.0,
        |c| c.ramp_thresholds = [0.5, 2.0].as_ptr(),
    ] {
        let mut c = config(&RAMPS, 4, 4, DREX_POLICY_HOLD);
        change(&mut c);
        drop(Engine::new(&c));
    }
}

/// A struct with bytes behind it.
#[repr(C)]
struct Longer<T> {
    inner: T,
    tail: [u8; 24],
}

#[test]
fn sizes_from_the_past_and_the_future() {
    let e = engine();
    let status = DREX_ERROR_STRUCT_SIZE;
    let longer = |size: usize| (size + 24) as u32;

    let mut c = Longer {
        inner: config(&RAMPS, 4, 4, DREX_POLICY_HOLD),
        tail: [0; 24],
    };
    let mut raw = null_mut();
    // SAFETY: `size` bytes are there, except where only the size is looked at.
    unsafe {
        for size in [0, 4, 119] {
            c.inner.size = size;
            fails(
                ok(drex_create(&c.inner, &mut raw)),
                status,
                "config.size is|at least",
            );
        }
        c.inner.size = longer(size_of::<drex_config>());
        ok(drex_create((&raw const c).cast(), &mut raw)).unwrap();
        ok(drex_destroy(raw)).unwrap();
        for i in [0, 23] {
            c.tail[i] = 1;
            let got = drex_create((&raw const c).cast(), &mut raw);
            fails(ok(got), status, "newer version|unknown here");
            c.tail[i] = 0;
        }
        c.inner.size = u32::MAX;
        fails(
            ok(drex_create((&raw const c).cast(), &mut raw)),
            status,
            "4294967295",
        );

        // An output of a newer program: the part that we know is written, the
        // size and the rest are not.
        let mut stats = Longer {
            inner: sized!(drex_stats),
            tail: [0xaa; 24],
        };
        stats.inner.size = longer(size_of::<drex_stats>());
        ok(drex_stats_get(e.raw, (&raw mut stats).cast())).unwrap();
        assert_eq!(stats.inner.size, longer(size_of::<drex_stats>()));
        assert_eq!(stats.inner.slots_free, 4);
        assert_eq!(stats.tail, [0xaa; 24]);

        stats.inner = sized!(drex_stats);
        // One less than the first version had.
        stats.inner.size = 1039;
        stats.inner.slots_free = 77;
        fails(
            ok(drex_stats_get(e.raw, &mut stats.inner)),
            status,
            "out.size",
        );
        assert_eq!(stats.inner.slots_free, 77);

        let mut request = sized!(drex_request_config);
        request.size = 55;
        fails(
            ok(drex_request_add(e.raw, &request)),
            status,
            "request.size is 55",
        );
        e.add(1).unwrap();
        e.ready(1, 0).unwrap();
        let mut info = sized!(drex_request_info);
        info.size = 4;
        fails(
            ok(drex_request_get(e.raw, 1, &mut info)),
            status,
            "out.size is 4",
        );

        // A plan that cannot be written must not happen.
        let mut row = std::mem::MaybeUninit::<drex_row>::uninit();
        let mut input = sized!(drex_plan_input);
        let mut step = sized!(drex_step);
        step.size = 8;
        let got = drex_plan(e.raw, &input, row.as_mut_ptr(), 1, &mut step);
        fails(ok(got), status, "drex_plan: out.size is 8");
        step.size = size_of::<drex_step>() as u32;
        input.size = 1;
        let got = drex_plan(e.raw, &input, row.as_mut_ptr(), 1, &mut step);
        fails(ok(got), status, "drex_plan: input.size is 1");
        assert_eq!(e.info(1).unwrap().state, DREX_REQUEST_READY);
    }

    // Arrays go by the first element's size.
    let mut store = [0u8; 12 * 4];
    let layers: Vec<Longer<drex_kv_layer>> = (0..12)
        .map(|i| {
            let mut l = sized!(drex_kv_layer);
            l.size = longer(size_of::<drex_kv_layer>());
            l.n_cells = 1;
            l.k = store[i * 4..].as_mut_ptr().cast();
            l.k_row_bytes = 4;
            l.k_cell_stride = 4;
            Longer {
                inner: l,
                tail: [0; 24],
            }
        })
        .collect();
    // SAFETY: twelve elements.
    ok(unsafe { drex_bind_kv(e.raw, layers.as_ptr().cast(), 12) }).unwrap();
}

#[test]
fn handles_that_are_none() {
    let mut raw = null_mut();
    let c = config(&RAMPS, 4, 4, DREX_POLICY_HOLD);
    let status = DREX_ERROR_INVALID_HANDLE;
    let mut stats = sized!(drex_stats);
    // SAFETY: stale handles are what is tested.
    unsafe {
        ok(drex_create(&c, &mut raw)).unwrap();
        ok(drex_destroy(raw)).unwrap();
        fails(
            ok(drex_destroy(raw)),
            status,
            "drex_destroy: engine is not a live handle",
        );
        fails(
            ok(drex_stats_get(raw, &mut stats)),
            status,
            "drex_stats_get",
        );
        fails(
            ok(drex_request_ready(raw, 1, 0, 0)),
            status,
            "drex_request_ready",
        );
        fails(ok(drex_fill(raw)), status, "drex_fill");
        // The place is used again; the old handle is still dead.
        for _ in 0..1000 {
            let e = Engine::new(&c);
            assert_ne!(e.raw, raw);
            assert_eq!(drex_stats_get(raw, &mut stats), status);
        }
        let garbage = [1usize, 0xfff8, &raw const stats as usize, usize::MAX];
        for g in garbage.map(std::ptr::without_provenance_mut) {
            fails(ok(drex_abandon(g)), status, "drex_abandon");
            fails(ok(drex_destroy(g)), status, "drex_destroy");
        }
    }
}

#[test]
fn two_threads_on_one_handle() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let e = engine();
    e.add(1).unwrap();
    let (served, busy) = (AtomicU64::new(0), AtomicU64::new(0));
    let addr = e.raw.addr();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let raw = std::ptr::without_provenance_mut(addr);
                for _ in 0..20_000 {
                    let mut info = sized!(drex_request_info);
                    // SAFETY: a handle; one thread at a time is let in.
                    match unsafe { drex_request_get(raw, 1, &mut info) } {
                        DREX_OK => served.fetch_add(1, Ordering::Relaxed),
                        DREX_ERROR_HANDLE_BUSY => busy.fetch_add(1, Ordering::Relaxed),
                        other => panic!("{other}"),
                    };
                }
            });
        }
    });
    assert!(served.into_inner() > 0);
    // And engines of their own never are in each other's way.
    std::thread::scope(|s| {
        for t in 0..4u64 {
            s.spawn(move || {
                let e = engine();
                for i in 0..500 {
                    e.add(t).unwrap();
                    e.ready(t, i).unwrap();
                    assert_eq!(e.plan(i, 4).unwrap().ids(), [t]);
                    e.ramp(&[0.9]).unwrap();
                    e.complete(i, 10).unwrap();
                    e.remove(t).unwrap();
                }
                assert_eq!(e.stats().tokens, 500);
            });
        }
    });
}

#[test]
fn requests_that_do_not_fit() {
    let e = engine();
    e.add(u64::MAX).unwrap();
    fails(
        e.add(u64::MAX),
        DREX_ERROR_DUPLICATE_REQUEST,
        "drex_request_add: |18446744073709551615",
    );
    for id in 0..3 {
        e.add(id).unwrap();
    }
    fails(e.add(9), DREX_ERROR_CAPACITY, "max_requests is 4");
    e.remove(0).unwrap();
    fails(
        e.remove(0),
        DREX_ERROR_UNKNOWN_REQUEST,
        "drex_request_remove: no request has id 0",
    );
    fails(e.ready(0, 0), DREX_ERROR_UNKNOWN_REQUEST, "id 0");
    fails(e.info(0), DREX_ERROR_UNKNOWN_REQUEST, "id 0");
    let invalid = DREX_ERROR_INVALID_ARGUMENT;
    let wrong = |set: fn(&mut drex_request_config)| e.add_with(0, set);
    fails(wrong(|c| c.metric = 3), invalid, "metric is 3");
    fails(wrong(|c| c.threshold = -1.0), invalid, "threshold is -1");
    fails(
        wrong(|c| c.threshold = f32::INFINITY),
        invalid,
        "threshold is inf",
    );
    fails(wrong(|c| c.fill = 9), invalid, "fill is 9");
    fails(wrong(|c| c.reserved = 1), invalid, "reserved is 1");
    fails(wrong(|c| c.fill = 1), invalid, "n_slots is 4");
    e.add(0).unwrap();
    e.ready(0, 0).unwrap();
    fails(e.ready(0, 0), DREX_ERROR_CALL_ORDER, "request 0 is ready");
    e.plan(0, 4).unwrap();
    fails(e.ready(0, 0), DREX_ERROR_CALL_ORDER, "request 0 is running");
    e.ramp(&[0.1]).unwrap();
    e.complete(0, 0).unwrap();
    fails(e.ready(0, 0), DREX_ERROR_CALL_ORDER, "request 0 is held");
}

#[test]
fn calls_out_of_order() {
    let e = engine();
    let order = DREX_ERROR_CALL_ORDER;
    fails(e.ramp(&[]), order, "drex_ramp: no step is planned");
    fails(e.complete(0, 0), order, "drex_complete: no step is planned");
    fails(e.abandon(), order, "drex_abandon: no step is planned");
    // Nothing to run is no step.
    assert_eq!(e.plan(0, 4).unwrap().step.n_rows, 0);
    fails(e.complete(0, 0), order, "no step");
    e.add(1).unwrap();
    e.ready(1, 0).unwrap();
    fails(
        e.plan(0, 0),
        DREX_ERROR_CAPACITY,
        "drex_plan: capacity is 0",
    );
    e.plan(0, 4).unwrap();
    fails(e.plan(0, 4), order, "drex_plan: a step is planned already");
    fails(e.complete(0, 0), order, "drex_ramp first");
    e.ramp(&[0.1]).unwrap();
    fails(e.ramp(&[0.1]), order, "has had its verdicts");
    e.complete(0, 0).unwrap();
    // The held row goes on, to the next ramp and to the end.
    for _ in 0..2 {
        let plan = e.plan(0, 4).unwrap();
        if plan.step.ramp == DREX_NO_RAMP {
            fails(e.ramp(&[0.1]), order, "last layer");
        } else {
            e.ramp(&[0.1]).unwrap();
        }
        e.complete(0, 0).unwrap();
    }
    assert_eq!(e.info(1).unwrap().tokens, 1);
}

/// A plan that is refused leaves the step that is planned as it was.
#[test]
fn a_refused_plan_changes_nothing() {
    let mut c = config(&RAMPS, 4, 4, DREX_POLICY_HOLD);
    c.n_top = 2;
    let e = Engine::new(&c);
    let mut k = [0u8; 12 * 4];
    let layers: Vec<drex_kv_layer> = (0..12)
        .map(|i| {
            let mut l = sized!(drex_kv_layer);
            (l.n_cells, l.k_row_bytes, l.k_cell_stride) = (1, 4, 4);
            l.k = k[i * 4..].as_mut_ptr().cast();
            l
        })
        .collect();
    // SAFETY: the tensors outlive the engine's use of them.
    ok(unsafe { drex_bind_kv(e.raw, layers.as_ptr(), 12) }).unwrap();
    e.add(1).unwrap();
    e.ready(1, 0).unwrap();
    e.plan(0, 4).unwrap();
    let row = row_of(0.9);
    let mut logits = sized!(drex_logits);
    logits.data = row.as_ptr().cast();
    (logits.row_stride_bytes, logits.n_rows) = (4 * VOCAB as u64, 1);
    (logits.n_vocab, logits.n_top) = (VOCAB as u32, 2);
    let mut verdict = std::mem::MaybeUninit::<drex_verdict>::uninit();
    // SAFETY: a row, a cell and a verdict.
    ok(unsafe { drex_ramp(e.raw, &logits, &0, verdict.as_mut_ptr(), 1) }).unwrap();
    e.fill().unwrap();
    assert_eq!(e.stats().cells_filled, 1);

    for capacity in [4, 0] {
        fails(
            e.plan(1, capacity),
            DREX_ERROR_CALL_ORDER,
            "drex_plan: a step is planned already",
        );
    }
    let mut top = [drex_top {
        logit: 0.0,
        token: -7,
    }; 2];
    let mut n = 9;
    // SAFETY: room for two.
    ok(unsafe { drex_top_get(e.raw, 0, top.as_mut_ptr(), 2, &mut n) }).unwrap();
    assert_eq!((n, top[0].token), (2, 3));
    // SAFETY: no room, and none asked for.
    ok(unsafe { drex_top_get(e.raw, 0, null_mut(), 0, &mut n) }).unwrap();
    assert_eq!(n, 0);
    e.fill().unwrap();
    assert_eq!(e.stats().cells_filled, 1, "filled twice");
    e.complete(2, 5).unwrap();
    // The step is over, and its lists with it.
    // SAFETY: room for two.
    let after = ok(unsafe { drex_top_get(e.raw, 0, top.as_mut_ptr(), 2, &mut n) });
    fails(
        after,
        DREX_ERROR_CALL_ORDER,
        "drex_top_get: no ramp has listed",
    );
}

fn text_of(call: impl Fn(*mut std::ffi::c_char, usize, *mut usize) -> drex_status) -> String {
    let mut n = 0;
    ok(call(null_mut(), 0, &mut n)).unwrap();
    let mut out = vec![0u8; n + 1];
    ok(call(out.as_mut_ptr().cast(), n + 1, &mut n)).unwrap();
    assert_eq!(out.pop(), Some(0));
    String::from_utf8(out).unwrap()
}

#[test]
fn profiles() {
    // SAFETY: handles, and as much room as is said.
    let save = |e: &Engine, text, capacity, length: *mut usize| unsafe {
        drex_profile_save(e.raw, text, capacity, length)
    };
    // SAFETY: a C string.
    let load = |e: &Engine, text: &str| unsafe {
        let text = std::ffi::CString::new(text).unwrap();
        ok(drex_profile_load(e.raw, text.as_ptr()))
    };
    let (from, to) = (engine(), engine());
    let mut n = 77;
    let nothing = ok(save(&from, null_mut(), 0, &mut n));
    fails(nothing, DREX_ERROR_CALL_ORDER, "no window has been timed");
    assert_eq!(n, 77);
    for rows in 1..20 {
        from.observe(0, 12, rows, 1_000_000 + 10_000 * u64::from(rows))
            .unwrap();
        from.observe(0, 4, rows, 400_000 + 3_000 * u64::from(rows))
            .unwrap();
    }
    let saved = text_of(|text, capacity, length| save(&from, text, capacity, length));
    let mut short = [1u8; 8];
    let cut = ok(save(&from, short.as_mut_ptr().cast(), 8, &mut n));
    fails(cut, DREX_ERROR_CAPACITY, "capacity is 8");
    assert_eq!(
        (n, short),
        (saved.len(), [1; 8]),
        "the length alone is written"
    );
    load(&to, &saved).unwrap();
    let mut out = vec![0u8; n + 1];
    ok(save(&to, out.as_mut_ptr().cast(), n + 1, &mut n)).unwrap();
    let read = |text: &str| drex::profile::from_json(text).unwrap();
    let (a, b) = (read(&saved), read(std::str::from_utf8(&out[..n]).unwrap()));
    assert_eq!(a.segments.len(), 3);
    for (a, b) in a.segments.iter().zip(&b.segments) {
        // They go through the model's own unit.
        let same = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a;
        assert!(a.ns > 0.0 && same(a.ns, b.ns) && same(a.ns_per_row, b.ns_per_row));
    }

    let invalid = DREX_ERROR_INVALID_ARGUMENT;
    fails(load(&to, "{"), invalid, "drex_profile_load: not JSON");
    let other = Engine::new(&config(&[4, 9], 4, 4, DREX_POLICY_HOLD));
    fails(
        load(&other, &saved),
        invalid,
        "n_layers is 12, but the engine's n_layers is 13",
    );
    assert_eq!(save(&other, null_mut(), 0, &mut n), DREX_ERROR_CALL_ORDER);
}

/// A duration of 0 is unknown, and no window of no time.
#[test]
fn windows_that_were_not_timed_are_not_in_the_histogram() {
    let e = engine();
    e.add(1).unwrap();
    for (i, duration) in [0, 3_000_000, 0].into_iter().enumerate() {
        e.ready(1, i as u64).unwrap();
        e.plan(i as u64, 4).unwrap();
        e.ramp(&[0.9]).unwrap();
        e.complete(i as u64, duration).unwrap();
    }
    // SAFETY: a handle, and as much room as is said.
    let metrics = text_of(|text, capacity, length| unsafe {
        drex::ffi::observe::drex_metrics_text(e.raw, null(), text, capacity, length)
    });
    for line in [
        "drex_window_seconds_count 1",
        "drex_window_seconds_sum 0.003",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{metrics}");
    }
    assert_eq!(e.stats().steps, 3);
}

#[test]
fn logits_that_do_not_fit() {
    let e = engine();
    for id in 0..2 {
        e.add(id).unwrap();
        e.ready(id, 0).unwrap();
    }
    e.plan(0, 4).unwrap();
    let data = [0f32; 16];
    let mut good = sized!(drex_logits);
    good.data = data.as_ptr().cast();
    good.n_rows = 2;
    good.n_vocab = 8;
    good.row_stride_bytes = 32;
    let mut verdicts = [const { std::mem::MaybeUninit::<drex_verdict>::uninit() }; 2];
    let mut ramp = |change: fn(&mut drex_logits), capacity: u32| {
        let mut l = good;
        change(&mut l);
        let v = verdicts.as_mut_ptr().cast();
        // SAFETY: room for two verdicts, and two rows.
        ok(unsafe { drex_ramp(e.raw, &l, null(), v, capacity) })
    };
    let invalid = DREX_ERROR_INVALID_ARGUMENT;
    fails(
        ramp(|l| l.n_rows = 1, 2),
        invalid,
        "logits.n_rows is 1|n_rows is 2",
    );
    fails(ramp(|l| l.n_rows = 3, 3), invalid, "logits.n_rows is 3");
    fails(ramp(|l| l.dtype = 3, 2), invalid, "logits.dtype is 3");
    fails(ramp(|l| l.n_vocab = 0, 2), invalid, "logits.n_vocab is 0");
    fails(
        ramp(|l| l.n_vocab = 1 << 31, 2),
        invalid,
        "logits.n_vocab is 2147483648",
    );
    fails(
        ramp(|l| l.row_stride_bytes = 31, 2),
        invalid,
        "logits.row_stride_bytes is 31",
    );
    fails(
        ramp(|l| l.row_stride_bytes = u64::MAX, 2),
        invalid,
        "row_stride_bytes",
    );
    fails(
        ramp(|_| {}, 1),
        DREX_ERROR_CAPACITY,
        "capacity is 1, but 2 needed",
    );
    assert!(e.info(0).unwrap().last_confidence.is_nan());
    ramp(|l| l.row_stride_bytes = 32, 2).unwrap();
    assert_eq!(e.info(0).unwrap().last_confidence, 0.125);
    e.complete(0, 0).unwrap();
}

/// A head over three tokens, the last of which stands for all that it has not.
#[test]
fn tokens_and_chances_of_a_head_over_some_tokens() {
    let ids = [40, 7, -1];
    let calibration = [
        drex_calibration {
            scale: 1.0,
            shift: 0.0,
        },
        drex_calibration {
            scale: 0.5,
            shift: 0.0,
        },
        drex_calibration {
            scale: 1.0,
            shift: 0.0,
        },
    ];
    let mut c = config(&[4, 8], 2, 2, DREX_POLICY_LATENCY);
    c.metric = DREX_METRIC_MAXPROB;
    c.threshold = 0.7;
    c.n_top = 3;
    let e = Engine::new(&c);
    for id in 0..2 {
        e.add(id).unwrap();
        e.ready(id, 0).unwrap();
    }
    e.plan(0, 2).unwrap();
    // Probabilities 0.8, 0.1, 0.1 with the best at token 7, and at none.
    let rows = [[0.1f32, 0.8, 0.1], [0.1, 0.1, 0.8]].map(|r| r.map(f32::ln));
    let mut l = sized!(drex_logits);
    l.data = rows.as_ptr().cast();
    l.row_stride_bytes = 12;
    l.n_rows = 2;
    l.n_vocab = 3;
    l.n_top = 2;
    l.token_ids = ids.as_ptr();
    l.calibration = calibration.as_ptr();
    let mut verdicts = [drex_verdict {
        decision: 9,
        token: 9,
        confidence: 9.0,
        forced: 9,
    }; 2];
    let mut bad = calibration;
    bad[2].scale = -1.0;
    l.calibration = bad.as_ptr();
    // SAFETY: valid pointers.
    let refused = ok(unsafe { drex_ramp(e.raw, &l, null(), verdicts.as_mut_ptr(), 2) });
    fails(
        refused,
        DREX_ERROR_INVALID_ARGUMENT,
        "logits.calibration[2].scale is -1",
    );
    l.calibration = calibration.as_ptr();
    // SAFETY: valid pointers.
    ok(unsafe { drex_ramp(e.raw, &l, null(), verdicts.as_mut_ptr(), 2) }).unwrap();
    // Odds of 4, and half of their logarithm: odds of 2, which is below the threshold.
    assert_eq!(verdicts[0].token, 7);
    assert!((verdicts[0].confidence - 2.0 / 3.0).abs() < 1e-6);
    assert_eq!(verdicts[0].decision, DREX_DECISION_STAY);
    assert_eq!(verdicts[1].token, -1);
    assert!(verdicts[1].confidence.is_nan());
    let mut top = [drex_top {
        logit: 0.0,
        token: 9,
    }; 2];
    let mut n = 0;
    // SAFETY: valid pointers.
    ok(unsafe { drex_top_get(e.raw, 0, top.as_mut_ptr(), 2, &mut n) }).unwrap();
    assert_eq!(top.map(|t| t.token), [7, 40]);
    e.complete(0, 0).unwrap();
}

#[test]
fn observations_and_completions_that_do_not_fit() {
    let e = engine();
    let invalid = DREX_ERROR_INVALID_ARGUMENT;
    fails(
        e.observe(0, 13, 1, 1),
        invalid,
        "layer_end is 13, but n_layers is 12",
    );
    fails(
        e.observe(4, 4, 1, 1),
        invalid,
        "layer_begin is 4, but layer_end is 4",
    );
    fails(e.observe(0, 4, 0, 1), invalid, "n_rows is 0");
    fails(e.observe(0, 4, 1, 0), invalid, "duration_ns is 0");
    e.observe(1, 3, 1, 1).unwrap();
    e.add(1).unwrap();
    e.ready(1, 0).unwrap();
    e.plan(0, 1).unwrap();
    e.ramp(&[0.9]).unwrap();
    let mut c = sized!(drex_completion);
    c.reserved = 1;
    // SAFETY: valid pointers.
    fails(
        ok(unsafe { drex_complete(e.raw, &c) }),
        invalid,
        "reserved is 1",
    );
    e.complete(0, 0).unwrap();
}

#[test]
fn a_success_leaves_the_text_alone() {
    let e = engine();
    fails(e.remove(7), DREX_ERROR_UNKNOWN_REQUEST, "id 7");
    e.add(7).unwrap();
    assert_eq!(text(), "drex_request_remove: no request has id 7");
}
