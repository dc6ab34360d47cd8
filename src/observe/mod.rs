// SPDX-License-Identifier: Apache-2.0

//! An engine's reports about itself: log events, a snapshot, metrics, a trace,
//! ranges for a profiler. All of it is off until asked for, and off costs a test
//! of one flag per call.

pub mod metrics;
pub mod nvtx;
pub mod snapshot;
pub mod trace;

use std::ffi::{CStr, c_char, c_void};
use std::fmt::{self, Display, Write};

use tracing::Level;
use tracing::level_filters::LevelFilter;

use crate::core::engine::Engine;
use crate::core::planner::Marks;
use crate::core::policy::{Decision, Policy};
use nvtx::Profiler;
use trace::Trace;

pub type Callback = unsafe extern "C" fn(*mut c_void, u32, *const c_char);

/// Where an engine's events go besides a Rust host's own subscriber.
#[derive(Default)]
pub struct Watch {
    /// Somebody may listen: all that a hook looks at when nobody does.
    on: bool,
    sink: Option<Sink>,
    trace: Option<Box<Trace>>,
    profiler: Option<&'static Profiler>,
}

pub struct Sink {
    pub callback: Callback,
    pub user_data: *mut c_void,
    /// 1 (error) to 5 (trace)
    pub level: u32,
}

// SAFETY: drex does not follow `user_data`. The host names it for a callback that
// runs on whatever thread calls, one at a time: the header says so.
unsafe impl Send for Sink {}

/// A line that is cut to its room, so that no event allocates.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let mut n = s.len().min(self.bytes.len() - 1 - self.len);
        while !s.is_char_boundary(n) {
            n -= 1;
        }
        for (to, &from) in self.bytes[self.len..].iter_mut().zip(&s.as_bytes()[..n]) {
            *to = if from == 0 { b'?' } else { from };
        }
        self.len += n;
        Ok(())
    }
}

/// One event: to the Rust host's subscriber, if any, and to the callback.
macro_rules! log {
    ($watch:expr, $level:expr, $number:expr, $($text:tt)+) => {
        tracing::event!($level, $($text)+);
        $watch.send($number, format_args!($($text)+));
    };
}

/// The counters that a step's end is compared with.
pub struct Before {
    misses: u64,
    marks: Marks,
    ramps_predicted: Option<f64>,
    duration_ns: u64,
    now_ns: u64,
}

impl Watch {
    /// Of an engine that is being made: a profiler is there by then, or never.
    pub fn new() -> Self {
        let mut watch = Watch {
            profiler: nvtx::injected().as_ref().and_then(|p| p.as_ref().ok()),
            ..Watch::default()
        };
        watch.look();
        watch
    }

    pub fn set(&mut self, sink: Option<Sink>) {
        self.sink = sink;
        self.look();
    }

