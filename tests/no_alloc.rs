// SPDX-License-Identifier: Apache-2.0

//! The decode path allocates nothing, and makes no system call: counted, and forbidden by the kernel, not assumed.

mod common;
#[path = "common/fake.rs"]
mod fake;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use common::*;

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn count() -> u64 {
    COUNT.with(Cell::get)
}

/// A process that is sealed where its counting begins, see [`sealed`].
static SEALED: AtomicBool = AtomicBool::new(false);

/// Counting begins. The kernel ends a process to be sealed at its first system call from here on, but for `read`, `write`
/// and `exit`: no memory is mapped, no lock is waited for, no time is slept.
fn begin() -> u64 {
    if SEALED.load(Ordering::Relaxed) {
        // SAFETY: takes no pointer.
        let status = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
        assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    }
    count()
}

/// Counting ends: how often the allocator was called. A sealed process ends here.
fn end(before: u64) -> u64 {
    let calls = count() - before;
    if SEALED.load(Ordering::Relaxed) {
        // SAFETY: ends the only thread of this process.
        unsafe { libc::syscall(libc::SYS_exit, i64::from(calls > 0)) };
    }
    calls
}

/// The wait status of a process that is sealed where `run` begins to count.
fn sealed(run: &dyn Fn()) -> i32 {
    let mut status = 0;
    // SAFETY: the child has one thread, and ends without what Rust and C have registered for the end.
    unsafe {
        match libc::fork() {
            0 => {
                SEALED.store(true, Ordering::Relaxed);
                run();
                libc::_exit(2);
            }
            child => assert_eq!(libc::waitpid(child, &mut status, 0), child),
        }
    }
    status
}

fn bump() {
    COUNT.with(|c| c.set(c.get() + 1));
}

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        bump();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        bump();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(p, layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        bump();
        // SAFETY: the caller's contract.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const N: usize = 24;
const LAYERS: usize = 12;
const CELLS: usize = 32;
const ROW: usize = 16;

/// Lines that were logged.
static HEARD: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" fn hear(_: *mut c_void, _: u32, _: *const c_char) {
    HEARD.fetch_add(1, Ordering::Relaxed);
}

/// The fake driver is one for all threads.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

