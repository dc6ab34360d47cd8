// SPDX-License-Identifier: Apache-2.0

//! The greatest logits of a row, for hosts that sample.

use half::{bf16, f16};

use crate::device::{Dtype, Top};

/// Fills `out` with the greatest logits, the greatest first and the lower
/// index before an equal one. NaN is no logit.
///
/// # Safety
/// `row` has `n` readable elements of `dtype`, at any alignment.
pub unsafe fn list(row: *const u8, n: usize, dtype: Dtype, out: &mut [Top]) {
    if out.is_empty() {
        return;
    }
    out.fill(Top::NONE);
    let mut len = 0;
    for i in 0..n {
        // SAFETY: by this function's contract.
        let x = unsafe {
            match dtype {
                Dtype::F32 => row.cast::<f32>().add(i).read_unaligned(),
                Dtype::F16 => f16::from_bits(row.cast::<u16>().add(i).read_unaligned()).to_f32(),
                Dtype::Bf16 => bf16::from_bits(row.cast::<u16>().add(i).read_unaligned()).to_f32(),
            }
        };
        if x.is_nan() || (len == out.len() && x <= out[len - 1].logit) {
            continue;
        }
        // Behind its equals, which have lower indices.
        let at = out[..len].partition_point(|t| t.logit >= x);
        len = (len + 1).min(out.len());
        out[at..len].rotate_right(1);
        out[at] = Top {
            logit: x,
            token: i as i32,
        };
    }
}
