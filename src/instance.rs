// SPDX-License-Identifier: Apache-2.0

//! One engine with its device and the host's tensors: what a handle stands
//! for.

use crate::core::config::Config;
use crate::core::engine::{Engine, Step, StepRow};
use crate::core::error::{Error, Result};
use crate::core::metric::{Metric, Score};
use crate::device::host::Host;
use crate::device::kv::{Kv, Layer};
use crate::device::{Device, Hole, Logits};
use crate::observe::Watch;

pub struct Instance {
    pub engine: Engine,
    pub watch: Watch,
    device: Box<dyn Device>,
    kv: Option<Kv>,
    metrics: Vec<Option<Metric>>,
    scores: Vec<Score>,
    /// Cells of the planned step's rows, as the last ramp named them.
    cells: Vec<u32>,
    holes: Vec<Hole>,
    filled: bool,
}

impl Instance {
    pub fn new(config: Config) -> Result<Self> {
        let engine = Engine::new(config)?;
        let batch = engine.config().pass_rows();
        Ok(Instance {
            engine,
            watch: Watch::default(),
            device: Box::new(Host::new()),
            kv: None,
            metrics: Vec::with_capacity(batch),
            scores: Vec::with_capacity(batch),
            cells: Vec::with_capacity(batch),
            holes: Vec::with_capacity(batch),
            filled: false,
        })
    }

    /// Replaces the bound tensors; `None` unbinds.
    pub fn bind_kv(&mut self, layers: Option<Vec<Layer>>) -> Result<()> {
        if self.engine.step().is_some() {
            return Err(Error::CallOrder(
                "a step is planned; expected drex_complete or drex_abandon first",
            ));
        }
        let config = self.engine.config();
        let first = config.ramp_layers[0] as usize - 1;
        self.kv = match layers {
            None => None,
            Some(layers) if layers.len() != config.n_layers as usize => {
                return Err(Error::Conflict {
                    field: "n_layers",
                    index: None,
                    value: layers.len() as u64,
                    other: "the engine's n_layers",
                    other_value: config.n_layers.into(),
                    why: "every layer has one entry",
                });
            }
            Some(layers) => Some(Kv::new(layers, first)?),
        };
        Ok(())
    }

    pub fn kv_bound(&self) -> bool {
        self.kv.is_some()
    }

    pub fn plan(&mut self, now_ns: u64, capacity: usize) -> Result<Option<Step>> {
        self.filled = false;
        let step = self.engine.plan(now_ns, capacity)?;
        if self.watch.on() {
            self.watch.planned(&self.engine);
        }
        Ok(step)
    }

    /// # Safety
    /// `logits` has a readable row for every planned row, and `cells`, if not
    /// null, one number.
    pub unsafe fn ramp(&mut self, logits: &Logits, cells: *const u32) -> Result<()> {
        let rows = self.engine.step_rows();
        self.cells.clear();
        if let Some(kv) = &self.kv {
            if cells.is_null() {
                return Err(Error::CallOrder(
                    "cells is NULL, but K/V is bound; expected one cell per row",
                ));
            }
            for (i, row) in rows.iter().enumerate() {
                // SAFETY: by this function's contract.
                let cell = unsafe { cells.add(i).read_unaligned() };
                if !row.gone && cell >= kv.n_cells() {
                    return Err(Error::Conflict {
                        field: "cells",
                        index: Some(i),
                        value: cell.into(),
                        other: "n_cells of the bound K/V",
                        other_value: kv.n_cells().into(),
                        why: "a cell lies within every layer",
                    });
                }
                self.cells.push(cell);
            }
        }
        self.metrics.clear();
        self.scores.clear();
        for row in rows {
            let metric = (!row.gone && row.back == 0).then(|| self.engine.metric_of(row));
            self.metrics.push(metric);
            self.scores.push(Score::NONE);
        }
        // SAFETY: by this function's contract.
        unsafe {
            self.device.score(logits, &self.metrics, &mut self.scores)?;
        }
        self.engine.ramp(&self.scores)?;
        if self.watch.on() {
            self.watch.ramped(&self.engine);
        }
        Ok(())
    }

    pub fn fill(&mut self) -> Result<()> {
        let Some(kv) = &self.kv else {
            return Err(Error::CallOrder(
                "no K/V is bound; expected drex_bind_kv first",
            ));
        };
        let layer = match self.engine.step() {
            Some(step) if self.engine.ramped() => step.layer_end,
            _ => {
                return Err(Error::CallOrder(
                    "no ramp has let rows out since the last plan; expected drex_ramp first",
                ));
            }
        };
        if self.filled {
            return Ok(());
        }
        self.holes.clear();
        for (row, &cell) in self.engine.step_rows().iter().zip(&self.cells) {
            // A request that was removed since has no use for its cells, and
            // the host may have given them to another one.
            if row.copies() {
                self.holes.push(Hole { cell });
            }
        }
        // SAFETY: `Kv::new` checked the layers, `ramp` the cells; the host
        // vouched for the pointers when it bound them.
        unsafe { self.device.fill(kv, layer, &self.holes)? };
        let n = self.holes.len() as u64;
        let bytes = n * kv.hole_bytes(layer);
        let counters = self.engine.counters_mut();
        counters.cells_filled += n;
        counters.bytes_filled += bytes;
        self.filled = true;
        Ok(())
    }

    pub fn complete(&mut self, now_ns: u64, duration_ns: u64, cells: u64) -> Result<()> {
        let unfilled = self.kv.is_some()
            && self.engine.ramped()
            && !self.filled
            && self.engine.step_rows().iter().any(StepRow::copies);
        if unfilled {
            return Err(Error::CallOrder(
                "rows exited and their skipped layers are not filled; expected drex_fill first",
            ));
        }
        if !self.watch.on() {
            return self.engine.complete(now_ns, duration_ns, cells);
        }
        self.engine.expect_complete()?;
        let before = self.watch.completing(&self.engine, now_ns, duration_ns);
        self.engine.complete(now_ns, duration_ns, cells)?;
        self.watch.completed(&self.engine, &before);
        Ok(())
    }
}
