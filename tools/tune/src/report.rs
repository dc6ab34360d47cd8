// SPDX-License-Identifier: Apache-2.0

//! What was found, for people and for programs.

use std::fmt::Write;

use serde::Serialize;
use serde_json::json;

use crate::{choose::RowCost, measure::Measured};

#[derive(Debug, Clone, Serialize)]
pub struct Text {
    pub what: String,
    pub tokens: usize,
    pub held_out: usize,
}

#[derive(Debug, Clone, Serialize)]
pub struct Exit {
    pub layer: u32,
    pub kind: String,
    /// On held-out text of the kind that it was fitted on.
    pub agreement: f64,
    pub agreement_ridge: f64,
    pub coverage: f64,
    pub ece: f64,
    /// Share of tokens that are at least 0.7 sure, and of them the share that is right.
    pub leave: f64,
    pub right: f64,
    pub cost_layers: f64,
    /// On the text that the user named: agreement and calibration error.
    pub other: Option<(f64, f64)>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Prediction {
    /// lossless (fill verify), or the share of tokens that are the full model's
    pub quality: String,
    pub in_flight: u32,
    pub threshold: f32,
    pub off_tokens_per_s: f64,
    pub auto_tokens_per_s: f64,
}

impl Prediction {
    pub fn ratio(&self) -> f64 {
        self.auto_tokens_per_s / self.off_tokens_per_s
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub model: String,
    pub architecture: String,
    pub n_layers: u32,
    pub text: Text,
    pub head_tokens: usize,
    pub head_type: String,
    pub costs: Vec<RowCost>,
    /// Of all that were refined.
    pub exits: Vec<Exit>,
    /// The layers of those that are in the file.
    pub chosen: Vec<u32>,
    pub predictions: Vec<Prediction>,
    pub worth: bool,
    /// In llama-server, with fill verify; empty: not measured.
    pub measured: Vec<Measured>,
    /// The report in the file does not say where that once was.
    #[serde(skip)]
    pub file: String,
}

impl Report {
    pub fn table(&self) -> String {
        let mut out = String::new();
        self.put(&mut out).expect("a string takes what is written");
        out
    }

    fn put(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "model  {} ({}, {} layers)",
            self.model, self.architecture, self.n_layers
        )?;
        writeln!(
            out,
            "text   {}: {} tokens, and {} held out",
            self.text.what, self.text.tokens, self.text.held_out
        )?;
        writeln!(
            out,
            "head   {} tokens in {}, among which are {:.3} of what the model says",
            self.head_tokens,
            self.head_type,
            self.exits.first().map_or(f64::NAN, |e| e.coverage)
        )?;
        writeln!(
            out,
            "\nexit after  agreement (ridge)  0.7 sure: leave / right    ECE  ramp costs  named text: agreement, ECE"
        )?;
        for e in &self.exits {
            let mark = if self.chosen.contains(&e.layer) {
                '*'
            } else {
                ' '
            };
            let other = e
                .other
                .map_or("-".into(), |(a, c)| format!("{a:.3}, {c:.3}"));
            writeln!(
                out,
                "{mark}{:>3} of {:<3}   {:.3}     ({:.3})         {:.3} / {:.3}          {:.3}  {:.2} layers  {other}",
                e.layer,
                self.n_layers,
                e.agreement,
                e.agreement_ridge,
                e.leave,
                e.right,
                e.ece,
                e.cost_layers
            )?;
        }
        writeln!(
            out,
            "\npredicted with exits after {:?}, tokens/s:",
            self.chosen
        )?;
        writeln!(
            out,
            "in flight  quality   threshold      off     auto  ratio"
        )?;
        for p in &self.predictions {
            writeln!(
                out,
                "{:>9}  {:8}  {:>9.2}  {:>7.0}  {:>7.0}  {:>5.2}",
                p.in_flight,
                p.quality,
                p.threshold,
                p.off_tokens_per_s,
                p.auto_tokens_per_s,
                p.ratio()
            )?;
        }
        if !self.measured.is_empty() {
            writeln!(
                out,
                "\nmeasured in llama-server, lossless, tokens/s:\n\
                 in flight  threshold      off     auto  ratio"
            )?;
        }
        for m in &self.measured {
            writeln!(
                out,
                "{:>9}  {:>9.2}  {:>7.0}  {:>7.0}  {:>5.2} ({:.2} to {:.2})",
                m.in_flight,
                m.threshold,
                m.off_tokens_per_s,
                m.auto_tokens_per_s,
                m.ratio,
                m.least,
                m.greatest
            )?;
        }
        if self.worth {
            writeln!(out, "\nwritten to {}; serve them with", self.file)?;
            for p in self.predictions.iter().filter(|p| p.quality == "lossless") {
                writeln!(
                    out,
                    "  -np {} --drex-policy auto --drex-fill verify --drex-exits {} --drex-threshold {:.2}",
                    p.in_flight, self.file, p.threshold
                )?;
            }
        } else {
            let best = self
                .predictions
                .iter()
                .filter(|p| p.quality == "lossless")
                .map(Prediction::ratio)
                .fold(0.0, f64::max);
            writeln!(
                out,
                "\nNot worth it on this machine: lossless, the best ratio is {best:.2}. An exit pays when its agreement exceeds \
                 what the way to it costs, as a share of a pass:"
            )?;
            let costs = &self.costs[1.min(self.costs.len() - 1)];
            for e in &self.exits {
                let way = (costs.window + f64::from(e.layer) * costs.layer + costs.ramp)
                    / costs.full(self.n_layers);
                writeln!(
                    out,
                    "  after {:>3}: agreement {:.2}, cost {way:.2}",
                    e.layer, e.agreement
                )?;
            }
            writeln!(out, "The exits are in {} all the same.", self.file)?;
        }
        Ok(())
    }

