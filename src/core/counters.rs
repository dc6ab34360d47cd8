// SPDX-License-Identifier: Apache-2.0

use crate::core::MAX_RAMPS;
use crate::core::decision::Decision;
use crate::core::names::named;

pub const WAIT_BUCKETS: usize = 32;

named! {
    /// Why a step runs.
    Reason {
        /// Ready rows, or prompts, run through the first window.
        None = c"none",
        /// As many rows are held as the rule asks for.
        Full = c"fill",
        /// A row was held for the longest time that it may be.
        Age = c"age",
        /// A deadline would be missed.
        Deadline = c"deadline",
        /// Nothing else is left to run.
        Idle = c"idle",
        /// A ramp told rows to stay.
        Stay = c"stay",
        /// Prompt rows go on, and take along what waits there.
        Prompt = c"prompt",
    }
}

pub const REASONS: usize = Reason::ALL.len();

named! {
    /// Where the time of a token goes, and most of it where it missed its deadline.
    TimeIn {
        /// Between its last token and the request being ready: the host's part.
        Host = c"host",
        /// Ready, with other rows going first.
        Queue = c"queue",
        /// Held in the rebatching buffer.
        Held = c"held",
        /// In layer windows.
        Run = c"run",
    }
}

pub const MISSES: usize = TimeIn::ALL.len();

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

    /// A ramp decided a row; `token`: its exit is one.
    pub fn decided(&mut self, decision: Decision, ramp: usize, forced: bool, token: bool) {
        match decision {
            Decision::Exit => {
                self.tokens += u64::from(token);
                self.exits[ramp] += 1;
                self.involuntary_exits += u64::from(forced);
            }
            Decision::Hold | Decision::Stay => self.involuntary_stays += u64::from(forced),
            _ => {}
        }
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
