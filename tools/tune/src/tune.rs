// SPDX-License-Identifier: Apache-2.0

//! From a model to its exits: harvest, fit, measure, choose, write.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use drex::core::config::Fill;
use drex_harness::{machine, stats};
use ndarray::s;
use rayon::prelude::*;

use crate::{
    calibrate,
    choose::{self, Heard, RowCost},
    engine::{Engine, Info},
    exits::{self, Calibrations},
    fit::{self, Checkpoint, Fitted, Schedule, shuffled},
    harvest::{CHUNK, Harvest, Source},
    head::{Head, frequent},
    measure::measure,
    prompts::{self, Use},
    quality::{self, Said},
    report::{Exit, Prediction, Report, Text},
    states::States,
};

pub struct Options {
    pub engine: Engine,
    pub output: PathBuf,
    pub work: PathBuf,
    pub texts: Vec<PathBuf>,
    pub held_out: Option<PathBuf>,
    pub tokens: usize,
    /// Candidates; empty: a tenth of the model apart.
    pub layers: Vec<u32>,
    /// How many candidates are refined.
    pub refine: usize,
    pub schedule: Schedule,
    /// Tokens of the head; 0: by cost against coverage.
    pub head_tokens: usize,
    /// Most that a ramp may cost, in layers.
    pub ramp_layers: f64,
    /// Measure in the server what the exits bring.
    pub measure: bool,
}

/// Of the tokens, one of so many is held out.
const HELD: usize = 8;
/// Numbers of rows whose windows are timed.
const ROWS: [u32; 4] = [1, 4, 16, 64];
/// Heads that are looked at.
const HEADS: [usize; 6] = [2048, 4096, 6144, 8192, 12288, 16384];
/// States whose first choice is recomputed, to see that the head alone gives the model's logits.
const CHECKED: usize = 512;
/// What fill verify gives.
const LOSSLESS: &str = "lossless";
/// What counts as lossy but good.
const GOOD: f64 = 0.99;
/// Predicted speed that is worth the trouble.
const WORTH: f64 = 1.02;

