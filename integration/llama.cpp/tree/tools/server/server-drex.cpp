#include "server-drex.h"
#include "drex-exits.h"

#include "gguf.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>

void server_drex::check(drex_status status) {
    if (status != DREX_OK) {
        throw std::runtime_error(drex_last_error());
    }
}

void server_drex::warn(drex_status status) {
    if (status != DREX_OK) {
        SRV_ERR("early exit: %s\n", drex_last_error());
    }
}

static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// exit layers that the model was trained with: <arch>.early_exit.layers, an array of integers
static std::vector<uint32_t> read_exit_layers(const std::string & path, std::string & head) {
    gguf_init_params iparams = { /*.no_alloc =*/ true, /*.ctx =*/ nullptr };
    gguf_context * gguf = gguf_init_from_file(path.c_str(), iparams);
    if (!gguf) {
        throw std::runtime_error("failed to read the metadata of " + path);
    }

    std::vector<uint32_t> res;

    const int64_t id_arch = gguf_find_key(gguf, "general.architecture");
    if (id_arch >= 0 && gguf_get_kv_type(gguf, id_arch) == GGUF_TYPE_STRING) {
        const std::string prefix = std::string(gguf_get_val_str(gguf, id_arch)) + ".early_exit.";

        const int64_t id_layers = gguf_find_key(gguf, (prefix + "layers").c_str());
        if (id_layers >= 0 && gguf_get_kv_type(gguf, id_layers) == GGUF_TYPE_ARRAY) {
            const auto type = gguf_get_arr_type(gguf, id_layers);
            if (type == GGUF_TYPE_INT32 || type == GGUF_TYPE_UINT32) {
                const auto * data = static_cast<const uint32_t *>(gguf_get_arr_data(gguf, id_layers));
                res.assign(data, data + gguf_get_arr_n(gguf, id_layers));
            }
        }

        const int64_t id_head = gguf_find_key(gguf, (prefix + "head").c_str());
        if (id_head >= 0 && gguf_get_kv_type(gguf, id_head) == GGUF_TYPE_STRING) {
            head = gguf_get_val_str(gguf, id_head);
        }
    }

    gguf_free(gguf);

    return res;
}

static drex_fill_mode fill_from_name(const std::string & what, const std::string & name) {
    if (name == "copy") {
        return DREX_FILL_COPY;
    }
    if (name == "postfill") {
        return DREX_FILL_POSTFILL;
    }
    if (name == "verify") {
        return DREX_FILL_VERIFY;
    }
    if (name == "propagate") {
        return DREX_FILL_PROPAGATE;
    }
    throw std::runtime_error(what + " " + name + " is not known, expected copy, propagate, postfill or verify");
}

uint32_t server_drex::n_rows_max(const common_params & params) {
    const auto & p = params.drex;

    if (p.max_batch > 0) {
        return p.max_batch;
    }
    // Every row of a window can be an output, and outputs have logits on the host. Where requests leave no pending rows behind
    // unless they ask for it, there is room for the rows of one such request.
    const int32_t n_pending = std::max(p.max_pending, 0);
    const int32_t n_rows    = p.keeps() ? params.n_parallel*(1 + n_pending) : params.n_parallel + n_pending;

    // all of them are in one micro-batch, which is no larger than a batch
    return std::min(std::min(params.n_ubatch, params.n_batch), n_rows);
}

uint32_t server_drex::n_outputs_max(const common_params & params) {
    // audits run answers in passes of so many rows at least
    const int32_t n_audit = params.drex.agrees() ? 64 : 0;

    return std::min<uint32_t>(std::min(params.n_ubatch, params.n_batch), std::max<int32_t>(n_audit, n_rows_max(params) + params.n_parallel));
}

