// SPDX-License-Identifier: Apache-2.0

//! Totals and current values. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::c_char;

use super::engine::{DREX_MAX_RAMPS, drex_engine};
use super::entry::{self, with};
use super::names::name;
use super::plan::DREX_FLUSH_REASONS;
use super::status::drex_status;
use crate::core::counters::{MISSES, REASONS, TimeIn, WAIT_BUCKETS};
use crate::core::estimate::agreement::{Estimate, TARGETS, floor};

/// Length of drex_stats.flushes, more than there are DREX_FLUSH_*.
pub const DREX_MAX_FLUSH_REASONS: usize = 16;
/// Length of drex_stats.misses, more than there are DREX_MISS_*.
pub const DREX_MAX_MISS_REASONS: usize = 8;
/// Length of drex_stats.wait_us_buckets.
pub const DREX_WAIT_BUCKETS: usize = 32;

/// Where most of the time went of a token that missed its deadline:
/// DREX_MISS_*.
pub type drex_miss_reason = u32;

/// Between its last token and drex_request_ready(): in the host.
pub const DREX_MISS_HOST: drex_miss_reason = 0;
/// Ready, while other rows ran: overload.
pub const DREX_MISS_QUEUE: drex_miss_reason = 1;
/// Held in the rebatching buffer.
pub const DREX_MISS_HELD: drex_miss_reason = 2;
/// In layer windows, its own or others' while it was to go on at once.
pub const DREX_MISS_RUN: drex_miss_reason = 3;
/// How many reasons there are; a later version may have more, up to
/// DREX_MAX_MISS_REASONS.
pub const DREX_MISS_REASONS: usize = 4;

