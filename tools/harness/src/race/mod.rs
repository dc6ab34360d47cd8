// SPDX-License-Identifier: Apache-2.0
//! A race of servers: the same requests for each contender, in short slices that follow each other in time, with ratios of the
//! slices of one round.

mod page;
mod report;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::process::Progress;

pub use report::{Cell, Report, splice};

use crate::{
    load::{self, Generation},
    machine::{busy_seconds, cpu_seconds},
    metrics::Metrics,
    server::Server,
    stats::{mean, median},
    traffic::{Arrivals, CONTEXT, Chats, Counted, POISSON, Steady, TURNS_OF_CHAT, Text, Traffic},
};

/// The layouts of the unpatched server, of which the faster one of a cell is its baseline.
pub const LAYOUTS: [&str; 2] = ["stock+streams", "stock+unified"];
/// The baseline's name in results.
pub const STOCK: &str = "stock";
/// Poisson arrivals come to a server with so many places, or the number nearest to it that is asked for.
const POISSON_PLACES: usize = 16;

/// A server in the race.
#[derive(Clone)]
pub struct Contender {
    pub name: String,
    pub program: PathBuf,
    /// All but the number of slots and the context.
    pub args: Vec<String>,
}

pub struct Race {
    /// Both layouts of the unpatched server first.
    pub contenders: Vec<Contender>,
    pub traffic: Vec<Traffic>,
    pub in_flight: Vec<usize>,
    /// Of these cells only, by traffic and requests in flight; all where it is empty.
    pub only: Vec<(Traffic, usize)>,
    /// Rounds of each cell.
    pub rounds: usize,
    /// How long the counted part of a slice is to last.
    pub slice: Duration,
    /// When to start no more rounds, once each cell left has had two.
    pub budget: Option<Duration>,
    /// Where prompts are cut from.
    pub corpus: String,
    /// What goes into the report as it is.
    pub about: About,
}

/// What the report says beside the figures.
#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct About {
    pub model: String,
    pub machine: String,
    pub threads: usize,
    pub exit_layers: String,
    pub threshold: f64,
    pub fill: String,
    pub command: String,
    pub date: String,
}

/// What one contender did in one slice.
#[derive(Clone, Default)]
pub struct Sample {
    pub tokens_per_s: f64,
    pub requests: u64,
    pub tokens: u64,
    pub prompt_tokens: u64,
    pub ttft_ms: Vec<f64>,
    pub tbt_ms: Vec<f64>,
    pub completion_ms: Vec<f64>,
    pub exits: u64,
    pub involuntary_exits: u64,
    pub involuntary_stays: u64,
    pub held_ms: f64,
    /// Counters of the slice, by name.
    pub counters: BTreeMap<String, f64>,
    pub client_cpu: f64,
    /// Cores that neither this server nor the client kept busy.
    pub foreign_cpu: f64,
    /// Cores that the other contenders kept busy.
    pub idle_cpu: f64,
}

/// Counters of the patched server whose growth over a slice is worth a place in the report.
const COUNTERS: [&str; 8] = [
    "drex_steps_total",
    "drex_step_rows_total",
    "drex_window_seconds_sum",
    "drex_graphs_built_total",
    "drex_graphs_reused_total",
    "drex_deadline_misses_total",
    "drex_searches_total",
    "drex_tokens_total",
];

/// In a round everybody runs once; the next round runs backwards, and the two after these begin with the next one.
pub fn order(round: usize, contenders: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..contenders).collect();
    order.rotate_left(round / 2 % contenders.max(1));
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// Requests that are given up, or a silence so long, are errors: what is measured is a whole load.
const LIMITS: load::Limits = load::Limits {
    silence: Duration::from_secs(120),
    send: Duration::MAX,
    total: Duration::MAX,
};

struct Running {
    contender: Contender,
    server: Server,
}

impl Running {
    fn start(contender: &Contender, slots: usize) -> Result<Running> {
        let context = slots * CONTEXT;
        let mut args = contender.args.clone();
        args.extend(["-np".into(), slots.to_string()]);
        args.extend(["-c".into(), context.to_string()]);
        let server = Server::start(&contender.program, &args)
            .with_context(|| format!("{} with {slots} slots", contender.name))?;
        Ok(Running {
            contender: contender.clone(),
            server,
        })
    }

