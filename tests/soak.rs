// SPDX-License-Identifier: Apache-2.0

//! Requests by the thousand through one engine, of every fill and priority, with deadlines, some cancelled wherever they
//! are: what the host counted is what the engine counted, and in the end everything is as it was at the start.
//! `DREX_SOAK` is the number of requests; the default is the short form.

mod common;

use std::collections::BTreeMap;

use common::*;

const PLACES: usize = 48;
const RAMPS: [u32; 2] = [4, 8];
const LAYERS: u32 = 12;
const CELLS: u32 = 64;

struct Alive {
    left: u32,
    fill: drex_fill_mode,
    idle: bool,
    /// Tokens that were emitted and may still turn out to be void.
    drafts: u32,
}

struct Host {
    engine: Engine,
    rng: fastrand::Rng,
    alive: BTreeMap<u64, Alive>,
    next: u64,
    now: u64,
    tokens: u64,
    done: u64,
    cancelled: u64,
}

impl Host {
    fn add(&mut self) {
        let fill = self.rng.u32(DREX_FILL_COPY..=DREX_FILL_PROPAGATE);
        let (priority, deadline) = (self.rng.i32(-1..=1), self.rng.u64(0..3) * 40_000);
        let added = self.engine.add_with(self.next, |c| {
            c.fill = fill;
            c.priority = priority;
            c.token_deadline_ns = deadline;
        });
        added.unwrap_or_else(|e| panic!("{e:?}: {}", text()));
        let alive = Alive {
            left: self.rng.u32(1..24),
            fill,
            idle: true,
            drafts: 0,
        };
        self.alive.insert(self.next, alive);
        self.next += 1;
    }

    /// Idle requests go on, settle or end; a few of any state are cancelled.
    fn between(&mut self) {
        let ids: Vec<u64> = self.alive.keys().copied().collect();
        for id in ids {
            let cancel = self.rng.u32(0..400) == 0;
            let r = self.alive.get_mut(&id).unwrap();
            if cancel {
                self.cancelled += 1;
            } else if !r.idle {
                continue;
            } else if r.left > 0 {
                self.engine.ready(id, self.now).unwrap();
                r.idle = false;
                continue;
            } else if r.fill == DREX_FILL_VERIFY && r.drafts > 0 {
                let mut pending = 0;
                // SAFETY: valid pointers.
                ok(unsafe { drex_request_settle(self.engine.raw, id, self.now, &mut pending) })
                    .unwrap();
                assert!(pending > 0, "drafts without a pending row");
                r.idle = false;
                continue;
            } else {
                self.done += 1;
            }
            self.engine.remove(id).unwrap();
            self.alive.remove(&id);
        }
    }

    fn window(&mut self) {
        self.now += 1000;
        let prompts = if self.rng.u32(0..8) == 0 {
            self.rng.u32(1..30)
        } else {
            0
        };
        let plan = self.engine.plan_with(self.now, 32, prompts).unwrap();
        if plan.rows.is_empty() && plan.step.n_prompt_rows == 0 {
            return;
        }
        match self.rng.u32(0..200) {
            0 => return self.engine.abandon().unwrap(),
            _ if plan.rows.is_empty() => {}
            _ if plan.step.ramp != DREX_NO_RAMP => self.ramp(&plan),
            _ => self.last(&plan),
        }
        let duration = self.rng.u64(200..900);
        self.engine.complete(self.now + duration, duration).unwrap();
        // A request that settled, or whose drafts were judged, is idle again.
        for id in plan.ids() {
            if let Some(r) = self.alive.get_mut(&id) {
                r.idle = self.engine.info(id).unwrap().state == DREX_REQUEST_IDLE;
            }
        }
    }

    fn ramp(&mut self, plan: &Planned) {
        let confidences: Vec<f32> = plan
            .rows
            .iter()
            .map(|_| [0.1, 0.4, 0.6, 0.9][self.rng.usize(0..4)])
            .collect();
        let cells: Vec<u32> = plan.rows.iter().map(|_| self.rng.u32(0..CELLS)).collect();
        let verdicts = self.engine.ramp_at(&confidences, cells.as_ptr()).unwrap();
        self.engine.fill().unwrap();
        for ((row, verdict), confidence) in plan.rows.iter().zip(verdicts).zip(confidences) {
            assert!(verdict.decision != DREX_DECISION_EXIT || confidence >= 0.5);
            if verdict.decision == DREX_DECISION_EXIT {
                self.emitted(row.request);
                let r = self.alive.get_mut(&row.request).unwrap();
                // A draft is counted once the full model has said what it thinks of it.
                if r.fill == DREX_FILL_VERIFY {
                    r.drafts += 1;
                    self.tokens -= 1;
                }
            }
        }
    }