/// Totals since drex_create(), and some current values.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_stats {
    /// sizeof(drex_stats), set by the caller
    pub size: u32,
    /// The engine's; the entries of the arrays beyond it are 0.
    pub n_ramps: u32,
    /// Rows that emitted a token, at a ramp or at the end. With
    /// DREX_FILL_VERIFY a draft counts when it is accepted or replaced.
    pub tokens: u64,
    /// Rows that left at each ramp. With DREX_FILL_VERIFY they are drafts, and
    /// count here also where they were replaced or dropped later, so there may
    /// be more of them than tokens.
    pub exits: [u64; DREX_MAX_RAMPS],
    /// Of the exits, those below the row's threshold; see drex_policy.
    pub involuntary_exits: u64,
    /// Rows that were confident at a ramp and went on.
    pub involuntary_stays: u64,
    /// Completed steps by reason; DREX_FLUSH_NONE counts those that were no
    /// flush, so that all sum to `steps`. From DREX_FLUSH_REASONS on 0, as
    /// far as this version goes; so are `misses` from DREX_MISS_REASONS on.
    pub flushes: [u64; DREX_MAX_FLUSH_REASONS],
    /// Rows in the rebatching buffer now, without those of the planned step.
    pub held_rows: u64,
    /// Of these, at each ramp.
    pub held_rows_at: [u64; DREX_MAX_RAMPS],
    /// The most rows that were held at one time.
    pub held_rows_max: u64,
    /// Requests alive now.
    pub requests: u64,
    /// Arena rows free now.
    pub slots_free: u64,
    /// Cells whose skipped layers drex_fill() filled.
    pub cells_filled: u64,
    /// Bytes that it wrote for them.
    pub bytes_filled: u64,
    /// Tokens that came later than their deadline.
    pub deadline_misses: u64,
    /// Rows at a ramp whose confidence was NaN.
    pub nonfinite_rows: u64,
    /// Completed steps.
    pub steps: u64,
    /// Their rows, those of requests that went away included.
    pub step_rows: u64,
    /// Held times: bucket 0 counts those under 1 us, bucket i those in
    /// [2^(i-1), 2^i) us, the last one all that are longer.
    pub wait_us_buckets: [u64; DREX_WAIT_BUCKETS],
    /// Held times, each in whole us, summed.
    pub wait_us_sum: u64,
    /// c/t_d at the first ramp for the last batch's rows, as pinned or as
    /// measured; NaN when unknown.
    pub art_ratio: f64,
    /// Deadline misses by where most of the token's time went: DREX_MISS_*.
    pub misses: [u64; DREX_MAX_MISS_REASONS],
    /// AUTO: searches for a better rule so far.
    pub searches: u64,
    /// AUTO: the ramps that the present rule looks at, bit r for ramp r; 0:
    /// no early exit.
    pub rule_ramps: u32,
    /// AUTO: held rows at a ramp that flush.
    pub rule_hold_rows: u32,
    /// AUTO: ready rows below which held ones are flushed.
    pub rule_ready_rows: u32,
    /// 0
    pub reserved: u32,
    /// AUTO: tokens per second that the last search predicted for its rule.
    pub predicted_tokens_per_s: f64,
    /// AUTO: tokens per second that it predicted for full passes.
    pub predicted_off_tokens_per_s: f64,
    /// Measured share of rows that are confident at each ramp, of those
    /// scored there that were scored nowhere before; NaN before the first.
    pub exit_share: [f64; DREX_MAX_RAMPS],
    /// Pending rows now.
    pub pending_rows: u64,
    /// Pending rows whose skipped layers were computed.
    pub rows_filled: u64,
    /// VERIFY: drafts that were accepted or replaced.
    pub drafts: u64,
    /// Of these, accepted.
    pub drafts_accepted: u64,
    /// VERIFY: rows that followed a draft that was replaced or was the last.
    pub rows_dropped: u64,
    /// Prompt rows of completed steps. One that a window leaves at a ramp counts
    /// in each of its windows.
    /// Since 0.2.
    pub prompt_rows: u64,
    /// Completed steps with prompt rows.
    /// Since 0.2.
    pub prompt_steps: u64,
    /// The chance that a draft and all before it stand from which requests whose
    /// thresholds are learned make it; see drex_config.quality.
    /// Since 0.2.
    pub rule_survival: f32,
    /// AUTO: most drafts of such a request; 0: no bound but max_pending.
    /// Since 0.2.
    pub rule_drafts: u32,
    /// The target agreement that the next five are about: the engine's, or what a
    /// request last asked for; NaN before the first.
    /// Since 0.2.
    pub agreement_target: f64,
    /// Estimated from audits: share of the tokens of requests with that target that
    /// are the full model's, of late; NaN before the first.
    /// Since 0.2.
    pub agreement: f64,
    /// Its bounds, each of which chance breaks one time in fifty.
    /// Since 0.2.
    pub agreement_low: f64,
    /// Since 0.2.
    pub agreement_high: f64,
    /// The lowest threshold that audits have shown to be within it; NaN: none, and
    /// then such requests are lossless but for those that try one.
    /// Since 0.2.
    pub agreement_threshold: f64,
    /// Tokens that may yet differ before such requests are lossless for a while.
    /// Since 0.2.
    pub agreement_balance: f64,
    /// Answers that were audited, of all targets.
    /// Since 0.2.
    pub audits: u64,
    /// Their tokens.
    /// Since 0.2.
    pub audited_tokens: u64,
    /// Of these, those that the full model would have chosen otherwise.
    /// Since 0.2.
    pub audited_differing: u64,
    /// Answers that were to be audited, and were removed without that.
    /// Since 0.2.
    pub audits_missed: u64,
}