/// A host's loop with all of its buffers made beforehand. Returns how often
/// the allocator was called.
fn serve(
    policy: drex_policy,
    fill: drex_fill_mode,
    cuda: bool,
    watched: bool,
    iterations: u64,
) -> u64 {
    let ramps = [4, 8];
    let mut config = config(&ramps, N as u32, 8, policy);
    config.max_hold_ns = 5000;
    config.fill = fill;
    config.n_slots = N as u32 + 16;
    config.token_deadline_ns = 20_000;
    config.max_pass_rows = 32;
    if cuda {
        config.device = DREX_DEVICE_CUDA;
        fake::context(1);
    }
    let engine = Engine::new(&config);
    let device: Vec<_> = (0..2 * LAYERS * usize::from(cuda))
        .map(|_| fake::Memory::new(CELLS * ROW))
        .collect();
    let mut k = vec![[0u8; CELLS * ROW]; LAYERS];
    let mut v = vec![[0u8; CELLS * ROW]; LAYERS];
    let layers: Vec<drex_kv_layer> = (0..LAYERS)
        .map(|i| {
            let mut l = sized!(drex_kv_layer);
            l.n_cells = CELLS as u32;
            l.k = k[i].as_mut_ptr().cast();
            l.v = v[i].as_mut_ptr().cast();
            if cuda {
                (l.k, l.v) = (device[2 * i].at.cast(), device[2 * i + 1].at.cast());
            }
            l.k_row_bytes = ROW as u64;
            l.k_cell_stride = ROW as u64;
            l.v_row_bytes = ROW as u64;
            l.v_elem_bytes = 2;
            l.v_elem_stride = 2 * CELLS as u64;
            l
        })
        .collect();
    // SAFETY: the tensors outlive the engine's use of them.
    ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), LAYERS as u32) }).unwrap();
    for id in 0..N as u64 {
        engine.add(id).unwrap();
    }

    if watched {
        // SAFETY: a handle; the callback takes no pointer.
        unsafe {
            ok(drex_trace_start(engine.raw, 1000)).unwrap();
            ok(drex_log_set(
                engine.raw,
                Some(hear),
                std::ptr::null_mut(),
                DREX_LOG_TRACE,
            ))
            .unwrap();
        }
    }

    let mut logits_data = vec![[0f32; VOCAB]; 8];
    let levels: Vec<[f32; VOCAB]> = [0.1, 0.4, 0.6, 0.9, f32::NAN].map(row_of).to_vec();
    let mut rows = Vec::with_capacity(8);
    let mut verdicts = Vec::with_capacity(8);
    let mut cells = [0u32; 8];
    let (mut now, mut idle_error) = (0u64, 0);
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut steps, mut carried) = (0, 0);

    let before = begin();
    for i in 0..iterations {
        now += 1000;
        let x = rng.u64(..);
        for id in 0..N as u64 {
            // Those that are not idle fail, which must not allocate either.
            // SAFETY: a handle.
            let status = unsafe { drex_request_ready(engine.raw, id, 5, now) };
            idle_error += u64::from(status == DREX_ERROR_CALL_ORDER);
        }
        let mut input = sized!(drex_plan_input);
        input.now_ns = now;
        // Prompts come and go, too.
        input.n_prompt_rows = if i % 7 < 3 { (x >> 40) as u32 % 50 } else { 0 };
        let mut step = sized!(drex_step);
        // SAFETY: room for 8 rows.
        let status = unsafe { drex_plan(engine.raw, &input, rows.as_mut_ptr(), 8, &mut step) };
        assert_eq!(status, DREX_OK);
        // SAFETY: written by the engine.
        unsafe { rows.set_len(step.n_rows as usize) };
        steps += 1;
        carried += u64::from(step.n_prompt_rows > 0 && step.layer_begin > 0);
        if i % 17 == 3 {
            // SAFETY: a handle.
            assert_eq!(unsafe { drex_abandon(engine.raw) }, DREX_OK);
            continue;
        }
        if step.ramp != DREX_NO_RAMP && (step.n_rows > 0 || i % 2 == 0) {
            for (j, row) in rows.iter().enumerate() {
                let row: &drex_row = row;
                let level = (x >> (8 + 3 * j)) as usize % 23;
                logits_data[j] = levels[if level == 22 { 4 } else { level % 4 }];
                cells[j] = row.request as u32;
            }
            let mut logits = sized!(drex_logits);
            logits.data = logits_data.as_ptr().cast();
            logits.row_stride_bytes = 4 * VOCAB as u64;
            logits.n_rows = step.n_rows;
            logits.n_vocab = VOCAB as u32;
            // SAFETY: room for 8 verdicts.
            let status = unsafe {
                drex_ramp(
                    engine.raw,
                    &logits,
                    cells.as_ptr(),
                    verdicts.as_mut_ptr(),
                    8,
                )
            };
            assert_eq!(status, DREX_OK);
            // SAFETY: a handle.
            assert_eq!(unsafe { drex_fill(engine.raw) }, DREX_OK);
        } else if step.ramp == DREX_NO_RAMP && step.n_rows > 0 {
            let agrees = [1, 0, 1, 1, 0, 1, 1, 1];
            let mut out = [0; 8];
            // SAFETY: at most 8 rows.
            let status = unsafe {
                drex_verify(
                    engine.raw,
                    agrees.as_ptr(),
                    step.n_rows,
                    out.as_mut_ptr(),
                    8,
                )
            };
            assert_eq!(status, DREX_OK);
        }
        let mut c = sized!(drex_completion);
        c.now_ns = now + 500;
        c.duration_ns = 100 + (x >> 50) % 100;
        // SAFETY: a handle.
        assert_eq!(unsafe { drex_complete(engine.raw, &c) }, DREX_OK);
        let mut stats = sized!(drex_stats);
        // SAFETY: a handle.
        assert_eq!(unsafe { drex_stats_get(engine.raw, &mut stats) }, DREX_OK);
        // Requests come and go too.
        let id = x % N as u64;
        let mut n = 0;
        // SAFETY: a handle; it fails where the request is not idle.
        unsafe { drex_request_settle(engine.raw, (id + 1) % N as u64, now + 600, &mut n) };
        if i % 5 == 0 {
            let mut c = sized!(drex_request_config);
            c.metric = DREX_METRIC_MAXPROB;
            c.id = id;
            c.threshold = f32::NAN;
            c.fill = DREX_FILL_DEFAULT;
            // SAFETY: a handle.
            unsafe {
                assert_eq!(drex_request_remove(engine.raw, id), DREX_OK);
                assert_eq!(drex_request_add(engine.raw, &c), DREX_OK);
            }
        }
    }
    let calls = end(before);
    if cuda {
        // The last fill, before its memory goes.
        fake::wait(std::ptr::null_mut());
    }
    // It did serve.
    let _: Vec<drex_verdict> = verdicts;
    assert!(steps > 0 && idle_error > 0);
    assert_eq!(carried > 0, policy != DREX_POLICY_OFF, "{carried}");
    let stats = engine.stats();
    assert!(stats.tokens > iterations / 4, "{policy} {fill} {stats:?}");
    if policy != DREX_POLICY_OFF {
        let copies = fill == DREX_FILL_COPY;
        assert_eq!(
            (stats.cells_filled > 0, stats.rows_filled > 0),
            (copies, !copies)
        );
        assert_eq!(stats.drafts > 0, fill == DREX_FILL_VERIFY);
    }
    calls
}

