// SPDX-License-Identifier: Apache-2.0
//! A model for tests, which can be made to fail. Its next token is a function of all tokens before; a ramp's guess is
//! sometimes another one, and sometimes not sure. It panics when a row attends to K or V that nobody filled, or when an
//! arena row is not what the window wants.

use std::collections::HashMap;
use std::ffi::c_void;

use drex::ffi::{drex_calibration, drex_kv_layer, drex_logits};

use super::decoder::{Decoder, Device, Row, SamplerParams, Windows};
use super::zeroed;
use crate::families::Graphs;
use crate::triton::error::Failure;

pub const LAYERS: u32 = 6;
pub const RAMPS: [u32; 2] = [2, 4];
pub const VOCAB: u32 = 61;
pub const END: i32 = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// A window of all layers, without prompt rows.
    Full,
    /// A window from layer 0 to a ramp, without prompt rows.
    Shallow,
    /// A window from a ramp, without prompt rows.
    Deep,
    /// A window from layer 0, with prompt rows.
    Prompt,
    /// A window from a ramp, with prompt rows.
    Carry,
    Project,
}

pub struct Fault {
    pub call: Call,
    pub code: i32,
    /// Only calls with more rows fail.
    pub above: usize,
    /// So many of such calls go well before.
    pub after: u32,
    pub times: u32,
}

/// Exits that were fitted to the model.
pub struct Exits {
    /// Those of their head, increasing.
    pub tokens: Vec<i32>,
    pub calibration: [drex_calibration; 3],
}

pub struct Fake {
    context: u32,
    /// None: ramps have logits of all tokens.
    pub exits: Option<Exits>,
    /// K and V of its layers are not alike.
    pub unlike: bool,
    cells: Vec<Option<(i32, i32)>>,
    /// [layer][cell]: position + 1, or 0 where nothing is filled
    k: Vec<Vec<u32>>,
    v: Vec<Vec<u32>>,
    tokens: HashMap<(i32, i32), i32>,
    /// Sequence, position, the layer that comes next.
    arena: Vec<Option<(i32, i32, u32)>>,
    /// Arena rows from here on are of prompt rows.
    n_slots: usize,
    spare: Vec<(i32, i32, usize)>,
    last_cells: Vec<u32>,
    /// In the order of the outputs, and of each row its place there.
    last_logits: Vec<f32>,
    /// The columns of those.
    last_tokens: Vec<i32>,
    /// A row of all tokens.
    whole: Vec<f32>,
    places: Vec<Option<usize>>,
    pub fault: Option<Fault>,
    /// The sequences of the call that failed last.
    pub failed: Vec<i32>,
    pub calls: Vec<Call>,
    /// Of each call: decode rows and prompt rows.
    pub sizes: Vec<(usize, usize)>,
}

fn hash(tokens: &[i32], salt: u64) -> u64 {
    tokens.iter().fold(salt ^ 0x9e37_79b9_7f4a_7c15, |h, &t| {
        (h ^ t as u64)
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(23)
            .wrapping_add(h >> 7)
    }) >> 8
}

/// What the full model says after these tokens; never the end.
pub fn deep(tokens: &[i32]) -> i32 {
    1 + (hash(tokens, 1) % u64::from(VOCAB - 1)) as i32
}

/// What a ramp says, and whether it is sure.
pub fn guess(tokens: &[i32], layer: u32) -> (i32, bool) {
    let right = deep(tokens);
    let wrong = hash(tokens, u64::from(layer) + 2).is_multiple_of(5);
    let token = if wrong {
        1 + right % (VOCAB as i32 - 1)
    } else {
        right
    };
    (
        token,
        !hash(tokens, u64::from(layer) + 77).is_multiple_of(3),
    )
}

/// A sampler that now and then takes the token after the best one, by how many it has seen.
pub struct Sampler {
    seed: u32,
    seen: usize,
}

