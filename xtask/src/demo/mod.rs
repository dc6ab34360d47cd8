//! `cargo xtask demo`: the exit policies against each other, on the bundled model.
//!
//! The client talks to the native `/completion` endpoint, not to `/v1/completions`: only the former can return token
//! ids in its stream (`return_tokens`), and agreement with the full model is counted over ids. Both run the same code in
//! the server.

mod plot;
mod report;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use drex_harness::{
    race,
    stats::{median, quantile},
    traffic::{Lengths, Text, Traffic},
};
use serde_json::{Value, json};

use crate::{
    Source,
    cache::{self, Cache},
    llama::{Kind, Llama, Runtime},
    load, process,
    score::{self, Score},
    server::Server,
};

use report::Report;
pub use report::machine;

/// The unpatched server, as one more policy.
const REFERENCE: &str = "reference";
/// Its layouts of the cache: a stream for each sequence, as it has by default, and one for all. The faster one of a cell is
/// what the ratios are relative to.
const LAYOUTS: [&str; 2] = [REFERENCE, "reference+unified"];
/// The patched server without early exit.
const OFF: &str = "off";
/// The traffic of the short prompts in `demo/prompts.txt`.
const SHORT: &str = "short";

/// Rounds end here even if some are still to come: the whole demo should take about four minutes.
const BUDGET: Duration = Duration::from_secs(180);

/// A measurement takes two seconds on a quiet machine. On a busy one the server's threads wait for each other across
/// time slices and it can be a hundred times that: then less is measured, and the report says so.
const LIMITS: load::Limits = load::Limits {
    silence: Duration::from_secs(60),
    send: Duration::from_secs(6),
    total: Duration::from_secs(14),
};

#[derive(Args)]
pub struct Options {
    /// Print only the results, as one line of JSON
    #[arg(long)]
    json: bool,
    /// How the skipped layers' K/V of an exited token is filled
    #[arg(long, default_value = "copy", value_parser = ["copy", "propagate", "postfill", "verify"])]
    fill: String,
    /// Policies to compare with the unpatched server, which is always measured in both layouts of its cache. `hold+verify` is
    /// a policy with a fill of its own, `reference+ngram-simple` the unpatched server with a speculation type that needs no
    /// second model
    #[arg(long, value_delimiter = ',', default_value = "off,eager,art,hold,auto")]
    policies: Vec<String>,
    /// `short`: prompts of a dozen tokens; PROMPT/ANSWER: tokens of each on average
    #[arg(long, value_delimiter = ',', default_value = "short,300/64")]
    traffic: Vec<String>,
    /// Requests in flight
    #[arg(long, value_delimiter = ',', default_value = "1,4,16", value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: Vec<u16>,
    /// Tokens to generate per `short` request on average; requests ask for half to one and a half times as many
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=250))]
    tokens: u32,
    /// Layers after which a row may exit, separated by commas, or `model` for those of its metadata
    #[arg(long, value_name = "LAYERS", default_value = "8")]
    exit_layers: String,
    /// Confidence (gap between the two most likely tokens) from which a row may exit
    #[arg(long, default_value_t = 0.7)]
    threshold: f64,
    /// How often everything is measured; medians are reported [default: 3, fewer if they would take too long]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: Option<u32>,
    /// Threads that compute [default: all cores but one, which the client and the server's HTTP threads need]
    #[arg(long, default_value_t = default_threads(), hide_default_value = true)]
    threads: usize,
    /// Where the report goes
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
    #[command(flatten)]
    source: Source,
}

/// The name before a plus sign, and what comes after it: a fill, or a speculation type of the unpatched server.
fn parts(policy: &str) -> (&str, Option<&str>) {
    match policy.split_once('+') {
        Some((base, variant)) => (base, Some(variant)),
        None => (policy, None),
    }
}

fn base(policy: &str) -> &str {
    parts(policy).0
}

fn verifies(options: &Options, policy: &str) -> bool {
    ![OFF, REFERENCE].contains(&base(policy)) && fill(options, policy) == "verify"
}

