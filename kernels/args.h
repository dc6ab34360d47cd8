// SPDX-License-Identifier: Apache-2.0

// What the kernels are launched with. src/device/cuda/args.rs has the same
// structs; tests/kernels.rs compares their layouts.

#pragma once

#include <stdint.h>

// Threads of a block of drex_ramp_*; elements of a row that such a block looks
// at; most of the greatest logits that it lists.
// tools/gpu compiles others, to compare.
#ifndef DREX_RAMP_CHUNK
#define DREX_RAMP_THREADS 128
#define DREX_RAMP_CHUNK 2048
#endif
#define DREX_RAMP_MAX_TOP 64
// Most chunks of a row when the greatest logits are listed.
#define DREX_RAMP_MAX_LISTS 1024

// Threads of a block of drex_state_copy and drex_copy_rows.
#define DREX_COPY_THREADS 256
// Row numbers that fit into a launch; more are read from the host's memory.
#define DREX_INLINE_ROWS 224

// What a row's logits, or a chunk of them, come down to. No NaN in `sum` means
// that there is none among the logits, and no +Inf.
struct DrexMoments {
    float top;       // the greatest logit
    float second;    // the second greatest; equal to top on a tie
    float sum;       // sum of exp(x - top)
    float weighted;  // sum of (x - top) exp(x - top), if asked for
    int32_t token;   // the lowest index of top
};

struct DrexTop {
    float logit;
    int32_t token;  // -1: there is none
};

struct DrexRampArgs {
    const void * logits;    // row i at logits + i * row_stride
    uint64_t row_stride;    // bytes
    uint32_t n_rows;
    uint32_t n_vocab;
    uint32_t n_chunks;      // ceil(n_vocab / DREX_RAMP_CHUNK)
    uint32_t vectors;       // every row begins at a multiple of 16 bytes
    uint32_t weighted;      // DrexMoments.weighted is wanted
    uint32_t n_top;         // 0..DREX_RAMP_MAX_TOP, below drex_ramp_top_* only
    DrexMoments * partial;  // [n_rows][n_chunks], scratch
    DrexTop * partial_top;  // [n_rows][n_chunks][n_top], scratch
    uint32_t * arrived;     // [n_rows], 0 before and after
    DrexMoments * out;      // [n_rows]
    DrexTop * out_top;      // [n_rows][n_top]
};

// Numbers of cells or arena rows: inside the launch, or, for many of them and
// in a captured graph, in memory of the host that the device can read.
struct DrexRows {
    // NULL: `here`. Else n, the source layer, then n numbers.
    const uint32_t * there;
    uint32_t n;
    uint32_t here[DREX_INLINE_ROWS];
};

// One tensor of one layer.
struct DrexSide {
    void * data;
    uint64_t stride;  // bytes: between cells, or between elements if transposed
};

// What all layers' tensors of one kind have in common.
struct DrexShape {
    uint32_t n;          // units of a cell; 0: there is no such tensor
    uint32_t unit;       // bytes of a unit: 16, 8, 4, 2 or 1
    uint32_t transposed; // unit j of cell c: j * stride + c * unit, else
                         // c * stride + j * unit
};

struct DrexFillArgs {
    const DrexSide * sides;   // [n_layers][2], K and V
    uint32_t n_layers;
    uint32_t source;          // the layer that is copied to all layers after it
    uint32_t busy;            // so many threads keep the memory busy
    DrexShape shape[2];
    DrexRows cells;
};

// To how many of the target layers a thread writes what it has read: beyond
// `busy` threads, as few reads of the source as can be.
#ifdef __CUDACC__
__host__ __device__
#endif
static inline uint32_t drex_layers_a_turn(uint32_t units, uint32_t targets, uint32_t busy) {
    uint32_t groups = (busy - 1) / units + 1;
    groups = groups < targets ? groups : targets;
    return (targets - 1) / groups + 1;
}

struct DrexCopyRowsArgs {
    char * arena;
    char * dense;
    uint64_t arena_stride;  // bytes
    uint64_t dense_stride;
    uint32_t n_units;       // of a row
    uint32_t unit;          // bytes: 16, 8, 4, 2 or 1
    uint32_t to_arena;      // 0: dense[i] = arena[rows[i]]
    DrexRows rows;
};
