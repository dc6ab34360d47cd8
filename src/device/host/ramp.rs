// SPDX-License-Identifier: Apache-2.0

//! One row of logits to its confidence and top-1 token.
//!
//! Two passes over the row: the greatest two values, then the sum of
//! exponentials. Written over arrays of 16 lanes so that one source becomes
//! AVX-512, AVX2 or plain code. A lane always gets the same elements, so a
//! row's result depends neither on its place in the batch nor on alignment.

use half::f16;

use crate::core::metric::{Metric, Moments, Score};
use crate::device::Dtype;

const LANES: usize = 16;
/// Elements between two sums into f64, and the unit in which the place of
/// the maximum is kept.
const BLOCK: usize = 4096;

type V = [f32; LANES];

/// Instruction sets, the best last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    Portable,
    Avx2,
    Avx512,
}

impl Isa {
    pub fn best() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa::Portable)
    }

    pub fn available() -> &'static [Isa] {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") {
                return &[Isa::Portable, Isa::Avx2, Isa::Avx512];
            }
            if avx2 {
                return &[Isa::Portable, Isa::Avx2];
            }
        }
        &[Isa::Portable]
    }
}

/// # Safety
/// `row` has `n` readable elements of `dtype`, at any alignment; `isa` is one
/// of [`Isa::available`].
pub unsafe fn score(isa: Isa, row: *const u8, n: usize, dtype: Dtype, metric: Metric) -> Score {
    // SAFETY: by this function's contract.
    let (moments, token) = unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(row, n, dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(row, n, dtype),
            _ => portable(row, n, dtype),
        }
    };
    let confidence = moments.confidence(metric, n);
    Score {
        confidence,
        token: if confidence.is_nan() {
            -1
        } else {
            token as i32
        },
    }
}

macro_rules! instruction_set {
    ($name:ident, $fma:literal, $f16c:literal $(, $features:literal)?) => {
        /// # Safety
        /// As [`score`].
        $(#[target_feature(enable = $features)])?
        unsafe fn $name(row: *const u8, n: usize, dtype: Dtype) -> (Moments, usize) {
            // SAFETY: by this function's contract.
            unsafe {
                match dtype {
                    Dtype::F32 => moments::<F32, $fma>(row, n),
                    Dtype::F16 => moments::<F16<$f16c>, $fma>(row, n),
                    Dtype::Bf16 => moments::<Bf16, $fma>(row, n),
                }
            }
        }
    };
}

instruction_set!(portable, false, false);
#[cfg(target_arch = "x86_64")]
instruction_set!(avx2, true, true, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
instruction_set!(avx512, true, true, "avx512f,avx2,fma,f16c");

trait Element {
    const BYTES: usize;
    /// # Safety
    /// `p` has `LANES` readable elements.
    unsafe fn load(p: *const u8) -> V;
    /// # Safety
    /// `p` has one readable element.
    unsafe fn one(p: *const u8) -> f32;
}

struct F32;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: by the trait's contract.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by the trait's contract.
        unsafe { p.cast::<f32>().read_unaligned() }
    }
}

struct Bf16;

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: by the trait's contract.
        let raw = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        raw.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by the trait's contract.
        f32::from_bits(u32::from(unsafe { p.cast::<u16>().read_unaligned() }) << 16)
    }
}

struct F16<const F16C: bool>;

impl<const F16C: bool> Element for F16<F16C> {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        #[cfg(target_arch = "x86_64")]
        if F16C {
            use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps};
            // SAFETY: `F16C` is only set in functions that enable it; the two
            // loads cover `LANES` elements; the types are plain lanes.
            return unsafe {
                let low = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
                let high = _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()));
                std::mem::transmute::<[std::arch::x86_64::__m256; 2], V>([low, high])
            };
        }
        // SAFETY: by the trait's contract.
        let raw = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        raw.map(|b| f16::from_bits(b).to_f32_const())
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by the trait's contract.
        f16::from_bits(unsafe { p.cast::<u16>().read_unaligned() }).to_f32_const()
    }
}

