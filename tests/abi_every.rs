// SPDX-License-Identifier: Apache-2.0

//! Every function of the header, called with NULL for each of its pointers, with
//! handles that are none, and with structs of no size. A function that is not in
//! the table fails the test.

mod common;
mod headers;

use std::ffi::{c_char, c_void};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::ptr::{null_mut, without_provenance_mut};

use common::*;
use drex::ffi::handle;

/// What is wrong with the call: the i-th pointer is NULL, or its struct's size is
/// too small or none at all.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    Null(usize),
    Size(usize, u32),
}

/// The argument at place `i`.
fn arg<T>(value: &mut T, i: usize, wrong: Wrong) -> *mut T {
    match wrong {
        Wrong::Null(at) if at == i => return null_mut(),
        Wrong::Size(at, size) if at == i => {
            // SAFETY: structs that are named as such begin with their size.
            unsafe { std::ptr::from_mut(value).cast::<u32>().write(size) };
        }
        _ => {}
    }
    value
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Engine,
    Pages,
    Neither,
}

struct Function {
    name: &'static str,
    kind: Kind,
    /// Pointers that may not be NULL, by their names in error texts.
    pointers: &'static [&'static str],
    /// The first so many of them are structs with a size.
    sized: usize,
    /// Of a call with nothing wrong, in the state of [`Fixture`].
    right: drex_status,
    call: fn(usize, Wrong) -> drex_status,
}

macro_rules! function {
    ($name:ident, $kind:ident, [$($pointer:literal),*], $sized:literal, $right:ident,
     |$h:ident, $w:ident| $body:block) => {
        Function {
            name: stringify!($name),
            kind: Kind::$kind,
            pointers: &[$($pointer),*],
            sized: $sized,
            right: $right,
            // SAFETY: what is not NULL on purpose has room for what is written.
            call: |$h, $w| unsafe { $body },
        }
    };
}

fn e(h: usize) -> *mut drex_engine {
    without_provenance_mut(h)
}

fn p(h: usize) -> *mut drex_pages {
    without_provenance_mut(h)
}

const LAYERS: usize = 12;
const BLOCKS: u32 = 2;

fn table() -> [u32; LAYERS * BLOCKS as usize] {
    [DREX_NO_PAGE; LAYERS * BLOCKS as usize]
}

const NO_COPY: drex_page_copy = drex_page_copy {
    from: 0,
    to: 0,
    first_cell: 0,
    n_cells: 0,
};

const NO_ROW: drex_row = drex_row {
    request: 0,
    slot: 0,
    back: 0,
};

fn some_logits(data: &[f32; 4]) -> drex_logits {
    let mut l = sized!(drex_logits);
    l.data = data.as_ptr().cast();
    (l.row_stride_bytes, l.n_rows, l.n_vocab) = (16, 1, 4);
    l
}

unsafe extern "C" fn drop_text(_: *mut c_void, _: *const c_char, _: usize) {}

/// A copy between rows that overlap nowhere; no step is planned.
unsafe fn rows_between(
    copy: unsafe extern "C" fn(*mut drex_engine, *const drex_arena) -> drex_status,
    h: usize,
    w: Wrong,
) -> drex_status {
    let mut rows = [0u8; 16];
    let mut a = sized!(drex_arena);
    a.arena = arg(&mut rows[0], 1, w).cast();
    a.dense = arg(&mut rows[8], 2, w).cast();
    (a.row_bytes, a.arena_stride_bytes, a.dense_stride_bytes) = (8, 8, 8);
    // SAFETY: the caller's contract.
    unsafe { copy(e(h), arg(&mut a, 0, w)) }
}