    /// Runs a load and says what came of it. `others` are idle meanwhile.
    fn measure(&self, source: &mut dyn Counted, others: &[u32]) -> Result<Sample> {
        let mut run = || {
            let client = self.server.client;
            let cpu = |pids: &[u32]| pids.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>();
            let ours = [self.server.pid(), std::process::id()];
            let metrics = || client.metrics().unwrap_or_default();
            let before = (
                metrics(),
                busy_seconds(),
                cpu(&ours),
                cpu(others),
                Instant::now(),
            );
            let outcome = load::drive(client.addr, "/completion", source, LIMITS)?;
            let wall = before.4.elapsed().as_secs_f64().max(1e-9);
            let (idle, mine) = (cpu(others) - before.3, cpu(&ours) - before.2);
            let mut sample = sample(source, &outcome)?;
            sample.idle_cpu = idle / wall;
            sample.foreign_cpu = ((busy_seconds() - before.1 - mine - idle) / wall).max(0.0);
            sample.counters = grown(&before.0, &metrics());
            Ok(sample)
        };
        run().map_err(|error: anyhow::Error| {
            error.context(format!(
                "{}; its server's last lines:\n  {}\n",
                self.contender.name,
                self.server.last_lines(12)
            ))
        })
    }
}

fn grown(before: &Metrics, after: &Metrics) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    for name in COUNTERS {
        if let Some(value) = after.get(name) {
            out.insert(name.to_owned(), value - before.get(name).unwrap_or(0.0));
        }
    }
    for (reason, value) in after.growth_by_label(before, "drex_flushes_total", "reason") {
        out.insert(format!("flushes_{reason}"), value);
    }
    out
}

fn sample(source: &dyn Counted, outcome: &load::Outcome) -> Result<Sample> {
    let mut sample = Sample {
        client_cpu: outcome.client_cpu,
        ..Sample::default()
    };
    let begin = outcome.start + source.window_begin();
    let last = outcome.finished.iter().map(|f| f.ended).max();
    let end = if source.drains() {
        outcome.drain
    } else {
        last.unwrap_or(outcome.drain)
    };
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    let mut in_window = 0.0;
    for finished in &outcome.finished {
        let generation: Generation = finished
            .generation()
            .with_context(|| format!("request {}", finished.job))?;
        let predicted = generation.last["tokens_predicted"]
            .as_u64()
            .unwrap_or(generation.tokens.len() as u64);
        let seen = generation.times.len();
        ensure!(seen > 0, "request {}: no token came", finished.job);
        let inside = generation
            .times
            .iter()
            .filter(|time| (begin..=end).contains(*time))
            .count();
        // While a character is incomplete, the server holds its bytes back and their tokens have no event.
        in_window += inside as f64 * predicted as f64 / seen as f64;
        if !source.counts(finished.job) {
            continue;
        }
        let timings = &generation.last["timings"];
        let number = |name: &str| timings[name].as_u64().unwrap_or(0);
        sample.requests += 1;
        sample.tokens += predicted;
        sample.prompt_tokens += number("prompt_n") + number("cache_n");
        sample.ttft_ms.push(ms(finished.sent, generation.times[0]));
        sample
            .tbt_ms
            .extend(generation.times.windows(2).map(|pair| ms(pair[0], pair[1])));
        sample.completion_ms.push(ms(finished.sent, finished.ended));
        let exits = timings["drex_exits"].as_array();
        sample.exits += exits
            .into_iter()
            .flatten()
            .filter_map(serde_json::Value::as_u64)
            .sum::<u64>();
        sample.involuntary_exits += number("drex_involuntary_exits");
        sample.involuntary_stays += number("drex_involuntary_stays");
        sample.held_ms += timings["drex_held_ms"].as_f64().unwrap_or(0.0);
    }
    ensure!(sample.requests > 0, "no request counts");
    sample.tokens_per_s = in_window / (end - begin).as_secs_f64().max(1e-9);
    Ok(sample)
}

/// One cell while it is being measured.
struct Field {
    traffic: Traffic,
    in_flight: usize,
    /// Requests (of a chat: conversations) that count in a slice.
    counted: usize,
    /// Requests a second that the server without early exit can serve, where arrivals are a share of it.
    capacity: f64,
    /// Tokens/s of the slices that do not count, by contender.
    warm_up: Vec<f64>,
    /// By contender, by round; none in rounds that a contender did not run.
    samples: Vec<Vec<Option<Sample>>>,
}

