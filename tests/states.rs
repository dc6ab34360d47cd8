// SPDX-License-Identifier: Apache-2.0

//! The header's table of states, tried: every call in every state of a real engine.

mod common;
mod headers;

use std::collections::BTreeSet;
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use common::*;

/// The states in the order of the table's columns.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    NoStep,
    ToARamp,
    ToNLayers,
    Ramped,
    Verified,
}

const STATES: [(State, &str); 5] = [
    (State::NoStep, "no step"),
    (State::ToARamp, "to a ramp"),
    (State::ToNLayers, "to n_layers"),
    (State::Ramped, "ramped"),
    (State::Verified, "verified"),
];

fn header() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/drex.h");
    std::fs::read_to_string(path).unwrap()
}

/// The cells of a line of the table: two spaces or more lie between them.
fn cells(line: &str) -> Vec<&str> {
    let line = line.trim_start_matches(" *");
    let cells = line.split("  ").map(str::trim);
    cells.filter(|c| !c.is_empty()).collect()
}

/// The table: each call, and whether it is allowed in each state.
fn table(header: &str) -> Vec<(String, [bool; 5])> {
    let names: Vec<&str> = STATES.iter().map(|s| s.1).collect();
    let mut lines = header.lines().skip_while(|l| cells(l) != names);
    assert!(lines.next().is_some(), "no line names {names:?}");
    let rows = lines.map(cells).take_while(|row| !row.is_empty());
    rows.map(|row| {
        assert_eq!(row.len(), 6, "{row:?}");
        let allowed: Vec<bool> = row[1..]
            .iter()
            .map(|&cell| {
                assert!(["yes", "-"].contains(&cell), "{row:?}");
                cell == "yes"
            })
            .collect();
        (row[0].to_owned(), allowed.try_into().unwrap())
    })
    .collect()
}

const LAYERS: u32 = 12;
const RAMP: u32 = 8;
const ROW: usize = 8;
const CELLS: u32 = 4;

/// An engine with two requests that run, and the memory that it works on.
struct Host {
    e: Engine,
    step: drex_step,
    rows: Vec<drex_row>,
    kv: Vec<u8>,
    arena: Vec<u8>,
    dense: Vec<u8>,
}

impl Host {
    fn new(fill: drex_fill_mode) -> Host {
        let mut c = config(&[RAMP], 4, 4, DREX_POLICY_HOLD);
        (c.fill, c.n_slots, c.n_top) = (fill, 8, 2);
        let e = Engine::new(&c);
        for id in [1, 2] {
            e.add(id).unwrap();
            e.ready(id, 1).unwrap();
        }
        Host {
            e,
            step: sized!(drex_step),
            rows: Vec::new(),
            kv: vec![0; LAYERS as usize * CELLS as usize * ROW],
            arena: vec![0; 8 * ROW],
            dense: vec![0; 8 * ROW],
        }
    }

    /// In a state, with K/V bound. Both rows are held at the ramp.
    fn at(state: State) -> Host {
        let mut h = Host::new(DREX_FILL_COPY);
        assert_eq!(h.bind_kv(), DREX_OK);
        if state == State::NoStep {
            return h;
        }
        h.window_to(RAMP);
        if state == State::ToARamp {
            return h;
        }
        assert_eq!(h.ramp(&[0.1, 0.1], 2), DREX_OK);
        if state == State::Ramped {
            return h;
        }
        assert_eq!(h.complete(), DREX_OK);
        h.window_to(LAYERS);
        if state == State::Verified {
            assert_eq!(h.verify(0), DREX_OK);
        }
        h
    }

    /// Plans a step, which must be one over both requests that ends here.
    fn window_to(&mut self, layer: u32) {
        assert_eq!(self.plan(0), DREX_OK);
        let own = self.rows.iter().filter(|r| r.back == 0).count();
        assert_eq!((self.step.layer_end, own), (layer, 2));
    }

    fn plan(&mut self, prompts: u32) -> drex_status {
        match self.e.plan_with(1, 4, prompts) {
            Ok(planned) => {
                (self.step, self.rows) = (planned.step, planned.rows);
                DREX_OK
            }
            Err(Failed(status)) => status,
        }
    }

