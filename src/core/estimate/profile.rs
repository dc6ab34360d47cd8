// SPDX-License-Identifier: Apache-2.0

//! What layer windows cost, as plain numbers: what the cost model has
//! learned, what a user saves and loads, what a simulation runs on.

use crate::core::error::{Error, Result};

/// `ns + ns_per_row * rows`, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Line {
    pub ns: f64,
    pub ns_per_row: f64,
}

impl Line {
    pub fn at(&self, rows: f64) -> f64 {
        self.ns + self.ns_per_row * rows
    }

    pub fn plus(self, o: Line) -> Line {
        Line {
            ns: self.ns + o.ns,
            ns_per_row: self.ns_per_row + o.ns_per_row,
        }
    }
}

/// What every window costs, however few its layers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Window {
    pub ns: f64,
    pub ns_per_row: f64,
    /// Per row of a prompt, which has no head and comes in large batches.
    pub ns_per_prompt_row: f64,
}

/// The layers between two neighbouring bounds (0, the ramps, the end).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Segment {
    pub ns: f64,
    pub ns_per_row: f64,
    pub ns_per_prompt_row: f64,
    /// Per KV cell attended, cells summed over the rows.
    pub ns_per_cell: f64,
}

/// What a window runs over.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Decode rows, pending ones included.
    pub rows: f64,
    /// KV cells that they attend over, summed.
    pub cells: f64,
    /// Prompt rows.
    pub prompts: f64,
}

/// The time of a window over segments `i..j`:
///
/// window(rows, prompts) + sum over i..j of segment(rows, cells, prompts) +
/// ramp(rows), the last where the window ends at a ramp and has decode rows.
/// No number is negative, so a window never gets cheaper with more layers,
/// rows or cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    pub n_layers: u32,
    /// Strictly increasing; a ramp at `l` follows layers `[0, l)`.
    pub ramp_layers: Vec<u32>,
    pub window: Window,
    /// The ramp's head, confidence and state-copy.
    pub ramp: Line,
    /// One more than ramps.
    pub segments: Vec<Segment>,
}

/// Eleven days. Sums and squares of such numbers are still finite.
pub const MAX_NS: f64 = 1e15;

impl Profile {
    /// Predicted ns of a window over segments `[first, last)` without prompt
    /// rows. Where it ends at a ramp, the ramp's fixed cost is in it for any
    /// number of rows.
    pub fn time(&self, first: usize, last: usize, rows: f64, cells: f64) -> f64 {
        let mut t = self.window.ns + self.window.ns_per_row * rows;
        for s in &self.segments[first..last] {
            t += s.ns + s.ns_per_row * rows + s.ns_per_cell * cells;
        }
        if last < self.segments.len() {
            t += self.ramp.at(rows);
        }
        t
    }

    /// What a prompt row adds to such a window.
    pub fn prompt_row(&self, first: usize, last: usize) -> f64 {
        let layers = self.segments[first..last].iter();
        self.window.ns_per_prompt_row + layers.map(|s| s.ns_per_prompt_row).sum::<f64>()
    }

    /// Predicted ns of a window over segments `[first, last)`.
    pub fn window(&self, first: usize, last: usize, work: Work) -> f64 {
        let mut t = self.time(first, last, work.rows, work.cells);
        if last < self.segments.len() && work.rows == 0.0 {
            t -= self.ramp.at(0.0);
        }
        t + self.prompt_row(first, last) * work.prompts
    }

    pub fn validate(&self) -> Result<()> {
        if self.segments.len() != self.ramp_layers.len() + 1 {
            return Err(Error::int(
                "segments",
                self.segments.len() as u64,
                "one more than ramp_layers",
            ));
        }
        let check = |field, index: Option<usize>, v: f64| {
            if (0.0..=MAX_NS).contains(&v) {
                return Ok(());
            }
            let e = Error::float(field, v as f32, "a number from 0 to 1e15");
            Err(match index {
                Some(i) => e.at(i),
                None => e,
            })
        };
        check("window.ns", None, self.window.ns)?;
        check("window.ns_per_row", None, self.window.ns_per_row)?;
        check(
            "window.ns_per_prompt_row",
            None,
            self.window.ns_per_prompt_row,
        )?;
        check("ramp.ns", None, self.ramp.ns)?;
        check("ramp.ns_per_row", None, self.ramp.ns_per_row)?;
        for (i, s) in self.segments.iter().enumerate() {
            check("segments.ns", Some(i), s.ns)?;
            check("segments.ns_per_row", Some(i), s.ns_per_row)?;
            check("segments.ns_per_prompt_row", Some(i), s.ns_per_prompt_row)?;
            check("segments.ns_per_cell", Some(i), s.ns_per_cell)?;
        }
        Ok(())
    }
}
