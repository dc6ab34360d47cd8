// SPDX-License-Identifier: Apache-2.0

//! One run: the engine, a virtual clock, a host that only does sums.

use std::collections::{HashMap, VecDeque};

use anyhow::{Context, Result, bail};
use drex::core::config::{Config, Fill, Policy, Quality};
use drex::core::decision::Decision;
use drex::core::estimate::profile::{Profile, Work};
use drex::core::metric::{Metric, Score};
use drex::core::policy::rule::RowRule;
use drex::core::rows::requests::RequestConfig;
use drex::core::scheduler::{Agrees, Scheduler, Step, StepRow};

use crate::draw::{normal, purpose, uniform};
use crate::workload::{Arrivals, Confidence, TURN_SHIFT, Workload};

/// A policy, or a fixed threshold rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Contender {
    pub name: String,
    pub policy: Policy,
    /// theta and phi of `hold`; 0: its own rule.
    pub theta: u32,
    pub phi: u32,
}

impl Contender {
    /// A policy's name, or hold:THETA[:PHI].
    pub fn parse(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or("");
        let policy = match name {
            "off" => Policy::Off,
            "eager" => Policy::Eager,
            "lazy" => Policy::Lazy,
            "median" => Policy::Median,
            "mean" => Policy::Mean,
            "latency" => Policy::Latency,
            "hold" => Policy::Hold,
            "art" => Policy::Art,
            "auto" => Policy::Auto,
            _ => bail!(
                "--policies: {text:?} is not known; expected off, auto, hold[:THETA[:PHI]], latency, art, lazy, \
                 eager, median or mean"
            ),
        };
        let mut number = |what| match parts.next() {
            None => Ok(0),
            Some(n) => n
                .parse()
                .with_context(|| format!("--policies: {what} of {text:?} is no number")),
        };
        let (theta, phi) = (number("THETA")?, number("PHI")?);
        if policy != Policy::Hold && theta > 0 {
            bail!("--policies: {text:?}: only hold takes THETA and PHI");
        }
        Ok(Contender {
            name: text.into(),
            policy,
            theta,
            phi,
        })
    }

    pub fn rule(theta: u32, phi: u32) -> Self {
        Contender {
            name: format!("hold:{theta}:{phi}"),
            policy: Policy::Hold,
            theta,
            phi,
        }
    }
}

/// How holes are filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filling {
    pub fill: Fill,
    /// Pending rows of a request at most.
    pub max_pending: u32,
    /// Chance that a draft is what the full model says.
    pub accept: f64,
    /// Chance that a token differs from the full model's where all tokens of its answer before it left holes that were filled
    /// with something else than the full model's K/V; less where fewer did.
    pub harm: f64,
}

/// Rows of one window at most where a setup does not say.
pub const PASS_ROWS: u32 = 512;

impl Filling {
    pub const COPY: Filling = Filling {
        fill: Fill::Copy,
        max_pending: 0,
        accept: 1.0,
        harm: 0.0,
    };

    /// Rows of `requests` in one pass at most.
    pub fn pass_rows(&self, requests: u32) -> u32 {
        requests * (1 + self.max_pending)
    }
}

#[derive(Debug, Clone)]
pub struct Setup {
    pub profile: Profile,
    pub workload: Workload,
    pub batch: u32,
    /// Rows of one window at most, those of prompts included; 0: enough.
    pub pass_rows: u32,
    /// Longest wait of a held row; 0: the engine's own.
    pub max_hold_ns: u64,
    /// Requests in decode or in their prompt at most; more wait.
    pub max_requests: u32,
    pub thresholds: Vec<f32>,
    /// Stop after so many tokens.
    pub tokens: u64,
    /// Standard deviation of the logarithm of times, and the share of windows
    /// that take ten times as long.
    pub noise: f64,
    pub outliers: f64,
    /// The host's own time per window.
    pub gap_ns: f64,
    /// What the engine believes at the start.
    pub start: Option<Profile>,
    pub filling: Filling,
    pub quality: Quality,
}

