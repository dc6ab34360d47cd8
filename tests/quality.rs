// SPDX-License-Identifier: Apache-2.0

//! Quality 1 through the C ABI: drafts are made where they are likely to stand, as
//! learned from the full model's tokens, and what a request names is kept to.

mod common;

use common::*;

const RAMP: u32 = 2;
/// The token that `row_of` makes the likeliest.
const GUESS: i32 = 3;

fn lossless(requests: u32, policy: drex_policy) -> drex_config {
    let mut c = config(&[RAMP], requests, 9 * requests, policy);
    c.n_slots = 9 * requests;
    c.quality = 1.0;
    c
}

fn verify(engine: &Engine, agrees: &[u8]) -> Vec<drex_decision> {
    let mut decisions = vec![0; agrees.len()];
    let n = agrees.len() as u32;
    // SAFETY: room for a decision per row.
    ok(unsafe { drex_verify(engine.raw, agrees.as_ptr(), n, decisions.as_mut_ptr(), n) }).unwrap();
    decisions
}

fn complete_with(engine: &Engine, now: u64, tokens: &[i32]) {
    let mut c = sized!(drex_completion);
    c.now_ns = now;
    c.duration_ns = 1000;
    c.tokens = tokens.as_ptr();
    // SAFETY: a token for each row.
    ok(unsafe { drex_complete(engine.raw, &c) }).unwrap();
}

/// A host of one request, whose ramp is right where `right` says so of a confidence.
struct Host {
    engine: Engine,
    rng: fastrand::Rng,
    now: u64,
    /// Of each draft that waits, whether it is right.
    drafts: Vec<bool>,
    next: bool,
    exits: u32,
    looks: u32,
    /// Of all rows at each ramp; empty: drawn.
    sure: Vec<f32>,
}

impl Host {
    fn new(engine: Engine) -> Self {
        engine.add(1).unwrap();
        Host {
            engine,
            rng: fastrand::Rng::with_seed(1),
            now: 1,
            drafts: Vec::new(),
            next: false,
            exits: 0,
            looks: 0,
            sure: Vec::new(),
        }
    }

    /// Runs one window. `tell`: what the full model chose is told of held rows too.
    fn window(&mut self, right: impl Fn(f32) -> f64, tell: bool) {
        let e = &self.engine;
        if e.info(1).unwrap().state == DREX_REQUEST_IDLE {
            e.ready(1, self.now).unwrap();
        }
        let planned = e.plan(self.now, 9).unwrap();
        self.now += 1000;
        if planned.step.ramp != DREX_NO_RAMP {
            let drawn = self.rng.f32().clamp(0.01, 0.999);
            let confidence = *self.sure.get(planned.step.ramp as usize).unwrap_or(&drawn);
            let rows: Vec<f32> = planned.rows.iter().map(|_| confidence).collect();
            let own = planned.rows.iter().position(|r| r.back == 0);
            let verdicts = e.ramp(&rows).unwrap();
            e.complete(self.now, 1000).unwrap();
            if let Some(own) = own {
                self.next = self.rng.f64() < right(confidence);
                self.looks += 1;
                if verdicts[own].decision == DREX_DECISION_EXIT {
                    self.exits += 1;
                    self.drafts.push(self.next);
                }
            }
            return;
        }
        let agrees: Vec<u8> = planned
            .rows
            .iter()
            .map(|r| match r.back as usize {
                0 => 0,
                back => self.drafts[self.drafts.len() - back].into(),
            })
            .collect();
        verify(e, &agrees);
        let tokens: Vec<i32> = planned
            .rows
            .iter()
            .map(|r| match r.back {
                0 if tell => GUESS + i32::from(!self.next),
                _ => -1,
            })
            .collect();
        complete_with(e, self.now, &tokens);
        self.drafts.clear();
    }
}

/// A ramp that is always right lets all rows out, and one that never is none: from the
/// drafts that stand, and from the rows that were held.
#[test]
fn who_exits_is_learned() {
    for (chance, low, high) in [(1.0, 0.8, 1.0), (0.0, 0.0, 0.03), (0.6, 0.3, 0.7)] {
        let mut host = Host::new(Engine::new(&lossless(1, DREX_POLICY_LATENCY)));
        for _ in 0..6000 {
            host.window(|_| chance, true);
        }
        (host.exits, host.looks) = (0, 0);
        for _ in 0..2000 {
            host.window(|_| chance, true);
        }
        let share = f64::from(host.exits) / f64::from(host.looks);
        assert!((low..=high).contains(&share), "{chance}: {share} exit");
        let stats = host.engine.stats();
        assert_eq!(stats.involuntary_exits, 0);
        assert_eq!((stats.rule_survival, stats.rule_drafts), (0.5, 0));
    }
}

/// Rows that are held teach that a ramp has become right, where nothing exits any more.
#[test]
fn held_rows_teach() {
    for (tell, learns) in [(true, true), (false, false)] {
        let mut host = Host::new(Engine::new(&lossless(1, DREX_POLICY_LATENCY)));
        for _ in 0..6000 {
            host.window(|_| 0.0, true);
        }
        (host.exits, host.looks) = (0, 0);
        for _ in 0..12_000 {
            host.window(|_| 1.0, tell);
        }
        let share = f64::from(host.exits) / f64::from(host.looks);
        assert_eq!(share > 0.3, learns, "told {tell}: {share} exit");
    }
}

