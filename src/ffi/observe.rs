// SPDX-License-Identifier: Apache-2.0

//! Logs, traces, snapshots and metrics of an engine. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::{CStr, c_char, c_void};

use super::engine::drex_engine;
use super::entry::{give_text, with};
use super::fault::Fault;
use super::handle;
use super::status::drex_status;
use crate::core::error::Error;
use crate::observe::trace::Trace;
use crate::observe::{Sink, metrics, snapshot};

/// How much is logged: a level and all that are more urgent.
pub type drex_log_level = u32;

/// Nothing.
pub const DREX_LOG_OFF: drex_log_level = 0;
/// A device failed.
pub const DREX_LOG_ERROR: drex_log_level = 1;
/// Refused calls, missed deadlines, logits that are not finite.
pub const DREX_LOG_WARN: drex_log_level = 2;
/// Engines, and the rules that AUTO chooses.
pub const DREX_LOG_INFO: drex_log_level = 3;
/// Requests.
pub const DREX_LOG_DEBUG: drex_log_level = 4;
/// Every step.
pub const DREX_LOG_TRACE: drex_log_level = 5;

/// Receives one event: its level and a line of UTF-8 without a line break, at
/// most 511 bytes, valid during the call. It runs on the thread and inside the
/// call that caused it, so a call on the same engine gets
/// DREX_ERROR_HANDLE_BUSY (DREX_ERROR_INVALID_HANDLE from the event of its
/// destruction). It must return: no exception, no longjmp.
pub type drex_log_callback = Option<
    unsafe extern "C" fn(user_data: *mut c_void, level: drex_log_level, text: *const c_char),
>;

/// Sends an engine's events to a callback, and says its configuration at level
/// INFO. Events of other engines do not go there.
///
/// callback   NULL: none from now on
/// user_data  handed to the callback; kept until the engine ends or another
///            call of this function; may be NULL
/// level      DREX_LOG_*
///
/// Errors: INVALID_ARGUMENT for an unknown level.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_log_set(
    engine: *mut drex_engine,
    callback: drex_log_callback,
    user_data: *mut c_void,
    level: drex_log_level,
) -> drex_status {
    with("drex_log_set", engine, |engine| {
        if level > DREX_LOG_TRACE {
            return Err(Error::int("level", level, "DREX_LOG_* (0..5)").into());
        }
        let sink = callback.filter(|_| level > DREX_LOG_OFF);
        engine.watch.set(sink.map(|callback| Sink {
            callback,
            user_data,
            level,
        }));
        if sink.is_some() {
            engine.watch.created(&engine.scheduler);
        }
        Ok(())
    })
}

/// Counters, queues, held rows with their ages, and the scheduler's estimates
/// as a JSON object. What is not known is null.
///
/// text      [capacity] receives the text and a 0 byte; NULL with capacity 0
///           to ask for the length
/// capacity  bytes at text
/// length    receives the text's bytes without the 0 byte, also with CAPACITY
///
/// Allocates. Errors: NULL_ARGUMENT; CAPACITY when the text and its 0 byte do
/// not fit and capacity is not 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_snapshot(
    engine: *const drex_engine,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> drex_status {
    with("drex_snapshot", engine, |engine| {
        let json = snapshot::to_json(&engine.scheduler);
        // SAFETY: the caller's contract.
        unsafe { give_text(&json, text, capacity, length) }
    })
}

/// Counters, gauges and histograms in Prometheus' text format 0.0.4. Every
/// engine's text has the same families in the same order, each from its HELP
/// line on, also where a family has no sample: so several texts can be merged.
///
/// labels    put on every sample, as name="value" separated by commas, with
///           values escaped as that format says; NULL or empty: none. Not
///           ramp, layer, reason, rule or le.
/// text, capacity, length  as for drex_snapshot()
///
/// Allocates. Errors: NULL_ARGUMENT, INVALID_ARGUMENT; CAPACITY as for
/// drex_snapshot().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_metrics_text(
    engine: *const drex_engine,
    labels: *const c_char,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> drex_status {
    with("drex_metrics_text", engine, |engine| {
        let labels = match labels.is_null() {
            true => "",
            // SAFETY: the caller passes a C string.
            false => unsafe { CStr::from_ptr(labels) }
                .to_str()
                .map_err(|_| Fault::Profile("labels is not UTF-8".into()))?,
        };
        metrics::check_labels(labels).map_err(|e| Fault::Profile(format!("labels: {e}")))?;
        let all = metrics::text(&engine.scheduler, labels);
        // SAFETY: the caller's contract.
        unsafe { give_text(&all, text, capacity, length) }
    })
}

/// Receives a part of a text: n_bytes bytes, without a 0 byte, valid during the
/// call. A call on the same engine gets DREX_ERROR_HANDLE_BUSY. It must return:
/// no exception, no longjmp.
pub type drex_trace_sink =
    Option<unsafe extern "C" fn(user_data: *mut c_void, bytes: *const c_char, n_bytes: usize)>;

/// Records from now on what happens to an engine's rows, in a ring: when it is
/// full, the oldest events go. A trace that is under way is dropped.
///
/// max_events  at least 1, of at most 64 bytes each; memory is taken now, and
///             none later. A step takes one for its window, one for its
///             counters, and one for each row that exits, and for each that
///             was held.
///
/// Errors: INVALID_ARGUMENT; MEMORY, and then the trace before goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_trace_start(
    engine: *mut drex_engine,
    max_events: u32,
) -> drex_status {
    with("drex_trace_start", engine, |engine| {
        if max_events == 0 {
            return Err(Error::int("max_events", max_events, "at least 1").into());
        }
        let Some(trace) = Trace::new(max_events as usize) else {
            let bytes = u64::from(max_events) * 64;
            return Err(Error::Memory { bytes }.into());
        };
        engine.watch.set_trace(Some(Box::new(trace)));
        Ok(())
    })
}

/// Writes the trace so far, as Chrome's JSON trace events, which Perfetto
/// (ui.perfetto.dev) and chrome://tracing open. The trace goes on.
///
/// sink       called with the text's parts in their order, on this thread
/// user_data  handed to it; may be NULL
///
/// Windows are complete events on one track, from plan to complete, with the
/// host's own duration_ns in their arguments. Each time that a row was held is
/// a pair of async events of the request's, named after its ramp; rows that are
/// held now end now. Exits are instants on a track per ramp. Times are the
/// host's; an exit's is its window's end. Steps that were abandoned have no
/// window. Requests are strings, since viewers' numbers end at 2^53. The events
/// of several engines and processes can be put into one list.
///
/// Allocates. Errors: NULL_ARGUMENT for sink; CALL_ORDER without
/// drex_trace_start().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_trace_write(
    engine: *const drex_engine,
    sink: drex_trace_sink,
    user_data: *mut c_void,
) -> drex_status {
    with("drex_trace_write", engine, |engine| {
        let Some(sink) = sink else {
            return Err(Fault::Null("sink"));
        };
        let Some(trace) = engine.watch.trace() else {
            return Err(
                Error::CallOrder("no trace is under way; expected drex_trace_start first").into(),
            );
        };
        let number = handle::ENGINES.number(engine);
        trace.write(&engine.scheduler, number, &mut |part| {
            // SAFETY: the host vouches for the pair.
            unsafe { sink(user_data, part.as_ptr().cast(), part.len()) }
        });
        Ok(())
    })
}

/// Ends the recording and frees its events. Without one, does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_trace_stop(engine: *mut drex_engine) -> drex_status {
    with("drex_trace_stop", engine, |engine| {
        engine.watch.set_trace(None);
        Ok(())
    })
}
