// SPDX-License-Identifier: Apache-2.0

// Rows of logits to their moments: one launch, one read of the logits.
//
// A block takes one chunk of a row into registers, finds its greatest two
// values and then, from the registers, the sums relative to the greatest. The
// block that finishes a row's last chunk combines them all, in their order:
// which one that is does not matter. An element belongs to the same thread
// wherever the row lies, so a row's result depends on nothing but the row.

#include "portable.h"

#define WARPS (DREX_RAMP_THREADS / 32)
#define EACH (DREX_RAMP_CHUNK / DREX_RAMP_THREADS)
#define ALL 0xffffffffu

struct F32 {
    static const int bytes = 4, width = 4;
    static __device__ __forceinline__ void unpack(const uint4 & v, float * x) {
        x[0] = drex_from_bits(v.x);
        x[1] = drex_from_bits(v.y);
        x[2] = drex_from_bits(v.z);
        x[3] = drex_from_bits(v.w);
    }
    static __device__ __forceinline__ float one(const char * p) {
        return drex_from_bits(*(const uint32_t *) p);
    }
};

struct F16 {
    static const int bytes = 2, width = 8;
    static __device__ __forceinline__ void pair(uint32_t v, float * x) {
        x[0] = drex_from_half(v & 0xffff);
        x[1] = drex_from_half(v >> 16);
    }
    static __device__ __forceinline__ void unpack(const uint4 & v, float * x) {
        pair(v.x, x);
        pair(v.y, x + 2);
        pair(v.z, x + 4);
        pair(v.w, x + 6);
    }
    static __device__ __forceinline__ float one(const char * p) {
        return drex_from_half(*(const uint16_t *) p);
    }
};

struct Bf16 {
    static const int bytes = 2, width = 8;
    static __device__ __forceinline__ void pair(uint32_t v, float * x) {
        x[0] = drex_from_bits(v << 16);
        x[1] = drex_from_bits(v & 0xffff0000u);
    }
    static __device__ __forceinline__ void unpack(const uint4 & v, float * x) {
        pair(v.x, x);
        pair(v.y, x + 2);
        pair(v.z, x + 4);
        pair(v.w, x + 6);
    }
    static __device__ __forceinline__ float one(const char * p) {
        return drex_from_bits((uint32_t) *(const uint16_t *) p << 16);
    }
};

// The index, within its chunk, of a thread's element i: ascending in i.
template <typename T>
static __device__ __forceinline__ uint32_t place(int i) {
    const int vector = i / T::width;
    return (vector * DREX_RAMP_THREADS + threadIdx.x) * T::width + i % T::width;
}

