// SPDX-License-Identifier: Apache-2.0

//! An agreement as the quality, through the C ABI: lossless until audits show that
//! more is allowed, then as bold as they allow, and what cannot be is refused.

mod common;

use common::*;

const RAMP: u32 = 2;
const ANSWER: u64 = 50;

fn agreement(quality: f64, pending: u32) -> drex_config {
    let mut c = config(&[RAMP], 2, 2 * (1 + pending), DREX_POLICY_LATENCY);
    c.n_slots = 2 * (1 + pending);
    c.fill = DREX_FILL_COPY;
    c.quality = quality;
    c.seed = 5;
    c
}

fn audit(engine: &Engine, id: u64, tokens: u64, differing: u64) -> Result<(), Failed> {
    // SAFETY: a handle.
    ok(unsafe { drex_request_audit(engine.raw, id, tokens, differing) })
}

/// Serves answers one after the other, in an engine without room for drafts. A row
/// that exits differs with a chance that its confidence gives, and no other does.
struct Host {
    engine: Engine,
    rng: fastrand::Rng,
    now: u64,
    tokens: u64,
    differing: u64,
    exits: u64,
    lossless: u64,
    audits: u64,
}

impl Host {
    fn new(quality: f64) -> Self {
        Host {
            engine: Engine::new(&agreement(quality, 0)),
            rng: fastrand::Rng::with_seed(2),
            now: 1,
            tokens: 0,
            differing: 0,
            exits: 0,
            lossless: 0,
            audits: 0,
        }
    }

    fn answer(&mut self, id: u64, audits: bool, risk: impl Fn(f32) -> f64) {
        let e = &self.engine;
        e.add(id).unwrap();
        self.lossless += u64::from(e.info(id).unwrap().quality == 1.0);
        let mut differing = 0;
        for _ in 0..ANSWER {
            e.ready(id, self.now).unwrap();
            let planned = e.plan(self.now, 2).unwrap();
            assert_eq!(planned.ids(), [id]);
            self.now += 1000;
            // Nobody may exit: one window.
            if planned.step.ramp == DREX_NO_RAMP {
                e.complete(self.now, 1000).unwrap();
                continue;
            }
            let confidence = self.rng.f32().clamp(0.01, 0.999);
            let verdicts = e.ramp(&[confidence]).unwrap();
            e.complete(self.now, 300).unwrap();
            if verdicts[0].decision == DREX_DECISION_EXIT {
                self.exits += 1;
                differing += u64::from(self.rng.f64() < risk(confidence));
            } else {
                assert_eq!(e.plan(self.now, 2).unwrap().ids(), [id]);
                self.now += 1000;
                e.complete(self.now, 700).unwrap();
            }
        }
        self.tokens += ANSWER;
        self.differing += differing;
        if audits && e.info(id).unwrap().audit_due == 1 {
            self.audits += 1;
            audit(e, id, ANSWER, differing).unwrap();
            assert_eq!(e.info(id).unwrap().audit_due, 0);
        }
        e.remove(id).unwrap();
    }
}

#[test]
fn audits_find_how_much_is_allowed() {
    for quality in [0.9, 0.99] {
        let mut host = Host::new(quality);
        let risk = |confidence: f32| 0.3 * f64::from(1.0 - confidence);
        host.answer(0, true, risk);
        assert_eq!(
            (host.lossless, host.exits),
            (1, 0),
            "before anything is known"
        );
        for id in 1..2000 {
            host.answer(id, true, risk);
        }
        let agrees = 1.0 - host.differing as f64 / host.tokens as f64;
        assert!(agrees >= quality, "{quality}: {agrees}");
        assert!(
            host.exits > host.tokens / 20,
            "{quality}: {} exits",
            host.exits
        );
        let s = host.engine.stats();
        assert_eq!(s.agreement_target, quality);
        assert_eq!(s.audits, host.audits);
        assert_eq!(s.audited_tokens, host.audits * ANSWER);
        assert!(
            s.audits_missed == 0 && s.audits < 1000,
            "{} audits",
            s.audits
        );
        assert!(s.agreement_low <= s.agreement && s.agreement <= s.agreement_high);
        assert!(
            s.agreement_low > quality - 0.01,
            "{quality}: {}",
            s.agreement_low
        );
        assert!(s.agreement_threshold <= 0.95, "{}", s.agreement_threshold);
        assert_eq!(s.involuntary_exits, 0);
    }
}

