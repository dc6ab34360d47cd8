// SPDX-License-Identifier: Apache-2.0

//! Tensors in the memory of a CUDA device.
//!
//! The host's context and streams are used as they are. Everything that drex
//! needs for itself is allocated when an engine is made or K/V is bound; after
//! that, a ramp is one launch, one small copy to pinned memory and one wait,
//! and a fill one launch.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUfunction, CUstream};

use self::args::{
    COPY_THREADS, CopyRowsArgs, DeviceMoments, DeviceSide, FillArgs, INLINE_ROWS, RAMP_CHUNK,
    RAMP_MAX_LISTS, RAMP_MAX_TOP, RAMP_THREADS, RampArgs, Rows, Shape, layers_a_turn,
};
use self::driver::{Current, Driver};
use self::memory::{Buffer, List, Module, Pinned};
use super::kv::{Kv, Layout, Side};
use super::{Arena, Device, Dtype, Hole, Limits, Logits, Top};
use crate::core::error::{Error, Result};
use crate::core::metric::{Metric, Moments, Score};

pub mod args;
mod driver;
mod image;
mod memory;

/// Chunks of a row that there is scratch for when the host names no n_vocab.
const DEFAULT_VOCAB: u32 = 512 * 1024;

struct Kernels {
    ramp: [CUfunction; 3],
    ramp_top: [CUfunction; 3],
    fill: CUfunction,
    copy_rows: CUfunction,
}

/// The bound layers, as the kernels see them.
struct Bound {
    sides: Buffer,
    n_layers: u32,
    shape: [Shape; 2],
    /// The first layer that is ever copied from.
    first: u32,
}

/// Where the parts of the scratch memory begin.
struct Plan {
    partial: CUdeviceptr,
    partial_top: CUdeviceptr,
    arrived: CUdeviceptr,
    out: CUdeviceptr,
    out_top: CUdeviceptr,
}

/// Dropped with the context current.
struct Resources {
    kernels: Kernels,
    bound: Option<Bound>,
    results: Pinned,
    holes: List,
    rows: List,
    plan: Plan,
    _scratch: Buffer,
    _module: Module,
}

pub struct Cuda {
    driver: &'static Driver,
    context: CUcontext,
    limits: Limits,
    n_chunks: u32,
    /// Taken out only when this is dropped.
    resources: Option<Resources>,
    /// Of the last ramp; fills go there.
    stream: CUstream,
    /// A graph reads the list of rows.
    rows_captured: bool,
    /// Enqueued, and not scored yet.
    enqueued: Option<Enqueued>,
    /// Graphs bring results, of their captures' rows.
    ramp_captured: bool,
}

/// A ramp that runs on the device.
#[derive(Debug, Clone, Copy)]
struct Enqueued {
    logits: Logits,
    n_rows: usize,
}

impl Enqueued {
    /// Another ramp's results are no answer for these logits.
    fn check(&self, logits: &Logits, n_rows: usize) -> Result<()> {
        let fields = |l: &Logits, n_rows: usize| {
            [
                ("logits.data", l.data as u64),
                ("logits.row_stride_bytes", l.row_stride as u64),
                ("logits.dtype", l.dtype as u64),
                ("logits.n_vocab", l.n_vocab as u64),
                ("logits.n_rows", n_rows as u64),
                ("logits.n_top", l.n_top as u64),
                ("logits.stream", l.stream as u64),
            ]
        };
        let pairs = fields(logits, n_rows).into_iter();
        for ((field, value), (_, before)) in pairs.zip(fields(&self.logits, self.n_rows)) {
            if value != before {
                return Err(Error::Changed {
                    field,
                    value,
                    call: "drex_ramp_enqueue",
                    before,
                });
            }
        }
        Ok(())
    }
}

// SAFETY: handles of the driver may be used from any thread, with the context
// current; one thread at a time is inside an engine.
unsafe impl Send for Cuda {}

