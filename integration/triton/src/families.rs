// SPDX-License-Identifier: Apache-2.0
//! Which metrics there are. Names, types and labels are those of the table in docs/observability.md, for all hosts.

use drex::ffi::{DREX_FLUSH_REASONS, DREX_MISS_REASONS, drex_stats};

use crate::triton::abi::{
    METRIC_COUNTER as COUNTER, METRIC_GAUGE as GAUGE, METRIC_HISTOGRAM as HISTOGRAM,
};

/// What the metrics of an instance are made from.
pub struct Snapshot {
    pub stats: drex_stats,
    pub window_ns: u64,
    pub tokens: u64,
    pub running: usize,
    pub graphs: Graphs,
}

/// Compute graphs of layer windows.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Graphs {
    pub built: u64,
    /// Windows that used one again.
    pub reused: u64,
    pub evicted: u64,
    pub kept: u64,
    pub bytes: u64,
}

/// What a family has one metric for.
#[derive(Clone, Copy)]
pub enum Over {
    One,
    Ramps,
    /// Why held rows ran.
    Flushes,
    /// Where a late token's time went.
    Misses,
    /// `chosen`, `off`
    Rules,
}

pub struct Family {
    pub kind: u32,
    pub name: &'static str,
    pub help: &'static str,
    pub over: Over,
    /// For an index of what `over` says. NaN: not known yet, and the metric is not there until it is.
    pub value: fn(&Snapshot, usize) -> f64,
}

pub const FLUSHES: [&str; DREX_FLUSH_REASONS] =
    ["none", "fill", "age", "deadline", "idle", "stay", "prompt"];
pub const MISSES: [&str; DREX_MISS_REASONS] = ["host", "queue", "held", "run"];
pub const RULES: [&str; 2] = ["chosen", "off"];

/// Of policy auto, which has no rule before its first search.
fn searched(s: &Snapshot, value: f64) -> f64 {
    if s.stats.searches > 0 {
        value
    } else {
        f64::NAN
    }
}

macro_rules! families {
    ($($kind:ident $name:literal $over:ident $help:literal, $value:expr;)*) => {
        pub const FAMILIES: &[Family] = &[$(Family {
            kind: $kind,
            name: $name,
            help: $help,
            over: Over::$over,
            value: $value,
        },)*];
    };
}

