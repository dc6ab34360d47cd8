// SPDX-License-Identifier: Apache-2.0

//! Axes, lines and texts of plots, as SVG, and the pages that hold them. Classes carry colours, so that a page's style
//! decides about them.

pub mod page;

use std::fmt::{Display, Write};

/// A text that holds no mark-up, in a document or in an attribute's quotes.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// From values to places: one direction of a plot.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    low: f64,
    high: f64,
    at_low: f64,
    at_high: f64,
    logarithmic: bool,
}

impl Axis {
    /// `low` lies at `at_low`, `high` at `at_high`, which may be the smaller one: y grows downwards.
    pub fn linear((low, high): (f64, f64), (at_low, at_high): (f64, f64)) -> Axis {
        Axis {
            low,
            high,
            at_low,
            at_high,
            logarithmic: false,
        }
    }

    /// Of values above 0.
    pub fn logarithmic(values: (f64, f64), places: (f64, f64)) -> Axis {
        Axis {
            logarithmic: true,
            ..Axis::linear(values, places)
        }
    }

    /// The place of a value; of one beyond the axis, its end.
    pub fn at(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.logarithmic { v.ln() } else { v };
        let (low, high) = (scale(self.low), scale(self.high));
        let share = (scale(value.clamp(self.low, self.high)) - low) / (high - low);
        self.at_low + share * (self.at_high - self.at_low)
    }

    pub fn has(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// The ends of an axis that holds all of `values`, and `room` in any case, and the step between its marks. The ends are
    /// whole steps.
    pub fn round(values: impl IntoIterator<Item = f64>, room: (f64, f64)) -> ((f64, f64), f64) {
        let (low, high) = values
            .into_iter()
            .fold(room, |(low, high), v| (low.min(v), high.max(v)));
        let step = match high - low {
            wide if wide > 2.0 => 0.5,
            wide if wide > 0.8 => 0.2,
            _ => 0.1,
        };
        let ends = ((low / step).floor() * step, (high / step).ceil() * step);
        (ends, step)
    }
}

/// Where a text begins.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture on its way.
pub struct Picture(String);

impl Picture {
    /// A picture in a page, whose style it has; `what` is for who cannot see it.
    pub fn in_page(width: f64, height: f64, what: &str) -> Picture {
        Picture(format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
            escape(what)
        ))
    }

    /// A file of its own, with its own style.
    pub fn file(width: f64, height: f64, style: &str) -> Picture {
        Picture(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\"><style>{style}</style>"
        ))
    }

    pub fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: impl Display) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let class = of_class(class);
        let text = escape(&text.to_string());
        self.raw(format_args!(
            "<text{class} x=\"{x:.1}\" y=\"{y:.1}\"{anchor}>{text}</text>"
        ));
    }

    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let class = of_class(class);
        self.raw(format_args!(
            "<line{class} x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    /// A line through these points.
    pub fn trace(&mut self, class: &str, points: impl IntoIterator<Item = (f64, f64)>) {
        let points: Vec<String> = points
            .into_iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let class = of_class(class);
        self.raw(format_args!(
            "<polyline{class} points=\"{}\"/>",
            points.join(" ")
        ));
    }

    /// A rectangle from its upper left corner on.
    pub fn bar(
        &mut self,
        class: &str,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
        round: f64,
    ) {
        let class = of_class(class);
        self.raw(format_args!(
            "<rect{class} x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"{round}\"/>"
        ));
    }

    pub fn dot(&mut self, class: &str, (x, y): (f64, f64), radius: f64) {
        let class = of_class(class);
        self.raw(format_args!(
            "<circle{class} cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>"
        ));
    }

    /// A group of what `draw` draws. Who points at it is shown the title.
    pub fn group(&mut self, class: &str, title: &str, draw: impl FnOnce(&mut Picture)) {
        let class = of_class(class);
        self.raw(format_args!("<g{class}><title>{}</title>", escape(title)));
        draw(self);
        self.raw(format_args!("</g>"));
    }

    /// Names beside the ends of lines, in a column at `x`, moved apart where they would lie on each other.
    pub fn names(&mut self, class: &str, x: f64, mut names: Vec<(f64, String)>) {
        names.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut above = f64::NEG_INFINITY;
        for (y, name) in names {
            above = y.max(above + 15.0);
            self.text(class, (x, above + 4.0), Anchor::Start, name);
        }
    }

    pub fn finish(self) -> String {
        self.0 + "</svg>"
    }

    fn raw(&mut self, what: std::fmt::Arguments) {
        let _ = self.0.write_fmt(what);
    }
}

fn of_class(class: &str) -> String {
    if class.is_empty() {
        String::new()
    } else {
        format!(" class=\"{class}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_places() {
        let y = Axis::linear((0.0, 2.0), (100.0, 0.0));
        assert_eq!(
            [0.0, 1.0, 2.0, 9.0].map(|v| y.at(v)),
            [100.0, 50.0, 0.0, 0.0]
        );
        let x = Axis::logarithmic((0.1, 10.0), (0.0, 200.0));
        assert!((x.at(1.0) - 100.0).abs() < 1e-9 && x.at(0.0) == 0.0);
        assert!(x.has(10.0) && !x.has(0.05));
    }

    #[test]
    fn an_axis_holds_all_values_and_what_it_must() {
        assert_eq!(Axis::round([1.0], (0.9, 1.1)).1, 0.1);
        let ((low, high), step) = Axis::round([0.34, 2.9], (0.9, 1.1));
        assert_eq!((low, high, step), (0.0, 3.0, 0.5));
    }

    #[test]
    fn a_picture_is_closed_and_its_texts_are_texts() {
        let mut picture = Picture::in_page(10.0, 20.0, "a \"b\"");
        picture.group("hit", "1 < 2", |picture| {
            picture.bar("", (1.0, 2.0), (3.0, 4.0), 1.0);
        });
        picture.text("strong", (0.0, 1.0), Anchor::End, "a & b");
        picture.names("n", 5.0, vec![(8.0, "late".into()), (7.0, "early".into())]);
        assert_eq!(
            picture.finish(),
            "<svg viewBox=\"0 0 10 20\" role=\"img\" aria-label=\"a &quot;b&quot;\"><g class=\"hit\"><title>1 &lt; 2</title>\
             <rect x=\"1.0\" y=\"2.0\" width=\"3.0\" height=\"4.0\" rx=\"1\"/></g>\
             <text class=\"strong\" x=\"0.0\" y=\"1.0\" text-anchor=\"end\">a &amp; b</text>\
             <text class=\"n\" x=\"5.0\" y=\"11.0\">early</text><text class=\"n\" x=\"5.0\" y=\"26.0\">late</text></svg>"
        );
    }
}