#[test]
fn the_decode_path_does_not_allocate() {
    for policy in DREX_POLICY_OFF..=DREX_POLICY_AUTO {
        for fill in DREX_FILL_COPY..=DREX_FILL_VERIFY {
            assert_eq!(
                serve(policy, fill, false, false, 1000),
                0,
                "policy {policy}, fill {fill}"
            );
        }
    }
}

#[test]
fn nor_does_it_under_a_log_and_a_trace() {
    for policy in [DREX_POLICY_HOLD, DREX_POLICY_AUTO] {
        for fill in DREX_FILL_COPY..=DREX_FILL_VERIFY {
            let before = HEARD.load(Ordering::Relaxed);
            assert_eq!(
                serve(policy, fill, false, true, 1000),
                0,
                "policy {policy}, fill {fill}"
            );
            assert!(HEARD.load(Ordering::Relaxed) - before > 3000);
        }
    }
}

#[test]
fn nor_does_it_on_a_cuda_device() {
    let _alone = alone();
    for fill in DREX_FILL_COPY..=DREX_FILL_VERIFY {
        assert_eq!(
            serve(DREX_POLICY_AUTO, fill, true, false, 200),
            0,
            "fill {fill}"
        );
    }
    assert_eq!(fake::errors(), "");
}

#[test]
fn nor_do_the_calls_beside_it() {
    calls_beside();
}

