// SPDX-License-Identifier: Apache-2.0
//! One instance of a model: a thread that runs the engine, and one that sends.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::clock::now_ns;
use crate::engine::Engine;
use crate::engine::answer::{Answer, GONE};
use crate::engine::pool::{Seat, UNLOADED};
use crate::engine::queue::Job;
use crate::exit;
use crate::families::Snapshot;
use crate::intake::Read;
use crate::llama::{self, Llama, Vocab};
use crate::metrics::Metrics;
use crate::model::Model;
use crate::request::Asked;
use crate::sender::{self, Added, Message};
use crate::triton::error::Failure;
use crate::triton::reply::Reply;
use crate::triton::statistics::Executions;
use crate::triton::{abi, log};

/// How often the counters at /metrics get new values while requests run.
const METRICS_EVERY: Duration = Duration::from_millis(250);

/// What the engine's thread runs; in tests it is not an engine.
trait Work {
    fn is_idle(&self) -> bool;
    fn step(&mut self) -> Result<(), Failure>;
    fn fail_all(&mut self, failure: &Failure);
    fn snapshot(&self) -> Snapshot;
}

impl Work for Engine<Llama> {
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
        Snapshot {
            stats: self.stats(),
            window_ns: self.window_ns,
            tokens: self.tokens,
            running: self.running(),
            graphs: self.graphs(),
        }
    }
}

/// Where requests come in: the pool gets the job, the sender all the rest.
struct Inbox {
    seat: Seat,
    sender: Sender<Message>,
}

impl Inbox {
    /// Err: the sender is gone.
    fn put(&self, added: Added, job: impl FnOnce(Answer) -> Job) -> Result<(), Reply> {
        let id = added.id;
        let sent = self.sender.send(Message::Add(Box::new(added)));
        if let Err(mpsc::SendError(Message::Add(added))) = sent {
            return Err(added.reply);
        }
        let sender = self.sender.clone();
        self.seat
            .pool
            .submit(job(Answer::new(Box::new(move |event| {
                // A sender that is gone has answered all requests and cancelled them.
                let at = now_ns();
                let _ = sender.send(Message::Event { id, event, at });
            }))));
        Ok(())
    }
}

pub struct Instance {
    /// None: the model is being unloaded.
    inbox: Option<Inbox>,
    engine: Option<JoinHandle<()>>,
    sender: Option<JoinHandle<()>>,
    model: Arc<Model>,
    vocab: Vocab,
    context: u32,
}

