// SPDX-License-Identifier: Apache-2.0
//! What Triton counts of an instance beside requests: responses and executions.

use std::ptr::null_mut;

use super::abi;
use super::error::check;

/// When a response was made. Nanoseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    /// What is sent was known; 0: nothing is.
    pub computed: u64,
}

/// Counts one response that was sent. None with a server that does not count them.
///
/// # Safety
/// All are Triton's and live; `error` is the response's, or NULL.
pub unsafe fn response(
    instance: *mut abi::Instance,
    factory: *mut abi::Factory,
    span: Span,
    end: u64,
    error: *mut abi::Error,
) -> Option<()> {
    let new = abi::TRITONBACKEND_ModelInstanceResponseStatisticsNew()?;
    let delete = abi::TRITONBACKEND_ModelInstanceResponseStatisticsDelete()?;
    let of_instance = abi::TRITONBACKEND_ModelInstanceResponseStatisticsSetModelInstance()?;
    let of_factory = abi::TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseFactory()?;
    let starts = abi::TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseStart()?;
    let computed = abi::TRITONBACKEND_ModelInstanceResponseStatisticsSetComputeOutputStart()?;
    let ends = abi::TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseEnd()?;
    let fails = abi::TRITONBACKEND_ModelInstanceResponseStatisticsSetError()?;
    let report = abi::TRITONBACKEND_ModelInstanceReportResponseStatistics()?;
    // Triton refuses times that go back.
    let start = span.start.min(end);
    let known = span.computed.clamp(start, end);
    // SAFETY: by the caller; what is made is deleted.
    unsafe {
        let mut this = null_mut();
        check(new(&mut this)).ok()?;
        if this.is_null() {
            return None; // a server that was built without statistics
        }
        let filled = check(of_instance(this, instance))
            .and_then(|()| check(of_factory(this, factory)))
            .and_then(|()| check(starts(this, start)))
            .and_then(|()| check(computed(this, if span.computed > 0 { known } else { 0 })))
            .and_then(|()| check(ends(this, end)))
            .and_then(|()| check(fails(this, error)));
        let done = filled.and_then(|()| check(report(this)));
        let _ = check(delete(this));
        done.ok()
    }
}

/// The instance's own counter, from the thread that computes.
pub struct Executions(*mut abi::Instance);
// SAFETY: Triton locks its statistics.
unsafe impl Send for Executions {}

impl Executions {
    /// # Safety
    /// The instance outlives this.
    pub unsafe fn of(instance: *mut abi::Instance) -> Self {
        Self(instance)
    }

    /// Counts one execution of so many rows.
    pub fn add(&self, rows: u64, start: u64, end: u64) {
        // SAFETY: by `of`.
        let _ = unsafe {
            check(abi::TRITONBACKEND_ModelInstanceReportBatchStatistics(
                self.0, rows, start, start, end, end,
            ))
        };
    }
}
