// SPDX-License-Identifier: Apache-2.0
//! The `parameters` of config.pbtxt, and the configuration that a short one is completed to.

use serde_json::{Map, Value, json};

use crate::sampling::FILLS;
use crate::triton::error::Failure;

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// In the version folder; None: the only *.gguf there.
    pub model_file: Option<String>,
    pub policy: String,
    pub metric: String,
    /// `DREX_FILL_*`
    pub fill: u32,
    /// Empty: from the model's metadata.
    pub exit_layers: Vec<u32>,
    /// One, or one for each exit layer.
    pub threshold: Vec<f32>,
    /// Requests that run at once.
    pub slots: u32,
    /// Tokens of a request, prompt and answer together.
    pub context: u32,
    /// Most tokens of one pass.
    pub batch: u32,
    pub threads: i32,
    pub kv_type: String,
    pub graphs: u32,
    /// Most rows of a window; 0: as many as there can be.
    pub max_batch: u32,
    pub max_pending: u32,
    pub flush_rows: u32,
    pub min_ready: u32,
    pub max_hold_ms: f64,
    pub deadline_ms: f64,
    pub request_deadline_ms: f64,
    /// NaN: measured
    pub art_ratio: f32,
}

impl Default for Settings {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            model_file: None,
            policy: "auto".into(),
            metric: "gap".into(),
            fill: 0,
            exit_layers: Vec::new(),
            threshold: vec![0.7],
            slots: 16,
            context: 2048,
            batch: 512,
            threads: threads as i32,
            kv_type: "f16".into(),
            graphs: 128,
            max_batch: 0,
            max_pending: 8,
            flush_rows: 0,
            min_ready: 0,
            max_hold_ms: 0.0,
            deadline_ms: 0.0,
            request_deadline_ms: 0.0,
            art_ratio: f32::NAN,
        }
    }
}

impl Settings {
    /// From the model's configuration as JSON. An unknown name is an error: what it asks for would not happen.
    pub fn parse(config: &Value) -> Result<Self, Failure> {
        let mut out = Self::default();
        let none = Map::new();
        let parameters = config["parameters"].as_object().unwrap_or(&none);
        for (name, value) in parameters {
            let text = value["string_value"].as_str().unwrap_or_default().trim();
            match name.as_str() {
                "model_file" => out.model_file = Some(text.to_owned()),
                "policy" => out.policy = text.to_owned(),
                "metric" => out.metric = text.to_owned(),
                "fill" => {
                    let known = FILLS.iter().position(|fill| *fill == text);
                    // verify takes tokens back, which this backend does not do yet
                    let known = known.filter(|&mode| mode != 2);
                    out.fill = known
                        .ok_or_else(|| wrong(name, text, "copy, postfill or propagate"))?
                        as u32;
                }
                "exit_layers" => out.exit_layers = list(name, text, "layer numbers")?,
                "threshold" => {
                    out.threshold = list(name, text, "numbers")?;
                    if out.threshold.iter().any(|t| !(*t >= 0.0 && t.is_finite())) {
                        return Err(wrong(name, text, "numbers, 0 or more"));
                    }
                }
                "slots" => out.slots = whole(name, text, 1, 1024)?,
                "context" => out.context = whole(name, text, 8, 1 << 24)?,
                "batch" => out.batch = whole(name, text, 1, 1 << 16)?,
                "threads" => out.threads = whole(name, text, 1, 1024)? as i32,
                "kv_type" => out.kv_type = text.to_owned(),
                "graphs" => out.graphs = whole(name, text, 1, 1 << 16)?,
                "max_batch" => out.max_batch = whole(name, text, 0, 1 << 16)?,
                "max_pending" => out.max_pending = whole(name, text, 1, 1024)?,
                "flush_rows" => out.flush_rows = whole(name, text, 0, 1 << 20)?,
                "min_ready" => out.min_ready = whole(name, text, 0, 1 << 20)?,
                "max_hold_ms" => out.max_hold_ms = milliseconds(name, text)?,
                "deadline_ms" => out.deadline_ms = milliseconds(name, text)?,
                "request_deadline_ms" => out.request_deadline_ms = milliseconds(name, text)?,
                "art_ratio" => out.art_ratio = milliseconds(name, text)? as f32,
                _ => {
                    return Err(Failure::invalid(format!(
                        "parameters: unknown name {name}; known are model_file, policy, metric, fill, exit_layers, \
                         threshold, slots, context, batch, threads, kv_type, graphs, max_batch, max_pending, \
                         flush_rows, min_ready, max_hold_ms, deadline_ms, request_deadline_ms, art_ratio"
                    )));
                }
            }
        }
        if out.policy == "art" && out.art_ratio.is_nan() {
            return Err(Failure::invalid(
                "parameters: policy art needs art_ratio here; it is not measured",
            ));
        }
        if out.max_batch > out.batch {
            return Err(Failure::invalid(format!(
                "parameters: max_batch is {}, above batch, which is {}",
                out.max_batch, out.batch
            )));
        }
        Ok(out)
    }
}

fn wrong(name: &str, text: &str, wanted: &str) -> Failure {
    Failure::invalid(format!(
        "parameters: {name} is \"{text}\", must be {wanted}"
    ))
}

fn whole(name: &str, text: &str, low: u32, high: u32) -> Result<u32, Failure> {
    text.parse()
        .ok()
        .filter(|n| (low..=high).contains(n))
        .ok_or_else(|| wrong(name, text, &format!("a whole number from {low} to {high}")))
}

