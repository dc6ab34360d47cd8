// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench serve`: which servers race, under which load.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use drex_harness::{
    is_quality,
    race::{About, Contender, LAYOUTS, Race},
    traffic::{self, Traffic},
};

use crate::{command_line, known_threads, parsed, show, today, unique};
use drex_build::{
    Source,
    cache::{self, Cache},
    llama::{Kind, Llama},
};
use drex_harness::machine;

pub const HELP: &str = "The baseline, `stock`, is the unpatched server with the same slots, context and threads, in the faster of its two \
    layouts of the cache in each cell: a stream for each sequence (the default) or one for all (--kv-unified). Contenders \
    take turns within a round, with the same requests; ratios are those of one round.\n\n\
    Traffic: PROMPT/ANSWER in tokens, so many in flight at all times; `chat`: five turns after a shared prefix, with the \
    prompt cache; `poisson-0.8`: arrivals at random at 0.8 of what `off` can serve, at 16 places.\n\n\
    --quick: 16/128 at 4, 300/64 at 1 and at 16, chat at 4, in less than four minutes.";

const POLICIES: [&str; 9] = [
    "off", "auto", "hold", "latency", "art", "lazy", "eager", "median", "mean",
];
const FILLS: [&str; 4] = ["copy", "propagate", "postfill", "verify"];
/// In place of a fill: the quality that needs neither a fill nor a threshold.
const LOSSLESS: &str = "lossless";
const QUICK: [(&str, usize); 4] = [("300/64", 1), ("16/128", 4), ("chat", 4), ("300/64", 16)];
/// For four cells. Starting servers, warming up and a last round that began in time come on top.
const QUICK_BUDGET: Duration = Duration::from_secs(185);

#[derive(Args)]
pub struct Options {
    /// Progress on stderr, and the results as one line of JSON
    #[arg(long)]
    json: bool,
    /// Four cells in less than four minutes
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 6, with --quick as many as there is time for]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Kinds of traffic: PROMPT/ANSWER tokens, chat, or random arrivals as poisson-LOAD
    /// [default: 16/128,128/128,300/64,400/16,chat,poisson-0.5,poisson-0.8,poisson-1.2]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    traffic: Option<Vec<String>>,
    /// Requests in flight [default: 1,4,8,16,32,64]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: Option<Vec<u16>>,
    /// Policies of the patched server; `auto+propagate` is the policy auto with the fill propagate, `auto+verify@0.5`
    /// has a threshold of its own too, and `auto+lossless` and `auto+0.99` have neither fill nor threshold, but a quality
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "off,auto"
    )]
    policies: Vec<String>,
    /// How the skipped layers' K/V of an exited token is filled
    #[arg(long, default_value = "copy", value_parser = FILLS)]
    fill: String,
    /// Layers after which a row may exit, separated by commas, or `model` for those of its metadata
    #[arg(long, value_name = "LAYERS", default_value = "8")]
    exit_layers: String,
    /// Confidence (gap between the two most likely tokens) from which a row may exit
    #[arg(long, default_value_t = 0.7)]
    threshold: f64,
    /// Threads that compute [default: all cores but one, which the client needs]
    #[arg(long, default_value_t = machine::default_threads(), hide_default_value = true)]
    threads: usize,
    /// Seconds of a slice that count; a slice counts at least as many requests as are in flight
    #[arg(long, value_name = "SECONDS")]
    slice: Option<f64>,
    /// Where report.html, report.json and report.md go
    #[arg(long, value_name = "DIR", default_value = "target/bench-serve")]
    out: PathBuf,
    #[command(flatten)]
    source: Source,
}

/// What is to be raced, from arguments that were checked.
struct Plan {
    traffic: Vec<Traffic>,
    in_flight: Vec<usize>,
    only: Vec<(Traffic, usize)>,
    rounds: usize,
    slice: Duration,
    budget: Option<Duration>,
}