#[rustfmt::skip]
fn functions() -> Vec<Function> { vec![
    function!(drex_policy_from_name, Neither, ["name", "out"], 0, DREX_OK, |_h, w| {
        let (mut name, mut out) = (*b"hold\0", 0);
        drex_policy_from_name(arg(&mut name, 0, w).cast(), arg(&mut out, 1, w))
    }),
    function!(drex_metric_from_name, Neither, ["name", "out"], 0, DREX_OK, |_h, w| {
        let (mut name, mut out) = (*b"gap\0", 0);
        drex_metric_from_name(arg(&mut name, 0, w).cast(), arg(&mut out, 1, w))
    }),
    function!(drex_fill_from_name, Neither, ["name", "out"], 0, DREX_OK, |_h, w| {
        let (mut name, mut out) = (*b"copy\0", 0);
        drex_fill_from_name(arg(&mut name, 0, w).cast(), arg(&mut out, 1, w))
    }),
    function!(drex_create, Neither, ["config", "out"], 1, DREX_OK, |_h, w| {
        let ramps = [4];
        let (mut c, mut out) = (config(&ramps, 2, 2, DREX_POLICY_HOLD), null_mut());
        let status = drex_create(arg(&mut c, 0, w), arg(&mut out, 1, w));
        assert_eq!(out.is_null(), status != DREX_OK);
        drex_destroy(out);
        status
    }),
    function!(drex_destroy, Engine, [], 0, DREX_OK, |h, _w| { drex_destroy(e(h)) }),
    function!(drex_bind_kv, Engine, ["layers"], 1, DREX_OK, |h, w| {
        let mut l = sized!(drex_kv_layer);
        l.n_cells = 1;
        let mut layers = [l; LAYERS];
        if let Wrong::Size(0, size) = w { layers[0].size = size; }
        drex_bind_kv(e(h), arg(&mut layers, 0, w).cast(), LAYERS as u32)
    }),
    function!(drex_request_add, Engine, ["request"], 1, DREX_OK, |h, w| {
        let mut c = sized!(drex_request_config);
        (c.id, c.metric, c.fill, c.threshold) = (7, DREX_METRIC_DEFAULT, DREX_FILL_DEFAULT, f32::NAN);
        drex_request_add(e(h), arg(&mut c, 0, w))
    }),
    function!(drex_request_ready, Engine, [], 0, DREX_OK, |h, _w| { drex_request_ready(e(h), 2, 0, 0) }),
    function!(drex_request_remove, Engine, [], 0, DREX_OK, |h, _w| { drex_request_remove(e(h), 2) }),
    function!(drex_request_get, Engine, ["out"], 1, DREX_OK, |h, w| {
        let mut info = sized!(drex_request_info);
        drex_request_get(e(h), 2, arg(&mut info, 0, w))
    }),
    function!(drex_request_settle, Engine, [], 0, DREX_OK, |h, _w| {
        drex_request_settle(e(h), 2, 0, null_mut())
    }),
    // Request 2 has no target.
    function!(drex_request_audit, Engine, [], 0, DREX_ERROR_CALL_ORDER, |h, _w| {
        drex_request_audit(e(h), 2, 1, 0)
    }),
    function!(drex_plan, Engine, ["input", "out", "rows"], 2, DREX_OK, |h, w| {
        let (mut input, mut step) = (sized!(drex_plan_input), sized!(drex_step));
        let mut rows = [NO_ROW; 4];
        drex_plan(e(h), arg(&mut input, 0, w), arg(&mut rows, 2, w).cast(), 4, arg(&mut step, 1, w))
    }),
    function!(drex_ramp, Engine, ["logits", "verdicts"], 1, DREX_ERROR_CALL_ORDER, |h, w| {
        let data = [0.0; 4];
        let mut l = some_logits(&data);
        let mut out = [sized_verdict(); 4];
        drex_ramp(e(h), arg(&mut l, 0, w), null_mut(), arg(&mut out, 1, w).cast(), 4)
    }),
    function!(drex_ramp_enqueue, Engine, ["logits", "logits.data"], 1, DREX_ERROR_UNSUPPORTED, |h, w| {
        let mut data = [0.0; 4];
        let mut l = some_logits(&data);
        l.data = arg(&mut data, 1, w).cast();
        drex_ramp_enqueue(e(h), arg(&mut l, 0, w))
    }),
    function!(drex_top_get, Engine, ["top", "n"], 0, DREX_ERROR_CALL_ORDER, |h, w| {
        let (mut top, mut n) = ([drex_top { logit: 0.0, token: 0 }; 4], 0);
        drex_top_get(e(h), 0, arg(&mut top, 0, w).cast(), 4, arg(&mut n, 1, w))
    }),
    function!(drex_gather, Engine, ["arena", "arena.arena", "arena.dense"], 1, DREX_ERROR_CALL_ORDER, |h, w| {
        rows_between(drex_gather, h, w)
    }),
    function!(drex_scatter, Engine, ["arena", "arena.arena", "arena.dense"], 1, DREX_ERROR_CALL_ORDER, |h, w| {
        rows_between(drex_scatter, h, w)
    }),
    function!(drex_fill, Engine, [], 0, DREX_ERROR_CALL_ORDER, |h, _w| { drex_fill(e(h)) }),
    function!(drex_fill_enqueue, Engine, [], 0, DREX_ERROR_CALL_ORDER, |h, _w| {
        drex_fill_enqueue(e(h), null_mut())
    }),
    function!(drex_fill_plan, Engine, [], 0, DREX_ERROR_CALL_ORDER, |h, _w| { drex_fill_plan(e(h)) }),
    function!(drex_verify, Engine, ["agrees", "decisions"], 0, DREX_ERROR_CALL_ORDER, |h, w| {
        let (mut agrees, mut out) = ([1u8; 4], [0; 4]);
        drex_verify(e(h), arg(&mut agrees, 0, w).cast(), 4, arg(&mut out, 1, w).cast(), 4)
    }),
    function!(drex_speculate, Neither, ["deep", "token"], 0, DREX_OK, |_h, w| {
        let (mut deep, mut token) = ([0.5f32; 2], 0);
        drex_speculate(arg(&mut deep, 0, w).cast(), null_mut(), 2, 0, 0.5, 0.5, arg(&mut token, 1, w))
    }),
    function!(drex_complete, Engine, ["completion"], 1, DREX_ERROR_CALL_ORDER, |h, w| {
        drex_complete(e(h), arg(&mut sized!(drex_completion), 0, w))
    }),
    function!(drex_abandon, Engine, [], 0, DREX_ERROR_CALL_ORDER, |h, _w| { drex_abandon(e(h)) }),
    function!(drex_observe, Engine, ["observation"], 1, DREX_OK, |h, w| {
        let mut o = sized!(drex_observation);
        (o.n_rows, o.layer_end, o.duration_ns) = (1, 4, 5);
        drex_observe(e(h), arg(&mut o, 0, w))
    }),
    function!(drex_replan, Engine, [], 0, DREX_OK, |h, _w| { drex_replan(e(h), 1, null_mut()) }),
    function!(drex_profile_save, Engine, ["text", "length"], 0, DREX_OK, |h, w| {
        let (mut text, mut n) = ([0u8; 4096], 0);
        drex_profile_save(e(h), arg(&mut text, 0, w).cast(), 4096, arg(&mut n, 1, w))
    }),
    function!(drex_profile_load, Engine, ["text"], 0, DREX_ERROR_INVALID_ARGUMENT, |h, w| {
        let mut text = *b"{}\0";
        drex_profile_load(e(h), arg(&mut text, 0, w).cast())
    }),
    function!(drex_stats_get, Engine, ["out"], 1, DREX_OK, |h, w| {
        drex_stats_get(e(h), arg(&mut sized!(drex_stats), 0, w))
    }),
    function!(drex_log_set, Engine, [], 0, DREX_OK, |h, _w| {
        drex_log_set(e(h), None, null_mut(), DREX_LOG_TRACE)
    }),
    function!(drex_snapshot, Engine, ["text", "length"], 0, DREX_OK, |h, w| {
        let (mut text, mut n) = ([0u8; 16384], 0);
        drex_snapshot(e(h), arg(&mut text, 0, w).cast(), 16384, arg(&mut n, 1, w))
    }),
    function!(drex_metrics_text, Engine, ["text", "length"], 0, DREX_OK, |h, w| {
        let (mut text, mut n) = ([0u8; 32768], 0);
        drex_metrics_text(e(h), null_mut(), arg(&mut text, 0, w).cast(), 32768, arg(&mut n, 1, w))
    }),
    function!(drex_trace_start, Engine, [], 0, DREX_OK, |h, _w| { drex_trace_start(e(h), 10) }),
    function!(drex_trace_write, Engine, ["sink"], 0, DREX_ERROR_CALL_ORDER, |h, w| {
        let sink: drex_trace_sink = Some(drop_text);
        drex_trace_write(e(h), sink.filter(|_| w == Wrong::Nothing), null_mut())
    }),
    function!(drex_trace_stop, Engine, [], 0, DREX_OK, |h, _w| { drex_trace_stop(e(h)) }),
    function!(drex_pages_create, Neither, ["config", "out"], 1, DREX_OK, |_h, w| {
        let (mut c, mut out) = (sized!(drex_pages_config), null_mut());
        (c.n_layers, c.page_tokens, c.n_pages) = (2, 2, 2);
        let status = drex_pages_create(arg(&mut c, 0, w), arg(&mut out, 1, w));
        assert_eq!(out.is_null(), status != DREX_OK);
        drex_pages_destroy(out);
        status
    }),
    function!(drex_pages_destroy, Pages, [], 0, DREX_OK, |h, _w| { drex_pages_destroy(p(h)) }),
    function!(drex_pages_write, Pages, ["table", "copies", "n_copies"], 0, DREX_OK, |h, w| {
        let (mut t, mut copies, mut n) = (table(), [NO_COPY; 24], 0);
        drex_pages_write(p(h), arg(&mut t, 0, w).cast(), BLOCKS, 0, 0, 4, arg(&mut copies, 1, w).cast(), 24, arg(&mut n, 2, w))
    }),
    function!(drex_pages_exit, Pages, ["table", "copies", "n_copies"], 0, DREX_ERROR_INVALID_ARGUMENT, |h, w| {
        let (mut t, mut copies, mut n) = (table(), [NO_COPY; 24], 0);
        drex_pages_exit(p(h), arg(&mut t, 0, w).cast(), BLOCKS, 0, 4, arg(&mut copies, 1, w).cast(), 24, arg(&mut n, 2, w))
    }),
    function!(drex_pages_fork, Pages, ["table"], 0, DREX_OK, |h, w| {
        drex_pages_fork(p(h), arg(&mut table(), 0, w).cast(), BLOCKS, 0, 1)
    }),
    function!(drex_pages_release, Pages, ["table"], 0, DREX_OK, |h, w| {
        drex_pages_release(p(h), arg(&mut table(), 0, w).cast(), BLOCKS, 0, 1)
    }),
    function!(drex_pages_stats_get, Pages, ["out"], 1, DREX_OK, |h, w| {
        drex_pages_stats_get(p(h), arg(&mut sized!(drex_pages_stats), 0, w))
    }),
] }