    pub fn line(&self) -> String {
        let exits: Vec<_> = self
            .exits
            .iter()
            .filter(|e| self.chosen.contains(&e.layer))
            .map(|e| {
                let mut exit = json!({
                    "layer": e.layer, "kind": e.kind, "agreement": e.agreement, "coverage": e.coverage, "ece": e.ece,
                    "cost_layers": e.cost_layers,
                });
                if let Some((agreement, ece)) = e.other {
                    exit["held_out_agreement"] = json!(agreement);
                    exit["held_out_ece"] = json!(ece);
                }
                exit
            })
            .collect();
        let predicted: Vec<_> = self
            .predictions
            .iter()
            .map(|p| {
                json!({"quality": p.quality, "in_flight": p.in_flight, "threshold": p.threshold, "ratio": p.ratio()})
            })
            .collect();
        let mut line = json!({
            "model": self.model, "file": self.file, "worth": self.worth, "exits": exits, "predicted": predicted,
        });
        if !self.measured.is_empty() {
            line["measured"] = json!(self.measured);
        }
        line.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(auto: f64) -> Report {
        Report {
            model: "m".into(),
            architecture: "llama".into(),
            n_layers: 12,
            text: Text {
                what: "a.txt".into(),
                tokens: 900,
                held_out: 100,
            },
            head_tokens: 2048,
            head_type: "q8_0".into(),
            costs: vec![RowCost {
                rows: 1,
                window: 10.0,
                layer: 5.0,
                ramp: 4.0,
                head: 30.0,
            }],
            exits: [3, 6]
                .map(|layer| Exit {
                    layer,
                    kind: "affine".into(),
                    agreement: 0.5,
                    agreement_ridge: 0.4,
                    coverage: 0.9,
                    ece: 0.02,
                    leave: 0.3,
                    right: 0.8,
                    cost_layers: 0.8,
                    other: None,
                })
                .into(),
            chosen: vec![6],
            predictions: vec![Prediction {
                quality: "lossless".into(),
                in_flight: 1,
                threshold: 0.6,
                off_tokens_per_s: 100.0,
                auto_tokens_per_s: auto,
            }],
            worth: auto > 102.0,
            measured: Vec::new(),
            file: "m.exits.gguf".into(),
        }
    }

    #[test]
    fn a_line_has_what_was_chosen_and_what_it_brings() {
        let line: serde_json::Value = serde_json::from_str(&report(120.0).line()).unwrap();
        assert_eq!(
            line["exits"],
            json!([{"layer": 6, "kind": "affine", "agreement": 0.5, "coverage": 0.9, "ece": 0.02, "cost_layers": 0.8}])
        );
        assert_eq!(line["predicted"][0]["ratio"], 1.2);
        assert_eq!(line["worth"], true);
    }

    #[test]
    fn what_does_not_pay_is_said_with_its_numbers() {
        let table = report(98.0).table();
        // 10 + 6 * 5 + 4 of 10 + 12 * 5 + 30 microseconds.
        for text in [
            "Not worth it on this machine",
            "best ratio is 0.98",
            "after   6: agreement 0.50, cost 0.44",
        ] {
            assert!(table.contains(text), "{text} is not in {table}");
        }
        assert!(!report(120.0).table().contains("Not worth"));
    }
}