impl Setup {
    /// All of `max_requests` fit into one batch, from a cold start, without prompts and on a host that takes no time.
    pub fn in_one_batch(
        profile: Profile,
        workload: Workload,
        max_requests: u32,
        filling: Filling,
        tokens: u64,
    ) -> Self {
        Setup {
            batch: filling.pass_rows(max_requests),
            pass_rows: 0,
            max_hold_ns: 0,
            max_requests,
            thresholds: vec![USUAL; profile.ramp_layers.len()],
            tokens,
            noise: 0.0,
            outliers: 0.0,
            gap_ns: 0.0,
            start: None,
            filling,
            quality: Quality::Given,
            profile,
            workload,
        }
    }
}

/// The threshold of those who fix none.
pub const USUAL: f32 = 0.7;

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub name: String,
    pub tokens: u64,
    pub seconds: f64,
    pub tokens_per_s: f64,
    /// Of the second half of the tokens.
    pub late_tokens_per_s: f64,
    pub rows_per_window: f64,
    pub tbt_p50_ms: f64,
    pub tbt_p99_ms: f64,
    pub tbt_max_ms: f64,
    pub finished: u64,
    pub completion_ms: f64,
    /// From arrival to the first token.
    pub ttft_p50_ms: f64,
    pub ttft_p99_ms: f64,
    /// Share of the time of windows with prompt rows, and of the prompt rows
    /// in it.
    pub carrier_share: f64,
    pub prompt_share: f64,
    pub exit_share: f64,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub deadline_misses: u64,
    /// By reason: host, queue, held, run.
    pub misses: [u64; 4],
    /// Misses and tokens by priority, highest first.
    pub by_priority: Vec<(i32, u64, u64)>,
    pub held_max: u64,
    /// Rows whose recorded confidence did not tell.
    pub unknown: u64,
    pub rows_scored: u64,
    /// With fill `verify`: judged, and accepted.
    pub drafts: u64,
    pub accepted: u64,
    /// Tokens that are not what the full model would have said after the same text.
    pub differing: u64,
    /// Tokens of answers that were read once more, and the share of the time that this took.
    pub audited: u64,
    pub audit_share: f64,
    /// The rule at the end, and the throughput that `auto` predicted for it, relative
    /// to full passes.
    pub rule: Option<RowRule>,
    pub predicted: f64,
}

struct Live {
    arrived_ns: f64,
    made: u64,
    /// Drafts that wait to be verified.
    ahead: u64,
    /// How often drafts were taken back: what comes then is another text.
    turn: u64,
    want: Option<u64>,
    last_ns: f64,
    /// Tokens with holes that were not filled with the full model's K/V.
    holes: u64,
    differing: u64,
}

