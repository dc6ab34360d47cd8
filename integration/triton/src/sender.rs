// SPDX-License-Identifier: Apache-2.0
//! The thread that owns the replies: it sends, and it sees who went away. The engine's thread waits for neither.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::clock::now_ns;
use crate::engine::pool::Open;
use crate::engine::{Event, Figures, Finish};
use crate::exit::EXITING;
use crate::load::Load;
use crate::request::Want;
use crate::triton::abi;
use crate::triton::error::Failure;
use crate::triton::reply::{Parameter, Reply, Tensor};
use crate::triton::statistics::Span;

/// How often requests are asked whether they are cancelled.
const POLL: Duration = Duration::from_millis(5);

/// A request that is to be answered.
pub struct Added {
    pub id: u64,
    pub reply: Reply,
    pub stream: bool,
    pub want: Want,
    pub cancelled: Arc<AtomicBool>,
    pub arrived: u64,
    /// Dropped when the request is answered.
    pub open: Option<Open>,
}

pub enum Message {
    Add(Box<Added>),
    /// What happened to a request, and when: the engine does not wait for the sender.
    Event {
        id: u64,
        event: Event,
        at: u64,
    },
}

struct Entry {
    reply: Reply,
    stream: bool,
    want: Want,
    cancelled: Cancelled,
    /// What was not sent yet.
    text: String,
    tokens: Vec<i32>,
    prompt_tokens: u32,
    output_tokens: u32,
    /// Where the next response's time begins, where the last token was known.
    since: u64,
    known: u64,
    arrived: u64,
    load: Arc<Load>,
    /// Why a response could not be sent; the request is then cancelled, and this is what its client is told.
    failure: Option<Failure>,
    _open: Option<Open>,
}

/// Set when the entry goes, whatever takes it: nobody waits for its tokens any more.
struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.set();
    }
}

struct Entries {
    all: HashMap<u64, Entry>,
    load: Arc<Load>,
}