impl Cuda {
    /// On the calling thread's current context.
    pub fn new(limits: Limits) -> Result<Cuda> {
        let driver = Driver::get()?;
        let mut context: CUcontext = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { driver.cuCtxGetCurrent(&mut context)? };
        if context.is_null() {
            return Err(Error::CallOrder(
                "no CUDA context is current on this thread; expected the host's",
            ));
        }
        let n_vocab = match limits.n_vocab {
            0 => DEFAULT_VOCAB,
            n => n,
        };
        let n_chunks = n_vocab.div_ceil(RAMP_CHUNK);
        if limits.n_top > 0 && n_chunks > RAMP_MAX_LISTS {
            return Err(Error::Conflict {
                field: "n_vocab",
                index: None,
                value: n_vocab.into(),
                other: "n_top",
                other_value: limits.n_top.into(),
                why: "the greatest logits of so long a row cannot be listed on a CUDA device",
            });
        }
        Ok(Cuda {
            driver,
            context,
            limits: Limits { n_vocab, ..limits },
            n_chunks,
            resources: Some(Resources::new(driver, &limits, n_chunks)?),
            stream: ptr::null_mut(),
            rows_captured: false,
            enqueued: None,
            ramp_captured: false,
        })
    }

    fn enter(&self) -> Result<Current<'static>> {
        Current::of(self.driver, self.context)
    }

    /// For the stream of the last ramp.
    fn wait(&self) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the host's stream.
        unsafe { self.driver.cuStreamSynchronize(self.stream) }
    }

    fn resources(&mut self) -> &mut Resources {
        match &mut self.resources {
            Some(r) => r,
            None => unreachable!("taken out only by drop"),
        }
    }

    fn capturing(&self, stream: CUstream) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the host's stream; writes one number.
        unsafe { self.driver.cuStreamIsCapturing(stream, &mut status)? };
        Ok(status != 0)
    }

    /// # Safety
    /// `args` is what the kernel takes, and what it points to is valid.
    unsafe fn launch<A>(
        &self,
        kernel: CUfunction,
        grid: (u32, u32),
        threads: u32,
        stream: CUstream,
        args: &A,
    ) -> Result<()> {
        let mut list = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: by this function's contract; the driver copies `args`.
        unsafe {
            self.driver.cuLaunchKernel(
                kernel,
                grid.0,
                grid.1,
                1,
                threads,
                1,
                1,
                0,
                stream,
                list.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let resources = self.resources.take();
        match self.enter() {
            Ok(_current) => drop(resources),
            // Most likely the context is gone, and with it all that was in it:
            // the addresses may be somebody else's. If not, they would be looked
            // for in a context that they are not of.
            Err(_) => std::mem::forget(resources),
        }
    }
}

impl Resources {
    fn new(driver: &'static Driver, limits: &Limits, n_chunks: u32) -> Result<Resources> {
        let (module, kernels) = load(driver)?;
        let (rows, chunks, top) = (limits.rows, n_chunks as usize, limits.n_top as usize);
        let moments = size_of::<DeviceMoments>();
        let mut size = 0usize;
        let mut part = |bytes: usize| {
            let at = size;
            size = (size + bytes).next_multiple_of(16);
            at as CUdeviceptr
        };
        let mut plan = Plan {
            partial: part(rows * chunks * moments),
            partial_top: part(rows * chunks * top * size_of::<Top>()),
            arrived: part(rows * size_of::<u32>()),
            out: part(rows * moments),
            out_top: part(rows * top * size_of::<Top>()),
        };
        let scratch = Buffer::new(driver, size)?;
        // The host's streams need not be ordered behind the default one, on
        // which this runs.
        // SAFETY: as long as was just allocated; the default stream.
        unsafe {
            driver.cuMemsetD8_v2(scratch.at, 0, size.max(1))?;
            driver.cuStreamSynchronize(ptr::null_mut())?;
        }
        for at in [
            &mut plan.partial,
            &mut plan.partial_top,
            &mut plan.arrived,
            &mut plan.out,
            &mut plan.out_top,
        ] {
            *at += scratch.at;
        }
        let results = Pinned::new(driver, rows * (moments + top * size_of::<Top>()))?;
        for i in 0..rows {
            forget(&results, i);
        }
        Ok(Resources {
            kernels,
            bound: None,
            results,
            holes: List::new(driver, rows)?,
            rows: List::new(driver, rows)?,
            plan,
            _scratch: scratch,
            _module: module,
        })
    }
}

/// So that a row whose result never comes, since its graph was not launched, is
/// one without a confidence: it does not leave.
fn forget(results: &Pinned, row: usize) {
    let none = DeviceMoments {
        top: f32::NEG_INFINITY,
        second: f32::NEG_INFINITY,
        sum: f32::NAN,
        weighted: f32::NAN,
        token: -1,
    };
    // SAFETY: there is room for every row of a step, and nothing else writes
    // there now.
    unsafe {
        let to = results.host.cast::<DeviceMoments>().add(row);
        to.write_volatile(none);
    }
}

/// The first image that this driver and device take.
fn load(driver: &'static Driver) -> Result<(Module, Kernels)> {
    /// CUDA_ERROR_INVALID_IMAGE, _NO_BINARY_FOR_GPU: for another device, or for
    /// a driver that is newer.
    const ANOTHER: [i32; 2] = [200, 209];
    let [binary, ptx] = image::ALL;
    // SAFETY: an image that nvcc made.
    let module = match unsafe { Module::new(driver, binary) } {
        Err(first @ Error::Driver { code, .. }) if ANOTHER.contains(&code) => {
            // SAFETY: as above. What it says of this image is less to the point.
            unsafe { Module::new(driver, ptx) }.map_err(|_| first)
        }
        module => module,
    }?;
    let get = |name: &CStr| {
        /// CU_FUNC_ATTRIBUTE_NUM_REGS
        const REGISTERS: i32 = 4;
        let mut function = ptr::null_mut();
        let mut registers = 0;
        // SAFETY: writes a handle and a number. The second call has the
        // function loaded now, and not in somebody's graph capture.
        unsafe {
            driver.cuModuleGetFunction(&mut function, module.handle, name.as_ptr())?;
            driver.cuFuncGetAttribute(&mut registers, REGISTERS, function)?;
        }
        Ok(function)
    };
    let kernels = Kernels {
        ramp: [
            get(c"drex_ramp_f32")?,
            get(c"drex_ramp_f16")?,
            get(c"drex_ramp_bf16")?,
        ],
        ramp_top: [
            get(c"drex_ramp_top_f32")?,
            get(c"drex_ramp_top_f16")?,
            get(c"drex_ramp_top_bf16")?,
        ],
        fill: get(c"drex_state_copy")?,
        copy_rows: get(c"drex_copy_rows")?,
    };
    Ok((module, kernels))
}

/// The largest unit, a power of two up to 16, that divides all of these.
fn unit(numbers: impl Iterator<Item = u64>) -> u32 {
    let bits = numbers.fold(16, |a, b| a | b);
    1 << bits.trailing_zeros()
}

fn shape(sides: &[Side]) -> Shape {
    let alignment =
        |extra: &dyn Fn(&Side) -> u64| unit(sides.iter().flat_map(|s| [s.data as u64, extra(s)]));
    match sides[0].layout {
        _ if sides[0].bytes() == 0 => Shape {
            n: 0,
            unit: 1,
            transposed: 0,
        },
        Layout::Rows { bytes, .. } => {
            let unit = alignment(&|s| match s.layout {
                Layout::Rows { stride, .. } | Layout::Transposed { stride, .. } => stride as u64,
            })
            .min(unit(std::iter::once(bytes as u64)));
            Shape {
                n: (bytes / unit as usize) as u32,
                unit,
                transposed: 0,
            }
        }
        Layout::Transposed { n, elem, .. } => Shape {
            n: n as u32,
            unit: elem as u32,
            transposed: 1,
        },
    }
}

/// The kernels count units in 32 bits, beyond the last by a grid.
fn check_units(units: u64) -> Result<()> {
    const MOST: u64 = u32::MAX as u64 - (1 << 16) * COPY_THREADS as u64;
    if units <= MOST {
        return Ok(());
    }
    Err(Error::Capacity {
        field: "units of memory that one launch moves",
        value: MOST,
        need: units,
        why: "fewer rows or smaller ones",
    })
}

/// Element sizes of transposed V that the kernel knows, at their alignment.
fn check_transposed(sides: &[Side]) -> Result<()> {
    for (i, side) in sides.iter().enumerate() {
        if let Layout::Transposed { elem, stride, n } = side.layout {
            if n == 0 {
                continue;
            }
            if !matches!(elem, 1 | 2 | 4 | 8 | 16) {
                return Err(Error::int(
                    "layers.v_elem_bytes",
                    elem as u64,
                    "1, 2, 4, 8 or 16 on a CUDA device",
                )
                .at(i));
            }
            let expected = "a multiple of v_elem_bytes on a CUDA device";
            if !(side.data as u64).is_multiple_of(elem as u64) {
                return Err(Error::pointer("layers.v", side.data as u64, expected).at(i));
            }
            if stride % elem != 0 {
                return Err(Error::int("layers.v_elem_stride", stride as u64, expected).at(i));
            }
        }
    }
    Ok(())
}

impl Cuda {
    /// Whether the device can read there.
    fn check_pointer(&self, field: &'static str, i: usize, side: &Side) -> Result<()> {
        /// CU_POINTER_ATTRIBUTE_DEVICE_POINTER
        const DEVICE_POINTER: i32 = 3;
        if side.bytes() == 0 {
            return Ok(());
        }
        let mut at: CUdeviceptr = 0;
        // SAFETY: writes one pointer.
        let result = unsafe {
            self.driver.cuPointerGetAttribute(
                ptr::from_mut(&mut at).cast(),
                DEVICE_POINTER,
                side.data as CUdeviceptr,
            )
        };
        match result {
            Ok(()) => Ok(()),
            // CUDA_ERROR_INVALID_VALUE: no memory that CUDA knows.
            Err(Error::Driver { code: 1, .. }) => Err(Error::pointer(
                field,
                side.data as u64,
                "memory that the CUDA device can reach",
            )
            .at(i)),
            Err(e) => Err(e),
        }
    }

    fn grid(&self, total: u64) -> u32 {
        // Blocks beyond this take another turn.
        (total.div_ceil(COPY_THREADS.into())).clamp(1, 1 << 16) as u32
    }

    /// # Safety
    /// As [`Device::fill`].
    unsafe fn launch_fill(
        &mut self,
        source: u32,
        n: u64,
        cells: Rows,
        stream: CUstream,
    ) -> Result<()> {
        let r = self.resources();
        let kernel = r.kernels.fill;
        let Some(bound) = &r.bound else {
            return Err(Error::CallOrder(
                "no K/V is bound; expected drex_bind_kv first",
            ));
        };
        let targets = bound.n_layers - 1 - source;
        let units = n * (u64::from(bound.shape[0].n) + u64::from(bound.shape[1].n));
        check_units(units)?;
        // So many threads keep any device's memory busy.
        const BUSY: u32 = 1 << 17;
        let args = FillArgs {
            sides: bound.sides.at,
            n_layers: bound.n_layers,
            source,
            busy: BUSY,
            shape: bound.shape,
            cells,
        };
        let most = units.max(1) as u32;
        let groups = targets.div_ceil(layers_a_turn(most, targets, BUSY));
        let one = u64::from(most.next_multiple_of(COPY_THREADS));
        let mut threads = one * u64::from(groups);
        if args.cells.there != 0 {
            // The list may have fewer when the launch runs, which then are spread
            // over more layers.
            let fewer = (2 * u64::from(BUSY)).min(one * u64::from(targets));
            threads = threads.max(fewer);
        }
        let grid = (self.grid(threads), 1);
        // SAFETY: by this function's contract.
        unsafe { self.launch(kernel, grid, COPY_THREADS, stream, &args) }
    }

    /// # Safety
    /// As [`Device::enqueue`].
    unsafe fn launch_ramp(&mut self, logits: &Logits, n_rows: usize, weighted: bool) -> Result<()> {
        let _current = self.enter()?;
        if logits.n_vocab > self.limits.n_vocab as usize {
            return Err(Error::Capacity {
                field: "n_vocab of drex_config",
                value: self.limits.n_vocab.into(),
                need: logits.n_vocab as u64,
                why: "scratch memory was made for rows of that length",
            });
        }
        let element = logits.dtype.bytes();
        if (logits.data as usize | logits.row_stride) & (element - 1) != 0 {
            return Err(Error::int(
                "logits.data",
                logits.data as u64,
                "rows that begin at a multiple of their element's size, on a CUDA device",
            ));
        }
        let n_chunks = (logits.n_vocab as u32).div_ceil(RAMP_CHUNK);
        debug_assert!(n_chunks <= self.n_chunks);
        let n_top = logits.n_top as u32;
        let rows = self.limits.rows;
        let r = self.resources();
        let args = RampArgs {
            logits: logits.data as CUdeviceptr,
            row_stride: logits.row_stride as u64,
            n_rows: n_rows as u32,
            n_vocab: logits.n_vocab as u32,
            n_chunks,
            vectors: u32::from((logits.data as usize | logits.row_stride) & 15 == 0),
            weighted: weighted.into(),
            n_top,
            partial: r.plan.partial,
            partial_top: r.plan.partial_top,
            arrived: r.plan.arrived,
            out: r.plan.out,
            out_top: r.plan.out_top,
        };
        let dtype = match logits.dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::Bf16 => 2,
        };
        let kernel = match n_top {
            0 => r.kernels.ramp[dtype],
            _ => r.kernels.ramp_top[dtype],
        };
        let (out, out_top, host) = (r.plan.out, r.plan.out_top, r.results.host);
        let stream: CUstream = logits.stream.cast();
        let blocks = i32::try_from(n_rows * n_chunks as usize)
            .map_err(|_| Error::int("logits.n_rows", n_rows as u64, "fewer rows of this length"))?;
        // SAFETY: the caller vouches for the logits; the rest is ours, for
        // `rows` rows, and `n_rows` is at most that.
        unsafe {
            self.launch(kernel, (blocks as u32, 1), RAMP_THREADS, stream, &args)?;
            let moments = size_of::<DeviceMoments>();
            self.driver
                .cuMemcpyDtoHAsync_v2(host, out, n_rows * moments, stream)?;
            if n_top > 0 {
                self.driver.cuMemcpyDtoHAsync_v2(
                    host.byte_add(rows * moments),
                    out_top,
                    n_rows * n_top as usize * size_of::<Top>(),
                    stream,
                )?;
            }
        }
        Ok(())
    }
}

