// SPDX-License-Identifier: Apache-2.0

//! Engines and their configuration. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::c_char;

use super::check::reserved;
use super::entry::{self, call};
use super::fault::Fault;
use super::handle;
use super::names::{from_name, name};
use super::status::*;
use crate::core::config::{Config, Fill, Policy, Quality};
use crate::core::error::Error;
use crate::core::estimate::agreement;
use crate::core::metric::Metric;
use crate::device::Limits;
use crate::engine::{Engine, Place};

/// Most exit ramps that a model may have.
pub const DREX_MAX_RAMPS: usize = 16;
/// Most of the greatest logits of a row that a ramp lists.
pub const DREX_MAX_TOP: usize = 64;

/// In place of a ramp's index: none.
pub const DREX_NO_RAMP: u32 = u32::MAX;
/// In place of an arena row: none.
pub const DREX_NO_SLOT: u32 = u32::MAX;

/// The rule by which rows leave at a ramp: DREX_POLICY_*. A row is *confident*
/// when its confidence is at least its threshold. Under every policy, a row whose
/// confidence is NaN and a row whose threshold is above 1 go on.
///
/// An *involuntary exit* is a row made to exit below its threshold; only
/// EAGER, MEDIAN and MEAN do that. An *involuntary stay* is a confident row
/// that goes on with its batch. Both are counted, and marked in the verdict.
pub type drex_policy = u32;

/// Full passes only; no ramp is ever reached.
pub const DREX_POLICY_OFF: drex_policy = 0;
/// One confident row makes the whole batch exit. Forces rows out.
pub const DREX_POLICY_EAGER: drex_policy = 1;
/// The batch exits when all of its rows are confident, else all go on at
/// once. Rows with a threshold above 1 have no say.
pub const DREX_POLICY_LAZY: drex_policy = 2;
/// The batch exits when the median of (confidence - threshold) is at least 0;
/// of an even number of rows, the mean of the middle two. Rows without a
/// number, or with a threshold above 1, have no say. Forces rows out.
pub const DREX_POLICY_MEDIAN: drex_policy = 3;
/// As MEDIAN, with the mean. Forces rows out.
pub const DREX_POLICY_MEAN: drex_policy = 4;
/// Confident rows exit, the rest go on at once.
pub const DREX_POLICY_LATENCY: drex_policy = 5;
/// Confident rows exit, the rest are held in the rebatching buffer until
/// drex_config.flush_rows are held, or fewer than drex_config.min_ready rows
/// are ready, or one has waited too long, or a deadline is near.
pub const DREX_POLICY_HOLD: drex_policy = 6;
/// DREX's adaptive rebatching threshold: a batch of b rows of which b' are
/// confident is split (confident rows exit, the rest are held) when b' = b or
/// b' > (c/t_d) b, where c = t_s + t_d - t_f is what splitting costs; else
/// all go on at once. The times of the shallow (t_s), deep (t_d) and full
/// (t_f) pass at b rows are learned from drex_complete() and drex_observe();
/// while one is unknown, c/t_d is taken as 0. Full passes are not run by
/// themselves while rows may exit: time a few and report them with
/// drex_observe(). c/t_d is kept within [0, 1].
pub const DREX_POLICY_ART: drex_policy = 7;
/// As HOLD, with the rule that is predicted to make the most tokens per
/// second, "no early exit" among the rules: which ramps are looked at, how
/// many held rows flush, below how many ready rows. Learned from what
/// drex_complete() and the ramps report: times by rows and KV cells, how
/// often rows exit. A small share of the tokens is made under other rules,
/// to keep knowing what they would bring. See drex_replan().
pub const DREX_POLICY_AUTO: drex_policy = 8;

/// How sure a row is, from its raw logits (before temperature, penalties and
/// grammar), in [0, 1]: DREX_METRIC_*.
pub type drex_metric = u32;

/// p(top 1) - p(top 2)
pub const DREX_METRIC_GAP: drex_metric = 0;
/// p(top 1)
pub const DREX_METRIC_MAXPROB: drex_metric = 1;
/// 1 - H / ln(n_vocab), where H is the entropy in nats; 1 for n_vocab = 1
pub const DREX_METRIC_ENTROPY: drex_metric = 2;
/// In a request: the engine's metric.
pub const DREX_METRIC_DEFAULT: drex_metric = u32::MAX;

/// How the K/V entries of the layers that an exited token skipped (its
/// *hole*) are filled: DREX_FILL_*. Requests of one batch may differ.
pub type drex_fill_mode = u32;