    fn bind_kv(&mut self) -> drex_status {
        let mut layers = Vec::new();
        for cells in self.kv.chunks_mut(CELLS as usize * ROW) {
            let mut layer = sized!(drex_kv_layer);
            layer.n_cells = CELLS;
            layer.k = cells.as_mut_ptr().cast();
            (layer.k_row_bytes, layer.k_cell_stride) = (ROW as u64, ROW as u64);
            layers.push(layer);
        }
        // SAFETY: the tensors live as long as the engine.
        unsafe { drex_bind_kv(self.e.raw, layers.as_ptr(), LAYERS) }
    }

    fn copy(
        &mut self,
        call: unsafe extern "C" fn(*mut drex_engine, *const drex_arena) -> drex_status,
    ) -> drex_status {
        let mut a = sized!(drex_arena);
        (a.arena, a.dense) = (
            self.arena.as_mut_ptr().cast(),
            self.dense.as_mut_ptr().cast(),
        );
        let row = ROW as u64;
        (a.row_bytes, a.arena_stride_bytes, a.dense_stride_bytes) = (row, row, row);
        // SAFETY: eight rows each, as many as there are slots.
        unsafe { call(self.e.raw, &a) }
    }

    fn ramp(&mut self, confidences: &[f32], n_top: u32) -> drex_status {
        let data: Vec<[f32; VOCAB]> = confidences.iter().map(|&c| row_of(c)).collect();
        let mut l = sized!(drex_logits);
        l.data = data.as_ptr().cast();
        l.row_stride_bytes = size_of::<[f32; VOCAB]>() as u64;
        (l.n_rows, l.n_vocab, l.n_top) = (data.len() as u32, VOCAB as u32, n_top);
        let cells: Vec<u32> = (0..l.n_rows).collect();
        let mut verdicts = Vec::with_capacity(data.len());
        let out = verdicts.as_mut_ptr();
        // SAFETY: as many cells and verdicts as rows.
        unsafe { drex_ramp(self.e.raw, &l, cells.as_ptr(), out, l.n_rows) }
    }

    fn top(&self) -> drex_status {
        let (mut top, mut n) = (Vec::with_capacity(2), 0);
        // SAFETY: room for two.
        unsafe { drex_top_get(self.e.raw, 0, top.as_mut_ptr(), 2, &mut n) }
    }

    fn fill(&self) -> drex_status {
        // SAFETY: a handle.
        unsafe { drex_fill(self.e.raw) }
    }

    fn verify(&self, agrees: u8) -> drex_status {
        let n = self.rows.len().max(2);
        let agrees = vec![agrees; n];
        let mut out = Vec::with_capacity(n);
        // SAFETY: as many as rows.
        unsafe {
            drex_verify(
                self.e.raw,
                agrees.as_ptr(),
                n as u32,
                out.as_mut_ptr(),
                n as u32,
            )
        }
    }

    fn complete(&self) -> drex_status {
        let mut c = sized!(drex_completion);
        (c.now_ns, c.duration_ns) = (2, 1);
        // SAFETY: valid pointers.
        unsafe { drex_complete(self.e.raw, &c) }
    }

    fn abandon(&self) -> drex_status {
        // SAFETY: a handle.
        unsafe { drex_abandon(self.e.raw) }
    }

    /// A call of the table, with arguments that fit the step.
    fn call(&mut self, name: &str) -> drex_status {
        match name {
            "drex_plan" => self.plan(0),
            "drex_bind_kv" => self.bind_kv(),
            "drex_gather" => self.copy(drex_gather),
            "drex_scatter" => self.copy(drex_scatter),
            "drex_ramp" => self.ramp(&[0.1, 0.1], 0),
            "drex_top_get" => self.top(),
            "drex_fill" => self.fill(),
            // SAFETY: a handle.
            "drex_fill_plan" => unsafe { drex_fill_plan(self.e.raw) },
            "drex_verify" => self.verify(0),
            "drex_complete" => self.complete(),
            "drex_abandon" => self.abandon(),
            _ => panic!("{name} is in the table, and not in this test"),
        }
    }
}