template <typename T>
static __device__ __forceinline__ void load(const DrexRampArgs & a, const char * chunk, uint32_t n, float * x) {
    if (a.vectors) {
        uint4 v[EACH / T::width];
#pragma unroll
        for (int i = 0; i < EACH / T::width; i++) {
            if (place<T>(i * T::width) + T::width <= n) {
                v[i] = __ldcs((const uint4 *) chunk + i * DREX_RAMP_THREADS + threadIdx.x);
            }
        }
#pragma unroll
        for (int i = 0; i < EACH / T::width; i++) {
            const uint32_t at = place<T>(i * T::width);
            if (at + T::width <= n) {
                T::unpack(v[i], x + i * T::width);
                continue;
            }
            // The row's last few, and what is beyond.
#pragma unroll
            for (int j = 0; j < T::width; j++) {
                const bool inside = at + j < n;
                x[i * T::width + j] = inside ? T::one(chunk + (uint64_t) (at + j) * T::bytes) : DREX_MINUS_INF;
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t at = place<T>(i);
        x[i] = at < n ? T::one(chunk + (uint64_t) at * T::bytes) : DREX_MINUS_INF;
    }
}

// Of the greatest two of two sets, the greatest two of both.
static __device__ __forceinline__ void join_top(float & top, float & second, float other_top, float other_second) {
    second = fmaxf(fmaxf(second, other_second), fminf(top, other_top));
    top = fmaxf(top, other_top);
}

static __device__ __forceinline__ void join(DrexMoments & a, const DrexMoments & b) {
    const float top = fmaxf(a.top, b.top);
    // Where both are -Inf or +Inf, the difference would be NaN.
    const float da = a.top == top ? 0.0f : a.top - top;
    const float db = b.top == top ? 0.0f : b.top - top;
    const float ea = drex_exp(da), eb = drex_exp(db);
    // What has no weight may be at no finite distance.
    const float wa = ea > 0.0f ? ea * (a.weighted + da * a.sum) : 0.0f;
    const float wb = eb > 0.0f ? eb * (b.weighted + db * b.sum) : 0.0f;
    a.token = b.top > a.top || (b.top == a.top && b.token < a.token) ? b.token : a.token;
    a.second = fmaxf(fmaxf(a.second, b.second), fminf(a.top, b.top));
    a.top = top;
    // Through a product with 0, a NaN stays one.
    a.sum = ea * a.sum + eb * b.sum;
    a.weighted = wa + wb;
}

static __device__ __forceinline__ DrexMoments from_lane(const DrexMoments & m, int mask) {
    DrexMoments o;
    o.top = __shfl_xor_sync(ALL, m.top, mask);
    o.second = __shfl_xor_sync(ALL, m.second, mask);
    o.sum = __shfl_xor_sync(ALL, m.sum, mask);
    o.weighted = __shfl_xor_sync(ALL, m.weighted, mask);
    o.token = __shfl_xor_sync(ALL, m.token, mask);
    return o;
}

// What another thread of this launch wrote must not come from the cache of
// this multiprocessor.
static __device__ __forceinline__ DrexMoments fresh(const DrexMoments * p) {
    DrexMoments m;
    m.top = __ldcg(&p->top);
    m.second = __ldcg(&p->second);
    m.sum = __ldcg(&p->sum);
    m.weighted = __ldcg(&p->weighted);
    m.token = __ldcg(&p->token);
    return m;
}

// A chunk's moments, in thread 0.
template <typename T>
static __device__ DrexMoments chunk_moments(const DrexRampArgs & a, const float * x, uint32_t base) {
    __shared__ float tops[WARPS], seconds[WARPS], sums[WARPS], weights[WARPS];
    __shared__ uint32_t places[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    float top = DREX_MINUS_INF, second = DREX_MINUS_INF;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        second = fmaxf(second, fminf(top, x[i]));
        top = fmaxf(top, x[i]);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const float t = __shfl_xor_sync(ALL, top, mask), s = __shfl_xor_sync(ALL, second, mask);
        join_top(top, second, t, s);
    }
    if (lane == 0) {
        tops[warp] = top;
        seconds[warp] = second;
    }
    __syncthreads();
    top = tops[0];
    second = seconds[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
        join_top(top, second, tops[w], seconds[w]);
    }

    // All -Inf: relative to 0, their sum is 0.
    const float zero = top == DREX_MINUS_INF ? 0.0f : top;
    float sum = 0.0f, weighted = 0.0f;
    uint32_t at = DREX_RAMP_CHUNK;
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) {
        const float d = x[i] - zero;
        const float e = drex_exp(d);
        sum += e;
        if (a.weighted) {
            // Keeps -Inf out of the product. What is smaller weighs nothing.
            weighted += fmaxf(d, -100.0f) * e;
        }
        if (x[i] == top) {
            at = place<T>(i);
        }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(ALL, sum, mask);
        weighted += __shfl_xor_sync(ALL, weighted, mask);
        at = min(at, __shfl_xor_sync(ALL, at, mask));
    }
    if (lane == 0) {
        sums[warp] = sum;
        weights[warp] = weighted;
        places[warp] = at;
    }
    __syncthreads();
    sum = sums[0];
    weighted = weights[0];
    at = places[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
        sum += sums[w];
        weighted += weights[w];
        at = min(at, places[w]);
    }
    DrexMoments m;
    m.top = top;
    m.second = second;
    m.sum = sum;
    m.weighted = weighted;
    m.token = (int32_t) (base + at);
    return m;
}

// Greater, or equal with the lower index.
static __device__ __forceinline__ bool before(float x, int32_t i, float y, int32_t j) {
    return x > y || (x == y && i < j);
}

// The first of all lanes' candidates, in every lane. Token -1: none.
static __device__ __forceinline__ DrexTop first_of_warp(float x, int32_t i) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const float y = __shfl_xor_sync(ALL, x, mask);
        const int32_t j = __shfl_xor_sync(ALL, i, mask);
        if (j >= 0 && (i < 0 || before(y, j, x, i))) {
            x = y;
            i = j;
        }
    }
    DrexTop t;
    t.logit = x;
    t.token = i;
    return t;
}

// The n greatest of a warp's registers, in order, to out[n].
template <typename T>
static __device__ void warp_top(const float * x, uint32_t base, uint32_t n_vocab, uint32_t n, DrexTop * out) {
    float last = DREX_MINUS_INF;
    int32_t last_i = -1;
    for (uint32_t k = 0; k < n; k++) {
        // This lane's first one after the last that was taken.
        float best = DREX_MINUS_INF;
        int32_t best_i = -1;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t at = base + place<T>(i);
            const bool left = at < n_vocab && x[i] == x[i] &&
                              (k == 0 || before(last, last_i, x[i], (int32_t) at));
            if (left && (best_i < 0 || before(x[i], (int32_t) at, best, best_i))) {
                best = x[i];
                best_i = (int32_t) at;
            }
        }
        const DrexTop t = first_of_warp(best, best_i);
        if (threadIdx.x % 32 == 0) {
            out[k] = t;
        }
        last = t.logit;
        last_i = t.token;
        if (t.token < 0) {
            // All lanes agree; the rest of the list is empty.
            for (k++; k < n; k++) {
                if (threadIdx.x % 32 == 0) {
                    out[k] = t;
                }
            }
        }
    }
}

