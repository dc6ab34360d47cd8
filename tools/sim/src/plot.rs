// SPDX-License-Identifier: Apache-2.0

//! Plots as SVG: throughput and p99 time between tokens, with the limit.

use drex_svg::{Anchor, Axis, Picture};

use crate::grid::Cell;
use crate::run::Report;

const STYLE: &str = "text{font:11px sans-serif;fill:#333}.t{font-weight:bold}.axis{stroke:#bbb}.limit{stroke:#888;\
stroke-dasharray:4 3;fill:none}.off{stroke:#999;fill:#999}.art{stroke:#c77700;fill:#c77700}.latency{stroke:#2a7fb8;fill:#2a7fb8}\
.eager{stroke:#b03a5b;fill:#b03a5b}.best{stroke:#555;fill:#555}.auto{stroke:#1a8f4a;fill:#1a8f4a}line,polyline{stroke-width:1.6;\
fill:none!important}text.l{stroke:none}@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#555}.best{stroke:#ccc;fill:#ccc}}";

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

/// A panel for each regime, size and depth; p from left to right. Above:
/// throughput, below: p99 time between tokens, both relative to no early exit.
pub fn grid(cells: &[Cell]) -> String {
    let (w, h) = (150.0, 120.0);
    let panels: Vec<&[Cell]> = cells.chunks(3).collect();
    let columns = 6;
    let rows = panels.len().div_ceil(columns);
    let half = rows as f64 * (h + 34.0) + 40.0;
    let width = columns as f64 * (w + 24.0) + 30.0;
    let mut out = Picture::file(width, 2.0 * half + 30.0, STYLE);
    for (part, (title, series)) in [
        ("Throughput relative to no early exit, over p", &RATES[..]),
        (
            "p99 time between tokens relative to no early exit (logarithmic), over p",
            &WAITS[..],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let top = part as f64 * half + 18.0;
        out.text("t", (20.0, top), Anchor::Start, title);
        for (k, (name, _)) in series.iter().enumerate() {
            let (x, y) = (460.0 + 75.0 * k as f64, top - 4.0);
            out.line(name, (x, y), (x + 16.0, y));
            out.text("", (x + 20.0, top), Anchor::Start, name);
        }
        for (i, panel) in panels.iter().enumerate() {
            let x0 = 24.0 + (i % columns) as f64 * (w + 24.0);
            let y0 = top + 24.0 + (i / columns) as f64 * (h + 34.0);
            self::panel(&mut out, panel, series, part == 1, (x0, y0, w, h));
        }
    }
    out.finish() + "\n"
}

fn panel(
    out: &mut Picture,
    cells: &[Cell],
    series: &[Series],
    logarithmic: bool,
    (x0, y0, w, h): (f64, f64, f64, f64),
) {
    let c = &cells[0];
    let title = format!("{} {}/{} a={}", c.class.name, c.n, c.batch, c.a);
    out.text("", (x0, y0 - 4.0), Anchor::Start, title);
    out.line("axis", (x0, y0 + h), (x0 + w, y0 + h));
    let all = || {
        cells
            .iter()
            .flat_map(|c| series.iter().map(move |s| (s.1)(c)))
    };
    let high = all().fold(1.1, f64::max);
    let low = all().fold(0.9, f64::min);
    let y = if logarithmic {
        Axis::logarithmic((low.max(1e-3), high), (y0 + h, y0))
    } else {
        Axis::linear((low, high), (y0 + h, y0))
    };
    let x = Axis::linear((0.0, 1.0), (x0, x0 + w));
    let one = y.at(1.0);
    out.line("axis", (x0, one), (x0 + w, one));
    out.text("", (x0 - 10.0, one + 4.0), Anchor::Start, 1);
    for (name, value) in series {
        out.trace(name, cells.iter().map(|c| (x.at(c.p), y.at(value(c)))));
    }
}

/// Bars of throughput and p99 time between tokens, one per policy.
pub fn runs(runs: &[Report], limit: Option<f64>) -> String {
    let row = 26.0;
    let mut out = Picture::file(760.0, 70.0 + row * runs.len() as f64, STYLE);
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
