// SPDX-License-Identifier: Apache-2.0

//! Requests, from their first token to their end. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use super::check::reserved;
use super::engine::*;
use super::entry::{self, with};
use super::status::drex_status;
use crate::core::estimate::agreement::TARGETS;
use crate::core::rows::requests::{RequestConfig, State};

/// The state of a request: DREX_REQUEST_*.
pub type drex_request_state = u32;

/// The request has no token to run: its prompt is being processed, or the host
/// is sampling.
pub const DREX_REQUEST_IDLE: drex_request_state = 0;
/// A token waits for the first window.
pub const DREX_REQUEST_READY: drex_request_state = 1;
/// Its row is in the planned step, or was told to stay and is in the next.
pub const DREX_REQUEST_RUNNING: drex_request_state = 2;
/// Its row waits in the rebatching buffer.
pub const DREX_REQUEST_HELD: drex_request_state = 3;

/// The description of a request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_request_config {
    /// sizeof(drex_request_config)
    pub size: u32,
    /// Or DREX_METRIC_DEFAULT.
    pub metric: drex_metric,
    /// Chosen by the host; unique among the requests alive. Any number.
    pub id: u64,
    /// For every ramp, as drex_config.threshold; NaN: the engine's.
    pub threshold: f32,
    /// Or DREX_FILL_DEFAULT.
    pub fill: drex_fill_mode,
    /// Time between two tokens, in ns; 0: the engine's.
    pub token_deadline_ns: u64,
    /// Higher is taken first when more rows wait than fit. Of priorities
    /// that wait at one time, 64 are told apart.
    pub priority: i32,
    /// 0
    pub reserved: u32,
    /// Time from the first drex_request_ready() to the last token, in ns; 0:
    /// none. What is left of it is spread evenly over the tokens left, so
    /// each has a deadline; the nearer one counts.
    pub request_deadline_ns: u64,
    /// Tokens that it will have at most; 0: unknown, and then only the
    /// request's deadline itself counts.
    pub max_tokens: u64,
    /// As drex_config.quality; 0: the engine's. Where it is 1, a threshold is kept to
    /// and a fill other than VERIFY is refused. Where it is an agreement, a threshold
    /// is refused, and holes are filled as `fill` says. Where only the engine's is 1
    /// or an agreement, a request that names another fill is served by that and by
    /// thresholds; with an agreement also one that names a threshold. A request that
    /// names a metric other than the engine's has the engine's thresholds, and is
    /// lossless.
    /// Since 0.2.
    pub quality: f64,
}

/// A request's state and counters.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_request_info {
    /// sizeof(drex_request_info), set by the caller
    pub size: u32,
    /// The state that it is in.
    pub state: drex_request_state,
    /// Where its row is held, else DREX_NO_RAMP.
    pub ramp: u32,
    /// The arena row that its row occupies, else DREX_NO_SLOT.
    pub slot: u32,
    /// Tokens decoded through drex so far.
    pub tokens: u64,
    /// Rows that left at each ramp. With DREX_FILL_VERIFY they are drafts, and
    /// count here also where they were replaced or dropped later, so there may
    /// be more of them than tokens.
    pub exits: [u64; DREX_MAX_RAMPS],
    /// Of the exits, those below the row's threshold; see drex_policy.
    pub involuntary_exits: u64,
    /// Times that its row was confident at a ramp and went on.
    pub involuntary_stays: u64,
    /// Total time spent held, in ns; what is held now is not in it.
    pub held_ns: u64,
    /// Tokens that came later than their deadline.
    pub deadline_misses: u64,
    /// At the last ramp that its row passed; NaN before the first.
    pub last_confidence: f32,
    /// Pending rows, see DREX_FILL_POSTFILL: of the tokens right before its
    /// next one, or before its own row if it has one.
    pub n_pending: u32,
    /// How its holes are filled.
    /// Since 0.2.
    pub fill: drex_fill_mode,
    /// 1: its answer is to be audited before it is removed; see
    /// drex_request_audit(). Else 0.
    /// Since 0.2.
    pub audit_due: u32,
    /// What is promised: 1: every token is the full model's; between 0 and 1: the
    /// agreement that it is served with; 0: nothing.
    /// Since 0.2.
    pub quality: f64,
}

/// Makes a request known. It is IDLE: say drex_request_ready() when its
/// prompt is done and its first token can run.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE; INVALID_ARGUMENT, also for a fill mode
/// that n_slots or max_batch leave no room for; DUPLICATE_REQUEST; CAPACITY
/// when max_requests are alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_add(
    engine: *mut drex_engine,
    request: *const drex_request_config,
) -> drex_status {
    with("drex_request_add", engine, |engine| {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("request", request)? };
        let metric = match c.metric {
            DREX_METRIC_DEFAULT => None,
            m => Some(metric(m, "DREX_METRIC_* (0..2) or DREX_METRIC_DEFAULT")?),
        };
        let fill = match c.fill {
            DREX_FILL_DEFAULT => None,
            f => Some(fill(f, "DREX_FILL_* (0..3) or DREX_FILL_DEFAULT")?),
        };
        reserved(c.reserved)?;
        let quality = quality(c.quality)?;
        engine.scheduler.add(RequestConfig {
            id: c.id,
            metric,
            threshold: (!c.threshold.is_nan()).then_some(c.threshold),
            fill,
            quality,
            token_deadline_ns: c.token_deadline_ns,
            request_deadline_ns: c.request_deadline_ns,
            max_tokens: c.max_tokens,
            priority: c.priority,
        })?;
        if engine.watch.on() {
            engine.watch.request(c.id, "added");
        }
        Ok(())
    })
}

