// SPDX-License-Identifier: Apache-2.0

//! What was measured, as a table, as JSON and as a page.

use std::fmt::Write;

use drex_harness::stats::{median, ratio_interval, rounded};
use drex_svg::{escape, page};
use serde_json::{Value, json};

use crate::{
    cells::Cell,
    chat::Chat,
    measure::Compared,
    options::{REFERENCE, SHORT, base, forces},
    plot,
};

/// Where agreement is that of the builds that were measured.
const USUAL: &str = "Where nothing exits, agreement is below 1 too: the check runs rows alone, the servers run them in batches, and the \
                     engine adds up in another order for another width. Tokens that are close change places then.";

/// Less is noise of most machines: a median so near to 1 is nothing.
const NOTHING: f64 = 0.02;

/// What `auto` brought: ratios to the unpatched server's tokens per second, and agreement with the full model.
struct Auto {
    loads: usize,
    worst: f64,
    /// Traffic and number in flight.
    worst_at: String,
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
    /// In sentences.
    pub model_is: &'static str,
    /// The traffic `short`, in a few words.
    pub short_is: &'static str,
    /// With a chat model.
    pub chat: Option<Chat>,
    pub machine: String,
    pub threshold: f64,
    /// Of policies that have none of their own.
    pub fill: String,
    pub rounds: u32,
    pub tokens_per_request: u32,
    pub threads: usize,
    /// The one load of which that is; none: of each.
    pub repeat: Option<String>,
    /// Agreement and perplexity are of builds whose results do not depend on the batch, and this is what those said.
    pub compared: Option<Compared>,
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
            "worst_auto": of(&|auto| auto.worst),
            "median_auto": of(&|auto| auto.median),
            "median_auto_interval": interval.map(|(low, high)| [rounded(low, 4), rounded(high, 4)]),
            "agreement_auto": auto.as_ref().and_then(|auto| auto.agreement).map(|a| rounded(a, 4)),
            "model": self.model,
            "chat": self.chat,
            "machine": self.machine,
            "threshold": self.threshold,
            "fill": self.fill,
            "rounds": self.rounds,
            "tokens_per_request": self.tokens_per_request,
            "threads": self.threads,
            "compared": self.compared,
            "compared_under": self.repeat,
            "agreement_of": if self.compared.is_some() { "exact builds" } else { "the builds that were measured" },
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
        let worst = cells.iter().min_by(|a, b| a.ratio.total_cmp(&b.ratio))?;
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
            worst: worst.ratio,
            worst_at: format!("{} at {} in flight", worst.traffic, worst.concurrency),
            median: median(&ratios),
            interval: ratio_interval(&by_round),
            agreement: agreement(&cells),
            stock_agreement: agreement(&self.of(REFERENCE)),
        })
    }

    /// Whether early exit pays; the median, the worst load and the price.
    fn headline(&self) -> Option<String> {
        let auto = self.auto()?;
        let rounds = self.rounds_text();
        let mut out = match auto.interval {
            None => format!("Nothing can be concluded from {rounds}"),
            Some((low, _)) if low > 1.0 && auto.median > 1.0 => {
                "Early exit pays on this machine".into()
            }
            Some((_, high)) if high < 1.0 && auto.median < 1.0 => {
                "Early exit loses on this machine".into()
            }
            Some(_) if (auto.median - 1.0).abs() < NOTHING => {
                "On this machine early exit brings this model nothing".into()
            }
            Some(_) => {
                let what = if auto.median < 1.0 { "loses" } else { "pays" };
                format!("{rounds} cannot tell whether early exit {what} on this machine")
            }
        };
        let loads = match auto.loads {
            1 => "under one load".to_owned(),
            n => format!("in the median of {n} loads"),
        };
        let _ = write!(
            out,
            ": auto had {:.2} of the unpatched server's tokens/s {loads}",
            auto.median
        );
        if let Some((low, high)) = auto.interval {
            let _ = write!(out, " (95 %: {low:.2} to {high:.2}, of {rounds})");
        }
        if auto.loads > 1 {
            let _ = write!(out, ", {:.2} in the worst ({})", auto.worst, auto.worst_at);
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
        out.push('.');
        match self.cells.iter().map(|c| c.cut).sum::<u64>() {
            0 => (),
            n => {
                let _ = write!(out, " Of all requests {n} took too long and were given up.");
            }
        }
        Some(out)
    }

    /// Whether what verifies said what the unpatched server says.
    fn lossless(&self) -> Option<String> {
        let of = self.compared.as_ref()?;
        let (answers, equal) = (of.answers, of.equal);
        let mut out = format!(
            "{answers} answers ({} tokens) of {} were compared with the unpatched server's, token by token: ",
            of.tokens,
            of.policies.join(" and ")
        );
        let _ = match answers - equal {
            0 if answers > 0 => write!(out, "all are equal."),
            0 => write!(out, "nothing is known."),
            n => write!(out, "{n} differ, which is an error."),
        };
        let _ = match of.drafts {
            0 => write!(
                out,
                " No exit proposed a token, so that this proves little."
            ),
            n => write!(
                out,
                " Exits proposed {n} tokens, and the full model took {}.",
                of.drafts_accepted
            ),
        };
        Some(out)
    }

    pub fn table(&self) -> String {
        let mut out = format!(
            "{}, threshold {}, fill {}, {}, {} tokens per request\n{}\n{}\n\n",
            self.model,
            self.threshold,
            self.fill,
            self.rounds_text(),
            self.tokens_per_request,
            self.machine,
            self.model_is
        );
        if let Some(chat) = &self.chat {
            let _ = writeln!(
                out,
                "> {}\n{}\n\n{}\n",
                chat.question,
                chat.answer,
                chat.drafts_in_words()
            );
        }
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
        if let Some(lossless) = self.lossless() {
            let _ = writeln!(out, "\n{lossless}");
        }
        let _ = writeln!(out, "\n{}", self.about_agreement());
        out
    }

    fn about_agreement(&self) -> String {
        if self.compared.is_none() {
            return USUAL.to_owned();
        }
        let of = match &self.repeat {
            Some(load) => format!(" of one load ({load})"),
            None => String::new(),
        };
        format!(
            "Agreement was measured in a second run{of}, in builds whose results do not depend on who shares a batch. \
             The usual builds, without early exit, disagree with themselves: in half a percent of the bundled model's tokens."
        )
    }

    /// What the names of the traffic say.
    fn about_traffic(&self) -> String {
        let mut out = Vec::new();
        if self.cells.iter().any(|c| c.traffic == SHORT) {
            out.push(format!("<b>{SHORT}</b>: {}", self.short_is));
        }
        if let Some(cell) = self.cells.iter().find(|c| c.traffic != SHORT) {
            let name = escape(&cell.traffic);
            out.push(format!("<b>{name}</b>: tokens of prompt and answer"));
        }
        out.join("; ")
    }

    pub fn html(&self) -> String {
        let mut rows = String::new();
        for cell in &self.cells {
            let row = Row::of(cell);
            // As it is printed: 1.00 is no loss.
            let class = if cell.ratio < 0.995 {
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
        let lossless = self.lossless().map_or_else(String::new, |said| {
            format!("<p class=\"note\">{}</p>\n", escape(&said))
        });
        let headline = self.headline().map_or_else(|| lossless.clone(), |text| {
            let picture = plot::brought(&self.of("auto"));
            format!(
                "<p class=\"lead\">{}</p>\n{lossless}<section>\n<h2>What auto brought</h2>\n<p class=\"note\">Tokens per second relative to the \
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
        let chat = self.chat.as_ref().map_or(String::new(), |chat| {
            format!(
                "<p><b>{}</b><br>{}</p>\n<p class=\"note\">{}</p>",
                escape(chat.question),
                escape(&chat.answer),
                chat.drafts_in_words()
            )
        });
        page::fill(
            include_str!("report.html"),
            &[
                ("MODEL_IS", &escape(self.model_is)),
                ("MODEL", &escape(&self.model)),
                ("MACHINE", &escape(&self.machine)),
                ("THRESHOLD", &self.threshold.to_string()),
                ("FILL", &self.fill),
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
                ("TRAFFIC", &self.about_traffic()),
                ("AGREEMENT", &escape(&self.about_agreement())),
                ("CHAT", &chat),
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
            model_is: "A toy.",
            chat: Some(Chat {
                question: "Where?",
                answer: "<here>".into(),
                tokens: 2,
                drafts: 1,
                drafts_accepted: 1,
                ..Chat::default()
            }),
            machine: "m".into(),
            threshold: 0.7,
            fill: "copy".into(),
            rounds: 3,
            tokens_per_request: 128,
            threads: 2,
            short_is: "questions",
            repeat: None,
            compared: None,
            seconds: 1.0,
        }
    }

    #[test]
    fn the_page_is_whole_and_closed() {
        let html = report().html();
        assert_eq!(page::faults(&html), [""; 0]);
        assert!(
            html.contains("a&lt;b")
                && html.contains("&lt;here")
                && !html.contains("inf")
                && html.contains("<svg")
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

    /// No best cell: the median with its interval, the worst, and the price. By hand: the rounds' medians are 1.14, 1.2 and
    /// 1.26, whose logarithms have the mean 0.1815 and the standard error 0.0289; t(2) is 4.303.
    #[test]
    fn the_headline_is_the_median_the_worst_and_the_price() {
        let says = "Early exit pays on this machine: auto had 1.20 of the unpatched server's tokens/s in the median of 3 loads \
                    (95 %: 1.06 to 1.36, of 3 rounds), 0.90 in the worst (300/64 at 4 in flight), and 98.8 % of its tokens are the full model's choice (of the unpatched server's 98.8 %).";
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
            said.starts_with("Nothing can be concluded from 1 round: auto had 1.20 of")
                && !said.contains("95 %"),
            "{said}"
        );
        report.cells[0].cut = 3;
        let said = report.headline().unwrap();
        assert!(said.ends_with("Of all requests 3 took too long and were given up."));
        // Without auto there is nothing to say.
        report.cells.truncate(1);
        assert_eq!(report.headline(), None);
        assert!(report.html().contains("<h2>Throughput"));
    }

    #[test]
    fn losing_and_bringing_nothing_are_said_first() {
        let says = |ratios: [f64; 3], start: &str| {
            let mut report = report();
            report.cells.truncate(2);
            report.cells[1].ratio = median(&ratios);
            report.cells[1].ratio_rounds = ratios.to_vec();
            let said = report.headline().unwrap();
            assert!(said.starts_with(start), "{said}");
        };
        let nothing = "On this machine early exit brings this model nothing: auto had 1.00 of";
        says([0.99, 1.0, 1.01], nothing);
        says([0.9, 1.0, 1.1], nothing);
        says(
            [0.94, 0.95, 0.96],
            "Early exit loses on this machine: auto had 0.95 of",
        );
        says(
            [0.8, 0.95, 1.1],
            "3 rounds cannot tell whether early exit loses",
        );
        says(
            [0.8, 1.05, 1.1],
            "3 rounds cannot tell whether early exit pays",
        );
    }

    fn compared() -> Compared {
        Compared {
            policies: vec!["auto".into(), "hold".into()],
            answers: 40,
            equal: 40,
            tokens: 1280,
            drafts: 90,
            drafts_accepted: 60,
        }
    }

    #[test]
    fn what_was_compared_is_counted() {
        let mut report = report();
        let mut of = compared();
        report.repeat = Some("20 requests".into());
        report.compared = Some(of.clone());
        let says = "40 answers (1280 tokens) of auto and hold were compared with the unpatched server's, token by token: all are \
                    equal. Exits proposed 90 tokens, and the full model took 60.";
        assert!(report.table().contains(says), "{}", report.table());
        let html = report.html();
        assert!(html.contains(&escape(says)) && html.contains("of one load (20 requests)"));
        assert_eq!(page::faults(&html), [""; 0]);
        let json = report.json();
        assert_eq!(json["compared"]["equal"], 40);
        assert_eq!(json["agreement_of"], "exact builds");
        of.equal = 39;
        of.drafts = 0;
        report.compared = Some(of);
        let said = report.lossless().unwrap();
        assert!(
            said.contains("1 differ, which is an error. No exit proposed"),
            "{said}"
        );
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
            "reference+ngram-simple",
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
        // A slow machine, and answers that were compared.
        report.rounds = 1;
        report.compared = Some(compared());
        report.repeat = Some("20 requests".into());
        for cell in &mut report.cells {
            cell.ratio_rounds.truncate(1);
            cell.tbt_ms = (313.9, 13_530.3);
        }
        assert!(
            report
                .html()
                .contains("auto had 1.45 of the unpatched server's tokens/s under one load")
        );
        let one = report.html();
        assert_eq!(page::faults(&one), [""; 0]);
        page::leave("demo-one-load.html", &one);
    }
}
