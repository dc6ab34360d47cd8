// SPDX-License-Identifier: Apache-2.0
//! From a model and its settings to an engine.

use std::ffi::CString;
use std::ptr::null_mut;

use drex::ffi::*;

use super::decoder::{Decoder, Windows};
use super::pool::Seat;
use super::{Engine, check, nanoseconds, zeroed};
use crate::settings::Settings;
use crate::triton::error::Failure;
use crate::triton::log;

impl<D: Decoder> Engine<D> {
    pub fn new(mut decoder: D, mut settings: Settings, seat: Seat) -> Result<Self, Failure> {
        if settings.context > decoder.n_context() {
            log::warning(&format!(
                "parameters: context is {}, the model was trained with {}, which is used",
                settings.context,
                decoder.n_context()
            ));
            settings.context = decoder.n_context();
        }
        if settings.quality > 0.0 && settings.quality < 1.0 && decoder.slides() {
            return Err(Failure::unsupported(format!(
                "parameters: quality is {}, and the model has a sliding window, whose answers cannot be audited; must be lossless",
                settings.quality
            )));
        }
        let name = |text: &str| CString::new(text).unwrap_or_default();
        let arena = settings.arena();
        let max_batch = settings.decode_rows();
        decoder.windows(Windows {
            n_slots: arena,
            n_prompts: settings.batch,
            n_graphs: settings.graphs,
            n_rows_graph: max_batch,
        })?;
        let ramps = ramps(&decoder, &settings)?;
        let device = decoder.device()?;
        let thresholds = &settings.threshold;
        let mut config: drex_config = zeroed();
        config.size = size_of::<drex_config>() as u32;
        config.abi_version = DREX_ABI_VERSION;
        config.n_layers = decoder.n_layer();
        config.n_ramps = ramps.len() as u32;
        config.ramp_layers = ramps.as_ptr();
        config.n_slots = arena;
        config.max_requests = settings.slots;
        config.max_batch = max_batch;
        config.max_pass_rows = settings.batch;
        config.fill = settings.fill;
        config.quality = if settings.learns {
            settings.quality
        } else {
            0.0
        };
        config.device = DREX_DEVICE_HOST;
        if device.cuda {
            config.device = DREX_DEVICE_CUDA;
            config.n_vocab = decoder.n_vocab();
        }
        config.threshold = thresholds[0];
        if thresholds.len() > 1 {
            config.ramp_thresholds = thresholds.as_ptr();
        }
        config.flush_rows = settings.flush_rows;
        config.min_ready = settings.min_ready;
        config.max_hold_ns = nanoseconds(settings.max_hold_ms);
        config.token_deadline_ns = nanoseconds(settings.deadline_ms);
        config.art_ratio = settings.art_ratio;
        config.max_pending = settings.max_pending;
        let mut engine = null_mut();
        // SAFETY: what the structs point to lives during the calls.
        unsafe {
            check(drex_policy_from_name(
                name(&settings.policy).as_ptr(),
                &mut config.policy,
            ))
            .map_err(parameter("policy", &settings.policy))?;
            check(drex_metric_from_name(
                name(&settings.metric).as_ptr(),
                &mut config.metric,
            ))
            .map_err(parameter("metric", &settings.metric))?;
            check(drex_create(&config, &mut engine))?;
        }
        let ends = 0..decoder.n_vocab() as i32;
        let mut this = Self {
            drex: engine,
            device,
            ramps,
            max_batch,
            ends: ends.filter(|&token| decoder.is_end(token)).collect(),
            slots: (0..settings.slots).map(|_| None).collect(),
            free: (0..settings.slots as usize).collect(),
            seat,
            admitted: 0,
            leavers: Vec::new(),
            audits: Vec::new(),
            transit: Vec::new(),
            no_copy: decoder.no_copy(),
            n_arena: arena,
            plan: vec![zeroed(); max_batch as usize],
            verdicts: vec![zeroed(); max_batch as usize],
            agrees: vec![0; max_batch as usize],
            chosen: vec![-1; max_batch as usize],
            decisions: vec![0; max_batch as usize],
            banned: Vec::new(),
            window_ns: 0,
            tokens: 0,
            settings,
            decoder,
        };
        this.bind()?;
        this.load_profile()?;
        if config.policy == DREX_POLICY_ART && config.art_ratio.is_nan() {
            this.calibrate()?;
        }
        Ok(this)
    }

    /// From here on it gets requests.
    pub fn begin(&self) {
        self.seat.begin(self.slots.len());
    }

    fn bind(&mut self) -> Result<(), Failure> {
        if let Some(why) = &self.no_copy {
            return match self.settings.fill {
                DREX_FILL_COPY => Err(Failure::unsupported(no_copy("parameters: fill", why))),
                _ => Ok(()),
            };
        }
        let layer = |layer| {
            let kv = self.decoder.layer(layer);
            kv.ok_or_else(|| Failure::unsupported(format!("layer {layer} has no K/V storage")))
        };
        let layers: Result<Vec<drex_kv_layer>, _> =
            (0..self.decoder.n_layer()).map(layer).collect();
        let layers = layers?;
        // SAFETY: the tensors live as long as the context, which is closed after the engine.
        unsafe {
            check(drex_bind_kv(
                self.drex,
                layers.as_ptr(),
                layers.len() as u32,
            ))
        }
    }
}

/// The text for whoever named fill copy, or left it at that.
pub(super) fn no_copy(what: &str, why: &str) -> String {
    format!(
        "{what} is copy, which cannot be used with this model, {why}; the other fills are propagate, postfill and verify"
    )
}

fn ramps(decoder: &impl Decoder, settings: &Settings) -> Result<Vec<u32>, Failure> {
    let ramps = if settings.exit_layers.is_empty() {
        decoder.exit_layers()
    } else {
        settings.exit_layers.clone()
    };
    if ramps.is_empty() {
        return Err(Failure::invalid(
            "the model has no early_exit.layers in its metadata: it was not trained for early exit, or name the layers \
             with the parameter exit_layers, or a file of exits with the parameter exits",
        ));
    }
    let n_layer = decoder.n_layer();
    let up = ramps.windows(2).all(|pair| pair[0] < pair[1]);
    if !up || ramps.iter().any(|layer| !(1..n_layer).contains(layer)) {
        let whose = if settings.exit_layers.is_empty() {
            "the model's early_exit.layers"
        } else {
            "parameters: exit_layers"
        };
        return Err(Failure::invalid(format!(
            "{whose} is {ramps:?}, must be numbers from 1 to {}, each above the one before",
            n_layer - 1
        )));
    }
    let head = decoder.exit_head();
    if head != "shared" {
        return Err(Failure::unsupported(format!(
            "early_exit.head is {head}, must be shared"
        )));
    }
    let thresholds = settings.threshold.len();
    if thresholds != 1 && thresholds != ramps.len() {
        return Err(Failure::invalid(format!(
            "parameters: threshold has {thresholds} values, must have 1 or one for each of the {} exit layers",
            ramps.len()
        )));
    }
    Ok(ramps)
}

/// Names the parameter that drex refused.
fn parameter<'a>(name: &'a str, value: &'a str) -> impl FnOnce(Failure) -> Failure + 'a {
    move |failure| Failure {
        text: format!("parameters: {name} is \"{value}\": {}", failure.text),
        ..failure
    }
}
