// SPDX-License-Identifier: Apache-2.0

// State-copy, and rows of the arena to and from a dense batch: bytes that move.

#include "portable.h"

// A list's count and source layer, read once a block: they may lie behind a bus.
static __device__ __forceinline__ void list_head(const DrexRows & rows, uint32_t source, uint32_t * head) {
    if (threadIdx.x == 0) {
        head[0] = rows.there ? rows.there[0] : rows.n;
        head[1] = rows.there ? rows.there[1] : source;
    }
    __syncthreads();
}

static __device__ __forceinline__ uint32_t number(const DrexRows & rows, uint32_t i) {
    return rows.there ? rows.there[2 + i] : rows.here[i];
}

static __device__ __forceinline__ DrexSide side_of(const DrexSide * p) {
    const ulonglong2 v = __ldg((const ulonglong2 *) p);
    DrexSide s;
    s.data = (void *) v.x;
    s.stride = v.y;
    return s;
}

template <typename T>
static __device__ __forceinline__ void fill_unit(const DrexFillArgs & a, uint32_t which, uint32_t source,
                                                 uint32_t cell, uint32_t j, uint32_t first, uint32_t end) {
    const bool transposed = a.shape[which].transposed;
    // sizeof(T), not the shape's unit, so that the compiler sees a shift.
    const DrexSide from = side_of(a.sides + source * 2 + which);
    const uint64_t at = transposed ? j * from.stride + (uint64_t) cell * sizeof(T)
                                   : cell * from.stride + (uint64_t) j * sizeof(T);
    const T v = *(const T *) ((const char *) from.data + at);
#pragma unroll 4
    for (uint32_t l = first; l < end; l++) {
        const DrexSide to = side_of(a.sides + l * 2 + which);
        const uint64_t there = transposed ? j * to.stride + (uint64_t) cell * sizeof(T)
                                          : cell * to.stride + (uint64_t) j * sizeof(T);
        *(T *) ((char *) to.data + there) = v;
    }
}

// One launch for all cells, K and V, and all skipped layers: a thread reads
// one unit of the source and writes it to the layers of its blockIdx.y.
extern "C" __global__ void __launch_bounds__(DREX_COPY_THREADS)
    drex_state_copy(const __grid_constant__ DrexFillArgs a) {
    __shared__ uint32_t head[2];
    list_head(a.cells, a.source, head);
    const uint32_t n = head[0], source = head[1];
    const uint32_t first = source + 1 + blockIdx.y * a.layers_a_block;
    const uint32_t end = min(first + a.layers_a_block, a.n_layers);
    if (first >= end) {
        return;
    }
    // The host sees to it that 32 bits are enough.
    const uint32_t n_k = n * a.shape[0].n, total = n_k + n * a.shape[1].n;
    const uint32_t step = gridDim.x * DREX_COPY_THREADS;
    for (uint32_t i = blockIdx.x * DREX_COPY_THREADS + threadIdx.x; i < total; i += step) {
        const uint32_t which = i >= n_k;
        const uint32_t u = which ? i - n_k : i;
        // Neighbours in a warp are neighbours in memory: units of one cell,
        // or, transposed, one element of cells that often follow each other.
        const uint32_t units = a.shape[which].n;
        const bool transposed = a.shape[which].transposed;
        const uint32_t hole = transposed ? u % n : u / units;
        const uint32_t j = transposed ? u / n : u % units;
        const uint32_t cell = number(a.cells, hole);
        switch (a.shape[which].unit) {
            case 16: fill_unit<uint4>(a, which, source, cell, j, first, end); break;
            case 8: fill_unit<uint2>(a, which, source, cell, j, first, end); break;
            case 4: fill_unit<uint32_t>(a, which, source, cell, j, first, end); break;
            case 2: fill_unit<uint16_t>(a, which, source, cell, j, first, end); break;
            default: fill_unit<uint8_t>(a, which, source, cell, j, first, end); break;
        }
    }
}

template <typename T>
static __device__ __forceinline__ void move_unit(const char * from, char * to, uint32_t j) {
    ((T *) to)[j] = ((const T *) from)[j];
}

// dense[i] = arena[rows[i]], or the other way round.
extern "C" __global__ void __launch_bounds__(DREX_COPY_THREADS)
    drex_copy_rows(const __grid_constant__ DrexCopyRowsArgs a) {
    __shared__ uint32_t head[2];
    list_head(a.rows, 0, head);
    const uint32_t total = head[0] * a.n_units;
    const uint32_t step = gridDim.x * DREX_COPY_THREADS;
    for (uint32_t i = blockIdx.x * DREX_COPY_THREADS + threadIdx.x; i < total; i += step) {
        const uint32_t row = i / a.n_units, j = i % a.n_units;
        char * dense = a.dense + row * a.dense_stride;
        char * arena = a.arena + number(a.rows, row) * a.arena_stride;
        const char * from = a.to_arena ? dense : arena;
        char * to = a.to_arena ? arena : dense;
        switch (a.unit) {
            case 16: move_unit<uint4>(from, to, j); break;
            case 8: move_unit<uint2>(from, to, j); break;
            case 4: move_unit<uint32_t>(from, to, j); break;
            case 2: move_unit<uint16_t>(from, to, j); break;
            default: move_unit<uint8_t>(from, to, j); break;
        }
    }
}
