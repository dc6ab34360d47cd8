// SPDX-License-Identifier: Apache-2.0

//! Handles are keys, not addresses: an index and a generation, looked up in a
//! fixed table of atomics. NULL, garbage and handles of destroyed engines are
//! found out instead of followed, and a second thread inside one engine too.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use super::error::Fault;
use super::types::drex_engine;
use crate::instance::Instance;

/// Engines that one process may have at a time.
pub const MAX_ENGINES: usize = 256;

const INDEX_BITS: u32 = 8;
const TAG_BITS: u32 = 3;
/// Odd, so that no pointer to an allocation looks like a handle.
const TAG: usize = 0b101;
const GENERATION_BITS: u32 = usize::BITS - INDEX_BITS - TAG_BITS;

const FREE: u64 = 0;
const CLOSED: u64 = 1;
const IDLE: u64 = 2;
const BUSY: u64 = 3;
const POISONED: u64 = 4;

struct Entry {
    /// generation << 3 | one of the states above
    word: AtomicU64,
    instance: AtomicPtr<Instance>,
}

static TABLE: [Entry; MAX_ENGINES] = [const {
    Entry {
        word: AtomicU64::new(FREE),
        instance: AtomicPtr::new(ptr::null_mut()),
    }
}; MAX_ENGINES];

fn word(generation: u64, state: u64) -> u64 {
    generation << 3 | state
}

fn encode(index: usize, generation: u64) -> *mut drex_engine {
    let key = (generation as usize) << (INDEX_BITS + TAG_BITS) | index << TAG_BITS | TAG;
    ptr::without_provenance_mut(key)
}

fn decode(handle: *const drex_engine) -> Result<(&'static Entry, u64), Fault> {
    let key = handle.addr();
    if handle.is_null() {
        return Err(Fault::Null("engine"));
    }
    if key & ((1 << TAG_BITS) - 1) != TAG {
        return Err(Fault::Handle);
    }
    let index = (key >> TAG_BITS) & (MAX_ENGINES - 1);
    let generation = (key >> (INDEX_BITS + TAG_BITS)) as u64;
    Ok((&TABLE[index], generation))
}

/// Why an entry could not be taken in the state that was asked for.
fn refuse(found: u64, generation: u64) -> Fault {
    match found & 7 {
        _ if found >> 3 != generation => Fault::Handle,
        BUSY => Fault::Busy,
        POISONED => Fault::Poisoned,
        _ => Fault::Handle,
    }
}

/// Puts an instance into the table.
pub fn insert(instance: Instance) -> Result<*mut drex_engine, Fault> {
    for (index, entry) in TABLE.iter().enumerate() {
        let found = entry.word.load(Ordering::Relaxed);
        if found & 7 != FREE {
            continue;
        }
        // Generation 0 is never given out, and no generation twice until the
        // bits of a handle run out.
        let mut generation = (found >> 3) + 1;
        if generation >> GENERATION_BITS != 0 {
            generation = 1;
        }
        let taken = entry.word.compare_exchange(
            found,
            word(generation, CLOSED),
            Ordering::Acquire,
            Ordering::Relaxed,
        );
        if taken.is_ok() {
            let raw = Box::into_raw(Box::new(instance));
            entry.instance.store(raw, Ordering::Relaxed);
            entry.word.store(word(generation, IDLE), Ordering::Release);
            return Ok(encode(index, generation));
        }
    }
    Err(Fault::Engines(MAX_ENGINES))
}

/// Takes an instance out of the table, also after a panic.
pub fn remove(handle: *const drex_engine) -> Result<Box<Instance>, Fault> {
    let (entry, generation) = decode(handle)?;
    let close = |from| {
        entry.word.compare_exchange(
            word(generation, from),
            word(generation, CLOSED),
            Ordering::Acquire,
            Ordering::Relaxed,
        )
    };
    close(IDLE)
        .or_else(|_| close(POISONED))
        .map_err(|found| refuse(found, generation))?;
    let raw = entry.instance.swap(ptr::null_mut(), Ordering::Relaxed);
    entry.word.store(word(generation, FREE), Ordering::Release);
    // SAFETY: made by `insert`; the exchange above let this thread alone in.
    Ok(unsafe { Box::from_raw(raw) })
}

/// The right to be inside an engine. If a panic that began after it was given
/// drops it, the engine is poisoned.
pub struct Guard {
    entry: &'static Entry,
    generation: u64,
    /// A host may call from a destructor that runs while its own thread
    /// unwinds: that panic is not ours.
    was_panicking: bool,
}

pub fn enter(handle: *const drex_engine) -> Result<Guard, Fault> {
    let (entry, generation) = decode(handle)?;
    entry
        .word
        .compare_exchange(
            word(generation, IDLE),
            word(generation, BUSY),
            Ordering::Acquire,
            Ordering::Relaxed,
        )
        .map_err(|found| refuse(found, generation))?;
    Ok(Guard {
        entry,
        generation,
        was_panicking: std::thread::panicking(),
    })
}

impl Guard {
    pub fn instance(&mut self) -> &mut Instance {
        // SAFETY: the entry is BUSY with this guard's generation, so this
        // guard is the only way to the instance, and nobody frees it.
        unsafe { &mut *self.entry.instance.load(Ordering::Relaxed) }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let state = if std::thread::panicking() && !self.was_panicking {
            POISONED
        } else {
            IDLE
        };
        self.entry
            .word
            .store(word(self.generation, state), Ordering::Release);
    }
}