fn sized_verdict() -> drex_verdict {
    drex_verdict {
        decision: 0,
        token: 0,
        confidence: 0.0,
        forced: 0,
    }
}

/// One of each kind: an engine that has timed something, with requests 1 (ready)
/// and 2 (idle), and a pool.
struct Fixture {
    engine: Engine,
    pages: Pages,
}

impl Fixture {
    fn new() -> Self {
        let ramps = [4, 8];
        let mut c = config(&ramps, 4, 4, DREX_POLICY_HOLD);
        c.n_top = 2;
        let engine = Engine::new(&c);
        engine.add(1).unwrap();
        engine.ready(1, 0).unwrap();
        engine.add(2).unwrap();
        engine.observe(0, 12, 1, 1000).unwrap();
        let pages = Pages::new(LAYERS as u32, 4, 100).unwrap();
        Fixture { engine, pages }
    }

    fn handle(&self, kind: Kind) -> usize {
        match kind {
            Kind::Engine => self.engine.raw.addr(),
            Kind::Pages => self.pages.raw().addr(),
            Kind::Neither => 0,
        }
    }
}

fn fails(f: &Function, status: drex_status, expect: drex_status, words: &str) {
    assert_eq!(status, expect, "{}: {}", f.name, text());
    let all = format!("{}: {words}", f.name);
    assert!(text().starts_with(&all), "no '{all}' in: {}", text());
}

