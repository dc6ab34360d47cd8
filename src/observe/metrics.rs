// SPDX-License-Identifier: Apache-2.0

//! Counters in Prometheus' text format, version 0.0.4.

use std::fmt::Write;

use crate::core::counters::WAIT_BUCKETS;
use crate::core::engine::Engine;

const REASONS: [&str; 6] = ["none", "fill", "age", "deadline", "idle", "stay"];
const MISSES: [&str; 4] = ["host", "queue", "held", "run"];

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

    fn one(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.family(name, kind, help);
        self.sample(name, "", &value.to_string());
    }

    fn many<'b>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        values: impl Iterator<Item = (String, &'b u64)>,
    ) {
        self.family(name, kind, help);
        for (own, value) in values {
            self.sample(name, &own, &value.to_string());
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

pub fn text(e: &Engine, labels: &str) -> String {
    let (c, n) = (e.counters(), e.config().n_ramps());
    let mut t = Text {
        out: String::new(),
        labels,
    };
    let ramp = |r: usize| format!("ramp=\"{r}\"");
    let held = e.held_rows_at();
    let indexed = |v: &'_ [u64]| v.iter().enumerate().map(|(r, _)| r).collect::<Vec<_>>();
    let ramps = indexed(&c.exits[..n]);
    t.one("drex_tokens_total", "counter", "Tokens emitted.", c.tokens);
    t.many(
        "drex_exits_total",
        "counter",
        "Rows that exited at a ramp.",
        ramps.iter().map(|&r| (ramp(r), &c.exits[r])),
    );
    t.one(
        "drex_involuntary_exits_total",
        "counter",
        "Exits without confidence.",
        c.involuntary_exits,
    );
    t.one(
        "drex_involuntary_stays_total",
        "counter",
        "Confident rows that went on.",
        c.involuntary_stays,
    );
    t.many(
        "drex_held_rows",
        "gauge",
        "Rows in the rebatching buffer.",
        ramps.iter().map(|&r| (ramp(r), &held[r])),
    );
    t.many(
        "drex_flushes_total",
        "counter",
        "Completed steps by reason.",
        REASONS
            .iter()
            .zip(&c.flushes)
            .map(|(r, v)| (format!("reason=\"{r}\""), v)),
    );
    t.many(
        "drex_deadline_misses_total",
        "counter",
        "Late tokens by where most of their time went.",
        MISSES
            .iter()
            .zip(&c.misses)
            .map(|(r, v)| (format!("cause=\"{r}\""), v)),
    );
    t.one("drex_steps_total", "counter", "Completed steps.", c.steps);
    t.one(
        "drex_step_rows_total",
        "counter",
        "Rows of completed steps.",
        c.step_rows,
    );
    t.one(
        "drex_nonfinite_rows_total",
        "counter",
        "Rows whose confidence was NaN.",
        c.nonfinite_rows,
    );
    t.one(
        "drex_filled_cells_total",
        "counter",
        "Cells filled by copy.",
        c.cells_filled,
    );
    t.one("drex_drafts_total", "counter", "Drafts judged.", c.drafts);
    t.one(
        "drex_drafts_accepted_total",
        "counter",
        "Drafts that stood.",
        c.accepted,
    );
    t.one(
        "drex_requests",
        "gauge",
        "Requests alive.",
        e.requests() as u64,
    );
    t.one(
        "drex_ready_rows",
        "gauge",
        "Rows that wait for the first window.",
        e.buffer().ready_rows() as u64,
    );
    t.one(
        "drex_pending_rows",
        "gauge",
        "Exited rows whose layers are to run.",
        e.pending_rows().into(),
    );
    t.seconds(
        "drex_held_seconds",
        "Time that rows were held.",
        &c.wait_us_buckets,
        c.wait_us_sum,
    );
    t.seconds(
        "drex_window_seconds",
        "Durations of layer windows.",
        &c.window_us_buckets,
        c.window_us_sum,
    );
    t.out
}

/// Labels as they stand between braces: name="value", separated by commas.
/// The error says what is wrong.
pub fn check_labels(labels: &str) -> Result<(), String> {
    let mut names: Vec<&str> = vec!["ramp", "reason", "cause", "le"];
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
