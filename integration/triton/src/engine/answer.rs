// SPDX-License-Identifier: Apache-2.0
//! What a request is told: events, the last of which is its end.

use super::{Event, Figures, Finish};
use crate::triton::error::Failure;

/// Where a request's events go.
pub type Out = Box<dyn Fn(Event) + Send>;

/// A request's way out. A request that is dropped without an end gets one.
pub struct Answer {
    out: Out,
    ended: bool,
}

impl Answer {
    pub fn new(out: Out) -> Self {
        Self { out, ended: false }
    }

    pub fn send(&mut self, event: Event) {
        self.ended |= match &event {
            Event::Started { .. } => false,
            Event::Token { end, .. } => end.is_some(),
            Event::Failed(_) => true,
        };
        (self.out)(event);
    }

    pub fn fail(&mut self, failure: Failure) {
        self.send(Event::Failed(failure));
    }

    /// The client went away before the first token.
    pub fn cancel(&mut self) {
        self.send(Event::Token {
            token: None,
            text: String::new(),
            end: Some((Finish::Cancelled, Figures::default())),
        });
    }
}

/// What requests are refused with when the engine is gone.
pub const GONE: &str = "the model's engine has ended by a panic; load the model again";

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.ended {
            self.fail(Failure::unavailable(GONE));
        }
    }
}
