// SPDX-License-Identifier: Apache-2.0

//! One engine with its device and the host's tensors: what a handle stands
//! for.

use std::ffi::c_void;

use crate::core::config::Config;
use crate::core::error::{Error, Result};
use crate::core::memory;
use crate::core::metric::{Metric, Score};
use crate::core::scheduler::{Scheduler, Step, StepRow};
use crate::device::cuda::Cuda;
use crate::device::host::Host;
use crate::device::kv::{Kv, Layer};
use crate::device::{Arena, Device, Hole, Limits, Logits, Top, token_of};
use crate::observe::Watch;
use crate::observe::nvtx::Name;

/// Where the host's tensors lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Host,
    Cuda,
}

pub struct Engine {
    pub scheduler: Scheduler,
    pub watch: Watch,
    limits: Limits,
    /// Logits listed for each row of the last ramp; 0: none.
    n_top: usize,
    tokens: Tokens,
    device: Box<dyn Device>,
    kv: Option<Kv>,
    metrics: Vec<Option<Metric>>,
    scores: Vec<Score>,
    /// Cells of the planned step's rows, as the last ramp named them.
    cells: Vec<u32>,
    holes: Vec<Hole>,
    filled: bool,
}

/// The tokens that the last ramp's logits are of; null: logit i is of token i.
struct Tokens(*const i32);

// SAFETY: the array is the host's, which lets one thread at a time into an
// engine.
unsafe impl Send for Tokens {}

/// The starter of the device's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launch {
    /// This call.
    Now,
    /// The host, by replaying a graph.
    Replay,
}

const UNBOUND: Error = Error::CallOrder("no K/V is bound; expected drex_bind_kv first");

impl Engine {
    /// On the host, where a step's rows are all that limits it.
    pub fn new(config: Config) -> Result<Self> {
        Engine::on(Place::Host, config, Limits::default())
    }

    /// The configuration gives the number of rows; `limits.rows` is not used.
    pub fn on(place: Place, config: Config, limits: Limits) -> Result<Self> {
        let scheduler = Scheduler::new(config)?;
        let batch = scheduler.config().pass_rows();
        let limits = Limits {
            rows: batch,
            ..limits
        };
        let device: Box<dyn Device> = match place {
            Place::Host => Box::new(Host::new(limits)?),
            Place::Cuda => Box::new(Cuda::new(limits)?),
        };
        Ok(Engine {
            scheduler,
            limits,
            watch: Watch::new(),
            n_top: 0,
            tokens: Tokens(std::ptr::null()),
            device,
            kv: None,
            metrics: memory::room(batch)?,
            scores: memory::room(batch)?,
            cells: memory::room(batch)?,
            holes: memory::room(batch)?,
            filled: false,
        })
    }

