// SPDX-License-Identifier: Apache-2.0

//! The CUDA kernels' own source, run on a CPU thread by thread, against
//! references in f64 and naive copies. `cargo xtask test --kernels` shows how
//! many cases that are; `tools/gpu` runs the same ones on a device.

#[path = "common/fake.rs"]
mod fake;
#[path = "common/rows.rs"]
mod rows;

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Mutex, MutexGuard};

use drex::core::metric::{Metric, Moments};
use drex::device::cuda::args::*;
use drex::device::{Dtype, Top};
use rows::*;

/// The emulation is one block at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

/// The lists of `kernels/cases.txt`, which a GPU runs as well.
fn listed_cases(name: &str) -> Vec<u32> {
    let text = include_str!("../kernels/cases.txt");
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name).filter(|l| l.starts_with(' ')))
        .unwrap_or_else(|| panic!("kernels/cases.txt has no {name}"));
    line.split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect()
}

fn pairs(name: &str) -> Vec<(u32, u32)> {
    let list = listed_cases(name);
    list.chunks_exact(2).map(|p| (p[0], p[1])).collect()
}

fn status_of<A>(kernel: &str, grid: (u32, u32), threads: u32, args: &A, turned: bool) -> i32 {
    let name = CString::new(kernel).unwrap();
    let args = std::ptr::from_ref(args).cast::<c_void>();
    // SAFETY: the caller's arguments are the kernel's.
    unsafe { fake::emulate()(name.as_ptr(), grid.0, grid.1, threads, args, turned.into()) }
}

fn run<A>(kernel: &str, grid: (u32, u32), threads: u32, args: &A, turned: bool) {
    assert_eq!(
        status_of(kernel, grid, threads, args, turned),
        0,
        "{kernel}"
    );
}

#[test]
fn arguments_have_one_layout() {
    let layouts = fake::function::<unsafe extern "C" fn() -> *const c_char>("drex_layouts");
    // SAFETY: a text that ends in 0.
    let there = unsafe { CStr::from_ptr(layouts()) }.to_str().unwrap();
    assert_eq!(there, layouts_here());
}

fn layouts_here() -> String {
    drex::device::cuda::args::layouts()
}

struct Ramp {
    moments: Vec<DeviceMoments>,
    tops: Vec<Top>,
}

/// All rows of one length in one launch, `offset` bytes into their memory.
fn ramp(
    rows: &[Vec<u8>],
    dtype: Dtype,
    n: usize,
    n_top: usize,
    offset: usize,
    turned: bool,
) -> Ramp {
    let row = n * dtype.bytes();
    // Aligned for vectors, unless the offset is odd.
    let stride = if offset == 0 {
        row.next_multiple_of(16)
    } else {
        row
    };
    let mut memory = vec![0u128; (stride * rows.len() + offset).div_ceil(16) + 1];
    let base = memory.as_mut_ptr().cast::<u8>();
    for (i, bytes) in rows.iter().enumerate() {
        // SAFETY: within `memory`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(offset + i * stride), row);
        }
    }
    let n_chunks = (n as u32).div_ceil(RAMP_CHUNK);
    let chunks = rows.len() * n_chunks as usize;
    let none = DeviceMoments {
        top: f32::NAN,
        second: f32::NAN,
        sum: f32::NAN,
        weighted: f32::NAN,
        token: -7,
    };
    let mut partial = vec![none; chunks];
    let mut partial_top = vec![
        Top {
            logit: f32::NAN,
            token: -7
        };
        chunks * n_top
    ];
    let mut arrived = vec![0u32; rows.len()];
    let mut moments = vec![none; rows.len()];
    let mut tops = vec![
        Top {
            logit: f32::NAN,
            token: -7
        };
        rows.len() * n_top
    ];
    let args = RampArgs {
        logits: base as u64 + offset as u64,
        row_stride: stride as u64,
        n_rows: rows.len() as u32,
        n_vocab: n as u32,
        n_chunks,
        vectors: u32::from(offset == 0),
        weighted: 1,
        n_top: n_top as u32,
        partial: partial.as_mut_ptr() as u64,
        partial_top: partial_top.as_mut_ptr() as u64,
        arrived: arrived.as_mut_ptr() as u64,
        out: moments.as_mut_ptr() as u64,
        out_top: tops.as_mut_ptr() as u64,
    };
    let name = match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
    };
    let top = if n_top > 0 { "top_" } else { "" };
    run(
        &format!("drex_ramp_{top}{name}"),
        (chunks as u32, 1),
        RAMP_THREADS,
        &args,
        turned,
    );
    assert!(
        arrived.iter().all(|&a| a == 0),
        "the counters are left as they were"
    );
    Ramp { moments, tops }
}

