#pragma once

// Layer ranges: run layers [il_begin, il_end) of the model over a batch.
//
// A pass over all layers can be cut at layer boundaries. The hidden row of each token leaves one range through a row of
// a persistent arena and enters the next range from there, so tokens of different passes can be regrouped between
// ranges without moving a row. A range that ends before the last layer applies the model's own final norm and output
// head to the rows that are outputs. Arena and logits stay on the model's device.
//
//   llama_layer_range_init(ctx, params);
//   llama_layer_range_decode(ctx, batch, 0, 8,       rows);   // allocates KV cells, logits after layer 7
//   llama_layer_range_decode(ctx, batch, 8, n_layer, rows);   // any regrouping of tokens that passed [0, 8)
//
// The KV cache may be unified or have a stream for each sequence. Some layers may have a sliding window: their cells stay
// until no row that has layers left to pass can see them.
//
// A context that never calls llama_layer_range_init() behaves and costs as before.
// Staging API: C++ allowed, not stable. Thread rules are those of llama_decode().

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_layer_range_params {
    uint32_t n_rows;       // rows of the arena
    uint32_t n_graphs;     // most graphs kept, one for each (range, number of rows, layout of their streams); 0: 4 for each sequence, at least 128
    uint32_t n_rows_graph; // batches of more tokens are rarely alike: their graphs are not kept
    size_t   max_bytes;    // most bytes of compute buffers and metadata of kept graphs; 0: by the size of the model and the number of sequences
    int32_t  il_arena;     // the arena lies on the device of this layer
};

// Returns nullptr on success, otherwise the reason why this model or context cannot run layer ranges, valid until the next call
// on this thread. Whether a model can be cut is found out from its memory and its graph, cut by cut.
LLAMA_API const char * llama_layer_range_init(llama_context * ctx, llama_layer_range_params params);

// Runs layers [il_begin, il_end) over the batch.
//   - every token is a text token of one sequence; at most n_ubatch tokens; logits are computed for outputs only
//   - rows[i] in [0, n_rows), distinct: the arena row of token i
//   - il_begin == 0: tokens enter as in llama_decode(); cells are allocated; positions must follow the sequence
//   - il_begin  > 0: token i continues from rows[i], which an earlier range must have left for the same (sequence, position)
//                    with il_end equal to this il_begin; token ids are not used
// Returns what llama_decode() returns; -1 also for an arena row that does not hold what the batch says.
// On a failure of the computation itself (ret < -1 or 2) the cells of the batch's tokens are removed, as by llama_decode().
LLAMA_API int32_t llama_layer_range_decode(
        llama_context   * ctx,
        llama_batch_ext * batch,
        int32_t           il_begin,
        int32_t           il_end,
        const int32_t   * rows);

// After llama_layer_range_decode() or llama_layer_range_project() returned -1 for these arguments: the sequences of tokens that
// do not fit, in the batch's order. Their arena row does not hold them, their cell has changed, or their position does not follow
// the sequence. The other tokens can be decoded. Empty: the arguments are wrong in another way
LLAMA_API std::vector<llama_seq_id> llama_layer_range_misfits(
        llama_context   * ctx,
        llama_batch_ext * batch,
        int32_t           il_begin,
        const int32_t   * rows);

// Ends the way of rows that are to go no further: layers [il_begin, n_layer) get their K and V as projected from the hidden row
// as it is, without attention and feed-forward (CALM's state propagation). No logits; the logits of the range before are gone.
LLAMA_API int32_t llama_layer_range_project(
        llama_context   * ctx,
        llama_batch_ext * batch,
        int32_t           il_begin,
        const int32_t   * rows);

// The sequence goes on at pos: its tokens from there on, which came through ranges and whose arena rows have not been used
// since, are void. Their cells stay in the memory, for the next tokens at these positions in ranges that begin at layer 0, so
// that the order of the sequence's cells remains that of its positions (the order in which attention adds up).
// llama_memory_seq_rm() frees them.
LLAMA_API void llama_layer_range_rollback(llama_context * ctx, llama_seq_id seq, llama_pos pos);

// KV cell of each token of the last llama_layer_range_decode(), valid until the next one. Cells are numbered over all
// streams: cell i of stream s is s*n_cells/n_stream + i. Layers with a sliding window have cells of their own, not these
LLAMA_API const uint32_t * llama_layer_range_cells(const llama_context * ctx);

// logits of the last range on its device, F32 [n_vocab, n_outputs], valid until the next call that decodes, resets or frees.
// A range that ends at a fitted exit has [n, n_outputs], those of llama_layer_exits_tokens(). nullptr: there are none
LLAMA_API ggml_tensor * llama_layer_range_logits(const llama_context * ctx);

// Reads (write = false) or writes the logit of one vocabulary entry in rows [first, first + n) of these logits: values[i] for row
// first + i. In order with the range's own work, and as asynchronous as that is. A token that a fitted exit's head has not is
// -infinity there, and stays it. false: there are no such logits
LLAMA_API bool llama_layer_range_edit_logits(llama_context * ctx, llama_token token, int32_t first, int32_t n, float * values, bool write);

// Unlike those of llama_decode(), a range's logits stay where they are. Before the next range, this copies those of tokens
// [first, first + n), all of them outputs, to where llama_get_logits_ith() finds them; the others are undefined there. Does not
// wait, as llama_decode(); logits of a fitted exit are waited for, and other tokens than its own are -infinity. false: there
// are no such logits
LLAMA_API bool llama_layer_range_fetch_logits(llama_context * ctx, int32_t first, int32_t n);

// the backend that has all layers, their KV cache, the head and the arena; nullptr if they are spread over several
LLAMA_API ggml_backend_t llama_layer_range_backend(const llama_context * ctx);

// The device stream on which that backend runs ranges (cudaStream_t), which orders with no other: work on the arena, the
// logits and the KV cache between ranges belongs there. The device's context is current on the calling thread afterwards.
// nullptr: the backend has none, or does not tell it
LLAMA_API void * llama_layer_range_stream(const llama_context * ctx);

// the arena, F32 [n_embd, n_rows]
LLAMA_API ggml_tensor * llama_layer_range_hidden(const llama_context * ctx);

struct llama_layer_range_kv {
    ggml_tensor * k;        // [n_embd_k_gqa, n_cells]: cell c is the row at c*nb[1]
    ggml_tensor * v;        // v_trans == false: as k
    bool          v_trans;  // element j of cell i of stream s lies at s*nb[2] + (j*n_cells/n_stream + i)*element size
    uint32_t      n_cells;  // of all streams
    uint32_t      n_stream;
};

// K and V storage of a layer; false if there is no such layer
LLAMA_API bool llama_layer_range_get_kv(const llama_context * ctx, int32_t il, llama_layer_range_kv * out);

// nullptr: the K and V of each layer have the cells, the shape and the positional encoding of those of any other layer.
// Otherwise what differs
LLAMA_API const char * llama_layer_range_kv_unlike(const llama_context * ctx);

struct llama_layer_range_perf_data {
    uint64_t n_built;   // graphs built for ranges
    uint64_t n_reused;  // ranges that reused a graph
    uint64_t n_evicted; // graphs dropped for want of room
    uint64_t n_kept;    // graphs kept now
    uint64_t bytes;     // their compute buffers and metadata
};

LLAMA_API llama_layer_range_perf_data llama_layer_range_perf(const llama_context * ctx);
