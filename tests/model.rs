// SPDX-License-Identifier: Apache-2.0

//! The engine against a simple model, under random sequences of calls.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use proptest::prelude::*;

const CONFIDENCES: [f32; 6] = [0.05, 0.3, 0.45, 0.55, 0.8, f32::NAN];
const THRESHOLDS: [f32; 4] = [f32::NAN, 0.4, 0.9, 1.5];

#[derive(Debug, Clone)]
enum Op {
    Add {
        id: u64,
        threshold: usize,
        priority: i32,
    },
    Ready(u64),
    Remove(u64),
    Step {
        /// Index into CONFIDENCES per row.
        confidences: Vec<usize>,
        /// 0: complete; 1: abandon before the ramp; 2: abandon after it.
        end: u8,
        /// Remove this row of the step before or after the ramp.
        remove: Option<(usize, bool)>,
        /// Make exited requests ready before complete.
        eager_ready: bool,
        capacity: u32,
        /// Prompt rows that wait.
        prompts: u32,
    },
    Time(u64),
}

fn op(n: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (0..n, 0..THRESHOLDS.len(), -2..3i32)
            .prop_map(|(id, threshold, priority)| Op::Add { id, threshold, priority }),
        4 => (0..n).prop_map(Op::Ready),
        1 => (0..n).prop_map(Op::Remove),
        6 => (
            prop::collection::vec(0..CONFIDENCES.len(), 8),
            prop_oneof![8 => Just(0u8), 1 => Just(1u8), 1 => Just(2u8)],
            prop::option::weighted(0.1, (0usize..8, any::<bool>())),
            any::<bool>(),
            1u32..10,
            prop_oneof![2 => Just(0u32), 1 => 1u32..20],
        )
            .prop_map(|(confidences, end, remove, eager_ready, capacity, prompts)| Op::Step {
                confidences,
                end,
                remove,
                eager_ready,
                capacity,
                prompts,
            }),
        1 => (0u64..5000).prop_map(Op::Time),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Idle,
    Ready,
    Held(usize),
    Stay(usize),
    Step,
}

#[derive(Debug, Clone)]
struct Request {
    threshold: f32,
    at: At,
    /// Where it goes if the step is abandoned.
    from: At,
    slot: Option<u32>,
    tokens: u64,
    exits: [u64; 2],
    forced_out: u64,
    forced_on: u64,
}

struct Model {
    engine: Engine,
    policy: drex_policy,
    art_ratio: f64,
    max_batch: usize,
    /// Rows of one window.
    most: usize,
    /// Prompt rows that a window left at a ramp.
    transit: Option<(usize, usize)>,
    n_slots: usize,
    requests: BTreeMap<u64, Request>,
    now: u64,
    tokens: u64,
    forced_out: u64,
    forced_on: u64,
    nonfinite: u64,
    steps: u64,
}

const RAMPS: [u32; 2] = [4, 8];
const BASE: f32 = 0.5;

impl Model {
    fn new(
        policy: drex_policy,
        n: u32,
        batch: u32,
        most: u32,
        art_ratio: f32,
        max_hold: u64,
    ) -> Model {
        let mut c = config(&RAMPS, n, batch, policy);
        c.art_ratio = art_ratio;
        c.max_hold_ns = max_hold;
        c.n_slots = n + 1;
        c.threshold = BASE;
        c.max_pass_rows = batch + most;
        Model {
            engine: Engine::new(&c),
            policy,
            art_ratio: art_ratio.into(),
            max_batch: batch.min(n) as usize,
            most: (batch + most) as usize,
            transit: None,
            n_slots: n as usize + 1,
            requests: BTreeMap::new(),
            now: 0,
            tokens: 0,
            forced_out: 0,
            forced_on: 0,
            nonfinite: 0,
            steps: 0,
        }
    }

    fn count(&self, f: impl Fn(At) -> bool) -> usize {
        self.requests.values().filter(|r| f(r.at)).count()
    }