/// A ramp whose rows leave at a later one learns from what becomes of those drafts.
#[test]
fn an_earlier_ramp_learns_from_a_later_ones_drafts() {
    let mut c = lossless(1, DREX_POLICY_LATENCY);
    let ramps = [RAMP, 2 * RAMP];
    (c.ramp_layers, c.n_ramps, c.n_layers) = (ramps.as_ptr(), 2, 8);
    let mut host = Host::new(Engine::new(&c));
    // Unsure and right; at the second ramp sure and right.
    host.sure = vec![0.3, 0.97];
    for _ in 0..3000 {
        host.window(|_| 1.0, false);
    }
    let [first, second] = [0, 1].map(|r| host.engine.stats().exits[r]);
    for _ in 0..1000 {
        host.window(|_| 1.0, false);
    }
    let [first, second] =
        [(0, first), (1, second)].map(|(r, before)| host.engine.stats().exits[r] - before);
    assert!(first > 10 * second && first > 500, "{first} {second}");
}

/// The chance of a chain is that of all its drafts: it ends before it is long.
#[test]
fn chains_end_where_they_are_unlikely_to_stand() {
    let mut host = Host::new(Engine::new(&lossless(1, DREX_POLICY_LATENCY)));
    let mut longest = 0;
    for i in 0..12_000 {
        host.window(|_| 0.8, true);
        if i > 8000 {
            longest = longest.max(host.drafts.len());
        }
    }
    // 0.8^3 = 0.51, and 0.5 is asked for.
    assert!((2..=4).contains(&longest), "{longest}");
}

#[test]
fn what_a_request_names_is_kept_to() {
    let engine = Engine::new(&lossless(4, DREX_POLICY_LATENCY));
    engine.add_with(1, |c| c.threshold = 0.9).unwrap();
    engine.add_with(2, |c| c.fill = DREX_FILL_COPY).unwrap();
    engine
        .add_with(3, |c| (c.quality, c.threshold) = (1.0, 0.2))
        .unwrap();
    engine.add(4).unwrap();
    for id in 1..=4 {
        engine.ready(id, 1).unwrap();
    }
    let planned = engine.plan(2, 36).unwrap();
    assert_eq!(planned.ids(), [1, 2, 3, 4]);
    // 0.55 is above the engine's threshold and what a learned one is at first.
    let verdicts = engine.ramp(&[0.55; 4]).unwrap();
    let exits: Vec<bool> = verdicts
        .iter()
        .map(|v| v.decision == DREX_DECISION_EXIT)
        .collect();
    assert_eq!(exits, [false, true, true, true]);
    engine.complete(3, 1).unwrap();
    // The copied row is a token, the others are drafts.
    assert_eq!(engine.stats().tokens, 1);
    assert_eq!(engine.stats().pending_rows, 2);
}

#[test]
fn what_cannot_be_is_refused() {
    let mut c = lossless(2, DREX_POLICY_AUTO);
    for (quality, says) in [(1.5, "quality is 1.5"), (f64::NAN, "quality is NaN")] {
        c.quality = quality;
        let failed = Engine::try_new(&c).err();
        assert_eq!(failed, Some(Failed(DREX_ERROR_INVALID_ARGUMENT)));
        assert!(text().contains(says), "{}", text());
    }
    c.quality = 1.0;
    // No room for pending rows.
    c.n_slots = 2;
    assert!(Engine::try_new(&c).is_err());
    assert!(text().contains("n_slots is 2"), "{}", text());
    c.n_slots = 18;
    let engine = Engine::new(&c);
    let failed = engine.add_with(1, |c| (c.quality, c.fill) = (1.0, DREX_FILL_COPY));
    assert_eq!(failed, Err(Failed(DREX_ERROR_INVALID_ARGUMENT)));
    assert!(text().contains("DREX_FILL_VERIFY"), "{}", text());
    let failed = engine.add_with(1, |c| c.quality = -1.0);
    assert_eq!(failed, Err(Failed(DREX_ERROR_INVALID_ARGUMENT)));
    assert_eq!(engine.stats().requests, 0);
}

/// Confidences of another metric are worth other chances: such a request has the
/// engine's thresholds, and teaches nothing.
#[test]
fn another_metric_has_thresholds() {
    let engine = Engine::new(&lossless(2, DREX_POLICY_LATENCY));
    engine
        .add_with(1, |c| c.metric = DREX_METRIC_ENTROPY)
        .unwrap();
    engine.add(2).unwrap();
    for id in 1..=2 {
        engine.ready(id, 1).unwrap();
    }
    assert_eq!(engine.plan(2, 18).unwrap().ids(), [1, 2]);
    // Half of the probability on one token of 1001: sure by neither metric's 0.5 but
    // likely enough to be right.
    let verdicts = engine.ramp(&[0.56; 2]).unwrap();
    assert!(verdicts[0].confidence < 0.5, "{}", verdicts[0].confidence);
    let exits = verdicts.iter().map(|v| v.decision == DREX_DECISION_EXIT);
    assert_eq!(exits.collect::<Vec<_>>(), [false, true]);
}
