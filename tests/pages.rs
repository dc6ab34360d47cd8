// SPDX-License-Identifier: Apache-2.0

//! A host with paged K/V, in pages of 1, 2 and 16 tokens, against one dense
//! array per layer: after every token, each layer reads through its block table
//! what state-copy would have left it, also across forks.

mod common;

use std::collections::HashMap;

use common::*;

const LAYERS: usize = 12;
const RAMPS: [usize; 3] = [3, 6, 9];
const BLOCKS: usize = 40;

#[derive(Clone)]
struct Sequence {
    table: Vec<u32>,
    /// What each layer must read: `[layer][pos]`.
    dense: Vec<Vec<u64>>,
}

impl Sequence {
    fn len(&self) -> usize {
        self.dense[0].len()
    }
}

struct Host {
    pages: Pages,
    tokens: usize,
    /// The K/V of each page, one number a cell.
    store: Vec<Vec<u64>>,
    next: u64,
    /// Cells copied, and those that state-copy would have copied.
    copied: usize,
    state_copy: usize,
}

impl Host {
    fn new(tokens: usize, n_pages: usize) -> Self {
        Host {
            pages: Pages::new(LAYERS as u32, tokens as u32, n_pages as u32).unwrap(),
            tokens,
            store: vec![vec![0; tokens]; n_pages],
            next: 1,
            copied: 0,
            state_copy: 0,
        }
    }

    fn sequence(&self) -> Sequence {
        Sequence {
            table: vec![DREX_NO_PAGE; LAYERS * BLOCKS],
            dense: vec![Vec::new(); LAYERS],
        }
    }

    fn run(&mut self, copies: &[drex_page_copy]) {
        for c in copies {
            for i in c.first_cell..c.first_cell + c.n_cells {
                self.store[c.to as usize][i as usize] = self.store[c.from as usize][i as usize];
            }
            self.copied += c.n_cells as usize;
        }
    }

    fn window(
        &mut self,
        s: &mut Sequence,
        pos: usize,
        begin: usize,
        end: usize,
    ) -> Result<(), Failed> {
        let copies = self.pages.write(&mut s.table, BLOCKS, pos, begin, end)?;
        self.run(&copies);
        for l in begin..end {
            let page = s.table[l * BLOCKS + pos / self.tokens] as usize;
            self.store[page][pos % self.tokens] = self.next;
            s.dense[l].push(self.next);
            self.next += 1;
        }
        Ok(())
    }

    /// One token through windows up to the layer where it leaves.
    fn token(&mut self, s: &mut Sequence, leave: usize) -> Result<(), Failed> {
        let pos = s.len();
        let mut begin = 0;
        for end in RAMPS.into_iter().chain([LAYERS]) {
            self.window(s, pos, begin, end)?;
            begin = end;
            if end == leave {
                break;
            }
        }
        if leave < LAYERS {
            let copies = self.pages.exit(&mut s.table, BLOCKS, pos, leave)?;
            self.run(&copies);
            let value = s.dense[leave - 1][pos];
            for l in leave..LAYERS {
                s.dense[l].push(value);
            }
            self.state_copy += LAYERS - leave;
        }
        Ok(())
    }

    fn check(&self, all: &[Sequence]) {
        let mut uses: HashMap<u32, u64> = HashMap::new();
        for s in all {
            for l in 0..LAYERS {
                for (pos, &expect) in s.dense[l].iter().enumerate() {
                    let page = s.table[l * BLOCKS + pos / self.tokens];
                    let got = self.store[page as usize][pos % self.tokens];
                    assert_eq!(got, expect, "layer {l}, token {pos}, page {page}");
                }
            }
            for &page in s.table.iter().filter(|&&p| p != DREX_NO_PAGE) {
                *uses.entry(page).or_default() += 1;
            }
        }
        let stats = self.pages.stats();
        assert_eq!(stats.pages_used, uses.len() as u64);
        assert_eq!(stats.references, uses.values().sum::<u64>());
        assert_eq!(stats.pages_free + stats.pages_used, self.store.len() as u64);
    }
}