impl Field {
    fn source<'a>(&self, text: &'a Text, round: u64) -> Box<dyn Counted + 'a> {
        match self.traffic {
            Traffic::Closed(lengths) => Box::new(Steady::new(
                text,
                lengths,
                round,
                self.in_flight,
                self.counted,
            )),
            Traffic::Chat => Box::new(Chats::new(text, round, self.in_flight, self.counted)),
            Traffic::Poisson(share) => Box::new(Arrivals::new(
                text,
                share,
                share * self.capacity,
                round,
                self.counted,
            )),
        }
    }

    /// The layout whose median of tokens/s is higher.
    fn stock(&self) -> usize {
        let of = |at: usize| {
            let rates: Vec<f64> = self.samples[at]
                .iter()
                .flatten()
                .map(|s| s.tokens_per_s)
                .collect();
            median(&rates)
        };
        (0..LAYOUTS.len())
            .max_by(|a, b| of(*a).total_cmp(&of(*b)))
            .unwrap_or(0)
    }

    /// A layout that had less than 0.4 of the other one's speed in the warm-up.
    fn hopeless(&self) -> Option<usize> {
        let [a, b] = [0, 1].map(|at| self.warm_up.get(at).copied().unwrap_or(0.0));
        (a.min(b) < 0.4 * a.max(b)).then_some(usize::from(b < a))
    }

    /// A layout that was slower in two rounds by more than any noise between them; by much more, in the warm-up and one round.
    fn beaten(&self) -> Option<usize> {
        let stock = self.stock();
        let other = 1 - stock;
        let rates = |at: usize| -> Vec<f64> {
            let rounds = self.samples[at].iter().flatten();
            rounds.map(|s| s.tokens_per_s).collect()
        };
        // Of the faster one what was worst, of the slower one what was best.
        let slower = |ours: &[f64], theirs: &[f64], by: f64| {
            let worst = ours.iter().copied().fold(f64::INFINITY, f64::min);
            let best = theirs.iter().copied().fold(0.0, f64::max);
            theirs.len() >= 2 && best < by * worst
        };
        let (ours, theirs) = (rates(stock), rates(other));
        let with_warm_up = |rates: &[f64], at: usize| -> Vec<f64> {
            self.warm_up
                .get(at)
                .into_iter()
                .chain(rates)
                .copied()
                .collect()
        };
        let out = slower(&ours, &theirs, 0.92)
            || slower(
                &with_warm_up(&ours, stock),
                &with_warm_up(&theirs, other),
                0.6,
            );
        out.then_some(other)
    }
}

/// Round numbers of slices that do not count: their requests are others than those of the rounds.
const WARM_UP: u64 = 1 << 32;

impl Race {
    /// The cells, by requests in flight.
    pub fn plan(&self) -> Vec<(usize, Vec<Traffic>)> {
        let near = self
            .in_flight
            .iter()
            .min_by_key(|n| (n.abs_diff(POISSON_PLACES), **n));
        let mut plan = Vec::new();
        for level in &self.in_flight {
            let chosen = |traffic: &&Traffic| match traffic {
                _ if !self.only.is_empty() => self.only.contains(&(**traffic, *level)),
                Traffic::Poisson(_) => Some(level) == near,
                _ => true,
            };
            let traffic: Vec<Traffic> = self.traffic.iter().filter(chosen).copied().collect();
            if !traffic.is_empty() {
                plan.push((*level, traffic));
            }
        }
        plan
    }

    /// `so_far` gets a report of the cells that are done, after each of them: a race that is ended early leaves them.
    pub fn run(&self, mut so_far: impl FnMut(&Report) -> Result<()>) -> Result<Report> {
        ensure!(
            self.contenders.len() >= LAYOUTS.len()
                && LAYOUTS
                    .iter()
                    .zip(&self.contenders)
                    .all(|(name, c)| *name == c.name),
            "the unpatched server's layouts are not the first contenders"
        );
        let start = Instant::now();
        let plan = self.plan();
        let weight = |level: usize| 1.0 + level as f64 / 8.0;
        let weights: Vec<f64> = plan
            .iter()
            .flat_map(|(level, traffic)| traffic.iter().map(|_| weight(*level)))
            .collect();
        let total = weights.len();
        let mut progress = Progress::new("measuring");
        let mut report = Report::new(Vec::new(), self.about.clone(), 0.0, 0.0);
        let mut idle = 0.0_f64;
        let mut done = 0;
        for (level, traffics) in plan {
            let servers = self
                .contenders
                .iter()
                .map(|c| Running::start(c, level))
                .collect::<Result<Vec<_>>>()?;
            let text = Text::of(servers[0].server.client, &self.corpus)?;
            for traffic in traffics {
                // What is left, shared by the cells that are left; more in flight takes longer.
                let until = self.budget.map(|budget| {
                    let left = budget.saturating_sub(start.elapsed());
                    let all: f64 = weights[done..].iter().sum();
                    Instant::now() + left.mul_f64(weights[done] / all)
                });
                let mut say = |what: &str| {
                    progress.update(&format!(
                        "cell {} of {total}: {traffic} at {level}, {what}",
                        done + 1
                    ));
                };
                let field = self
                    .field(&servers, &text, traffic, level, until, &mut say)
                    .with_context(|| format!("{traffic} at {level} in flight"))?;
                for sample in field.samples.iter().flatten().flatten() {
                    idle = idle.max(sample.idle_cpu);
                }
                let made = report::cells(&self.contenders, &field);
                progress.note(&report::line(&made));
                let cells = [report.cells, made].concat();
                let seconds = start.elapsed().as_secs_f64();
                report = Report::new(cells, self.about.clone(), seconds, idle);
                so_far(&report)?;
                done += 1;
            }
            for running in servers {
                running.server.stop(Duration::from_secs(10))?;
            }
        }
        progress.finish("done");
        Ok(report)
    }

