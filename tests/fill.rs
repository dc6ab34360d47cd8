// SPDX-License-Identifier: Apache-2.0

//! State-copy against a naive copy: every hole is filled, and nothing else is
//! touched.

mod common;

use common::*;
use proptest::prelude::*;

const GUARD: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Shape {
    k_row: usize,
    k_pad: usize,
    v_row: usize,
    v_pad: usize,
    /// Bytes of an element of transposed V; 0: row layout.
    v_elem: usize,
    cells: usize,
}

/// A cache of which every byte is known.
struct Cache {
    shape: Shape,
    k: Vec<Vec<u8>>,
    v: Vec<Vec<u8>>,
}

impl Cache {
    fn new(shape: Shape, layers: usize) -> Cache {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut noise = |n: usize| {
            let mut bytes = vec![0u8; n];
            rng.fill(&mut bytes);
            bytes
        };
        let k_bytes = shape.cells * (shape.k_row + shape.k_pad) + 2 * GUARD;
        let v_bytes = shape.cells * (shape.v_row + shape.v_pad)
            + shape.v_row / shape.v_elem.max(1) * shape.v_pad
            + 2 * GUARD;
        Cache {
            shape,
            k: (0..layers).map(|_| noise(k_bytes)).collect(),
            v: (0..layers).map(|_| noise(v_bytes)).collect(),
        }
    }

    fn elem_stride(&self) -> usize {
        self.shape.cells * self.shape.v_elem + self.shape.v_pad
    }

    fn layers(&mut self) -> Vec<drex_kv_layer> {
        let s = self.shape;
        let stride = self.elem_stride();
        self.k
            .iter_mut()
            .zip(&mut self.v)
            .map(|(k, v)| {
                let mut l = sized!(drex_kv_layer);
                l.n_cells = s.cells as u32;
                l.k = k[GUARD..].as_mut_ptr().cast();
                l.v = v[GUARD..].as_mut_ptr().cast();
                l.k_row_bytes = s.k_row as u64;
                l.k_cell_stride = (s.k_row + s.k_pad) as u64;
                l.v_row_bytes = s.v_row as u64;
                if s.v_elem == 0 {
                    l.v_cell_stride = (s.v_row + s.v_pad) as u64;
                } else {
                    l.v_elem_bytes = s.v_elem as u64;
                    l.v_elem_stride = stride as u64;
                }
                l
            })
            .collect()
    }

    /// Byte by byte, by the header's formulas.
    fn copy_naively(&mut self, source: usize, cell: usize) {
        let s = self.shape;
        let stride = self.elem_stride();
        for l in source + 1..self.k.len() {
            for b in 0..s.k_row {
                let at = GUARD + cell * (s.k_row + s.k_pad) + b;
                self.k[l][at] = self.k[source][at];
            }
            for b in 0..s.v_row {
                let offset = match s.v_elem {
                    0 => cell * (s.v_row + s.v_pad) + b,
                    elem => (b / elem) * stride + cell * elem + b % elem,
                };
                let at = GUARD + offset;
                self.v[l][at] = self.v[source][at];
            }
        }
    }
}

