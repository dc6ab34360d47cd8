// SPDX-License-Identifier: Apache-2.0

//! What was measured, as a table, as JSON and as a page.

use std::fmt::Write;

use drex_harness::stats::{median, ratio_interval, rounded};
use drex_svg::{escape, page};
use serde_json::{Value, json};

use crate::{
    cells::Cell,
    options::{REFERENCE, base, forces},
    plot,
};

/// The demo has one model.
const MODEL_IS: &str = "The model is a toy: 16 layers and 6.7 million parameters, trained for early exit on Rust documentation. \
                        Other models have other figures.";

/// Where agreement is that of the builds that were measured.
const USUAL: &str = "Where nothing exits, agreement is below 1 too: the check runs rows alone, the servers run them in batches, and the \
                     engine adds up in another order for another width. Tokens that are close change places then.";

const EXACT: &str = "Agreement was measured in a second run, in builds whose results do not depend on who shares a batch. \
                     The usual builds, without early exit, disagree with themselves in half a percent of the tokens.";

/// What `auto` brought: ratios to the unpatched server's tokens per second, and agreement with the full model.
struct Auto {
    loads: usize,
    low: f64,
    high: f64,
    median: f64,
    /// Of the median; none of one round.
    interval: Option<(f64, f64)>,
    agreement: Option<f64>,
    stock_agreement: Option<f64>,
}