fn fill<'a>(options: &'a Options, policy: &'a str) -> &'a str {
    parts(policy).1.unwrap_or(&options.fill)
}

pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().saturating_sub(1).max(1))
}

/// Requests of one length would start and end together for ever, and the engine would see them all at the same age.
fn length(options: &Options, i: usize) -> u32 {
    options.tokens / 2 + options.tokens * (i as u32 * 37 % 101) / 100
}

/// What the servers are asked.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Load {
    /// As in `--traffic`.
    pub traffic: String,
    pub concurrency: u16,
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} at {} in flight", self.traffic, self.concurrency)
    }
}

/// A policy under a load.
type Key = (String, Load);
type Samples = BTreeMap<Key, Vec<Sample>>;

/// The prompts of both kinds of traffic.
struct Prompts {
    short: Vec<String>,
    corpus: String,
}

/// One measurement: one policy under one load in one round.
pub struct Sample {
    pub tokens_per_s: f64,
    /// Those that ended.
    pub requests: u64,
    /// Those that were given up because they took too long.
    pub cut: u64,
    pub tokens: u64,
    pub gaps_ms: (f64, f64),
    pub completion_ms: f64,
    /// Tokens that left at each ramp, by the layer after which it sits.
    pub exits: BTreeMap<u32, u64>,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub held_ms: f64,
    pub flushes: BTreeMap<String, u64>,
    pub client_cpu: f64,
    /// Prompts and outputs, for scoring.
    pub streams: Vec<(Vec<i64>, Vec<i64>)>,
}

/// Lengths of a traffic, or none for `short`.
fn lengths(traffic: &str) -> Result<Option<Lengths>> {
    if traffic == SHORT {
        return Ok(None);
    }
    match traffic
        .parse()
        .with_context(|| format!("--traffic {traffic}"))?
    {
        Traffic::Closed(lengths) => Ok(Some(lengths)),
        _ => bail!("--traffic {traffic}: the demo has {SHORT} and PROMPT/ANSWER only"),
    }
}

/// Everybody who is measured, the unpatched server's layouts first.
fn contenders(options: &Options) -> Vec<String> {
    let mut all: Vec<String> = LAYOUTS.map(str::to_owned).to_vec();
    for policy in &options.policies {
        if !all.contains(policy) {
            all.push(policy.clone());
        }
    }
    all
}

/// The layout that made more tokens/s under a load, and how much more in its worst round than the other in its best one.
fn stock(samples: &Samples, load: &Load) -> (&'static str, f64) {
    let rates = |layout: &str| -> Vec<f64> {
        let list = samples.get(&(layout.to_owned(), load.clone()));
        list.into_iter().flatten().map(|s| s.tokens_per_s).collect()
    };
    let of = LAYOUTS.map(|layout| (layout, rates(layout)));
    let [a, b] = &of;
    let (fast, slow) = if median(&a.1) >= median(&b.1) {
        (a, b)
    } else {
        (b, a)
    };
    let worst = fast.1.iter().copied().fold(f64::INFINITY, f64::min);
    let best = slow.1.iter().copied().fold(0.0, f64::max);
    (fast.0, worst / best)
}

