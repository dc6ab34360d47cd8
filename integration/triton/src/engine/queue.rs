// SPDX-License-Identifier: Apache-2.0
//! Requests that wait for a slot.

use super::Job;

/// A request that so many younger ones went before goes next; as rows do in drex.
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

    /// Gives the job back when too many wait.
    pub fn push(&mut self, job: Job) -> Result<(), Box<Job>> {
        if self.jobs.len() >= self.most {
            return Err(Box::new(job));
        }
        self.jobs.push(Waiting { job, passed: 0 });
        Ok(())
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
    use crate::sampling::Sampling;

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
        }
    }

    #[test]
    fn priority_then_age() {
        let mut queue = Queue::new(8);
        for (id, priority) in [(1, 0), (2, 5), (3, -1), (4, 5)] {
            assert!(queue.push(job(id, priority)).is_ok());
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
            assert!(queue.push(job(id, -1)).is_ok());
        }
        // As many of high priority as are taken, for ever.
        let taken: Vec<bool> = (0..40)
            .map(|i| {
                assert!(queue.push(job(100 + i, 1)).is_ok());
                queue.pop().unwrap().id < 100
            })
            .collect();
        let low: Vec<usize> = (0..40).filter(|&i| taken[i]).collect();
        assert_eq!(low, [8, 10, 12, 14]);
    }

    #[test]
    fn a_full_queue_gives_the_job_back() {
        let mut queue = Queue::new(1);
        assert!(queue.push(job(1, 0)).is_ok());
        assert_eq!(queue.push(job(2, 9)).err().map(|job| job.id), Some(2));
        assert_eq!(queue.take(|job| job.id == 1).len(), 1);
        assert!(queue.push(job(3, 0)).is_ok());
    }
}
