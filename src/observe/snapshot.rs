// SPDX-License-Identifier: Apache-2.0

//! All that an engine counts and estimates, as JSON. What is not known is null.

use serde_json::{Value, json};

use crate::core::estimate::agreement::TARGETS;
use crate::core::scheduler::Scheduler;

pub fn to_json(e: &Scheduler) -> String {
    let (c, k) = (e.counters(), e.config());
    let n = k.n_ramps();
    let held_at = e.held_rows_at();
    let ramps: Vec<Value> = (0..n)
        .map(|r| {
            let chance = e.exit_rates().chance(None, r);
            json!({
                "layer": k.ramp_layers[r], "threshold": k.thresholds[r],
                "exits": c.exits[r], "held": held_at[r], "staying": e.buffer().stays_at(r),
                "exit_chance": (chance.looks > 0.0).then_some(chance.p),
                "acceptance": e.acceptance().chance(r),
            })
        })
        .collect();
    let now = e.clock_ns();
    let held: Vec<Value> = e
        .held_requests()
        .map(|r| {
            let since = e.buffer().node(r.slot).since_ns;
            json!({"request": r.id, "ramp": r.ramp, "slot": r.slot,
                   "age_ns": now.saturating_sub(since)})
        })
        .collect();
    let cost = e.cost();
    let profile: Option<Value> = cost
        .known()
        .then(|| serde_json::from_str(&crate::profile::to_json(cost.profile())).ok())
        .flatten();
    let (agreement, audits) = (e.agreement(), e.agreement().audits());
    let found = e.target().and_then(|t| agreement.estimate(t));
    let (row_rule, rate) = (e.chosen_rule(), e.auto().predicted());
    json!({
        "drex_snapshot": 1,
        "now_ns": now,
        "policy": k.policy.name(),
        "counters": {
            "tokens": c.tokens, "involuntary_exits": c.involuntary_exits,
            "involuntary_stays": c.involuntary_stays, "flushes": c.flushes,
            "held_rows_max": c.held_rows_max, "cells_filled": c.cells_filled,
            "bytes_filled": c.bytes_filled, "deadline_misses": c.deadline_misses,
            "misses": c.misses, "nonfinite_rows": c.nonfinite_rows,
            "rows_filled": c.rows_filled, "drafts": c.drafts, "accepted": c.accepted,
            "dropped": c.dropped, "steps": c.steps, "step_rows": c.step_rows,
            "prompt_steps": c.prompt_steps, "prompt_rows": c.prompt_rows,
            "wait_us_buckets": c.wait_us_buckets, "wait_us_sum": c.wait_us_sum,
            "window_us_buckets": c.window_us_buckets, "window_us_sum": c.window_us_sum,
        },
        "queues": {
            "requests": e.requests(), "decoding": e.decoding(),
            "ready": e.buffer().ready_rows(), "held": e.buffer().held(),
            "pending": e.pending_rows(), "slots_free": e.buffer().free_slots(),
        },
        "ramps": ramps,
        "held_rows": held,
        "rule": {
            "ramps": row_rule.ramps, "hold_rows": row_rule.hold_rows, "ready_rows": row_rule.ready_rows,
            "predicted_tokens_per_s": rate.0 * 1e9,
            "predicted_off_tokens_per_s": rate.1 * 1e9, "searches": e.auto().searches(),
        },
        "agreement": {
            "target": e.target().map(|t| TARGETS[usize::from(t)]),
            "agreement": found.map(|f| f.agreement), "low": found.map(|f| f.low), "high": found.map(|f| f.high),
            "proven": e.target().map(|t| agreement.proven(t)), "balance": e.target().map(|t| agreement.balance(t)),
            "audits": audits.answers, "audited_tokens": audits.tokens, "audited_differing": audits.differing,
            "audits_missed": audits.missed,
        },
        "cost": {"observations": cost.observations(), "profile": profile,
                 "gap_ns": e.host_time().gap_ns(), "art_ratio": e.art_ratio()},
    })
    .to_string()
}
