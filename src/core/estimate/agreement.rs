// SPDX-License-Identifier: Apache-2.0

//! How far answers may differ from the full model's, and the threshold that this
//! allows.
//!
//! A request with a target is served at a rung. Rung 0 is lossless, and each next
//! one lets rows exit that are less sure. Some answers, chosen at random, are
//! audited: after its end the full model reads the answer with whole K/V, and the
//! host counts the tokens that it would have chosen otherwise. So the count has what
//! ramps got wrong and what holes did to the tokens after them. The share of such
//! tokens is a rung's risk.
//!
//! Two things keep the promise. The first is a bound on each rung's risk: requests are
//! served at the last rung whose bound is within the target, before any that is known
//! to be beyond it. Risk grows from rung to rung, so one bound is enough for all
//! before it (risk-controlling prediction sets, Bates et al. 2021; CALM, Schuster et
//! al. 2022, does so for exits). The second is an account for each target, as in
//! rolling risk control (Feldman et al. 2022): tokens pay in what they may differ by,
//! audits take out what differs, each for all the answers that it stands for, and who
//! is overdrawn is served losslessly. The bound looks ahead where text is as before,
//! and the account holds where it is not.

/// Targets that are told apart: shares of tokens that are the full model's. One in
/// between is served as the next higher.
pub const TARGETS: [f64; 7] = [0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999];
/// Confidences from which rows exit, from rung 1 on.
const FLOORS: [f32; RUNGS - 1] = [0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3];
pub const RUNGS: usize = 8;

/// Audited tokens that a rung's risk remembers, and those that tell whether it is
/// another one of late.
const MEMORY: f64 = 40_000.0;
const RECENT: f64 = 1500.0;
/// Of what was known before an answer, the least share that is kept, however long the
/// answer: no single one tells all.
const KEPT: f64 = 0.95;
const RECENT_KEPT: f64 = 0.75;
/// Standard deviations of bounds: 0.98 on one side, since one looks at them often.
const Z: f64 = 2.0;
/// Answers, counted as if all had the same length, below which a bound says nothing;
/// and the recent ones that may contradict the others.
const FEW: f64 = 8.0;
const TELLING: f64 = 3.0;
/// How much tokens of one answer differ together: the correlation that is guessed, and
/// the differing tokens that this guess counts for.
const TOGETHER: f64 = 0.02;
const SPREAD_EVENTS: f64 = 4.0;
/// The highest risk that is thought possible of a rung that is not known.
const UNKNOWN: f64 = 0.1;
/// Share of the time that audits of requests that try a bolder rung may take, and the
/// greatest share of the requests that do.
const TRIAL_TIME: f64 = 0.03;
const TRIALS: f64 = 0.25;
/// The same of a rung that is known to be beyond the target: text changes.
const LOOKS: f64 = 1.0 / 128.0;
/// Of the answers that are to be audited, the least share that must be for anything but
/// lossless to be served; and then the share of the requests that find out whether
/// they are by now.
const AUDITED: f64 = 0.4;
const RARELY: f64 = 1.0 / 256.0;
/// Weight of one answer in that share.
const NEW: f64 = 1.0 / 16.0;
/// Audited tokens of a rung, times what is allowed, that leave little to learn of it.
const ENOUGH: f64 = 100.0;
/// A risk of this share of what is allowed takes long to be proven: rungs before it are
/// tried first.
const HARDLY: f64 = 0.6;
/// Least and greatest share of the answers that are audited.
const AUDITS: (f64, f64) = (1.0 / 24.0, 0.25);
/// Share of an answer's tokens that a change of text costs, times the audits until
/// it is seen.
const WATCH: f64 = 0.6;
/// Of what tokens may differ by, the share that they pay in. The rest makes up for
/// audits that were lucky.
const PAYS_IN: f64 = 0.8;
/// Tokens whose part an account holds at most.
const MOST: f64 = 300_000.0;
/// Tokens that an answer is thought to have, where nothing is known.
const ANSWER: f64 = 128.0;

/// The target that a share of tokens is served as; `None`: only lossless will do.
pub fn target(agreement: f64) -> Option<u8> {
    // 0.99 as an f32 is a little more than as an f64.
    let i = TARGETS.partition_point(|&t| t < agreement - 1e-6);
    (i < TARGETS.len()).then_some(i as u8)
}

