// SPDX-License-Identifier: Apache-2.0

//! Verdicts at a ramp, and the fill. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::{c_char, c_void};

use super::check::flag;
use super::engine::{DREX_MAX_TOP, drex_engine};
use super::entry::{self, with};
use super::fault::Fault;
use super::names::name;
use super::status::drex_status;
use crate::core::calibration::{Calibration, Platt};
use crate::core::decision::Decision;
use crate::core::error::Error;
use crate::device::{Dtype, Logits, MAX_TOP, Top};
use crate::engine::Launch;

/// The element type of logits: DREX_DTYPE_*, in the machine's byte order.
pub type drex_dtype = u32;

/// IEEE binary32
pub const DREX_DTYPE_F32: drex_dtype = 0;
/// IEEE binary16
pub const DREX_DTYPE_F16: drex_dtype = 1;
/// The upper half of binary32
pub const DREX_DTYPE_BF16: drex_dtype = 2;

/// Is asked at a ramp whether a row whose confidence is sufficient may exit
/// with its token: 1, or 0 where the host would not emit that token. It runs on
/// the thread and inside the call of drex_ramp(), once for each such row, so a
/// call on the same engine gets DREX_ERROR_HANDLE_BUSY. It must return: no
/// exception, no longjmp. Rows that EAGER, MEDIAN or MEAN force out are not asked
/// about.
/// Since 0.2.
pub type drex_confirm_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, row: u32, token: i32) -> u32>;

/// Turns a confidence c into a chance: 1 / (1 + exp(-x)), where
/// x = scale ln(c / (1 - c)) + shift. Where it is fitted to how often tokens of
/// such a confidence were the full model's, 0.9 means that nine of ten are.
/// Since 0.2.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_calibration {
    /// Finite, above 0.
    /// Since 0.2.
    pub scale: f32,
    /// Finite.
    /// Since 0.2.
    pub shift: f32,
}

/// The logits at a ramp.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_logits {
    /// sizeof(drex_logits)
    pub size: u32,
    /// The type of their elements.
    pub dtype: drex_dtype,
    /// [n_rows, n_vocab]; row i, in the order of drex_plan()'s rows, begins
    /// at data + i * row_stride_bytes. Not NULL. On the host it needs no
    /// alignment, on a CUDA device that of its elements.
    pub data: *const c_void,
    /// Bytes from row to row, at least n_vocab elements.
    pub row_stride_bytes: u64,
    /// drex_step.n_rows
    pub n_rows: u32,
    /// Logits per row, at least 1, below 2^31.
    pub n_vocab: u32,
    /// CUDA: the CUstream (or cudaStream_t) on which the logits are made, and
    /// on which drex works until the next ramp; NULL is the default stream.
    /// NULL on the host.
    pub stream: *mut c_void,
    /// Greatest logits of each row to list, at most drex_config.n_top.
    pub n_top: u32,
    /// 1: the logits were given to drex_ramp_enqueue() before, or a graph that
    /// captured it has been launched. Else 0.
    pub enqueued: u32,
    /// NULL, or decides about rows that would exit, for example under a
    /// grammar. A row whose token it refuses has the greatest confidence that
    /// is not sufficient.
    /// Since 0.2.
    pub confirm: drex_confirm_callback,
    /// Handed to it; may be NULL.
    /// Since 0.2.
    pub confirm_data: *mut c_void,
    /// [n_vocab] the token of each logit, for a head over some of the tokens.
    /// NULL: logit i is that of token i. Host memory, on a CUDA device too.
    /// Verdicts, confirm and drex_top_get() name these tokens, so the array
    /// must stay as it is until the step ends. A row whose greatest logit has a
    /// negative token has no confidence.
    /// Since 0.2.
    pub token_ids: *const i32,
    /// [3] one for each DREX_METRIC_*, in their order: turns this ramp's
    /// confidences into chances before they meet their thresholds. NULL: they
    /// stay as they are.
    /// Since 0.2.
    pub calibration: *const drex_calibration,
}

/// The decision on a row at a ramp, or by drex_verify(): DREX_DECISION_*.
pub type drex_decision = u32;

/// Emit the token from the ramp's logits; the row is done.
pub const DREX_DECISION_EXIT: drex_decision = 0;
/// The row waits in the rebatching buffer for a deeper batch.
pub const DREX_DECISION_HOLD: drex_decision = 1;
/// The row goes on in the next step.
pub const DREX_DECISION_STAY: drex_decision = 2;
/// The request was removed while the step ran.
pub const DREX_DECISION_GONE: drex_decision = 3;
/// A pending row: it left before, and goes along.
pub const DREX_DECISION_PENDING: drex_decision = 4;
/// drex_verify(): the draft stands; it is a token now.
pub const DREX_DECISION_ACCEPT: drex_decision = 5;
/// drex_verify(): the full model's token is emitted in place of the draft.
pub const DREX_DECISION_REPLACE: drex_decision = 6;
/// drex_verify(): the row follows a draft that was replaced, and is void.
pub const DREX_DECISION_DROP: drex_decision = 7;