#[test]
fn without_audits_all_is_lossless() {
    let mut host = Host::new(0.9);
    for id in 0..400 {
        host.answer(id, false, |_| 1.0);
    }
    let s = host.engine.stats();
    assert!(s.agreement_threshold.is_nan() && s.audits == 0);
    // A few answers were to show what is allowed. Nobody looked, so no more are tried.
    assert!(s.audits_missed <= 20, "{}", s.audits_missed);
    assert!(host.lossless + s.audits_missed == 400);
}

/// A ramp that is sure and wrong: nearly everything stays lossless.
#[test]
fn what_cannot_be_promised_is_lossless() {
    let mut host = Host::new(0.999);
    for id in 0..1000 {
        host.answer(id, true, |_| 0.5);
    }
    let agrees = 1.0 - host.differing as f64 / host.tokens as f64;
    assert!(agrees >= 0.999, "{agrees}");
    assert!(host.lossless > 900, "{}", host.lossless);
    assert!(host.engine.stats().agreement_threshold.is_nan());
}

#[test]
fn lossless_means_drafts_where_there_is_room() {
    let engine = Engine::new(&agreement(0.99, 8));
    engine.add(1).unwrap();
    let info = engine.info(1).unwrap();
    assert_eq!(
        (info.fill, info.quality, info.audit_due),
        (DREX_FILL_VERIFY, 1.0, 0)
    );
    // What a request names goes before what the engine does with those that do not.
    engine.add_with(2, |c| c.threshold = 0.5).unwrap();
    let info = engine.info(2).unwrap();
    assert_eq!((info.fill, info.quality), (DREX_FILL_COPY, 0.0));
    engine.remove(2).unwrap();
    engine.add_with(2, |c| c.quality = 1.0).unwrap();
    assert_eq!(engine.info(2).unwrap().quality, 1.0);
    engine.remove(2).unwrap();
    // More than 0.999 is all.
    engine.add_with(2, |c| c.quality = 0.9999).unwrap();
    let info = engine.info(2).unwrap();
    assert_eq!((info.fill, info.quality), (DREX_FILL_VERIFY, 1.0));
}

#[test]
fn what_cannot_be_is_refused() {
    let engine = Engine::new(&agreement(0.0, 8));
    let failed = engine.add_with(1, |c| (c.quality, c.threshold) = (0.99, 0.7));
    assert_eq!(failed, Err(Failed(DREX_ERROR_INVALID_ARGUMENT)));
    assert!(text().contains("threshold is 0.7"), "{}", text());
    for quality in [1.5, -0.5, 1e-300, 0.49, f64::NAN, f64::INFINITY] {
        let failed = engine.add_with(1, |c| c.quality = quality);
        assert_eq!(failed, Err(Failed(DREX_ERROR_INVALID_ARGUMENT)));
        assert!(
            text().contains("0, or a number from 0.5 to 1"),
            "{}",
            text()
        );
    }
    engine.add_with(1, |c| c.quality = 0.9).unwrap();
    assert_eq!(audit(&engine, 1, 10, 0), Err(Failed(DREX_ERROR_CALL_ORDER)));
    assert!(text().contains("audit_due"), "{}", text());
    assert_eq!(
        audit(&engine, 9, 10, 0),
        Err(Failed(DREX_ERROR_UNKNOWN_REQUEST))
    );
    let mut host = Host::new(0.9);
    for id in 0..400 {
        host.answer(id, true, |_| 0.0);
    }
    // Until one is to be audited.
    let e = &host.engine;
    let mut audited = false;
    for id in 1000..3000 {
        e.add(id).unwrap();
        e.ready(id, host.now).unwrap();
        if e.plan(host.now, 2).unwrap().step.ramp != DREX_NO_RAMP {
            e.ramp(&[0.999]).unwrap();
        }
        e.complete(host.now, 300).unwrap();
        if e.info(id).unwrap().audit_due == 1 {
            let failed = audit(e, id, 1, 2);
            assert_eq!(failed, Err(Failed(DREX_ERROR_INVALID_ARGUMENT)));
            assert!(text().contains("n_differing is 2"), "{}", text());
            for tokens in [0, 3, u64::MAX] {
                let failed = audit(e, id, tokens, 0);
                assert_eq!(failed, Err(Failed(DREX_ERROR_INVALID_ARGUMENT)));
                assert!(text().contains("n_tokens is"), "{}", text());
            }
            audit(e, id, 1, 1).unwrap();
            assert_eq!(audit(e, id, 1, 1), Err(Failed(DREX_ERROR_CALL_ORDER)));
            audited = true;
            break;
        }
        e.remove(id).unwrap();
    }
    assert!(audited);
}
