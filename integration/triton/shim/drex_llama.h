/* SPDX-License-Identifier: Apache-2.0
 *
 * What the backend needs of the patched llama.cpp, as plain C: llama.h passes large structs by value and llama-window.h
 * is C++, so this is compiled against the headers of the very libraries that it is loaded with.
 *
 * One thread at a time for each engine. No exception leaves a call. */

#ifndef DREX_LLAMA_H
#define DREX_LLAMA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with anything below. */
#define DREX_LLAMA_VERSION 1

typedef struct drex_llama drex_llama;
typedef struct drex_llama_sampler drex_llama_sampler;

typedef struct drex_llama_params {
  const char *model;   /* path of a GGUF file */
  const char *kv_type; /* ggml's name of the K/V cache's type, such as "f16" */
  uint32_t n_ctx;      /* cells of the K/V cache, for all sequences together */
  uint32_t n_seq;
  uint32_t n_batch;    /* most tokens of one pass */
  int32_t n_threads;
} drex_llama_params;

/* K and V of one layer, as drex_kv_layer wants them. */
typedef struct drex_llama_kv {
  void *k, *v;
  uint64_t k_row_bytes, k_cell_stride, v_row_bytes, v_cell_stride, v_elem_bytes, v_elem_stride;
  uint32_t n_cells;
  uint32_t reserved;
} drex_llama_kv;

typedef struct drex_llama_sampling {
  float temperature; /* 0: the most likely token */
  int32_t top_k;     /* 0: all */
  float top_p, min_p;
  float repetition_penalty, frequency_penalty, presence_penalty;
  uint32_t seed;
  int32_t ignore_eos;
} drex_llama_sampling;

uint32_t drex_llama_version(void);

/* NULL on failure, with the reason in error[0, n_error). */
drex_llama *drex_llama_open(const drex_llama_params *params, char *error, size_t n_error);
void drex_llama_close(drex_llama *llama);

int32_t drex_llama_n_layer(const drex_llama *llama);
int32_t drex_llama_n_vocab(const drex_llama *llama);
uint32_t drex_llama_n_ctx_train(const drex_llama *llama);
uint32_t drex_llama_n_cells(const drex_llama *llama);
/* <arch>.early_exit.layers of the model's metadata; returns how many there are, writes at most n. */
size_t drex_llama_exit_layers(const drex_llama *llama, uint32_t *layers, size_t n);
/* <arch>.early_exit.head, "shared" when the metadata has none. */
const char *drex_llama_exit_head(const drex_llama *llama);

/* After open: the hidden arena. NULL, or why this model cannot run layer windows (static). */
const char *drex_llama_windows(drex_llama *llama, uint32_t n_slots, uint32_t n_graphs);
/* 0: there is no such layer, or it is not in host memory. */
int32_t drex_llama_layer(const drex_llama *llama, int32_t layer, drex_llama_kv *out);

/* As llama_tokenize(): the count, or minus the count when it is above n. */
int32_t drex_llama_tokenize(const drex_llama *llama, const char *text, int32_t length, int32_t *tokens, int32_t n);
int32_t drex_llama_piece(const drex_llama *llama, int32_t token, char *text, int32_t n);
int32_t drex_llama_is_end(const drex_llama *llama, int32_t token);

/* All layers; outputs[i] != 0: row i's logits are wanted. Returns what llama_decode() does, 2 or below -1 on failure. */
int32_t drex_llama_decode(drex_llama *llama, const int32_t *tokens, const int32_t *positions, const int32_t *sequences,
                          const uint8_t *outputs, int32_t n);
/* Layers [begin, end); waits for the result. slots[i]: the arena row of row i. */
int32_t drex_llama_window(drex_llama *llama, const int32_t *tokens, const int32_t *positions, const int32_t *sequences,
                          const int32_t *slots, int32_t n, int32_t begin, int32_t end);
/* K and V of layers [begin, n_layer) from the hidden rows as they are. */
int32_t drex_llama_project(drex_llama *llama, const int32_t *positions, const int32_t *sequences, const int32_t *slots,
                           int32_t n, int32_t begin);
/* KV cell of each row of the last window. */
const uint32_t *drex_llama_cells(const drex_llama *llama);
/* [n_vocab] of row i of the last pass through drex_llama_decode(); NULL when it was no output. */
const float *drex_llama_logits(drex_llama *llama, int32_t i);
/* [n][n_vocab] of the last window, where it left them; NULL when that is not host memory. */
const float *drex_llama_window_logits(const drex_llama *llama);
/* Frees all cells of a sequence. */
void drex_llama_forget(drex_llama *llama, int32_t sequence);
void drex_llama_rollback(drex_llama *llama, int32_t sequence, int32_t position);

drex_llama_sampler *drex_llama_sampler_new(const drex_llama *llama, const drex_llama_sampling *params);
void drex_llama_sampler_free(drex_llama_sampler *sampler);
/* Chooses a token from row i's logits and remembers it. window: of the last window, else of the last decode. Below 0: there
 * are no such logits. */
int32_t drex_llama_sample(drex_llama *llama, drex_llama_sampler *sampler, int32_t i, int32_t window);

void drex_llama_perf(const drex_llama *llama, uint64_t *graphs_built, uint64_t *graphs_reused);

#ifdef __cplusplus
}
#endif

#endif