/// A ramp's verdict on a row.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_verdict {
    /// EXIT, HOLD, STAY, GONE or PENDING.
    pub decision: drex_decision,
    /// The greatest logit's index, the lowest on a tie, or its token by
    /// drex_logits.token_ids; -1 where confidence is NaN. For greedy hosts;
    /// others sample the row themselves.
    pub token: i32,
    /// In [0, 1]. NaN when a logit is NaN or +Inf, or all are -Inf, and for GONE
    /// and PENDING. -Inf beside other logits is a mask, and fine.
    pub confidence: f32,
    /// 1: an involuntary exit or an involuntary stay. A row is not asked, and
    /// does not count, at a ramp that the rule of DREX_POLICY_AUTO passes by and
    /// where its window ends only because pending rows wait there.
    pub forced: u32,
}

/// At the end of a window that ends at a ramp: scores every row's logits and
/// decides what becomes of it. The logits must be complete, or on a CUDA device
/// enqueued on their stream, and stay unchanged during the call. A row's
/// confidence and token depend on nothing but its own logits.
///
/// logits    the window's logits
/// cells     [n_rows] the KV cell of each row, below n_cells of every bound
///           layer; for a row whose request was removed, any number. NULL only
///           when no K/V is bound. Copied.
/// verdicts  [capacity] receives one per row, in their order
/// capacity  at least n_rows
///
/// A request whose row says EXIT is IDLE from here on.
///
/// Not needed in a step with n_rows = 0, which only prompt rows pass; allowed
/// there with logits.n_rows = 0, and then no other field is looked at.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CAPACITY;
/// CALL_ORDER when no step is planned, when it ends at the last layer, when
/// it had its verdicts, when cells are missing, or when logits.enqueued is 1
/// and nothing was enqueued, or other logits were; DEVICE. After a failure, the
/// call may be made again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_ramp(
    engine: *mut drex_engine,
    logits: *const drex_logits,
    cells: *const u32,
    verdicts: *mut drex_verdict,
    capacity: u32,
) -> drex_status {
    with("drex_ramp", engine, |engine| {
        // SAFETY: the caller's contract.
        let l = unsafe { entry::read("logits", logits)? };
        if verdicts.is_null() {
            return Err(Fault::Null("verdicts"));
        }
        engine.scheduler.expect_ramp()?;
        let n = engine.scheduler.step_rows().len() as u32;
        if l.n_rows != n {
            return Err(Error::Conflict {
                field: "logits.n_rows",
                index: None,
                value: l.n_rows.into(),
                other: "the planned step's n_rows",
                other_value: n.into(),
                why: "every planned row has one row of logits",
            }
            .into());
        }
        if capacity < n {
            return Err(Error::Capacity {
                field: "capacity",
                value: capacity.into(),
                need: n.into(),
                why: "every row has a verdict",
            }
            .into());
        }
        if n == 0 {
            return Ok(engine.ramp_without_rows()?);
        }
        let logits = convert_logits(&l)?;
        let confirm = l.confirm.map(|ask| {
            // SAFETY: the caller's contract.
            move |row, token| unsafe { ask(l.confirm_data, row, token) } != 0
        });
        // SAFETY: checked above, and the caller's contract.
        unsafe { engine.ramp(&logits, cells, confirm)? };
        for (i, row) in engine.scheduler.step_rows().iter().enumerate() {
            let verdict = drex_verdict {
                decision: row.decision as drex_decision,
                token: row.score.token,
                confidence: row.score.confidence,
                forced: row.forced.into(),
            };
            // SAFETY: `capacity` is at least the number of rows.
            unsafe { verdicts.add(i).write_unaligned(verdict) };
        }
        Ok(())
    })
}

/// Fills the holes of the rows that the last drex_ramp() let out and whose
/// requests have DREX_FILL_COPY: for each, K and V of the window's last layer at
/// the row's cell are copied to all layers from layer_end on. Does nothing when
/// none exited, or when done already. Nothing else may touch these cells during
/// the call.
///
/// On a CUDA device it is enqueued on the stream of that ramp's logits, in one
/// launch, and not waited for.
///
/// Errors: CALL_ORDER when no K/V is bound, or when drex_ramp() was not
/// called since the last plan; DEVICE, and CAPACITY for more memory than one
/// launch can move.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_fill(engine: *mut drex_engine) -> drex_status {
    with("drex_fill", engine, |engine| Ok(engine.fill(Launch::Now)?))
}

