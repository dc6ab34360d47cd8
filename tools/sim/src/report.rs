// SPDX-License-Identifier: Apache-2.0

//! Tables, CSV and JSON of runs and grids.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::grid::{Cell, Options, worst};
use crate::run::Report;

const GRID_HEAD: [&str; 15] = [
    "regime",
    "N",
    "B",
    "a",
    "p",
    "art",
    "latency",
    "eager",
    "auto",
    "best rule",
    "theta",
    "phi",
    "limit",
    "auto/best",
    "p99 ms auto/off",
];

fn grid_row(c: &Cell) -> Vec<String> {
    let r = |x: f64| format!("{x:.3}");
    vec![
        c.class.name.into(),
        c.n.to_string(),
        c.batch.to_string(),
        c.a.to_string(),
        c.p.to_string(),
        r(c.ratio(&c.art)),
        r(c.ratio(&c.latency)),
        r(c.ratio(&c.eager)),
        r(c.vs_off()),
        r(c.ratio(&c.best)),
        c.theta.to_string(),
        c.phi.to_string(),
        r(c.limit / c.off.tokens_per_s),
        r(c.vs_best()),
        format!("{:.1}/{:.1}", c.auto.tbt_p99_ms, c.off.tbt_p99_ms),
    ]
}

pub fn grid_table(cells: &[Cell]) -> String {
    let mut out = table(&GRID_HEAD, &cells.iter().map(grid_row).collect::<Vec<_>>());
    let (off, best) = worst(cells);
    let _ = writeln!(
        out,
        "\nThroughput relative to no early exit. Worst cell of auto: {off:.4} of no early exit, {best:.4} of the best rule."
    );
    out
}

pub fn grid_markdown(cells: &[Cell]) -> String {
    markdown(&GRID_HEAD, &cells.iter().map(grid_row).collect::<Vec<_>>())
}

pub fn grid_csv(cells: &[Cell]) -> String {
    csv(&GRID_HEAD, &cells.iter().map(grid_row).collect::<Vec<_>>())
}

pub fn grid_json(cells: &[Cell], o: &Options) -> Value {
    let (off, best) = worst(cells);
    json!({
        "cells": cells.iter().map(Cell::json).collect::<Vec<_>>(),
        "worst_vs_off": (off * 1e4).round() / 1e4,
        "worst_vs_best": (best * 1e4).round() / 1e4,
        "tokens_per_run": o.tokens, "seed": o.seed, "noise": o.noise, "outliers": o.outliers,
        "fill": format!("{:?}", o.filling.fill).to_lowercase(), "max_pending": o.filling.max_pending,
        "accept": o.filling.accept, "prompt_share": o.prompt_share, "p_spread": o.spread, "p_drift": o.drift, "wrong_profile": o.wrong,
    })
}

const RUN_HEAD: [&str; 16] = [
    "policy",
    "tokens/s",
    "vs off",
    "rows/window",
    "tbt p50 ms",
    "tbt p99 ms",
    "tbt max ms",
    "finished",
    "completion ms",
    "ttft p50 ms",
    "ttft p99 ms",
    "exits",
    "forced exits",
    "forced stays",
    "misses",
    "held max",
];

fn run_row(r: &Report, off: Option<f64>) -> Vec<String> {
    vec![
        r.name.clone(),
        format!("{:.1}", r.tokens_per_s),
        off.map_or("-".into(), |o| format!("{:.3}", r.tokens_per_s / o)),
        format!("{:.1}", r.rows_per_window),
        format!("{:.2}", r.tbt_p50_ms),
        format!("{:.2}", r.tbt_p99_ms),
        format!("{:.1}", r.tbt_max_ms),
        r.finished.to_string(),
        format!("{:.1}", r.completion_ms),
        format!("{:.1}", r.ttft_p50_ms),
        format!("{:.1}", r.ttft_p99_ms),
        format!("{:.3}", r.exit_share),
        r.involuntary_exits.to_string(),
        r.involuntary_stays.to_string(),
        r.deadline_misses.to_string(),
        r.held_max.to_string(),
    ]
}

