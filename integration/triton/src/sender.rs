// SPDX-License-Identifier: Apache-2.0
//! The thread that owns the replies: it sends, and it sees who went away. The engine's thread waits for neither.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::clock::now_ns;
use crate::engine::{Event, Figures, Finish};
use crate::request::Want;
use crate::triton::abi;
use crate::triton::error::Failure;
use crate::triton::reply::{Parameter, Reply, Tensor, Times};

/// How often requests are asked whether they are cancelled.
const POLL: Duration = Duration::from_millis(5);

pub enum Message {
    Add {
        id: u64,
        reply: Box<Reply>,
        stream: bool,
        want: Want,
        cancelled: Arc<AtomicBool>,
    },
    Event(u64, Event),
}

struct Entry {
    reply: Box<Reply>,
    stream: bool,
    want: Want,
    cancelled: Arc<AtomicBool>,
    /// What was not sent yet.
    text: String,
    tokens: Vec<i32>,
    prompt_tokens: u32,
    output_tokens: u32,
}

/// Until every sending end is gone. `wake` is called after a request was seen to be cancelled.
pub fn run(messages: &Receiver<Message>, wake: impl Fn()) {
    let mut entries: HashMap<u64, Entry> = HashMap::new();
    let mut polled = Instant::now();
    loop {
        let message = if entries.is_empty() {
            messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            messages.recv_timeout(POLL)
        };
        match message {
            Ok(message) => handle(&mut entries, message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if polled.elapsed() >= POLL {
            polled = Instant::now();
            let mut seen = false;
            for entry in entries.values() {
                if !entry.cancelled.load(Ordering::Relaxed) && entry.reply.is_cancelled() {
                    entry.cancelled.store(true, Ordering::Relaxed);
                    seen = true;
                }
            }
            if seen {
                wake();
            }
        }
    }
}

fn handle(entries: &mut HashMap<u64, Entry>, message: Message) {
    match message {
        Message::Add {
            id,
            reply,
            stream,
            want,
            cancelled,
        } => {
            let text = want.prepend.clone().unwrap_or_default();
            entries.insert(
                id,
                Entry {
                    reply,
                    stream,
                    want,
                    cancelled,
                    text,
                    tokens: Vec::new(),
                    prompt_tokens: 0,
                    output_tokens: 0,
                },
            );
        }
        Message::Event(id, Event::Started { prompt_tokens }) => {
            if let Some(entry) = entries.get_mut(&id) {
                entry.prompt_tokens = prompt_tokens;
                let times = entry.reply.times();
                entry.reply.set_times(Times {
                    compute_start: now_ns(),
                    ..times
                });
            }
        }
        Message::Event(id, Event::Failed(failure)) => {
            if let Some(entry) = entries.remove(&id) {
                entry.end(Err(failure));
            }
        }
        Message::Event(id, Event::Token { token, text, end }) => {
            let Some(entry) = entries.get_mut(&id) else {
                return;
            };
            entry.text += &text;
            if let Some(token) = token {
                entry.tokens.push(token);
                entry.output_tokens += 1;
            }
            match end {
                Some(end) => {
                    if let Some(entry) = entries.remove(&id) {
                        entry.end(Ok(end));
                    }
                }
                // Where nobody can be told any more, the engine need not go on.
                None if entry.stream && entry.send(None).is_err() => {
                    entry.cancelled.store(true, Ordering::Relaxed);
                }
                None => {}
            }
        }
    }
}

impl Entry {
    fn end(mut self, how: Result<(Finish, Figures), Failure>) {
        let mut times = self.reply.times();
        times.compute_end = now_ns();
        times.exec_end = times.compute_end;
        times.compute_start = if times.compute_start == 0 {
            times.compute_end
        } else {
            times.compute_start
        };
        self.reply.set_times(times);
        match how {
            Ok((Finish::Cancelled, _)) => self.reply.fail(Failure {
                code: abi::ERROR_CANCELLED,
                text: "the request was cancelled".into(),
            }),
            Ok(end) => {
                if let Err(failure) = self.send(Some(end)) {
                    self.reply.fail(failure);
                }
            }
            Err(failure) => self.reply.fail(failure),
        }
    }

    /// Sends what was not sent yet, and the end if there is one.
    fn send(&mut self, end: Option<(Finish, Figures)>) -> Result<(), Failure> {
        let mut outputs = Vec::new();
        let reason = match &end {
            Some((Finish::Stop, _)) => "stop",
            Some((Finish::Length, _)) => "length",
            Some((Finish::Cancelled, _)) => "cancelled",
            None => "",
        };
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
                ("drex_held_us", figures.held_ns / 1000),
                ("drex_deadline_misses", figures.deadline_misses),
                ("drex_drafts", figures.drafts),
                ("drex_drafts_accepted", figures.drafts_accepted),
            ] {
                parameters.push((text(name), Parameter::Int(value as i64)));
            }
        }
        self.reply.send(&outputs, &parameters, end.is_some())?;
        self.text.clear();
        self.tokens.clear();
        Ok(())
    }
}
