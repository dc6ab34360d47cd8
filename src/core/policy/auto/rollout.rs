// SPDX-License-Identifier: Apache-2.0

//! The rate that a threshold rule would bring, by playing the queue forward on row
//! counts: no requests, no rows, just how many wait where. It mirrors
//! [`crate::core::flush::planner`], and runs in tens of nanoseconds a window.

use crate::core::MAX_RAMPS;
use crate::core::estimate::carrier::{Riders, Ways};
use crate::core::estimate::exit_rate::HABITS;
use crate::core::policy::rule::MOST_DRAFTS;
use crate::core::policy::rule::choose;
use crate::core::random::Rng;

/// Kinds of rows. First the habits of requests whose thresholds are given; then the
/// rows of those whose thresholds are learned, by how many drafts are before them.
pub const KINDS: usize = HABITS + LEVELS;
/// From no draft to the most.
pub const LEVELS: usize = MOST_DRAFTS as usize + 1;

/// The numbers that a rollout runs on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scene {
    /// Requests in decode, of each kind at the start.
    pub requests: [u32; KINDS],
    /// B
    pub batch: u32,
    /// B behind the first window, where pending rows come along.
    pub deep_batch: u32,
    /// Prompt work between windows per token emitted: a request that ends is
    /// replaced, and its prompt runs before anything else.
    pub prompt_ns: f64,
    /// Prompt rows in windows, per token emitted.
    pub prompt_rows: f64,
    /// Time of one in a full pass.
    pub prompt_row_ns: f64,
    /// So many of them run at a time.
    pub chunk: f64,
    /// The host's own time per window.
    pub gap_ns: f64,
    /// Windows, in the order in which a row meets them: from the start, or
    /// the last ramp looked at, to the next.
    pub windows: usize,
    pub ns: [f64; MAX_RAMPS + 1],
    pub ns_per_row: [f64; MAX_RAMPS + 1],
    /// Times of a pass over prompt rows that could be cut after the window.
    pub ways: [Ways; MAX_RAMPS],
    /// Cost of an exit there to such a pass, see [`Riders::exit_ns`].
    pub exit_ns: [f64; MAX_RAMPS],
    /// Chance to exit at the end of each window but the last, in 1/1024, for
    /// each kind.
    pub exits: [[u32; KINDS]; MAX_RAMPS],
    /// Cost of an exit there later on, as a pending row of the windows
    /// behind it: each is taken along once, whenever that is.
    pub pending_ns: [f64; MAX_RAMPS],
    /// Tokens that come out, as a share of those that exit or pass the last
    /// layer, of requests whose thresholds are given; see
    /// [`crate::core::estimate::acceptance::Cycle`].
    pub worth: f64,
    /// Tokens that come out when a row with so many drafts before it has passed the
    /// last layer, of requests whose thresholds are learned.
    pub out: [f64; LEVELS],
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Outcome {
    pub tokens: f64,
    pub ns: f64,
}

impl Scene {
    /// Without requests, windows or prompts.
    pub const EMPTY: Scene = Scene {
        requests: [0; KINDS],
        batch: 0,
        deep_batch: 0,
        prompt_ns: 0.0,
        prompt_rows: 0.0,
        prompt_row_ns: 0.0,
        chunk: 0.0,
        gap_ns: 0.0,
        windows: 0,
        ns: [0.0; MAX_RAMPS + 1],
        ns_per_row: [0.0; MAX_RAMPS + 1],
        ways: [Ways::NONE; MAX_RAMPS],
        exit_ns: [0.0; MAX_RAMPS],
        exits: [[0; KINDS]; MAX_RAMPS],
        pending_ns: [0.0; MAX_RAMPS],
        worth: 1.0,
        out: [1.0; LEVELS],
    };

    /// The kind of a request's next row, and the tokens that come out, where its row
    /// of kind `kind` exits, or has passed the last layer.
    fn after(&self, kind: usize, last: bool) -> (usize, f64) {
        match kind.checked_sub(HABITS) {
            None => (kind, self.worth),
            Some(drafts) if last => (HABITS, self.out[drafts]),
            Some(drafts) => (HABITS + (drafts + 1).min(LEVELS - 1), 0.0),
        }
    }

    /// Whether a pass over `prompts` prompt rows and `rows` of each kind is cut
    /// after window `k`, where `held` rows are held.
    fn cut(&self, k: usize, prompts: f64, rows: [u32; KINDS], held: u32, flush: u32) -> bool {
        let n = rows.iter().sum::<u32>();
        if n == 0 && held == 0 {
            return false;
        }
        let mut exits = 0.0;
        for (rows, p) in rows.iter().zip(self.exits[k]) {
            exits += f64::from(*rows) * f64::from(p) / 1024.0;
        }
        let stay = f64::from(n) - exits;
        let beside = (f64::from(self.deep_batch) - stay).max(0.0);
        self.ways[k].cut_pays(&Riders {
            prompts,
            rows: n.into(),
            stay,
            held: f64::from(held).min(beside),
            flush: flush.min(self.batch).into(),
            exit_ns: self.exit_ns[k],
        })
    }
}

