// SPDX-License-Identifier: Apache-2.0
//! The traffic of a benchmark: what requests are made of, and when they come. Everything is drawn from a name and a number, so
//! that each contender of a round gets the same requests.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use serde_json::json;

use crate::{
    client::Client,
    load::{Finished, Next, Source},
    stats::random,
};

/// Tokens that a sequence has room for: what the bundled model was trained with.
pub const CONTEXT: usize = 512;
/// Lengths are spread so far around their mean, evenly.
const SPREAD: f64 = 0.2;
/// Lengths of requests that come at times of their own.
pub const POISSON: Lengths = Lengths {
    prompt: 300,
    answer: 64,
};
const TURNS: usize = 5;
/// What all chats begin with, and what each turn adds, in tokens.
const CHAT_PREFIX: usize = 64;
const CHAT_TURN: Lengths = Lengths {
    prompt: 20,
    answer: 40,
};

/// Means, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    pub prompt: usize,
    pub answer: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Traffic {
    /// So many requests in flight at all times.
    Closed(Lengths),
    /// So many chats in flight: a prefix that all share, five turns, and each turn's prompt is all that came before.
    Chat,
    /// Arrivals at random, at this share of what the server without early exit can serve.
    Poisson(f64),
}

pub const ALL: &str = "16/128,128/128,300/64,400/16,chat,poisson-0.5,poisson-0.8,poisson-1.2";

impl FromStr for Traffic {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Traffic> {
        if text == "chat" {
            return Ok(Traffic::Chat);
        }
        if let Some(share) = text.strip_prefix("poisson-") {
            let share: f64 = share
                .parse()
                .ok()
                .filter(|share| (0.05..=4.0).contains(share))
                .with_context(|| {
                    format!("traffic {text}: the share of the capacity is a number from 0.05 to 4")
                })?;
            return Ok(Traffic::Poisson(share));
        }
        let Some((prompt, answer)) = text.split_once('/') else {
            bail!("traffic {text}: unknown; known are {ALL} and PROMPT/ANSWER in tokens");
        };
        let number = |part: &str, what| {
            part.parse::<usize>()
                .ok()
                .filter(|n| *n >= 2)
                .with_context(|| format!("traffic {text}: the {what} has at least 2 tokens"))
        };
        let lengths = Lengths {
            prompt: number(prompt, "prompt")?,
            answer: number(answer, "answer")?,
        };
        let most = lengths.longest();
        if most > CONTEXT {
            bail!("traffic {text}: up to {most} tokens, and a sequence has room for {CONTEXT}");
        }
        Ok(Traffic::Closed(lengths))
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Traffic::Closed(l) => write!(f, "{}/{}", l.prompt, l.answer),
            Traffic::Chat => write!(f, "chat"),
            Traffic::Poisson(share) => write!(f, "poisson-{share}"),
        }
    }
}

impl Lengths {
    /// The most tokens that a sequence of these lengths has.
    pub fn longest(self) -> usize {
        let most = |mean: usize| (mean as f64 * (1.0 + SPREAD)).ceil() as usize;
        most(self.prompt) + most(self.answer)
    }

    /// A list of prompts, each with the number of tokens to answer with; the same for the same numbers.
    pub fn requests(self, text: &Text, round: u64, count: usize) -> Vec<(Vec<i64>, usize)> {
        (0..count)
            .map(|job| self.request(text, round, job))
            .collect()
    }

    fn request(self, text: &Text, round: u64, job: usize) -> (Vec<i64>, usize) {
        let name = Traffic::Closed(self).to_string();
        let mut random = random(&name, &[round, job as u64]);
        let Lengths { prompt, answer } = self.draw(&mut random);
        (text.prompt(&mut random, prompt), answer)
    }

    fn draw(self, random: &mut Rng) -> Lengths {
        let mut one = |mean: usize| {
            let factor = 1.0 - SPREAD + 2.0 * SPREAD * random.f64();
            ((mean as f64 * factor).round() as usize).max(1)
        };
        Lengths {
            prompt: one(self.prompt),
            answer: one(self.answer),
        }
    }
}

