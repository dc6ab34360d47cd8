// SPDX-License-Identifier: Apache-2.0
//! The requests of a model that no engine has yet, and who gets them: one queue for all instances.
//!
//! A request goes to the instance with most room. It waits only while no instance has any.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::answer::GONE;
use super::queue::{Job, Queue};
use crate::clock::now_ns;
use crate::exit::{self, Stop};
use crate::triton::error::Failure;

/// Why requests are refused while the model is unloaded.
pub const UNLOADED: &str = "the model is being unloaded";

/// The state of a member's engine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Runs,
    /// Ends what it runs, and gets nothing more.
    Leaves,
    /// Gives up what it runs, and says why.
    Stops(&'static str),
    /// Is not there yet, or no more.
    Ended,
}

/// An instance.
struct Member {
    mode: Mode,
    /// Requests that it gets next.
    inbox: Vec<Job>,
    /// Slots that no request has, nor will get from the inbox.
    room: usize,
    /// Requests that were taken in through it and are not answered yet.
    open: usize,
}

struct State {
    queue: Queue,
    /// Members stay where they are.
    members: Vec<Member>,
    /// Why nobody runs any more.
    why: &'static str,
}

pub struct Pool {
    state: Mutex<State>,
    wake: Condvar,
    exiting: AtomicBool,
    /// Told how many wait, whenever it changes.
    waiting: Box<dyn Fn(usize) + Send + Sync>,
}

/// Requests that are told that they do not run, and why.
#[derive(Default)]
struct Refused {
    jobs: Vec<Job>,
    why: Cow<'static, str>,
}

impl Refused {
    fn new(jobs: Vec<Job>, why: impl Into<Cow<'static, str>>) -> Self {
        Self {
            jobs,
            why: why.into(),
        }
    }
}

impl State {
    /// Gives requests away while there is room; the instance with most of it comes first.
    fn give(&mut self) {
        while !self.queue.is_empty() {
            let with_room = self
                .members
                .iter_mut()
                .rev()
                .filter(|member| member.mode == Mode::Runs && member.room > 0);
            let Some(member) = with_room.max_by_key(|member| member.room) else {
                return;
            };
            if let Some(job) = self.queue.pop() {
                member.room -= 1;
                member.inbox.push(job);
            }
        }
    }

    fn any_runs(&self) -> bool {
        self.members.iter().any(|member| member.mode == Mode::Runs)
    }

    /// A member gets nothing more. What it has not begun goes back, and is refused where nobody is left.
    fn retire(&mut self, at: usize, mode: Mode, why: &'static str) -> Refused {
        let member = &mut self.members[at];
        member.mode = mode;
        for job in member.inbox.drain(..) {
            member.room += 1;
            self.queue.put_back(job);
        }
        if self.any_runs() {
            self.give();
            return Refused::default();
        }
        self.why = why;
        Refused::new(self.queue.drain(), why)
    }
}

impl Pool {
    /// So many requests may wait; `waiting` is told how many do.
    pub fn new(most: u32, waiting: Box<dyn Fn(usize) + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                queue: Queue::new(most),
                members: Vec::new(),
                why: UNLOADED,
            }),
            wake: Condvar::new(),
            exiting: AtomicBool::new(false),
            waiting,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, refuses what comes back, and wakes whoever waits.
    fn change(&self, f: impl FnOnce(&mut State) -> Refused) {
        let refused = {
            let mut state = self.lock();
            let done = f(&mut state);
            (self.waiting)(state.queue.len());
            done
        };
        self.wake.notify_all();
        for mut job in refused.jobs {
            job.answer.fail(Failure::unavailable(&*refused.why));
        }
    }

    /// A new member, which gets nothing before it begins.
    pub fn join(self: &Arc<Self>) -> Seat {
        let mut state = self.lock();
        state.members.push(Member {
            mode: Mode::Ended,
            inbox: Vec::new(),
            room: 0,
            open: 0,
        });
        Seat {
            pool: self.clone(),
            at: state.members.len() - 1,
        }
    }

    /// From here on the request is answered, whatever happens.
    pub fn submit(&self, job: Job) {
        self.sweep();
        self.change(|state| {
            state.queue.push(job);
            if !state.any_runs() {
                return Refused::new(state.queue.drain(), state.why);
            }
            state.give();
            let jobs = state.queue.too_many();
            if jobs.is_empty() {
                return Refused::default();
            }
            let most = state.queue.most();
            Refused::new(
                jobs,
                format!("{most} requests wait, which is max_queue; try again later"),
            )
        });
    }

    /// Ends what waits and is cancelled, or waits for longer than its timeout.
    pub(super) fn sweep(&self) {
        let now = now_ns();
        let (mut gone, mut late) = {
            let mut state = self.lock();
            if state.queue.is_empty() {
                return;
            }
            let gone = state.queue.take(Job::is_cancelled);
            let late = state.queue.take(|job| job.is_late(now));
            (self.waiting)(state.queue.len());
            (gone, late)
        };
        gone.iter_mut().for_each(|job| job.answer.cancel());
        late.iter_mut().for_each(Job::fail_late);
    }

    /// The process ends: nothing more is sent but refusals.
    pub fn is_exiting(&self) -> bool {
        self.exiting.load(Ordering::Relaxed)
    }

    /// Wakes whoever waits, to look again.
    pub fn notify(&self) {
        self.wake.notify_all();
    }
}

