// SPDX-License-Identifier: Apache-2.0

//! State-copy for paged K/V: where a token leaves early, the skipped layers'
//! block table entries point to the page of the last computed layer, and cells
//! are copied only where a page holds tokens that left at different depths.
//!
//! What makes it work: a token that left after `x` layers has the same K/V in
//! all layers from `x - 1` on. So in a block whose deepest token left after
//! `d` layers, all layers from `d - 1` on hold the same cells and can share one
//! page, and the layers before have a page each. `d` only grows while a block
//! fills up, hence a layer gets a page of its own at most once per block, and
//! never are more cells copied than state-copy would copy, apart from what two
//! sequences that share a block must copy when they part. With pages of one
//! token, none is.

use crate::core::error::{Error, Result};
use crate::core::memory;

/// A block table entry without a page.
pub const NO_PAGE: u32 = u32::MAX;
pub const MAX_PAGES: u32 = 1 << 26;
const MAX_PAGE_TOKENS: u32 = 1 << 16;

/// The first of a page's cells to copy, how many, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellCopy {
    pub from: u32,
    pub to: u32,
    pub first: u32,
    pub n: u32,
}

/// A sequence's block table: entry `layer * stride + block` is a page.
pub struct BlockTable<E> {
    pub entries: E,
    pub stride: usize,
}

/// One whose entries a call may change, and one that it only reads.
pub type Changed<'a> = BlockTable<&'a mut [u32]>;
pub type Read<'a> = BlockTable<&'a [u32]>;

/// Who uses which page.
pub struct Pages {
    layers: usize,
    page_tokens: u32,
    /// Table entries that point to each page. 0: free.
    refs: Vec<u32>,
    free: Vec<u32>,
    entries: u64,
    copied: u64,
    aliased: u64,
    /// The column that a call works on, and its copies.
    column: Vec<u32>,
    sorted: Vec<u32>,
    copies: Vec<CellCopy>,
}