/// `LANES` elements from `i` on; past the end there is -Inf.
#[inline(always)]
unsafe fn load<E: Element>(row: *const u8, i: usize, n: usize) -> V {
    // SAFETY: only elements below `n` are read.
    unsafe {
        if i + LANES <= n {
            E::load(row.add(i * E::BYTES))
        } else {
            let mut v = [f32::NEG_INFINITY; LANES];
            for (k, v) in v.iter_mut().enumerate().take(n - i) {
                *v = E::one(row.add((i + k) * E::BYTES));
            }
            v
        }
    }
}

// Comparisons instead of f32::max: they are one instruction each, and NaN is
// looked for separately.
#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction, mul_add is a call into libm.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// exp(x) for x in [-87, 0], to about one unit in the last place.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding and subtracting this rounds to an integer, and leaves that
    // integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with a short mantissa.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = mul_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_HIGH, x);
    let r = mul_add::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.987_569_1e-4;
    p = mul_add::<FMA>(p, r, 1.398_2e-3);
    p = mul_add::<FMA>(p, r, 8.333_452e-3);
    p = mul_add::<FMA>(p, r, 4.166_579_6e-2);
    p = mul_add::<FMA>(p, r, 1.666_666_5e-1);
    p = mul_add::<FMA>(p, r, 0.5);
    let y = mul_add::<FMA>(p, r * r, r) + 1.0;
    let power = shifted.to_bits().wrapping_add(127) << 23;
    y * f32::from_bits(power)
}

/// # Safety
/// As [`score`].
#[inline(always)]
unsafe fn moments<E: Element, const FMA: bool>(row: *const u8, n: usize) -> (Moments, usize) {
    let mut top = [f32::NEG_INFINITY; LANES];
    let mut second = [f32::NEG_INFINITY; LANES];
    let mut nan = [0u32; LANES];
    let mut best = f32::NEG_INFINITY;
    let mut best_block = 0;

    let mut block = 0;
    while block < n {
        let end = n.min(block + BLOCK);
        let mut i = block;
        while i < end {
            // SAFETY: reads below `n` only.
            let x = unsafe { load::<E>(row, i, n) };
            for k in 0..LANES {
                nan[k] |= u32::from(x[k].is_nan());
                second[k] = max(second[k], min(top[k], x[k]));
                top[k] = max(top[k], x[k]);
            }
            i += LANES;
        }
        let here = top.iter().fold(f32::NEG_INFINITY, |a, &b| max(a, b));
        // Only a greater value moves the place: the lowest index wins a tie.
        if here > best {
            best = here;
            best_block = block;
        }
        block = end;
    }

    let mut result = Moments {
        top: best,
        second: f32::NEG_INFINITY,
        sum: 0.0,
        weighted: 0.0,
        nan: nan.iter().any(|&b| b != 0),
    };
    if result.nan || !best.is_finite() {
        return (result, 0);
    }
    let mut seen = false;
    for k in 0..LANES {
        // The first lane with the greatest value owns it; in the others it is
        // a tie.
        let rest = if top[k] == best && !seen {
            seen = true;
            second[k]
        } else {
            top[k]
        };
        result.second = max(result.second, rest);
    }

    let mut block = 0;
    while block < n {
        let end = n.min(block + BLOCK);
        let mut sum = [0f32; LANES];
        let mut weighted = [0f32; LANES];
        let mut i = block;
        while i < end {
            // SAFETY: reads below `n` only.
            let x = unsafe { load::<E>(row, i, n) };
            for k in 0..LANES {
                // exp(-87) is lost beside the top's 1, also 300,000 times, and
                // keeps a masked -Inf out of the product below.
                let d = max(x[k] - best, -87.0);
                let e = exp::<FMA>(d);
                sum[k] += e;
                weighted[k] = mul_add::<FMA>(d, e, weighted[k]);
            }
            i += LANES;
        }
        result.sum += sum.iter().map(|&v| f64::from(v)).sum::<f64>();
        result.weighted += weighted.iter().map(|&v| f64::from(v)).sum::<f64>();
        block = end;
    }

    let mut token = best_block;
    // SAFETY: the value was read from below `n`.
    while unsafe { E::one(row.add(token * E::BYTES)) } != best {
        token += 1;
    }
    (result, token)
}