#[test]
fn the_table_has_every_function() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/drex.h");
    let header = std::fs::read_to_string(header).unwrap();
    let header = headers::Header::parse(&header);
    // They return no status; tests/abi.rs calls them.
    let others = ["version", "abi_version", "status_name", "status_text"];
    let others = others
        .iter()
        .chain(&["last_error", "policy_name", "metric_name", "fill_name"])
        .chain(&["decision_name", "flush_reason_name", "miss_reason_name"]);
    let mut known: Vec<String> = others.map(|n| format!("drex_{n}")).collect();
    known.extend(functions().iter().map(|f| f.name.to_owned()));
    known.sort_unstable();
    let mut declared: Vec<&str> = header.functions().collect();
    declared.sort_unstable();
    assert_eq!(known, declared);
}

#[test]
fn every_pointer_as_null_and_every_size_that_is_none() {
    for f in functions() {
        let x = Fixture::new();
        let h = x.handle(f.kind);
        for (i, name) in f.pointers.iter().enumerate() {
            let status = (f.call)(h, Wrong::Null(i));
            let words = format!("{name} is NULL");
            fails(&f, status, DREX_ERROR_NULL_ARGUMENT, &words);
        }
        for (i, name) in f.pointers.iter().enumerate().take(f.sized) {
            for size in [0, 8, 4097, u32::MAX] {
                let status = (f.call)(h, Wrong::Size(i, size));
                let index = if f.name == "drex_bind_kv" { "[0]" } else { "" };
                let words = format!("{name}{index}.size is {size}; expected at");
                fails(&f, status, DREX_ERROR_STRUCT_SIZE, &words);
            }
        }
        // None of these changed anything, so a right one still does what it does.
        let status = (f.call)(h, Wrong::Nothing);
        assert_eq!(status, f.right, "{}: {}", f.name, text());
    }
}

