// SPDX-License-Identifier: Apache-2.0

// Rows of logits to their moments: one launch, one read of the logits.
//
// A block takes one chunk of a row into registers. Each of its warps finds its
// own greatest two values and then, from the registers, the sums relative to
// the greatest, as soon as its own loads are there: no warp waits for another
// before its part is done. The block's first thread joins the warps' parts, and
// the block that finishes a row's last chunk joins them all, in their order:
// which one that is does not matter. An element belongs to the same thread
// wherever the row lies, so a row's result depends on nothing but the row.
// Blocks are small, so that there are more of them than run at a time: some
// compute while others load.

#include "portable.h"

#define WARPS (DREX_RAMP_THREADS / 32)
#define EACH (DREX_RAMP_CHUNK / DREX_RAMP_THREADS)
#define ALL 0xffffffffu
// Blocks that a multiprocessor should hold, for enough loads to be under way.
// More would leave too few registers for a chunk.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define RESIDENT ((EACH <= 16 ? 1280 : 1024) / DREX_RAMP_THREADS)
#else
#define RESIDENT (1024 / DREX_RAMP_THREADS)
#endif

struct F32 {
    static const int bytes = 4, width = 4;
    static __device__ __forceinline__ void unpack(const uint4 & v, float * x) {
        x[0] = drex_from_bits(v.x);
        x[1] = drex_from_bits(v.y);
        x[2] = drex_from_bits(v.z);
        x[3] = drex_from_bits(v.w);
    }
    static __device__ __forceinline__ float one(const char * p) {
        return drex_from_bits(drex_load((const uint32_t *) p));
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
        return drex_from_half(drex_load((const uint16_t *) p));
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
        return drex_from_bits((uint32_t) drex_load((const uint16_t *) p) << 16);
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

// Of a warp's registers, in all lanes.
template <typename T>
static __device__ __forceinline__ DrexMoments warp_moments(const DrexRampArgs & a, const float * x, uint32_t base) {
    float top = DREX_MINUS_INF, second = DREX_MINUS_INF;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        second = fmaxf(second, fminf(top, x[i]));
        top = fmaxf(top, x[i]);
    }
    const float own = top;
    top = drex_warp_max(own);
    // Where one lane alone has the greatest, the second is its second or the
    // others' greatest. Zeros of both signs are equal.
    const uint32_t lanes = __ballot_sync(ALL, own == top);
    second = drex_warp_max(own != top ? own : __popc(lanes) > 1 ? top : second);

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
    }
    if (a.weighted) {
        for (int mask = 16; mask > 0; mask /= 2) {
            weighted += __shfl_xor_sync(ALL, weighted, mask);
        }
    }
    DrexMoments m;
    m.top = top;
    m.second = second;
    m.sum = sum;
    m.weighted = weighted;
    m.token = (int32_t) (base + drex_warp_min(at));
    return m;
}

// The first of all lanes' candidates, in every lane: the greatest, and of equal
// ones that with the lowest index. Token -1: none.
static __device__ __forceinline__ DrexTop first_of_warp(float x, int32_t i) {
    // Zeros of both signs are equal.
    const uint32_t key = i < 0 ? 0 : drex_ordered(x + 0.0f);
    const uint32_t best = drex_warp_max(key);
    const uint32_t at = drex_warp_min(key == best ? (uint32_t) i : 0xffffffffu);
    DrexTop t;
    t.logit = best ? drex_unordered(best) : DREX_MINUS_INF;
    t.token = best ? (int32_t) at : -1;
    return t;
}

// The n greatest of a warp's registers, in order, to out[n].
template <typename T>
static __device__ void warp_top(const float * x, uint32_t base, uint32_t n_vocab, uint32_t n, DrexTop * out) {
    static_assert(EACH <= 32, "a bit for each");
    uint32_t taken = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const bool logit = base + place<T>(i) < n_vocab && x[i] == x[i];
        taken |= (logit ? 0u : 1u) << i;
    }
    float best = DREX_MINUS_INF;
    int best_i = -1;
    bool look = true;
    for (uint32_t k = 0; k < n; k++) {
        // Only the lane whose candidate was taken has another one now.
        if (look) {
            best = DREX_MINUS_INF;
            best_i = -1;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (!(taken >> i & 1) && (best_i < 0 || x[i] > best)) {
                    best = x[i];
                    best_i = i;
                }
            }
        }
        const int32_t mine = best_i < 0 ? -1 : (int32_t) (base + place<T>(best_i));
        const DrexTop t = first_of_warp(best, mine);
        // Indices are unique, so one lane recognises its own.
        look = mine >= 0 && mine == t.token;
        taken |= look ? 1u << best_i : 0;
        if (threadIdx.x % 32 == 0) {
            out[k] = t;
        }
    }
}

static __device__ __forceinline__ DrexTop fresh(const DrexTop * p) {
    DrexTop t;
    t.logit = __ldcg(&p->logit);
    t.token = __ldcg(&p->token);
    return t;
}