server_drex::server_drex(const common_params & params, llama_context * ctx, bool has_spec, bool is_resume, const server_drex_figures & past) :
    ctx(ctx), options(params.drex), past(past) {
    const auto & p     = params.drex;
    const auto * model = llama_get_model(ctx);

    n_layer = llama_model_n_layer(model);
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    drex_config config = DREX_CONFIG_INITIALIZER;

    check(drex_policy_from_name(p.policy.c_str(), &config.policy));
    check(drex_metric_from_name(p.metric.c_str(), &config.metric));

    if (p.lossless() && p.fill_name() != "verify") {
        throw std::runtime_error("--drex-quality lossless cannot be combined with --drex-fill " + p.fill + ", whose output is not the full model's");
    }
    slides = llama_model_n_swa(model) > 0 && !params.swa_full;
    if (p.agrees() && slides) {
        throw std::runtime_error(string_format("--drex-quality %g needs --swa-full with this model: audits read answers whose sliding window "
                    "would be gone", p.quality));
    }
    if (p.agrees() && !p.thresholds.empty()) {
        throw std::runtime_error(string_format("--drex-quality %g cannot be combined with --drex-threshold, which follows from it", p.quality));
    }
    config.fill    = fill_from_name("--drex-fill", p.fill_name());
    config.quality = p.learns() ? p.quality : 0.0;

    // options that do not work with early exit yet
    if (params.embedding) {
        throw std::runtime_error("--embedding cannot be combined with early exit");
    }
    if (has_spec || !params.mmproj.path.empty()) {
        throw std::runtime_error("speculative decoding and --mmproj cannot be combined with early exit");
    }
    has_lora = !params.lora_adapters.empty();
    for (const auto & lora : params.lora_adapters) {
        // it is on for a part of a request only, and rows with it and without would share a window
        if (llama_adapter_get_alora_n_invocation_tokens(lora.ptr) > 0) {
            throw std::runtime_error("--lora " + lora.path + ": an adapter with invocation tokens (aLoRA) cannot be combined with early exit");
        }
    }
    if (params.ctx_shift) {
        throw std::runtime_error("--context-shift cannot be combined with early exit");
    }
    if (params.sampling.backend_sampling) {
        throw std::runtime_error("--backend-sampling cannot be combined with early exit");
    }
    if (!params.cont_batching) {
        throw std::runtime_error("--no-cont-batching cannot be combined with early exit");
    }

    std::string head = "shared";

    if (!p.exits.empty()) {
        exits       = std::make_unique<common_drex_exits>(common_drex_exits::options { "--drex-exits", "--drex-exit-layers" }, p.exits, p.exit_layers);
        ramp_layers = exits->layers();
    } else {
        ramp_layers = read_exit_layers(params.model.path, head);
        if (!p.exit_layers.empty()) {
            ramp_layers = p.exit_layers;
        }
    }
    if (ramp_layers.empty()) {
        throw std::runtime_error("the model has no early_exit.layers in its metadata: "
                "name the layers with --drex-exit-layers if it was trained for early exit, else fit exits to it "
                "(cargo xtask tune) and name the file with --drex-exits");
    }
    if (head != "shared") {
        throw std::runtime_error("early_exit.head = " + head + " is not supported, expected shared (the model's own norm and head)");
    }
    const auto thresholds = p.all_thresholds();
    if (thresholds.size() != 1 && thresholds.size() != ramp_layers.size()) {
        throw std::runtime_error(string_format("--drex-threshold has %zu values, expected 1 or one for each of the %zu exit layers",
                    thresholds.size(), ramp_layers.size()));
    }

    // every slot may have its own row in the arena, and exited ones beside it
    n_slots = p.n_slots > 0 ? p.n_slots : params.n_parallel*(1 + p.max_pending);

    config.n_layers          = n_layer;
    config.n_ramps           = ramp_layers.size();
    config.ramp_layers       = ramp_layers.data();
    config.n_slots           = n_slots;
    config.max_requests      = params.n_parallel;
    config.max_batch         = std::min(n_rows_max(params), llama_n_ubatch(ctx));
    config.max_pass_rows     = llama_n_ubatch(ctx);
    config.max_pending       = p.max_pending;
    config.threshold         = thresholds[0];
    config.ramp_thresholds   = thresholds.size() > 1 ? thresholds.data() : nullptr;
    config.flush_rows        = p.flush_rows;
    config.min_ready         = p.min_ready;
    config.max_hold_ns       = uint64_t(p.max_hold_ms*1e6);
    config.token_deadline_ns = uint64_t(p.deadline_ms*1e6);
    config.art_ratio         = p.art_ratio;

    if (p.max_batch > (int32_t) llama_n_ubatch(ctx)) { // every row of a window is in one ubatch
        const char * by = params.n_ubatch > (int32_t) llama_n_ubatch(ctx) ? "--batch-size" : "--ubatch-size";
        throw std::runtime_error(string_format("--drex-max-batch %d is larger than %s %u", p.max_batch, by, llama_n_ubatch(ctx)));
    }

    fill = config.fill;

    // a window can have as many prompt rows as fit into a micro-batch
    llama_layer_range_params range = {};
    range.n_rows       = n_slots + llama_n_ubatch(ctx);
    range.n_graphs     = p.n_graphs;
    range.n_rows_graph = config.max_batch;
    range.max_bytes    = size_t(p.graphs_mib) << 20;
    range.il_arena     = std::min<int32_t>(ramp_layers[0], n_layer - 1);
    if (const char * why = llama_layer_range_init(ctx, range)) {
        throw std::runtime_error(why);
    }
    if (exits) {
        exits->load(ctx, params.model.path);
    }
    bind_device(config, params);

    check(drex_create(&config, &engine));

    try {
        bind_kv();

        slots    .resize(params.n_parallel);
        plan_rows.resize(config.max_batch);
        arena_rows.reserve(config.max_pass_rows);
        verdicts .resize(config.max_batch);
        agreed   .resize(config.max_batch);
        chosen   .resize(config.max_batch);
        positions.resize(config.max_batch);
        to_project.reserve(config.max_batch);
        batch_project = std::make_unique<common_batch>(ctx);
        decisions.resize(config.max_batch);
        step_rows .reserve(config.max_batch);

        banned   .resize(config.max_batch, -std::numeric_limits<float>::infinity());

        request_deadline_ms = p.request_deadline_ms;
        all_strict = *std::min_element(thresholds.begin(), thresholds.end()) > 1.0f;

        open_files(params, is_resume);

        if (config.policy == DREX_POLICY_ART && std::isnan(config.art_ratio)) {
            calibrate();
        }
    } catch (...) {
        drex_destroy(engine);
        throw;
    }
    say(params);
}

