// SPDX-License-Identifier: Apache-2.0

#pragma GCC visibility push(default)
#include "drex_llama.h"
#pragma GCC visibility pop

#include "drex-exits.h"
#include "llama-layer-range.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

// What llama.cpp said while a model was loaded; each thread loads its own.
thread_local std::string log_errors;

void log_line(ggml_log_level level, const char * text, void *) {
    static thread_local bool show = false;
    if (level != GGML_LOG_LEVEL_CONT) {
        show = level >= GGML_LOG_LEVEL_WARN;
    }
    if (!show) {
        return;
    }
    fputs(text, stderr);
    if (level >= GGML_LOG_LEVEL_ERROR && log_errors.size() < 1000) {
        log_errors += text;
    }
}

int type_from_name(const char * name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char * known = ggml_type_name(ggml_type(type));
        if (known && strcmp(known, name) == 0) {
            return type;
        }
    }
    return -1;
}

struct metadata {
    std::vector<uint32_t> layers;
    std::string           head = "shared";
};

// throws std::string
metadata read_metadata(const char * path) {
    gguf_context * gguf = gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr });
    if (!gguf) {
        throw std::string("not a GGUF file");
    }
    metadata out;
    const int64_t arch = gguf_find_key(gguf, "general.architecture");
    if (arch >= 0 && gguf_get_kv_type(gguf, arch) == GGUF_TYPE_STRING) {
        const std::string prefix = std::string(gguf_get_val_str(gguf, arch)) + ".early_exit.";
        const int64_t layers = gguf_find_key(gguf, (prefix + "layers").c_str());
        if (layers >= 0 && gguf_get_kv_type(gguf, layers) == GGUF_TYPE_ARRAY) {
            const gguf_type type = gguf_get_arr_type(gguf, layers);
            if (type == GGUF_TYPE_INT32 || type == GGUF_TYPE_UINT32) {
                const uint32_t * data = static_cast<const uint32_t *>(gguf_get_arr_data(gguf, layers));
                out.layers.assign(data, data + gguf_get_arr_n(gguf, layers));
            }
        }
        const int64_t head = gguf_find_key(gguf, (prefix + "head").c_str());
        if (head >= 0 && gguf_get_kv_type(gguf, head) == GGUF_TYPE_STRING) {
            out.head = gguf_get_val_str(gguf, head);
        }
    }
    gguf_free(gguf);
    return out;
}

} // namespace

struct drex_llama {
    llama_model     * model = nullptr;
    llama_context   * ctx   = nullptr;
    llama_batch_ext * batch = nullptr;
    const llama_vocab * vocab = nullptr;
    metadata          meta;
    std::string       path;
    std::unique_ptr<common_drex_exits> exits; // nullptr: rows exit through the model's own head
    uint32_t          n_context = 0;
    void            * stream    = nullptr; // of the GPU, on a CPU there is none

    std::vector<int32_t> outputs; // of each row of the last window: its place among the outputs, -1 where it is none

    ~drex_llama() {
        if (batch) {
            llama_batch_ext_free(batch);
        }
        if (ctx) {
            llama_free(ctx);
        }
        if (model) {
            llama_model_free(model);
        }
    }
};

struct drex_llama_sampler {
    llama_sampler * chain = nullptr;
    std::vector<llama_token_data> candidates;

    ~drex_llama_sampler() {
        if (chain) {
            llama_sampler_free(chain);
        }
    }
};

// false when a row is refused
static bool fill(drex_llama * l, const int32_t * tokens, const int32_t * positions, const int32_t * sequences,
                 const uint8_t * outputs, int32_t n) {
    l->outputs.clear();
    llama_batch_ext_clear(l->batch);
    int32_t n_outputs = 0;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t at = llama_batch_ext_add_token(l->batch, sequences[i], tokens ? tokens[i] : 0);
        if (at < 0) {
            return false;
        }
        llama_batch_ext_set_pos(l->batch, at, &positions[i]);
        const bool output = outputs && outputs[i] != 0;
        llama_batch_ext_set_output_logits(l->batch, at, output);
        l->outputs.push_back(output ? n_outputs++ : -1);
    }
    return true;
}

// Exceptions of llama.cpp become the number that stands for a failed computation.
template <typename F> static int32_t guarded(F f) {
    try {
        return f();
    } catch (const std::exception & e) {
        fprintf(stderr, "drex: %s\n", e.what());
        return -3;
    } catch (...) {
        return -3;
    }
}

