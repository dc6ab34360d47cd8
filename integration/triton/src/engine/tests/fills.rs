// SPDX-License-Identifier: Apache-2.0
//! What each fill gives, and how a text ends.

use super::*;

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
        let tokens: usize = answers.values().map(|answer| answer.tokens.len()).sum();
        assert_eq!(bench.engine.tokens, tokens as u64);
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
fn a_row_that_is_sure_of_a_banned_token_does_not_leave() {
    const ALLOWED: [i32; 2] = [7, 8];
    const N: usize = 40;
    for fill in ["copy", "verify"] {
        let mut bench = Bench::new(settings("latency", fill));
        let others = (1..fake::VOCAB as i32).filter(|token| !ALLOWED.contains(token));
        let id = bench.push(Sampling {
            stop_token_ids: others.collect(),
            min_tokens: N as u32,
            ..greedy(N as u32)
        });
        let answer = &bench.run()[&id];
        assert_eq!(answer.tokens.len(), N);
        assert!(answer.tokens.iter().all(|token| ALLOWED.contains(token)));
        // Rows after the prompt, by what the ramps are sure of: something that is banned, something that is not.
        let (mut stay, mut leave) = (0, 0);
        for ran in 1..N {
            let seen = [&prompt(id)[..], &answer.tokens[..ran]].concat();
            let guesses = fake::RAMPS.map(|layer| fake::guess(&seen, layer));
            let sure =
                |of: fn(&i32) -> bool| guesses.iter().any(|(token, sure)| *sure && of(token));
            if sure(|token| ALLOWED.contains(token)) {
                leave += 1;
            } else if sure(|_| true) {
                stay += 1;
            }
        }
        assert!(stay > N / 2, "{stay}");
        if fill == "copy" {
            assert_eq!(answer.figures.exits.iter().sum::<u64>(), leave);
        } else {
            assert_eq!(answer.figures.drafts, leave);
        }
    }
}

/// The fake's ramps are wrong too often for the target, so each answer that is not lossless is a trial, and audited: what the
/// audits counted is what the model says.
#[test]
fn audits_count_what_the_full_model_would_have_chosen_otherwise() {
    let mut settings = settings("latency", "propagate");
    (settings.quality, settings.learns) = (0.95, true);
    let mut bench = Bench::new(settings);
    let mut answers = HashMap::new();
    for id in 1..=1500u64 {
        let mut sampling = greedy(8 + id as u32 % 20);
        if id % 5 == 0 {
            (sampling.temperature, sampling.seed) = (1.0, Some(id as u32));
        }
        bench.push(sampling);
        if id % 100 == 0 {
            answers.extend(bench.run());
        }
    }
    let (mut tokens, mut differing, mut served) = (0, 0, [0, 0]);
    for (id, answer) in &answers {
        let lossless = answer.figures.quality == 1.0;
        served[usize::from(lossless)] += 1;
        let mut text = prompt(*id);
        let mut differs = 0;
        for &token in &answer.tokens {
            differs += u64::from(token != fake::deep(&text));
            text.push(token);
        }
        match id % 5 == 0 {
            true => assert!(lossless, "request {id} draws its tokens"),
            false if lossless => assert_eq!(differs, 0, "request {id} is lossless"),
            false => {
                assert_eq!(answer.figures.quality, 0.95);
                (tokens, differing) =
                    (tokens + answer.tokens.len() as u64 - 1, differing + differs);
            }
        }
    }
    let stats = bench.engine.stats();
    assert!(
        served[0] >= 5 && differing > 0,
        "{served:?}, {differing} differ"
    );
    assert_eq!((stats.audits, stats.audits_missed), (served[0], 0));
    assert_eq!(
        (stats.audited_tokens, stats.audited_differing),
        (tokens, differing)
    );
}

/// Clients that leave while an audit waits for prompt rows at a ramp: no slot is lost.
#[test]
fn audits_end_whoever_leaves() {
    let mut settings = settings("hold", "copy");
    (settings.quality, settings.learns, settings.slots) = (0.9, true, 4);
    let mut bench = Bench::new(settings);
    let mut answers = HashMap::new();
    for id in 1..=900u64 {
        bench.push(greedy(4 + id as u32 % 9));
        for _ in 0..id % 7 {
            bench.engine.step().unwrap();
        }
        if id % 3 == 0 {
            bench.cancel((id - id % 4).max(1));
        }
        if id % 60 == 0 {
            answers.extend(bench.run());
        }
    }
    let stats = bench.engine.stats();
    assert_eq!(answers.len(), 900);
    assert!(
        stats.audits > 20 && stats.requests == 0,
        "{} audits",
        stats.audits
    );
    for answer in answers.values() {
        assert_eq!(answer.ends.len(), 1, "{:?}", answer.ends);
    }
}
