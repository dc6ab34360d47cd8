// SPDX-License-Identifier: Apache-2.0
//! Queue, timeouts, context, and what is measured and kept.

use super::*;

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
    // The late one does not count.
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
    assert_eq!(answers[&4].ends, [Ok(Finish::Length)]);
}

#[test]
fn only_who_finds_no_slot_is_one_too_many() {
    for (max_queue, waiting) in [(0, 0), (1, 1)] {
        let mut bench = Bench::new(Settings {
            slots: 2,
            max_queue,
            ..settings("hold", "copy")
        });
        // All in one step.
        let ids: Vec<u64> = (0..4).map(|_| bench.push(greedy(4))).collect();
        let answers = bench.run();
        for (i, id) in ids.iter().enumerate() {
            let served = answers[id].ends[0] == Ok(Finish::Length);
            assert_eq!(
                served,
                i < 2 + waiting,
                "max_queue {max_queue}, request {i}"
            );
        }
    }
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
    bench.engine.admit().unwrap();
    let at = bench.slot_of(id);
    bench.engine.slots[at].as_mut().unwrap().deadline_ns = Some(1);
    let answer = &bench.run()[&id];
    assert_eq!(answer.tokens.len(), 8);
    assert!(answer.figures.deadline_misses > 0);
}

#[test]
fn policy_art_is_calibrated_before_the_first_request() {
    let bench = Bench::new(settings("art", "copy"));
    let calls = &bench.engine.decoder.calls;
    let count = |call| calls.iter().filter(|&&c| c == call).count();
    // 1, 2 and 4 rows, each four times: all layers, and three windows
    assert_eq!(
        (count(Call::Full), count(Call::Shallow), count(Call::Deep)),
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
    let failure = new(Fake::new(4, 64), with()).err().unwrap();
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
    let engine = new(Fake::new(4, 64), long).unwrap();
    assert_eq!(engine.context(), 64);
    let said = crate::triton::fake_host::take_messages();
    assert_eq!(
        said,
        ["1 drex: parameters: context is 4096, the model was trained with 64, which is used"]
    );
}

#[test]
fn a_model_whose_layers_are_not_alike_has_every_fill_but_copy() {
    let unlike = || {
        let mut fake = Fake::new(4, 64);
        fake.unlike = true;
        fake
    };
    let failure = new(unlike(), settings("hold", "copy")).err().unwrap();
    assert_eq!(failure.code, abi::ERROR_UNSUPPORTED);
    assert!(
        failure.text.contains("fill is copy") && failure.text.contains("not alike"),
        "{}",
        failure.text
    );
    for fill in ["propagate", "postfill", "verify"] {
        let mut bench = Bench::of(unlike(), settings("hold", fill));
        for id in 1..=6 {
            let mut sampling = greedy(20);
            sampling.drex_fill = (id == 3).then_some(DREX_FILL_COPY);
            bench.push(sampling);
        }
        for (id, answer) in bench.run() {
            match &answer.ends[..] {
                [Err(failure)] if id == 3 => assert!(failure.text.contains("drex_fill is copy")),
                [Ok(Finish::Length)] => assert_eq!(answer.tokens.len(), 20),
                ends => panic!("{fill}, request {id}: {ends:?}"),
            }
        }
    }
}
