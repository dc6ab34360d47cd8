// SPDX-License-Identifier: Apache-2.0
//! The engine with a model that can fail.

use std::collections::HashMap;
use std::sync::Mutex;

use super::fake::{self, Call, Fake, Fault};
use super::*;

type Events = Arc<Mutex<Vec<(u64, Event)>>>;

struct Bench {
    engine: Engine<Fake>,
    events: Events,
    next: u64,
    flags: HashMap<u64, Arc<AtomicBool>>,
}

/// What became of a request.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<i32>,
    ends: Vec<Result<Finish, Failure>>,
    figures: Figures,
}

fn settings(policy: &str, fill: &str) -> Settings {
    let fill = crate::sampling::FILLS.iter().position(|name| *name == fill);
    Settings {
        policy: policy.into(),
        fill: fill.unwrap() as u32,
        slots: 4,
        context: 64,
        batch: 32,
        max_pending: 4,
        ..Settings::default()
    }
}

fn prompt(id: u64) -> Vec<i32> {
    (0..3 + id as i32 % 5)
        .map(|i| 1 + (7 * i + 11 * id as i32) % 60)
        .collect()
}

/// What the full model says, alone.
fn full(id: u64, n: usize, seed: Option<u32>) -> Vec<i32> {
    let mut tokens = prompt(id);
    let begin = tokens.len();
    for _ in 0..n {
        let best = fake::deep(&tokens);
        tokens.push(seed.map_or(best, |seed| fake::sampled(best, seed, tokens.len())));
    }
    tokens.split_off(begin)
}

impl Bench {
    fn new(settings: Settings) -> Self {
        let events: Events = Arc::default();
        let sent = events.clone();
        let out: Out = Box::new(move |id, event| sent.lock().unwrap().push((id, event)));
        let fake = Fake::new(settings.slots, settings.context);
        Self {
            engine: Engine::new(fake, settings, out).unwrap(),
            events,
            next: 1,
            flags: HashMap::new(),
        }
    }

    fn push(&mut self, sampling: Sampling) -> u64 {
        self.push_job(sampling, now_ns(), Vec::new())
    }

    fn push_job(&mut self, sampling: Sampling, arrived_ns: u64, bad: Vec<Vec<i32>>) -> u64 {
        let id = self.next;
        self.next += 1;
        let cancelled = Arc::<AtomicBool>::default();
        self.flags.insert(id, cancelled.clone());
        self.engine.push(Job {
            id,
            prompt: prompt(id),
            bad,
            sampling,
            arrived_ns,
            cancelled,
        });
        id
    }

    fn cancel(&self, id: u64) {
        self.flags[&id].store(true, Ordering::Relaxed);
    }

    /// Steps until it is so, and says whether it ever was.
    fn until(&mut self, is: impl Fn(&Engine<Fake>) -> bool) -> bool {
        for _ in 0..5000 {
            if is(&self.engine) {
                return true;
            }
            if self.engine.is_idle() {
                return false;
            }
            self.engine.step().unwrap();
        }
        panic!("it does not end");
    }

    fn run(&mut self) -> HashMap<u64, Answer> {
        self.until(|_| false);
        self.all_free();
        self.answers()
    }

    fn answers(&self) -> HashMap<u64, Answer> {
        let mut answers: HashMap<u64, Answer> = HashMap::new();
        for (id, event) in self.events.lock().unwrap().iter() {
            let answer = answers.entry(*id).or_default();
            assert!(answer.ends.is_empty(), "request {id} goes on after its end");
            match event {
                Event::Started { prompt_tokens } => {
                    assert_eq!(*prompt_tokens as usize, prompt(*id).len());
                }
                Event::Token { token, end, .. } => {
                    answer.tokens.extend(token);
                    if let Some((end, figures)) = end {
                        answer.ends.push(Ok(*end));
                        answer.figures = figures.clone();
                    }
                }
                Event::Failed(failure) => answer.ends.push(Err(failure.clone())),
            }
        }
        answers
    }

    /// Nothing is left of any request.
    fn all_free(&self) {
        let stats = self.engine.stats();
        let slots = self.engine.settings.slots;
        let arena = slots * (1 + self.engine.settings.max_pending);
        assert_eq!(stats.slots_free, u64::from(arena));
        assert_eq!(
            (stats.requests, stats.held_rows, stats.pending_rows),
            (0, 0, 0)
        );
        assert_eq!(self.engine.free.len(), slots as usize);
        assert!(self.engine.leavers.is_empty());
        assert_eq!(self.engine.load(), (0, 0));
    }

    fn slot_of(&self, id: u64) -> usize {
        let mut slots = self.engine.slots.iter();
        let is = |slot: &Option<Slot<_>>| slot.as_ref().is_some_and(|slot| slot.id == id);
        slots.position(is).unwrap()
    }
}

fn greedy(max_tokens: u32) -> Sampling {
    Sampling {
        temperature: 0.0,
        max_tokens,
        ..Sampling::default()
    }
}

