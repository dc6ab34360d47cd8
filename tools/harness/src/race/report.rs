// SPDX-License-Identifier: Apache-2.0
//! What a race gave: as JSON, as a table, as Markdown and as a page.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{About, Contender, Field, LAYOUTS, STOCK, Sample, over, page};
use crate::{
    stats::{mean, median, quantile, quantile_ratio_interval, ratio_interval, rounded},
    traffic::{self, Traffic},
};

/// The policy that the summary is about.
const AUTO: &str = "auto";

/// Median and 99th percentile.
#[derive(Clone, Copy, Default, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    pub p50: f64,
    pub p99: f64,
}

/// A figure relative to the baseline's, with its interval where there was more than one round.
#[derive(Clone, Copy, Default, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    pub value: f64,
    pub low: Option<f64>,
    pub high: Option<f64>,
}

impl Ratio {
    /// Whether the value lies beyond a bound: below one that is less than 1, above one that is more.
    pub fn loses(&self, bound: f64) -> bool {
        beyond(self.value, bound)
    }

    /// Its interval in words, where there is one.
    pub fn interval(&self) -> Option<String> {
        self.low
            .zip(self.high)
            .map(|(low, high)| format!("{low:.2} to {high:.2}"))
    }

    /// Its interval in brackets after a blank, or nothing.
    pub fn brackets(&self) -> String {
        self.interval()
            .map_or_else(String::new, |text| format!(" ({text})"))
    }
}

fn beyond(value: f64, bound: f64) -> bool {
    if bound < 1.0 {
        value < bound
    } else {
        value > bound
    }
}

/// Where a cell begins to lose: relative to the baseline's tokens/s, times to first token and times between tokens (p99).
pub const LEAST_THROUGHPUT: f64 = 0.99;
pub const MOST_TTFT: f64 = 1.05;
pub const MOST_TBT: f64 = 1.25;

#[derive(Clone, Copy, Default, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratios {
    pub p50: Ratio,
    pub p99: Ratio,
}

/// One contender under one load.
#[derive(Clone, Default, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Tokens of a prompt and of an answer, on average.
    pub prompt: u64,
    pub answer: u64,
    pub traffic: String,
    pub in_flight: usize,
    pub policy: String,
    /// Of the cache, where the server is the unpatched one.
    pub layout: Option<String>,
    /// Of the server that ratios are relative to.
    pub stock_layout: String,
    pub tokens_per_s: f64,
    pub ratio_to_stock: f64,
    pub ratio_low: Option<f64>,
    pub ratio_high: Option<f64>,
    pub ratio_rounds: Vec<f64>,
    pub ttft_ms: Pair,
    pub ttft_ratio: Ratios,
    pub tbt_ms: Pair,
    pub tbt_ratio: Ratios,
    pub completion_ms: f64,
    pub completion_ratio: f64,
    /// Share of the tokens that left early.
    pub exits: f64,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub held_ms_per_token: f64,
    pub rows_per_step: Option<f64>,
    /// Share of the steps that reused a graph.
    pub graph_reuse: Option<f64>,
    /// Share of the steps over held rows, by what caused them.
    pub flushes: BTreeMap<String, f64>,
    /// Requests a second of the server without early exit, where arrivals are a share of them.
    pub capacity: Option<f64>,
    pub rounds: usize,
    pub requests: u64,
    pub tokens: u64,
    /// Cores that the client used, and that programs used which are no part of this.
    pub client_cpu: f64,
    pub foreign_cpu: f64,
}

/// A figure of a cell that is worse than it should be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    pub traffic: String,
    pub in_flight: usize,
    pub policy: String,
    pub figure: String,
    pub ratio: f64,
    pub low: Option<f64>,
    pub high: Option<f64>,
    pub bound: f64,
    /// The whole interval lies beyond the bound.
    pub clear: bool,
}

#[derive(Clone, Default, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub worst: f64,
    pub median: f64,
    pub best: f64,
    pub cells: usize,
    pub losing: usize,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct Report {
    pub cells: Vec<Cell>,
    /// Ratios of policy `auto`; null where it was not in the race.
    pub worst_auto: Option<f64>,
    pub median_auto: Option<f64>,
    pub worst_auto_cell: Option<String>,
    /// By policy.
    pub policies: BTreeMap<String, Summary>,
    pub losses: Vec<Loss>,
    pub interval: String,
    #[serde(flatten)]
    pub about: About,
    pub seconds: f64,
    /// The most of a core that a server used while another one was measured.
    pub idle_cpu_max: f64,
}

