// SPDX-License-Identifier: Apache-2.0

//! Verdicts of the full model on drafts. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use super::engine::drex_engine;
use super::entry::{call, with};
use super::fault::Fault;
use super::ramp::drex_decision;
use super::status::drex_status;
use crate::core::error::Error;
use crate::core::sampling::keep_or_replace;
use crate::core::scheduler::Agrees;

/// At the end of a window that ends at n_layers and has drafts: says which of
/// them stand. A draft is the token that a row of a request with
/// DREX_FILL_VERIFY emitted at a ramp; the row is in the step as a pending
/// one. Allowed, and without consequence, in a step without drafts.
///
/// For each request, going through its rows in their order (the oldest first):
/// choose a token from the row's logits, and compare it with the draft. After
/// the first that differs, the request's later rows are void. Hosts that sample
/// choose by drex_speculate().
///
/// agrees     [n_rows] 1: the token chosen from the row's logits is its draft;
///            2: the same, and it is the request's last token; 0: it is
///            another. Looked at for drafts only, up to the first 0 or 2 of
///            each request.
/// n_rows     drex_step.n_rows
/// decisions  [capacity] receives one per row: ACCEPT or REPLACE for drafts,
///            PENDING for pending rows without, EXIT for the request's own row:
///            emit the token chosen from its logits; DROP for what follows a
///            draft that was replaced or was the last token; GONE
/// capacity   at least n_rows
///
/// After REPLACE, the request's next token is the one chosen; the rows after it
/// never were: the host takes their tokens back and frees their KV cells. The
/// request is IDLE after drex_complete() in any case. Until then the verdicts
/// can be lost by drex_abandon(): give their tokens to clients after it.
///
/// Errors: NULL_ARGUMENT, INVALID_ARGUMENT, CAPACITY; CALL_ORDER when no step is
/// planned, when it ends at a ramp, or when it is verified already.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_verify(
    engine: *mut drex_engine,
    agrees: *const u8,
    n_rows: u32,
    decisions: *mut drex_decision,
    capacity: u32,
) -> drex_status {
    with("drex_verify", engine, |engine| {
        if agrees.is_null() {
            return Err(Fault::Null("agrees"));
        }
        if decisions.is_null() {
            return Err(Fault::Null("decisions"));
        }
        let n = n_rows as usize;
        engine.scheduler.expect_verify(n)?;
        if capacity < n_rows {
            return Err(Error::Capacity {
                field: "capacity",
                value: capacity.into(),
                need: n_rows.into(),
                why: "every row has a decision",
            }
            .into());
        }
        engine.scheduler.verify(n, |i| {
            // SAFETY: the caller's contract.
            match unsafe { agrees.add(i).read() } {
                0 => Ok(Agrees::No),
                1 => Ok(Agrees::Yes),
                2 => Ok(Agrees::AndEnds),
                other => Err(Error::int("agrees", other, "0, 1 or 2").at(i)),
            }
        })?;
        for (i, row) in engine.scheduler.step_rows().iter().enumerate() {
            // SAFETY: `capacity` is at least the number of rows.
            unsafe {
                decisions
                    .add(i)
                    .write_unaligned(row.decision as drex_decision)
            };
        }
        Ok(())
    })
}

/// Speculative sampling: makes a token that was drawn from the ramp's
/// distribution one of the full model's, by keeping or replacing it. For hosts
/// that sample (greedy ones compare). The result is distributed as `deep`,
/// whatever `draft` is; it equals draft_token as often as is possible.
/// Leviathan et al. 2023, arXiv 2211.17192, section 2.3.
///
/// deep         [n_vocab] probabilities by the full model, after temperature,
///              top-k and the like; finite, >= 0, not all 0; need not sum to 1
/// draft        the same, by the ramp, as draft_token was drawn from them; NULL:
///              draft_token was certain
/// draft_token  below n_vocab
/// u, v         two random numbers, uniform in [0, 1)
/// token        receives the token
///
/// Takes no engine. Errors: NULL_ARGUMENT, INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_speculate(
    deep: *const f32,
    draft: *const f32,
    n_vocab: u32,
    draft_token: i32,
    u: f64,
    v: f64,
    token: *mut i32,
) -> drex_status {
    call("drex_speculate", || {
        if deep.is_null() {
            return Err(Fault::Null("deep"));
        }
        if token.is_null() {
            return Err(Fault::Null("token"));
        }
        if n_vocab == 0 || i32::try_from(n_vocab).is_err() {
            return Err(Error::int("n_vocab", n_vocab, "1..2147483647").into());
        }
        let drafted = match u32::try_from(draft_token) {
            Ok(t) if t < n_vocab => t as usize,
            _ => {
                return Err(Error::signed("draft_token", draft_token, "0..n_vocab-1").into());
            }
        };
        for (name, x) in [("u", u), ("v", v)] {
            if !(0.0..1.0).contains(&x) {
                return Err(Error::float(name, x as f32, "a number in [0, 1)").into());
            }
        }
        let read = |name, p: *const f32| -> Result<&[f32], Fault> {
            if !p.is_aligned() {
                return Err(Error::pointer(name, p.addr() as u64, "an aligned pointer").into());
            }
            // SAFETY: the caller's contract.
            let all = unsafe { std::slice::from_raw_parts(p, n_vocab as usize) };
            let mut sum = 0.0f64;
            for (i, &x) in all.iter().enumerate() {
                if !(x.is_finite() && x >= 0.0) {
                    let e = Error::float(name, x, "a finite number >= 0");
                    return Err(e.at(i).into());
                }
                sum += f64::from(x);
            }
            if sum <= 0.0 {
                return Err(Error::float(name, 0.0, "a sum above 0").into());
            }
            Ok(all)
        };
        let p = read("deep", deep)?;
        let q = match draft.is_null() {
            true => None,
            false => Some(read("draft", draft)?),
        };
        let out = keep_or_replace(p, q, drafted, u, v);
        // SAFETY: not NULL.
        unsafe { token.write_unaligned(out as i32) };
        Ok(())
    })
}
