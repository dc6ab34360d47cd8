// SPDX-License-Identifier: Apache-2.0
//
// What serve.cpp works with: a context with prompts in its cache, a drex engine bound to it, a JSON file.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-layer-range.h"
#include "llama.h"

#include <drex.h>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// of libllama, for its tests and tools
const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);

namespace serve {

inline int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void check(drex_status status) {
    if (status != DREX_OK) {
        throw std::runtime_error(drex_last_error());
    }
}

inline double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? NAN : 0.5*(v[(v.size() - 1)/2] + v[v.size()/2]);
}

template <typename T> std::vector<T> list(const char * text) {
    std::vector<T> res;
    std::stringstream in(text);
    for (std::string part; std::getline(in, part, ','); ) {
        res.push_back(T(std::stod(part)));
    }
    return res;
}

// what ggml's CUDA backend says of its graphs
struct graph_counts { uint64_t reused = 0, captured = 0, reset = 0; };

inline graph_counts & counts() {
    static graph_counts c;
    return c;
}
inline graph_counts graph_log() { return counts(); }

inline void log_init() {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        const std::string t = text;
        counts().reused   += t.find("CUDA Graph id") != std::string::npos && t.find("reused") != std::string::npos;
        counts().captured += t.find("CUDA graph warmup complete") != std::string::npos;
        counts().reset    += t.find("CUDA graph warmup reset") != std::string::npos;
        if (level == GGML_LOG_LEVEL_ERROR || (level == GGML_LOG_LEVEL_WARN && getenv("SERVE_VERBOSE"))) {
            fputs(text, stderr);
        }
    }, nullptr);
}

using model_ptr = std::unique_ptr<llama_model, decltype(&llama_model_free)>;

inline model_ptr load_model(const std::string & path, int ngl) {
    llama_model_params params = llama_model_default_params();
    params.split_mode = LLAMA_SPLIT_MODE_NONE;
    if (ngl >= 0) {
        params.n_gpu_layers = ngl;
    }
    model_ptr model(llama_model_load_from_file(path.c_str(), params), llama_model_free);
    if (!model) {
        throw std::runtime_error("cannot load " + path);
    }
    return model;
}

// of the KV cache: a stream of cells for each sequence, as llama.cpp has it by default, or one for all
enum class layout { streams, unified };

// n_requests sequences with a prompt each
struct session {
    llama_model   * model;
    llama_context * ctx = nullptr;
    llama_batch_ext * batch = nullptr;

    int n_requests, n_prompt, n_layer, n_vocab, n_kv;
    void * stream = nullptr;

    std::vector<int32_t> slots;

    // a unified cache is for stock passes only; its last cell is in use, so that rows always attend over all of it
    session(llama_model * model, int n_requests, int n_prompt, int n_tokens, int n_threads, layout kv = layout::streams) :
            model(model), n_requests(n_requests), n_prompt(n_prompt) {
        const bool streams = kv == layout::streams;
        n_layer = llama_model_n_layer(model);
        n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        n_kv    = streams ? (n_prompt + n_tokens + 255)/256*256 : (n_requests*(n_prompt + n_tokens) + 256)/256*256;

        llama_context_params params = llama_context_default_params();
        params.n_ctx           = streams ? n_kv*n_requests : n_kv;
        params.n_seq_max       = streams ? n_requests : n_requests + 1;
        params.n_batch         = 512;
        params.n_ubatch        = 512;
        params.kv_unified      = !streams;
        params.n_threads       = n_threads;
        params.n_threads_batch = n_threads;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        ctx = llama_init_from_model(model, params);
        if (!ctx) {
            throw std::runtime_error("cannot make a context");
        }
        batch = llama_batch_ext_init(ctx);

        for (int r = 0; r < n_requests; ++r) {
            prompt(r, n_prompt);
        }
        if (!streams) {
            const int n_left = n_kv - n_requests*n_prompt;
            prompt(n_requests, n_left);
            llama_memory_seq_rm(llama_get_memory(ctx), n_requests, 0, n_left - 1);
            return;
        }
        if (const char * why = llama_layer_range_init(ctx, { uint32_t(n_requests), 64, uint32_t(n_requests), 0 })) {
            throw std::runtime_error(why);
        }
        if (!llama_layer_range_backend(ctx)) {
            throw std::runtime_error("the model is spread over several devices");
        }
        stream = llama_layer_range_stream(ctx);
    }
    ~session() {
        llama_batch_ext_free(batch);
        llama_free(ctx);
    }
    session(const session &) = delete;
    session & operator=(const session &) = delete;