    /// Replaces the bound tensors; `None` unbinds.
    pub fn bind_kv(&mut self, layers: Option<Vec<Layer>>) -> Result<()> {
        if self.scheduler.step().is_some() {
            return Err(Error::CallOrder(
                "a step is planned; expected drex_complete or drex_abandon first",
            ));
        }
        let config = self.scheduler.config();
        let first = config.ramp_layers[0] as usize - 1;
        let kv = match layers {
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
        self.device.bind(kv.as_ref())?;
        self.kv = kv;
        Ok(())
    }

    pub fn plan(&mut self, now_ns: u64, capacity: usize, n_prompts: u32) -> Result<Option<Step>> {
        self.watch.look();
        let _range = self.watch.range(Name::Plan);
        let device = &mut self.device;
        let step = self
            .scheduler
            .plan_with(now_ns, capacity, n_prompts, |rows| {
                device.plan_rows(&mut rows.iter().map(|r| r.slot))
            })?;
        self.filled = false;
        self.n_top = 0;
        if self.watch.on() {
            self.watch.planned(&self.scheduler);
        }
        Ok(step)
    }

    pub fn abandon(&mut self) -> Result<()> {
        if self.watch.on() {
            self.watch.abandoning(&self.scheduler);
        }
        self.scheduler.abandon()
    }

    pub fn remove(&mut self, id: u64) -> Result<()> {
        if !self.watch.on() {
            return self.scheduler.remove(id);
        }
        self.watch.removing(&self.scheduler, id);
        self.scheduler.remove(id)?;
        self.watch.request(id, "removed");
        Ok(())
    }

    /// # Safety
    /// The logits may be read until they were scored.
    pub unsafe fn enqueue(&mut self, logits: &Logits, n_rows: usize) -> Result<()> {
        self.check_top(logits)?;
        if n_rows > self.limits.rows {
            return Err(Error::Capacity {
                field: "logits.n_rows",
                value: n_rows as u64,
                need: self.limits.rows as u64,
                why: "no step has more rows than that",
            });
        }
        // SAFETY: by this function's contract.
        unsafe { self.device.enqueue(logits, n_rows) }
    }

    fn check_top(&self, logits: &Logits) -> Result<()> {
        if logits.n_top > self.limits.n_top as usize {
            return Err(Error::Conflict {
                field: "logits.n_top",
                index: None,
                value: logits.n_top as u64,
                other: "n_top of drex_config",
                other_value: self.limits.n_top.into(),
                why: "memory for the lists is made with the engine",
            });
        }
        Ok(())
    }

    /// The greatest logits of a row of the last ramp; how many there are.
    pub fn top(&self, row: usize, out: &mut [Top]) -> Result<usize> {
        if self.n_top == 0 || !self.scheduler.ramped() {
            return Err(Error::CallOrder(
                "no ramp has listed logits in the planned step; expected drex_ramp with n_top",
            ));
        }
        let rows = self.scheduler.step_rows();
        if row >= rows.len() {
            return Err(Error::Conflict {
                field: "row",
                index: None,
                value: row as u64,
                other: "the planned step's n_rows",
                other_value: rows.len() as u64,
                why: "rows count from 0",
            });
        }
        let n = if rows[row].gone || rows[row].back > 0 {
            0
        } else {
            self.n_top.min(out.len())
        };
        self.device.top(row, self.n_top, &mut out[..n]);
        for t in &mut out[..n] {
            // SAFETY: the host leaves the array as it is until the step ends.
            t.token = unsafe { token_of(self.tokens.0, t.token) };
        }
        Ok(n)
    }

    /// # Safety
    /// The rows may be read and written, and do not overlap.
    pub unsafe fn copy_rows(&mut self, arena: &Arena, to_arena: bool) -> Result<()> {
        if self.scheduler.step().is_none() {
            return Err(Error::CallOrder(
                "no step is planned; expected drex_plan first",
            ));
        }
        let name = if to_arena {
            Name::Scatter
        } else {
            Name::Gather
        };
        let _range = self.watch.range(name);
        let rows = self.scheduler.step_rows();
        if rows.is_empty() {
            return Ok(());
        }
        // SAFETY: by this function's contract.
        unsafe {
            self.device
                .copy_rows(arena, to_arena, &mut rows.iter().map(|r| r.slot))
        }
    }

    /// A ramp that only prompt rows pass.
    pub fn ramp_without_rows(&mut self) -> Result<()> {
        self.scheduler.ramp(&[])?;
        if self.watch.on() {
            self.watch.ramped(&self.scheduler);
        }
        Ok(())
    }

    /// # Safety
    /// `logits` has a readable row for every planned row, and `cells`, if not
    /// null, one number.
    ///
    /// `confirm` says whether a row that would exit may, with its token.
    pub unsafe fn ramp(
        &mut self,
        logits: &Logits,
        cells: *const u32,
        confirm: Option<impl Fn(u32, i32) -> bool>,
    ) -> Result<()> {
        let _range = self.watch.range(Name::Ramp);
        // SAFETY: by this function's contract.
        unsafe { self.list_cells(cells)? };
        self.list_metrics();
        self.check_top(logits)?;
        // SAFETY: by this function's contract.
        unsafe {
            self.device.score(logits, &self.metrics, &mut self.scores)?;
            logits.finish(&self.metrics, &mut self.scores);
        }
        self.tokens = Tokens(logits.token_ids);
        if let Some(confirm) = confirm {
            self.scheduler.confirm(&mut self.scores, confirm)?;
        }
        if self.watch.on() {
            return self.decide_watched(logits.n_top);
        }
        self.scheduler.ramp(&self.scores)?;
        self.n_top = logits.n_top;
        Ok(())
    }

    /// Lists the cell of each row of the ramp, where K/V is bound. A function of its
    /// own, as [`Engine::list_metrics`] is.
    ///
    /// # Safety
    /// As [`Engine::ramp`].
    #[inline(never)]
    unsafe fn list_cells(&mut self, cells: *const u32) -> Result<()> {
        self.cells.clear();
        let Some(kv) = &self.kv else {
            return Ok(());
        };
        if cells.is_null() {
            return Err(Error::CallOrder(
                "cells is NULL, but K/V is bound; expected one cell per row",
            ));
        }
        for (i, row) in self.scheduler.step_rows().iter().enumerate() {
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
        Ok(())
    }

    /// Lists what is asked of each row of the ramp. A function of its own, so that
    /// what comes after does not take registers from its loop.
    #[inline(never)]
    fn list_metrics(&mut self) {
        self.metrics.clear();
        self.scores.clear();
        for row in self.scheduler.step_rows() {
            let metric = (!row.gone && row.back == 0).then(|| self.scheduler.metric_of(row));
            self.metrics.push(metric);
            self.scores.push(Score::NONE);
        }
    }

    #[cold]
    #[inline(never)]
    fn decide_watched(&mut self, n_top: usize) -> Result<()> {
        self.scheduler.ramp(&self.scores)?;
        self.n_top = n_top;
        self.watch.ramped(&self.scheduler);
        Ok(())
    }

    /// Enqueues the fill of holes that [`Engine::fill`] with `Launch::Replay`
    /// names.
    ///
    /// # Safety
    /// As [`Device::enqueue_fill`].
    pub unsafe fn enqueue_fill(&mut self, stream: *mut c_void) -> Result<()> {
        if self.kv.is_none() {
            return Err(UNBOUND);
        }
        // SAFETY: by this function's contract.
        unsafe { self.device.enqueue_fill(stream) }
    }

    pub fn fill(&mut self, launch: Launch) -> Result<()> {
        let _range = self.watch.range(Name::Fill);
        let Some(kv) = &self.kv else {
            return Err(UNBOUND);
        };
        let layer = match self.scheduler.step() {
            Some(step) if self.scheduler.ramped() => step.layer_end,
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
        for (row, &cell) in self.scheduler.step_rows().iter().zip(&self.cells) {
            // A request that was removed since has no use for its cells, and
            // the host may have given them to another one.
            if row.copies() {
                self.holes.push(Hole { cell });
            }
        }
        match launch {
            // SAFETY: `Kv::new` checked the layers, `ramp` the cells; the host
            // vouched for the pointers when it bound them.
            Launch::Now => unsafe { self.device.fill(kv, layer, &self.holes)? },
            Launch::Replay => self.device.plan_fill(layer, &self.holes)?,
        }
        let n = self.holes.len() as u64;
        let bytes = n * kv.hole_bytes(layer);
        let counters = self.scheduler.counters_mut();
        counters.cells_filled += n;
        counters.bytes_filled += bytes;
        self.filled = true;
        Ok(())
    }

    /// `tokens`: see [`Scheduler::teach`].
    pub fn complete(
        &mut self,
        now_ns: u64,
        duration_ns: u64,
        cells: u64,
        tokens: Option<impl Fn(usize) -> i32>,
    ) -> Result<()> {
        let _range = self.watch.range(Name::Complete);
        let unfilled = self.kv.is_some()
            && self.scheduler.ramped()
            && !self.filled
            && self.scheduler.step_rows().iter().any(StepRow::copies);
        if unfilled {
            return Err(Error::CallOrder(
                "rows exited and their skipped layers are not filled; expected drex_fill first",
            ));
        }
        let step = self.scheduler.expect_complete()?;
        if let (None, Some(tokens)) = (step.ramp, tokens) {
            self.scheduler.teach(tokens);
        }
        if !self.watch.on() {
            return self.scheduler.complete(now_ns, duration_ns, cells);
        }
        let before = self.watch.completing(&self.scheduler, now_ns, duration_ns);
        self.scheduler.complete(now_ns, duration_ns, cells)?;
        self.watch.completed(&self.scheduler, &before);
        Ok(())
    }
}