/// A decision's name in lower case, such as "exit"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_decision_name(decision: drex_decision) -> *const c_char {
    name(Decision::from_number(decision).map(Decision::c_name))
}

pub(super) fn convert_logits(l: &drex_logits) -> Result<Logits, Fault> {
    let dtype = match l.dtype {
        DREX_DTYPE_F32 => Dtype::F32,
        DREX_DTYPE_F16 => Dtype::F16,
        DREX_DTYPE_BF16 => Dtype::Bf16,
        other => return Err(Error::int("logits.dtype", other, "DREX_DTYPE_* (0..2)").into()),
    };
    if l.data.is_null() {
        return Err(Fault::Null("logits.data"));
    }
    if l.n_vocab == 0 || i32::try_from(l.n_vocab).is_err() {
        return Err(Error::int("logits.n_vocab", l.n_vocab, "1..2147483647").into());
    }
    let row = l.n_vocab as usize * dtype.bytes();
    if l.row_stride_bytes < row as u64 {
        return Err(Error::Conflict {
            field: "logits.row_stride_bytes",
            index: None,
            value: l.row_stride_bytes,
            other: "n_vocab",
            other_value: l.n_vocab.into(),
            why: "rows would overlap",
        }
        .into());
    }
    let span = l.row_stride_bytes.checked_mul(l.n_rows.into());
    if span.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Error::int(
            "logits.row_stride_bytes",
            l.row_stride_bytes,
            "a stride that keeps the rows within the address space",
        )
        .into());
    }
    Ok(Logits {
        data: l.data.cast(),
        dtype,
        row_stride: l.row_stride_bytes as usize,
        n_vocab: l.n_vocab as usize,
        stream: l.stream,
        n_top: l.n_top as usize,
        enqueued: flag("logits.enqueued", l.enqueued)?,
        token_ids: l.token_ids,
        calibration: calibration(l)?,
    })
}

fn calibration(l: &drex_logits) -> Result<Option<Calibration>, Error> {
    if l.calibration.is_null() {
        return Ok(None);
    }
    let all = Calibration([0, 1, 2].map(|i| {
        // SAFETY: the caller's contract: one for each metric.
        let c = unsafe { l.calibration.add(i).read_unaligned() };
        Platt {
            scale: c.scale,
            shift: c.shift,
        }
    }));
    all.validate()?;
    Ok(Some(all))
}

/// One of the greatest logits of a row.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_top {
    /// As it is, before any softmax.
    pub logit: f32,
    /// Its index, or its token by drex_logits.token_ids; -1 where the row has
    /// no more logits that are numbers.
    pub token: i32,
}

/// The greatest logits of a row, the greatest first and the lower index before
/// an equal one: candidates for hosts that sample, without the whole row. After
/// a drex_ramp() whose logits had n_top > 0, until its step ends.
///
/// row       of the planned step, from 0
/// top       [capacity] receives them; may be NULL with capacity 0
/// capacity  entries at top; no more are written
/// n         receives how many: the lesser of capacity and n_top, or 0 for a
///           row without a verdict of its own (GONE, PENDING)
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT; CALL_ORDER without such a ramp.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_top_get(
    engine: *const drex_engine,
    row: u32,
    top: *mut drex_top,
    capacity: u32,
    n: *mut u32,
) -> drex_status {
    with("drex_top_get", engine, |engine| {
        if top.is_null() && capacity > 0 {
            return Err(Fault::Null("top"));
        }
        if n.is_null() {
            return Err(Fault::Null("n"));
        }
        let mut found = [Top::NONE; DREX_MAX_TOP];
        let most = DREX_MAX_TOP.min(capacity as usize);
        let len = engine.top(row as usize, &mut found[..most])?;
        for (i, t) in found[..len].iter().enumerate() {
            let t = drex_top {
                logit: t.logit,
                token: t.token,
            };
            // SAFETY: `capacity` entries, by the caller's contract.
            unsafe { top.add(i).write_unaligned(t) };
        }
        // SAFETY: not NULL.
        unsafe { n.write_unaligned(len as u32) };
        Ok(())
    })
}

const _: () = assert!(DREX_MAX_TOP == MAX_TOP);

const _: () = assert!(DREX_DECISION_DROP == Decision::Drop as u32 && Decision::ALL.len() == 8);