    /// The whole of what the engine shows.
    fn check(&self) {
        for (&id, r) in &self.requests {
            let info = self.engine.info(id).unwrap();
            let state = match r.at {
                At::Idle => DREX_REQUEST_IDLE,
                At::Ready => DREX_REQUEST_READY,
                At::Held(_) => DREX_REQUEST_HELD,
                At::Stay(_) | At::Step => DREX_REQUEST_RUNNING,
            };
            assert_eq!(info.state, state, "request {id}");
            let ramp = match r.at {
                At::Held(ramp) => ramp as u32,
                _ => DREX_NO_RAMP,
            };
            assert_eq!(info.ramp, ramp, "request {id}");
            assert_eq!(info.slot, r.slot.unwrap_or(DREX_NO_SLOT), "request {id}");
            assert_eq!(info.tokens, r.tokens, "request {id}");
            assert_eq!(info.exits[..2], r.exits, "request {id}");
            assert_eq!(info.involuntary_exits, r.forced_out, "request {id}");
            assert_eq!(info.involuntary_stays, r.forced_on, "request {id}");
        }
        let stats = self.engine.stats();
        assert_eq!(stats.requests, self.requests.len() as u64);
        assert_eq!(stats.tokens, self.tokens);
        assert_eq!(stats.involuntary_exits, self.forced_out);
        assert_eq!(stats.involuntary_stays, self.forced_on);
        assert_eq!(stats.nonfinite_rows, self.nonfinite);
        assert_eq!(stats.steps, self.steps);
        assert_eq!(stats.flushes.iter().sum::<u64>(), self.steps);
        for ramp in 0..2 {
            let held = self.count(|at| at == At::Held(ramp));
            assert_eq!(stats.held_rows_at[ramp], held as u64);
        }
        assert_eq!(
            stats.held_rows,
            self.count(|at| matches!(at, At::Held(_))) as u64
        );
        assert!(stats.held_rows_max >= stats.held_rows);
        let slots: Vec<u32> = self.requests.values().filter_map(|r| r.slot).collect();
        assert_eq!(slots.iter().collect::<BTreeSet<_>>().len(), slots.len());
        assert!(slots.iter().all(|&s| (s as usize) < self.n_slots));
        assert_eq!(stats.slots_free as usize, self.n_slots - slots.len());
        if !matches!(
            self.policy,
            DREX_POLICY_EAGER | DREX_POLICY_MEDIAN | DREX_POLICY_MEAN
        ) {
            assert_eq!(stats.involuntary_exits, 0);
        }
    }

    fn remove(&mut self, id: u64) {
        let known = self.requests.remove(&id).is_some();
        let expect = if known {
            Ok(())
        } else {
            Err(Failed(DREX_ERROR_UNKNOWN_REQUEST))
        };
        assert_eq!(self.engine.remove(id), expect);
    }

    fn ready(&mut self, id: u64) {
        let got = self.engine.ready(id, self.now);
        match self.requests.get_mut(&id) {
            None => assert_eq!(got, Err(Failed(DREX_ERROR_UNKNOWN_REQUEST))),
            Some(r) if r.at == At::Idle => {
                assert_eq!(got, Ok(()));
                r.at = At::Ready;
            }
            Some(_) => assert_eq!(got, Err(Failed(DREX_ERROR_CALL_ORDER))),
        }
    }

