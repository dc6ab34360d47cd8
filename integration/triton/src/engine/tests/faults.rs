// SPDX-License-Identifier: Apache-2.0
//! Failed passes, cancelled requests, and what is left after them.

use super::*;

#[test]
fn a_failed_call_ends_the_requests_that_were_in_it_and_no_others() {
    for (call, fill, words) in [
        (Call::Prompt, "copy", "on the prompt (-3)"),
        (Call::Shallow, "copy", "on a layer window (-3)"),
        (Call::Shallow, "verify", "on a layer window (-3)"),
        (Call::Deep, "postfill", "on a layer window (-3)"),
        (Call::Deep, "verify", "on a layer window (-3)"),
        (Call::Deep, "copy", "on a layer window (-3)"),
        (Call::Project, "propagate", "to project K and V (-3)"),
    ] {
        for after in 0..12 {
            let mut bench = Bench::new(settings("hold", fill));
            bench.engine.decoder.fault = Some(Fault {
                call,
                code: -3,
                above: 0,
                after: if call == Call::Prompt { 0 } else { after },
                times: 1,
            });
            for _ in 0..4 {
                bench.push(greedy(20));
            }
            // all four have their slots, and keep them until something fails
            let failed = |engine: &Engine<Fake>| !engine.decoder.failed.is_empty();
            assert!(bench.until(failed), "{call:?} {fill} {after}");
            let slots: Vec<u64> = bench
                .engine
                .decoder
                .failed
                .iter()
                .map(|s| *s as u64 + 1)
                .collect();
            let answers = bench.run();
            for id in 1..=4 {
                let answer = &answers[&id];
                if slots.contains(&id) {
                    let failure = answer.ends[0].clone().unwrap_err();
                    assert_eq!(failure.code, abi::ERROR_INTERNAL);
                    assert!(failure.text.contains(words), "{}", failure.text);
                } else {
                    assert_eq!(
                        answer.ends,
                        [Ok(Finish::Length)],
                        "{call:?} {fill} {after} {id}"
                    );
                    assert_eq!(answer.tokens.len(), 20);
                }
            }
            // what comes next is as if nothing had been
            let id = bench.push(Sampling {
                drex_fill: Some(DREX_FILL_VERIFY),
                ..greedy(20)
            });
            assert_eq!(bench.run()[&id].tokens, full(id, 20, None));
        }
    }
}

#[test]
fn where_there_is_no_room_fewer_rows_are_tried() {
    for call in [Call::Prompt, Call::Shallow] {
        for fill in crate::sampling::FILLS {
            let mut bench = Bench::new(settings("latency", fill));
            bench.engine.decoder.fault = Some(Fault {
                call,
                code: 1,
                above: 1,
                after: 0,
                times: u32::MAX,
            });
            for _ in 0..4 {
                bench.push(greedy(10));
            }
            let answers = bench.run();
            assert!(!bench.engine.decoder.failed.is_empty());
            for answer in answers.values() {
                assert_eq!(
                    (answer.tokens.len(), &answer.ends[..]),
                    (10, &[Ok(Finish::Length)][..])
                );
            }
        }
    }
    // even one row is too many
    let mut bench = Bench::new(settings("latency", "copy"));
    bench.engine.decoder.fault = Some(Fault {
        call: Call::Shallow,
        code: 1,
        above: 0,
        after: 0,
        times: u32::MAX,
    });
    let id = bench.push(greedy(10));
    assert!(bench.run()[&id].ends[0].is_err());
}

