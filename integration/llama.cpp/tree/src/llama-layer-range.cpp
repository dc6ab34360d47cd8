#include "llama-layer-range-impl.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-layer-exits-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

//
// llama_row_places
//

void llama_row_places::assign(const std::vector<uint32_t> & streams, uint32_t n_stream) {
    const uint32_t n_rows = streams.size();

    std::vector<uint32_t> count(n_stream, 0);
    for (const uint32_t s : streams) {
        count[s]++;
    }

    std::vector<uint32_t> limits(count);
    std::sort(limits.begin(), limits.end());
    limits.erase(std::unique(limits.begin(), limits.end()), limits.end());

    // the streams with at most `limit` rows as one group, over an aligned range, so that few layouts occur
    auto shared = [&](uint32_t limit) {
        group res = { 0, 0, limit, 0 };

        uint32_t lo = n_stream, hi = 0;
        for (uint32_t s = 0; s < n_stream; ++s) {
            if (count[s] > 0 && count[s] <= limit) {
                lo = std::min(lo, s);
                hi = s;
            }
        }
        if (lo < n_stream) {
            uint32_t block = 1;
            while (lo/block != hi/block) {
                block *= 2;
            }
            res.s0       = lo/block*block;
            res.n_stream = std::min(block, n_stream - res.s0);
        }

        return res;
    };

    // each other stream is a group of its own, which costs an attention operation: about as much as some masked places
    const uint32_t group_cost = 48;

    uint32_t best_limit = 0, best_cost = UINT32_MAX;
    for (const uint32_t limit : limits) {
        uint32_t cost    = limit*shared(limit).n_stream;
        uint32_t n_group = 1;
        for (uint32_t s = 0; s < n_stream; ++s) {
            if (count[s] > limit) {
                cost += count[s] + group_cost;
                n_group++;
            }
        }
        if (cost <= best_cost && n_group <= max_groups) {
            best_cost  = cost;
            best_limit = limit;
        }
    }

    groups.clear();
    uint32_t n_places = 0;

    auto add = [&](group g) {
        g.first   = n_places;
        n_places += g.n_stream*g.n_query;
        groups.push_back(g);
    };

    if (const group g = shared(best_limit); g.n_stream > 0) {
        add(g);
    }
    std::vector<uint32_t> next(n_stream);
    for (uint32_t s = 0; s < n_stream; ++s) {
        if (count[s] > best_limit) {
            next[s] = n_places;
            add({ s, 1, count[s], 0 });
        } else if (count[s] > 0) {
            next[s] = (s - groups[0].s0)*groups[0].n_query;
        }
    }

    row_of_place.assign(n_places, -1);
    place_of_row.resize(n_rows);
    identity = n_places == n_rows;
    for (uint32_t i = 0; i < n_rows; ++i) {
        place_of_row[i] = next[streams[i]]++;
        row_of_place[place_of_row[i]] = i;
        identity = identity && place_of_row[i] == (int32_t) i;
    }
}

//
// graph
//

class llm_graph_input_range : public llm_graph_input_i {
public:
    llm_graph_input_range(const llama_layer_range * range) : range(range) {}

    void set_input(const llama_ubatch * ubatch) override {
        auto set = [](ggml_tensor * t, const std::vector<int32_t> & data) {
            if (t && t->buffer) {
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            }
        };

        set(arena_idx, range->arena_rows);
        set(place_of_row, range->places.place_of_row);

        range->exit_logits = exit_logits;

        if (row_of_place && row_of_place->buffer) {
            std::vector<int32_t> rows(range->places.row_of_place);
            std::replace(rows.begin(), rows.end(), -1, 0); // any row will do: the place is masked
            set(row_of_place, rows);
        }

        if (out_ids && out_ids->buffer) {
            std::vector<int32_t> ids;
            for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
                if (ubatch->output[i]) {
                    ids.push_back(i);
                }
            }
            set(out_ids, ids);
        }
    }

    // the ranges of one kept graph are all alike
    bool can_reuse(const llm_graph_params & params) override {
        range = params.range;

        return range != nullptr;
    }

    ggml_tensor * arena_idx    = nullptr; // I32 [n_tokens]
    ggml_tensor * out_ids      = nullptr; // I32 [n_outputs]
    ggml_tensor * row_of_place = nullptr; // I32 [n_places]
    ggml_tensor * place_of_row = nullptr; // I32 [n_tokens]
    ggml_tensor * exit_logits  = nullptr; // F32 [tokens of the exits, n_outputs]

    const llama_layer_range * range;
};

int64_t llama_layer_range_n_layer(const llama_layer_range * range, const llama_hparams & hparams) {
    return range ? range->il_end : hparams.n_layer();
}

ggml_cgraph * llama_layer_range_begin(const llama_layer_range & range, ggml_cgraph * gf) {
    range.gf_live      = gf;
    range.arena_idx    = nullptr;
    range.out_ids      = nullptr;
    range.entered      = nullptr;
    range.left         = nullptr;
    range.row_of_place = nullptr;
    range.place_of_row = nullptr;
    range.in_group     = false;
    range.inputs       = nullptr;

    range.dead.clear();

    ggml_graph_clear(range.gf_dead);

    return range.il_begin > 0 ? range.gf_dead : gf;
}

ggml_cgraph * llama_layer_range_gf_store(const llm_graph_context & gctx, int il) {
    return gctx.range->project && il >= gctx.range->il_begin ? gctx.range->gf_live : gctx.gf;
}

ggml_tensor * llama_layer_range_build_dead_embd(const llm_graph_context & gctx) {
    ggml_tensor * cur = ggml_new_tensor_2d(gctx.ctx0, GGML_TYPE_F32, gctx.n_embd, gctx.n_tokens);
    gctx.cb(cur, "range_dead_embd", -1);
    gctx.range->dead.push_back(cur);

    return cur;
}

static ggml_tensor * new_idx(const llm_graph_context & gctx, int64_t n, const char * name) {
    ggml_tensor * cur = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, n);
    ggml_set_input(cur);
    gctx.cb(cur, name, -1);

    return cur;
}

// the inputs of the range are made when the first of them is needed
static const llama_layer_range & with_inputs(const llm_graph_context & gctx) {
    const auto & range = *gctx.range;

    if (!range.arena_idx) {
        auto inp = std::make_unique<llm_graph_input_range>(&range);

        inp->arena_idx = range.arena_idx = new_idx(gctx, gctx.n_tokens, "range_arena_idx");
        if (!range.is_last()) {
            inp->out_ids = range.out_ids = new_idx(gctx, gctx.n_outputs, "range_out_ids");
        }
        if (!range.places.identity) {
            inp->row_of_place = range.row_of_place = new_idx(gctx, range.places.row_of_place.size(), "range_row_of_place");
            inp->place_of_row = range.place_of_row = new_idx(gctx, gctx.n_tokens,                    "range_place_of_row");
        }

        range.inputs = inp.get();
        gctx.res->add_input(std::move(inp));
    }

    return range;
}

