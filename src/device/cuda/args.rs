// SPDX-License-Identifier: Apache-2.0

//! What the kernels are launched with: the structs of `kernels/args.h`, where
//! their fields are explained.

use cudarc::driver::sys::CUdeviceptr;

pub const RAMP_THREADS: u32 = 128;
pub const RAMP_CHUNK: u32 = 2048;
pub const RAMP_MAX_TOP: u32 = 64;
pub const RAMP_MAX_LISTS: u32 = 1024;
pub const COPY_THREADS: u32 = 256;
pub const INLINE_ROWS: usize = 224;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DeviceMoments {
    pub top: f32,
    pub second: f32,
    pub sum: f32,
    pub weighted: f32,
    pub token: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RampArgs {
    pub logits: CUdeviceptr,
    pub row_stride: u64,
    pub n_rows: u32,
    pub n_vocab: u32,
    pub n_chunks: u32,
    pub vectors: u32,
    pub weighted: u32,
    pub n_top: u32,
    pub partial: CUdeviceptr,
    pub partial_top: CUdeviceptr,
    pub arrived: CUdeviceptr,
    pub out: CUdeviceptr,
    pub out_top: CUdeviceptr,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub there: CUdeviceptr,
    pub n: u32,
    pub here: [u32; INLINE_ROWS],
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DeviceSide {
    pub data: CUdeviceptr,
    pub stride: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub n: u32,
    pub unit: u32,
    pub transposed: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct FillArgs {
    pub sides: CUdeviceptr,
    pub n_layers: u32,
    pub source: u32,
    pub busy: u32,
    pub shape: [Shape; 2],
    pub cells: Rows,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CopyRowsArgs {
    pub arena: CUdeviceptr,
    pub dense: CUdeviceptr,
    pub arena_stride: u64,
    pub dense_stride: u64,
    pub n_units: u32,
    pub unit: u32,
    pub to_arena: u32,
    pub rows: Rows,
}

/// As `drex_layers_a_turn`, by which the kernel decides; for its grid.
pub fn layers_a_turn(units: u32, targets: u32, busy: u32) -> u32 {
    let groups = ((busy - 1) / units + 1).min(targets);
    (targets - 1) / groups + 1
}

/// Sizes and offsets, as `drex_layouts` in `kernels/host/emulate.cpp` prints
/// them.
pub fn layouts() -> String {
    use std::mem::{offset_of, size_of};
    let lines = [
        ("DrexMoments", size_of::<DeviceMoments>()),
        ("DrexTop", size_of::<crate::device::Top>()),
        ("DrexRampArgs", size_of::<RampArgs>()),
        ("DrexRampArgs.n_rows", offset_of!(RampArgs, n_rows)),
        ("DrexRampArgs.n_top", offset_of!(RampArgs, n_top)),
        ("DrexRampArgs.partial", offset_of!(RampArgs, partial)),
        ("DrexRampArgs.out_top", offset_of!(RampArgs, out_top)),
        ("DrexRows", size_of::<Rows>()),
        ("DrexRows.here", offset_of!(Rows, here)),
        ("DrexSide", size_of::<DeviceSide>()),
        ("DrexShape", size_of::<Shape>()),
        ("DrexFillArgs", size_of::<FillArgs>()),
        ("DrexFillArgs.shape", offset_of!(FillArgs, shape)),
        ("DrexFillArgs.cells", offset_of!(FillArgs, cells)),
        ("DrexCopyRowsArgs", size_of::<CopyRowsArgs>()),
        ("DrexCopyRowsArgs.rows", offset_of!(CopyRowsArgs, rows)),
    ];
    lines.iter().map(|(n, v)| format!("{n} {v}\n")).collect()
}
