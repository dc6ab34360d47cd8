// SPDX-License-Identifier: Apache-2.0

//! Counters in Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write};

use crate::core::config::Policy;
use crate::core::counters::{Reason, TimeIn, WAIT_BUCKETS};
use crate::core::estimate::agreement::TARGETS;
use crate::core::scheduler::Scheduler;

const COUNTER: &str = "counter";
const GAUGE: &str = "gauge";

struct Text<'a> {
    out: String,
    labels: &'a str,
}

impl Text<'_> {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, own: &str, value: &str) {
        let comma = if own.is_empty() || self.labels.is_empty() {
            ""
        } else {
            ","
        };
        let _ = match own.is_empty() && self.labels.is_empty() {
            true => writeln!(self.out, "{name} {value}"),
            false => writeln!(self.out, "{name}{{{}{comma}{own}}} {value}", self.labels),
        };
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Into<Option<u64>>) {
        self.family(name, kind, help);
        if let Some(value) = value.into() {
            self.sample(name, "", &value.to_string());
        }
    }

    /// One sample for each value that is known, told apart by the label.
    fn many<V: ToString>(
        &mut self,
        (name, kind): (&str, &str),
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (impl Display, Option<V>)>,
    ) {
        self.family(name, kind, help);
        for (which, value) in values {
            if let Some(value) = value {
                let own = format!("{label}=\"{which}\"");
                self.sample(name, &own, &value.to_string());
            }
        }
    }

    /// One sample for each ramp whose value is known.
    fn ramps<V: ToString>(
        &mut self,
        (name, kind): (&str, &str),
        help: &str,
        layers: &[u32],
        values: impl IntoIterator<Item = Option<V>>,
    ) {
        self.family(name, kind, help);
        for (ramp, (layer, value)) in layers.iter().zip(values).enumerate() {
            if let Some(value) = value {
                let own = format!("ramp=\"{ramp}\",layer=\"{layer}\"");
                self.sample(name, &own, &value.to_string());
            }
        }
    }

    fn seconds(&mut self, name: &str, help: &str, buckets: &[u64; WAIT_BUCKETS], us: u64) {
        self.family(name, "histogram", help);
        let mut all = 0;
        for (i, n) in buckets.iter().enumerate() {
            all += n;
            let le = match i + 1 == WAIT_BUCKETS {
                true => "+Inf".to_owned(),
                false => ((1u64 << i) as f64 / 1e6).to_string(),
            };
            self.sample(
                &format!("{name}_bucket"),
                &format!("le=\"{le}\""),
                &all.to_string(),
            );
        }
        self.sample(&format!("{name}_sum"), "", &(us as f64 / 1e6).to_string());
        self.sample(&format!("{name}_count"), "", &all.to_string());
    }
}

/// The families and their order are the same in every text.
pub fn text(e: &Scheduler, labels: &str) -> String {
    let mut t = Text {
        out: String::new(),
        labels,
    };
    served(&mut t, e);
    waiting(&mut t, e);
    filling(&mut t, e);
    rule(&mut t, e);
    agreement(&mut t, e);
    t.out
}

fn served(t: &mut Text, e: &Scheduler) {
    let (c, layers) = (e.counters(), &e.config().ramp_layers);
    t.one("drex_tokens_total", COUNTER, "Tokens emitted.", c.tokens);
    t.ramps(
        ("drex_exits_total", COUNTER),
        "Rows that exited at a ramp.",
        layers,
        c.exits.iter().map(Some),
    );
    t.one(
        "drex_involuntary_exits_total",
        COUNTER,
        "Exits without confidence.",
        c.involuntary_exits,
    );
    t.one(
        "drex_involuntary_stays_total",
        COUNTER,
        "Confident rows that went on.",
        c.involuntary_stays,
    );
    t.one(
        "drex_nonfinite_rows_total",
        COUNTER,
        "Rows whose confidence was NaN.",
        c.nonfinite_rows,
    );
    t.many(
        ("drex_deadline_misses_total", COUNTER),
        "Late tokens by where most of their time went.",
        "reason",
        TimeIn::ALL
            .map(TimeIn::name)
            .iter()
            .zip(c.misses.iter().map(Some)),
    );
    t.one("drex_steps_total", COUNTER, "Completed steps.", c.steps);
    t.one(
        "drex_step_rows_total",
        COUNTER,
        "Rows of completed steps.",
        c.step_rows,
    );
    t.one(
        "drex_prompt_steps_total",
        COUNTER,
        "Completed steps with prompt rows.",
        c.prompt_steps,
    );
    t.one(
        "drex_prompt_rows_total",
        COUNTER,
        "Prompt rows of completed steps.",
        c.prompt_rows,
    );
    // A step of ready rows is no flush.
    t.many(
        ("drex_flushes_total", COUNTER),
        "Completed steps over held rows, by what caused them.",
        "reason",
        Reason::ALL
            .map(Reason::name)
            .iter()
            .zip(c.flushes.iter().map(Some))
            .skip(1),
    );
    t.seconds(
        "drex_window_seconds",
        "Durations of layer windows.",
        &c.window_us_buckets,
        c.window_us_sum,
    );
}

