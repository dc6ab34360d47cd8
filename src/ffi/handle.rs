// SPDX-License-Identifier: Apache-2.0

//! Handles are keys, not addresses: an index and a generation, looked up in a
//! fixed table of atomics. NULL, garbage and handles of destroyed objects are
//! found out instead of followed, and a second thread inside one object too.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use super::fault::Fault;
use crate::core::pages::Pages;
use crate::engine::Engine;

/// Objects of one kind that one process may have at a time.
pub const MAX_HANDLES: usize = 256;

const INDEX_BITS: u32 = 8;
const TAG_BITS: u32 = 3;
const GENERATION_BITS: u32 = usize::BITS - INDEX_BITS - TAG_BITS;

const FREE: u64 = 0;
const CLOSED: u64 = 1;
const IDLE: u64 = 2;
const BUSY: u64 = 3;
const POISONED: u64 = 4;

struct Entry<T> {
    /// generation << 3 | one of the states above
    word: AtomicU64,
    object: AtomicPtr<T>,
}

/// The objects of one kind. Calls come from any thread, so the objects move
/// between threads.
pub struct Table<T: Send + 'static> {
    /// The argument's name in error texts, and what several are.
    name: &'static str,
    plural: &'static str,
    /// Odd, so that no pointer to an allocation looks like a handle, and
    /// another one for each kind.
    tag: usize,
    entries: [Entry<T>; MAX_HANDLES],
}

pub static ENGINES: Table<Engine> = Table::new("engine", "engines", 0b101);
pub static PAGES: Table<Pages> = Table::new("pages", "page pools", 0b011);

fn word(generation: u64, state: u64) -> u64 {
    generation << 3 | state
}

impl<T: Send> Table<T> {
    const fn new(name: &'static str, plural: &'static str, tag: usize) -> Self {
        Table {
            name,
            plural,
            tag,
            entries: [const {
                Entry {
                    word: AtomicU64::new(FREE),
                    object: AtomicPtr::new(ptr::null_mut()),
                }
            }; MAX_HANDLES],
        }
    }

    fn encode<H>(&self, index: usize, generation: u64) -> *mut H {
        let key = (generation as usize) << (INDEX_BITS + TAG_BITS) | index << TAG_BITS | self.tag;
        ptr::without_provenance_mut(key)
    }

    fn decode<H>(&'static self, handle: *const H) -> Result<(&'static Entry<T>, u64), Fault> {
        let key = handle.addr();
        if handle.is_null() {
            return Err(Fault::Null(self.name));
        }
        if key & ((1 << TAG_BITS) - 1) != self.tag {
            return Err(Fault::Handle(self.name));
        }
        let index = self.number(handle);
        let generation = (key >> (INDEX_BITS + TAG_BITS)) as u64;
        Ok((&self.entries[index], generation))
    }

    /// Tells the objects alive from each other: below MAX_HANDLES.
    pub fn number<H>(&self, handle: *const H) -> usize {
        (handle.addr() >> TAG_BITS) & (MAX_HANDLES - 1)
    }

    /// Why an entry could not be taken in the state that was asked for.
    fn refuse(&self, found: u64, generation: u64) -> Fault {
        match found & 7 {
            _ if found >> 3 != generation => Fault::Handle(self.name),
            BUSY => Fault::Busy(self.name),
            POISONED => Fault::Poisoned(self.name),
            _ => Fault::Handle(self.name),
        }
    }

    /// Puts an object into the table.
    pub fn insert<H>(&'static self, object: T) -> Result<*mut H, Fault> {
        for (index, entry) in self.entries.iter().enumerate() {
            let found = entry.word.load(Ordering::Relaxed);
            if found & 7 != FREE {
                continue;
            }
            // Generation 0 is never given out, and no generation twice until
            // the bits of a handle run out.
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
                let raw = Box::into_raw(Box::new(object));
                entry.object.store(raw, Ordering::Relaxed);
                entry.word.store(word(generation, IDLE), Ordering::Release);
                return Ok(self.encode(index, generation));
            }
        }
        Err(Fault::Full(self.plural, MAX_HANDLES))
    }

    /// Takes an object out of the table, also after a panic.
    pub fn remove<H>(&'static self, handle: *const H) -> Result<Box<T>, Fault> {
        let (entry, generation) = self.decode(handle)?;
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
            .map_err(|found| self.refuse(found, generation))?;
        let raw = entry.object.swap(ptr::null_mut(), Ordering::Relaxed);
        entry.word.store(word(generation, FREE), Ordering::Release);
        // SAFETY: made by `insert`; the exchange above let this thread alone in.
        Ok(unsafe { Box::from_raw(raw) })
    }

    /// Runs a call's body inside an object. A panic of the body poisons it.
    pub fn visit<H, R>(
        &'static self,
        handle: *const H,
        body: impl FnOnce(&mut T) -> R,
    ) -> Result<R, Fault> {
        let mut guard = self.enter(handle)?;
        let result = body(guard.object());
        guard.returned = true;
        Ok(result)
    }

    fn enter<H>(&'static self, handle: *const H) -> Result<Guard<T>, Fault> {
        let (entry, generation) = self.decode(handle)?;
        entry
            .word
            .compare_exchange(
                word(generation, IDLE),
                word(generation, BUSY),
                Ordering::Acquire,
                Ordering::Relaxed,
            )
            .map_err(|found| self.refuse(found, generation))?;
        Ok(Guard {
            entry,
            generation,
            returned: false,
        })
    }
}

/// The right to be inside an object. Whether a thread unwinds says nothing of the
/// body: a host may call from a destructor while its own panic is under way.
struct Guard<T: 'static> {
    entry: &'static Entry<T>,
    generation: u64,
    /// The body did.
    returned: bool,
}

impl<T> Guard<T> {
    fn object(&mut self) -> &mut T {
        // SAFETY: the entry is BUSY with this guard's generation, so this
        // guard is the only way to the object, and nobody frees it.
        unsafe { &mut *self.entry.object.load(Ordering::Relaxed) }
    }
}

impl<T> Drop for Guard<T> {
    fn drop(&mut self) {
        let state = if self.returned { IDLE } else { POISONED };
        self.entry
            .word
            .store(word(self.generation, state), Ordering::Release);
    }
}
