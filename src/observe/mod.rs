// SPDX-License-Identifier: Apache-2.0

//! An engine's reports about itself: log events, a snapshot, metrics, a trace,
//! ranges for a profiler. All of it is off until asked for, and off costs a test
//! of one flag per call.

pub mod metrics;
pub mod nvtx;
pub mod snapshot;
pub mod trace;

use std::ffi::{c_char, c_void};
use std::fmt::{self, Display, Write};

use tracing::Level;
use tracing::level_filters::LevelFilter;

use crate::core::config::Policy;
use crate::core::decision::Decision;
use crate::core::policy::rule::RowRule;
use crate::core::scheduler::Scheduler;
use crate::text::Text;
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
    row_rule: RowRule,
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
        let mut line = Text::EMPTY;
        let _ = line.write_fmt(text);
        // SAFETY: the host vouched for the pair when it set it.
        unsafe { (sink.callback)(sink.user_data, level, line.as_ptr()) };
    }

    #[cold]
    #[inline(never)]
    pub fn created(&self, scheduler: &Scheduler) {
        let c = scheduler.config();
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
    pub fn destroyed(&self, scheduler: &Scheduler) {
        let c = scheduler.counters();
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
    pub fn planned(&self, scheduler: &Scheduler) {
        if let Some(s) = scheduler.step() {
            let rows = scheduler.step_rows().len();
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
    pub fn ramped(&self, scheduler: &Scheduler) {
        let rows = scheduler.step_rows();
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
    pub fn removing(&mut self, scheduler: &Scheduler, id: u64) {
        if let Some(trace) = &mut self.trace {
            trace.removing(scheduler, id);
        }
    }

    #[cold]
    #[inline(never)]
    pub fn abandoning(&mut self, scheduler: &Scheduler) {
        if let Some(trace) = &mut self.trace {
            trace.leaving(scheduler, scheduler.clock_ns(), None);
        }
    }

    /// The planned step is one that [`Scheduler::complete`] will end.
    #[cold]
    #[inline(never)]
    pub fn completing(&mut self, scheduler: &Scheduler, now_ns: u64, duration_ns: u64) -> Before {
        if let Some(trace) = &mut self.trace {
            trace.leaving(scheduler, now_ns, Some(duration_ns));
        }
        let auto = scheduler.config().policy == Policy::Auto;
        Before {
            misses: scheduler.counters().deadline_misses,
            row_rule: scheduler.chosen_rule(),
            ramps_predicted: auto.then(|| scheduler.auto().predicted().0),
            duration_ns,
            now_ns,
        }
    }

    #[cold]
    #[inline(never)]
    pub fn completed(&mut self, scheduler: &Scheduler, before: &Before) {
        if let Some(trace) = &mut self.trace {
            trace.completed(scheduler);
        }
        let missed = scheduler.counters().deadline_misses - before.misses;
        log!(
            self,
            Level::TRACE,
            5,
            "complete: {} ns, {} rows held, at {} ns",
            before.duration_ns,
            scheduler.buffer().held(),
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
        let row_rule = scheduler.chosen_rule();
        let (rate, off) = scheduler.auto().predicted();
        // The row counts move with the load; a rule is new when a search chose.
        if before.ramps_predicted.is_some_and(|old| old != rate) && row_rule != before.row_rule {
            log!(
                self,
                Level::INFO,
                3,
                "rule: ramps {:#x}, flush at {} rows, or below {} ready; predicted {:.1} tokens/s, {:.1} without exits",
                row_rule.ramps,
                row_rule.hold_rows,
                row_rule.ready_rows,
                rate * 1e9,
                off * 1e9
            );
        }
    }
}
