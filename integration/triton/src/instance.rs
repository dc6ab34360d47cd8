// SPDX-License-Identifier: Apache-2.0
//! One instance of a model: a thread that runs the engine, and one that sends.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::clock::now_ns;
use crate::engine::{Engine, Job};
use crate::exit::{self, Stop};
use crate::families::Snapshot;
use crate::llama::{Llama, Vocab};
use crate::metrics::Metrics;
use crate::model::Model;
use crate::request::Asked;
use crate::sender::{self, Message};
use crate::triton::error::Failure;
use crate::triton::reply::Reply;
use crate::triton::statistics::Executions;
use crate::triton::{abi, log};

const UNLOADED: &str = "the model is being unloaded";
/// How often the counters at /metrics get new values while requests run.
const METRICS_EVERY: Duration = Duration::from_millis(250);

struct Queue<J> {
    jobs: Vec<J>,
    /// Why the engine is to stop.
    stop: Option<&'static str>,
    /// It has stopped, and every request is answered.
    ended: bool,
}

struct Shared<J> {
    queue: Mutex<Queue<J>>,
    wake: Condvar,
    /// The process ends: nothing more is sent but refusals.
    exiting: AtomicBool,
}

/// What the engine's thread runs; in tests it is not an engine.
trait Work {
    type Job;
    fn push(&mut self, job: Self::Job);
    fn is_idle(&self) -> bool;
    fn step(&mut self) -> Result<(), Failure>;
    fn fail_all(&mut self, failure: &Failure);
    fn snapshot(&self) -> Snapshot;
}

impl Work for Engine {
    type Job = Job;

    fn push(&mut self, job: Job) {
        self.push(job);
    }

    fn is_idle(&self) -> bool {
        self.is_idle()
    }

    fn step(&mut self) -> Result<(), Failure> {
        self.step()
    }

    fn fail_all(&mut self, failure: &Failure) {
        self.fail_all(failure);
    }

    fn snapshot(&self) -> Snapshot {
        let (waiting, running) = self.load();
        Snapshot {
            stats: self.stats(),
            window_ns: self.window_ns,
            waiting,
            running,
            graphs: self.graphs(),
        }
    }
}

impl<J> Shared<J> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(Queue {
                jobs: Vec::new(),
                stop: None,
                ended: false,
            }),
            wake: Condvar::new(),
            exiting: AtomicBool::new(false),
        })
    }

    fn change(&self, f: impl FnOnce(&mut Queue<J>)) {
        f(&mut self.queue.lock().unwrap_or_else(PoisonError::into_inner));
        // The engine's thread, and at the server's end the one that waits for it.
        self.wake.notify_all();
    }

    fn stop_because(&self, why: &'static str) {
        self.change(|queue| {
            queue.stop.get_or_insert(why);
        });
    }
}

impl<J: Send> Stop for Shared<J> {
    fn stop(&self) {
        self.exiting.store(true, Ordering::Relaxed);
        self.stop_because(exit::EXITING);
    }

    fn wait(&self, until: Instant) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let left = until.saturating_duration_since(Instant::now());
        let (queue, _) = self
            .wake
            .wait_timeout_while(queue, left, |queue| !queue.ended)
            .unwrap_or_else(PoisonError::into_inner);
        queue.ended
    }
}

/// Dropped when every request is answered.
struct Ended<J>(Arc<Shared<J>>);

impl<J> Drop for Ended<J> {
    fn drop(&mut self) {
        self.0.change(|queue| queue.ended = true);
    }
}

/// Where requests come in: the engine gets the job, the sender all the rest.
struct Inbox<J> {
    shared: Arc<Shared<J>>,
    sender: Sender<Message>,
}

impl<J> Inbox<J> {
    /// `message` adds the job's request to the sender.
    fn put(&self, message: Message, job: J) {
        if let Err(mpsc::SendError(message)) = self.sender.send(message) {
            if let Message::Add { reply, .. } = message {
                reply.fail(Failure::unavailable(
                    "the model's thread that sends has ended by a panic; load the model again",
                ));
            }
            return;
        }
        self.shared.change(|queue| {
            // After that nobody takes jobs, and the sender refuses the request.
            if queue.stop.is_none() {
                queue.jobs.push(job);
            }
        });
    }
}