families! {
    COUNTER "drex_exits_total" Ramps "Rows that left at an exit ramp, drafts among them",
        |s, i| s.stats.exits[i] as f64;
    COUNTER "drex_tokens_total" One "Tokens given to requests, the first one of each included",
        |s, _| s.tokens as f64;
    COUNTER "drex_involuntary_exits_total" One "Rows made to exit below their threshold",
        |s, _| s.stats.involuntary_exits as f64;
    COUNTER "drex_involuntary_stays_total" One "Confident rows that went on with the batch",
        |s, _| s.stats.involuntary_stays as f64;
    COUNTER "drex_nonfinite_rows_total" One "Rows whose confidence was NaN or infinite",
        |s, _| s.stats.nonfinite_rows as f64;
    COUNTER "drex_steps_total" One "Layer windows run",
        |s, _| s.stats.steps as f64;
    COUNTER "drex_step_rows_total" One "Rows of all layer windows run",
        |s, _| s.stats.step_rows as f64;
    COUNTER "drex_prompt_steps_total" One "Layer windows with prompt rows",
        |s, _| s.stats.prompt_steps as f64;
    COUNTER "drex_prompt_rows_total" One "Prompt rows of all layer windows run",
        |s, _| s.stats.prompt_rows as f64;
    COUNTER "drex_filled_cells_total" One "KV cells whose skipped layers were filled by state-copy",
        |s, _| s.stats.cells_filled as f64;
    COUNTER "drex_filled_bytes_total" One "Bytes written by state-copy",
        |s, _| s.stats.bytes_filled as f64;
    COUNTER "drex_postfilled_rows_total" One "Exited rows that went through their skipped layers later on",
        |s, _| s.stats.rows_filled as f64;
    COUNTER "drex_drafts_total" One "Drafts of exit ramps that the full model judged",
        |s, _| s.stats.drafts as f64;
    COUNTER "drex_drafts_accepted_total" One "Drafts of exit ramps that the full model confirmed",
        |s, _| s.stats.drafts_accepted as f64;
    COUNTER "drex_dropped_rows_total" One "Rows run for nothing, behind a draft that was not confirmed",
        |s, _| s.stats.rows_dropped as f64;
    GAUGE "drex_pending_rows" One "Exited rows in the hidden arena that have layers to go",
        |s, _| s.stats.pending_rows as f64;
    COUNTER "drex_deadline_misses_total" Misses
        "Tokens emitted after their deadline, by where most of their time went",
        |s, i| s.stats.misses[i] as f64;
    COUNTER "drex_flushes_total" Flushes "Windows over held rows, by what caused them",
        |s, i| s.stats.flushes[i] as f64;
    GAUGE "drex_held_rows" Ramps "Rows waiting in the rebatching buffer",
        |s, i| s.stats.held_rows_at[i] as f64;
    GAUGE "drex_held_rows_max" One "Most rows that waited at once",
        |s, _| s.stats.held_rows_max as f64;
    GAUGE "drex_requests" One "Requests alive",
        |s, _| s.stats.requests as f64;
    GAUGE "drex_slots_free" One "Free rows of the hidden arena",
        |s, _| s.stats.slots_free as f64;
    GAUGE "drex_art_ratio" One "Rebatching overhead over deep time, c/t_d",
        |s, _| s.stats.art_ratio;
    GAUGE "drex_exit_share" Ramps
        "Share of rows that are confident at an exit ramp, of those scored there first",
        |s, i| s.stats.exit_share[i];
    GAUGE "drex_rule_ramp" Ramps "Policy auto: 1 where the present rule looks at an exit ramp",
        |s, i| searched(s, f64::from((s.stats.rule_ramps >> i) & 1));
    GAUGE "drex_rule_hold_rows" One "Policy auto: held rows at a ramp that are flushed",
        |s, _| searched(s, s.stats.rule_hold_rows.into());
    GAUGE "drex_rule_ready_rows" One "Policy auto: ready rows below which held rows are flushed",
        |s, _| searched(s, s.stats.rule_ready_rows.into());
    GAUGE "drex_rule_survival" One
        "Quality lossless: chance to stand, with all before it, from which a draft is made",
        |s, _| searched(s, s.stats.rule_survival.into());
    GAUGE "drex_rule_drafts" One
        "Quality lossless: most drafts of a request; 0: no bound but max_pending",
        |s, _| searched(s, s.stats.rule_drafts.into());
    GAUGE "drex_agreement_target" One "Agreement with the full model that was last asked for",
        |s, _| s.stats.agreement_target;
    GAUGE "drex_agreement" One
        "Share of the tokens of requests with that target that are the full model's, estimated from audits",
        |s, _| s.stats.agreement;
    GAUGE "drex_agreement_low" One "Its lower bound, which chance breaks one time in fifty",
        |s, _| s.stats.agreement_low;
    COUNTER "drex_audits_total" One "Answers that were audited",
        |s, _| s.stats.audits as f64;
    COUNTER "drex_audited_tokens_total" One "Tokens of audited answers",
        |s, _| s.stats.audited_tokens as f64;
    COUNTER "drex_audited_differing_total" One
        "Of these, tokens that the full model would have chosen otherwise",
        |s, _| s.stats.audited_differing as f64;
    COUNTER "drex_audits_missed_total" One "Answers that were to be audited and were not",
        |s, _| s.stats.audits_missed as f64;
    COUNTER "drex_searches_total" One "Policy auto: searches for a better rule",
        |s, _| s.stats.searches as f64;
    GAUGE "drex_predicted_tokens_per_second" Rules "Policy auto: speed that the last search predicted",
        |s, i| searched(s, [s.stats.predicted_tokens_per_s, s.stats.predicted_off_tokens_per_s][i]);
    COUNTER "drex_graphs_built_total" One "Compute graphs built for layer windows",
        |s, _| s.graphs.built as f64;
    COUNTER "drex_graphs_reused_total" One "Layer windows that reused a graph",
        |s, _| s.graphs.reused as f64;
    COUNTER "drex_graphs_evicted_total" One "Kept graphs that were dropped for want of room",
        |s, _| s.graphs.evicted as f64;
    GAUGE "drex_graphs" One "Graphs kept",
        |s, _| s.graphs.kept as f64;
    GAUGE "drex_graphs_bytes" One "Compute buffers and metadata of kept graphs",
        |s, _| s.graphs.bytes as f64;
    GAUGE "drex_requests_running" One "Requests that run",
        |s, _| s.running as f64;
}

/// A family with one metric for each label's value, or with one.
pub type About = (u32, &'static str, &'static str);

/// Of an instance, the buckets are drex's.
pub const HELD: About = (
    HISTOGRAM,
    "drex_held_seconds",
    "Time that rows spent in the rebatching buffer",
);
pub const WINDOW: About = (
    HISTOGRAM,
    "drex_window_seconds",
    "Time of each layer window",
);

/// Of a model, whatever the instance.
pub const ENDED: About = (
    COUNTER,
    "drex_requests_ended_total",
    "Requests that ended, by why",
);
pub const PROMPT_TOKENS: About = (
    COUNTER,
    "drex_prompt_tokens_total",
    "Tokens of the prompts of requests that got a slot",
);
pub const WAITING: About = (
    GAUGE,
    "drex_requests_waiting",
    "Requests that wait for a slot",
);
pub const QUEUE: About = (
    HISTOGRAM,
    "drex_request_queue_time_seconds",
    "Time from a request's arrival to its slot",
);
pub const FIRST: About = (
    HISTOGRAM,
    "drex_time_to_first_token_seconds",
    "Time from a request's arrival to its first token",
);
pub const BETWEEN: About = (
    HISTOGRAM,
    "drex_inter_token_latency_seconds",
    "Time between two tokens of a request",
);
pub const WHOLE: About = (
    HISTOGRAM,
    "drex_e2e_request_latency_seconds",
    "Time from a request's arrival to its last token, of requests that came to their end",
);
pub const BUILD: About = (
    GAUGE,
    "drex_build_info",
    "1; the labels say what early exit was built from",
);
pub const OTHERS: [About; 10] = [
    HELD,
    WINDOW,
    ENDED,
    PROMPT_TOKENS,
    WAITING,
    QUEUE,
    FIRST,
    BETWEEN,
    WHOLE,
    BUILD,
];

/// Upper bounds in seconds of the buckets of requests' times and of windows.
pub const BOUNDS: [f64; 17] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0,
];
