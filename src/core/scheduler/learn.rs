// SPDX-License-Identifier: Apache-2.0

//! Learning from the windows that ran, and the search for a rule with what is known.

use super::Scheduler;
use crate::core::config::Fill;
use crate::core::error::{Error, Result};
use crate::core::estimate::profile::Profile;
use crate::core::policy::auto::{Auto, Known};

/// The search takes at most this share of a window's time, where the host does not
/// call for it itself.
const REPLAN_SHARE: u64 = 200;
/// About what a simulated window takes.
const WINDOW_NS: u64 = 40;
/// The least that is done at once, and the most.
const REPLAN_MIN_NS: u64 = 16 * WINDOW_NS;
const REPLAN_MAX_NS: u64 = 20_000 * WINDOW_NS;

impl Scheduler {
    pub(super) fn auto_and_known(&mut self) -> (&mut Auto, Known<'_>) {
        let known = Known {
            cost: &self.cost,
            exit_rates: &self.exit_rates,
            acceptance: &self.acceptance,
            reliability: &self.reliability,
        };
        (&mut self.auto, known)
    }

    /// Share of the requests in decode with fill `fill`.
    pub(super) fn share_of(&self, fill: Fill) -> f64 {
        self.fills[fill as usize] as f64 / self.decoding.max(1) as f64
    }

    /// Rows that are held, each as the share of its layers that it has passed.
    pub(super) fn held_share(&self) -> f64 {
        if self.buffer.held() == 0 {
            return 0.0;
        }
        let layers = self.config.ramp_layers.iter().enumerate();
        let passed = layers.map(|(r, &l)| f64::from(self.buffer.held_at(r)) * f64::from(l));
        passed.sum::<f64>() / f64::from(self.config.n_layers)
    }

    pub(super) fn share_keeping(&self) -> f64 {
        let keep = Fill::ALL.into_iter().filter(|f| f.keeps());
        keep.map(|f| self.share_of(f)).sum()
    }

    /// Does a share of the search that is small beside a window that took
    /// `duration_ns`; 0: unknown.
    pub(super) fn replan_beside(&mut self, duration_ns: u64) {
        let share = match duration_ns {
            0 => REPLAN_MIN_NS,
            ns => (ns / REPLAN_SHARE).min(REPLAN_MAX_NS),
        };
        // The shares of short windows add up to a part that is worth its start. A part
        // that took longer is paid back by the next ones.
        let saved = self.replan_ns + share as i64;
        self.replan_ns = saved.min(share.max(REPLAN_MIN_NS) as i64);
        if self.replan_ns >= REPLAN_MIN_NS as i64 {
            let windows = (self.replan_ns as u64 / WINDOW_NS) as u32;
            let (auto, known) = self.auto_and_known();
            let spent = auto.work(windows, known);
            self.replan_ns -= (u64::from(spent) * WINDOW_NS) as i64;
        }
    }

    /// Does up to about `windows` simulated windows' worth of the search for
    /// a better rule (0: all of it). After the first call, [`Scheduler::complete`]
    /// leaves that work to the host. True when none is left.
    pub fn replan(&mut self, windows: u32) -> bool {
        self.host_replans = true;
        let (auto, known) = self.auto_and_known();
        auto.work(if windows == 0 { u32::MAX } else { windows }, known);
        !auto.searching()
    }

    /// Starts from times learned before.
    pub fn load_profile(&mut self, p: &Profile) -> Result<()> {
        p.validate()?;
        let same = |field, index, value: u64, other, other_value: u64| match value == other_value {
            true => Ok(()),
            false => Err(Error::Conflict {
                field,
                index,
                value,
                other,
                other_value,
                why: "a profile belongs to one model and its exit layers",
            }),
        };
        let (theirs, ours) = (&p.ramp_layers, &self.config.ramp_layers);
        let n_layers = [p.n_layers, self.config.n_layers].map(u64::from);
        same(
            "n_layers",
            None,
            n_layers[0],
            "the engine's n_layers",
            n_layers[1],
        )?;
        let n_ramps = [theirs, ours].map(|layers| layers.len() as u64);
        same(
            "number of ramp_layers",
            None,
            n_ramps[0],
            "the engine's",
            n_ramps[1],
        )?;
        for (i, (&a, &b)) in theirs.iter().zip(ours).enumerate() {
            same("ramp_layers", Some(i), a.into(), "the engine's", b.into())?;
        }
        self.cost.load(p);
        Ok(())
    }

    /// A timing that was not planned here.
    pub fn observe(
        &mut self,
        begin: u32,
        end: u32,
        rows: u32,
        cells: u64,
        prompts: u32,
        ns: u64,
    ) -> Result<()> {
        if end > self.config.n_layers {
            return Err(Error::Conflict {
                field: "layer_end",
                index: None,
                value: end.into(),
                other: "n_layers",
                other_value: self.config.n_layers.into(),
                why: "the window lies within the model",
            });
        }
        if begin >= end {
            return Err(Error::Conflict {
                field: "layer_begin",
                index: None,
                value: begin.into(),
                other: "layer_end",
                other_value: end.into(),
                why: "the window has at least one layer",
            });
        }
        if rows == 0 && prompts == 0 {
            return Err(Error::int(
                "n_rows",
                rows,
                "at least 1 where n_prompt_rows is 0",
            ));
        }
        if ns == 0 {
            return Err(Error::int("duration_ns", ns, "at least 1"));
        }
        self.cost.observe(begin, end, rows, cells, prompts, ns);
        Ok(())
    }
}