#[test]
fn every_call_in_every_state() {
    let table = table(&header());
    assert!(table.len() >= 10, "{table:?}");
    for (name, allowed) in &table {
        for ((state, _), allowed) in STATES.into_iter().zip(allowed) {
            let mut h = Host::at(state);
            let status = h.call(name);
            let expect = match (allowed, name.as_str()) {
                (false, _) => DREX_ERROR_CALL_ORDER,
                // Graphs are a CUDA device's.
                (true, "drex_fill_plan") => DREX_ERROR_UNSUPPORTED,
                (true, _) => DREX_OK,
            };
            assert_eq!(status, expect, "{name}, {state:?}: {}", text());
            if !allowed {
                // The engine is where it was.
                let step = h.abandon() == DREX_OK;
                assert_eq!(step, state != State::NoStep, "{name}, {state:?}");
            }
        }
    }
}

unsafe extern "C" fn drop_text(_: *mut c_void, _: *const c_char, _: usize) {}

type Call = fn(*mut drex_engine) -> drex_status;

/// The calls that the table does not name. Request 3 is IDLE, and a trace is under
/// way.
const ANY_TIME: [(&str, Call); 17] = [
    ("drex_request_add", |e| {
        let mut c = sized!(drex_request_config);
        (c.id, c.metric, c.fill) = (9, DREX_METRIC_DEFAULT, DREX_FILL_DEFAULT);
        // SAFETY: valid pointers, here and below.
        unsafe { drex_request_add(e, &c) }
    }),
    ("drex_request_ready", |e| unsafe {
        drex_request_ready(e, 3, 0, 1)
    }),
    ("drex_request_settle", |e| unsafe {
        drex_request_settle(e, 3, 1, null_mut())
    }),
    ("drex_request_remove", |e| unsafe {
        drex_request_remove(e, 1)
    }),
    ("drex_request_get", |e| unsafe {
        drex_request_get(e, 1, &mut sized!(drex_request_info))
    }),
    ("drex_observe", |e| {
        let mut o = sized!(drex_observation);
        (o.n_rows, o.layer_end, o.duration_ns) = (1, LAYERS, 1000);
        // SAFETY: valid pointers.
        unsafe { drex_observe(e, &o) }
    }),
    ("drex_replan", |e| unsafe { drex_replan(e, 10, null_mut()) }),
    ("drex_profile_save", |e| unsafe {
        drex_profile_save(e, null_mut(), 0, &mut 0)
    }),
    ("drex_profile_load", |e| {
        let mut text = vec![0u8; 8192];
        let out = text.as_mut_ptr().cast();
        // SAFETY: as much room as is said.
        unsafe {
            ok(drex_profile_save(e, out, text.len(), &mut 0)).unwrap();
            drex_profile_load(e, out)
        }
    }),
    ("drex_stats_get", |e| unsafe {
        drex_stats_get(e, &mut sized!(drex_stats))
    }),
    ("drex_log_set", |e| unsafe {
        drex_log_set(e, None, null_mut(), DREX_LOG_OFF)
    }),
    ("drex_snapshot", |e| unsafe {
        drex_snapshot(e, null_mut(), 0, &mut 0)
    }),
    ("drex_metrics_text", |e| unsafe {
        drex_metrics_text(e, null(), null_mut(), 0, &mut 0)
    }),
    ("drex_trace_write", |e| unsafe {
        drex_trace_write(e, Some(drop_text), null_mut())
    }),
    ("drex_trace_start", |e| unsafe { drex_trace_start(e, 10) }),
    ("drex_trace_stop", |e| unsafe { drex_trace_stop(e) }),
    ("drex_destroy", |e| unsafe { drex_destroy(e) }),
];

/// Calls for a host that captures graphs, which need a CUDA device and no step.
const FOR_GRAPHS: [&str; 2] = ["drex_ramp_enqueue", "drex_fill_enqueue"];

/// Calls for a request whose answer is to be audited, see tests/agreement.rs.
const FOR_AUDITS: [&str; 1] = ["drex_request_audit"];

#[test]
fn all_other_calls_at_any_time() {
    for (state, _) in STATES {
        for (name, call) in ANY_TIME {
            let h = Host::at(state);
            h.e.add(3).unwrap();
            h.e.observe(0, LAYERS, 1, 1000).unwrap();
            // SAFETY: a handle.
            ok(unsafe { drex_trace_start(h.e.raw, 10) }).unwrap();
            let status = call(h.e.raw);
            assert_eq!(status, DREX_OK, "{name}, {state:?}: {}", text());
        }
    }
}