impl Instance {
    /// Loads the model and starts the threads.
    ///
    /// # Safety
    /// Triton's instance outlives this.
    pub unsafe fn start(
        model: &Arc<Model>,
        instance: *mut abi::Instance,
        name: &str,
        gpu: Option<i32>,
    ) -> Result<Self, Failure> {
        let mut settings = model.settings.clone();
        settings.share_threads(
            model.instances,
            model.started.fetch_add(1, Ordering::Relaxed),
        );
        let asked = match gpu {
            Some(device) => {
                settings.on_gpu(device);
                format!("instance_group: {name} is KIND_GPU, on GPU {device}, which cannot be")
            }
            None => format!(
                "parameters: gpu_layers is {}, must be 0",
                settings.gpu_layers_said()
            ),
        };
        if settings.gpu_layers > 0 && !llama::has_gpu()? {
            return Err(Failure::invalid(format!(
                "{asked}: this llama.cpp was built without a GPU backend, or finds no GPU"
            )));
        }
        let file = model.file()?;
        let exits = model.exits()?;
        let llama =
            Llama::open(&file, exits.as_deref(), &settings).map_err(|failure| match gpu {
                Some(_) => Failure {
                    text: format!("{asked}: {}", failure.text),
                    ..failure
                },
                None => failure,
            })?;
        let vocab = llama.vocab();
        let through = exits.map_or_else(String::new, |file| format!(" of {}", file.display()));
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
        let seat = model.pool.join();
        let engine = Engine::new(llama, settings, seat.clone())?;
        exit::register();
        let ramps = engine.ramps.clone();
        let mut metrics = Metrics::new(&model.name, model.version, name, &ramps);
        // SAFETY: by the caller; the thread is joined before this is gone.
        let executions = unsafe { Executions::of(instance) };
        let mut this = Self {
            inbox: Some(Inbox {
                seat: seat.clone(),
                sender,
            }),
            engine: None,
            sender: None,
            model: model.clone(),
            vocab,
            context: engine.context(),
        };
        let spawn = |name: &str, f: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(f)
                .map_err(|error| Failure::internal(format!("cannot start a thread: {error}")))
        };
        let (pool, load) = (model.pool.clone(), model.load.clone());
        this.sender = Some(spawn(
            "drex-sender",
            Box::new(move || {
                let run = || sender::run(&messages, &load, || pool.notify(), || pool.is_exiting());
                if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                    log::error(&format!(
                        "the thread that sends has ended by a panic: {}",
                        log::panic_text(&*panic)
                    ));
                }
            }),
        )?);
        engine.begin();
        this.engine = Some(spawn(
            "drex-engine",
            Box::new(move || {
                let publish = move |now: &Snapshot, all| match all {
                    true => metrics.update(now),
                    false => metrics.update_gauges(now),
                };
                engine_thread(engine, publish, &executions, &seat);
            }),
        )?);
        log::info(&format!("{loaded}; exit layers {ramps:?}{through}"));
        Ok(this)
    }

    /// From here on the request is answered, whatever happens.
    pub fn submit(&self, mut reply: Reply, asked: Asked) {
        reply.set_leading(self.model.leading);
        let Some(inbox) = &self.inbox else {
            return self.refuse(reply, Failure::unavailable(UNLOADED));
        };
        if asked.stream && !self.model.decoupled {
            return self.refuse(
                reply,
                Failure::invalid(
                    "stream is true, must be false: the model has one response for a request (decoupled: false)",
                ),
            );
        }
        // Here and not on the engine's thread, which others wait for.
        let read = match Read::new(&self.vocab, self.context, &asked.prompt, asked.sampling) {
            Ok(read) => read,
            Err(failure) => return self.refuse(reply, failure),
        };
        let id = self.model.next_id.fetch_add(1, Ordering::Relaxed);
        let cancelled = Arc::new(AtomicBool::new(false));
        let added = Added {
            id,
            reply,
            stream: asked.stream,
            want: asked.want,
            cancelled: cancelled.clone(),
            arrived: read.arrived_ns,
            open: Some(inbox.seat.open()),
        };
        if let Err(reply) = inbox.put(added, |answer| read.job(id, cancelled, answer)) {
            let why = "the model's thread that sends has ended by a panic; load the model again";
            self.refuse(reply, Failure::unavailable(why));
        }
    }

    /// Answers a request that does not run.
    pub fn refuse(&self, reply: Reply, failure: Failure) {
        self.model.load.ended_by(&failure);
        reply.fail(failure);
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let join = |thread: Option<JoinHandle<()>>| {
            // Neither thread ends with a panic.
            let _ = thread.map(JoinHandle::join);
        };
        if let Some(inbox) = &self.inbox {
            inbox.seat.leave();
        }
        join(self.engine.take());
        if let Some(inbox) = self.inbox.take() {
            // Others may run what came in here, and the replies name this instance.
            inbox.seat.answered();
        }
        join(self.sender.take());
    }
}

/// Runs the engine until the instance stops or the engine panics where it must not. What it had is answered by then, and
/// what comes later is for others, or refused.
fn engine_thread<W: Work>(
    engine: W,
    publish: impl FnMut(&Snapshot, bool),
    executions: &Executions,
    seat: &Seat,
) {
    let run = || run(engine, publish, executions, seat);
    let why = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(why) => why,
        Err(panic) => {
            let text = log::panic_text(&*panic);
            log::error(&format!("the engine has ended by a panic: {text}"));
            GONE
        }
    };
    seat.ended(why);
}

