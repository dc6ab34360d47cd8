// SPDX-License-Identifier: Apache-2.0

//! What a whole step costs a host through the C ABI: plan, ramp, fill, ready and
//! complete, in both orders of ready and complete. One line of JSON on stdout.

use std::ffi::c_void;
use std::ptr;
use std::time::Duration;

#[path = "../tests/common/mod.rs"]
mod common;
use common::*;

/// Logits of a row: few, so that the scores are the least part of a step.
const VOCAB: usize = 4;
const LAYERS: u32 = 4;
const KV_BYTES: usize = 16;
const SIZES: [(u32, u32); 2] = [(256, 512), (4096, 8192)];
const STEPS_A_RUN: u32 = 16;
const WARM_UP: usize = 4;

/// What a case has on top of rows that exit or are held.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    deadlines: bool,
    priorities: bool,
    /// Exited rows stay pending.
    pending: bool,
    /// Each step is planned, given up, and planned again.
    abandon: bool,
}

const PLAIN: Case = Case {
    name: "plain",
    deadlines: false,
    priorities: false,
    pending: false,
    abandon: false,
};

const CASES: [Case; 8] = [
    PLAIN,
    Case {
        name: "deadlines",
        deadlines: true,
        ..PLAIN
    },
    Case {
        name: "priorities",
        priorities: true,
        ..PLAIN
    },
    Case {
        name: "pending",
        pending: true,
        ..PLAIN
    },
    Case {
        name: "pending_deadlines",
        pending: true,
        deadlines: true,
        ..PLAIN
    },
    Case {
        name: "abandon",
        abandon: true,
        ..PLAIN
    },
    Case {
        name: "abandon_deadlines",
        abandon: true,
        deadlines: true,
        ..PLAIN
    },
    Case {
        name: "abandon_priorities",
        abandon: true,
        priorities: true,
        ..PLAIN
    },
];

struct Host {
    engine: Engine,
    batch: u32,
    case: Case,
    ready_first: bool,
    now: u64,
    rng: fastrand::Rng,
    logits: Vec<[f32; VOCAB]>,
    rows: Vec<drex_row>,
    verdicts: Vec<drex_verdict>,
    cells: Vec<u32>,
    done: Vec<u64>,
    _kv: Vec<Vec<u8>>,
}

