// SPDX-License-Identifier: Apache-2.0
//! That `bench serve` and `bench scale` measure what they say: the same load for everybody, and everything counted.

use anyhow::{Context, Result, ensure};
use drex_harness::{
    race::{Cell, Report},
    traffic::{Lengths, Text},
};
use serde_json::Value;

use super::{Suite, Test};
use crate::{
    bench::{scale, serve},
    cache::TempDir,
};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new("a race gives everybody the same load", fair),
        Test::new("a large model's measurement, with a tiny one", scale_up),
    ]
};

fn fair(suite: &Suite) -> Result<()> {
    let race = serve::small(&suite.reference.0.server(), &suite.patched.0.server())?;
    let report = race.run(|_| Ok(()))?;
    let groups = report.groups();
    let loads: Vec<&str> = groups.iter().map(|g| g[0].traffic.as_str()).collect();
    ensure!(loads == ["16/8", "chat", "poisson-0.8"], "loads {loads:?}");
    let mut exited = 0.0;
    for group in groups {
        let find = |name: &str| group.iter().find(|c| c.policy == name);
        let of = |name: &str| find(name).with_context(|| format!("no {name}"));
        let (stock, off, auto) = (of("stock")?, of("off")?, of("auto")?);
        ensure!(group.len() == 4, "{} contenders", group.len());
        for cell in group {
            let name = format!("{} {}", cell.traffic, cell.policy);
            ensure!(
                cell.requests * stock.rounds as u64 == stock.requests * cell.rounds as u64,
                "{name}: {} requests, stock had {}",
                cell.requests,
                stock.requests
            );
            ensure!(
                cell.tokens_per_s > 0.0 && cell.ratio_to_stock > 0.0,
                "{name}: {cell:?}"
            );
            ensure!(
                cell.ttft_ms.p50 > 0.0 && cell.completion_ms > cell.ttft_ms.p50,
                "{name}: {cell:?}"
            );
        }
        ensure!(
            off.tokens == stock.tokens,
            "tokens {} of {}",
            off.tokens,
            stock.tokens
        );
        // The prompts of a chat hold answers, and tokens that end within a character have no id in a stream.
        ensure!(
            off.prompt == stock.prompt || stock.traffic == "chat",
            "prompts {} of {}",
            off.prompt,
            stock.prompt
        );
        ensure!(
            stock.exits == 0.0 && off.exits == 0.0,
            "exits without early exit"
        );
        ensure!(auto.involuntary_exits == 0, "{auto:?}");
        exited += auto.exits;
    }
    // When `auto` lets out its first row depends on measured times, not in which cell.
    ensure!(exited > 0.0, "no row exits in any cell");

    // What was answered is what the text and the lengths give, computed here once more.
    let server = suite.start(&suite.reference, 1, &[])?;
    let text = Text::of(server.client, &race.corpus)?;
    let cell = &report.cells[0];
    let per_round = cell.requests as usize / cell.rounds;
    let lengths = Lengths {
        prompt: 16,
        answer: 8,
    };
    // The first requests, one for each place, do not count.
    let places = cell.in_flight;
    let wanted: usize = (0..cell.rounds as u64)
        .flat_map(|round| {
            lengths
                .requests(&text, round, places + per_round)
                .split_off(places)
        })
        .map(|(_, answer)| answer)
        .sum();
    ensure!(
        cell.tokens == wanted as u64,
        "{} tokens instead of {wanted}",
        cell.tokens
    );

    let line = serde_json::to_string(&report)?;
    let json: Value = serde_json::from_str(&line)?;
    ensure!(
        json["worst_auto"].is_number() && json["median_auto"].is_number(),
        "{line}"
    );
    let back: Report = serde_json::from_str(&line)?;
    let same = |a: &[Cell], b: &[Cell]| a == b;
    ensure!(
        same(&back.cells, &report.cells),
        "the cells do not read back"
    );
    println!(
        "        {}",
        report.headline().trim().replace('\n', "\n        ")
    );
    Ok(())
}

fn scale_up(suite: &Suite) -> Result<()> {
    let folder = TempDir::unlocked("scale")?;
    let report = scale::small(&suite.patched.0, folder.path())?;
    ensure!(
        report["ok"] == true && report["split_identical"] == true,
        "{report}"
    );
    ensure!(
        report["worst_auto"].is_number() && report["median_auto"].is_number(),
        "{report}"
    );
    let cells = report["cells"].as_array().context("no cells")?;
    // Three loads, two policies, two shares.
    ensure!(cells.len() == 12, "{} cells", cells.len());
    for cell in cells {
        let number = |name: &str| {
            cell[name]
                .as_f64()
                .with_context(|| format!("{name} in {cell}"))
        };
        for name in [
            "tokens_per_s",
            "stock_tokens_per_s",
            "ratio_to_stock",
            "ratio_low",
            "ratio_high",
            "cold_ratio",
        ] {
            ensure!(number(name)? > 0.0, "{name}: {cell}");
        }
        ensure!(number("ratio_to_stock")? <= number("ratio_high")?, "{cell}");
        ensure!(number("involuntary_exits")? == 0.0, "{cell}");
        let (exits, of_mask) = (number("exits")?, number("exits_of_mask")?);
        ensure!(
            exits == of_mask || cell["policy"] == "auto" && exits < of_mask,
            "not the mask's exits: {cell}"
        );
    }
    println!("        {} cells", cells.len());
    Ok(())
}
