// SPDX-License-Identifier: Apache-2.0

//! State-copy: the last computed layer's K/V, at the same position, stands in
//! for the layers that were skipped.

use std::ptr;

use crate::device::Hole;
use crate::device::kv::{Kv, Layout, Side};

/// # Safety
/// As [`crate::device::Device::fill`].
pub unsafe fn fill(kv: &Kv, layer: u32, holes: &[Hole]) {
    let layers = kv.layers();
    let source = &layers[layer as usize - 1];
    for target in &layers[layer as usize..] {
        for hole in holes {
            let cell = hole.cell as usize;
            // SAFETY: `cell` lies within every layer in use, whose tensors
            // are valid and, by `Kv::new`, different ones of one layout kind.
            unsafe {
                copy_cell(&source.k, &target.k, cell);
                copy_cell(&source.v, &target.v, cell);
            }
        }
    }
}

/// # Safety
/// Both sides are valid at `cell`, do not overlap, and have rows of the same
/// bytes in the same kind of layout.
unsafe fn copy_cell(from: &Side, to: &Side, cell: usize) {
    match (from.layout, to.layout) {
        (Layout::Rows { bytes, stride: a }, Layout::Rows { stride: b, .. }) => {
            // SAFETY: by this function's contract.
            unsafe {
                ptr::copy_nonoverlapping(from.data.add(cell * a), to.data.add(cell * b), bytes);
            }
        }
        (Layout::Transposed { n, elem, stride: a }, Layout::Transposed { stride: b, .. }) => {
            // SAFETY: by this function's contract.
            unsafe {
                let (from, to) = (from.data.add(cell * elem), to.data.add(cell * elem));
                match elem {
                    1 => scatter::<1>(from, a, to, b, n),
                    2 => scatter::<2>(from, a, to, b, n),
                    4 => scatter::<4>(from, a, to, b, n),
                    _ => {
                        for j in 0..n {
                            ptr::copy_nonoverlapping(from.add(j * a), to.add(j * b), elem);
                        }
                    }
                }
            }
        }
        _ => unreachable!("Kv::new admits one layout kind per side"),
    }
}

/// # Safety
/// `E` bytes at every stride are valid at both ends.
unsafe fn scatter<const E: usize>(from: *const u8, a: usize, to: *mut u8, b: usize, n: usize) {
    for j in 0..n {
        // SAFETY: by this function's contract; byte arrays have no alignment.
        unsafe {
            let v = from.add(j * a).cast::<[u8; E]>().read();
            to.add(j * b).cast::<[u8; E]>().write(v);
        }
    }
}
