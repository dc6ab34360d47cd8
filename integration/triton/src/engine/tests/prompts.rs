// SPDX-License-Identifier: Apache-2.0
//! Prompts in windows: whole, in parts, cut at ramps, and what befalls them on their way.

use super::*;

/// What a request gets that has the engine for itself.
fn alone(settings: &Settings, id: u64, sampling: &Sampling) -> Vec<i32> {
    let mut bench = Bench::new(settings.clone());
    bench.next = id;
    bench.push(sampling.clone());
    bench.run().remove(&id).unwrap().tokens
}

fn small(policy: &str, fill: &str) -> Settings {
    Settings {
        batch: 8,
        max_pending: 2,
        ..settings(policy, fill)
    }
}

/// Every third one is sampled.
fn mixed(id: u64) -> Sampling {
    let mut sampling = greedy(6 + id as u32);
    if id.is_multiple_of(3) {
        sampling.temperature = 1.0;
        sampling.seed = Some(id as u32);
    }
    sampling
}

fn count(bench: &Bench, call: Call) -> usize {
    bench
        .engine
        .decoder
        .calls
        .iter()
        .filter(|&&one| one == call)
        .count()
}

fn sums(numbers: impl Iterator<Item = usize>) -> Vec<usize> {
    let add = |sum: &mut usize, n| {
        *sum += n;
        Some(*sum)
    };
    numbers.scan(0, add).collect()
}

/// Steps until prompt rows wait at a ramp, with requests that come one after another. Gives the requests' ids, in the
/// order of their rows.
fn at_a_ramp(bench: &mut Bench, most: u64) -> Vec<u64> {
    while bench.engine.transit.is_empty() {
        if bench.next <= most {
            bench.push(mixed(bench.next));
        }
        bench.engine.step().unwrap();
        assert!(!bench.engine.is_idle(), "no prompt row stops at a ramp");
    }
    let slot = |at: usize| bench.engine.slots[at].as_ref().unwrap().id;
    let mut ids: Vec<u64> = bench.engine.transit.iter().map(|t| slot(t.slot)).collect();
    ids.dedup();
    ids
}

/// All of them but these have what they get alone.
fn expect_alone(bench: &mut Bench, settings: &Settings, but: &[u64]) {
    for (id, answer) in bench.run() {
        if !but.contains(&id) {
            assert_eq!(answer.ends, [Ok(Finish::Length)], "request {id}");
            assert_eq!(
                answer.tokens,
                alone(settings, id, &mixed(id)),
                "request {id}"
            );
        }
    }
}

#[test]
fn a_request_gets_what_it_gets_alone() {
    for policy in ["off", "hold", "latency"] {
        for fill in crate::sampling::FILLS {
            for batch in [8, 32] {
                let settings = Settings {
                    batch,
                    ..small(policy, fill)
                };
                let mut bench = Bench::new(settings.clone());
                // One in a step, then two.
                for id in 1..=12 {
                    bench.push(mixed(id));
                    if id % 3 != 1 {
                        bench.engine.step().unwrap();
                    }
                }
                expect_alone(&mut bench, &settings, &[]);
                let fake = &bench.engine.decoder;
                let what = format!("{policy} {fill} {batch}: {:?}", fake.sizes);
                let together = |&&(own, prompts): &&(usize, usize)| own > 0 && prompts > 0;
                assert!(fake.sizes.iter().filter(together).count() > 3, "{what}");
                let most = fake.sizes.iter().map(|(own, prompts)| own + prompts).max();
                assert!(most.unwrap() <= batch as usize, "{what}");
                let carried = count(&bench, Call::Carry);
                if policy == "off" {
                    assert_eq!(carried + count(&bench, Call::Shallow), 0, "{what}");
                } else {
                    assert!(carried > 3, "{what}");
                }
                // Every row begins once; a part ends within a prompt only where there is no room for all of it.
                let calls = fake.calls.iter().zip(&fake.sizes);
                let parts = calls.filter(|(call, _)| **call == Call::Prompt);
                let ends = sums(parts.map(|(_, (_, rows))| *rows));
                let whole = sums((1..=12).map(|id| prompt(id).len()));
                assert_eq!(ends.last(), whole.last(), "{what}");
                let within = ends.iter().any(|end| !whole.contains(end));
                assert_eq!(within, batch == 8, "{what}");
            }
        }
    }
}

#[test]
fn verify_is_lossless_beside_prompts_under_every_policy() {
    for policy in ["auto", "art", "lazy", "eager", "median", "mean"] {
        let mut bench = Bench::new(small(policy, "verify"));
        for id in 1..=12 {
            bench.push(mixed(id));
            bench.engine.step().unwrap();
        }
        for (id, answer) in bench.run() {
            let seed = id.is_multiple_of(3).then_some(id as u32);
            let tokens = full(id, 6 + id as usize, seed);
            assert_eq!(answer.tokens, tokens, "{policy}, request {id}");
        }
    }
}

#[test]
fn prompts_run_in_the_order_of_their_admission_unless_one_has_priority() {
    let settings = Settings {
        batch: 4,
        ..small("hold", "copy")
    };
    let mut bench = Bench::new(settings);
    for id in 1..=4 {
        bench.push(Sampling {
            drex_priority: i32::from(id == 3),
            ..greedy(3)
        });
    }
    bench.run();
    let events = bench.events.lock().unwrap();
    let mut first: Vec<u64> = Vec::new();
    for (id, event) in events.iter() {
        if matches!(event, Event::Token { .. }) && !first.contains(id) {
            first.push(*id);
        }
    }
    assert_eq!(first, [3, 1, 2, 4]);
}