extern "C" {

uint32_t drex_llama_version(void) { return DREX_LLAMA_VERSION; }

int32_t drex_llama_has_gpu(void) { return llama_supports_gpu_offload(); }

drex_llama * drex_llama_open(const drex_llama_params * p, char * error, size_t n_error) {
    static std::once_flag once;
    drex_llama * l = nullptr;
    try {
        std::call_once(once, [] {
            llama_backend_init();
            llama_log_set(log_line, nullptr);
        });
        const int type = type_from_name(p->kv_type);
        if (type < 0) {
            throw std::string("kv_type ") + p->kv_type + " is not known";
        }
        log_errors.clear();
        const auto said = [](const char * what) {
            return log_errors.empty() ? std::string(what) : what + (": " + log_errors);
        };
        l = new drex_llama;
        l->path = p->model;
        l->meta = read_metadata(p->model);

        llama_model_params mp = llama_model_default_params();
        ggml_backend_dev_t no_devices[] = { nullptr };
        if (p->n_gpu_layers > 0) {
            // one GPU: drex works where the layers are
            mp.n_gpu_layers = p->n_gpu_layers;
            mp.split_mode   = LLAMA_SPLIT_MODE_NONE;
            mp.main_gpu     = p->main_gpu;
        } else {
            mp.n_gpu_layers = 0;
            mp.devices      = no_devices;
        }
        l->model = llama_model_load_from_file(p->model, mp);
        if (!l->model) {
            throw said("llama.cpp cannot load it");
        }
        l->vocab = llama_model_get_vocab(l->model);
        l->n_context = std::min<uint32_t>(p->n_ctx, llama_model_n_ctx_train(l->model));

        llama_context_params cp = llama_context_default_params();
        cp.n_ctx           = l->n_context*p->n_seq;
        cp.n_seq_max       = p->n_seq;
        cp.n_batch         = p->n_batch;
        cp.n_ubatch        = p->n_batch;
        cp.n_outputs_max   = p->n_outputs;
        cp.n_threads       = p->n_threads;
        cp.n_threads_batch = p->n_threads;
        cp.type_k          = ggml_type(type);
        cp.type_v          = ggml_type(type);
        cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        cp.kv_unified      = false; // a row attends over its own sequence's cells only
        l->ctx = llama_init_from_model(l->model, cp);
        if (!l->ctx) {
            throw said("llama.cpp cannot make a context");
        }
        l->batch = llama_batch_ext_init(l->ctx);
        return l;
    } catch (const std::string & e) {
        snprintf(error, n_error, "%s", e.c_str());
    } catch (const std::exception & e) {
        snprintf(error, n_error, "%s", e.what());
    } catch (...) {
        snprintf(error, n_error, "unknown exception");
    }
    delete l;
    return nullptr;
}

void drex_llama_close(drex_llama * l) { delete l; }

int32_t  drex_llama_n_layer(const drex_llama * l)     { return llama_model_n_layer(l->model); }
int32_t  drex_llama_n_vocab(const drex_llama * l)     { return llama_vocab_n_tokens(l->vocab); }
uint32_t drex_llama_n_context(const drex_llama * l)   { return l->n_context; }
int32_t  drex_llama_bos(const drex_llama * l)         { return std::max(llama_vocab_bos(l->vocab), 0); }

size_t drex_llama_exit_layers(const drex_llama * l, uint32_t * layers, size_t n) {
    const auto & from = l->exits ? l->exits->layers() : l->meta.layers;
    std::copy_n(from.begin(), std::min(n, from.size()), layers);
    return from.size();
}
const char * drex_llama_exit_head(const drex_llama * l) { return l->exits ? "shared" : l->meta.head.c_str(); }

const char * drex_llama_windows(drex_llama * l, uint32_t n_rows, uint32_t n_graphs, uint32_t n_rows_graph) {
    try {
        return llama_layer_range_init(l->ctx, { n_rows, n_graphs, n_rows_graph, 0, 0 });
    } catch (...) {
        return "no memory for the hidden arena";
    }
}

int32_t drex_llama_slides(const drex_llama * l) { return llama_model_n_swa(l->model) > 0; }

const char * drex_llama_no_copy(drex_llama * l) { return llama_layer_range_kv_unlike(l->ctx); }

const char * drex_llama_exits(drex_llama * l, const char * path, const uint32_t * layers, size_t n) {
    static thread_local std::string why;
    try {
        const common_drex_exits::options names = { "parameters: exits", "parameters: exit_layers" };
        auto exits = std::make_unique<common_drex_exits>(names, path, std::vector<uint32_t>(layers, layers + n));
        exits->load(l->ctx, l->path);
        l->exits = std::move(exits);
        return nullptr;
    } catch (const std::exception & e) {
        why = e.what();
        return why.c_str();
    } catch (...) {
        return "parameters: exits: no memory for them";
    }
}

const char * drex_llama_device(drex_llama * l, int32_t * cuda, void ** stream) {
    *cuda   = 0;
    *stream = nullptr;
    try {
        ggml_backend_t backend = llama_layer_range_backend(l->ctx);
        if (!backend) {
            return "the layers, the KV cache and the output head are not all on one device, which early exit needs: "
                   "gpu_layers must be 0 or all";
        }
        ggml_backend_dev_t dev = ggml_backend_get_device(backend);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            return nullptr;
        }
        // the device's context is current on this thread from here on
        l->stream = llama_layer_range_stream(l->ctx);
        if (!l->stream || strncmp(ggml_backend_dev_name(dev), "CUDA", 4) != 0) {
            return "early exit works on CPUs and with CUDA, but the model is on another device: gpu_layers must be 0, or "
                   "llama.cpp built with CUDA";
        }
        *cuda   = 1;
        *stream = l->stream;
        return nullptr;
    } catch (...) {
        return "the device's stream is not to be had";
    }
}

