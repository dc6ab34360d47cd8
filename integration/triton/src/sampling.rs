// SPDX-License-Identifier: Apache-2.0
//! The input `sampling_parameters`: JSON with the names that Triton's vLLM backend uses, and drex's own.

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
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    /// None: the model's
    pub drex_threshold: Option<f32>,
    /// None: the model's; one of `FILLS`
    pub drex_fill: Option<u32>,
    /// Milliseconds between two tokens; 0: the model's
    pub drex_deadline_ms: f32,
    /// Milliseconds from the end of the prompt to the last token; 0: the model's
    pub drex_request_deadline_ms: f32,
    /// Higher is taken first
    pub drex_priority: i32,
}

/// Fill modes by the numbers of drex.h.
pub const FILLS: [&str; 4] = ["copy", "postfill", "verify", "propagate"];

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            max_tokens: 16,
            stop: Vec::new(),
            ignore_eos: false,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            drex_threshold: None,
            drex_fill: None,
            drex_deadline_ms: 0.0,
            drex_request_deadline_ms: 0.0,
            drex_priority: 0,
        }
    }
}

impl Sampling {
    /// Reads the text of the input. An unknown name is an error: what it asks for would not happen.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Failure::invalid(format!("sampling_parameters: not JSON: {error}")))?;
        Self::from_value(&value)
    }

    pub fn from_value(value: &Value) -> Result<Self, Failure> {
        let Value::Object(fields) = value else {
            return Err(Failure::invalid(format!(
                "sampling_parameters: not a JSON object: {value}"
            )));
        };
        let mut out = Self::default();
        for (name, value) in fields {
            match name.as_str() {
                "temperature" => out.temperature = number(name, value, 0.0, f64::from(f32::MAX))?,
                "top_k" => out.top_k = integer(name, value, -1, i64::from(i32::MAX))?.max(0) as i32,
                "top_p" => out.top_p = number(name, value, 0.0, 1.0)?,
                "min_p" => out.min_p = number(name, value, 0.0, 1.0)?,
                "seed" => out.seed = Some(integer(name, value, 0, i64::from(u32::MAX))? as u32),
                "max_tokens" => {
                    out.max_tokens = integer(name, value, 1, i64::from(i32::MAX))? as u32
                }
                "ignore_eos" => {
                    out.ignore_eos = value
                        .as_bool()
                        .ok_or_else(|| wrong(name, value, "true or false"))?
                }
                "stop" => out.stop = strings(name, value)?,
                "drex_threshold" => {
                    out.drex_threshold = Some(number(name, value, 0.0, f64::from(f32::MAX))?)
                }
                "repetition_penalty" => out.repetition_penalty = number(name, value, 1e-3, 1e3)?,
                "frequency_penalty" => out.frequency_penalty = number(name, value, -1e3, 1e3)?,
                "presence_penalty" => out.presence_penalty = number(name, value, -1e3, 1e3)?,
                "drex_fill" => {
                    let known = value
                        .as_str()
                        .and_then(|text| FILLS.iter().position(|name| *name == text));
                    let wanted = "copy, postfill or propagate";
                    // verify takes tokens back, which this backend does not do yet
                    out.drex_fill = Some(
                        known
                            .filter(|&mode| mode != 2)
                            .ok_or_else(|| wrong(name, value, wanted))?
                            as u32,
                    )
                }
                "drex_deadline_ms" => out.drex_deadline_ms = number(name, value, 0.0, 1e9)?,
                "drex_request_deadline_ms" => {
                    out.drex_request_deadline_ms = number(name, value, 0.0, 1e9)?
                }
                "drex_priority" => {
                    out.drex_priority =
                        integer(name, value, i64::from(i32::MIN), i64::from(i32::MAX))? as i32
                }
                _ => {
                    return Err(Failure::invalid(format!(
                        "sampling_parameters: unknown name {name}"
                    )));
                }
            }
        }
        Ok(out)
    }
}

fn wrong(name: &str, value: &Value, wanted: &str) -> Failure {
    Failure::invalid(format!(
        "sampling_parameters: {name} is {value}, must be {wanted}"
    ))
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

fn strings(name: &str, value: &Value) -> Result<Vec<String>, Failure> {
    let one = |value: &Value| value.as_str().map(str::to_owned);
    let all = match value {
        Value::Array(items) => items.iter().map(one).collect(),
        other => one(other).map(|text| vec![text]),
    };
    all.ok_or_else(|| wrong(name, value, "a string or a list of strings"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_vllm_backend() {
        let got = Sampling::parse(
            r#"{"temperature":"0.5","top_k":-1,"top_p":0.9,"min_p":0.1,"seed":7,"max_tokens":"64","stop":"x","ignore_eos":true,"drex_threshold":1.5}"#,
        );
        let want = Sampling {
            temperature: 0.5,
            top_k: 0,
            top_p: 0.9,
            min_p: 0.1,
            seed: Some(7),
            max_tokens: 64,
            stop: vec!["x".into()],
            ignore_eos: true,
            drex_threshold: Some(1.5),
            ..Sampling::default()
        };
        assert_eq!(got.unwrap(), want);
        assert_eq!(Sampling::parse("{}").unwrap(), Sampling::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            (r#"{"tempreature":1}"#, "tempreature"),
            (r#"{"temperature":-1}"#, "temperature is -1"),
            (r#"{"temperature":"nan"}"#, r#"temperature is "nan""#),
            (r#"{"temperature":1e39}"#, "temperature is 1e"),
            (r#"{"top_p":1.5}"#, "top_p is 1.5"),
            (r#"{"top_k":2.5}"#, "top_k is 2.5"),
            (r#"{"max_tokens":0}"#, "max_tokens is 0"),
            (r#"{"seed":4294967296}"#, "seed is 4294967296"),
            (r#"{"stop":[1]}"#, "stop is [1]"),
            (r#"{"ignore_eos":"yes"}"#, "ignore_eos"),
        ] {
            let failure = Sampling::parse(text).unwrap_err();
            assert!(failure.text.contains(part), "{text}: {}", failure.text);
            assert_eq!(failure.code, crate::triton::abi::ERROR_INVALID_ARG);
        }
    }
}