impl Device for Cuda {
    fn bind(&mut self, kv: Option<&Kv>) -> Result<()> {
        let _current = self.enter()?;
        let Some(kv) = kv else {
            self.resources().bound = None;
            return Ok(());
        };
        let first = kv.first();
        let used = &kv.layers()[first..];
        let k: Vec<Side> = used.iter().map(|l| l.k).collect();
        let v: Vec<Side> = used.iter().map(|l| l.v).collect();
        check_transposed(&v).map_err(|e| e.moved(first))?;
        for (i, layer) in used.iter().enumerate() {
            self.check_pointer("layers.k", first + i, &layer.k)?;
            self.check_pointer("layers.v", first + i, &layer.v)?;
        }
        let device = |s: &Side| DeviceSide {
            data: s.data as CUdeviceptr,
            stride: match s.layout {
                Layout::Rows { stride, .. } | Layout::Transposed { stride, .. } => stride as u64,
            },
        };
        let table: Vec<DeviceSide> = kv
            .layers()
            .iter()
            .flat_map(|l| [device(&l.k), device(&l.v)])
            .collect();
        let bytes = size_of_val(table.as_slice());
        let sides = Buffer::new(self.driver, bytes)?;
        // SAFETY: as long as was just allocated; the default stream, for which
        // the host's need not wait.
        unsafe {
            self.driver
                .cuMemcpyHtoD_v2(sides.at, table.as_ptr().cast(), bytes)?;
            self.driver.cuStreamSynchronize(ptr::null_mut())?;
        }
        self.resources().bound = Some(Bound {
            sides,
            n_layers: kv.layers().len() as u32,
            shape: [shape(&k), shape(&v)],
            first: first as u32,
        });
        Ok(())
    }

