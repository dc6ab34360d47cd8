// SPDX-License-Identifier: Apache-2.0
//! A process that ends while models are loaded: past its exit timeout the server calls exit() and unloads nothing.
//!
//! exit() first takes down what was loaded last, the engine's libraries, under the threads that use them, and then the
//! server's own endpoints, which wait for the requests in flight. So before all that the engines stop, and whoever waits for an
//! answer is told.

use std::panic::catch_unwind;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

const EXITING: &str = "the server is exiting";
/// A step cannot be interrupted; after this long the process ends under it.
const LIMIT: Duration = Duration::from_secs(5);

/// An engine, and the requests that it has.
pub trait Stop: Send + Sync {
    /// Begins to stop; requests are refused with this text.
    fn stop(&self, why: &'static str);
    /// Waits until it has stopped and every request is answered.
    fn wait(&self, until: Instant);
}

static RUNNING: Mutex<Vec<Weak<dyn Stop>>> = Mutex::new(Vec::new());

/// `one` is stopped at exit, if it is still there.
pub fn add(one: Weak<dyn Stop>) {
    let mut all = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|other| other.strong_count() > 0);
    all.push(one);
}

/// Once, after the engine's libraries are loaded: what is registered last is called first. Where the backend is unloaded
/// before, it is called then, and finds nothing.
pub fn register() {
    // SAFETY: it stays loaded until it was called. Without it the process still ends.
    let _ = unsafe { libc::atexit(at_exit) };
}

extern "C" fn at_exit() {
    let _ = catch_unwind(|| {
        let all = std::mem::take(&mut *RUNNING.lock().unwrap_or_else(PoisonError::into_inner));
        let all: Vec<Arc<dyn Stop>> = all.iter().filter_map(Weak::upgrade).collect();
        let until = Instant::now() + LIMIT;
        all.iter().for_each(|one| one.stop(EXITING));
        all.iter().for_each(|one| one.wait(until));
        // What they own is not taken down here, under a thread that may still use it.
        all.into_iter().for_each(std::mem::forget);
    });
}
