// SPDX-License-Identifier: Apache-2.0

//! What was measured, as a table, as JSON and as a page.

use std::fmt::Write;

use drex_harness::stats::{median, rounded};
use drex_svg::{escape, page};
use serde_json::{Value, json};

use crate::{cells::Cell, options::base, plot};

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
        let panels = |cells: &[&Cell]| {
            let panels = plot::time_between_tokens(cells);
            format!("<div class=\"panels\">{panels}</div>")
        };
        page::fill(
            include_str!("report.html"),
            &[
                ("MODEL", &escape(&self.model)),
                ("MACHINE", &escape(&self.machine)),
                ("THRESHOLD", &self.threshold.to_string()),
                ("ROUNDS", &self.rounds_text()),
                ("TOKENS", &self.tokens_per_request.to_string()),
                ("HEADLINE", &headline),
                ("LEGEND", &legend),
                ("RATIO", &each(&|cells| plot::ratio(cells, &policies))),
                ("TBT", &each(&panels)),
                ("EXITS", &each(&|cells| plot::exit_share(cells, &policies))),
                ("HEAD", &head),
                ("ROWS", &rows),
                ("EXACT", if self.exact { EXACT } else { "" }),
            ],
        )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::REFERENCE;
    use std::collections::BTreeMap;

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
        assert_eq!(page::faults(&html), [""; 0]);
        assert!(html.contains("a&lt;b") && !html.contains("inf") && html.contains("<svg"));
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
