// SPDX-License-Identifier: Apache-2.0

//! The time that probes lose, and its bounds.

/// Bounds of what probes lose: a share of all time so far, and on top of it so
/// many full passes at the start.
const PROBE_SHARE: f64 = 0.01;
const PROBE_PASSES: f64 = 0.1;
/// Weight of a step in the usual time of a token.
const USUAL: f64 = 1.0 / 32.0;

/// Time that probes lose: where a pass takes long, so does a probe, and a
/// window of a shape that never ran before may take several times as long.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Losses {
    /// Of all steps.
    elapsed_ns: f64,
    lost_ns: f64,
    /// Usual time and tokens of late, without probes.
    usual_ns: f64,
    usual_tokens: f64,
    /// Of the probe under way.
    probe_ns: f64,
    probe_tokens: f64,
    done: f64,
    /// Loss of the last probe of full passes, and of ramps.
    last_ns: [f64; 2],
}

impl Losses {
    pub(super) fn step(&mut self, ns: f64, tokens: f64, probe: bool) {
        self.elapsed_ns += ns;
        if probe {
            self.probe_ns += ns;
            self.probe_tokens += tokens;
        } else {
            self.usual_ns += (ns - self.usual_ns) * USUAL;
            self.usual_tokens += (tokens - self.usual_tokens) * USUAL;
        }
    }

    pub(super) fn begin(&mut self, done: f64) {
        (self.probe_ns, self.probe_tokens, self.done) = (0.0, 0.0, done);
    }

    /// A probe ended; rows that it left held are worth the part that ran.
    pub(super) fn end(&mut self, ramps: bool, done: f64) {
        if self.usual_tokens <= 0.0 {
            return;
        }
        let tokens = self.probe_tokens + done - self.done;
        let loss = self.probe_ns - tokens * self.usual_ns / self.usual_tokens;
        self.last_ns[usize::from(ramps)] = loss.max(0.0);
        self.lost_ns += loss.max(0.0);
    }

    /// Another probe that loses what the last one did is within bounds.
    pub(super) fn allow(&self, ramps: bool, pass_ns: f64) -> bool {
        let next = self.lost_ns + self.last_ns[usize::from(ramps)];
        next <= PROBE_SHARE * self.elapsed_ns + PROBE_PASSES * pass_ns
    }
}
