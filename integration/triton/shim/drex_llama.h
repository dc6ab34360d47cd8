/* SPDX-License-Identifier: Apache-2.0
 *
 * What the backend needs of the patched llama.cpp, as plain C: llama.h passes large structs by value and llama-layer-range.h
 * is C++, so this is compiled against the headers of the very libraries that it is loaded with.
 *
 * One thread at a time for each engine. No exception leaves a call. */

#ifndef DREX_LLAMA_H
#define DREX_LLAMA_H

#include <stddef.h>
#include <stdint.h>

#include "drex.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with anything below. */
#define DREX_LLAMA_VERSION 7

typedef struct drex_llama drex_llama;
typedef struct drex_llama_sampler drex_llama_sampler;

typedef struct drex_llama_params {
  const char *model;   /* path of a GGUF file */
  const char *kv_type; /* ggml's name of the K/V cache's type, such as "f16" */
  uint32_t n_ctx;      /* tokens of a sequence; cut to what the model was trained with, see drex_llama_n_context() */
  uint32_t n_seq;      /* the K/V cache has cells for so many sequences of n_ctx tokens */
  uint32_t n_batch;    /* most rows of one window */
  uint32_t n_outputs;  /* most of them that have logits */
  int32_t n_threads;
  int32_t n_gpu_layers; /* 0: on the CPU; else all of them must fit on the GPU */
  int32_t main_gpu;
} drex_llama_params;

/* Graphs that were built, windows that used one again, graphs that were dropped for want of room, graphs kept, their bytes. */
typedef struct drex_llama_graphs {
  uint64_t built, reused, evicted, kept, bytes;
} drex_llama_graphs;

typedef struct drex_llama_sampling {
  float temperature; /* 0: the most likely token */
  int32_t top_k;     /* 0: all */
  float top_p, min_p;
  float repetition_penalty, frequency_penalty, presence_penalty;
  uint32_t seed;
} drex_llama_sampling;

uint32_t drex_llama_version(void);

/* 0: this llama.cpp was built without a GPU backend, or finds no GPU. */
int32_t drex_llama_has_gpu(void);
/* NULL on failure, with the reason in error[0, n_error). */
drex_llama *drex_llama_open(const drex_llama_params *params, char *error, size_t n_error);
void drex_llama_close(drex_llama *llama);

int32_t drex_llama_n_layer(const drex_llama *llama);
int32_t drex_llama_n_vocab(const drex_llama *llama);
uint32_t drex_llama_n_context(const drex_llama *llama);
/* A token that a text can begin with. */
int32_t drex_llama_bos(const drex_llama *llama);
/* Those of drex_llama_exits(), else <arch>.early_exit.layers of the model's metadata; returns how many there are, writes at
 * most n. */
size_t drex_llama_exit_layers(const drex_llama *llama, uint32_t *layers, size_t n);
/* <arch>.early_exit.head, "shared" when the metadata has none, and with drex_llama_exits(). */
const char *drex_llama_exit_head(const drex_llama *llama);

/* After open: the hidden arena of n_rows rows. Graphs of windows of at most n_rows_graph rows are kept, n_graphs of them;
 * 0: by the number of slots.
 * NULL, or why this model cannot run layer windows, valid until the thread's next call. */
const char *drex_llama_windows(drex_llama *llama, uint32_t n_rows, uint32_t n_graphs, uint32_t n_rows_graph);
/* Whether K/V of layers with a sliding window is gone when it has passed. */
int32_t drex_llama_slides(const drex_llama *llama);
/* After windows: why fill copy cannot be used with the model, NULL where it can. */
const char *drex_llama_no_copy(drex_llama *llama);
/* After windows: rows exit through what was fitted to the model, in a file beside it. layers: those of the file's layers that
 * are exits; none: all of them. NULL, or what is wrong, valid until the thread's next call; then nothing has changed. */
