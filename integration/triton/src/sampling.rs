// SPDX-License-Identifier: Apache-2.0
//! What a request says of its answer, by the names that Triton's vLLM backend uses, those of the TensorRT-LLM backend, and
//! drex's own.

use std::collections::BTreeMap;

use drex::ffi::{DREX_FILL_VERIFY, DREX_METRIC_ENTROPY, DREX_METRIC_GAP, DREX_METRIC_MAXPROB};
use serde_json::Value;

use crate::triton::error::Failure;

#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0: greedy
    pub temperature: f32,
    /// 0: all
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    /// None: a new one each time
    pub seed: Option<u32>,
    pub max_tokens: u32,
    /// The request names `max_tokens`.
    pub max_tokens_said: bool,
    /// No end before so many tokens
    pub min_tokens: u32,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<i32>,
    pub include_stop: bool,
    pub bad_words: Vec<String>,
    pub skip_special: bool,
    pub ignore_eos: bool,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    /// Microseconds from the arrival; 0: none
    pub timeout_us: u64,
    /// None: the model's
    pub drex_threshold: Option<f32>,
    /// None: the model's; `DREX_METRIC_*`
    pub drex_metric: Option<u32>,
    /// None: the model's; one of `FILLS`
    pub drex_fill: Option<u32>,
    /// Share of the tokens that are the full model's, 1: all; 0: as the model's quality
    pub drex_quality: f64,
    /// Milliseconds between two tokens; 0: the model's
    pub drex_deadline_ms: f32,
    /// Milliseconds from the end of the prompt to the last token; 0: the model's
    pub drex_request_deadline_ms: f32,
    /// Higher is taken first
    pub drex_priority: i32,
}

/// Fill modes by the numbers of drex.h.
pub const FILLS: [&str; 4] = ["copy", "postfill", "verify", "propagate"];
pub const FILLS_TEXT: &str = "copy, postfill, verify or propagate";

pub const QUALITY_TEXT: &str = "lossless, or a number from 0.5 to 1";

/// The share of the tokens that a quality is.
pub fn quality(text: &str) -> Option<f64> {
    match text {
        "lossless" => Some(1.0),
        _ => text
            .parse()
            .ok()
            .filter(|share| (0.5..=1.0).contains(share)),
    }
}

/// The number of a fill mode.
pub fn fill(name: &str) -> Option<u32> {
    let at = FILLS.iter().position(|known| *known == name);
    at.map(|at| at as u32)
}

const METRICS: [(&str, u32); 3] = [
    ("gap", DREX_METRIC_GAP),
    ("maxprob", DREX_METRIC_MAXPROB),
    ("entropy", DREX_METRIC_ENTROPY),
];

/// What asks for nothing that is done here, and the one number that it may have then. Any of them may also be null, false,
/// "", [] or {}.
const NEUTRAL: [(&str, Option<f64>); 19] = [
    ("n", Some(1.0)),
    ("best_of", Some(1.0)),
    ("beam_width", Some(1.0)),
    ("num_return_sequences", Some(1.0)),
    ("length_penalty", Some(1.0)),
    ("use_beam_search", None),
    ("early_stopping", None),
    ("logprobs", None),
    ("prompt_logprobs", None),
    ("truncate_prompt_tokens", None),
    ("logit_bias", None),
    ("guided_decoding", None),
    ("return_log_probs", None),
    ("return_logprobs", None),
    ("return_cumulative_logprob", None),
    ("return_context_logits", None),
    ("return_generation_logits", None),
    ("return_perf_metrics", None),
    ("allowed_token_ids", None),
];

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            max_tokens: 16,
            max_tokens_said: false,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop: false,
            bad_words: Vec::new(),
            skip_special: true,
            ignore_eos: false,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            timeout_us: 0,
            drex_threshold: None,
            drex_metric: None,
            drex_fill: None,
            drex_quality: 0.0,
            drex_deadline_ms: 0.0,
            drex_request_deadline_ms: 0.0,
            drex_priority: 0,
        }
    }
}

/// Where a request says something. A later one goes before an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A parameter of the request: what /generate has in its body beside the inputs.
    Parameter,
    /// An input tensor.
    Input,
    /// The JSON of the input `sampling_parameters`.
    Json,
}

impl Source {
    /// Puts the source before a text about one of its names.
    fn blame(self, failure: Failure) -> Failure {
        let text = match self {
            Self::Parameter => format!("parameter {}", failure.text),
            Self::Input => format!("input {}", failure.text),
            Self::Json => format!("sampling_parameters: {}", failure.text),
        };
        Failure { text, ..failure }
    }
}

