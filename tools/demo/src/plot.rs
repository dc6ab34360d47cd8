// SPDX-License-Identifier: Apache-2.0

//! The report's plots, coloured by the page's style so that they follow its light and dark modes.

use drex_svg::{Anchor, Axis, Picture, page};

use crate::{
    cells::Cell,
    options::{LAYOUTS, OFF, REFERENCE, base},
};

/// The least and the greatest of the rounds.
fn spread(cell: &Cell) -> (f64, f64) {
    let ends = (cell.ratio, cell.ratio);
    let rounds = cell.ratio_rounds.iter();
    rounds.fold(ends, |(low, high), r| (low.min(*r), high.max(*r)))
}

/// What one policy brought: a row for each load, with the median of its rounds and how far they lie apart.
pub fn brought(cells: &[&Cell]) -> String {
    let (width, left, right, row, top) = (400.0, 92.0, 44.0, 24.0, 26.0);
    let ends = cells.iter().flat_map(|c| [spread(c).0, spread(c).1]);
    let ((low, high), step) = Axis::round(ends, (0.9, 1.1));
    let x = Axis::linear((low, high), (left, width - right));
    let height = top + row * cells.len() as f64 + 4.0;
    let mut out = Picture::in_page(
        width,
        height,
        "Tokens per second relative to the unpatched server, by load",
    );
    for i in 0..=((high - low) / step).round() as u32 {
        let value = low + f64::from(i) * step;
        let class = if (value - 1.0).abs() < 1e-9 {
            "axis"
        } else {
            "grid"
        };
        out.line(class, (x.at(value), top - 4.0), (x.at(value), height));
        out.text(
            "",
            (x.at(value), top - 10.0),
            Anchor::Middle,
            format!("{value:.1}"),
        );
    }
    for (i, cell) in cells.iter().enumerate() {
        let y = top + row * (i as f64 + 0.5);
        let load = format!("{} at {}", cell.traffic, cell.concurrency);
        out.text("", (left - 12.0, y + 4.0), Anchor::End, load);
        let class = class(&cell.policy);
        let (low, high) = spread(cell);
        let title = format!(
            "{} at {} in flight: {:.2}, rounds from {low:.2} to {high:.2}",
            cell.traffic, cell.concurrency, cell.ratio
        );
        out.group("hit", &title, |out| {
            out.line(
                &format!("trace spread {class}"),
                (x.at(low), y),
                (x.at(high), y),
            );
            out.dot(&format!("dot fill {class}"), (x.at(cell.ratio), y), 5.0);
        });
        let value = format!("{:.2}", cell.ratio);
        out.text(
            "strong",
            (width - right + 10.0, y + 4.0),
            Anchor::Start,
            value,
        );
    }
    format!("<div class=\"brought\">{}</div>", out.finish())
}

/// The class that carries a policy's colour.
pub fn class(policy: &str) -> &'static str {
    match base(policy) {
        OFF => "off",
        // Its speculation is a contender of its own.
        REFERENCE if !LAYOUTS.contains(&policy) => "other",
        REFERENCE => "reference",
        "eager" => "eager",
        "art" => "art",
        "latency" => "latency",
        "hold" => "hold",
        "auto" => "auto",
        _ => "other",
    }
}

fn levels(cells: &[&Cell]) -> Vec<u16> {
    let mut levels: Vec<u16> = cells.iter().map(|c| c.concurrency).collect();
    levels.sort_unstable();
    levels.dedup();
    levels
}

/// Throughput ratio over concurrency, a line per policy. The concurrencies are spaced evenly: they are powers of two.
pub fn ratio(cells: &[&Cell], policies: &[&str]) -> String {
    let (width, height, left, right, top, bottom) = (860.0, 330.0, 44.0, 184.0, 14.0, 44.0);
    let levels = levels(cells);
    let ends = cells.iter().flat_map(|c| [spread(c).0, spread(c).1]);
    let ((low, high), step) = Axis::round(ends, (0.9, 1.1));
    let y = Axis::linear((low, high), (height - bottom, top));
    let last = levels.len().saturating_sub(1).max(1) as f64;
    let across = Axis::linear((0.0, last), (left + 20.0, width - right - 20.0));
    let x = |level: u16| match levels.iter().position(|l| *l == level) {
        _ if levels.len() < 2 => (left + width - right) / 2.0,
        index => across.at(index.unwrap_or(0) as f64),
    };

    let mut out = Picture::in_page(width, height, "Throughput ratio by requests in flight");
    for i in 0..=((high - low) / step).round() as u32 {
        let value = low + f64::from(i) * step;
        let at = y.at(value);
        out.line("grid", (left, at), (width - right, at));
        out.text(
            "",
            (left - 8.0, at + 4.0),
            Anchor::End,
            format!("{value:.1}"),
        );
    }
    let one = y.at(1.0);
    out.line("axis", (left, one), (width - right, one));
    for level in &levels {
        out.text(
            "",
            (x(*level), height - bottom + 20.0),
            Anchor::Middle,
            level,
        );
    }
    let middle = (left + width - right) / 2.0;
    out.text(
        "",
        (middle, height - 6.0),
        Anchor::Middle,
        "requests in flight",
    );
    let mut names = Vec::new();
    for policy in policies {
        let mut points: Vec<&&Cell> = cells.iter().filter(|c| c.policy == *policy).collect();
        points.sort_by_key(|cell| cell.concurrency);
        let Some(last) = points.last() else {
            continue;
        };
        names.push((y.at(last.ratio), (*policy).to_owned()));
        let place = |cell: &Cell| (x(cell.concurrency), y.at(cell.ratio));
        let class = class(policy);
        out.trace(&format!("trace {class}"), points.iter().map(|c| place(c)));
        for cell in points {
            let rounds: Vec<_> = cell
                .ratio_rounds
                .iter()
                .map(|r| format!("{r:.2}"))
                .collect();
            let title = format!(
                "{policy} at {} in flight: {:.2}x (rounds {}), {:.0} tokens/s",
                cell.concurrency,
                cell.ratio,
                rounds.join(", "),
                cell.tokens_per_s
            );
            let ((low, high), (at, _)) = (spread(cell), place(cell));
            out.group("hit", &title, |out| {
                out.line(
                    &format!("trace spread {class}"),
                    (at, y.at(low)),
                    (at, y.at(high)),
                );
                out.dot(&format!("dot fill {class}"), place(cell), 5.0);
            });
        }
    }
    out.names("strong", width - right + 6.0, names);
    page::scrolling(&out.finish())
}

