#pragma once

#include "llama-graph.h"
#include "llama-layer-range.h"
#include "llama-memory.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

class  llm_graph_input_range;
struct llama_layer_exits;
struct llama_layer_ranges;
class  llama_batch_allocr;

// Where the rows of a batch stand around attention.
//
// Rows of a layer range come from any subset of the streams of the KV cache, in any order. Attention over several streams
// wants the same number of queries for each stream of a contiguous range. So the queries are gathered into places just
// before attention, and the results are gathered back into rows just after it. A place without a row is masked. All other
// operations run over the rows as they are.
struct llama_row_places {
    // streams [s0, s0 + n_stream), n_query places for each; place q of stream s is first + (s - s0)*n_query + q
    struct group {
        uint32_t s0;
        uint32_t n_stream;
        uint32_t n_query;
        uint32_t first;

        bool operator==(const group & o) const {
            return s0 == o.s0 && n_stream == o.n_stream && n_query == o.n_query && first == o.first;
        }
    };

    std::vector<group>   groups;
    std::vector<int32_t> row_of_place; // -1: none
    std::vector<int32_t> place_of_row;
    bool                 identity = false; // place i is row i

    static constexpr uint32_t max_groups = 12; // see llama_layer_range_max_nodes()

    // streams[i]: the stream of row i
    void assign(const std::vector<uint32_t> & streams, uint32_t n_stream);

    bool same_layout(const llama_row_places & o) const {
        return identity == o.identity && groups == o.groups && place_of_row.size() == o.place_of_row.size();
    }
};

// The range that is being decoded, as the graph sees it.
struct llama_layer_range {
    int32_t n_layer  = 0; // of the model
    int32_t il_begin = 0;
    int32_t il_end   = 0;
    bool    project  = false; // only K and V are stored, projected from the rows as they enter

    ggml_tensor * hidden = nullptr; // the arena, F32 [n_embd, n_rows]

    const llama_layer_exits * exits = nullptr; // nullptr: ranges end in the model's own norm and head
    mutable ggml_tensor * exit_logits = nullptr; // of the graph that has been computed; nullptr: it ends at no exit

    std::vector<int32_t> arena_rows; // [n_tokens]
    llama_row_places     places;

    bool is_last() const { return il_end == n_layer; }

    // What builders expand outside of the range goes to a graph that nobody computes.
    ggml_cgraph * gf_dead = nullptr;

    // while a graph is built
    mutable ggml_cgraph * gf_live      = nullptr;
    mutable ggml_tensor * arena_idx    = nullptr; // I32 [n_tokens]
    mutable ggml_tensor * out_ids      = nullptr; // I32 [n_outputs]
    mutable ggml_tensor * entered      = nullptr; // F32 [n_embd, n_tokens]
    mutable ggml_tensor * left         = nullptr;
    mutable ggml_tensor * row_of_place = nullptr; // I32 [n_places]
    mutable ggml_tensor * place_of_row = nullptr; // I32 [n_tokens]
    mutable std::vector<ggml_tensor *> dead;        // what no layer of the range may read, the first one in place of the embeddings
    mutable bool          in_group     = false;   // attention of one group is being built

    mutable llm_graph_input_range * inputs = nullptr;
};

//
// hooks of llm_graph_context
//

// the number of layers that builders build
int64_t llama_layer_range_n_layer(const llama_layer_range * range, const llama_hparams & hparams);

// the graph that builders expand into from here on
ggml_cgraph * llama_layer_range_begin(const llama_layer_range & range, ggml_cgraph * gf);

// the graph that takes the K/V stores of layer il
ggml_cgraph * llama_layer_range_gf_store(const llm_graph_context & gctx, int il);

// in place of the embeddings of a range that begins above layer 0: a tensor that nothing of the range may reach
ggml_tensor * llama_layer_range_build_dead_embd(const llm_graph_context & gctx);

// at the end of layer il: hidden rows enter or leave the range
ggml_tensor * llama_layer_range_build_cut(const llm_graph_context & gctx, ggml_tensor * cur, int il);

// attention over places, group by group
ggml_tensor * llama_layer_range_build_attn(
        const llm_graph_context & gctx,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla,
        int64_t n_kv_max, float kq_scale, int il);

//
// hooks of llama_context
//

// memory context of the current range's batch: one micro-batch, whose tokens have a cell or get one
llama_memory_context_ptr llama_layer_range_init_batch(llama_layer_ranges & ranges, llama_batch_allocr & balloc);

// notes the cells of the micro-batch that has just been computed
void llama_layer_range_record(llama_layer_ranges & ranges, const llama_memory_context_i & mctx);

// nodes of the context's own graphs
size_t llama_layer_range_max_nodes(const llama_layer_ranges * ranges, size_t n_nodes);

// drops the graphs: what they were built from (adapters, attention type, ...) changes. The device is idle.
void llama_layer_range_reset(llama_layer_ranges & ranges);

// drops all graphs but the one in use; false: there was none
bool llama_layer_range_make_room(llama_layer_ranges & ranges);

// adds the arena and the kept graphs
void llama_layer_range_memory(const llama_layer_ranges & ranges, std::map<ggml_backend_buffer_type_t, size_t> & bytes);

// takes these exits from here on, and drops the graphs. Throws std::runtime_error where llama_layer_range_init() is missing
void llama_layer_range_set_exits(llama_context & ctx, std::shared_ptr<llama_layer_exits> exits);

// nullptr: there are none
const llama_layer_exits * llama_layer_range_exits(const llama_context & ctx);
