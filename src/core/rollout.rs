// SPDX-License-Identifier: Apache-2.0

//! What a threshold rule would bring, by playing the queue forward on row
//! counts: no requests, no rows, just how many wait where. It mirrors
//! [`super::planner`], and runs in tens of nanoseconds a window.

use super::MAX_RAMPS;
use super::carrier::{Riders, Ways};
use super::exits::KINDS;

/// A threshold rule. Confident rows always exit, the others are held.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Bit r: ramp r is looked at. 0: no early exit.
    pub ramps: u32,
    /// theta: rows held at a ramp that make it flush, as a share of
    /// [`Rule::scale`].
    pub hold: f32,
    /// phi: held rows flush when fewer rows than this are ready, as a share
    /// of the same; at least one row.
    pub ready: f32,
}

impl Rule {
    pub const OFF: Rule = Rule {
        ramps: 0,
        hold: 0.0,
        ready: 0.0,
    };

    /// What the shares refer to: no more than two batches' worth of rows
    /// matter, however many requests there are.
    pub fn scale(requests: usize, batch: usize) -> f32 {
        requests.min(2 * batch) as f32
    }

    pub fn hold_rows(&self, scale: f32) -> u32 {
        ((self.hold * scale).round() as u32).max(1)
    }

    pub fn ready_rows(&self, scale: f32) -> u32 {
        ((self.ready * scale).round() as u32).max(1)
    }
}

/// What a rollout runs on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scene {
    /// Requests in decode, of each kind.
    pub requests: [u32; KINDS],
    /// B
    pub batch: u32,
    /// The same behind the first window, where pending rows come along.
    pub deep_batch: u32,
    /// Prompt work between windows per token emitted: a request that ends is
    /// replaced, and its prompt runs before anything else.
    pub prompt_ns: f64,
    /// Prompt rows in windows, per token emitted.
    pub prompt_rows: f64,
    /// So many of them run at a time.
    pub chunk: f64,
    /// The host's own time per window.
    pub gap_ns: f64,
    /// Windows, in the order in which a row meets them: from the start, or
    /// the last ramp looked at, to the next.
    pub windows: usize,
    pub ns: [f64; MAX_RAMPS + 1],
    pub ns_per_row: [f64; MAX_RAMPS + 1],
    /// The same of a pass over prompt rows that could be cut after the window.
    pub ways: [Ways; MAX_RAMPS],
    /// What an exit there costs such a pass, see [`Riders::exit_ns`].
    pub exit_ns: [f64; MAX_RAMPS],
    /// Chance to exit at the end of each window but the last, in 1/1024, for
    /// each kind.
    pub exits: [[u32; KINDS]; MAX_RAMPS],
    /// What an exit there costs later on, as a pending row of the windows
    /// behind it: each is taken along once, whenever that is.
    pub pending_ns: [f64; MAX_RAMPS],
    /// Tokens that come out, as a share of those that exit or pass the last
    /// layer, see [`super::drafts::Cycle`].
    pub worth: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Outcome {
    pub tokens: f64,
    pub ns: f64,
    /// Windows run: what the rollout cost.
    pub passes: u32,
}

impl Scene {
    /// Without requests, windows or prompts.
    pub const EMPTY: Scene = Scene {
        requests: [0; KINDS],
        batch: 0,
        deep_batch: 0,
        prompt_ns: 0.0,
        prompt_rows: 0.0,
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
    };

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

/// splitmix64
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Successes among `n` trials of chance `p`/1024: 64 at a time, each bit
    /// of p one word of coin flips. Beyond 256 trials, a normal variable.
    pub fn binomial(&mut self, n: u32, p: u32) -> u32 {
        if n == 0 || p == 0 {
            return 0;
        }
        if p >= 1024 {
            return n;
        }
        if n > 256 {
            let share = f64::from(p) / 1024.0;
            // 64 coins have a standard deviation of 4
            let z = (f64::from(self.bits().count_ones()) - 32.0) / 4.0;
            let k = f64::from(n) * share + z * (f64::from(n) * share * (1.0 - share)).sqrt();
            return (k.round().max(0.0) as u32).min(n);
        }
        let mut left = n;
        let mut k = 0;
        while left > 0 {
            let mut hit = 0u64;
            for bit in p.trailing_zeros()..10 {
                let coins = self.bits();
                hit = if p >> bit & 1 == 1 {
                    hit | coins
                } else {
                    hit & coins
                };
            }
            let take = left.min(64);
            k += (hit & (u64::MAX >> (64 - take))).count_ones();
            left -= take;
        }
        k
    }
}

