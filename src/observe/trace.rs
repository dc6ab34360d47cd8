// SPDX-License-Identifier: Apache-2.0

//! A ring of what happened, written as Chrome's JSON trace events ("Trace
//! Event Format"), which Perfetto reads too.

use std::collections::HashMap;
use std::fmt::Write;

use crate::core::MAX_RAMPS;
use crate::core::counters::Reason;
use crate::core::decision::Decision;
use crate::core::rows::requests::{Request, State};
use crate::core::scheduler::Scheduler;

#[derive(Debug, Clone, Copy)]
enum Event {
    /// A window that ran.
    Window {
        begin_ns: u64,
        end_ns: u64,
        /// As the host measured it.
        run_ns: u64,
        layer_begin: u32,
        layer_end: u32,
        rows: u32,
        exits: u32,
        ramp: Option<u8>,
        reason: Reason,
    },
    /// A row's time in the rebatching buffer, which is over.
    Held {
        begin_ns: u64,
        end_ns: u64,
        request: u64,
        ramp: u8,
    },
    Exit {
        at_ns: u64,
        request: u64,
        token: i32,
        confidence: f32,
        ramp: u8,
        forced: bool,
    },
    Rows {
        at_ns: u64,
        held: u32,
        ready: u32,
    },
}

/// Said in the header.
const _: () = assert!(size_of::<Event>() <= 64);

pub struct Trace {
    events: Vec<Event>,
    max: usize,
    /// Where the oldest lies once the ring is full.
    next: usize,
    dropped: u64,
    /// Windows do not overlap, whatever the host's clock does.
    last_ns: u64,
}

/// One line of the output.
#[derive(Clone, Copy)]
struct Item {
    at_ns: u64,
    event: Event,
    ends: bool,
}

impl Trace {
    /// `None`: there is no memory for so many.
    pub fn new(max: usize) -> Option<Self> {
        let mut events = Vec::new();
        events.try_reserve_exact(max).ok()?;
        Some(Trace {
            events,
            max,
            next: 0,
            dropped: 0,
            last_ns: 0,
        })
    }

    fn push(&mut self, event: Event) {
        if self.events.len() < self.max {
            self.events.push(event);
        } else {
            self.events[self.next] = event;
            self.next = (self.next + 1) % self.max;
            self.dropped += 1;
        }
    }

    /// The planned step is about to end, and was timed, or is given up.
    pub fn leaving(&mut self, e: &Scheduler, now_ns: u64, run_ns: Option<u64>) {
        let Some(step) = e.step() else {
            return;
        };
        let begin_ns = step.now_ns.max(self.last_ns);
        let end_ns = now_ns.max(begin_ns);
        let mut exits = 0;
        for row in e.step_rows() {
            let exit = e.ramped() && row.decision == Decision::Exit;
            // In a step that is given up, the others go back.
            if (run_ns.is_some() || row.gone || exit)
                && let Some(ramp) = row.was_held_at()
            {
                let begin_ns = row.since_ns;
                self.push(Event::Held {
                    begin_ns,
                    end_ns: step.now_ns.max(begin_ns),
                    request: row.id,
                    ramp: ramp as u8,
                });
            }
            if let (true, Some(ramp)) = (exit, step.ramp) {
                exits += 1;
                self.push(Event::Exit {
                    at_ns: end_ns,
                    request: row.id,
                    token: row.score.token,
                    confidence: row.score.confidence,
                    ramp: ramp as u8,
                    forced: row.forced,
                });
            }
        }
        self.last_ns = end_ns;
        if let Some(run_ns) = run_ns {
            self.push(Event::Window {
                begin_ns,
                end_ns,
                run_ns,
                layer_begin: step.layer_begin,
                layer_end: step.layer_end,
                rows: e.step_rows().len() as u32,
                exits,
                ramp: step.ramp.map(|r| r as u8),
                reason: step.reason,
            });
        }
    }

