// SPDX-License-Identifier: Apache-2.0

//! Paged K/V. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::slice;

use super::entry::{self, call};
use super::fault::Fault;
use super::handle::PAGES;
use super::status::drex_status;
use crate::core::error::Error;
use crate::core::pages::{CellCopy, Changed, Pages, Read};

/// A block table entry without a page.
pub const DREX_NO_PAGE: u32 = u32::MAX;

/// An account of a pool of K/V pages. Opaque, and not an address. Made by
/// drex_pages_create(), ended by drex_pages_destroy(). A destroyed handle gives
/// DREX_ERROR_INVALID_HANDLE.
pub struct drex_pages {
    _opaque: [u8; 0],
}

/// For drex_pages_create().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_pages_config {
    /// sizeof(drex_pages_config)
    pub size: u32,
    /// Layers of the model, 1 to 65536.
    pub n_layers: u32,
    /// Cells of a page, 1 to 65536. A page holds K and V of one layer.
    pub page_tokens: u32,
    /// Pages of the pool, numbered from 0; at most 67108864. Any layer can use
    /// any of them.
    pub n_pages: u32,
}

/// Cells [first_cell, first_cell + n_cells) of a page, K and V, to the same
/// cells of another.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct drex_page_copy {
    /// The page that is read.
    pub from: u32,
    /// The page that is written, another one.
    pub to: u32,
    /// Below page_tokens.
    pub first_cell: u32,
    /// At least 1.
    pub n_cells: u32,
}

/// For drex_pages_stats_get().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_pages_stats {
    /// sizeof(drex_pages_stats), set by the caller
    pub size: u32,
    /// 0
    pub reserved: u32,
    /// Pages that some entry points to.
    pub pages_used: u64,
    /// All others.
    pub pages_free: u64,
    /// Block table entries that point to a page.
    pub references: u64,
    /// Pages that sharing saves: references - pages_used.
    pub pages_saved: u64,
    /// Cells of one layer that were copied so far.
    pub cells_copied: u64,
    /// Cells of skipped layers that needed no copy.
    pub cells_aliased: u64,
}

fn with(
    function: &str,
    pages: *const drex_pages,
    body: impl FnOnce(&mut Pages) -> Result<(), Fault>,
) -> drex_status {
    call(function, || PAGES.visit(pages, body)?)
}

/// Entries of a table, if its address can be one.
fn entries(pages: &Pages, table: *const u32, n_blocks: u32) -> Result<usize, Fault> {
    if table.is_null() {
        return Err(Fault::Null("table"));
    }
    if !table.is_aligned() {
        let expected = "an address that is a multiple of 4";
        return Err(Error::pointer("table", table.addr() as u64, expected).into());
    }
    if n_blocks == 0 {
        return Err(Error::int("n_blocks", 0u32, "at least 1").into());
    }
    Ok(pages.layers() * n_blocks as usize)
}

/// # Safety
/// `table` is NULL or has n_layers * n_blocks entries, and nobody else uses
/// them.
unsafe fn changed<'a>(pages: &Pages, table: *mut u32, n_blocks: u32) -> Result<Changed<'a>, Fault> {
    let n = entries(pages, table, n_blocks)?;
    Ok(Changed {
        // SAFETY: the caller's contract.
        entries: unsafe { slice::from_raw_parts_mut(table, n) },
        stride: n_blocks as usize,
    })
}

/// # Safety
/// `table` is NULL or has n_layers * n_blocks entries, and nobody changes them.
unsafe fn read<'a>(pages: &Pages, table: *const u32, n_blocks: u32) -> Result<Read<'a>, Fault> {
    let n = entries(pages, table, n_blocks)?;
    Ok(Read {
        // SAFETY: the caller's contract.
        entries: unsafe { slice::from_raw_parts(table, n) },
        stride: n_blocks as usize,
    })
}

/// # Safety
/// `out` has room for them, `n` is writable.
unsafe fn give(copies: &[CellCopy], out: *mut drex_page_copy, n: *mut u32) {
    for (i, c) in copies.iter().enumerate() {
        let copy = drex_page_copy {
            from: c.from,
            to: c.to,
            first_cell: c.first,
            n_cells: c.n,
        };
        // SAFETY: the caller's contract.
        unsafe { out.add(i).write_unaligned(copy) };
    }
    // SAFETY: the caller's contract.
    unsafe { n.write_unaligned(copies.len() as u32) };
}

fn room(copies: *mut drex_page_copy, max_copies: u32, n_copies: *mut u32) -> Result<usize, Fault> {
    if n_copies.is_null() {
        return Err(Fault::Null("n_copies"));
    }
    if copies.is_null() && max_copies > 0 {
        return Err(Fault::Null("copies"));
    }
    Ok(max_copies as usize)
}

/// Accounts for a pool of K/V pages, see chapter 6.
///
/// config  read during the call only
/// out     the handle; to be destroyed with drex_pages_destroy()
///
/// Allocates 8 bytes a page; nothing else here does. Errors: NULL_ARGUMENT,
/// STRUCT_SIZE, INVALID_ARGUMENT; MEMORY; CAPACITY for more than 256 pools.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_create(
    config: *const drex_pages_config,
    out: *mut *mut drex_pages,
) -> drex_status {
    call("drex_pages_create", || {
        // SAFETY: the caller's contract.
        let c = unsafe { entry::read("config", config)? };
        if out.is_null() {
            return Err(Fault::Null("out"));
        }
        let pages = Pages::new(c.n_layers, c.page_tokens, c.n_pages)?;
        let handle = PAGES.insert(pages)?;
        // SAFETY: checked above.
        unsafe { out.write_unaligned(handle) };
        Ok(())
    })
}