fn milliseconds(name: &str, text: &str) -> Result<f64, Failure> {
    text.parse()
        .ok()
        .filter(|ms| (0.0..=1e9).contains(ms))
        .ok_or_else(|| wrong(name, text, "a number from 0 to 1e9"))
}

fn list<T: std::str::FromStr>(name: &str, text: &str, what: &str) -> Result<Vec<T>, Failure> {
    text.split(',')
        .map(|part| part.trim().parse().ok())
        .collect::<Option<_>>()
        .ok_or_else(|| wrong(name, text, &format!("{what} with commas between")))
}

/// Name, type, and whether a request may leave it out.
pub const INPUTS: [(&str, &str, bool); 8] = [
    ("text_input", "TYPE_STRING", false),
    ("stream", "TYPE_BOOL", true),
    ("sampling_parameters", "TYPE_STRING", true),
    ("exclude_input_in_output", "TYPE_BOOL", true),
    ("return_finish_reason", "TYPE_BOOL", true),
    ("return_num_input_tokens", "TYPE_BOOL", true),
    ("return_num_output_tokens", "TYPE_BOOL", true),
    ("return_token_ids", "TYPE_BOOL", true),
];
pub const OUTPUTS: [(&str, &str); 5] = [
    ("text_output", "TYPE_STRING"),
    ("finish_reason", "TYPE_STRING"),
    ("num_input_tokens", "TYPE_UINT32"),
    ("num_output_tokens", "TYPE_UINT32"),
    ("token_ids", "TYPE_INT32"),
];

/// What Triton is to use in place of what config.pbtxt leaves out.
pub fn complete(config: &Value) -> Value {
    let mut out = config.clone();
    let empty = |value: &Value| value.as_array().is_none_or(Vec::is_empty);
    if empty(&out["input"]) {
        out["input"] = INPUTS
            .iter()
            .map(|(name, kind, optional)| {
                json!({"name": name, "data_type": kind, "dims": [1], "optional": optional})
            })
            .collect();
    }
    if empty(&out["output"]) {
        out["output"] = OUTPUTS
            .iter()
            .map(|(name, kind)| json!({"name": name, "data_type": kind, "dims": [-1]}))
            .collect();
    }
    if out["model_transaction_policy"].is_null() {
        out["model_transaction_policy"] = json!({"decoupled": true});
    }
    if empty(&out["instance_group"]) {
        out["instance_group"] = json!([{"name": "drex", "count": 1, "kind": "KIND_CPU"}]);
    }
    out
}

/// Refuses what a model of this backend cannot have.
pub fn check(config: &Value) -> Result<(), Failure> {
    if config["max_batch_size"].as_i64().unwrap_or(0) != 0 {
        return Err(Failure::invalid(format!(
            "max_batch_size is {}, must be 0: drex batches the rows of requests itself",
            config["max_batch_size"]
        )));
    }
    for (list, known) in [
        ("input", INPUTS.map(|(name, kind, _)| (name, kind)).to_vec()),
        ("output", OUTPUTS.to_vec()),
    ] {
        for item in config[list].as_array().into_iter().flatten() {
            let name = item["name"].as_str().unwrap_or_default();
            let kind = item["data_type"].as_str().unwrap_or_default();
            match known.iter().find(|(known, _)| *known == name) {
                None => return Err(Failure::invalid(format!("{list}: unknown name {name}"))),
                Some((_, wanted)) if *wanted != kind => {
                    return Err(Failure::invalid(format!(
                        "{list} {name}: data_type is {kind}, must be {wanted}"
                    )));
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, text: &str) -> Result<Settings, Failure> {
        Settings::parse(&json!({"parameters": {name: {"string_value": text}}}))
    }

    #[test]
    fn parameters_are_read() {
        assert_eq!(parse("exit_layers", "4, 8").unwrap().exit_layers, [4, 8]);
        assert_eq!(parse("threshold", "0.5,2").unwrap().threshold, [0.5, 2.0]);
        assert_eq!(parse("fill", "postfill").unwrap().fill, 1);
        assert_eq!(parse("slots", "64").unwrap().slots, 64);
        assert_eq!(
            Settings::parse(&json!({})).unwrap().policy,
            Settings::default().policy
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, text) in [
            ("slots", "0"),
            ("slots", "-1"),
            ("slots", "many"),
            ("context", ""),
            ("threshold", "0.5,x"),
            ("threshold", "NaN"),
            ("threshold", "-1"),
            ("exit_layers", "4;8"),
            ("fill", "verify"),
            ("max_hold_ms", "inf"),
            ("polizy", "hold"),
            ("max_batch", "513"),
        ] {
            let failure = parse(name, text).unwrap_err();
            assert!(
                failure.text.contains(name) && failure.text.contains(text),
                "{}",
                failure.text
            );
        }
        assert!(parse("policy", "art").unwrap_err().text.contains("art"));
    }

    #[test]
    fn a_short_configuration_is_completed_and_a_long_one_left_alone() {
        let full = complete(&json!({"name": "m", "input": [], "output": []}));
        assert_eq!(full["input"].as_array().unwrap().len(), INPUTS.len());
        assert_eq!(full["model_transaction_policy"]["decoupled"], true);
        assert!(check(&full).is_ok());
        let mine =
            json!({"model_transaction_policy": {"decoupled": false}, "input": [{"name": "x"}]});
        let done = complete(&mine);
        assert_eq!(done["model_transaction_policy"]["decoupled"], false);
        assert!(check(&done).unwrap_err().text.contains("unknown name x"));
        assert!(
            check(&json!({"max_batch_size": 8}))
                .unwrap_err()
                .text
                .contains("is 8")
        );
    }
}
