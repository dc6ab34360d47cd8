// SPDX-License-Identifier: Apache-2.0

//! The report's plots: plain SVG, coloured by the page's style so that they follow its light and dark modes.

use std::fmt::Write;

use super::{
    OFF, REFERENCE, base,
    report::{Cell, escape},
};

/// The class that carries a policy's colour.
pub fn class(policy: &str) -> &'static str {
    match base(policy) {
        OFF => "off",
        REFERENCE => "reference",
        "eager" => "eager",
        "art" => "art",
        "latency" => "latency",
        "hold" => "hold",
        "auto" => "auto",
        _ => "other",
    }
}

/// Throughput ratio over concurrency, a line per policy. The concurrencies are spaced evenly: they are powers of two.
pub fn ratio(cells: &[&Cell], policies: &[&str]) -> String {
    let (width, height, left, right, top, bottom) = (860.0, 330.0, 44.0, 90.0, 14.0, 44.0);
    let mut levels: Vec<u16> = cells.iter().map(|c| c.concurrency).collect();
    levels.sort_unstable();
    levels.dedup();
    let ratios: Vec<f64> = cells.iter().map(|c| c.ratio).collect();
    let high = ratios.iter().copied().fold(1.1, f64::max);
    let low = ratios.iter().copied().fold(0.9, f64::min);
    let step = if high - low > 2.0 {
        0.5
    } else if high - low > 0.8 {
        0.2
    } else {
        0.1
    };
    let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
    let x = |level: u16| {
        let index = levels.iter().position(|l| *l == level).unwrap_or(0) as f64;
        let room = width - left - right;
        if levels.len() < 2 {
            left + room / 2.0
        } else {
            left + 20.0 + index * (room - 40.0) / (levels.len() - 1) as f64
        }
    };
    let y = |ratio: f64| top + (high - ratio) / (high - low) * (height - top - bottom);

    let mut out = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"Throughput ratio by requests in flight\">"
    );
    for i in 0..=((high - low) / step).round() as u32 {
        let value = low + f64::from(i) * step;
        let at = y(value);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{x2}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{tx}\" y=\"{ty:.1}\" text-anchor=\"end\">{value:.1}</text>",
            x2 = width - right,
            tx = left - 8.0,
            ty = at + 4.0
        );
    }
    let one = y(1.0);
    let _ = write!(
        out,
        "<line class=\"axis\" x1=\"{left}\" x2=\"{}\" y1=\"{one:.1}\" y2=\"{one:.1}\"/>",
        width - right
    );
    for level in &levels {
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{level}</text>",
            x(*level),
            height - bottom + 20.0
        );
    }
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">requests in flight</text>",
        (left + width - right) / 2.0,
        height - 6.0
    );
    // Names at the lines' ends, moved apart where they would lie on each other.
    let mut labels: Vec<(f64, &str)> = Vec::new();
    for policy in policies {
        let mut points: Vec<(&Cell, f64)> = cells
            .iter()
            .filter(|c| c.policy == *policy)
            .map(|c| (*c, c.ratio))
            .collect();
        points.sort_by_key(|(cell, _)| cell.concurrency);
        let Some((_, last)) = points.last() else {
            continue;
        };
        labels.push((y(*last), policy));
        let line: Vec<_> = points
            .iter()
            .map(|(c, r)| format!("{:.1},{:.1}", x(c.concurrency), y(*r)))
            .collect();
        let _ = write!(
            out,
            "<polyline class=\"trace {}\" points=\"{}\"/>",
            class(policy),
            line.join(" ")
        );
        for (cell, ratio) in points {
            let rounds: Vec<_> = cell
                .ratio_rounds
                .iter()
                .map(|r| format!("{r:.2}"))
                .collect();
            let _ = write!(
                out,
                "<circle class=\"dot hit fill {}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\"><title>{} at {} in flight: {ratio:.2}x \
                 (rounds {}), {:.0} tokens/s</title></circle>",
                class(policy),
                x(cell.concurrency),
                y(ratio),
                escape(policy),
                cell.concurrency,
                rounds.join(", "),
                cell.tokens_per_s
            );
        }
    }
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut above = f64::NEG_INFINITY;
    for (at, policy) in labels {
        above = at.max(above + 15.0);
        let _ = write!(
            out,
            "<text class=\"strong\" x=\"{}\" y=\"{:.1}\">{}</text>",
            width - right + 6.0,
            above + 4.0,
            escape(policy)
        );
    }
    out + "</svg>"
}

