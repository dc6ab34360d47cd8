// SPDX-License-Identifier: Apache-2.0

//! Record files, as `llama-server --drex-record` writes them: JSON lines. The
//! first describes the model; the others say when requests came and went, and
//! what each window took and each row's confidence.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use drex::core::estimate::cost::CostModel;
use drex::core::estimate::profile::Profile;
use serde_json::Value;

use crate::workload::{Arrivals, Confidence};

#[derive(Debug)]
pub struct Record {
    pub profile: Profile,
    pub thresholds: Vec<f32>,
    pub max_batch: u32,
    pub policy: String,
    /// Time of arrival in ns from the first one, and tokens.
    pub arrivals: Vec<(u64, u64)>,
    /// Rows of the prompt of each arrival.
    pub prompts: Vec<u64>,
    /// By request, token and ramp; NaN: not scored there.
    pub confidences: HashMap<u64, Vec<Vec<f32>>>,
    pub windows: u64,
    /// Host time between windows, mean in ns.
    pub gap_ns: f64,
    /// What was measured, to compare a replay with.
    pub tokens: u64,
    pub tokens_per_s: f64,
    /// Share of the drafts that were right; `None`: there were none.
    pub accept: Option<f64>,
}

#[derive(Default)]
struct Asked {
    at: u64,
    prompt: u64,
    tokens: Vec<Vec<f32>>,
    /// Of the token under way.
    row: Option<Vec<f32>>,
}