    unsafe fn enqueue(&mut self, logits: &Logits, n_rows: usize) -> Result<()> {
        let stream = logits.stream.cast();
        let capturing = {
            let _current = self.enter()?;
            self.capturing(stream)?
        };
        if !capturing
            && self
                .enqueued
                .is_some_and(|e| e.logits.stream != logits.stream)
        {
            // Nothing orders one stream's results before the other's.
            self.wait()?;
        }
        // The rows' metrics are not known yet: nothing is left out.
        // SAFETY: the same contract.
        unsafe { self.launch_ramp(logits, n_rows, true)? };
        if capturing {
            self.ramp_captured = true;
        } else {
            self.enqueued = Some(Enqueued {
                logits: *logits,
                n_rows,
            });
            self.stream = stream;
        }
        Ok(())
    }

    unsafe fn score(
        &mut self,
        logits: &Logits,
        metrics: &[Option<Metric>],
        out: &mut [Score],
    ) -> Result<()> {
        match &self.enqueued {
            Some(enqueued) if logits.enqueued => enqueued.check(logits, metrics.len())?,
            None if logits.enqueued && !self.ramp_captured => {
                return Err(Error::CallOrder(
                    "logits.enqueued is 1, but nothing was enqueued; expected drex_ramp_enqueue \
                     first",
                ));
            }
            None if logits.enqueued => {}
            enqueued => {
                // Results that nobody asks for come before these.
                if enqueued.is_some() {
                    self.wait()?;
                }
                let weighted = metrics.contains(&Some(Metric::Entropy));
                // SAFETY: the same contract.
                unsafe { self.launch_ramp(logits, metrics.len(), weighted)? };
            }
        }
        self.stream = logits.stream.cast();
        self.wait()?;
        self.enqueued = None;
        // A graph may have had more rows than the step.
        let brought = if logits.enqueued && self.ramp_captured {
            self.limits.rows
        } else {
            metrics.len()
        };
        let results = &self.resources().results;
        let found = results.host.cast::<DeviceMoments>();
        for (i, (metric, out)) in metrics.iter().zip(out).enumerate() {
            // SAFETY: there is room for every row of a step.
            let m = unsafe { found.add(i).read_volatile() };
            let Some(metric) = *metric else { continue };
            let moments = Moments {
                top: m.top,
                second: m.second,
                sum: m.sum.into(),
                weighted: m.weighted.into(),
                nan: m.sum.is_nan(),
            };
            let confidence = moments.confidence(metric, logits.n_vocab);
            *out = Score {
                confidence,
                token: if confidence.is_nan() { -1 } else { m.token },
            };
        }
        (0..brought).for_each(|i| forget(results, i));
        Ok(())
    }