/// Text as tokens, and where its paragraphs start.
pub struct Text {
    ids: Vec<i64>,
    starts: Vec<usize>,
    /// What a prompt starts with.
    first: Vec<i64>,
}

impl Text {
    /// Tokens as a server sees them.
    pub fn of(client: Client, text: &str) -> Result<Text> {
        let mut out = Text {
            ids: Vec::new(),
            starts: Vec::new(),
            first: client.tokenize("")?,
        };
        for paragraph in text
            .split_inclusive("\n\n")
            .filter(|p| !p.trim().is_empty())
        {
            let ids = client.tokenize(paragraph)?;
            out.starts.push(out.ids.len());
            // What the server adds to a prompt's begin is no part of a text's middle.
            out.ids
                .extend(ids.strip_prefix(out.first.as_slice()).unwrap_or(&ids));
        }
        if out.ids.len() < 2 * CONTEXT {
            bail!(
                "the corpus has {} tokens, which is less than {}",
                out.ids.len(),
                2 * CONTEXT
            );
        }
        Ok(out)
    }

    /// So many tokens from the begin of a paragraph on. What is longer than the rest goes on at the text's begin.
    fn part(&self, random: &mut Rng, tokens: usize) -> impl Iterator<Item = i64> + '_ {
        let start = self.starts[random.usize(..self.starts.len())];
        self.ids.iter().copied().cycle().skip(start).take(tokens)
    }

    fn prompt(&self, random: &mut Rng, tokens: usize) -> Vec<i64> {
        let mut prompt = self.first.clone();
        let rest = tokens.saturating_sub(prompt.len());
        prompt.extend(self.part(random, rest));
        prompt
    }
}

/// A request for so many tokens, which takes what it can from the prompt cache where it is `cached`.
pub fn body(prompt: &[i64], tokens: usize, cached: bool) -> Vec<u8> {
    let body = json!({
        "prompt": prompt,
        "stream": true,
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": true,
        "return_tokens": true,
        "cache_prompt": cached,
        // The rest repeats the settings and the prompt, for every request.
        "response_fields": ["stop", "timings", "tokens_predicted"],
    });
    body.to_string().into_bytes()
}

/// Load whose first requests are there to bring the server into the state that the others find.
pub trait Counted: Source {
    /// Whether a request counts.
    fn counts(&self, job: usize) -> bool;
    /// When the first request that counts was sent, since the start.
    fn window_begin(&self) -> Duration;
    /// Whether the load is what it should be only until there is nothing more to send.
    fn drains(&self) -> bool {
        true
    }
}

/// Where the numbers of requests begin that are sent before the load is steady and belong to no place's first wave.
const FILLER: usize = 1 << 32;

/// So many requests for each place come after one that has no token yet before it counts as starved. Servers need one or two.
const STARVED: usize = 40;

/// The begin of a closed load. The first request of each place comes first, then requests that replace those that ended, until
/// each place's first request has a token: from there on no server has prompts left that came all at once. What is sent next
/// counts. Requests that count have the same numbers whatever came before, so that each server gets the same ones.
struct Ramp {
    places: usize,
    counted: usize,
    /// Of the first wave, requests with a token.
    began: usize,
    sent: usize,
    fillers: usize,
    begin: Option<Duration>,
}

impl Ramp {
    fn new(places: usize, counted: usize) -> Ramp {
        Ramp {
            places,
            counted,
            began: 0,
            sent: 0,
            fillers: 0,
            begin: None,
        }
    }

    /// The number of the next request; none when all that count were sent. Fails where a request waits for ever.
    fn next(&mut self, now: Duration) -> Result<Option<usize>> {
        if self.sent >= self.places {
            if self.began < self.places {
                self.fillers += 1;
                if self.fillers > STARVED * self.places {
                    bail!(
                        "{} of {} requests have no token yet, and {} that came later were sent: the server starves them",
                        self.places - self.began,
                        self.places,
                        self.fillers - 1
                    );
                }
                return Ok(Some(FILLER + self.fillers - 1));
            }
            self.begin.get_or_insert(now);
        }
        if self.sent == self.places + self.counted {
            return Ok(None);
        }
        self.sent += 1;
        Ok(Some(self.sent - 1))
    }