pub fn run(options: &Options) -> Result<()> {
    for traffic in &options.traffic {
        lengths(traffic)?;
    }
    let prompts = Prompts {
        short: prompts()?,
        corpus: fs::read_to_string(cache::repo().join("demo/corpus.txt"))
            .context("cannot read demo/corpus.txt")?,
    };
    let loads: Vec<Load> = options
        .traffic
        .iter()
        .flat_map(|traffic| {
            options.concurrency.iter().map(|concurrency| Load {
                traffic: traffic.clone(),
                concurrency: *concurrency,
            })
        })
        .collect();
    let model = cache::bundled_model()?;
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let patched = options.policies.iter().any(|p| base(p) != REFERENCE);
    // Lossless or not is a question for builds whose results do not depend on who shares a batch: the others disagree with
    // themselves in half a percent of the tokens.
    let exact = options.policies.iter().any(|p| verifies(options, p));
    let kinds: &[Kind] = match (patched, exact) {
        (false, _) => &[Kind::Reference],
        (true, false) => &[Kind::Reference, Kind::Patched],
        (true, true) => &[
            Kind::Reference,
            Kind::Patched,
            Kind::ReferenceExact,
            Kind::PatchedExact,
        ],
    };
    let runtimes = llama.ensure(kinds)?;
    let scorer = llama
        .tools(&runtimes[if exact { 2 } else { 0 }])?
        .into_iter()
        .find(|tool| tool.ends_with("drex-score"))
        .context("integration/llama.cpp/tools/score.cpp is missing")?;

    let _machine = cache.lock_machine()?;
    warn_if_busy();
    let start = Instant::now();
    let mut samples = Samples::new();
    let contenders = contenders(options);
    let rounds = options.rounds.unwrap_or(3);
    let mut done = 0;
    let mut progress = process::Progress::new("measuring");
    for round in 0..rounds {
        let so_far = start.elapsed();
        let next = if round > 0 {
            so_far / round
        } else {
            Duration::ZERO
        };
        if options.rounds.is_none() && so_far + next > BUDGET {
            break;
        }
        for load in &loads {
            let (fast, lead) = stock(&samples, load);
            // Side by side in time: what the machine does meanwhile hits all policies alike.
            for at in race::order(round as usize, contenders.len()) {
                let policy = &contenders[at];
                // A layout that is so much slower is no baseline in this cell.
                if round > 0 && LAYOUTS.contains(&policy.as_str()) && policy != fast && lead > 1.2 {
                    continue;
                }
                progress.update(&format!(
                    "round {} of {rounds}  {policy}, {load}",
                    round + 1
                ));
                let runtime = &runtimes[usize::from(base(policy) != REFERENCE)];
                let sample = measure(runtime, options, policy, load, &model, &prompts, false)
                    .with_context(|| format!("policy {policy}, {load}"))?;
                samples
                    .entry((policy.clone(), load.clone()))
                    .or_default()
                    .push(sample);
            }
        }
        done += 1;
    }
    progress.finish("done");

    let mut apart = Samples::new();
    if exact {
        let mut progress =
            process::Progress::new("repeating in builds that do not depend on the batch");
        for (policy, load) in samples.keys() {
            progress.update(&format!("{policy}, {load}"));
            let runtime = &runtimes[if base(policy) == REFERENCE { 2 } else { 3 }];
            let sample = measure(runtime, options, policy, load, &model, &prompts, true)
                .with_context(|| format!("policy {policy}, {load}"))?;
            apart.insert((policy.clone(), load.clone()), vec![sample]);
        }
        progress.finish("done");
    }

    let cut: u64 = samples.values().flatten().map(|s| s.cut).sum();
    if cut > 0 {
        eprintln!("warning: {cut} requests were given up because they took too long");
    }

    let mut progress = process::Progress::new("scoring with the full model");
    progress.update("");
    let scores = score_all(
        &scorer,
        &model,
        options.threads,
        if exact { &apart } else { &samples },
        exact,
    )?;
    progress.finish("done");

    let report = Report {
        cells: report::cells(options, &contenders, &loads, &samples, &scores),
        model: model
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        machine: report::machine(),
        threshold: options.threshold,
        rounds: done,
        tokens_per_request: options.tokens,
        threads: options.threads,
        exact,
        seconds: start.elapsed().as_secs_f64(),
    };
    // Relative to the clone, wherever it is called from.
    let out = cache::repo().join(&options.out);
    fs::create_dir_all(&out)?;
    let json = report.json();
    fs::write(
        out.join("report.json"),
        serde_json::to_string_pretty(&json)? + "\n",
    )?;
    fs::write(out.join("report.html"), report.html())?;
    if options.json {
        println!("{json}");
    } else {
        print!("{}", report.table());
        println!(
            "\nreport: {}\n        {}",
            out.join("report.html").display(),
            out.join("report.json").display()
        );
    }
    Ok(())
}