/// So many digits as mean something.
fn ms(value: f64) -> String {
    let digits = usize::from(value < 100.0);
    format!("{value:.digits$}")
}

/// A panel per concurrency: for each policy the median in front of the 99th percentile.
pub fn time_between_tokens(cells: &[&Cell]) -> String {
    let panel = |level: u16| {
        let here: Vec<_> = cells.iter().filter(|c| c.concurrency == level).collect();
        let (row, left, right) = (30.0, 4.0, 150.0);
        let height = 26.0 + row * here.len() as f64;
        let most = here
            .iter()
            .map(|c| c.tbt_ms.1.max(c.tbt_ms.0))
            .fold(1e-6, f64::max);
        let x = Axis::linear((0.0, most), (left, right));
        let mut out = Picture::in_page(
            236.0,
            height,
            &format!("Time between tokens at {level} in flight"),
        );
        let title = format!("{level} in flight");
        out.text("strong", (left, 13.0), Anchor::Start, title);
        for (i, cell) in here.iter().enumerate() {
            let top = 24.0 + row * i as f64;
            let (p50, p99) = cell.tbt_ms;
            let wide = |value: f64| (x.at(value) - left).max(1.5);
            let class = class(&cell.policy);
            let title = format!(
                "{} at {level} in flight: p50 {p50:.2} ms, p99 {p99:.2} ms",
                cell.policy
            );
            out.group("hit", &title, |out| {
                out.bar(
                    &format!("fill pale {class}"),
                    (left, top),
                    (wide(p99), 20.0),
                    3.0,
                );
                out.bar(
                    &format!("fill {class}"),
                    (left, top + 5.0),
                    (wide(p50), 10.0),
                    2.0,
                );
                let end = left + wide(p99.max(p50)) + 5.0;
                out.text(
                    "",
                    (end, top + 14.0),
                    Anchor::Start,
                    format!("{} / {}", ms(p50), ms(p99)),
                );
            });
        }
        out.finish()
    };
    levels(cells).into_iter().map(panel).collect()
}

/// A stacked bar per policy and concurrency. The ramps get the tones of one colour, the earliest the strongest.
pub fn exit_share(cells: &[&Cell], policies: &[&str]) -> String {
    let mut layers: Vec<u32> = cells
        .iter()
        .flat_map(|c| c.exit_share.keys().copied())
        .collect();
    layers.sort_unstable();
    layers.dedup();
    if layers.is_empty() {
        return "<p class=\"note\">No token left early.</p>".into();
    }
    let tone = |layer: &u32| 1 + layers.iter().position(|l| l == layer).unwrap_or(0).min(2);
    let legend: String = layers
        .iter()
        .map(|layer| {
            format!(
                "<span><i class=\"key ramp{}\"></i>after layer {layer}</span>",
                tone(layer)
            )
        })
        .collect();
    // Policies with their bars.
    let shown: Vec<(&str, Vec<&&Cell>)> = policies
        .iter()
        .map(|policy| {
            let exits = |c: &&&Cell| c.policy == *policy && !c.exit_share.is_empty();
            (*policy, cells.iter().filter(exits).collect())
        })
        .filter(|(_, bars): &(_, Vec<_>)| !bars.is_empty())
        .collect();
    let (left, right, row, gap) = (110.0, 790.0, 20.0, 12.0);
    let bars: usize = shown.iter().map(|(_, bars)| bars.len()).sum();
    let height = 4.0 + row * bars as f64 + gap * shown.len() as f64;
    let mut out = Picture::in_page(860.0, height, "Share of tokens by exit ramp");
    let mut top = 4.0;
    for (policy, bars) in shown {
        out.text("strong", (0.0, top + 13.0), Anchor::Start, policy);
        for cell in bars {
            out.text("", (left - 8.0, top + 13.0), Anchor::End, cell.concurrency);
            out.line("grid", (left, top + 8.0), (right, top + 8.0));
            let mut x = left;
            for (layer, share) in &cell.exit_share {
                let wide = share * (right - left);
                let title = format!(
                    "{policy} at {} in flight: {:.1} % after layer {layer}",
                    cell.concurrency,
                    share * 100.0
                );
                out.group("hit", &title, |out| {
                    // A gap between the tones, where there is room for one.
                    let wide = (wide - 2.0).max(wide.min(0.5));
                    out.bar(&format!("ramp{}", tone(layer)), (x, top), (wide, 16.0), 2.0);
                });
                x += wide;
            }
            let total: f64 = cell.exit_share.values().sum();
            let share = format!("{:.0} %", total * 100.0);
            out.text("", (x + 6.0, top + 13.0), Anchor::Start, share);
            top += row;
        }
        top += gap;
    }
    let picture = page::scrolling(&out.finish());
    format!("<div class=\"legend\">{legend}</div>{picture}")
}