impl Outcome {
    pub fn rate(&self) -> f64 {
        if self.ns > 0.0 {
            self.tokens / self.ns
        } else {
            0.0
        }
    }
}

/// A rule to play: theta and phi in rows, until `tokens` were emitted after `warm`
/// others, in `windows` windows at most.
#[derive(Debug, Clone, Copy)]
pub struct Game {
    pub hold: u32,
    pub ready: u32,
    pub warm: u32,
    pub tokens: u32,
    pub windows: u32,
    pub seed: u64,
}

/// A rule played on a scene, some windows at a time.
///
/// The part that counts lies between two flushes to the last layer, so that rows
/// held at the end were held at the start; without two, it is all after `warm`.
/// Play starts shortly before a flush, with the rows that are held longest.
#[derive(Debug, Clone)]
pub struct Rollout {
    game: Game,
    rng: Rng,
    /// Rows that wait for window k, of each kind, and of all.
    rows: [[u32; KINDS]; MAX_RAMPS + 1],
    held: [u32; MAX_RAMPS + 1],
    waiting: u32,
    all_held: u32,
    /// Tokens and time so far, and when they began to count.
    now: (f64, f64),
    start: (f64, f64),
    started: bool,
    /// At the first and the latest flush that count.
    first: Option<(f64, f64)>,
    latest: (f64, f64),
    windows: u32,
    /// Prompt rows that wait, and those on their way with the window that they
    /// are in front of.
    owed: f64,
    transit: Option<(usize, f64)>,
}

impl Rollout {
    pub fn new(scene: &Scene, game: Game) -> Self {
        let last = scene.windows - 1;
        let mut r = Rollout {
            game,
            rng: Rng(game.seed),
            rows: [[0; KINDS]; MAX_RAMPS + 1],
            held: [0; MAX_RAMPS + 1],
            waiting: scene.requests.iter().sum(),
            all_held: 0,
            now: (0.0, 0.0),
            start: (0.0, 0.0),
            started: game.warm == 0,
            first: None,
            latest: (0.0, 0.0),
            windows: 0,
            owed: 0.0,
            transit: None,
        };
        r.rows[0] = scene.requests;
        if last > 0 && scene.exits[last - 1] != [0; KINDS] {
            let held = (game.hold - game.hold.div_ceil(8)).min(r.waiting / 2);
            let mut left = held;
            for kind in 0..KINDS {
                let n = left.min(r.rows[0][kind]);
                r.rows[last][kind] = n;
                r.rows[0][kind] -= n;
                left -= n;
            }
            (r.held[last], r.all_held) = (held, held);
            r.waiting -= held;
        }
        // Half of those that draft have a draft: where requests go deep together only
        // because they began so, a rule is not as good as it looks.
        if scene.exits[0][HABITS] > 0 {
            let drafting = r.rows[0][HABITS] / 2;
            r.rows[0][HABITS] -= drafting;
            r.rows[0][HABITS + 1] += drafting;
        }
        r
    }

    pub fn done(&self) -> bool {
        let goal = f64::from(self.game.warm) + f64::from(self.game.tokens);
        self.now.0 >= goal || self.windows >= self.game.windows
    }

    /// Plays up to `windows` windows; returns how many it played.
    pub fn run(&mut self, scene: &Scene, windows: u32) -> u32 {
        let before = self.windows;
        while self.windows - before < windows && !self.done() {
            self.window(scene);
        }
        self.windows - before
    }

    fn window(&mut self, scene: &Scene) {
        let last = scene.windows - 1;
        let Game {
            hold,
            ready,
            warm,
            windows,
            ..
        } = self.game;
        if !self.started && (self.now.0 >= f64::from(warm) || self.windows >= windows / 4) {
            self.started = true;
            self.start = self.now;
        }
        self.windows += 1;
        let (k, prompts) = match self.transit.take() {
            Some(on_the_way) => on_the_way,
            None if self.owed > 0.0 && self.owed >= scene.chunk => {
                (0, std::mem::take(&mut self.owed))
            }
            None => {
                let held = &self.held[..=last];
                (choose(held, self.all_held, self.waiting, hold, ready), 0.0)
            }
        };
        let taken = self.take(scene, k);
        let b = taken.iter().sum::<u32>();
        // Where rows that go on with prompt rows are at the end.
        let end = if prompts > 0.0 {
            self.carry(scene, k, prompts, taken)
        } else {
            k
        };
        let clock = &mut self.now.1;
        *clock += scene.ns[k] + scene.ns_per_row[k] * f64::from(b) + scene.gap_ns;
        let (mut out, mut tokens) = (0, 0.0);
        for (rows, n) in self.rows[k].iter_mut().zip(taken) {
            *rows -= n;
        }
        for (kind, &n) in taken.iter().enumerate().filter(|t| *t.1 > 0) {
            let gone = if end == last {
                n
            } else {
                self.rng.binomial(n, scene.exits[k][kind])
            };
            let (next, each) = scene.after(kind, end == last);
            self.rows[0][next] += gone;
            if end < last {
                self.rows[k + 1][kind] += n - gone;
            }
            out += gone;
            tokens += each * f64::from(gone);
        }
        if end < last {
            self.held[k + 1] += b - out;
            self.all_held += b - out;
            self.now.1 += scene.pending_ns[k] * f64::from(out);
        }
        self.waiting += out;
        self.now.0 += tokens;
        self.owed += tokens * scene.prompt_rows;
        if k == last && self.started {
            self.latest = self.now;
            self.first = self.first.or(Some(self.now));
        }
    }

