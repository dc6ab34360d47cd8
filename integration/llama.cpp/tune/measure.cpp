// What layers and exits cost, and what exits say, in the engine itself.

#include "engine.h"

#include "llama-layer-exits.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

static std::string meta(const llama_model * model, const char * key) {
    std::vector<char> text(256);
    const int32_t n = llama_model_meta_val_str(model, key, text.data(), text.size());
    return n < 0 ? "" : text.data();
}

int run_info(const options & o) {
    const llama_model_ptr model = load_model(o);
    const llama_vocab * vocab = llama_model_get_vocab(model.get());

    char hash[17];
    if (const char * why = llama_layer_exits_hash(o.model.c_str(), hash)) {
        fail(why);
    }
    int32_t type = 0;
    if (const char * why = llama_layer_exits_head(o.model.c_str(), llama_model_n_embd(model.get()), nullptr, 0, &type, nullptr)) {
        fail(why);
    }

    printf("{\"architecture\":%s,\"name\":%s,\"block_count\":%d,\"embedding_length\":%d,\"vocab_size\":%d,\"hash\":\"%s\","
            "\"size\":%llu,\"head_type\":\"%s\",\"template\":%s}\n",
            quoted(meta(model.get(), "general.architecture")).c_str(), quoted(meta(model.get(), "general.name")).c_str(), llama_model_n_layer(model.get()),
            llama_model_n_embd(model.get()), llama_vocab_n_tokens(vocab), hash, (unsigned long long) llama_model_size(model.get()),
            ggml_type_name(ggml_type(type)), llama_model_chat_template(model.get(), nullptr) ? "true" : "false");
    return 0;
}

int run_head(const options & o) {
    std::vector<int32_t> tokens;
    for (sequence s; read_sequence(s, INT32_MAX); ) {
        tokens.insert(tokens.end(), s.tokens.begin(), s.tokens.end());
    }
    const llama_model_ptr model = load_model(o);
    const int32_t n_embd = llama_model_n_embd(model.get());

    int32_t type = 0;
    std::vector<float> row(n_embd);
    if (const char * why = llama_layer_exits_head(o.model.c_str(), n_embd, nullptr, 0, &type, nullptr)) {
        fail(why);
    }
    const size_t n_row = ggml_row_size(ggml_type(type), n_embd);
    std::vector<uint8_t> data(n_row*tokens.size());
    if (const char * why = llama_layer_exits_head(o.model.c_str(), n_embd, tokens.data(), tokens.size(), &type, data.data())) {
        fail(why);
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (type == GGML_TYPE_F32) {
            fwrite(&data[i*n_row], 1, n_row, stdout);
            continue;
        }
        ggml_get_type_traits(ggml_type(type))->to_float(&data[i*n_row], row.data(), n_embd);
        fwrite(row.data(), sizeof(float), n_embd, stdout);
    }
    return 0;
}