/// NULL is ignored. Block tables stay the host's.
///
/// Errors: INVALID_HANDLE, HANDLE_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_destroy(pages: *mut drex_pages) -> drex_status {
    call("drex_pages_destroy", || {
        if !pages.is_null() {
            drop(PAGES.remove(pages)?);
        }
        Ok(())
    })
}

/// Before layers [layer_begin, layer_end) write the cell of the token at `pos`:
/// gives these layers pages for its block, and ends sharing where another layer
/// or sequence would see what they write. Of a sequence's tokens in one window,
/// the oldest first: these layers must have written no later cell yet.
///
/// table       [n_layers][n_blocks] pages, layer by layer, DREX_NO_PAGE where
///             there is none; entries of the token's block are changed
/// n_blocks    entries of a layer
/// copies      what to copy before the window runs, in this order
/// max_copies  room in `copies`; n_layers is always enough here
/// n_copies    how many there are
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT; CAPACITY when no page is free or
/// `copies` is too short. Nothing has changed then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_write(
    pages: *mut drex_pages,
    table: *mut u32,
    n_blocks: u32,
    pos: u64,
    layer_begin: u32,
    layer_end: u32,
    copies: *mut drex_page_copy,
    max_copies: u32,
    n_copies: *mut u32,
) -> drex_status {
    with("drex_pages_write", pages, |pages| {
        let max = room(copies, max_copies, n_copies)?;
        // SAFETY: the caller's contract.
        let mut table = unsafe { changed(pages, table, n_blocks)? };
        let (begin, end) = (layer_begin as usize, layer_end as usize);
        let got = pages.write(&mut table, pos, begin, end, max)?;
        // SAFETY: checked above; no more than `max`.
        unsafe { give(got, copies, n_copies) };
        Ok(())
    })
}

/// After the token at `pos`, its sequence's newest, left after layers
/// [0, exit_layer): gives the skipped layers its K/V. Where all tokens of its
/// block so far left after as many layers or fewer, their entries become the
/// page of layer exit_layer - 1 and nothing is copied.
///
/// exit_layer  the ramp's layer, as in drex_config.ramp_layers
/// max_copies  2 * n_layers is always enough
///
/// The rest is as for drex_pages_write().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_exit(
    pages: *mut drex_pages,
    table: *mut u32,
    n_blocks: u32,
    pos: u64,
    exit_layer: u32,
    copies: *mut drex_page_copy,
    max_copies: u32,
    n_copies: *mut u32,
) -> drex_status {
    with("drex_pages_exit", pages, |pages| {
        let max = room(copies, max_copies, n_copies)?;
        // SAFETY: the caller's contract.
        let mut table = unsafe { changed(pages, table, n_blocks)? };
        let got = pages.exit(&mut table, pos, exit_layer as usize, max)?;
        // SAFETY: checked above; no more than `max`.
        unsafe { give(got, copies, n_copies) };
        Ok(())
    })
}

/// Another sequence shares blocks [first_block, first_block + count) from now
/// on: the host has copied, or is about to copy, their entries into its table.
/// Whoever writes into a shared page first gets one of its own.
///
/// Errors: NULL_ARGUMENT, INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_fork(
    pages: *mut drex_pages,
    table: *const u32,
    n_blocks: u32,
    first_block: u32,
    count: u32,
) -> drex_status {
    with("drex_pages_fork", pages, |pages| {
        // SAFETY: the caller's contract.
        let table = unsafe { read(pages, table, n_blocks)? };
        Ok(pages.fork(&table, first_block as usize, count as usize)?)
    })
}

/// A sequence gives blocks [first_block, first_block + count) back; their
/// entries become DREX_NO_PAGE.
///
/// Errors: NULL_ARGUMENT; INVALID_ARGUMENT, also for a page that is free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_release(
    pages: *mut drex_pages,
    table: *mut u32,
    n_blocks: u32,
    first_block: u32,
    count: u32,
) -> drex_status {
    with("drex_pages_release", pages, |pages| {
        // SAFETY: the caller's contract.
        let mut table = unsafe { changed(pages, table, n_blocks)? };
        Ok(pages.release(&mut table, first_block as usize, count as usize)?)
    })
}

/// Counts of pages used, shared and copied.
///
/// out  its size is set by the caller
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_pages_stats_get(
    pages: *const drex_pages,
    out: *mut drex_pages_stats,
) -> drex_status {
    with("drex_pages_stats_get", pages, |pages| {
        // SAFETY: the caller's contract.
        let size = unsafe { entry::writable("out", out)? };
        let (cells_copied, cells_aliased) = pages.cells();
        let stats = drex_pages_stats {
            size,
            reserved: 0,
            pages_used: pages.used(),
            pages_free: pages.free(),
            references: pages.entries(),
            pages_saved: pages.entries() - pages.used(),
            cells_copied,
            cells_aliased,
        };
        // SAFETY: checked above.
        unsafe { entry::write(out, &stats) };
        Ok(())
    })
}

const _: () = assert!(DREX_NO_PAGE == crate::core::pages::NO_PAGE);