const char *drex_llama_exits(drex_llama *llama, const char *path, const uint32_t *layers, size_t n_layers);
/* After windows: where layers, K/V and head are. *cuda: 1, and K/V and logits are device pointers, in order on *stream, whose
 * context is current on the calling thread; 0: in host memory. NULL, or why drex cannot work there (static). */
const char *drex_llama_device(drex_llama *llama, int32_t *cuda, void **stream);
/* K and V of a layer, as drex_bind_kv() takes them. 0: there is no such layer. */
int32_t drex_llama_layer(const drex_llama *llama, int32_t layer, drex_kv_layer *out);

/* As llama_tokenize(): the count, or minus the count when it is above n. special: special tokens are read, and those added
 * that a text begins with. tokenize, piece, longest and is_end may be called from any thread at any time. */
int32_t drex_llama_tokenize(const drex_llama *llama, const char *text, int32_t length, int32_t special, int32_t *tokens,
                            int32_t n);
/* special: those have a text too. */
int32_t drex_llama_piece(const drex_llama *llama, int32_t token, int32_t special, char *text, int32_t n);
/* No token stands for more bytes of text. */
size_t drex_llama_longest(const drex_llama *llama);
int32_t drex_llama_is_end(const drex_llama *llama, int32_t token);

/* Layers [begin, end); waits for the result, on a GPU only where the window ends at the last layer or has no outputs.
 * slots[i]: the arena row of row i. outputs[i] != 0: row i's logits are wanted. Returns what llama_decode() does, 2 or below
 * -1 on failure. */
int32_t drex_llama_window(drex_llama *llama, const int32_t *tokens, const int32_t *positions, const int32_t *sequences,
                          const int32_t *slots, const uint8_t *outputs, int32_t n, int32_t begin, int32_t end);
/* K and V of layers [begin, n_layer) from the hidden rows as they are. */
int32_t drex_llama_project(drex_llama *llama, const int32_t *positions, const int32_t *sequences, const int32_t *slots,
                           int32_t n, int32_t begin);
/* KV cell of each row of the last window. */
const uint32_t *drex_llama_cells(const drex_llama *llama);
/* [n_vocab] of the last window's row i, in host memory, -infinity for a token that an exit's head has not; NULL when it is
 * no output. */
const float *drex_llama_logits(drex_llama *llama, int32_t i);
/* The logits of the last window, which ended at this ramp, in the order of its outputs and where it left them: sets data,
 * row_stride_bytes, n_vocab, token_ids and calibration. 0: they do not lie like this. */
int32_t drex_llama_ramp_logits(const drex_llama *llama, uint32_t ramp, drex_logits *out);
/* Row i of the last window's outputs gives these tokens no logit from here on. Not 0: there are no such logits. */
int32_t drex_llama_ban(drex_llama *llama, int32_t i, const int32_t *tokens, int32_t n_tokens);
/* Frees all cells of a sequence; -1: of all sequences. */
void drex_llama_forget(drex_llama *llama, int32_t sequence);
/* The tokens of a sequence from a position on are void: those that come next take their cells. */
void drex_llama_rollback(drex_llama *llama, int32_t sequence, int32_t position);

/* A sampler that has seen the prompt's tokens. */
drex_llama_sampler *drex_llama_sampler_new(const drex_llama *llama, const drex_llama_sampling *params, const int32_t *prompt,
                                           int32_t n_prompt);
void drex_llama_sampler_free(drex_llama_sampler *sampler);
/* Chooses a token from the logits of the last window's row i, none of the banned ones, and remembers it. -1: there are no
 * such logits; -2: one of them is NaN; -3: it failed. */
int32_t drex_llama_sample(drex_llama *llama, drex_llama_sampler *sampler, int32_t i, const int32_t *banned, int32_t n_banned);

void drex_llama_perf(const drex_llama *llama, drex_llama_graphs *out);

#ifdef __cplusplus
}
#endif

#endif