    /// The step that was leaving has ended well.
    pub fn completed(&mut self, e: &Scheduler) {
        self.push(Event::Rows {
            at_ns: self.last_ns,
            held: e.buffer().held(),
            ready: e.buffer().ready_rows() as u32,
        });
    }

    /// A request is about to be forgotten.
    pub fn removing(&mut self, e: &Scheduler, id: u64) {
        if let Some(event) = e.request(id).ok().and_then(|r| held(e, r)) {
            self.push(event);
        }
    }

    /// Hands the JSON text to `sink`, in pieces. What is still held ends now.
    /// `number` tells the engines of a process from each other.
    pub fn write(&self, e: &Scheduler, number: usize, sink: &mut dyn FnMut(&str)) {
        let open = e.held_requests().filter_map(|r| held(e, r));
        let planned = e.step_rows().iter().filter_map(|row| {
            let begin_ns = row.since_ns;
            Some(Event::Held {
                begin_ns,
                end_ns: e.step()?.now_ns.max(begin_ns),
                request: row.id,
                ramp: row.was_held_at()? as u8,
            })
        });
        let (late, early) = self.events.split_at(self.next);
        let all = early.iter().chain(late).copied().chain(open).chain(planned);
        let mut items = Vec::new();
        // A host's clock that goes back must not put one of a request's spans
        // into another.
        let mut ended = HashMap::new();
        for event in all {
            let (mut begin, mut end) = event.times();
            if let Event::Held { request, .. } = event {
                let last = ended.entry(request).or_insert(begin);
                begin = begin.max(*last);
                end = end.max(begin);
                *last = end;
            }
            let mut at = |at_ns, ends| items.push(Item { at_ns, event, ends });
            at(begin, false);
            if matches!(event, Event::Held { .. }) {
                at(end, true);
            }
        }
        // Stable: of one request, what came first stays first.
        items.sort_by_key(|i| i.at_ns);
        let mut out = Text {
            text: String::with_capacity(2 * PIECE),
            sink,
            pid: std::process::id(),
            number,
        };
        out.head(e, self.dropped);
        for item in &items {
            out.item(item);
        }
        out.text.push_str("\n]}\n");
        out.flush();
    }
}

/// The span of a row that is held and not in the planned step, if it is.
fn held(e: &Scheduler, r: &Request) -> Option<Event> {
    let waits = r.state == State::Held && r.in_step == crate::core::NONE;
    waits.then(|| {
        let begin_ns = e.buffer().node(r.slot).since_ns;
        Event::Held {
            begin_ns,
            end_ns: e.clock_ns().max(begin_ns),
            request: r.id,
            ramp: r.ramp as u8,
        }
    })
}

impl Event {
    fn times(&self) -> (u64, u64) {
        match *self {
            Event::Window {
                begin_ns, end_ns, ..
            }
            | Event::Held {
                begin_ns, end_ns, ..
            } => (begin_ns, end_ns),
            Event::Exit { at_ns, .. } | Event::Rows { at_ns, .. } => (at_ns, at_ns),
        }
    }
}

const PIECE: usize = 16 * 1024;

/// No thread of Linux's has so high a number: a host's own events of the same
/// process may lie in the same list.
const FIRST_TRACK: usize = 1 << 22;
/// The windows', and one for each ramp.
const TRACKS: usize = (1 + MAX_RAMPS).next_power_of_two();

struct Text<'a> {
    text: String,
    sink: &'a mut dyn FnMut(&str),
    pid: u32,
    /// The engine's.
    number: usize,
}