    fn began(&mut self, number: usize) {
        self.began += usize::from(number < self.places);
    }

    fn counts(&self, number: usize) -> bool {
        (self.places..FILLER).contains(&number)
    }
}

/// So many requests in flight. Of the first wave, the i-th of n has i/n of its tokens: they end one after the other, as those of a
/// server that has run for long do.
pub struct Steady<'a> {
    text: &'a Text,
    lengths: Lengths,
    round: u64,
    ramp: Ramp,
    open: usize,
}

impl<'a> Steady<'a> {
    pub fn new(
        text: &'a Text,
        lengths: Lengths,
        round: u64,
        in_flight: usize,
        counted: usize,
    ) -> Steady<'a> {
        Steady {
            text,
            lengths,
            round,
            ramp: Ramp::new(in_flight, counted),
            open: 0,
        }
    }

    fn request(&self, job: usize) -> (Vec<i64>, usize) {
        let (prompt, answer) = self.lengths.request(self.text, self.round, job);
        let places = self.ramp.places;
        let answer = if job < places {
            (answer * (job + 1)).div_ceil(places)
        } else {
            answer
        };
        (prompt, answer)
    }
}

impl Source for Steady<'_> {
    fn next(&mut self, now: Duration) -> Result<Next> {
        if self.open >= self.ramp.places {
            return Ok(Next::Busy);
        }
        let Some(job) = self.ramp.next(now)? else {
            return Ok(Next::End);
        };
        let (prompt, answer) = self.request(job);
        self.open += 1;
        Ok(Next::Send(job, body(&prompt, answer, false)))
    }

    fn began(&mut self, job: usize) {
        self.ramp.began(job);
    }

    fn answered(&mut self, _: &Finished) -> Result<()> {
        self.open -= 1;
        Ok(())
    }
}

impl Counted for Steady<'_> {
    fn counts(&self, job: usize) -> bool {
        self.ramp.counts(job)
    }

    fn window_begin(&self) -> Duration {
        self.ramp.begin.unwrap_or_default()
    }
}

/// Requests that come when they come, however many are open.
pub struct Arrivals<'a> {
    text: &'a Text,
    name: String,
    round: u64,
    times: Vec<Duration>,
    sent: usize,
}

impl<'a> Arrivals<'a> {
    /// `rate` in requests a second.
    pub fn new(text: &'a Text, share: f64, rate: f64, round: u64, count: usize) -> Arrivals<'a> {
        let name = Traffic::Poisson(share).to_string();
        let mut random = random(&name, &[round]);
        let mut at = 0.0;
        let times = (0..count)
            .map(|i| {
                if i > 0 {
                    at -= (1.0 - random.f64()).ln() / rate;
                }
                Duration::from_secs_f64(at)
            })
            .collect();
        Arrivals {
            text,
            name,
            round,
            times,
            sent: 0,
        }
    }
}

impl Source for Arrivals<'_> {
    fn next(&mut self, now: Duration) -> Result<Next> {
        let job = self.sent;
        let Some(time) = self.times.get(job) else {
            return Ok(Next::End);
        };
        if *time > now {
            return Ok(Next::At(*time));
        }
        let mut random = random(&self.name, &[self.round, 1, job as u64]);
        let Lengths { prompt, answer } = POISSON.draw(&mut random);
        let prompt = self.text.prompt(&mut random, prompt);
        self.sent += 1;
        Ok(Next::Send(job, body(&prompt, answer, false)))
    }

    fn answered(&mut self, _: &Finished) -> Result<()> {
        Ok(())
    }
}

impl Counted for Arrivals<'_> {
    fn counts(&self, _: usize) -> bool {
        true
    }

    fn window_begin(&self) -> Duration {
        Duration::ZERO
    }

    fn drains(&self) -> bool {
        false
    }
}

struct Conversation {
    number: usize,
    turn: usize,
    /// All that was said.
    said: Vec<i64>,
    waits: bool,
}