fn held(engine: &Engine<Fake>) -> Option<u64> {
    engine
        .slots
        .iter()
        .flatten()
        .map(|slot| slot.id)
        .find(|&id| {
            let mut info: drex_request_info = zeroed();
            info.size = size_of::<drex_request_info>() as u32;
            // SAFETY: a struct with its size.
            let status = unsafe { drex_request_get(engine.drex, id, &mut info) };
            status == DREX_OK && info.state == DREX_REQUEST_HELD
        })
}

#[test]
fn verify_gives_what_the_full_model_does() {
    for policy in ["hold", "latency", "lazy", "off", "auto"] {
        let mut bench = Bench::new(settings(policy, "verify"));
        for id in 1..=12u64 {
            let mut sampling = greedy(5 + 4 * id as u32);
            if id % 3 == 0 {
                sampling.temperature = 1.0;
                sampling.seed = Some(id as u32);
            }
            assert_eq!(bench.push(sampling), id);
        }
        let answers = bench.run();
        let (mut drafts, mut accepted) = (0, 0);
        for (id, answer) in &answers {
            let seed = (id % 3 == 0).then_some(*id as u32);
            let n = 5 + 4 * *id as usize;
            assert_eq!(answer.tokens, full(*id, n, seed), "{policy}, request {id}");
            assert_eq!(answer.ends, [Ok(Finish::Length)]);
            drafts += answer.figures.drafts;
            accepted += answer.figures.drafts_accepted;
        }
        assert_eq!(answers.len(), 12);
        let stats = bench.engine.stats();
        assert_eq!((stats.drafts, stats.drafts_accepted), (drafts, accepted));
        // Some are right and some are not, else this test has seen nothing.
        let some = accepted > 20 && drafts > accepted + 5;
        match policy {
            "off" => assert_eq!(drafts, 0),
            "auto" => {} // as it likes
            _ => assert!(some, "{policy}: {accepted} of {drafts}"),
        }
    }
}

#[test]
fn a_request_may_ask_for_verify_and_the_context_ends_it_all_the_same() {
    let mut bench = Bench::new(settings("latency", "copy"));
    for id in 1..=4u64 {
        let mut sampling = greedy(1000);
        sampling.drex_fill = Some(if id % 2 == 0 {
            DREX_FILL_VERIFY
        } else {
            DREX_FILL_POSTFILL
        });
        bench.push(sampling);
    }
    let answers = bench.run();
    for (id, answer) in answers {
        // The last one needs no cell.
        let n = 64 - prompt(id).len() + 1;
        assert_eq!(answer.tokens.len(), n, "request {id}");
        assert_eq!(answer.ends, [Ok(Finish::Length)]);
        if id % 2 == 0 {
            assert_eq!(answer.tokens, full(id, n, None));
        }
    }
}

#[test]
fn every_fill_leaves_no_holes_and_exits_early() {
    for fill in crate::sampling::FILLS {
        for policy in ["hold", "latency", "art"] {
            let mut bench = Bench::new(settings(policy, fill));
            for _ in 0..10 {
                bench.push(greedy(30));
            }
            let answers = bench.run();
            let exits: u64 = answers.values().flat_map(|a| &a.figures.exits).sum();
            assert!(exits > 30, "{policy} {fill}: {exits}");
            for answer in answers.values() {
                assert_eq!(
                    (answer.tokens.len(), &answer.ends[..]),
                    (30, &[Ok(Finish::Length)][..])
                );
            }
        }
    }
}

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
    assert_eq!(bench.engine.load(), (1, 3));
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
fn too_many_wait_or_too_long() {
    let mut bench = Bench::new(Settings {
        slots: 1,
        max_queue: 2,
        ..settings("hold", "copy")
    });
    bench.push(greedy(4));
    bench.engine.step().unwrap();
    let late = bench.push_job(
        Sampling {
            timeout_us: 5,
            ..greedy(4)
        },
        1,
        Vec::new(),
    );
    bench.push(greedy(4));
    let refused = bench.push(greedy(4));
    let answers = bench.run();
    for (id, words) in [(late, "timeout of 5 us"), (refused, "max_queue")] {
        let failure = answers[&id].ends[0].clone().unwrap_err();
        assert_eq!(failure.code, abi::ERROR_UNAVAILABLE);
        assert!(failure.text.contains(words), "{}", failure.text);
        assert!(answers[&id].tokens.is_empty());
    }
    assert_eq!(answers[&3].ends, [Ok(Finish::Length)]);
}

#[test]
fn a_timeout_counts_from_the_arrival() {
    let mut bench = Bench::new(settings("hold", "copy"));
    let second = 1_000_000_000;
    let id = bench.push_job(
        Sampling {
            timeout_us: 3_600_000_000,
            ..greedy(8)
        },
        now_ns().saturating_sub(5 * second),
        Vec::new(),
    );
    bench.engine.step().unwrap();
    let slot = bench.engine.slots[bench.slot_of(id)].as_ref().unwrap();
    let left = slot.deadline_ns.unwrap() - now_ns();
    assert!(left <= 3595 * second, "{left}");
    assert_eq!(bench.run()[&id].figures.deadline_misses, 0);

    // it is over once the request runs: that goes on, and what comes late is counted
    let id = bench.push_job(
        Sampling {
            timeout_us: 1_000_000,
            ..greedy(8)
        },
        now_ns(),
        Vec::new(),
    );
    bench.engine.admit();
    let at = bench.slot_of(id);
    bench.engine.slots[at].as_mut().unwrap().deadline_ns = Some(1);
    let answer = &bench.run()[&id];
    assert_eq!(answer.tokens.len(), 8);
    assert!(answer.figures.deadline_misses > 0);
}