    bool on_gpu() const { return stream != nullptr; }

    std::string device() const {
        return ggml_backend_dev_description(ggml_backend_get_device(llama_layer_range_backend(ctx)));
    }

    void begin() {
        llama_batch_ext_clear(batch);
        slots.clear();
    }

    void add(int seq, llama_pos pos, int32_t slot) {
        put(seq, pos, true);
        slots.push_back(slot);
    }

    void window(int begin, int end) {
        if (const int ret = llama_layer_range_decode(ctx, batch, begin, end, slots.data())) {
            throw std::runtime_error("layers [" + std::to_string(begin) + ", " + std::to_string(end) + ") of " +
                    std::to_string(slots.size()) + " rows failed: " + std::to_string(ret));
        }
    }

    // the stock pass over the same batch
    void process() {
        if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch)) {
            throw std::runtime_error("a full pass failed");
        }
    }

    void wait() { llama_synchronize(ctx); }

    // logits of the last window, from its device
    std::vector<float> logits() {
        const ggml_tensor * t = llama_layer_range_logits(ctx);
        wait();
        std::vector<float> res(ggml_nelements(t));
        ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));
        return res;
    }

    void forget(llama_pos pos, int first, int last) {
        for (int r = first; r < last; ++r) {
            llama_memory_seq_rm(llama_get_memory(ctx), r, pos, -1);
        }
    }
    void forget_tokens() { forget(n_prompt, 0, n_requests); }

private:
    void put(int seq, llama_pos pos, bool output) {
        const llama_token token = (seq*7919 + pos*104729) % n_vocab;
        const int32_t i = llama_batch_ext_add_token(batch, seq, token);
        llama_batch_ext_set_pos(batch, i, &pos);
        llama_batch_ext_set_output_logits(batch, i, output);
    }

    void prompt(int seq, int n) {
        for (int i = 0; i < n; ) {
            begin();
            for (int k = 0; k < 512 && i < n; ++k) {
                put(seq, i++, false);
            }
            process();
        }
    }
};

// The device's own clock around what is enqueued on a stream. Its driver is loaded already, where there is one.
struct device_clock {
    explicit device_clock(void * stream) : stream(stream) {
        void * driver = stream ? dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD) : nullptr;
        auto get = [&](auto & f, const char * name) {
            f = driver ? reinterpret_cast<std::remove_reference_t<decltype(f)>>(dlsym(driver, name)) : nullptr;
            on = on && f;
        };
        get(create, "cuEventCreate");
        get(destroy, "cuEventDestroy_v2");
        get(record, "cuEventRecord");
        get(elapsed, "cuEventElapsedTime");
        on = on && create(&begin_event, 0) == 0 && create(&end_event, 0) == 0;
    }
    ~device_clock() {
        if (on) {
            destroy(begin_event);
            destroy(end_event);
        }
    }
    device_clock(const device_clock &) = delete;

    void begin() { ok = on && record(begin_event, stream) == 0; }
    void end()   { ok = ok && record(end_event,   stream) == 0; }
    // after a wait; NaN without such a clock
    double ms() {
        float res = 0.0f;
        return ok && elapsed(&res, begin_event, end_event) == 0 ? res : NAN;
    }

