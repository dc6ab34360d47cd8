// SPDX-License-Identifier: Apache-2.0

//! A pass that prompts need anyway is a *carrier*: rows that are ready ride
//! along. Cut at a ramp, it takes held rows along from there; uncut, it gives
//! every row that rides along the full model's token. Which of both is a
//! matter of time; the planner and the rollout ask the same function.

use crate::core::estimate::cost::CostModel;
use crate::core::estimate::profile::Profile;

/// A pass that prompt rows need, and that runs unless something is due.
#[derive(Debug, Clone, Copy)]
pub struct Carrier {
    pub prompts: u32,
    /// Decode rows that would ride along from the start.
    pub rows: u32,
    /// Where it would be cut.
    pub cut: Option<usize>,
}

/// Time of a window: `ns + per_row * rows + per_prompt * prompts`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Part {
    pub ns: f64,
    pub per_row: f64,
    pub per_prompt: f64,
}

impl Part {
    pub const NONE: Part = Part {
        ns: 0.0,
        per_row: 0.0,
        per_prompt: 0.0,
    };

    /// Of a window over segments `[first, last)`, with the ramp at its end.
    pub fn new(profile: &Profile, first: usize, last: usize, cells_per_row: f64) -> Part {
        let ns = profile.time(first, last, 0.0, 0.0);
        Part {
            ns,
            per_row: profile.time(first, last, 1.0, cells_per_row) - ns,
            per_prompt: profile.prompt_row(first, last),
        }
    }

    pub fn at(&self, rows: f64, prompts: f64) -> f64 {
        self.ns + self.per_row * rows + self.per_prompt * prompts
    }
}

/// The ways of a pass from one layer on: to a ramp, from there to the end, and
/// the whole way at once.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ways {
    pub head: Part,
    pub rest: Part,
    pub whole: Part,
    /// Of `head.ns`, what only decode rows cause.
    pub ramp_ns: f64,
    /// The host's own time per window.
    pub gap_ns: f64,
}

/// What runs, and what waits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Riders {
    pub prompts: f64,
    /// Decode rows that ride along from the start.
    pub rows: f64,
    /// Of these, those that are expected not to exit.
    pub stay: f64,
    /// Rows held at the ramp, as many as fit beside the prompts.
    pub held: f64,
    /// Rows of a flush of their own.
    pub flush: f64,
    /// What an exit costs later on: as a pending row, or as a wrong draft.
    pub exit_ns: f64,
}

impl Ways {
    pub const NONE: Ways = Ways {
        head: Part::NONE,
        rest: Part::NONE,
        whole: Part::NONE,
        ramp_ns: 0.0,
        gap_ns: 0.0,
    };

    /// From segment `first` on, cut after segment `ramp`.
    pub fn new(cost: &CostModel, first: usize, ramp: usize, gap_ns: f64) -> Ways {
        let p = cost.profile();
        let n = p.segments.len();
        let cells = cost.cells_per_row();
        Ways {
            head: Part::new(p, first, ramp + 1, cells),
            rest: Part::new(p, ramp + 1, n, cells),
            whole: Part::new(p, first, n, cells),
            ramp_ns: p.ramp.ns,
            gap_ns,
        }
    }

    /// Cut, the pass makes tokens of the riders and of the held rows. Uncut, it
    /// makes those of the riders, and the held rows need their share of a flush
    /// of their own. Both ways end with the same tokens and nothing held, so
    /// the shorter one is right.
    pub fn cut_pays(&self, r: &Riders) -> bool {
        let ramp = if r.rows > 0.0 { 0.0 } else { self.ramp_ns };
        let cut = self.head.at(r.rows, r.prompts) - ramp
            + self.gap_ns
            + self.rest.at(r.stay + r.held, r.prompts)
            + (r.rows - r.stay) * r.exit_ns;
        let flush = r.flush.max(1.0);
        let share = (self.rest.at(flush, 0.0) + self.gap_ns) / flush;
        cut <= self.whole.at(r.rows, r.prompts) + r.held * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass of `t0 + t1 rows + t2 prompts`, cut after a share `a` of it.
    fn ways(t0: f64, t1: f64, t2: f64, a: f64) -> Ways {
        let part = |share: f64, ramp: f64| Part {
            ns: share * t0 + ramp,
            per_row: share * t1,
            per_prompt: share * t2,
        };
        let ramp_ns = 0.02 * t0;
        Ways {
            head: part(a, ramp_ns),
            rest: part(1.0 - a, 0.0),
            whole: part(1.0, 0.0),
            ramp_ns,
            gap_ns: 0.0,
        }
    }

    const RIDERS: Riders = Riders {
        prompts: 100.0,
        rows: 8.0,
        stay: 4.0,
        held: 0.0,
        flush: 4.0,
        exit_ns: 0.0,
    };

    #[test]
    fn held_rows_pay_for_the_cut() {
        // Weights bound the time: the head costs 0.02, and a row nothing.
        let w = ways(1.0, 0.0, 0.01, 0.25);
        assert!(!w.cut_pays(&RIDERS));
        // One held row would cost 0.75 / 4.
        let held = |held| Riders { held, ..RIDERS };
        assert!(w.cut_pays(&held(1.0)));
        // In flushes of 64, two rows cost 0.0234 and one 0.0117.
        let dense = |n| Riders {
            flush: 64.0,
            ..held(n)
        };
        assert!(!w.cut_pays(&dense(1.0)));
        assert!(w.cut_pays(&dense(2.0)));
    }

    #[test]
    fn rows_that_exit_pay_where_rows_cost() {
        // Four exits save 4 x 0.75 x 0.01 = 0.03, more than the head's 0.02.
        let w = ways(1.0, 0.01, 0.01, 0.25);
        assert!(w.cut_pays(&RIDERS));
        // Two save 0.015.
        assert!(!w.cut_pays(&Riders {
            stay: 6.0,
            ..RIDERS
        }));
        // An exit whose row runs later on saves nothing.
        assert!(!w.cut_pays(&Riders {
            exit_ns: 0.0075,
            ..RIDERS
        }));
        // A window more costs the host's time.
        let slow = Ways { gap_ns: 0.02, ..w };
        assert!(!slow.cut_pays(&RIDERS));
    }

    #[test]
    fn a_prompt_alone_has_no_head() {
        let w = ways(1.0, 0.01, 0.01, 0.25);
        let alone = Riders {
            rows: 0.0,
            stay: 0.0,
            held: 1.0,
            flush: 64.0,
            ..RIDERS
        };
        // 0.0075 in the pass against 1.23 / 64 = 0.0192; with a head: 0.0275.
        assert!(w.cut_pays(&alone));
        let head = Ways { ramp_ns: 0.0, ..w };
        assert!(!head.cut_pays(&alone));
    }
}