    fn top(&self, row: usize, n_top: usize, out: &mut [Top]) {
        let Some(r) = &self.resources else { return };
        let skip = self.limits.rows * size_of::<DeviceMoments>();
        for (i, out) in out.iter_mut().enumerate().take(n_top) {
            // SAFETY: `n_top` entries for every row, after the moments.
            *out = unsafe {
                let tops = r.results.host.byte_add(skip).cast::<Top>();
                tops.add(row * n_top + i).read_volatile()
            };
        }
    }

    unsafe fn fill(&mut self, _kv: &Kv, layer: u32, holes: &[Hole]) -> Result<()> {
        if holes.is_empty() {
            return Ok(());
        }
        let _current = self.enter()?;
        let (source, stream) = (layer - 1, self.stream);
        let mut cells = Rows {
            there: 0,
            n: holes.len() as u32,
            here: [0; INLINE_ROWS],
        };
        let inline = holes.len() <= INLINE_ROWS;
        if inline {
            for (to, hole) in cells.here.iter_mut().zip(holes) {
                *to = hole.cell;
            }
        } else {
            let list = &mut self.resources().holes;
            list.write(source, holes.iter().map(|h| h.cell))?;
            cells.there = list.device;
        }
        // SAFETY: the same contract.
        unsafe { self.launch_fill(source, holes.len() as u64, cells, stream)? };
        if !inline {
            self.resources().holes.read_on(stream)?;
        }
        Ok(())
    }