    /// The rule of each policy, in the words of the header.
    fn verdicts(&self, rows: &[(f32, f32)]) -> Vec<(drex_decision, bool)> {
        let confident = |&(c, t): &(f32, f32)| !c.is_nan() && t <= 1.0 && c >= t;
        let voters: Vec<&(f32, f32)> = rows.iter().filter(|r| r.1 <= 1.0).collect();
        let mut margins: Vec<f64> = voters
            .iter()
            .filter(|r| !r.0.is_nan())
            .map(|r| f64::from(r.0 - r.1))
            .collect();
        margins.sort_by(f64::total_cmp);
        let n = margins.len();
        let group = match self.policy {
            DREX_POLICY_EAGER => rows.iter().any(confident),
            DREX_POLICY_LAZY => voters.iter().all(|r| confident(r)),
            DREX_POLICY_MEDIAN => n > 0 && margins[n / 2] + margins[(n - 1) / 2] >= 0.0,
            DREX_POLICY_MEAN => n > 0 && margins.iter().sum::<f64>() >= 0.0,
            _ => false,
        };
        let b = rows.len();
        let sure = rows.iter().filter(|r| confident(r)).count();
        rows.iter()
            .map(|r| {
                let decision = match self.policy {
                    DREX_POLICY_HOLD if confident(r) => DREX_DECISION_EXIT,
                    DREX_POLICY_HOLD => DREX_DECISION_HOLD,
                    DREX_POLICY_LATENCY if confident(r) => DREX_DECISION_EXIT,
                    DREX_POLICY_LATENCY => DREX_DECISION_STAY,
                    DREX_POLICY_ART if sure == b || sure as f64 > self.art_ratio * b as f64 => {
                        if confident(r) {
                            DREX_DECISION_EXIT
                        } else {
                            DREX_DECISION_HOLD
                        }
                    }
                    DREX_POLICY_ART => DREX_DECISION_STAY,
                    _ if group && r.1 <= 1.0 && !r.0.is_nan() => DREX_DECISION_EXIT,
                    _ => DREX_DECISION_STAY,
                };
                let forced = match decision {
                    DREX_DECISION_EXIT => !confident(r),
                    DREX_DECISION_STAY => confident(r),
                    _ => false,
                };
                (decision, forced)
            })
            .collect()
    }