/// So many chats in flight; the next turn follows an answer at once. Of the first ones, the i-th has fewer turns, so that they
/// do not all stay at the same turn.
pub struct Chats<'a> {
    text: &'a Text,
    round: u64,
    ramp: Ramp,
    open: Vec<Conversation>,
}

impl<'a> Chats<'a> {
    pub fn new(text: &'a Text, round: u64, in_flight: usize, counted: usize) -> Chats<'a> {
        Chats {
            text,
            round,
            ramp: Ramp::new(in_flight, counted),
            open: Vec::new(),
        }
    }

    fn turns(&self, number: usize) -> usize {
        if number < self.ramp.places {
            number % TURNS + 1
        } else {
            TURNS
        }
    }

    fn turn(&self, conversation: &Conversation) -> (Vec<i64>, usize) {
        let seed = [
            self.round,
            conversation.number as u64,
            conversation.turn as u64,
        ];
        let mut random = random("chat", &seed);
        let Lengths { prompt, answer } = CHAT_TURN.draw(&mut random);
        (self.text.part(&mut random, prompt).collect(), answer)
    }
}

impl Source for Chats<'_> {
    fn next(&mut self, now: Duration) -> Result<Next> {
        let missing = self.open.len() < self.ramp.places;
        let number = match missing {
            true => self.ramp.next(now)?,
            false => None,
        };
        if let Some(number) = number {
            self.open.push(Conversation {
                number,
                turn: 0,
                said: self
                    .text
                    .prompt(&mut random("chat prefix", &[]), CHAT_PREFIX),
                waits: false,
            });
        }
        let Some(at) = self.open.iter().position(|c| !c.waits) else {
            let ends = self.open.len() < self.ramp.places;
            return Ok(if ends { Next::End } else { Next::Busy });
        };
        let (asked, tokens) = self.turn(&self.open[at]);
        let conversation = &mut self.open[at];
        conversation.said.extend(asked);
        conversation.waits = true;
        let job = conversation.number * TURNS + conversation.turn;
        Ok(Next::Send(job, body(&conversation.said, tokens, true)))
    }

    fn began(&mut self, job: usize) {
        if job.is_multiple_of(TURNS) {
            self.ramp.began(job / TURNS);
        }
    }

    fn answered(&mut self, finished: &Finished) -> Result<()> {
        let number = finished.job / TURNS;
        let turns = self.turns(number);
        let at = self
            .open
            .iter()
            .position(|c| c.number == number)
            .context("an answer to no conversation")?;
        let conversation = &mut self.open[at];
        conversation.said.extend(finished.generation()?.tokens);
        conversation.turn += 1;
        conversation.waits = false;
        if conversation.turn == turns {
            self.open.swap_remove(at);
        }
        Ok(())
    }
}

impl Counted for Chats<'_> {
    fn counts(&self, job: usize) -> bool {
        self.ramp.counts(job / TURNS)
    }

    fn window_begin(&self) -> Duration {
        self.ramp.begin.unwrap_or_default()
    }
}