pub struct Instance {
    /// None: the model is being unloaded.
    inbox: Option<Inbox<Job>>,
    threads: Vec<JoinHandle<()>>,
    next_id: AtomicU64,
    vocab: Vocab,
    context: u32,
    decoupled: bool,
}

impl Instance {
    /// Loads the model and starts the threads.
    ///
    /// # Safety
    /// Triton's instance outlives this.
    pub unsafe fn start(
        model: &Model,
        instance: *mut abi::Instance,
        name: &str,
        gpu: Option<i32>,
    ) -> Result<Self, Failure> {
        let mut settings = model.settings.clone();
        if let Some(device) = gpu {
            settings.on_gpu(device);
        }
        let file = model.file()?;
        let llama = Llama::open(&file, &settings).map_err(|failure| match gpu {
            Some(device) => Failure {
                text: format!(
                    "instance_group: {name} is KIND_GPU, on GPU {device}: {}",
                    failure.text
                ),
                ..failure
            },
            None => failure,
        })?;
        let vocab = llama.vocab();
        let loaded = format!(
            "{name} has loaded {}, {} layers; policy {}, {} slots of {} tokens, {} threads, {}",
            file.display(),
            llama.n_layer,
            settings.policy,
            settings.slots,
            llama.n_context,
            settings.threads,
            if settings.gpu_layers > 0 {
                format!("on GPU {}", settings.main_gpu)
            } else {
                "on the CPU".into()
            }
        );
        let (sender, messages) = mpsc::channel();
        let (events, last) = (sender.clone(), sender.clone());
        let engine = Engine::new(
            llama,
            settings,
            Box::new(move |id, event| {
                // A sender that is gone has answered all requests and cancelled them.
                let at = now_ns();
                let _ = events.send(Message::Event { id, event, at });
            }),
        )?;
        exit::register();
        let ramps = engine.ramps.clone();
        let mut metrics = Metrics::new(&model.name, model.version, name, &ramps);
        // SAFETY: by the caller; the thread is joined before this is gone.
        let executions = unsafe { Executions::of(instance) };
        let shared = Shared::new();
        exit::add(Arc::downgrade(&shared) as Weak<dyn Stop>);
        let (for_engine, for_sender) = (shared.clone(), shared.clone());
        let spawn = |name: &str, f: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(f)
                .map_err(|error| Failure::internal(format!("cannot start a thread: {error}")))
        };
        let mut this = Self {
            inbox: Some(Inbox { shared, sender }),
            threads: Vec::new(),
            next_id: AtomicU64::new(1),
            vocab,
            context: engine.context(),
            decoupled: model.decoupled,
        };
        this.threads.push(spawn(
            "drex-engine",
            Box::new(move || {
                let publish = move |now: &Snapshot, all| match all {
                    true => metrics.update(now),
                    false => metrics.update_gauges(now),
                };
                engine_thread(engine, publish, &executions, &for_engine, &last);
            }),
        )?);
        this.threads.push(spawn(
            "drex-sender",
            Box::new(move || {
                let wake = || for_sender.change(|_| ());
                let exiting = || for_sender.exiting.load(Ordering::Relaxed);
                let run = || sender::run(&messages, wake, exiting);
                if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                    log::error(&format!(
                        "the thread that sends has ended by a panic: {}",
                        log::panic_text(&*panic)
                    ));
                }
            }),
        )?);
        log::info(&format!("{loaded}; exit layers {ramps:?}"));
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
        let Some(inbox) = &self.inbox else {
            return reply.fail(Failure::unavailable(UNLOADED));
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
        let message = Message::Add {
            id,
            reply: Box::new(reply),
            stream: asked.stream,
            want: asked.want,
            cancelled,
        };
        inbox.put(message, job);
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(inbox) = self.inbox.take() {
            inbox.shared.stop_because(UNLOADED);
        }
        for thread in self.threads.drain(..) {
            // Neither ends with a panic.
            let _ = thread.join();
        }
    }
}

/// Runs the engine until the instance stops or the engine panics where it must not. Then the sender is told: whatever
/// happened, nobody waits for an answer that cannot come.
fn engine_thread<W: Work>(
    engine: W,
    publish: impl FnMut(&Snapshot, bool),
    executions: &Executions,
    shared: &Arc<Shared<W::Job>>,
    sender: &Sender<Message>,
) where
    W::Job: Send + 'static,
{
    let run = || run(engine, publish, executions, shared);
    let failure = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(why) => Failure::unavailable(why),
        Err(panic) => {
            let text = log::panic_text(&*panic);
            log::error(&format!("the engine has ended by a panic: {text}"));
            Failure::unavailable("the model's engine has ended by a panic; load the model again")
        }
    };
    shared.change(|queue| {
        queue.stop.get_or_insert(UNLOADED);
        queue.jobs.clear();
    });
    let _ = sender.send(Message::EngineGone(
        failure,
        Box::new(Ended(shared.clone())),
    ));
}

