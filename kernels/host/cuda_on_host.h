// SPDX-License-Identifier: Apache-2.0

// Enough of CUDA for the kernels to run on a CPU, thread by thread: each
// thread of a block is a fibre that runs until it must wait for the others.
// In tests only. A barrier that not all threads reach ends the program, and
// the order of the threads can be turned round, so that a missing barrier
// shows as a wrong result. So does memory that is not aligned for its type.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// Aligned as the device wants them.
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) ulonglong2 {
    uint64_t x, y;
};
struct dim3_on_host {
    uint32_t x, y, z;
};

extern dim3_on_host threadIdx, blockIdx, gridDim;

// host/emulate.cpp
void drex_host_barrier(uint32_t first, uint32_t n);

#define DREX_MINUS_INF (-INFINITY)

static inline void __syncthreads() { drex_host_barrier(0, 256); }
static inline void __syncwarp() { drex_host_barrier(threadIdx.x / 32 * 32, 32); }
static inline void __threadfence() {}

uint32_t drex_host_shuffle(uint32_t bits, int mask);

template <typename T>
static inline T __shfl_xor_sync(uint32_t, T v, int mask) {
    static_assert(sizeof(T) == 4, "");
    uint32_t bits;
    memcpy(&bits, &v, 4);
    bits = drex_host_shuffle(bits, mask);
    memcpy(&v, &bits, 4);
    return v;
}

// Of a whole warp, with one wait.
uint32_t __reduce_max_sync(uint32_t, uint32_t v);
uint32_t __ballot_sync(uint32_t, bool on);

// Notes that a thread is about to access memory that its type does not fit.
void drex_host_misaligned(const void * p, size_t alignment);

// A device would end the program; here the access is done all the same, and
// the launch is one that failed.
template <typename T>
static inline T drex_load(const T * p) {
    if (reinterpret_cast<uintptr_t>(p) % alignof(T)) {
        drex_host_misaligned(p, alignof(T));
    }
    T v;
    memcpy(static_cast<void *>(&v), static_cast<const void *>(p), sizeof v);
    return v;
}
template <typename T>
static inline void drex_store(T * p, const T & v) {
    if (reinterpret_cast<uintptr_t>(p) % alignof(T)) {
        drex_host_misaligned(p, alignof(T));
    }
    memcpy(static_cast<void *>(p), static_cast<const void *>(&v), sizeof v);
}

static inline uint32_t atomicAdd(uint32_t * p, uint32_t v) {
    const uint32_t old = *p;
    *p += v;
    return old;
}

template <typename T>
static inline T __ldcg(const T * p) {
    return drex_load(p);
}
template <typename T>
static inline T __ldcs(const T * p) {
    return drex_load(p);
}
template <typename T>
static inline T __ldg(const T * p) {
    return drex_load(p);
}

static inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }

static inline float drex_exp2(float x) {
    const float y = exp2f(x);
    // As the device's: results below the normal numbers are 0.
    return y < 1.17549435e-38f ? 0.0f : y;
}

static inline float drex_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t drex_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float drex_from_half(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
        return drex_from_bits(sign | 0x7f800000 | fraction << 13);
    }
    if (exponent == 0) {
        const float x = (float) fraction * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -x : x;
    }
    return drex_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}
