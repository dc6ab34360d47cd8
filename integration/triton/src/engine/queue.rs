// SPDX-License-Identifier: Apache-2.0
//! Requests that wait for a slot.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::clock::now_ns;
use crate::llama::Vocab;
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
}

impl Job {
    /// Reads the text, on the caller's thread: a long one takes a while. `context` as `Engine::context` says.
    pub fn new(
        vocab: &Vocab,
        context: u32,
        id: u64,
        prompt: &str,
        sampling: Sampling,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Self, Failure> {
        let arrived_ns = now_ns();
        let most = vocab.longest().saturating_mul(context as usize);
        if prompt.len() > most {
            return Err(Failure::invalid(format!(
                "text_input has {} bytes, the context holds {context} tokens, which are at most {most} bytes",
                prompt.len()
            )));
        }
        let prompt = vocab.tokenize(prompt, true)?;
        if prompt.is_empty() {
            return Err(Failure::invalid("text_input is empty"));
        }
        if prompt.len() >= context as usize {
            return Err(Failure::invalid(format!(
                "text_input has {} tokens, the context holds {context} with at least one for the answer",
                prompt.len()
            )));
        }
        let mut bad = Vec::new();
        for word in &sampling.bad_words {
            // At the beginning of a line, and within.
            for text in [word.clone(), format!(" {}", word.trim_start())] {
                let tokens = vocab.tokenize(&text, false)?;
                if !tokens.is_empty() && !bad.contains(&tokens) {
                    bad.push(tokens);
                }
            }
        }
        Ok(Self {
            id,
            prompt,
            bad,
            sampling,
            arrived_ns,
            cancelled,
        })
    }

    /// When its timeout is over.
    pub(super) fn deadline_ns(&self) -> Option<u64> {
        let timeout = self.sampling.timeout_us.saturating_mul(1000);
        (timeout > 0).then(|| self.arrived_ns.saturating_add(timeout))
    }
}

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
    /// So many may wait for longer than a step.
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

    /// Gives the youngest back where too many wait: those that came since a slot was last free.
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