/// One per line, with `\n` for a line's end in the prompt.
fn prompts() -> Result<Vec<String>> {
    let path = cache::repo().join("demo/prompts.txt");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let prompts: Vec<_> = text
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| line.replace("\\n", "\n"))
        .collect();
    if prompts.is_empty() {
        bail!("{} is empty", path.display());
    }
    Ok(prompts)
}

/// Enough for a steady state, and about the same time for each.
fn requests(load: &Load) -> usize {
    let c = usize::from(load.concurrency);
    if load.traffic != SHORT {
        return (2 * c).max(8);
    }
    match c {
        1..=2 => 8,
        3..=8 => 3 * c,
        _ => (2 * c).max(40),
    }
}

fn server_args(
    options: &Options,
    policy: &str,
    slots: usize,
    model: &Path,
    ctx: usize,
    exact: bool,
) -> Vec<String> {
    let mut args: Vec<String> = vec!["-m".into(), model.display().to_string()];
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    add("-np", slots.to_string());
    add("-c", ctx.to_string());
    add("-t", options.threads.to_string());
    add("--cache-ram", "0".into());
    add("-fa", "on".into());
    if exact {
        // See the README of integration/llama.cpp.
        for (name, value) in [("-ctk", "q8_0"), ("-ctv", "q8_0"), ("-sps", "0")] {
            add(name, value.into());
        }
    }
    let (base, variant) = parts(policy);
    if base == REFERENCE {
        if let Some(variant) = variant.filter(|_| policy != LAYOUTS[1]) {
            add("--spec-type", variant.into());
        }
    } else {
        add("--drex-policy", base.into());
        if base != OFF {
            add("--drex-threshold", options.threshold.to_string());
            add("--drex-metric", "gap".into());
            add("--drex-fill", fill(options, policy).into());
            if options.exit_layers != "model" {
                add("--drex-exit-layers", options.exit_layers.clone());
            }
        }
    }
    if policy == LAYOUTS[1] {
        args.push("--kv-unified".into());
    }
    args.extend(["--metrics", "--slots", "--no-webui"].map(Into::into));
    args
}

fn measure(
    runtime: &Runtime,
    options: &Options,
    policy: &str,
    load: &Load,
    model: &Path,
    prompts: &Prompts,
    exact: bool,
) -> Result<Sample> {
    // Exact, no slot serves twice: a KV cell that is used again changes the order of summation.
    let slots = match exact {
        true => usize::from(load.concurrency) + requests(load),
        false => load.concurrency.into(),
    };
    // Each request gets a prompt and an output; the room that is left over costs nothing, since only used cells are
    // attended to.
    let room = match lengths(&load.traffic)? {
        Some(lengths) => lengths.longest().next_multiple_of(256),
        None => options.tokens as usize * 3 / 2 + 128,
    };
    let ctx = (slots * room).max(512).next_multiple_of(256);
    let server = Server::start(
        runtime,
        server_args(options, policy, slots, model, ctx, exact),
    )?;
    let result = drive(&server, options, load, prompts);
    match result {
        Ok(sample) => {
            server.stop(Duration::from_secs(10))?;
            Ok(sample)
        }
        Err(error) => {
            let last = process::tail(server.log_path(), 12)?.join("\n  ");
            Err(error.context(format!("the server's last lines:\n  {last}\n")))
        }
    }
}