/// Plays `hold` (theta) and `ready` (phi), in rows, until `tokens` were
/// emitted after `warm` others, in at most `passes` windows.
///
/// What counts lies between two flushes to the last layer, so that rows held
/// at the end were held at the start; without two, it is all after `warm`.
/// Play starts shortly before a flush, with the rows that are held longest.
pub fn play(
    scene: &Scene,
    hold: u32,
    ready: u32,
    warm: u32,
    tokens: u32,
    passes: u32,
    seed: u64,
) -> Outcome {
    let last = scene.windows - 1;
    let mut rng = Rng(seed);
    // rows[k]: rows that wait for window k, of each kind; held[k]: of all
    let mut rows = [[0u32; KINDS]; MAX_RAMPS + 1];
    rows[0] = scene.requests;
    let mut held = [0u32; MAX_RAMPS + 1];
    let mut waiting = scene.requests[0] + scene.requests[1];
    let mut all_held = 0u32;
    if last > 0 && scene.exits[last - 1] != [0; KINDS] {
        all_held = (hold - hold.div_ceil(8)).min(waiting / 2);
        let often = all_held.saturating_sub(rows[0][0]);
        rows[last] = [all_held - often, often];
        rows[0] = [rows[0][0] - rows[last][0], rows[0][1] - rows[last][1]];
        held[last] = all_held;
        waiting -= all_held;
    }
    let mut made = 0u64;
    let mut clock = 0.0f64;
    let (mut made0, mut clock0) = (0u64, 0.0f64);
    let mut started = warm == 0;
    // Tokens and time at the first and the latest flush that count.
    let mut first = None;
    let mut latest = (0u64, 0.0f64);
    let mut n = 0;
    // Prompt rows that wait, and those on their way with the window that they
    // are in front of.
    let mut owed = 0.0f64;
    let mut transit = None;
    let goal = u64::from(warm) + u64::from(tokens);
    while made < goal && n < passes {
        if !started && (made >= u64::from(warm) || n >= passes / 4) {
            started = true;
            (made0, clock0) = (made, clock);
        }
        n += 1;
        let (k, prompts) = match transit.take() {
            Some(on_the_way) => on_the_way,
            None if owed > 0.0 && owed >= scene.chunk => (0, std::mem::take(&mut owed)),
            None => (choose(&held[..=last], all_held, waiting, hold, ready), 0.0),
        };
        let there = if k == 0 { waiting } else { held[k] };
        let b = there.min(if k == 0 {
            scene.batch
        } else {
            scene.deep_batch
        });
        // In the order of their arrival: the kinds as they are mixed there.
        let often = if b == there || there == 0 {
            rows[k][1]
        } else {
            let (rows, b, there) = (u64::from(rows[k][1]), u64::from(b), u64::from(there));
            ((rows * b + there / 2) / there) as u32
        };
        let taken = [b - often, often];
        if k == 0 {
            waiting -= b;
        } else {
            held[k] -= b;
            all_held -= b;
        }
        // Prompt rows, and where those that go on with them are at the end.
        let mut end = k;
        if prompts > 0.0 {
            if k == last {
                // The last window is the rest of the one before.
                let before = k.checked_sub(1).map(|k| scene.ways[k].rest);
                clock += before.unwrap_or(scene.ways[0].whole).per_prompt * prompts;
            } else if scene.cut(k, prompts, taken, held[k + 1], hold) {
                let ways = &scene.ways[k];
                clock += ways.head.per_prompt * prompts;
                if b == 0 {
                    clock -= ways.ramp_ns;
                }
                transit = Some((k + 1, prompts));
            } else {
                let whole = scene.ways[k].whole;
                let uncut = whole.at(f64::from(b), prompts);
                clock += uncut - scene.ns[k] - scene.ns_per_row[k] * f64::from(b);
                end = last;
            }
        }
        clock += scene.ns[k] + scene.ns_per_row[k] * f64::from(b) + scene.gap_ns;
        let mut out = 0;
        for (kind, &n) in taken.iter().enumerate() {
            let gone = if end == last {
                n
            } else {
                rng.binomial(n, scene.exits[k][kind])
            };
            rows[k][kind] -= n;
            rows[0][kind] += gone;
            if end < last {
                rows[k + 1][kind] += n - gone;
            }
            out += gone;
        }
        if end < last {
            held[k + 1] += b - out;
            all_held += b - out;
            clock += scene.pending_ns[k] * f64::from(out);
        }
        waiting += out;
        made += u64::from(out);
        owed += f64::from(out) * scene.prompt_rows;
        if k == last && started {
            latest = (made, clock);
            first = first.or(Some(latest));
        }
    }
    if let Some(f) = first.filter(|f| f.0 < latest.0) {
        (made0, clock0) = f;
        (made, clock) = latest;
    }
    let tokens = (made - made0) as f64 * scene.worth;
    Outcome {
        tokens,
        ns: clock - clock0 + tokens * scene.prompt_ns,
        passes: n,
    }
}

