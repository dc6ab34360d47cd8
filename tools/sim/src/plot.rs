// SPDX-License-Identifier: Apache-2.0

//! Plots as SVG: throughput and p99 time between tokens, with the limit.

use drex_svg::{Anchor, Axis, Picture};

use crate::grid::Cell;
use crate::run::Report;

/// A picture of its own: with a ground, in light and dark. Each policy has a colour, and what no policy reaches is dashed.
const STYLE: &str = ":root{color-scheme:light dark}.page{fill:#fff}text{font:11px sans-serif;fill:#333}.t{font-weight:bold;\
font-size:13px}.axis{stroke:#999}.grid{stroke:#e4e4e4}.limit{stroke:#777;stroke-dasharray:4 3;fill:#777}\
.off{stroke:#8a8f99;fill:#8a8f99}.eager{stroke:#b03a5b;fill:#b03a5b}.lazy{stroke:#7a6a4f;fill:#7a6a4f}.median{stroke:#a0529b;\
fill:#a0529b}.mean{stroke:#c98fc4;fill:#c98fc4}.latency{stroke:#2a7fb8;fill:#2a7fb8}.hold{stroke:#0f766e;fill:#0f766e}\
.art{stroke:#c77700;fill:#c77700}.best{stroke:#444;fill:#444}.auto{stroke:#1a8f4a;fill:#1a8f4a}line,polyline{stroke-width:1.6;\
fill:none!important}.grid,.axis{stroke-width:1}.limit{stroke-width:1.2}text.l{stroke:none}\
@media(prefers-color-scheme:dark){.page{fill:#1c1f25}text{fill:#ddd}.axis{stroke:#777}.grid{stroke:#31353d}.limit{stroke:#aaa;\
fill:#aaa}.best{stroke:#ccc;fill:#ccc}.lazy{stroke:#b09a72;fill:#b09a72}.median{stroke:#c77fc2;fill:#c77fc2}.hold{stroke:#2dac9f;\
fill:#2dac9f}.eager{stroke:#dc6486;fill:#dc6486}.latency{stroke:#58a6d8;fill:#58a6d8}.auto{stroke:#35b468;fill:#35b468}}";

