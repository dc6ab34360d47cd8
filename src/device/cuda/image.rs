// SPDX-License-Identifier: Apache-2.0

//! The compiled kernels, see `kernels/README.md`.

/// In the order in which they are tried: machine code for the architectures
/// that were compiled for, then PTX for all others and for older drivers.
pub const ALL: [&[u8]; 2] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/drex.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/drex.ptx.fatbin")),
];