/// All that a request says of its answer. Each name stands once, with the last source that gave it.
#[derive(Default)]
pub struct Said(BTreeMap<String, (Source, String, Value)>);

/// Names for one thing, and the one that it is kept by.
const SAME: [(&str, &str); 4] = [
    ("random_seed", "seed"),
    ("min_length", "min_tokens"),
    ("stop_words", "stop"),
    ("priority", "drex_priority"),
];

impl Said {
    /// Sources are added in their order. An unknown name is an error: what it asks for would not happen. `null` says nothing.
    pub fn add(&mut self, source: Source, name: &str, value: Value) -> Result<(), Failure> {
        let same = SAME.iter().find(|(other, _)| *other == name);
        let kept = same.map_or(name, |(_, kept)| *kept);
        // A name that is known may refuse the value.
        let mut other = Sampling::default();
        if !other.set(kept, &Value::Bool(false)).unwrap_or(true) {
            return Err(source.blame(Failure::invalid(format!("{name} is an unknown name"))));
        }
        if !value.is_null() {
            self.0
                .insert(kept.to_owned(), (source, name.to_owned(), value));
        }
        Ok(())
    }

    pub fn sampling(self) -> Result<Sampling, Failure> {
        let mut out = Sampling {
            max_tokens_said: self.0.contains_key("max_tokens"),
            ..Sampling::default()
        };
        for (source, name, value) in self.0.into_values() {
            out.set(&name, &value)
                .map_err(|failure| source.blame(failure))?;
        }
        if out.min_tokens > out.max_tokens {
            return Err(Failure::invalid(format!(
                "min_tokens is {}, above max_tokens, which is {}",
                out.min_tokens, out.max_tokens
            )));
        }
        if out.drex_quality == 1.0 && out.drex_fill.is_some_and(|f| f != DREX_FILL_VERIFY) {
            let named = out.drex_fill.map_or("", |f| FILLS[f as usize]);
            return Err(Failure::invalid(format!(
                "drex_fill is {named}, must be verify with drex_quality lossless"
            )));
        }
        if out.drex_quality > 0.0 && out.drex_quality < 1.0 && out.drex_threshold.is_some() {
            return Err(Failure::invalid(format!(
                "drex_quality is {} and drex_threshold is named, which follows from it",
                out.drex_quality
            )));
        }
        Ok(out)
    }
}

impl Sampling {
    /// Whether the name is known.
    fn set(&mut self, name: &str, value: &Value) -> Result<bool, Failure> {
        let int = i64::from(i32::MAX);
        match name {
            "temperature" => self.temperature = number(name, value, 0.0, f64::from(f32::MAX))?,
            "top_k" => self.top_k = integer(name, value, -1, int)?.max(0) as i32,
            "top_p" => self.top_p = number(name, value, 0.0, 1.0)?,
            "min_p" => self.min_p = number(name, value, 0.0, 1.0)?,
            "seed" | "random_seed" => self.seed = Some(seed(name, value)?),
            "max_tokens" => self.max_tokens = integer(name, value, 1, int)? as u32,
            "min_tokens" | "min_length" => {
                self.min_tokens = integer(name, value, 0, int)? as u32;
            }
            "ignore_eos" => self.ignore_eos = boolean(name, value)?,
            "stop" | "stop_words" => self.stop = strings(name, value)?,
            "stop_token_ids" => self.stop_token_ids.extend(tokens(name, value)?),
            "end_id" => {
                let token = integer(name, value, -1, int)? as i32;
                self.stop_token_ids.extend((token >= 0).then_some(token));
            }
            // Nothing is padded here.
            "pad_id" => {
                integer(name, value, -1, int)?;
            }
            "include_stop_str_in_output" => self.include_stop = boolean(name, value)?,
            "bad_words" => {
                self.bad_words = strings(name, value)?;
                self.bad_words.retain(|word| !word.is_empty());
            }
            "skip_special_tokens" => self.skip_special = boolean(name, value)?,
            "spaces_between_special_tokens" => {
                boolean(name, value)?;
            }
            "detokenize" => {
                if !boolean(name, value)? {
                    return Err(wrong(name, value, "true"));
                }
            }
            "repetition_penalty" => self.repetition_penalty = number(name, value, 1e-3, 1e3)?,
            "frequency_penalty" => self.frequency_penalty = number(name, value, -1e3, 1e3)?,
            "presence_penalty" => self.presence_penalty = number(name, value, -1e3, 1e3)?,
            "timeout" => self.timeout_us = integer(name, value, 0, i64::MAX)? as u64,
            // Triton's and vLLM's way round: 1 goes before 2. 0 is what a request has that names none.
            "priority" => self.drex_priority = -integer(name, value, 0, int)? as i32,
            "drex_threshold" => {
                self.drex_threshold = Some(number(name, value, 0.0, f64::from(f32::MAX))?);
            }
            "drex_metric" => {
                let known = value
                    .as_str()
                    .and_then(|text| METRICS.iter().find(|(name, _)| *name == text));
                let (_, metric) =
                    known.ok_or_else(|| wrong(name, value, "gap, maxprob or entropy"))?;
                self.drex_metric = Some(*metric);
            }
            "drex_fill" => {
                let fill = value.as_str().and_then(fill);
                self.drex_fill = Some(fill.ok_or_else(|| wrong(name, value, FILLS_TEXT))?);
            }
            "drex_quality" => {
                let share = match value.as_str() {
                    Some(text) => quality(text),
                    None => value.as_f64().filter(|share| (0.5..=1.0).contains(share)),
                };
                self.drex_quality = share.ok_or_else(|| wrong(name, value, QUALITY_TEXT))?;
            }
            "drex_deadline_ms" => self.drex_deadline_ms = number(name, value, 0.0, 1e9)?,
            "drex_request_deadline_ms" => {
                self.drex_request_deadline_ms = number(name, value, 0.0, 1e9)?;
            }
            "drex_priority" => {
                self.drex_priority =
                    integer(name, value, i64::from(i32::MIN), i64::from(i32::MAX))? as i32;
            }
            _ => {
                let Some((_, neutral)) = NEUTRAL.iter().find(|(known, _)| *known == name) else {
                    return Ok(false);
                };
                refuse(name, value, *neutral)?;
            }
        }
        Ok(true)
    }
}