/// Runs requests with these confidences at ramp 0 and then at ramp 1, with
/// request i at cell `cells[i]`.
fn run(shape: Shape, confidences: &[(f32, f32)], cells: &[u32]) {
    let ramps = [2, 5];
    let n = confidences.len() as u32;
    let mut config = config(&ramps, n, n, DREX_POLICY_LATENCY);
    config.n_layers = 8;
    let engine = Engine::new(&config);
    let mut cache = Cache::new(shape, 8);
    let layers = cache.layers();
    let mut expect = Cache {
        shape,
        k: cache.k.clone(),
        v: cache.v.clone(),
    };
    // SAFETY: the cache lives as long as the engine is used.
    ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), 8) }).unwrap();
    for id in 0..n {
        engine.add(id.into()).unwrap();
        engine.ready(id.into(), 0).unwrap();
    }
    let mut filled = 0;
    let mut bytes = 0;
    for (ramp, layer) in [2usize, 5].into_iter().enumerate() {
        let plan = engine.plan(1, n).unwrap();
        if plan.rows.is_empty() {
            break;
        }
        assert_eq!(plan.step.layer_end as usize, layer);
        let of = |id: u64| {
            let (a, b) = confidences[id as usize];
            if ramp == 0 { a } else { b }
        };
        let here: Vec<f32> = plan.ids().iter().map(|&id| of(id)).collect();
        let at: Vec<u32> = plan.ids().iter().map(|&id| cells[id as usize]).collect();
        let verdicts = engine.ramp_at(&here, at.as_ptr()).unwrap();
        for (v, &cell) in verdicts.iter().zip(&at) {
            if v.decision == DREX_DECISION_EXIT {
                expect.copy_naively(layer - 1, cell as usize);
                filled += 1;
                bytes += ((shape.k_row + shape.v_row) * (8 - layer)) as u64;
            }
        }
        engine.fill().unwrap();
        engine.fill().unwrap();
        engine.complete(2, 0).unwrap();
    }
    assert!(cache.k == expect.k, "K: {shape:?}");
    assert!(cache.v == expect.v, "V: {shape:?}");
    assert_eq!(engine.stats().cells_filled, filled);
    assert_eq!(engine.stats().bytes_filled, bytes);
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    // f32 and f16 rows, blocks of 34 bytes per 32 elements, odd sizes
    for (k_row, v_row) in [(256, 256), (128, 64), (34 * 4, 34 * 2), (33, 7), (16, 0)] {
        for pad in [0, 13] {
            shapes.push(Shape {
                k_row,
                k_pad: pad,
                v_row,
                v_pad: pad,
                v_elem: 0,
                cells: 20,
            });
        }
    }
    for v_elem in [1, 2, 4, 8, 3] {
        for pad in [0, 7] {
            shapes.push(Shape {
                k_row: 34,
                k_pad: pad,
                v_row: 32 * v_elem,
                v_pad: pad,
                v_elem,
                cells: 20,
            });
        }
    }
    shapes
}

#[test]
fn every_layout() {
    let rows = [(0.9, 0.0), (0.1, 0.9), (0.1, 0.1), (0.8, 0.9), (0.2, 0.7)];
    for shape in shapes() {
        run(shape, &rows, &[0, 7, 3, 19, 12]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn any_rows(
        shape in prop::sample::select(shapes()),
        rows in prop::collection::vec((0.01f32..1.0, 0.01f32..1.0), 1..12),
        cells in Just((0..20u32).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        run(shape, &rows, &cells);
    }
}

fn bind(change: impl FnOnce(&mut Vec<drex_kv_layer>)) -> Result<(), Failed> {
    let ramps = [3];
    let mut config = config(&ramps, 2, 2, DREX_POLICY_HOLD);
    config.n_layers = 6;
    let engine = Engine::new(&config);
    let shape = Shape {
        k_row: 32,
        k_pad: 0,
        v_row: 32,
        v_pad: 0,
        v_elem: 0,
        cells: 4,
    };
    let mut cache = Cache::new(shape, 6);
    let mut layers = cache.layers();
    change(&mut layers);
    // SAFETY: the layers are valid; nothing is filled.
    ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), layers.len() as u32) })
}