const INTERVAL: &str = "tokens/s: median of the rounds' paired ratios, 95 % interval by Student's t over their logarithms; times: \
                        quantiles of all rounds' requests together, 95 % interval by drawing the rounds anew";

/// One of a sample's lists of times.
type Times = for<'a> fn(&'a Sample) -> &'a [f64];

fn pooled(samples: &[&Sample], of: Times, q: f64) -> f64 {
    let mut all: Vec<f64> = samples.iter().flat_map(|s| of(s)).copied().collect();
    quantile(&mut all, q)
}

/// The layout of a contender that is the unpatched server.
fn layout_of(name: &str) -> Option<String> {
    let layout = name.split('+').nth(1).unwrap_or_default();
    LAYOUTS.contains(&name).then(|| layout.to_owned())
}

/// A cell for each contender.
pub(super) fn cells(contenders: &[Contender], field: &Field) -> Vec<Cell> {
    let stock = field.stock();
    let mut out = Vec::new();
    for (at, contender) in contenders.iter().enumerate() {
        // Pairs of the same round.
        let pairs: Vec<(&Sample, &Sample)> = field.samples[at]
            .iter()
            .zip(&field.samples[stock])
            .filter_map(|(ours, theirs)| Some((ours.as_ref()?, theirs.as_ref()?)))
            .collect();
        let ours: Vec<&Sample> = pairs.iter().map(|p| p.0).collect();
        let theirs: Vec<&Sample> = pairs.iter().map(|p| p.1).collect();
        if ours.is_empty() {
            continue;
        }
        let ratio_rounds: Vec<f64> = pairs
            .iter()
            .map(|(a, b)| a.tokens_per_s / b.tokens_per_s)
            .collect();
        let interval = ratio_interval(&ratio_rounds).filter(|_| at != stock);
        let pair = |of: Times| Pair {
            p50: rounded(pooled(&ours, of, 0.5), 3),
            p99: rounded(pooled(&ours, of, 0.99), 3),
        };
        let ratio = |of: Times, q: f64| {
            let a: Vec<&[f64]> = ours.iter().map(|s| of(s)).collect();
            let b: Vec<&[f64]> = theirs.iter().map(|s| of(s)).collect();
            let value = pooled(&ours, of, q) / pooled(&theirs, of, q);
            let interval = quantile_ratio_interval(&a, &b, q).filter(|_| at != stock);
            Ratio {
                value: if value.is_finite() {
                    rounded(value, 4)
                } else {
                    1.0
                },
                low: interval.map(|i| rounded(i.0, 4)),
                high: interval.map(|i| rounded(i.1, 4)),
            }
        };
        let ratios = |of: Times| Ratios {
            p50: ratio(of, 0.5),
            p99: ratio(of, 0.99),
        };
        let (ttft, tbt): (Times, Times) = (|s| &s.ttft_ms, |s| &s.tbt_ms);
        let completion = |from: &[&Sample]| {
            let all: Vec<f64> = from
                .iter()
                .flat_map(|s| &s.completion_ms)
                .copied()
                .collect();
            mean(&all)
        };
        let sum = |value: &dyn Fn(&Sample) -> u64| ours.iter().map(|s| value(s)).sum::<u64>();
        let (requests, tokens) = (sum(&|s| s.requests), sum(&|s| s.tokens));
        let counter = |name: &str| -> Option<f64> {
            let found: Vec<f64> = ours
                .iter()
                .filter_map(|s| s.counters.get(name))
                .copied()
                .collect();
            (!found.is_empty()).then(|| found.iter().sum())
        };
        let share = |part: Option<f64>, whole: Option<f64>| {
            Some(rounded(part? / whole.filter(|w| *w > 0.0)?, 3))
        };
        let steps = counter("drex_steps_total");
        let reused = counter("drex_graphs_reused_total");
        let graphs = reused
            .zip(counter("drex_graphs_built_total"))
            .map(|(a, b)| a + b);
        let mut flushes = BTreeMap::new();
        for name in ours.iter().flat_map(|s| s.counters.keys()) {
            if let (Some(reason), Some(value)) =
                (name.strip_prefix("flushes_"), share(counter(name), steps))
                && value > 0.0
            {
                flushes.insert(reason.to_owned(), value);
            }
        }
        let (prompt, answer) = match field.traffic {
            Traffic::Closed(l) => (l.prompt as u64, l.answer as u64),
            _ => (
                sum(&|s| s.prompt_tokens) / requests.max(1),
                tokens / requests.max(1),
            ),
        };
        out.push(Cell {
            prompt,
            answer,
            traffic: field.traffic.to_string(),
            in_flight: field.in_flight,
            policy: if at == stock {
                STOCK.to_owned()
            } else {
                contender.name.clone()
            },
            layout: layout_of(&contender.name),
            stock_layout: layout_of(&contenders[stock].name).unwrap_or_default(),
            tokens_per_s: rounded(
                median(&ours.iter().map(|s| s.tokens_per_s).collect::<Vec<_>>()),
                1,
            ),
            ratio_to_stock: rounded(median(&ratio_rounds), 4),
            ratio_low: interval.map(|i| rounded(i.0, 4)),
            ratio_high: interval.map(|i| rounded(i.1, 4)),
            ratio_rounds: ratio_rounds.iter().map(|r| rounded(*r, 4)).collect(),
            ttft_ms: pair(ttft),
            ttft_ratio: ratios(ttft),
            tbt_ms: pair(tbt),
            tbt_ratio: ratios(tbt),
            completion_ms: rounded(completion(&ours), 1),
            completion_ratio: rounded(completion(&ours) / completion(&theirs), 4),
            exits: rounded(sum(&|s| s.exits) as f64 / tokens.max(1) as f64, 4),
            involuntary_exits: sum(&|s| s.involuntary_exits),
            involuntary_stays: sum(&|s| s.involuntary_stays),
            held_ms_per_token: rounded(
                ours.iter().map(|s| s.held_ms).sum::<f64>() / tokens.max(1) as f64,
                4,
            ),
            rows_per_step: share(counter("drex_step_rows_total"), steps),
            graph_reuse: share(reused, graphs),
            flushes,
            capacity: (field.capacity > 0.0).then(|| rounded(field.capacity, 2)),
            rounds: ours.len(),
            requests,
            tokens,
            client_cpu: rounded(over(&ours, |s| s.client_cpu), 3),
            foreign_cpu: rounded(over(&ours, |s| s.foreign_cpu), 3),
        });
    }
    // The baseline first.
    out.sort_by_key(|cell| cell.policy != STOCK);
    out
}

