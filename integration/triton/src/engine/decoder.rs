// SPDX-License-Identifier: Apache-2.0
//! What the engine needs of a model: llama.cpp, or in unit tests one that can be made to fail.

use std::ffi::c_void;

use drex::ffi::{drex_kv_layer, drex_logits};

use crate::families::Graphs;
use crate::triton::error::Failure;

/// One row of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub token: i32,
    pub position: i32,
    pub sequence: i32,
}

/// How a token is chosen, as `drex_llama_sampling` has it.
#[repr(C)]
pub struct SamplerParams {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub seed: u32,
}

/// Where K, V and the logits of windows lie.
#[derive(Clone, Copy)]
pub struct Device {
    /// Device pointers; else host memory.
    pub cuda: bool,
    /// NULL on the host.
    pub stream: *mut c_void,
}

/// What windows need beside the model.
#[derive(Clone, Copy)]
pub struct Windows {
    /// Arena rows that drex has.
    pub n_slots: u32,
    /// Arena rows behind them, of prompt rows.
    pub n_prompts: u32,
    /// Graphs kept for later.
    pub n_graphs: u32,
    /// Windows of more rows are rarely alike: their graphs are not kept.
    pub n_rows_graph: u32,
}

/// A model with its K/V cache. What runs returns 0, 1 where fewer rows may do, or another number.
pub trait Decoder {
    type Sampler;

    fn n_layer(&self) -> u32;
    fn n_vocab(&self) -> u32;
    /// Most tokens of a sequence.
    fn n_context(&self) -> u32;
    /// A token that a text can begin with.
    fn bos(&self) -> i32;
    /// Layers that the model was trained to exit at, or after `windows` those of the exits beside it; empty: none.
    fn exit_layers(&self) -> Vec<u32>;
    fn exit_head(&self) -> String;

    /// The hidden arena, and the exits beside the model, before anything runs.
    fn windows(&mut self, windows: Windows) -> Result<(), Failure>;
    /// After `windows`.
    fn device(&mut self) -> Result<Device, Failure>;
    /// K/V of layers with a sliding window is gone when it has passed: no answer can be read once more.
    fn slides(&self) -> bool;
    /// After `windows`: why fill copy cannot be used; `None`: it can.
    fn no_copy(&self) -> Option<String>;
    /// K and V of a layer.
    fn layer(&self, layer: u32) -> Option<drex_kv_layer>;

    /// Layers [begin, end); `arena[i]` is the arena row of row i. The logits of the rows with `outputs` are wanted.
    fn window(
        &mut self,
        rows: &[Row],
        arena: &[i32],
        outputs: &[bool],
        begin: u32,
        end: u32,
    ) -> i32;
    /// K and V of layers from `begin` on, from the hidden rows as they are.
    fn project(&mut self, rows: &[Row], arena: &[i32], begin: u32) -> i32;
    /// The KV cells of the last window's rows.
    fn cells(&self) -> *const u32;
    /// Says where the device has the logits of the last window's outputs, one after another, and which tokens they are of.
    /// The window ended at this ramp. False: there are no such logits.
    fn ramp_logits(&self, ramp: u32, logits: &mut drex_logits) -> bool;
    /// Output i of the last window gives these tokens no logit from here on. False: there are no such logits.
    fn ban(&mut self, i: usize, tokens: &[i32]) -> bool;
    /// The logits of all tokens of the last window's row i, in host memory. `None`: it is no output.
    fn logits(&mut self, i: usize) -> Option<&[f32]>;

    /// Frees the cells of a sequence, or of all.
    fn forget(&mut self, sequence: Option<i32>);
    /// The tokens of a sequence from `position` on are void.
    fn rollback(&mut self, sequence: i32, position: u32);

    /// One that has seen the prompt.
    fn sampler(&self, params: &SamplerParams, prompt: &[i32]) -> Result<Self::Sampler, Failure>;
    /// A token from row i's logits, none of the banned ones.
    fn sample(
        &mut self,
        sampler: &mut Self::Sampler,
        i: usize,
        banned: &[i32],
    ) -> Result<i32, Failure>;

    /// The bytes of a token; `special`: also those of special ones, which have none else.
    fn piece(&self, token: i32, special: bool) -> Vec<u8>;
    /// Whether a text ends here.
    fn is_end(&self, token: i32) -> bool;
    fn perf(&self) -> Graphs;
}
