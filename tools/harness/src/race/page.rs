// SPDX-License-Identifier: Apache-2.0
//! The report as a page: one file, no outside resources, plots that follow the light and the dark mode.

use std::fmt::Write;

use drex_svg::{Anchor, Axis, Picture, escape, page};

use super::report::{Cell, LEAST_THROUGHPUT, MOST_TBT, MOST_TTFT, Ratio, Report};

/// A row for each cell with a dot at its ratio and a bar over its interval, on a logarithmic axis around 1.
fn forest(cells: &[&Cell], ratio: &dyn Fn(&Cell) -> Ratio, bound: f64, what: &str) -> String {
    if cells.is_empty() {
        return "<p class=\"note\">Not measured.</p>".into();
    }
    let (width, left, right, row, top) = (860.0, 250.0, 96.0, 17.0, 24.0);
    let ratios: Vec<Ratio> = cells.iter().map(|c| ratio(c)).collect();
    let ends = |r: &Ratio| [r.value, r.low.unwrap_or(r.value), r.high.unwrap_or(r.value)];
    let all: Vec<f64> = ratios.iter().flat_map(ends).filter(|v| *v > 0.0).collect();
    // An interval of few rounds may be wide: the axis ends where figures do.
    let low = all.iter().copied().fold(0.8, f64::min).max(0.1);
    let high = all.iter().copied().fold(1.25, f64::max).min(10.0);
    let x = Axis::logarithmic((low, high), (left, width - right));
    let height = top + row * cells.len() as f64 + 8.0;
    let mut out = Picture::in_page(width, height, what);
    for tick in [0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0] {
        if x.has(tick) {
            let class = if tick == 1.0 { "axis" } else { "grid" };
            let at = x.at(tick);
            out.line(class, (at, top), (at, height - 6.0));
            out.text("", (at, top - 8.0), Anchor::Middle, tick);
        }
    }
    let mut last = None;
    for (i, (cell, r)) in cells.iter().zip(&ratios).enumerate() {
        let y = top + row * (i as f64 + 0.5);
        let load = (cell.traffic.as_str(), cell.in_flight);
        if last != Some(load) {
            let name = format!("{} at {}", load.0, load.1);
            out.text("strong", (0.0, y + 4.0), Anchor::Start, name);
            last = Some(load);
        }
        let class = if r.loses(bound) { "loss" } else { "good" };
        let interval = r.brackets();
        out.text("", (left - 10.0, y + 4.0), Anchor::End, &cell.policy);
        let title = format!(
            "{}, {} at {}: {:.3}{interval}",
            cell.policy, cell.traffic, cell.in_flight, r.value
        );
        out.group(&format!("hit {class}"), &title, |out| {
            if let (Some(low), Some(high)) = (r.low, r.high) {
                out.line("bar", (x.at(low), y), (x.at(high), y));
            }
            out.dot("", (x.at(r.value), y), 4.0);
        });
        let value = format!("{:.2}", r.value);
        out.text("", (width - right + 10.0, y + 4.0), Anchor::Start, value);
    }
    page::scrolling(&out.finish())
}

