// SPDX-License-Identifier: Apache-2.0

//! The host's K/V tensors, as far as copying a cell needs to know them.

use crate::core::error::{Error, Result, Value};

/// One of the two tensors of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    pub data: *mut u8,
    pub layout: Layout,
}

// SAFETY: an address of the host's, which only `unsafe` calls follow; the host says
// there that the memory may be touched.
unsafe impl Send for Side {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A cell is `bytes` bytes in one piece, `stride` bytes after the one
    /// before it.
    Rows { bytes: usize, stride: usize },
    /// Element j of cell c is the `elem` bytes at `j * stride + c * elem`.
    Transposed {
        n: usize,
        elem: usize,
        stride: usize,
    },
}

impl Side {
    /// Bytes of one cell.
    pub fn bytes(&self) -> usize {
        match self.layout {
            Layout::Rows { bytes, .. } => bytes,
            Layout::Transposed { n, elem, .. } => n * elem,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    pub n_cells: u32,
    pub k: Side,
    pub v: Side,
}

/// All layers of a model, checked.
#[derive(Debug)]
pub struct Kv {
    layers: Vec<Layer>,
    first: usize,
    n_cells: u32,
}

// SAFETY: the pointers are only ever passed on to a device inside a call of
// the engine that owns this, and one thread at a time is inside an engine.
unsafe impl Send for Kv {}

fn clash(field: &'static str, source: (usize, u64), target: (usize, u64)) -> Error {
    Error::KvLayers {
        field,
        source: source.0,
        source_value: Value::Int(source.1),
        target: target.0,
        target_value: Value::Int(target.1),
        why: "state-copy needs equal K/V rows in all layers after the first ramp",
    }
}

impl Kv {
    /// `first` is the first layer that is ever copied from; the layers before
    /// it are not looked at.
    pub fn new(layers: Vec<Layer>, first: usize) -> Result<Self> {
        let mut n_cells = u32::MAX;
        for (i, layer) in layers.iter().enumerate().skip(first) {
            check_side(&layer.k, layer.n_cells, &K).map_err(|e| e.at(i))?;
            check_side(&layer.v, layer.n_cells, &V).map_err(|e| e.at(i))?;
            if layer.n_cells == 0 {
                return Err(Error::int("layers.n_cells", 0u32, "at least 1").at(i));
            }
            n_cells = n_cells.min(layer.n_cells);
            let source = &layers[first];
            let at = |n: usize| (i, n as u64);
            let from = |n: usize| (first, n as u64);
            if layer.k.bytes() != source.k.bytes() {
                return Err(clash(
                    "k_row_bytes",
                    from(source.k.bytes()),
                    at(layer.k.bytes()),
                ));
            }
            if layer.v.bytes() != source.v.bytes() {
                return Err(clash(
                    "v_row_bytes",
                    from(source.v.bytes()),
                    at(layer.v.bytes()),
                ));
            }
            let (a, b) = (elem(&source.v), elem(&layer.v));
            if a != b {
                return Err(clash("v_elem_bytes", from(a), at(b)));
            }
            for (j, other) in layers[..i].iter().enumerate().skip(first) {
                for (field, a, b) in [("k", &other.k, &layer.k), ("v", &other.v, &layer.v)] {
                    if a.bytes() > 0 && a.data == b.data {
                        return Err(Error::KvLayers {
                            field,
                            source: j,
                            source_value: Value::Pointer(a.data as u64),
                            target: i,
                            target_value: Value::Pointer(b.data as u64),
                            why: "layers that share their K/V cannot be filled by state-copy",
                        });
                    }
                }
            }
        }
        Ok(Kv {
            layers,
            first,
            n_cells,
        })
    }

    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The first layer that is ever copied from.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Cells that every layer in use has.
    pub fn n_cells(&self) -> u32 {
        self.n_cells
    }

    /// Bytes written to fill one hole whose first empty layer is `layer`.
    pub fn hole_bytes(&self, layer: u32) -> u64 {
        let l = &self.layers[layer as usize - 1];
        let skipped = self.layers.len() as u64 - u64::from(layer);
        (l.k.bytes() + l.v.bytes()) as u64 * skipped
    }
}

fn elem(side: &Side) -> usize {
    match side.layout {
        Layout::Rows { .. } => 0,
        Layout::Transposed { elem, .. } => elem,
    }
}

struct Names {
    data: &'static str,
    row: &'static str,
    cell_stride: &'static str,
    elem_stride: &'static str,
}

const K: Names = Names {
    data: "layers.k",
    row: "layers.k_row_bytes",
    cell_stride: "layers.k_cell_stride",
    elem_stride: "",
};
const V: Names = Names {
    data: "layers.v",
    row: "layers.v_row_bytes",
    cell_stride: "layers.v_cell_stride",
    elem_stride: "layers.v_elem_stride",
};

fn check_side(side: &Side, n_cells: u32, names: &Names) -> Result<()> {
    if side.bytes() == 0 {
        return Ok(());
    }
    if side.data.is_null() {
        return Err(Error::pointer(
            names.data,
            0,
            "a pointer, since its row has bytes",
        ));
    }
    let cells = n_cells as usize;
    let (span, field, stride) = match side.layout {
        Layout::Rows { bytes, stride } => {
            if stride < bytes {
                return Err(Error::Conflict {
                    field: names.cell_stride,
                    index: None,
                    value: stride as u64,
                    other: names.row,
                    other_value: bytes as u64,
                    why: "cells would overlap",
                });
            }
            (cells.checked_mul(stride), names.cell_stride, stride)
        }
        Layout::Transposed { n, elem, stride } => {
            let row = cells.checked_mul(elem);
            if row.is_none_or(|row| stride < row) {
                return Err(Error::Conflict {
                    field: names.elem_stride,
                    index: None,
                    value: stride as u64,
                    other: "layers.n_cells",
                    other_value: n_cells.into(),
                    why: "elements would overlap",
                });
            }
            (n.checked_mul(stride), names.elem_stride, stride)
        }
    };
    if span.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Error::int(
            field,
            stride as u64,
            "a stride that keeps the tensor within the address space",
        ));
    }
    Ok(())
}