pub fn tune(o: &Options) -> Result<Report> {
    let info = o.engine.info()?;
    let n_layers = info.block_count;
    ensure!(
        n_layers >= 3,
        "the model has {n_layers} layers, too few to leave early"
    );
    let layers = candidates(&o.layers, n_layers)?;
    let width = info.embedding_length as usize;
    fs::create_dir_all(&o.work).with_context(|| format!("making {}", o.work.display()))?;

    let (fit_on, judge_on) = sources(o)?;
    let harvest = Harvest::new(&o.engine, &info, &o.work, &layers, &fit_on);
    let (mut states, _) = harvest.run(o.tokens - o.tokens / HELD, "harvesting")?;
    let judge = Harvest::new(&o.engine, &info, &o.work, &layers, &judge_on);
    let (mut held, ends) = judge.run(o.tokens / HELD, "harvesting what is held out")?;
    ensure!(
        ends.len() > 1,
        "there are too few texts to hold some out; name longer ones, or several"
    );

    // A head first that has what any later one has, to see what a smaller one loses.
    let most = HEADS[HEADS.len() - 1].min(info.vocab_size as usize);
    let ranked = |size| frequent(&states.rows, info.vocab_size as usize, size);
    let first = ranked(most.min(8192));
    let head = Head::new(first.clone(), o.engine.head(&first, width)?);
    states.factor = head_factor(&states, &head)?;
    held.factor = states.factor;

    eprintln!("regressing on {} tokens", states.rows.len());
    let ridge = fit::regress(&states, &layers)?;
    let ridge_said = say_all(&held, &ridge, &head)?;

    let none = [calibrate::NONE; 3];
    let timed: Vec<(Fitted, Calibrations)> = ridge.iter().map(|f| (f.clone(), none)).collect();
    let (costs, size) = head_size(o, &info, &layers, &timed, ranked, &ridge_said, &held)?;
    let tokens = ranked(size);
    let head = Head::new(tokens.clone(), o.engine.head(&tokens, width)?);

    let short = shortlist(&layers, &ridge_said, &costs, n_layers, o.refine);
    let checkpoint = Checkpoint {
        path: o.work.join(format!("maps-{}.bin", harvest.key)),
        key: format!(
            "{:016x} {size} {short:?} {} {} {} {}",
            states.fingerprint(),
            o.schedule.mlp,
            o.schedule.passes,
            o.schedule.batch,
            o.schedule.rate
        ),
    };
    let refined = fit::refine(&states, &short, &head, &o.schedule, &checkpoint)?;
    let said = say_all(&held, &refined, &head)?;

    // Calibrated and chosen on the first half of the held-out texts, judged on the second.
    let (first, second) = ends.split_at(ends.len().div_ceil(2));
    let middle = first[first.len() - 1];
    let calibrations: Vec<Calibrations> = said.iter().map(|s| calibrated(&s[..middle])).collect();

    let other = match &o.held_out {
        None => None,
        Some(path) => {
            let judge = Judge {
                layers: &layers,
                factor: states.factor,
                fitted: &refined,
                head: &head,
                calibrations: &calibrations,
            };
            Some(judge.other_text(o, &info, path)?)
        }
    };

    let exits: Vec<Exit> = refined
        .iter()
        .zip(&said)
        .zip(&calibrations)
        .enumerate()
        .map(|(i, ((f, s), c))| {
            let chances = || s[middle..].iter().map(|s| (c[0].apply(s.gap), s.right));
            let (leave, right) = quality::leaving(chances(), 0.7);
            let ridge_at = layers.iter().position(|l| *l == f.layer);
            Exit {
                layer: f.layer,
                kind: f.map.kind().into(),
                agreement: quality::agreement(s),
                agreement_ridge: ridge_at.map_or(f64::NAN, |k| quality::agreement(&ridge_said[k])),
                coverage: head.coverage(&held.rows),
                ece: quality::calibration_error(chances()),
                leave,
                right,
                cost_layers: ramp_layers(&costs),
                other: other.as_ref().map(|all| all[i]),
            }
        })
        .collect();

    let part = |from: usize, ends: &[usize]| Part {
        said: said.iter().map(|s| s[from..].to_vec()).collect(),
        ends: ends.iter().map(|e| e - from).collect(),
        calibrations: &calibrations,
    };
    let set = choose_set(&costs, n_layers, &short, &part(0, first))?;
    let (chosen, predictions) = set.judged(&costs, n_layers, &short, &part(middle, second))?;

    let mut report = Report {
        model: info.name.clone(),
        architecture: info.architecture.clone(),
        n_layers,
        text: Text {
            what: match &fit_on {
                Source::Prompts(_) => "what the model answers to prompts".into(),
                Source::Lines(_) => o
                    .texts
                    .iter()
                    .map(|p| {
                        p.file_name()
                            .unwrap_or_default()
                            .to_string_lossy()
                            .into_owned()
                    })
                    .collect::<Vec<_>>()
                    .join(", "),
            },
            tokens: states.rows.len(),
            held_out: held.rows.len(),
        },
        head_tokens: size,
        head_type: info.head_type.clone(),
        costs: costs.clone(),
        chosen: chosen.iter().map(|&i| short[i]).collect(),
        exits,
        worth: predictions
            .iter()
            .any(|p| p.quality == LOSSLESS && p.ratio() >= WORTH),
        predictions,
        measured: Vec::new(),
        file: o.output.display().to_string(),
    };
    let written: Vec<(Fitted, Calibrations)> = chosen
        .iter()
        .map(|&i| (refined[i].clone(), calibrations[i]))
        .collect();
    let write = |report: &Report| {
        let text = serde_json::to_string(report)?;
        exits::write(&o.output, &info, &tokens, &written, &text)
    };
    write(&report)?;
    if o.measure {
        report.measured = measure(&o.engine, info.template, &o.output, &report.predictions)?;
        write(&report)?;
    }
    Ok(report)
}

fn candidates(named: &[u32], n_layers: u32) -> Result<Vec<u32>> {
    let mut layers = named.to_vec();
    if layers.is_empty() {
        layers = (1..10)
            .map(|k| (f64::from(k * n_layers) / 10.0).round() as u32)
            .collect();
        layers.retain(|l| (1..n_layers).contains(l));
    }
    layers.sort_unstable();
    layers.dedup();
    if let Some(bad) = layers.iter().find(|l| !(1..n_layers).contains(*l)) {
        bail!("--layers: {bad} is not in 1..{}", n_layers - 1);
    }
    Ok(layers)
}