/// Anything but what asks for nothing.
fn refuse(name: &str, value: &Value, neutral: Option<f64>) -> Result<(), Failure> {
    let nothing = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::String(text) => text.is_empty() || text.parse().ok() == neutral && neutral.is_some(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(number) => number.as_f64() == neutral,
    };
    if nothing {
        return Ok(());
    }
    let wanted = neutral.map_or("left out".to_owned(), |one| format!("{one} or left out"));
    Err(wrong(
        name,
        value,
        &format!("{wanted}: it is not served here"),
    ))
}

fn wrong(name: &str, value: &Value, wanted: &str) -> Failure {
    Failure::invalid(format!("{name} is {value}, must be {wanted}"))
}

/// A number, also as a string: request parameters of /generate may come as either.
fn number(name: &str, value: &Value, low: f64, high: f64) -> Result<f32, Failure> {
    let found = value.as_f64().or_else(|| value.as_str()?.parse().ok());
    match found {
        Some(x) if (low..=high).contains(&x) => Ok(x as f32),
        _ if high == f64::from(f32::MAX) => Err(wrong(name, value, "a number, 0 or more")),
        _ => Err(wrong(
            name,
            value,
            &format!("a number from {low} to {high}"),
        )),
    }
}

fn integer(name: &str, value: &Value, low: i64, high: i64) -> Result<i64, Failure> {
    let found = value.as_i64().or_else(|| value.as_str()?.parse().ok());
    found
        .filter(|x| (low..=high).contains(x))
        .ok_or_else(|| wrong(name, value, &format!("a whole number from {low} to {high}")))
}

fn boolean(name: &str, value: &Value) -> Result<bool, Failure> {
    value
        .as_bool()
        .ok_or_else(|| wrong(name, value, "true or false"))
}

/// Of up to 64 bits, which are folded: the samplers take 32.
fn seed(name: &str, value: &Value) -> Result<u32, Failure> {
    let found = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    // Signed ones by their bits, as they would arrive in a tensor.
    let found = found.or_else(|| Some(value.as_i64()? as u64));
    let seed = found.ok_or_else(|| wrong(name, value, "a whole number of at most 64 bits"))?;
    // The greatest means "any" to llama.cpp.
    Ok(((seed ^ (seed >> 32)) as u32).min(u32::MAX - 1))
}

fn tokens(name: &str, value: &Value) -> Result<Vec<i32>, Failure> {
    let one = |value: &Value| i32::try_from(value.as_i64()?).ok().filter(|&t| t >= 0);
    let all = match value {
        Value::Array(items) => items.iter().map(one).collect(),
        other => one(other).map(|token| vec![token]),
    };
    let mut all: Vec<i32> = all.ok_or_else(|| wrong(name, value, "a list of token numbers"))?;
    all.sort_unstable();
    all.dedup();
    at_most(name, "different tokens", all.len(), MAX_STOP_TOKENS)?;
    Ok(all)
}