pub fn run(setup: &Setup, contender: &Contender) -> Result<Report> {
    let ramps = setup.profile.ramp_layers.len();
    let w = &setup.workload;
    let mut engine = Scheduler::new(Config {
        n_layers: setup.profile.n_layers,
        ramp_layers: setup.profile.ramp_layers.clone(),
        thresholds: setup.thresholds.clone(),
        n_slots: setup.filling.pass_rows(setup.max_requests),
        max_requests: setup.max_requests,
        max_batch: setup.batch,
        max_pass_rows: setup.batch.max(match setup.pass_rows {
            0 => PASS_ROWS,
            n => n,
        }),
        policy: contender.policy,
        metric: Metric::Gap,
        fill: setup.filling.fill,
        max_pending: setup.filling.max_pending,
        flush_rows: contender.theta,
        min_ready: contender.phi,
        max_hold_ns: setup.max_hold_ns,
        token_deadline_ns: w.token_deadline_ns,
        seed: w.seed,
        art_ratio: None,
        quality: setup.quality,
    })?;
    if let Some(p) = &setup.start {
        engine.load_profile(p)?;
    }
    if contender.policy == Policy::Art {
        calibrate(&mut engine, setup)?;
    }
    let mut host = Host {
        setup,
        live: HashMap::new(),
        waiting: VecDeque::new(),
        prompts: VecDeque::new(),
        transit: Vec::new(),
        next_id: 0,
        next_at: 0.0,
        clock: 0.0,
    };
    let mut intervals: Vec<f32> = Vec::new();
    let mut firsts: Vec<f32> = Vec::new();
    let (mut in_carriers, mut in_prompts) = (0.0, 0.0);
    let mut completions = (0u64, 0.0f64);
    let (mut made, mut half) = (0u64, (0u64, 0.0f64));
    let mut scores: Vec<Score> = Vec::new();
    let mut out = Report {
        name: contender.name.clone(),
        ..Report::default()
    };
    let mut classes: Vec<(i32, u64, u64)> = w.priorities.iter().map(|p| (p.0, 0, 0)).collect();
    classes.sort_by_key(|c| std::cmp::Reverse(c.0));
    let mut steps = 0u64;
    let mut in_audits = 0.0;
    while made < setup.tokens {
        host.admit(&mut engine)?;
        let prompts = host.prompt_rows();
        let Some(step) = engine.plan(host.clock as u64, setup.batch as usize, prompts)? else {
            if !host.idle() {
                break;
            }
            continue;
        };
        let bound = |layer: u32| match layer {
            0 => 0,
            l => setup
                .profile
                .ramp_layers
                .iter()
                .position(|&r| r == l)
                .map_or(ramps + 1, |i| i + 1),
        };
        let rows = engine.step_rows().len();
        let cells: u64 = engine
            .step_rows()
            .iter()
            .map(|r| {
                let l = &host.live[&r.id];
                w.prompt(r.id) + l.made + l.ahead - u64::from(r.back) + 1
            })
            .sum();
        let (first, last) = (bound(step.layer_begin), bound(step.layer_end));
        let work = Work {
            rows: rows as f64,
            cells: cells as f64,
            prompts: step.prompt_rows.into(),
        };
        let mut ns = setup.profile.window(first, last, work);
        if step.prompt_rows > 0 {
            in_carriers += ns;
            in_prompts += work.prompts * setup.profile.prompt_row(first, last);
        }
        if setup.noise > 0.0 {
            ns *= (setup.noise * normal(w.seed, purpose::NOISE, steps)).exp();
        }
        if setup.outliers > 0.0 && uniform(w.seed, purpose::OUTLIER, steps, 0) < setup.outliers {
            ns *= 10.0;
        }
        steps += 1;
        let began = host.clock;
        host.clock += ns;
        if let Some(ramp) = step.ramp.filter(|_| rows > 0) {
            scores.clear();
            for r in engine.step_rows() {
                if r.back > 0 {
                    scores.push(Score::NONE);
                    continue;
                }
                let token = host.live[&r.id].token(0);
                let mut confidence = w.confidence(r.id, token, ramp, began);
                out.rows_scored += 1;
                if confidence.is_nan() && matches!(w.confidence, Confidence::Recorded(_)) {
                    out.unknown += 1;
                    confidence = w.drawn(r.id, token, ramp);
                }
                let right = w.right(r.id, token, setup.filling.accept);
                scores.push(Score {
                    confidence,
                    token: i32::from(!right),
                });
            }
            engine.ramp(&scores)?;
        } else if engine.step_rows().iter().any(StepRow::is_draft) {
            let right: Vec<Agrees> = engine
                .step_rows()
                .iter()
                .map(|r| {
                    let token = host.live[&r.id].token(r.back);
                    match w.right(r.id, token, setup.filling.accept) {
                        true => Agrees::Yes,
                        false => Agrees::No,
                    }
                })
                .collect();
            engine.verify(right.len(), |i| Ok(right[i]))?;
        }
        // Tokens for the client, and who goes on.
        let mut done: Vec<(u64, u64)> = Vec::new();
        for r in engine.step_rows() {
            let l = host.live.get_mut(&r.id).context("a row of nobody")?;
            let token = l.token(r.back);
            let harmed = l.holes > 0 && {
                let share = l.holes as f64 / (l.made + 1) as f64;
                uniform(w.seed, purpose::HARM, r.id, token) < setup.filling.harm * share
            };
            let own = r.back == 0 && r.decision != Decision::Drop;
            if step.ramp.is_some() && r.decision == Decision::Exit && r.fill != Fill::Verify {
                let wrong = !w.right(r.id, token, setup.filling.accept);
                l.differing += u64::from(wrong || harmed);
                l.holes += u64::from(!r.fill.keeps());
            } else if step.ramp.is_none() && own {
                l.differing += u64::from(harmed);
            }
            let n = match (step.ramp, r.decision) {
                (Some(_), Decision::Exit) if r.fill == Fill::Verify => {
                    l.ahead += 1;
                    0
                }
                (Some(_), Decision::Exit) => 1,
                (Some(_), _) => continue,
                (None, Decision::Accept) => {
                    l.ahead -= 1;
                    1
                }
                (None, Decision::Replace) => {
                    (l.ahead, l.turn) = (0, l.turn + 1);
                    1
                }
                (None, _) => u64::from(r.back == 0 && r.decision != Decision::Drop),
            };
            match done.last_mut() {
                Some(d) if d.0 == r.id => d.1 += n,
                _ => done.push((r.id, n)),
            }
        }
        if step.ramp.is_none() {
            // Ramps that are wrong said 1.
            engine.teach(|_| 0);
        }
        engine.complete(
            host.clock as u64,
            ns as u64,
            if w.has_prompts() { cells } else { 0 },
        )?;
        host.prompts_ran(&mut engine, &step)?;
        for (id, n) in done {
            let l = host.live.get_mut(&id).context("a token of nobody")?;
            // A host stops at the last token, whatever was drafted behind it.
            let n = n.min(l.want.map_or(n, |want| want - l.made));
            made += n;
            if half.0 == 0 && made >= setup.tokens / 2 {
                half = (made, host.clock);
            }
            l.made += n;
            if n > 0 && l.made == n && w.has_prompts() {
                firsts.push((host.clock - l.arrived_ns) as f32);
            }
            if n > 0 {
                intervals.push((host.clock - l.last_ns) as f32);
                l.last_ns = host.clock;
                let class = classes.iter_mut().find(|c| c.0 == w.priority(id));
                if let Some(class) = class {
                    class.2 += n;
                }
            }
            if l.want.is_some_and(|n| l.made >= n) {
                completions.0 += 1;
                completions.1 += host.clock - l.arrived_ns;
                let missed = u64::from(engine.request(id)?.deadline_misses);
                if let Some(class) = classes.iter_mut().find(|c| c.0 == w.priority(id)) {
                    class.1 += missed;
                }
                out.differing += l.differing;
                if engine.audit_due(id)? {
                    let rows = Work {
                        rows: 0.0,
                        cells: 0.0,
                        prompts: l.made as f64,
                    };
                    let ns = setup.profile.window(0, ramps + 1, rows);
                    engine.audit(id, l.made, l.differing)?;
                    out.audited += l.made;
                    in_audits += ns;
                    host.clock += ns;
                }
                engine.remove(id)?;
                host.live.remove(&id);
                if let Arrivals::Closed(_) = w.arrivals {
                    host.waiting.push_back((host.next_id, host.clock));
                    host.next_id += 1;
                }
            } else if l.ahead > 0 && l.want.is_some_and(|w| l.made + l.ahead >= w) {
                // Drafts enough for all that is wanted.
                engine.settle(id, host.clock as u64)?;
            } else {
                engine.ready(id, host.clock as u64)?;
            }
        }
        host.clock += setup.gap_ns;
    }
    for (&id, l) in &host.live {
        out.differing += l.differing;
        let missed = u64::from(engine.request(id)?.deadline_misses);
        if let Some(class) = classes.iter_mut().find(|c| c.0 == w.priority(id)) {
            class.1 += missed;
        }
    }
    let c = engine.counters();
    // Of a request that is done, the engine counts tokens that are not wanted.
    let over = c.tokens.wrapping_sub(made);
    if over > c.drafts {
        bail!("the engine counted {} tokens, the host {made}", c.tokens);
    }
    (out.drafts, out.accepted) = (c.drafts, c.accepted);
    out.audit_share = in_audits / host.clock;
    out.tokens = made;
    out.seconds = host.clock / 1e9;
    out.tokens_per_s = made as f64 / out.seconds;
    out.late_tokens_per_s = (made - half.0) as f64 / ((host.clock - half.1) / 1e9);
    out.rows_per_window = c.step_rows as f64 / c.steps.max(1) as f64;
    let at = |all: &mut [f32], share: f64| {
        if all.is_empty() {
            return 0.0;
        }
        let k = ((all.len() - 1) as f64 * share) as usize;
        f64::from(*all.select_nth_unstable_by(k, f32::total_cmp).1) / 1e6
    };
    let tbt = &mut intervals[..];
    (out.tbt_p50_ms, out.tbt_p99_ms, out.tbt_max_ms) = (at(tbt, 0.5), at(tbt, 0.99), at(tbt, 1.0));
    (out.ttft_p50_ms, out.ttft_p99_ms) = (at(&mut firsts, 0.5), at(&mut firsts, 0.99));
    (out.carrier_share, out.prompt_share) = (in_carriers / host.clock, in_prompts / host.clock);
    out.finished = completions.0;
    out.completion_ms = completions.1 / completions.0.max(1) as f64 / 1e6;
    // Drafts that were taken back left, too.
    let left = made.max(1) + c.dropped;
    out.exit_share = c.exits.iter().sum::<u64>() as f64 / left as f64;
    out.involuntary_exits = c.involuntary_exits;
    out.involuntary_stays = c.involuntary_stays;
    out.deadline_misses = c.deadline_misses;
    out.misses = c.misses;
    out.by_priority = classes;
    out.held_max = c.held_rows_max;
    out.rule = Some(engine.chosen_rule());
    let (rate, off) = engine.auto().predicted();
    out.predicted = rate / off;
    Ok(out)
}

