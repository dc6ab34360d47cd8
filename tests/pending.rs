// SPDX-License-Identifier: Apache-2.0

//! Pending rows in a host whose model shows every mistake: each hidden state
//! and each K/V entry is a hash of everything that went into it, a missing
//! entry is an error, and what comes out is compared with the model run alone,
//! token by token through all layers.

mod common;

use common::*;
use std::collections::BTreeMap;
use std::ptr;

fn mix(a: u64, b: u64) -> u64 {
    let mut z = a
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(b)
        .wrapping_add(0x632b_e59b_d9b4_e019);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a layer has written, by position; `None`: a hole.
type Kv = Vec<Vec<Option<u64>>>;

fn write(kv: &mut Kv, layer: usize, pos: usize, hidden: u64) {
    let row = &mut kv[layer];
    row.resize(row.len().max(pos + 1), None);
    row[pos] = Some(mix(hidden, 1000 + layer as u64));
}

fn attend(kv: &Kv, layer: usize, pos: usize, hidden: u64) -> u64 {
    let all = kv[layer][..=pos].iter().enumerate();
    all.fold(mix(hidden, layer as u64), |h, (p, e)| {
        mix(
            h,
            e.unwrap_or_else(|| panic!("layer {layer} reads a hole at {p} for {pos}")),
        )
    })
}

/// Mostly the same at all depths, as that of a trained model.
fn token(input: u64, hidden: u64) -> u64 {
    let same = mix(input, 77) % 500;
    if mix(hidden, 5).is_multiple_of(6) {
        500 + mix(hidden, 6) % 500
    } else {
        same
    }
}

fn confidence(hidden: u64) -> f32 {
    (mix(hidden, 9) % 1000) as f32 / 1000.0
}

/// The model alone, one token after another: the reference.
struct Alone {
    kv: Kv,
    layers: usize,
}

impl Alone {
    fn new(layers: usize) -> Self {
        Alone {
            kv: vec![Vec::new(); layers],
            layers,
        }
    }

    fn step(&mut self, pos: usize, input: u64) -> u64 {
        let mut hidden = mix(input, 3);
        for layer in 0..self.layers {
            write(&mut self.kv, layer, pos, hidden);
            hidden = attend(&self.kv, layer, pos, hidden);
        }
        token(input, hidden)
    }
}

struct Client {
    fill: drex_fill_mode,
    /// Prompt, emitted tokens, and the drafts after them.
    inputs: Vec<u64>,
    prompt: usize,
    emitted: usize,
    want: usize,
    kv: Kv,
}

impl Client {
    fn new(id: u64, fill: drex_fill_mode, layers: usize, rng: &mut fastrand::Rng) -> Self {
        let prompt = 1 + rng.u64(..5) as usize;
        let mut inputs: Vec<u64> = (0..prompt as u64).map(|i| mix(id, i) % 1000).collect();
        let mut alone = Alone::new(layers);
        let mut next = 0;
        for (pos, &input) in inputs.iter().enumerate() {
            next = alone.step(pos, input);
        }
        inputs.push(next);
        Client {
            fill,
            inputs,
            prompt,
            emitted: 1,
            want: 2 + rng.u64(..30) as usize,
            kv: alone.kv,
        }
    }

    fn drafts(&self) -> usize {
        self.inputs.len() - self.prompt - self.emitted
    }

    /// What the full model says alone, and its K/V.
    fn check(&self, id: u64) {
        let mut alone = Alone::new(self.kv.len());
        let upto = self.prompt + self.emitted;
        for pos in 0..upto {
            let next = alone.step(pos, self.inputs[pos]);
            let known = self.inputs.get(pos + 1).filter(|_| pos + 1 < upto);
            if let (Some(&t), true) = (
                known,
                self.fill == DREX_FILL_VERIFY && pos + 1 >= self.prompt,
            ) {
                assert_eq!(
                    t,
                    next,
                    "request {id}, position {}: not the full model's token",
                    pos + 1
                );
            }
        }
        if self.fill == DREX_FILL_COPY {
            return;
        }
        for (layer, (own, full)) in self.kv.iter().zip(&alone.kv).enumerate() {
            for (pos, (a, b)) in own.iter().zip(full).enumerate().take(upto - 1) {
                if a.is_some() {
                    assert_eq!(a, b, "request {id}: K/V of layer {layer} at {pos}");
                }
            }
        }
    }
}

#[derive(Default, Debug)]
struct Seen {
    tokens: usize,
    exits: usize,
    accepted: usize,
    replaced: usize,
    dropped: usize,
    along: usize,
    settled: usize,
    cancelled: usize,
    given_up: usize,
}

struct World {
    ramps: Vec<u32>,
    policy: drex_policy,
    fills: Vec<drex_fill_mode>,
    slots: u32,
    batch: u32,
    max_pending: u32,
    chaos: bool,
}

fn run(w: &World, seed: u64) -> Seen {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut c = config(&w.ramps, 6, w.batch, w.policy);
    c.n_slots = w.slots;
    c.max_pending = w.max_pending;
    let layers = c.n_layers as usize;
    let e = Engine::new(&c);
    let mut clients: BTreeMap<u64, Client> = BTreeMap::new();
    let mut arena = vec![0u64; w.slots as usize];
    let (mut next_id, mut now, mut idle) = (0u64, 0u64, 0);
    let mut seen = Seen::default();
    let total = 24;
    while next_id < total || !clients.is_empty() {
        while next_id < total && clients.len() < 6 {
            let fill = w.fills[rng.u64(..w.fills.len() as u64) as usize];
            e.add_with(next_id, |r| {
                r.fill = fill;
                r.threshold = [0.2, 0.4, 0.7, 2.0][rng.u64(..4) as usize];
            })
            .unwrap();
            clients.insert(next_id, Client::new(next_id, fill, layers, &mut rng));
            e.ready(next_id, now).unwrap();
            next_id += 1;
        }
        if w.chaos && rng.u64(..40) == 0 {
            let id = *clients
                .keys()
                .nth(rng.u64(..clients.len() as u64) as usize)
                .unwrap();
            e.remove(id).unwrap();
            clients.remove(&id).unwrap().check(id);
            seen.cancelled += 1;
            continue;
        }
        now += 1000;
        let p = e.plan(now, w.batch).unwrap();
        if p.rows.is_empty() {
            idle += 1;
            assert!(
                idle < 3,
                "stuck: {:?} with {} requests",
                e.stats(),
                clients.len()
            );
            continue;
        }
        idle = 0;
        assert!(p.rows.len() <= w.batch as usize);
        if w.chaos && rng.u64(..25) == 0 {
            e.abandon().unwrap();
            continue;
        }

        // The window, layer by layer over all rows.
        let at: Vec<(u64, usize)> = p
            .rows
            .iter()
            .map(|r| {
                (
                    r.request,
                    clients[&r.request].inputs.len() - 1 - r.back as usize,
                )
            })
            .collect();
        let mut hidden: Vec<u64> = p
            .rows
            .iter()
            .zip(&at)
            .map(|(r, &(id, pos))| match p.step.layer_begin {
                0 => mix(clients[&id].inputs[pos], 3),
                _ => arena[r.slot as usize],
            })
            .collect();
        for layer in p.step.layer_begin as usize..p.step.layer_end as usize {
            for (&(id, pos), &h) in at.iter().zip(&hidden) {
                write(&mut clients.get_mut(&id).unwrap().kv, layer, pos, h);
            }
            for (&(id, pos), h) in at.iter().zip(&mut hidden) {
                *h = attend(&clients[&id].kv, layer, pos, *h);
            }
        }
        let before = arena.clone();
        for (r, &h) in p.rows.iter().zip(&hidden) {
            arena[r.slot as usize] = h;
        }
        let says: Vec<u64> = at
            .iter()
            .zip(&hidden)
            .map(|(&(id, pos), &h)| token(clients[&id].inputs[pos], h))
            .collect();
        seen.along += p.rows.iter().filter(|r| r.back > 0).count();

        // What it decides, row by row.
        let decisions: Vec<drex_decision> = if p.step.ramp == DREX_NO_RAMP {
            let agrees: Vec<u8> = at
                .iter()
                .zip(&says)
                .map(|(&(id, pos), &t)| u8::from(clients[&id].inputs.get(pos + 1) == Some(&t)))
                .collect();
            let mut out = vec![99; agrees.len()];
            // SAFETY: both have that many.
            let status = unsafe {
                drex_verify(
                    e.raw,
                    agrees.as_ptr(),
                    agrees.len() as u32,
                    out.as_mut_ptr(),
                    out.len() as u32,
                )
            };
            ok(status).unwrap();
            out
        } else {
            let confidences: Vec<f32> = hidden.iter().map(|&h| confidence(h)).collect();
            let verdicts = e.ramp(&confidences).unwrap();
            verdicts.iter().map(|v| v.decision).collect()
        };
        // Sometimes somebody leaves while the step is open.
        let mut left = None;
        if w.chaos && rng.u64(..30) == 0 {
            let id = at[rng.u64(..at.len() as u64) as usize].0;
            e.remove(id).unwrap();
            left = Some(id);
            seen.cancelled += 1;
        }
        if w.chaos && p.step.ramp != DREX_NO_RAMP && rng.u64(..20) == 0 {
            // The exits stand, with what came along with them; all else is as it was.
            e.abandon().unwrap();
            seen.given_up += 1;
            let left: Vec<u64> = (at.iter().zip(&decisions))
                .filter(|(_, d)| **d == DREX_DECISION_EXIT)
                .map(|((id, _), _)| *id)
                .collect();
            for (r, &(id, _)) in p.rows.iter().zip(&at) {
                if !left.contains(&id) {
                    arena[r.slot as usize] = before[r.slot as usize];
                }
            }
        } else {
            e.complete(now + 500, 400).unwrap();
        }
        let mut again = Vec::new();
        for (k, (&(id, pos), &d)) in at.iter().zip(&decisions).enumerate() {
            if left == Some(id) {
                if let Some(c) = clients.remove(&id) {
                    c.check(id);
                }
                continue;
            }
            let c = clients.get_mut(&id).unwrap();
            let own = p.rows[k].back == 0;
            match d {
                DREX_DECISION_EXIT => {
                    assert!(own);
                    let early = p.step.ramp != DREX_NO_RAMP;
                    seen.exits += usize::from(early);
                    c.inputs.push(says[k]);
                    if !(early && c.fill == DREX_FILL_VERIFY) {
                        c.emitted += 1;
                        seen.tokens += 1;
                    }
                    if early && c.fill == DREX_FILL_COPY {
                        for layer in p.step.layer_end as usize..layers {
                            write(&mut c.kv, layer, pos, hidden[k]);
                        }
                    }
                }
                DREX_DECISION_ACCEPT => {
                    assert!(!own && c.fill == DREX_FILL_VERIFY);
                    assert_eq!(c.inputs[pos + 1], says[k]);
                    c.emitted += 1;
                    seen.tokens += 1;
                    seen.accepted += 1;
                }
                DREX_DECISION_REPLACE => {
                    assert!(!own && c.fill == DREX_FILL_VERIFY);
                    assert_ne!(c.inputs[pos + 1], says[k]);
                    c.inputs.truncate(pos + 1);
                    c.inputs.push(says[k]);
                    for layer in &mut c.kv {
                        layer.truncate(pos + 1);
                    }
                    c.emitted += 1;
                    seen.tokens += 1;
                    seen.replaced += 1;
                }
                DREX_DECISION_DROP => seen.dropped += 1,
                DREX_DECISION_PENDING => assert!(!own),
                DREX_DECISION_HOLD | DREX_DECISION_STAY => assert!(own),
                other => panic!("decision {other}"),
            }
            if !again.contains(&id) && e.info(id).unwrap().state == DREX_REQUEST_IDLE {
                again.push(id);
            }
        }
        for id in again {
            let c = &clients[&id];
            let done = c.emitted >= c.want;
            if done && c.fill != DREX_FILL_VERIFY && rng.u64(..2) == 0 || done && c.drafts() == 0 {
                e.remove(id).unwrap();
                clients.remove(&id).unwrap().check(id);
            } else if c.emitted + c.drafts() >= c.want {
                let mut n = 0;
                // SAFETY: a handle.
                ok(unsafe { drex_request_settle(e.raw, id, now + 600, &mut n) }).unwrap();
                seen.settled += usize::from(n > 0);
                if n == 0 {
                    e.remove(id).unwrap();
                    clients.remove(&id).unwrap().check(id);
                }
            } else {
                e.ready(id, now + 600).unwrap();
            }
        }
        let s = e.stats();
        assert!(s.pending_rows <= u64::from(w.slots - 6));
    }
    let s = e.stats();
    assert_eq!(
        (s.slots_free, s.pending_rows, s.held_rows, s.requests),
        (u64::from(w.slots), 0, 0, 0)
    );
    if !w.chaos {
        assert_eq!(s.tokens as usize, seen.tokens);
        assert_eq!(
            (s.drafts_accepted as usize, s.drafts as usize),
            (seen.accepted, seen.accepted + seen.replaced)
        );
        assert_eq!(s.rows_dropped as usize, seen.dropped);
    }
    seen
}

#[test]
fn the_full_models_tokens_and_cache_come_out() {
    let mut all = Seen::default();
    let mut seed = 0;
    for policy in [
        DREX_POLICY_HOLD,
        DREX_POLICY_LATENCY,
        DREX_POLICY_ART,
        DREX_POLICY_AUTO,
        DREX_POLICY_LAZY,
        DREX_POLICY_EAGER,
    ] {
        for ramps in [&[2][..], &[1, 3], &[2, 4, 6]] {
            for fills in [
                &[DREX_FILL_VERIFY][..],
                &[DREX_FILL_POSTFILL],
                &[DREX_FILL_COPY, DREX_FILL_POSTFILL, DREX_FILL_VERIFY],
            ] {
                for (slots, batch, max_pending) in [(64, 16, 0), (64, 5, 3), (8, 4, 0), (30, 2, 9)]
                {
                    for chaos in [false, true] {
                        seed += 1;
                        let w = World {
                            ramps: ramps.to_vec(),
                            policy,
                            fills: fills.to_vec(),
                            slots,
                            batch,
                            max_pending,
                            chaos,
                        };
                        let s = run(&w, seed);
                        all.tokens += s.tokens;
                        all.exits += s.exits;
                        all.accepted += s.accepted;
                        all.replaced += s.replaced;
                        all.dropped += s.dropped;
                        all.along += s.along;
                        all.settled += s.settled;
                        all.cancelled += s.cancelled;
                        all.given_up += s.given_up;
                    }
                }
            }
        }
    }
    println!("{all:?}");
    assert!(
        all.tokens > 50_000 && all.exits > 5_000 && all.along > 5_000,
        "{all:?}"
    );
    assert!(
        all.accepted > 2_000 && all.replaced > 300 && all.dropped > 300,
        "{all:?}"
    );
    assert!(all.settled > 300 && all.cancelled > 300, "{all:?}");
    assert!(all.given_up > 1_000, "{all:?}");
}

#[test]
fn verify_names_what_is_wrong() {
    let mut c = config(&[2], 2, 4, DREX_POLICY_LATENCY);
    c.n_slots = 6;
    c.fill = DREX_FILL_VERIFY;
    let e = Engine::new(&c);
    e.add(1).unwrap();
    e.ready(1, 0).unwrap();
    let verify = |agrees: &[u8], capacity: u32| {
        let mut out = [0; 8];
        // SAFETY: room for 8.
        ok(unsafe {
            drex_verify(
                e.raw,
                agrees.as_ptr(),
                agrees.len() as u32,
                out.as_mut_ptr(),
                capacity,
            )
        })
        .map(|()| out[..agrees.len()].to_vec())
    };
    let fails = |r: Result<Vec<u32>, Failed>, status, part: &str| {
        assert_eq!(r, Err(Failed(status)), "{}", text());
        assert!(text().contains(part), "{}", text());
    };
    // Before anything else, and whatever the answers are.
    fails(verify(&[9], 8), DREX_ERROR_CALL_ORDER, "drex_plan");
    e.plan(1, 4).unwrap();
    fails(verify(&[9], 8), DREX_ERROR_CALL_ORDER, "drex_ramp");
    assert_eq!(e.ramp(&[0.9]).unwrap()[0].decision, DREX_DECISION_EXIT);
    // SAFETY: a handle.
    let settle = |id| ok(unsafe { drex_request_settle(e.raw, id, 2, ptr::null_mut()) });
    assert_eq!(settle(1), Err(Failed(DREX_ERROR_CALL_ORDER)));
    assert!(text().contains("drex_complete"), "{}", text());
    e.complete(2, 1).unwrap();
    assert_eq!(e.stats().tokens, 0, "a draft is no token");
    e.ready(1, 3).unwrap();
    e.plan(4, 4).unwrap();
    e.ramp(&[0.1]).unwrap();
    e.complete(5, 1).unwrap();
    assert_eq!(e.plan(6, 1).unwrap_err(), Failed(DREX_ERROR_CAPACITY));
    assert!(
        text().contains("capacity is 1") && text().contains('2'),
        "{}",
        text()
    );
    let p = e.plan(6, 4).unwrap();
    assert_eq!(p.rows.iter().map(|r| r.back).collect::<Vec<_>>(), [1, 0]);
    assert_eq!(e.complete(7, 1), Err(Failed(DREX_ERROR_CALL_ORDER)));
    assert!(text().contains("drex_verify"), "{}", text());
    fails(verify(&[9], 8), DREX_ERROR_INVALID_ARGUMENT, "n_rows is 1");
    fails(
        verify(&[9; 3], 8),
        DREX_ERROR_INVALID_ARGUMENT,
        "n_rows is 3",
    );
    fails(verify(&[9, 9], 1), DREX_ERROR_CAPACITY, "capacity is 1");
    fails(
        verify(&[3, 0], 8),
        DREX_ERROR_INVALID_ARGUMENT,
        "agrees[0] is 3",
    );
    // The second row is no draft, and follows one that does not stand: nobody
    // looks at what is said of it.
    assert_eq!(
        verify(&[0, 9], 8).unwrap(),
        [DREX_DECISION_REPLACE, DREX_DECISION_DROP]
    );
    fails(verify(&[0, 1], 8), DREX_ERROR_CALL_ORDER, "drex_complete");
    // A step that is abandoned after that is as if it had not been planned.
    e.abandon().unwrap();
    let s = e.stats();
    assert_eq!((s.tokens, s.drafts, s.pending_rows), (0, 0, 1));
    let again = e.plan(7, 4).unwrap();
    assert_eq!(
        again.rows.iter().map(|r| r.back).collect::<Vec<_>>(),
        [1, 0]
    );
    assert_eq!(e.complete(7, 1), Err(Failed(DREX_ERROR_CALL_ORDER)));
    verify(&[0, 1], 8).unwrap();
    e.complete(7, 1).unwrap();
    let s = e.stats();
    assert_eq!(
        (s.tokens, s.drafts, s.drafts_accepted, s.rows_dropped),
        (1, 1, 0, 1)
    );
    assert_eq!((s.slots_free, s.pending_rows), (6, 0));
    // A right draft with which its request ends: what follows is no token.
    e.ready(1, 8).unwrap();
    e.plan(8, 4).unwrap();
    e.ramp(&[0.9]).unwrap();
    e.complete(9, 1).unwrap();
    e.ready(1, 9).unwrap();
    e.plan(9, 4).unwrap();
    e.ramp(&[0.1]).unwrap();
    e.complete(10, 1).unwrap();
    e.plan(10, 4).unwrap();
    assert_eq!(
        verify(&[2, 7], 8).unwrap(),
        [DREX_DECISION_ACCEPT, DREX_DECISION_DROP]
    );
    e.complete(11, 1).unwrap();
    let s = e.stats();
    assert_eq!(
        (s.tokens, s.drafts, s.drafts_accepted, s.rows_dropped),
        (2, 2, 1, 2)
    );
    let mut n = 7;
    // SAFETY: a handle.
    ok(unsafe { drex_request_settle(e.raw, 1, 12, &mut n) }).unwrap();
    assert_eq!(n, 0, "nothing is pending");
    assert_eq!(settle(9), Err(Failed(DREX_ERROR_UNKNOWN_REQUEST)));
}

#[test]
fn speculate_names_what_is_wrong() {
    let p = [0.5f32, 0.5];
    let mut out = -1;
    let mut call = |p: &[f32], q: Option<&[f32]>, draft, u| {
        let q = q.map_or(ptr::null(), |q| q.as_ptr());
        // SAFETY: two probabilities each.
        let status = unsafe { drex_speculate(p.as_ptr(), q, 2, draft, u, 0.5, &mut out) };
        ok(status).map(|()| out)
    };
    assert_eq!(call(&p, Some(&p), 1, 0.9), Ok(1));
    assert_eq!(call(&[0.0, 1.0], None, 0, 0.0), Ok(1));
    for (p, q, draft, u, part) in [
        (&p[..], None, 2, 0.5, "draft_token"),
        (&p, None, -1, 0.5, "draft_token is -1"),
        (&p, None, 0, 1.0, "u is 1"),
        (&[f32::NAN, 1.0], None, 0, 0.5, "deep[0] is NaN"),
        (&p, Some(&[0.5, -0.5][..]), 0, 0.5, "draft[1] is -0.5"),
        (&[0.0, 0.0], None, 0, 0.5, "deep is 0"),
    ] {
        assert_eq!(
            call(p, q, draft, u),
            Err(Failed(DREX_ERROR_INVALID_ARGUMENT)),
            "{part}"
        );
        assert!(text().contains(part), "{} does not say {part}", text());
    }
}