void server_drex::say(const common_params & params) const {
    const auto & p = params.drex;

    auto list = [](const auto & values) {
        std::stringstream out;
        for (size_t i = 0; i < values.size(); ++i) {
            out << (i > 0 ? "," : "") << values[i];
        }
        return out.str();
    };
    llama_layer_range_kv kv;
    const bool streams = llama_layer_range_get_kv(ctx, 0, &kv) && kv.n_stream > 1;

    const std::string threshold = p.agrees() ? string_format("as audits allow for an agreement of %g", p.quality) :
        p.learns() ? "as learned" : list(p.all_thresholds());

    SRV_INF("early exit: policy %s, after layers %s of %d%s, threshold %s (%s), fill %s, %s\n", p.policy.c_str(), list(ramp_layers).c_str(),
            n_layer, exits ? " through fitted exits" : "", threshold.c_str(), p.metric.c_str(), p.fill_name().c_str(),
            streams ? "a KV cache with a stream for each slot" : "a unified KV cache");
}

void server_drex::settle_policy(common_params & params) {
    params.drex.settle();
    if (!params.drex.enabled() || !params.drex.exit_layers.empty() || !params.drex.exits.empty() || !std::getenv("LLAMA_SERVER_ROUTER_PORT")) {
        return;
    }
    std::string head;
    if (read_exit_layers(params.model.path, head).empty()) {
        SRV_WRN("early exit: policy off instead of %s: %s has no early_exit.layers in its metadata\n",
                params.drex.policy.c_str(), params.model.path.c_str());
        params.drex.policy  = "off";
        params.drex.quality = 0.0;
    }
}

void server_drex::say_off(const common_params & params) {
    const common_params_drex defaults;
    const auto & p = params.drex;

    if (p.metric != defaults.metric || !p.fill.empty() || p.quality > 0.0 || !p.exit_layers.empty() || !p.thresholds.empty() ||
            !p.exits.empty() || !p.profile.empty() || !p.record.empty()) {
        SRV_WRN("%s", "early exit is off: options that begin with --drex- have no effect without --drex on or --drex-policy\n");
    }
}

// drex works where the layers and the head are computed, on their memory and their stream, if that is the host or one CUDA
// device. Elsewhere, and where they are spread over devices, the logits of a ramp come to the host.
void server_drex::bind_device(drex_config & config, const common_params & params) {
    config.device = DREX_DEVICE_HOST;

    auto * backend = llama_layer_range_backend(ctx);
    auto * dev     = backend ? ggml_backend_get_device(backend) : nullptr;

    if (dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return;
    }
    if (params.split_mode == LLAMA_SPLIT_MODE_ROW || params.split_mode == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("--split-mode row and tensor cannot be combined with early exit: use --split-mode layer or none");
    }

    // the device's context is current on this thread from here on
    stream = dev && strncmp(ggml_backend_dev_name(dev), "CUDA", 4) == 0 ? llama_layer_range_stream(ctx) : nullptr;
    if (stream) {
        config.device  = DREX_DEVICE_CUDA;
        config.n_vocab = n_vocab;
    } else {
        fetches = true;
    }
}

void server_drex::bind_kv() {
    std::vector<drex_kv_layer> layers(n_layer, DREX_KV_LAYER_INITIALIZER);

    const char * unlike = llama_layer_range_kv_unlike(ctx);
    if (unlike) {
        why_no_copy = std::string("cannot be used with this model, ") + unlike;
    }
    for (int32_t il = 0; il < n_layer && why_no_copy.empty(); ++il) {
        llama_layer_range_kv kv;
        if (!llama_layer_range_get_kv(ctx, il, &kv)) {
            throw std::runtime_error(string_format("layer %d has no K/V storage", il));
        }
        if (kv.v_trans && kv.n_stream > 1) {
            // V is transposed in each stream: the cells of all streams have no common stride
            why_no_copy = "needs flash attention (--flash-attn on) or --kv-unified";
            break;
        }
        if (!stream && !(ggml_backend_buffer_is_host(kv.k->buffer) && ggml_backend_buffer_is_host(kv.v->buffer))) {
            why_no_copy = "needs the KV cache of all layers in the memory of the host (--no-kv-offload) or of one CUDA device";
            break;
        }

        auto & l = layers[il];
        l.n_cells       = kv.n_cells;
        l.k             = kv.k->data;
        l.k_row_bytes   = ggml_row_size(kv.k->type, kv.k->ne[0]);
        l.k_cell_stride = kv.k->nb[1];
        l.v             = kv.v->data;
        l.v_row_bytes   = ggml_row_size(kv.v->type, kv.v->ne[0]);
        if (kv.v_trans) {
            l.v_elem_bytes  = ggml_type_size(kv.v->type);
            l.v_elem_stride = l.v_elem_bytes*kv.n_cells;
        } else {
            l.v_cell_stride = kv.v->nb[1];
        }
    }
    if (!why_no_copy.empty()) {
        check_copy("--drex-fill", fill);
        return;
    }
    check(drex_bind_kv(engine, layers.data(), n_layer));
}

