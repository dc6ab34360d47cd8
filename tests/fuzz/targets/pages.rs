// SPDX-License-Identifier: Apache-2.0

//! A pool of pages, and a block table that a host may have spoiled.

use std::ptr::null_mut;

use arbitrary::{Result, Unstructured};
use drex::ffi::*;

use crate::{sized, succeeded};

pub fn run(data: &[u8]) {
    // An end of the bytes is the end of the story.
    let _ = story(&mut Unstructured::new(data));
}

struct Pool {
    raw: *mut drex_pages,
    n_layers: u32,
    n_blocks: u32,
    n_pages: u32,
    page_tokens: u32,
    table: Vec<u32>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: a handle.
        unsafe { drex_pages_destroy(self.raw) };
    }
}

fn story(u: &mut Unstructured) -> Result<()> {
    let mut c = sized!(drex_pages_config);
    c.n_layers = u.int_in_range(1..=6)?;
    c.page_tokens = u.int_in_range(1..=4)?;
    c.n_pages = u.int_in_range(1..=24)?;
    if u.ratio(1, 16)? {
        (c.n_layers, c.page_tokens) = (u.arbitrary()?, u.arbitrary()?);
        c.n_pages = u.int_in_range(0..=1000)?;
    }
    let mut raw = null_mut();
    // SAFETY: valid pointers.
    let status = unsafe { drex_pages_create(&c, &mut raw) };
    if !succeeded("drex_pages_create", status) {
        assert!(raw.is_null(), "a failed call has an output");
        return Ok(());
    }
    let n_blocks = 3;
    let room = c.n_layers.min(64) as usize * n_blocks as usize;
    let mut pool = Pool {
        raw,
        n_layers: c.n_layers,
        n_blocks,
        n_pages: c.n_pages,
        page_tokens: c.page_tokens,
        table: vec![DREX_NO_PAGE; room],
    };
    if c.n_layers > 64 {
        return Ok(()); // a table for it would be the host's
    }
    let mut spoiled = false;
    while !u.is_empty() {
        spoiled |= pool.call(u)?;
        pool.check();
    }
    if !spoiled {
        pool.end();
    }
    Ok(())
}

impl Pool {
    /// Makes one call. Returns whether the table is not what the calls left it to be.
    fn call(&mut self, u: &mut Unstructured) -> Result<bool> {
        let n = u64::from(self.n_blocks * self.page_tokens);
        let pos = match u.ratio(1, 16)? {
            true => u.arbitrary()?,
            false => u.int_in_range(0..=n)?,
        };
        let (begin, end) = (u.int_in_range(0..=7)?, u.int_in_range(0..=7)?);
        let room = 2 * self.n_layers.min(u.int_in_range(0..=8)?);
        let mut copies = vec![
            drex_page_copy {
                from: 0,
                to: 0,
                first_cell: 0,
                n_cells: 0
            };
            room as usize + 1
        ];
        let (before, mut n_copies) = (self.table.clone(), u32::MAX);
        let (t, out) = (self.table.as_mut_ptr(), copies.as_mut_ptr());
        let kind = u.int_in_range(0..=8u8)?;
        // SAFETY: the table has n_layers x n_blocks entries, `copies` the room that is said.
        let (name, status) = unsafe {
            match kind {
                0..=3 => {
                    let status = drex_pages_write(
                        self.raw,
                        t,
                        self.n_blocks,
                        pos,
                        begin,
                        end,
                        out,
                        room,
                        &mut n_copies,
                    );
                    ("drex_pages_write", status)
                }
                4..=5 => {
                    let status = drex_pages_exit(
                        self.raw,
                        t,
                        self.n_blocks,
                        pos,
                        begin,
                        out,
                        room,
                        &mut n_copies,
                    );
                    ("drex_pages_exit", status)
                }
                6 => {
                    let status = drex_pages_release(self.raw, t, self.n_blocks, begin, end);
                    ("drex_pages_release", status)
                }
                7 => {
                    // Another sequence that shares blocks, and gives them back at once.
                    let status = drex_pages_fork(self.raw, t, self.n_blocks, begin, end);
                    if succeeded("drex_pages_fork", status) {
                        let mut other = self.table.clone();
                        let status = drex_pages_release(
                            self.raw,
                            other.as_mut_ptr(),
                            self.n_blocks,
                            begin,
                            end,
                        );
                        assert!(succeeded("drex_pages_release", status));
                    }
                    ("drex_pages_fork", DREX_OK)
                }
                _ => {
                    let i = u.choose_index(self.table.len())?;
                    self.table[i] = u.arbitrary()?;
                    return Ok(true);
                }
            }
        };
        if !succeeded(name, status) {
            assert_eq!(before, self.table, "{name} failed and changed the table");
            assert_eq!(n_copies, u32::MAX, "{name} failed and has an output");
        } else if kind <= 5 {
            assert!(
                n_copies <= room,
                "{name} wrote {n_copies} copies into {room}"
            );
            for c in &copies[..n_copies as usize] {
                assert!(c.from < self.n_pages && c.to < self.n_pages && c.from != c.to);
                assert!(c.first_cell + c.n_cells <= self.page_tokens);
            }
        }
        Ok(false)
    }

    fn stats(&self) -> drex_pages_stats {
        let mut s = sized!(drex_pages_stats);
        // SAFETY: valid pointers.
        let status = unsafe { drex_pages_stats_get(self.raw, &mut s) };
        assert!(succeeded("drex_pages_stats_get", status));
        s
    }

    fn check(&self) {
        let s = self.stats();
        assert_eq!(s.pages_used + s.pages_free, u64::from(self.n_pages));
        assert!(s.references >= s.pages_used);
    }

    /// The sequence gives all of its blocks back, and nothing is left.
    fn end(&mut self) {
        let held = self.table.iter().filter(|&&p| p != DREX_NO_PAGE).count();
        assert_eq!(self.stats().references, held as u64);
        // SAFETY: the table has n_layers x n_blocks entries.
        let status = unsafe {
            let n = self.n_blocks;
            drex_pages_release(self.raw, self.table.as_mut_ptr(), n, 0, n)
        };
        assert!(succeeded("drex_pages_release", status));
        assert_eq!(self.stats().pages_used, 0);
        assert!(self.table.iter().all(|&p| p == DREX_NO_PAGE));
    }
}
