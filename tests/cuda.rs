// SPDX-License-Identifier: Apache-2.0

//! The CUDA device behind the C ABI, on a driver without a device: the same
//! decisions and the same bytes as on the host, whatever the driver refuses.

mod common;
#[path = "common/fake.rs"]
mod fake;
#[path = "common/rows.rs"]
mod rows;

use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use common::*;
use drex::device::Dtype;

const CONTEXT: usize = 0x1000;
const STREAM: *mut c_void = ptr::without_provenance_mut(0x77);

/// The fake is one for all threads, and its work is done one at a time.
struct Alone {
    _lock: MutexGuard<'static, ()>,
}

fn alone() -> Alone {
    static LOCK: Mutex<()> = Mutex::new(());
    let _lock = LOCK.lock().unwrap_or_else(|e| e.into_inner());
    fake::context(CONTEXT);
    fake::fail_at(-1);
    Alone { _lock }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(fake::errors(), "");
            assert_eq!(fake::alive(), 0, "handles are left in the driver");
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: u32,
    n_vocab: usize,
    dtype: Dtype,
    k_row: usize,
    v_row: usize,
    v_elem: usize,
    metric: drex_metric,
    n_top: u32,
}

const N_LAYERS: usize = 6;
const RAMP: u32 = 2;

/// One engine and the host's memory, on either device.
struct World {
    engine: Engine,
    shape: Shape,
    cuda: bool,
    cells: usize,
    memory: Vec<[Bytes; 2]>,
}

/// The host's memory or the device's.
enum Bytes {
    Host(Vec<u128>),
    Cuda(fake::Memory),
}

impl Bytes {
    fn new(cuda: bool, bytes: &[u8]) -> Bytes {
        if cuda {
            return Bytes::Cuda(fake::Memory::of(bytes));
        }
        let mut v = vec![0u128; bytes.len().div_ceil(16)];
        // SAFETY: as long.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), v.as_mut_ptr().cast(), bytes.len()) };
        Bytes::Host(v)
    }

    fn at(&mut self) -> *mut c_void {
        match self {
            Bytes::Host(v) => v.as_mut_ptr().cast(),
            Bytes::Cuda(m) => m.at.cast(),
        }
    }

    fn read(&self, n: usize) -> Vec<u8> {
        match self {
            Bytes::Host(v) => v.iter().flat_map(|x| x.to_ne_bytes()).take(n).collect(),
            Bytes::Cuda(m) => m.read()[..n].to_vec(),
        }
    }
}

fn pattern(n: usize, seed: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    fastrand::Rng::with_seed(seed as u64).fill(&mut bytes);
    bytes
}

/// Rows of `row` bytes, without gaps.
fn arena_of(arena: &mut Bytes, dense: &mut Bytes, row: usize, stream: *mut c_void) -> drex_arena {
    let mut a = sized!(drex_arena);
    (a.arena, a.dense) = (arena.at(), dense.at());
    a.row_bytes = row as u64;
    (a.arena_stride_bytes, a.dense_stride_bytes) = (row as u64, row as u64);
    a.stream = stream;
    a
}

fn config_of(shape: Shape, cuda: bool, ramps: &[u32; 1]) -> drex_config {
    let mut c = config(ramps, shape.rows, shape.rows, DREX_POLICY_LATENCY);
    c.n_layers = N_LAYERS as u32;
    c.metric = shape.metric;
    c.n_top = shape.n_top;
    c.device = if cuda {
        DREX_DEVICE_CUDA
    } else {
        DREX_DEVICE_HOST
    };
    c
}

impl World {
    fn new(shape: Shape, cuda: bool) -> Result<World, Failed> {
        let ramps = [RAMP];
        let engine = Engine::try_new(&config_of(shape, cuda, &ramps))?;
        let cells = shape.rows as usize + 5;
        let bytes = [cells * shape.k_row, cells * shape.v_row];
        let memory = (0..N_LAYERS)
            .map(|l| [0, 1].map(|s| Bytes::new(cuda, &pattern(bytes[s], 2 * l + s))))
            .collect();
        let mut world = World {
            engine,
            shape,
            cuda,
            cells,
            memory,
        };
        world.bind()?;
        for id in 0..shape.rows {
            world.engine.add(id.into())?;
        }
        Ok(world)
    }

    fn bind(&mut self) -> Result<(), Failed> {
        let (s, cells) = (self.shape, self.cells);
        let layers: Vec<drex_kv_layer> = self
            .memory
            .iter_mut()
            .map(|[k, v]| {
                let mut l = sized!(drex_kv_layer);
                l.n_cells = cells as u32;
                (l.k, l.v) = (k.at(), v.at());
                (l.k_row_bytes, l.k_cell_stride) = (s.k_row as u64, s.k_row as u64);
                l.v_row_bytes = s.v_row as u64;
                if s.v_elem == 0 {
                    l.v_cell_stride = s.v_row as u64;
                } else {
                    l.v_elem_bytes = s.v_elem as u64;
                    l.v_elem_stride = (cells * s.v_elem) as u64;
                }
                l
            })
            .collect();
        // SAFETY: the memory lives as long as the engine is used.
        ok(unsafe { drex_bind_kv(self.engine.raw, layers.as_ptr(), N_LAYERS as u32) })
    }