/// The request's next token can run: IDLE becomes READY.
///
/// id      of a request alive and IDLE
/// n_kv    KV cells that the row attends over, 0 if unknown; a hint that this
///         version does not use: see drex_completion.n_kv
/// now_ns  now; the first call starts the clock of the request's deadline
///
/// A row that exited may be made ready again before drex_complete().
///
/// Errors: UNKNOWN_REQUEST; CALL_ORDER when it is not IDLE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_ready(
    engine: *mut drex_engine,
    id: u64,
    n_kv: u32,
    now_ns: u64,
) -> drex_status {
    with("drex_request_ready", engine, |engine| {
        let _ = n_kv;
        Ok(engine.scheduler.ready(id, now_ns)?)
    })
}

/// Forgets a request: finished, or cancelled, in any state, also between plan
/// and complete. Its id is free at once. A held row leaves the buffer and its
/// arena row is free at once; the arena row of a row in the planned step is
/// free when the step ends, and drex_ramp() and drex_verify() say
/// DREX_DECISION_GONE for it. Where neither is called, because the window ends at
/// n_layers and has no drafts, the host passes over its logits by itself.
/// The hole of a row that exited and was not filled yet is not filled.
///
/// Errors: UNKNOWN_REQUEST.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_remove(engine: *mut drex_engine, id: u64) -> drex_status {
    with("drex_request_remove", engine, |engine| {
        Ok(engine.remove(id)?)
    })
}

/// A request's state and counters.
///
/// out  its size is set by the caller
///
/// Errors: UNKNOWN_REQUEST, NULL_ARGUMENT, STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_get(
    engine: *const drex_engine,
    id: u64,
    out: *mut drex_request_info,
) -> drex_status {
    with("drex_request_get", engine, |engine| {
        // SAFETY: the caller's contract.
        let size = unsafe { entry::writable("out", out)? };
        let r = engine.scheduler.request(id)?;
        let info = drex_request_info {
            size,
            state: match r.state {
                State::Idle => DREX_REQUEST_IDLE,
                State::Ready => DREX_REQUEST_READY,
                State::Running => DREX_REQUEST_RUNNING,
                State::Held => DREX_REQUEST_HELD,
            },
            ramp: if r.state == State::Held {
                r.ramp
            } else {
                DREX_NO_RAMP
            },
            slot: r.slot,
            tokens: r.tokens,
            exits: r.exits,
            involuntary_exits: r.involuntary_exits,
            involuntary_stays: r.involuntary_stays.into(),
            held_ns: r.held_ns,
            deadline_misses: r.deadline_misses.into(),
            last_confidence: r.last_confidence,
            n_pending: r.pending.len(),
            fill: r.fill as u32,
            audit_due: engine.scheduler.audit_due(id)?.into(),
            quality: match r.terms {
                _ if r.lossless => 1.0,
                Some(terms) => TARGETS[usize::from(terms.target)],
                None => 0.0,
            },
        };
        // SAFETY: checked above.
        unsafe { entry::write(out, &info) };
        Ok(())
    })
}

/// Sends an IDLE request's pending rows to the last layer without a newer
/// row, in the next steps: at the request's end under DREX_FILL_VERIFY, or
/// wherever its K/V must be whole (before it is saved or shared). The request
/// is RUNNING until the last of them is through, then IDLE.
///
/// now_ns   now
/// pending  receives how many rows; 0: there is none, and the request stays
///          IDLE; may be NULL
///
/// Errors: UNKNOWN_REQUEST; CALL_ORDER when it is not IDLE, or when a row of it
/// is in a step that is not complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_settle(
    engine: *mut drex_engine,
    id: u64,
    now_ns: u64,
    pending: *mut u32,
) -> drex_status {
    with("drex_request_settle", engine, |engine| {
        let n = engine.scheduler.request(id)?.pending.len();
        engine.scheduler.settle(id, now_ns)?;
        if !pending.is_null() {
            // SAFETY: not NULL.
            unsafe { pending.write_unaligned(n) };
        }
        Ok(())
    })
}

/// Says how much of a request's answer the full model would have chosen otherwise:
/// an audit. A request with a target agreement (drex_config.quality) needs one where
/// drex_request_info.audit_due is 1. drex chooses whom, at random: those that try
/// how much is allowed, and later one in four to one in twenty-four.
///
/// When the request has its last token, and before it is removed, the host discards
/// the K/V of its answer, runs the answer's tokens once more in passes without exits,
/// behind a prompt whose K/V is the full model's, and compares each with the model's
/// own choice at its place, made as the request's tokens are made. The first token
/// comes from the prompt and needs no comparison. For a request whose tokens are
/// drawn at random there is no such choice: the host gives it quality 1. The K/V that
/// the audit leaves is the full model's.
///
/// id           of a request whose audit_due is 1
/// n_tokens     tokens of the answer that were compared, at least 1 and at most all
/// n_differing  of them, those that the full model would have chosen otherwise
///
/// From audits follows the lowest threshold whose tokens agree well enough, with a
/// bound on what chance does to audits; and an account of what has differed, by
/// which all requests with that target are lossless while too much has. Answers that
/// are removed without their audit, such as cancelled ones, are taken to be like the
/// others; where most are, all requests are lossless.
///
/// Errors: UNKNOWN_REQUEST; CALL_ORDER when audit_due is 0; INVALID_ARGUMENT when
/// n_tokens is 0 or more than the answer has, or n_differing is more than n_tokens.
/// Since 0.2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_request_audit(
    engine: *mut drex_engine,
    id: u64,
    n_tokens: u64,
    n_differing: u64,
) -> drex_status {
    with("drex_request_audit", engine, |engine| {
        Ok(engine.scheduler.audit(id, n_tokens, n_differing)?)
    })
}