pub fn sampled(best: i32, seed: u32, seen: usize) -> i32 {
    if hash(&[seed as i32, seen as i32], 5).is_multiple_of(3) {
        1 + best % (VOCAB as i32 - 1)
    } else {
        best
    }
}

impl Fake {
    pub fn new(slots: u32, context: u32) -> Self {
        let n = (slots * context) as usize;
        Self {
            context,
            unlike: false,
            exits: None,
            cells: vec![None; n],
            k: vec![vec![0; n]; LAYERS as usize],
            v: vec![vec![0; n]; LAYERS as usize],
            tokens: HashMap::new(),
            arena: Vec::new(),
            n_slots: 0,
            spare: Vec::new(),
            last_cells: Vec::new(),
            last_logits: Vec::new(),
            last_tokens: Vec::new(),
            whole: Vec::new(),
            places: Vec::new(),
            fault: None,
            failed: Vec::new(),
            calls: Vec::new(),
            sizes: Vec::new(),
        }
    }

    pub fn cells_used(&self) -> usize {
        self.cells.iter().flatten().count()
    }

    fn fails(&mut self, call: Call, rows: &[Row], arena: &[i32]) -> Option<i32> {
        self.calls.push(call);
        let own = arena.iter().filter(|&&at| (at as usize) < self.n_slots);
        let own = own.count();
        self.sizes.push((own, rows.len() - own));
        let fault = self.fault.as_mut()?;
        if fault.call != call || rows.len() <= fault.above || fault.times == 0 {
            return None;
        }
        if fault.after > 0 {
            fault.after -= 1;
            return None;
        }
        fault.times -= 1;
        self.failed = rows.iter().map(|row| row.sequence).collect();
        self.failed.dedup();
        Some(fault.code)
    }

    fn place(&mut self, row: &Row) -> Option<usize> {
        let at = (row.sequence, row.position);
        let old = self.spare.iter().position(|&(s, p, _)| (s, p) == at);
        let cell = match old {
            Some(i) => self.spare.remove(i).2,
            None => {
                assert!(!self.cells.contains(&Some(at)), "{row:?} has a cell");
                self.cells.iter().position(Option::is_none)?
            }
        };
        self.cells[cell] = Some(at);
        for layer in 0..LAYERS as usize {
            self.k[layer][cell] = 0;
            self.v[layer][cell] = 0;
        }
        self.tokens.insert(at, row.token);
        Some(cell)
    }

    fn cell(&self, sequence: i32, position: i32) -> usize {
        let at = Some((sequence, position));
        self.cells.iter().position(|&c| c == at).expect("a cell")
    }

    fn history(&self, row: &Row) -> Vec<i32> {
        (0..=row.position)
            .map(|position| self.tokens[&(row.sequence, position)])
            .collect()
    }

    /// Writes K and V, then attends.
    fn run(&mut self, rows: &[Row], begin: u32, end: u32) {
        for row in rows {
            let cell = self.cell(row.sequence, row.position);
            for layer in begin..end {
                self.k[layer as usize][cell] = row.position as u32 + 1;
                self.v[layer as usize][cell] = row.position as u32 + 1;
            }
        }
        for row in rows {
            for position in 0..row.position {
                let cell = self.cell(row.sequence, position);
                for layer in begin as usize..end as usize {
                    let filled = (self.k[layer][cell], self.v[layer][cell]);
                    let wanted = position as u32 + 1;
                    assert_eq!(
                        filled,
                        (wanted, wanted),
                        "{row:?} sees a hole at {position}, layer {layer}"
                    );
                }
            }
        }
    }

    fn scores(&self, row: &Row, end: u32) -> Vec<f32> {
        let history = self.history(row);
        let (token, sure) = if end == LAYERS {
            (deep(&history), true)
        } else {
            guess(&history, end)
        };
        let mut logits = vec![0.0; VOCAB as usize];
        logits[END as usize] = -5.0;
        logits[token as usize] = if sure { 20.0 } else { 0.5 };
        logits
    }
}

