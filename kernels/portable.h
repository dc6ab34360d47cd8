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

static __device__ __forceinline__ uint32_t drex_bits(float x) {
    return __float_as_uint(x);
}

// Plain accesses; on a CPU, they say when they are not aligned.
template <typename T>
static __device__ __forceinline__ T drex_load(const T * p) {
    return *p;
}
template <typename T>
static __device__ __forceinline__ void drex_store(T * p, const T & v) {
    *p = v;
}

#else

#include "host/cuda_on_host.h"

#endif

// exp(x) for x <= 0 with a relative error below 3e-7 + 9e-8 |x|.
static __device__ __forceinline__ float drex_exp(float x) {
    return drex_exp2(x * 1.44269504f);
}

// The greatest and the least of a warp's numbers, in all lanes. Before sm_80
// there is no instruction for it.
static __device__ __forceinline__ uint32_t drex_warp_max(uint32_t x) {
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
    for (int mask = 16; mask > 0; mask /= 2) {
        x = max(x, __shfl_xor_sync(0xffffffffu, x, mask));
    }
    return x;
#endif
}

static __device__ __forceinline__ uint32_t drex_warp_min(uint32_t x) {
    return ~drex_warp_max(~x);
}

// Numbers in the order of the floats, NaN aside; none of them is 0.
static __device__ __forceinline__ uint32_t drex_ordered(float x) {
    const uint32_t b = drex_bits(x);
    return b ^ ((uint32_t) ((int32_t) b >> 31) | 0x80000000u);
}

static __device__ __forceinline__ float drex_unordered(uint32_t n) {
    return drex_from_bits(n & 0x80000000u ? n ^ 0x80000000u : ~n);
}

static __device__ __forceinline__ float drex_warp_max(float x) {
    return drex_unordered(drex_warp_max(drex_ordered(x)));
}