/// State-copy: K and V of the last computed layer at the token's cell are
/// copied to all skipped layers.
pub const DREX_FILL_COPY: drex_fill_mode = 0;
/// K and V of the skipped layers are computed. The token's hidden row stays in the
/// arena, *pending*, and goes along when its request next goes through the skipped
/// layers: exactly what the full model would have put there for this text.
pub const DREX_FILL_POSTFILL: drex_fill_mode = 1;
/// As POSTFILL, and the token is a draft: emitted, that is given to the
/// client, when the full model's logits for the pending row agree; else
/// replaced, and what was made after it is void. See drex_verify(). The output
/// is that of the full model. Deadlines do not hurry drafts on: the tokens of
/// up to max_pending rows come together, when the rows have gone deep.
pub const DREX_FILL_VERIFY: drex_fill_mode = 2;
/// The host fills them: after drex_ramp(), before the arena row is used again,
/// it runs the skipped layers' own K and V projections over the rows that left,
/// from their hidden states as they are (state propagation, Schuster et al.,
/// arXiv 2207.07061). Closer to the full model than COPY, at the price of these
/// projections; drex_fill() leaves such rows alone.
pub const DREX_FILL_PROPAGATE: drex_fill_mode = 3;
/// In a request: the engine's mode.
pub const DREX_FILL_DEFAULT: drex_fill_mode = u32::MAX;

/// Where logits, arena rows and K/V lie: DREX_DEVICE_*.
pub type drex_device = u32;

/// Memory that the calling thread can read and write.
pub const DREX_DEVICE_HOST: drex_device = 0;
/// Memory of a CUDA device. drex_create() needs a current CUDA context on its
/// thread, and the engine works in that one: see chapter 7.
pub const DREX_DEVICE_CUDA: drex_device = 1;

/// One engine: the scheduler of one model engine. Opaque, and not an
/// address: never read through it. Made by drex_create(), ended by
/// drex_destroy(). A destroyed handle gives DREX_ERROR_INVALID_HANDLE.
pub struct drex_engine {
    _opaque: [u8; 0],
}

/// The description of an engine. Everything is copied; no pointer is kept.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_config {
    /// sizeof(drex_config)
    pub size: u32,
    /// DREX_ABI_VERSION
    pub abi_version: u32,
    /// Layers of the model, 2..65536.
    pub n_layers: u32,
    /// Exit ramps, 1..DREX_MAX_RAMPS.
    pub n_ramps: u32,
    /// [n_ramps] strictly increasing, each in 1..n_layers-1; a ramp at L
    /// follows layers [0, L). Not NULL.
    pub ramp_layers: *const u32,
    /// Rows of the host's hidden-state arena, 1..1048576; at least
    /// max_requests, since every request may hold one. What is beyond is room
    /// for pending rows, see DREX_FILL_POSTFILL; when it is full, rows go deep
    /// rather than exit.
    pub n_slots: u32,
    /// Most requests alive at once, 1..1048576.
    pub max_requests: u32,
    /// B: most decode rows in one pass, pending ones included, 1..1048576.
    pub max_batch: u32,
    /// The rule by which rows leave at a ramp.
    pub policy: drex_policy,
    /// How sure a row is, for requests that do not name a metric; not
    /// DREX_METRIC_DEFAULT.
    pub metric: drex_metric,
    /// How holes are filled, for requests that do not name a mode; not
    /// DREX_FILL_DEFAULT.
    pub fill: drex_fill_mode,
    /// Where logits, arena rows and K/V lie, all of them.
    pub device: drex_device,
    /// Finite, >= 0. A row exits when its confidence >= threshold; above 1:
    /// never. See quality, which may do without.
    pub threshold: f32,
    /// [n_ramps] one threshold per ramp, or NULL: `threshold` for every ramp.
    pub ramp_thresholds: *const f32,
    /// Rows held at a ramp that force a flush. 0: the policy's own rule (ART:
    /// max_batch; HOLD: 0.6 of the requests that have had a token to run, or
    /// of max_batch if that is less, rounded up).
    pub flush_rows: u32,
    /// HOLD: flush when fewer rows than this are ready. 0 means 1.
    pub min_ready: u32,
    /// Flush a row that was held this long, in ns. 0: 8 times the predicted time
    /// of its remaining layers, for as many rows as are held there; while no time
    /// is known, once 256 other steps have passed it by.
    pub max_hold_ns: u64,
    /// Time between two tokens that a request may take, in ns; 0: none. A
    /// request may name its own.
    pub token_deadline_ns: u64,
    /// Pins c/t_d of ART, finite, >= 0; NaN: as measured.
    pub art_ratio: f32,
    /// 0
    pub reserved: u32,
    /// AUTO: of the random numbers that its predictions draw. Any number.
    pub seed: u64,
    /// POSTFILL, VERIFY: pending rows of a request at most; 0: 8. When it has
    /// so many, its next row goes deep even if it is confident (an involuntary
    /// stay). They and that row must fit into max_batch, which cuts it.
    pub max_pending: u32,
    /// CUDA: most logits of a row, which scratch memory is made for; 0:
    /// 524288. On the host, rows may have any length.
    pub n_vocab: u32,
    /// Most of the greatest logits that a ramp is asked to list, see
    /// drex_top_get(); 0..DREX_MAX_TOP.
    pub n_top: u32,
    /// Most rows of one window, decode rows and prompt rows together; 0:
    /// max_batch. At least max_batch, at most 1048576. For hosts that name
    /// drex_plan_input.n_prompt_rows.
    pub max_pass_rows: u32,
    /// How far the output may differ from the full model's, for requests that do
    /// not say. 0: as far as threshold and fill let it. 1: not at all (lossless):
    /// the fill is VERIFY, whatever `fill` says, and the thresholds are learned. A
    /// row exits when the chance that its draft and all its request's drafts before
    /// it stand is at least what the rule of AUTO asks for (0.5 under another
    /// policy). Thresholds count only for requests that name one, another metric, or
    /// another fill. From 0.5 to 1: a target agreement, the least share of the tokens
    /// of such requests that are the full model's; see drex_request_audit(). Until
    /// audits show that more is allowed, and where that would not be faster, they are
    /// lossless. Rows that exit beyond that fill their holes as `fill` says; VERIFY:
    /// always lossless. 0.9, 0.95, 0.98, 0.99, 0.995, 0.998 and 0.999 are told
    /// apart, what lies between counts as the next higher, and more as 1.
    /// Since 0.2.
    pub quality: f64,
}

