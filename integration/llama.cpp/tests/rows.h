// Shared by the tests of layer ranges: contexts, and batches of rows.

#pragma once

#include "llama.h"
#include "llama-layer-range.h"

#include <cstdio>
#include <vector>

struct row {
    llama_token  token;
    llama_pos    pos;
    llama_seq_id seq;
    bool         output = true;
};

inline llama_context * make_context(
        llama_model * model, int n_ctx, int n_seq, ggml_type type_kv, llama_flash_attn_type flash_attn, bool unified,
        int n_ubatch = 512) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_seq_max       = n_seq;
    params.n_batch         = n_ubatch;
    params.n_ubatch        = n_ubatch;
    params.kv_unified      = unified;
    params.n_threads       = 2;
    params.n_threads_batch = 2;
    params.type_k          = type_kv;
    params.type_v          = type_kv;
    params.flash_attn_type = flash_attn;
    params.swa_full        = false;
    return llama_init_from_model(model, params);
}

// fills the batch with rows
inline void fill(llama_batch_ext * batch, const std::vector<row> & rows) {
    llama_batch_ext_clear(batch);
    for (const auto & r : rows) {
        const int32_t i = llama_batch_ext_add_token(batch, r.seq, r.token);
        llama_batch_ext_set_pos          (batch, i, &r.pos);
        llama_batch_ext_set_output_logits(batch, i, r.output);
    }
}

inline void log_warnings_only() {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) {
            fputs(text, stderr);
        }
    }, nullptr);
}