    fn step(
        &mut self,
        confidences: &[usize],
        mut end: u8,
        remove: Option<(usize, bool)>,
        eager_ready: bool,
        capacity: u32,
        waiting: usize,
    ) -> bool {
        self.now += 100;
        let plan = self
            .engine
            .plan_with(self.now, capacity, waiting as u32)
            .unwrap();
        let n = plan.rows.len();
        let prompts = plan.step.n_prompt_rows as usize;
        let mut limit = self.max_batch.min(capacity as usize);
        assert!(n <= limit && n + prompts <= self.most);
        if n + prompts == 0 {
            // Nothing to run means that nothing waits.
            assert_eq!(self.count(|at| at != At::Idle), 0);
            assert_eq!((waiting, self.transit), (0, None));
            return false;
        }
        // Prompt rows on their way come first, then stay rows, then what is
        // due, then prompt rows that wait.
        let transit = self.transit.take();
        let least = self.most.div_ceil(8).min(waiting);
        if let Some((_, rows)) = transit {
            limit = limit.min(self.most - rows);
        } else if prompts > 0 {
            limit = limit.min(self.most - least);
        }
        // Stay rows first; the rows are of one kind.
        let stay = match transit {
            Some((ramp, _)) => Some(ramp),
            None => (0..2)
                .rev()
                .find(|&r| self.count(|at| at == At::Stay(r)) > 0),
        };
        let ids = plan.ids();
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), n);
        let mut may_exit = [false; 2];
        let (begin, ramp) = match plan.step.layer_begin {
            0 => (0, None),
            l => (l, RAMPS.iter().position(|&r| r == l)),
        };
        if let Some(r) = stay {
            assert_eq!(ramp, Some(r));
            let stays = self.count(|at| at == At::Stay(r));
            let taken = |id: &&u64| self.requests[id].at == At::Stay(r);
            assert_eq!(ids.iter().filter(taken).count(), stays.min(limit));
            // Topped up with what is held there.
            let here = stays + self.count(|at| at == At::Held(r));
            assert_eq!(n, here.min(limit));
            let reason = match transit {
                Some(_) => DREX_FLUSH_PROMPT,
                None => DREX_FLUSH_STAY,
            };
            assert_eq!(plan.step.reason, reason);
            assert_eq!(prompts, transit.map_or(0, |t| t.1));
        } else {
            assert_ne!(plan.step.reason, DREX_FLUSH_STAY);
            assert_ne!(plan.step.reason, DREX_FLUSH_PROMPT);
            assert_eq!(plan.step.reason == DREX_FLUSH_NONE, ramp.is_none());
            // Prompt rows wait for nothing but what is due.
            assert_eq!(prompts > 0, waiting > 0 && ramp.is_none());
            if waiting > 0 && ramp.is_some() {
                assert!(matches!(
                    plan.step.reason,
                    DREX_FLUSH_AGE | DREX_FLUSH_DEADLINE
                ));
            }
            let here = match ramp {
                None => self.count(|at| at == At::Ready),
                Some(r) => self.count(|at| at == At::Held(r)),
            };
            assert_eq!(n, here.min(limit));
        }
        let before: BTreeSet<u32> = self.requests.values().filter_map(|r| r.slot).collect();
        for row in &plan.rows {
            let r = self.requests.get_mut(&row.request).unwrap();
            match (r.at, ramp) {
                (At::Ready, None) => {
                    assert!(!before.contains(&row.slot));
                    assert!(r.slot.is_none());
                }
                (At::Held(a) | At::Stay(a), Some(b)) if a == b => {
                    assert_eq!(r.slot, Some(row.slot), "a held row moved");
                }
                other => panic!("request {} was planned at {other:?}", row.request),
            }
            r.slot = Some(row.slot);
            r.from = r.at;
            r.at = At::Step;
            for (may, _) in may_exit.iter_mut().zip(RAMPS) {
                let t = if r.threshold.is_nan() {
                    BASE
                } else {
                    r.threshold
                };
                *may |= t <= 1.0;
            }
        }
        // The window ends at the next ramp where someone may exit.
        let first = ramp.map_or(0, |r| r + 1);
        // With prompt rows, also where rows are held.
        let held = |r: usize| self.count(|at| at == At::Held(r));
        let stop = (first..2).find(|&r| {
            self.policy != DREX_POLICY_OFF && (may_exit[r] || prompts > 0 && held(r) > 0)
        });
        if prompts > 0 && transit.is_none() {
            // Behind a cut, all that may go deep fits.
            let behind = stop.map_or(0, |r| (held(r) + n).min(self.max_batch));
            let room = (self.most - n.max(behind)).max(self.most.div_ceil(8));
            assert_eq!(prompts, waiting.min(room).min(self.most - n));
        }
        assert_eq!(plan.step.ramp, stop.map_or(DREX_NO_RAMP, |r| r as u32));
        assert_eq!(plan.step.layer_end, stop.map_or(12, |r| RAMPS[r]));
        assert!(begin < plan.step.layer_end);

        let mut gone: BTreeSet<u64> = BTreeSet::new();
        let victim = remove
            .filter(|_| n > 0)
            .map(|(i, after)| (ids[i % n], after));
        let drop_row = |m: &mut Model, gone: &mut BTreeSet<u64>, id: u64| {
            let free = m.engine.stats().slots_free;
            m.remove(id);
            gone.insert(id);
            // Its slot comes back with the step, not before.
            assert_eq!(m.engine.stats().slots_free, free);
        };
        if let Some((id, false)) = victim {
            drop_row(self, &mut gone, id);
        }
        if stop.is_none() && end == 2 {
            end = 1;
        }
        if end == 1 {
            self.engine.abandon().unwrap();
            self.back(&ids, &gone);
            return true;
        }
        let mut exited = Vec::new();
        // A ramp without rows may be left out.
        if let Some(stop) = stop.filter(|_| n > 0 || eager_ready) {
            let c: Vec<f32> = (0..n)
                .map(|i| CONFIDENCES[confidences[i % confidences.len()]])
                .collect();
            let verdicts = self.engine.ramp(&c).unwrap();
            let alive: Vec<usize> = (0..n).filter(|&i| !gone.contains(&ids[i])).collect();
            let rows: Vec<(f32, f32)> = alive
                .iter()
                .map(|&i| {
                    let t = self.requests[&ids[i]].threshold;
                    // What came back, not what went in: the model judges the
                    // decision, tests/confidence.rs the number.
                    (verdicts[i].confidence, if t.is_nan() { BASE } else { t })
                })
                .collect();
            for (&i, (decision, forced)) in alive.iter().zip(self.verdicts(&rows)) {
                let v = &verdicts[i];
                assert_eq!(v.confidence.is_nan(), c[i].is_nan());
                assert!(c[i].is_nan() || (v.confidence - c[i]).abs() < 1e-4);
                assert_eq!(v.token, if c[i].is_nan() { -1 } else { 3 });
                assert_eq!(v.decision, decision, "row {i} of {rows:?}");
                assert_eq!(v.forced != 0, forced);
                let r = self.requests.get_mut(&ids[i]).unwrap();
                let (out, on) = match decision {
                    DREX_DECISION_EXIT => (u64::from(forced), 0),
                    _ => (0, u64::from(forced)),
                };
                r.forced_out += out;
                self.forced_out += out;
                if end == 0 {
                    r.forced_on += on;
                    self.forced_on += on;
                    self.nonfinite += u64::from(v.confidence.is_nan());
                }
                match decision {
                    DREX_DECISION_EXIT => {
                        r.at = At::Idle;
                        r.slot = None;
                        r.tokens += 1;
                        r.exits[stop] += 1;
                        self.tokens += 1;
                        exited.push(ids[i]);
                    }
                    DREX_DECISION_HOLD if end == 0 => r.at = At::Held(stop),
                    DREX_DECISION_STAY if end == 0 => r.at = At::Stay(stop),
                    _ => {}
                }
            }
            for (i, v) in verdicts.iter().enumerate() {
                if gone.contains(&ids[i]) {
                    assert_eq!(v.decision, DREX_DECISION_GONE);
                    assert!(v.confidence.is_nan());
                }
            }
            if eager_ready {
                for &id in &exited {
                    self.ready(id);
                }
            }
        }
        if let Some((id, true)) = victim {
            drop_row(self, &mut gone, id);
        }
        if end == 2 {
            self.engine.abandon().unwrap();
            let inside: Vec<u64> = ids
                .iter()
                .copied()
                .filter(|i| !exited.contains(i))
                .collect();
            self.back(&inside, &gone);
            return true;
        }
        self.engine.complete(self.now + 50, 1000).unwrap();
        self.steps += 1;
        if prompts > 0 {
            self.transit = stop.map(|r| (r, prompts));
        }
        if stop.is_none() {
            for id in ids {
                if let Some(r) = self.requests.get_mut(&id) {
                    r.at = At::Idle;
                    r.slot = None;
                    r.tokens += 1;
                    self.tokens += 1;
                }
            }
        }
        true
    }

    fn back(&mut self, ids: &[u64], gone: &BTreeSet<u64>) {
        for id in ids.iter().filter(|id| !gone.contains(id)) {
            let r = self.requests.get_mut(id).unwrap();
            r.at = r.from;
            if r.at == At::Ready {
                r.slot = None;
            }
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Add {
                id,
                threshold,
                priority,
            } => {
                let threshold = THRESHOLDS[*threshold];
                let got = self.engine.add_with(*id, |c| {
                    c.threshold = threshold;
                    c.priority = *priority;
                });
                if self.requests.contains_key(id) {
                    assert_eq!(got, Err(Failed(DREX_ERROR_DUPLICATE_REQUEST)));
                    return;
                }
                assert_eq!(got, Ok(()));
                self.requests.insert(
                    *id,
                    Request {
                        threshold,
                        at: At::Idle,
                        from: At::Idle,
                        slot: None,
                        tokens: 0,
                        exits: [0; 2],
                        forced_out: 0,
                        forced_on: 0,
                    },
                );
            }
            Op::Ready(id) => self.ready(*id),
            Op::Remove(id) => self.remove(*id),
            Op::Step {
                confidences,
                end,
                remove,
                eager_ready,
                capacity,
                prompts,
            } => {
                let prompts = *prompts as usize;
                self.step(confidences, *end, *remove, *eager_ready, *capacity, prompts);
            }
            Op::Time(ns) => self.now += ns,
        }
    }

    /// Whatever waits comes out in the end, once.
    fn drain(&mut self) {
        let waiting = self.count(|at| at != At::Idle) as u64;
        let on_the_way = if self.transit.is_some() { 2 } else { 0 };
        let before = self.tokens;
        let mut steps = 0;
        while self.step(&[0, 3, 5, 1], 0, None, false, 64, 0) {
            self.check();
            steps += 1;
            assert!(
                steps <= 3 * waiting + 3 + on_the_way,
                "rows do not come out"
            );
        }
        assert_eq!(self.tokens - before, waiting);
        let ids: Vec<u64> = self.requests.keys().copied().collect();
        for id in ids {
            self.remove(id);
        }
        self.check();
        assert_eq!(self.engine.stats().slots_free as usize, self.n_slots);
    }
}

