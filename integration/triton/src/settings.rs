// SPDX-License-Identifier: Apache-2.0
//! The `parameters` of config.pbtxt, and the configuration that a short one is completed to.

use serde_json::{Map, Value, json};

use drex::ffi::{DREX_FILL_PROPAGATE, DREX_FILL_VERIFY};

use crate::sampling::{FILLS, FILLS_TEXT, QUALITY_TEXT, fill, quality};
use crate::triton::error::Failure;

/// As llama-server's: types that a K/V cache can have.
const KV_TYPES: [&str; 9] = [
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1",
];
/// Sequences that llama.cpp can tell apart.
const MAX_SLOTS: u32 = 256;
/// Cells of a K/V cache, which are counted in 32 bits, the sign included.
const MAX_CELLS: u32 = i32::MAX as u32;
/// More than any model has.
pub const ALL_LAYERS: u32 = 65536;

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// In the version folder; None: the only *.gguf there.
    pub model_file: Option<String>,
    pub policy: String,
    pub metric: String,
    /// `DREX_FILL_*`
    pub fill: u32,
    /// Thresholds are learned: quality lossless, and no threshold is named.
    pub learns: bool,
    /// Share of the tokens that are the full model's, 1: lossless; 0: as thresholds and fill say.
    pub quality: f64,
    /// `fill` is named.
    pub names_fill: bool,
    /// A file of exits beside the model, in the version folder or by an absolute path.
    pub exits: Option<String>,
    /// Empty: those of `exits`, else from the model's metadata.
    pub exit_layers: Vec<u32>,
    /// One, or one for each exit layer.
    pub threshold: Vec<f32>,
    /// Requests that run at once.
    pub slots: u32,
    /// Tokens of a request, prompt and answer together; at most what the model was trained with.
    pub context: u32,
    /// Most tokens of one pass.
    pub batch: u32,
    /// Of all instances of the model together.
    pub threads: u32,
    pub kv_type: String,
    /// 0: on the CPU; else all of them must fit there
    pub gpu_layers: u32,
    pub main_gpu: u32,
    /// Most requests that wait for a slot
    pub max_queue: u32,
    /// Learned costs: a file that is read at the start and written at the end
    pub profile: Option<String>,
    /// Most compute graphs that are kept; 0: by the number of slots
    pub graphs: u32,
    /// Most rows of a window; 0: as many as there can be.
    pub max_batch: u32,
    pub max_pending: u32,
    pub flush_rows: u32,
    pub min_ready: u32,
    pub max_hold_ms: f64,
    pub deadline_ms: f64,
    pub request_deadline_ms: f64,
    /// NaN: measured, for policy art before the first request
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
            quality: 0.0,
            names_fill: false,
            learns: false,
            exits: None,
            exit_layers: Vec::new(),
            threshold: vec![0.7],
            slots: 16,
            context: 2048,
            batch: 512,
            threads: threads as u32,
            kv_type: "f16".into(),
            gpu_layers: 0,
            main_gpu: 0,
            max_queue: 1024,
            profile: None,
            graphs: 0,
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
                    out.fill = fill(text).ok_or_else(|| wrong(name, text, FILLS_TEXT))?;
                }
                "quality" => {
                    let share = quality(text).ok_or_else(|| wrong(name, text, QUALITY_TEXT))?;
                    out.quality = share;
                }
                "exits" if text.is_empty() => {
                    return Err(wrong(name, text, "the path of a file"));
                }
                "exits" => out.exits = Some(text.to_owned()),
                "exit_layers" => out.exit_layers = list(name, text, "layer numbers")?,
                "threshold" => {
                    out.threshold = list(name, text, "numbers")?;
                    if out.threshold.iter().any(|t| !(*t >= 0.0 && t.is_finite())) {
                        return Err(wrong(name, text, "numbers, 0 or more"));
                    }
                }
                "slots" => out.slots = whole(name, text, 1, MAX_SLOTS)?,
                "context" => out.context = whole(name, text, 8, 1 << 24)?,
                "batch" => out.batch = whole(name, text, 1, 1 << 16)?,
                "threads" => out.threads = whole(name, text, 1, 1024)?,
                "kv_type" => {
                    if !KV_TYPES.contains(&text) {
                        return Err(wrong(name, text, &KV_TYPES.join(", ")));
                    }
                    out.kv_type = text.to_owned();
                }
                "gpu_layers" if text == "all" => out.gpu_layers = ALL_LAYERS,
                "gpu_layers" => out.gpu_layers = whole(name, text, 0, ALL_LAYERS - 1)?,
                "main_gpu" => out.main_gpu = whole(name, text, 0, 1023)?,
                "max_queue" => out.max_queue = whole(name, text, 0, 1 << 20)?,
                "profile" => out.profile = (!text.is_empty()).then(|| text.to_owned()),
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
                        "parameters: unknown name {name}; known are model_file, policy, metric, fill, quality, exits, \
                         exit_layers, threshold, slots, context, batch, threads, kv_type, graphs, max_batch, max_pending, \
                         flush_rows, min_ready, max_hold_ms, deadline_ms, request_deadline_ms, art_ratio, gpu_layers, \
                         main_gpu, max_queue, profile"
                    )));
                }
            }
        }
        let named = |name| parameters.contains_key(name);
        out.names_fill = named("fill");
        out.learns = out.quality > 0.0 && !named("threshold");
        if out.quality > 0.0 && out.quality < 1.0 {
            if named("threshold") {
                return Err(Failure::invalid(format!(
                    "parameters: quality is {} and threshold is named, which follows from it",
                    out.quality
                )));
            }
            if !named("fill") {
                out.fill = DREX_FILL_PROPAGATE;
            }
        }
        if out.quality == 1.0 {
            if named("fill") && out.fill != DREX_FILL_VERIFY {
                return Err(Failure::invalid(format!(
                    "parameters: quality is lossless and fill is {}, must be verify",
                    FILLS[out.fill as usize]
                )));
            }
            out.fill = DREX_FILL_VERIFY;
        }
        if out
            .slots
            .checked_mul(out.context)
            .is_none_or(|n| n > MAX_CELLS)
        {
            return Err(Failure::invalid(format!(
                "parameters: slots is {} and context is {}, the KV cache can have at most {MAX_CELLS} cells for them",
                out.slots, out.context
            )));
        }
        if let (None, Some(name)) = (
            &out.model_file,
            config["default_model_filename"]
                .as_str()
                .filter(|name| !name.is_empty()),
        ) {
            out.model_file = Some(name.to_owned());
        }
        if out.max_batch > out.batch {
            return Err(Failure::invalid(format!(
                "parameters: max_batch is {}, above batch, which is {}",
                out.max_batch, out.batch
            )));
        }
        Ok(out)
    }

    /// Arena rows of requests: one for each, and its pending rows.
    pub fn arena(&self) -> u32 {
        self.slots * (1 + self.max_pending)
    }

    /// Most decode rows of a window.
    pub fn decode_rows(&self) -> u32 {
        let most = if self.max_batch > 0 {
            self.max_batch
        } else {
            self.batch
        };
        most.min(self.arena())
    }

    /// Most rows of a window that have logits: all decode rows, and the last row of each prompt.
    pub fn outputs(&self) -> u32 {
        self.batch.min(self.decode_rows() + self.slots)
    }

    /// `gpu_layers` as config.pbtxt has it.
    pub fn gpu_layers_said(&self) -> String {
        match self.gpu_layers {
            ALL_LAYERS => "all".into(),
            n => n.to_string(),
        }
    }

    /// Threads of one of `instances`, the one that started `before` others: the shares differ by one at most.
    pub fn share_threads(&mut self, instances: u32, before: u32) {
        let (each, rest) = (self.threads / instances, self.threads % instances);
        self.threads = (each + u32::from(before % instances < rest)).max(1);
    }

    /// For an instance that config.pbtxt wants on this GPU: all layers, if it does not say how many.
    pub fn on_gpu(&mut self, device: i32) {
        if self.gpu_layers == 0 {
            self.gpu_layers = ALL_LAYERS;
        }
        self.main_gpu = device.unsigned_abs();
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

/// Name, type, and how many elements: -1 is any number. A request may leave all but the first out. Beside what steers an
/// answer there are the names that clients of the TensorRT-LLM backend send.
pub const INPUTS: [(&str, &str, i64); 35] = [
    ("text_input", "TYPE_STRING", 1),
    ("stream", "TYPE_BOOL", 1),
    ("sampling_parameters", "TYPE_STRING", 1),
    ("exclude_input_in_output", "TYPE_BOOL", 1),
    ("return_finish_reason", "TYPE_BOOL", 1),
    ("return_num_input_tokens", "TYPE_BOOL", 1),
    ("return_num_output_tokens", "TYPE_BOOL", 1),
    ("return_token_ids", "TYPE_BOOL", 1),
    ("max_tokens", "TYPE_INT32", 1),
    ("min_tokens", "TYPE_INT32", 1),
    ("min_length", "TYPE_INT32", 1),
    ("temperature", "TYPE_FP32", 1),
    ("top_k", "TYPE_INT32", 1),
    ("top_p", "TYPE_FP32", 1),
    ("random_seed", "TYPE_UINT64", 1),
    ("seed", "TYPE_UINT64", 1),
    ("stop_words", "TYPE_STRING", -1),
    ("bad_words", "TYPE_STRING", -1),
    ("end_id", "TYPE_INT32", 1),
    ("pad_id", "TYPE_INT32", 1),
    ("repetition_penalty", "TYPE_FP32", 1),
    ("presence_penalty", "TYPE_FP32", 1),
    ("frequency_penalty", "TYPE_FP32", 1),
    ("length_penalty", "TYPE_FP32", 1),
    ("beam_width", "TYPE_INT32", 1),
    ("num_return_sequences", "TYPE_INT32", 1),
    ("return_log_probs", "TYPE_BOOL", 1),
    ("return_logprobs", "TYPE_BOOL", 1),
    ("return_cumulative_logprob", "TYPE_BOOL", 1),
    ("return_context_logits", "TYPE_BOOL", 1),
    ("return_generation_logits", "TYPE_BOOL", 1),
    ("return_perf_metrics", "TYPE_BOOL", 1),
    ("early_stopping", "TYPE_BOOL", 1),
    // as /generate may have them in its body
    ("stop", "TYPE_STRING", -1),
    ("stop_token_ids", "TYPE_INT32", -1),
];
pub const OUTPUTS: [(&str, &str); 5] = [
    ("text_output", "TYPE_STRING"),
    ("finish_reason", "TYPE_STRING"),
    ("num_input_tokens", "TYPE_UINT32"),
    ("num_output_tokens", "TYPE_UINT32"),
    ("token_ids", "TYPE_INT32"),
];

/// The lists of the configuration with what may be in them: name, type, elements, whether a request may leave it out.
type Known = Vec<(&'static str, &'static str, i64, bool)>;

fn known() -> [(&'static str, Known); 2] {
    let inputs = INPUTS.iter().enumerate();
    let outputs = OUTPUTS.iter();
    [
        (
            "input",
            inputs
                .map(|(i, (name, kind, n))| (*name, *kind, *n, i > 0))
                .collect(),
        ),
        (
            "output",
            outputs
                .map(|(name, kind)| (*name, *kind, -1, false))
                .collect(),
        ),
    ]
}

/// What Triton is to use in place of what config.pbtxt leaves out.
pub fn complete(config: &Value) -> Value {
    let mut out = config.clone();
    let empty = |value: &Value| value.as_array().is_none_or(Vec::is_empty);
    for (list, known) in known() {
        let mut items = out[list].as_array().cloned().unwrap_or_default();
        for (name, kind, elements, optional) in known {
            if items.iter().all(|item| item["name"] != name) {
                let mut item = json!({"name": name, "data_type": kind, "dims": [elements]});
                if list == "input" {
                    item["optional"] = json!(optional);
                }
                items.push(item);
            }
        }
        out[list] = Value::Array(items);
    }
    if out["model_transaction_policy"].is_null() {
        out["model_transaction_policy"] = json!({"decoupled": true});
    }
    if empty(&out["instance_group"]) {
        out["instance_group"] = json!([{"name": "drex", "count": 1, "kind": "KIND_CPU"}]);
    }
    out
}

/// What Triton can be asked for and would not happen: where it stands in the configuration, and why not.
const WITHOUT_EFFECT: [(&str, &str); 12] = [
    (
        "/dynamic_batching",
        "drex batches the rows of requests itself, by the parameters slots, batch and max_queue, and a request says its \
         priority and timeout",
    ),
    ("/sequence_batching", "a request is a whole prompt"),
    (
        "/response_cache/enable",
        "the cache's key leaves the parameters of a request out, so that other requests would get its answer",
    ),
    ("/batch_input", "inputs are read one by one"),
    ("/batch_output", "outputs are written one by one"),
    ("/model_operations", "no operations are loaded"),
    ("/optimization/graph", "llama.cpp makes the graphs"),
    ("/optimization/cuda", "llama.cpp makes the graphs"),
    ("/optimization/execution_accelerators", "llama.cpp computes"),
    ("/optimization/eager_batching", "drex batches the rows"),
    (
        "/optimization/gather_kernel_buffer_threshold",
        "inputs are read one by one",
    ),
    (
        "/cc_model_filenames",
        "the parameter model_file names the file",
    ),
];

/// Nothing is asked for.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "0",
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Refuses what a model of this backend cannot have.
pub fn check(config: &Value) -> Result<(), Failure> {
    for (at, why) in WITHOUT_EFFECT {
        let value = config.pointer(at).unwrap_or(&Value::Null);
        // An empty block of a scheduler asks for it.
        let asked = match at {
            "/dynamic_batching" | "/sequence_batching" => !value.is_null(),
            _ => !is_default(value),
        };
        if asked {
            let name = at[1..].replace('/', ": ");
            return Err(Failure::invalid(format!(
                "{name} is {value}, must be left out: {why}"
            )));
        }
    }
    let priority = &config["optimization"]["priority"];
    if !matches!(priority.as_str(), None | Some("PRIORITY_DEFAULT")) {
        return Err(Failure::invalid(format!(
            "optimization: priority is {priority}, must be left out: drex has threads of its own"
        )));
    }
    for group in config["instance_group"].as_array().into_iter().flatten() {
        let limiter = &group["rate_limiter"];
        if !is_default(&limiter["resources"]) || !is_default(&limiter["priority"]) {
            return Err(Failure::invalid(format!(
                "instance_group {}: rate_limiter is {limiter}, must be left out: the model's own queue gives requests to the \
                 instance with most room",
                group["name"]
            )));
        }
    }
    for (list, known) in known() {
        for item in config[list].as_array().into_iter().flatten() {
            let name = item["name"].as_str().unwrap_or_default();
            let Some((_, kind, elements, _)) = known.iter().find(|(known, ..)| *known == name)
            else {
                return Err(Failure::invalid(format!("{list}: unknown name {name}")));
            };
            let given = item["data_type"].as_str().unwrap_or_default();
            if given != *kind {
                return Err(Failure::invalid(format!(
                    "{list} {name}: data_type is {given}, must be {kind}"
                )));
            }
            // Triton writes such numbers as strings, too.
            let number = |dim: &Value| dim.as_i64().or_else(|| dim.as_str()?.parse().ok());
            let dims = item["dims"].as_array();
            let dims: Option<Vec<i64>> = dims.into_iter().flatten().map(number).collect();
            if dims != Some(vec![*elements]) && dims != Some(vec![-1]) {
                return Err(Failure::invalid(format!(
                    "{list} {name}: dims is {}, must be [ {elements} ]",
                    item["dims"]
                )));
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
        assert_eq!(parse("slots", "8").unwrap().exits, None);
        let both = Settings::parse(&json!({"parameters": {
            "exits": {"string_value": " fitted.gguf "}, "exit_layers": {"string_value": "8"}}}));
        let both = both.unwrap();
        assert_eq!(both.exits, Some("fitted.gguf".into()));
        assert_eq!(both.exit_layers, [8]);
        assert_eq!(parse("threshold", "0.5,2").unwrap().threshold, [0.5, 2.0]);
        assert_eq!(parse("fill", "postfill").unwrap().fill, 1);
        assert_eq!(parse("fill", "verify").unwrap().fill, 2);
        let lossless = parse("quality", "lossless").unwrap();
        assert_eq!((lossless.fill, lossless.learns), (2, true));
        let of = |a: &str, b: &str| {
            Settings::parse(&json!({"parameters": {
                "quality": {"string_value": "lossless"}, a: {"string_value": b}
            }}))
        };
        assert!(!of("threshold", "0.5").unwrap().learns);
        assert!(of("fill", "verify").unwrap().learns);
        let agreement = parse("quality", "0.99").unwrap();
        assert_eq!(
            (agreement.fill, agreement.learns, agreement.quality),
            (3, true, 0.99)
        );
        for wrong in ["0.2", "2", "much", "NaN"] {
            let error = parse("quality", wrong).unwrap_err().text;
            assert!(
                error.contains("lossless, or a number from 0.5 to 1"),
                "{error}"
            );
        }
        let error = Settings::parse(&json!({"parameters": {
            "quality": {"string_value": "0.99"}, "threshold": {"string_value": "0.5"}}}));
        let error = error.unwrap_err().text;
        assert!(
            error.contains("quality is 0.99 and threshold is named"),
            "{error}"
        );
        let error = of("fill", "copy").unwrap_err().text;
        assert!(error.contains("fill is copy, must be verify"), "{error}");
        assert_eq!(parse("slots", "64").unwrap().slots, 64);
        assert_eq!(parse("gpu_layers", "all").unwrap().gpu_layers, ALL_LAYERS);
        assert_eq!(
            parse("profile", "a.json").unwrap().profile,
            Some("a.json".into())
        );
        for kind in KV_TYPES {
            assert_eq!(parse("kv_type", kind).unwrap().kv_type, kind);
        }
        assert_eq!(
            Settings::parse(&json!({})).unwrap().policy,
            Settings::default().policy
        );
    }

    #[test]
    fn the_gpu_of_an_instance_is_used() {
        let mut settings = Settings::default();
        assert_eq!(settings.gpu_layers, 0);
        settings.on_gpu(3);
        assert_eq!((settings.gpu_layers, settings.main_gpu), (ALL_LAYERS, 3));
        let mut named = parse("gpu_layers", "24").unwrap();
        named.on_gpu(1);
        assert_eq!((named.gpu_layers, named.main_gpu), (24, 1));
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
            ("exits", ""),
            ("fill", "pour"),
            ("quality", "0.2"),
            ("kv_type", "i32"),
            ("kv_type", "q8_1"),
            ("slots", "257"),
            ("gpu_layers", "some"),
            ("max_queue", "-1"),
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
        let failure = Settings::parse(&json!({"parameters": {
            "slots": {"string_value": "256"}, "context": {"string_value": "16777216"}}}));
        let text = failure.unwrap_err().text;
        assert!(
            text.contains("slots is 256") && text.contains("context is 16777216"),
            "{text}"
        );
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
            check(&complete(&json!({"max_batch_size": 8}))).is_ok(),
            "a leading dimension is taken"
        );
    }

    #[test]
    fn what_would_have_no_effect_is_refused_by_name() {
        for (config, part) in [
            (
                json!({"dynamic_batching": {"priority_levels": "2"}}),
                "dynamic_batching is {\"priority_levels\":\"2\"}, must be left out",
            ),
            (json!({"dynamic_batching": {}}), "dynamic_batching is {}"),
            (json!({"sequence_batching": {}}), "sequence_batching is {}"),
            (
                json!({"response_cache": {"enable": true}}),
                "response_cache: enable is true",
            ),
            (
                json!({"optimization": {"cuda": {"graphs": true}}}),
                "optimization: cuda is",
            ),
            (
                json!({"optimization": {"priority": "PRIORITY_MAX"}}),
                "optimization: priority is \"PRIORITY_MAX\"",
            ),
            (
                json!({"instance_group": [{"name": "g", "rate_limiter": {"resources": [{"name": "R", "count": 1}]}}]}),
                "instance_group \"g\": rate_limiter is",
            ),
        ] {
            let text = check(&config).unwrap_err().text;
            assert!(text.starts_with(part), "{text}");
        }
        // What Triton itself puts into every configuration.
        let written = json!({"response_cache": {"enable": false}, "optimization": {"priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": true}, "gather_kernel_buffer_threshold": 0, "eager_batching": false},
            "batch_input": [], "cc_model_filenames": {}, "instance_group": [{"rate_limiter": null}]});
        assert_eq!(check(&written), Ok(()));
    }

    #[test]
    fn threads_are_shared_out() {
        let shares = |threads: u32, n: u32| -> Vec<u32> {
            let share = |before| {
                let mut settings = Settings {
                    threads,
                    ..Settings::default()
                };
                settings.share_threads(n, before);
                settings.threads
            };
            (0..n).map(share).collect()
        };
        assert_eq!(shares(8, 1), [8]);
        assert_eq!(shares(8, 3), [3, 3, 2]);
        assert_eq!(shares(1, 2), [1, 1]);
    }
    #[test]
    fn a_list_in_part_is_completed_and_its_own_entries_are_kept_and_checked() {
        let with = |item: Value| complete(&json!({"input": [item]}));
        let mine =
            json!({"name": "stream", "data_type": "TYPE_BOOL", "dims": ["1"], "optional": true});
        let full = with(mine.clone());
        assert!(check(&full).is_ok());
        let inputs = full["input"].as_array().unwrap();
        assert_eq!(inputs.len(), INPUTS.len());
        assert_eq!(inputs[0], mine);
        let required: Vec<_> = inputs
            .iter()
            .filter(|input| input["optional"] != true)
            .collect();
        assert_eq!(required.len(), 1);
        assert_eq!(required[0]["name"], "text_input");

        let mut wrong = mine.clone();
        wrong["data_type"] = json!("TYPE_INT32");
        let text = check(&with(wrong)).unwrap_err().text;
        assert_eq!(
            text,
            "input stream: data_type is TYPE_INT32, must be TYPE_BOOL"
        );
        let mut wrong = mine;
        wrong["dims"] = json!([2, 1]);
        let text = check(&with(wrong)).unwrap_err().text;
        assert_eq!(text, "input stream: dims is [2,1], must be [ 1 ]");
    }
}