impl Host {
    fn new(batch: u32, requests: u32, case: Case, ready_first: bool) -> Host {
        let ramp = LAYERS / 2;
        let mut c = sized!(drex_config);
        c.abi_version = DREX_ABI_VERSION;
        (c.n_layers, c.n_ramps, c.ramp_layers) = (LAYERS, 1, &ramp);
        (c.max_requests, c.max_batch) = (requests, batch);
        c.n_slots = if case.pending { 8 * requests } else { requests };
        c.fill = if case.pending {
            DREX_FILL_POSTFILL
        } else {
            DREX_FILL_COPY
        };
        (c.policy, c.metric) = (DREX_POLICY_HOLD, DREX_METRIC_MAXPROB);
        (c.threshold, c.art_ratio) = (0.5, f32::NAN);
        c.flush_rows = batch;
        c.max_hold_ns = u64::MAX;
        if case.deadlines {
            c.token_deadline_ns = 1_000_000_000;
        }
        let engine = Engine::new(&c);
        let cells = requests;
        let mut kv: Vec<Vec<u8>> = Vec::new();
        let mut layers = Vec::new();
        for _ in 0..LAYERS {
            let mut l = sized!(drex_kv_layer);
            l.n_cells = cells;
            for side in [&mut l.k, &mut l.v] {
                kv.push(vec![0; cells as usize * KV_BYTES]);
                let data = kv.last_mut().map_or(ptr::null_mut(), |d| d.as_mut_ptr());
                *side = data.cast();
            }
            (l.k_row_bytes, l.k_cell_stride) = (KV_BYTES as u64, KV_BYTES as u64);
            (l.v_row_bytes, l.v_cell_stride) = (KV_BYTES as u64, KV_BYTES as u64);
            layers.push(l);
        }
        // SAFETY: the tensors live as long as the engine.
        ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), LAYERS) }).unwrap();
        let mut host = Host {
            engine,
            batch,
            case,
            ready_first,
            now: 1,
            rng: fastrand::Rng::with_seed(1),
            logits: vec![[0.0; VOCAB]; batch as usize],
            rows: Vec::with_capacity(batch as usize),
            verdicts: Vec::with_capacity(batch as usize),
            cells: vec![0; batch as usize],
            done: Vec::with_capacity(batch as usize),
            _kv: kv,
        };
        for id in 0..u64::from(requests) {
            let priority = if case.priorities {
                host.rng.i32(..8)
            } else {
                0
            };
            host.engine.add_with(id, |r| r.priority = priority).unwrap();
            host.engine.ready(id, 0).unwrap();
        }
        host
    }

    fn plan(&mut self) -> drex_step {
        let mut input = sized!(drex_plan_input);
        input.now_ns = self.now;
        let mut step = sized!(drex_step);
        // SAFETY: room for `batch` rows, of which as many are written as it says.
        unsafe {
            let rows = self.rows.as_mut_ptr();
            let raw = self.engine.raw;
            ok(drex_plan(raw, &input, rows, self.batch, &mut step)).unwrap();
            self.rows.set_len(step.n_rows as usize);
        }
        step
    }

    fn ramp(&mut self) {
        let mut l = sized!(drex_logits);
        l.data = self.logits.as_ptr().cast::<c_void>();
        l.row_stride_bytes = size_of::<[f32; VOCAB]>() as u64;
        (l.n_rows, l.n_vocab) = (self.rows.len() as u32, VOCAB as u32);
        // SAFETY: as many rows, cells and verdicts as the step has.
        unsafe {
            let (cells, out) = (self.cells.as_ptr(), self.verdicts.as_mut_ptr());
            ok(drex_ramp(self.engine.raw, &l, cells, out, self.batch)).unwrap();
            self.verdicts.set_len(self.rows.len());
        }
        self.engine.fill().unwrap();
    }

    fn ready(&self) {
        for &id in &self.done {
            self.engine.ready(id, self.now).unwrap();
        }
    }

    fn complete(&self) {
        self.engine.complete(self.now, 900).unwrap();
    }

    /// Runs a step. Its rows, and the time within drex.
    fn step(&mut self) -> (u32, Duration) {
        let mut spent = Duration::ZERO;
        self.now += 1000;
        let begin = cpu_time();
        if self.case.abandon {
            self.plan();
            self.engine.abandon().unwrap();
        }
        let step = self.plan();
        spent += cpu_time() - begin;
        let ramp = step.ramp != DREX_NO_RAMP;
        for i in 0..self.rows.len() {
            // Three of four are confident.
            self.logits[i][1] = if self.rng.u8(..4) > 0 { 20.0 } else { 0.0 };
            self.cells[i] = self.rows[i].request as u32;
        }
        let begin = cpu_time();
        if ramp {
            self.ramp();
        }
        spent += cpu_time() - begin;
        self.done.clear();
        for (i, row) in self.rows.iter().enumerate() {
            let out = !ramp || self.verdicts[i].decision == DREX_DECISION_EXIT;
            if row.back == 0 && out {
                self.done.push(row.request);
            }
        }
        self.now += 1000;
        let begin = cpu_time();
        // A row of the last layer is not idle before its step is complete.
        if self.ready_first && ramp {
            self.ready();
            self.complete();
        } else {
            self.complete();
            self.ready();
        }
        spent += cpu_time() - begin;
        (step.n_rows, spent)
    }
}

/// Lowest tenth of short runs, mean us of a step with a full batch: a run that
/// another process interrupts does not count.
fn measure(batch: u32, requests: u32, case: Case, ready_first: bool) -> f64 {
    const RUNS: usize = 60;
    let mut host = Host::new(batch, requests, case, ready_first);
    let mut means = Vec::new();
    while means.len() < WARM_UP + RUNS {
        let (mut rows, mut spent) = (0, Duration::ZERO);
        while rows < STEPS_A_RUN * batch {
            let (n, time) = host.step();
            if n * 10 >= batch * 9 {
                rows += n;
                spent += time;
            }
        }
        means.push(spent.as_secs_f64() * 1e6 * f64::from(batch) / f64::from(rows));
    }
    let means = &mut means[WARM_UP..];
    means.sort_unstable_by(f64::total_cmp);
    means[RUNS / 10]
}

/// Arguments: of the cases, those whose names contain one of them.
fn main() {
    let names: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let mut worst = 0.0f64;
    let mut parts = Vec::new();
    for ready_first in [true, false] {
        let order = ["complete_first", "ready_first"][usize::from(ready_first)];
        for case in CASES {
            let name = format!("{order}_{}", case.name);
            if !names.is_empty() && !names.iter().any(|n| name.contains(n.as_str())) {
                continue;
            }
            let us = SIZES.map(|(rows, of)| measure(rows, of, case, ready_first));
            let linear = f64::from(SIZES[1].0) / f64::from(SIZES[0].0);
            worst = worst.max(us[1] / us[0] / linear);
            for ((rows, of), us) in SIZES.iter().zip(us) {
                parts.push(format!("\"{name}_{rows}_of_{of}\":{us:.2}"));
            }
        }
    }
    println!(
        "{{\"step_us\":{{{}}},\"worst_ratio_to_linear\":{worst:.2}}}",
        parts.join(",")
    );
}
