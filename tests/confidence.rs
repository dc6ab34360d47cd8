// SPDX-License-Identifier: Apache-2.0

//! Scores of logits rows against a reference in f64, in every instruction set
//! that this machine has.

use drex::core::metric::Score;
use drex::device::host::Host;
use drex::device::host::ramp::{Isa, score};
use drex::device::{Device, Dtype, Limits, Logits};
use proptest::prelude::*;

#[path = "common/rows.rs"]
mod rows;

use rows::*;

fn check(row: &[f32], what: &str) {
    for dtype in DTYPES {
        let values = rounded(row, dtype);
        let stored = bytes(row, dtype);
        for offset in [0usize, 1] {
            let mut memory = vec![0xffu8; stored.len() + offset];
            memory[offset..].copy_from_slice(&stored);
            for metric in METRICS {
                let (c, token) = reference(&values, metric);
                for &isa in Isa::available() {
                    // SAFETY: the row lies in `memory`.
                    let got = unsafe {
                        score(isa, memory.as_ptr().add(offset), row.len(), dtype, metric)
                    };
                    let at = format!("{what}: {isa:?} {dtype:?} {metric:?} n={}", row.len());
                    assert_eq!(got.token, token, "{at}");
                    if c.is_nan() {
                        assert!(got.confidence.is_nan(), "{at}: {}", got.confidence);
                    } else {
                        let diff = (f64::from(got.confidence) - c).abs();
                        assert!(diff < 2e-6, "{at}: {} is not {c}", got.confidence);
                        assert!((0.0..=1.0).contains(&got.confidence), "{at}");
                    }
                }
            }
        }
    }
}

#[test]
fn random_rows_of_every_length() {
    for n in (1..70).chain([127, 4095, 4096, 4097, 8191]) {
        for scale in [0.0, 1.0, 30.0] {
            check(&noise(n, n as u64, scale), "random");
        }
    }
}

#[test]
fn the_longest_vocabularies() {
    check(&noise(300_000, 3, 20.0), "random");
    check(&noise(49_152, 4, 5.0), "random");
}

#[test]
fn ties_go_to_the_lowest_index() {
    for n in [2usize, 16, 17, 33, 5000, 9000] {
        for (i, j) in [(0, n - 1), (n / 2, n - 1), (n - 2, n - 1), (0, 1)] {
            let mut row = noise(n, 5, 1.0);
            row[i] = 3.0;
            row[j] = 3.0;
            check(&row, "tie");
        }
        check(&vec![-4.25; n], "all equal");
        // ties one lane apart and one vector apart
        for d in [1, 16, 32] {
            if d < n {
                let mut row = vec![0.0; n];
                row[n - 1] = 7.0;
                row[n - 1 - d] = 7.0;
                check(&row, "tie");
            }
        }
    }
}

#[test]
fn one_hot_and_huge() {
    for n in [1usize, 2, 15, 16, 17, 4097] {
        for at in [0, n / 2, n - 1] {
            for hot in [1.0f32, 80.0, 1000.0, 60000.0, 1e30, f32::MAX] {
                let mut row = vec![0.0; n];
                row[at] = hot;
                check(&row, "one hot");
                let row: Vec<f32> = row.iter().map(|x| x - hot / 2.0).collect();
                check(&row, "shifted");
            }
            let mut row = vec![-f32::MAX; n];
            row[at] = f32::MAX;
            check(&row, "the whole range");
            check(&vec![-f32::MAX; n], "lowest");
        }
    }
}

#[test]
fn masks_are_fine_and_a_row_of_masks_is_not() {
    for n in [1usize, 2, 16, 31, 4100] {
        check(&vec![f32::NEG_INFINITY; n], "all masked");
        for keep in [0, n / 2, n - 1] {
            let mut row = vec![f32::NEG_INFINITY; n];
            row[keep] = -3.0;
            check(&row, "one left");
            row[0] = -3.5;
            check(&row, "two left");
        }
        let mut row = noise(n, 9, 8.0);
        for x in row.iter_mut().step_by(3) {
            *x = f32::NEG_INFINITY;
        }
        check(&row, "every third masked");
    }
}

#[test]
fn nan_and_infinity_anywhere() {
    for n in [1usize, 2, 15, 16, 17, 100, 4096, 4099, 8200] {
        let places = [0, 1, n / 3, n / 2, n.saturating_sub(2), n - 1];
        for at in places {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let mut row = noise(n, 11, 8.0);
                row[at.min(n - 1)] = bad;
                check(&row, "bad");
                let mut row = vec![f32::NEG_INFINITY; n];
                row[at.min(n - 1)] = bad;
                check(&row, "bad among masks");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_row(row in prop::collection::vec(
        prop_oneof![
            8 => -50.0f32..50.0,
            1 => Just(f32::NEG_INFINITY),
            1 => prop::num::f32::ANY,
        ],
        1..200,
    )) {
        check(&row, "any");
    }

    /// A row's score does not depend on its neighbours, the stride, or its
    /// place.
    #[test]
    fn rows_are_independent(
        rows in prop::collection::vec((0u64..1000, 0.1f32..40.0), 1..8),
        n in 1usize..600,
        gap in 0usize..40,
        dtype in 0usize..3,
    ) {
        let dtype = DTYPES[dtype];
        let stride = n * dtype.bytes() + gap;
        let mut memory = vec![0xffu8; stride * rows.len()];
        for (i, &(seed, scale)) in rows.iter().enumerate() {
            let row = bytes(&noise(n, seed, scale), dtype);
            memory[i * stride..][..row.len()].copy_from_slice(&row);
        }
        let mut host = Host::new(Limits::default()).unwrap();
        let mut run = |data: *const u8, count: usize| {
            let logits = Logits {
                data,
                dtype,
                row_stride: stride,
                n_vocab: n,
                stream: std::ptr::null_mut(),
        n_top: 0,
        enqueued: false,
        token_ids: std::ptr::null(),
        calibration: None,
            };
            let metrics: Vec<_> = (0..count).map(|i| Some(METRICS[i % 3])).collect();
            let mut out = vec![Score::NONE; count];
            // SAFETY: the rows lie in `memory`.
            unsafe { host.score(&logits, &metrics, &mut out) }.unwrap();
            out
        };
        let together = run(memory.as_ptr(), rows.len());
        for (i, &(seed, scale)) in rows.iter().enumerate() {
            let alone = bytes(&noise(n, seed, scale), dtype);
            // SAFETY: the row lies in `alone`.
            let got = unsafe { score(host_isa(), alone.as_ptr(), n, dtype, METRICS[i % 3]) };
            prop_assert_eq!(got.confidence.to_bits(), together[i].confidence.to_bits());
            prop_assert_eq!(got.token, together[i].token);
        }
    }
}

fn host_isa() -> Isa {
    Host::new(Limits::default()).unwrap().isa()
}

#[test]
fn rows_left_out_are_not_read() {
    let logits = Logits {
        data: std::ptr::null(),
        dtype: Dtype::F32,
        row_stride: 4,
        n_vocab: 1,
        stream: std::ptr::null_mut(),
        n_top: 0,
        enqueued: false,
        token_ids: std::ptr::null(),
        calibration: None,
    };
    let mut out = [Score::NONE; 3];
    // SAFETY: no row is scored.
    unsafe {
        Host::new(Limits::default())
            .unwrap()
            .score(&logits, &[None; 3], &mut out)
    }
    .unwrap();
    assert!(out.iter().all(|s| s.confidence.is_nan() && s.token == -1));
}