    fn emitted(&mut self, id: u64) {
        let r = self.alive.get_mut(&id).unwrap();
        assert!(!r.idle && r.left > 0);
        r.left -= 1;
        r.idle = true;
        self.tokens += 1;
    }

    fn last(&mut self, plan: &Planned) {
        let agrees: Vec<u8> = plan
            .rows
            .iter()
            .map(|_| u8::from(self.rng.u32(0..5) > 0))
            .collect();
        let mut out = vec![u32::MAX; plan.rows.len()];
        let n = out.len() as u32;
        // SAFETY: a verdict a row.
        ok(unsafe { drex_verify(self.engine.raw, agrees.as_ptr(), n, out.as_mut_ptr(), n) })
            .unwrap();
        for (row, decision) in plan.rows.iter().zip(out) {
            let r = self.alive.get_mut(&row.request).unwrap();
            match decision {
                DREX_DECISION_EXIT => self.emitted(row.request),
                DREX_DECISION_ACCEPT => {
                    r.drafts -= 1;
                    self.tokens += 1;
                }
                DREX_DECISION_REPLACE => {
                    // The draft is another token; those behind it never were.
                    r.left += r.drafts - 1;
                    r.drafts = 0;
                    self.tokens += 1;
                }
                DREX_DECISION_DROP | DREX_DECISION_PENDING => {}
                other => panic!("decision {other}"),
            }
        }
    }
}

#[test]
fn many_requests_leave_nothing_behind() {
    let n: u64 = std::env::var("DREX_SOAK").map_or(20_000, |n| n.parse().expect("DREX_SOAK"));
    for policy in [
        DREX_POLICY_HOLD,
        DREX_POLICY_LATENCY,
        DREX_POLICY_ART,
        DREX_POLICY_AUTO,
    ] {
        let mut c = config(&RAMPS, PLACES as u32, 32, policy);
        c.n_layers = LAYERS;
        c.n_slots = 2 * PLACES as u32;
        c.max_pass_rows = 48;
        let mut memory = vec![[0u8; 16 * CELLS as usize]; 2 * LAYERS as usize];
        let layers: Vec<drex_kv_layer> = memory
            .chunks_mut(2)
            .map(|kv| {
                let mut l = sized!(drex_kv_layer);
                l.n_cells = CELLS;
                (l.k, l.v) = (kv[0].as_mut_ptr().cast(), kv[1].as_mut_ptr().cast());
                (l.k_row_bytes, l.k_cell_stride) = (16, 16);
                (l.v_row_bytes, l.v_cell_stride) = (16, 16);
                l
            })
            .collect();
        let engine = Engine::new(&c);
        // SAFETY: the tensors outlive the engine's use of them.
        ok(unsafe { drex_bind_kv(engine.raw, layers.as_ptr(), LAYERS) }).unwrap();
        let before = engine.stats();
        let mut host = Host {
            engine,
            rng: fastrand::Rng::with_seed(policy.into()),
            alive: BTreeMap::new(),
            next: 0,
            now: 0,
            tokens: 0,
            done: 0,
            cancelled: 0,
        };
        let limit = 200 * n + 10_000;
        for window in 0.. {
            while host.next < n && host.alive.len() < PLACES {
                host.add();
            }
            if host.alive.is_empty() {
                break;
            }
            host.between();
            host.window();
            assert!(
                window < limit,
                "{policy}: {} requests are stuck",
                host.alive.len()
            );
        }
        let s = host.engine.stats();
        assert_eq!(host.done + host.cancelled, n);
        assert!(host.done > n / 2 && (n < 1000 || host.cancelled > 0));
        assert_eq!(s.tokens, host.tokens, "{policy}");
        assert!(s.drafts > s.drafts_accepted && s.drafts_accepted > 0);
        assert_eq!(s.involuntary_exits, 0);
        assert_eq!((s.requests, s.held_rows, s.pending_rows), (0, 0, 0));
        assert_eq!(s.slots_free, before.slots_free);
    }
}