fn drive(server: &Server, options: &Options, load: &Load, prompts: &Prompts) -> Result<Sample> {
    let client = server.client;
    let body = |tokens: &[i64], n: u32| {
        let body = json!({
            "prompt": tokens,
            "stream": true,
            "n_predict": n,
            "temperature": 0,
            "ignore_eos": true,
            "return_tokens": true,
            // Each request pays for its own prompt, whichever slot it comes to.
            "cache_prompt": false,
            // The rest repeats the settings and the prompt, for every request.
            "response_fields": ["stop", "timings", "tokens_predicted"],
        });
        body.to_string().into_bytes()
    };
    let in_flight = usize::from(load.concurrency);
    let total = requests(load);
    let jobs: Vec<(Vec<i64>, u32)> = match lengths(&load.traffic)? {
        None => {
            let ids = prompts
                .short
                .iter()
                .map(|text| client.tokenize(text))
                .collect::<Result<Vec<_>>>()?;
            (0..total)
                .map(|i| (ids[i % ids.len()].clone(), length(options, i)))
                .collect()
        }
        Some(lengths) => Text::of(client, &prompts.corpus)
            .map(|text| lengths.requests(&text, 0, total))?
            .into_iter()
            .map(|(prompt, answer)| (prompt, answer as u32))
            .collect(),
    };
    let warm_up: Vec<_> = (0..in_flight)
        .map(|i| body(&jobs[i % jobs.len()].0, 8))
        .collect();
    load::closed_loop(client.addr, "/completion", &warm_up, in_flight, LIMITS)?;

    let before = client.metrics().unwrap_or_default();
    let bodies: Vec<_> = jobs.iter().map(|(prompt, n)| body(prompt, *n)).collect();
    let outcome = load::closed_loop(client.addr, "/completion", &bodies, in_flight, LIMITS)?;
    let after = client.metrics().unwrap_or_default();

    let mut sample = Sample {
        tokens_per_s: 0.0,
        requests: outcome.finished.len() as u64,
        cut: outcome.cut.len() as u64,
        tokens: 0,
        gaps_ms: (0.0, 0.0),
        completion_ms: 0.0,
        exits: BTreeMap::new(),
        involuntary_exits: 0,
        involuntary_stays: 0,
        held_ms: 0.0,
        flushes: BTreeMap::new(),
        client_cpu: outcome.client_cpu,
        streams: Vec::new(),
    };
    // Ramps are numbered in responses; the metrics know after which layers they are.
    let mut layers: Vec<(u32, u32)> = after
        .labels("drex_exits_total", ["ramp", "layer"])
        .into_iter()
        .filter_map(|[ramp, layer]| Some((ramp.parse().ok()?, layer.parse().ok()?)))
        .collect();
    layers.sort_unstable();
    let mut in_window = 0_u64;
    let mut gaps = Vec::new();
    let mut ramps: Vec<u64> = Vec::new();
    for finished in &outcome.finished {
        let generation = finished
            .generation()
            .with_context(|| format!("request {}", finished.job))?;
        let predicted = generation.last["tokens_predicted"]
            .as_u64()
            .unwrap_or(generation.tokens.len() as u64);
        sample.tokens += predicted;
        in_window += generation
            .times
            .iter()
            .filter(|time| **time <= outcome.drain)
            .count() as u64;
        // While a character is incomplete, the server holds its bytes back and their tokens' ids are lost.
        in_window += predicted.saturating_sub(generation.tokens.len() as u64);
        gaps.extend(gaps_ms(&generation.times));
        sample.completion_ms +=
            (finished.ended - finished.sent).as_secs_f64() * 1e3 / outcome.finished.len() as f64;
        let timings = &generation.last["timings"];
        for (ramp, count) in timings["drex_exits"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            ramps.resize(ramps.len().max(ramp + 1), 0);
            ramps[ramp] += count.as_u64().unwrap_or(0);
        }
        sample.involuntary_exits += timings["drex_involuntary_exits"].as_u64().unwrap_or(0);
        sample.involuntary_stays += timings["drex_involuntary_stays"].as_u64().unwrap_or(0);
        sample.held_ms += timings["drex_held_ms"].as_f64().unwrap_or(0.0);
        if generation.tokens.len() as u64 == predicted {
            sample
                .streams
                .push((jobs[finished.job].0.clone(), generation.tokens));
        }
    }
    for cut in &outcome.cut {
        let times = cut.partial()?.times;
        in_window += times.iter().filter(|time| **time <= outcome.drain).count() as u64;
        gaps.extend(gaps_ms(&times));
    }
    let window = (outcome.drain - outcome.start).as_secs_f64();
    sample.tokens_per_s = in_window as f64 / window.max(1e-9);
    sample.gaps_ms = (quantile(&mut gaps, 0.5), quantile(&mut gaps, 0.99));
    for (ramp, count) in ramps.iter().enumerate() {
        let layer = layers
            .iter()
            .find(|(r, _)| *r as usize == ramp)
            .map_or(4 * (ramp as u32 + 1), |(_, layer)| *layer);
        sample.exits.insert(layer, *count);
    }
    for (reason, count) in after.by_label("drex_flushes_total", "reason") {
        let old = before
            .by_label("drex_flushes_total", "reason")
            .into_iter()
            .find(|(r, _)| *r == reason);
        sample.flushes.insert(
            reason,
            (count - old.map_or(0.0, |(_, n)| n)).max(0.0) as u64,
        );
    }
    Ok(sample)
}

