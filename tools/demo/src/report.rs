// SPDX-License-Identifier: Apache-2.0

//! What was measured, as a table, as JSON and as a page.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::{Map, Value, json};

use drex_harness::stats::median;

use super::{
    Load, OFF, Options, REFERENCE, Sample, Samples, Scores, base, fill, plot, rounded, stock,
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

const EXACT: &str = "Agreement was measured in a second run, in builds whose results do not depend on who shares a batch. \
                     The usual builds, without early exit, disagree with themselves in half a percent of the tokens.";

pub struct Report {
    pub cells: Vec<Cell>,
    pub model: String,
    pub machine: String,
    pub threshold: f64,
    pub rounds: u32,
    pub tokens_per_request: u32,
    pub threads: usize,
    /// Agreement and perplexity are of builds whose results do not depend on the batch.
    pub exact: bool,
    pub seconds: f64,
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

impl Report {
    pub fn json(&self) -> Value {
        let runs: Vec<_> = self.cells.iter().map(Cell::json).collect();
        let auto: Vec<f64> = self
            .cells
            .iter()
            .filter(|c| c.policy == "auto")
            .map(|c| c.ratio)
            .collect();
        let of = |value: f64| (!auto.is_empty()).then(|| rounded(value, 4));
        json!({
            "runs": runs,
            "worst_auto": of(auto.iter().copied().fold(f64::INFINITY, f64::min)),
            "median_auto": of(median(&auto)),
            "model": self.model,
            "machine": self.machine,
            "threshold": self.threshold,
            "rounds": self.rounds,
            "tokens_per_request": self.tokens_per_request,
            "threads": self.threads,
            "agreement_of": if self.exact { "exact builds" } else { "the builds that were measured" },
            "seconds": rounded(self.seconds, 1),
        })
    }

    fn rounds_text(&self) -> String {
        let plural = if self.rounds == 1 { "" } else { "s" };
        format!("{} round{plural}", self.rounds)
    }

    /// The worst and the median cell of `auto`, or of what else is like it.
    fn headline(&self) -> Option<String> {
        let of = |name: &str| -> Vec<&Cell> {
            self.cells
                .iter()
                .filter(|c| base(&c.policy) == name)
                .collect()
        };
        let cells = Some(of("auto")).filter(|list| !list.is_empty())?;
        let worst = cells.iter().min_by(|a, b| a.ratio.total_cmp(&b.ratio))?;
        let all: Vec<f64> = cells.iter().map(|c| c.ratio).collect();
        Some(format!(
            "auto: worst cell {:.2} ({} at {} in flight), median cell {:.2} of the unpatched server's tokens/s",
            worst.ratio,
            worst.traffic,
            worst.concurrency,
            median(&all)
        ))
    }

    pub fn table(&self) -> String {
        let mut out = format!(
            "{}, threshold {}, {}, {} tokens per request\n{}\n\n",
            self.model,
            self.threshold,
            self.rounds_text(),
            self.tokens_per_request,
            self.machine
        );
        let header = Row::header();
        let names = self.cells.iter().map(|c| Row::of(c).0[0].len());
        let width = names.max().unwrap_or(0).max(10);
        let mut last = None;
        for cell in &self.cells {
            let load = (&cell.traffic, cell.concurrency);
            if last != Some(load) {
                if last.is_some() {
                    out.push('\n');
                }
                let _ = writeln!(out, "{}: {} in flight", cell.traffic, cell.concurrency);
                let _ = writeln!(out, "{}", header.line(width));
                last = Some(load);
            }
            let _ = writeln!(out, "{}", Row::of(cell).line(width));
        }
        if let Some(headline) = self.headline() {
            let _ = writeln!(out, "\n{headline}");
        }
        if self.exact {
            let _ = writeln!(out, "\n{EXACT}");
        }
        out
    }

    pub fn html(&self) -> String {
        let mut rows = String::new();
        for cell in &self.cells {
            let row = Row::of(cell);
            let class = if cell.ratio < 1.0 {
                " class=\"loss\""
            } else {
                ""
            };
            let numbers = row.0[1..]
                .iter()
                .map(|v| format!("<td>{v}</td>"))
                .collect::<String>();
            let _ = writeln!(
                rows,
                "<tr{class}><th scope=\"row\"><i class=\"key {key}\"></i>{name}</th><td>{traffic}</td><td>{n}</td>{numbers}</tr>",
                traffic = escape(&cell.traffic),
                key = plot::class(&cell.policy),
                name = escape(&cell.policy),
                n = cell.concurrency
            );
        }
        let head = Row::header().0[1..]
            .iter()
            .map(|h| format!("<th scope=\"col\">{h}</th>"))
            .collect::<String>();
        let mut policies: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !policies.contains(&cell.policy.as_str()) {
                policies.push(&cell.policy);
            }
        }
        let legend = policies
            .iter()
            .map(|p| {
                format!(
                    "<span><i class=\"key {}\"></i>{}</span>",
                    plot::class(p),
                    escape(p)
                )
            })
            .collect::<String>();
        let headline = self.headline().map_or_else(String::new, |text| {
            format!("<p class=\"lead\">{}</p>", escape(&text))
        });
        // A plot for each traffic.
        let mut traffics: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !traffics.contains(&cell.traffic.as_str()) {
                traffics.push(&cell.traffic);
            }
        }
        let each = |plot: &dyn Fn(&[&Cell]) -> String| -> String {
            let mut out = String::new();
            for traffic in &traffics {
                let cells: Vec<&Cell> = self
                    .cells
                    .iter()
                    .filter(|c| c.traffic == **traffic)
                    .collect();
                let _ = write!(out, "<h3>{}</h3>{}", escape(traffic), plot(&cells));
            }
            out
        };
        include_str!("report.html")
            .replace("@MODEL@", &escape(&self.model))
            .replace("@MACHINE@", &escape(&self.machine))
            .replace("@THRESHOLD@", &self.threshold.to_string())
            .replace("@ROUNDS@", &self.rounds_text())
            .replace("@TOKENS@", &self.tokens_per_request.to_string())
            .replace("@HEADLINE@", &headline)
            .replace("@LEGEND@", &legend)
            .replace("@RATIO@", &each(&|cells| plot::ratio(cells, &policies)))
            .replace(
                "@TBT@",
                &each(&|cells| {
                    format!(
                        "<div class=\"panels\">{}</div>",
                        plot::time_between_tokens(cells)
                    )
                }),
            )
            .replace(
                "@EXITS@",
                &each(&|cells| plot::exit_share(cells, &policies)),
            )
            .replace("@HEAD@", &head)
            .replace("@ROWS@", &rows)
            .replace("@EXACT@", if self.exact { EXACT } else { "" })
    }
}

