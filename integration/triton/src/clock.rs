// SPDX-License-Identifier: Apache-2.0
//! The clock that Triton's statistics and drex's deadlines are in.

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn now_ns() -> u64 {
    // SAFETY: plain data that the call fills; this clock always exists.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
        time
    };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
