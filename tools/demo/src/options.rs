// SPDX-License-Identifier: Apache-2.0

//! What is compared, under which load.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Parser;
use drex_build::Source;
use drex_harness::{
    is_quality, machine,
    traffic::{Lengths, Traffic},
};

pub const BUNDLED: &str = "bundled";
pub const SMOLLM2: &str = "smollm2";

/// The unpatched server, as one more policy.
pub const REFERENCE: &str = "reference";

/// Its layouts of the cache: a stream for each sequence, as it has by default, and one for all. The faster one of a cell is
/// what the ratios are relative to.
pub const LAYOUTS: [&str; 2] = [REFERENCE, "reference+unified"];

/// The patched server without early exit.
pub const OFF: &str = "off";

/// The traffic of the short prompts in `demo/prompts.txt` and `demo/chat.txt`.
pub const SHORT: &str = "short";

/// Compare the exit policies on a model and write a report
#[derive(Parser)]
#[command(name = "cargo xtask demo", bin_name = "cargo xtask demo")]
pub struct Options {
    /// `bundled`: a toy that was trained for early exit; `smollm2`: a chat model that was not, with exits that `cargo xtask
    /// tune` fitted to it, fetched on first use (93 MB), with --fill verify --policies off,hold,auto,reference+ngram-simple
    /// --traffic short --tokens 64 --exit-layers model where nothing else is said
    #[arg(long, default_value = BUNDLED, value_parser = [BUNDLED, SMOLLM2])]
    pub model: String,
    /// Print only the results, as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// How the skipped layers' K/V of an exited token is filled [default: copy]
    #[arg(long, default_value = "copy", default_value_if("model", SMOLLM2, "verify"), hide_default_value = true, value_parser = ["copy", "propagate", "postfill", "verify"])]
    pub fill: String,
    /// Policies to compare with the unpatched server, which is always measured in both layouts of its cache. `hold+verify` is
    /// a policy with a fill of its own, `reference+ngram-simple` the unpatched server with a speculation type that needs no
    /// second model
    #[arg(long, value_delimiter = ',', default_value = "off,eager,art,hold,auto")]
    #[arg(default_value_if("model", SMOLLM2, "off,hold,auto,reference+ngram-simple"))]
    pub policies: Vec<String>,
    /// In place of --policies: `off`, and policy auto with each of these qualities, `lossless` or an agreement such as 0.99
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["policies", "fill"])]
    pub quality: Vec<String>,
    /// `short`: prompts of a dozen tokens, or questions of a chat; PROMPT/ANSWER: tokens of each on average
    #[arg(long, value_delimiter = ',', default_value = "short,300/64")]
    #[arg(default_value_if("model", SMOLLM2, SHORT))]
    pub traffic: Vec<String>,
    /// Requests in flight
    #[arg(long, value_delimiter = ',', default_value = "1,4,16", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: Vec<u16>,
    /// Tokens to generate per `short` request on average; requests ask for half to one and a half times as many
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=250))]
    #[arg(default_value_if("model", SMOLLM2, "64"))]
    pub tokens: u32,
    /// Layers after which a row may exit, separated by commas, or `model` for those of its metadata or its file of exits
    #[arg(long, value_name = "LAYERS", default_value = "8")]
    #[arg(default_value_if("model", SMOLLM2, "model"))]
    pub exit_layers: String,
    /// Confidence from which a row may exit: the gap between the two most likely tokens, or where exits were fitted the chance
    /// that the model says the same
    #[arg(long, default_value_t = 0.7)]
    pub threshold: f64,
    /// How often everything is measured; medians are reported [default: 3, fewer if they would take too long]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub rounds: Option<u32>,
    /// Threads that compute [default: all cores but one, which the client and the server's HTTP threads need]
    #[arg(long, default_value_t = machine::default_threads(), hide_default_value = true)]
    pub threads: usize,
    /// Where the report goes
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    pub out: PathBuf,
    #[command(flatten)]
    pub source: Source,
}

impl Options {
    /// With `--quality` in the terms of the policies.
    pub fn settled(mut self) -> Self {
        if !self.quality.is_empty() {
            let served = self.quality.iter().map(|quality| format!("auto+{quality}"));
            self.policies = std::iter::once(OFF.to_owned()).chain(served).collect();
        }
        self
    }
}

/// The name before a plus sign, and what comes after it: a fill, a quality, or a speculation type of the unpatched server.
pub fn parts(policy: &str) -> (&str, Option<&str>) {
    match policy.split_once('+') {
        Some((base, variant)) => (base, Some(variant)),
        None => (policy, None),
    }
}

pub fn base(policy: &str) -> &str {
    parts(policy).0
}

/// Makes rows exit that are below their threshold: the baselines that show what forcing costs.
pub fn forces(policy: &str) -> bool {
    ["eager", "median", "mean"].contains(&base(policy))
}