/// The cells of one load in a line.
pub(super) fn line(cells: &[Cell]) -> String {
    let Some(first) = cells.first() else {
        return String::new();
    };
    let mut out = format!("{} at {}:", first.traffic, first.in_flight);
    for c in cells {
        let ratio = c.throughput();
        let _ = write!(out, " {} {:.2}{}", c.policy, ratio.value, ratio.brackets());
    }
    let _ = write!(
        out,
        ", {} rounds, stock {:.0} tokens/s",
        first.rounds, first.tokens_per_s
    );
    out
}

impl Cell {
    pub fn is_stock(&self) -> bool {
        self.layout.is_some()
    }

    /// Tokens/s relative to the baseline's.
    pub fn throughput(&self) -> Ratio {
        Ratio {
            value: self.ratio_to_stock,
            low: self.ratio_low,
            high: self.ratio_high,
        }
    }

    fn losses(&self) -> Vec<Loss> {
        if self.is_stock() {
            return Vec::new();
        }
        let (ttft, tbt) = (self.ttft_ratio, self.tbt_ratio);
        let figures = [
            ("tokens/s", self.throughput(), LEAST_THROUGHPUT),
            ("time to first token, p50", ttft.p50, MOST_TTFT),
            ("time to first token, p99", ttft.p99, MOST_TTFT),
            ("time between tokens, p99", tbt.p99, MOST_TBT),
        ];
        let mut out = Vec::new();
        for (figure, ratio, bound) in figures {
            if ratio.loses(bound) {
                // The end of the interval that lies nearer to 1.
                let near = if bound < 1.0 { ratio.high } else { ratio.low };
                out.push(Loss {
                    traffic: self.traffic.clone(),
                    in_flight: self.in_flight,
                    policy: self.policy.clone(),
                    figure: figure.to_owned(),
                    ratio: ratio.value,
                    low: ratio.low,
                    high: ratio.high,
                    bound,
                    clear: near.is_some_and(|end| beyond(end, bound)),
                });
            }
        }
        out
    }
}