pub fn html(report: &Report) -> String {
    let about = &report.about;
    let policies: Vec<&Cell> = report.cells.iter().filter(|c| !c.is_stock()).collect();
    let mut headline = String::new();
    if let (Some(worst), Some(median)) = (report.worst_auto, report.median_auto) {
        let _ = write!(
            headline,
            "<p class=\"lead\"><b>auto</b>: worst cell <b>{worst:.2}&times;</b> ({}), median cell <b>{median:.2}&times;</b> the \
             tokens/s of the fastest unpatched server.</p>",
            escape(report.worst_auto_cell.as_deref().unwrap_or_default())
        );
    }
    let mut rows = String::new();
    for c in &report.cells {
        let ratio = c.throughput();
        let class = if !c.is_stock() && ratio.loses(LEAST_THROUGHPUT) {
            " class=\"lost\""
        } else {
            ""
        };
        let interval = ratio.interval().unwrap_or_else(|| "&ndash;".into());
        let name = match &c.layout {
            Some(layout) if c.policy == super::STOCK => format!("stock ({layout})"),
            _ => c.policy.clone(),
        };
        let mut cells = vec![
            escape(&name),
            c.in_flight.to_string(),
            format!("{:.0}", c.tokens_per_s),
            format!("{:.2}", c.ratio_to_stock),
            interval,
        ];
        for (ms, ratio) in [(c.ttft_ms, c.ttft_ratio), (c.tbt_ms, c.tbt_ratio)] {
            cells.push(format!("{:.2} / {:.2}", ms.p50, ms.p99));
            cells.push(format!("{:.2} / {:.2}", ratio.p50.value, ratio.p99.value));
        }
        cells.extend([
            format!("{:.0}", c.completion_ms),
            format!("{:.0} %", c.exits * 100.0),
            format!("{:.3}", c.held_ms_per_token),
            c.graph_reuse
                .map_or_else(|| "&ndash;".into(), |r| format!("{:.0} %", r * 100.0)),
            c.rounds.to_string(),
        ]);
        let cells: String = cells.iter().map(|v| format!("<td>{v}</td>")).collect();
        let _ = writeln!(
            rows,
            "<tr{class}><th scope=\"row\">{}</th>{cells}</tr>",
            escape(&c.traffic)
        );
    }
    let head: String = [
        "policy",
        "in flight",
        "tokens/s",
        "of stock",
        "95 %",
        "first token, ms",
        "of stock",
        "between, ms",
        "of stock",
        "done, ms",
        "exits",
        "held, ms a token",
        "graphs kept",
        "rounds",
    ]
    .map(|h| format!("<th scope=\"col\">{h}</th>"))
    .concat();
    let lost: String = report
        .losing_lines()
        .iter()
        .map(|line| format!("<li>{}</li>", escape(line)))
        .collect();
    let lost = if lost.is_empty() {
        "<p class=\"note\">None.</p>".to_owned()
    } else {
        format!("<ul>{lost}</ul>")
    };
    let plot = |ratio: &dyn Fn(&Cell) -> Ratio, bound: f64, what: &str| {
        forest(&policies, ratio, bound, what)
    };
    page::fill(
        include_str!("page.html"),
        &[
            ("MODEL", &escape(&about.model)),
            ("MACHINE", &escape(&about.machine)),
            (
                "SETTINGS",
                &format!(
                    "exit after {} &middot; threshold {} &middot; {} compute thread(s)",
                    escape(&about.exit_layers),
                    about.threshold,
                    about.threads
                ),
            ),
            ("COMMAND", &escape(&about.command)),
            ("INTERVAL", &escape(&report.interval)),
            ("HEADLINE", &headline),
            (
                "RATIO",
                &plot(
                    &Cell::throughput,
                    LEAST_THROUGHPUT,
                    "Throughput relative to stock",
                ),
            ),
            (
                "TTFT50",
                &plot(
                    &|c| c.ttft_ratio.p50,
                    MOST_TTFT,
                    "Time to first token, median",
                ),
            ),
            (
                "TTFT99",
                &plot(&|c| c.ttft_ratio.p99, MOST_TTFT, "Time to first token, p99"),
            ),
            (
                "TBT99",
                &plot(&|c| c.tbt_ratio.p99, MOST_TBT, "Time between tokens, p99"),
            ),
            (
                "BOUNDS",
                &format!(
                    "Throughput below {LEAST_THROUGHPUT} of stock, time to first token above {MOST_TTFT}, time between tokens \
                     (p99) above {MOST_TBT}."
                ),
            ),
            ("LOST", &lost),
            ("HEAD", &head),
            ("ROWS", &rows),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use drex_svg::page;

    #[test]
    fn the_page_is_whole_and_closed() {
        let html = report().html();
        assert_eq!(page::faults(&html), [""; 0]);
        assert!(html.contains("a&lt;b"));
        assert_eq!(html.matches("<svg").count(), 4);
    }

    #[test]
    fn pages_to_look_at() {
        let mut report = report();
        report.about.command =
            "cargo xtask bench serve --traffic 300/64,chat --in-flight 1,4,16,64".repeat(3);
        page::leave("bench.html", &report.html());
    }
}