impl Record {
    pub fn read(path: &str) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("--replay {path}"))?;
        Self::parse(path, &text)
    }

    pub fn parse(path: &str, text: &str) -> Result<Self> {
        let mut lines = text.lines().enumerate();
        let (_, first) = lines.next().with_context(|| format!("{path}: empty"))?;
        let head: Value =
            serde_json::from_str(first).with_context(|| format!("{path}:1: not JSON"))?;
        if head["drex_record"] != 1 {
            bail!(
                "{path}:1: drex_record is {}; expected 1",
                head["drex_record"]
            );
        }
        let n_layers = number(&head, "n_layers").with_context(|| format!("{path}:1"))? as u32;
        let ramp_layers: Vec<u32> = numbers::<u64>(&head, "ramp_layers")
            .with_context(|| format!("{path}:1"))?
            .into_iter()
            .map(|x| x as u32)
            .collect();
        let thresholds: Vec<f32> = numbers::<f64>(&head, "thresholds")
            .with_context(|| format!("{path}:1"))?
            .into_iter()
            .map(|x| x as f32)
            .collect();
        let mut before = 0;
        for &l in &ramp_layers {
            if l <= before || l >= n_layers {
                bail!(
                    "{path}:1: ramp_layers has {l}; expected increasing numbers below n_layers, {n_layers}"
                );
            }
            before = l;
        }
        if ramp_layers.is_empty() || thresholds.len() != ramp_layers.len() {
            bail!(
                "{path}:1: {} ramp_layers and {} thresholds; expected as many of both, at least one",
                ramp_layers.len(),
                thresholds.len()
            );
        }
        let mut cost = CostModel::new(n_layers, &ramp_layers);
        let mut asked: HashMap<u64, Asked> = HashMap::new();
        let mut order = Vec::new();
        let (mut windows, mut gaps, mut gap_count, mut last_end) = (0u64, 0.0, 0u64, 0u64);
        let mut tokens = 0u64;
        let (mut judged, mut accepted) = (0u64, 0u64);
        let (mut first_at, mut last_at) = (None, 0u64);
        let mut quiet = false;
        for (i, line) in lines {
            let at = || format!("{path}:{}", i + 1);
            if line.trim().is_empty() {
                continue;
            }
            let v: Value = match serde_json::from_str(line) {
                Ok(v) => v,
                // A server that was killed leaves half a line.
                Err(_) if i + 1 == text.lines().count() => break,
                Err(e) => return Err(e).with_context(at),
            };
            let t = number(&v, "t").with_context(at)?;
            match v["e"].as_str() {
                Some("add") => {
                    let id = number(&v, "id").with_context(at)?;
                    let prompt = number(&v, "n_prompt").with_context(at)?;
                    asked.insert(
                        id,
                        Asked {
                            at: t,
                            prompt,
                            ..Asked::default()
                        },
                    );
                    order.push(id);
                    quiet = false;
                }
                Some("remove") => quiet = false,
                Some("step") => {
                    let ns = number(&v, "ns").with_context(at)?;
                    let begin = number(&v, "begin").with_context(at)? as u32;
                    let end = number(&v, "end").with_context(at)? as u32;
                    let ids = numbers::<u64>(&v, "ids").with_context(at)?;
                    if begin >= end || end > n_layers {
                        bail!(
                            "{}: begin is {begin}, end is {end}; expected a window within {n_layers} layers",
                            at()
                        );
                    }
                    let ramp = ramp_layers.iter().position(|&l| l == end);
                    let conf: Vec<f32> = match (ramp, v["conf"].as_array()) {
                        (None, _) => Vec::new(),
                        (Some(_), Some(c)) if c.len() == ids.len() => c
                            .iter()
                            .map(|x| x.as_f64().map_or(0.0, |x| x as f32))
                            .collect(),
                        _ => bail!(
                            "{}: conf: expected {} numbers, one for each of ids",
                            at(),
                            ids.len()
                        ),
                    };
                    let exit: Vec<bool> = v["exit"]
                        .as_array()
                        .map(|e| e.iter().map(|x| x == 1).collect())
                        .unwrap_or_default();
                    if ramp.is_some() && exit.len() != ids.len() {
                        bail!(
                            "{}: exit: expected {} numbers, one for each of ids",
                            at(),
                            ids.len()
                        );
                    }
                    let cells = number(&v, "kv").with_context(at)?;
                    // Rows of prompts beside them; servers that run prompts
                    // between windows do not write it.
                    let prompts = match &v["prompt"] {
                        Value::Null => 0,
                        _ => number(&v, "prompt").with_context(at)? as u32,
                    };
                    cost.observe(begin, end, ids.len() as u32, cells, prompts, ns);
                    windows += 1;
                    if quiet && t >= last_end {
                        gaps += (t - last_end) as f64;
                        gap_count += 1;
                    }
                    quiet = true;
                    last_end = t + ns;
                    first_at.get_or_insert(t);
                    last_at = t + ns;
                    // Pending rows, and what became of drafts: 1 right, 0
                    // wrong, -1 behind a wrong one.
                    let column = |key: &str| -> Result<Vec<i64>> {
                        let Some(all) = v[key].as_array() else {
                            return Ok(vec![0; ids.len()]);
                        };
                        if all.len() != ids.len() {
                            bail!(
                                "{}: {key}: expected {} numbers, one for each of ids",
                                at(),
                                ids.len()
                            );
                        }
                        Ok(all.iter().map(|x| x.as_i64().unwrap_or(2)).collect())
                    };
                    let (back, draft) = (column("back")?, column("draft")?);
                    let has_drafts = v["draft"].is_array();
                    for (k, id) in ids.iter().enumerate() {
                        let void = has_drafts && draft[k] == -1;
                        if has_drafts && (draft[k] == 0 || draft[k] == 1) {
                            judged += 1;
                            accepted += u64::from(draft[k] == 1);
                        }
                        let a = asked.get_mut(id).with_context(|| {
                            format!("{}: ids has {id}, which was never added", at())
                        })?;
                        if back[k] > 0 {
                            // It was counted where it left.
                            if void && a.tokens.pop().is_some() {
                                tokens -= 1;
                            }
                            continue;
                        }
                        if void {
                            a.row = None;
                            continue;
                        }
                        let row = a
                            .row
                            .get_or_insert_with(|| vec![f32::NAN; ramp_layers.len()]);
                        let out = match ramp {
                            Some(r) => {
                                row[r] = conf[k];
                                exit[k]
                            }
                            None => true,
                        };
                        if out {
                            a.tokens.extend(a.row.take());
                            tokens += 1;
                        }
                    }
                }
                _ => bail!("{}: e is {}; expected add, step or remove", at(), v["e"]),
            }
        }
        if windows == 0 {
            bail!("{path}: no window was recorded");
        }
        let start = order.first().map_or(0, |id| asked[id].at);
        let (mut arrivals, mut prompts) = (Vec::new(), Vec::new());
        let mut confidences = HashMap::new();
        for id in order {
            let a = &mut asked.get_mut(&id).context("an id")?;
            if a.tokens.is_empty() {
                continue;
            }
            confidences.insert(arrivals.len() as u64, std::mem::take(&mut a.tokens));
            let n = confidences[&(arrivals.len() as u64)].len() as u64;
            arrivals.push((a.at - start, n));
            prompts.push(a.prompt);
        }
        let seconds = last_at.saturating_sub(first_at.unwrap_or(0)) as f64 / 1e9;
        Ok(Record {
            profile: cost.profile().clone(),
            thresholds,
            max_batch: number(&head, "max_batch").with_context(|| format!("{path}:1"))? as u32,
            policy: head["policy"].as_str().unwrap_or("").into(),
            prompts,
            arrivals,
            confidences,
            windows,
            gap_ns: if gap_count > 0 {
                gaps / gap_count as f64
            } else {
                0.0
            },
            tokens,
            tokens_per_s: tokens as f64 / seconds.max(1e-9),
            accept: (judged > 0).then(|| accepted as f64 / judged as f64),
        })
    }

    /// Keeps some of the ramps.
    pub fn keep_ramps(&mut self, layers: &[u32]) -> Result<()> {
        let p = &self.profile;
        let mut kept = Vec::new();
        for l in layers {
            match p.ramp_layers.iter().position(|r| r == l) {
                Some(i) => kept.push(i),
                None => bail!(
                    "--ramps: {l} was not recorded; recorded were {:?}",
                    p.ramp_layers
                ),
            }
        }
        kept.sort_unstable();
        kept.dedup();
        let mut segments = Vec::new();
        let mut from = 0;
        for to in kept.iter().map(|i| i + 1).chain([p.segments.len()]) {
            let mut s = p.segments[from];
            for o in &p.segments[from + 1..to] {
                s.ns += o.ns;
                s.ns_per_row += o.ns_per_row;
                s.ns_per_prompt_row += o.ns_per_prompt_row;
                s.ns_per_cell += o.ns_per_cell;
            }
            segments.push(s);
            from = to;
        }
        for tokens in self.confidences.values_mut() {
            for t in tokens {
                *t = kept.iter().map(|&i| t[i]).collect();
            }
        }
        self.thresholds = kept.iter().map(|&i| self.thresholds[i]).collect();
        self.profile.ramp_layers = kept.iter().map(|&i| p.ramp_layers[i]).collect();
        self.profile.segments = segments;
        Ok(())
    }

    /// A row that exited was not scored deeper, and a threshold above the
    /// recorded one asks: those are drawn from what other rows had there.
    pub fn confidence(&self) -> Confidence {
        Confidence::Recorded(self.confidences.clone())
    }

    pub fn trace(&self) -> Arrivals {
        Arrivals::Trace(self.arrivals.clone())
    }
}

fn number(v: &Value, key: &str) -> Result<u64> {
    match v[key].as_u64() {
        Some(n) => Ok(n),
        None => bail!("{key} is {}; expected a whole number", v[key]),
    }
}

fn numbers<T: FromJson>(v: &Value, key: &str) -> Result<Vec<T>> {
    let Some(all) = v[key].as_array() else {
        bail!("{key} is {}; expected an array", v[key])
    };
    all.iter()
        .map(|x| T::from_json(x).with_context(|| format!("{key} has {x}; expected numbers")))
        .collect()
}

trait FromJson: Sized {
    fn from_json(v: &Value) -> Option<Self>;
}

impl FromJson for u64 {
    fn from_json(v: &Value) -> Option<u64> {
        v.as_u64()
    }
}

impl FromJson for f64 {
    fn from_json(v: &Value) -> Option<f64> {
        v.as_f64()
    }
}
