// SPDX-License-Identifier: Apache-2.0

//! From a model to its exits: harvest, fit, measure, choose, write.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use drex::core::config::Fill;
use drex_harness::machine;
use ndarray::s;
use rayon::prelude::*;

use crate::{
    calibrate,
    choose::{self, Heard, Predicted, RowCost},
    engine::{Engine, Info},
    exits::{self, Calibrations},
    fit::{self, Checkpoint, Fitted, Schedule, shuffled},
    harvest::{CHUNK, Harvest, Source},
    head::{Head, frequent},
    measure::measure,
    prompts,
    quality::{self, Said},
    report::{Exit, Prediction, Report, Text},
    states::{Range, States},
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

/// Of the texts, one of so many is held out.
const HELD: usize = 8;
/// Numbers of rows whose windows are timed.
const ROWS: [u32; 4] = [1, 4, 16, 64];
/// Heads that are looked at.
const HEADS: [usize; 6] = [2048, 4096, 6144, 8192, 12288, 16384];
/// States whose first choice is recomputed, to see that the head alone gives the model's logits.
const CHECKED: usize = 512;
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

    let source = source(o)?;
    let harvest = Harvest::new(&o.engine, &info, &o.work, &layers, &source);
    let (mut states, ends) = harvest.run(o.tokens, "harvesting")?;
    let held_texts = (ends.len() / HELD).max(2);
    ensure!(
        ends.len() > 2 * held_texts,
        "there are {} texts, too few to fit exits on; name longer ones, or several",
        ends.len()
    );
    let split = ends[ends.len() - held_texts - 1];
    let (train, held) = (0..split, split..states.rows.len());

    // A head first that has what any later one has, to see what a smaller one loses.
    let most = HEADS[HEADS.len() - 1].min(info.vocab_size as usize);
    let ranked = |size| frequent(&states.rows[train.clone()], info.vocab_size as usize, size);
    let first = ranked(most.min(8192));
    let head = Head::new(first.clone(), o.engine.head(&first, width)?);
    states.factor = head_factor(&states, &head)?;

    eprintln!("regressing on {} tokens", train.len());
    let ridge = fit::regress(&states, &layers, train.clone())?;
    let ridge_said = say_all(&states, &ridge, &head, held.clone())?;

    let none = [calibrate::NONE; 3];
    let timed: Vec<(Fitted, Calibrations)> = ridge.iter().map(|f| (f.clone(), none)).collect();
    let (costs, size) = head_size(
        o,
        &info,
        &layers,
        &timed,
        ranked,
        &ridge_said,
        &states,
        &held,
    )?;
    let tokens = ranked(size);
    let head = Head::new(tokens.clone(), o.engine.head(&tokens, width)?);

    let short = shortlist(&layers, &ridge_said, &costs, n_layers, o.refine);
    let checkpoint = Checkpoint {
        path: o.work.join(format!("maps-{}.bin", harvest.key)),
        key: format!(
            "{} {size} {short:?} {} {} {} {}",
            train.len(),
            o.schedule.mlp,
            o.schedule.passes,
            o.schedule.batch,
            o.schedule.rate
        ),
    };
    let refined = fit::refine(
        &states,
        &short,
        train.clone(),
        &head,
        &o.schedule,
        &checkpoint,
    )?;
    let said = say_all(&states, &refined, &head, held.clone())?;

    // Fitted on the first half of the held-out texts, judged on the second.
    let middle = ends[ends.len() - held_texts / 2 - 1] - held.start;
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
                coverage: head.coverage(&states.rows[held.clone()]),
                ece: quality::calibration_error(chances()),
                leave,
                right,
                cost_layers: ramp_layers(&costs),
                other: other.as_ref().map(|all| all[i]),
            }
        })
        .collect();

    let texts: Vec<usize> = ends[ends.len() - held_texts..]
        .iter()
        .map(|e| e - held.start)
        .collect();
    let (chosen, predictions) = choose_set(&costs, n_layers, &short, &said, &calibrations, &texts)?;

    let mut report = Report {
        model: info.name.clone(),
        architecture: info.architecture.clone(),
        n_layers,
        text: Text {
            what: match &source {
                Source::Prompts(p) => format!(
                    "what the model answers to {} prompts",
                    p.len().min(ends.len())
                ),
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
            tokens: train.len(),
            held_out: held.len(),
        },
        head_tokens: size,
        head_type: info.head_type.clone(),
        costs: costs.clone(),
        chosen: chosen.iter().map(|&i| short[i]).collect(),
        exits,
        worth: predictions.iter().any(|p| p.ratio() >= WORTH),
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

fn source(o: &Options) -> Result<Source> {
    if o.texts.is_empty() {
        return Ok(Source::Prompts(prompts::all()));
    }
    let mut all = Vec::new();
    for path in &o.texts {
        all.extend(fs::read(path).with_context(|| format!("--text {}", path.display()))?);
        all.push(0);
    }
    let lines = o.engine.tokens(&all, CHUNK)?;
    // So that those that are held out are from everywhere.
    let order = shuffled(lines.len(), 1);
    Ok(Source::Lines(
        order.into_iter().map(|i| lines[i].clone()).collect(),
    ))
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
    let factor = choose::median(ratios.map(|p| f64::from(p.0 / p.1)).collect()) as f32;
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

fn say(states: &States, f: &Fitted, head: &Head, range: Range) -> Result<Vec<Said>> {
    const PART: usize = 2048;
    let x = states.layer(f.layer, range.clone())?;
    let rows = &states.rows[range];
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

fn say_all(states: &States, all: &[Fitted], head: &Head, range: Range) -> Result<Vec<Vec<Said>>> {
    all.iter()
        .map(|f| say(states, f, head, range.clone()))
        .collect()
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
        let mut text = fs::read(path).with_context(|| format!("--held-out {}", path.display()))?;
        text.push(0);
        let source = Source::Lines(o.engine.tokens(&text, CHUNK)?);
        let harvest = Harvest::new(&o.engine, info, &o.work, self.layers, &source);
        let (mut states, _) = harvest.run(o.tokens / HELD, "harvesting held-out text")?;
        states.factor = self.factor;
        let said = say_all(&states, self.fitted, self.head, 0..states.rows.len())?;
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
    states: &States,
    held: &Range,
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
    let slope = (high - low) / (large.saturating_sub(small)).max(1) as f64;
    let middle = &said[said.len() / 2];
    let rows = &states.rows[held.clone()];
    let covered = |size| Head::new(ranked(size), ndarray::Array2::zeros((0, 0))).coverage(rows);
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
    let size = best.0;
    let costs = a
        .iter()
        .zip(&b)
        .map(|(a, b)| {
            let share = (size as f64 - small as f64) / (large.saturating_sub(small)).max(1) as f64;
            RowCost {
                ramp: (a.ramp + share * (b.ramp - a.ramp)).max(0.0),
                ..*b
            }
        })
        .collect();
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

/// The best one or two of the exits, and what they are predicted to bring.
fn choose_set(
    costs: &[RowCost],
    n_layers: u32,
    layers: &[u32],
    said: &[Vec<Said>],
    calibrations: &[Calibrations],
    ends: &[usize],
) -> Result<(Vec<usize>, Vec<Prediction>)> {
    let mut sets: Vec<Vec<usize>> = (0..layers.len()).map(|i| vec![i]).collect();
    for i in 0..layers.len() {
        sets.extend((i + 1..layers.len()).map(|j| vec![i, j]));
    }
    let all: Vec<(f64, Vec<Prediction>)> = sets
        .par_iter()
        .map(|set| -> Result<(f64, Vec<Prediction>)> {
            let heard = heard(set, said, calibrations, ends);
            let names: Vec<u32> = set.iter().map(|&i| layers[i]).collect();
            let good = [choose::threshold_for(&heard, set.len(), GOOD)];
            let mut all = Vec::new();
            for rows in ROWS {
                let tried: [(&str, Fill, &[f32]); 2] = [
                    ("lossless", Fill::Verify, &choose::THRESHOLDS),
                    ("0.99", Fill::Postfill, &good),
                ];
                for (quality, fill, thresholds) in tried {
                    let p: Predicted =
                        choose::predict(costs, n_layers, &names, &heard, rows, fill, thresholds)?;
                    all.push(Prediction {
                        quality: quality.into(),
                        in_flight: rows,
                        threshold: p.threshold,
                        off_tokens_per_s: p.off,
                        auto_tokens_per_s: p.auto,
                    });
                }
            }
            let gain = all.iter().map(|p| p.ratio().max(1.0).ln()).sum();
            Ok((gain, all))
        })
        .collect::<Result<_>>()?;
    let best = (0..sets.len())
        .max_by(|&a, &b| {
            // Of equal ones the smaller set.
            let key = |i: usize| (all[i].0, -(sets[i].len() as f64));
            let (a, b) = (key(a), key(b));
            a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
        })
        .context("there is no candidate")?;
    Ok((sets[best].clone(), all[best].1.clone()))
}

fn heard(
    set: &[usize],
    said: &[Vec<Said>],
    calibrations: &[Calibrations],
    ends: &[usize],
) -> Heard {
    let mut texts = Vec::new();
    let mut from = 0;
    for &to in ends {
        let token = |t: usize| {
            let exit = |&i: &usize| (calibrations[i][0].apply(said[i][t].gap), said[i][t].right);
            set.iter().map(exit).collect()
        };
        texts.push((from..to).map(token).collect());
        from = to;
    }
    Heard { texts }
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