int32_t drex_llama_layer(const drex_llama * l, int32_t layer, drex_kv_layer * out) {
    llama_layer_range_kv kv;
    if (!llama_layer_range_get_kv(l->ctx, layer, &kv) || kv.v_trans) { // V is transposed without flash attention only
        return 0;
    }
    *out = DREX_KV_LAYER_INITIALIZER;
    out->n_cells       = kv.n_cells;
    out->k             = kv.k->data;
    out->k_row_bytes   = ggml_row_size(kv.k->type, kv.k->ne[0]);
    out->k_cell_stride = kv.k->nb[1];
    out->v             = kv.v->data;
    out->v_row_bytes   = ggml_row_size(kv.v->type, kv.v->ne[0]);
    out->v_cell_stride = kv.v->nb[1];
    return 1;
}

int32_t drex_llama_tokenize(const drex_llama * l, const char * text, int32_t length, int32_t special, int32_t * tokens,
                            int32_t n) {
    try {
        return llama_tokenize(l->vocab, text, length, tokens, n, special != 0, special != 0);
    } catch (...) {
        return INT32_MIN;
    }
}
int32_t drex_llama_piece(const drex_llama * l, int32_t token, int32_t special, char * text, int32_t n) {
    return llama_token_to_piece(l->vocab, token, text, n, 0, special != 0);
}
size_t drex_llama_longest(const drex_llama * l) {
    size_t longest = 1;
    for (llama_token token = 0; token < llama_vocab_n_tokens(l->vocab); ++token) {
        longest = std::max(longest, strlen(llama_vocab_get_text(l->vocab, token)));
    }
    return longest;
}
int32_t drex_llama_is_end(const drex_llama * l, int32_t token) { return llama_vocab_is_eog(l->vocab, token); }

int32_t drex_llama_window(drex_llama * l, const int32_t * tokens, const int32_t * positions, const int32_t * sequences,
                          const int32_t * slots, const uint8_t * outputs, int32_t n, int32_t begin, int32_t end) {
    return guarded([&] {
        if (!fill(l, tokens, positions, sequences, outputs, n)) {
            return -1;
        }
        const int32_t ret = llama_layer_range_decode(l->ctx, l->batch, begin, end, slots);
        // what drex scores on a device's stream needs no wait
        const bool scored = end < llama_model_n_layer(l->model) && std::count(outputs, outputs + n, 0) < n;
        if (ret == 0 && (!l->stream || !scored)) {
            llama_synchronize(l->ctx);
        }
        return ret;
    });
}

int32_t drex_llama_project(drex_llama * l, const int32_t * positions, const int32_t * sequences, const int32_t * slots,
                           int32_t n, int32_t begin) {
    return guarded([&] {
        if (!fill(l, nullptr, positions, sequences, nullptr, n)) {
            return -1;
        }
        return llama_layer_range_project(l->ctx, l->batch, begin, slots);
    });
}