// Inputs are set whether a layer reads them or not: positions are not read where no layer of the range has RoPE. So they get
// memory. The large ones, which are the masks, are set only where they have some.
static void keep_inputs(const llm_graph_context & gctx) {
    for (auto * t = ggml_get_first_tensor(gctx.ctx0); t; t = ggml_get_next_tensor(gctx.ctx0, t)) {
        if ((t->flags & GGML_TENSOR_FLAG_INPUT) && ggml_nelements(t) <= GGML_MROPE_SECTIONS*gctx.n_tokens) {
            ggml_build_forward_expand(gctx.range->gf_live, t);
        }
    }
}

ggml_tensor * llama_layer_range_build_cut(const llm_graph_context & gctx, ggml_tensor * cur, int il) {
    const auto & range = with_inputs(gctx);

    if (il + 1 == range.il_end) {
        keep_inputs(gctx);
    }

    const bool enters = il + 1 == range.il_begin;
    const bool leaves = il + 1 == range.il_end && !range.is_last();
    if ((enters || leaves) && (cur->ne[0] != gctx.n_embd || ggml_nrows(cur) != gctx.n_tokens)) {
        throw std::runtime_error("a layer ends in another shape than one row for each token");
    }

    if (enters) {
        if (!range.project) {
            gctx.gf = range.gf_live;
        }
        range.entered = ggml_get_rows(gctx.ctx0, range.hidden, range.arena_idx);
        gctx.cb(range.entered, "range_enter", -1);

        return range.entered;
    }

    if (range.project && il + 1 > range.il_begin) {
        return range.entered;
    }

    if (leaves) {
        ggml_tensor * out = ggml_set_rows(gctx.ctx0, range.hidden, cur, range.arena_idx);
        gctx.cb(out, "range_leave", -1);
        range.left = out;
        ggml_build_forward_expand(gctx.gf, out);

        cur = ggml_get_rows(gctx.ctx0, cur, range.out_ids);

        if (const auto * e = range.exits ? range.exits->find(range.il_end) : nullptr) {
            range.inputs->exit_logits = range.exits->build(gctx, *e, cur);
            ggml_build_forward_expand(gctx.gf, range.inputs->exit_logits);
            gctx.gf = range.gf_dead; // what follows is the model's own head
        }

        return cur;
    }

    return cur;
}

ggml_tensor * llama_layer_range_build_attn(
        const llm_graph_context & gctx,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla,
        int64_t n_kv_max, float kq_scale, int il) {
    const auto & range  = with_inputs(gctx);
    const auto & places = range.places;

    ggml_context * ctx0 = gctx.ctx0;

    if (gctx.gf == range.gf_dead && !v_mla) {
        // nobody computes it: only its shape counts
        const int64_t n_embd_head_v = v->nb[1] > v->nb[2] ? v->ne[2] : v->ne[0];
        range.dead.push_back(ggml_new_tensor_2d(ctx0, GGML_TYPE_F32, n_embd_head_v*q->ne[1], q->ne[2]));
        return range.dead.back();
    }

    const int64_t n_embd = q->ne[0]*q->ne[1];

    // [n_embd_head*n_head, n_tokens]
    ggml_tensor * rows = q->nb[1] == ggml_row_size(q->type, q->ne[0]) ?
        ggml_view_2d(ctx0, q, n_embd, q->ne[2], q->nb[2], 0) :
        ggml_cont_2d(ctx0, q, n_embd, q->ne[2]);

    if (!places.identity) {
        rows = ggml_get_rows(ctx0, rows, range.row_of_place);
    }

    range.in_group = true;

    ggml_tensor * cur = nullptr;
    for (const auto & g : places.groups) {
        ggml_tensor * q_g = ggml_view_3d(ctx0, rows, q->ne[0], q->ne[1], g.n_stream*g.n_query,
                ggml_row_size(q->type, q->ne[0]), rows->nb[1], g.first*rows->nb[1]);
        ggml_tensor * k_g = ggml_view_4d(ctx0, k, k->ne[0], k->ne[1], k->ne[2], g.n_stream, k->nb[1], k->nb[2], k->nb[3], g.s0*k->nb[3]);
        ggml_tensor * v_g = ggml_view_4d(ctx0, v, v->ne[0], v->ne[1], v->ne[2], g.n_stream, v->nb[1], v->nb[2], v->nb[3], g.s0*v->nb[3]);
        ggml_tensor * m_g = ggml_view_4d(ctx0, kq_mask, kq_mask->ne[0], g.n_query, 1, g.n_stream,
                kq_mask->nb[1], g.n_query*kq_mask->nb[1], g.n_query*kq_mask->nb[1], g.first*kq_mask->nb[1]);

        ggml_tensor * cur_g = gctx.build_attn_mha(q_g, k_g, v_g, nullptr, m_g, sinks, v_mla, n_kv_max, kq_scale, il);

        cur = cur ? ggml_concat(ctx0, cur, cur_g, 1) : cur_g;
    }

    range.in_group = false;

    if (!places.identity) {
        cur = ggml_get_rows(ctx0, cur, range.place_of_row);
    }
    ggml_build_forward_expand(gctx.gf, cur);

    return cur;
}

//
// memory
//

llama_kv_cache::slot_info llama_kv_cache::find_row_slots(
        const llama_ubatch & ubatch,
        const std::vector<uint32_t> & cells,
        const std::vector<llama_pos> & pos_min) const {
    slot_info res;

    res.s0 = 0;
    res.s1 = n_stream - 1;
    res.resize(ubatch.n_tokens);

    struct cursor {
        uint32_t head     = 0;
        uint32_t n_tested = 0;
        uint32_t n_new    = 0;
    };
    std::vector<cursor> cursors(n_stream);

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        res.strm[i] = seq_to_stream[ubatch.seq_id[i][0]];
        cursors[res.strm[i]].n_new += cells[i] == UINT32_MAX;
    }
    for (uint32_t s = 0; s < n_stream; ++s) {
        // where find_slot() would begin
        cursors[s].head = v_heads[s] > v_cells[s].get_used() + 2*cursors[s].n_new ? 0 : v_heads[s];
    }

    auto is_free = [&](const llama_kv_cells & stream, uint32_t idx) {
        if (stream.is_empty(idx)) {
            return true;
        }
        if (stream.seq_count(idx) != 1) {
            return false;
        }
        const llama_seq_id seq = stream.seq_get(idx);
        return llama_hparams::is_masked_swa(n_swa, swa_type, stream.pos_get(idx), std::min(stream.seq_pos_max(seq) + 1, pos_min[seq]));
    };

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        uint32_t idx = cells[i];
        if (idx == UINT32_MAX) {
            const auto & stream = v_cells[res.strm[i]];
            auto       & c      = cursors[res.strm[i]];
            for (; c.n_tested < stream.size() && idx == UINT32_MAX; ++c.n_tested) {
                c.head = c.head >= stream.size() ? 0 : c.head;
                if (is_free(stream, c.head)) {
                    idx = c.head;
                }
                c.head++;
            }
            if (idx == UINT32_MAX) {
                return {};
            }
        }
        res.idxs[i] = { idx };
    }

    return res;
}