/// Under art a row that stayed may be held at the next ramp, and then its step be given up.
#[test]
fn a_row_that_stayed_and_was_to_be_held_stays_again() {
    let mut model = Model::new(DREX_POLICY_ART, 3, 2, 0, 0.0, 0);
    let step = |confidences: [usize; 2], end| Op::Step {
        confidences: confidences.to_vec(),
        end,
        remove: None,
        eager_ready: false,
        capacity: 2,
        prompts: 0,
    };
    let add = |id| Op::Add {
        id,
        threshold: 0,
        priority: 0,
    };
    let (unsure, sure) = (0, 3);
    let ops = [
        add(5),
        add(6),
        Op::Ready(5),
        Op::Ready(6),
        step([unsure; 2], 0),
        step([sure, unsure], 2),
    ];
    for op in &ops {
        model.apply(op);
        model.check();
    }
    assert_eq!(model.count(|at| at == At::Stay(0)), 1);
    model.drain();
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn the_engine_agrees_with_the_model(
        policy in DREX_POLICY_OFF..=DREX_POLICY_ART,
        n in 1u32..9,
        batch in 1u32..9,
        most in 0u32..24,
        ratio in prop::sample::select(vec![0.0f32, 0.3, 0.5, 1.0]),
        max_hold in prop::sample::select(vec![0u64, 300, 3000]),
        ops in prop::collection::vec(op(8), 1..120),
    ) {
        let mut model = Model::new(policy, n, batch, most, ratio, max_hold);
        for op in &ops {
            if let Op::Add { id, .. } = op
                && model.requests.len() == n as usize && !model.requests.contains_key(id) {
                    prop_assert_eq!(model.engine.add(*id), Err(Failed(DREX_ERROR_CAPACITY)));
                    continue;
                }
            model.apply(op);
            model.check();
        }
        model.drain();
    }

    /// What happens to a request's tokens depends on its own confidences, not
    /// on who else is served.
    #[test]
    fn rebatching_is_transparent(
        policy in prop::sample::select(
            vec![DREX_POLICY_HOLD, DREX_POLICY_LATENCY, DREX_POLICY_ART]),
        n in 2u64..9,
        batch in 1u32..9,
        flush in 0u32..6,
        table in prop::collection::vec(prop::collection::vec(0..CONFIDENCES.len(), 2), 9 * 6),
        thresholds in prop::collection::vec(0..THRESHOLDS.len(), 9),
        priorities in prop::collection::vec(-2i32..3, 9),
        prompts in prop::collection::vec(0u32..40, 30),
    ) {
        let serve = |ids: &[u64], batch: u32| {
            let mut c = config(&RAMPS, ids.len() as u32, batch, policy);
            c.art_ratio = 0.0;
            c.flush_rows = flush;
            c.max_pass_rows = batch + 16;
            let e = Engine::new(&c);
            let mut exits: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
            for &id in ids {
                e.add_with(id, |c| {
                    c.threshold = THRESHOLDS[thresholds[id as usize]];
                    c.priority = priorities[id as usize];
                }).unwrap();
                e.ready(id, 0).unwrap();
                exits.insert(id, Vec::new());
            }
            let mut now = 0;
            for k in 0.. {
                now += 10;
                // Prompts come along for a while.
                let waiting = prompts.get(k).map_or(0, |n| n.saturating_sub(15));
                let plan = e.plan_with(now, 64, waiting).unwrap();
                if plan.rows.is_empty() && plan.step.n_prompt_rows == 0 {
                    if k < prompts.len() {
                        continue;
                    }
                    break;
                }
                let ids = plan.ids();
                let ramp = plan.step.ramp;
                let mut out = ids.clone();
                if ramp != DREX_NO_RAMP && !ids.is_empty() {
                    let c: Vec<f32> = ids.iter().map(|id| {
                        let token = exits[id].len();
                        CONFIDENCES[table[*id as usize * 6 + token][ramp as usize]]
                    }).collect();
                    let v = e.ramp(&c).unwrap();
                    let mut it = v.iter();
                    out.retain(|_| it.next().unwrap().decision == DREX_DECISION_EXIT);
                }
                e.complete(now, 100).unwrap();
                for id in out {
                    let tokens = exits.get_mut(&id).unwrap();
                    tokens.push(ramp);
                    if tokens.len() < 6 {
                        e.ready(id, now).unwrap();
                    }
                }
            }
            exits
        };
        let all: Vec<u64> = (0..n).collect();
        let together = serve(&all, batch);
        for id in all {
            prop_assert_eq!(together[&id].len(), 6);
            prop_assert_eq!(&together[&id], &serve(&[id], 1)[&id], "request {}", id);
        }
    }

}

