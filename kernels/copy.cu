// SPDX-License-Identifier: Apache-2.0

// State-copy, and rows of the arena to and from a dense batch: bytes that move.

#include "portable.h"

// A list's count and source layer, read once a block: they lie behind a bus.
static __device__ __forceinline__ void list_head(const DrexRows & rows, uint32_t * n, uint32_t * source) {
    *n = rows.n;
    if (rows.there) {
        __shared__ uint32_t head[2];
        if (threadIdx.x == 0) {
            head[0] = rows.there[0];
            head[1] = rows.there[1];
        }
        __syncthreads();
        *n = head[0];
        *source = head[1];
    }
}

// The number of entry i. A list's is read by `reader` alone, a thread of this
// block for which i is the same, and all threads of the block are here.
static __device__ __forceinline__ uint32_t number(const DrexRows & rows, uint32_t i, uint32_t reader, bool inside) {
    if (!rows.there) {
        return inside ? rows.here[i] : 0;
    }
    __shared__ uint32_t numbers[DREX_COPY_THREADS];
    __syncthreads();  // those of the turn before were taken
    if (inside && reader == threadIdx.x) {
        numbers[reader] = rows.there[2 + i];
    }
    __syncthreads();
    return inside ? numbers[reader] : 0;
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
    const T v = drex_load((const T *) ((const char *) from.data + at));
#pragma unroll 4
    for (uint32_t l = first; l < end; l++) {
        const DrexSide to = side_of(a.sides + l * 2 + which);
        const uint64_t there = transposed ? j * to.stride + (uint64_t) cell * sizeof(T)
                                          : cell * to.stride + (uint64_t) j * sizeof(T);
        drex_store((T *) ((char *) to.data + there), v);
    }
}

// One launch for all cells, K and V, and all skipped layers: a thread reads
// one unit of the source and writes it to some of the layers. To how many is
// decided here, since only here it is known what a list has.
extern "C" __global__ void __launch_bounds__(DREX_COPY_THREADS)
    drex_state_copy(const __grid_constant__ DrexFillArgs a) {
    uint32_t n, source = a.source;
    list_head(a.cells, &n, &source);
    // The host sees to it that 32 bits are enough.
    const uint32_t n_k = n * a.shape[0].n, total = n_k + n * a.shape[1].n;
    if (total == 0 || source + 1 >= a.n_layers) {
        return;
    }
    const uint32_t targets = a.n_layers - 1 - source;
    const uint32_t layers = drex_layers_a_turn(total, targets, a.busy);
    const uint32_t wide = (total - 1) / DREX_COPY_THREADS + 1;
    const uint32_t turns = wide * ((targets - 1) / layers + 1);
    for (uint32_t turn = blockIdx.x; turn < turns; turn += gridDim.x) {
        const uint32_t first = source + 1 + turn / wide * layers;
        const uint32_t end = min(first + layers, a.n_layers);
        const uint32_t begin = turn % wide * DREX_COPY_THREADS, i = begin + threadIdx.x;
        const bool inside = i < total;
        const uint32_t which = i >= n_k;
        const uint32_t before = which ? n_k : 0, u = i - before;
        // Neighbours in a warp are neighbours in memory: units of one cell,
        // or, transposed, one element of cells that often follow each other.
        const uint32_t units = max(a.shape[which].n, 1u);
        const bool transposed = a.shape[which].transposed;
        const uint32_t hole = transposed ? u % n : u / units;
        const uint32_t j = transposed ? u / n : u % units;
        // The thread at this cell's first unit, or the block's first one.
        const uint32_t start = before + hole * units;
        const uint32_t reader = transposed ? threadIdx.x : start > begin ? start - begin : 0;
        const uint32_t cell = number(a.cells, hole, reader, inside);
        if (!inside) {
            continue;
        }
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
    drex_store((T *) to + j, drex_load((const T *) from + j));
}

// dense[i] = arena[rows[i]], or the other way round.
extern "C" __global__ void __launch_bounds__(DREX_COPY_THREADS)
    drex_copy_rows(const __grid_constant__ DrexCopyRowsArgs a) {
    uint32_t n, source;
    list_head(a.rows, &n, &source);
    const uint32_t total = n * a.n_units;
    const uint32_t step = gridDim.x * DREX_COPY_THREADS;
    for (uint32_t begin = blockIdx.x * DREX_COPY_THREADS; begin < total; begin += step) {
        const uint32_t i = begin + threadIdx.x;
        const bool inside = i < total;
        const uint32_t row = i / a.n_units, j = i % a.n_units;
        const uint32_t start = row * a.n_units;
        const uint32_t slot = number(a.rows, row, start > begin ? start - begin : 0, inside);
        if (!inside) {
            continue;
        }
        char * dense = a.dense + row * a.dense_stride;
        char * arena = a.arena + slot * a.arena_stride;
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