fn confidence(m: &DeviceMoments, metric: Metric, n: usize) -> f32 {
    let moments = Moments {
        top: m.top,
        second: m.second,
        sum: m.sum.into(),
        weighted: m.weighted.into(),
        nan: m.sum.is_nan(),
    };
    moments.confidence(metric, n)
}

fn same(a: &DeviceMoments, b: &DeviceMoments) -> bool {
    // Equal, not of the same bits: 0 has two signs, and the greatest of both
    // may have either. A NaN has many faces.
    let numbers = |m: &DeviceMoments| [m.top, m.second, m.sum, m.weighted];
    (a.sum.is_nan() && b.sum.is_nan()) || (numbers(a) == numbers(b) && a.token == b.token)
}

/// Rows of one length, in one launch each way; how many rows were compared.
fn check_ramp(cases: &[(String, Vec<f32>)]) -> usize {
    let mut compared = 0;
    let n = cases[0].1.len();
    for dtype in DTYPES {
        let stored: Vec<_> = cases.iter().map(|(_, r)| bytes(r, dtype)).collect();
        let k = [1, 7, 40, 64][n % 4];
        let plain = ramp(&stored, dtype, n, 0, 0, false);
        let variants = [
            ramp(&stored, dtype, n, 0, 0, true),
            ramp(&stored, dtype, n, 0, dtype.bytes(), false),
            ramp(&stored, dtype, n, k, 0, false),
            ramp(&stored, dtype, n, k, dtype.bytes(), true),
        ];
        for (i, (name, row)) in cases.iter().enumerate() {
            let values = rounded(row, dtype);
            let m = &plain.moments[i];
            let at = format!("{name}, {dtype:?}");
            for v in &variants {
                assert!(same(m, &v.moments[i]), "{at}: {m:?} {:?}", v.moments[i]);
            }
            for metric in METRICS {
                let (want, token) = reference(&values, metric);
                let got = confidence(m, metric, n);
                if want.is_nan() {
                    assert!(got.is_nan(), "{at}: {got} {m:?}");
                } else {
                    let diff = (f64::from(got) - want).abs();
                    assert!(diff < 3e-6, "{at} {metric:?}: {got} is not {want}");
                    assert_eq!(m.token, token, "{at}");
                }
                compared += 1;
            }
            for v in &variants[2..] {
                let got = &v.tops[i * k..][..k];
                let want = greatest(&values, k);
                for (j, t) in got.iter().enumerate() {
                    match want.get(j) {
                        Some(&(token, x)) => {
                            assert_eq!(t.token, token, "{at}: {j} of {k}");
                            assert_eq!(f64::from(t.logit), x, "{at}: {j} of {k}");
                        }
                        None => assert_eq!(t.token, -1, "{at}: {j} of {k}"),
                    }
                }
                compared += 1;
            }
        }
    }
    compared
}

#[test]
fn ramp_rows_of_every_kind() {
    let _alone = alone();
    let mut compared = 0;
    for n in listed_cases("lengths") {
        compared += check_ramp(&cases(&[n as usize]));
    }
    println!("ramp: {compared} comparisons of rows of every kind");
}

#[test]
fn ramp_the_longest_vocabularies() {
    let _alone = alone();
    let mut compared = 0;
    for n in listed_cases("long_lengths") {
        let n = n as usize;
        let mut tie = noise(n, 5, 1.0);
        (tie[n / 3], tie[n - 1]) = (3.0, 3.0);
        let mut bad = noise(n, 6, 1.0);
        bad[n - 2] = f32::NAN;
        compared += check_ramp(&[
            ("random".into(), noise(n, 3, 20.0)),
            ("flat".into(), noise(n, 4, 0.01)),
            ("tie".into(), tie),
            ("bad".into(), bad),
        ]);
    }
    println!("ramp: {compared} comparisons of long rows");
}

/// A row's result depends neither on its neighbours nor on its place.
#[test]
fn ramp_rows_are_independent() {
    let _alone = alone();
    let n = 9001;
    let rows: Vec<_> = (0..5)
        .map(|i| bytes(&noise(n, i, 9.0), Dtype::F16))
        .collect();
    let together = ramp(&rows, Dtype::F16, n, 0, 0, false);
    for (i, row) in rows.iter().enumerate() {
        let alone = ramp(std::slice::from_ref(row), Dtype::F16, n, 0, 2, false);
        assert!(same(&together.moments[i], &alone.moments[0]));
    }
    println!("ramp: {} rows alone and in a batch", rows.len());
}