const uint32_t * drex_llama_cells(const drex_llama * l) { return llama_layer_range_cells(l->ctx); }
// The logits where they are, rows one after another: of all tokens, or of those of an exit's head.
static const ggml_tensor * plain_logits(const drex_llama * l) {
    const ggml_tensor * t = llama_layer_range_logits(l->ctx);
    const bool plain = t && t->buffer && t->type == GGML_TYPE_F32 && t->nb[1] == sizeof(float)*t->ne[0] &&
        (l->stream || ggml_backend_buffer_is_host(t->buffer));
    return plain ? t : nullptr;
}
const float * drex_llama_logits(drex_llama * l, int32_t i) {
    try {
        if (i < 0 || size_t(i) >= l->outputs.size() || l->outputs[i] < 0) {
            return nullptr;
        }
        const ggml_tensor * t = plain_logits(l);
        if (!t) {
            return nullptr;
        }
        const int32_t n_vocab = llama_vocab_n_tokens(l->vocab);
        if (!l->stream && t->ne[0] == n_vocab) {
            return static_cast<const float *>(t->data) + size_t(l->outputs[i])*n_vocab;
        }
        return llama_layer_range_fetch_logits(l->ctx, i, 1) ? llama_get_logits_ith(l->ctx, i) : nullptr;
    } catch (...) {
        return nullptr;
    }
}
int32_t drex_llama_ramp_logits(const drex_llama * l, uint32_t ramp, drex_logits * out) {
    const ggml_tensor * t = plain_logits(l);
    if (!t) {
        return 0;
    }
    out->data             = t->data;
    out->row_stride_bytes = t->nb[1];
    out->n_vocab          = t->ne[0];
    if (l->exits) {
        l->exits->describe(*out, ramp);
    }
    return 1;
}
int32_t drex_llama_ban(drex_llama * l, int32_t i, const int32_t * tokens, int32_t n_tokens) {
    static float none = -INFINITY; // written whenever the device comes to it
    for (int32_t k = 0; k < n_tokens; ++k) {
        if (!llama_layer_range_edit_logits(l->ctx, tokens[k], i, 1, &none, true)) {
            return -1;
        }
    }
    return 0;
}
void drex_llama_forget(drex_llama * l, int32_t sequence) {
    llama_memory_seq_rm(llama_get_memory(l->ctx), sequence, -1, -1);
}
void drex_llama_rollback(drex_llama * l, int32_t sequence, int32_t position) {
    llama_layer_range_rollback(l->ctx, sequence, position);
}

drex_llama_sampler * drex_llama_sampler_new(const drex_llama * l, const drex_llama_sampling * p, const int32_t * prompt,
                                            int32_t n_prompt) {
    try {
        const int32_t n_vocab = llama_vocab_n_tokens(l->vocab);
        auto sampler = std::make_unique<drex_llama_sampler>();
        sampler->candidates.resize(n_vocab);
        sampler->chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
        const auto add = [&](llama_sampler * one) { llama_sampler_chain_add(sampler->chain, one); };
        if (p->repetition_penalty != 1.0f || p->frequency_penalty != 0.0f || p->presence_penalty != 0.0f) {
            add(llama_sampler_init_penalties(n_vocab, 64, p->repetition_penalty, p->frequency_penalty, p->presence_penalty));
        }
        if (p->temperature <= 0.0f) {
            add(llama_sampler_init_greedy());
        } else {
            if (p->top_k > 0) {
                add(llama_sampler_init_top_k(p->top_k));
            }
            if (p->top_p < 1.0f) {
                add(llama_sampler_init_top_p(p->top_p, 1));
            }
            if (p->min_p > 0.0f) {
                add(llama_sampler_init_min_p(p->min_p, 1));
            }
            add(llama_sampler_init_temp(p->temperature));
            add(llama_sampler_init_dist(p->seed));
        }
        for (int32_t i = 0; i < n_prompt; ++i) {
            llama_sampler_accept(sampler->chain, prompt[i]);
        }
        return sampler.release();
    } catch (...) {
        return nullptr;
    }
}
void drex_llama_sampler_free(drex_llama_sampler * s) { delete s; }

int32_t drex_llama_sample(drex_llama * l, drex_llama_sampler * s, int32_t i, const int32_t * banned, int32_t n_banned) {
    return guarded([&] {
        const float * logits = drex_llama_logits(l, i);
        if (!logits) {
            return -1;
        }
        const int32_t n_vocab = int32_t(s->candidates.size());
        for (llama_token token = 0; token < n_vocab; ++token) {
            if (std::isnan(logits[token])) {
                return -2;
            }
            s->candidates[token] = { token, logits[token], 0.0f };
        }
        for (int32_t k = 0; k < n_banned; ++k) {
            if (banned[k] >= 0 && banned[k] < n_vocab) {
                s->candidates[banned[k]].logit = -INFINITY;
            }
        }
        llama_token_data_array all = { s->candidates.data(), s->candidates.size(), -1, false };
        llama_sampler_apply(s->chain, &all);
        if (all.selected < 0 || all.selected >= int64_t(all.size)) {
            return -1;
        }
        const llama_token token = all.data[all.selected].id;
        llama_sampler_accept(s->chain, token);
        return token;
    });
}

void drex_llama_perf(const drex_llama * l, drex_llama_graphs * out) {
    const auto perf = llama_layer_range_perf(l->ctx);
    *out = { perf.n_built, perf.n_reused, perf.n_evicted, perf.n_kept, perf.bytes };
}

} // extern "C"