#[test]
fn every_layer_reads_what_state_copy_would_have_left() {
    for tokens in [1, 2, 16] {
        for (seed, chance) in [(1, 9), (2, 5), (3, 2), (4, 0)] {
            let mut rng = fastrand::Rng::with_seed(seed * 77 + tokens as u64);
            let mut host = Host::new(tokens, 6 * LAYERS * BLOCKS);
            let mut all: Vec<Sequence> = (0..4).map(|_| host.sequence()).collect();
            let most = BLOCKS * tokens;
            let mut forked = false;
            for step in 0..2000 {
                let i = rng.usize(..all.len());
                match rng.usize(..100) {
                    0 if all.len() < 6 && chance != 9 => {
                        let twin = all[i].clone();
                        let blocks = twin.len().div_ceil(tokens);
                        host.pages.fork(&twin.table, BLOCKS, 0, blocks).unwrap();
                        all.push(twin);
                        forked = true;
                    }
                    1 if all.len() > 1 => {
                        let mut s = all.swap_remove(i);
                        host.pages.release(&mut s.table, BLOCKS, 0, BLOCKS).unwrap();
                        assert!(s.table.iter().all(|&p| p == DREX_NO_PAGE));
                        let fresh = host.sequence();
                        if all.len() < 4 {
                            all.push(fresh);
                        }
                    }
                    _ if all[i].len() < most => {
                        let leave = match rng.usize(..10) {
                            n if n < chance as usize => RAMPS[rng.usize(..3).min(rng.usize(..3))],
                            _ => LAYERS,
                        };
                        host.token(&mut all[i], leave).unwrap();
                    }
                    _ => {}
                }
                if step % 50 == 0 {
                    host.check(&all);
                }
            }
            host.check(&all);
            let stats = host.pages.stats();
            assert_eq!(stats.cells_copied, host.copied as u64);
            if !forked {
                assert!(host.copied <= host.state_copy, "{tokens} {chance}");
                let saved = host.state_copy - host.copied;
                assert!(stats.cells_aliased >= saved as u64);
            }
            if tokens == 1 {
                assert_eq!(host.copied, 0, "pages of one token never copy");
            }
            let pages = stats.references - stats.pages_used;
            println!(
                "pages of {tokens}, {chance} of 10 leave: {pages} of {} pages saved, {} of {} cells copied",
                stats.references, host.copied, host.state_copy
            );
            if !forked {
                assert_eq!(pages == 0, chance == 0, "{tokens} {chance}");
            }
            for mut s in all {
                host.pages.release(&mut s.table, BLOCKS, 0, BLOCKS).unwrap();
            }
            let stats = host.pages.stats();
            assert_eq!((stats.pages_used, stats.references), (0, 0), "a leak");
        }
    }
}

/// One ramp, all leave there: a block has as many pages as layers that ran.
#[test]
fn memory_saved_is_what_the_depths_say() {
    let mut host = Host::new(16, LAYERS * BLOCKS);
    let mut s = host.sequence();
    for _ in 0..160 {
        host.token(&mut s, 3).unwrap();
    }
    let stats = host.pages.stats();
    assert_eq!((stats.pages_used, stats.references), (30, 120));
    assert_eq!((stats.cells_copied, stats.cells_aliased), (0, 160 * 9));
    // One deep token in the next block: nine layers get pages of their own.
    for i in 0..16 {
        host.token(&mut s, if i == 8 { LAYERS } else { 3 }).unwrap();
    }
    let stats = host.pages.stats();
    assert_eq!((stats.pages_used, stats.references), (42, 132));
    // 8 cells before it and the 7 after it, in 9 layers.
    assert_eq!(stats.cells_copied, 15 * 9);
    host.check(&[s]);
}

/// What docs/filling.md reports: one sequence, one ramp half way, tokens that
/// leave with a fixed chance.
#[test]
fn memory_saved_at_random() {
    for tokens in [1, 16] {
        for percent in [50, 80, 95] {
            let mut rng = fastrand::Rng::with_seed(9);
            let mut host = Host::new(tokens, LAYERS * BLOCKS);
            let mut s = host.sequence();
            let n = BLOCKS * tokens;
            for _ in 0..n {
                let out = rng.usize(..100) < percent;
                host.token(&mut s, if out { 6 } else { LAYERS }).unwrap();
            }
            let stats = host.pages.stats();
            println!(
                "pages of {tokens}, {percent} % leave: {:.1} % of the pages saved, {:.0} % of the cells not copied",
                100.0 * stats.pages_saved as f64 / stats.references as f64,
                100.0 * (1.0 - host.copied as f64 / host.state_copy as f64)
            );
            // A block is deep if one of its tokens is.
            let shallow = (percent as f64 / 100.0).powi(tokens as i32);
            let got = stats.pages_saved as f64 / stats.references as f64;
            assert!(
                (got - shallow / 2.0).abs() < 0.12,
                "{tokens} {percent}: {got}"
            );
            host.check(&[s]);
        }
    }
}