    /// Logits of this step's rows, some of them sure.
    fn logits(&self, seed: u64) -> Bytes {
        let mut all = Vec::new();
        for i in 0..self.shape.rows as u64 {
            let mut row = rows::noise(self.shape.n_vocab, seed * 1000 + i, 4.0);
            if !(i + seed).is_multiple_of(3) {
                row[(i as usize * 7) % self.shape.n_vocab] = 40.0;
            }
            if i == 5 {
                row[0] = f32::NAN;
            }
            all.extend(rows::bytes(&row, self.shape.dtype));
        }
        Bytes::new(self.cuda, &all)
    }

    /// Logits of which every row is sure.
    fn sure(&self) -> Bytes {
        let mut row = vec![0.0; self.shape.n_vocab];
        row[5] = 40.0;
        let row = rows::bytes(&row, self.shape.dtype);
        Bytes::new(self.cuda, &row.repeat(self.shape.rows as usize))
    }

    fn describe(&self, logits: &mut Bytes) -> drex_logits {
        let mut l = sized!(drex_logits);
        l.dtype = self.shape.dtype as u32;
        l.data = logits.at();
        l.row_stride_bytes = (self.shape.n_vocab * self.shape.dtype.bytes()) as u64;
        l.n_rows = self.shape.rows;
        l.n_vocab = self.shape.n_vocab as u32;
        l.n_top = self.shape.n_top;
        l.stream = if self.cuda { STREAM } else { ptr::null_mut() };
        l
    }

    fn cells_of(&self) -> Vec<u32> {
        // Not in order, not all of them.
        let n = self.cells as u32;
        (0..self.shape.rows).map(|i| n - 1 - i).collect()
    }

    fn verdicts(&self, logits: &drex_logits) -> Result<Vec<drex_verdict>, Failed> {
        let cells = self.cells_of();
        let mut verdicts = Vec::with_capacity(self.shape.rows as usize);
        // SAFETY: room for a verdict per row.
        ok(unsafe {
            drex_ramp(
                self.engine.raw,
                logits,
                cells.as_ptr(),
                verdicts.as_mut_ptr(),
                self.shape.rows,
            )
        })?;
        // SAFETY: one per row was written.
        unsafe { verdicts.set_len(self.shape.rows as usize) };
        Ok(verdicts)
    }

    fn top(&self, row: u32) -> Vec<(u32, i32)> {
        let mut top = [drex_top {
            logit: 0.0,
            token: -9,
        }; DREX_MAX_TOP];
        let mut n = 99;
        let got = unsafe { drex_top_get(self.engine.raw, row, top.as_mut_ptr(), 64, &mut n) };
        ok(got).unwrap_or_else(|e| panic!("{e:?}: {}", text()));
        top[..n as usize]
            .iter()
            .map(|t| (t.logit.to_bits(), t.token))
            .collect()
    }

    fn kv(&self) -> Vec<Vec<u8>> {
        let bytes = [self.cells * self.shape.k_row, self.cells * self.shape.v_row];
        let sides = self
            .memory
            .iter()
            .flat_map(|m| [m[0].read(bytes[0]), m[1].read(bytes[1])]);
        sides.collect()
    }

    /// A step through the ramp, and what stays through the rest.
    fn token(&self, seed: u64) -> Result<Vec<drex_verdict>, Failed> {
        let now = seed * 10;
        for id in 0..self.shape.rows {
            self.engine.ready(id.into(), now)?;
        }
        let plan = self.engine.plan(now + 1, self.shape.rows)?;
        assert_eq!(plan.rows.len(), self.shape.rows as usize);
        let mut logits = self.logits(seed);
        let verdicts = self.verdicts(&self.describe(&mut logits))?;
        self.engine.fill()?;
        self.engine.complete(now + 2, 5)?;
        let deep = self.engine.plan(now + 3, self.shape.rows)?;
        if !deep.rows.is_empty() {
            self.engine.complete(now + 4, 5)?;
        }
        Ok(verdicts)
    }
}

fn close(a: &[drex_verdict], b: &[drex_verdict]) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(
            (a.decision, a.token, a.forced),
            (b.decision, b.token, b.forced),
            "row {i}"
        );
        let diff = (a.confidence - b.confidence).abs();
        assert!(
            diff < 3e-6 || (a.confidence.is_nan() && b.confidence.is_nan()),
            "row {i}"
        );
    }
}

const SHAPE: Shape = Shape {
    rows: 7,
    n_vocab: 9000,
    dtype: Dtype::F32,
    k_row: 48,
    v_row: 64,
    v_elem: 0,
    metric: DREX_METRIC_GAP,
    n_top: 3,
};

#[test]
fn the_same_as_on_the_host() {
    let _alone = alone();
    let shapes = [
        SHAPE,
        Shape {
            dtype: Dtype::F16,
            n_top: 0,
            metric: DREX_METRIC_ENTROPY,
            ..SHAPE
        },
        Shape {
            dtype: Dtype::Bf16,
            n_vocab: 777,
            v_elem: 2,
            n_top: 64,
            ..SHAPE
        },
        // quantised rows, and rows that no vector fits
        Shape {
            k_row: 34,
            v_row: 136,
            metric: DREX_METRIC_MAXPROB,
            ..SHAPE
        },
        Shape {
            k_row: 7,
            v_row: 0,
            n_vocab: 31,
            ..SHAPE
        },
        Shape {
            v_elem: 4,
            rows: 64,
            n_vocab: 100,
            ..SHAPE
        },
        // more rows than fit into a launch
        Shape {
            rows: 600,
            n_vocab: 50,
            k_row: 16,
            v_row: 16,
            ..SHAPE
        },
    ];
    let mut tokens = 0;
    for shape in shapes {
        let host = World::new(shape, false).unwrap();
        let cuda = World::new(shape, true).unwrap_or_else(|e| panic!("{e:?}: {}", text()));
        for seed in 0..4 {
            let a = host.token(seed).unwrap();
            let b = cuda
                .token(seed)
                .unwrap_or_else(|e| panic!("{e:?}: {}", text()));
            close(&a, &b);
            tokens += a.len();
            fake::wait(STREAM);
            assert!(host.kv() == cuda.kv(), "{shape:?}");
        }
        assert_eq!(
            host.engine.stats().bytes_filled,
            cuda.engine.stats().bytes_filled
        );
        assert!(host.engine.stats().bytes_filled > 0);
    }
    println!("cuda: {tokens} verdicts as on the host");
}

