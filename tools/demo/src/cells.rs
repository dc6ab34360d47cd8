// SPDX-License-Identifier: Apache-2.0

//! What was measured, by policy and load.

use std::collections::BTreeMap;

use drex_harness::stats::{median, rounded};
use serde_json::{Map, Value, json};

use crate::{
    measure::{Sample, Samples, Scores, stock},
    options::{Load, OFF, Options, REFERENCE, base, fill},
};

/// One policy under one load, over all rounds.
pub struct Cell {
    pub policy: String,
    /// None where nothing exits.
    pub fill: Option<String>,
    pub traffic: String,
    pub concurrency: u16,
    /// The unpatched server in the layout that the ratios are relative to.
    pub baseline: bool,
    pub tokens_per_s: f64,
    /// The median of the ratios to the faster layout of the unpatched server in the same round.
    pub ratio: f64,
    pub ratio_rounds: Vec<f64>,
    /// The same to `off`; none if that was not measured.
    pub ratio_to_off: Option<f64>,
    /// By the layer after which the ramp sits.
    pub exit_share: BTreeMap<u32, f64>,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    /// Share of the tokens that are the full model's own choice, given what came before them.
    pub agreement: Option<f64>,
    /// Of the text under the full model.
    pub perplexity: Option<f64>,
    pub tbt_ms: (f64, f64),
    pub completion_ms: f64,
    /// How long a request's tokens were held, in all.
    pub held_ms: f64,
    pub flushes: BTreeMap<String, u64>,
    pub requests: u64,
    /// Requests that were given up because they took too long.
    pub cut: u64,
    pub tokens: u64,
    pub client_cpu: f64,
}

pub fn cells(
    options: &Options,
    contenders: &[String],
    loads: &[Load],
    samples: &Samples,
    scores: &Scores,
) -> Vec<Cell> {
    let mut cells = Vec::new();
    for load in loads {
        let (baseline, _) = stock(samples, load);
        for policy in contenders {
            let key = (policy.clone(), load.clone());
            let Some(list) = samples.get(&key).filter(|list| !list.is_empty()) else {
                continue;
            };
            let of = |value: &dyn Fn(&Sample) -> f64| {
                median(&list.iter().map(value).collect::<Vec<_>>())
            };
            let ratios_to = |other: &str| -> Vec<f64> {
                let other = samples.get(&(other.to_owned(), load.clone()));
                list.iter()
                    .zip(other.into_iter().flatten())
                    .map(|(ours, theirs)| ours.tokens_per_s / theirs.tokens_per_s)
                    .collect()
            };
            let ratio_rounds = ratios_to(baseline);
            let to_off = ratios_to(OFF);
            let requests: u64 = list.iter().map(|s| s.requests).sum();
            let tokens: u64 = list.iter().map(|s| s.tokens).sum();
            let mut exit_share = BTreeMap::new();
            let mut flushes = BTreeMap::new();
            for sample in list {
                for (layer, count) in &sample.exits {
                    *exit_share.entry(*layer).or_insert(0.0) +=
                        *count as f64 / tokens.max(1) as f64;
                }
                for (reason, count) in &sample.flushes {
                    *flushes.entry(reason.clone()).or_insert(0) += count;
                }
            }
            let scored = scores.get(&key).map(Vec::as_slice).unwrap_or_default();
            let n: u64 = scored.iter().map(|s| s.n).sum();
            let agree: u64 = scored.iter().map(|s| s.agree).sum();
            let nll: f64 = scored.iter().map(|s| s.nll).sum();
            cells.push(Cell {
                policy: policy.clone(),
                fill: (![OFF, REFERENCE].contains(&base(policy)))
                    .then(|| fill(options, policy).to_owned()),
                traffic: load.traffic.clone(),
                concurrency: load.concurrency,
                baseline: policy == baseline,
                tokens_per_s: of(&|s| s.tokens_per_s),
                ratio: median(&ratio_rounds),
                ratio_rounds,
                ratio_to_off: (!to_off.is_empty()).then(|| median(&to_off)),
                exit_share,
                involuntary_exits: list.iter().map(|s| s.involuntary_exits).sum(),
                involuntary_stays: list.iter().map(|s| s.involuntary_stays).sum(),
                agreement: (n > 0).then(|| agree as f64 / n as f64),
                perplexity: (n > 0).then(|| (nll / n as f64).exp()),
                tbt_ms: (of(&|s| s.gaps_ms.0), of(&|s| s.gaps_ms.1)),
                completion_ms: of(&|s| s.completion_ms),
                held_ms: list.iter().map(|s| s.held_ms).sum::<f64>() / requests.max(1) as f64,
                flushes,
                requests,
                cut: list.iter().map(|s| s.cut).sum(),
                tokens,
                client_cpu: of(&|s| s.client_cpu),
            });
        }
    }
    cells
}

impl Cell {
    pub fn json(&self) -> Value {
        let share: Map<_, _> = self
            .exit_share
            .iter()
            .map(|(k, v)| (k.to_string(), json!(rounded(*v, 4))))
            .collect();
        json!({
            "policy": self.policy,
            "fill": self.fill,
            "traffic": self.traffic,
            "concurrency": self.concurrency,
            "baseline": self.baseline,
            "tokens_per_s": rounded(self.tokens_per_s, 1),
            "ratio_to_stock": rounded(self.ratio, 4),
            "ratio_to_off": self.ratio_to_off.map(|r| rounded(r, 4)),
            "ratio_rounds": self.ratio_rounds.iter().map(|r| rounded(*r, 4)).collect::<Vec<_>>(),
            "exit_share": share,
            "involuntary_exits": self.involuntary_exits,
            "involuntary_stays": self.involuntary_stays,
            "agreement": self.agreement.map(|a| rounded(a, 4)),
            "perplexity": self.perplexity.map(|p| rounded(p, 4)),
            "tbt_ms": {"p50": rounded(self.tbt_ms.0, 3), "p99": rounded(self.tbt_ms.1, 3)},
            "completion_ms_mean": rounded(self.completion_ms, 1),
            "held_ms_mean": rounded(self.held_ms, 2),
            "flushes": self.flushes,
            "requests": self.requests,
            "requests_cut": self.cut,
            "tokens": self.tokens,
            "client_cpu": rounded(self.client_cpu, 4),
        })
    }
}