private:
    void * stream;
    bool on = true, ok = false;
    void * begin_event = nullptr;
    void * end_event = nullptr;
    int (*create)(void **, unsigned) = nullptr;
    int (*destroy)(void *) = nullptr;
    int (*record)(void *, void *) = nullptr;
    int (*elapsed)(float *, void *, void *) = nullptr;
};

// drex over a session's K/V
struct engine {
    session & s;
    drex_engine * ptr = nullptr;
    std::vector<drex_row> rows;

    engine(session & s, int n_batch, drex_policy policy, int exit_layer) : s(s), rows(n_batch) {
        const uint32_t ramp = exit_layer;
        drex_config config = DREX_CONFIG_INITIALIZER;
        config.n_layers     = s.n_layer;
        config.n_ramps      = 1;
        config.ramp_layers  = &ramp;
        config.n_slots      = s.n_requests;
        config.max_requests = s.n_requests;
        config.max_batch    = n_batch;
        config.policy       = policy;
        config.fill         = DREX_FILL_COPY;
        if (policy == DREX_POLICY_HOLD) {
            config.flush_rows = n_batch; // dense deep batches: there are more requests than rows
        }
        config.n_vocab      = s.n_vocab;
        config.device       = s.on_gpu() ? DREX_DEVICE_CUDA : DREX_DEVICE_HOST;
        check(drex_create(&config, &ptr));

        std::vector<drex_kv_layer> layers(s.n_layer, DREX_KV_LAYER_INITIALIZER);
        for (int il = 0; il < s.n_layer; ++il) {
            llama_layer_range_kv kv;
            llama_layer_range_get_kv(s.ctx, il, &kv);
            if (kv.v_trans) {
                throw std::runtime_error("V is transposed: flash attention is off");
            }
            auto & l = layers[il];
            l.n_cells       = kv.n_cells;
            l.k             = kv.k->data;
            l.k_row_bytes   = ggml_row_size(kv.k->type, kv.k->ne[0]);
            l.k_cell_stride = kv.k->nb[1];
            l.v             = kv.v->data;
            l.v_row_bytes   = ggml_row_size(kv.v->type, kv.v->ne[0]);
            l.v_cell_stride = kv.v->nb[1];
        }
        check(drex_bind_kv(ptr, layers.data(), layers.size()));
    }
    ~engine() { drex_destroy(ptr); }

    // scores the last window's rows, and copies the K/V of those that leave
    void ramp(uint32_t n_rows, std::vector<drex_verdict> & verdicts) {
        const ggml_tensor * t = llama_layer_range_logits(s.ctx);
        drex_logits logits = DREX_LOGITS_INITIALIZER;
        logits.data             = t->data;
        logits.row_stride_bytes = t->nb[1];
        logits.n_rows           = n_rows;
        logits.n_vocab          = s.n_vocab;
        logits.stream           = s.stream;
        check(drex_ramp(ptr, &logits, llama_layer_range_cells(s.ctx), verdicts.data(), verdicts.size()));
        check(drex_fill(ptr));
    }

    // a step of n rows that will all be held, to time what a ramp takes
    void plan_held(int n) {
        for (int i = 0; i < n; ++i) {
            drex_request_config c = DREX_REQUEST_CONFIG_INITIALIZER;
            c.id        = i;
            c.threshold = 1.0f;
            check(drex_request_add(ptr, &c));
            check(drex_request_ready(ptr, i, s.n_prompt + 1, now_ns()));
        }
        drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
        drex_step       step  = DREX_STEP_INITIALIZER;
        input.now_ns = now_ns();
        check(drex_plan(ptr, &input, rows.data(), rows.size(), &step));
        if (step.n_rows != uint32_t(n) || step.ramp == DREX_NO_RAMP) {
            throw std::runtime_error("the planned step is not the one that was to be timed");
        }
    }
    void end_held(int n) {
        drex_completion completion = DREX_COMPLETION_INITIALIZER;
        completion.now_ns = now_ns();
        check(drex_complete(ptr, &completion));
        for (int i = 0; i < n; ++i) {
            check(drex_request_remove(ptr, i));
        }
    }
};