impl Decoder for Fake {
    type Sampler = Sampler;

    fn n_layer(&self) -> u32 {
        LAYERS
    }
    fn n_vocab(&self) -> u32 {
        VOCAB
    }
    fn n_context(&self) -> u32 {
        self.context
    }
    fn bos(&self) -> i32 {
        1
    }
    fn exit_layers(&self) -> Vec<u32> {
        RAMPS.to_vec()
    }
    fn exit_head(&self) -> String {
        "shared".into()
    }
    fn windows(&mut self, windows: Windows) -> Result<(), Failure> {
        self.n_slots = windows.n_slots as usize;
        self.arena = vec![None; self.n_slots + windows.n_prompts as usize];
        Ok(())
    }
    fn device(&mut self) -> Result<Device, Failure> {
        Ok(Device {
            cuda: false,
            stream: std::ptr::null_mut(),
        })
    }

    fn slides(&self) -> bool {
        false
    }

    fn no_copy(&self) -> Option<String> {
        self.unlike.then(|| "its layers are not alike".into())
    }

    fn layer(&self, layer: u32) -> Option<drex_kv_layer> {
        let address = |rows: &Vec<u32>| rows.as_ptr().cast_mut().cast::<c_void>();
        let mut kv: drex_kv_layer = zeroed();
        kv.size = size_of::<drex_kv_layer>() as u32;
        kv.k = address(&self.k[layer as usize]);
        kv.v = address(&self.v[layer as usize]);
        (kv.k_row_bytes, kv.k_cell_stride) = (4, 4);
        (kv.v_row_bytes, kv.v_cell_stride) = (4, 4);
        kv.n_cells = self.cells.len() as u32;
        Some(kv)
    }

