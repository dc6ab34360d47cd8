// SPDX-License-Identifier: Apache-2.0

//! Time between windows, which no window reports: the host's own work per
//! window, and the prompts of new requests.

/// Weight of a new gap in the average.
const NEW: f64 = 0.05;
/// What is left of old prompt work after each new request.
const KEEP: f64 = 0.95;

#[derive(Debug, Clone, Default)]
pub struct HostTime {
    /// End of the last window, unless the host has been idle since.
    paused: Option<u64>,
    /// Requests that had their first token to run since then.
    began: u32,
    gap_ns: Option<f64>,
    prompt_ns: f64,
    /// Tokens made in all, when the last window ended.
    pub tokens: u64,
    /// Tokens made of late, which `prompt_ns` is divided by.
    seen_tokens: f64,
}

impl HostTime {
    /// A request had its first token to run: its prompt has been worked on.
    pub fn began(&mut self) {
        self.began += 1;
    }

    /// There was nothing to run.
    pub fn idle(&mut self) {
        self.paused = None;
    }

    /// A window begins. Where prompts run in windows (`carried`), none has run
    /// since the last one.
    pub fn resume(&mut self, now_ns: u64, carried: bool) {
        let mut began = std::mem::take(&mut self.began);
        if carried {
            (began, self.prompt_ns) = (0, 0.0);
        }
        let Some(paused) = self.paused.take() else {
            return;
        };
        let ns = now_ns.saturating_sub(paused) as f64;
        if began == 0 {
            let gap = self.gap_ns.get_or_insert(ns);
            // A host that was away for long had other business.
            *gap += (ns.min(*gap * 10.0 + 1e4) - *gap) * NEW;
        } else {
            let extra = (ns - self.gap_ns()).max(0.0);
            for _ in 0..began.min(64) {
                self.prompt_ns *= KEEP;
                self.seen_tokens *= KEEP;
            }
            self.prompt_ns += extra;
        }
    }

    /// A window ended; `tokens` in all have been made.
    pub fn pause(&mut self, now_ns: u64, tokens: u64) {
        self.paused = Some(now_ns);
        self.seen_tokens += (tokens - self.tokens) as f64;
        self.tokens = tokens;
    }

    pub fn gap_ns(&self) -> f64 {
        self.gap_ns.unwrap_or(0.0)
    }

    /// Prompt work per token made.
    pub fn prompt_ns_per_token(&self) -> f64 {
        if self.seen_tokens > 0.0 {
            self.prompt_ns / self.seen_tokens
        } else {
            0.0
        }
    }
}