impl Pages {
    pub fn new(layers: u32, page_tokens: u32, n_pages: u32) -> Result<Self> {
        let range = |field, value: u32, most: u32, expected| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::int(field, value, expected)),
        };
        range(
            "n_layers",
            layers,
            crate::core::config::MAX_LAYERS,
            "1..65536",
        )?;
        range("page_tokens", page_tokens, MAX_PAGE_TOKENS, "1..65536")?;
        range("n_pages", n_pages, MAX_PAGES, "1..67108864")?;
        Ok(Pages {
            layers: layers as usize,
            page_tokens,
            refs: memory::filled(0, n_pages as usize)?,
            free: memory::free_list(n_pages)?,
            entries: 0,
            copied: 0,
            aliased: 0,
            column: memory::room(layers as usize)?,
            sorted: memory::room(layers as usize)?,
            copies: memory::room(2 * layers as usize)?,
        })
    }

    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Pages in use.
    pub fn used(&self) -> u64 {
        (self.refs.len() - self.free.len()) as u64
    }

    pub fn free(&self) -> u64 {
        self.free.len() as u64
    }

    /// Table entries that point to a page.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Cells that were copied, and cells of skipped layers that were not
    /// because their page is shared.
    pub fn cells(&self) -> (u64, u64) {
        (self.copied, self.aliased)
    }

    fn load(&mut self, table: &Changed, block: usize) -> Result<()> {
        self.column.clear();
        for l in 0..self.layers {
            let i = l * table.stride + block;
            let page = table.entries[i];
            self.known(page, i)?;
            self.column.push(page);
        }
        self.copies.clear();
        // A page that the table names more often than it was given out is
        // somebody else's, and must not be taken from them.
        self.sorted.clear();
        self.sorted.extend_from_slice(&self.column);
        self.sorted.sort_unstable();
        for own in self.sorted.chunk_by(|a, b| a == b) {
            if own[0] != NO_PAGE && own.len() as u64 > u64::from(self.refs[own[0] as usize]) {
                let expected = "a page at no more places than it was given out for";
                let at = self.column.iter().rposition(|p| *p == own[0]);
                let i = at.unwrap_or(0) * table.stride + block;
                return Err(Error::int("table", own[0], expected).at(i));
            }
        }
        Ok(())
    }

    fn known(&self, page: u32, i: usize) -> Result<()> {
        if page == NO_PAGE || self.refs.get(page as usize).is_some_and(|&n| n > 0) {
            return Ok(());
        }
        Err(Error::int("table", page, "a page that is in use, or DREX_NO_PAGE").at(i))
    }

    fn store(&mut self, table: &mut Changed, block: usize) -> &[CellCopy] {
        for (l, &page) in self.column.iter().enumerate() {
            table.entries[l * table.stride + block] = page;
        }
        &self.copies
    }

    /// Of this column's entries: the first that points to the page, and how
    /// many do.
    fn sharers(&self, page: u32) -> (usize, u32) {
        if self.refs[page as usize] == 1 {
            let at = self.column.iter().position(|&p| p == page);
            return (at.unwrap_or(0), 1);
        }
        let mut own = self.column.iter().enumerate().filter(|c| *c.1 == page);
        let first = own.next().map_or(0, |c| c.0);
        (first, 1 + own.count() as u32)
    }

    /// What layer `l` needs before one of its cells is written.
    fn needs_page(&self, l: usize) -> bool {
        let page = self.column[l];
        if page == NO_PAGE {
            return true;
        }
        let (first, own) = self.sharers(page);
        first != l || self.refs[page as usize] > own
    }

    fn room(&self, pages: usize, copies: usize, max_copies: usize) -> Result<()> {
        if copies > max_copies {
            return Err(Error::Capacity {
                field: "max_copies",
                value: max_copies as u64,
                need: copies as u64,
                why: "2 * n_layers is always enough",
            });
        }
        if pages > self.free.len() {
            return Err(Error::Capacity {
                field: "n_pages",
                value: self.refs.len() as u64,
                need: self.used() + pages as u64,
                why: "no page is free; release a sequence",
            });
        }
        Ok(())
    }

    /// Gives layer `l` a page that nobody else reads its cells from, with the
    /// block's first `cells` cells in it.
    fn own(&mut self, l: usize, cells: u32) {
        if !self.needs_page(l) {
            return;
        }
        let old = self.column[l];
        // `room` has seen to it.
        let Some(new) = self.free.pop() else { return };
        if old == NO_PAGE {
            self.column[l] = new;
            self.refs[new as usize] = 1;
            self.entries += 1;
            return;
        }
        let (first, _) = self.sharers(old);
        // Those that read this layer's cells go on doing so.
        let follow = first == l;
        let mut moved = 0;
        for p in &mut self.column[l..] {
            if *p == old && (follow || moved == 0) {
                *p = new;
                moved += 1;
            }
        }
        self.refs[new as usize] = moved;
        self.drop_refs(old, moved);
        if cells > 0 {
            self.copies.push(CellCopy {
                from: old,
                to: new,
                first: 0,
                n: cells,
            });
            self.copied += u64::from(cells);
        }
    }

    fn drop_refs(&mut self, page: u32, n: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= n;
        if *refs == 0 {
            self.free.push(page);
        }
    }

    fn place(&self, table: &Changed, pos: u64) -> Result<(usize, u32)> {
        let block = (pos / u64::from(self.page_tokens)) as usize;
        if block >= table.stride {
            return Err(Error::Conflict {
                field: "pos",
                index: None,
                value: pos,
                other: "n_blocks",
                other_value: table.stride as u64,
                why: "the table has an entry for each block of the sequence",
            });
        }
        Ok((block, (pos % u64::from(self.page_tokens)) as u32))
    }

    /// Before layers `[begin, end)` write the cell of the token at `pos`, behind
    /// which they have written none: allocates pages and ends sharing where others would
    /// see it. The copies have to be made before the cell is written.
    pub fn write(
        &mut self,
        table: &mut Changed,
        pos: u64,
        begin: usize,
        end: usize,
        max_copies: usize,
    ) -> Result<&[CellCopy]> {
        if end > self.layers {
            let layers = self.layers as u64;
            return Err(Error::Conflict {
                field: "layer_end",
                index: None,
                value: end as u64,
                other: "n_layers",
                other_value: layers,
                why: "the window lies within the model",
            });
        }
        if begin >= end {
            return Err(Error::Conflict {
                field: "layer_begin",
                index: None,
                value: begin as u64,
                other: "layer_end",
                other_value: end as u64,
                why: "the window has at least one layer",
            });
        }
        let (block, cell) = self.place(table, pos)?;
        self.load(table, block)?;
        let (mut pages, mut copies) = (0, 0);
        for l in begin..end {
            if self.needs_page(l) {
                pages += 1;
                copies += usize::from(cell > 0 && self.column[l] != NO_PAGE);
            }
        }
        self.room(pages, copies, max_copies)?;
        for l in begin..end {
            self.own(l, cell);
        }
        Ok(self.store(table, block))
    }

    /// The token at `pos`, the sequence's newest, left after layers
    /// `[0, exit)`, which have written its cell: gives the other layers the
    /// cell of layer `exit - 1`.
    pub fn exit(
        &mut self,
        table: &mut Changed,
        pos: u64,
        exit: usize,
        max_copies: usize,
    ) -> Result<&[CellCopy]> {
        if exit == 0 || exit >= self.layers {
            return Err(Error::int(
                "exit_layer",
                exit as u64,
                "at least 1 and below n_layers",
            ));
        }
        let (block, cell) = self.place(table, pos)?;
        self.load(table, block)?;
        let source = self.column[exit - 1];
        if source == NO_PAGE {
            let i = (exit - 1) * table.stride + block;
            let expected = "a page: the layer before the exit has written its cell";
            return Err(Error::int("table", NO_PAGE, expected).at(i));
        }
        let last = self.column[self.layers - 1];
        // Layers from the deepest token's last one on share a page.
        let deepest = match last {
            NO_PAGE => 0,
            page => self.sharers(page).0 + 1,
        };
        if cell == 0 || deepest <= exit {
            for l in exit..self.layers {
                let old = self.column[l];
                if old == source {
                    continue;
                }
                self.column[l] = source;
                self.refs[source as usize] += 1;
                match old {
                    NO_PAGE => self.entries += 1,
                    old => self.drop_refs(old, 1),
                }
            }
            self.aliased += (self.layers - exit) as u64;
            return Ok(self.store(table, block));
        }
        let (mut pages, mut copies) = (0, 0);
        for l in exit..deepest {
            let own = self.needs_page(l);
            pages += usize::from(own);
            copies += 1 + usize::from(own && self.column[l] != NO_PAGE);
        }
        self.room(pages, copies, max_copies)?;
        for l in exit..deepest {
            self.own(l, cell);
            self.copies.push(CellCopy {
                from: source,
                to: self.column[l],
                first: cell,
                n: 1,
            });
            self.copied += 1;
        }
        self.aliased += (self.layers - deepest) as u64;
        Ok(self.store(table, block))
    }

    /// Another sequence shares these blocks from now on: the host has copied
    /// their entries.
    pub fn fork(&mut self, table: &Read, first: usize, n: usize) -> Result<()> {
        self.check_blocks(table.entries, table.stride, first, n)?;
        for l in 0..self.layers {
            for b in first..first + n {
                let page = table.entries[l * table.stride + b];
                if page != NO_PAGE {
                    self.refs[page as usize] += 1;
                    self.entries += 1;
                }
            }
        }
        Ok(())
    }

    /// The sequence gives these blocks back; their entries become `NO_PAGE`.
    pub fn release(&mut self, table: &mut Changed, first: usize, n: usize) -> Result<()> {
        self.check_blocks(table.entries, table.stride, first, n)?;
        for l in 0..self.layers {
            for b in first..first + n {
                let entry = &mut table.entries[l * table.stride + b];
                let page = std::mem::replace(entry, NO_PAGE);
                // A table that names a page more often than it was given out
                // is wrong, and must not take it from others.
                if page != NO_PAGE && self.refs[page as usize] > 0 {
                    self.entries -= 1;
                    self.drop_refs(page, 1);
                }
            }
        }
        Ok(())
    }

    fn check_blocks(&self, entries: &[u32], stride: usize, first: usize, n: usize) -> Result<()> {
        if first.checked_add(n).is_none_or(|end| end > stride) {
            return Err(Error::Conflict {
                field: "first_block",
                index: None,
                value: first as u64,
                other: "n_blocks",
                other_value: stride as u64,
                why: "the table has these blocks",
            });
        }
        for l in 0..self.layers {
            for b in first..first + n {
                let i = l * stride + b;
                self.known(entries[i], i)?;
            }
        }
        Ok(())
    }
}
