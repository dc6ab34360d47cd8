// SPDX-License-Identifier: Apache-2.0

//! Plots as SVG: throughput and p99 time between tokens, with the limit.

use std::fmt::Write;

use crate::grid::Cell;
use crate::run::Report;

const STYLE: &str = "<style>text{font:11px sans-serif;fill:#333}.t{font-weight:bold}.axis{stroke:#bbb}.limit{stroke:#888;\
stroke-dasharray:4 3;fill:none}.off{stroke:#999;fill:#999}.art{stroke:#c77700;fill:#c77700}.latency{stroke:#2a7fb8;fill:#2a7fb8}\
.eager{stroke:#b03a5b;fill:#b03a5b}.best{stroke:#555;fill:#555}.auto{stroke:#1a8f4a;fill:#1a8f4a}line,polyline{stroke-width:1.6;\
fill:none!important}text.l{stroke:none}@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#555}.best{stroke:#ccc;fill:#ccc}}</style>";

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
    let mut out = head(columns as f64 * (w + 24.0) + 30.0, 2.0 * half + 30.0);
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
        let _ = write!(out, "<text class=\"t\" x=\"20\" y=\"{top}\">{title}</text>");
        for (k, (name, _)) in series.iter().enumerate() {
            let x = 460.0 + 75.0 * k as f64;
            let _ = write!(
                out,
                "<line class=\"{name}\" x1=\"{x}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\"/><text x=\"{}\" y=\"{top}\">{name}</text>",
                x + 16.0,
                x + 20.0,
                y = top - 4.0
            );
        }
        for (i, panel) in panels.iter().enumerate() {
            let x0 = 24.0 + (i % columns) as f64 * (w + 24.0);
            let y0 = top + 24.0 + (i / columns) as f64 * (h + 34.0);
            self::panel(&mut out, panel, series, part == 1, (x0, y0, w, h));
        }
    }
    out + "</svg>\n"
}

fn panel(
    out: &mut String,
    cells: &[Cell],
    series: &[Series],
    log: bool,
    (x0, y0, w, h): (f64, f64, f64, f64),
) {
    let c = &cells[0];
    let _ = write!(
        out,
        "<text x=\"{x0}\" y=\"{}\">{} {}/{} a={}</text><line class=\"axis\" x1=\"{x0}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>",
        y0 - 4.0,
        c.class.name,
        c.n,
        c.batch,
        c.a,
        x0 + w,
        y0 + h,
        y0 + h
    );
    let scale = |v: f64| if log { v.max(1e-3).ln() } else { v };
    let all = || {
        cells
            .iter()
            .flat_map(|c| series.iter().map(move |s| scale((s.1)(c))))
    };
    let high = all().fold(scale(1.1), f64::max);
    let low = all().fold(scale(0.9), f64::min);
    let y = |v: f64| y0 + (high - scale(v)) / (high - low) * h;
    let _ = write!(
        out,
        "<line class=\"axis\" x1=\"{x0}\" x2=\"{}\" y1=\"{one}\" y2=\"{one}\"/><text x=\"{}\" y=\"{}\">1</text>",
        x0 + w,
        x0 - 10.0,
        y(1.0) + 4.0,
        one = y(1.0)
    );
    for (name, value) in series {
        let points: Vec<String> = cells
            .iter()
            .map(|c| format!("{:.1},{:.1}", x0 + c.p * w, y(value(c))))
            .collect();
        let _ = write!(
            out,
            "<polyline class=\"{name}\" points=\"{}\"/>",
            points.join(" ")
        );
    }
}

/// Bars of throughput and p99 time between tokens, one per policy.
pub fn runs(runs: &[Report], limit: Option<f64>) -> String {
    let (width, row) = (760.0, 26.0);
    let mut out = head(width, 70.0 + row * runs.len() as f64);
    let most = runs
        .iter()
        .map(|r| r.tokens_per_s)
        .chain(limit)
        .fold(0.0, f64::max);
    let slow = runs.iter().map(|r| r.tbt_p99_ms).fold(0.0, f64::max);
    let _ = write!(
        out,
        "<text class=\"t\" x=\"110\" y=\"20\">tokens/s</text><text class=\"t\" x=\"470\" y=\"20\">p99 time between tokens, ms</text>"
    );
    for (i, r) in runs.iter().enumerate() {
        let y = 34.0 + row * i as f64;
        let class = r.name.split(':').next().unwrap_or("");
        let (a, b) = (
            r.tokens_per_s / most * 280.0,
            r.tbt_p99_ms / slow.max(1e-9) * 200.0,
        );
        let _ = write!(
            out,
            "<text x=\"10\" y=\"{t}\">{name}</text><rect class=\"{class}\" x=\"110\" y=\"{y}\" width=\"{a:.1}\" height=\"16\"/>\
             <text class=\"l\" x=\"{ax:.1}\" y=\"{t}\">{rate:.0}</text><rect class=\"{class}\" x=\"470\" y=\"{y}\" width=\"{b:.1}\" \
             height=\"16\"/><text class=\"l\" x=\"{bx:.1}\" y=\"{t}\">{p99:.1}</text>",
            t = y + 12.0,
            name = r.name,
            ax = 116.0 + a,
            bx = 476.0 + b,
            rate = r.tokens_per_s,
            p99 = r.tbt_p99_ms
        );
    }
    if let Some(limit) = limit {
        let x = 110.0 + limit / most * 280.0;
        let bottom = 34.0 + row * runs.len() as f64;
        let _ = write!(
            out,
            "<line class=\"limit\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"28\" y2=\"{bottom}\"/><text x=\"{:.1}\" y=\"{}\">limit</text>",
            x - 12.0,
            bottom + 14.0
        );
    }
    out + "</svg>\n"
}

fn head(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\">{STYLE}"
    )
}