type Series = (&'static str, fn(&Cell) -> f64);

const RATES: [Series; 6] = [
    ("limit", |c| c.limit / c.off.tokens_per_s),
    ("art", |c| c.ratio(&c.art)),
    ("latency", |c| c.ratio(&c.latency)),
    ("eager", |c| c.ratio(&c.eager)),
    ("best", |c| c.ratio(&c.best)),
    ("auto", |c| c.vs_off()),
];

const WAITS: [Series; 4] = [
    ("off", |_| 1.0),
    ("art", |c| c.art.tbt_p99_ms / c.off.tbt_p99_ms),
    ("latency", |c| c.latency.tbt_p99_ms / c.off.tbt_p99_ms),
    ("auto", |c| c.auto.tbt_p99_ms / c.off.tbt_p99_ms),
];

const PANEL: (f64, f64) = (150.0, 110.0);
/// From a panel to the next one.
const STEP: (f64, f64) = (166.0, 158.0);
const LEFT: f64 = 52.0;

/// A panel for each regime, size and depth, all on the same axes. Above: throughput, below: p99 time between tokens, both
/// relative to no early exit.
pub fn grid(cells: &[Cell]) -> String {
    let mut classes: Vec<&str> = cells.iter().map(|c| c.class.name).collect();
    classes.dedup();
    let mut depths: Vec<f64> = cells.iter().map(|c| c.a).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    let mut sizes: Vec<(u32, u32)> = cells.iter().map(|c| (c.n, c.batch)).collect();
    sizes.sort_unstable();
    sizes.dedup();

    let class_height = 30.0 + STEP.1 * depths.len() as f64;
    let half = 66.0 + class_height * classes.len() as f64;
    let width = (LEFT + STEP.0 * sizes.len() as f64 + 8.0).max(760.0);
    let height = 2.0 * half + 20.0;
    let mut out = Picture::file(width, height, STYLE);
    out.bar("page", (0.0, 0.0), (width, height), 0.0);
    for (part, (title, series)) in [
        (
            "Throughput relative to no early exit, by the chance p to exit at the ramp",
            &RATES[..],
        ),
        (
            "p99 time between tokens relative to no early exit, by the chance p to exit at the ramp",
            &WAITS[..],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let top = part as f64 * half + 26.0;
        out.text("t", (LEFT, top), Anchor::Start, title);
        for (k, (name, _)) in series.iter().enumerate() {
            let (x, y) = (LEFT + 90.0 * k as f64, top + 20.0);
            out.line(name, (x, y - 4.0), (x + 20.0, y - 4.0));
            out.text("", (x + 26.0, y), Anchor::Start, said(name));
        }
        let scale = Scale::of(cells, series, part == 1);
        for (i, class) in classes.iter().enumerate() {
            let above = top + 44.0 + class_height * i as f64;
            out.text("t", (LEFT, above + 8.0), Anchor::Start, in_words(class));
            for (row, a) in depths.iter().enumerate() {
                let y0 = above + 44.0 + STEP.1 * row as f64;
                for (column, (n, batch)) in sizes.iter().enumerate() {
                    let x0 = LEFT + STEP.0 * column as f64;
                    let here: Vec<&Cell> = cells
                        .iter()
                        .filter(|c| c.class.name == *class && c.a == *a && (c.n, c.batch) == (*n, *batch))
                        .collect();
                    panel(&mut out, &here, series, &scale, (x0, y0), column == 0);
                }
            }
        }
    }
    out.finish() + "\n"
}

/// What a line of that name is.
fn said(name: &str) -> &str {
    match name {
        "best" => "best rule",
        name => name,
    }
}

fn in_words(class: &str) -> &str {
    match class {
        "memory" => "Memory-bound: reading the weights takes the time, a row more next to none",
        "mixed" => "Mixed: twenty rows take as long as reading the weights",
        "compute" => "Compute-bound: each row takes as long as reading the weights",
        other => other,
    }
}

/// The values' axis of all panels of a part.
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
    ticks: Vec<f64>,
}

impl Scale {
    fn of(cells: &[Cell], series: &[Series], logarithmic: bool) -> Scale {
        let all: Vec<f64> = cells
            .iter()
            .flat_map(|c| series.iter().map(move |s| (s.1)(c)))
            .filter(|value| value.is_finite() && *value > 0.0)
            .collect();
        let (least, most) = all
            .iter()
            .fold((1.0_f64, 1.0_f64), |(l, m), v| (l.min(*v), m.max(*v)));
        let (low, high) = if logarithmic {
            (least * 0.9, most * 1.1)
        } else {
            (0.0, most.ceil().max(2.0))
        };
        let marks: &[f64] = if logarithmic {
            &[0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
        } else {
            &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        };
        let ticks = marks.iter().copied().filter(|t| (low..=high).contains(t));
        Scale {
            low,
            high,
            logarithmic,
            ticks: ticks.collect(),
        }
    }

    fn axis(&self, places: (f64, f64)) -> Axis {
        let values = (self.low, self.high);
        match self.logarithmic {
            true => Axis::logarithmic(values, places),
            false => Axis::linear(values, places),
        }
    }
}

fn panel(
    out: &mut Picture,
    cells: &[&Cell],
    series: &[Series],
    scale: &Scale,
    (x0, y0): (f64, f64),
    first: bool,
) {
    let Some(c) = cells.first() else { return };
    let (w, h) = PANEL;
    let size = format!("{} requests, batch {}", c.n, c.batch);
    out.text("", (x0, y0 - 17.0), Anchor::Start, size);
    let depth = format!("ramp at {:.0} % of the layers", 100.0 * c.a);
    out.text("", (x0, y0 - 4.0), Anchor::Start, depth);
    let y = scale.axis((y0 + h, y0));
    for tick in &scale.ticks {
        let class = if *tick == 1.0 { "axis" } else { "grid" };
        out.line(class, (x0, y.at(*tick)), (x0 + w, y.at(*tick)));
        if first {
            out.text("", (x0 - 6.0, y.at(*tick) + 4.0), Anchor::End, tick);
        }
    }
    let x = Axis::linear((0.0, 1.0), (x0, x0 + w));
    for c in cells {
        let label = format!("p {}", c.p);
        out.text("", (x.at(c.p), y0 + h + 13.0), Anchor::Middle, label);
    }
    for (name, value) in series {
        let points = cells.iter().map(|c| (x.at(c.p), y.at(value(c))));
        out.trace(name, points);
    }
}

/// Bars of throughput and p99 time between tokens, one per policy.
pub fn runs(runs: &[Report], limit: Option<f64>) -> String {
    let row = 26.0;
    let (width, height) = (760.0, 70.0 + row * runs.len() as f64);
    let mut out = Picture::file(width, height, STYLE);
    out.bar("page", (0.0, 0.0), (width, height), 0.0);
    let most = runs
        .iter()
        .map(|r| r.tokens_per_s)
        .chain(limit)
        .fold(1e-9, f64::max);
    let slow = runs.iter().map(|r| r.tbt_p99_ms).fold(1e-9, f64::max);
    let rates = Axis::linear((0.0, most), (110.0, 390.0));
    let waits = Axis::linear((0.0, slow), (470.0, 670.0));
    out.text("t", (110.0, 20.0), Anchor::Start, "tokens/s");
    let title = "p99 time between tokens, ms";
    out.text("t", (470.0, 20.0), Anchor::Start, title);
    for (i, r) in runs.iter().enumerate() {
        let y = 34.0 + row * i as f64;
        let class = r.name.split(':').next().unwrap_or("");
        out.text("", (10.0, y + 12.0), Anchor::Start, &r.name);
        for (axis, value, text) in [
            (rates, r.tokens_per_s, format!("{:.0}", r.tokens_per_s)),
            (waits, r.tbt_p99_ms, format!("{:.1}", r.tbt_p99_ms)),
        ] {
            let (from, to) = (axis.at(0.0), axis.at(value));
            out.bar(class, (from, y), (to - from, 16.0), 0.0);
            out.text("l", (to + 6.0, y + 12.0), Anchor::Start, text);
        }
    }
    if let Some(limit) = limit {
        let (x, bottom) = (rates.at(limit), 34.0 + row * runs.len() as f64);
        out.line("limit", (x, 28.0), (x, bottom));
        out.text("", (x - 12.0, bottom + 14.0), Anchor::Start, "limit");
    }
    out.finish() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::{Options, cell};
    use crate::profiles::CLASSES;
    use crate::run::{Contender, Filling, Setup, run};
    use crate::workload::Workload;
    use drex::core::config::Policy;
    use drex_svg::page;

    #[test]
    fn every_policy_and_every_line_has_a_style() {
        let names = Policy::ALL.map(Policy::name);
        let lines = RATES.iter().chain(&WAITS).map(|(name, _)| *name);
        for name in names.into_iter().chain(lines) {
            assert!(STYLE.contains(&format!(".{name}{{")), "{name}");
        }
    }

    fn cells() -> Vec<Cell> {
        let options = Options {
            tokens: 300,
            seed: 1,
            noise: 0.0,
            outliers: 0.0,
            spread: 0.0,
            drift: 0.0,
            wrong: 1.0,
            filling: Filling::COPY,
            prompt_share: 0.0,
            pass_rows: 0,
        };
        let mut all = Vec::new();
        for class in CLASSES {
            // One that ran, in all places.
            let ran = cell(class, 8, 8, 0.25, 0.5, &options).unwrap();
            for (n, batch) in [(8, 8), (16, 8), (32, 16), (64, 64), (96, 64), (128, 64)] {
                for a in [0.25, 0.5] {
                    for p in [0.2, 0.5, 0.8] {
                        all.push(Cell {
                            n,
                            batch,
                            a,
                            p,
                            ..ran.clone()
                        });
                    }
                }
            }
        }
        all
    }

    #[test]
    fn pages_to_look_at() {
        let grid = grid(&cells());
        assert_eq!(
            page::faults(&grid.replace("http://www.w3.org/2000/svg", "")),
            [""; 0]
        );
        // 36 panels in each of two parts, with their sizes, depths and the mark of 1; numbers beside the first of a row.
        for (text, count) in [
            (">8 requests, batch 8<", 2 * 3 * 2),
            ("ramp at 25 % of the layers", 2 * 3 * 6),
            ("class=\"axis\"", 2 * 36),
            (">1</text>", 2 * 6),
            (">p 0.5</text>", 2 * 36),
            (">Memory-bound: ", 2),
        ] {
            assert_eq!(grid.matches(text).count(), count, "{text}");
        }
        page::leave("sim-grid.svg", &grid);

        let setup = Setup {
            profile: CLASSES[0].profile(16, &[4]),
            workload: Workload::closed(8, vec![0.5], 1),
            batch: 8,
            pass_rows: 8,
            max_hold_ns: 0,
            max_requests: 8,
            thresholds: vec![0.5],
            tokens: 300,
            noise: 0.0,
            outliers: 0.0,
            gap_ns: 0.0,
            start: None,
            filling: Filling::COPY,
            quality: drex::core::config::Quality::Given,
        };
        let contenders = Policy::ALL.map(|p| Contender::parse(p.name()).unwrap());
        let all: Vec<Report> = contenders.iter().map(|c| run(&setup, c).unwrap()).collect();
        let bars = runs(&all, Some(1e3));
        assert_eq!(bars.matches("<rect").count(), 1 + 2 * all.len());
        page::leave("sim-runs.svg", &bars);
    }
}