/// A snapshot of the engine's totals. Cheap enough for every step.
///
/// out  its size is set by the caller
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_stats_get(
    engine: *const drex_engine,
    out: *mut drex_stats,
) -> drex_status {
    with("drex_stats_get", engine, |engine| {
        // SAFETY: the caller's contract.
        let size = unsafe { entry::writable("out", out)? };
        let engine = &engine.scheduler;
        let c = engine.counters();
        let auto = engine.auto();
        let (row_rule, predicted) = (engine.chosen_rule(), auto.predicted());
        let mut exit_share = [f64::NAN; DREX_MAX_RAMPS];
        for (r, share) in exit_share
            .iter_mut()
            .enumerate()
            .take(engine.config().n_ramps())
        {
            let chance = engine.exit_rates().chance(None, r);
            if chance.looks > 0.0 {
                *share = chance.p;
            }
        }
        let (mut flushes, mut misses) = ([0; DREX_MAX_FLUSH_REASONS], [0; DREX_MAX_MISS_REASONS]);
        flushes[..c.flushes.len()].copy_from_slice(&c.flushes);
        misses[..c.misses.len()].copy_from_slice(&c.misses);
        let target = engine.target();
        let found = target.and_then(|t| engine.agreement().estimate(t));
        let agreed = |value: fn(Estimate) -> f64| found.map_or(f64::NAN, value);
        let proven = target.and_then(|t| floor(engine.agreement().proven(t)));
        let audits = engine.agreement().audits();
        let stats = drex_stats {
            size,
            n_ramps: engine.config().n_ramps() as u32,
            tokens: c.tokens,
            exits: c.exits,
            involuntary_exits: c.involuntary_exits,
            involuntary_stays: c.involuntary_stays,
            flushes,
            held_rows: engine.buffer().held().into(),
            held_rows_at: engine.held_rows_at(),
            held_rows_max: c.held_rows_max,
            requests: engine.requests() as u64,
            slots_free: engine.buffer().free_slots() as u64,
            cells_filled: c.cells_filled,
            bytes_filled: c.bytes_filled,
            deadline_misses: c.deadline_misses,
            nonfinite_rows: c.nonfinite_rows,
            steps: c.steps,
            step_rows: c.step_rows,
            wait_us_buckets: c.wait_us_buckets,
            wait_us_sum: c.wait_us_sum,
            art_ratio: engine.art_ratio().unwrap_or(f64::NAN),
            misses,
            searches: auto.searches(),
            rule_ramps: row_rule.ramps,
            rule_hold_rows: row_rule.hold_rows,
            rule_ready_rows: row_rule.ready_rows,
            reserved: 0,
            predicted_tokens_per_s: predicted.0 * 1e9,
            predicted_off_tokens_per_s: predicted.1 * 1e9,
            exit_share,
            pending_rows: engine.pending_rows().into(),
            rows_filled: c.rows_filled,
            drafts: c.drafts,
            drafts_accepted: c.accepted,
            rows_dropped: c.dropped,
            prompt_rows: c.prompt_rows,
            prompt_steps: c.prompt_steps,
            rule_survival: row_rule.survival,
            rule_drafts: row_rule.drafts.unwrap_or(0),
            agreement_target: target.map_or(f64::NAN, |t| TARGETS[usize::from(t)]),
            agreement: agreed(|e| e.agreement),
            agreement_low: agreed(|e| e.low),
            agreement_high: agreed(|e| e.high),
            agreement_threshold: proven.map_or(f64::NAN, f64::from),
            agreement_balance: target.map_or(0.0, |t| engine.agreement().balance(t)),
            audits: audits.answers,
            audited_tokens: audits.tokens,
            audited_differing: audits.differing,
            audits_missed: audits.missed,
        };
        // SAFETY: checked above.
        unsafe { entry::write(out, &stats) };
        Ok(())
    })
}

/// A miss reason's name in lower case, such as "queue"; NULL when unknown. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drex_miss_reason_name(reason: drex_miss_reason) -> *const c_char {
    name(TimeIn::from_number(reason).map(TimeIn::c_name))
}

// Padding would hand the caller whatever was on our stack.
const _: () = assert!(size_of::<drex_stats>().is_multiple_of(8));

const _: () = {
    assert!(DREX_WAIT_BUCKETS == WAIT_BUCKETS);
    assert!(DREX_FLUSH_REASONS == REASONS && REASONS <= DREX_MAX_FLUSH_REASONS);
    assert!(DREX_MISS_REASONS == MISSES && MISSES <= DREX_MAX_MISS_REASONS);
    assert!(DREX_MISS_RUN == TimeIn::Run as u32);
};