/// Makes an engine. What serving needs is allocated here; chapter 3 says which
/// calls allocate nothing.
///
/// config  copied, with what it points to
/// out     receives the engine; the caller owns it and ends it with
///         drex_destroy()
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, ABI_MISMATCH, INVALID_ARGUMENT; MEMORY;
/// CAPACITY when 256 engines are alive in this process; with DREX_DEVICE_CUDA also
/// UNSUPPORTED where there is no CUDA driver, CALL_ORDER where no context is
/// current, and DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_create(
    config: *const drex_config,
    out: *mut *mut drex_engine,
) -> drex_status {
    call("drex_create", || {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("config", config)? };
        if out.is_null() {
            return Err(Fault::Null("out"));
        }
        if c.abi_version != DREX_ABI_VERSION {
            return Err(Fault::Abi(c.abi_version));
        }
        // SAFETY: the caller's contract.
        let config = unsafe { convert(&c)? };
        let (place, limits) = place(&c)?;
        let engine = Engine::on(place, config, limits)?;
        if engine.watch.on() {
            engine.watch.created(&engine.scheduler);
        }
        let handle = handle::ENGINES.insert(engine)?;
        // SAFETY: not NULL.
        unsafe { out.write_unaligned(handle) };
        Ok(())
    })
}

/// # Safety
/// The arrays are as long as the fields say.
unsafe fn convert(c: &drex_config) -> Result<Config, Fault> {
    if c.ramp_layers.is_null() {
        return Err(Fault::Null("ramp_layers"));
    }
    if !(1..=DREX_MAX_RAMPS as u32).contains(&c.n_ramps) {
        return Err(Error::int("n_ramps", c.n_ramps, "1..16").into());
    }
    let n = c.n_ramps as usize;
    // SAFETY: `n_ramps` numbers, by the caller's contract.
    let ramp_layers = (0..n).map(|i| unsafe { c.ramp_layers.add(i).read_unaligned() });
    crate::core::config::check_threshold("threshold", c.threshold)?;
    let thresholds = if c.ramp_thresholds.is_null() {
        vec![c.threshold; n]
    } else {
        // SAFETY: as above.
        let at = |i| unsafe { c.ramp_thresholds.add(i).read_unaligned() };
        (0..n).map(at).collect()
    };
    let policy = Policy::from_number(c.policy);
    reserved(c.reserved)?;
    Ok(Config {
        n_layers: c.n_layers,
        ramp_layers: ramp_layers.collect(),
        thresholds,
        n_slots: c.n_slots,
        max_requests: c.max_requests,
        max_batch: c.max_batch,
        max_pass_rows: c.max_pass_rows,
        policy: policy.ok_or(Error::int("policy", c.policy, "DREX_POLICY_* (0..8)"))?,
        metric: metric(c.metric, "DREX_METRIC_* (0..2)")?,
        fill: fill(c.fill, "DREX_FILL_* (0..3)")?,
        quality: quality(c.quality)?.unwrap_or(Quality::Given),
        max_pending: c.max_pending,
        flush_rows: c.flush_rows,
        min_ready: c.min_ready,
        max_hold_ns: c.max_hold_ns,
        token_deadline_ns: c.token_deadline_ns,
        seed: c.seed,
        art_ratio: (!c.art_ratio.is_nan()).then_some(c.art_ratio),
    })
}