void server_drex::check_copy(const char * what, drex_fill_mode mode) const {
    if (mode == DREX_FILL_COPY && !why_no_copy.empty()) {
        throw std::invalid_argument(std::string(what) + " copy " + why_no_copy + "; the other fills are propagate, postfill and verify");
    }
}

server_drex::~server_drex() {
    try {
        save_profile();
    } catch (const std::exception & e) {
        SRV_ERR("early exit: %s\n", e.what());
    }
    drex_destroy(engine);
}

// ART compares windows with full passes, which it never runs itself: time both before the first request
void server_drex::calibrate() {
    const auto * vocab = llama_model_get_vocab(llama_get_model(ctx));

    llama_token token = llama_vocab_bos(vocab);
    if (token == LLAMA_TOKEN_NULL) {
        token = 0;
    }

    common_batch batch(ctx);
    auto * mem = llama_get_memory(ctx);

    std::vector<uint32_t> bounds = ramp_layers;
    bounds.push_back(n_layer);

    llama_layer_range_kv kv;
    const bool unified = llama_layer_range_get_kv(ctx, 0, &kv) && kv.n_stream == 1; // rows attend over the cells of all

    const int n_rows_max = std::min(slots.size(), verdicts.size());
    const int n_reps     = 4; // the first one builds the graph and is not counted

    std::vector<int32_t> arena(n_rows_max);

    for (int n_rows = 1; ; n_rows = std::min(2*n_rows, n_rows_max)) {
        llama_memory_clear(mem, false);

        llama_pos pos = 0;

        // [begin, end) over the rows at the current position
        auto measure = [&](int32_t begin, int32_t end, bool window, bool count) {
            batch.clear();
            for (int i = 0; i < n_rows; ++i) {
                batch.add(token, pos, i, true);
                arena[i] = i;
            }
            auto * rendered = batch.get();

            const int64_t t_start = now_ns();
            const int32_t ret = window ?
                llama_layer_range_decode(ctx, rendered, begin, end, arena.data()) :
                llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, rendered);
            llama_synchronize(ctx);
            if (ret != 0) {
                throw std::runtime_error("failed to run the calibration passes");
            }
            if (count) {
                drex_observation obs = DREX_OBSERVATION_INITIALIZER;
                obs.n_rows      = n_rows;
                obs.layer_begin = begin;
                obs.layer_end   = end;
                obs.duration_ns = now_ns() - t_start;
                obs.n_kv        = uint64_t(n_rows)*(pos + 1)*(unified ? n_rows : 1);
                check(drex_observe(engine, &obs));
            }
        };

        for (int rep = 0; rep < n_reps; ++rep) {
            measure(0, n_layer, false, rep > 0);
            pos++;

            uint32_t begin = 0;
            for (const uint32_t end : bounds) {
                measure(begin, end, true, rep > 0);
                begin = end;
            }
            pos++;
        }

        // the next number of rows must fit into the cache
        if (n_rows == n_rows_max || 2*n_reps*std::min(2*n_rows, n_rows_max) > (int) llama_n_ctx(ctx)) {
            break;
        }
    }

    llama_memory_clear(mem, false);
}

// A bias that clients give to tokens that are not to come up at all.
static const float ban_bias = -100.0f;

// Each is a strided write for each window.
static const size_t n_bans_max = 64;

// the tokens that the sampler never emits; biased: there are other changes to the logits
static llama_tokens banned_tokens(const llama_vocab * vocab, const std::vector<llama_logit_bias> & biases, bool & biased) {
    std::map<llama_token, float> sums;
    for (const auto & b : biases) {
        sums[b.token] += b.bias;
    }
    int32_t n_suppress = 0;
    const llama_token * suppress = llama_vocab_get_suppress_tokens(vocab, &n_suppress);
    for (int32_t i = 0; i < n_suppress; ++i) {
        sums[suppress[i]] = -std::numeric_limits<float>::infinity();
    }

    llama_tokens res;
    for (const auto & [token, bias] : sums) {
        if (bias <= ban_bias && token >= 0 && token < llama_vocab_n_tokens(vocab)) {
            res.push_back(token);
        } else if (bias != 0.0f) {
            biased = true;
        }
    }
    if (res.size() > n_bans_max) {
        biased = true;
        res.clear();
    }
    return res;
}