/// Texts to fit on, and texts that are held out: other topics of the prompts, or the last part of each file.
fn sources(o: &Options) -> Result<(Source, Source)> {
    if o.texts.is_empty() {
        return Ok((
            Source::Prompts(prompts::all(Use::Fit)),
            Source::Prompts(prompts::all(Use::Judge)),
        ));
    }
    let (mut fit_on, mut judge_on) = (Vec::new(), Vec::new());
    for path in &o.texts {
        let mut lines = lines(o, "--text", path)?;
        let held = lines.len().div_ceil(HELD);
        judge_on.extend(lines.split_off(lines.len() - held));
        fit_on.extend(lines);
    }
    ensure!(
        !fit_on.is_empty(),
        "--text: there are fewer than {CHUNK} tokens to fit on"
    );
    // So that a part of them is from everywhere.
    Ok((Source::Lines(mixed(fit_on)), Source::Lines(mixed(judge_on))))
}

fn lines(o: &Options, option: &str, path: &Path) -> Result<Vec<String>> {
    let mut text = fs::read(path).with_context(|| format!("{option} {}", path.display()))?;
    text.push(0);
    let lines = o.engine.tokens(&text, CHUNK)?;
    ensure!(!lines.is_empty(), "{option} {}: no text", path.display());
    Ok(lines)
}

fn mixed(lines: Vec<String>) -> Vec<String> {
    let order = shuffled(lines.len(), 1);
    order.into_iter().map(|i| lines[i].clone()).collect()
}

/// What the head's product with the last state lacks to be the model's logits, which is one factor at most: a bias, or a
/// cap on the logits, would make maps fit something else.
fn head_factor(states: &States, head: &Head) -> Result<f32> {
    let n = CHECKED.min(states.rows.len());
    let products = head.logits(states.last(0..n)?.view());
    // Of each row: the model's greatest logit, and the product that is to be it.
    let pairs: Vec<(f32, f32)> = states.rows[..n]
        .iter()
        .zip(products.outer_iter())
        .filter_map(|(row, p)| Some((row.log_sum + row.p_top.ln(), p[head.find(row.top)?])))
        .collect();
    let ratios = pairs.iter().filter(|p| p.1.abs() > 1.0);
    ensure!(
        ratios.clone().next().is_some(),
        "the model's greatest logits are too small, or of tokens that the exits' head has not, to compare them with the \
         head's product with the last state"
    );
    let factor = stats::median(&ratios.map(|p| f64::from(p.0 / p.1)).collect::<Vec<_>>()) as f32;
    let near = |p: &&(f32, f32)| (p.0 - factor * p.1).abs() <= 0.1 + 0.03 * p.0.abs();
    let fitting = pairs.iter().filter(near).count();
    ensure!(
        factor > 0.0 && fitting as f64 >= 0.97 * pairs.len() as f64 && !pairs.is_empty(),
        "the model's logits are not its head's product with the last state ({fitting} of {} greatest ones are): exits \
         cannot be fitted to it",
        pairs.len()
    );
    // What rounding does is no factor.
    Ok(if (factor - 1.0).abs() < 0.02 {
        1.0
    } else {
        factor
    })
}

fn say(states: &States, f: &Fitted, head: &Head) -> Result<Vec<Said>> {
    const PART: usize = 2048;
    let x = states.layer(f.layer, states.all())?;
    let rows = &states.rows;
    let parts: Vec<Vec<Said>> = (0..rows.len())
        .into_par_iter()
        .step_by(PART)
        .map(|i| {
            let to = rows.len().min(i + PART);
            quality::said(
                head,
                f.map.apply(x.slice(s![i..to, ..])).view(),
                &rows[i..to],
            )
        })
        .collect();
    Ok(parts.concat())
}

fn say_all(states: &States, all: &[Fitted], head: &Head) -> Result<Vec<Vec<Said>>> {
    all.iter().map(|f| say(states, f, head)).collect()
}

fn calibrated(said: &[Said]) -> Calibrations {
    let by = |f: fn(&Said) -> f32| {
        let pairs: Vec<(f32, bool)> = said.iter().map(|s| (f(s), s.right)).collect();
        calibrate::fit(&pairs)
    };
    [by(|s| s.gap), by(|s| s.max_prob), by(|s| s.entropy)]
}

/// What is judged on a text of another kind.
struct Judge<'a> {
    layers: &'a [u32],
    factor: f32,
    fitted: &'a [Fitted],
    head: &'a Head,
    calibrations: &'a [Calibrations],
}

