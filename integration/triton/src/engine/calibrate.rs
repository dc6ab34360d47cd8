// SPDX-License-Identifier: Apache-2.0
//! What layer windows cost: measured before the first request, read from a file, written to one.

use std::ffi::CString;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use drex::ffi::*;

use super::decoder::{Decoder, Row};
use super::{Engine, check, now_ns, zeroed};
use crate::triton::error::Failure;
use crate::triton::log;

/// Of each pass; the first one builds the graph and is not counted.
const TIMES: u32 = 4;

impl<D: Decoder> Engine<D> {
    /// Policy art compares windows with full passes, which it never runs itself: both are timed.
    pub(super) fn calibrate(&mut self) -> Result<(), Failure> {
        let most = self.settings.slots.min(self.max_batch);
        let cells = u64::from(self.settings.slots) * u64::from(self.settings.context);
        let mut bounds = self.ramps.clone();
        bounds.push(self.decoder.n_layer());
        let mut n_rows = 1;
        loop {
            self.decoder.forget(None);
            for time in 0..TIMES {
                let count = time > 0;
                self.measure(n_rows, 2 * time, 0, self.decoder.n_layer(), count)?;
                let mut begin = 0;
                for &end in &bounds {
                    self.measure(n_rows, 2 * time + 1, begin, end, count)?;
                    begin = end;
                }
            }
            // the next number of rows must fit into the cache
            let next = (2 * n_rows).min(most);
            if n_rows == most || u64::from(2 * TIMES) * u64::from(next) > cells {
                break;
            }
            n_rows = next;
        }
        self.decoder.forget(None);
        Ok(())
    }

    /// A window over one token of each of the first sequences.
    fn measure(
        &mut self,
        n_rows: u32,
        position: u32,
        begin: u32,
        end: u32,
        count: bool,
    ) -> Result<(), Failure> {
        let rows: Vec<Row> = (0..n_rows as i32)
            .map(|sequence| Row {
                token: self.decoder.bos(),
                position: position as i32,
                sequence,
            })
            .collect();
        let start = now_ns();
        let arena: Vec<i32> = (0..n_rows as i32).collect();
        let outputs = vec![true; rows.len()];
        let code = self.decoder.window(&rows, &arena, &outputs, begin, end);
        // waits, where a window does not
        let _ = self.decoder.logits(0);
        if code != 0 {
            return Err(Failure::internal(format!(
                "llama.cpp failed on the passes that policy art is calibrated with ({code})"
            )));
        }
        if !count {
            return Ok(());
        }
        let mut seen: drex_observation = zeroed();
        seen.size = size_of::<drex_observation>() as u32;
        seen.n_rows = n_rows;
        seen.layer_begin = begin;
        seen.layer_end = end;
        seen.duration_ns = (now_ns() - start).max(1);
        seen.n_kv = u64::from(n_rows) * u64::from(position + 1);
        // SAFETY: the struct lives during the call.
        unsafe { check(drex_observe(self.drex, &seen)) }
    }

    /// Learned costs of an earlier run. Without a file there will be one next time, where one can be written.
    pub(super) fn load_profile(&mut self) -> Result<(), Failure> {
        let Some(path) = &self.settings.profile else {
            return Ok(());
        };
        let failure = |why: String| Failure::invalid(format!("parameters: profile {path}: {why}"));
        let other = beside(path);
        let written = std::fs::write(&other, "");
        let written = written.and_then(|()| std::fs::remove_file(&other));
        written.map_err(|error| failure(format!("cannot be written: {error}")))?;
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failure(error.to_string())),
        };
        let text = CString::new(text).map_err(|_| failure("it has a 0 byte".into()))?;
        // SAFETY: a text that lives during the call.
        unsafe { check(drex_profile_load(self.drex, text.as_ptr())) }
            .map_err(|error| failure(error.text))
    }

    /// At the end; what cannot be written is said.
    pub(super) fn save_profile(&self) {
        let Some(path) = &self.settings.profile else {
            return;
        };
        let mut length = 0;
        // SAFETY: asks for the length.
        let status = unsafe { drex_profile_save(self.drex, null_mut(), 0, &mut length) };
        if status != DREX_OK {
            return; // nothing was learned
        }
        let mut text = vec![0u8; length + 1];
        // SAFETY: as many bytes as it says.
        let status = unsafe {
            drex_profile_save(self.drex, text.as_mut_ptr().cast(), text.len(), &mut length)
        };
        if status != DREX_OK {
            return;
        }
        text.truncate(length);
        text.push(b'\n');
        let other = beside(path);
        let written = std::fs::write(&other, text).and_then(|()| std::fs::rename(&other, path));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&other);
            log::error(&format!("profile {path}: {error}"));
        }
    }
}

/// A name for what becomes the file at once: a server that is killed must not leave half a file, and two instances may write
/// at the same time.
fn beside(path: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{path}.{}.{count}.tmp", std::process::id())
}