fn refused(status: drex_status, names: &[&str], change: impl FnOnce(&mut Vec<drex_kv_layer>)) {
    assert_eq!(bind(change), Err(Failed(status)));
    let text = text();
    for name in names {
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn binding_checks_the_layers_in_use() {
    bind(|_| {}).unwrap();
    // Layers 0 and 1 are never copied from.
    bind(|l| {
        l[0].k = std::ptr::null_mut();
        l[1].k_row_bytes = 77;
    })
    .unwrap();
    let unsupported = DREX_ERROR_UNSUPPORTED;
    refused(
        unsupported,
        &["layers[4].k_row_bytes is 16", "layers[2]", "32"],
        |l| {
            l[4].k_row_bytes = 16;
        },
    );
    refused(unsupported, &["layers[5].v_row_bytes is 8"], |l| {
        l[5].v_row_bytes = 8;
    });
    refused(unsupported, &["layers[3].v_elem_bytes is 2"], |l| {
        l[3].v_elem_bytes = 2;
        l[3].v_elem_stride = 8;
    });
    refused(
        unsupported,
        &["layers[5].k is 0x", "layers[4].k is 0x", "share"],
        |l| {
            l[5].k = l[4].k;
        },
    );
    let invalid = DREX_ERROR_INVALID_ARGUMENT;
    refused(invalid, &["drex_bind_kv: layers[2].k is NULL"], |l| {
        l[2].k = std::ptr::null_mut();
    });
    refused(invalid, &["layers[3].k_cell_stride is 31"], |l| {
        l[3].k_cell_stride = 31;
    });
    refused(invalid, &["layers[2].v_elem_stride is 7"], |l| {
        l[2].v_elem_bytes = 2;
        l[2].v_elem_stride = 7;
    });
    refused(
        invalid,
        &["layers[2].v_row_bytes is 32", "layers[2].v_elem_bytes is 5"],
        |l| {
            l[2].v_elem_bytes = 5;
        },
    );
    refused(invalid, &["layers[5].n_cells is 0"], |l| l[5].n_cells = 0);
    refused(invalid, &["layers[2].k_cell_stride"], |l| {
        l[2].k_cell_stride = u64::MAX / 2
    });
    refused(invalid, &["n_layers is 5"], |l| {
        l.pop();
    });
    let size = DREX_ERROR_STRUCT_SIZE;
    refused(size, &["layers[0].size is 8"], |l| l[0].size = 8);
    refused(size, &["layers[4].size is 0"], |l| l[4].size = 0);
    refused(size, &["layers[3].size is 5000"], |l| l[3].size = 5000);
}

#[test]
fn order_of_calls() {
    let ramps = [1];
    let mut config = config(&ramps, 2, 2, DREX_POLICY_HOLD);
    config.n_layers = 2;
    let engine = Engine::new(&config);
    let order = Err(Failed(DREX_ERROR_CALL_ORDER));
    assert_eq!(engine.fill(), order);
    let shape = Shape {
        k_row: 4,
        k_pad: 0,
        v_row: 4,
        v_pad: 0,
        v_elem: 0,
        cells: 3,
    };
    let mut cache = Cache::new(shape, 2);
    let layers = cache.layers();
    // SAFETY: the cache outlives the engine's use of it.
    let bind = || ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), 2) });
    bind().unwrap();
    assert_eq!(engine.fill(), order);
    engine.add(1).unwrap();
    engine.ready(1, 0).unwrap();
    assert_eq!(engine.plan(0, 2).unwrap().ids(), [1]);
    assert_eq!(bind(), order);
    assert_eq!(engine.fill(), order);
    // No cells, and a cell that is not there: nothing has happened yet.
    let missing = engine.ramp(&[0.9]).unwrap_err();
    assert_eq!(missing, Failed(DREX_ERROR_CALL_ORDER));
    let beyond = engine.ramp_at(&[0.9], [3].as_ptr()).unwrap_err();
    assert_eq!(beyond, Failed(DREX_ERROR_INVALID_ARGUMENT));
    assert!(text().contains("cells[0] is 3"), "{}", text());
    assert_eq!(engine.stats().tokens, 0);
    let verdicts = engine.ramp_at(&[0.9], [2].as_ptr()).unwrap();
    assert_eq!(verdicts[0].decision, DREX_DECISION_EXIT);
    // A forgotten fill is found.
    assert_eq!(engine.complete(1, 0), order);
    engine.fill().unwrap();
    engine.complete(1, 0).unwrap();
    assert_eq!(engine.fill(), order);
    // Nobody exited: nothing to fill.
    engine.ready(1, 2).unwrap();
    engine.plan(2, 2).unwrap();
    engine.ramp_at(&[0.1], [2].as_ptr()).unwrap();
    engine.complete(3, 0).unwrap();
    // SAFETY: unbinds.
    ok(unsafe { drex_bind_kv(engine.raw, std::ptr::null(), 0) }).unwrap();
    assert_eq!(engine.fill(), order);
}

#[test]
fn a_request_removed_after_its_exit_is_not_filled() {
    let ramps = [1];
    let mut config = config(&ramps, 2, 2, DREX_POLICY_HOLD);
    config.n_layers = 2;
    let engine = Engine::new(&config);
    let shape = Shape {
        k_row: 4,
        k_pad: 0,
        v_row: 4,
        v_pad: 0,
        v_elem: 0,
        cells: 3,
    };
    let mut cache = Cache::new(shape, 2);
    let layers = cache.layers();
    // SAFETY: the cache outlives the engine's use of it.
    ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), 2) }).unwrap();
    engine.add(1).unwrap();
    engine.ready(1, 0).unwrap();
    engine.plan(0, 2).unwrap();
    engine.ramp_at(&[0.9], [1].as_ptr()).unwrap();
    engine.remove(1).unwrap();
    let before = cache.k.clone();
    engine.fill().unwrap();
    engine.complete(1, 0).unwrap();
    assert!(cache.k == before);
    assert_eq!(engine.stats().cells_filled, 0);
    assert_eq!(engine.stats().slots_free, 2);
}