impl Loss {
    fn line(&self) -> String {
        let ratio = Ratio {
            value: self.ratio,
            low: self.low,
            high: self.high,
        };
        format!(
            "{} at {}, {}: {} {:.2}{} of stock, bound {}{}",
            self.traffic,
            self.in_flight,
            self.policy,
            self.figure,
            ratio.value,
            ratio.brackets(),
            self.bound,
            if self.clear {
                ""
            } else {
                "; within the interval"
            }
        )
    }
}

impl Report {
    pub fn new(cells: Vec<Cell>, about: About, seconds: f64, idle: f64) -> Report {
        let losses: Vec<Loss> = cells.iter().flat_map(Cell::losses).collect();
        let mut policies = BTreeMap::new();
        for cell in cells.iter().filter(|c| !c.is_stock()) {
            policies.entry(cell.policy.clone()).or_insert_with(|| {
                let all: Vec<f64> = cells
                    .iter()
                    .filter(|c| c.policy == cell.policy)
                    .map(|c| c.ratio_to_stock)
                    .collect();
                Summary {
                    worst: all.iter().copied().fold(f64::INFINITY, f64::min),
                    median: rounded(median(&all), 4),
                    best: all.iter().copied().fold(0.0, f64::max),
                    cells: all.len(),
                    losing: all.iter().filter(|r| beyond(**r, LEAST_THROUGHPUT)).count(),
                }
            });
        }
        let auto = policies.get(AUTO).cloned();
        let worst = cells
            .iter()
            .filter(|c| c.policy == AUTO)
            .min_by(|a, b| a.ratio_to_stock.total_cmp(&b.ratio_to_stock));
        Report {
            worst_auto_cell: worst.map(|c| format!("{} at {}", c.traffic, c.in_flight)),
            worst_auto: auto.as_ref().map(|s| s.worst),
            median_auto: auto.map(|s| s.median),
            policies,
            losses,
            cells,
            interval: INTERVAL.to_owned(),
            about,
            seconds: rounded(seconds, 1),
            idle_cpu_max: rounded(idle, 3),
        }
    }

    /// One report of several that were measured in the same setting. A load that two have is the later one's.
    pub fn joined(reports: Vec<Report>) -> Result<Report> {
        let setting = |a: &About| {
            let text = format!("{}, exit after {}", a.model, a.exit_layers);
            format!(
                "{text}, threshold {}, fill {}, {} threads, {}",
                a.threshold, a.fill, a.threads, a.machine
            )
        };
        let about = reports.last().context("there is no report")?.about.clone();
        if let Some(other) = reports
            .iter()
            .find(|r| setting(&r.about) != setting(&about))
        {
            bail!(
                "the reports differ in what they measured: {}; {}",
                setting(&other.about),
                setting(&about)
            );
        }
        let seconds = reports.iter().map(|r| r.seconds).sum();
        let idle = reports.iter().map(|r| r.idle_cpu_max).fold(0.0, f64::max);
        let mut loads: BTreeMap<(usize, usize, String), Vec<Cell>> = BTreeMap::new();
        for report in reports {
            for group in report.groups() {
                let first = &group[0];
                let usual = traffic::ALL
                    .split(',')
                    .position(|name| name == first.traffic);
                let key = (
                    usual.unwrap_or(usize::MAX),
                    first.in_flight,
                    first.traffic.clone(),
                );
                loads.insert(key, group.to_vec());
            }
        }
        let cells = loads.into_values().flatten().collect();
        Ok(Report::new(cells, about, seconds, idle))
    }

    /// Neighbouring cells of one load.
    pub fn groups(&self) -> Vec<&[Cell]> {
        self.cells
            .chunk_by(|a, b| (&a.traffic, a.in_flight) == (&b.traffic, b.in_flight))
            .collect()
    }

