// SPDX-License-Identifier: Apache-2.0
//! From the queue to a slot, and to drex.

use std::sync::atomic::Ordering;

use drex::ffi::*;

use super::decoder::{Decoder, SamplerParams};
use super::queue::Job;
use super::{Engine, Event, Finish, Slot, check, nanoseconds, now_ns, setup, zeroed};
use crate::text::Text;
use crate::triton::error::Failure;

impl<D: Decoder> Engine<D> {
    /// Ends what is cancelled, and what waits for longer than its timeout.
    pub(super) fn cancel(&mut self) {
        self.seat.pool.sweep();
        for at in 0..self.slots.len() {
            let slot = self.slots[at].as_ref();
            if slot.is_some_and(|slot| slot.cancelled.load(Ordering::Relaxed)) {
                self.finish(at, None, String::new(), Finish::Cancelled);
            }
        }
    }

    pub(super) fn admit(&mut self) -> Result<(), Failure> {
        let now = now_ns();
        for mut job in self.seat.take() {
            if job.is_cancelled() {
                job.answer.cancel();
            } else if job.is_late(now) {
                job.fail_late();
            } else if let Some(mut slot) = self.slot(job) {
                // Whoever is alone does not look at the cells of those that were.
                let alone = self.free.len() == self.slots.len();
                let at = self.free.pop_front();
                let at = at.ok_or_else(|| Failure::internal("more requests than slots"))?;
                let prompt_tokens = slot.prompt.len() as u32;
                slot.answer.send(Event::Started { prompt_tokens });
                self.decoder.forget((!alone).then_some(at as i32));
                self.slots[at] = Some(slot);
                continue;
            }
            self.seat.freed();
        }
        Ok(())
    }

    /// None: there is no sampler for it, and it was told so.
    fn slot(&mut self, job: Job) -> Option<Slot<D::Sampler>> {
        let deadline_ns = job.deadline_ns();
        let Job {
            id,
            prompt,
            bad,
            sampling,
            cancelled,
            mut answer,
            ..
        } = job;
        if let (Some(why), Some(DREX_FILL_COPY)) = (&self.no_copy, sampling.drex_fill) {
            answer.fail(Failure::unsupported(setup::no_copy("drex_fill", why)));
            return None;
        }
        let penalties = sampling.repetition_penalty != 1.0
            || sampling.frequency_penalty != 0.0
            || sampling.presence_penalty != 0.0;
        let sampler = if sampling.temperature > 0.0 || penalties {
            let seed = sampling
                .seed
                .unwrap_or_else(|| (now_ns() ^ id.wrapping_mul(0x9e37_79b9)) as u32);
            let params = SamplerParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                frequency_penalty: sampling.frequency_penalty,
                presence_penalty: sampling.presence_penalty,
                seed,
            };
            match self.decoder.sampler(&params, &prompt) {
                Ok(sampler) => Some(sampler),
                Err(failure) => {
                    answer.fail(failure);
                    return None;
                }
            }
        } else {
            None
        };
        self.admitted += 1;
        Some(Slot {
            id,
            answer,
            cancelled,
            reshaped: penalties || !bad.is_empty(),
            bad,
            fill: self.settings.fill,
            sampler,
            text: Text::new(&sampling.stop, sampling.include_stop),
            sampling,
            prompt,
            deadline_ns,
            order: self.admitted,
            n_past: 0,
            ahead: Vec::new(),
            n_drafts: 0,
            output: Vec::new(),
            next: 0,
            busy: false,
            drafts: 0,
            drafts_accepted: 0,
            over: false,
        })
    }

    /// Makes a request known to drex, at the end of its prompt.
    pub(super) fn register(&mut self, at: usize) -> Result<(), Failure> {
        let settings = &self.settings;
        let Some(slot) = &mut self.slots[at] else {
            return Ok(());
        };
        let sampling = &slot.sampling;
        let mut config: drex_request_config = zeroed();
        config.size = size_of::<drex_request_config>() as u32;
        config.metric = sampling.drex_metric.unwrap_or(DREX_METRIC_DEFAULT);
        config.id = slot.id;
        // Confidence is that of the model's own distribution: where that is changed, a ramp says nothing about the token,
        // and such a request exits early only if it names a threshold itself.
        let threshold = if slot.reshaped { 2.0 } else { f32::NAN };
        config.threshold = sampling.drex_threshold.unwrap_or(threshold);
        config.fill = sampling.drex_fill.unwrap_or(DREX_FILL_DEFAULT);
        config.quality = sampling.drex_quality;
        // What the request names goes before the model's quality. An agreement is counted in tokens that the full model
        // would have chosen: where its best token is not what a request gets, the request is lossless.
        let names = sampling.drex_fill.is_some() || sampling.drex_threshold.is_some();
        let share = match sampling.drex_quality {
            0.0 if names => 0.0,
            0.0 => settings.quality,
            named => named,
        };
        if share > 0.0 && share < 1.0 {
            let greedy = slot.sampler.is_none() && !slot.reshaped && !self.decoder.slides();
            config.quality = if greedy { share } else { 1.0 };
            config.fill = match sampling.drex_fill {
                _ if !greedy => DREX_FILL_DEFAULT,
                Some(fill) => fill,
                None if settings.names_fill => settings.fill,
                None => DREX_FILL_PROPAGATE,
            };
        }
        config.token_deadline_ns = nanoseconds(sampling.drex_deadline_ms.into());
        config.priority = sampling.drex_priority;
        let deadline = if sampling.drex_request_deadline_ms > 0.0 {
            sampling.drex_request_deadline_ms.into()
        } else {
            settings.request_deadline_ms
        };
        config.request_deadline_ns = nanoseconds(deadline);
        // The timeout counts from the arrival; of one that is over, the least is left.
        if let Some(end) = slot.deadline_ns {
            let left = end.saturating_sub(now_ns()).max(1);
            config.request_deadline_ns = match config.request_deadline_ns {
                0 => left,
                other => other.min(left),
            };
        }
        config.max_tokens = sampling.max_tokens.into();
        // SAFETY: the struct lives during the call.
        unsafe { check(drex_request_add(self.drex, &config))? };
        let mut info: drex_request_info = zeroed();
        info.size = size_of::<drex_request_info>() as u32;
        // SAFETY: a struct with its size.
        unsafe { check(drex_request_get(self.drex, slot.id, &mut info))? };
        slot.fill = info.fill;
        Ok(())
    }
}
