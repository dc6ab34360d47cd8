// SPDX-License-Identifier: Apache-2.0

// The kernels are one source for nvcc and, through host/cuda_on_host.h, for
// any C++ compiler. Here is the little that differs.

#pragma once

#include "args.h"

#ifdef __CUDACC__

#include <math_constants.h>

#define DREX_MINUS_INF (-CUDART_INF_F)

static __device__ __forceinline__ float drex_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float drex_from_half(uint32_t bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short) bits));
    return y;
}

static __device__ __forceinline__ float drex_from_bits(uint32_t bits) {
    return __uint_as_float(bits);
}

#else

#include "host/cuda_on_host.h"

#endif

// exp(x) for x <= 0 with a relative error below 3e-7 + 9e-8 |x|.
static __device__ __forceinline__ float drex_exp(float x) {
    return drex_exp2(x * 1.44269504f);
}