// For each number of rows and each layer, the time of: all layers; the layers before it without a head, and with the head
// that ends a range there, which is an exit's or the model's own; the layers behind it.
int run_cost(const options & o) {
    const llama_model_ptr model = load_model(o);

    const int32_t n_max = *std::max_element(o.rows.begin(), o.rows.end());
    ranges r(o, model.get(), n_max, 256, n_max);
    if (o.layers.empty()) {
        fail("--layers names no layer");
    }

    const int n_warm = 2, n_reps = 7;

    for (const int32_t n_rows : o.rows) {
        r.forget(-1);
        llama_pos pos = 0;

        auto rows = [&](bool output) {
            std::vector<row> res;
            for (int32_t i = 0; i < n_rows; ++i) {
                res.push_back({ (pos*31 + i*7) % r.n_vocab, pos, i, output });
            }
            return res;
        };

        struct timing {
            int32_t             begin, end;
            const char *        head;
            std::vector<double> us;
        };
        int32_t n_exits = 0;
        const int32_t * exits = llama_layer_exits_layers(r.ctx, &n_exits);

        std::vector<timing> timings;
        for (const int32_t layer : o.layers) {
            const bool is_exit = std::find(exits, exits + n_exits, layer) != exits + n_exits;
            timings.push_back({ 0,     r.n_layer, "own",                       {} });
            timings.push_back({ 0,     layer,     "none",                      {} });
            timings.push_back({ 0,     layer,     is_exit ? "exit" : "own",    {} });
            timings.push_back({ layer, r.n_layer, "own",                       {} });
        }
        for (int rep = 0; rep < n_warm + n_reps; ++rep) {
            for (size_t i = 0; i < timings.size(); ++i) {
                auto & t = timings[i];
                const bool output = t.head[0] != 'n';
                const auto start = std::chrono::steady_clock::now();
                r.run(rows(output), t.begin, t.end);
                const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start;
                if (rep >= n_warm) {
                    t.us.push_back(us.count());
                }
                if (t.begin == 0 && i % 4 == 1) {
                    r.run(rows(false), t.end, r.n_layer); // so that the next rows follow these
                }
                if (t.end == r.n_layer || i % 4 == 1) {
                    pos++;
                }
            }
            if (pos + 4*(int) o.layers.size() >= 250) {
                r.forget(-1);
                pos = 0;
            }
        }
        for (auto & t : timings) {
            std::sort(t.us.begin(), t.us.end());
            printf("{\"rows\":%d,\"begin\":%d,\"end\":%d,\"head\":\"%s\",\"us\":%.2f,\"least_us\":%.2f}\n", n_rows, t.begin, t.end, t.head,
                    t.us[t.us.size()/2], t.us[0]);
            fflush(stdout);
        }
    }
    return 0;
}

// What each exit says of each token that is wanted: layer, whether its first choice is the full model's, its probability, and
// the probability of the second.
int run_score(const options & o) {
    const llama_model_ptr model = load_model(o);
    ranges r(o, model.get(), 1, o.n_chunk, o.n_chunk);

    int32_t n_exits = 0, n_tokens = 0;
    const int32_t * exits  = llama_layer_exits_layers(r.ctx, &n_exits);
    const int32_t * tokens = llama_layer_exits_tokens(r.ctx, &n_tokens);
    if (!exits) {
        fail("--exits names no file");
    }

    struct said {
        llama_token top;
        float       first, second;
    };
    std::vector<float> logits;

    for (sequence s; read_sequence(s, r.n_vocab); ) {
        const auto rows = rows_of(s, o.n_chunk);
        r.forget(-1);

        std::vector<std::vector<said>> all;
        for (int32_t k = 0, begin = 0; k <= n_exits; ++k) {
            const int32_t end = k < n_exits ? exits[k] : r.n_layer;
            r.run(rows, begin, end);
            begin = end;

            const ggml_tensor * t = llama_layer_range_logits(r.ctx);
            logits.resize(ggml_nelements(t));
            ggml_backend_tensor_get(t, logits.data(), 0, ggml_nbytes(t));
            all.emplace_back();
            for (int64_t i = 0; i < t->ne[1]; ++i) {
                const float * row = logits.data() + i*t->ne[0];
                int64_t top = 0;
                float second = -INFINITY, sum = 0.0f;
                for (int64_t v = 1; v < t->ne[0]; ++v) {
                    if (row[v] > row[top]) {
                        second = row[top];
                        top    = v;
                    } else {
                        second = std::max(second, row[v]);
                    }
                }
                for (int64_t v = 0; v < t->ne[0]; ++v) {
                    sum += std::exp(row[v] - row[top]);
                }
                if (k < n_exits && t->ne[0] != n_tokens) {
                    fail("the exit's logits are not those of its tokens");
                }
                all.back().push_back({ k < n_exits ? tokens[top] : (llama_token) top, 1.0f/sum, std::exp(second - row[top])/sum });
            }
        }
        for (int32_t k = 0; k < n_exits; ++k) {
            for (size_t i = 0; i < all[k].size(); ++i) {
                const auto & e = all[k][i];
                printf("%d %d %.6g %.6g\n", exits[k], e.top == all[n_exits][i].top, e.first, e.second);
            }
        }
        fflush(stdout);
    }
    return 0;
}