void llama_kv_cache::free_row_slots(const slot_info & sinfo, const std::vector<uint32_t> & cells) {
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (cells[i] != UINT32_MAX) {
            v_cells[sinfo.strm[i]].rm(cells[i]);
        }
    }
}

int64_t llama_kv_cache_context::get_n_queries(int64_t n_tokens) const {
    const auto * places = get_places();
    return places ? places->row_of_place.size() : n_tokens;
}

template<typename T>
static void set_mask(T * data, int64_t n_kv, const llama_ubatch & ubatch, const llama_row_places & places,
        const llama_kv_cells_vec & v_cells, const std::vector<uint32_t> & seq_to_stream, uint32_t n_swa, llama_swa_type swa_type, bool alibi) {
    T keep, drop;
    if constexpr (std::is_same_v<T, ggml_fp16_t>) {
        keep = ggml_fp32_to_fp16(0.0f);
        drop = ggml_fp32_to_fp16(-INFINITY);
    } else {
        keep = 0.0f;
        drop = -INFINITY;
    }

    std::fill(data, data + n_kv*places.row_of_place.size(), drop);

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq = ubatch.seq_id[i][0];
        const llama_pos    p1  = ubatch.pos[i];
        const auto & cells = v_cells.at(seq_to_stream[seq]);

        T * dst = data + n_kv*places.place_of_row[i];

        const int64_t n = std::min<int64_t>(n_kv, cells.used_max_p1());
        for (int64_t j = 0; j < n; ++j) {
            if (cells.is_empty(j) || !cells.seq_has(j, seq)) {
                continue;
            }
            const llama_pos p0 = cells.pos_get(j);
            if (p0 > p1 || llama_hparams::is_masked_swa(n_swa, swa_type, p0, p1)) {
                continue;
            }
            if (alibi) {
                if constexpr (std::is_same_v<T, ggml_fp16_t>) {
                    dst[j] = ggml_fp32_to_fp16(-std::abs(p0 - p1));
                } else {
                    dst[j] = -std::abs(p0 - p1);
                }
            } else {
                dst[j] = keep;
            }
        }
    }
}

void llama_kv_cache::set_input_kq_mask_rows(ggml_tensor * dst, const llama_ubatch & ubatch, const llama_row_places & places) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(dst->ne[1] == (int64_t) places.row_of_place.size());

    if (dst->type == GGML_TYPE_F16) {
        set_mask((ggml_fp16_t *) dst->data, dst->ne[0], ubatch, places, v_cells, seq_to_stream, n_swa, swa_type, hparams.use_alibi);
    } else {
        set_mask((float *)       dst->data, dst->ne[0], ubatch, places, v_cells, seq_to_stream, n_swa, swa_type, hparams.use_alibi);
    }
}

//
// llama_layer_ranges
//

namespace {

// what an arena row holds
struct arena_row {
    llama_seq_id seq  = -1;
    llama_pos    pos  = -1;
    int32_t      il   = -1; // the layer this row enters next, -1: empty
    uint32_t     cell[2] = {}; // in each cache, within the sequence's stream
};

// what decode() keeps from call to call, so that its graph can be reused
struct kept_graph {
    int32_t  il_begin;
    int32_t  il_end;
    uint32_t n_tokens;
    uint32_t n_outputs;
    bool     project;

    llama_row_places places;

    uint64_t t_last_used = 0;
    size_t   bytes       = 0;

    ggml_backend_sched_ptr sched;

    std::array<llm_graph_result_ptr, 2> gf_res_prev;
    llm_graph_result * gf_res_prev_active = nullptr;
};

} // namespace

struct llama_layer_ranges {
    llama_context & ctx;

    size_t n_nodes = 0; // of a kept graph

    llama_layer_range_params params;
    const int32_t n_layer;

    ggml_context_ptr        ctx_hidden;
    ggml_backend_buffer_ptr buf_hidden;

    std::vector<uint8_t> buf_dead;
    ggml_context_ptr     ctx_dead;

    llama_layer_range range; // the current one

    // the KV cache, or that of the layers without a sliding window and that of those with one
    std::vector<llama_kv_cache *> caches;

    std::string kv_unlike; // empty: the K and V of each layer have the form of those of any other

    std::shared_ptr<llama_layer_exits> exits;

    std::vector<arena_row> rows;  // [n_rows]
    std::vector<arena_row> spare; // cells that rolled back tokens have left, for the next tokens at their positions

    std::vector<uint32_t>  cells[2];  // of the current batch in each cache, within their streams; UINT32_MAX: none yet
    std::vector<uint32_t>  cells_all; // of the last batch in the first cache, over all streams
    std::vector<uint32_t>  streams;   // of the current batch
    std::vector<uint64_t>  row_used;  // [n_rows] number of the last call that had this row
    std::vector<llama_pos> pos_min;   // [n_seq_max] lowest position of the rows in question
    std::vector<float>     exit_rows; // logits of an exit, on their way to the host

    std::vector<std::unique_ptr<kept_graph>> graphs;
    const kept_graph * current = nullptr; // in use by decode()

    ggml_tensor *      logits         = nullptr;
    ggml_backend_t     logits_backend = nullptr;
    const kept_graph * logits_graph   = nullptr;

    uint64_t n_calls   = 0;
    uint64_t n_built   = 0;
    uint64_t n_reused  = 0;
    uint64_t n_evicted = 0;

    llama_layer_ranges(llama_context & ctx, llama_layer_range_params params) :
        ctx(ctx), params(params), n_layer(ctx.model.hparams.n_layer()) {}

    static llama_layer_ranges * get(const llama_context * ctx) {
        return ctx->ranges.get();
    }

    // for what the caches have in common: streams and sequences
    llama_kv_cache & kv() const {
        return *caches[0];
    }

    llama_kv_cache & kv_of_layer(int32_t il) const {
        return *caches[caches.size() > 1 && ctx.model.hparams.is_swa(il) ? 1 : 0];
    }

    static const char * keep(std::string reason) {
        static thread_local std::string text;
        text = std::move(reason);
        return text.c_str();
    }