pub fn verifies(options: &Options, policy: &str) -> bool {
    let lossless = ["verify", "lossless"].contains(&fill(options, policy));
    ![OFF, REFERENCE].contains(&base(policy)) && lossless
}

pub fn fill<'a>(options: &'a Options, policy: &'a str) -> &'a str {
    parts(policy).1.unwrap_or(&options.fill)
}

/// Requests of one length would start and end together for ever, and the engine would see them all at the same age.
pub fn length(tokens: u32, i: usize) -> u32 {
    tokens / 2 + tokens * (i as u32 * 37 % 101) / 100
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

/// Lengths of a traffic, or none for `short`.
pub fn lengths(traffic: &str) -> Result<Option<Lengths>> {
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

const POLICIES: [&str; 9] = [
    "off", "auto", "hold", "latency", "art", "lazy", "eager", "median", "mean",
];
const FILLS: [&str; 4] = ["copy", "propagate", "postfill", "verify"];

/// What the servers would refuse, after a build of some minutes.
pub fn check(options: &Options) -> Result<()> {
    for traffic in &options.traffic {
        lengths(traffic)?;
    }
    for policy in &options.policies {
        let (base, variant) = parts(policy);
        if base != REFERENCE && !POLICIES.contains(&base) {
            bail!(
                "--policies {policy}: no such policy; known are {}",
                POLICIES.join(", ")
            );
        }
        let of_server = base == REFERENCE;
        let known = |variant: &&str| FILLS.contains(variant) || is_quality(variant);
        if let Some(fill) = variant.filter(|fill| !of_server && !known(fill)) {
            bail!(
                "--policies {policy}: {fill} is no fill; known are {}, and qualities: lossless and numbers from 0.5 to 1",
                FILLS.join(", ")
            );
        }
    }
    if let Some(quality) = options.quality.iter().find(|quality| !is_quality(quality)) {
        bail!("--quality {quality}: expected lossless, or a number from 0.5 to 1");
    }
    if options.exit_layers != "model" {
        let is_number = |layer: &str| layer.parse::<u32>().is_ok_and(|n| n > 0);
        if let Some(layer) = options
            .exit_layers
            .split(',')
            .find(|layer| !is_number(layer))
        {
            bail!(
                "--exit-layers {}: {layer:?} is no number of layers",
                options.exit_layers
            );
        }
    }
    if !(options.threshold.is_finite() && options.threshold >= 0.0) {
        bail!("--threshold {}: not a confidence", options.threshold);
    }
    Ok(())
}

/// Everybody who is measured, the unpatched server's layouts first.
pub fn contenders(options: &Options) -> Vec<String> {
    let mut all: Vec<String> = LAYOUTS.map(str::to_owned).to_vec();
    for policy in &options.policies {
        if !all.contains(policy) {
            all.push(policy.clone());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_servers_would_refuse_is_refused_before() {
        for (args, sentence) in [
            ("--policies often", "no such policy; known are off, auto"),
            ("--policies hold+more", "more is no fill; known are copy"),
            ("--quality 0.99,0.2", "--quality 0.2: expected lossless"),
            ("--exit-layers 4,x", "\"x\" is no number of layers"),
            ("--threshold nan", "not a confidence"),
            ("--traffic chat", "the demo has short"),
        ] {
            let options = Options::parse_from(format!("demo {args}").split(' '));
            let error = format!("{:#}", check(&options).unwrap_err());
            assert!(error.contains(sentence), "{args}: {error}");
        }
        let args = "demo --policies off,hold+verify,reference+ngram-simple --exit-layers 4,8 --traffic short,300/64";
        assert!(check(&Options::parse_from(args.split(' '))).is_ok());
    }

    #[test]
    fn a_model_brings_its_own_defaults() {
        let of = |args: &str| Options::parse_from(args.split(' '));
        let bundled = of("demo");
        assert_eq!((&*bundled.fill, &*bundled.exit_layers), ("copy", "8"));
        let chat = of("demo --model smollm2");
        assert_eq!((&*chat.fill, &*chat.exit_layers), ("verify", "model"));
        assert_eq!(
            chat.policies,
            ["off", "hold", "auto", "reference+ngram-simple"]
        );
        assert_eq!((&*chat.traffic, chat.tokens), (&[SHORT.to_owned()][..], 64));
        assert_eq!(of("demo --model smollm2 --fill copy").fill, "copy");
        let quality = of("demo --quality lossless,0.99").settled();
        assert_eq!(quality.policies, ["off", "auto+lossless", "auto+0.99"]);
        assert!(
            check(&quality).is_ok()
                && verifies(&quality, "auto+lossless")
                && !verifies(&quality, "auto+0.99")
        );
    }

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
}