    fn plan_fill(&mut self, layer: u32, holes: &[Hole]) -> Result<()> {
        let _current = self.enter()?;
        let list = &mut self.resources().holes;
        list.write(layer - 1, holes.iter().map(|h| h.cell))
    }

    unsafe fn enqueue_fill(&mut self, stream: *mut c_void) -> Result<()> {
        let _current = self.enter()?;
        let n = self.limits.rows as u64;
        let r = self.resources();
        let there = r.holes.device;
        // The source is in the list; the grid is for the most that can be.
        let source = r.bound.as_ref().map_or(0, |b| b.first);
        let cells = Rows {
            there,
            n: 0,
            here: [0; INLINE_ROWS],
        };
        let stream: CUstream = stream.cast();
        // SAFETY: the same contract.
        unsafe { self.launch_fill(source, n, cells, stream)? };
        if !self.capturing(stream)? {
            self.resources().holes.read_on(stream)?;
        }
        Ok(())
    }

    fn plan_rows(&mut self, slots: &mut dyn ExactSizeIterator<Item = u32>) -> Result<()> {
        let given_up = self.enqueued.take().is_some();
        if given_up {
            // The step's results must not come after this. Tried once: the host may
            // have taken its stream down with the step.
            self.wait()?;
        }
        if given_up || self.ramp_captured {
            // A step that was given up may have left its results.
            let rows = self.limits.rows;
            let results = &self.resources().results;
            (0..rows).for_each(|i| forget(results, i));
        }
        let captured = self.rows_captured;
        if !captured && !self.resources().rows.busy() {
            return Ok(());
        }
        let _current = self.enter()?;
        let list = &mut self.resources().rows;
        // Now, and not in a capture, where waiting is not allowed.
        list.wait()?;
        if captured {
            list.write(0, slots)?;
        }
        Ok(())
    }

