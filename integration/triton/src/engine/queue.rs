// SPDX-License-Identifier: Apache-2.0
//! Requests that wait for a slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::answer::Answer;
use crate::sampling::Sampling;
use crate::triton::error::Failure;

/// A request before it runs.
pub struct Job {
    pub id: u64,
    pub prompt: Vec<i32>,
    /// Sequences of tokens that the answer must not have.
    pub bad: Vec<Vec<i32>>,
    pub sampling: Sampling,
    pub arrived_ns: u64,
    /// Set by whoever sees the client go.
    pub cancelled: Arc<AtomicBool>,
    pub answer: Answer,
}

impl Job {
    /// When its timeout is over.
    pub(super) fn deadline_ns(&self) -> Option<u64> {
        let timeout = self.sampling.timeout_us.saturating_mul(1000);
        (timeout > 0).then(|| self.arrived_ns.saturating_add(timeout))
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn is_late(&self, now: u64) -> bool {
        self.deadline_ns().is_some_and(|deadline| now >= deadline)
    }

    pub(super) fn fail_late(&mut self) {
        self.answer.fail(Failure::unavailable(format!(
            "the timeout of {} us is over and the request has not begun",
            self.sampling.timeout_us
        )));
    }
}

/// A request that so many younger requests have overtaken goes next, as a row does in drex.
const PASSES: u32 = 8;

struct Waiting {
    job: Job,
    /// How many younger ones were taken before it.
    passed: u32,
}

/// Higher priority first, the older first among equals. None starves: every second one that is taken may be one that was
/// passed over `PASSES` times.
pub struct Queue {
    /// The oldest first.
    jobs: Vec<Waiting>,
    /// So many may wait.
    most: usize,
    /// The last one was taken for its age.
    aged: bool,
}

impl Queue {
    pub fn new(most: u32) -> Self {
        Self {
            jobs: Vec::new(),
            most: most as usize,
            aged: false,
        }
    }

    pub fn push(&mut self, job: Job) {
        self.jobs.push(Waiting { job, passed: 0 });
    }

    /// So many may wait.
    pub fn most(&self) -> usize {
        self.most
    }

    /// One that was taken and did not begin.
    pub fn put_back(&mut self, job: Job) {
        let older = |w: &Waiting| w.job.arrived_ns <= job.arrived_ns;
        let at = self.jobs.iter().take_while(|w| older(w)).count();
        self.jobs.insert(at, Waiting { job, passed: 0 });
    }

    /// Gives the youngest back where too many wait.
    pub fn too_many(&mut self) -> Vec<Job> {
        let rest = self.most.min(self.jobs.len());
        self.jobs.drain(rest..).map(|w| w.job).collect()
    }

    pub fn pop(&mut self) -> Option<Job> {
        let old = self.jobs.iter().position(|w| w.passed >= PASSES);
        let old = old.filter(|_| !self.aged);
        self.aged = old.is_some();
        let at = old.or_else(|| {
            let priority = |w: &Waiting| w.job.sampling.drex_priority;
            let best = self.jobs.iter().map(priority).max()?;
            self.jobs.iter().position(|w| priority(w) == best)
        })?;
        for older in &mut self.jobs[..at] {
            older.passed += 1;
        }
        Some(self.jobs.remove(at).job)
    }

    /// Takes out all that are so.
    pub fn take(&mut self, is: impl Fn(&Job) -> bool) -> Vec<Job> {
        self.jobs
            .extract_if(.., |w| is(&w.job))
            .map(|w| w.job)
            .collect()
    }

    pub fn drain(&mut self) -> Vec<Job> {
        self.take(|_| true)
    }

    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    pub fn len(&self) -> usize {
        self.jobs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: u64, priority: i32) -> Job {
        Job {
            id,
            prompt: vec![1],
            bad: Vec::new(),
            sampling: Sampling {
                drex_priority: priority,
                ..Sampling::default()
            },
            arrived_ns: 0,
            cancelled: Default::default(),
            answer: Answer::new(Box::new(|_| ())),
        }
    }

    #[test]
    fn priority_then_age() {
        let mut queue = Queue::new(8);
        for (id, priority) in [(1, 0), (2, 5), (3, -1), (4, 5)] {
            queue.push(job(id, priority));
        }
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop())
            .map(|job| job.id)
            .collect();
        assert_eq!(order, [2, 4, 1, 3]);
    }

    #[test]
    fn low_priority_does_not_starve_and_takes_at_most_every_second_turn() {
        let mut queue = Queue::new(64);
        for id in 0..4 {
            queue.push(job(id, -1));
        }
        // As many of high priority as are taken, for ever.
        let taken: Vec<bool> = (0..40)
            .map(|i| {
                queue.push(job(100 + i, 1));
                queue.pop().unwrap().id < 100
            })
            .collect();
        let low: Vec<usize> = (0..40).filter(|&i| taken[i]).collect();
        assert_eq!(low, [8, 10, 12, 14]);
    }

    #[test]
    fn a_full_queue_gives_the_youngest_back() {
        let mut queue = Queue::new(1);
        for (id, priority) in [(1, 0), (2, 9), (3, 0)] {
            queue.push(job(id, priority));
        }
        let gone: Vec<u64> = queue.too_many().iter().map(|job| job.id).collect();
        assert_eq!(gone, [2, 3]);
        assert_eq!(queue.take(|job| job.id == 1).len(), 1);
        queue.push(job(4, 0));
        assert!(queue.too_many().is_empty());
    }
}