    /// Worst and median of each policy.
    pub fn headline(&self) -> String {
        let mut out = String::new();
        for (policy, s) in &self.policies {
            let _ = writeln!(
                out,
                "{policy}: worst cell {:.2}, median cell {:.2}, best {:.2} of stock's tokens/s; {} of {} cells below 0.99",
                s.worst, s.median, s.best, s.losing, s.cells
            );
        }
        out
    }

    fn lost(&self) -> String {
        if self.losses.is_empty() {
            return "No cell loses.\n".into();
        }
        let mut out = String::from("Losing cells:\n");
        for line in self.losing_lines() {
            let _ = writeln!(out, "- {line}");
        }
        out
    }

    pub fn losing_lines(&self) -> Vec<String> {
        self.losses.iter().map(Loss::line).collect()
    }

    fn remarks(&self) -> String {
        let mut out = String::new();
        if self.idle_cpu_max > 0.03 {
            let _ = writeln!(
                out,
                "A server used up to {:.2} of a core while another one was measured.",
                self.idle_cpu_max
            );
        }
        let foreign = mean(&self.cells.iter().map(|c| c.foreign_cpu).collect::<Vec<_>>());
        if foreign > 0.1 {
            let little = if foreign > 0.25 {
                ": these figures mean little"
            } else {
                ""
            };
            let _ = writeln!(
                out,
                "Other programs kept {foreign:.2} cores busy meanwhile{little}."
            );
        }
        out
    }

    pub fn table(&self) -> String {
        let a = &self.about;
        let mut out = format!(
            "{}, exit after {}, threshold {}, {} compute thread{}\n{}\n",
            a.model,
            a.exit_layers,
            a.threshold,
            a.threads,
            if a.threads == 1 { "" } else { "s" },
            a.machine
        );
        for group in self.groups() {
            let _ = write!(
                out,
                "\n{} at {} in flight (stock: {})\n  {:16}{:>8}{:>8}{:>15}{:>16}{:>7}{:>7}{:>15}{:>7}{:>9}{:>7}{:>8}\n",
                group[0].traffic,
                group[0].in_flight,
                group[0].stock_layout,
                "",
                "tok/s",
                "x stock",
                "interval",
                "first p50/99 ms",
                "x p50",
                "x p99",
                "between p50/99",
                "x p99",
                "done ms",
                "exits",
                "held ms"
            );
            for c in group {
                let interval = c.throughput().interval().unwrap_or_else(|| "-".into());
                let _ = writeln!(
                    out,
                    "  {:16}{:>8.0}{:>8.2}{interval:>15}{:>16}{:>7.2}{:>7.2}{:>15}{:>7.2}{:>9.0}{:>6.0}%{:>8.3}",
                    c.policy,
                    c.tokens_per_s,
                    c.ratio_to_stock,
                    format!("{:.1}/{:.1}", c.ttft_ms.p50, c.ttft_ms.p99),
                    c.ttft_ratio.p50.value,
                    c.ttft_ratio.p99.value,
                    format!("{:.2}/{:.2}", c.tbt_ms.p50, c.tbt_ms.p99),
                    c.tbt_ratio.p99.value,
                    c.completion_ms,
                    c.exits * 100.0,
                    c.held_ms_per_token
                );
            }
        }
        let _ = write!(
            out,
            "\n{}\n{}{}",
            self.headline(),
            self.lost(),
            self.remarks()
        );
        out
    }