void server_drex::add_request(int id_slot, const server_task & task, bool same_lora) {
    const auto & p = task.params;

    if (!task.need_sampling()) {
        throw std::invalid_argument("embeddings and reranking cannot be combined with early exit");
    }
    if (p.sampling.backend_sampling) {
        throw std::invalid_argument("Field 'backend_sampling': cannot be combined with early exit");
    }
    if (!p.lora.empty() && !(has_lora && same_lora)) {
        throw std::invalid_argument("Field 'lora': with early exit, a request has the adapters and scales of the server (/lora-adapters)");
    }

    if (p.drex.tokens && p.res_type != TASK_RESPONSE_TYPE_NONE && p.res_type != TASK_RESPONSE_TYPE_OAI_CMPL &&
            p.res_type != TASK_RESPONSE_TYPE_OAI_CHAT) {
        throw std::invalid_argument("Field 'drex_tokens': answers of /completion, /v1/completions and /v1/chat/completions have them");
    }

    if (slots[id_slot].leaving) {
        abandon(); // an exception has cut the last step short
    }

    drex_request_config config = DREX_REQUEST_CONFIG_INITIALIZER;

    config.id                = task.id;
    config.threshold         = p.drex.threshold;
    config.priority          = p.drex.priority;
    config.token_deadline_ns = uint64_t(p.drex.deadline_ms*1e6);

    config.request_deadline_ns = uint64_t((p.drex.request_deadline_ms > 0 ? p.drex.request_deadline_ms : request_deadline_ms)*1e6);
    config.max_tokens          = p.n_predict > 0 ? p.n_predict : 0;

    if (!p.drex.fill.empty()) {
        config.fill = fill_from_name("Field 'drex_fill'", p.drex.fill);
    }
    if (p.drex.quality == 1.0 && !p.drex.fill.empty() && config.fill != DREX_FILL_VERIFY) {
        throw std::invalid_argument("Field 'drex_quality': lossless cannot be combined with 'drex_fill' " + p.drex.fill);
    }
    config.quality = p.drex.quality;
    check_copy("Field 'drex_fill':", p.drex.fill.empty() ? fill : config.fill);

    if (!p.drex.metric.empty() && drex_metric_from_name(p.drex.metric.c_str(), &config.metric) != DREX_OK) {
        throw std::invalid_argument(std::string("Field 'drex_metric': ") + drex_last_error());
    }

    // Confidence is that of the model's own distribution without the tokens that the request bans, and with a grammar a row
    // leaves only where the grammar allows its best token. Where the request changes the distribution in other ways before it
    // samples, a confident ramp says nothing about the token: such a request exits early only if it names a threshold itself.
    const auto & s = p.sampling;

    bool biased = false;
    llama_tokens bans = banned_tokens(llama_model_get_vocab(llama_get_model(ctx)), s.logit_bias, biased);

    using type = common_sampler_type;
    auto has = [&](type t) { return std::find(s.samplers.begin(), s.samplers.end(), t) != s.samplers.end(); };
    const bool reshaped = biased ||
        s.penalty_repeat != 1.0f || s.penalty_freq != 0.0f || s.penalty_present != 0.0f || s.dry_multiplier != 0.0f;

    // its sampler would choose the best token: with these settings nothing before the temperature can remove it
    const bool greedy = s.temp <= 0.0f && has(type::COMMON_SAMPLER_TYPE_TEMPERATURE) && s.dynatemp_range <= 0.0f && !reshaped &&
        s.grammar.empty() && s.n_probs == 0 && s.mirostat == 0 && s.xtc_probability <= 0.0f && s.typ_p >= 1.0f &&
        !has(type::COMMON_SAMPLER_TYPE_INFILL) && !has(type::COMMON_SAMPLER_TYPE_ADAPTIVE_P) &&
        s.reasoning_budget_tokens < 0 && !s.reasoning_control;

    // What the request names goes before the server's quality. An agreement is counted in tokens that the full model would have
    // chosen: where its best token is not what a request gets, the request is lossless.
    const bool names   = !p.drex.fill.empty() || !std::isnan(p.drex.threshold);
    const double share = p.drex.quality > 0.0 ? p.drex.quality : names ? 0.0 : options.quality;
    const bool  agrees = share > 0.0 && share < 1.0;
    if (agrees && p.drex.quality > 0.0 && !std::isnan(p.drex.threshold)) {
        throw std::invalid_argument(string_format("Field 'drex_quality': %g cannot be combined with 'drex_threshold', which follows from it", share));
    }
    if (agrees && slides) {
        throw std::invalid_argument(string_format("Field 'drex_quality': %g needs a server with --swa-full for this model", share));
    }
    if (agrees) {
        const drex_fill_mode its_fill = !p.drex.fill.empty() ? config.fill : options.fill.empty() ? DREX_FILL_PROPAGATE : fill;
        config.quality = greedy ? share    : 1.0;
        config.fill    = greedy ? its_fill : drex_fill_mode(DREX_FILL_DEFAULT);
    }
    if (reshaped && std::isnan(config.threshold)) {
        config.threshold = 2.0f;
    }

    if (drex_request_add(engine, &config) != DREX_OK) {
        throw std::invalid_argument(drex_last_error());
    }

    drex_request_info in = DREX_REQUEST_INFO_INITIALIZER;
    check(drex_request_get(engine, config.id, &in));

    slots[id_slot] = {};
    slots[id_slot].added  = true;
    slots[id_slot].fill   = in.fill;
    slots[id_slot].id     = config.id;
    slots[id_slot].greedy = greedy;
    slots[id_slot].strict = in.quality > 0.0 || (std::isnan(config.threshold) ? all_strict : config.threshold > 1.0f);
    slots[id_slot].grammar = !s.grammar.empty();
    slots[id_slot].raw     = s.n_probs > 0;
    slots[id_slot].traces_tokens = p.drex.tokens;
    slots[id_slot].bans    = std::move(bans);

    if (record.is_open()) {
        record << json({{"e", "add"}, {"t", now_ns()}, {"id", config.id}, {"n_prompt", task.n_tokens()}}).dump() << "\n";
    }
}

bool server_drex::audits(int id_slot) const {
    return slots[id_slot].added && info(id_slot).audit_due;
}