/// Over all tokens of these.
fn agreement(cells: &[&Cell]) -> Option<f64> {
    let known: Vec<(f64, f64)> = cells
        .iter()
        .filter_map(|c| Some((c.agreement?, c.tokens as f64)))
        .collect();
    let tokens: f64 = known.iter().map(|k| k.1).sum();
    (tokens > 0.0).then(|| known.iter().map(|(share, n)| share * n).sum::<f64>() / tokens)
}

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
        let auto = self.auto();
        let of = |value: &dyn Fn(&Auto) -> f64| auto.as_ref().map(|auto| rounded(value(auto), 4));
        let interval = auto.as_ref().and_then(|auto| auto.interval);
        json!({
            "runs": runs,
            "worst_auto": of(&|auto| auto.low),
            "median_auto": of(&|auto| auto.median),
            "median_auto_interval": interval.map(|(low, high)| [rounded(low, 4), rounded(high, 4)]),
            "agreement_auto": auto.as_ref().and_then(|auto| auto.agreement).map(|a| rounded(a, 4)),
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

    fn of(&self, name: &str) -> Vec<&Cell> {
        let cells = self.cells.iter();
        cells.filter(|c| base(&c.policy) == name).collect()
    }

    /// What `auto` brought over all loads, and what it cost.
    fn auto(&self) -> Option<Auto> {
        let cells = Some(self.of("auto")).filter(|list| !list.is_empty())?;
        let ratios: Vec<f64> = cells.iter().map(|c| c.ratio).collect();
        // The loads' median is a figure of each round.
        let rounds = cells.iter().map(|c| c.ratio_rounds.len()).min()?;
        let by_round: Vec<f64> = (0..rounds)
            .map(|round| {
                median(
                    &cells
                        .iter()
                        .map(|c| c.ratio_rounds[round])
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        Some(Auto {
            loads: cells.len(),
            low: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            high: ratios.iter().copied().fold(0.0, f64::max),
            median: median(&ratios),
            interval: ratio_interval(&by_round),
            agreement: agreement(&cells),
            stock_agreement: agreement(&self.of(REFERENCE)),
        })
    }

    /// In one sentence, or two where one round says nothing.
    fn headline(&self) -> Option<String> {
        let auto = self.auto()?;
        let mut out = String::new();
        if self.rounds < 2 {
            out += "One round: nothing can be concluded from it. ";
        }
        if auto.loads == 1 {
            let _ = write!(
                out,
                "Under one load auto had {:.2} of the unpatched server's tokens/s",
                auto.median
            );
        } else {
            let _ = write!(
                out,
                "Over {} loads auto had {:.2} to {:.2} of the unpatched server's tokens/s, {:.2} in the median",
                auto.loads, auto.low, auto.high, auto.median
            );
        }
        if let Some((low, high)) = auto.interval {
            let _ = write!(
                out,
                " (95 %: {low:.2} to {high:.2}, of {})",
                self.rounds_text()
            );
        }
        if let Some(own) = auto.agreement {
            let _ = write!(
                out,
                ", and {:.1} % of its tokens are the full model's choice",
                100.0 * own
            );
        }
        if let Some(stock) = auto.stock_agreement {
            let _ = write!(out, " (of the unpatched server's {:.1} %)", 100.0 * stock);
        }
        Some(out + ".")
    }

    pub fn table(&self) -> String {
        let mut out = format!(
            "{}, threshold {}, {}, {} tokens per request\n{}\n{MODEL_IS}\n\n",
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
        let _ = writeln!(out, "\n{}", self.about_agreement());
        out
    }

    fn about_agreement(&self) -> &'static str {
        if self.exact { EXACT } else { USUAL }
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
        let legend = |names: &[&str]| {
            let names = names.iter();
            let spans = names.map(|p| {
                format!(
                    "<span><i class=\"key {}\"></i>{}</span>",
                    plot::class(p),
                    escape(p)
                )
            });
            spans.collect::<String>()
        };
        let headline = self.headline().map_or_else(String::new, |text| {
            let picture = plot::brought(&self.of("auto"));
            format!(
                "<p class=\"lead\">{}</p>\n<section>\n<h2>What auto brought</h2>\n<p class=\"note\">Tokens per second relative to the \
                 unpatched server, by load: the median of the rounds, and how far they lie apart.</p>\n{picture}\n</section>",
                escape(&text)
            )
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
        // Those that force rows out are not in a race with those that do not.
        let apart = |forced: bool| -> Vec<&str> {
            let all = policies.iter().copied();
            all.filter(|p| forces(p) == forced).collect()
        };
        let ratio = |forced: bool| {
            let names = apart(forced);
            each(&|cells| {
                let drawn: Vec<&Cell> = cells
                    .iter()
                    .filter(|c| names.contains(&c.policy.as_str()))
                    .copied()
                    .collect();
                plot::ratio(&drawn, &names)
            })
        };
        let forced = if apart(true).is_empty() {
            String::new()
        } else {
            format!(
                "<section>\n<h2>Policies that force rows out</h2>\n<p class=\"note\">Baselines: they make rows exit below the threshold, \
                 and pay for their speed in agreement (see the table).</p>\n{}\n</section>",
                ratio(true)
            )
        };
        let panels = |cells: &[&Cell]| {
            let panels = plot::time_between_tokens(cells);
            format!("<div class=\"panels\">{panels}</div>")
        };
        page::fill(
            include_str!("report.html"),
            &[
                ("MODEL_IS", MODEL_IS),
                ("MODEL", &escape(&self.model)),
                ("MACHINE", &escape(&self.machine)),
                ("THRESHOLD", &self.threshold.to_string()),
                ("ROUNDS", &self.rounds_text()),
                ("TOKENS", &self.tokens_per_request.to_string()),
                ("HEADLINE", &headline),
                ("LEGEND", &legend(&policies)),
                ("NOT_FORCED", &legend(&apart(false))),
                ("RATIO", &ratio(false)),
                ("FORCED", &forced),
                ("TBT", &each(&panels)),
                ("EXITS", &each(&|cells| plot::exit_share(cells, &policies))),
                ("HEAD", &head),
                ("ROWS", &rows),
                ("AGREEMENT", self.about_agreement()),
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
            ratio_rounds: [0.95, 1.0, 1.05].map(|r| r * ratio).to_vec(),
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

    /// No best cell: the range, the median with its interval, and the price. By hand: the rounds' medians are 1.14, 1.2 and
    /// 1.26, whose logarithms have the mean 0.1815 and the standard error 0.0289; t(2) is 4.303.
    #[test]
    fn the_headline_is_the_range_the_median_and_the_price() {
        let says = "Over 3 loads auto had 0.90 to 1.50 of the unpatched server's tokens/s, 1.20 in the median (95 %: 1.06 to 1.36, \
                    of 3 rounds), and 98.8 % of its tokens are the full model's choice (of the unpatched server's 98.8 %).";
        let mut report = report();
        assert!(report.table().contains(says), "{}", report.table());
        assert!(report.html().contains(&escape(says)));
        report.rounds = 1;
        report
            .cells
            .iter_mut()
            .for_each(|c| c.ratio_rounds.truncate(1));
        let said = report.headline().unwrap();
        assert!(
            said.starts_with("One round: nothing can be concluded") && !said.contains("95 %"),
            "{said}"
        );
        // Without auto there is nothing to say.
        report.cells.truncate(1);
        assert_eq!(report.headline(), None);
        assert!(report.html().contains("<h2>Throughput"));
    }

    #[test]
    fn policies_that_force_rows_out_are_drawn_apart() {
        let mut report = report();
        assert!(!report.html().contains("force rows out"));
        report.cells.push(cell("eager", 1, 2.5));
        let html = report.html();
        let (free, forced) = html.split_once("Policies that force rows out").unwrap();
        assert!(
            free.contains("auto at 1 in flight: 1.50x") && !free.contains("eager at 1 in flight")
        );
        assert!(forced.contains("eager at 1 in flight: 2.50x"));
    }

    #[test]
    fn pages_to_look_at() {
        let mut report = report();
        report.cells.clear();
        let policies = [
            REFERENCE,
            "reference+unified",
            "off",
            "eager",
            "art",
            "hold",
            "hold+verify",
            "auto",
        ];
        for traffic in ["short", "300/64"] {
            for concurrency in [1, 4, 16] {
                for (i, policy) in policies.iter().enumerate() {
                    let ratio = 1.0 + 0.07 * i as f64 - 0.01 * f64::from(concurrency);
                    let mut cell = cell(policy, concurrency, ratio);
                    cell.traffic = traffic.into();
                    report.cells.push(cell);
                }
            }
        }
        page::leave("demo.html", &report.html());
        report
            .cells
            .retain(|c| c.concurrency == 4 && c.traffic == "short");
        report.rounds = 1;
        report
            .cells
            .iter_mut()
            .for_each(|c| c.ratio_rounds.truncate(1));
        assert!(report.html().contains("Under one load auto had 1.45 of"));
        let one = report.html();
        assert_eq!(page::faults(&one), [""; 0]);
        page::leave("demo-one-load.html", &one);
    }
}