#[test]
fn cancelled_wherever_they_are() {
    let cancelled = |bench: &Bench, id| bench.answers()[&id].ends == [Ok(Finish::Cancelled)];

    // a held row, and one that waits for a slot
    let mut bench = Bench::new(settings("hold", "copy"));
    for _ in 0..6 {
        bench.push(greedy(40));
    }
    assert!(bench.until(|engine| held(engine).is_some()));
    let id = held(&bench.engine).unwrap();
    let before = bench.engine.stats().held_rows;
    bench.cancel(id);
    bench.cancel(6);
    bench.engine.cancel();
    assert_eq!(bench.engine.stats().held_rows, before - 1);
    assert!(cancelled(&bench, id) && cancelled(&bench, 6));
    // The fifth has the slot, and begins in the next step.
    assert_eq!(load(&bench.engine), (0, 3));
    let answers = bench.run();
    assert_eq!(
        answers
            .values()
            .filter(|a| a.ends == [Ok(Finish::Length)])
            .count(),
        4
    );

    // pending rows
    for fill in ["postfill", "verify"] {
        let mut bench = Bench::new(settings("hold", fill));
        for _ in 0..4 {
            bench.push(greedy(40));
        }
        assert!(bench.until(|engine| engine.stats().pending_rows > 0));
        for id in 1..=4 {
            bench.cancel(id);
        }
        bench.engine.step().unwrap();
        bench.all_free();
        assert!((1..=4).all(|id| cancelled(&bench, id)));
    }

    // one whose K and V are still to be projected
    let mut bench = Bench::new(settings("hold", "propagate"));
    for _ in 0..4 {
        bench.push(greedy(40));
    }
    assert!(bench.until(|engine| engine.leavers.len() > 1));
    let at = bench.engine.leavers[0].slot;
    let id = bench.engine.slots[at].as_ref().unwrap().id;
    bench.cancel(id);
    let left = bench.engine.leavers.len();
    bench.engine.cancel();
    assert_eq!(bench.engine.leavers.len(), left - 1);
    assert!(cancelled(&bench, id));
    bench.run();

    // within the prompt
    let mut bench = Bench::new(Settings {
        batch: 4,
        ..settings("hold", "copy")
    });
    for _ in 0..4 {
        bench.push(greedy(4));
    }
    bench.engine.step().unwrap();
    let at = bench.slot_of(4);
    assert!(bench.engine.slots[at].as_ref().unwrap().in_prompt());
    bench.cancel(4);
    bench.run();
    assert!(cancelled(&bench, 4));
}

#[test]
fn slots_and_cells_are_used_again() {
    let mut bench = Bench::new(settings("hold", "verify"));
    for round in 1..=5 {
        for _ in 0..9 {
            bench.push(greedy(25));
        }
        let answers = bench.run();
        assert_eq!(answers.len(), 9 * round);
        for (id, answer) in answers {
            assert_eq!(answer.tokens, full(id, 25, None));
        }
    }
    // whoever comes alone finds no cells of others
    let id = bench.push(greedy(1));
    bench.engine.step().unwrap();
    assert_eq!(bench.engine.decoder.cells_used(), prompt(id).len());
}

#[test]
fn everything_fails_at_once() {
    let mut bench = Bench::new(settings("hold", "propagate"));
    for _ in 0..6 {
        bench.push(greedy(40));
    }
    assert!(bench.until(|engine| !engine.leavers.is_empty()));
    bench.engine.fail_all(&Failure::internal("all"));
    bench.all_free();
    for answer in bench.answers().values() {
        assert_eq!(answer.ends, [Err(Failure::internal("all"))]);
    }
}

#[test]
fn what_drex_says_becomes_triton_s_code() {
    for (status, code) in [
        (DREX_ERROR_INVALID_ARGUMENT, abi::ERROR_INVALID_ARG),
        (DREX_ERROR_UNSUPPORTED, abi::ERROR_UNSUPPORTED),
        (DREX_ERROR_CAPACITY, abi::ERROR_UNAVAILABLE),
        (DREX_ERROR_MEMORY, abi::ERROR_UNAVAILABLE),
        (DREX_ERROR_CALL_ORDER, abi::ERROR_INTERNAL),
        (DREX_ERROR_DEVICE, abi::ERROR_INTERNAL),
        (DREX_ERROR_INVALID_HANDLE, abi::ERROR_INTERNAL),
    ] {
        assert_eq!(check(status).unwrap_err().code, code);
    }
}