bool server_drex::differs(int id_slot, int i, llama_token token) const {
    const float * logits = llama_get_logits_ith(ctx, i);
    const auto  & bans   = slots[id_slot].bans;

    if (!logits) {
        throw std::runtime_error("a row gave no logits");
    }
    llama_token best = LLAMA_TOKEN_NULL;
    for (llama_token t = 0; t < n_vocab; ++t) {
        if (std::isnan(logits[t])) {
            throw std::runtime_error(string_format("the logit of token %d is NaN", t));
        }
        if ((best == LLAMA_TOKEN_NULL || logits[t] > logits[best]) && std::find(bans.begin(), bans.end(), t) == bans.end()) {
            best = t;
        }
    }
    return best != token;
}

void server_drex::audited(int id_slot, int n_tokens, int n_differing) {
    warn(drex_request_audit(engine, slots[id_slot].id, n_tokens, n_differing));
}

int server_drex::drop(int id_slot) {
    auto & slot = slots[id_slot];
    if (!slot.added) {
        return 0;
    }

    if (verifying && std::any_of(step_rows.begin(), step_rows.end(), [&](const row & r) { return r.id_slot == id_slot; })) {
        slot.leaving = true; // its last tokens are counted first
        return 0;
    }

    // in_flight: an exception has cut finish() short, maybe before the exited rows' skipped layers were filled
    const auto in = info(id_slot);
    const bool unfinished = in.state == DREX_REQUEST_HELD || in.state == DREX_REQUEST_RUNNING ||
        (in_flight && std::any_of(step_rows.begin(), step_rows.end(), [&](const row & r) { return r.id_slot == id_slot; }));

    // what left in this step and was not projected has no K and V in the skipped layers
    const auto left = std::remove_if(to_project.begin(), to_project.end(), [&](const projection & p) { return p.id_slot == id_slot; });
    const bool hole = left != to_project.end();
    to_project.erase(left, to_project.end());

    warn(drex_request_remove(engine, slot.id)); // slots are released in the handling of exceptions too
    if (record.is_open()) {
        record << json({{"e", "remove"}, {"t", now_ns()}, {"id", slot.id}}).dump() << std::endl;
    }
    // with fill verify, such tokens are not among the prompt's
    const int res = slot.verifies() ? 0 : std::max<int>(unfinished || hole, in.n_pending + (in.slot != DREX_NO_SLOT));
    slot = {};

    return res;
}

void server_drex::settle(int id_slot) {
    auto & slot = slots[id_slot];
    uint32_t n = 0;
    check(drex_request_settle(engine, slot.id, now_ns(), &n));
    GGML_ASSERT(n > 0);
    slot.busy = true;
}

bool server_drex::ran(int id_slot, llama_token token) {
    auto & slot = slots[id_slot];
    if (slot.verifies()) {
        slot.ahead.push_back(token);
    }
    return !slot.verifies();
}

void server_drex::verified(int id_slot) {
    auto & ahead = slots[id_slot].ahead;
    ahead.erase(ahead.begin());
}

bool server_drex::approximates(size_t i) const {
    if (step.ramp == DREX_NO_RAMP || verdicts[i].decision != DREX_DECISION_EXIT) {
        return false;
    }
    const auto mode = slots[step_rows[i].id_slot].fill;
    return mode == DREX_FILL_COPY || mode == DREX_FILL_PROPAGATE;
}

llama_token server_drex::drafted(size_t i) const {
    const bool yes = step.ramp != DREX_NO_RAMP && verdicts[i].decision == DREX_DECISION_EXIT && slots[step_rows[i].id_slot].verifies();
    return yes ? verdicts[i].token : LLAMA_TOKEN_NULL;
}

void server_drex::ready(int id_slot, int n_kv) {
    auto & slot = slots[id_slot];
    check(drex_request_ready(engine, slot.id, n_kv, now_ns()));
    slot.busy = true;
}

bool server_drex::plan(int n_prompt_rows, int n_rows_max) {
    if (in_flight) {
        abandon(); // the last step ended in an exception
    }

    drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;

    input.n_prompt_rows = n_prompt_rows;
    input.now_ns        = now_ns();

    drex_status status = drex_plan(engine, &input, plan_rows.data(), std::min<uint32_t>(n_rows_max, plan_rows.size()), &step);
    if (status == DREX_ERROR_CAPACITY) {
        // a deep window with many rows of one request; it needs no cells
        status = drex_plan(engine, &input, plan_rows.data(), plan_rows.size(), &step);
    }
    check(status);

    step_rows     .clear();
    arena_rows    .clear();
    prompt_outputs.clear();

    for (uint32_t i = 0; i < step.n_rows; ++i) {
        int id_slot = 0;
        while (!slots[id_slot].added || slots[id_slot].id != plan_rows[i].request) {
            id_slot++;
        }
        // pending rows count back from the request's own row, its last one, or from where the next one will be
        uint32_t last = i;
        while (last + 1 < step.n_rows && plan_rows[last + 1].request == plan_rows[i].request) {
            last++;
        }
        const bool ran    = !is_first() && plan_rows[last].back == 0;
        const bool verify = slots[id_slot].verifies();
        const int  offset = int(slots[id_slot].ahead.size()) - (ran ? 1 : 0) - int(plan_rows[i].back);

        step_rows .push_back({ id_slot, offset, verify, verify && plan_rows[i].back > 0, false });
        arena_rows.push_back(plan_rows[i].slot);
    }

    in_flight = step.n_rows > 0 || step.n_prompt_rows > 0;

    return in_flight;
}