fn gaps_ms(times: &[Instant]) -> impl Iterator<Item = f64> {
    times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
}

/// Says so where other programs run.
pub fn warn_if_busy() {
    if let Some(busy) = busy().filter(|busy| *busy > 0.15) {
        eprintln!(
            "warning: other programs keep {:.0} % of this machine busy; nothing measured now means much",
            busy * 100.0
        );
    }
}

/// The share of all cores that something is running on.
fn busy() -> Option<f64> {
    let read = || -> Option<(u64, u64)> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let times: Vec<u64> = stat
            .lines()
            .next()?
            .split_whitespace()
            .skip(1)
            .filter_map(|t| t.parse().ok())
            .collect();
        Some((times.iter().take(8).sum(), times.get(3)? + times.get(4)?))
    };
    let (total, idle) = read()?;
    std::thread::sleep(Duration::from_millis(500));
    let (total2, idle2) = read()?;
    Some(1.0 - idle2.saturating_sub(idle) as f64 / (total2 - total).max(1) as f64)
}

type Scores = BTreeMap<Key, Vec<Score>>;

/// So many streams of long prompts are scored for each cell: most of the time goes into their prompts.
const SCORED: usize = 16;

/// The first round's streams: the later ones are mostly the same again.
fn score_all(
    tool: &Path,
    model: &Path,
    threads: usize,
    samples: &Samples,
    exact: bool,
) -> Result<Scores> {
    let first = |(key, list): (&Key, &Vec<Sample>)| {
        let most = if key.1.traffic == SHORT {
            usize::MAX
        } else {
            SCORED
        };
        let mut streams = list.first().map(|s| s.streams.clone()).unwrap_or_default();
        streams.truncate(most);
        streams
    };
    let counts: Vec<usize> = samples.iter().map(|cell| first(cell).len()).collect();
    let streams: Vec<_> = samples.iter().flat_map(first).collect();
    let mut scores = score::score(
        tool,
        model,
        threads,
        if exact { "q8_0" } else { "f16" },
        &streams,
    )?
    .into_iter();
    let take = |(key, n): (&Key, usize)| (key.clone(), scores.by_ref().take(n).collect());
    Ok(samples.keys().zip(counts).map(take).collect())
}

/// As it goes into the JSON: no more digits than mean something.
pub fn rounded(value: f64, digits: i32) -> Value {
    let scale = 10_f64.powi(digits);
    json!((value * scale).round() / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_is_short_or_lengths() {
        assert_eq!(lengths(SHORT).unwrap(), None);
        assert_eq!(lengths("300/64").unwrap().unwrap().prompt, 300);
        let error = format!("{:#}", lengths("chat").unwrap_err());
        assert!(
            error.contains("--traffic chat: the demo has short"),
            "{error}"
        );
        assert!(lengths("400/400").is_err());
    }

    #[test]
    fn the_bundled_prompts_are_there() -> Result<()> {
        assert_eq!(prompts()?.len(), 40);
        Ok(())
    }
}