/// A policy of the list, and what it has of its own.
struct Parts<'a> {
    base: &'a str,
    fill: Option<&'a str>,
    threshold: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn of(policy: &'a str) -> Self {
        let (rest, threshold) = match policy.split_once('@') {
            Some((rest, threshold)) => (rest, Some(threshold)),
            None => (policy, None),
        };
        let (base, fill) = match rest.split_once('+') {
            Some((base, fill)) => (base, Some(fill)),
            None => (rest, None),
        };
        Parts {
            base,
            fill,
            threshold,
        }
    }
}

fn plan(options: &Options) -> Result<Plan> {
    unique("--policies", &options.policies)?;
    for policy in &options.policies {
        let Parts {
            base,
            fill,
            threshold,
        } = Parts::of(policy);
        if base == "stock" || base == "reference" {
            bail!("--policies {policy}: the unpatched server is always in the race");
        }
        if !POLICIES.contains(&base) {
            bail!(
                "--policies {policy}: no such policy; known are {}",
                POLICIES.join(", ")
            );
        }
        match fill {
            Some(_) if base == "off" => {
                bail!("--policies {policy}: nothing is filled without exits")
            }
            Some(quality) if is_quality(quality) && threshold.is_some() => {
                bail!("--policies {policy}: with a quality, thresholds are found")
            }
            Some(fill) if !is_quality(fill) && !FILLS.contains(&fill) => {
                bail!(
                    "--policies {policy}: no such fill; known are {}; qualities are {LOSSLESS} and numbers from 0.5 to 1",
                    FILLS.join(", ")
                )
            }
            _ => {}
        }
        if let Some(threshold) = threshold {
            let known = threshold.parse::<f64>();
            ensure!(
                known.is_ok_and(|t| t.is_finite() && t >= 0.0),
                "--policies {policy}: the threshold is {threshold:?}; expected a number, 0 or more"
            );
        }
    }
    if options.exit_layers != "model" {
        for layer in options.exit_layers.split(',') {
            let known = layer.parse::<u32>().is_ok_and(|layer| layer > 0);
            ensure!(
                known,
                "--exit-layers {}: {layer:?} is no number of layers",
                options.exit_layers
            );
        }
    }
    ensure!(
        options.threshold.is_finite() && options.threshold >= 0.0,
        "--threshold {}: not a confidence",
        options.threshold
    );
    known_threads(options.threads)?;
    let slice = options
        .slice
        .unwrap_or(if options.quick { 1.2 } else { 3.0 });
    ensure!(
        (0.01..=600.0).contains(&slice),
        "--slice {slice}: from 0.01 to 600 seconds"
    );

    let of_quick = options.quick && options.traffic.is_none() && options.concurrency.is_none();
    let names: Vec<&str> = match &options.traffic {
        Some(names) => names.iter().map(String::as_str).collect(),
        None if of_quick => QUICK.iter().map(|(name, _)| *name).collect(),
        None => traffic::ALL.split(',').collect(),
    };
    let mut kinds: Vec<Traffic> = Vec::new();
    for name in names {
        let kind: Traffic = name.parse().with_context(|| format!("--traffic {name}"))?;
        if !kinds.contains(&kind) {
            kinds.push(kind);
        } else if !of_quick {
            bail!("--traffic {name}: named twice");
        }
    }
    let mut in_flight: Vec<usize> = match &options.concurrency {
        Some(list) => {
            unique("--concurrency", list)?;
            list.iter().map(|n| usize::from(*n)).collect()
        }
        None if of_quick => QUICK.iter().map(|(_, n)| *n).collect(),
        None => vec![1, 4, 8, 16, 32, 64],
    };
    in_flight.sort_unstable();
    in_flight.dedup();
    let only = if of_quick {
        QUICK
            .iter()
            .map(|(name, n)| Ok((name.parse()?, *n)))
            .collect::<Result<_>>()?
    } else {
        Vec::new()
    };
    Ok(Plan {
        traffic: kinds,
        in_flight,
        only,
        rounds: options
            .rounds
            .map_or(if options.quick { 12 } else { 6 }, |n| n as usize),
        slice: Duration::from_secs_f64(slice),
        budget: (options.quick && options.rounds.is_none()).then_some(QUICK_BUDGET),
    })
}