int32_t server_drex::run(llama_batch_ext * batch) {
    t_run = now_ns();

    if (const int32_t ret = project()) {
        return ret;
    }

    const int32_t ret = llama_layer_range_decode(ctx, batch, step.layer_begin, step.layer_end, arena_rows.data());
    if (ret != 0) {
        return ret;
    }

    if (step.ramp == DREX_NO_RAMP) {
        fetch_logits();
    } else if (step.n_rows > 0) {
        if (fetches) {
            fetch_logits(0, step.n_rows);
            llama_synchronize(ctx);
        }
        ban_tokens();
    }
    if (step.ramp != DREX_NO_RAMP && stream && step.n_rows > 0) {
        enqueued = false;
        const drex_logits logits = ramp_logits();
        enqueued = drex_ramp_enqueue(engine, &logits) == DREX_OK; // drex_ramp() waits for it, or says what is wrong
    }
    if (stream) {
        drex_replan(engine, 2000, nullptr); // below 0.1 ms, while the device works
    }
    if (step.ramp == DREX_NO_RAMP || !stream || step.n_rows == 0) {
        llama_synchronize(ctx);
    }

    t_ran = now_ns();

    return ret;
}

// Tokens are scored that can be emitted: banned tokens have no logit while drex looks at the rows.
void server_drex::ban_tokens() {
    size_t n_raw = 0;
    for (const auto & r : step_rows) {
        n_raw += slots[r.id_slot].raw ? slots[r.id_slot].bans.size() : 0;
    }
    raw.resize(n_raw);
    edit_bans(false);
}

// log probabilities are those of the model, banned tokens included
void server_drex::unban_tokens() {
    if (!raw.empty()) {
        edit_bans(true);
    }
}

// one logit of each row, where drex scores them
bool server_drex::edit_logits(llama_token token, size_t first, size_t n, float * values, bool write) {
    if (!fetches) {
        return llama_layer_range_edit_logits(ctx, token, first, n, values, write);
    }
    for (size_t i = 0; i < n; ++i) {
        float & logit = llama_get_logits_ith(ctx, first + i)[token];
        if (write) {
            logit = values[i];
        } else {
            values[i] = logit;
        }
    }
    return true;
}

// rows beside each other that ban the same tokens are written together
void server_drex::edit_bans(bool restore) {
    size_t n_raw = 0;
    for (size_t first = 0, n = 0; first < step_rows.size(); first += n) {
        const auto & slot = slots[step_rows[first].id_slot];
        for (n = 1; first + n < step_rows.size(); ++n) {
            const auto & other = slots[step_rows[first + n].id_slot];
            if (other.bans != slot.bans || other.raw != slot.raw) {
                break;
            }
        }
        for (const llama_token token : slot.bans) {
            bool ok = true;
            if (slot.raw) {
                ok = edit_logits(token, first, n, raw.data() + n_raw, restore);
                n_raw += n;
            }
            if (!restore) {
                ok = ok && edit_logits(token, first, n, banned.data(), true);
            }
            if (!ok) {
                throw std::runtime_error(string_format("failed to ban token %d at a ramp", token));
            }
        }
    }
}

// drex asks before it lets a row out that is sure of the token
static uint32_t confirm(void * data, uint32_t row, int32_t token) {
    return static_cast<const server_drex *>(data)->confirms(row, token);
}

bool server_drex::confirms(size_t i, llama_token token) const {
    const auto & slot = slots[step_rows[i].id_slot];
    if (!slot.grammar || slot.n_drafts > 0) {
        return true; // the sampler does not know of drafts: what the grammar says to the next one is seen when they are verified
    }
    try {
        return allows(step_rows[i].id_slot, token);
    } catch (const std::exception & e) {
        SRV_ERR("early exit: %s\n", e.what()); // the sampler meets it again, and ends the request
        return false;
    }
}

drex_logits server_drex::ramp_logits() {
    const ggml_tensor * t = llama_layer_range_logits(ctx);
    if (!t) {
        throw std::runtime_error("the window has no logits");
    }

    drex_logits logits = DREX_LOGITS_INITIALIZER;

    logits.dtype            = DREX_DTYPE_F32;
    logits.data             = fetches ? llama_get_logits_ith(ctx, 0) : t->data;
    logits.row_stride_bytes = t->nb[1];
    logits.n_rows           = step.n_rows;
    logits.n_vocab          = n_vocab;
    logits.stream           = stream;
    logits.enqueued         = enqueued ? 1 : 0;
    if (exits) {
        if (fetches) {
            exits->pick(logits);
        }
        exits->describe(logits, step.ramp);
    }

    if (std::any_of(step_rows.begin(), step_rows.end(), [&](const row & r) { return slots[r.id_slot].grammar; })) {
        logits.confirm      = confirm;
        logits.confirm_data = this;
    }

    return logits;
}

