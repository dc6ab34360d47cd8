// SPDX-License-Identifier: Apache-2.0

//! The command line of drex-sim.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, ValueEnum};
use drex::core::config::{Fill, Quality};
use drex_sim::record::Record;
use drex_sim::run::{Contender, Filling, PASS_ROWS, Setup, run};
use drex_sim::workload::{Arrivals, Confidence, Workload};
use drex_sim::{agreement, grid, plot, profiles, quality, report, scale};

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Kind {
    /// A fixed number of requests at all times
    Closed,
    /// Requests come at random
    Poisson,
    /// Requests come at random, in bursts
    Bursty,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Holes {
    /// State-copy
    Copy,
    /// Rows that exited go deep later on
    Postfill,
    /// Rows that exited go deep later on; their tokens are drafts until then
    Verify,
}

/// Simulates drex's scheduler: the engine's own code under a cost profile and a workload
#[derive(Parser)]
#[command(
    name = "drex-sim",
    bin_name = "cargo xtask sim",
    version,
    after_help = "Examples:\n  cargo xtask sim --profile mixed --requests 64 --batch 64 --p 0.8\n  cargo xtask sim --workload \
                  poisson --load 0.9 --length 50,150 --policies off,auto\n  cargo xtask sim --replay traffic.jsonl --threshold \
                  0.5 --policies off,auto,art\n  cargo xtask sim --grid --plot grid.svg\n\nExit status: 0 success, 1 something \
                  failed, 2 wrong usage.\n\nThe options are explained in docs/simulator.md, the words in docs/concepts.md."
)]
struct Cli {
    /// Run every policy over regimes, sizes, depths and exit chances, against the best fixed rule and the limit
    #[arg(long, conflicts_with_all = ["scale", "replay"])]
    grid: bool,
    /// Run quality lossless, where thresholds are learned, over machines, loads and ramps that are honest or not,
    /// against the best fixed threshold and chain of drafts; and agreements, over text that changes its kind
    #[arg(long, conflicts_with_all = ["grid", "scale", "replay"])]
    quality: bool,
    /// Measure what a decision costs in real time, from 16 to 10,000 requests
    #[arg(long, conflicts_with = "replay")]
    scale: bool,
    /// Replay a file of llama-server --drex-record: its costs, confidences and arrivals
    #[arg(long, value_name = "FILE")]
    replay: Option<String>,
    /// Policies to compare: off, auto, hold[:THETA[:PHI]], latency, art, lazy, eager, median, mean
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "off,art,latency,hold,auto"
    )]
    policies: Vec<String>,
    /// Costs: memory, mixed, compute, or a file of llama-server --drex-profile
    #[arg(long, default_value = "mixed")]
    profile: String,
    /// Layers of the model, for the bundled profiles
    #[arg(long, default_value_t = 16)]
    layers: u32,
    /// Layers after which a row may exit; with --replay, which of the recorded ones
    #[arg(long, value_delimiter = ',')]
    ramps: Vec<u32>,
    /// Chance to exit at each ramp, of the rows that come there; one value serves for all ramps
    #[arg(long, value_delimiter = ',', default_value = "0.5")]
    p: Vec<f64>,
    /// How much requests differ in their chance to exit: 0 not at all, 1 all or nothing
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    p_spread: f64,
    /// Share of itself by which the chance to exit swings
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    p_drift: f64,
    /// Period of --p-drift in seconds
    #[arg(long, default_value_t = 10.0)]
    p_period: f64,
    /// With --replay: confidence from which a row exits, one value or one for each ramp
    #[arg(long, value_delimiter = ',')]
    threshold: Vec<f32>,
    /// When requests come [default: closed; with --replay, as recorded]
    #[arg(long, value_enum)]
    workload: Option<Kind>,
    /// Requests at all times (closed), or the most that decode at once (others)
    #[arg(long, default_value_t = 32)]
    requests: u32,
    /// Most rows in one pass [default: 32; with pending rows, enough for all]
    #[arg(long)]
    batch: Option<u32>,
    /// How the K/V of exited rows is filled in the layers that they skipped
    #[arg(long, value_enum, default_value = "copy")]
    fill: Holes,
    /// Most pending rows of a request (postfill, verify)
    #[arg(long, default_value_t = 8)]
    max_pending: u32,
    /// Chance that the full model confirms a draft (verify) [default: as recorded, else 0.95]
    #[arg(long)]
    accept: Option<f64>,
    /// Requests per second (poisson, bursty)
    #[arg(long, conflicts_with = "load")]
    rate: Option<f64>,
    /// Requests per second, as a share of what full passes sustain
    #[arg(long)]
    load: Option<f64>,
    /// Period of bursts in seconds
    #[arg(long, default_value_t = 5.0)]
    burst_period: f64,
    /// Tokens of an answer, or a range FROM,TO; 0: endless
    #[arg(long, value_delimiter = ',')]
    length: Vec<u64>,
    /// Rows of a prompt, or a range FROM,TO
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt_share")]
    prompt_rows: Vec<u64>,
    /// Share of the work that prompts take when no row exits; sets the rows of a prompt
    #[arg(long, value_name = "SHARE")]
    prompt_share: Option<f64>,
    /// Most rows in one window, those of prompts included
    #[arg(long, value_name = "ROWS", default_value_t = PASS_ROWS)]
    pass_rows: u32,
    /// Longest wait of a held row, in ms [default: 8 times the predicted time of its remaining layers]
    #[arg(long, default_value_t = 0.0, hide_default_value = true)]
    max_hold_ms: f64,
    /// Time between tokens that flushes keep where they can, in ms; 0: none
    #[arg(long, default_value_t = 0.0)]
    deadline_ms: f64,
    /// Time from prompt to last token that flushes keep where they can, in ms; 0: none
    #[arg(long, default_value_t = 0.0)]
    request_deadline_ms: f64,
    /// Priorities and their shares, such as 0:0.8,5:0.2
    #[arg(long, value_delimiter = ',')]
    priorities: Vec<String>,
    /// Spread of the times of windows, as a share of them
    #[arg(long, default_value_t = 0.0)]
    noise: f64,
    /// Share of windows that take ten times as long
    #[arg(long, default_value_t = 0.0)]
    outliers: f64,
    /// The host's own time per window, in us
    #[arg(long, default_value_t = 0.0)]
    gap_us: f64,
    /// Factor by which the cost per row is wrong in the profile that auto starts from (1: no profile)
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    wrong_profile: f64,
    /// Tokens per run
    #[arg(long, default_value_t = 20_000)]
    tokens: u64,
    /// Seed of all random draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    /// Also write a CSV file
    #[arg(long, value_name = "FILE")]
    csv: Option<String>,
    /// Also write a plot
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<String>,
    /// Also write a Markdown table (grid)
    #[arg(long, value_name = "FILE")]
    markdown: Option<String>,
}