/// The other calls that chapter 3 of the header names.
fn calls_beside() {
    let ramps = [4];
    let mut c = config(&ramps, 4, 4, DREX_POLICY_AUTO);
    c.n_top = 4;
    let engine = Engine::new(&c);
    for id in 0..4 {
        engine.add(id).unwrap();
    }
    let mut arena_rows = [[7u8; 8]; 4];
    let mut dense_rows = [[0u8; 8]; 4];
    let mut arena = sized!(drex_arena);
    (arena.arena, arena.dense) = (
        arena_rows.as_mut_ptr().cast(),
        dense_rows.as_mut_ptr().cast(),
    );
    (
        arena.row_bytes,
        arena.arena_stride_bytes,
        arena.dense_stride_bytes,
    ) = (8, 8, 8);
    let data = [row_of(0.9), row_of(0.6), row_of(0.3), row_of(0.1)];
    let mut logits = sized!(drex_logits);
    logits.data = data.as_ptr().cast();
    logits.row_stride_bytes = 4 * VOCAB as u64;
    (logits.n_vocab, logits.n_top) = (VOCAB as u32, 4);
    let mut o = sized!(drex_observation);
    (o.n_rows, o.layer_end) = (4, 8);
    let probabilities = [0.25f32, 0.75];
    let pages = Pages::new(8, 4, 200).unwrap();
    let mut table = [DREX_NO_PAGE; 8 * 2];
    let mut forked = table;
    let mut copies = [drex_page_copy {
        from: 0,
        to: 0,
        first_cell: 0,
        n_cells: 0,
    }; 16];

    let before = begin();
    let (mut listed, mut copied) = (0, 0);
    for i in 0..500u64 {
        let now = 1000 * i;
        // SAFETY: handles, and as much room as is said.
        unsafe {
            for id in 0..4 {
                drex_request_ready(engine.raw, id, 1, now);
            }
            let mut input = sized!(drex_plan_input);
            input.now_ns = now;
            let mut step = sized!(drex_step);
            let mut rows = [drex_row {
                request: 0,
                slot: 0,
                back: 0,
            }; 4];
            assert_eq!(
                drex_plan(engine.raw, &input, rows.as_mut_ptr(), 4, &mut step),
                DREX_OK
            );
            assert_eq!(drex_gather(engine.raw, &arena), DREX_OK);
            assert_eq!(drex_scatter(engine.raw, &arena), DREX_OK);
            if step.ramp != DREX_NO_RAMP {
                logits.n_rows = step.n_rows;
                let mut verdicts = [const { std::mem::MaybeUninit::<drex_verdict>::uninit() }; 4];
                let v = verdicts.as_mut_ptr().cast();
                assert_eq!(
                    drex_ramp(engine.raw, &logits, std::ptr::null(), v, 4),
                    DREX_OK
                );
                let mut top = [drex_top {
                    logit: 0.0,
                    token: 0,
                }; 4];
                let mut n = 0;
                assert_eq!(
                    drex_top_get(engine.raw, 0, top.as_mut_ptr(), 4, &mut n),
                    DREX_OK
                );
                listed += n;
            }
            let mut info = sized!(drex_request_info);
            assert_eq!(drex_request_get(engine.raw, 1, &mut info), DREX_OK);
            o.duration_ns = 1000 + i;
            assert_eq!(drex_observe(engine.raw, &o), DREX_OK);
            let mut done = 0;
            assert_eq!(drex_replan(engine.raw, 500, &mut done), DREX_OK);
            let mut c = sized!(drex_completion);
            (c.now_ns, c.duration_ns) = (now + 500, 300);
            assert_eq!(drex_complete(engine.raw, &c), DREX_OK);

            let mut token = 0;
            let p = probabilities.as_ptr();
            assert_eq!(drex_speculate(p, p, 2, 1, 0.5, 0.5, &mut token), DREX_OK);

            let (pos, mut n) = (i % 8, 0);
            let (t, out) = (table.as_mut_ptr(), copies.as_mut_ptr());
            let raw = pages.raw();
            assert_eq!(
                drex_pages_write(raw, t, 2, pos, 0, 4, out, 16, &mut n),
                DREX_OK
            );
            copied += n;
            assert_eq!(drex_pages_exit(raw, t, 2, pos, 4, out, 16, &mut n), DREX_OK);
            copied += n;
            if pos == 2 {
                assert_eq!(drex_pages_fork(raw, t, 2, 0, 1), DREX_OK);
                forked = table;
            }
            if pos == 7 {
                let mut s = sized!(drex_pages_stats);
                assert_eq!(drex_pages_stats_get(raw, &mut s), DREX_OK);
                assert_eq!(
                    drex_pages_release(raw, forked.as_mut_ptr(), 2, 0, 1),
                    DREX_OK
                );
                assert_eq!(drex_pages_release(raw, t, 2, 0, 2), DREX_OK);
            }
        }
    }
    assert_eq!(end(before), 0);
    assert!(listed > 8 && copied > 100, "{listed} {copied}");
    assert!(engine.stats().tokens > 500);
    assert_eq!(pages.stats().pages_used, 8);
}

