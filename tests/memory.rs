// SPDX-License-Identifier: Apache-2.0

//! Memory that grows with a configuration may be refused: the call then
//! fails, and the host goes on.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::null_mut;

use common::*;
use drex::ffi::observe::drex_trace_start;

/// Refuses the calling thread's large requests from one on.
struct Refusing;

/// Smaller ones do not grow with a configuration, and are given.
const LARGE: usize = 32 << 10;

thread_local! {
    /// Large requests that are granted before one is refused.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static LIVE: Cell<i64> = const { Cell::new(0) };
}

impl Refusing {
    fn grants(&self, size: usize) -> bool {
        if size < LARGE {
            return true;
        }
        let left = LEFT.get();
        LEFT.set(left.saturating_sub(1));
        left > 0
    }
}

// SAFETY: hands on to the system's allocator what it grants.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !self.grants(layout.size()) {
            return null_mut();
        }
        LIVE.set(LIVE.get() + layout.size() as i64);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get() - layout.size() as i64);
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// Lets 0, 1, 2 ... large requests of the call pass until it succeeds, and
/// returns how many it needs. Whatever it failed with must be all gone.
fn starve<T>(call: impl Fn() -> Result<T, Failed>) -> u64 {
    // A first one makes what is made once.
    drop(call().map_err(|_| text()).unwrap());
    let before = LIVE.get();
    for granted in 0.. {
        LEFT.set(granted);
        let got = call();
        LEFT.set(u64::MAX);
        match got {
            Ok(made) => {
                drop(made);
                assert_eq!(LIVE.get(), before);
                return granted;
            }
            Err(Failed(status)) => assert_eq!(status, DREX_ERROR_MEMORY, "{}", text()),
        }
        assert!(
            text().ends_with("bytes of memory were refused"),
            "{}",
            text()
        );
        assert_eq!(LIVE.get(), before, "something leaks");
    }
    unreachable!()
}

#[test]
fn an_engine_that_does_not_fit_is_refused() {
    let ramps = [4, 8];
    let mut c = config(&ramps, 20_000, 20_000, DREX_POLICY_AUTO);
    c.n_slots = 40_000;
    c.n_top = 4;
    let needed = starve(|| Engine::try_new(&c));
    // The arena's slots, the queues, the requests, the rows of a step.
    assert!(needed > 12, "{needed}");
}

/// A row is in one queue at a time, so more ramps need hardly more memory.
#[test]
fn queues_of_more_ramps_share_their_memory() {
    let all: Vec<u32> = (1..=16).map(|r| 4 * r).collect();
    let needs = |ramps: &[u32]| {
        let before = LIVE.get();
        let c = config(ramps, 100_000, 256, DREX_POLICY_HOLD);
        let engine = Engine::new(&c);
        let live = LIVE.get() - before;
        drop(engine);
        live
    };
    let (one, sixteen) = (needs(&all[..1]), needs(&all));
    assert!(sixteen - one < 1 << 20, "{one} bytes, {sixteen}");
}

#[test]
fn so_are_pages_bound_layers_and_traces() {
    assert_eq!(starve(|| Pages::new(10_000, 16, 100_000)), 5);

    let mut c = config(&[4], 4, 4, DREX_POLICY_HOLD);
    c.n_layers = 4000;
    let engine = Engine::new(&c);
    let layers: Vec<drex_kv_layer> = (0..c.n_layers)
        .map(|_| {
            let mut l = sized!(drex_kv_layer);
            l.n_cells = 1;
            l
        })
        .collect();
    // SAFETY: as many layers; they have no rows.
    let bind = || ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), c.n_layers) });
    assert!(starve(bind) >= 1);

    // SAFETY: a handle.
    let trace = |n| ok(unsafe { drex_trace_start(engine.raw, n) });
    trace(1000).unwrap();
    LEFT.set(0);
    let got = trace(100_000);
    LEFT.set(u64::MAX);
    assert_eq!(got, Err(Failed(DREX_ERROR_MEMORY)));
    assert_eq!(
        text(),
        "drex_trace_start: 6400000 bytes of memory were refused"
    );
    trace(100_000).unwrap();
}
