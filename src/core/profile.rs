// SPDX-License-Identifier: Apache-2.0

//! What layer windows cost, as plain numbers: what the cost model has
//! learned, what a user saves and loads, what a simulation runs on.

use super::error::{Error, Result};

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

/// The layers between two neighbouring bounds (0, the ramps, the end).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Segment {
    pub ns: f64,
    pub ns_per_row: f64,
    /// Per KV cell attended, cells summed over the rows.
    pub ns_per_cell: f64,
}

/// The time of a window over segments `i..j`, `rows` rows that attend over
/// `cells` KV cells (summed over the rows):
///
/// window(rows) + sum over i..j of segment(rows, cells) + ramp(rows), the
/// last where the window ends at a ramp. No number is negative, so a window
/// never gets cheaper with more layers, rows or cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    pub n_layers: u32,
    /// Strictly increasing; a ramp at `l` follows layers `[0, l)`.
    pub ramp_layers: Vec<u32>,
    /// What every window costs, however few its layers.
    pub window: Line,
    /// The ramp's head, confidence and state-copy.
    pub ramp: Line,
    /// One more than ramps.
    pub segments: Vec<Segment>,
}

/// Eleven days. Sums and squares of such numbers are still finite.
pub const MAX_NS: f64 = 1e15;

impl Profile {
    /// Predicted ns of a window over segments `[first, last)`.
    pub fn time(&self, first: usize, last: usize, rows: f64, cells: f64) -> f64 {
        let mut t = self.window.at(rows);
        for s in &self.segments[first..last] {
            t += s.ns + s.ns_per_row * rows + s.ns_per_cell * cells;
        }
        if last < self.segments.len() {
            t += self.ramp.at(rows);
        }
        t
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
        check("ramp.ns", None, self.ramp.ns)?;
        check("ramp.ns_per_row", None, self.ramp.ns_per_row)?;
        for (i, s) in self.segments.iter().enumerate() {
            check("segments.ns", Some(i), s.ns)?;
            check("segments.ns_per_row", Some(i), s.ns_per_row)?;
            check("segments.ns_per_cell", Some(i), s.ns_per_cell)?;
        }
        Ok(())
    }
}