impl Stop for Pool {
    fn stop(&self) {
        self.exiting.store(true, Ordering::Relaxed);
        self.change(|state| {
            let mut jobs = Vec::new();
            for at in 0..state.members.len() {
                if state.members[at].mode != Mode::Ended {
                    let stops = Mode::Stops(exit::EXITING);
                    jobs.append(&mut state.retire(at, stops, exit::EXITING).jobs);
                }
            }
            Refused::new(jobs, exit::EXITING)
        });
    }

    fn wait(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        let ended = |state: &State| {
            let over = |member: &Member| member.mode == Mode::Ended && member.open == 0;
            state.members.iter().all(over)
        };
        let (state, _) = self
            .wake
            .wait_timeout_while(self.lock(), left, |state| !ended(state))
            .unwrap_or_else(PoisonError::into_inner);
        ended(&state)
    }
}

/// An instance's place in the pool.
#[derive(Clone)]
pub struct Seat {
    pub pool: Arc<Pool>,
    at: usize,
}

impl Seat {
    /// The engine is there, with so many slots.
    pub fn begin(&self, slots: usize) {
        self.pool.change(|state| {
            let member = &mut state.members[self.at];
            (member.mode, member.room) = (Mode::Runs, slots);
            state.give();
            Refused::default()
        });
    }

    /// Requests that are this instance's from now on. Each has one of its slots.
    pub fn take(&self) -> Vec<Job> {
        std::mem::take(&mut self.pool.lock().members[self.at].inbox)
    }

    /// Whether `take` would give any.
    pub fn has(&self) -> bool {
        !self.pool.lock().members[self.at].inbox.is_empty()
    }

    /// A slot is free again.
    pub fn freed(&self) {
        self.pool.change(|state| {
            state.members[self.at].room += 1;
            state.give();
            Refused::default()
        });
    }

    /// All of so many slots are free, whatever became of the requests that had them.
    pub fn emptied(&self, slots: usize) {
        self.pool.change(|state| {
            let member = &mut state.members[self.at];
            member.room = slots.saturating_sub(member.inbox.len());
            state.give();
            Refused::default()
        });
    }

