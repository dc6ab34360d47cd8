// SPDX-License-Identifier: Apache-2.0
//! A process that ends while models are loaded: past its exit timeout the server calls exit() and unloads nothing.
//!
//! exit() first takes down what was made last, such as the engine's libraries, under the threads that use them, and then the
//! server's gRPC endpoint, which waits for the requests in flight. So before all that the engines stop, and whoever waits for an
//! answer is told. (Whoever waits over HTTP cannot be: the server takes that endpoint down before it calls exit().)

use std::panic::catch_unwind;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// What requests are refused with.
pub const EXITING: &str = "the server is exiting";
/// A step cannot be interrupted; after this long the process ends under it.
const LIMIT: Duration = Duration::from_secs(5);

/// An engine, and the requests that it has.
pub trait Stop: Send + Sync {
    /// Begins to stop, and refuses its requests.
    fn stop(&self);
    /// Waits until it has stopped and every request is answered; false: it has not by then.
    fn wait(&self, until: Instant) -> bool;
}

static RUNNING: Mutex<Vec<Weak<dyn Stop>>> = Mutex::new(Vec::new());

/// `one` is stopped at exit, if it is still there.
pub fn add(one: Weak<dyn Stop>) {
    let mut all = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|other| other.strong_count() > 0);
    all.push(one);
}

/// What is registered last is called first, and the engine's libraries register what takes them down when they first need
/// it: some when a model is loaded, some in the first step. So this is called after each, for every instance; the first of the
/// calls at exit leaves nothing for the others. Where the backend is unloaded before, it is called then, and finds nothing.
pub fn register() {
    // SAFETY: the backend stays loaded until it was called. Without it the process still ends.
    let _ = unsafe { libc::atexit(at_exit) };
}

extern "C" fn at_exit() {
    let _ = catch_unwind(|| {
        let all = std::mem::take(&mut *RUNNING.lock().unwrap_or_else(PoisonError::into_inner));
        let all: Vec<Arc<dyn Stop>> = all.iter().filter_map(Weak::upgrade).collect();
        let until = Instant::now() + LIMIT;
        all.iter().for_each(|one| one.stop());
        for one in &all {
            one.wait(until);
        }
        // What they own is not taken down here, under a thread that may still use it.
        all.into_iter().for_each(std::mem::forget);
    });
}
