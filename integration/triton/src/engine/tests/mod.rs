// SPDX-License-Identifier: Apache-2.0
//! The engine with a model that can fail.

mod exits;
mod faults;
mod fills;
mod limits;
mod prompts;

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use drex::ffi::*;

use super::fake::{self, Call, Fake, Fault};
use super::pool::Pool;
use super::queue::Job;
use super::*;

type Events = Arc<Mutex<Vec<(u64, Event)>>>;

struct Bench {
    engine: Engine<Fake>,
    events: Events,
    next: u64,
    flags: HashMap<u64, Arc<AtomicBool>>,
}

/// What became of a request.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<i32>,
    ends: Vec<Result<Finish, Failure>>,
    figures: Figures,
}

fn settings(policy: &str, fill: &str) -> Settings {
    Settings {
        policy: policy.into(),
        fill: crate::sampling::fill(fill).unwrap(),
        slots: 4,
        context: 64,
        batch: 32,
        max_pending: 4,
        ..Settings::default()
    }
}

fn prompt(id: u64) -> Vec<i32> {
    (0..3 + id as i32 % 5)
        .map(|i| 1 + (7 * i + 11 * id as i32) % 60)
        .collect()
}

/// What the full model says, alone.
fn full(id: u64, n: usize, seed: Option<u32>) -> Vec<i32> {
    let mut tokens = prompt(id);
    let begin = tokens.len();
    for _ in 0..n {
        let best = fake::deep(&tokens);
        tokens.push(seed.map_or(best, |seed| fake::sampled(best, seed, tokens.len())));
    }
    tokens.split_off(begin)
}

/// An engine that has a queue of its own.
fn new(fake: Fake, settings: Settings) -> Result<Engine<Fake>, Failure> {
    let pool = Pool::new(settings.max_queue, Box::new(|_| ()));
    Engine::new(fake, settings, pool.join())
}

/// Requests that wait, and requests that run.
fn load(engine: &Engine<Fake>) -> (usize, usize) {
    (engine.seat.waiting(), engine.running())
}

impl Bench {
    fn new(settings: Settings) -> Self {
        Self::of(Fake::new(settings.slots, settings.context), settings)
    }

    fn of(fake: Fake, settings: Settings) -> Self {
        let events: Events = Arc::default();
        let engine = new(fake, settings).unwrap();
        engine.begin();
        Self {
            engine,
            events,
            next: 1,
            flags: HashMap::new(),
        }
    }

    fn push(&mut self, sampling: Sampling) -> u64 {
        self.push_job(sampling, now_ns(), Vec::new())
    }

    fn push_job(&mut self, sampling: Sampling, arrived_ns: u64, bad: Vec<Vec<i32>>) -> u64 {
        let id = self.next;
        self.next += 1;
        let cancelled = Arc::<AtomicBool>::default();
        self.flags.insert(id, cancelled.clone());
        let sent = self.events.clone();
        let out = Box::new(move |event| sent.lock().unwrap().push((id, event)));
        self.engine.seat.pool.submit(Job {
            id,
            prompt: prompt(id),
            bad,
            sampling,
            arrived_ns,
            cancelled,
            answer: answer::Answer::new(out),
        });
        id
    }

    fn cancel(&self, id: u64) {
        self.flags[&id].store(true, Ordering::Relaxed);
    }

    /// Steps until it is so, and says whether it ever was.
    fn until(&mut self, is: impl Fn(&Engine<Fake>) -> bool) -> bool {
        for _ in 0..5000 {
            if is(&self.engine) {
                return true;
            }
            if self.engine.is_idle() {
                return false;
            }
            self.engine.step().unwrap();
        }
        panic!("it does not end");
    }

    fn run(&mut self) -> HashMap<u64, Answer> {
        self.until(|_| false);
        self.all_free();
        self.answers()
    }

    fn answers(&self) -> HashMap<u64, Answer> {
        let mut answers: HashMap<u64, Answer> = HashMap::new();
        for (id, event) in self.events.lock().unwrap().iter() {
            let answer = answers.entry(*id).or_default();
            assert!(answer.ends.is_empty(), "request {id} goes on after its end");
            match event {
                Event::Started { prompt_tokens } => {
                    assert_eq!(*prompt_tokens as usize, prompt(*id).len());
                }
                Event::Token { token, end, .. } => {
                    answer.tokens.extend(token);
                    if let Some((end, figures)) = end {
                        answer.ends.push(Ok(*end));
                        answer.figures = figures.clone();
                    }
                }
                Event::Failed(failure) => answer.ends.push(Err(failure.clone())),
            }
        }
        answers
    }

    /// Nothing is left of any request.
    fn all_free(&self) {
        let stats = self.engine.stats();
        let slots = self.engine.settings.slots;
        let arena = slots * (1 + self.engine.settings.max_pending);
        assert_eq!(stats.slots_free, u64::from(arena));
        assert_eq!(
            (stats.requests, stats.held_rows, stats.pending_rows),
            (0, 0, 0)
        );
        assert_eq!(self.engine.free.len(), slots as usize);
        assert!(self.engine.leavers.is_empty());
        assert_eq!(load(&self.engine), (0, 0));
    }

    fn slot_of(&self, id: u64) -> usize {
        let mut slots = self.engine.slots.iter();
        let is = |slot: &Option<Slot<_>>| slot.as_ref().is_some_and(|slot| slot.id == id);
        slots.position(is).unwrap()
    }
}

fn greedy(max_tokens: u32) -> Sampling {
    Sampling {
        temperature: 0.0,
        max_tokens,
        ..Sampling::default()
    }
}

fn held(engine: &Engine<Fake>) -> Option<u64> {
    engine
        .slots
        .iter()
        .flatten()
        .map(|slot| slot.id)
        .find(|&id| {
            let mut info: drex_request_info = zeroed();
            info.size = size_of::<drex_request_info>() as u32;
            // SAFETY: a struct with its size.
            let status = unsafe { drex_request_get(engine.drex, id, &mut info) };
            status == DREX_OK && info.state == DREX_REQUEST_HELD
        })
}