/// Requests of a chat.
pub const TURNS_OF_CHAT: usize = TURNS;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_starves_a_request_is_told() {
        let mut ramp = Ramp::new(2, 10);
        let sent: Vec<_> = (0..2)
            .map(|_| ramp.next(Duration::ZERO).unwrap().unwrap())
            .collect();
        assert_eq!(sent, [0, 1]);
        ramp.began(0);
        for i in 0..2 * STARVED {
            assert_eq!(ramp.next(Duration::ZERO).unwrap(), Some(FILLER + i));
        }
        let error = ramp.next(Duration::ZERO).unwrap_err().to_string();
        assert!(
            error.starts_with("1 of 2 requests have no token yet, and 80 that"),
            "{error}"
        );
        ramp.began(1);
        assert_eq!(ramp.next(Duration::ZERO).unwrap(), Some(2));
    }
    use serde_json::Value;

    fn text() -> Text {
        Text {
            ids: (10..2010).collect(),
            starts: (0..100).map(|i| i * 20).collect(),
            first: vec![0],
        }
    }

    fn sent(source: &mut dyn Source, now: Duration) -> Option<(usize, Value)> {
        match source.next(now).unwrap() {
            Next::Send(job, body) => Some((job, serde_json::from_slice(&body).unwrap())),
            _ => None,
        }
    }

    fn tokens(body: &Value) -> (usize, u64) {
        (
            body["prompt"].as_array().unwrap().len(),
            body["n_predict"].as_u64().unwrap(),
        )
    }

    #[test]
    fn names_are_read_and_written() {
        for name in ALL.split(',') {
            assert_eq!(name.parse::<Traffic>().unwrap().to_string(), name);
        }
        for (name, says) in [
            ("chats", "chats: unknown"),
            ("300", "300: unknown"),
            ("300/x", "the answer has at least 2"),
            ("1/64", "the prompt has at least 2"),
            ("400/64", "up to 557 tokens"),
            ("poisson-0", "from 0.05 to 4"),
            ("poisson-x", "from 0.05 to 4"),
        ] {
            let error = name.parse::<Traffic>().unwrap_err().to_string();
            assert!(error.contains(says), "{name}: {error}");
        }
    }

    /// The i-th request is the same whatever was answered before, and differs from round to round.
    #[test]
    fn every_contender_gets_the_same_requests() {
        let text = text();
        let lengths = Lengths {
            prompt: 300,
            answer: 64,
        };
        let all = |round, answers_between: bool| {
            let mut source = Steady::new(&text, lengths, round, 4, 8);
            let mut got = Vec::new();
            loop {
                while let Some((job, body)) = sent(&mut source, Duration::ZERO) {
                    got.push((job, body));
                    if answers_between {
                        source.began(job);
                        break;
                    }
                }
                if source.open == 0 {
                    got.retain(|(job, _)| *job < FILLER);
                    return got;
                }
                // A first token that comes late lets requests in that do not count.
                if !answers_between && got.len() == 7 {
                    (0..4).for_each(|job| source.began(job));
                }
                // Which answer comes first makes no difference.
                source.open -= 1;
            }
        };
        let one = all(1, false);
        assert_eq!(one.len(), 12);
        assert_eq!(one, all(1, true));
        assert_ne!(one, all(2, false));
    }

    #[test]
    fn nothing_counts_before_each_place_has_had_a_token() {
        let text = text();
        let lengths = Lengths {
            prompt: 300,
            answer: 64,
        };
        let mut source = Steady::new(&text, lengths, 0, 2, 3);
        let send = |at: u64, source: &mut Steady| {
            let next = sent(source, Duration::from_secs(at)).map(|(job, _)| job);
            (next, source.window_begin().as_secs())
        };
        assert_eq!(send(1, &mut source).0, Some(0));
        assert_eq!(send(1, &mut source).0, Some(1));
        assert_eq!(send(1, &mut source).0, None);
        source.began(0);
        source.open -= 1;
        // The other place has no token yet: what replaces the first request does not count, and neither does its first token.
        let (filler, begin) = send(2, &mut source);
        assert!(!source.counts(filler.unwrap()) && begin == 0);
        source.began(filler.unwrap());
        source.open -= 1;
        let (filler, begin) = send(3, &mut source);
        assert!(!source.counts(filler.unwrap()) && begin == 0);
        source.began(1);
        source.open -= 1;
        assert_eq!(send(4, &mut source), (Some(2), 4));
        assert!(source.counts(2));
        source.open -= 1;
        assert_eq!(send(5, &mut source), (Some(3), 4));
        source.open -= 1;
        assert_eq!(send(6, &mut source), (Some(4), 4));
        source.open -= 1;
        assert!(matches!(
            source.next(Duration::from_secs(7)).unwrap(),
            Next::End
        ));
    }

    #[test]
    fn lengths_lie_around_their_mean() {
        let text = text();
        let lengths = Lengths {
            prompt: 300,
            answer: 64,
        };
        let mut source = Steady::new(&text, lengths, 0, 1, 2000);
        let (mut prompts, mut answers) = (0, 0);
        for _ in 0..2001 {
            let (job, body) = sent(&mut source, Duration::ZERO).unwrap();
            source.began(job);
            source.open = 0;
            let (prompt, answer) = tokens(&body);
            assert!(
                (240..=360).contains(&prompt) && (51..=77).contains(&answer),
                "{prompt} {answer}"
            );
            assert_eq!(body["prompt"][0], 0);
            prompts += prompt;
            answers += answer;
        }
        assert!((prompts / 2001).abs_diff(300) <= 3 && (answers / 2001).abs_diff(64) <= 1);
    }

    #[test]
    fn the_first_requests_end_one_after_the_other_and_do_not_count() {
        let text = text();
        let mut source = Steady::new(
            &text,
            Lengths {
                prompt: 16,
                answer: 100,
            },
            0,
            4,
            2,
        );
        let mut answers = Vec::new();
        while let Some((job, body)) = sent(&mut source, Duration::from_secs(3)) {
            assert!(!source.counts(job));
            source.began(job);
            answers.push(tokens(&body).1);
        }
        assert_eq!(answers.len(), 4);
        assert!(answers[0] <= 30 && answers[3] >= 80, "{answers:?}");
        source.open = 3;
        let (job, _) = sent(&mut source, Duration::from_secs(5)).unwrap();
        assert!(source.counts(job));
        assert_eq!(source.window_begin(), Duration::from_secs(5));
    }

    #[test]
    fn arrivals_come_at_their_rate_and_are_the_same_for_all() {
        let text = text();
        let times = |round| Arrivals::new(&text, 0.8, 50.0, round, 5000).times;
        let one = times(3);
        assert_eq!(one, times(3));
        assert_ne!(one, times(4));
        let gaps: Vec<f64> = one
            .windows(2)
            .map(|w| (w[1] - w[0]).as_secs_f64())
            .collect();
        let mean = crate::stats::mean(&gaps);
        let deviation =
            (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        // Both are the same in a Poisson process.
        assert!(
            (mean * 50.0 - 1.0).abs() < 0.06 && (deviation * 50.0 - 1.0).abs() < 0.1,
            "{mean} {deviation}"
        );
        let mut source = Arrivals::new(&text, 0.8, 50.0, 3, 3);
        assert!(sent(&mut source, Duration::ZERO).is_some());
        assert!(matches!(source.next(Duration::ZERO).unwrap(), Next::At(at) if at == one[1]));
        assert!(sent(&mut source, one[1]).is_some());
    }

    #[test]
    fn a_chat_fits_and_its_turns_hold_what_was_said() {
        let most = CHAT_PREFIX + TURNS * CHAT_TURN.longest();
        assert!(most <= CONTEXT, "{most}");
        let text = text();
        let mut source = Chats::new(&text, 0, 5, 1);
        let mut first = Vec::new();
        while let Some((job, body)) = sent(&mut source, Duration::ZERO) {
            assert_eq!(job % TURNS, 0);
            first.push(body);
        }
        assert_eq!(first.len(), 5);
        // All begin alike.
        let prefix = |body: &Value| body["prompt"].as_array().unwrap()[..CHAT_PREFIX].to_vec();
        assert!(
            first
                .iter()
                .all(|body| prefix(body) == prefix(&first[0]) && body["cache_prompt"] == true)
        );
        assert_ne!(first[0]["prompt"], first[1]["prompt"]);
        // Of the first chats, the i-th has i turns.
        let turns: Vec<usize> = (0..6).map(|n| source.turns(n)).collect();
        assert_eq!(turns, [1, 2, 3, 4, 5, 5]);
        let next = &mut source.open[1];
        next.turn = 1;
        next.said.extend([7, 8, 9]);
        next.waits = false;
        let (_, body) = sent(&mut source, Duration::ZERO).unwrap();
        let (old, new) = (
            first[1]["prompt"].as_array().unwrap(),
            body["prompt"].as_array().unwrap(),
        );
        assert_eq!(new[..old.len()], old[..]);
        assert_eq!(
            new[old.len()..old.len() + 3],
            [json!(7), json!(8), json!(9)]
        );
        assert!(new.len() > old.len() + 3);
    }
}