/// Rows to and from the arena, a ramp beside the host, and fills of a graph.
#[test]
fn nor_do_arenas_and_graphs() {
    const ROW_BYTES: usize = 32;
    let _alone = alone();
    let ramps = [4];
    let stream = std::ptr::without_provenance_mut::<c_void>(0x30);
    let graph = std::ptr::without_provenance_mut::<c_void>(0x31);
    let mut config = config(&ramps, N as u32, N as u32, DREX_POLICY_LATENCY);
    config.n_layers = LAYERS as u32;
    config.device = DREX_DEVICE_CUDA;
    fake::context(1);
    let engine = Engine::new(&config);
    let device: Vec<_> = (0..2 * LAYERS)
        .map(|_| fake::Memory::new(CELLS * ROW))
        .collect();
    let layers: Vec<drex_kv_layer> = (0..LAYERS)
        .map(|i| {
            let mut l = sized!(drex_kv_layer);
            l.n_cells = CELLS as u32;
            (l.k, l.v) = (device[2 * i].at.cast(), device[2 * i + 1].at.cast());
            (l.k_row_bytes, l.k_cell_stride) = (ROW as u64, ROW as u64);
            (l.v_row_bytes, l.v_cell_stride) = (ROW as u64, ROW as u64);
            l
        })
        .collect();
    let rows: Vec<u8> = [0.9, 0.1]
        .iter()
        .cycle()
        .take(N)
        .flat_map(|&c| row_of(c))
        .flat_map(f32::to_ne_bytes)
        .collect();
    let memory = fake::Memory::of(&rows);
    let (arena_memory, dense) = (
        fake::Memory::new(N * ROW_BYTES),
        fake::Memory::new(N * ROW_BYTES),
    );
    let mut arena = sized!(drex_arena);
    (arena.arena, arena.dense) = (arena_memory.at.cast(), dense.at.cast());
    arena.row_bytes = ROW_BYTES as u64;
    (arena.arena_stride_bytes, arena.dense_stride_bytes) = (ROW_BYTES as u64, ROW_BYTES as u64);
    arena.stream = stream;
    let mut logits = sized!(drex_logits);
    logits.data = memory.at.cast();
    logits.row_stride_bytes = 4 * VOCAB as u64;
    logits.n_rows = N as u32;
    logits.n_vocab = VOCAB as u32;
    logits.stream = stream;
    let mut planned: Vec<drex_row> = Vec::with_capacity(N);
    let mut verdicts: Vec<drex_verdict> = Vec::with_capacity(N);
    let cells: Vec<u32> = (0..N as u32).collect();
    let raw = engine.raw;
    let (mut calls, mut exits) = (0, 0);
    // SAFETY: valid pointers with room for N rows, here and below.
    unsafe {
        ok(drex_bind_kv(raw, layers.as_ptr(), LAYERS as u32)).unwrap();
        fake::capture(graph, true);
        ok(drex_fill_enqueue(raw, graph)).unwrap();
        fake::capture(graph, false);
    }
    for id in 0..N as u64 {
        engine.add(id).unwrap();
    }
    for now in (1..60u64).map(|i| i * 10) {
        let before = count();
        for id in 0..N as u64 {
            // SAFETY: a handle.
            assert_eq!(unsafe { drex_request_ready(raw, id, 5, now) }, DREX_OK);
        }
        let mut input = sized!(drex_plan_input);
        input.now_ns = now;
        let mut step = sized!(drex_step);
        let mut c = sized!(drex_completion);
        c.now_ns = now + 1;
        logits.enqueued = 0;
        // SAFETY: as above.
        let all = unsafe {
            [
                drex_plan(raw, &input, planned.as_mut_ptr(), N as u32, &mut step),
                drex_gather(raw, &arena),
                drex_scatter(raw, &arena),
                drex_ramp_enqueue(raw, &logits),
                drex_replan(raw, 0, std::ptr::null_mut()),
                {
                    logits.enqueued = 1;
                    drex_ramp(
                        raw,
                        &logits,
                        cells.as_ptr(),
                        verdicts.as_mut_ptr(),
                        N as u32,
                    )
                },
                drex_fill_plan(raw),
                drex_complete(raw, &c),
                drex_plan(raw, &input, planned.as_mut_ptr(), N as u32, &mut step),
                drex_complete(raw, &c),
            ]
        };
        calls += count() - before;
        assert_eq!(all, [DREX_OK; 10]);
        // SAFETY: one per row was written.
        unsafe { verdicts.set_len(N) };
        exits += verdicts
            .iter()
            .filter(|v| v.decision == DREX_DECISION_EXIT)
            .count();
        fake::launch(graph);
        fake::wait(graph);
    }
    assert_eq!(calls, 0);
    assert_eq!(exits, 59 * N / 2);
    assert!(engine.stats().cells_filled as usize == exits);
    fake::wait(stream);
    drop(engine);
    assert_eq!(fake::errors(), "");
}

#[test]
fn the_counter_counts() {
    let before = count();
    drop(std::hint::black_box(Box::new(5)));
    assert_eq!(count() - before, 2);
    let ramps = [4];
    let before = count();
    drop(Engine::new(&config(&ramps, 4, 4, DREX_POLICY_HOLD)));
    assert!(count() - before > 10);
}

#[test]
fn the_decode_path_makes_no_system_call() {
    for policy in DREX_POLICY_OFF..=DREX_POLICY_AUTO {
        for fill in DREX_FILL_COPY..=DREX_FILL_VERIFY {
            let status = sealed(&|| {
                serve(policy, fill, false, false, 1000);
            });
            assert_eq!(status, 0, "policy {policy}, fill {fill}");
        }
    }
    assert_eq!(sealed(&calls_beside), 0);
}

#[test]
fn a_sealed_process_ends_at_a_system_call() {
    let ask = || {
        // SAFETY: takes nothing.
        unsafe { libc::getppid() };
    };
    let map = || drop(std::hint::black_box(vec![1u8; 1 << 26]));
    for call in [&ask as &dyn Fn(), &map, &std::thread::yield_now] {
        let status = sealed(&|| {
            let before = begin();
            call();
            end(before);
        });
        assert!(libc::WIFSIGNALED(status), "{status}");
        assert_eq!(libc::WTERMSIG(status), libc::SIGKILL);
    }
    // An allocation that needs no system call is counted.
    let status = sealed(&|| {
        let before = begin();
        drop(std::hint::black_box(Box::new(1u8)));
        end(before);
    });
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1);
}