    static const char * refuse(const llama_model & model, const std::string & reason) {
        return keep(std::string("the architecture ") + llm_arch_name(model.arch) + " cannot run layer ranges: " + reason);
    }

    // nullptr: the memory can be cut
    static const char * check_memory(const llama_model & model, llama_memory_i * memory) {
        const auto & hparams = model.hparams;

        if (!memory) {
            return refuse(model, "it has no KV cache");
        }
        if (llama_model_has_encoder(&model)) {
            return refuse(model, "it has an encoder");
        }
        if (llama_model_is_recurrent(&model) || llama_model_is_hybrid(&model)) {
            return refuse(model, "it has recurrent layers, whose state cannot be taken back to an earlier token");
        }
        if (hparams.is_mla()) {
            return refuse(model, "its cache holds no V (multi-head latent attention, MLA)");
        }
        if (!dynamic_cast<llama_kv_cache *>(memory) && !dynamic_cast<llama_kv_cache_iswa *>(memory)) {
            return refuse(model, "its KV cache is neither a plain one nor one with sliding windows");
        }
        for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
            if (!hparams.has_kv(il)) {
                return refuse(model, "layer " + std::to_string(il) + " reads the K and V of an earlier layer");
            }
        }

        return nullptr;
    }

    static const char * init(llama_context * ctx, llama_layer_range_params params) {
        const auto & model   = ctx->model;
        const auto & hparams = model.hparams;
        const auto & cparams = ctx->cparams;

        if (params.n_rows == 0) {
            return "n_rows = 0, expected at least 1";
        }
        if (const char * why = check_memory(model, ctx->memory.get())) {
            return why;
        }
        if (params.il_arena < 0 || params.il_arena >= (int32_t) hparams.n_layer()) {
            return keep("il_arena = " + std::to_string(params.il_arena) + " is not in [0, " + std::to_string(hparams.n_layer()) + ")");
        }
        if (cparams.embeddings || cparams.pooling_type != LLAMA_POOLING_TYPE_NONE || !cparams.causal_attn) {
            return "layer ranges need a causal context without embeddings and pooling";
        }
        if (cparams.pipeline_parallel) {
            // micro-batches that overlap would share the arena
            ctx->cparams.pipeline_parallel = false;
            ctx->sched_need_reserve = true;
        }

        // windows of each number of rows up to one for each sequence occur, at each cut
        if (params.n_graphs == 0) {
            params.n_graphs = std::max<uint32_t>(128, 4*cparams.n_seq_max);
        }
        if (params.max_bytes == 0) {
            const size_t for_rows = size_t(cparams.n_seq_max)*(2u << 20);
            params.max_bytes = std::min<size_t>(std::max<size_t>({ model.size()/4, 64u << 20, for_rows }), 1u << 30);
        }

        auto res = std::make_shared<llama_layer_ranges>(*ctx, params);

        if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(ctx->memory.get())) {
            res->caches = { iswa->get_base(), iswa->get_swa() };
        } else {
            res->caches = { static_cast<llama_kv_cache *>(ctx->memory.get()) };
        }

        ggml_init_params iparams = { ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
        res->ctx_hidden.reset(ggml_init(iparams));
        if (!res->ctx_hidden) {
            return "failed to create the context of the arena";
        }

        res->range.n_layer = res->n_layer;
        res->range.hidden  = ggml_new_tensor_2d(res->ctx_hidden.get(), GGML_TYPE_F32, hparams.n_embd, params.n_rows);
        ggml_set_name(res->range.hidden, "range_hidden");

        auto * buft = ggml_backend_dev_buffer_type(model.dev_layer(params.il_arena));
        res->buf_hidden.reset(ggml_backend_alloc_ctx_tensors_from_buft(res->ctx_hidden.get(), buft));
        if (!res->buf_hidden) {
            return keep("failed to allocate the arena of " + std::to_string(params.n_rows) + " rows");
        }

        res->rows    .resize(params.n_rows);
        res->row_used.resize(params.n_rows, 0);

        ctx->sched_reserve();

        // at first that of the stock graphs, see llama_layer_range_max_nodes()
        res->n_nodes = ctx->gf_res_reserve->get_max_nodes();
        const size_t n_nodes_dead = llama_layer_range_max_nodes(res.get(), res->n_nodes);
        res->buf_dead.resize(ggml_graph_overhead_custom(n_nodes_dead, false) + ggml_tensor_overhead());
        res->ctx_dead.reset(ggml_init({ res->buf_dead.size(), res->buf_dead.data(), /*.no_alloc =*/ true }));
        res->range.gf_dead = ggml_new_graph_custom(res->ctx_dead.get(), n_nodes_dead, false);

        if (const char * why = res->check_model()) {
            return why;
        }

        ctx->ranges = std::move(res);

        ctx->sched_need_reserve = true;
        ctx->sched_reserve();

        return nullptr;
    }

    // Builds the graphs of both sides of each cut, without memory for them.
    const char * check_model() {
        if (n_layer < 2) {
            return refuse(ctx.model, "it has less than two layers");
        }

        llm_graph_result res(n_nodes);

        auto mctx = ctx.memory->init_full();
        if (!mctx) {
            return refuse(ctx.model, "its memory cannot be inspected");
        }
        const uint32_t n_tokens = 2;
        llama_batch_allocr balloc(ctx.model.hparams.n_pos_per_embd());
        const auto ubatch = balloc.ubatch_reserve(n_tokens, 1);

        range.arena_rows = { 0, 1 };
        range.places.assign({ 0, 0 }, kv().get_n_stream());

        const auto n_outputs = ctx.n_outputs;
        ctx.n_outputs = n_tokens;

        auto build = [&](int32_t il_begin, int32_t il_end) {
            range.il_begin = il_begin;
            range.il_end   = il_end;

            ctx.range_cur = &range;
            res.reset();
            try {
                auto * gf = ctx.model.build_graph(ctx.graph_params(&res, ubatch, mctx.get(), LLM_GRAPH_TYPE_DEFAULT));
                ctx.range_cur = nullptr;
                return gf;
            } catch (...) {
                ctx.range_cur = nullptr;
                throw;
            }
        };

        std::string why;
        try {
            // Later sides first: a graph that stops early may have other shapes than its builder expects, where there are inputs
            // for each layer. Later layers that read such inputs are refused before.
            for (int32_t il = 1; il < n_layer && why.empty(); ++il) {
                auto * gf = build(il, n_layer);
                why = check_graph(res, gf, range.entered);
            }
            for (int32_t il = 1; il < n_layer && why.empty(); ++il) {
                auto * gf = build(0, il);
                why = check_graph(res, gf, range.left);
            }
            if (why.empty()) {
                kv_unlike = compare_layers(build(0, n_layer));
            }
        } catch (const std::exception & e) {
            why = e.what();
        }

        ctx.n_outputs = n_outputs;

        return why.empty() ? nullptr : refuse(ctx.model, why);
    }

    // what is wrong with one side of a cut, whose graph must have the node where hidden rows leave or enter
    std::string check_graph(const llm_graph_result & res, ggml_cgraph * gf, const ggml_tensor * end) const {
        bool cut = false;

        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            const auto * node = ggml_graph_node(gf, i);
            cut = cut || node == end;
            if (range.il_begin == 0) {
                continue;
            }
            for (const auto * src : node->src) {
                if (src && (src == res.t_inp_tokens || src == res.t_inp_embd || src == range.dead[0])) {
                    return "later layers read the token embeddings";
                }
                if (src && std::find(range.dead.begin(), range.dead.end(), src) != range.dead.end()) {
                    return "later layers read more of earlier ones than the hidden rows";
                }
            }
        }

        return cut ? "" : "its graph does not name where layers end";
    }

    // what makes the K and V of the layers of this graph differ in form
    std::string compare_layers(ggml_cgraph * gf) const {
        const auto & hparams = ctx.model.hparams;

        for (int32_t il = 1; il < n_layer; ++il) {
            if (hparams.is_swa(il) != hparams.is_swa(0)) {
                return "some layers have a sliding window and others have none";
            }
            if (hparams.n_embd_k_gqa(il) != hparams.n_embd_k_gqa(0) || hparams.n_embd_v_gqa(il) != hparams.n_embd_v_gqa(0)) {
                return "layers have K and V of different sizes";
            }
        }
        if (caches.size() > 1 && hparams.is_swa(0)) {
            return "all layers have a sliding window"; // llama_layer_range_cells() are those of the other cache
        }

        // the rotations that come before a layer's K is stored
        std::vector<const ggml_tensor *> first, cur;
        for (int i = 0, il = 0; i < ggml_graph_n_nodes(gf) && il < n_layer; ++i) {
            const auto * node = ggml_graph_node(gf, i);
            if (node->op == GGML_OP_ROPE) {
                cur.push_back(node);
            }
            if (node->op != GGML_OP_SET_ROWS || node->view_src != kv_of_layer(il).get_k_storage(il)) {
                continue;
            }
            if (il++ == 0) {
                first = cur;
            }
            const bool same = std::equal(first.begin(), first.end(), cur.begin(), cur.end(), [](const auto * a, const auto * b) {
                return memcmp(a->op_params, b->op_params, sizeof(a->op_params)) == 0;
            });
            if (!same) {
                return "layers encode positions in different ways";
            }
            cur.clear();
        }

        return "";
    }

    // false: the batch and the arena rows do not fit together
    bool check(const llama_batch_ext & batch, int32_t il_begin, int32_t il_end, const int32_t * arena) {
        if (il_begin < 0 || il_begin >= il_end || il_end > n_layer) {
            LLAMA_LOG_ERROR("layer range: [%d, %d) is not a range of %d layers\n", il_begin, il_end, n_layer);
            return false;
        }
        if (batch.tokens.empty() || batch.tokens.size() > ctx.cparams.n_ubatch) {
            LLAMA_LOG_ERROR("layer range: n_tokens = %zu is not in [1, n_ubatch = %u]\n", batch.tokens.size(), ctx.cparams.n_ubatch);
            return false;
        }

        n_calls++;

        for (size_t i = 0; i < batch.tokens.size(); ++i) {
            const auto & tok = batch.tokens[i];

            if (arena[i] < 0 || arena[i] >= (int32_t) params.n_rows || row_used[arena[i]] == n_calls) {
                LLAMA_LOG_ERROR("layer range: rows[%zu] = %d is not in [0, %u) or not distinct\n", i, arena[i], params.n_rows);
                return false;
            }
            row_used[arena[i]] = n_calls;

            if (tok.seq_ids.size() != 1 || tok.id == LLAMA_TOKEN_NULL) {
                LLAMA_LOG_ERROR("layer range: token %zu must be a text token of one sequence\n", i);
                return false;
            }
            const auto seq = *tok.seq_ids.begin();
            if (seq < 0 || seq >= (llama_seq_id) kv().get_n_seq_max()) {
                LLAMA_LOG_ERROR("layer range: sequence %d of token %zu is not in [0, %u)\n", seq, i, kv().get_n_seq_max());
                return false;
            }
            if (il_begin > 0 && !holds_row(arena[i], seq, tok.pos[0], il_begin)) {
                LLAMA_LOG_ERROR("layer range: arena row %d does not hold the row of sequence %d, position %d at layer %d\n",
                        arena[i], seq, tok.pos[0], il_begin);
                return false;
            }
        }

        return true;
    }

    std::vector<llama_seq_id> misfits(const llama_batch_ext & batch, int32_t il_begin, const int32_t * arena) {
        std::vector<llama_seq_id> res;
        std::map<llama_seq_id, llama_pos> next; // of each sequence in the batch

        for (size_t i = 0; i < batch.tokens.size(); ++i) {
            const auto & tok = batch.tokens[i];
            if (tok.seq_ids.size() != 1 || *tok.seq_ids.begin() < 0 || *tok.seq_ids.begin() >= (llama_seq_id) kv().get_n_seq_max()) {
                return {};
            }
            const auto seq = *tok.seq_ids.begin();
            const auto pos = tok.pos[0];

            if (il_begin > 0) {
                if (!holds_row(arena[i], seq, pos, il_begin)) {
                    res.push_back(seq);
                }
                continue;
            }
            const auto begin = next.try_emplace(seq, kv().seq_pos_max(seq) + 1).first;
            if (pos != begin->second && !find_cells(seq, pos, 0, arena[i])) {
                res.push_back(seq);
            }
            begin->second = pos + 1;
        }

        return res;
    }

    bool holds_row(int32_t i, llama_seq_id seq, llama_pos pos, int32_t il) const {
        if (i < 0 || i >= (int32_t) params.n_rows) {
            return false;
        }
        const auto & row = rows[i];
        return row.il == il && row.seq == seq && row.pos == pos && holds(row);
    }

    // where a token that is about to run has its cells: deep ranges find them by arena row, first ones take what a rollback left
    const arena_row * find_cells(llama_seq_id seq, llama_pos pos, int32_t il_begin, int32_t row) const {
        if (il_begin > 0) {
            return &rows[row];
        }

        for (const auto & s : spare) {
            // the sequence may have been changed since
            if (s.seq == seq && s.pos == pos && holds(s)) {
                return &s;
            }
        }

        return nullptr;
    }

    bool holds(const arena_row & row) const {
        for (size_t c = 0; c < caches.size(); ++c) {
            const auto & all = caches[c]->get_cells(row.seq);

            if (all.is_empty(row.cell[c]) || all.pos_get(row.cell[c]) != row.pos || !all.seq_has(row.cell[c], row.seq)) {
                return false;
            }
        }

        return true;
    }

    void rollback(llama_seq_id seq, llama_pos pos) {
        // the arena's rows know where their tokens lie, which spares a search through the memory
        for (auto & row : rows) {
            if (row.seq != seq || row.pos < pos || !holds(row)) {
                continue;
            }
            const bool known = std::any_of(spare.begin(), spare.end(), [&](const auto & s) { return s.cell[0] == row.cell[0] && s.seq == seq; });
            if (!known) {
                spare.push_back(row);
            }
            row.il = -1;
        }
    }

    // What a sliding window no longer shows to a sequence's next token, it may still show to rows that have layers left to pass.
    void find_pos_min() {
        pos_min.assign(kv().get_n_seq_max(), std::numeric_limits<llama_pos>::max());
        if (caches.size() == 1) {
            return;
        }
        for (const auto & row : rows) {
            if (row.il >= 0 && row.pos < pos_min[row.seq] && holds(row)) {
                pos_min[row.seq] = row.pos;
            }
        }
    }

    // A sequence that has a new token at a position has nothing else from there on.
    void void_rows(const llama_ubatch & ubatch) {
        pos_min.assign(kv().get_n_seq_max(), std::numeric_limits<llama_pos>::max());
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            auto & p = pos_min[ubatch.seq_id[i][0]];
            p = std::min(p, ubatch.pos[i]);
        }
        for (auto & row : rows) {
            if (row.il >= 0 && row.pos >= pos_min[row.seq]) {
                row.il = -1;
            }
        }
    }

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc) {
        balloc.split_reset();

        std::vector<llama_ubatch> ubatches;
        ubatches.push_back(balloc.split_simple(ctx.cparams.n_ubatch));

        const bool placed = range.il_begin > 0;

        std::vector<llama_kv_cache::slot_info_vec_t> sinfos;
        if (balloc.get_n_used() == balloc.get_n_tokens() && cells[0].size() == balloc.get_n_tokens()) {
            find_pos_min();
            for (size_t c = 0; c < caches.size(); ++c) {
                auto sinfo = caches[c]->find_row_slots(ubatches[0], cells[c], pos_min);
                if (sinfo.empty()) {
                    break;
                }
                sinfo.placed = placed;
                sinfo.places = &range.places;
                sinfos.push_back({ std::move(sinfo) });
            }
        }
        if (sinfos.size() < caches.size()) {
            return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }

        for (size_t c = 0; c < caches.size() && !placed; ++c) {
            caches[c]->free_row_slots(sinfos[c][0], cells[c]);
        }

        if (caches.size() == 1) {
            return std::make_unique<llama_kv_cache_context>(caches[0], std::move(sinfos[0]), std::move(ubatches));
        }
        return std::make_unique<llama_kv_cache_iswa_context>(static_cast<llama_kv_cache_iswa *>(ctx.memory.get()),
                std::move(sinfos[0]), std::move(sinfos[1]), std::move(ubatches));
    }

    // notes the cells of the micro-batch that has just been computed
    void record(const llama_memory_context_i & mctx) {
        const auto & ubatch = mctx.get_ubatch();

        const llama_kv_cache_context * mctxs[2] = { nullptr, nullptr };
        if (caches.size() > 1) {
            const auto & iswa = static_cast<const llama_kv_cache_iswa_context &>(mctx);
            mctxs[0] = iswa.get_base();
            mctxs[1] = iswa.get_swa();
        } else {
            mctxs[0] = static_cast<const llama_kv_cache_context *>(&mctx);
        }

        if (range.il_begin == 0) {
            void_rows(ubatch);
        }

        cells_all.resize(ubatch.n_tokens);
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            arena_row row = { ubatch.seq_id[i][0], ubatch.pos[i], range.is_last() ? -1 : range.il_end, {} };
            for (size_t c = 0; c < caches.size(); ++c) {
                row.cell[c] = mctxs[c]->get_sinfo().idxs[i][0];
            }
            cells_all[i] = mctxs[0]->get_sinfo().strm[i]*kv().get_size() + row.cell[0];
            rows[range.arena_rows[i]] = row;
        }
    }

    //
    // graphs
    //

    size_t bytes() const {
        size_t res = 0;
        for (const auto & g : graphs) {
            res += g->bytes;
        }
        return res;
    }

    // nullptr: the batch runs in the context's own scheduler, and its graph is not kept
    kept_graph * get_graph(uint32_t n_tokens, uint32_t n_outputs) {
        if (n_tokens > params.n_rows_graph || range.places.groups.size() > 1) {
            return nullptr;
        }

        for (auto & g : graphs) {
            if (g->il_begin == range.il_begin && g->il_end == range.il_end && g->n_tokens == n_tokens && g->n_outputs == n_outputs &&
                    g->project == range.project && g->places.same_layout(range.places)) {
                g->t_last_used = n_calls;
                return g.get();
            }
        }

        auto g = std::make_unique<kept_graph>();

        g->il_begin    = range.il_begin;
        g->il_end      = range.il_end;
        g->n_tokens    = n_tokens;
        g->n_outputs   = n_outputs;
        g->project     = range.project;
        g->t_last_used = n_calls;
        g->places      = range.places;
        g->sched.reset(ggml_backend_sched_new(ctx.backend_ptrs.data(), ctx.backend_buft.data(), ctx.backend_ptrs.size(),
                    n_nodes, false, ctx.cparams.op_offload));
        g->gf_res_prev[n_outputs > 0].reset(new llm_graph_result(n_nodes));

        graphs.push_back(std::move(g));

        return graphs.back().get();
    }

    void add_memory(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
        res[ggml_backend_buffer_get_type(buf_hidden.get())] += ggml_backend_buffer_get_size(buf_hidden.get());
        if (exits) {
            res[ggml_backend_buffer_get_type(exits->buf.get())] += ggml_backend_buffer_get_size(exits->buf.get());
        }

        for (const auto & g : graphs) {
            for (auto * b : ctx.backend_ptrs) {
                if (g->sched) {
                    res[ggml_backend_sched_get_buffer_type(g->sched.get(), b)] += ggml_backend_sched_get_buffer_size(g->sched.get(), b);
                }
            }
        }
    }

    void drop_logits() {
        logits         = nullptr;
        logits_backend = nullptr;
        logits_graph   = nullptr;
    }

    void evict(size_t i) {
        if (graphs[i].get() == logits_graph) {
            drop_logits();
        }
        graphs.erase(graphs.begin() + i);
        n_evicted++;
    }

    // down to the bounds; the current graph stays
    void trim(size_t max_graphs, size_t max_bytes) {
        while (graphs.size() > max_graphs || bytes() > max_bytes) {
            size_t oldest = graphs.size();
            for (size_t i = 0; i < graphs.size(); ++i) {
                if (graphs[i].get() != current && (oldest == graphs.size() || graphs[i]->t_last_used < graphs[oldest]->t_last_used)) {
                    oldest = i;
                }
            }
            if (oldest == graphs.size()) {
                return;
            }
            evict(oldest);
        }
    }

    void reset() {
        drop_logits();
        graphs.clear();
    }

    //
    // decode
    //

    bool fetch_logits(int32_t first, int32_t n) {
        const auto & ids = ctx.output_ids;
        if (!logits || first < 0 || n < 1 || first + n > (int32_t) ids.size() || ids[first] < 0 || ids[first + n - 1] != ids[first] + n - 1 ||
                ids[first + n - 1] >= logits->ne[1]) {
            LLAMA_LOG_ERROR("layer range: the last one has no logits of tokens [%d, %d)\n", first, first + n);
            return false;
        }
        const int64_t row = ids[first];
        if (logits == range.exit_logits) {
            fetch_exit_logits(row, n);
        } else {
            ggml_backend_tensor_get_async(logits_backend, logits, ctx.logits.data + row*logits->ne[0], row*logits->nb[1], n*logits->nb[1]);
        }

        return true;
    }

    bool edit_logits(llama_token token, int32_t first, int32_t n, float * values, bool write) {
        if (!logits || token < 0 || token >= (llama_token) ctx.model.vocab.n_tokens() || first < 0 || n < 1 || first + n > logits->ne[1]) {
            LLAMA_LOG_ERROR("layer range: the last one has no logits of token %d in rows [%d, %d)\n", token, first, first + n);
            return false;
        }
        const int32_t column = logits == range.exit_logits ? exits->find_token(token) : token;
        if (column < 0) {
            if (!write) {
                std::fill_n(values, n, -INFINITY);
            }
            return true;
        }
        const size_t offset = first*logits->nb[1] + column*sizeof(float);
        if (write) {
            ggml_backend_tensor_set_2d_async(logits_backend, logits, values, offset, sizeof(float), n, logits->nb[1], sizeof(float));
        } else {
            ggml_backend_tensor_get_2d_async(logits_backend, logits, values, offset, sizeof(float), n, logits->nb[1], sizeof(float));
        }

        return true;
    }

    // Spreads the logits over rows of all tokens. A token that the exit's head has not gets -infinity.
    void fetch_exit_logits(int64_t row, int64_t n) {
        const int64_t n_vocab = ctx.model.vocab.n_tokens();
        const auto &  tokens  = exits->tokens;

        exit_rows.resize(n*tokens.size());
        ggml_backend_synchronize(logits_backend);
        ggml_backend_tensor_get(logits, exit_rows.data(), row*logits->nb[1], n*logits->nb[1]);

        for (int64_t i = 0; i < n; ++i) {
            float * to = ctx.logits.data + (row + i)*n_vocab;
            std::fill(to, to + n_vocab, -INFINITY);
            for (size_t k = 0; k < tokens.size(); ++k) {
                to[tokens[k]] = exit_rows[i*tokens.size() + k];
            }
        }
    }

    ggml_backend_t backend() const {
        auto * dev = ctx.model.dev_output();

        auto is_there = [&](const ggml_tensor * t) {
            return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU ?
                ggml_backend_buffer_is_host(t->buffer) :
                ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer)) == dev;
        };

        bool one = is_there(range.hidden);
        for (int32_t il = 0; il < n_layer; ++il) {
            one = one && ctx.model.dev_layer(il) == dev && is_there(kv_of_layer(il).get_k_storage(il)) && is_there(kv_of_layer(il).get_v_storage(il));
        }

        for (auto * backend : ctx.backend_ptrs) {
            if (one && ggml_backend_get_device(backend) == dev) {
                return backend;
            }
        }

        return nullptr;
    }

    // exchanges what decode() of the context works with, and back
    void swap_with(kept_graph & g) {
        std::swap(ctx.sched,              g.sched);
        std::swap(ctx.gf_res_prev,        g.gf_res_prev);
        std::swap(ctx.gf_res_prev_active, g.gf_res_prev_active);
    }

    int32_t decode(llama_batch_ext & batch, int32_t il_begin, int32_t il_end, const int32_t * arena, bool project) {
        if (!check(batch, il_begin, il_end, arena)) {
            return -1;
        }

        // what would reset the context's own graphs resets ours too, and must not happen while they are exchanged
        ctx.sched_reserve();
        ctx.memory_update(false);

        drop_logits();

        const size_t n_tokens  = batch.tokens.size();
        uint32_t     n_outputs = 0;

        range.il_begin = il_begin;
        range.il_end   = il_end;
        range.project  = project;
        range.arena_rows.assign(arena, arena + n_tokens);

        auto * batch_mem = batch.mem;

        cells[0].clear();
        cells[1].clear();
        streams .clear();
        for (size_t i = 0; i < n_tokens; ++i) {
            const auto & tok = batch.tokens[i];
            const auto   seq = *tok.seq_ids.begin();

            n_outputs += tok.output;
            const auto * found = find_cells(seq, tok.pos[0], il_begin, arena[i]);

            streams.push_back(kv().get_stream(seq));
            for (size_t c = 0; c < caches.size(); ++c) {
                cells[c].push_back(found ? found->cell[c] : UINT32_MAX);
            }
            if (found) {
                batch.mem = nullptr; // the positions are in the memory already
            }
        }
        range.places.assign(streams, kv().get_n_stream());

        auto * graph = get_graph(n_tokens, n_outputs);

        ctx.range_cur = &range;
        current       = graph;
        if (graph) {
            swap_with(*graph);
        } else {
            ctx.gf_res_prev_active = nullptr; // it does not know of ranges
        }

        range.exit_logits = nullptr;

        const auto n_reused_prev = ctx.n_reused;
        const int  ret           = ctx.decode(batch);
        const bool reused        = ctx.n_reused > n_reused_prev;

        if (ret == 0) {
            (reused ? n_reused : n_built)++;

            // spare cells that are in use again
            if (il_begin == 0 && !spare.empty()) {
                spare.erase(std::remove_if(spare.begin(), spare.end(), [&](const auto & s) {
                    const auto offs = kv().get_stream(s.seq)*kv().get_size();
                    return !holds(s) || std::find(cells_all.begin(), cells_all.end(), offs + s.cell[0]) != cells_all.end();
                }), spare.end());
            }
            if (!project && n_outputs > 0) {
                logits         = range.exit_logits ? range.exit_logits : ctx.gf_res_prev_active->get_logits();
                logits_backend = logits ? ggml_backend_sched_get_tensor_backend(ctx.sched.get(), logits) : nullptr;
                logits_graph   = graph;
            }
        } else {
            for (size_t i = 0; i < n_tokens; ++i) {
                rows[arena[i]] = {};
            }
        }

        if (graph) {
            if (ret == 0 && !reused) {
                graph->bytes = 0;
                for (auto * b : ctx.backend_ptrs) {
                    graph->bytes += ggml_backend_sched_get_buffer_size(ctx.sched.get(), b);
                }
                graph->bytes += ggml_tensor_overhead()*n_nodes + 2*ggml_graph_overhead_custom(n_nodes, false);
            }
            swap_with(*graph);
            trim(params.n_graphs, params.max_bytes);
        } else {
            ctx.gf_res_prev_active = nullptr;
        }
        current       = nullptr;
        ctx.range_cur = nullptr;
        batch.mem     = batch_mem;

        return ret;
    }
};