#[test]
fn the_greatest_logits() {
    let _alone = alone();
    let host = World::new(SHAPE, false).unwrap();
    let cuda = World::new(SHAPE, true).unwrap();
    for world in [&host, &cuda] {
        for id in 0..SHAPE.rows {
            world.engine.ready(id.into(), 0).unwrap();
        }
        world.engine.plan(1, SHAPE.rows).unwrap();
        // SAFETY: valid pointers.
        let early = unsafe {
            let mut t = drex_top {
                logit: 0.0,
                token: 0,
            };
            drex_top_get(world.engine.raw, 0, &mut t, 1, &mut 0)
        };
        assert_eq!(early, DREX_ERROR_CALL_ORDER);
        let mut logits = world.logits(1);
        world.verdicts(&world.describe(&mut logits)).unwrap();
    }
    for row in 0..SHAPE.rows {
        assert_eq!(host.top(row), cuda.top(row));
        assert_eq!(host.top(row).len(), 3);
    }
    // Row 5 has a NaN, which is no logit, and others that are.
    assert!(host.top(5).iter().all(|t| t.1 > 0));
    let mut t = drex_top {
        logit: 0.0,
        token: 0,
    };
    // SAFETY: valid pointers.
    let status = unsafe { drex_top_get(cuda.engine.raw, 7, &mut t, 1, &mut 0) };
    assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT);
    assert!(text().contains("row is 7"), "{}", text());
}

/// Drops it, and says whether a call was refused there. Nothing can be freed
/// then, and all of it is left.
fn drop_refused(world: World) -> bool {
    let armed = fake::armed();
    if armed {
        // What is freed with a context waits for this; the rest cannot.
        fake::wait(STREAM);
    }
    drop(world);
    let refused = armed && !fake::armed();
    if refused {
        fake::leak();
    }
    refused
}

/// Nothing is in doubt after a call that the driver refused: it says so, may be
/// made again, and leaves nothing behind.
#[test]
fn every_call_of_the_driver_may_fail() {
    let _alone = alone();
    let shape = Shape {
        rows: 230,
        n_vocab: 20,
        k_row: 16,
        v_row: 16,
        ..SHAPE
    };
    let want = World::new(shape, true).unwrap().token(1).unwrap();
    let base = fake::alive();
    assert_eq!(base, 0);
    let mut refused = 0;
    for n in 0.. {
        fake::fail_at(n);
        let world = World::new(shape, true);
        let Ok(world) = world else {
            assert_eq!(world.err(), Some(Failed(DREX_ERROR_DEVICE)));
            assert!(
                text().contains("CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"),
                "{}",
                text()
            );
            assert_eq!(fake::depth(), 1);
            assert_eq!(fake::alive(), base, "call {n}");
            refused += 1;
            continue;
        };
        for id in 0..shape.rows {
            world.engine.ready(id.into(), 0).unwrap();
        }
        world.engine.plan(1, shape.rows).unwrap();
        let mut logits = world.logits(1);
        let l = world.describe(&mut logits);
        let mut failures = 0;
        let mut again = |status: Result<(), Failed>| {
            if let Err(e) = status {
                assert_eq!(e, Failed(DREX_ERROR_DEVICE), "{}", text());
                failures += 1;
            }
            status.is_err()
        };
        let mut verdicts = world.verdicts(&l);
        if again(verdicts.as_ref().map(|_| ()).map_err(|e| *e)) {
            verdicts = world.verdicts(&l);
        }
        close(&verdicts.unwrap(), &want);
        if again(world.engine.fill()) {
            world.engine.fill().unwrap();
        }
        world.engine.complete(2, 0).unwrap();
        refused += failures;
        if drop_refused(world) {
            refused += 1;
            continue;
        }
        assert_eq!(fake::alive(), 1, "only the logits are alive, call {n}");
        if fake::calls() as i64 <= n {
            break;
        }
    }
    fake::fail_at(-1);
    assert!(refused > 30, "{refused}");
    println!("cuda: {refused} refused calls");
}