impl Cell {
    fn json(&self) -> Value {
        let share: Map<_, _> = self
            .exit_share
            .iter()
            .map(|(k, v)| (k.to_string(), rounded(*v, 4)))
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

struct Row([String; 10]);

impl Row {
    fn header() -> Row {
        let names = [
            "policy",
            "tok/s",
            "x stock",
            "exits",
            "forced out",
            "stays",
            "agree",
            "p50 ms",
            "p99 ms",
            "done ms",
        ];
        Row(names.map(str::to_owned))
    }

    fn of(cell: &Cell) -> Row {
        let exits: f64 = cell.exit_share.values().sum();
        Row([
            match &cell.policy {
                policy if cell.baseline => format!("{policy} (stock)"),
                policy => policy.clone(),
            },
            format!("{:.0}", cell.tokens_per_s),
            format!("{:.2}", cell.ratio),
            if cell.exit_share.is_empty() {
                "-".into()
            } else {
                format!("{:.0} %", exits * 100.0)
            },
            cell.involuntary_exits.to_string(),
            cell.involuntary_stays.to_string(),
            cell.agreement
                .map_or_else(|| "-".into(), |a| format!("{a:.3}")),
            format!("{:.2}", cell.tbt_ms.0),
            format!("{:.2}", cell.tbt_ms.1),
            format!("{:.0}", cell.completion_ms),
        ])
    }

    fn line(&self, width: usize) -> String {
        let mut out = format!("  {:width$}", self.0[0]);
        for value in &self.0[1..] {
            let _ = write!(out, " {value:>10}");
        }
        out
    }
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(policy: &str, concurrency: u16, ratio: f64) -> Cell {
        Cell {
            policy: policy.into(),
            fill: None,
            traffic: "300/64".into(),
            concurrency,
            baseline: policy == REFERENCE,
            tokens_per_s: 1234.5,
            ratio,
            ratio_rounds: vec![ratio],
            ratio_to_off: (concurrency == 1).then_some(ratio),
            exit_share: BTreeMap::from([(4, 0.25), (8, 0.125)]),
            involuntary_exits: 0,
            involuntary_stays: 3,
            agreement: Some(0.987_65),
            perplexity: None,
            tbt_ms: (0.5, 2.0),
            completion_ms: 60.0,
            held_ms: 0.0,
            flushes: BTreeMap::new(),
            requests: 8,
            cut: 0,
            tokens: 1024,
            client_cpu: 0.01,
        }
    }

    fn report() -> Report {
        Report {
            cells: vec![
                cell(REFERENCE, 1, 1.0),
                cell("auto", 1, 1.5),
                cell("auto", 4, 0.9),
                cell("auto", 8, 1.2),
            ],
            model: "a<b".into(),
            machine: "m".into(),
            threshold: 0.7,
            rounds: 3,
            tokens_per_request: 128,
            threads: 2,
            exact: false,
            seconds: 1.0,
        }
    }

    #[test]
    fn the_page_is_whole_and_closed() {
        let html = report().html();
        let left: Vec<_> = html
            .split('@')
            .skip(1)
            .filter(|s| s.starts_with(|c: char| c.is_ascii_uppercase()))
            .collect();
        assert!(left.is_empty(), "placeholders are left: {left:?}");
        assert!(html.contains("a&lt;b") && !html.contains("NaN") && !html.contains("inf"));
        assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
        assert!(
            !html.contains("http://") && !html.contains("https://"),
            "a page without outside resources"
        );
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let json = report().json();
        let run = &json["runs"][1];
        assert_eq!(run["exit_share"]["8"], 0.125);
        assert_eq!(run["tbt_ms"]["p99"], 2.0);
        assert_eq!(run["agreement"], 0.9877);
        assert_eq!(run["ratio_to_stock"], 1.5);
        assert!(json["runs"][2]["ratio_to_off"].is_null());
        assert_eq!(json["median_auto"], 1.2);
        assert_eq!(json["worst_auto"], 0.9);
        assert!(!json.to_string().contains('\n'));
    }

    /// Not the best cell: what is worst, and what is in the middle.
    #[test]
    fn the_headline_is_the_worst_and_the_median_cell() {
        let says = "auto: worst cell 0.90 (300/64 at 4 in flight), median cell 1.20 of";
        assert!(report().table().contains(says), "{}", report().table());
        assert!(report().html().contains(says));
    }
}
