#pragma once

#include "llama-graph.h"
#include "llama-layer-exits.h"

#include "ggml-cpp.h"

#include <memory>
#include <string>
#include <vector>

struct llama_layer_exits {
    struct exit {
        int32_t layer = 0;

        // nullptr: this term is missing
        ggml_tensor * bias        = nullptr;
        ggml_tensor * weight      = nullptr;
        ggml_tensor * scale       = nullptr;
        ggml_tensor * down        = nullptr;
        ggml_tensor * up          = nullptr;
        ggml_tensor * mlp_up      = nullptr;
        ggml_tensor * mlp_up_bias = nullptr;
        ggml_tensor * mlp_down    = nullptr;
    };

    std::vector<exit>    exits;
    std::vector<int32_t> layers; // of these, increasing
    std::vector<int32_t> tokens; // of the head's rows, increasing

    ggml_tensor * head = nullptr;

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    // throws std::runtime_error with what is wrong
    static std::shared_ptr<llama_layer_exits> load(
            const llama_model & model, const std::string & path_model, const std::string & path_exits);

    // the exit after so many layers, nullptr: there is none
    const exit * find(int32_t n_layer) const;

    // the head's row of a token, -1: there is none
    int32_t find_token(int32_t token) const;

    // logits [n_tokens, n_rows] of the states cur [n_embd, n_rows]
    ggml_tensor * build(const llm_graph_context & gctx, const exit & e, ggml_tensor * cur) const;
};
