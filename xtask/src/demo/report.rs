//! What was measured, as a table, as JSON and as a page.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::{Map, Value, json};

use super::{OFF, Options, REFERENCE, Sample, Scores, base, fill, plot, rounded};

/// One policy at one concurrency, over all rounds.
pub struct Cell {
    pub policy: String,
    /// None where nothing exits.
    pub fill: Option<String>,
    pub concurrency: u16,
    pub tokens_per_s: f64,
    /// The median of the ratios to `off` of the same round; none if that was not measured.
    pub ratio: Option<f64>,
    pub ratio_rounds: Vec<f64>,
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
    samples: &BTreeMap<(String, u16), Vec<Sample>>,
    scores: &Scores,
) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &concurrency in &options.concurrency {
        let off = samples.get(&(OFF.to_owned(), concurrency));
        for policy in &options.policies {
            let key = (policy.clone(), concurrency);
            let Some(list) = samples.get(&key).filter(|list| !list.is_empty()) else {
                continue;
            };
            let of = |value: &dyn Fn(&Sample) -> f64| median(list.iter().map(value).collect());
            let ratio_rounds: Vec<f64> = off
                .map(|off| {
                    list.iter()
                        .zip(off)
                        .map(|(s, off)| s.tokens_per_s / off.tokens_per_s)
                        .collect()
                })
                .unwrap_or_default();
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
                concurrency,
                tokens_per_s: of(&|s| s.tokens_per_s),
                ratio: (!ratio_rounds.is_empty()).then(|| median(ratio_rounds.clone())),
                ratio_rounds,
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

pub fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpu
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?
                .split_once(':')
                .map(|(_, name)| name.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    format!("{name}, {cores} cores, {}", std::env::consts::OS)
}

impl Report {
    pub fn json(&self) -> Value {
        let runs: Vec<_> = self.cells.iter().map(Cell::json).collect();
        json!({
            "runs": runs,
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
        let names = self.cells.iter().map(|c| c.policy.len());
        let width = names.max().unwrap_or(0).max(10);
        let mut last = None;
        for cell in &self.cells {
            if last != Some(cell.concurrency) {
                if last.is_some() {
                    out.push('\n');
                }
                let _ = writeln!(out, "{} in flight", cell.concurrency);
                let _ = writeln!(out, "{}", header.line(width));
                last = Some(cell.concurrency);
            }
            let _ = writeln!(out, "{}", Row::of(cell).line(width));
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
            let class = if cell.ratio.is_some_and(|r| r < 1.0) {
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
                "<tr{class}><th scope=\"row\"><i class=\"key {key}\"></i>{name}</th><td>{n}</td>{numbers}</tr>",
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
        let best = self
            .cells
            .iter()
            // A baseline that forces rows out has nobody to force where one request is served at a time.
            .filter(|c| ![OFF, REFERENCE, "eager", "median", "mean"].contains(&base(&c.policy)))
            .filter_map(|c| Some((c.ratio?, c)))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let headline = best.map_or_else(String::new, |(ratio, cell)| {
            format!(
                "<p class=\"lead\">Best without forcing anybody out: <b>{}</b> at {} in flight, <b>{ratio:.2}&times;</b> \
                 the throughput of no early exit.</p>",
                escape(&cell.policy),
                cell.concurrency
            )
        });
        include_str!("report.html")
            .replace("@MODEL@", &escape(&self.model))
            .replace("@MACHINE@", &escape(&self.machine))
            .replace("@THRESHOLD@", &self.threshold.to_string())
            .replace("@ROUNDS@", &self.rounds_text())
            .replace("@TOKENS@", &self.tokens_per_request.to_string())
            .replace("@HEADLINE@", &headline)
            .replace("@LEGEND@", &legend)
            .replace("@RATIO@", &plot::ratio(&self.cells, &policies))
            .replace("@TBT@", &plot::time_between_tokens(&self.cells))
            .replace("@EXITS@", &plot::exit_share(&self.cells, &policies))
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
            "concurrency": self.concurrency,
            "tokens_per_s": rounded(self.tokens_per_s, 1),
            "ratio_to_off": self.ratio.map(|r| rounded(r, 4)),
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
            "x off",
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
            cell.policy.clone(),
            format!("{:.0}", cell.tokens_per_s),
            cell.ratio.map_or_else(|| "-".into(), |r| format!("{r:.2}")),
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

    fn cell(policy: &str, concurrency: u16, ratio: Option<f64>) -> Cell {
        Cell {
            policy: policy.into(),
            fill: None,
            concurrency,
            tokens_per_s: 1234.5,
            ratio,
            ratio_rounds: ratio.into_iter().collect(),
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
                cell("off", 1, Some(1.0)),
                cell("hold", 1, Some(1.5)),
                cell("hold", 8, None),
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
        assert!(json["runs"][2]["ratio_to_off"].is_null());
        assert!(!json.to_string().contains('\n'));
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
    }
}