    fn window(
        &mut self,
        rows: &[Row],
        arena: &[i32],
        outputs: &[bool],
        begin: u32,
        end: u32,
    ) -> i32 {
        let prompts = arena.iter().any(|&at| at as usize >= self.n_slots);
        let call = match (begin, prompts) {
            (0, true) => Call::Prompt,
            (0, false) if end == LAYERS => Call::Full,
            (0, false) => Call::Shallow,
            (_, true) => Call::Carry,
            (_, false) => Call::Deep,
        };
        let mut distinct = arena.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), rows.len(), "two rows share an arena row");
        for (row, &at) in rows.iter().zip(arena) {
            let wanted = Some((row.sequence, row.position, begin));
            assert!(
                begin == 0 || self.arena[at as usize] == wanted,
                "{row:?} is not at {at}"
            );
        }
        if end < LAYERS {
            // Only decode rows meet a ramp, and they stand first.
            let own = arena.iter().map(|&at| (at as usize) < self.n_slots);
            assert!(own.eq(outputs.iter().copied()), "{outputs:?}");
            assert!(outputs.is_sorted_by(|a, b| a >= b), "{outputs:?}");
        }
        if let Some(code) = self.fails(call, rows, arena) {
            for &at in arena {
                self.arena[at as usize] = None;
            }
            return code;
        }
        self.last_cells.clear();
        self.last_logits.clear();
        self.places.clear();
        for row in rows {
            let cell = if begin == 0 {
                self.place(row).expect("a free cell")
            } else {
                self.cell(row.sequence, row.position)
            };
            self.last_cells.push(cell as u32);
        }
        self.run(rows, begin, end);
        self.last_tokens = match &self.exits {
            Some(exits) if end < LAYERS => exits.tokens.clone(),
            _ => (0..VOCAB as i32).collect(),
        };
        let mut n_outputs = 0;
        for ((row, &at), &output) in rows.iter().zip(arena).zip(outputs) {
            self.arena[at as usize] = Some((row.sequence, row.position, end));
            self.places.push(output.then_some(n_outputs));
            if output {
                n_outputs += 1;
                let logits = self.scores(row, end);
                let columns = self.last_tokens.iter();
                self.last_logits
                    .extend(columns.map(|&token| logits[token as usize]));
            }
        }
        0
    }

    fn project(&mut self, rows: &[Row], arena: &[i32], begin: u32) -> i32 {
        for (row, &at) in rows.iter().zip(arena) {
            let wanted = Some((row.sequence, row.position, begin));
            assert_eq!(self.arena[at as usize], wanted, "projected too late");
        }
        if let Some(code) = self.fails(Call::Project, rows, arena) {
            return code;
        }
        for row in rows {
            let cell = self.cell(row.sequence, row.position);
            for layer in begin as usize..LAYERS as usize {
                self.k[layer][cell] = row.position as u32 + 1;
                self.v[layer][cell] = row.position as u32 + 1;
            }
        }
        0
    }

    fn cells(&self) -> *const u32 {
        self.last_cells.as_ptr()
    }
    fn ramp_logits(&self, _: u32, logits: &mut drex_logits) -> bool {
        logits.data = self.last_logits.as_ptr().cast();
        logits.n_vocab = self.last_tokens.len() as u32;
        logits.row_stride_bytes = 4 * u64::from(logits.n_vocab);
        if let Some(exits) = &self.exits {
            logits.token_ids = self.last_tokens.as_ptr();
            logits.calibration = exits.calibration.as_ptr();
        }
        true
    }
    fn ban(&mut self, i: usize, tokens: &[i32]) -> bool {
        let Some(logits) = self.last_logits.chunks_mut(self.last_tokens.len()).nth(i) else {
            return false;
        };
        for (logit, token) in logits.iter_mut().zip(&self.last_tokens) {
            if tokens.contains(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        true
    }
    fn logits(&mut self, i: usize) -> Option<&[f32]> {
        let at = (*self.places.get(i)?)?;
        let logits = self.last_logits.chunks(self.last_tokens.len()).nth(at)?;
        self.whole.clear();
        self.whole.resize(VOCAB as usize, f32::NEG_INFINITY);
        for (&token, &logit) in self.last_tokens.iter().zip(logits) {
            self.whole[token as usize] = logit;
        }
        Some(&self.whole)
    }

    fn forget(&mut self, sequence: Option<i32>) {
        for cell in &mut self.cells {
            if cell.is_some_and(|(s, _)| sequence.is_none_or(|one| s == one)) {
                *cell = None;
            }
        }
        self.tokens
            .retain(|(s, _), _| sequence.is_some_and(|one| *s != one));
        let cells = &self.cells;
        self.spare
            .retain(|&(s, p, cell)| cells[cell] == Some((s, p)));
    }

    fn rollback(&mut self, sequence: i32, position: u32) {
        for (cell, at) in self.cells.iter().enumerate() {
            if let Some((s, p)) = *at
                && s == sequence
                && p >= position as i32
                && !self.spare.contains(&(s, p, cell))
            {
                self.spare.push((s, p, cell));
            }
        }
    }

    fn sampler(&self, params: &SamplerParams, prompt: &[i32]) -> Result<Sampler, Failure> {
        Ok(Sampler {
            seed: params.seed,
            seen: prompt.len(),
        })
    }

    fn sample(&mut self, sampler: &mut Sampler, i: usize, _: &[i32]) -> Result<i32, Failure> {
        let logits = self.logits(i).expect("logits");
        let best = (0..VOCAB as usize).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let token = sampled(best.expect("a token") as i32, sampler.seed, sampler.seen);
        sampler.seen += 1;
        Ok(token)
    }

    fn piece(&self, token: i32, _: bool) -> Vec<u8> {
        format!(" {token}").into_bytes()
    }
    fn is_end(&self, token: i32) -> bool {
        token == END
    }
    fn perf(&self) -> Graphs {
        Graphs::default()
    }
}