impl Text<'_> {
    fn flush(&mut self) {
        (self.sink)(&self.text);
        self.text.clear();
    }

    /// 0: windows; r + 1: ramp r.
    fn track(&self, which: usize) -> usize {
        FIRST_TRACK + self.number * TRACKS + which
    }

    fn head(&mut self, e: &Scheduler, dropped: u64) {
        let (pid, number) = (self.pid, self.number);
        let _ = write!(
            self.text,
            "{{\"displayTimeUnit\":\"ns\",\"otherData\":{{\"drex_version\":\"{}\",\
             \"dropped_events\":\"{dropped}\"}},\"traceEvents\":[\n\
             {{\"ph\":\"M\",\"pid\":{pid},\"name\":\"process_name\",\"args\":{{\"name\":\"drex\"}}}}",
            env!("CARGO_PKG_VERSION"),
        );
        let ramps = e.config().ramp_layers.iter().enumerate();
        let ramps = ramps.map(|(r, layer)| format!("ramp {r}, layer {layer}"));
        for (which, name) in std::iter::once("windows".to_owned())
            .chain(ramps)
            .enumerate()
        {
            let tid = self.track(which);
            let _ = write!(
                self.text,
                ",\n{{\"ph\":\"M\",\"pid\":{pid},\"tid\":{tid},\"name\":\"thread_name\",\
                 \"args\":{{\"name\":\"engine {number}, {name}\"}}}}",
            );
        }
    }

    fn item(&mut self, item: &Item) {
        let us = |ns: u64| Us(ns);
        let (at, pid, number) = (us(item.at_ns), self.pid, self.number);
        let tid = self.track(match item.event {
            Event::Window { .. } | Event::Rows { .. } => 0,
            Event::Held { ramp, .. } | Event::Exit { ramp, .. } => usize::from(ramp) + 1,
        });
        let t = &mut self.text;
        let _ = match item.event {
            Event::Window {
                begin_ns,
                end_ns,
                run_ns,
                layer_begin,
                layer_end,
                rows,
                exits,
                ramp,
                reason,
            } => {
                let ramp = ramp.map_or("null".to_owned(), |r| r.to_string());
                write!(
                    t,
                    ",\n{{\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"ts\":{at},\"dur\":{},\"cat\":\"window\",\
                     \"name\":\"[{layer_begin},{layer_end})\",\"args\":{{\"rows\":{rows},\
                     \"reason\":\"{}\",\"ramp\":{ramp},\"exits\":{exits},\"duration_ns\":{run_ns}}}}}",
                    us(end_ns - begin_ns),
                    reason.name(),
                )
            }
            Event::Held { request, ramp, .. } => write!(
                t,
                ",\n{{\"ph\":\"{}\",\"pid\":{pid},\"tid\":{tid},\"ts\":{at},\"cat\":\"held\",\
                 \"id\":\"{pid}.{number}.{request}\",\"name\":\"held at ramp {ramp}\",\
                 \"args\":{{\"request\":\"{request}\"}}}}",
                if item.ends { 'e' } else { 'b' },
            ),
            Event::Exit {
                request,
                token,
                confidence,
                forced,
                ..
            } => {
                let confidence = match confidence.is_finite() {
                    true => confidence.to_string(),
                    false => "null".to_owned(),
                };
                write!(
                    t,
                    ",\n{{\"ph\":\"i\",\"s\":\"t\",\"pid\":{pid},\"tid\":{tid},\"ts\":{at},\"cat\":\"exit\",\
                     \"name\":\"exit\",\"args\":{{\"request\":\"{request}\",\"token\":{token},\
                     \"confidence\":{confidence},\"forced\":{forced}}}}}",
                )
            }
            Event::Rows { held, ready, .. } => write!(
                t,
                ",\n{{\"ph\":\"C\",\"pid\":{pid},\"tid\":{tid},\"ts\":{at},\"id\":\"{number}\",\"name\":\"rows\",\
                 \"args\":{{\"held\":{held},\"ready\":{ready}}}}}",
            ),
        };
        if self.text.len() >= PIECE {
            self.flush();
        }
    }
}

/// Nanoseconds as the format's microseconds, without rounding.
struct Us(u64);

impl std::fmt::Display for Us {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}