/// `publish` is told whether counters are due too. Returns why it was to stop.
fn run<W: Work>(
    mut engine: W,
    mut publish: impl FnMut(&Snapshot, bool),
    executions: &Executions,
    shared: &Shared<W::Job>,
) -> &'static str {
    let (mut published, mut has_run) = (Instant::now(), false);
    let mut before = engine.snapshot();
    publish(&before, true);
    let why = loop {
        {
            let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            while engine.is_idle() && queue.jobs.is_empty() && queue.stop.is_none() {
                queue = shared
                    .wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            for job in queue.jobs.drain(..) {
                engine.push(job);
            }
            if let Some(why) = queue.stop {
                break why;
            }
        }
        let failure = match catch_unwind(AssertUnwindSafe(|| engine.step())) {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => {
                log::error(&format!("a step failed: {}", failure.text));
                Some(failure)
            }
            Err(panic) => {
                let text = format!("a step panicked: {}", log::panic_text(&*panic));
                log::error(&text);
                Some(Failure::internal(text))
            }
        };
        if let Some(failure) = failure {
            engine.fail_all(&failure);
        }
        let now = engine.snapshot();
        if now.stats.steps > before.stats.steps {
            if !std::mem::replace(&mut has_run, true) {
                exit::register();
            }
            let rows = now.stats.step_rows - before.stats.step_rows;
            let end = now_ns();
            // A window of prompt rows alone is none.
            if rows > 0 {
                executions.add(rows, end - (now.window_ns - before.window_ns), end);
            }
        }
        let all = engine.is_idle() || published.elapsed() >= METRICS_EVERY;
        if all {
            published = Instant::now();
        }
        publish(&now, all);
        before = now;
    };
    engine.fail_all(&Failure::unavailable(why));
    publish(&engine.snapshot(), true);
    why
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Event, Out};
    use crate::request::Want;
    use crate::triton::fake_host as host;

    /// Answers each job in its second step, "forever" never; "push" and "step" in a prompt are where it panics.
    struct Fake {
        jobs: Vec<(u64, String)>,
        steps: u64,
        out: Out,
    }

    impl Work for Fake {
        type Job = (u64, String);
        fn push(&mut self, job: (u64, String)) {
            assert!(!job.1.contains("push"), "injected");
            self.jobs.push(job);
        }
        fn is_idle(&self) -> bool {
            self.jobs.is_empty()
        }
        fn step(&mut self) -> Result<(), Failure> {
            assert!(
                !self.jobs.iter().any(|job| job.1.contains("step")),
                "injected"
            );
            self.steps += 1;
            if self.steps.is_multiple_of(2) {
                let done = |job: &mut (u64, String)| !job.1.contains("forever");
                for (id, prompt) in self.jobs.extract_if(.., done) {
                    (self.out)(id, Event::Failed(Failure::invalid(prompt)));
                }
            }
            Ok(())
        }
        fn fail_all(&mut self, failure: &Failure) {
            for (id, _) in self.jobs.drain(..) {
                (self.out)(id, Event::Failed(failure.clone()));
            }
        }
        fn snapshot(&self) -> Snapshot {
            // SAFETY: plain numbers.
            let mut stats: drex::ffi::types::drex_stats = unsafe { std::mem::zeroed() };
            (stats.steps, stats.step_rows) = (self.steps, self.steps * 3);
            Snapshot {
                stats,
                window_ns: self.steps * 10,
                waiting: 0,
                running: self.jobs.len(),
                graphs: (0, 0),
            }
        }
    }

    fn submit(inbox: &Inbox<(u64, String)>, id: u64, prompt: &str) {
        let message = Message::Add {
            id,
            reply: Box::new(host::reply()),
            stream: true,
            want: Want::default(),
            cancelled: Arc::new(AtomicBool::new(false)),
        };
        inbox.put(message, (id, prompt.to_owned()));
    }

    /// What the clients of these prompts are told, all of which are there before the engine starts, and `late` after.
    fn serve(prompts: &[&str], late: &str, publish: impl FnMut(&Snapshot, bool)) -> Vec<String> {
        let (sender, messages) = mpsc::channel();
        let shared = Shared::new();
        let inbox = Inbox {
            shared: shared.clone(),
            sender: sender.clone(),
        };
        for (id, prompt) in prompts.iter().enumerate() {
            submit(&inbox, id as u64, prompt);
        }
        let stop = shared.clone();
        let events = sender.clone();
        let engine = Fake {
            jobs: Vec::new(),
            steps: 0,
            out: Box::new(move |id, event| {
                let _ = events.send(Message::Event { id, event, at: 1 });
                stop.stop_because(UNLOADED);
            }),
        };
        // SAFETY: the fake host does not look at it.
        let executions = unsafe { Executions::of(std::ptr::null_mut()) };
        engine_thread(engine, publish, &executions, &shared, &sender);
        submit(&inbox, 100, late);
        drop((sender, inbox));
        sender::run(&messages, || (), || false);
        host::take_responses();
        assert_eq!(host::live(), 0);
        let log = host::take_log();
        let sent = log.iter().filter_map(|line| line.strip_prefix("send 1 "));
        sent.map(str::to_owned).collect()
    }

    #[test]
    fn at_exit_who_runs_is_told_and_waited_for() {
        let (sender, messages) = mpsc::channel();
        let shared = Shared::new();
        let inbox = Inbox {
            shared: shared.clone(),
            sender: sender.clone(),
        };
        (0..2).for_each(|id| submit(&inbox, id, "forever"));
        let engine = Fake {
            jobs: Vec::new(),
            steps: 0,
            out: {
                let events = sender.clone();
                Box::new(move |id, event| {
                    let _ = events.send(Message::Event { id, event, at: 1 });
                })
            },
        };
        // SAFETY: the fake host does not look at it.
        let executions = unsafe { Executions::of(std::ptr::null_mut()) };
        let at_exit = {
            let shared = shared.clone();
            std::thread::spawn(move || {
                let in_vain = shared.wait(Instant::now() + Duration::from_millis(20));
                shared.stop();
                let stopped = shared.wait(Instant::now() + Duration::from_secs(60));
                (in_vain, stopped)
            })
        };
        engine_thread(engine, |_, _| (), &executions, &shared, &sender);
        drop((sender, inbox));
        sender::run(&messages, || (), || false);
        assert_eq!(at_exit.join().unwrap(), (false, true));
        let log = host::take_log();
        let sent: Vec<_> = log.iter().filter(|line| line.starts_with("send")).collect();
        assert_eq!(
            sent, ["send 1 error the server is exiting"; 2],
            "one final response each"
        );
        host::take_responses();
        assert_eq!(host::live(), 0);
    }

    const GONE: &str = "error the model's engine has ended by a panic; load the model again";

    #[test]
    fn each_window_is_an_execution_of_its_rows() {
        let told = serve(&["a", "b"], "c", |_, _| ());
        let unloaded = "error the model is being unloaded";
        assert_eq!(told, ["error a", "error b", unloaded]);
        assert_eq!(host::take_executions(), [3, 3]);
        assert!(host::take_messages().is_empty());
    }

    #[test]
    fn a_step_that_panics_fails_those_who_run() {
        let told = serve(&["a", "step"], "b", |_, _| ());
        let unloaded = "error the model is being unloaded";
        let failed = "error a step panicked: injected";
        assert_eq!(told, [failed, failed, unloaded]);
        assert_eq!(host::take_messages(), ["2 drex: a step panicked: injected"]);
    }

    #[test]
    fn a_panic_outside_of_a_step_leaves_no_request_unanswered() {
        assert_eq!(serve(&["a", "push", "b"], "c", |_, _| ()), [GONE; 4]);
        let mut published = 0;
        let told = serve(&["a", "b"], "c", |_, all| {
            published += u32::from(all);
            assert_eq!(published, 1, "injected too");
        });
        // Those who ended before the panic have their own answers.
        assert_eq!(told, ["error a", "error b", GONE]);
        let messages = host::take_messages();
        assert_eq!(messages.len(), 2);
        assert!(
            messages[0].starts_with("2 drex: the engine has ended by a panic: injected"),
            "{messages:?}"
        );
    }
}