#[test]
fn ends_and_bans() {
    for fill in ["copy", "verify"] {
        let mut bench = Bench::new(settings("off", fill));
        let whole = full(1, 12, None);
        assert!(!whole[..4].contains(&whole[4]));
        let stop = Sampling {
            stop_token_ids: vec![whole[4]],
            ..greedy(12)
        };
        bench.push(stop);
        let answers = bench.run();
        assert_eq!(answers[&1].tokens, whole[..5]);
        assert_eq!(answers[&1].ends, [Ok(Finish::Stop)]);

        // not before min_tokens: another token is chosen in its place
        let whole = full(2, 12, None);
        bench.push(Sampling {
            stop_token_ids: vec![whole[4]],
            min_tokens: 9,
            ..greedy(12)
        });
        let tokens = &bench.run()[&2].tokens;
        assert_eq!(tokens[..4], whole[..4]);
        assert!(!tokens[..9].contains(&whole[4]), "{tokens:?}");

        // a word of two tokens: the second does not follow the first
        let whole = full(3, 12, None);
        bench.push_job(greedy(12), now_ns(), vec![whole[3..5].to_vec()]);
        let tokens = &bench.run()[&3].tokens;
        assert_eq!(tokens[..4], whole[..4]);
        assert_ne!(tokens[4], whole[4]);
        assert_eq!(tokens.len(), 12);
    }
}

#[test]
fn policy_art_is_calibrated_before_the_first_request() {
    let bench = Bench::new(settings("art", "copy"));
    let calls = &bench.engine.decoder.calls;
    let count = |call| calls.iter().filter(|&&c| c == call).count();
    // 1, 2 and 4 rows, each four times: all layers, and three windows
    assert_eq!(
        (count(Call::Prompt), count(Call::Shallow), count(Call::Deep)),
        (12, 12, 24)
    );
    assert_eq!(bench.engine.decoder.cells_used(), 0);
    let pinned = Settings {
        art_ratio: 0.5,
        ..settings("art", "copy")
    };
    assert!(Bench::new(pinned).engine.decoder.calls.is_empty());
}

#[test]
fn what_was_learned_is_kept_in_a_file() {
    let path = std::env::temp_dir().join(format!("drex-profile-{}.json", std::process::id()));
    let with = || Settings {
        profile: Some(path.to_string_lossy().into_owned()),
        ..settings("hold", "copy")
    };
    let mut bench = Bench::new(with());
    bench.push(greedy(20));
    bench.run();
    drop(bench);
    let first = std::fs::read_to_string(&path).unwrap();
    // read, and written again as it was, but for the last digit
    drop(Bench::new(with()));
    let second = std::fs::read_to_string(&path).unwrap();
    let costs = |text: &str| -> Vec<f64> {
        let profile: serde_json::Value = serde_json::from_str(text).unwrap();
        let segments = profile["segments"].as_array().unwrap();
        segments.iter().map(|s| s["ns"].as_f64().unwrap()).collect()
    };
    let (first, second) = (costs(&first), costs(&second));
    assert!(first.len() == 3 && first[0] > 0.0);
    for (a, b) in first.iter().zip(&second) {
        assert!((a - b).abs() <= a * 1e-9, "{a} {b}");
    }
    std::fs::write(&path, "{").unwrap();
    let out: Out = Box::new(|_, _| {});
    let failure = Engine::new(Fake::new(4, 64), with(), out).err().unwrap();
    assert!(
        failure.text.starts_with("parameters: profile "),
        "{}",
        failure.text
    );
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn the_context_is_at_most_what_the_model_was_trained_with() {
    let long = Settings {
        context: 4096,
        ..settings("hold", "copy")
    };
    let engine = Engine::new(Fake::new(4, 64), long, Box::new(|_, _| {})).unwrap();
    assert_eq!(engine.context(), 64);
}

#[test]
fn what_drex_says_becomes_triton_s_code() {
    for (status, code) in [
        (DREX_ERROR_INVALID_ARGUMENT, abi::ERROR_INVALID_ARG),
        (DREX_ERROR_UNSUPPORTED, abi::ERROR_UNSUPPORTED),
        (DREX_ERROR_CAPACITY, abi::ERROR_UNAVAILABLE),
        (DREX_ERROR_CALL_ORDER, abi::ERROR_INTERNAL),
        (DREX_ERROR_DEVICE, abi::ERROR_INTERNAL),
        (DREX_ERROR_INVALID_HANDLE, abi::ERROR_INTERNAL),
    ] {
        assert_eq!(check(status).unwrap_err().code, code);
    }
}