fn waiting(t: &mut Text, e: &Scheduler) {
    let (c, layers) = (e.counters(), &e.config().ramp_layers);
    t.ramps(
        ("drex_held_rows", GAUGE),
        "Rows in the rebatching buffer.",
        layers,
        e.held_rows_at().iter().map(Some),
    );
    t.one(
        "drex_held_rows_max",
        GAUGE,
        "The most rows that were in the rebatching buffer at a time.",
        c.held_rows_max,
    );
    t.seconds(
        "drex_held_seconds",
        "Time that rows were held.",
        &c.wait_us_buckets,
        c.wait_us_sum,
    );
    t.one(
        "drex_ready_rows",
        GAUGE,
        "Rows that wait for the first window.",
        e.buffer().ready_rows() as u64,
    );
    t.one(
        "drex_pending_rows",
        GAUGE,
        "Exited rows whose layers are to run.",
        u64::from(e.pending_rows()),
    );
    t.one(
        "drex_requests",
        GAUGE,
        "Requests alive.",
        e.requests() as u64,
    );
    t.one(
        "drex_slots_free",
        GAUGE,
        "Free rows of the hidden arena.",
        e.buffer().free_slots() as u64,
    );
}

fn filling(t: &mut Text, e: &Scheduler) {
    let c = e.counters();
    t.one(
        "drex_filled_cells_total",
        COUNTER,
        "Cells filled by copy.",
        c.cells_filled,
    );
    t.one(
        "drex_filled_bytes_total",
        COUNTER,
        "Bytes written to fill cells by copy.",
        c.bytes_filled,
    );
    t.one(
        "drex_postfilled_rows_total",
        COUNTER,
        "Pending rows whose skipped layers were computed.",
        c.rows_filled,
    );
    t.one("drex_drafts_total", COUNTER, "Drafts judged.", c.drafts);
    t.one(
        "drex_drafts_accepted_total",
        COUNTER,
        "Drafts that stood.",
        c.accepted,
    );
    t.one(
        "drex_dropped_rows_total",
        COUNTER,
        "Rows that followed a draft that did not stand.",
        c.dropped,
    );
}