static __device__ __forceinline__ DrexTop fresh(const DrexTop * p) {
    DrexTop t;
    t.logit = __ldcg(&p->logit);
    t.token = __ldcg(&p->token);
    return t;
}

// Merges sorted lists of n to one, in the first warp. heads[n_lists] is 0.
template <bool GLOBAL>
static __device__ void merge_top(const DrexTop * lists, uint32_t n_lists, uint32_t n, uint8_t * heads, DrexTop * out) {
    const uint32_t lane = threadIdx.x;
    for (uint32_t k = 0; k < n; k++) {
        float best = DREX_MINUS_INF;
        int32_t best_i = -1;
        uint32_t from = 0;
        for (uint32_t l = lane; l < n_lists; l += 32) {
            if (heads[l] < n) {
                const DrexTop * p = lists + (uint64_t) l * n + heads[l];
                const DrexTop t = GLOBAL ? fresh(p) : *p;
                if (t.token >= 0 && (best_i < 0 || before(t.logit, t.token, best, best_i))) {
                    best = t.logit;
                    best_i = t.token;
                    from = l;
                }
            }
        }
        const DrexTop t = first_of_warp(best, best_i);
        // Indices are unique, so one lane recognises its own.
        if (t.token >= 0 && t.token == best_i) {
            heads[from]++;
        }
        if (lane == 0) {
            out[k] = t;
        }
    }
}

template <typename T, bool TOP>
static __device__ __forceinline__ void ramp(const DrexRampArgs & a) {
    __shared__ uint32_t last_chunk;
    const uint32_t row = blockIdx.x / a.n_chunks, chunk = blockIdx.x % a.n_chunks;
    const uint32_t base = chunk * DREX_RAMP_CHUNK;
    const uint32_t n = min(a.n_vocab - base, (uint32_t) DREX_RAMP_CHUNK);

    float x[EACH];
    load<T>(a, (const char *) a.logits + row * a.row_stride + (uint64_t) base * T::bytes, n, x);
    DrexMoments m = chunk_moments<T>(a, x, base);
    const uint64_t me = (uint64_t) row * a.n_chunks + chunk;

    if (TOP) {
        __shared__ DrexTop tops[WARPS * DREX_RAMP_MAX_TOP];
        __shared__ uint8_t heads[DREX_RAMP_MAX_LISTS];
        warp_top<T>(x, base, a.n_vocab, a.n_top, tops + threadIdx.x / 32 * a.n_top);
        for (uint32_t i = threadIdx.x; i < DREX_RAMP_MAX_LISTS; i += DREX_RAMP_THREADS) {
            heads[i] = 0;
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            merge_top<false>(tops, WARPS, a.n_top, heads, a.partial_top + me * a.n_top);
            // The other lanes' writes are lane 0's.
            __syncwarp();
        }
    }
    if (threadIdx.x == 0) {
        a.partial[me] = m;
        __threadfence();
        last_chunk = atomicAdd(&a.arrived[row], 1u) == a.n_chunks - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last_chunk || threadIdx.x >= 32) {
        return;
    }

    DrexMoments total;
    total.top = total.second = DREX_MINUS_INF;
    total.sum = total.weighted = 0.0f;
    total.token = 0x7fffffff;
    for (uint32_t c = threadIdx.x; c < a.n_chunks; c += 32) {
        join(total, fresh(a.partial + (uint64_t) row * a.n_chunks + c));
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        join(total, from_lane(total, mask));
    }
    if (TOP) {
        __shared__ uint8_t heads[DREX_RAMP_MAX_LISTS];
        for (uint32_t i = threadIdx.x; i < DREX_RAMP_MAX_LISTS; i += 32) {
            heads[i] = 0;
        }
        __syncwarp();
        merge_top<true>(a.partial_top + (uint64_t) row * a.n_chunks * a.n_top, a.n_chunks, a.n_top, heads,
                  a.out_top + (uint64_t) row * a.n_top);
    }
    if (threadIdx.x == 0) {
        a.out[row] = total;
        a.arrived[row] = 0;
    }
}

#define RAMP(name, type)                                                                    \
    extern "C" __global__ void __launch_bounds__(DREX_RAMP_THREADS, 4)                      \
        drex_ramp_##name(const __grid_constant__ DrexRampArgs a) {                          \
        ramp<type, false>(a);                                                               \
    }                                                                                       \
    extern "C" __global__ void __launch_bounds__(DREX_RAMP_THREADS)                         \
        drex_ramp_top_##name(const __grid_constant__ DrexRampArgs a) {                      \
        ramp<type, true>(a);                                                                \
    }

RAMP(f32, F32)
RAMP(f16, F16)
RAMP(bf16, Bf16)
