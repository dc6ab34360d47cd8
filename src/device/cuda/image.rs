// SPDX-License-Identifier: Apache-2.0

//! The compiled kernels, see `kernels/README.md`.

/// The driver reads headers of 8 bytes and more in place.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

static BINARY: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/drex.fatbin")));
static PTX: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
    env!("OUT_DIR"),
    "/drex.ptx.fatbin"
)));

/// In the order in which they are tried: machine code for the architectures
/// that were compiled for, then PTX for all others and for older drivers.
pub static ALL: [&[u8]; 2] = [&BINARY.0, &PTX.0];