impl Judge<'_> {
    /// Agreement and calibration error of each exit.
    fn other_text(&self, o: &Options, info: &Info, path: &Path) -> Result<Vec<(f64, f64)>> {
        let source = Source::Lines(lines(o, "--held-out", path)?);
        let harvest = Harvest::new(&o.engine, info, &o.work, self.layers, &source);
        let (mut states, _) = harvest.run(o.tokens / HELD, "harvesting held-out text")?;
        states.factor = self.factor;
        let said = say_all(&states, self.fitted, self.head)?;
        let one = |(s, c): (&Vec<Said>, &Calibrations)| {
            let chances = s.iter().map(|s| (c[0].apply(s.gap), s.right));
            (quality::agreement(s), quality::calibration_error(chances))
        };
        Ok(said.iter().zip(self.calibrations).map(one).collect())
    }
}

/// In layers, where few rows run, which is where exits are to pay.
fn ramp_layers(costs: &[RowCost]) -> f64 {
    let c = &costs[1.min(costs.len() - 1)];
    c.ramp / c.layer
}

/// The size of the head whose exits are predicted to save most, and what windows cost with it.
#[allow(clippy::too_many_arguments)]
fn head_size(
    o: &Options,
    info: &Info,
    layers: &[u32],
    timed: &[(Fitted, Calibrations)],
    ranked: impl Fn(usize) -> Vec<i32>,
    said: &[Vec<Said>],
    held: &States,
) -> Result<(Vec<RowCost>, usize)> {
    let vocab = info.vocab_size as usize;
    let time = |size: usize| -> Result<Vec<RowCost>> {
        eprintln!("timing windows with a head of {size} tokens");
        machine::warn_if_busy();
        let path = o.work.join("timed.gguf");
        exits::write(&path, info, &ranked(size), timed, "")?;
        let mut few = vec![
            layers[0],
            layers[layers.len() / 2],
            layers[layers.len() - 1],
        ];
        few.dedup();
        if few.len() == 1 {
            // Another window, through the model's own head: what a layer costs takes two.
            few.push(if few[0] > 1 { 1 } else { 2 });
        }
        let costs = o.engine.costs(&few, &ROWS, &path)?;
        choose::row_costs(&costs, info.block_count)
    };
    if o.head_tokens > 0 {
        let size = o.head_tokens.min(vocab);
        return Ok((time(size)?, size));
    }
    let (small, large) = (HEADS[0].min(vocab), 8192.min(vocab));
    let (a, b) = (time(small)?, time(large)?);
    let (low, high) = (ramp_layers(&a), ramp_layers(&b));
    // A larger head costs no less: what says otherwise is noise.
    let slope = ((high - low) / (large.saturating_sub(small)).max(1) as f64).max(0.0);
    let middle = &said[said.len() / 2];
    let covered =
        |size| Head::new(ranked(size), ndarray::Array2::zeros((0, 0))).coverage(&held.rows);
    // Of the tokens that the large head has, an exit in the middle is right about so many.
    let right = quality::agreement(middle) / covered(large).max(1e-9);
    let mut best = (small, f64::NEG_INFINITY);
    for size in HEADS.into_iter().filter(|&s| s <= vocab) {
        let cost = low + slope * (size as f64 - small as f64);
        let gain = covered(size) * right * f64::from(info.block_count) - cost;
        if cost <= o.ramp_layers && gain > best.1 {
            best = (size, gain);
        }
    }
    if best.1 == f64::NEG_INFINITY {
        eprintln!(
            "warning: --ramp-layers {}: a head of {small} tokens costs {low:.2} already",
            o.ramp_layers
        );
    }
    let size = best.0;
    let costs = match size {
        _ if size == small => a,
        _ if size == large => b,
        _ => time(size)?,
    };
    Ok((costs, size))
}

/// The layers where agreement exceeds by most what the way to them costs.
fn shortlist(
    layers: &[u32],
    said: &[Vec<Said>],
    costs: &[RowCost],
    n_layers: u32,
    n: usize,
) -> Vec<u32> {
    let ramp = ramp_layers(costs);
    let gain = |i: usize| {
        quality::agreement(&said[i]) - (f64::from(layers[i]) + ramp) / f64::from(n_layers)
    };
    let mut order: Vec<usize> = (0..layers.len()).collect();
    order.sort_by(|&a, &b| gain(b).total_cmp(&gain(a)));
    let mut short: Vec<u32> = order
        .into_iter()
        .take(n.max(1))
        .map(|i| layers[i])
        .collect();
    short.sort_unstable();
    short
}