    /// Rows of each kind for window `k`, in the order of their arrival: the kinds
    /// as they are mixed there.
    fn take(&mut self, scene: &Scene, k: usize) -> [u32; KINDS] {
        let (there, most) = match k {
            0 => (self.waiting, scene.batch),
            _ => (self.held[k], scene.deep_batch),
        };
        let b = there.min(most);
        let mut taken = self.rows[k];
        if b < there {
            let (b, there) = (u64::from(b), u64::from(there));
            // Of the kinds from this one on: how many there are, and are taken.
            let (mut rows, mut before) = (0, 0);
            for n in taken.iter_mut().rev() {
                rows += u64::from(*n);
                let upto = (rows * b + there / 2) / there;
                *n = (upto - before) as u32;
                before = upto;
            }
        }
        if k == 0 {
            self.waiting -= b;
        } else {
            self.held[k] -= b;
            self.all_held -= b;
        }
        taken
    }

    /// Adds the time that prompt rows take beside the rows of window `k`, and
    /// returns the window after which the rows are.
    fn carry(&mut self, scene: &Scene, k: usize, prompts: f64, taken: [u32; KINDS]) -> usize {
        let last = scene.windows - 1;
        let rows = f64::from(taken.iter().sum::<u32>());
        let clock = &mut self.now.1;
        if k == last {
            // The last window is the rest of the one before.
            let before = k.checked_sub(1).map(|k| scene.ways[k].rest);
            *clock += before.unwrap_or(scene.ways[0].whole).per_prompt * prompts;
            return k;
        }
        let ways = &scene.ways[k];
        if scene.cut(k, prompts, taken, self.held[k + 1], self.game.hold) {
            *clock += ways.head.per_prompt * prompts;
            if rows == 0.0 {
                *clock -= ways.ramp_ns;
            }
            self.transit = Some((k + 1, prompts));
            return k;
        }
        *clock += ways.whole.at(rows, prompts) - scene.ns[k] - scene.ns_per_row[k] * rows;
        last
    }

    pub fn outcome(&self, scene: &Scene) -> Outcome {
        let (from, to) = match self.first {
            Some(first) if first.0 < self.latest.0 => (first, self.latest),
            _ => (self.start, self.now),
        };
        let tokens = to.0 - from.0;
        Outcome {
            tokens,
            ns: to.1 - from.1 + tokens * scene.prompt_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published grid: memory-bound, 64 requests in batches of 64,
    /// a = 0.25, p = 0.8: 1.69 times no early exit at theta = 35.
    #[test]
    fn agrees_with_the_reference_simulation() {
        let (t0, t1) = (1.0, 0.002);
        let mut scene = Scene {
            batch: 64,
            deep_batch: 64,
            windows: 2,
            ..Scene::EMPTY
        };
        (scene.requests[0], scene.exits[0][0]) = (64, 819);
        scene.ns[0] = 0.25 * t0 + 0.02 * t0;
        scene.ns_per_row[0] = 0.25 * t1;
        scene.ns[1] = 0.75 * t0;
        scene.ns_per_row[1] = 0.75 * t1;
        let off = 64.0 / (t0 + t1 * 64.0);
        let rate = |hold, tokens| {
            let game = Game {
                hold,
                ready: 1,
                warm: 200,
                tokens,
                windows: u32::MAX,
                seed: 3,
            };
            let mut r = Rollout::new(&scene, game);
            // In parts, which makes no difference.
            while r.run(&scene, 7) > 0 {}
            let parts = r.outcome(&scene);
            let mut r = Rollout::new(&scene, game);
            r.run(&scene, u32::MAX);
            assert_eq!(parts, r.outcome(&scene));
            parts.rate() / off
        };
        let got = rate(35, 40_000);
        assert!((got / 1.689 - 1.0).abs() < 0.015, "{got}");
        // Held to the last: a cycle makes 64 / 0.2 tokens in E[max of 64
        // geometric variables] = 21.8 shallow windows and one deep one.
        let paper = rate(64, 800_000);
        assert!((paper / 0.818 - 1.0).abs() < 0.015, "{paper}");
    }
}