    fn field(
        &self,
        servers: &[Running],
        text: &Text,
        traffic: Traffic,
        in_flight: usize,
        until: Option<Instant>,
        say: &mut dyn FnMut(&str),
    ) -> Result<Field> {
        let pids: Vec<u32> = servers.iter().map(|s| s.server.pid()).collect();
        let measure = |at: usize, source: &mut dyn Counted| {
            let mut others = pids.clone();
            others.remove(at);
            servers[at].measure(source, &others)
        };
        let mut field = Field {
            traffic,
            in_flight,
            counted: in_flight.div_ceil(2).max(2),
            capacity: 0.0,
            warm_up: Vec::new(),
            samples: vec![Vec::new(); servers.len()],
        };
        say("warm-up");
        let seconds = self.slice.as_secs_f64();
        if let Traffic::Poisson(share) = traffic {
            field.capacity = self.capacity(servers, text, in_flight, &measure)?;
            let rate = share * field.capacity;
            // Where more comes than can be served, the queue is what is measured; it grows with the slice.
            field.counted = ((rate * seconds * 2.0).ceil() as usize).clamp(6, 4000);
        }
        let mut rate = 0.0_f64;
        for at in 0..servers.len() {
            let sample = measure(at, &mut *field.source(text, WARM_UP))?;
            field.warm_up.push(sample.tokens_per_s);
            // The first contender's speed decides for all.
            if at == 0 {
                let per_request = sample.tokens as f64 / sample.requests as f64;
                rate = sample.tokens_per_s / per_request;
            }
        }
        if !matches!(traffic, Traffic::Poisson(_)) {
            if traffic == Traffic::Chat {
                rate /= TURNS_OF_CHAT as f64;
            }
            field.counted = ((rate * seconds).round() as usize).clamp(in_flight.max(4), 2000);
        }

        let mut out = field.hopeless();
        let mut last = Duration::ZERO;
        for round in 0..self.rounds {
            let begin = Instant::now();
            // A round may end late by half of its time, since others end early by as much.
            if round >= 2 && until.is_some_and(|until| begin + last / 2 > until) {
                break;
            }
            for at in order(round, servers.len()) {
                if out == Some(at) {
                    field.samples[at].push(None);
                    continue;
                }
                say(&format!(
                    "round {} of {}, {}",
                    round + 1,
                    self.rounds,
                    servers[at].contender.name
                ));
                let sample = measure(at, &mut *field.source(text, round as u64))?;
                field.samples[at].push(Some(sample));
            }
            out = out.or_else(|| field.beaten());
            last = begin.elapsed();
        }
        Ok(field)
    }

    /// Requests of Poisson traffic a second that policy `off` can serve, or the faster stock layout where it is not in the race.
    fn capacity(
        &self,
        servers: &[Running],
        text: &Text,
        in_flight: usize,
        measure: &dyn Fn(usize, &mut dyn Counted) -> Result<Sample>,
    ) -> Result<f64> {
        let off = self.contenders.iter().position(|c| c.name == "off");
        let runners = off.map_or_else(|| vec![0, 1], |at| vec![at]);
        let mut best = 0.0_f64;
        for at in runners {
            ensure!(at < servers.len(), "no such server");
            let mut rates = Vec::new();
            for slice in 0..3 {
                let mut load =
                    Steady::new(text, POISSON, WARM_UP + slice, in_flight, 2 * in_flight);
                let sample = measure(at, &mut load)?;
                rates.push(sample.tokens_per_s * sample.requests as f64 / sample.tokens as f64);
            }
            best = best.max(median(&rates));
        }
        if best <= 0.0 {
            bail!("the capacity is {best}");
        }
        Ok(best)
    }
}