fn rule(t: &mut Text, e: &Scheduler) {
    let (auto, layers) = (e.auto(), &e.config().ramp_layers);
    let follows = e.config().policy == Policy::Auto;
    let row_rule = follows.then(|| e.chosen_rule());
    t.family(
        "drex_art_ratio",
        GAUGE,
        "Rebatching overhead over deep time, c / t_d.",
    );
    if let Some(ratio) = e.art_ratio() {
        t.sample("drex_art_ratio", "", &ratio.to_string());
    }
    let shares = (0..layers.len()).map(|r| {
        let chance = e.exit_rates().chance(None, r);
        (chance.looks > 0.0).then_some(chance.p)
    });
    t.ramps(
        ("drex_exit_share", GAUGE),
        "Share of rows that are confident at a ramp, of those scored there first.",
        layers,
        shares,
    );
    t.one(
        "drex_searches_total",
        COUNTER,
        "Policy auto: searches for a better rule.",
        auto.searches(),
    );
    t.ramps(
        ("drex_rule_ramp", GAUGE),
        "Policy auto: 1 where the rule looks at a ramp.",
        layers,
        (0..layers.len()).map(|r| row_rule.map(|m| m.ramps >> r & 1)),
    );
    t.one(
        "drex_rule_hold_rows",
        GAUGE,
        "Policy auto: held rows at a ramp that are flushed.",
        row_rule.map(|m| m.hold_rows.into()),
    );
    t.one(
        "drex_rule_ready_rows",
        GAUGE,
        "Policy auto: ready rows below which held rows are flushed.",
        row_rule.map(|m| m.ready_rows.into()),
    );
    t.family(
        "drex_rule_survival",
        GAUGE,
        "Quality lossless: chance to stand, with all before it, from which a draft is made.",
    );
    if let Some(m) = row_rule {
        t.sample("drex_rule_survival", "", &m.survival.to_string());
    }
    t.one(
        "drex_rule_drafts",
        GAUGE,
        "Quality lossless: most drafts of a request; 0: no bound but the most pending rows.",
        row_rule.map(|m| m.drafts.unwrap_or(0).into()),
    );
    let known = follows && auto.searches() > 0;
    let (chosen, off) = auto.predicted();
    let rate = |per_ns: f64| known.then_some(per_ns * 1e9).filter(|r| r.is_finite());
    t.many(
        ("drex_predicted_tokens_per_second", GAUGE),
        "Policy auto: what the last search predicts of its rule, and of no exits.",
        "rule",
        [("chosen", rate(chosen)), ("off", rate(off))],
    );
}

fn agreement(t: &mut Text, e: &Scheduler) {
    let target = e.target();
    let found = target.and_then(|i| e.agreement().estimate(i));
    let target = target.map(|i| TARGETS[usize::from(i)]);
    for (name, help, value) in [
        (
            "drex_agreement_target",
            "Agreement with the full model that was last asked for.",
            target,
        ),
        (
            "drex_agreement",
            "Share of the tokens of requests with that target that are the full model's, estimated from audits.",
            found.map(|f| f.agreement),
        ),
        (
            "drex_agreement_low",
            "Its lower bound, which chance breaks one time in fifty.",
            found.map(|f| f.low),
        ),
    ] {
        t.family(name, GAUGE, help);
        if let Some(value) = value {
            t.sample(name, "", &value.to_string());
        }
    }
    let audits = e.agreement().audits();
    for (name, help, value) in [
        (
            "drex_audits_total",
            "Answers that were audited.",
            audits.answers,
        ),
        (
            "drex_audited_tokens_total",
            "Tokens of audited answers.",
            audits.tokens,
        ),
        (
            "drex_audited_differing_total",
            "Of these, tokens that the full model would have chosen otherwise.",
            audits.differing,
        ),
        (
            "drex_audits_missed_total",
            "Answers that were to be audited and were not.",
            audits.missed,
        ),
    ] {
        t.one(name, COUNTER, help, value);
    }
}

/// Labels as they stand between braces: name="value", separated by commas.
/// The error says what is wrong.
pub fn check_labels(labels: &str) -> Result<(), String> {
    let mut names: Vec<&str> = vec!["ramp", "layer", "reason", "rule", "le"];
    let mut rest = labels;
    while !rest.is_empty() {
        let (name, after) = rest
            .split_once("=\"")
            .ok_or("a label is not name=\"value\"")?;
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let digit = name.starts_with(|c: char| c.is_ascii_digit());
        if name.is_empty() || digit || name.starts_with("__") || !name.chars().all(word) {
            return Err(format!("{name:?} is no label name"));
        }
        if names.contains(&name) {
            return Err(format!(
                "the label {name} is there twice, or is one of drex's own"
            ));
        }
        names.push(name);
        let mut end = None;
        let mut escaped = false;
        for (i, c) in after.char_indices() {
            match c {
                'n' | '\\' | '"' if escaped => escaped = false,
                _ if escaped => return Err(format!("the value of {name} has an unknown escape")),
                '\\' => escaped = true,
                '"' => {
                    end = Some(i);
                    break;
                }
                '\n' | '\r' => return Err(format!("the value of {name} has a line break")),
                _ => {}
            }
        }
        let end = end.ok_or(format!("the value of {name} does not end"))?;
        rest = &after[end + 1..];
        if !rest.is_empty() {
            let next = rest.strip_prefix(',').filter(|r| !r.is_empty());
            rest = next.ok_or("labels are separated by one comma")?;
        }
    }
    Ok(())
}
