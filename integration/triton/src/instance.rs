// SPDX-License-Identifier: Apache-2.0
//! One instance of a model: a thread that runs the engine, and one that sends.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::{Engine, Job};
use crate::llama::{Llama, Vocab};
use crate::metrics::{Metrics, Snapshot};
use crate::model::Model;
use crate::request::Asked;
use crate::sender::{self, Message};
use crate::triton::error::Failure;
use crate::triton::reply::Reply;

/// How often /metrics gets new values while requests run.
const METRICS_EVERY: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Queue {
    jobs: Vec<Job>,
    stop: bool,
    woken: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    fn change(&self, f: impl FnOnce(&mut Queue)) {
        f(&mut self.queue.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_one();
    }
}

pub struct Instance {
    shared: Arc<Shared>,
    sender: Option<Sender<Message>>,
    threads: Vec<JoinHandle<()>>,
    next_id: AtomicU64,
    vocab: Vocab,
    context: u32,
    decoupled: bool,
}

impl Instance {
    /// Loads the model and starts the threads.
    pub fn start(model: &Model, name: &str) -> Result<Self, Failure> {
        let settings = model.settings.clone();
        let llama = Llama::open(&model.file()?, &settings)?;
        let vocab = llama.vocab();
        let (sender, messages) = mpsc::channel();
        let events = sender.clone();
        let engine = Engine::new(
            llama,
            settings,
            Box::new(move |id, event| {
                // The sender outlives the engine.
                let _ = events.send(Message::Event(id, event));
            }),
        )?;
        let metrics = Metrics::new(&model.name, model.version, name, &engine.ramps);
        let shared = Arc::new(Shared::default());
        let (for_engine, for_sender) = (shared.clone(), shared.clone());
        let spawn = |name: &str, f: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(f)
                .map_err(|error| Failure::internal(format!("cannot start a thread: {error}")))
        };
        let mut this = Self {
            shared,
            sender: Some(sender),
            threads: Vec::new(),
            next_id: AtomicU64::new(1),
            vocab,
            context: engine.context(),
            decoupled: model.decoupled,
        };
        this.threads.push(spawn(
            "drex-engine",
            Box::new(move || run(engine, metrics, &for_engine)),
        )?);
        this.threads.push(spawn(
            "drex-sender",
            Box::new(move || sender::run(&messages, || for_sender.change(|q| q.woken = true))),
        )?);
        Ok(this)
    }

    /// From here on the request is answered, whatever happens.
    pub fn submit(&self, reply: Reply, asked: Asked) {
        if asked.stream && !self.decoupled {
            return reply.fail(Failure::invalid(
                "stream is true, must be false: the model has one response for a request (decoupled: false)",
            ));
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let cancelled = Arc::new(AtomicBool::new(false));
        let Some(sender) = &self.sender else {
            return reply.fail(Failure::internal("the model is being unloaded"));
        };
        // Here and not on the engine's thread, which others wait for.
        let job = match Job::new(
            &self.vocab,
            self.context,
            id,
            &asked.prompt,
            asked.sampling,
            cancelled.clone(),
        ) {
            Ok(job) => job,
            Err(failure) => return reply.fail(failure),
        };
        // If the sender is gone, the message that comes back ends the request as it is dropped.
        let _ = sender.send(Message::Add {
            id,
            reply: Box::new(reply),
            stream: asked.stream,
            want: asked.want,
            cancelled,
        });
        self.shared.change(|queue| queue.jobs.push(job));
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.shared.change(|queue| queue.stop = true);
        self.sender = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has dropped its replies, which ended their requests.
            let _ = thread.join();
        }
    }
}

fn run(mut engine: Engine, mut metrics: Metrics, shared: &Shared) {
    let mut published = Instant::now();
    let mut publish = |engine: &Engine| {
        let (waiting, running) = engine.load();
        metrics.update(&Snapshot {
            stats: engine.stats(),
            window_ns: engine.window_ns,
            waiting,
            running,
        });
    };
    publish(&engine);
    loop {
        {
            let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            while engine.is_idle() && queue.jobs.is_empty() && !queue.stop {
                queue = shared
                    .wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            queue.woken = false;
            for job in queue.jobs.drain(..) {
                engine.push(job);
            }
            if queue.stop {
                break;
            }
        }
        let failure = match catch_unwind(AssertUnwindSafe(|| engine.step())) {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(failure),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text
                    .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                    .unwrap_or_default();
                Some(Failure::internal(format!("a step panicked: {text}")))
            }
        };
        if let Some(failure) = failure {
            engine.fail_all(&failure);
        }
        if engine.is_idle() || published.elapsed() >= METRICS_EVERY {
            published = Instant::now();
            publish(&engine);
        }
    }
    engine.fail_all(&Failure {
        code: crate::triton::abi::ERROR_UNAVAILABLE,
        text: "the model is being unloaded".into(),
    });
    publish(&engine);
}