/// What all servers get. Their number of slots and their context come with the load.
fn common(options: &Options, model: &str) -> Vec<String> {
    let threads = options.threads.to_string();
    [
        "-m",
        model,
        "-t",
        &threads,
        "-tb",
        &threads,
        "--cache-ram",
        "0",
        "-fa",
        "on",
        "--metrics",
        "--no-webui",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Flags of the patched server for a policy of the list.
fn of_policy(options: &Options, policy: &str) -> Vec<String> {
    let parts = Parts::of(policy);
    let mut args = vec!["--drex-policy".to_owned(), parts.base.to_owned()];
    if parts.base != "off" {
        let usual = options.threshold.to_string();
        let flags = match parts.fill {
            Some(quality) if is_quality(quality) => vec![("--drex-quality", quality)],
            fill => vec![
                ("--drex-threshold", parts.threshold.unwrap_or(&usual)),
                ("--drex-metric", "gap"),
                ("--drex-fill", fill.unwrap_or(&options.fill)),
            ],
        };
        for (name, value) in flags {
            args.extend([name.to_owned(), value.to_owned()]);
        }
        if options.exit_layers != "model" {
            args.extend(["--drex-exit-layers".to_owned(), options.exit_layers.clone()]);
        }
    }
    args
}

/// Everybody in the race, from the programs of the unpatched and of the patched server.
fn race(options: &Options, reference: &Path, patched: &Path) -> Result<Race> {
    let plan = plan(options)?;
    let corpus = cache::repo().join("demo/corpus.txt");
    let corpus =
        fs::read_to_string(&corpus).with_context(|| format!("cannot read {}", corpus.display()))?;
    let model = cache::bundled_model()?;
    let common = common(options, &model.to_string_lossy());
    let contender = |name: &str, program: &Path, more: Vec<String>| Contender {
        name: name.to_owned(),
        program: program.to_owned(),
        args: [common.clone(), more].concat(),
    };
    let mut contenders = vec![
        contender(LAYOUTS[0], reference, Vec::new()),
        contender(LAYOUTS[1], reference, vec!["--kv-unified".into()]),
    ];
    for policy in &options.policies {
        contenders.push(contender(policy, patched, of_policy(options, policy)));
    }
    Ok(Race {
        contenders,
        traffic: plan.traffic,
        in_flight: plan.in_flight,
        only: plan.only,
        rounds: plan.rounds,
        slice: plan.slice,
        budget: plan.budget,
        corpus,
        about: About {
            model: model
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            machine: machine::name(),
            threads: options.threads,
            exit_layers: options.exit_layers.clone(),
            threshold: options.threshold,
            fill: options.fill.clone(),
            command: command_line(),
            date: today(),
        },
    })
}

/// A race whose figures mean nothing, in seconds.
pub fn small(reference: &Path, patched: &Path) -> Result<Race> {
    let line =
        "--traffic 16/8,chat,poisson-0.8 --concurrency 2 --rounds 2 --slice 0.05 --threads 1";
    race(&parsed(line)?, reference, patched)
}

pub fn run(options: &Options) -> Result<()> {
    plan(options)?;
    let out = cache::out_dir(&options.out)?;
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, options.source.llama_src.as_deref())?;
    let runtimes = llama.ensure(&[Kind::Reference, Kind::Patched])?;
    let race = race(options, &runtimes[0].server(), &runtimes[1].server())?;
    let _machine = cache.lock_machine()?;
    machine::warn_if_busy();
    let report = race.run(|report| {
        fs::write(out.join("report.html"), report.html())?;
        fs::write(out.join("report.md"), report.markdown())?;
        fs::write(
            out.join("report.json"),
            serde_json::to_string_pretty(report)?,
        )?;
        Ok(())
    })?;
    show(&out, options.json, &report.table(), &report)?;
    if !options.json {
        println!("\nreport: {}", out.join("report.html").display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &str) -> Result<Options> {
        parsed(args)
    }

    fn refused(args: &str) -> String {
        let result = options(args).and_then(|options| plan(&options).map(|_| ()));
        format!("{:#}", result.expect_err(args))
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (args, says) in [
            ("--policies auto,fast", "--policies fast: no such policy"),
            (
                "--policies auto+verfy",
                "--policies auto+verfy: no such fill",
            ),
            (
                "--policies off+copy",
                "--policies off+copy: nothing is filled",
            ),
            (
                "--policies stock",
                "--policies stock: the unpatched server is always",
            ),
            ("--policies auto,auto", "--policies auto: named twice"),
            (
                "--policies auto+verify@x",
                "--policies auto+verify@x: the threshold is \"x\"",
            ),
            (
                "--policies auto+lossless@0.5",
                "--policies auto+lossless@0.5: with a quality",
            ),
            ("--traffic 300/64,300/64", "--traffic 300/64: named twice"),
            (
                "--traffic 500/64",
                "--traffic 500/64: traffic 500/64: up to 677 tokens",
            ),
            ("--traffic chatter", "traffic chatter: unknown"),
            ("--concurrency 0", "0 is not in 1..=256"),
            ("--concurrency 4,4", "--concurrency 4: named twice"),
            ("--exit-layers 4,x", "\"x\" is no number of layers"),
            ("--threshold NaN", "--threshold NaN: not a confidence"),
            ("--threads 0", "--threads 0: there are"),
            ("--threads 9999", "--threads 9999: there are"),
            ("--slice 0", "--slice 0: from 0.01"),
            ("--rounds 0", "0 is not in 1..=100"),
            ("--fill cop", "invalid value 'cop'"),
        ] {
            let error = refused(args);
            assert!(error.contains(says), "{args}: {error}");
        }
    }

    #[test]
    fn quick_has_its_four_cells_unless_others_are_named() {
        let of = |args: &str| plan(&options(args).unwrap()).unwrap();
        let quick = of("--quick");
        assert_eq!(quick.only.len(), 4);
        assert!(quick.only.contains(&("300/64".parse().unwrap(), 16)));
        assert_eq!(quick.in_flight, [1, 4, 16]);
        assert!(quick.budget.is_some());
        let named = of("--quick --traffic chat --concurrency 2 --rounds 3");
        assert_eq!(
            (named.only.len(), named.in_flight, named.rounds),
            (0, vec![2], 3)
        );
        assert_eq!(named.budget, None);
        let all = of("");
        assert_eq!(
            (all.traffic.len(), all.in_flight.len(), all.rounds),
            (8, 6, 6)
        );
    }

    /// No contender has an advantage: the flags that are not a policy's are those of the unpatched server.
    #[test]
    fn policies_add_their_own_flags_only() {
        let options = options("--fill propagate --exit-layers model").unwrap();
        assert_eq!(of_policy(&options, "off"), ["--drex-policy", "off"]);
        let auto = of_policy(&options, "auto").join(" ");
        assert_eq!(
            auto,
            "--drex-policy auto --drex-threshold 0.7 --drex-metric gap --drex-fill propagate"
        );
        let own = of_policy(&options, "auto+verify@0.5").join(" ");
        assert_eq!(
            own,
            "--drex-policy auto --drex-threshold 0.5 --drex-metric gap --drex-fill verify"
        );
        assert_eq!(
            of_policy(&options, "auto+lossless").join(" "),
            "--drex-policy auto --drex-quality lossless"
        );
        assert!(!common(&options, "m").iter().any(|a| a.starts_with("--kv")));
    }
}