/// What is wrong with the command line.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

macro_rules! wrong {
    ($($text:tt)*) => {
        return Err(Usage(format!($($text)*)).into())
    };
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match go(&cli, &matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(if e.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn go(cli: &Cli, matches: &ArgMatches) -> Result<()> {
    check(cli)?;
    check_effects(cli, matches)?;
    if cli.grid {
        run_grid(cli)
    } else if cli.quality {
        run_quality(cli)
    } else if cli.scale {
        run_scale(cli)
    } else {
        compare(cli)
    }
}

fn check(cli: &Cli) -> Result<()> {
    let range = |name: &str, v: f64, low: f64, high: f64| -> Result<()> {
        if (low..=high).contains(&v) {
            return Ok(());
        }
        wrong!("--{name} is {v}; expected {low} to {high}")
    };
    for &p in &cli.p {
        range("p", p, 0.0, 1.0)?;
    }
    range("p-spread", cli.p_spread, 0.0, 1.0)?;
    range("p-drift", cli.p_drift, 0.0, 1.0)?;
    range("p-period", cli.p_period, 1e-6, 1e9)?;
    range("burst-period", cli.burst_period, 1e-6, 1e9)?;
    range("noise", cli.noise, 0.0, 2.0)?;
    range("outliers", cli.outliers, 0.0, 1.0)?;
    range("gap-us", cli.gap_us, 0.0, 1e9)?;
    range("max-hold-ms", cli.max_hold_ms, 0.0, 1e9)?;
    range("deadline-ms", cli.deadline_ms, 0.0, 1e9)?;
    range("request-deadline-ms", cli.request_deadline_ms, 0.0, 1e9)?;
    range("wrong-profile", cli.wrong_profile, 1e-3, 1e3)?;
    range("tokens", cli.tokens as f64, 100.0, 1e9)?;
    range("requests", f64::from(cli.requests), 1.0, 1_048_576.0)?;
    range("max-pending", f64::from(cli.max_pending), 1.0, 1024.0)?;
    range("accept", cli.accept.unwrap_or(0.95), 0.0, 1.0)?;
    range("batch", f64::from(batch(cli)), 1.0, 1_048_576.0)?;
    range("pass-rows", f64::from(cli.pass_rows), 1.0, 1_048_576.0)?;
    range("prompt-share", cli.prompt_share.unwrap_or(0.0), 0.0, 0.99)?;
    if let Some(path) = cli.plot.as_deref().filter(|path| !path.ends_with(".svg")) {
        wrong!("--plot is {path}; expected a name that ends in .svg");
    }
    if let Some(r) = cli.rate {
        range("rate", r, 1e-6, 1e9)?;
    }
    if let Some(l) = cli.load {
        range("load", l, 1e-3, 100.0)?;
    }
    Ok(())
}

/// Options of the grid; it goes through profiles, sizes and chances of its own.
const OF_GRID: [&str; 16] = [
    "grid",
    "tokens",
    "seed",
    "noise",
    "outliers",
    "p_spread",
    "p_drift",
    "wrong_profile",
    "fill",
    "max_pending",
    "accept",
    "prompt_share",
    "pass_rows",
    "json",
    "csv",
    "plot",
];

/// Options of the runs over qualities.
const OF_QUALITY: [&str; 6] = ["quality", "tokens", "seed", "noise", "p_drift", "json"];

/// What a recording says itself.
const NOT_OF_REPLAY: [&str; 6] = ["profile", "layers", "p", "p_spread", "p_drift", "p_period"];

/// What only requests that come at random have, or a number of them that is kept.
const OF_WORKLOAD: [&str; 5] = ["requests", "length", "rate", "load", "burst_period"];

/// An option that has no effect is a mistake of who gave it.
fn check_effects(cli: &Cli, matches: &ArgMatches) -> Result<()> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let replay = cli.replay.is_some();
    let random = matches!(cli.workload, Some(Kind::Poisson | Kind::Bursty));
    let bundled = profiles::CLASSES.iter().any(|c| c.name == cli.profile);
    for arg in Cli::command().get_arguments() {
        let id = arg.get_id().as_str();
        if !given(id) {
            continue;
        }
        let why = if cli.quality && !OF_QUALITY.contains(&id) {
            "with --quality"
        } else if cli.grid && !OF_GRID.contains(&id) && id != "markdown" {
            "with --grid"
        } else if cli.scale && !["scale", "json"].contains(&id) {
            "with --scale"
        } else if replay && NOT_OF_REPLAY.contains(&id) {
            "with --replay, which says that itself"
        } else if replay && cli.workload.is_none() && OF_WORKLOAD.contains(&id) {
            "with --replay and without --workload: requests come as recorded"
        } else if id == "markdown" && !cli.grid {
            "without --grid"
        } else if id == "threshold" && !replay {
            "without --replay: --p says who exits"
        } else if ["rate", "load"].contains(&id) && !random {
            "without --workload poisson or bursty"
        } else if id == "burst_period" && cli.workload != Some(Kind::Bursty) {
            "without --workload bursty"
        } else if id == "p_period" && cli.p_drift == 0.0 {
            "without --p-drift"
        } else if id == "max_pending" && cli.fill == Holes::Copy {
            "without --fill postfill or verify"
        } else if id == "accept" && cli.fill != Holes::Verify {
            "without --fill verify"
        } else if ["layers", "ramps"].contains(&id) && !replay && !bundled {
            "with a profile from a file, which has them"
        } else {
            continue;
        };
        wrong!("--{} has no effect {why}", id.replace('_', "-"));
    }
    Ok(())
}

fn write(path: &str, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {path}"))
}

fn progress(done: usize, all: usize) {
    if std::io::stderr().is_terminal() {
        let end = if done == all { "\n" } else { "" };
        let _ = write!(std::io::stderr(), "\rcell {done} of {all} {end}");
    }
}

fn run_grid(cli: &Cli) -> Result<()> {
    let o = grid::Options {
        tokens: cli.tokens,
        seed: cli.seed,
        noise: cli.noise,
        outliers: cli.outliers,
        spread: cli.p_spread,
        drift: cli.p_drift,
        wrong: cli.wrong_profile,
        filling: filling(cli),
        prompt_share: cli.prompt_share.unwrap_or(0.0),
        pass_rows: cli.pass_rows,
    };
    let cells = grid::run_grid(&o, progress)?;
    if cli.json {
        println!("{}", report::grid_json(&cells, &o));
    } else {
        print!("{}", report::grid_table(&cells));
    }
    if let Some(path) = &cli.csv {
        write(path, &report::grid_csv(&cells))?;
    }
    if let Some(path) = &cli.markdown {
        write(path, &report::grid_markdown(&cells))?;
    }
    if let Some(path) = &cli.plot {
        write(path, &plot::grid(&cells))?;
    }
    Ok(())
}

fn run_quality(cli: &Cli) -> Result<()> {
    let o = quality::Options {
        tokens: cli.tokens,
        seed: cli.seed,
        noise: cli.noise,
        drift: cli.p_drift,
    };
    let cells = quality::run_quality(&o, progress)?;
    // Audits of enough answers for the strictest target.
    let a = agreement::Options {
        tokens: 10 * cli.tokens,
        seed: cli.seed,
        noise: cli.noise,
    };
    let (speeds, promises) = agreement::run_agreement(&a, progress)?;
    if cli.json {
        let mut all = quality::quality_json(&cells, &o);
        all["agreement"] = agreement::agreement_json(&speeds, &promises);
        println!("{all}");
    } else {
        let agreements = agreement::agreement_tables(&speeds, &promises);
        println!("{}\n{agreements}", quality::quality_table(&cells));
    }
    Ok(())
}

fn run_scale(cli: &Cli) -> Result<()> {
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for ramps in [1, 8] {
        for deadlines in [false, true] {
            for requests in [16, 64, 256, 1000, 4000, 10_000] {
                let c = scale::measure(requests, ramps, 4000, deadlines)?;
                rows.push(vec![
                    c.ramps.to_string(),
                    deadlines.to_string(),
                    c.requests.to_string(),
                    format!("{:.1}", c.rows_per_step),
                    format!("{:.0}", c.ns_per_step),
                    format!("{:.1}", c.ns_per_row),
                ]);
                values.push(serde_json::json!({
                    "ramps": c.ramps, "deadlines": deadlines, "requests": c.requests,
                    "rows_per_step": c.rows_per_step, "ns_per_step": c.ns_per_step, "ns_per_row": c.ns_per_row,
                }));
            }
        }
    }
    if cli.json {
        println!("{}", serde_json::json!({"scale": values}));
    } else {
        let head = [
            "ramps",
            "deadlines",
            "requests",
            "rows/step",
            "ns/step",
            "ns/row",
        ];
        print!("{}", report::table(&head, &rows));
    }
    Ok(())
}

fn compare(cli: &Cli) -> Result<()> {
    let contenders = cli
        .policies
        .iter()
        .map(|p| Contender::parse(p).map_err(|e| Usage(format!("{e:#}")).into()))
        .collect::<Result<Vec<_>>>()?;
    let (setup, limit) = match &cli.replay {
        Some(path) => (replay(cli, path)?, None),
        None => {
            let setup = synthetic(cli)?;
            let limit = grid::limit(
                &setup.profile,
                cli.requests.min(batch(cli)),
                &chances(cli, setup.thresholds.len())?,
                &setup.filling,
            );
            (setup, Some(limit))
        }
    };
    let mut runs = Vec::new();
    for c in &contenders {
        runs.push(run(&setup, c)?);
    }
    if cli.json {
        println!("{}", report::run_json(&runs, limit));
    } else {
        print!("{}", report::run_table(&runs, limit));
    }
    if let Some(path) = &cli.csv {
        write(path, &report::run_csv(&runs))?;
    }
    if let Some(path) = &cli.plot {
        write(path, &plot::runs(&runs, limit))?;
    }
    Ok(())
}

fn chances(cli: &Cli, ramps: usize) -> Result<Vec<f64>> {
    match cli.p.len() {
        1 => Ok(vec![cli.p[0]; ramps]),
        n if n == ramps => Ok(cli.p.clone()),
        n => wrong!("--p has {n} values; expected 1, or one for each of the {ramps} ramps"),
    }
}

fn workload(cli: &Cli, setup: &Setup) -> Result<Workload> {
    let mut w = Workload::closed(cli.requests, Vec::new(), cli.seed);
    w.length = match cli.length[..] {
        [] if cli.workload.is_none_or(|k| k == Kind::Closed) => (0, 0),
        [] => (50, 150),
        [n] => (n, n),
        [a, b] if a <= b => (a, b),
        _ => wrong!("--length is {:?}; expected N, or FROM,TO", cli.length),
    };
    w.prompt_rows = match cli.prompt_rows[..] {
        [] => (0, 0),
        [n] => (n, n),
        [a, b] if a <= b => (a, b),
        _ => wrong!(
            "--prompt-rows is {:?}; expected N, or FROM,TO",
            cli.prompt_rows
        ),
    };
    w.token_deadline_ns = (cli.deadline_ms * 1e6) as u64;
    w.request_deadline_ns = (cli.request_deadline_ms * 1e6) as u64;
    if !cli.priorities.is_empty() {
        w.priorities = cli
            .priorities
            .iter()
            .map(|p| {
                let parts = p
                    .split_once(':')
                    .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
                let wrong = || Usage(format!("--priorities: {p:?}; expected PRIORITY:SHARE"));
                parts.ok_or_else(|| wrong().into())
            })
            .collect::<Result<_>>()?;
    }
    let mean = (w.length.0 + w.length.1) as f64 / 2.0;
    let b = f64::from(cli.requests.min(batch(cli)));
    let full = setup.profile.time(0, setup.profile.segments.len(), b, 0.0) + setup.gap_ns;
    if let Some(share) = cli.prompt_share.filter(|&s| s > 0.0) {
        if mean == 0.0 {
            wrong!(
                "--length is 0; expected more with --prompt-share: a prompt goes with an answer"
            );
        }
        let rows = grid::prompt_rows(&setup.profile, share, mean * full / b);
        w.prompt_rows = (rows, rows);
    }
    // In passes that decode rows need too.
    let prompt = setup.profile.prompt_row(0, setup.profile.segments.len())
        * (w.prompt_rows.0 + w.prompt_rows.1) as f64
        / 2.0;
    // Requests per second of full batches.
    let sustained = 1e9 / (mean * full / b + prompt);
    let rate = cli.rate.unwrap_or(cli.load.unwrap_or(0.8) * sustained);
    w.arrivals = match cli.workload.unwrap_or(Kind::Closed) {
        Kind::Closed => Arrivals::Closed(cli.requests),
        Kind::Poisson => Arrivals::Poisson(rate),
        Kind::Bursty => Arrivals::Bursty(rate, cli.burst_period),
    };
    if w.length.1 == 0 && cli.workload.is_some_and(|k| k != Kind::Closed) {
        wrong!("--length is 0; expected more: requests that come must also go");
    }
    Ok(w)
}

fn base(cli: &Cli, profile: drex::core::estimate::profile::Profile, thresholds: Vec<f32>) -> Setup {
    Setup {
        start: (cli.wrong_profile != 1.0).then(|| {
            let mut wrong = profile.clone();
            for s in &mut wrong.segments {
                s.ns_per_row *= cli.wrong_profile;
            }
            wrong
        }),
        profile,
        workload: Workload::closed(cli.requests, Vec::new(), cli.seed),
        batch: batch(cli),
        pass_rows: cli.pass_rows.max(batch(cli)),
        max_hold_ns: (cli.max_hold_ms * 1e6) as u64,
        max_requests: cli.requests,
        thresholds,
        tokens: cli.tokens,
        noise: cli.noise,
        outliers: cli.outliers,
        gap_ns: cli.gap_us * 1e3,
        filling: filling(cli),
        quality: Quality::Given,
    }
}

fn filling(cli: &Cli) -> Filling {
    let fill = match cli.fill {
        Holes::Copy => return Filling::COPY,
        Holes::Postfill => Fill::Postfill,
        Holes::Verify => Fill::Verify,
    };
    Filling {
        fill,
        max_pending: cli.max_pending,
        accept: cli.accept.unwrap_or(0.95),
        harm: 0.0,
    }
}

fn batch(cli: &Cli) -> u32 {
    match (cli.batch, cli.fill) {
        (Some(n), _) => n,
        (None, Holes::Copy) => 32,
        _ => filling(cli).pass_rows(cli.requests),
    }
}

fn synthetic(cli: &Cli) -> Result<Setup> {
    if cli.layers < 2 {
        wrong!("--layers is {}; expected at least 2", cli.layers);
    }
    let ramps = if cli.ramps.is_empty() {
        vec![(cli.layers / 4).max(1)]
    } else {
        cli.ramps.clone()
    };
    let mut before = 0;
    for &l in &ramps {
        if l <= before || l >= cli.layers {
            wrong!(
                "--ramps has {l}; expected increasing numbers in 1..{}",
                cli.layers - 1
            );
        }
        before = l;
    }
    let profile = profiles::load(&cli.profile, cli.layers, &ramps)?;
    let n = profile.ramp_layers.len();
    let mut setup = base(cli, profile, vec![0.5; n]);
    let p = chances(cli, n)?;
    setup.workload = workload(cli, &setup)?;
    setup.workload.confidence = match (cli.p_spread > 0.0, cli.p_drift > 0.0) {
        (true, true) => wrong!("--p-spread and --p-drift cannot be combined"),
        (true, _) => Confidence::Spread(p, cli.p_spread),
        (_, true) => Confidence::Drift(p, cli.p_drift, cli.p_period),
        _ => Confidence::Fixed(p),
    };
    Ok(setup)
}

fn replay(cli: &Cli, path: &str) -> Result<Setup> {
    let mut record = Record::read(path)?;
    if !cli.ramps.is_empty() {
        record.keep_ramps(&cli.ramps)?;
    }
    let thresholds = match cli.threshold.len() {
        0 => record.thresholds.clone(),
        1 => vec![cli.threshold[0]; record.thresholds.len()],
        n if n == record.thresholds.len() => cli.threshold.clone(),
        n => wrong!(
            "--threshold has {n} values; expected 1, or one for each of the {} ramps",
            record.thresholds.len()
        ),
    };
    eprintln!(
        "{path}: {} requests, {} windows, {} tokens, {:.1} tokens/s under {}",
        record.arrivals.len(),
        record.windows,
        record.tokens,
        record.tokens_per_s,
        record.policy
    );
    let mut setup = base(cli, record.profile.clone(), thresholds);
    if let (Some(share), None) = (record.accept, cli.accept) {
        eprintln!("{path}: {:.1} % of the drafts were right", share * 100.0);
        setup.filling.accept = share;
    }
    setup.gap_ns += record.gap_ns;
    setup.workload = workload(cli, &setup)?;
    setup.workload.confidence = record.confidence();
    setup.workload.prompts = record.prompts.clone();
    if !setup.filling.fill.keeps() {
        setup.batch = batch(cli).min(record.max_batch);
    }
    if cli.workload.is_none() {
        setup.max_requests = record.max_batch;
        setup.workload.arrivals = record.trace();
    } else if cli.length.is_empty() {
        setup.workload.lengths = record.arrivals.iter().map(|a| a.1).collect();
    }
    Ok(setup)
}
