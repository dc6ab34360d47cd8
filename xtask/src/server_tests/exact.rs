//! Bit-exact comparison: in the exact builds the result for a row does not depend on the batch it is in, so that streams
//! can be compared token for token.

use std::fs;

use anyhow::{Result, ensure};

use super::{Build, Suite, Test, generate, greedy};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "exact builds load the exact libggml-cpu",
            loads_exact_library,
        )
        .exact(),
        Test::new("exact: patched without exits equals unpatched", |suite| {
            compare(suite, &["--drex-policy", "off"], "policy off")
        })
        .exact(),
    ]
};

/// A quantised KV cache: with F16 the engine's flash attention takes other paths for one row over many cells, and for many
/// rows, so that even the exact build depends on the batch size.
pub const EXACT: &[&str] = &["-ctk", "q8_0", "-ctv", "q8_0"];

pub fn builds(suite: &Suite) -> Result<&(Build, Build)> {
    suite
        .exact
        .as_ref()
        .ok_or_else(|| anyhow::anyhow!("there are no exact builds"))
}

/// The runtime folders are mixed from two builds: make sure that it is the right library that a server has mapped.
fn loads_exact_library(suite: &Suite) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    for build in [reference, patched] {
        let server = suite.start(build, 1, &[])?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", server.pid()))?;
        let libraries: Vec<_> = maps
            .lines()
            .filter_map(|l| l.find('/').map(|at| &l[at..]))
            .collect();
        let cpu: Vec<_> = libraries
            .iter()
            .filter(|l| l.contains("/libggml-cpu.so"))
            .collect();
        ensure!(
            !cpu.is_empty()
                && cpu
                    .iter()
                    .all(|l| l.starts_with(&*build.0.dir.to_string_lossy())),
            "{cpu:?}"
        );
        let log = server.log();
        ensure!(
            log.contains("system_info"),
            "the server does not say what it was built with"
        );
        for feature in ["LLAMAFILE = 1", "REPACK = 1"] {
            ensure!(
                !log.contains(feature),
                "{} was built with {feature}",
                build.0.kind.name()
            );
        }
    }
    Ok(())
}

/// The same requests to the unpatched server, one at a time, and to the patched one, eight at a time.
fn compare(suite: &Suite, args: &[&str], what: &str) -> Result<()> {
    let (reference, patched) = builds(suite)?;
    let count = if suite.quick { 8 } else { 24 };
    let starts = [
        "Returns the",
        "# Examples\n\n",
        "A closure can",
        "impl Display for",
        "The compiler",
        "fn main() {\n",
    ];
    let requests: Vec<_> = (0..count)
        .map(|i| {
            greedy(
                &format!("{} {i}", starts[i % starts.len()]),
                32 + (i as u32 % 5) * 16,
            )
        })
        .collect();
    let alone = generate(suite.start(reference, 1, EXACT)?.client, &requests, 1);
    let alone = alone?;
    let server = suite.start(patched, 8, &[EXACT, args].concat())?;
    let together = generate(server.client, &requests, 8)?;
    let mut tokens = 0;
    for (i, (a, b)) in alone.iter().zip(&together).enumerate() {
        let at = a.tokens.iter().zip(&b.tokens).position(|(a, b)| a != b);
        ensure!(
            a.tokens == b.tokens && a.text == b.text,
            "request {i} differs from token {at:?} on:\n  unpatched {:?}\n  patched   {:?}",
            a.text,
            b.text
        );
        tokens += a.tokens.len();
    }
    println!(
        "        {what}: {} requests, {tokens} tokens compared, all equal",
        alone.len()
    );
    Ok(())
}