// the final norm and the head alone, in ms: as many passes as fit between two waits, so that no wait is in it
inline double time_head(session & s, int n_rows, int n_reps) {
    const ggml_tensor * norm = nullptr, * head = nullptr;
    for (const auto & t : llama_internal_get_tensor_map(s.model)) {
        norm = t.first == "output_norm.weight" ? t.second : norm;
        head = t.first == "output.weight"      ? t.second : head;
    }
    if (!norm || !head) {
        throw std::runtime_error("the model has no output.weight");
    }
    ggml_backend_t backend = llama_layer_range_backend(s.ctx);
    std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(
            ggml_init({ 16*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }), ggml_free);
    ggml_tensor * x = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, head->ne[0], n_rows);
    ggml_tensor * y = ggml_mul(ctx.get(), ggml_rms_norm(ctx.get(), x, 1e-5f), const_cast<ggml_tensor *>(norm));
    y = ggml_mul_mat(ctx.get(), const_cast<ggml_tensor *>(head), y);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, y);

    std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer(
            ggml_backend_alloc_ctx_tensors(ctx.get(), backend), ggml_backend_buffer_free);
    const std::vector<float> ones(ggml_nelements(x), 1.0f);
    ggml_backend_tensor_set(x, ones.data(), 0, ggml_nbytes(x));

    const int n_between = s.on_gpu() ? 8 : 1;
    std::vector<double> ms;
    for (int rep = 0; rep < 3 + n_reps; ++rep) {
        const int64_t t = now_ns();
        for (int i = 0; i < n_between; ++i) {
            ggml_backend_graph_compute_async(backend, graph);
        }
        ggml_backend_synchronize(backend);
        if (rep >= 3) {
            ms.push_back((now_ns() - t)/1e6/n_between);
        }
    }
    return median(ms);
}

// a number, or text, or true and false
struct value {
    std::string text;
    value(double v) {
        char buffer[40];
        snprintf(buffer, sizeof(buffer), "%.6g", v);
        text = std::isfinite(v) ? buffer : "null";
    }
    value(int v)  : text(std::to_string(v)) {}
    value(bool v) : text(v ? "true" : "false") {}
    value(const char * v) : value(std::string(v)) {}
    value(const std::string & v) {
        text = "\"";
        for (const char c : v) {
            text += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
        }
        text += "\"";
    }
};

// complete after each change, so that a run that is cut short leaves what it had
struct json_file {
    explicit json_file(const std::string & path) : path(path) {}

    json_file & add(const std::string & name, const value & v) {
        head += (head.empty() ? "" : ",\n") + ("  \"" + name + "\": ") + v.text;
        write();
        return *this;
    }
    void cell(const std::vector<std::pair<std::string, value>> & fields) {
        cells += cells.empty() ? "\n    { " : ",\n    { ";
        for (size_t i = 0; i < fields.size(); ++i) {
            cells += (i ? ", \"" : "\"") + fields[i].first + "\": " + fields[i].second.text;
        }
        cells += " }";
        write();
    }
    void finish(bool ok, bool cut) {
        add("cut_by_time", cut).add("ok", ok);
    }

private:
    std::string path, head, cells;

    void write() const {
        const std::string temp = path + ".tmp";
        FILE * f = fopen(temp.c_str(), "w");
        if (!f) {
            throw std::runtime_error("cannot write " + temp);
        }
        fprintf(f, "{\n%s,\n  \"cells\": [%s\n  ]\n}\n", head.c_str(), cells.c_str());
        const bool ok = fclose(f) == 0 && rename(temp.c_str(), path.c_str()) == 0;
        if (!ok) {
            throw std::runtime_error("cannot write " + path);
        }
    }
};