#[test]
fn cancelled_between_the_halves_of_a_window() {
    for fill in crate::sampling::FILLS {
        let settings = Settings {
            batch: 32,
            ..small("hold", fill)
        };
        // One of several.
        let mut bench = Bench::new(settings.clone());
        bench.push(mixed(1));
        bench.engine.step().unwrap();
        for id in 2..=4 {
            bench.push(mixed(id));
        }
        let ids = at_a_ramp(&mut bench, 0);
        assert_eq!(ids, [2, 3, 4], "{fill}");
        bench.cancel(3);
        // Another request takes the slot while the others' rows are on their way.
        bench.push(mixed(5));
        bench.engine.step().unwrap();
        let rows = prompt(2).len() + prompt(4).len();
        let carry = bench.engine.decoder.calls.len() - 1;
        assert_eq!(bench.engine.decoder.calls[carry], Call::Carry);
        assert_eq!(bench.engine.decoder.sizes[carry].1, rows, "{fill}");
        assert_eq!(bench.answers()[&3].ends, [Ok(Finish::Cancelled)]);
        expect_alone(&mut bench, &settings, &[3]);

        // All of them.
        let mut bench = Bench::new(settings.clone());
        let ids = at_a_ramp(&mut bench, 12);
        for &id in &ids {
            bench.cancel(id);
        }
        let carried = count(&bench, Call::Carry);
        bench.engine.step().unwrap();
        assert_eq!(count(&bench, Call::Carry), carried, "{fill}");
        for &id in &ids {
            assert_eq!(bench.answers()[&id].ends, [Ok(Finish::Cancelled)]);
        }
        // The next ones find the slots.
        bench.push(mixed(bench.next));
        expect_alone(&mut bench, &settings, &ids);
    }
}

#[test]
fn either_half_of_a_window_fails() {
    for call in [Call::Prompt, Call::Carry] {
        for fill in crate::sampling::FILLS {
            let mut with_decode = 0;
            for after in 0..8 {
                let settings = small("hold", fill);
                let mut bench = Bench::new(settings.clone());
                bench.engine.decoder.fault = Some(Fault {
                    call,
                    code: -3,
                    above: 0,
                    after,
                    times: 1,
                });
                let mut before = Vec::new();
                while bench.engine.decoder.failed.is_empty() {
                    bench.push(mixed(bench.next));
                    let slots = bench.engine.slots.iter();
                    before = slots.map(|s| s.as_ref().map(|s| s.id)).collect();
                    bench.engine.step().unwrap();
                    assert!(bench.next < 60, "{call:?} {fill} {after}: nothing fails");
                }
                let answers = bench.answers();
                let (mut failed, mut words) = (Vec::new(), Vec::new());
                for (id, answer) in &answers {
                    if let Some(Err(failure)) = answer.ends.first() {
                        failed.push(*id);
                        words.push(failure.text.clone());
                    }
                }
                // The requests of its rows, some of which had their slots before the step.
                let sequences = bench.engine.decoder.failed.clone();
                assert_eq!(failed.len(), sequences.len(), "{call:?} {fill} {after}");
                for at in sequences {
                    let fresh = before[at as usize].is_none();
                    let known = before[at as usize].is_some_and(|id| failed.contains(&id));
                    assert!(fresh || known, "{call:?} {fill} {after}");
                }
                assert!(words.contains(&"llama.cpp failed on the prompt (-3)".to_owned()));
                let other = "llama.cpp failed on a layer window (-3)".to_owned();
                with_decode += usize::from(words.contains(&other));
                assert!(bench.engine.transit.is_empty());
                bench.push(mixed(bench.next));
                expect_alone(&mut bench, &settings, &failed);
            }
            assert!(with_decode > 1, "{call:?} {fill}: {with_decode}");
        }
    }
}

#[test]
fn prompt_rows_at_a_ramp_outlive_a_failed_projection() {
    let settings = small("hold", "propagate");
    let mut restarted = 0;
    for after in 0..12 {
        let mut bench = Bench::new(settings.clone());
        bench.engine.decoder.fault = Some(Fault {
            call: Call::Project,
            code: -3,
            above: 0,
            after,
            times: 1,
        });
        let mut waited = 0;
        while bench.engine.decoder.failed.is_empty() {
            bench.push(mixed(bench.next));
            waited = bench.engine.transit.len();
            bench.engine.step().unwrap();
            assert!(bench.next < 60, "no projection fails");
        }
        restarted += waited;
        assert!(bench.engine.transit.is_empty());
        let answers = bench.answers();
        let is_failed = |id: &u64| matches!(answers[id].ends.first(), Some(Err(_)));
        let failed: Vec<u64> = answers.keys().copied().filter(is_failed).collect();
        assert_eq!(failed.len(), bench.engine.decoder.failed.len());
        expect_alone(&mut bench, &settings, &failed);
    }
    assert!(restarted > 5, "{restarted} rows were at a ramp");
}

#[test]
fn where_there_is_no_room_fewer_prompt_rows_are_tried() {
    for above in [1, 2, 5] {
        for fill in crate::sampling::FILLS {
            let settings = small("hold", fill);
            let mut bench = Bench::new(settings.clone());
            bench.engine.decoder.fault = Some(Fault {
                call: Call::Prompt,
                code: 1,
                above,
                after: 0,
                times: u32::MAX,
            });
            for id in 1..=9 {
                bench.push(mixed(id));
                bench.engine.step().unwrap();
            }
            expect_alone(&mut bench, &settings, &[]);
            assert!(!bench.engine.decoder.failed.is_empty());
        }
    }
}