llama_memory_context_ptr llama_layer_range_init_batch(llama_layer_ranges & ranges, llama_batch_allocr & balloc) {
    return ranges.init_batch(balloc);
}

void llama_layer_range_record(llama_layer_ranges & ranges, const llama_memory_context_i & mctx) {
    ranges.record(mctx);
}

// A batch of several prompts has an attention operation for each. The context's own scheduler runs such batches.
size_t llama_layer_range_max_nodes(const llama_layer_ranges * ranges, size_t n_nodes) {
    return ranges ? 4*n_nodes : n_nodes;
}

void llama_layer_range_reset(llama_layer_ranges & ranges) {
    ranges.reset();
}

bool llama_layer_range_make_room(llama_layer_ranges & ranges) {
    const auto n = ranges.graphs.size();
    ranges.trim(0, 0);
    return ranges.graphs.size() < n;
}

void llama_layer_range_memory(const llama_layer_ranges & ranges, std::map<ggml_backend_buffer_type_t, size_t> & bytes) {
    ranges.add_memory(bytes);
}

//
// interface
//

const char * llama_layer_range_init(llama_context * ctx, llama_layer_range_params params) {
    return llama_layer_ranges::init(ctx, params);
}

int32_t llama_layer_range_decode(llama_context * ctx, llama_batch_ext * batch, int32_t il_begin, int32_t il_end, const int32_t * rows) {
    auto * ranges = llama_layer_ranges::get(ctx);
    if (!ranges) {
        LLAMA_LOG_ERROR("%s: llama_layer_range_init() has not been called\n", __func__);
        return -1;
    }
    return ranges->decode(*batch, il_begin, il_end, rows, false);
}

