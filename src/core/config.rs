// SPDX-License-Identifier: Apache-2.0

use crate::core::MAX_RAMPS;
use crate::core::decision::Decision;
use crate::core::error::{Error, Result};
use crate::core::metric::Metric;
use crate::core::names::named;

/// Sizes beyond this are mistakes.
pub const MAX_ROWS: u32 = 1 << 20;
pub const MAX_LAYERS: u32 = 1 << 16;

named! {
    Policy {
        Off = c"off",
        Eager = c"eager",
        Lazy = c"lazy",
        Median = c"median",
        Mean = c"mean",
        Latency = c"latency",
        Hold = c"hold",
        Art = c"art",
        Auto = c"auto",
    }
}

impl Policy {
    /// The decision on a confident row that may not exit.
    pub fn otherwise(self) -> Decision {
        match self {
            Policy::Hold | Policy::Art | Policy::Auto => Decision::Hold,
            _ => Decision::Stay,
        }
    }
}

named! {
    /// How the K/V entries that an exited token leaves out are filled.
    Fill {
        /// K and V of the last computed layer, copied.
        Copy = c"copy",
        /// Computed: the token's row stays pending until its request next goes
        /// through the skipped layers.
        Postfill = c"postfill",
        /// Computed as by `Postfill`, and what the full model says there decides: the
        /// token is a draft until then.
        Verify = c"verify",
        /// Projected by the skipped layers from the hidden row as it is, by the
        /// host.
        Propagate = c"propagate",
    }
}

impl Fill {
    /// Exited rows stay in the arena.
    pub fn keeps(self) -> bool {
        matches!(self, Fill::Postfill | Fill::Verify)
    }
}

/// How far the output may differ from the full model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    /// As thresholds and fill say.
    Given,
    /// Not at all: drafts are verified, and the rule finds which are worth making.
    Lossless,
    /// At most by the target with this index, see
    /// [`TARGETS`](crate::core::estimate::agreement::TARGETS), on average over the
    /// tokens of such requests: audits find the thresholds.
    Agreement(u8),
}

/// Pending rows of a request at most, where the host does not say.
pub const MAX_PENDING: u32 = 8;

#[derive(Debug, Clone)]
pub struct Config {
    pub n_layers: u32,
    /// A ramp at `l` follows layers `[0, l)`.
    pub ramp_layers: Vec<u32>,
    /// One threshold per ramp.
    pub thresholds: Vec<f32>,
    pub n_slots: u32,
    pub max_requests: u32,
    pub max_batch: u32,
    /// Rows of one window at most, those of prompts included; 0: `max_batch`.
    pub max_pass_rows: u32,
    pub policy: Policy,
    pub metric: Metric,
    pub fill: Fill,
    pub quality: Quality,
    /// Pending rows of a request at most; 0: [`MAX_PENDING`].
    pub max_pending: u32,
    /// 0: the policy's own rule.
    pub flush_rows: u32,
    pub min_ready: u32,
    /// 0: see [`crate::core::flush::planner::HOLD_TIMES`].
    pub max_hold_ns: u64,
    /// 0: none.
    pub token_deadline_ns: u64,
    /// Seed of the random numbers that `auto`'s rollouts draw.
    pub seed: u64,
    /// Pins c/t_d of `art`.
    pub art_ratio: Option<f32>,
}

/// A threshold is any finite number from 0 up; above 1 it means "never".
pub fn check_threshold(field: &'static str, value: f32) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(Error::float(field, value, "a finite number >= 0"))
    }
}

fn check_range(
    field: &'static str,
    value: u32,
    low: u32,
    high: u32,
    expected: &'static str,
) -> Result<()> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(Error::int(field, value, expected))
    }
}