fn place(c: &drex_config) -> Result<(Place, Limits), Fault> {
    let place = match c.device {
        DREX_DEVICE_HOST => Place::Host,
        DREX_DEVICE_CUDA => Place::Cuda,
        other => return Err(Error::int("device", other, "DREX_DEVICE_* (0..1)").into()),
    };
    if c.n_vocab > i32::MAX as u32 {
        return Err(Error::int("n_vocab", c.n_vocab, "0..2147483647").into());
    }
    if c.n_top > DREX_MAX_TOP as u32 {
        return Err(Error::int("n_top", c.n_top, "0..64").into());
    }
    let limits = Limits {
        rows: 0,
        n_vocab: c.n_vocab,
        n_top: c.n_top,
    };
    Ok((place, limits))
}

/// Ends an engine, in any state, and frees what it holds. The host's tensors
/// are not touched. NULL is fine.
///
/// Errors: INVALID_HANDLE for one that is destroyed already; HANDLE_BUSY
/// while another thread is inside, and then the engine lives on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_destroy(engine: *mut drex_engine) -> drex_status {
    call("drex_destroy", || {
        if engine.is_null() {
            return Ok(());
        }
        let engine = handle::ENGINES.remove(engine)?;
        if engine.watch.on() {
            engine.watch.destroyed(&engine.scheduler);
        }
        Ok(())
    })
}

/// A policy's name in lower case, such as "hold"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_policy_name(policy: drex_policy) -> *const c_char {
    name(Policy::from_number(policy).map(Policy::c_name))
}

/// A metric's name in lower case, such as "gap"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_metric_name(metric: drex_metric) -> *const c_char {
    name(Metric::from_number(metric).map(Metric::c_name))
}

/// A fill mode's name in lower case, such as "copy"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_fill_name(fill: drex_fill_mode) -> *const c_char {
    name(Fill::from_number(fill).map(Fill::c_name))
}

/// The policy of a name, exactly as drex_policy_name() writes it.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_policy_from_name(
    name: *const c_char,
    out: *mut drex_policy,
) -> drex_status {
    call("drex_policy_from_name", || {
        let names = Policy::ALL.map(Policy::c_name);
        // SAFETY: the caller's contract.
        unsafe { from_name(&names, name, out) }
    })
}

/// The metric of a name, exactly as drex_metric_name() writes it.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_metric_from_name(
    name: *const c_char,
    out: *mut drex_metric,
) -> drex_status {
    call("drex_metric_from_name", || {
        let names = Metric::ALL.map(Metric::c_name);
        // SAFETY: the caller's contract.
        unsafe { from_name(&names, name, out) }
    })
}

/// The fill mode of a name, exactly as drex_fill_name() writes it.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_fill_from_name(
    name: *const c_char,
    out: *mut drex_fill_mode,
) -> drex_status {
    call("drex_fill_from_name", || {
        let names = Fill::ALL.map(Fill::c_name);
        // SAFETY: the caller's contract.
        unsafe { from_name(&names, name, out) }
    })
}

pub(super) fn metric(value: u32, expected: &'static str) -> Result<Metric, Error> {
    Metric::from_number(value).ok_or(Error::int("metric", value, expected))
}

/// `None`: 0, which leaves it to others.
pub(super) fn quality(value: f64) -> Result<Option<Quality>, Error> {
    match value {
        0.0 => Ok(None),
        1.0 => Ok(Some(Quality::Lossless)),
        v if (0.5..1.0).contains(&v) => Ok(Some(
            agreement::target(v).map_or(Quality::Lossless, Quality::Agreement),
        )),
        _ => Err(Error::float(
            "quality",
            value as f32,
            "0, or a number from 0.5 to 1",
        )),
    }
}

pub(super) fn fill(value: u32, expected: &'static str) -> Result<Fill, Error> {
    Fill::from_number(value).ok_or(Error::int("fill", value, expected))
}

const _: () = {
    assert!(DREX_MAX_RAMPS == crate::core::MAX_RAMPS);
    assert!(DREX_NO_RAMP == crate::core::NONE && DREX_NO_SLOT == crate::core::NONE);
    assert!(DREX_POLICY_AUTO == Policy::Auto as u32 && Policy::ALL.len() == 9);
    assert!(DREX_METRIC_ENTROPY == Metric::Entropy as u32 && Metric::ALL.len() == 3);
    assert!(DREX_FILL_PROPAGATE == Fill::Propagate as u32 && Fill::ALL.len() == 4);
};