int32_t llama_layer_range_project(llama_context * ctx, llama_batch_ext * batch, int32_t il_begin, const int32_t * rows) {
    auto * ranges = llama_layer_ranges::get(ctx);
    if (!ranges || il_begin == 0) {
        LLAMA_LOG_ERROR("%s: llama_layer_range_init() has not been called, or il_begin is 0\n", __func__);
        return -1;
    }
    return ranges->decode(*batch, il_begin, ranges->n_layer, rows, true);
}

std::vector<llama_seq_id> llama_layer_range_misfits(llama_context * ctx, llama_batch_ext * batch, int32_t il_begin, const int32_t * rows) {
    auto * ranges = llama_layer_ranges::get(ctx);
    return ranges ? ranges->misfits(*batch, il_begin, rows) : std::vector<llama_seq_id>();
}

void llama_layer_range_rollback(llama_context * ctx, llama_seq_id seq, llama_pos pos) {
    auto * ranges = llama_layer_ranges::get(ctx);
    if (ranges) {
        ranges->rollback(seq, pos);
    }
}

const uint32_t * llama_layer_range_cells(const llama_context * ctx) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    return ranges ? ranges->cells_all.data() : nullptr;
}

ggml_tensor * llama_layer_range_logits(const llama_context * ctx) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    return ranges ? ranges->logits : nullptr;
}