    /// Requests of the model that wait.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.pool.lock().queue.len()
    }

    /// Why the engine is to stop now. One that is `idle` waits until there is something to do.
    pub fn stopped(&self, idle: bool) -> Option<&'static str> {
        let mut state = self.pool.lock();
        loop {
            let member = &state.members[self.at];
            match member.mode {
                Mode::Stops(why) => return Some(why),
                Mode::Leaves if idle => return Some(UNLOADED),
                Mode::Ended => return Some(GONE),
                _ if idle && member.inbox.is_empty() => {}
                _ => return None,
            }
            state = self
                .pool
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The instance goes: others end what waits. The last one gives up what it runs.
    pub fn leave(&self) {
        self.pool.change(|state| {
            let mode = state.members[self.at].mode;
            if mode != Mode::Runs {
                return Refused::default();
            }
            let refused = state.retire(self.at, Mode::Leaves, UNLOADED);
            if !state.any_runs() {
                state.members[self.at].mode = Mode::Stops(UNLOADED);
            }
            refused
        });
    }

    /// The engine is no more.
    pub fn ended(&self, why: &'static str) {
        self.pool
            .change(|state| state.retire(self.at, Mode::Ended, why));
    }

    /// A request comes in through this instance, and is not answered until the guard goes.
    pub fn open(&self) -> Open {
        self.pool.lock().members[self.at].open += 1;
        Open(self.clone())
    }

    /// Waits until every request that came in through this instance is answered.
    pub fn answered(&self) {
        let mut state = self.pool.lock();
        while state.members[self.at].open > 0 {
            // A bound on the wait, should a notice be missed.
            let waited = self.pool.wake.wait_timeout(state, Duration::from_secs(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A request that is not answered yet.
pub struct Open(Seat);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.pool.lock().members[self.0.at].open -= 1;
        self.0.pool.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Finish};
    use super::*;
    use crate::engine::answer::Answer;
    use crate::sampling::Sampling;
    use std::sync::mpsc::{Receiver, channel};

    struct Bench {
        pool: Arc<Pool>,
        seats: Vec<Seat>,
        told: Receiver<(u64, String)>,
        out: std::sync::mpsc::Sender<(u64, String)>,
        waiting: Arc<Mutex<usize>>,
    }

    fn bench(most: u32, slots: &[usize]) -> Bench {
        let waiting = Arc::new(Mutex::new(0));
        let seen = waiting.clone();
        let pool = Pool::new(most, Box::new(move |n| *seen.lock().unwrap() = n));
        let (out, told) = channel();
        Bench {
            seats: slots
                .iter()
                .map(|&n| {
                    let seat = pool.join();
                    seat.begin(n);
                    seat
                })
                .collect(),
            pool,
            told,
            out,
            waiting,
        }
    }

    impl Bench {
        fn submit(&self, id: u64) -> Arc<AtomicBool> {
            self.submit_with(id, Sampling::default())
        }

        fn submit_with(&self, id: u64, sampling: Sampling) -> Arc<AtomicBool> {
            let cancelled = Arc::<AtomicBool>::default();
            let out = self.out.clone();
            self.pool.submit(Job {
                id,
                prompt: vec![1],
                bad: Vec::new(),
                sampling,
                arrived_ns: id,
                cancelled: cancelled.clone(),
                answer: Answer::new(Box::new(move |event| {
                    let text = match event {
                        Event::Failed(failure) => failure.text,
                        Event::Token {
                            end: Some((Finish::Cancelled, _)),
                            ..
                        } => "cancelled".into(),
                        _ => "?".into(),
                    };
                    let _ = out.send((id, text));
                })),
            });
            cancelled
        }

        /// Which requests an instance gets; they are cancelled, so that nothing else is said of them.
        fn take(&self, at: usize) -> Vec<u64> {
            let jobs = self.seats[at].take();
            jobs.into_iter()
                .map(|mut job| {
                    job.answer.cancel();
                    job.id
                })
                .collect()
        }

        fn told(&self) -> Vec<(u64, String)> {
            self.told
                .try_iter()
                .filter(|(_, text)| text != "cancelled")
                .collect()
        }
    }

    #[test]
    fn nobody_waits_while_an_instance_has_room() {
        let bench = bench(0, &[2, 2]);
        (1..=5).for_each(|id| {
            bench.submit(id);
        });
        assert_eq!((bench.take(0), bench.take(1)), (vec![1, 3], vec![2, 4]));
        assert_eq!(
            bench.told(),
            [(
                5,
                "0 requests wait, which is max_queue; try again later".into()
            )]
        );
        bench.seats[1].freed();
        bench.submit(6);
        assert_eq!((bench.take(0), bench.take(1)), (vec![], vec![6]));
    }

    #[test]
    fn the_instance_with_most_room_takes_next() {
        let bench = bench(8, &[1, 4]);
        (1..=5).for_each(|id| {
            bench.submit(id);
        });
        assert_eq!((bench.take(0), bench.take(1)), (vec![4], vec![1, 2, 3, 5]));
        (6..=8).for_each(|id| {
            bench.submit(id);
        });
        assert_eq!(*bench.waiting.lock().unwrap(), 3);
        bench.seats[0].freed();
        bench.seats[1].freed();
        assert_eq!((bench.take(0), bench.take(1)), (vec![6], vec![7]));
        assert_eq!(*bench.waiting.lock().unwrap(), 1);
    }

    #[test]
    fn what_an_instance_has_not_begun_goes_to_the_others_and_the_last_refuses() {
        let bench = bench(8, &[2, 2]);
        (1..=4).for_each(|id| {
            bench.submit(id);
        });
        bench.seats[0].leave();
        assert_eq!(bench.seats[0].stopped(true), Some(UNLOADED));
        // The requests that run end there.
        assert_eq!(bench.seats[0].stopped(false), None);
        assert_eq!(bench.take(1), [2, 4]);
        assert_eq!(bench.seats[1].waiting(), 2);
        bench.seats[1].freed();
        assert_eq!(bench.take(1), [1], "the oldest first");
        bench.seats[1].leave();
        assert_eq!(bench.seats[1].stopped(false), Some(UNLOADED));
        assert_eq!(bench.told(), [(3, UNLOADED.into())]);
        bench.submit(9);
        assert_eq!(bench.told(), [(9, UNLOADED.into())]);
    }

    #[test]
    fn one_engine_that_dies_leaves_the_other_serving() {
        let bench = bench(8, &[1, 1]);
        bench.submit(1);
        bench.seats[0].ended(GONE);
        assert_eq!(bench.take(1), [1]);
        bench.seats[1].ended(GONE);
        bench.submit(2);
        assert_eq!(bench.told(), [(2, GONE.into())]);
    }

    #[test]
    fn who_waits_may_be_cancelled_or_too_late() {
        let bench = bench(8, &[1]);
        bench.submit(1);
        let cancelled = bench.submit(2);
        let late = Sampling {
            timeout_us: 5,
            ..Sampling::default()
        };
        bench.submit_with(3, late);
        cancelled.store(true, Ordering::Relaxed);
        assert_eq!(bench.take(0), [1]);
        bench.pool.sweep();
        let told: Vec<_> = bench.told.try_iter().collect();
        assert_eq!(told[1], (2, "cancelled".into()), "{told:?}");
        let (id, text) = &told[2];
        assert!(*id == 3 && text.contains("timeout of 5 us"), "{text}");
        assert_eq!(*bench.waiting.lock().unwrap(), 0);
    }

    #[test]
    fn a_request_that_is_lost_is_told_so() {
        let bench = bench(8, &[1]);
        bench.submit(1);
        drop(bench.seats[0].take());
        assert_eq!(bench.told(), [(1, GONE.into())]);
    }
}