    /// Tables for a page of results.
    pub fn markdown(&self) -> String {
        let a = &self.about;
        let mut out = format!(
            "`{}`, {}: {}, {} compute thread{}; model `{}`, exit after {}, threshold {}, fill `{}` unless named; {:.0} s in all.\n\n",
            a.command,
            a.date,
            a.machine,
            a.threads,
            if a.threads == 1 { "" } else { "s" },
            a.model,
            a.exit_layers,
            a.threshold,
            a.fill,
            self.seconds
        );
        out.push_str("| policy | worst cell | median cell | best cell | cells below 0.99 |\n| --- | --- | --- | --- | --- |\n");
        for (policy, s) in &self.policies {
            let _ = writeln!(
                out,
                "| `{policy}` | {:.2} | {:.2} | {:.2} | {} of {} |",
                s.worst, s.median, s.best, s.losing, s.cells
            );
        }
        out.push_str(
            "\n| prompt/answer | in flight | stock's layout | policy | tokens/s | of stock's (95 %) | first token, ms, p50 / p99 | of stock's | \
             between tokens, ms, p50 / p99 | of stock's | completion, ms | exits | held, ms a token |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        for group in self.groups() {
            for c in group {
                let interval = c.throughput().brackets();
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | `{}` | {:.0} | {:.2}{interval} | {:.1} / {:.1} | {:.2} / {:.2} | {:.2} / {:.2} | {:.2} / {:.2} | {:.0} | {:.0} % \
                     | {:.3} |",
                    c.traffic,
                    c.in_flight,
                    group[0].stock_layout,
                    c.policy,
                    c.tokens_per_s,
                    c.ratio_to_stock,
                    c.ttft_ms.p50,
                    c.ttft_ms.p99,
                    c.ttft_ratio.p50.value,
                    c.ttft_ratio.p99.value,
                    c.tbt_ms.p50,
                    c.tbt_ms.p99,
                    c.tbt_ratio.p50.value,
                    c.tbt_ratio.p99.value,
                    c.completion_ms,
                    c.exits * 100.0,
                    c.held_ms_per_token
                );
            }
        }
        let _ = write!(
            out,
            "\n{}\n{}{}.\n",
            self.lost(),
            self.remarks(),
            self.interval
        );
        out
    }

    pub fn html(&self) -> String {
        page::html(self)
    }
}

/// Marks in a page around what is written by a program.
const MARKS: [&str; 2] = ["<!-- figures begin -->", "<!-- figures end -->"];