/// Each token of the answer is held against all of them, on the thread that runs everybody's.
const MAX_STOP_TOKENS: usize = 4096;
const MAX_TEXTS: usize = 256;
const MAX_BYTES: usize = 1 << 16;

fn at_most(name: &str, what: &str, is: usize, most: usize) -> Result<(), Failure> {
    if is <= most {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "{name} has {is} {what}, the most is {most}"
    )))
}

fn strings(name: &str, value: &Value) -> Result<Vec<String>, Failure> {
    let one = |value: &Value| value.as_str().map(str::to_owned);
    let all = match value {
        Value::Array(items) => items.iter().map(one).collect(),
        other => one(other).map(|text| vec![text]),
    };
    let all: Vec<String> =
        all.ok_or_else(|| wrong(name, value, "a string or a list of strings"))?;
    at_most(name, "texts", all.len(), MAX_TEXTS)?;
    at_most(name, "bytes", all.iter().map(String::len).sum(), MAX_BYTES)?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one source says.
    fn said(source: Source, text: &str) -> Result<Sampling, Failure> {
        let Value::Object(fields) = serde_json::from_str(text).unwrap() else {
            panic!("{text}")
        };
        let mut said = Said::default();
        for (name, value) in fields {
            said.add(source, &name, value)?;
        }
        said.sampling()
    }

    fn parse(text: &str) -> Result<Sampling, Failure> {
        said(Source::Json, text)
    }

    #[test]
    fn what_every_token_is_held_against_is_bounded() {
        let of = |name: &str, value: Value| {
            parse(&serde_json::json!({ name: value }).to_string()).map_err(|f| f.text)
        };
        let many: Vec<i32> = (0..5000).map(|i| i % 4096).collect();
        let tokens = of("stop_token_ids", many.into()).unwrap();
        assert_eq!(tokens.stop_token_ids.len(), 4096);
        let more: Vec<i32> = (0..4097).collect();
        assert_eq!(
            of("stop_token_ids", more.into()).unwrap_err(),
            "sampling_parameters: stop_token_ids has 4097 different tokens, the most is 4096"
        );
        assert_eq!(
            of("stop", vec!["x"; 257].into()).unwrap_err(),
            "sampling_parameters: stop has 257 texts, the most is 256"
        );
        assert_eq!(
            of("bad_words", "x".repeat(65_537).into()).unwrap_err(),
            "sampling_parameters: bad_words has 65537 bytes, the most is 65536"
        );
        assert!(of("stop", vec!["x"; 256].into()).is_ok());
    }

    #[test]
    fn names_of_the_vllm_backend() {
        let got = parse(
            r#"{"temperature":"0.5","top_k":-1,"top_p":0.9,"min_p":0.1,"seed":7,"max_tokens":"64","stop":"x","ignore_eos":true,"drex_threshold":1.5}"#,
        );
        let want = Sampling {
            temperature: 0.5,
            top_k: 0,
            top_p: 0.9,
            min_p: 0.1,
            seed: Some(7),
            max_tokens: 64,
            max_tokens_said: true,
            stop: vec!["x".into()],
            ignore_eos: true,
            drex_threshold: Some(1.5),
            ..Sampling::default()
        };
        assert_eq!(got.unwrap(), want);
        assert_eq!(parse("{}").unwrap(), Sampling::default());
    }

    #[test]
    fn names_of_the_tensorrt_llm_backend() {
        let got = parse(
            r#"{"max_tokens":20,"bad_words":"","stop_words":"","end_id":2,"pad_id":2,"random_seed":7,"min_length":3,
            "top_k":1,"beam_width":1,"length_penalty":1.0,"return_log_probs":false}"#,
        );
        let want = Sampling {
            max_tokens: 20,
            max_tokens_said: true,
            stop: vec![String::new()],
            stop_token_ids: vec![2],
            seed: Some(7),
            min_tokens: 3,
            top_k: 1,
            ..Sampling::default()
        };
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn what_asks_for_nothing_is_taken() {
        let got = parse(
            r#"{"n":1,"best_of":1,"use_beam_search":false,"logprobs":null,"prompt_logprobs":null,"logit_bias":{},
            "early_stopping":false,"temperature":null,"stop":null,"seed":null,"stop_token_ids":[],"drex_fill":null,
            "skip_special_tokens":true,"spaces_between_special_tokens":true,"detokenize":true,"max_tokens":null}"#,
        );
        assert_eq!(got.unwrap(), Sampling::default());
        let got = parse(r#"{"timeout":1000,"priority":2,"bad_words":["a",""]}"#).unwrap();
        assert_eq!((got.timeout_us, got.drex_priority), (1000, -2));
        assert_eq!(got.bad_words, ["a"]);
    }

    #[test]
    fn seeds_keep_their_low_bits_and_are_never_the_one_that_means_any() {
        let seed = |text: &str| parse(text).unwrap().seed;
        assert_eq!(seed(r#"{"seed":4294967294}"#), Some(u32::MAX - 1));
        assert_eq!(seed(r#"{"seed":4294967295}"#), Some(u32::MAX - 1));
        assert_eq!(seed(r#"{"seed":4294967297}"#), Some(0));
        assert_eq!(seed(r#"{"seed":-1}"#), Some(0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            (r#"{"tempreature":1}"#, "tempreature is an unknown name"),
            (r#"{"temperature":-1}"#, "temperature is -1"),
            (r#"{"temperature":"nan"}"#, r#"temperature is "nan""#),
            (r#"{"temperature":1e39}"#, "temperature is 1e"),
            (r#"{"top_p":1.5}"#, "top_p is 1.5"),
            (r#"{"top_k":2.5}"#, "top_k is 2.5"),
            (r#"{"max_tokens":0}"#, "max_tokens is 0"),
            (r#"{"seed":1.5}"#, "seed is 1.5"),
            (r#"{"n":2}"#, "n is 2, must be 1"),
            (r#"{"beam_width":4}"#, "beam_width is 4"),
            (r#"{"logprobs":1}"#, "logprobs is 1"),
            (r#"{"return_log_probs":true}"#, "return_log_probs is true"),
            (r#"{"logit_bias":{"5":1}}"#, "logit_bias is"),
            (r#"{"stop_token_ids":[-1]}"#, "stop_token_ids is [-1]"),
            (r#"{"min_tokens":17}"#, "max_tokens, which is 16"),
            (r#"{"detokenize":false}"#, "detokenize is false"),
            (
                r#"{"drex_fill":"pour"}"#,
                "copy, postfill, verify or propagate",
            ),
            (
                r#"{"drex_quality":0.2}"#,
                "drex_quality is 0.2, must be lossless, or a number from 0.5 to 1",
            ),
            (
                r#"{"drex_quality":0.99,"drex_threshold":0.5}"#,
                "drex_quality is 0.99 and drex_threshold is named",
            ),
            (
                r#"{"drex_quality":"lossless","drex_fill":"copy"}"#,
                "drex_fill is copy, must be verify with drex_quality lossless",
            ),
            (r#"{"drex_metric":"size"}"#, "gap, maxprob or entropy"),
            (r#"{"tempreature":null}"#, "tempreature"),
            (r#"{"stop":[1]}"#, "stop is [1]"),
            (r#"{"ignore_eos":"yes"}"#, "ignore_eos"),
        ] {
            let failure = parse(text).unwrap_err();
            assert!(failure.text.contains(part), "{text}: {}", failure.text);
            assert_eq!(failure.code, crate::triton::abi::ERROR_INVALID_ARG);
        }
    }

    #[test]
    fn a_later_source_goes_before_an_earlier_one_and_null_says_nothing() {
        let mut all = Said::default();
        for (source, name, value) in [
            (Source::Parameter, "max_tokens", 3.into()),
            (Source::Parameter, "temperature", 0.into()),
            (Source::Parameter, "random_seed", 5.into()),
            (Source::Input, "stop_words", vec!["b"].into()),
            (Source::Json, "max_tokens", Value::Null),
            (Source::Json, "temperature", Value::Null),
            (Source::Json, "seed", 7.into()),
            (Source::Json, "stop", vec!["a"].into()),
        ] {
            all.add(source, name, value).unwrap();
        }
        let got = all.sampling().unwrap();
        assert_eq!((got.max_tokens, got.temperature), (3, 0.0));
        assert_eq!((got.seed, got.stop), (Some(7), vec!["a".into()]));
    }

    #[test]
    fn the_source_of_a_wrong_value_is_named() {
        for (source, text) in [
            (Source::Parameter, "parameter min_length is -1, must be"),
            (Source::Input, "input min_length is -1, must be"),
            (
                Source::Json,
                "sampling_parameters: min_length is -1, must be",
            ),
        ] {
            let failure = said(source, r#"{"min_length":-1}"#).unwrap_err();
            assert!(failure.text.starts_with(text), "{}", failure.text);
        }
        let failure = said(Source::Parameter, r#"{"x":null}"#).unwrap_err();
        assert!(
            failure.text.starts_with("parameter x is an unknown name"),
            "{}",
            failure.text
        );
    }
}