/// What all candidates say of some of the held-out texts.
struct Part<'a> {
    /// Of each candidate, token by token.
    said: Vec<Vec<Said>>,
    /// Where each text ends.
    ends: Vec<usize>,
    calibrations: &'a [Calibrations],
}

impl Part<'_> {
    fn heard(&self, set: &[usize]) -> Heard {
        let mut texts = Vec::new();
        let mut from = 0;
        for &to in &self.ends {
            let token = |t: usize| {
                let exit = |&i: &usize| {
                    let said = &self.said[i][t];
                    (self.calibrations[i][0].apply(said.gap), said.right)
                };
                set.iter().map(exit).collect()
            };
            texts.push((from..to).map(token).collect());
            from = to;
        }
        Heard { texts }
    }
}

/// One or two of the candidates, and a threshold for each quality and number in flight.
struct Set {
    of: Vec<usize>,
    thresholds: Vec<(&'static str, Fill, u32, f32)>,
    gain: f64,
}

impl Set {
    /// The thresholds that are best on these texts.
    fn of(
        of: Vec<usize>,
        costs: &[RowCost],
        n_layers: u32,
        layers: &[u32],
        part: &Part,
    ) -> Result<Set> {
        let heard = part.heard(&of);
        let names: Vec<u32> = of.iter().map(|&i| layers[i]).collect();
        let good = [choose::threshold_for(&heard, of.len(), GOOD)];
        let (mut thresholds, mut gain) = (Vec::new(), 0.0);
        for rows in ROWS {
            let tried: [(&str, Fill, &[f32]); 2] = [
                (LOSSLESS, Fill::Verify, &choose::THRESHOLDS),
                ("0.99", Fill::Postfill, &good),
            ];
            for (quality, fill, all) in tried {
                let p = choose::predict(costs, n_layers, &names, &heard, rows, fill, all)?;
                gain += (p.auto / p.off).max(1.0).ln();
                thresholds.push((quality, fill, rows, p.threshold));
            }
        }
        Ok(Set {
            of,
            thresholds,
            gain,
        })
    }

    /// What these thresholds bring on other texts.
    fn judged(
        self,
        costs: &[RowCost],
        n_layers: u32,
        layers: &[u32],
        part: &Part,
    ) -> Result<(Vec<usize>, Vec<Prediction>)> {
        let heard = part.heard(&self.of);
        let names: Vec<u32> = self.of.iter().map(|&i| layers[i]).collect();
        let one = |&(quality, fill, rows, threshold): &(&str, Fill, u32, f32)| {
            let p = choose::predict(costs, n_layers, &names, &heard, rows, fill, &[threshold])?;
            Ok(Prediction {
                quality: quality.into(),
                in_flight: rows,
                threshold,
                off_tokens_per_s: p.off,
                auto_tokens_per_s: p.auto,
            })
        };
        let predictions = self.thresholds.par_iter().map(one).collect::<Result<_>>()?;
        Ok((self.of, predictions))
    }
}

/// The best one or two of the exits.
fn choose_set(costs: &[RowCost], n_layers: u32, layers: &[u32], part: &Part) -> Result<Set> {
    let mut sets: Vec<Vec<usize>> = (0..layers.len()).map(|i| vec![i]).collect();
    for i in 0..layers.len() {
        sets.extend((i + 1..layers.len()).map(|j| vec![i, j]));
    }
    let all: Vec<Set> = sets
        .into_par_iter()
        .map(|of| Set::of(of, costs, n_layers, layers, part))
        .collect::<Result<_>>()?;
    // Of equal ones the smaller set.
    let better = |a: &Set, b: &Set| {
        let by_size = || b.of.len().cmp(&a.of.len());
        a.gain.total_cmp(&b.gain).then_with(by_size)
    };
    all.into_iter()
        .max_by(better)
        .context("there is no candidate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_a_tenth_of_the_model_apart() {
        assert_eq!(
            candidates(&[], 30).unwrap(),
            [3, 6, 9, 12, 15, 18, 21, 24, 27]
        );
        assert_eq!(candidates(&[], 4).unwrap(), [1, 2, 3]);
        assert_eq!(candidates(&[8, 4, 8], 16).unwrap(), [4, 8]);
        for bad in [0, 16] {
            let error = candidates(&[4, bad], 16).unwrap_err().to_string();
            assert_eq!(error, format!("--layers: {bad} is not in 1..15"));
        }
    }
}