/// Until every sending end is gone. `wake` is called after a request was seen to be cancelled. Once the process is `exiting`,
/// requests are refused and nothing else is sent: where it would be written may be gone.
pub fn run(
    messages: &Receiver<Message>,
    load: &Arc<Load>,
    wake: impl Fn(),
    exiting: impl Fn() -> bool,
) {
    let mut entries = Entries {
        all: HashMap::new(),
        load: load.clone(),
    };
    let mut polled = Instant::now();
    loop {
        let message = if entries.all.is_empty() {
            messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            messages.recv_timeout(POLL)
        };
        match message {
            Ok(message) => entries.handle(message, &exiting),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if polled.elapsed() >= POLL {
            polled = Instant::now();
            let mut seen = false;
            for entry in entries.all.values() {
                if !entry.cancelled.get() && entry.reply.is_cancelled() {
                    entry.cancelled.set();
                    seen = true;
                }
            }
            if seen {
                wake();
            }
        }
    }
}

impl Entries {
    fn handle(&mut self, message: Message, exiting: impl Fn() -> bool) {
        match message {
            Message::Add(added) => {
                let Added {
                    id,
                    reply,
                    stream,
                    want,
                    cancelled,
                    arrived,
                    open,
                } = *added;
                let text = want.prepend.clone().unwrap_or_default();
                self.all.insert(
                    id,
                    Entry {
                        reply,
                        stream,
                        want,
                        cancelled: Cancelled(cancelled),
                        text,
                        tokens: Vec::new(),
                        prompt_tokens: 0,
                        output_tokens: 0,
                        since: 0,
                        known: 0,
                        arrived,
                        load: self.load.clone(),
                        failure: None,
                        _open: open,
                    },
                );
            }
            Message::Event { id, event, at } => {
                let token = matches!(event, Event::Token { .. });
                if !(token && exiting()) {
                    self.event(id, event, at);
                } else if let Some(entry) = self.all.remove(&id) {
                    entry.end(Err(Failure::unavailable(EXITING)), at);
                }
            }
        }
    }

    fn event(&mut self, id: u64, event: Event, at: u64) {
        match event {
            Event::Started { prompt_tokens } => {
                if let Some(entry) = self.all.get_mut(&id) {
                    entry.prompt_tokens = prompt_tokens;
                    entry.since = at;
                    let waited = at.saturating_sub(entry.arrived);
                    entry.load.started(waited, prompt_tokens);
                    // What came before is the wait for a slot; inputs were read long ago.
                    let mut times = entry.reply.times();
                    (times.exec_start, times.compute_start) = (at, at);
                    entry.reply.set_times(times);
                }
            }
            Event::Failed(failure) => {
                if let Some(entry) = self.all.remove(&id) {
                    entry.end(Err(failure), at);
                }
            }
            Event::Token { token, text, end } => {
                let Some(entry) = self.all.get_mut(&id) else {
                    return;
                };
                entry.text += &text;
                if let Some(token) = token {
                    if entry.output_tokens == 0 {
                        entry.load.first_token(at.saturating_sub(entry.arrived));
                    } else {
                        entry.load.next_token(at.saturating_sub(entry.known));
                    }
                    entry.tokens.push(token);
                    entry.output_tokens += 1;
                }
                entry.known = at;
                match end {
                    Some(end) => {
                        if let Some(entry) = self.all.remove(&id) {
                            entry.end(Ok(end), at);
                        }
                    }
                    None if entry.stream && entry.failure.is_none() => {
                        // Where nobody can be told any more, the engine need not go on.
                        if let Err(failure) = entry.send(None) {
                            entry.failure = Some(failure);
                            entry.cancelled.set();
                        }
                    }
                    None => {}
                }
            }
        }
    }
}

impl Entry {
    /// `at`: when the engine was done with it.
    fn end(mut self, how: Result<(Finish, Figures), Failure>, at: u64) {
        let mut times = self.reply.times();
        times.compute_end = at;
        self.reply.set_times(times);
        self.reply.set_span(Span {
            start: self.since,
            computed: 0,
        });
        let failure = match (self.failure.take(), how) {
            (Some(failure), _) | (None, Err(failure)) => failure,
            (None, Ok((Finish::Cancelled, _))) => Failure {
                code: abi::ERROR_CANCELLED,
                text: "the request was cancelled".into(),
            },
            (None, Ok(end)) => {
                let how = end.0;
                match self.send(Some(end)) {
                    Ok(()) => {
                        self.load.finished(how);
                        self.load.whole(at.saturating_sub(self.arrived));
                        times.exec_end = now_ns();
                        return self.reply.set_times(times);
                    }
                    Err(failure) => failure,
                }
            }
        };
        self.load.ended_by(&failure);
        self.reply.fail(failure);
    }

    /// Sends what was not sent yet, and the end if there is one.
    fn send(&mut self, end: Option<(Finish, Figures)>) -> Result<(), Failure> {
        let mut outputs = Vec::new();
        let reason = end.as_ref().map_or("", |(how, _)| how.name());
        if self.want.text {
            outputs.push((c"text_output", Tensor::Text(&self.text)));
        }
        if self.want.finish_reason {
            outputs.push((c"finish_reason", Tensor::Text(reason)));
        }
        if self.want.num_input_tokens {
            outputs.push((c"num_input_tokens", Tensor::Count(self.prompt_tokens)));
        }
        if self.want.num_output_tokens {
            outputs.push((
                c"num_output_tokens",
                Tensor::Count(self.tokens.len() as u32),
            ));
        }
        if self.want.token_ids {
            outputs.push((c"token_ids", Tensor::Tokens(&self.tokens)));
        }
        let mut parameters = Vec::new();
        if let Some((_, figures)) = &end {
            let exits: Vec<String> = figures.exits.iter().map(u64::to_string).collect();
            let text = |text: &str| CString::new(text).unwrap_or_default();
            parameters.push((text("drex_exits"), Parameter::Text(text(&exits.join(",")))));
            for (name, value) in [
                ("drex_output_tokens", u64::from(self.output_tokens)),
                ("drex_involuntary_exits", figures.involuntary_exits),
                ("drex_involuntary_stays", figures.involuntary_stays),
                ("drex_deadline_misses", figures.deadline_misses),
                ("drex_drafts", figures.drafts),
                ("drex_drafts_accepted", figures.drafts_accepted),
            ] {
                parameters.push((text(name), Parameter::Int(value as i64)));
            }
            let quality = match figures.quality {
                1.0 => "lossless".into(),
                0.0 => "given".into(),
                share => share.to_string(),
            };
            parameters.push((text("drex_quality"), Parameter::Text(text(&quality))));
            let held = figures.held_ns as f64 / 1e6;
            parameters.push((text("drex_held_ms"), Parameter::Number(held)));
        }
        self.reply.set_span(Span {
            start: self.since,
            computed: self.known,
        });
        self.reply.send(&outputs, &parameters, end.is_some())?;
        self.since = self.known;
        self.text.clear();
        self.tokens.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::triton::fake_host as host;
    use std::sync::mpsc::{Sender, channel};

    fn add(sender: &Sender<Message>, id: u64, stream: bool) -> Arc<AtomicBool> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let want = Want {
            text: true,
            ..Want::default()
        };
        let added = Added {
            id,
            reply: host::reply(),
            stream,
            want,
            cancelled: cancelled.clone(),
            arrived: 40,
            open: None,
        };
        sender.send(Message::Add(Box::new(added))).unwrap();
        cancelled
    }

    /// Nothing is registered, so that nothing is counted.
    fn load() -> Arc<Load> {
        Arc::new(Load::new("m", 1))
    }

    fn event(sender: &Sender<Message>, id: u64, at: u64, event: Event) {
        sender.send(Message::Event { id, event, at }).unwrap();
    }

    fn token(text: &str, end: Option<Finish>) -> Event {
        Event::Token {
            token: Some(1),
            text: text.into(),
            end: end.map(|finish| (finish, Figures::default())),
        }
    }

    fn sends(log: &[String]) -> Vec<&str> {
        let sent = log.iter().filter(|line| line.starts_with("send "));
        sent.map(String::as_str).collect()
    }

    #[test]
    fn times_are_those_of_the_events() {
        let (sender, messages) = channel();
        add(&sender, 1, true);
        event(&sender, 1, 100, Event::Started { prompt_tokens: 3 });
        event(&sender, 1, 120, token("a", None));
        event(&sender, 1, 150, token("b", Some(Finish::Length)));
        drop(sender);
        run(&messages, &load(), || (), || false);
        assert_eq!(sends(&host::take_log()), ["send 0 a", "send 1 b"]);
        let [exec_start, compute_start, compute_end, exec_end] = host::times();
        assert_eq!((exec_start, compute_start, compute_end), (100, 100, 150));
        assert!(exec_end > 150);
        let spans: Vec<_> = host::take_responses()
            .iter()
            .map(|r| (r.start, r.computed))
            .collect();
        assert_eq!(spans, [(100, 120), (120, 150)]);
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn why_a_response_could_not_be_sent_is_what_the_client_is_told() {
        let (sender, messages) = channel();
        let cancelled = add(&sender, 1, true);
        event(&sender, 1, 100, Event::Started { prompt_tokens: 3 });
        event(&sender, 1, 120, token("a", None));
        event(&sender, 1, 150, token("", Some(Finish::Cancelled)));
        drop(sender);
        host::set_memory(7);
        run(&messages, &load(), || (), || false);
        host::set_memory(abi::MEMORY_CPU);
        let log = host::take_log();
        let [only] = sends(&log)[..] else {
            panic!("{log:?}")
        };
        assert!(
            only.starts_with("send 1 error text_output: ") && only.contains("type 7"),
            "{only}"
        );
        assert!(cancelled.load(Ordering::Relaxed), "the engine goes on");
        host::take_responses();
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn at_exit_nothing_is_written_any_more() {
        let (sender, messages) = channel();
        let cancelled = add(&sender, 1, true);
        event(&sender, 1, 100, Event::Started { prompt_tokens: 3 });
        event(&sender, 1, 120, token("a", None));
        event(&sender, 1, 150, token("b", Some(Finish::Length)));
        drop(sender);
        run(&messages, &load(), || (), || true);
        assert_eq!(
            sends(&host::take_log()),
            ["send 1 error the server is exiting"]
        );
        assert!(cancelled.load(Ordering::Relaxed), "the engine goes on");
        host::take_responses();
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn a_sender_that_dies_answers_and_cancels_all() {
        let (sender, messages) = channel();
        let cancelled = add(&sender, 1, true);
        host::cancel(true);
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(&messages, &load(), || panic!("injected"), || false);
        }));
        host::cancel(false);
        assert!(died.is_err());
        drop(sender);
        assert_eq!(
            sends(&host::take_log()),
            ["send 1 error the request was given up"]
        );
        assert!(cancelled.load(Ordering::Relaxed));
        host::take_responses();
        assert_eq!(host::live(), 0);
    }
}