/// A panel per concurrency: for each policy the median in front of the 99th percentile.
pub fn time_between_tokens(cells: &[&Cell]) -> String {
    let mut levels: Vec<u16> = cells.iter().map(|c| c.concurrency).collect();
    levels.sort_unstable();
    levels.dedup();
    let mut out = String::new();
    for level in levels {
        let here: Vec<_> = cells.iter().filter(|c| c.concurrency == level).collect();
        let (row, left, right) = (30.0, 4.0, 176.0);
        let height = 26.0 + row * here.len() as f64;
        let max = here
            .iter()
            .map(|c| c.tbt_ms.1.max(c.tbt_ms.0))
            .fold(1e-6, f64::max);
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 230 {height}\" role=\"img\" aria-label=\"Time between tokens at {level} in flight\">\
             <text class=\"strong\" x=\"{left}\" y=\"13\">{level} in flight</text>"
        );
        for (i, cell) in here.iter().enumerate() {
            let top = 24.0 + row * i as f64;
            let (p50, p99) = cell.tbt_ms;
            let wide = |value: f64| (value / max * (right - left)).max(1.5);
            let _ = write!(
                out,
                "<g class=\"hit\"><title>{policy} at {level} in flight: p50 {p50:.2} ms, p99 {p99:.2} ms</title>\
                 <rect class=\"fill pale {class}\" x=\"{left}\" y=\"{top}\" width=\"{w99:.1}\" height=\"20\" rx=\"3\"/>\
                 <rect class=\"fill {class}\" x=\"{left}\" y=\"{inner}\" width=\"{w50:.1}\" height=\"10\" rx=\"2\"/>\
                 <text x=\"{tx:.1}\" y=\"{ty}\">{p50:.1} / {p99:.1}</text></g>",
                policy = escape(&cell.policy),
                class = class(&cell.policy),
                w99 = wide(p99),
                w50 = wide(p50),
                inner = top + 5.0,
                tx = left + wide(p99.max(p50)) + 5.0,
                ty = top + 14.0
            );
        }
        out.push_str("</svg>");
    }
    out
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
    let (left, right, row) = (110.0, 790.0, 20.0);
    let mut body = String::new();
    let mut top = 4.0;
    for policy in policies {
        let here: Vec<_> = cells
            .iter()
            .filter(|c| c.policy == *policy && !c.exit_share.is_empty())
            .collect();
        if here.is_empty() {
            continue;
        }
        let _ = write!(
            body,
            "<text class=\"strong\" x=\"0\" y=\"{}\">{}</text>",
            top + 13.0,
            escape(policy)
        );
        for cell in here {
            let _ = write!(
                body,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
                 <line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{mid}\" y2=\"{mid}\"/>",
                left - 8.0,
                top + 13.0,
                cell.concurrency,
                mid = top + 8.0
            );
            let mut x = left;
            for (layer, share) in &cell.exit_share {
                let wide = share * (right - left);
                let _ = write!(
                    body,
                    "<rect class=\"hit ramp{}\" x=\"{:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"16\" rx=\"2\"><title>{} at {} in \
                     flight: {:.1} % after layer {layer}</title></rect>",
                    tone(layer),
                    x,
                    // A gap between the tones, where there is room for one.
                    (wide - 2.0).max(wide.min(0.5)),
                    escape(policy),
                    cell.concurrency,
                    share * 100.0
                );
                x += wide;
            }
            let total: f64 = cell.exit_share.values().sum();
            let _ = write!(
                body,
                "<text x=\"{:.1}\" y=\"{}\">{:.0} %</text>",
                x + 6.0,
                top + 13.0,
                total * 100.0
            );
            top += row;
        }
        top += 12.0;
    }
    format!(
        "<div class=\"legend\">{legend}</div><svg viewBox=\"0 0 860 {top}\" role=\"img\" aria-label=\"Share of tokens by exit \
         ramp\">{body}</svg>"
    )
}