/// The same for graphs, arenas and rebinding, with another context current.
#[test]
fn every_call_for_graphs_and_arenas_may_fail() {
    const OTHER: usize = 0x2000;
    let _alone = alone();
    let shape = Shape {
        rows: 230,
        n_vocab: 20,
        k_row: 16,
        v_row: 16,
        n_top: 0,
        ..SHAPE
    };
    let host = World::new(shape, false).unwrap();
    let want = [1, 2].map(|seed| (host.token(seed).unwrap(), host.kv()));
    let [ramp_graph, fill_graph, gather_graph] =
        [1usize, 2, 3].map(|i| ptr::without_provenance_mut::<c_void>(0x200 + i));
    let (row, n_rows) = (24usize, shape.rows as usize);
    let mut refused = 0;
    for n in 0.. {
        fake::fail_at(-1);
        fake::context(CONTEXT);
        let mut world = World::new(shape, true).unwrap();
        fake::context(OTHER);
        fake::fail_at(n);
        let mut failures = 0;
        // Until it is done; how often it was refused is counted.
        let mut insist = |call: &mut dyn FnMut() -> Result<(), Failed>| {
            while let Err(e) = call() {
                assert_eq!(e, Failed(DREX_ERROR_DEVICE), "{}", text());
                assert_eq!((fake::depth(), fake::current()), (1, OTHER));
                failures += 1;
                assert!(failures < 2, "one call was refused");
            }
        };
        insist(&mut || world.bind());
        let mut logits = world.logits(1);
        let mut l = world.describe(&mut logits);
        // A host throws away a capture that failed, and begins again.
        let captured = |stream, call: &mut dyn FnMut() -> drex_status| {
            fake::capture(stream, true);
            let status = call();
            fake::capture(stream, false);
            ok(status)
        };
        let raw = world.engine.raw;
        l.stream = ramp_graph;
        // SAFETY: the logits, K/V and rows stay where they are, here and below.
        insist(&mut || captured(ramp_graph, &mut || unsafe { drex_ramp_enqueue(raw, &l) }));
        insist(&mut || {
            captured(fill_graph, &mut || unsafe {
                drex_fill_enqueue(raw, fill_graph)
            })
        });
        let arena_bytes = pattern(n_rows * row, 3);
        let mut arena_memory = Bytes::new(true, &arena_bytes);
        let mut dense_memory = Bytes::new(true, &vec![0; n_rows * row]);
        let mut arena = arena_of(&mut arena_memory, &mut dense_memory, row, STREAM);
        l.enqueued = 1;
        for (seed, (verdicts, kv)) in (1..).zip(&want) {
            for id in 0..u64::from(shape.rows) {
                world.engine.ready(id, seed * 10).unwrap();
            }
            let mut plan = None;
            insist(&mut || {
                plan = Some(world.engine.plan(seed * 10 + 1, shape.rows)?);
                Ok(())
            });
            let slots: Vec<_> = plan.unwrap().rows.iter().map(|r| r.slot as usize).collect();
            let Bytes::Cuda(new) = world.logits(seed) else {
                unreachable!()
            };
            let bytes = new.read();
            // SAFETY: as long.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), logits.at().cast(), bytes.len()) };
            if seed == 1 {
                arena.stream = gather_graph;
                insist(&mut || captured(gather_graph, &mut || unsafe { drex_gather(raw, &arena) }));
            }
            fake::launch(gather_graph);
            fake::wait(gather_graph);
            let dense = dense_memory.read(n_rows * row);
            for (i, slot) in slots.iter().enumerate() {
                assert_eq!(dense[i * row..][..row], arena_bytes[slot * row..][..row]);
            }
            // And back to where they were.
            arena.stream = STREAM;
            insist(&mut || ok(unsafe { drex_scatter(raw, &arena) }));
            fake::wait(STREAM);
            assert_eq!(arena_memory.read(n_rows * row), arena_bytes);
            fake::launch(ramp_graph);
            let mut got = Vec::new();
            insist(&mut || {
                got = world.verdicts(&l)?;
                Ok(())
            });
            close(&got, verdicts);
            insist(&mut || ok(unsafe { drex_fill_plan(raw) }));
            fake::launch(fill_graph);
            fake::wait(fill_graph);
            assert!(world.kv() == *kv, "call {n}, step {seed}");
            world.engine.complete(seed * 10 + 2, 5).unwrap();
            let mut deep = 0;
            insist(&mut || {
                deep = world.engine.plan(seed * 10 + 3, shape.rows)?.rows.len();
                Ok(())
            });
            if deep > 0 {
                world.engine.complete(seed * 10 + 4, 5).unwrap();
            }
        }
        assert_eq!((fake::depth(), fake::current()), (1, OTHER));
        refused += failures;
        if drop_refused(world) {
            refused += 1;
            continue;
        }
        assert_eq!(
            fake::alive(),
            3,
            "only the host's memory is alive, call {n}"
        );
        if fake::calls() as i64 <= n {
            break;
        }
    }
    fake::fail_at(-1);
    fake::context(CONTEXT);
    assert!(refused > 30, "{refused}");
    println!("cuda: {refused} refused calls of graphs and arenas");
}

/// The first image is for other devices, or both are.
#[test]
fn an_image_for_another_device() {
    const NO_BINARY: i32 = 209;
    let _alone = alone();
    fake::image(NO_BINARY);
    let world = World::new(SHAPE, true).unwrap_or_else(|e| panic!("{e:?}: {}", text()));
    let want = World::new(SHAPE, false).unwrap().token(1).unwrap();
    close(&world.token(1).unwrap(), &want);
    fake::wait(STREAM);
    // Of both, what the first came to is said.
    fake::image(NO_BINARY);
    fake::image(1);
    let e = World::new(SHAPE, true).err();
    assert_eq!(e, Some(Failed(DREX_ERROR_DEVICE)));
    assert!(
        text().contains("CUDA_ERROR_NO_BINARY_FOR_GPU (209)"),
        "{}",
        text()
    );
    // Any other error is one; the second image would not be better.
    fake::image(2);
    let e = World::new(SHAPE, true).err();
    assert_eq!(e, Some(Failed(DREX_ERROR_DEVICE)));
    assert!(
        text().contains("CUDA_ERROR_OUT_OF_MEMORY (2)"),
        "{}",
        text()
    );
}