#[test]
fn every_call_on_an_engine_is_tried() {
    let header = header();
    let mut tried: BTreeSet<String> = table(&header).into_iter().map(|row| row.0).collect();
    tried.extend(ANY_TIME.iter().map(|c| c.0.to_owned()));
    tried.extend(
        FOR_GRAPHS
            .iter()
            .chain(&FOR_AUDITS)
            .map(|&name| name.to_owned()),
    );
    let parsed = headers::Header::parse(&header);
    let declared: BTreeSet<String> = parsed.on("drex_engine").map(str::to_owned).collect();
    assert_eq!(tried, declared);
}

/// The conditions below the table, one by one.
mod conditions {
    use super::*;

    #[test]
    fn drafts_are_verified_before_their_step_is_complete() {
        let mut h = Host::new(DREX_FILL_VERIFY);
        h.window_to(RAMP);
        assert_eq!(h.ramp(&[0.9, 0.9], 0), DREX_OK);
        assert_eq!(h.complete(), DREX_OK);
        for id in [1, 2] {
            h.e.ready(id, 1).unwrap();
        }
        h.window_to(RAMP);
        assert_eq!(h.ramp(&[0.1, 0.1], 0), DREX_OK);
        assert_eq!(h.complete(), DREX_OK);
        h.window_to(LAYERS);
        assert_eq!(h.rows.len(), 4, "a draft of each goes along");
        assert_eq!(h.complete(), DREX_ERROR_CALL_ORDER);
        assert_eq!(h.verify(1), DREX_OK);
        assert_eq!(h.complete(), DREX_OK);
    }

    #[test]
    fn holes_are_filled_before_their_step_is_complete() {
        for (bound, fill, wants_fill) in [
            (true, DREX_FILL_COPY, true),
            (true, DREX_FILL_PROPAGATE, false),
            (false, DREX_FILL_COPY, false),
        ] {
            let mut h = Host::new(fill);
            if bound {
                assert_eq!(h.bind_kv(), DREX_OK);
            }
            h.window_to(RAMP);
            assert_eq!(h.ramp(&[0.9, 0.1], 0), DREX_OK);
            if wants_fill {
                assert_eq!(h.complete(), DREX_ERROR_CALL_ORDER);
                assert_eq!(h.fill(), DREX_OK);
            }
            assert_eq!(h.complete(), DREX_OK, "{}", text());
        }
    }

    #[test]
    fn prompt_rows_alone_need_no_ramp() {
        let c = config(&[RAMP], 4, 4, DREX_POLICY_HOLD);
        let e = Engine::new(&c);
        let planned = e.plan_with(1, 4, 3).unwrap();
        let step = planned.step;
        assert_eq!((step.n_rows, step.n_prompt_rows), (0, 3));
        assert_eq!(e.complete(2, 1), Ok(()));
    }

    #[test]
    fn a_fill_wants_kv() {
        let mut h = Host::new(DREX_FILL_COPY);
        h.window_to(RAMP);
        assert_eq!(h.ramp(&[0.9, 0.1], 0), DREX_OK);
        assert_eq!(h.fill(), DREX_ERROR_CALL_ORDER);
        assert_eq!(h.call("drex_fill_plan"), DREX_ERROR_CALL_ORDER);
    }

    #[test]
    fn the_greatest_logits_are_listed_where_they_were_asked_for() {
        for (n_top, expect) in [(0, DREX_ERROR_CALL_ORDER), (2, DREX_OK)] {
            let mut h = Host::new(DREX_FILL_COPY);
            h.window_to(RAMP);
            assert_eq!(h.ramp(&[0.1, 0.1], n_top), DREX_OK);
            assert_eq!(h.top(), expect);
        }
    }

    #[test]
    fn a_request_that_is_made_ready_or_settled_is_idle() {
        for (state, _) in STATES {
            let h = Host::at(state);
            assert_eq!(h.e.ready(1, 1), Err(Failed(DREX_ERROR_CALL_ORDER)));
            // SAFETY: a handle.
            let status = unsafe { drex_request_settle(h.e.raw, 1, 1, null_mut()) };
            assert_eq!(status, DREX_ERROR_CALL_ORDER, "{state:?}");
        }
    }
}
