// SPDX-License-Identifier: Apache-2.0

//! The host's K/V cache, for state-copy. The documentation is the header's.

#![allow(clippy::missing_safety_doc, non_camel_case_types)] // the header states each contract, for C

use std::ffi::c_void;

use super::engine::drex_engine;
use super::entry::{self, with};
use super::fault::Fault;
use super::status::drex_status;
use crate::core::error::Error;
use crate::core::memory;
use crate::device::kv::{Layer, Layout, Side};

/// The K/V cache of one layer. The tensors stay the host's, and must stay
/// valid until other ones are bound or the engine is destroyed.
///
/// K of cell c is k_row_bytes bytes at k + c * k_cell_stride, whatever they
/// mean: quantised rows are copied as they are. V lies the same way (*row
/// layout*) or *transposed*: element j of cell c is v_elem_bytes bytes at
/// v + j * v_elem_stride + c * v_elem_bytes. A side with 0 row bytes does not
/// exist, and its pointer may be NULL.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_kv_layer {
    /// sizeof(drex_kv_layer)
    pub size: u32,
    /// Cells in the cache, at least 1.
    pub n_cells: u32,
    /// K of cell 0.
    pub k: *mut c_void,
    /// V of cell 0; in the transposed layout, its element 0.
    pub v: *mut c_void,
    /// Bytes of one cell's K; 0: the layer has none.
    pub k_row_bytes: u64,
    /// Bytes from one cell's K to the next one's; at least k_row_bytes.
    pub k_cell_stride: u64,
    /// Bytes of one cell's V; 0: the layer has none. In the transposed layout,
    /// a multiple of v_elem_bytes.
    pub v_row_bytes: u64,
    /// Row layout: bytes from one cell's V to the next one's, at least
    /// v_row_bytes. Unused in the transposed layout.
    pub v_cell_stride: u64,
    /// 0: row layout. Else transposed: bytes of one element.
    pub v_elem_bytes: u64,
    /// Transposed layout: bytes from element j to element j + 1 of one cell,
    /// at least n_cells * v_elem_bytes. Unused in the row layout.
    pub v_elem_stride: u64,
}

/// Names the K/V cache that drex_fill() works on. Binding again replaces it.
///
/// Without it, filling the holes of exited rows is the host's business.
///
/// layers    [n_layers] copied; the tensors stay the host's. The size of the
///           first element is the distance to the next. NULL with n_layers =
///           0 unbinds.
/// n_layers  drex_config.n_layers
///
/// Layers before the first ramp's last one are not looked at. The others need
/// K rows of one size and V rows of one size and layout, and tensors of their
/// own.
///
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; MEMORY; UNSUPPORTED,
/// with the layers named, where state-copy cannot work; CALL_ORDER while a step
/// is planned; DEVICE. After a failure, what was bound before still is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drex_bind_kv(
    engine: *mut drex_engine,
    layers: *const drex_kv_layer,
    n_layers: u32,
) -> drex_status {
    with("drex_bind_kv", engine, |engine| {
        if layers.is_null() {
            if n_layers != 0 {
                return Err(Fault::Null("layers"));
            }
            return Ok(engine.bind_kv(None)?);
        }
        let expected = engine.scheduler.config().n_layers;
        if n_layers != expected {
            return Err(Error::Conflict {
                field: "n_layers",
                index: None,
                value: n_layers.into(),
                other: "the engine's n_layers",
                other_value: expected.into(),
                why: "every layer has one element",
            }
            .into());
        }
        // SAFETY: there is at least one element, which begins with its size.
        let first = unsafe { entry::read("layers", layers) }.map_err(|e| e.at(0))?;
        let stride = first.size as usize;
        let mut converted = memory::room(n_layers as usize)?;
        for i in 0..n_layers as usize {
            // SAFETY: `n_layers` elements, `stride` bytes apart.
            let layer = unsafe { entry::read("layers", layers.byte_add(i * stride)) };
            let layer = layer.map_err(|e| e.at(i))?;
            converted.push(kv_layer(&layer).map_err(|e| e.at(i))?);
        }
        Ok(engine.bind_kv(Some(converted))?)
    })
}

fn kv_layer(l: &drex_kv_layer) -> Result<Layer, Error> {
    let int = |field, value: u64| {
        usize::try_from(value).map_err(|_| Error::int(field, value, "a number of bytes"))
    };
    let v = if l.v_elem_bytes == 0 {
        Layout::Rows {
            bytes: int("layers.v_row_bytes", l.v_row_bytes)?,
            stride: int("layers.v_cell_stride", l.v_cell_stride)?,
        }
    } else {
        if !l.v_row_bytes.is_multiple_of(l.v_elem_bytes) {
            return Err(Error::Conflict {
                field: "layers.v_row_bytes",
                index: None,
                value: l.v_row_bytes,
                other: "layers.v_elem_bytes",
                other_value: l.v_elem_bytes,
                why: "a row is a whole number of elements",
            });
        }
        Layout::Transposed {
            n: int("layers.v_row_bytes", l.v_row_bytes / l.v_elem_bytes)?,
            elem: int("layers.v_elem_bytes", l.v_elem_bytes)?,
            stride: int("layers.v_elem_stride", l.v_elem_stride)?,
        }
    };
    Ok(Layer {
        n_cells: l.n_cells,
        k: Side {
            data: l.k.cast(),
            layout: Layout::Rows {
                bytes: int("layers.k_row_bytes", l.k_row_bytes)?,
                stride: int("layers.k_cell_stride", l.k_cell_stride)?,
            },
        },
        v: Side {
            data: l.v.cast(),
            layout: v,
        },
    })
}