#[test]
fn contexts_are_left_as_they_were() {
    let _alone = alone();
    fake::context(0);
    let e = World::new(SHAPE, true).err();
    assert_eq!(e, Some(Failed(DREX_ERROR_CALL_ORDER)));
    assert!(text().contains("no CUDA context is current"), "{}", text());
    fake::context(CONTEXT);
    let world = World::new(SHAPE, true).unwrap();
    let want = World::new(SHAPE, false).unwrap().token(3).unwrap();
    // Another thread, without a context, or with another one.
    for other in [0usize, 0x2000] {
        std::thread::scope(|s| {
            let run = s.spawn(|| {
                fake::context(other);
                let depth = fake::depth();
                // SAFETY: one thread at a time.
                let world = unsafe { &*ptr::from_ref(&Shared(&world)) }.0;
                let got = world.token(3 + other as u64).unwrap();
                assert_eq!(fake::depth(), depth);
                got
            });
            let got = run.join().unwrap();
            if other == 0 {
                close(&got, &want);
            }
        });
    }
    assert_eq!(fake::depth(), 1);
    // Destroyed where no context is current.
    fake::context(0);
    drop(world);
    fake::context(CONTEXT);
}

/// Passes a world to another thread, one at a time.
struct Shared<'a>(&'a World);
// SAFETY: an engine may be used from any thread, by one at a time.
unsafe impl Sync for World {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

#[test]
fn a_ramp_may_run_beside_the_host() {
    let _alone = alone();
    let world = World::new(SHAPE, true).unwrap();
    let want = World::new(SHAPE, false).unwrap().token(2).unwrap();
    for id in 0..SHAPE.rows {
        world.engine.ready(id.into(), 20).unwrap();
    }
    world.engine.plan(21, SHAPE.rows).unwrap();
    let mut logits = world.logits(2);
    let mut l = world.describe(&mut logits);
    // SAFETY: the logits are there.
    ok(unsafe { drex_ramp_enqueue(world.engine.raw, &l) }).unwrap();
    assert!(fake::pending(STREAM) > 0, "nothing waits");
    let calls = fake::calls();
    // SAFETY: a handle.
    ok(unsafe { drex_replan(world.engine.raw, 0, ptr::null_mut()) }).unwrap();
    assert_eq!(fake::calls(), calls);
    l.enqueued = 1;
    close(&world.verdicts(&l).unwrap(), &want);
    world.engine.fill().unwrap();
    assert!(fake::pending(STREAM) > 0, "a fill is not waited for");
    fake::wait(STREAM);
    world.engine.complete(22, 5).unwrap();
    // Nothing is under way now.
    let deep = world.engine.plan(23, SHAPE.rows).unwrap();
    assert!(!deep.rows.is_empty());
    world.engine.complete(24, 5).unwrap();
    for id in 0..SHAPE.rows {
        world.engine.ready(id.into(), 30).unwrap();
    }
    world.engine.plan(31, SHAPE.rows).unwrap();
    let e = world.verdicts(&l).err();
    assert_eq!(e, Some(Failed(DREX_ERROR_CALL_ORDER)));
    assert!(text().contains("nothing was enqueued"), "{}", text());
    l.enqueued = 0;
    close(&world.verdicts(&l).unwrap(), &want);
    fake::wait(STREAM);
    let host = World::new(SHAPE, false).unwrap();
    // SAFETY: the logits are there.
    let status = unsafe { drex_ramp_enqueue(host.engine.raw, &l) };
    assert_eq!(status, DREX_ERROR_UNSUPPORTED);
}

/// A graph that was captured once sees each step's rows.
#[test]
fn graphs_see_each_steps_rows() {
    let _alone = alone();
    let shape = Shape { n_top: 0, ..SHAPE };
    let host = World::new(shape, false).unwrap();
    let cuda = World::new(shape, true).unwrap();
    let (ramp_graph, fill_graph, gather_graph) = [1usize, 2, 3]
        .map(|i| ptr::without_provenance_mut::<c_void>(0x100 + i))
        .into();
    let mut logits = cuda.logits(0);
    let mut l = cuda.describe(&mut logits);
    l.stream = ramp_graph;
    fake::capture(ramp_graph, true);
    // SAFETY: the logits stay where they are.
    ok(unsafe { drex_ramp_enqueue(cuda.engine.raw, &l) }).unwrap();
    fake::capture(ramp_graph, false);
    fake::capture(fill_graph, true);
    // SAFETY: K/V is bound.
    ok(unsafe { drex_fill_enqueue(cuda.engine.raw, fill_graph) }).unwrap();
    fake::capture(fill_graph, false);
    l.enqueued = 1;

    let row = 40usize;
    let arena_bytes = pattern(shape.rows as usize * row, 77);
    let mut arena_memory = Bytes::new(true, &arena_bytes);
    let mut dense_memory = Bytes::new(true, &vec![0; shape.rows as usize * row]);
    let arena = arena_of(&mut arena_memory, &mut dense_memory, row, gather_graph);

    let mut filled = 0;
    for seed in 0..6 {
        let want = host.token(seed).unwrap();
        let now = seed * 10;
        // In another order each time, so that rows have other slots.
        for i in 0..shape.rows as u64 {
            let id = (i * 3 + seed) % u64::from(shape.rows);
            cuda.engine.ready(id, now + i).unwrap();
        }
        let plan = cuda.engine.plan(now + 9, shape.rows).unwrap();
        if seed == 0 {
            fake::capture(gather_graph, true);
            // SAFETY: the memory stays where it is.
            ok(unsafe { drex_gather(cuda.engine.raw, &arena) }).unwrap();
            fake::capture(gather_graph, false);
        }
        fake::launch(gather_graph);
        fake::wait(gather_graph);
        let dense = dense_memory.read(shape.rows as usize * row);
        for (i, r) in plan.rows.iter().enumerate() {
            let s = r.slot as usize;
            assert_eq!(
                dense[i * row..][..row],
                arena_bytes[s * row..][..row],
                "row {i}"
            );
        }
        // The same request has the same logits and cell, wherever its row is.
        let all = match &cuda.logits(seed) {
            Bytes::Cuda(m) => m.read(),
            Bytes::Host(_) => unreachable!(),
        };
        let bytes = shape.n_vocab * shape.dtype.bytes();
        let cells = cuda.cells_of();
        let mut here = Vec::new();
        for (i, id) in plan.ids().iter().enumerate() {
            let from = *id as usize * bytes;
            // SAFETY: within both.
            unsafe {
                let to = logits.at().cast::<u8>().add(i * bytes);
                ptr::copy_nonoverlapping(all[from..].as_ptr(), to, bytes);
            }
            here.push(cells[*id as usize]);
        }
        fake::launch(ramp_graph);
        let mut verdicts = Vec::with_capacity(here.len());
        // SAFETY: room for a verdict per row.
        ok(unsafe {
            drex_ramp(
                cuda.engine.raw,
                &l,
                here.as_ptr(),
                verdicts.as_mut_ptr(),
                shape.rows,
            )
        })
        .unwrap();
        // SAFETY: one per row was written.
        unsafe { verdicts.set_len(here.len()) };
        let mut sorted = want.clone();
        for (v, id) in verdicts.iter().zip(plan.ids()) {
            sorted[id as usize] = *v;
        }
        close(&sorted, &want);
        filled += want
            .iter()
            .filter(|v| v.decision == DREX_DECISION_EXIT)
            .count();
        // SAFETY: a handle.
        ok(unsafe { drex_fill_plan(cuda.engine.raw) }).unwrap();
        fake::launch(fill_graph);
        cuda.engine.complete(now + 9, 5).unwrap();
        fake::wait(fill_graph);
        if !cuda
            .engine
            .plan(now + 9, shape.rows)
            .unwrap()
            .rows
            .is_empty()
        {
            cuda.engine.complete(now + 9, 5).unwrap();
        }
        assert!(host.kv() == cuda.kv(), "step {seed}");
    }
    assert!(filled > 10);
    // A graph that was not launched lets nobody out.
    for id in 0..u64::from(shape.rows) {
        cuda.engine.ready(id, 100).unwrap();
    }
    cuda.engine.plan(101, shape.rows).unwrap();
    fake::launch(gather_graph);
    fake::wait(gather_graph);
    for v in cuda.verdicts(&l).unwrap() {
        assert_eq!((v.decision, v.token), (DREX_DECISION_STAY, -1));
        assert!(v.confidence.is_nan());
    }
}

#[test]
fn rows_go_to_the_arena_and_back() {
    let _alone = alone();
    for (rows, cuda) in [(7u32, false), (7, true), (300, true)] {
        let shape = Shape {
            rows,
            n_vocab: 20,
            ..SHAPE
        };
        let world = World::new(shape, cuda).unwrap();
        for id in (0..u64::from(rows)).rev() {
            world.engine.ready(id, 1000 - id).unwrap();
        }
        let (row, n) = (24usize, rows as usize);
        let dense_bytes = pattern(n * row, 5);
        let mut dense = Bytes::new(cuda, &dense_bytes);
        let mut back = Bytes::new(cuda, &vec![0; n * row]);
        let mut memory = Bytes::new(cuda, &vec![0; n * row]);
        let mut arena = arena_of(&mut memory, &mut dense, row, STREAM);
        // SAFETY: valid pointers, here and below.
        let early = unsafe { drex_gather(world.engine.raw, &arena) };
        assert_eq!(early, DREX_ERROR_CALL_ORDER);
        let plan = world.engine.plan(2000, rows).unwrap();
        ok(unsafe { drex_scatter(world.engine.raw, &arena) }).unwrap();
        arena.dense = back.at();
        ok(unsafe { drex_gather(world.engine.raw, &arena) }).unwrap();
        fake::wait(STREAM);
        assert_eq!(back.read(n * row), dense_bytes);
        let inside = memory.read(n * row);
        for (i, r) in plan.rows.iter().enumerate() {
            let s = r.slot as usize;
            assert_eq!(inside[s * row..][..row], dense_bytes[i * row..][..row]);
        }
        arena.row_bytes = 0;
        let status = unsafe { drex_gather(world.engine.raw, &arena) };
        assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT);
        assert!(text().contains("arena.row_bytes is 0"), "{}", text());
        arena.row_bytes = 25;
        let status = unsafe { drex_gather(world.engine.raw, &arena) };
        assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT);
        assert!(
            text().contains("arena.arena_stride_bytes is 24"),
            "{}",
            text()
        );
    }
}

