// SPDX-License-Identifier: Apache-2.0

//! Clients go away at any time, also while their row is held: nothing is lost, nothing is left over.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Suite, Test, generate, greedy, prompt};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![Test::new(
        "clients that go away leave nothing behind",
        cancels,
    )]
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