fn rows_of(numbers: &[u32], there: Option<&mut Vec<u32>>, source: u32) -> Rows {
    let mut rows = Rows {
        there: 0,
        n: numbers.len() as u32,
        here: [0; INLINE_ROWS],
    };
    match there {
        Some(list) => {
            list.extend([numbers.len() as u32, source]);
            list.extend(numbers);
            rows.n = 0;
            rows.there = list.as_ptr() as u64;
        }
        None => rows.here[..numbers.len()].copy_from_slice(numbers),
    }
    rows
}

#[test]
fn fill_every_layout() {
    let _alone = alone();
    let (n_layers, n_cells) = (7usize, 40usize);
    let mut compared = 0;
    for unit in listed_cases("units") {
        for (k_units, v_units) in pairs("fill_shapes") {
            for transposed in [0u32, 1] {
                // From one thread for all layers to one for each.
                for (source, busy) in pairs("fill_spreads") {
                    for listed in [false, true] {
                        let pad = (unit * 3) as usize;
                        let k_stride = (k_units * unit) as usize + pad;
                        let v_stride = match transposed {
                            0 => (v_units * unit) as usize + pad,
                            _ => n_cells * unit as usize + pad,
                        };
                        let k_bytes = n_cells * k_stride;
                        let v_bytes = match transposed {
                            0 => n_cells * v_stride,
                            _ => v_units as usize * v_stride,
                        };
                        let make = |bytes: usize, seed: usize| -> Vec<u128> {
                            let mut rng = fastrand::Rng::with_seed(seed as u64);
                            let words = 0..bytes.div_ceil(16) + 1;
                            words.map(|_| rng.u128(..)).collect()
                        };
                        let mut memory: Vec<[Vec<u128>; 2]> = (0..n_layers)
                            .map(|l| [make(k_bytes, l), make(v_bytes, l + 100)])
                            .collect();
                        let mut want: Vec<[Vec<u8>; 2]> = memory
                            .iter()
                            .map(|m| {
                                [0, 1].map(|s| m[s].iter().flat_map(|x| x.to_ne_bytes()).collect())
                            })
                            .collect();
                        let sides: Vec<DeviceSide> = memory
                            .iter_mut()
                            .flat_map(|[k, v]| {
                                [
                                    DeviceSide {
                                        data: k.as_mut_ptr() as u64,
                                        stride: k_stride as u64,
                                    },
                                    DeviceSide {
                                        data: v.as_mut_ptr() as u64,
                                        stride: v_stride as u64,
                                    },
                                ]
                            })
                            .collect();
                        let cells = [3u32, 39, 0, 17, 18, 19];
                        let mut list = Vec::new();
                        let args = FillArgs {
                            sides: sides.as_ptr() as u64,
                            n_layers: n_layers as u32,
                            // In a list, the source is the list's.
                            source: if listed { 0 } else { source },
                            busy,
                            shape: [
                                Shape {
                                    n: k_units,
                                    unit,
                                    transposed: 0,
                                },
                                Shape {
                                    n: v_units,
                                    unit,
                                    transposed,
                                },
                            ],
                            cells: rows_of(&cells, listed.then_some(&mut list), source),
                        };
                        // Fewer threads than units, and blocks without any.
                        let grid = (2 + 9 * u32::from(listed), 1);
                        run("drex_state_copy", grid, COPY_THREADS, &args, listed);
                        for l in source as usize + 1..n_layers {
                            for &c in &cells {
                                for (s, units) in [(0, k_units), (1, v_units)] {
                                    for j in 0..units as usize {
                                        let u = unit as usize;
                                        let at = match (s, transposed) {
                                            (1, 1) => j * v_stride + c as usize * u,
                                            (1, _) => c as usize * v_stride + j * u,
                                            _ => c as usize * k_stride + j * u,
                                        };
                                        let bytes = want[source as usize][s][at..at + u].to_vec();
                                        want[l][s][at..at + u].copy_from_slice(&bytes);
                                    }
                                }
                            }
                        }
                        for (l, (got, want)) in memory.iter().zip(&want).enumerate() {
                            for s in [0, 1] {
                                let got: Vec<u8> =
                                    got[s].iter().flat_map(|x| x.to_ne_bytes()).collect();
                                assert!(
                                    got == want[s],
                                    "layer {l}, side {s}, unit {unit}, {k_units}/{v_units} units, \
                                     transposed {transposed}, source {source}, listed {listed}"
                                );
                            }
                        }
                        compared += 1;
                    }
                }
            }
        }
    }
    println!("fill: {compared} caches");
}