/// The confidence from which rows of a rung exit; `None` at rung 0.
pub fn floor(rung: u8) -> Option<f32> {
    usize::from(rung).checked_sub(1).map(|i| FLOORS[i])
}

/// Sums over answers, old ones faded.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    tokens: f64,
    differing: f64,
    /// Squares and products of both, for the spread.
    tt: f64,
    td: f64,
    dd: f64,
}

impl Sums {
    fn add(&mut self, (memory, kept): (f64, f64), tokens: f64, differing: f64) {
        let keep = (1.0 - tokens / memory).max(kept);
        for (sum, new) in [
            (&mut self.tokens, tokens),
            (&mut self.differing, differing),
            (&mut self.tt, tokens * tokens),
            (&mut self.td, tokens * differing),
            (&mut self.dd, differing * differing),
        ] {
            *sum = *sum * keep + new;
        }
    }

    fn risk(&self) -> f64 {
        self.differing / self.tokens.max(1.0)
    }

    /// The variance of answers' counts, in that of independent tokens (a design
    /// effect, Kish 1965).
    fn spread(&self) -> f64 {
        let r = self.risk();
        let found = self.dd - 2.0 * r * self.td + r * r * self.tt;
        let independent = self.differing * (1.0 - r);
        let length = self.tt / self.tokens.max(1.0);
        let guess = 1.0 + (length - 1.0).max(0.0) * TOGETHER;
        let events = independent + SPREAD_EVENTS;
        ((found + guess * SPREAD_EVENTS) / events).max(1.0)
    }

    /// Answers, counted as if all had the same length.
    fn answers(&self) -> f64 {
        self.tokens * self.tokens / self.tt.max(1.0)
    }

    /// The risk's bounds: the score interval of a Poisson count (Wilson 1927).
    fn bounds(&self) -> (f64, f64) {
        self.bounds_from(FEW)
    }

    /// The same, from so many answers on.
    fn bounds_from(&self, few: f64) -> (f64, f64) {
        if self.answers() < few {
            return (0.0, 1.0);
        }
        let spread = self.spread();
        let events = self.differing / spread;
        let (middle, half) = (events + Z * Z / 2.0, Z * (events + Z * Z / 4.0).sqrt());
        let share = |events: f64| (events * spread / self.tokens).clamp(0.0, 1.0);
        (share(middle - half), share(middle + half))
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Rung {
    all: Sums,
    recent: Sums,
}

impl Rung {
    /// True: it has become another one, and what was known of it is forgotten.
    fn observe(&mut self, tokens: f64, differing: f64) -> bool {
        self.all.add((MEMORY, KEPT), tokens, differing);
        self.recent.add((RECENT, RECENT_KEPT), tokens, differing);
        let other = self.recent.bounds_from(TELLING).0 > self.all.bounds().1;
        if other {
            self.all = self.recent;
        }
        other
    }

    /// Its risk may be within so much.
    fn possible(&self, may: f64) -> bool {
        self.all.bounds().0 <= may
    }

    /// What a token at it is presumed to risk.
    fn presumed(&self) -> f64 {
        let (_, high) = self.all.bounds();
        // A bound from few tokens says less than that most rungs are not so bad.
        high.min(UNKNOWN.max(self.all.risk()))
    }
}

/// How a request is served, from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Index of [`TARGETS`].
    pub target: u8,
    pub rung: u8,
    /// The chance with which the answer was chosen to be audited; 0: it was not.
    pub audit: f32,
    /// What the account keeps aside for it.
    reserve: f32,
}

/// Predicted time of a token at each rung, and of one that is audited, in any one
/// unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prices {
    pub token: [f64; RUNGS],
    pub audit: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Account {
    /// Tokens that may yet differ.
    balance: f64,
    /// Tokens served at each rung, old ones faded.
    tokens: [f64; RUNGS],
}

/// The agreement of what was served, as audits tell it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    pub agreement: f64,
    pub low: f64,
    pub high: f64,
}

/// Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Audits {
    pub answers: u64,
    pub tokens: u64,
    pub differing: u64,
    /// Answers that were to be audited and were not.
    pub missed: u64,
}

pub struct Agreement {
    rungs: [Rung; RUNGS],
    accounts: [Account; TARGETS.len()],
    audits: Audits,
    /// Of the answers that were to be audited of late, the share that were.
    audited: f64,
    /// Tokens of an answer.
    answer: f64,
}