    unsafe fn copy_rows(
        &mut self,
        arena: &Arena,
        to_arena: bool,
        slots: &mut dyn ExactSizeIterator<Item = u32>,
    ) -> Result<()> {
        let n = slots.len();
        let _current = self.enter()?;
        let stream: CUstream = arena.stream.cast();
        let capturing = self.capturing(stream)?;
        let mut rows = Rows {
            there: 0,
            n: n as u32,
            here: [0; INLINE_ROWS],
        };
        let listed = capturing || n > INLINE_ROWS;
        if listed {
            let list = &mut self.resources().rows;
            list.write(0, slots)?;
            rows.there = list.device;
        } else {
            for (to, slot) in rows.here.iter_mut().zip(slots) {
                *to = slot;
            }
        }
        let unit = unit(
            [
                arena.arena as u64,
                arena.dense as u64,
                arena.arena_stride as u64,
                arena.dense_stride as u64,
                arena.row_bytes as u64,
            ]
            .into_iter(),
        );
        let args = CopyRowsArgs {
            arena: arena.arena as CUdeviceptr,
            dense: arena.dense as CUdeviceptr,
            arena_stride: arena.arena_stride as u64,
            dense_stride: arena.dense_stride as u64,
            n_units: (arena.row_bytes / unit as usize) as u32,
            unit,
            to_arena: to_arena.into(),
            rows,
        };
        // A graph may be replayed over as many rows as a step can have.
        let most = if capturing { self.limits.rows } else { n } as u64;
        check_units(most * u64::from(args.n_units))?;
        let grid = (self.grid(most * u64::from(args.n_units)), 1);
        let kernel = self.resources().kernels.copy_rows;
        // SAFETY: the same contract.
        unsafe { self.launch(kernel, grid, COPY_THREADS, stream, &args)? };
        self.rows_captured |= capturing;
        if listed && !capturing {
            self.resources().rows.read_on(stream)?;
        }
        Ok(())
    }
}

const _: () = assert!(RAMP_MAX_TOP as usize == super::MAX_TOP);