    pub fn set_trace(&mut self, trace: Option<Box<Trace>>) {
        self.trace = trace;
        self.look();
    }

    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_deref()
    }

    /// Somebody may listen.
    #[inline]
    pub fn on(&self) -> bool {
        // The build without hooks that `cargo xtask test --observe` compares with.
        !cfg!(drex_unwatched) && self.on
    }

    /// Finds out whether somebody listens. A subscriber of the Rust host may
    /// come or go at any time: it is noticed at the next plan.
    #[inline]
    pub fn look(&mut self) {
        if cfg!(drex_unwatched) {
            return;
        }
        self.on = self.sink.is_some()
            || self.trace.is_some()
            || self.profiler.is_some()
            || LevelFilter::current() != LevelFilter::OFF;
    }

    /// A call's range in the profiler's timeline, if there is one, as long as
    /// the value lives.
    #[inline]
    pub fn range(&self, name: nvtx::Name) -> Option<nvtx::Range> {
        if self.on() { self.open(name) } else { None }
    }

    #[cold]
    #[inline(never)]
    fn open(&self, name: nvtx::Name) -> Option<nvtx::Range> {
        self.profiler.map(|p| p.range(name))
    }

    #[cold]
    fn send(&self, level: u32, text: fmt::Arguments<'_>) {
        let Some(sink) = self.sink.as_ref().filter(|s| level <= s.level) else {
            return;
        };
        let mut line = Line {
            bytes: [0; 512],
            len: 0,
        };
        let _ = line.write_fmt(text);
        if let Ok(text) = CStr::from_bytes_until_nul(&line.bytes) {
            // SAFETY: the host vouched for the pair when it set it.
            unsafe { (sink.callback)(sink.user_data, level, text.as_ptr()) };
        }
    }

    #[cold]
    #[inline(never)]
    pub fn created(&self, engine: &Engine) {
        let c = engine.config();
        log!(
            self,
            Level::INFO,
            3,
            "engine: {} layers, ramps at {:?}, thresholds {:?}, policy {:?}, {} requests, batch {}, {} slots",
            c.n_layers,
            c.ramp_layers,
            c.thresholds,
            c.policy,
            c.max_requests,
            c.max_batch,
            c.n_slots
        );
        if let Some(Err(why)) = nvtx::injected() {
            log!(self, Level::WARN, 2, "{}: {why}", nvtx::VARIABLE);
        }
    }

    #[cold]
    #[inline(never)]
    pub fn destroyed(&self, engine: &Engine) {
        let c = engine.counters();
        log!(
            self,
            Level::INFO,
            3,
            "engine destroyed after {} tokens in {} steps",
            c.tokens,
            c.steps
        );
    }

    #[cold]
    #[inline(never)]
    pub fn failed(&self, function: &str, why: &dyn Display, device: bool) {
        if device {
            log!(self, Level::ERROR, 1, "{function}: {why}");
        } else {
            log!(self, Level::WARN, 2, "{function}: {why}");
        }
    }

    #[cold]
    #[inline(never)]
    pub fn request(&self, id: u64, what: &str) {
        log!(self, Level::DEBUG, 4, "request {id} {what}");
    }

    #[cold]
    #[inline(never)]
    pub fn planned(&self, engine: &Engine) {
        if let Some(s) = engine.step() {
            let rows = engine.step_rows().len();
            log!(
                self,
                Level::TRACE,
                5,
                "step: layers {}..{}, {rows} rows, {} of prompts, reason {:?}, at {} ns",
                s.layer_begin,
                s.layer_end,
                s.prompt_rows,
                s.reason,
                s.now_ns
            );
        }
    }

    #[cold]
    #[inline(never)]
    pub fn ramped(&self, engine: &Engine) {
        let rows = engine.step_rows();
        let exits = rows.iter().filter(|r| r.decision == Decision::Exit).count();
        let nan = rows.iter().filter(|r| !r.gone && r.back == 0);
        let nan = nan.filter(|r| r.score.confidence.is_nan()).count();
        log!(
            self,
            Level::TRACE,
            5,
            "ramp: {exits} of {} rows exit",
            rows.len()
        );
        if nan > 0 {
            log!(
                self,
                Level::WARN,
                2,
                "ramp: {nan} rows have logits that are not finite"
            );
        }
    }

    #[cold]
    #[inline(never)]
    pub fn removing(&mut self, engine: &Engine, id: u64) {
        if let Some(trace) = &mut self.trace {
            trace.removing(engine, id);
        }
    }

    #[cold]
    #[inline(never)]
    pub fn abandoning(&mut self, engine: &Engine) {
        if let Some(trace) = &mut self.trace {
            trace.leaving(engine, engine.clock_ns(), None);
        }
    }

    /// The planned step is one that [`Engine::complete`] will end.
    #[cold]
    #[inline(never)]
    pub fn completing(&mut self, engine: &Engine, now_ns: u64, duration_ns: u64) -> Before {
        if let Some(trace) = &mut self.trace {
            trace.leaving(engine, now_ns, Some(duration_ns));
        }
        let auto = engine.config().policy == Policy::Auto;
        Before {
            misses: engine.counters().deadline_misses,
            marks: engine.chosen_marks(),
            ramps_predicted: auto.then(|| engine.auto().predicted().0),
            duration_ns,
            now_ns,
        }
    }

    #[cold]
    #[inline(never)]
    pub fn completed(&mut self, engine: &Engine, before: &Before) {
        if let Some(trace) = &mut self.trace {
            trace.completed(engine);
        }
        let missed = engine.counters().deadline_misses - before.misses;
        log!(
            self,
            Level::TRACE,
            5,
            "complete: {} ns, {} rows held, at {} ns",
            before.duration_ns,
            engine.buffer().held(),
            before.now_ns
        );
        if missed > 0 {
            log!(
                self,
                Level::WARN,
                2,
                "{missed} tokens missed their deadline"
            );
        }
        let marks = engine.chosen_marks();
        let (rate, off) = engine.auto().predicted();
        // The row counts move with the load; a rule is new when a search chose.
        if before.ramps_predicted.is_some_and(|old| old != rate) && marks != before.marks {
            log!(
                self,
                Level::INFO,
                3,
                "rule: ramps {:#x}, flush at {} rows, or below {} ready; predicted {:.1} tokens/s, {:.1} without exits",
                marks.ramps,
                marks.hold_rows,
                marks.ready_rows,
                rate * 1e9,
                off * 1e9
            );
        }
    }
}
