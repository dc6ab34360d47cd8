// SPDX-License-Identifier: Apache-2.0
//! Exits that were fitted to a model: a head over some of the tokens, confidences as chances.

use super::*;

/// A head over every token but each fifth; the end of a text is not among them.
fn head() -> Vec<i32> {
    (1..fake::VOCAB as i32)
        .filter(|token| token % 5 != 0)
        .collect()
}

/// A bench whose exits have this head, and chances that a shift of so much makes.
fn bench(policy: &str, fill: &str, tokens: Vec<i32>, shift: f32) -> Bench {
    let settings = settings(policy, fill);
    let mut fake = Fake::new(settings.slots, settings.context);
    let calibration = [drex_calibration { scale: 1.0, shift }; 3];
    fake.exits = Some(fake::Exits {
        tokens,
        calibration,
    });
    Bench::of(fake, settings)
}

/// Leaves early in spite of banned words.
fn banning(max_tokens: u32) -> Sampling {
    Sampling {
        drex_threshold: Some(0.7),
        ..greedy(max_tokens)
    }
}

fn exits(answer: &Answer) -> u64 {
    answer.figures.exits.iter().sum()
}

#[test]
fn verify_gives_what_the_full_model_does() {
    for policy in ["hold", "latency", "auto"] {
        let mut bench = bench(policy, "verify", head(), 0.0);
        for id in 1..=12u64 {
            let mut sampling = greedy(5 + 4 * id as u32);
            if id % 3 == 0 {
                sampling.temperature = 1.0;
                sampling.seed = Some(id as u32);
            }
            bench.push(sampling);
        }
        let (mut drafts, mut accepted) = (0, 0);
        for (id, answer) in bench.run() {
            let seed = (id % 3 == 0).then_some(id as u32);
            let tokens = full(id, 5 + 4 * id as usize, seed);
            assert_eq!(answer.tokens, tokens, "{policy}, request {id}");
            drafts += answer.figures.drafts;
            accepted += answer.figures.drafts_accepted;
        }
        let some = accepted > 20 && drafts > accepted + 5;
        assert!(policy == "auto" || some, "{policy}: {accepted} of {drafts}");
    }
}

/// Tokens, and not columns of the head, are emitted, run and banned.
#[test]
fn what_leaves_is_a_token_of_the_head() {
    let two = vec![17, 42];
    for fill in ["copy", "propagate"] {
        let mut bench = bench("latency", fill, two.clone(), 20.0);
        bench.push(greedy(20));
        bench.push(Sampling {
            temperature: 1.0,
            seed: Some(7),
            ..greedy(20)
        });
        // A row that has no other token than 42 left.
        bench.push_job(banning(20), now_ns(), vec![vec![17]]);
        // What the head has not is no matter.
        bench.push_job(banning(20), now_ns(), vec![vec![18]]);
        for (id, answer) in bench.run() {
            // The prompt's last row gives the first token, from the last layer.
            assert_eq!(exits(&answer), 19, "{fill}, request {id}");
            let mut rest = answer.tokens[1..].iter();
            let sampled = |token: &i32| *token == 18 || *token == 43;
            match id {
                2 => assert!(rest.all(|t| two.contains(t) || sampled(t)), "{answer:?}"),
                3 => assert!(rest.all(|&token| token == 42), "{answer:?}"),
                _ => assert!(rest.all(|token| two.contains(token)), "{answer:?}"),
            }
        }
    }
}

#[test]
fn a_head_that_is_all_banned_lets_nothing_out() {
    let mut bench = bench("latency", "copy", vec![17, 42], 20.0);
    let id = bench.push_job(banning(20), now_ns(), vec![vec![17], vec![42]]);
    let answer = &bench.run()[&id];
    assert_eq!((answer.tokens.len(), exits(answer)), (20, 0));
}

#[test]
fn chances_meet_the_thresholds() {
    for (shift, all) in [(20.0, true), (-20.0, false)] {
        let mut bench = bench("latency", "copy", head(), shift);
        let id = bench.push(greedy(20));
        let left = exits(&bench.run()[&id]);
        assert_eq!(left, if all { 19 } else { 0 }, "shift {shift}");
    }
}