impl Default for Agreement {
    fn default() -> Self {
        Agreement {
            rungs: [Rung::default(); RUNGS],
            accounts: [Account::default(); TARGETS.len()],
            audits: Audits::default(),
            audited: 1.0,
            answer: ANSWER,
        }
    }
}

impl Agreement {
    pub fn audits(&self) -> Audits {
        self.audits
    }

    /// The last rung whose risk is within the target, before any whose is not.
    pub fn proven(&self, target: u8) -> u8 {
        let may = 1.0 - TARGETS[usize::from(target)];
        let open = self.rungs[1..].iter().take_while(|r| r.possible(may));
        let within = |(_, r): &(usize, &Rung)| r.all.bounds().1 <= may;
        let proven = open.enumerate().filter(within).last();
        proven.map_or(0, |(i, _)| i + 1) as u8
    }

    /// The rung to try next: half way up to the first that is hardly within the target.
    /// Where there is none between, that one. `None`: the last is proven.
    fn next(&self, proven: u8, may: f64) -> Option<u8> {
        let first = usize::from(proven) + 1;
        let behind = self.rungs.get(first..)?;
        let hardly = behind.iter().position(|r| r.all.risk() > HARDLY * may);
        let open = hardly.unwrap_or(behind.len());
        (first < RUNGS).then(|| (first + open.saturating_sub(1) / 2) as u8)
    }

    /// Tokens that may yet differ before requests with the target are served
    /// losslessly.
    pub fn balance(&self, target: u8) -> f64 {
        self.accounts[usize::from(target)].balance
    }

    /// Of the tokens that requests with the target have had of late; `None`: they had
    /// none.
    pub fn estimate(&self, target: u8) -> Option<Estimate> {
        let tokens = &self.accounts[usize::from(target)].tokens;
        let all: f64 = tokens.iter().sum();
        if all < 1.0 {
            return None;
        }
        let differ = |share: fn(&Sums) -> f64| {
            let rungs = tokens.iter().zip(&self.rungs).skip(1);
            rungs.map(|(n, r)| n / all * share(&r.all)).sum::<f64>()
        };
        Some(Estimate {
            agreement: 1.0 - differ(Sums::risk),
            low: 1.0 - differ(|s| s.bounds().1),
            high: 1.0 - differ(|s| s.bounds().0),
        })
    }

    /// How the next request with the target is served. `tokens`: of its answer at
    /// most, 0 if unknown. `draws`: two numbers drawn from [0, 1).
    pub fn admit(&mut self, target: u8, tokens: u64, prices: &Prices, draws: [f64; 2]) -> Terms {
        let may = 1.0 - TARGETS[usize::from(target)];
        let answer = match tokens {
            0 => self.answer,
            n => self.answer.min(n as f64),
        };
        let proven = self.proven(target);
        let next = self.next(proven, may);
        let account = &mut self.accounts[usize::from(target)];
        let share = (WATCH * answer / account.balance.max(1.0)).clamp(AUDITS.0, AUDITS.1);
        let price = |rung: u8| match rung {
            0 => prices.token[0],
            rung => prices.token[usize::from(rung)] + share * prices.audit,
        };
        let cheapest = (0..=proven).min_by(|&a, &b| price(a).total_cmp(&price(b)));
        let audited = self.audited >= AUDITED;
        let mut serve = cheapest.filter(|_| audited).unwrap_or(0);
        let aside = match serve {
            0 => 0.0,
            rung => self.rungs[usize::from(rung)].presumed() * answer,
        };
        if aside > account.balance {
            serve = 0;
        }
        let mut terms = Terms {
            target,
            rung: serve,
            audit: 0.0,
            reserve: 0.0,
        };
        // A rung may pay only by those behind it that may be within the target, too.
        let pays = |next: u8| {
            let behind = usize::from(next)..RUNGS;
            let open =
                behind.take_while(|&r| r == usize::from(next) || self.rungs[r].possible(may));
            let least = open.fold(f64::INFINITY, |a, r| a.min(prices.token[r]));
            least + share * prices.audit < price(serve)
        };
        if let Some(next) = next.filter(|&next| pays(next)) {
            let rung = &self.rungs[usize::from(next)];
            let reserve = rung.presumed() * answer;
            let affordable = TRIAL_TIME * price(serve) / prices.audit;
            let trials = match audited {
                false => RARELY,
                true if rung.possible(may) => {
                    let news = 1.0 - rung.all.tokens * may / ENOUGH;
                    (affordable * news).clamp(LOOKS, TRIALS)
                }
                true => LOOKS,
            };
            if draws[0] < trials && reserve <= account.balance {
                account.balance -= reserve;
                terms.rung = next;
                terms.audit = 1.0;
                terms.reserve = reserve as f32;
                return terms;
            }
        }
        if serve > 0 {
            account.balance -= aside;
            terms.reserve = aside as f32;
            if draws[1] < share {
                terms.audit = share as f32;
            }
        }
        terms
    }