/// The launch of a call that failed behind it still reads its rows from the list.
#[test]
fn a_launch_whose_event_failed_keeps_its_rows() {
    let _alone = alone();
    let shape = Shape {
        rows: 300,
        n_vocab: 20,
        ..SHAPE
    };
    let world = World::new(shape, true).unwrap();
    for id in 0..u64::from(shape.rows) {
        world.engine.ready(id, 0).unwrap();
    }
    let (row, n) = (24usize, shape.rows as usize);
    let dense_bytes = pattern(n * row, 5);
    let mut dense = Bytes::new(true, &dense_bytes);
    let mut memory = Bytes::new(true, &vec![0; n * row]);
    let mut other = Bytes::new(true, &vec![0; n * row]);
    let mut arena = arena_of(&mut memory, &mut dense, row, STREAM);
    let rows = world.engine.plan(1, shape.rows).unwrap().rows;
    fake::fail_call(c"cuEventRecord");
    // SAFETY: valid pointers, here and below.
    let status = unsafe { drex_scatter(world.engine.raw, &arena) };
    assert_eq!(status, DREX_ERROR_DEVICE);
    ok(unsafe { drex_abandon(world.engine.raw) }).unwrap();
    // Fewer rows, to somewhere else.
    world.engine.plan(2, 240).unwrap();
    arena.arena = other.at();
    ok(unsafe { drex_scatter(world.engine.raw, &arena) }).unwrap();
    fake::wait(STREAM);
    let inside = memory.read(n * row);
    for (i, r) in rows.iter().enumerate() {
        let s = r.slot as usize;
        assert_eq!(inside[s * row..][..row], dense_bytes[i * row..][..row]);
    }
}