/// Mean of what the rounds say.
fn over<T>(samples: &[&Sample], value: impl Fn(&Sample) -> T) -> f64
where
    T: Into<f64>,
{
    mean(
        &samples
            .iter()
            .map(|s| value(s).into())
            .collect::<Vec<f64>>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_run_forth_and_back_and_everybody_is_first_as_often() {
        assert_eq!(order(0, 3), [0, 1, 2]);
        assert_eq!(order(1, 3), [2, 1, 0]);
        assert_eq!(order(2, 3), [1, 2, 0]);
        assert_eq!(order(3, 3), [0, 2, 1]);
        for n in 1..6 {
            let mut places = vec![vec![0; n]; n];
            for round in 0..2 * n {
                for (place, who) in order(round, n).into_iter().enumerate() {
                    places[who][place] += 1;
                }
            }
            assert!(
                places.iter().flatten().all(|count| *count == 2),
                "{places:?}"
            );
        }
    }

    fn race(traffic: &str, in_flight: &[usize]) -> Race {
        Race {
            contenders: Vec::new(),
            traffic: traffic.split(',').map(|t| t.parse().unwrap()).collect(),
            in_flight: in_flight.to_vec(),
            only: Vec::new(),
            rounds: 1,
            slice: Duration::ZERO,
            budget: None,
            corpus: String::new(),
            about: About::default(),
        }
    }

    #[test]
    fn arrivals_of_their_own_come_to_one_number_of_places() {
        let cells = |levels: &[usize]| -> Vec<(usize, usize)> {
            let plan = race(crate::traffic::ALL, levels).plan();
            plan.iter().map(|(level, t)| (*level, t.len())).collect()
        };
        assert_eq!(cells(&[1, 16, 64]), [(1, 5), (16, 8), (64, 5)]);
        assert_eq!(cells(&[4]), [(4, 8)]);
        assert_eq!(cells(&[8, 32]), [(8, 8), (32, 5)]);
        assert!(race("poisson-0.5", &[4, 16]).plan().len() == 1);
        let mut some = race("300/64,chat", &[4, 16]);
        some.only = vec![(Traffic::Chat, 4)];
        assert_eq!(some.plan(), [(4, vec![Traffic::Chat])]);
    }

    fn sample_of(rate: f64) -> Sample {
        Sample {
            tokens_per_s: rate,
            ..Sample::default()
        }
    }

    fn field(streams: &[f64], unified: &[f64]) -> Field {
        let list = |rates: &[f64]| rates.iter().map(|r| Some(sample_of(*r))).collect();
        Field {
            traffic: Traffic::Chat,
            in_flight: 1,
            counted: 1,
            capacity: 0.0,
            warm_up: vec![streams[0], unified[0]],
            samples: vec![list(streams), list(unified)],
        }
    }

    #[test]
    fn the_baseline_is_the_faster_layout_and_a_slow_one_goes() {
        assert_eq!(field(&[10.0, 10.0], &[4.0, 4.0]).stock(), 0);
        assert_eq!(field(&[10.0, 9.0], &[11.0, 12.0]).stock(), 1);
        assert_eq!(field(&[10.0, 10.0], &[4.0, 4.0]).beaten(), Some(1));
        assert_eq!(field(&[4.0, 4.0], &[10.0, 10.0]).beaten(), Some(0));
        // One round says little, and neither do rounds that overlap.
        assert_eq!(field(&[10.0], &[7.0]).beaten(), None);
        assert_eq!(field(&[10.0], &[4.0]).beaten(), Some(1));
        assert_eq!(field(&[10.0, 10.0], &[9.0, 9.1]).beaten(), Some(1));
        assert_eq!(field(&[10.0, 10.0], &[9.0, 9.3]).beaten(), None);
        assert_eq!(field(&[10.0, 5.0], &[4.0, 4.9]).beaten(), None);
        // A warm-up is enough where the difference is large.
        assert_eq!(field(&[10.0], &[3.9]).hopeless(), Some(1));
        assert_eq!(field(&[3.9], &[10.0]).hopeless(), Some(0));
        assert_eq!(field(&[10.0], &[4.1]).hopeless(), None);
    }
}