/// A page with the text between its marks replaced.
pub fn splice(page: &str, figures: &str) -> Result<String> {
    let (Some(begin), Some(end)) = (page.find(MARKS[0]), page.find(MARKS[1])) else {
        bail!("the page has no lines `{}` and `{}`", MARKS[0], MARKS[1]);
    };
    let begin = begin + MARKS[0].len();
    if end < begin {
        bail!("`{}` comes before `{}`", MARKS[1], MARKS[0]);
    }
    Ok(format!(
        "{}\n\n{}\n{}",
        &page[..begin],
        figures.trim_end(),
        &page[end..]
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::traffic::Lengths;
    use serde_json::Value;

    fn contenders() -> Vec<Contender> {
        ["stock+streams", "stock+unified", "off", "auto"]
            .map(|name| Contender {
                name: name.to_owned(),
                program: "x".into(),
                args: Vec::new(),
            })
            .to_vec()
    }

    fn sample(rate: f64, ttft: f64, exits: u64) -> Option<Sample> {
        Some(Sample {
            tokens_per_s: rate,
            requests: 2,
            tokens: 100,
            prompt_tokens: 600,
            ttft_ms: vec![ttft, ttft * 1.1],
            tbt_ms: vec![1.0, 2.0, 4.0],
            completion_ms: vec![1e5 / rate],
            exits,
            ..Sample::default()
        })
    }

    pub fn report() -> Report {
        let field = Field {
            traffic: Traffic::Closed(Lengths {
                prompt: 300,
                answer: 64,
            }),
            in_flight: 16,
            counted: 2,
            capacity: 0.0,
            warm_up: Vec::new(),
            samples: vec![
                vec![
                    sample(1000.0, 10.0, 0),
                    sample(900.0, 10.0, 0),
                    sample(1100.0, 10.0, 0),
                ],
                vec![sample(500.0, 20.0, 0), sample(450.0, 20.0, 0), None],
                vec![
                    sample(1000.0, 10.0, 0),
                    sample(900.0, 10.0, 0),
                    sample(1100.0, 10.0, 0),
                ],
                vec![
                    sample(800.0, 12.0, 50),
                    sample(729.0, 12.0, 50),
                    sample(869.0, 12.0, 50),
                ],
            ],
        };
        let about = About {
            model: "a<b.gguf".into(),
            threads: 1,
            ..About::default()
        };
        Report::new(cells(&contenders(), &field), about, 1.0, 0.0)
    }

    #[test]
    fn ratios_are_those_of_the_same_round() {
        let report = report();
        let of = |policy: &str| report.cells.iter().find(|c| c.policy == policy).unwrap();
        assert_eq!(report.cells[0].policy, "stock");
        assert_eq!(of("stock").layout.as_deref(), Some("streams"));
        assert_eq!(of("stock").ratio_low, None);
        assert_eq!(of("stock+unified").ratio_to_stock, 0.5);
        assert_eq!(of("stock+unified").rounds, 2);
        let auto = of("auto");
        assert_eq!(auto.ratio_rounds, [0.8, 0.81, 0.79]);
        assert_eq!(auto.ratio_to_stock, 0.8);
        assert!(auto.ratio_low.unwrap() < 0.79 && auto.ratio_high.unwrap() > 0.81);
        assert_eq!(auto.exits, 0.5);
        assert_eq!(auto.ttft_ratio.p50.value, 1.2);
        assert_eq!(
            (report.worst_auto, report.median_auto),
            (Some(0.8), Some(0.8))
        );
    }

    #[test]
    fn losing_cells_are_named() {
        let report = report();
        let named: Vec<(&str, &str, bool)> = report
            .losses
            .iter()
            .map(|l| (l.policy.as_str(), l.figure.as_str(), l.clear))
            .collect();
        assert_eq!(
            named,
            [
                ("auto", "tokens/s", true),
                ("auto", "time to first token, p50", true),
                ("auto", "time to first token, p99", true)
            ]
        );
        for text in [report.table(), report.markdown(), report.html()] {
            assert!(text.contains("300/64 at 16, auto: tokens/s 0.80"), "{text}");
        }
    }

    #[test]
    fn the_json_has_the_documented_keys_and_reads_back() {
        let report = report();
        let text = serde_json::to_string(&report).unwrap();
        assert!(!text.contains('\n'));
        let json: Value = serde_json::from_str(&text).unwrap();
        for key in [
            "cells",
            "worst_auto",
            "median_auto",
            "losses",
            "model",
            "threads",
        ] {
            assert!(!json[key].is_null(), "{key}");
        }
        let cell = &json["cells"][3];
        for (key, value) in [
            ("prompt", 300.0),
            ("answer", 64.0),
            ("in_flight", 16.0),
            ("tokens_per_s", 800.0),
            ("ratio_to_stock", 0.8),
            ("exits", 0.5),
        ] {
            assert_eq!(cell[key].as_f64(), Some(value), "{key}");
        }
        assert_eq!(cell["policy"], "auto");
        assert_eq!(cell["stock_layout"], "streams");
        assert!(cell["ratio_low"].is_f64() && cell["ratio_high"].is_f64());
        for times in ["ttft_ms", "tbt_ms"] {
            assert!(cell[times]["p50"].is_f64() && cell[times]["p99"].is_f64());
        }
        let back: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }

    #[test]
    fn reports_of_parts_make_one_report() {
        let whole = report();
        let part = |traffic: &str, idle: f64| {
            let mut cells = whole.cells.clone();
            for cell in &mut cells {
                traffic.clone_into(&mut cell.traffic);
            }
            Report::new(cells, whole.about.clone(), 10.0, idle)
        };
        // In another order than the usual one, and with a load that was measured again.
        let mut stale = part("300/64", 0.1);
        stale.cells[0].tokens_per_s = 1.0;
        let parts = vec![part("chat", 0.2), stale, part("300/64", 0.0)];
        let joined = Report::joined(parts).unwrap();
        assert_eq!((joined.seconds, joined.idle_cpu_max), (30.0, 0.2));
        let expected = [whole.cells.clone(), part("chat", 0.0).cells].concat();
        assert_eq!(joined.cells, expected);
        assert_eq!(joined.losses.len(), 2 * whole.losses.len());

        let mut other = part("chat", 0.0);
        other.about.threads = 7;
        let error = Report::joined(vec![other, part("300/64", 0.0)])
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("7 threads"), "{error}");
        assert!(Report::joined(Vec::new()).is_err());
    }

    #[test]
    fn figures_go_between_the_marks() {
        let page = "# Title\n<!-- figures begin -->\nold\n<!-- figures end -->\nrest\n";
        let new = splice(page, "| a |\n").unwrap();
        assert_eq!(
            new,
            "# Title\n<!-- figures begin -->\n\n| a |\n<!-- figures end -->\nrest\n"
        );
        assert_eq!(splice(&new, "| a |\n").unwrap(), new);
        assert!(
            splice("nothing", "x")
                .unwrap_err()
                .to_string()
                .contains("no lines")
        );
    }
}
