// SPDX-License-Identifier: Apache-2.0
//! The report as a page: one file, no outside resources, plots that follow the light and the dark mode.

use std::fmt::Write;

use super::report::{Cell, Ratio, Report};

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

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
    let x = |value: f64| {
        let at = (value.clamp(low, high).ln() - low.ln()) / (high.ln() - low.ln());
        left + at * (width - left - right)
    };
    let height = top + row * cells.len() as f64 + 8.0;
    let mut out = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(what)
    );
    for tick in [0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0] {
        if (low..=high).contains(&tick) {
            let class = if tick == 1.0 { "axis" } else { "grid" };
            let _ = write!(
                out,
                "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{end}\"/>\
                 <text x=\"{at:.1}\" y=\"{y}\" text-anchor=\"middle\">{tick}</text>",
                at = x(tick),
                end = height - 6.0,
                y = top - 8.0
            );
        }
    }
    let mut last = None;
    for (i, (cell, r)) in cells.iter().zip(&ratios).enumerate() {
        let y = top + row * (i as f64 + 0.5);
        let load = (cell.traffic.as_str(), cell.in_flight);
        if last != Some(load) {
            let _ = write!(
                out,
                "<text class=\"strong\" x=\"0\" y=\"{:.1}\">{} at {}</text>",
                y + 4.0,
                escape(load.0),
                load.1
            );
            last = Some(load);
        }
        let loses = if bound < 1.0 {
            r.value < bound
        } else {
            r.value > bound
        };
        let class = if loses { "loss" } else { "good" };
        let interval = r.low.zip(r.high).map_or_else(String::new, |(low, high)| {
            format!(" ({low:.2} to {high:.2})")
        });
        let _ = write!(
            out,
            "<text x=\"{lx}\" y=\"{ty:.1}\" text-anchor=\"end\">{policy}</text><g class=\"hit {class}\"><title>{policy}, {traffic} at \
             {n}: {value:.3}{interval}</title>",
            lx = left - 10.0,
            ty = y + 4.0,
            policy = escape(&cell.policy),
            traffic = escape(&cell.traffic),
            n = cell.in_flight,
            value = r.value
        );
        if let (Some(low), Some(high)) = (r.low, r.high) {
            let _ = write!(
                out,
                "<line class=\"bar\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                x(low),
                x(high)
            );
        }
        let _ = write!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\"/></g><text x=\"{}\" y=\"{:.1}\">{:.2}</text>",
            x(r.value),
            width - right + 10.0,
            y + 4.0,
            r.value
        );
    }
    out + "</svg>"
}

pub fn html(report: &Report) -> String {
    let about = &report.about;
    let policies: Vec<&Cell> = report.cells.iter().filter(|c| c.layout.is_none()).collect();
    let throughput = |c: &Cell| Ratio {
        value: c.ratio_to_stock,
        low: c.ratio_low,
        high: c.ratio_high,
    };
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
        let class = if c.layout.is_none() && c.ratio_to_stock < 0.99 {
            " class=\"lost\""
        } else {
            ""
        };
        let interval = c.ratio_low.zip(c.ratio_high).map_or_else(
            || "&ndash;".into(),
            |(low, high)| format!("{low:.2} to {high:.2}"),
        );
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
    include_str!("page.html")
        .replace("@MODEL@", &escape(&about.model))
        .replace("@MACHINE@", &escape(&about.machine))
        .replace(
            "@SETTINGS@",
            &format!(
                "exit after {} &middot; threshold {} &middot; {} compute thread(s)",
                escape(&about.exit_layers),
                about.threshold,
                about.threads
            ),
        )
        .replace("@COMMAND@", &escape(&about.command))
        .replace("@INTERVAL@", &escape(&report.interval))
        .replace("@HEADLINE@", &headline)
        .replace(
            "@RATIO@",
            &forest(&policies, &throughput, 0.99, "Throughput relative to stock"),
        )
        .replace(
            "@TTFT50@",
            &forest(
                &policies,
                &|c| c.ttft_ratio.p50,
                1.05,
                "Time to first token, median",
            ),
        )
        .replace(
            "@TTFT99@",
            &forest(
                &policies,
                &|c| c.ttft_ratio.p99,
                1.05,
                "Time to first token, p99",
            ),
        )
        .replace(
            "@TBT99@",
            &forest(
                &policies,
                &|c| c.tbt_ratio.p99,
                1.25,
                "Time between tokens, p99",
            ),
        )
        .replace("@LOST@", &lost)
        .replace("@HEAD@", &head)
        .replace("@ROWS@", &rows)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;

    #[test]
    fn the_page_is_whole_and_closed() {
        let html = report().html();
        let left: Vec<_> = html
            .split('@')
            .skip(1)
            .filter(|s| s.starts_with(|c: char| c.is_ascii_uppercase()))
            .collect();
        assert!(left.is_empty(), "placeholders are left: {left:?}");
        assert!(html.contains("a&lt;b") && !html.contains("NaN") && !html.contains("inf\""));
        assert_eq!(html.matches("<svg").count(), 4);
        assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
        assert!(
            !html.contains("http://") && !html.contains("https://"),
            "a page without outside resources"
        );
    }
}
