//! Requests come and go at any time, also while their row is held: nothing is lost, nothing is left over.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Suite, Test, generate, greedy, prompt};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("clients that go away leave nothing behind", cancels),
        Test::new("more requests than fit wait and finish", overload),
        Test::new(
            "a request that is refused leaves its place in the queue to the next",
            refused_in_queue,
        ),
    ]
};

fn cancels(suite: &Suite) -> Result<()> {
    for flags in [
        &["--drex-policy", "hold", "--drex-flush-rows", "8"][..],
        &["--drex-policy", "art"],
        &["--drex-policy", "latency"],
        &["--drex-policy", "hold", "--drex-fill", "postfill"],
        &["--drex-policy", "hold", "--drex-fill", "verify"],
        &["--drex-policy", "auto", "--drex-fill", "verify"],
    ] {
        let mut server = suite.start(&suite.patched, 8, flags)?;
        let client = server.client;
        let slots = client.metrics()?.get("drex_slots_free");
        let probe = [greedy(&prompt(0), 40)];
        let fresh = generate(client, &probe, 1)?.remove(0);
        std::thread::scope(|scope| {
            for worker in 0..8 {
                scope.spawn(move || {
                    for i in 0..12 {
                        let mut body = greedy(&prompt(worker * 100 + i), 300);
                        body["stream"] = json!(true);
                        if let Ok(stream) = client.stream("/completion", &body) {
                            stream.take((worker * 5 + i * 3) % 11).for_each(drop);
                        }
                    }
                });
            }
        });
        // The server notices a closed connection when it next writes to it.
        let start = Instant::now();
        loop {
            let m = client.metrics()?;
            let at = |name: &str| m.get(name).unwrap_or(f64::NAN);
            if at("drex_requests") == 0.0
                && at("drex_held_rows") == 0.0
                && m.get("drex_slots_free") == slots
                && at("requests_processing") == 0.0
            {
                break;
            }
            ensure!(
                start.elapsed() < Duration::from_secs(30),
                "{flags:?}: {} requests, {} held rows, {} free slots after everybody left",
                at("drex_requests"),
                at("drex_held_rows"),
                at("drex_slots_free")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        // What they left in the KV cache and in the slots does not change what the next one says.
        for cache in [false, true] {
            let mut body = probe[0].clone();
            body["cache_prompt"] = json!(cache);
            let again = generate(client, &[body], 1)?.remove(0);
            ensure!(
                again.tokens == fresh.tokens,
                "{flags:?}: {:?} became {:?}",
                fresh.text,
                again.text
            );
        }
        ensure!(server.is_running());
        let status = server.stop(Duration::from_secs(5))?;
        ensure!(status.success(), "the server ended with {status}");
    }
    Ok(())
}

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
