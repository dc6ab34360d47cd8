#pragma once

// Exits that were fitted to a model, in a file beside it.
//
// A middle state says little to a model's own head where the model was not trained for it. An exit maps the state to one that
// the head can read:
//
//   x = state / rms(state)
//   y = weight x + scale * x + up (down x) + mlp_down silu(mlp_up x + mlp_up_bias) + bias
//   logits = head y
//
// where any term but the bias may be missing, as long as there is a weight or a scale. The rows of the head are those of the
// model's own for some of the tokens.
//
// The file is a GGUF of the architecture "exits":
//
//   exits.version                 u32    1
//   exits.model.architecture      string
//   exits.model.block_count       u32
//   exits.model.embedding_length  u32
//   exits.model.vocab_size        u32
//   exits.model.hash              string see llama_layer_exits_hash()
//   exits.layers                  array of u32, strictly increasing: an exit at L follows layers [0, L)
//   tensor tokens                 I32 [n], the token of each row of the head, strictly increasing
//   tensors exit.L.bias           F32 [n_embd]
//           exit.L.weight              [n_embd, n_embd]
//           exit.L.scale          F32 [n_embd]
//           exit.L.down, .up           [n_embd, rank], [rank, n_embd]
//           exit.L.mlp_up, .mlp_down   [n_embd, width], [width, n_embd], and .mlp_up_bias F32 [width]
//
// exits.calibration and exits.report belong to the programs that write the file and use the exits.
//
// Staging API, as llama-layer-range.h.

#include "llama.h"

#include <cstdint>

// Ranges that end at one of the file's layers get their logits from its exit, from here on; llama_layer_range_init() comes
// first. path_model names the file that the model was loaded from, the first one where there are several.
// Returns nullptr on success, otherwise a text that names what is wrong, valid until the next call on this thread; then
// nothing has changed.
LLAMA_API const char * llama_layer_exits_load(llama_context * ctx, const char * path_model, const char * path_exits);

// the layers of the loaded exits; nullptr: there are none
LLAMA_API const int32_t * llama_layer_exits_layers(const llama_context * ctx, int32_t * n);

// the tokens of the logits of ranges that end at an exit; nullptr: no exits are loaded
LLAMA_API const int32_t * llama_layer_exits_tokens(const llama_context * ctx, int32_t * n);

// What tells a model from another: a hash of names, types and shapes of its tensors and of some of their bytes, as 16
// digits. Returns nullptr on success, otherwise what is wrong, as above.
LLAMA_API const char * llama_layer_exits_hash(const char * path_model, char hash[17]);

// Reads rows of a model's head as its file has them: tensor type, and n*ggml_row_size(type, n_embd) bytes at data, which may
// be nullptr to ask for the type alone. n_embd is the width of the model. Returns as above.
LLAMA_API const char * llama_layer_exits_head(
        const char * path_model, int32_t n_embd, const int32_t * tokens, int32_t n, int32_t * type, void * data);
