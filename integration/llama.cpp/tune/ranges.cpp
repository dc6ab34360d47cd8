#include "engine.h"

#include "llama-layer-exits.h"

ranges::ranges(const options & o, llama_model * model, int32_t n_seq, int32_t n_ctx_seq, int32_t n_tokens,
        ggml_backend_sched_eval_callback cb_eval, void * cb_eval_user_data) {
    n_layer = llama_model_n_layer(model);
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    n_embd  = llama_model_n_embd(model);

    llama_context_params params = llama_context_default_params();
    params.n_seq_max         = n_seq;
    params.n_ctx             = n_seq*((n_ctx_seq + 255)/256*256);
    params.n_batch           = n_tokens;
    params.n_ubatch          = n_tokens;
    params.n_threads         = o.n_threads;
    params.n_threads_batch   = o.n_threads;
    params.cb_eval           = cb_eval;
    params.cb_eval_user_data = cb_eval_user_data;
    ctx = llama_init_from_model(model, params);
    if (!ctx) {
        fail("a context of " + std::to_string(params.n_ctx) + " tokens does not fit");
    }

    llama_layer_range_params range = {};
    range.n_rows       = n_tokens;
    range.n_rows_graph = n_seq;
    if (const char * why = llama_layer_range_init(ctx, range)) {
        fail(why);
    }
    if (!o.exits.empty()) {
        if (const char * why = llama_layer_exits_load(ctx, o.model.c_str(), o.exits.c_str())) {
            fail(why);
        }
    }

    batch = llama_batch_ext_init(ctx);
    for (int32_t i = 0; i < n_tokens; ++i) {
        arena.push_back(i);
    }
}

ranges::~ranges() {
    llama_batch_ext_free(batch);
    llama_free(ctx);
}

void ranges::run(const std::vector<row> & rows, int32_t begin, int32_t end) {
    llama_batch_ext_clear(batch);
    for (const auto & r : rows) {
        const int32_t i = llama_batch_ext_add_token(batch, r.seq, r.token);
        llama_batch_ext_set_pos          (batch, i, &r.pos);
        llama_batch_ext_set_output_logits(batch, i, r.output);
    }
    const int32_t ret = llama_layer_range_decode(ctx, batch, begin, end, arena.data());
    if (ret != 0) {
        fail("layers " + std::to_string(begin) + " to " + std::to_string(end) + " do not run over " + std::to_string(rows.size()) +
                " rows: " + std::to_string(ret));
    }
    llama_synchronize(ctx);
}

void ranges::forget(llama_seq_id seq) {
    if (seq < 0) {
        llama_memory_clear(llama_get_memory(ctx), true);
    } else {
        llama_memory_seq_rm(llama_get_memory(ctx), seq, -1, -1);
    }
}

std::vector<row> rows_of(const sequence & s, int32_t n_chunk) {
    const int32_t n = s.tokens.size();
    if (n > n_chunk) {
        fail("sequence " + std::to_string(s.id) + " has " + std::to_string(n) + " tokens, more than --chunk " + std::to_string(n_chunk));
    }
    std::vector<row> rows;
    for (int32_t i = 0; i < n; ++i) {
        rows.push_back({ s.tokens[i], i, 0, i + 1 >= s.n_given });
    }
    return rows;
}