/// The window to run next: the deepest that is due, the first one while
/// enough rows are ready, else the fullest, the deepest among equals.
/// `held[0]` is not looked at.
pub fn choose(held: &[u32], all_held: u32, waiting: u32, hold: u32, ready: u32) -> usize {
    if all_held == 0 {
        return 0;
    }
    for k in (1..held.len()).rev() {
        if held[k] >= hold {
            return k;
        }
    }
    if waiting >= ready {
        return 0;
    }
    let mut best = 0;
    for k in (1..held.len()).rev() {
        if held[k] > 0 && (best == 0 || held[k] > held[best]) {
            best = k;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binomial_has_the_right_mean_and_spread() {
        for (n, p) in [(8u32, 205u32), (64, 512), (200, 819), (1000, 300)] {
            let mut rng = Rng(7);
            let (mut s, mut ss) = (0.0, 0.0);
            let m = 20_000;
            for _ in 0..m {
                let k = f64::from(rng.binomial(n, p));
                assert!(k <= f64::from(n));
                s += k;
                ss += k * k;
            }
            let (mean, share) = (s / f64::from(m), f64::from(p) / 1024.0);
            let var = ss / f64::from(m) - mean * mean;
            let expect = f64::from(n) * share;
            assert!(
                (mean / expect - 1.0).abs() < 0.01,
                "{n} {p}: {mean} {expect}"
            );
            assert!(
                (var / (expect * (1.0 - share)) - 1.0).abs() < 0.05,
                "{n} {p}: {var}"
            );
        }
        assert_eq!(Rng(1).binomial(10, 0), 0);
        assert_eq!(Rng(1).binomial(10, 1024), 10);
    }

    /// The published grid: memory-bound, 64 requests in batches of 64,
    /// a = 0.25, p = 0.8: 1.69 times no early exit at theta = 35.
    #[test]
    fn agrees_with_the_reference_simulation() {
        let (t0, t1) = (1.0, 0.002);
        let mut scene = Scene {
            requests: [64, 0],
            batch: 64,
            deep_batch: 64,
            windows: 2,
            exits: [[819, 0]; MAX_RAMPS],
            ..Scene::EMPTY
        };
        scene.ns[0] = 0.25 * t0 + 0.02 * t0;
        scene.ns_per_row[0] = 0.25 * t1;
        scene.ns[1] = 0.75 * t0;
        scene.ns_per_row[1] = 0.75 * t1;
        let off = 64.0 / (t0 + t1 * 64.0);
        let got = play(&scene, 35, 1, 200, 40_000, 1 << 20, 3).rate() / off;
        assert!((got / 1.689 - 1.0).abs() < 0.015, "{got}");
        // Held to the last: a cycle makes 64 / 0.2 tokens in E[max of 64
        // geometric variables] = 21.8 shallow windows and one deep one.
        let paper = play(&scene, 64, 1, 200, 800_000, 1 << 22, 3).rate() / off;
        assert!((paper / 0.818 - 1.0).abs() < 0.015, "{paper}");
    }
}