bool server_drex::has_drafts() const {
    return step.ramp == DREX_NO_RAMP && std::any_of(step_rows.begin(), step_rows.end(), [](const row & r) { return r.draft; });
}

void server_drex::finish(uint64_t n_kv) {
    if (step.ramp != DREX_NO_RAMP && step.n_rows > 0) {
        const drex_logits logits = ramp_logits();

        check(drex_ramp(engine, &logits, llama_layer_range_cells(ctx), verdicts.data(), verdicts.size()));
        unban_tokens();
        if (why_no_copy.empty()) {
            check(drex_fill(engine)); // without K/V nobody has fill copy, and nothing is drex's to fill
        }
        t_ran = now_ns(); // scoring and filling are part of what a ramp costs
    } else if (has_drafts()) {
        check(drex_verify(engine, agreed.data(), step.n_rows, decisions.data(), decisions.size()));
    }

    for (size_t i = 0; i < step_rows.size(); ++i) {
        const auto & r    = step_rows[i];
        auto       & slot = slots[r.id_slot];

        const bool last = step.ramp == DREX_NO_RAMP;
        const bool done = last || verdicts[i].decision == DREX_DECISION_EXIT;
        if (done) {
            slot.busy = false;
        }
        if (slot.traces_tokens && !last) {
            trace_ramp(i);
        }
        if (slot.projects() && done && !last) {
            to_project.push_back({ r.id_slot, positions[i], int32_t(plan_rows[i].slot) });
            project_layer = step.layer_end;
        }
        step_rows[i].emit = done && !r.verify && plan_rows[i].back == 0;
        if (slot.verifies() && done && !last) {
            slot.n_drafts++;
        }
        if (slot.verifies() && last) {
            slot.n_drafts = 0;
        }
    }

    if (step.ramp != DREX_NO_RAMP) {
        fetch_logits();
    }

    load.windows.observe(t_ran - t_run);

    drex_completion done = DREX_COMPLETION_INITIALIZER;

    done.now_ns      = now_ns();
    done.duration_ns = t_ran - t_run;
    done.n_kv        = n_kv;
    done.tokens      = is_last() ? chosen.data() : nullptr;

    if (record.is_open()) {
        record_step(done.duration_ns, n_kv);
    }

    check(drex_complete(engine, &done));
    end_step();
    keep_profile();
    say_pace(done.now_ns);
}

// only rows whose sampler needs them leave the device; the sampler waits for them
void server_drex::fetch_logits() {
    const bool last = step.ramp == DREX_NO_RAMP;

    auto wanted = [&](size_t i) {
        auto & slot = slots[step_rows[i].id_slot];
        slot.top = LLAMA_TOKEN_NULL;
        if (last) {
            return step_rows[i].verify || plan_rows[i].back == 0;
        }
        if (!step_rows[i].emit) {
            return false;
        }
        const bool known = slot.greedy && verdicts[i].token >= 0;
        slot.top = known ? verdicts[i].token : LLAMA_TOKEN_NULL;
        return !known && !fetches;
    };

    for (size_t i = 0, first = 0; i <= step_rows.size(); ++i) {
        if (i == step_rows.size() || !wanted(i)) {
            if (first < i) {
                fetch_logits(first, i - first);
            }
            first = i + 1;
        }
    }
    for (const int i : prompt_outputs) {
        fetch_logits(i, 1);
    }
}

void server_drex::fetch_logits(size_t first, size_t n) {
    if (!llama_layer_range_fetch_logits(ctx, first, n)) {
        throw std::runtime_error("failed to read the logits");
    }
}

void server_drex::abandon() {
    end_step();
    check(drex_abandon(engine));
}

int32_t server_drex::project() {
    if (to_project.empty()) {
        return 0;
    }

    batch_project->clear();
    project_rows.clear();
    for (const auto & p : to_project) {
        batch_project->add(0, p.pos, p.id_slot, false);
        project_rows.push_back(p.arena_row);
    }

    const int32_t ret = llama_layer_range_project(ctx, batch_project->get(), project_layer, project_rows.data());
    if (ret == 0) {
        to_project.clear();
    }

    return ret;
}

std::vector<int> server_drex::culprits(int32_t ret, llama_batch_ext * batch) {
    const bool projects = !to_project.empty(); // that failed, not the window

    std::vector<int> res;
    if (ret == -1) {
        res = projects ?
            llama_layer_range_misfits(ctx, batch_project->get(), project_layer,    project_rows.data()) :
            llama_layer_range_misfits(ctx, batch,                step.layer_begin, arena_rows.data());
    }
    if (res.empty()) {
        for (const auto & p : to_project) {
            res.push_back(p.id_slot);
        }
    }
    return res;
}

void server_drex::end_step() {
    in_flight = false;
    verifying = false;

    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i].leaving) {
            slots[i].leaving = false;
            drop(i);
        }
    }
}

void server_drex::agrees(size_t i, bool yes, bool last) {
    auto & slot = slots[step_rows[i].id_slot];

    agreed[i] = yes ? (last ? 2 : 1) : 0;
    if (slot.traces_tokens) {
        trace_draft(step_rows[i].id_slot, slot.judged, yes);
    }
    slot.n_verified++;
    slot.n_accepted += yes;
    slot.judged = LLAMA_TOKEN_NULL;
}