impl Config {
    pub fn validate(&self) -> Result<()> {
        check_range("n_layers", self.n_layers, 2, MAX_LAYERS, "2..65536")?;
        check_range(
            "n_ramps",
            self.ramp_layers.len() as u32,
            1,
            MAX_RAMPS as u32,
            "1..16",
        )?;
        let mut before = 0;
        for (i, &layer) in self.ramp_layers.iter().enumerate() {
            if layer <= before {
                let expected = if i == 0 {
                    "at least 1"
                } else {
                    "more than the ramp before it (ramp_layers must be strictly increasing)"
                };
                return Err(Error::int("ramp_layers", layer, expected).at(i));
            }
            if layer >= self.n_layers {
                return Err(Error::Conflict {
                    field: "ramp_layers",
                    index: Some(i),
                    value: layer.into(),
                    other: "n_layers",
                    other_value: self.n_layers.into(),
                    why: "a ramp lies before the last layer",
                });
            }
            before = layer;
        }
        check_range("n_slots", self.n_slots, 1, MAX_ROWS, "1..1048576")?;
        check_range("max_requests", self.max_requests, 1, MAX_ROWS, "1..1048576")?;
        check_range("max_batch", self.max_batch, 1, MAX_ROWS, "1..1048576")?;
        if self.max_pass_rows > 0 {
            check_range(
                "max_pass_rows",
                self.max_pass_rows,
                1,
                MAX_ROWS,
                "0..1048576",
            )?;
            if self.max_pass_rows < self.max_batch {
                return Err(Error::Conflict {
                    field: "max_pass_rows",
                    index: None,
                    value: self.max_pass_rows.into(),
                    other: "max_batch",
                    other_value: self.max_batch.into(),
                    why: "the decode rows of a window count in both",
                });
            }
        }
        if self.n_slots < self.max_requests {
            return Err(Error::Conflict {
                field: "n_slots",
                index: None,
                value: self.n_slots.into(),
                other: "max_requests",
                other_value: self.max_requests.into(),
                why: "every request may hold one row",
            });
        }
        self.check_fill(self.fill_of(self.quality))?;
        for (i, &t) in self.thresholds.iter().enumerate() {
            check_threshold("ramp_thresholds", t).map_err(|e| e.at(i))?;
        }
        if self.thresholds.len() != self.ramp_layers.len() {
            return Err(Error::int(
                "ramp_thresholds",
                self.thresholds.len() as u64,
                "one threshold per ramp",
            ));
        }
        if let Some(r) = self.art_ratio
            && !(r.is_finite() && r >= 0.0)
        {
            return Err(Error::float(
                "art_ratio",
                r,
                "a finite number >= 0, or NaN for the measured one",
            ));
        }
        Ok(())
    }

    pub fn n_ramps(&self) -> usize {
        self.ramp_layers.len()
    }

    /// Most requests that one pass can have rows of.
    pub fn batch(&self) -> usize {
        self.max_batch.min(self.max_requests) as usize
    }

    /// Most rows that one window can have, those of prompts included.
    pub fn window_rows(&self) -> usize {
        match self.max_pass_rows {
            0 => self.max_batch as usize,
            n => n as usize,
        }
    }

    /// Most decode and pending rows that one pass can have.
    pub fn pass_rows(&self) -> usize {
        let rows = u64::from(self.max_requests) * (1 + u64::from(self.pending()));
        rows.min(self.max_batch.into()) as usize
    }

    /// Pending rows of a request at most: they and the next row have to fit
    /// into one pass. 0 where the arena has no room for any.
    pub fn pending(&self) -> u32 {
        if self.n_slots <= self.max_requests {
            return 0;
        }
        let most = match self.max_pending {
            0 => MAX_PENDING,
            n => n,
        };
        most.min(self.max_batch - 1)
    }

    /// The fill of requests that name none.
    pub fn fill_of(&self, quality: Quality) -> Fill {
        match quality {
            Quality::Given | Quality::Agreement(_) => self.fill,
            Quality::Lossless => Fill::Verify,
        }
    }

    /// Whether there is room for `fill`.
    pub fn check_fill(&self, fill: Fill) -> Result<()> {
        if !fill.keeps() || self.pending() > 0 {
            return Ok(());
        }
        if self.max_batch < 2 {
            return Err(Error::int(
                "max_batch",
                self.max_batch,
                "at least 2 with fill POSTFILL or VERIFY, whose deep windows have several rows of \
                 a request",
            ));
        }
        Err(Error::Conflict {
            field: "n_slots",
            index: None,
            value: self.n_slots.into(),
            other: "max_requests",
            other_value: self.max_requests.into(),
            why: "with fill POSTFILL or VERIFY exited rows stay in the arena, which needs slots \
                  beyond one for each request",
        })
    }
}