/// The kernel decides as the host, which makes the grid for it.
#[test]
fn fill_spreads_over_layers() {
    let args = |units: u32, targets: u32| layers_a_turn(units, targets, 1 << 17);
    // Few holes: a thread for each layer. Many: all layers to a thread.
    assert_eq!(args(1, 24), 1);
    assert_eq!(args(1 << 17, 24), 24);
    assert_eq!(args(1 << 15, 24), 6);
    assert_eq!(args(100_000, 24), 12);
    let there = fake::function::<extern "C" fn(u32, u32, u32) -> u32>("drex_layers");
    for units in [
        1, 2, 255, 256, 1000, 65_535, 131_071, 131_072, 131_073, 9_999_999,
    ] {
        for targets in 1..40 {
            for busy in [1, 1000, 1 << 17] {
                assert_eq!(
                    layers_a_turn(units, targets, busy),
                    there(units, targets, busy)
                );
            }
        }
    }
}

/// What a device would end the program for is seen on a CPU.
#[test]
fn misaligned_accesses_are_seen() {
    let _alone = alone();
    let mut memory = vec![0u128; 64];
    let base = memory.as_mut_ptr() as u64;
    for (unit, good) in [(16u32, 16u64), (8, 8), (4, 4), (2, 2)] {
        for (offset, status) in [(good, 0), (good / 2, -2)] {
            for to_arena in [0, 1] {
                let args = CopyRowsArgs {
                    arena: base + offset,
                    dense: base + 512,
                    arena_stride: 32,
                    dense_stride: 32,
                    n_units: 1,
                    unit,
                    to_arena,
                    rows: rows_of(&[1, 2], None, 0),
                };
                let got = status_of("drex_copy_rows", (1, 1), COPY_THREADS, &args, false);
                assert_eq!(got, status, "unit {unit}, offset {offset}");
            }
        }
    }
    // Rows of logits at an odd place, said to be fit for vectors.
    let mut partial = [0u8; 64];
    let mut arrived = 0u32;
    let mut out = [0u8; 32];
    let args = |logits: u64| RampArgs {
        logits,
        row_stride: 512,
        n_rows: 1,
        n_vocab: 64,
        n_chunks: 1,
        vectors: 1,
        weighted: 0,
        n_top: 0,
        partial: (partial.as_mut_ptr() as u64).next_multiple_of(4),
        partial_top: 0,
        arrived: &raw mut arrived as u64,
        out: (out.as_mut_ptr() as u64).next_multiple_of(4),
        out_top: 0,
    };
    let mut args = args;
    let (fits, does_not) = (args(base), args(base + 8));
    for (args, status) in [(fits, 0), (does_not, -2)] {
        let got = status_of("drex_ramp_f32", (1, 1), RAMP_THREADS, &args, false);
        assert_eq!(got, status);
    }
}

#[test]
fn rows_to_and_from_the_arena() {
    let _alone = alone();
    let mut compared = 0;
    for unit in listed_cases("units") {
        for n_units in listed_cases("row_units") {
            for to_arena in [0u32, 1] {
                for listed in [false, true] {
                    let row = (unit * n_units) as usize;
                    let (arena_stride, dense_stride) =
                        (row + unit as usize, row + 2 * unit as usize);
                    let slots = [6u32, 0, 3, 9];
                    let fill = |n: usize, seed: u8| -> Vec<u8> {
                        (0..n)
                            .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
                            .collect()
                    };
                    let aligned = |bytes: &[u8]| -> Vec<u128> {
                        let mut v = vec![0u128; bytes.len().div_ceil(16)];
                        // SAFETY: as long.
                        unsafe {
                            std::ptr::copy_nonoverlapping(
                                bytes.as_ptr(),
                                v.as_mut_ptr().cast(),
                                bytes.len(),
                            );
                        }
                        v
                    };
                    let (mut a, mut d) = (fill(10 * arena_stride, 1), fill(4 * dense_stride, 99));
                    let (mut am, mut dm) = (aligned(&a), aligned(&d));
                    let mut list = Vec::new();
                    let args = CopyRowsArgs {
                        arena: am.as_mut_ptr() as u64,
                        dense: dm.as_mut_ptr() as u64,
                        arena_stride: arena_stride as u64,
                        dense_stride: dense_stride as u64,
                        n_units,
                        unit,
                        to_arena,
                        rows: rows_of(&slots, listed.then_some(&mut list), 0),
                    };
                    run("drex_copy_rows", (2, 1), COPY_THREADS, &args, listed);
                    for (i, &s) in slots.iter().enumerate() {
                        let (x, y) = (s as usize * arena_stride, i * dense_stride);
                        if to_arena == 1 {
                            a[x..x + row].copy_from_slice(&d[y..y + row]);
                        } else {
                            d[y..y + row].copy_from_slice(&a[x..x + row]);
                        }
                    }
                    assert!(
                        am == aligned(&a) && dm == aligned(&d),
                        "unit {unit}, {n_units} units"
                    );
                    compared += 1;
                }
            }
        }
    }
    println!("copy rows: {compared} batches");
}