fn off_of(runs: &[Report]) -> Option<f64> {
    runs.iter()
        .find(|r| r.name == "off")
        .map(|r| r.tokens_per_s)
}

pub fn run_table(runs: &[Report], limit: Option<f64>) -> String {
    let off = off_of(runs);
    let mut out = table(
        &RUN_HEAD,
        &runs.iter().map(|r| run_row(r, off)).collect::<Vec<_>>(),
    );
    if let Some(limit) = limit {
        let _ = writeln!(
            out,
            "\nLimit of full batches at every window: {limit:.1} tokens/s."
        );
    }
    for r in runs {
        if r.deadline_misses > 0 {
            let [host, queue, held, run] = r.misses;
            let _ = write!(
                out,
                "{}: misses by host {host}, queue {queue}, held {held}, run {run};",
                r.name
            );
            for (priority, missed, tokens) in &r.by_priority {
                let _ = write!(out, " priority {priority}: {missed} of {tokens} tokens;");
            }
            out.push('\n');
        }
        if r.unknown > 0 {
            let share = 100.0 * r.unknown as f64 / r.rows_scored as f64;
            let _ = writeln!(
                out,
                "{}: the recording does not tell {share:.1} % of the confidences (drawn instead).",
                r.name
            );
        }
    }
    out
}

pub fn run_csv(runs: &[Report]) -> String {
    let off = off_of(runs);
    csv(
        &RUN_HEAD,
        &runs.iter().map(|r| run_row(r, off)).collect::<Vec<_>>(),
    )
}

pub fn run_json(runs: &[Report], limit: Option<f64>) -> Value {
    let off = off_of(runs);
    let all: Vec<Value> = runs
        .iter()
        .map(|r| {
            json!({
                "policy": r.name, "tokens": r.tokens, "seconds": r.seconds, "tokens_per_s": r.tokens_per_s,
                "ratio_to_off": off.map(|o| r.tokens_per_s / o), "rows_per_window": r.rows_per_window,
                "tbt_p50_ms": r.tbt_p50_ms, "tbt_p99_ms": r.tbt_p99_ms, "tbt_max_ms": r.tbt_max_ms,
                "finished": r.finished, "completion_ms": r.completion_ms, "exit_share": r.exit_share,
                "involuntary_exits": r.involuntary_exits, "involuntary_stays": r.involuntary_stays,
                "deadline_misses": r.deadline_misses,
                "ttft_p50_ms": r.ttft_p50_ms, "ttft_p99_ms": r.ttft_p99_ms, "carrier_share": r.carrier_share,
                "prompt_share": r.prompt_share,
                "misses": {"host": r.misses[0], "queue": r.misses[1], "held": r.misses[2], "run": r.misses[3]},
                "by_priority": r.by_priority.iter().map(|c| json!({"priority": c.0, "misses": c.1, "tokens": c.2})).collect::<Vec<_>>(),
                "held_max": r.held_max, "unknown_rows": r.unknown, "rows_scored": r.rows_scored,
                "drafts": r.drafts, "drafts_accepted": r.accepted,
            })
        })
        .collect();
    json!({"runs": all, "limit_tokens_per_s": limit})
}

pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |k: usize| {
        rows.iter()
            .map(|r| r[k].len())
            .chain([head[k].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        for (k, c) in cells.enumerate() {
            let _ = if k == 0 {
                write!(out, "{c:<w$}", w = widths[k])
            } else {
                write!(out, "  {c:>w$}", w = widths[k])
            };
        }
        out.push('\n');
    };
    line(&mut head.iter().copied());
    for r in rows {
        line(&mut r.iter().map(String::as_str));
    }
    out
}

fn markdown(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = format!(
        "| {} |\n|{}\n",
        head.join(" | "),
        " --- |".repeat(head.len())
    );
    for r in rows {
        let _ = writeln!(out, "| {} |", r.join(" | "));
    }
    out
}

fn csv(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = head.join(",") + "\n";
    for r in rows {
        let _ = writeln!(out, "{}", r.join(","));
    }
    out
}
