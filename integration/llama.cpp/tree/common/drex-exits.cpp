#include "drex-exits.h"

#include "llama-layer-exits.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

// an array of the file's metadata, nullptr: there is none of this type
static const void * find_array(const gguf_context * gguf, const char * key, gguf_type type, size_t & n) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0 || gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, id) != type) {
        return nullptr;
    }
    n = gguf_get_arr_n(gguf, id);
    return gguf_get_arr_data(gguf, id);
}

common_drex_exits::common_drex_exits(const options & names, const std::string & path, const std::vector<uint32_t> & only) :
        names(names), path(path) {
    auto refuse = [&](const std::string & why) {
        throw std::runtime_error(names.file + " " + path + why);
    };

    gguf_init_params params = { /*.no_alloc =*/ true, /*.ctx =*/ nullptr };
    gguf_context_ptr gguf(gguf_init_from_file(path.c_str(), params));
    if (!gguf) {
        refuse(" is no GGUF file, or cannot be read");
    }

    size_t n = 0;
    const auto * in_file = static_cast<const uint32_t *>(find_array(gguf.get(), "exits.layers", GGUF_TYPE_UINT32, n));
    if (!in_file) {
        refuse(": exits.layers is missing, or no array of u32");
    }
    const std::vector<uint32_t> all(in_file, in_file + n);
    if (all.empty()) {
        refuse(": exits.layers is empty");
    }
    for (size_t i = 0; i < n; ++i) {
        if (all[i] == 0 || all[i] > 65535 || (i > 0 && all[i] <= all[i - 1])) {
            refuse(": exits.layers[" + std::to_string(i) + "] is " + std::to_string(all[i]) + ", expected layers in increasing order");
        }
    }

    // scale and shift of each metric, exit by exit
    const size_t n_metrics = 3;
    const auto * numbers = static_cast<const float *>(find_array(gguf.get(), "exits.calibration", GGUF_TYPE_FLOAT32, n));
    if (!numbers && gguf_find_key(gguf.get(), "exits.calibration") >= 0) {
        refuse(": exits.calibration is no array of f32");
    }
    if (numbers && n != all.size()*n_metrics*2) {
        refuse(": exits.calibration has " + std::to_string(n) + " numbers, expected " + std::to_string(all.size()*n_metrics*2));
    }

    for (const uint32_t layer : only.empty() ? all : only) {
        const auto it = std::find(all.begin(), all.end(), layer);
        if (it == all.end()) {
            refuse(" has no exit after layer " + std::to_string(layer) + " of " + names.layers);
        }
        ramp_layers.push_back(layer);
        if (!numbers) {
            continue;
        }
        calibrations.emplace_back();
        for (size_t k = 0; k < n_metrics; ++k) {
            const float * at = numbers + ((it - all.begin())*n_metrics + k)*2;
            if (!std::isfinite(at[0]) || at[0] <= 0.0f || !std::isfinite(at[1])) {
                refuse(": exits.calibration has the scale " + std::to_string(at[0]) + " and the shift " + std::to_string(at[1]) +
                        " for layer " + std::to_string(layer) + ", expected a scale above 0 and finite numbers");
            }
            calibrations.back()[k] = { at[0], at[1] };
        }
    }
}

void common_drex_exits::load(llama_context * ctx, const std::string & path_model) {
    if (const char * why = llama_layer_exits_load(ctx, path_model.c_str(), path.c_str())) {
        throw std::runtime_error(names.file + " " + why);
    }
    tokens = llama_layer_exits_tokens(ctx, &n_tokens);
}

void common_drex_exits::describe(drex_logits & logits, uint32_t ramp) const {
    logits.n_vocab     = n_tokens;
    logits.token_ids   = tokens;
    logits.calibration = calibrations.empty() ? nullptr : calibrations[ramp].data();
}

void common_drex_exits::pick(drex_logits & logits) {
    picked.resize(size_t(logits.n_rows)*n_tokens);

    const auto * from = static_cast<const float *>(logits.data);
    for (uint32_t i = 0; i < logits.n_rows; ++i) {
        for (int32_t k = 0; k < n_tokens; ++k) {
            picked[size_t(i)*n_tokens + k] = from[size_t(i)*logits.n_vocab + tokens[k]];
        }
    }
    logits.data             = picked.data();
    logits.row_stride_bytes = n_tokens*sizeof(float);
}