/// `art` compares windows with full passes, which it never runs: a host times
/// some before it serves.
fn calibrate(engine: &mut Scheduler, setup: &Setup) -> Result<()> {
    let p = &setup.profile;
    let mut bounds = vec![0];
    bounds.extend_from_slice(&p.ramp_layers);
    bounds.push(p.n_layers);
    let last = bounds.len() - 1;
    let most = setup.batch.min(setup.max_requests);
    for _ in 0..10 {
        for rows in [1, most.div_ceil(2), most] {
            for (i, j) in (0..last).map(|i| (i, i + 1)).chain([(0, last)]) {
                let ns = p.time(i, j, f64::from(rows), 0.0);
                engine.observe(bounds[i], bounds[j], rows, 0, 0, (ns as u64).max(1))?;
            }
        }
    }
    Ok(())
}

struct Host<'a> {
    setup: &'a Setup,
    live: HashMap<u64, Live>,
    waiting: VecDeque<(u64, f64)>,
    /// Requests whose prompt waits at layer 0, and rows left of it.
    prompts: VecDeque<(u64, u64)>,
    /// The same of rows on their way.
    transit: Vec<(u64, u64)>,
    next_id: u64,
    /// When request `next_id` comes.
    next_at: f64,
    clock: f64,
}

impl Live {
    /// The row runs the token after so many, of a text that has changed so
    /// often.
    fn token(&self, back: u32) -> u64 {
        (self.made + self.ahead - u64::from(back)) | self.turn << TURN_SHIFT
    }
}