#[test]
fn what_a_device_cannot_take_is_said() {
    let _alone = alone();
    let says = |e: Option<Failed>, status: drex_status, parts: &[&str]| {
        assert_eq!(e, Some(Failed(status)), "{}", text());
        for part in parts {
            assert!(text().contains(part), "{}", text());
        }
    };
    // transposed elements that no kernel moves
    let e = World::new(
        Shape {
            v_row: 6,
            v_elem: 3,
            ..SHAPE
        },
        true,
    )
    .err();
    says(
        e,
        DREX_ERROR_INVALID_ARGUMENT,
        &["layers[1].v_elem_bytes is 3", "CUDA"],
    );
    // K/V of the host
    let mut world = World::new(SHAPE, true).unwrap();
    let old = world.memory[3][0].at();
    let mut host = vec![0u8; world.cells * SHAPE.k_row];
    let kept = std::mem::replace(&mut world.memory[3][0], Bytes::Host(vec![0; 4096]));
    says(
        world.bind().err(),
        DREX_ERROR_INVALID_ARGUMENT,
        &["layers[3].k is 0x", "CUDA device can reach"],
    );
    world.memory[3][0] = kept;
    assert_eq!(world.memory[3][0].at(), old);
    host.clear();
    // What was bound before still is.
    let want = World::new(SHAPE, false).unwrap();
    close(&want.token(1).unwrap(), &world.token(1).unwrap());
    fake::wait(STREAM);
    assert!(want.kv() == world.kv());

    for id in 0..SHAPE.rows {
        world.engine.ready(id.into(), 100).unwrap();
    }
    world.engine.plan(101, SHAPE.rows).unwrap();
    let mut logits = world.logits(1);
    let good = world.describe(&mut logits);
    let mut bad = good;
    bad.data = logits.at().wrapping_byte_add(2);
    says(
        world.verdicts(&bad).err(),
        DREX_ERROR_INVALID_ARGUMENT,
        &["logits.data", "multiple"],
    );
    bad = good;
    bad.n_vocab = 600_000;
    bad.row_stride_bytes = 2_400_000;
    says(
        world.verdicts(&bad).err(),
        DREX_ERROR_CAPACITY,
        &["n_vocab", "524288", "600000"],
    );
    bad = good;
    bad.n_top = 4;
    says(
        world.verdicts(&bad).err(),
        DREX_ERROR_INVALID_ARGUMENT,
        &["logits.n_top is 4", "is 3"],
    );
    bad = good;
    bad.enqueued = 2;
    says(
        world.verdicts(&bad).err(),
        DREX_ERROR_INVALID_ARGUMENT,
        &["logits.enqueued is 2"],
    );
    bad = good;
    bad.n_rows = SHAPE.rows + 1;
    // SAFETY: valid pointers; refused before any row is read.
    let status = unsafe { drex_ramp_enqueue(world.engine.raw, &bad) };
    says(
        ok(status).err(),
        DREX_ERROR_CAPACITY,
        &["logits.n_rows is 8"],
    );
    assert!(world.verdicts(&good).is_ok());
    fake::wait(STREAM);
}

