// SPDX-License-Identifier: Apache-2.0
//! From a row's logits to a token that the client gets.

use super::decoder::Decoder;
use super::{Engine, Event, Finish, Slot};
use crate::triton::error::Failure;

/// A request's last token, the text that comes with it, and why it is the last.
pub(super) struct End(i32, String, Finish);

/// A token was given out; there may be an end to it.
pub(super) type Emitted = Result<Option<End>, Failure>;

/// Lists the tokens that the next one of a request may not be.
pub(super) fn list_banned<S>(slot: &Slot<S>, ends: &[i32], banned: &mut Vec<i32>) {
    let early = (slot.output.len() as u32) < slot.sampling.min_tokens;
    banned.clear();
    if slot.sampling.ignore_eos || early {
        banned.extend_from_slice(ends);
    }
    if early {
        banned.extend_from_slice(&slot.sampling.stop_token_ids);
    }
    for word in &slot.bad {
        if let [before @ .., last] = &word[..]
            && slot.output.ends_with(before)
        {
            banned.push(*last);
        }
    }
}

impl<D: Decoder> Engine<D> {
    /// Takes the logits of banned tokens at a ramp away, so that only what can be emitted is scored. `slots`: whose row each
    /// output is.
    pub(super) fn ban(&mut self, slots: &[usize]) -> Result<(), Failure> {
        for (i, &at) in slots.iter().enumerate() {
            let Some(slot) = &self.slots[at] else {
                continue;
            };
            list_banned(slot, &self.ends, &mut self.banned);
            if !self.banned.is_empty() && !self.decoder.ban(i, &self.banned) {
                return Err(Failure::internal("a row gave no logits"));
            }
        }
        Ok(())
    }

    /// Chooses the token of a row of the last window, and gives it out if it is not the request's last one: that is for
    /// `end()`. `known`: the row's most likely token.
    pub(super) fn emit(&mut self, at: usize, row: usize, known: Option<i32>) -> Emitted {
        let Some(slot) = &mut self.slots[at] else {
            return Ok(None);
        };
        list_banned(slot, &self.ends, &mut self.banned);
        let banned = &self.banned[..];
        let token = match (&mut slot.sampler, known) {
            (Some(sampler), _) => self.decoder.sample(sampler, row, banned)?,
            (None, Some(token)) if !banned.contains(&token) => token,
            (None, _) => {
                let logits = self.decoder.logits(row);
                let logits = logits.ok_or_else(|| Failure::internal("a row gave no logits"))?;
                argmax(logits, banned)?
            }
        };
        slot.next = token;
        slot.output.push(token);
        self.tokens += 1;
        if self.decoder.is_end(token) || slot.sampling.stop_token_ids.contains(&token) {
            let mut text = String::new();
            if slot.sampling.include_stop && !self.decoder.is_end(token) {
                text = slot
                    .text
                    .push(&self.decoder.piece(token, !slot.sampling.skip_special));
            }
            text += &slot.text.finish();
            return Ok(Some(End(token, text, Finish::Stop)));
        }
        let mut text = slot
            .text
            .push(&self.decoder.piece(token, !slot.sampling.skip_special));
        let end = if slot.text.stopped() {
            Finish::Stop
        } else if slot.output.len() as u32 >= slot.sampling.max_tokens
            || slot.n_past >= self.settings.context
        {
            Finish::Length
        } else {
            let event = Event::Token {
                token: Some(token),
                text,
                end: None,
            };
            slot.answer.send(event);
            return Ok(None);
        };
        text += &slot.text.finish();
        Ok(Some(End(token, text, end)))
    }

    /// Ends a request whose last token it was, or that has none.
    pub(super) fn end(&mut self, at: usize, how: Emitted) {
        match how {
            Ok(None) => {}
            Ok(Some(End(token, text, why))) => self.finish(at, Some(token), text, why),
            Err(failure) => self.fail(at, failure),
        }
    }
}

/// The most likely token, the lowest number among equals.
pub(super) fn argmax(logits: &[f32], banned: &[i32]) -> Result<i32, Failure> {
    let mut best: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(Failure::internal(format!(
                "the logit of token {token} is NaN"
            )));
        }
        if best.is_none_or(|(_, top)| logit > top) && !banned.contains(&(token as i32)) {
            best = Some((token, logit));
        }
    }
    best.map(|(token, _)| token as i32)
        .ok_or_else(|| Failure::internal("every token is banned"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_equals_is_chosen() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0, 1.0], &[]), Ok(1));
        assert_eq!(argmax(&[0.0, 2.0, 2.0, 1.0], &[1]), Ok(2));
        assert_eq!(argmax(&[0.0, 2.0, 2.0, 1.0], &[1, 2]), Ok(3));
        assert!(argmax(&[0.0], &[0]).is_err());
        assert!(argmax(&[], &[]).is_err());
    }

    #[test]
    fn nan_is_an_error_wherever_it_stands() {
        for at in 0..3 {
            let mut logits = [0.0, 1.0, 2.0];
            logits[at] = f32::NAN;
            let text = argmax(&logits, &[]).unwrap_err().text;
            assert_eq!(text, format!("the logit of token {at} is NaN"));
        }
    }
}