// DESIGN: what must hold before figures mean anything
inline bool first_checks(session & s, int n, int exit_layer, json_file & out) {
    auto fill = [&](int n_rows, llama_pos pos) {
        s.begin();
        for (int r = 0; r < n_rows; ++r) {
            s.add(r, pos, r);
        }
    };
    auto differ = [&](const std::vector<float> & a, const std::vector<float> & b, size_t n_rows) {
        float d = 0.0f;
        for (size_t i = 0; i < n_rows*s.n_vocab; ++i) {
            const float x = std::fabs(a[i] - b[i]);
            d = x >= 0.0f ? std::max(d, x) : INFINITY;
        }
        return double(d);
    };
    const llama_pos pos = s.n_prompt;

    fill(n, pos);
    s.process();
    s.wait();
    const float * stock_rows = llama_get_logits(s.ctx);
    const std::vector<float> stock(stock_rows, stock_rows + size_t(n)*s.n_vocab);
    s.forget_tokens();

    fill(n, pos);
    s.window(0, s.n_layer);
    const auto full = s.logits();
    s.forget_tokens();

    fill(n, pos);
    s.window(0, exit_layer);
    s.window(exit_layer, s.n_layer);
    const auto split = s.logits();
    s.forget_tokens();

    fill(1, pos);
    s.window(0, s.n_layer);
    const auto alone = s.logits();
    s.forget_tokens();

    // three arenas in turn, with rows of three groups, so that none finds the other's graph unchanged by chance
    const int n_turns = 12;
    graph_counts before;
    for (int turn = 0; turn < n_turns; ++turn) {
        if (turn % 4 == 0) {
            s.forget_tokens();
        }
        if (turn == n_turns - 4) {
            before = graph_log();
        }
        fill(n, pos + turn % 4);
        s.window(0, exit_layer);
        s.window(exit_layer, s.n_layer);
        s.begin();
        for (int r = 0; r < n; ++r) {
            s.add(n + r, pos + turn % 4, n + r);
        }
        s.window(0, s.n_layer);
        s.wait();
    }
    const auto after = graph_log();
    s.forget_tokens();

    // memory of arenas for other numbers of rows
    auto * dev = ggml_backend_get_device(llama_layer_range_backend(s.ctx));
    size_t free0 = 0, free1 = 0, total = 0;
    ggml_backend_dev_memory(dev, &free0, &total);
    int n_arenas = 0;
    for (int m = 1; m < n && n_arenas < 8; ++m, n_arenas += 2) {
        fill(m, pos);
        s.window(0, exit_layer);
        s.window(exit_layer, s.n_layer);
        s.wait();
        s.forget_tokens();
    }
    ggml_backend_dev_memory(dev, &free1, &total);

    const double split_diff = differ(split, stock, n), full_diff = differ(full, stock, n), alone_diff = differ(alone, full, 1);
    const double reused = double(after.reused - before.reused), reset = double(after.reset - before.reset);
    const bool identical = split_diff == 0.0 && full_diff == 0.0;
    const bool captured  = !s.on_gpu() || (reset == 0 && reused >= 3*4);
    const double mib = s.on_gpu() && free0 > free1 ? double(free0 - free1)/n_arenas/(1 << 20) : NAN;

    out.add("check_rows", n)
       .add("split_max_difference", split_diff).add("full_window_max_difference", full_diff).add("split_identical", identical)
       .add("alone_max_difference", alone_diff)
       .add("cuda_graphs_of_12_windows_reused", reused).add("cuda_graphs_of_12_windows_reset", reset)
       .add("cuda_graphs_ok", s.on_gpu() ? value(captured) : value(NAN)).add("arena_mib", mib);
    printf("first checks, %d rows: split %s (max difference %g), a row alone differs by %g, CUDA graphs of 12 windows: %g reused, %g reset, arena %.1f MiB\n",
            n, identical ? "bit-identical" : "DIFFERS", split_diff, alone_diff, reused, reset, mib);
    return identical && captured;
}

}  // namespace serve