/// Logits that another ramp was enqueued for are refused, and no row leaves by the
/// results of a step before.
#[test]
fn another_ramps_results_are_no_answer() {
    let _alone = alone();
    let world = World::new(SHAPE, true).unwrap();
    let raw = world.engine.raw;
    let mut sure = world.sure();
    let l = world.describe(&mut sure);
    let ready = |now| (0..SHAPE.rows).for_each(|id| world.engine.ready(id.into(), now).unwrap());
    ready(1);
    world.engine.plan(1, SHAPE.rows).unwrap();
    let all = world.verdicts(&l).unwrap();
    assert!(all.iter().all(|v| v.decision == DREX_DECISION_EXIT));
    world.engine.fill().unwrap();
    world.engine.complete(2, 5).unwrap();

    ready(3);
    world.engine.plan(3, SHAPE.rows).unwrap();
    let mut other = world.logits(1);
    let full = world.describe(&mut other);
    let mut one = full;
    one.n_rows = 1;
    let mut asked = full;
    asked.enqueued = 1;
    // SAFETY: the logits are there.
    ok(unsafe { drex_ramp_enqueue(raw, &one) }).unwrap();
    let refused = |l: &drex_logits, what: &str| {
        assert_eq!(
            world.verdicts(l).err(),
            Some(Failed(DREX_ERROR_CALL_ORDER)),
            "{what}"
        );
        assert!(text().contains(what), "{}", text());
    };
    refused(
        &asked,
        "logits.n_rows is 7, but in drex_ramp_enqueue it was 1",
    );
    // SAFETY: the logits are there.
    ok(unsafe { drex_ramp_enqueue(raw, &full) }).unwrap();
    let change = |set: fn(&mut drex_logits)| {
        let mut l = asked;
        set(&mut l);
        l
    };
    let before = |field, value: u64, before: u64| {
        format!("{field} is {value}, but in drex_ramp_enqueue it was {before}")
    };
    refused(&change(|l| l.n_top -= 1), &before("logits.n_top", 2, 3));
    refused(
        &change(|l| l.n_vocab -= 1),
        &before("logits.n_vocab", 8999, 9000),
    );
    refused(
        &change(|l| l.row_stride_bytes += 64),
        &before("logits.row_stride_bytes", 36064, 36000),
    );
    refused(
        &change(|l| l.dtype = DREX_DTYPE_F16),
        &before("logits.dtype", 1, 0),
    );
    let data = full.data as u64;
    refused(
        &change(|l| l.data = l.data.wrapping_byte_add(64)),
        &before("logits.data", data + 64, data),
    );
    refused(
        &change(|l| l.stream = ptr::null_mut()),
        &before("logits.stream", 0, STREAM as u64),
    );
    let host = World::new(SHAPE, false).unwrap();
    let want = host.token(1).unwrap();
    close(&world.verdicts(&asked).unwrap(), &want);
    world.engine.fill().unwrap();
    world.engine.complete(4, 5).unwrap();
    fake::wait(STREAM);
}

/// A graph of one row brings one result; the rows beside it have none, whatever the
/// step before found.
#[test]
fn a_graph_with_too_few_rows_lets_no_other_out() {
    let _alone = alone();
    let world = World::new(SHAPE, true).unwrap();
    let graph = ptr::without_provenance_mut::<c_void>(0x201);
    let mut sure = world.sure();
    let mut l = world.describe(&mut sure);
    for now in [1, 11] {
        for id in 0..SHAPE.rows {
            world.engine.ready(id.into(), now).unwrap();
        }
        world.engine.plan(now, SHAPE.rows).unwrap();
        let exits = |l: &drex_logits| {
            let all = world.verdicts(l).unwrap();
            let out = |v: &&drex_verdict| v.decision == DREX_DECISION_EXIT;
            all.iter().filter(out).count() as u32
        };
        if now == 1 {
            assert_eq!(exits(&l), SHAPE.rows);
        } else {
            l.enqueued = 1;
            assert_eq!(exits(&l), 0);
        }
        world.engine.fill().unwrap();
        world.engine.complete(now + 1, 5).unwrap();
        if now == 1 {
            let mut one = l;
            (one.n_rows, one.stream) = (1, graph);
            fake::capture(graph, true);
            // SAFETY: the logits stay where they are.
            ok(unsafe { drex_ramp_enqueue(world.engine.raw, &one) }).unwrap();
            fake::capture(graph, false);
        }
    }
    fake::wait(STREAM);
}

/// A plan that the device refuses is none: nothing is planned, counted or moved.
#[test]
fn a_plan_that_the_device_refuses_changes_nothing() {
    let _alone = alone();
    let world = World::new(SHAPE, true).unwrap();
    let raw = world.engine.raw;
    let graph = ptr::without_provenance_mut::<c_void>(0x202);
    let row = 40usize;
    let mut arena_memory = Bytes::new(true, &vec![0; SHAPE.rows as usize * row]);
    let mut dense_memory = Bytes::new(true, &vec![0; SHAPE.rows as usize * row]);
    let arena = arena_of(&mut arena_memory, &mut dense_memory, row, graph);
    for id in 0..SHAPE.rows {
        world.engine.ready(id.into(), 5).unwrap();
    }
    let first = world.engine.plan(6, SHAPE.rows).unwrap();
    fake::capture(graph, true);
    // SAFETY: the memory stays where it is.
    ok(unsafe { drex_gather(raw, &arena) }).unwrap();
    fake::capture(graph, false);
    world.engine.abandon().unwrap();
    let before = format!("{:?}", world.engine.stats());
    let mut refused = 0;
    for n in 0..300 {
        fake::fail_at(n % 3);
        let got = world.engine.plan(7, SHAPE.rows);
        fake::fail_at(-1);
        match got {
            Err(e) => {
                assert_eq!(e, Failed(DREX_ERROR_DEVICE));
                refused += 1;
            }
            Ok(plan) => {
                assert_eq!(plan.rows, first.rows);
                world.engine.abandon().unwrap();
            }
        }
    }
    assert!(refused > 90, "{refused}");
    assert_eq!(format!("{:?}", world.engine.stats()), before);
    // In their old order, in the same arena rows.
    let again = world.engine.plan(8, SHAPE.rows).unwrap();
    assert_eq!(again.rows, first.rows);
    world.engine.abandon().unwrap();
    fake::wait(graph);
}