    /// A request has ended with so many tokens. `audited`: how many of them were, at
    /// least one, and how many of those the full model would have chosen otherwise;
    /// `None`: it was not audited.
    pub fn end(&mut self, terms: Terms, tokens: u64, audited: Option<(u64, u64)>) {
        let n = tokens as f64;
        let may = 1.0 - TARGETS[usize::from(terms.target)];
        let account = &mut self.accounts[usize::from(terms.target)];
        for t in &mut account.tokens {
            *t *= (1.0 - n / MEMORY).max(0.0);
        }
        account.tokens[usize::from(terms.rung)] += n;
        if tokens > 0 {
            self.answer += (n - self.answer) / 32.0;
        }
        let mut gain = f64::from(terms.reserve) + PAYS_IN * may * n;
        if terms.audit > 0.0 && tokens > 0 {
            let done = f64::from(u8::from(audited.is_some()));
            self.audited += (done - self.audited) * NEW;
            match audited {
                Some((of, d)) => {
                    self.audits.answers += 1;
                    self.audits.tokens += of;
                    self.audits.differing += d;
                    // The answers that it stands for: those that were not chosen, and
                    // those that were and could not be audited.
                    let share = f64::from(terms.audit) * self.audited.max(AUDITED);
                    let (of, d) = (of as f64, d as f64);
                    gain -= d * (n / of) / share;
                    let rung = usize::from(terms.rung);
                    if self.rungs[rung].observe(of, d) {
                        // Bolder ones are no better than what is known of this one now.
                        self.rungs[rung + 1..].fill(Rung::default());
                    }
                }
                None => self.audits.missed += 1,
            }
        }
        account.balance = (account.balance + gain).min(may * MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bolder, the cheaper.
    const PRICES: Prices = Prices {
        token: [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65],
        audit: 0.3,
    };

    /// Serves `answers` of 100 tokens, whose tokens differ with a chance that the
    /// rung and the answer's number give. The share that differed, and the share of
    /// the tokens at each rung.
    fn serve(
        a: &mut Agreement,
        target: u8,
        answers: usize,
        rng: &mut fastrand::Rng,
        risk: impl Fn(u8, usize) -> f64,
    ) -> (f64, [f64; RUNGS]) {
        let (mut differing, mut rungs) = (0u64, [0.0; RUNGS]);
        for i in 0..answers {
            let terms = a.admit(target, 0, &PRICES, [rng.f64(), rng.f64()]);
            // Answers are unlike: half have no differing token.
            let risk = match terms.rung {
                0 => 0.0,
                rung if rng.bool() => 2.0 * risk(rung, i),
                _ => 0.0,
            };
            let d = (0..100).filter(|_| rng.f64() < risk).count() as u64;
            differing += d;
            rungs[usize::from(terms.rung)] += 1.0 / answers as f64;
            a.end(terms, 100, (terms.audit > 0.0).then_some((100, d)));
        }
        (differing as f64 / (100 * answers) as f64, rungs)
    }

    fn at(agreement: f64) -> u8 {
        target(agreement).unwrap()
    }

    #[test]
    fn a_target_in_between_is_served_as_the_next_higher() {
        assert_eq!(TARGETS[usize::from(at(0.99))], 0.99);
        assert_eq!(TARGETS[usize::from(at(0.96))], 0.98);
        assert_eq!(TARGETS[usize::from(at(0.3))], 0.9);
        assert_eq!(target(0.9995), None);
        for agreement in [0.95f32, 0.98, 0.99, 0.995, 0.998, 0.999] {
            let said: f64 = agreement.to_string().parse().unwrap();
            assert_eq!(target(agreement.into()), target(said), "{said}");
        }
        assert_eq!(floor(0), None);
        assert!((1..RUNGS as u8 - 1).all(|r| floor(r) > floor(r + 1)));
    }

    /// Bounds hold as often as they say, where answers are more alike inside than
    /// between each other.
    #[test]
    fn bounds_hold() {
        let mut rng = fastrand::Rng::with_seed(4);
        for risk in [0.002, 0.01, 0.05] {
            let (mut above, mut below, runs) = (0, 0, 1000);
            for _ in 0..runs {
                let mut s = Sums::default();
                for _ in 0..60 {
                    let own = if rng.bool() { 2.0 * risk } else { 0.0 };
                    let d = (0..100).filter(|_| rng.f64() < own).count();
                    s.add((f64::INFINITY, 1.0), 100.0, d as f64);
                }
                above += usize::from(s.bounds().1 < risk);
                below += usize::from(s.bounds().0 > risk);
            }
            // 23 of 1000 by the normal distribution.
            assert!(above < 50 && below < 50, "{risk}: {above} {below}");
        }
    }

    #[test]
    fn nothing_is_promised_before_it_is_known() {
        let mut a = Agreement::default();
        assert_eq!(a.proven(0), 0);
        assert_eq!(a.estimate(0), None);
        let terms = a.admit(0, 0, &PRICES, [0.0, 0.0]);
        assert_eq!((terms.rung, terms.audit), (0, 0.0));
        // Who never audits stays lossless, and learns nothing.
        for _ in 0..10_000 {
            let terms = a.admit(0, 0, &PRICES, [0.0, 0.0]);
            a.end(terms, 100, None);
        }
        assert_eq!(a.proven(0), 0);
        assert!(a.audits().missed > 0 && a.audits().answers == 0);
    }

    /// Where every rung is within the target the last one serves most, and where none
    /// is nearly all is lossless.
    #[test]
    fn the_last_rung_within_the_target_serves() {
        for (agreement, risk) in [(0.95, 0.01), (0.99, 0.002), (0.999, 0.0001)] {
            let mut rng = fastrand::Rng::with_seed(11);
            let mut a = Agreement::default();
            let target = at(agreement);
            serve(&mut a, target, 8000, &mut rng, |_, _| risk);
            let (_, rungs) = serve(&mut a, target, 1000, &mut rng, |_, _| risk);
            assert!(rungs[RUNGS - 1] > 0.9, "{agreement}: {rungs:?}");
            let e = a.estimate(target).unwrap();
            assert!(e.low <= 1.0 - risk && 1.0 - risk <= e.high, "{e:?}");
            assert!(e.low >= agreement - 0.01, "{e:?}");
        }
        let mut rng = fastrand::Rng::with_seed(12);
        let mut a = Agreement::default();
        let (risk, rungs) = serve(&mut a, at(0.99), 5000, &mut rng, |_, _| 0.04);
        assert!(risk < 0.002 && rungs[0] > 0.95, "{risk} {rungs:?}");
        // In between, the middle of the ladder.
        let mut a = Agreement::default();
        let steps = |rung: u8, _| 0.002 * f64::from(rung);
        serve(&mut a, at(0.99), 5000, &mut rng, steps);
        let (risk, rungs) = serve(&mut a, at(0.99), 2000, &mut rng, steps);
        assert!(risk < 0.01, "{risk}");
        assert!(rungs[3] + rungs[4] + rungs[5] > 0.9, "{rungs:?}");
    }

    /// The text changes in the middle, and what was right before is wrong: the promise
    /// holds over the whole in at least 95 of 100 runs.
    #[test]
    fn a_sudden_change_does_not_break_the_promise() {
        for agreement in [0.95, 0.99, 0.999] {
            let mut kept = 0;
            for seed in 0..100 {
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut a = Agreement::default();
                let may = 1.0 - agreement;
                let (risk, _) = serve(&mut a, at(agreement), 3000, &mut rng, |rung, i| {
                    let late = if i < 1500 { 0.05 } else { 1.5 };
                    (late * may * f64::from(rung)).min(0.3)
                });
                kept += usize::from(risk <= may);
            }
            assert!(kept >= 95, "{agreement}: {kept} of 100");
        }
    }

    /// What costs more than lossless is neither served nor tried.
    #[test]
    fn a_rung_must_pay() {
        let mut rng = fastrand::Rng::with_seed(8);
        let mut a = Agreement::default();
        let dear = Prices {
            token: [0.7, 0.9, 0.88, 0.85, 0.82, 0.78, 0.75, 0.7],
            audit: 0.2,
        };
        for _ in 0..4000 {
            let terms = a.admit(at(0.95), 0, &dear, [rng.f64(), rng.f64()]);
            assert_eq!(terms.rung, 0);
            a.end(terms, 100, None);
        }
    }

    /// Many answers at one time, and the text changes while they run: what is set aside
    /// for each bounds how far the account is overdrawn.
    #[test]
    fn many_at_a_time_do_not_break_the_promise() {
        let mut kept = 0;
        for seed in 0..50 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut a = Agreement::default();
            let mut open: Vec<Terms> = Vec::new();
            let (mut differing, answers) = (0u64, 4000);
            for i in 0..answers {
                open.push(a.admit(at(0.99), 100, &PRICES, [rng.f64(), rng.f64()]));
                if open.len() < 128 {
                    continue;
                }
                let terms = open.swap_remove(rng.usize(0..open.len()));
                let late = if i < answers / 2 { 0.0005 } else { 0.015 };
                let risk = late * f64::from(terms.rung);
                let d = (0..100).filter(|_| rng.f64() < risk).count() as u64;
                differing += d;
                // Three in ten cannot be audited.
                let audited = terms.audit > 0.0 && rng.f64() < 0.7;
                a.end(terms, 100, audited.then_some((100, d)));
            }
            kept += usize::from(differing as f64 <= 0.01 * 100.0 * f64::from(answers));
        }
        assert!(kept >= 47, "{kept} of 50");
    }

    #[test]
    fn a_few_answers_prove_nothing_and_one_does_not_tell_all() {
        let mut a = Agreement::default();
        let terms = |audit| Terms {
            target: at(0.9),
            rung: 3,
            audit,
            reserve: 5.0,
        };
        for _ in 0..7 {
            a.end(terms(1.0), 5000, Some((5000, 0)));
            assert_eq!(a.proven(at(0.9)), 0);
        }
        for _ in 0..20 {
            a.end(terms(1.0), 5000, Some((5000, 0)));
        }
        assert_eq!(a.proven(at(0.9)), 3);
        // One long answer that went wrong.
        a.end(terms(1.0), 5000, Some((5000, 500)));
        assert!(a.rungs[3].all.risk() < 0.02, "{}", a.rungs[3].all.risk());
        // What had no token gives back what was set aside for it, and is no miss.
        let before = a.balance(at(0.9));
        a.end(terms(1.0), 0, None);
        assert_eq!(a.balance(at(0.9)), before + 5.0);
        assert_eq!(a.audits().missed, 0);
    }

    /// A rung that turns out to be beyond the target takes the bolder ones along.
    #[test]
    fn bolder_rungs_are_no_better() {
        let mut a = Agreement::default();
        let end = |a: &mut Agreement, rung, d| {
            let terms = Terms {
                target: at(0.99),
                rung,
                audit: 1.0,
                reserve: 0.0,
            };
            a.end(terms, 100, Some((100, d)));
        };
        for _ in 0..200 {
            end(&mut a, 3, 0);
            end(&mut a, 6, 0);
        }
        assert_eq!(a.proven(at(0.99)), 6);
        for _ in 0..12 {
            end(&mut a, 3, 10);
        }
        assert_eq!(a.proven(at(0.99)), 0);
    }

    /// Targets do not pay for each other.
    #[test]
    fn each_target_has_its_own_account() {
        let mut rng = fastrand::Rng::with_seed(3);
        let mut a = Agreement::default();
        let rungs = |rung: u8, _| 0.004 * f64::from(rung);
        for _ in 0..40 {
            let (strict, _) = serve(&mut a, at(0.999), 100, &mut rng, rungs);
            let (lax, _) = serve(&mut a, at(0.95), 100, &mut rng, rungs);
            assert!(strict <= 0.004 && lax <= 0.06, "{strict} {lax}");
        }
        assert_eq!(a.proven(at(0.999)), 0);
        assert_eq!(a.proven(at(0.95)), RUNGS as u8 - 1);
    }
}