// Sorted lists of n each, of which the first `here` entries are in shared
// memory, too.
struct Lists {
    const DrexTop * near;
    const DrexTop * far;
    uint32_t n_lists, n, here;

    __device__ __forceinline__ DrexTop get(uint32_t list, uint32_t i) const {
        return i < here ? near[list * here + i] : fresh(far + (uint64_t) list * n + i);
    }
};

// Merges them to one, in the first warp. heads[n_lists] is 0.
static __device__ void merge_top(const Lists & lists, uint8_t * heads, DrexTop * out) {
    const uint32_t lane = threadIdx.x;
    float best = DREX_MINUS_INF;
    int32_t best_i = -1;
    uint32_t from = 0;
    bool look = true;
    for (uint32_t k = 0; k < lists.n; k++) {
        if (look) {
            best = DREX_MINUS_INF;
            best_i = -1;
            for (uint32_t l = lane; l < lists.n_lists; l += 32) {
                if (heads[l] < lists.n) {
                    const DrexTop t = lists.get(l, heads[l]);
                    // Of equal ones, the list that comes first has the lower index.
                    if (t.token >= 0 && (best_i < 0 || t.logit > best || (t.logit == best && t.token < best_i))) {
                        best = t.logit;
                        best_i = t.token;
                        from = l;
                    }
                }
            }
        }
        const DrexTop t = first_of_warp(best, best_i);
        look = t.token >= 0 && t.token == best_i;
        if (look) {
            heads[from]++;
        }
        if (lane == 0) {
            out[k] = t;
        }
    }
}

// Entries of lists in shared memory.
#define NEAR 2048

template <typename T, bool TOP>
static __device__ __forceinline__ void ramp(const DrexRampArgs & a) {
    __shared__ DrexMoments parts[WARPS];
    __shared__ uint32_t last_chunk;
    const uint32_t row = blockIdx.x / a.n_chunks, chunk = blockIdx.x % a.n_chunks;
    const uint32_t base = chunk * DREX_RAMP_CHUNK;
    const uint32_t n = min(a.n_vocab - base, (uint32_t) DREX_RAMP_CHUNK);
    const uint64_t me = (uint64_t) row * a.n_chunks + chunk;

    float x[EACH];
    load<T>(a, (const char *) a.logits + row * a.row_stride + (uint64_t) base * T::bytes, n, x);
    const DrexMoments part = warp_moments<T>(a, x, base);
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = part;
    }
    if (TOP) {
        __shared__ DrexTop tops[WARPS * DREX_RAMP_MAX_TOP];
        __shared__ uint8_t heads[WARPS];
        if (threadIdx.x < WARPS) {
            heads[threadIdx.x] = 0;
        }
        warp_top<T>(x, base, a.n_vocab, a.n_top, tops + threadIdx.x / 32 * a.n_top);
        __syncthreads();
        if (threadIdx.x < 32) {
            const Lists lists = {tops, nullptr, WARPS, a.n_top, a.n_top};
            merge_top(lists, heads, a.partial_top + me * a.n_top);
            // The other lanes' writes are lane 0's.
            __syncwarp();
        }
    } else {
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        DrexMoments m = parts[0];
        for (int w = 1; w < WARPS; w++) {
            join(m, parts[w]);
        }
        a.partial[me] = m;
        __threadfence();
        last_chunk = atomicAdd(&a.arrived[row], 1u) == a.n_chunks - 1;
    }
    __syncthreads();
    if (!last_chunk) {
        return;
    }
    __threadfence();

    if (TOP) {
        __shared__ DrexTop near[NEAR];
        __shared__ uint8_t heads[DREX_RAMP_MAX_LISTS];
        Lists lists;
        lists.near = near;
        lists.far = a.partial_top + (uint64_t) row * a.n_chunks * a.n_top;
        lists.n_lists = a.n_chunks;
        lists.n = a.n_top;
        // All at once: one after another, each would take a memory's latency.
        lists.here = min(a.n_top, NEAR / a.n_chunks);
        for (uint32_t i = threadIdx.x; i < a.n_chunks * lists.here; i += DREX_RAMP_THREADS) {
            near[i] = fresh(lists.far + (uint64_t) (i / lists.here) * a.n_top + i % lists.here);
        }
        for (uint32_t i = threadIdx.x; i < a.n_chunks; i += DREX_RAMP_THREADS) {
            heads[i] = 0;
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            merge_top(lists, heads, a.out_top + (uint64_t) row * a.n_top);
        }
    }
    if (threadIdx.x >= 32) {
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
    if (threadIdx.x == 0) {
        a.out[row] = total;
        a.arrived[row] = 0;
    }
}

#define RAMP(name, type)                                                                    \
    extern "C" __global__ void __launch_bounds__(DREX_RAMP_THREADS, RESIDENT)                     \
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
