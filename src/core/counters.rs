// SPDX-License-Identifier: Apache-2.0

use super::MAX_RAMPS;

pub const WAIT_BUCKETS: usize = 32;

/// Why a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Not a flush: new tokens through the first window.
    None = 0,
    Fill = 1,
    Age = 2,
    Deadline = 3,
    Idle = 4,
    Stay = 5,
    /// Prompt rows go on, and take along what waits there.
    Prompt = 6,
}

pub const REASONS: usize = 7;

/// Where most of the time of a token went that missed its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Miss {
    /// Between its last token and the request being ready: the host's part.
    Host = 0,
    /// Ready, with other rows going first.
    Queue = 1,
    /// Held in the rebatching buffer.
    Held = 2,
    /// In layer windows.
    Run = 3,
}

pub const MISSES: usize = 4;

/// Totals since the engine was made.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    pub tokens: u64,
    pub exits: [u64; MAX_RAMPS],
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub flushes: [u64; REASONS],
    pub held_rows_max: u64,
    pub cells_filled: u64,
    pub bytes_filled: u64,
    pub deadline_misses: u64,
    pub misses: [u64; MISSES],
    pub nonfinite_rows: u64,
    /// Pending rows whose skipped layers were computed.
    pub rows_filled: u64,
    /// Tokens that left at a ramp and were verified, and those of them that
    /// the full model confirmed.
    pub drafts: u64,
    pub accepted: u64,
    /// Drafts and deep rows that followed a draft that was replaced.
    pub dropped: u64,
    pub steps: u64,
    pub step_rows: u64,
    /// Steps with prompt rows, and those rows.
    pub prompt_steps: u64,
    pub prompt_rows: u64,
    pub wait_us_buckets: [u64; WAIT_BUCKETS],
    pub wait_us_sum: u64,
    /// Durations of windows, as the host measured them.
    pub window_us_buckets: [u64; WAIT_BUCKETS],
    pub window_us_sum: u64,
}

impl Counters {
    pub fn wait(&mut self, ns: u64) {
        let us = ns / 1000;
        self.wait_us_buckets[bucket(us)] += 1;
        self.wait_us_sum = self.wait_us_sum.saturating_add(us);
    }

    pub fn window(&mut self, ns: u64) {
        let us = ns / 1000;
        self.window_us_buckets[bucket(us)] += 1;
        self.window_us_sum = self.window_us_sum.saturating_add(us);
    }
}

/// Bucket i counts [2^(i-1), 2^i) us; 0 counts what is under 1 us.
fn bucket(us: u64) -> usize {
    ((64 - us.leading_zeros()) as usize).min(WAIT_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double() {
        let expect = [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 3),
            (1023, 10),
            (1024, 11),
        ];
        for (us, b) in expect {
            assert_eq!(bucket(us), b, "{us}");
        }
        assert_eq!(bucket(u64::MAX), WAIT_BUCKETS - 1);
    }
}
