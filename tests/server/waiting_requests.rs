// SPDX-License-Identifier: Apache-2.0

//! More requests than there are slots: each waits for its turn and is served or refused.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Suite, Test, generate, greedy, prompt};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("more requests than fit wait and finish", overload),
        Test::new(
            "a request that is refused leaves its place in the queue to the next",
            refused_in_queue,
        ),
        Test::new(
            "prompts run in the order in which requests came",
            first_come,
        ),
    ]
};

fn overload(suite: &Suite) -> Result<()> {
    // Windows of three rows for eight requests at a time out of 64, with priorities and deadlines that nobody can keep.
    let flags = [
        "--drex-policy",
        "hold",
        "--drex-max-batch",
        "3",
        "--drex-deadline-ms",
        "1",
    ];
    let server = suite.start(&suite.patched, 8, &flags)?;
    let requests: Vec<_> = (0..64)
        .map(|i| {
            let mut body = greedy(&prompt(i), 24);
            body["drex_priority"] = json!(i as i64 % 3 - 1);
            body
        })
        .collect();
    for (i, g) in generate(server.client, &requests, 24)?.iter().enumerate() {
        ensure!(
            g.tokens.len() == 24,
            "request {i} got {} tokens",
            g.tokens.len()
        );
    }
    let metrics = server.client.metrics()?;
    ensure!(
        metrics.get("drex_tokens_total") == Some(64.0 * 24.0),
        "{:?} tokens",
        metrics.get("drex_tokens_total")
    );
    Ok(())
}

/// Answers so short that places become free while prompts wait: whoever comes then must not go before them.
fn first_come(suite: &Suite) -> Result<()> {
    const PLACES: u64 = 8;
    let flags = ["--drex-policy", "auto", "-b", "64", "-ub", "64"];
    let server = suite.start(&suite.patched, PLACES as usize, &flags)?;
    let client = server.client;
    let (came, served) = (AtomicU64::new(0), AtomicU64::new(0));
    let passed: Vec<u64> = std::thread::scope(|scope| {
        let places: Vec<_> = (0..PLACES)
            .map(|place| {
                let (came, served) = (&came, &served);
                scope.spawn(move || -> Result<u64> {
                    let mut most = 0;
                    while came.fetch_add(1, Relaxed) < 160 {
                        let begun = served.load(Relaxed);
                        let text = vec![prompt((place * 31 + begun) as usize); 12].join(" ");
                        let mut body = greedy(&text, 2);
                        body["cache_prompt"] = json!(false);
                        generate(client, &[body], 1)?;
                        most = most.max(served.fetch_add(1, Relaxed) - begun);
                    }
                    Ok(most)
                })
            })
            .collect();
        places
            .into_iter()
            .map(|place| place.join().expect("no panic"))
            .collect::<Result<_>>()
    })?;
    // Those that were there, and as many again that end in the same window.
    ensure!(
        passed.iter().all(|&n| n <= 2 * PLACES),
        "so many others were served while a request waited: {passed:?}"
    );
    Ok(())
}

fn refused_in_queue(suite: &Suite) -> Result<()> {
    let server = suite.start(&suite.patched, 1, &["--drex-policy", "hold"])?;
    let client = server.client;
    let waiting = |n: f64| -> Result<()> {
        let start = Instant::now();
        while client.metrics()?.get("requests_deferred") != Some(n) {
            ensure!(
                start.elapsed() < Duration::from_secs(10),
                "{n} requests should wait"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let mut body = greedy(&prompt(0), 480);
        body["stream"] = json!(true);
        let mut running = client.stream("/completion", &body)?;
        ensure!(running.next().is_some_and(|event| event.is_ok()));
        let refused = scope.spawn(move || {
            let mut body = greedy(&prompt(1), 4);
            body["backend_sampling"] = json!(true);
            client.post("/completion", &body)
        });
        waiting(1.0)?;
        let good = scope.spawn(move || generate(client, &[greedy(&prompt(2), 4)], 1));
        waiting(2.0)?;
        drop(running);
        let status = refused.join().expect("no panic")?.status;
        ensure!(status == 400, "HTTP {status}");
        let n = good.join().expect("no panic")?[0].tokens.len();
        ensure!(n == 4, "{n} tokens");
        Ok(())
    })
}