bool llama_layer_range_edit_logits(llama_context * ctx, llama_token token, int32_t first, int32_t n, float * values, bool write) {
    auto * ranges = llama_layer_ranges::get(ctx);
    return ranges && ranges->edit_logits(token, first, n, values, write);
}

bool llama_layer_range_fetch_logits(llama_context * ctx, int32_t first, int32_t n) {
    auto * ranges = llama_layer_ranges::get(ctx);
    return ranges && ranges->fetch_logits(first, n);
}

ggml_backend_t llama_layer_range_backend(const llama_context * ctx) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    return ranges ? ranges->backend() : nullptr;
}

void * llama_layer_range_stream(const llama_context * ctx) {
    auto * backend = llama_layer_range_backend(ctx);
    if (!backend) {
        return nullptr;
    }

    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto * get = (void * (*)(ggml_backend_t)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_stream");

    return get ? get(backend) : nullptr;
}

void llama_layer_range_set_exits(llama_context & ctx, std::shared_ptr<llama_layer_exits> exits) {
    auto * ranges = llama_layer_ranges::get(&ctx);
    if (!ranges) {
        throw std::runtime_error("llama_layer_range_init() has not been called");
    }
    ctx.synchronize(); // a kept graph may be under way
    ranges->reset();
    ranges->range.exits = exits.get();
    ranges->exits       = std::move(exits);
}

const llama_layer_exits * llama_layer_range_exits(const llama_context & ctx) {
    const auto * ranges = llama_layer_ranges::get(&ctx);
    return ranges ? ranges->exits.get() : nullptr;
}

ggml_tensor * llama_layer_range_hidden(const llama_context * ctx) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    return ranges ? ranges->range.hidden : nullptr;
}

bool llama_layer_range_get_kv(const llama_context * ctx, int32_t il, llama_layer_range_kv * out) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    if (!ranges || il < 0 || il >= ranges->n_layer) {
        return false;
    }

    const auto & kv = ranges->kv_of_layer(il);

    *out = { kv.get_k_storage(il), kv.get_v_storage(il), kv.get_v_trans(), kv.get_size()*kv.get_n_stream(), kv.get_n_stream() };

    return true;
}

const char * llama_layer_range_kv_unlike(const llama_context * ctx) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    return !ranges || ranges->kv_unlike.empty() ? nullptr : ranges->kv_unlike.c_str();
}

llama_layer_range_perf_data llama_layer_range_perf(const llama_context * ctx) {
    const auto * ranges = llama_layer_ranges::get(ctx);
    if (!ranges) {
        return {};
    }
    return { ranges->n_built, ranges->n_reused, ranges->n_evicted, ranges->graphs.size(), ranges->bytes() };
}