proptest! {
    #![proptest_config(cases(60))]

    /// A ready row runs at the latest in the (9 + q / ceil(k / 2))th step of
    /// ready rows, whatever priority the others have.
    #[test]
    fn no_ready_row_starves(
        n in 2usize..40,
        k in 1usize..8,
        priorities in prop::collection::vec(-3i32..4, 40),
        deadlines in prop::collection::vec(0u64..3, 40),
        order in Just((0..40u64).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut c = config(&RAMPS, n as u32, k as u32, DREX_POLICY_LATENCY);
        c.n_slots = n as u32;
        let e = Engine::new(&c);
        // since[id]: first-window steps before it became ready, and older ones
        let mut waiting: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        let mut steps = 0u64;
        for id in order.into_iter().filter(|&id| id < n as u64) {
            e.add_with(id, |c| {
                c.priority = priorities[id as usize];
                c.token_deadline_ns = deadlines[id as usize];
            }).unwrap();
            e.ready(id, 0).unwrap();
            let older = waiting.len() as u64;
            waiting.insert(id, (steps, older));
        }
        let mut longest = 0;
        for now in 1..150 {
            let plan = e.plan(now, 64).unwrap();
            prop_assert_eq!(plan.step.layer_begin, 0);
            steps += 1;
            for id in plan.ids() {
                let (since, older) = waiting.remove(&id).unwrap();
                let waited = steps - since;
                longest = longest.max(waited);
                let bound = 9 + older / k.div_ceil(2) as u64;
                prop_assert!(waited <= bound, "{} > {}", waited, bound);
            }
            let ids = plan.ids();
            e.ramp(&vec![0.9; ids.len()]).unwrap();
            e.complete(now, 0).unwrap();
            for id in ids {
                e.ready(id, now).unwrap();
                let older = waiting.len() as u64;
                waiting.insert(id, (steps, older));
            }
        }
        // The bound was put to the test where rows had to wait at all.
        prop_assert!(n <= k || longest > 1);
    }
}