/// Tokens that go deep later (postfill): their layers are written oldest first,
/// while newer tokens have been written in shallow layers.
#[test]
fn pending_rows_are_written_later() {
    let mut rng = fastrand::Rng::with_seed(5);
    let mut host = Host::new(4, LAYERS * BLOCKS);
    let mut s = host.sequence();
    let mut waiting = Vec::new();
    for pos in 0..150 {
        // Some leave for good, by state-copy; only after what waits went deep.
        if waiting.is_empty() && rng.usize(..3) == 0 {
            host.token(&mut s, 6).unwrap();
            continue;
        }
        host.window(&mut s, pos, 0, 6).unwrap();
        waiting.push(pos);
        if rng.usize(..3) == 0 || pos == 149 {
            for pos in waiting.drain(..) {
                host.window(&mut s, pos, 6, LAYERS).unwrap();
            }
            host.check(std::slice::from_ref(&s));
        }
    }
    host.check(&[s]);
    assert!(host.copied > 0);
}

#[test]
fn a_failure_changes_nothing() {
    let mut host = Host::new(4, LAYERS + 2);
    let mut s = host.sequence();
    host.token(&mut s, LAYERS).unwrap();
    let mut other = host.sequence();
    let before = other.table.clone();
    let failed = host.token(&mut other, LAYERS).unwrap_err();
    assert_eq!(failed.0, DREX_ERROR_CAPACITY);
    assert!(
        text().contains("n_pages is 14, but 15 needed"),
        "{}",
        text()
    );
    assert_eq!(other.table, before);
    host.check(&[s.clone()]);

    let wrong = |table: &mut [u32], pos, begin, end, words: &str| {
        let before = table.to_vec();
        let got = host.pages.write(table, BLOCKS, pos, begin, end);
        assert_eq!(got.unwrap_err().0, DREX_ERROR_INVALID_ARGUMENT);
        assert!(text().contains(words), "no '{words}' in: {}", text());
        assert_eq!(table, before);
    };
    wrong(&mut s.table, 1, 3, 3, "layer_begin is 3");
    wrong(&mut s.table, 1, 0, LAYERS + 1, "layer_end is 13");
    wrong(&mut s.table, BLOCKS * 4, 0, 3, "pos is 160");
    let mut bad = s.table.clone();
    bad[2 * BLOCKS] = 13;
    wrong(&mut bad, 1, 0, 3, "table[80] is 13");
    bad[2 * BLOCKS] = 99;
    wrong(&mut bad, 1, 0, 3, "table[80] is 99");
    bad[2 * BLOCKS] = bad[5 * BLOCKS];
    wrong(&mut bad, 1, 3, 6, "table[200] is");

    let exit = |table: &mut [u32], layer, words: &str| {
        let got = host.pages.exit(table, BLOCKS, 1, layer);
        assert_eq!(got.unwrap_err().0, DREX_ERROR_INVALID_ARGUMENT);
        assert!(text().contains(words), "no '{words}' in: {}", text());
    };
    exit(&mut s.table, 0, "exit_layer is 0");
    exit(&mut s.table, LAYERS, "exit_layer is 12");
    exit(&mut other.table, 3, "table[80] is 4294967295");

    for (layers, tokens, pages, words) in [
        (0, 1, 1, "n_layers is 0"),
        (1, 0, 1, "page_tokens is 0"),
        (1, 1, 0, "n_pages is 0"),
        (1, 1, u32::MAX, "n_pages is 4294967295"),
    ] {
        let got = Pages::new(layers, tokens, pages);
        assert_eq!(got.err().unwrap().0, DREX_ERROR_INVALID_ARGUMENT);
        assert!(text().contains(words), "no '{words}' in: {}", text());
    }
    // A table is an array of numbers.
    let mut bytes = [0u64; LAYERS * BLOCKS / 2 + 1];
    let odd = bytes
        .as_mut_ptr()
        .cast::<u8>()
        .wrapping_add(2)
        .cast::<u32>();
    let raw = host.pages.raw();
    // SAFETY: as many bytes.
    let status = unsafe { drex_pages_fork(raw, odd, BLOCKS as u32, 0, 1) };
    assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT);
    assert!(text().contains("expected an address"), "{}", text());
    // SAFETY: as above.
    let status = unsafe { drex_pages_release(raw, odd, BLOCKS as u32, 0, 1) };
    assert_eq!(status, DREX_ERROR_INVALID_ARGUMENT);

    // A block given back twice is found out.
    host.pages
        .release(&mut s.table.clone(), BLOCKS, 0, 1)
        .unwrap();
    let again = host.pages.release(&mut s.table, BLOCKS, 0, 1);
    assert_eq!(again.unwrap_err().0, DREX_ERROR_INVALID_ARGUMENT);
    assert_eq!(host.pages.stats().pages_used, 0);
}
