// SPDX-License-Identifier: Apache-2.0

//! What an engine tells about itself: log events, a snapshot, metrics. All of
//! it is off until asked for, and off costs a test of two words per call.

pub mod metrics;
pub mod snapshot;

use std::ffi::{CStr, c_char, c_void};
use std::fmt::{self, Display, Write};

use tracing::Level;
use tracing::level_filters::LevelFilter;

use crate::core::engine::Engine;
use crate::core::planner::Marks;
use crate::core::policy::{Decision, Policy};

pub type Callback = unsafe extern "C" fn(*mut c_void, u32, *const c_char);

/// Where an engine's events go besides a Rust host's own subscriber.
#[derive(Default)]
pub struct Watch(Option<Sink>);

pub struct Sink {
    pub callback: Callback,
    pub user_data: *mut c_void,
    /// 1 (error) to 5 (trace)
    pub level: u32,
}

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
        if $watch.on() {
            tracing::event!($level, $($text)+);
            $watch.send($number, format_args!($($text)+));
        }
    };
}

/// What a step's end is compared with.
pub struct Before {
    misses: u64,
    marks: Marks,
    ramps_predicted: Option<f64>,
    duration_ns: u64,
    now_ns: u64,
}

impl Watch {
    pub fn set(&mut self, sink: Option<Sink>) {
        self.0 = sink;
    }

    /// Somebody may listen.
    #[inline]
    pub fn on(&self) -> bool {
        self.0.is_some() || LevelFilter::current() != LevelFilter::OFF
    }

    #[cold]
    fn send(&self, level: u32, text: fmt::Arguments<'_>) {
        let Some(sink) = self.0.as_ref().filter(|s| level <= s.level) else {
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
    }

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

    pub fn failed(&self, function: &str, why: &dyn Display, device: bool) {
        if device {
            log!(self, Level::ERROR, 1, "{function}: {why}");
        } else {
            log!(self, Level::WARN, 2, "{function}: {why}");
        }
    }

    pub fn request(&self, id: u64, what: &str) {
        log!(self, Level::DEBUG, 4, "request {id} {what}");
    }

    pub fn planned(&self, engine: &Engine) {
        if let Some(s) = engine.step() {
            let rows = engine.step_rows().len();
            log!(
                self,
                Level::TRACE,
                5,
                "step: layers {}..{}, {rows} rows, reason {:?}, at {} ns",
                s.layer_begin,
                s.layer_end,
                s.reason,
                s.now_ns
            );
        }
    }

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

    pub fn completing(&self, engine: &Engine, now_ns: u64, duration_ns: u64) -> Before {
        let auto = engine.config().policy == Policy::Auto;
        Before {
            misses: engine.counters().deadline_misses,
            marks: engine.chosen_marks(),
            ramps_predicted: auto.then(|| engine.auto().predicted().0),
            duration_ns,
            now_ns,
        }
    }

    pub fn completed(&self, engine: &Engine, before: &Before) {
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