impl Host<'_> {
    fn prompt_rows(&self) -> u32 {
        let all: u64 = self.prompts.iter().map(|p| p.1).sum();
        all.min(u64::from(u32::MAX)) as u32
    }

    /// A window with prompt rows ran: those of whole prompts at the last layer
    /// make their requests ready.
    fn prompts_ran(&mut self, engine: &mut Scheduler, step: &Step) -> Result<()> {
        let mut left = u64::from(step.prompt_rows);
        if step.layer_begin == 0 {
            while left > 0 {
                let (id, rows) = self.prompts.front_mut().context("prompt rows of nobody")?;
                let n = left.min(*rows);
                (*rows, left) = (*rows - n, left - n);
                self.transit.push((*id, n));
                if *rows == 0 {
                    self.prompts.pop_front();
                }
            }
        }
        let on_the_way: u64 = self.transit.iter().map(|t| t.1).sum();
        if step.prompt_rows > 0 && on_the_way != u64::from(step.prompt_rows) {
            bail!(
                "the step has {} prompt rows, the host {on_the_way}",
                step.prompt_rows
            );
        }
        if step.ramp.is_none() {
            for (id, _) in std::mem::take(&mut self.transit) {
                if self.prompts.front().is_some_and(|p| p.0 == id) {
                    continue;
                }
                let l = self.live.get_mut(&id).context("a prompt of nobody")?;
                l.last_ns = self.clock;
                engine.ready(id, self.clock as u64)?;
            }
        }
        Ok(())
    }

    /// Takes in who has come and fits.
    fn admit(&mut self, engine: &mut Scheduler) -> Result<()> {
        let w = &self.setup.workload;
        if let (Arrivals::Closed(n), 0) = (&w.arrivals, self.next_id) {
            self.waiting.extend((0..u64::from(*n)).map(|id| (id, 0.0)));
            self.next_id = u64::from(*n);
        }
        while let Some(at) = self.upcoming() {
            if at > self.clock {
                break;
            }
            self.waiting.push_back((self.next_id, at));
            self.next_id += 1;
            self.next_at = at + w.gap_ns(self.next_id, at);
        }
        while self.live.len() < self.setup.max_requests as usize {
            let Some((id, arrived_ns)) = self.waiting.pop_front() else {
                break;
            };
            engine.add(RequestConfig {
                id,
                metric: None,
                threshold: None,
                fill: None,
                quality: None,
                token_deadline_ns: 0,
                request_deadline_ns: w.request_deadline_ns,
                max_tokens: w.tokens(id).unwrap_or(0),
                priority: w.priority(id),
            })?;
            self.live.insert(
                id,
                Live {
                    arrived_ns,
                    made: 0,
                    ahead: 0,
                    turn: 0,
                    want: w.tokens(id),
                    last_ns: self.clock,
                    holes: 0,
                    differing: 0,
                },
            );
            match w.prompt(id) {
                0 => engine.ready(id, self.clock as u64)?,
                n => self.prompts.push_back((id, n)),
            }
        }
        Ok(())
    }

    fn upcoming(&self) -> Option<f64> {
        match &self.setup.workload.arrivals {
            Arrivals::Closed(_) => None,
            Arrivals::Poisson(_) | Arrivals::Bursty(..) => Some(self.next_at),
            Arrivals::Trace(all) => all.get(self.next_id as usize).map(|a| a.0 as f64),
        }
    }

    /// Nothing to run: waits for the next request. False when none will come.
    fn idle(&mut self) -> bool {
        match self.upcoming() {
            Some(at) => {
                self.clock = self.clock.max(at);
                true
            }
            None => false,
        }
    }
}