/// `publish` is told whether counters are due too. Returns why it was to stop.
fn run<W: Work>(
    mut engine: W,
    mut publish: impl FnMut(&Snapshot, bool),
    executions: &Executions,
    seat: &Seat,
) -> &'static str {
    let (mut published, mut has_run) = (Instant::now(), false);
    let mut before = engine.snapshot();
    publish(&before, true);
    let why = loop {
        if let Some(why) = seat.stopped(engine.is_idle()) {
            break why;
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
    use crate::engine::pool::Pool;
    use crate::exit::Stop;
    use crate::load::Load;
    use crate::request::Want;
    use crate::sampling::Sampling;
    use crate::triton::fake_host as host;

    /// Ends each job in its second step with what its stop text says, "forever" never; "step" is where it panics.
    struct Fake {
        seat: Seat,
        jobs: Vec<Job>,
        steps: u64,
        /// Ends, after which the model is unloaded.
        ends: usize,
    }

    fn word(job: &Job) -> &str {
        &job.sampling.stop[0]
    }

    impl Work for Fake {
        fn is_idle(&self) -> bool {
            self.jobs.is_empty() && !self.seat.has()
        }
        fn step(&mut self) -> Result<(), Failure> {
            self.jobs.extend(self.seat.take());
            assert!(!self.jobs.iter().any(|job| word(job) == "step"), "injected");
            self.steps += 1;
            if self.steps.is_multiple_of(2) {
                let done = |job: &mut Job| word(job) != "forever";
                for mut job in self.jobs.extract_if(.., done) {
                    let text = word(&job).to_owned();
                    job.answer.fail(Failure::invalid(text));
                    self.ends -= 1;
                }
            }
            if self.ends == 0 {
                self.seat.leave();
            }
            Ok(())
        }
        fn fail_all(&mut self, failure: &Failure) {
            for mut job in self.jobs.drain(..) {
                job.answer.fail(failure.clone());
            }
            self.seat.leave();
        }
        fn snapshot(&self) -> Snapshot {
            // SAFETY: plain numbers.
            let mut stats: drex::ffi::drex_stats = unsafe { std::mem::zeroed() };
            (stats.steps, stats.step_rows) = (self.steps, self.steps * 3);
            Snapshot {
                stats,
                window_ns: self.steps * 10,
                tokens: 0,
                running: self.jobs.len(),
                graphs: Default::default(),
            }
        }
    }

    struct Bench {
        inbox: Inbox,
        messages: mpsc::Receiver<Message>,
        engine: Fake,
    }

    fn bench(ends: usize) -> Bench {
        let (sender, messages) = mpsc::channel();
        let seat = Pool::new(16, Box::new(|_| ())).join();
        seat.begin(8);
        Bench {
            engine: Fake {
                seat: seat.clone(),
                jobs: Vec::new(),
                steps: 0,
                ends,
            },
            inbox: Inbox { seat, sender },
            messages,
        }
    }

    impl Bench {
        fn submit(&self, id: u64, text: &str) {
            let cancelled = Arc::new(AtomicBool::new(false));
            let added = Added {
                id,
                reply: host::reply(),
                stream: true,
                want: Want::default(),
                cancelled: cancelled.clone(),
                arrived: 1,
                open: Some(self.inbox.seat.open()),
            };
            let sampling = Sampling {
                stop: vec![text.to_owned()],
                ..Sampling::default()
            };
            let put = self.inbox.put(added, |answer| Job {
                id,
                prompt: vec![1],
                bad: Vec::new(),
                sampling,
                arrived_ns: id,
                cancelled,
                answer,
            });
            assert!(put.is_ok());
        }

        /// Runs the sender to its end; what each client was told.
        fn told(self) -> Vec<String> {
            drop((self.inbox, self.engine));
            let load = Arc::new(Load::new("m", 1));
            sender::run(&self.messages, &load, || (), || false);
            host::take_responses();
            assert_eq!(host::live(), 0);
            let log = host::take_log();
            let sent = log.iter().filter_map(|line| line.strip_prefix("send 1 "));
            sent.map(str::to_owned).collect()
        }
    }

    /// The fake host does not look at it.
    fn executions() -> Executions {
        // SAFETY: as above.
        unsafe { Executions::of(std::ptr::null_mut()) }
    }

    /// What the clients of these texts are told, all of which are there before the engine starts, and `late` after.
    fn serve(texts: &[&str], late: &str, publish: impl FnMut(&Snapshot, bool)) -> Vec<String> {
        let mut bench = bench(texts.len());
        for (id, text) in texts.iter().enumerate() {
            bench.submit(id as u64, text);
        }
        let other = Fake {
            seat: bench.inbox.seat.clone(),
            jobs: Vec::new(),
            steps: 0,
            ends: 0,
        };
        let engine = std::mem::replace(&mut bench.engine, other);
        engine_thread(engine, publish, &executions(), &bench.inbox.seat);
        bench.submit(100, late);
        bench.told()
    }

    #[test]
    fn at_exit_who_runs_is_told_and_waited_for() {
        let bench = bench(2);
        (0..2).for_each(|id| bench.submit(id, "forever"));
        let Bench {
            inbox,
            messages,
            engine,
        } = bench;
        let pool = inbox.seat.pool.clone();
        let at_exit = std::thread::spawn(move || {
            let in_vain = pool.wait(Instant::now() + Duration::from_millis(20));
            pool.stop();
            let stopped = pool.wait(Instant::now() + Duration::from_secs(60));
            (in_vain, stopped)
        });
        engine_thread(engine, |_, _| (), &executions(), &inbox.seat);
        drop(inbox);
        let load = Arc::new(Load::new("m", 1));
        sender::run(&messages, &load, || (), || false);
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
        let gone = format!("error {GONE}");
        let mut published = 0;
        let told = serve(&["a", "b", "forever"], "c", |_, _| {
            published += 1;
            assert!(published < 4, "injected");
        });
        // Those who ended before the panic have their own answers.
        assert_eq!(told, ["error a", "error b", &gone, &gone]);
        let told = serve(&["a", "b"], "c", |_, _| panic!("injected too"));
        assert_eq!(told, [&*gone; 3]);
        let messages = host::take_messages();
        assert_eq!(messages.len(), 2);
        assert!(
            messages[0].starts_with("2 drex: the engine has ended by a panic: injected"),
            "{messages:?}"
        );
    }
}