#[test]
fn every_handle_that_is_none() {
    let stale = Fixture::new();
    let (engine, pages) = (stale.handle(Kind::Engine), stale.handle(Kind::Pages));
    drop(stale);
    for f in functions().iter().filter(|f| f.kind != Kind::Neither) {
        let x = Fixture::new();
        let (name, wrong) = match f.kind {
            Kind::Engine => ("engine", [engine, x.handle(Kind::Pages)]),
            _ => ("pages", [pages, x.handle(Kind::Engine)]),
        };
        let garbage = [1, 8, 0xffff_ffff, usize::MAX, &raw const x as usize];
        for h in wrong.into_iter().chain(garbage) {
            let status = (f.call)(h, Wrong::Nothing);
            let words = format!("{name} is not a live handle");
            fails(f, status, DREX_ERROR_INVALID_HANDLE, &words);
        }
        let status = (f.call)(0, Wrong::Nothing);
        match f.name {
            "drex_destroy" | "drex_pages_destroy" => assert_eq!(status, DREX_OK),
            _ => fails(
                f,
                status,
                DREX_ERROR_NULL_ARGUMENT,
                &format!("{name} is NULL"),
            ),
        }
    }
}

#[test]
fn every_function_while_another_is_inside_and_after_a_panic() {
    panic::set_hook(Box::new(|_| {}));
    for f in functions().iter().filter(|f| f.kind != Kind::Neither) {
        let x = Fixture::new();
        let h = x.handle(f.kind);
        // Inside, as a call is, and then a panic.
        let body = || {
            let status = (f.call)(h, Wrong::Nothing);
            panic::panic_any((status, text()));
        };
        let inside = || match f.kind {
            Kind::Engine => drop(handle::ENGINES.visit(e(h), |_| body())),
            _ => drop(handle::PAGES.visit(p(h), |_| body())),
        };
        let seen = panic::catch_unwind(AssertUnwindSafe(inside)).unwrap_err();
        let (status, said) = *seen.downcast::<(drex_status, String)>().unwrap();
        assert_eq!(status, DREX_ERROR_HANDLE_BUSY, "{}: {said}", f.name);
        assert!(said.contains("another thread is inside"), "{said}");
        let status = (f.call)(h, Wrong::Nothing);
        match f.name {
            "drex_destroy" | "drex_pages_destroy" => assert_eq!(status, DREX_OK),
            _ => {
                assert_eq!(status, DREX_ERROR_PANIC, "{}", f.name);
                assert!(text().contains("expected its destruction"), "{}", text());
            }
        }
    }
    let _ = panic::take_hook();
}
