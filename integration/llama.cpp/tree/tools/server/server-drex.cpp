#include "server-drex.h"

#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>

// a failed call leaves no half-done work behind; its text names the field and the value
static void check(drex_status status) {
    if (status != DREX_OK) {
        throw std::runtime_error(drex_last_error());
    }
}

// where an exception would end the server, or end requests that have nothing to do with it
static void warn(drex_status status) {
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
    const bool    keeps     = p.fill == "postfill" || p.fill == "verify";
    const int32_t n_pending = std::max(p.max_pending, 0);
    const int32_t n_rows    = keeps ? params.n_parallel*(1 + n_pending) : params.n_parallel + n_pending;

    // all of them are in one micro-batch, which is no larger than a batch
    return std::min(std::min(params.n_ubatch, params.n_batch), n_rows);
}

uint32_t server_drex::n_outputs_max(const common_params & params) {
    return std::min<uint32_t>(std::min(params.n_ubatch, params.n_batch), n_rows_max(params) + params.n_parallel);
}

server_drex::server_drex(const common_params & params, llama_context * ctx, bool has_spec, bool is_resume) : ctx(ctx) {
    const auto & p     = params.drex;
    const auto * model = llama_get_model(ctx);

    n_layer = llama_model_n_layer(model);
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    drex_config config = DREX_CONFIG_INITIALIZER;

    check(drex_policy_from_name(p.policy.c_str(), &config.policy));
    check(drex_metric_from_name(p.metric.c_str(), &config.metric));

    config.fill = fill_from_name("--drex-fill", p.fill);

    // options that do not work with early exit yet
    if (params.embedding) {
        throw std::runtime_error("--embedding cannot be combined with early exit");
    }
    if (has_spec || !params.mmproj.path.empty()) {
        throw std::runtime_error("speculative decoding and --mmproj cannot be combined with early exit");
    }
    if (!params.lora_adapters.empty()) {
        // requests can differ in their adapters, and their rows would share a window
        throw std::runtime_error("--lora cannot be combined with early exit");
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

    ramp_layers = read_exit_layers(params.model.path, head);
    if (!p.exit_layers.empty()) {
        ramp_layers = p.exit_layers;
    }
    if (ramp_layers.empty()) {
        throw std::runtime_error("the model has no early_exit.layers in its metadata: "
                "it was not trained for early exit, or name the layers with --drex-exit-layers");
    }
    if (head != "shared") {
        throw std::runtime_error("early_exit.head = " + head + " is not supported, expected shared (the model's own norm and head)");
    }
    if (p.thresholds.empty() || (p.thresholds.size() != 1 && p.thresholds.size() != ramp_layers.size())) {
        throw std::runtime_error(string_format("--drex-threshold has %zu values, expected 1 or one for each of the %zu exit layers",
                    p.thresholds.size(), ramp_layers.size()));
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
    config.threshold         = p.thresholds[0];
    config.ramp_thresholds   = p.thresholds.size() > 1 ? p.thresholds.data() : nullptr;
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
    range.n_graphs     = p.n_graphs > 0 ? p.n_graphs : std::max(128, 4*params.n_parallel);
    range.n_rows_graph = config.max_batch;
    range.max_bytes    = size_t(p.graphs_mib) << 20;
    range.il_arena     = std::min<int32_t>(ramp_layers[0], n_layer - 1);
    if (const char * why = llama_layer_range_init(ctx, range)) {
        throw std::runtime_error(why);
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
        positions.resize(config.max_batch);
        to_project.reserve(config.max_batch);
        batch_project = std::make_unique<common_batch>(ctx);
        decisions.resize(config.max_batch);
        step_rows .reserve(config.max_batch);

        request_deadline_ms = p.request_deadline_ms;
        profile             = p.profile;

        load_profile();

        if (config.policy == DREX_POLICY_ART && std::isnan(config.art_ratio)) {
            calibrate();
        }

        if (!p.record.empty()) {
            record.open(p.record, is_resume ? std::ios::app : std::ios::out);
            if (!record) {
                throw std::runtime_error("--drex-record " + p.record + ": " + strerror(errno));
            }
            std::vector<float> thresholds(ramp_layers.size(), p.thresholds[0]);
            if (p.thresholds.size() > 1) {
                thresholds = p.thresholds;
            }
            record << json {
                {"drex_record", 1},         {"n_layers", n_layer},  {"ramp_layers", ramp_layers},         {"thresholds", thresholds},
                {"metric",      p.metric},  {"policy", p.policy},   {"max_batch",   std::min(config.max_batch, config.max_requests)},
            }.dump() << std::endl;
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

    SRV_INF("early exit: policy %s, after layers %s of %d, threshold %s (%s), fill %s, %s\n", p.policy.c_str(), list(ramp_layers).c_str(),
            n_layer, list(p.thresholds).c_str(), p.metric.c_str(), p.fill.c_str(),
            streams ? "a KV cache with a stream for each slot" : "a unified KV cache");
}

void server_drex::settle_policy(common_params & params) {
    if (!params.drex.enabled() || !params.drex.exit_layers.empty() || !std::getenv("LLAMA_SERVER_ROUTER_PORT")) {
        return;
    }
    std::string head;
    if (read_exit_layers(params.model.path, head).empty()) {
        SRV_WRN("early exit: policy off instead of %s: %s has no early_exit.layers in its metadata\n",
                params.drex.policy.c_str(), params.model.path.c_str());
        params.drex.policy = "off";
    }
}

void server_drex::say_off(const common_params & params) {
    const common_params_drex defaults;
    const auto & p = params.drex;

    if (p.metric != defaults.metric || p.fill != defaults.fill || p.exit_layers != defaults.exit_layers || p.thresholds != defaults.thresholds ||
            !p.profile.empty() || !p.record.empty()) {
        SRV_WRN("%s", "early exit is off: options that begin with --drex- have no effect without --drex-policy\n");
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

void server_drex::load_profile() {
    std::ifstream in(profile);
    if (profile.empty() || !in) {
        return; // it will be there next time
    }
    const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (drex_profile_load(engine, text.c_str()) != DREX_OK) {
        throw std::runtime_error("--drex-profile " + profile + ": " + drex_last_error());
    }
}

void server_drex::save_profile() const {
    size_t n = 0;
    if (profile.empty() || drex_profile_save(engine, nullptr, 0, &n) != DREX_OK) {
        return; // nothing was learned
    }
    std::string text(n + 1, 0);
    check(drex_profile_save(engine, &text[0], text.size(), &n));
    text.resize(n);

    // a server that is killed here must not leave half a file
    const std::string tmp = profile + ".tmp";
    std::ofstream out(tmp);
    out << text << "\n";
    out.close();
    if (!out || std::rename(tmp.c_str(), profile.c_str()) != 0) {
        throw std::runtime_error("--drex-profile " + profile + ": " + strerror(errno));
    }
}

// a line for each window, see docs/simulator.md of drex
void server_drex::record_step(int64_t duration_ns, uint64_t n_kv) {
    json ids = json::array(), conf = json::array(), exits = json::array(), back = json::array(), drafts = json::array();
    bool pending = false;
    const bool verified = has_drafts();
    for (size_t i = 0; i < step_rows.size(); ++i) {
        ids .push_back(slots[step_rows[i].id_slot].id);
        back.push_back(plan_rows[i].back);
        pending = pending || plan_rows[i].back > 0;
        if (step.ramp != DREX_NO_RAMP) {
            conf .push_back(std::isfinite(verdicts[i].confidence) ? json(verdicts[i].confidence) : json(nullptr));
            exits.push_back(verdicts[i].decision == DREX_DECISION_EXIT ? 1 : 0);
        } else if (verified) {
            const auto d = decisions[i];
            drafts.push_back(d == DREX_DECISION_ACCEPT ? json(1) : d == DREX_DECISION_REPLACE ? json(0) : d == DREX_DECISION_DROP ? json(-1) : json(nullptr));
        }
    }
    json line = {
        {"e", "step"}, {"t", t_run}, {"ns", duration_ns}, {"begin", step.layer_begin}, {"end", step.layer_end}, {"kv", n_kv}, {"ids", ids},
    };
    if (step.ramp != DREX_NO_RAMP) {
        line["conf"] = conf;
        line["exit"] = exits;
    }
    if (step.n_prompt_rows > 0) {
        line["prompt"] = step.n_prompt_rows;
    }
    if (pending) {
        line["back"] = back;
        if (verified) {
            line["draft"] = drafts;
        }
    }
    record << line.dump() << "\n";
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
                obs.n_kv        = uint64_t(n_rows)*(pos + 1);
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

void server_drex::add(int id_slot, const server_task & task) {
    const auto & p = task.params;

    if (!task.need_sampling()) {
        throw std::invalid_argument("embeddings and reranking cannot be combined with early exit");
    }
    if (p.sampling.backend_sampling) {
        throw std::invalid_argument("Field 'backend_sampling': cannot be combined with early exit");
    }
    if (!p.lora.empty()) {
        throw std::invalid_argument("Field 'lora': adapters of a single request cannot be combined with early exit");
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
    const drex_fill_mode mode = p.drex.fill.empty() ? fill : config.fill;
    check_copy("Field 'drex_fill':", mode);

    if (!p.drex.metric.empty() && drex_metric_from_name(p.drex.metric.c_str(), &config.metric) != DREX_OK) {
        throw std::invalid_argument(std::string("Field 'drex_metric': ") + drex_last_error());
    }

    // Confidence is that of the model's own distribution. Where the request changes the distribution before it samples,
    // a confident ramp says nothing about the token: such a request exits early only if it names a threshold itself.
    // (ignore_eos counts as no change, as does a bias against the tokens that end a text: it only bans them)
    const auto & s     = p.sampling;
    const auto * vocab = llama_model_get_vocab(llama_get_model(ctx));
    const bool biased  = std::any_of(s.logit_bias.begin(), s.logit_bias.end(), [&](const llama_logit_bias & b) {
        return !llama_vocab_is_eog(vocab, b.token) || b.bias > 0.0f;
    });
    int32_t n_suppress = 0;
    llama_vocab_get_suppress_tokens(vocab, &n_suppress); // the sampler bans them
    using type = common_sampler_type;
    auto has = [&](type t) { return std::find(s.samplers.begin(), s.samplers.end(), t) != s.samplers.end(); };
    const bool reshaped = !s.grammar.empty() || biased ||
        s.penalty_repeat != 1.0f || s.penalty_freq != 0.0f || s.penalty_present != 0.0f || s.dry_multiplier != 0.0f;
    if (reshaped && std::isnan(config.threshold)) {
        config.threshold = 2.0f;
    }

    if (drex_request_add(engine, &config) != DREX_OK) {
        throw std::invalid_argument(drex_last_error());
    }

    slots[id_slot] = {};
    slots[id_slot].added  = true;
    slots[id_slot].verify  = mode == DREX_FILL_VERIFY;
    slots[id_slot].project = mode == DREX_FILL_PROPAGATE;
    slots[id_slot].id     = config.id;

    // its sampler would choose the best token: with these settings nothing before the temperature can remove it
    slots[id_slot].greedy = s.temp <= 0.0f && has(type::COMMON_SAMPLER_TYPE_TEMPERATURE) && s.dynatemp_range <= 0.0f && !reshaped &&
        n_suppress == 0 && s.n_probs == 0 && s.mirostat == 0 && s.xtc_probability <= 0.0f && s.typ_p >= 1.0f &&
        !has(type::COMMON_SAMPLER_TYPE_INFILL) && !has(type::COMMON_SAMPLER_TYPE_ADAPTIVE_P) &&
        s.reasoning_budget_tokens < 0 && !s.reasoning_control;
    slots[id_slot].no_eog = !s.logit_bias.empty() || s.ignore_eos;

    if (record.is_open()) {
        record << json({{"e", "add"}, {"t", now_ns()}, {"id", config.id}, {"n_prompt", task.n_tokens()}}).dump() << "\n";
    }
}

int server_drex::remove(int id_slot) {
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
    const int res = slot.verify ? 0 : std::max<int>(unfinished || hole, in.n_pending + (in.slot != DREX_NO_SLOT));
    slot = {};

    return res;
}

void server_drex::settle(int id_slot) {
    auto & slot = slots[id_slot];
    if (slot.busy) {
        return;
    }
    uint32_t n = 0;
    check(drex_request_settle(engine, slot.id, now_ns(), &n));
    GGML_ASSERT(n > 0);
    slot.busy = true;
}

bool server_drex::ran(int id_slot, llama_token token) {
    auto & slot = slots[id_slot];
    if (slot.verify) {
        slot.ahead.push_back(token);
    }
    return !slot.verify;
}

void server_drex::verified(int id_slot) {
    auto & ahead = slots[id_slot].ahead;
    ahead.erase(ahead.begin());
}

llama_token server_drex::drafted(size_t i) const {
    const bool yes = step.ramp != DREX_NO_RAMP && verdicts[i].decision == DREX_DECISION_EXIT && slots[step_rows[i].id_slot].verify;
    return yes ? verdicts[i].token : LLAMA_TOKEN_NULL;
}

void server_drex::ready(int id_slot, int n_kv) {
    auto & slot = slots[id_slot];
    if (slot.busy) {
        return;
    }
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
        const bool verify = slots[id_slot].verify;
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
    } else if (fetches && step.n_rows > 0) {
        fetch_logits(0, step.n_rows);
    } else if (stream && step.n_rows > 0) {
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
    t_run_all += t_ran - t_run;

    return ret;
}

drex_logits server_drex::ramp_logits() const {
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

    return logits;
}

bool server_drex::has_drafts() const {
    return step.ramp == DREX_NO_RAMP && std::any_of(step_rows.begin(), step_rows.end(), [](const row & r) { return r.draft; });
}

void server_drex::finish(uint64_t n_kv) {
    if (step.ramp != DREX_NO_RAMP && step.n_rows > 0) {
        const drex_logits logits = ramp_logits();

        check(drex_ramp(engine, &logits, llama_layer_range_cells(ctx), verdicts.data(), verdicts.size()));
        check(drex_fill(engine));
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
        if (slot.project && done && !last) {
            to_project.push_back({ r.id_slot, positions[i], int32_t(plan_rows[i].slot) });
            project_layer = step.layer_end;
        }
        step_rows[i].emit = done && !r.verify && plan_rows[i].back == 0;
        if (slot.verify && done && !last) {
            slot.n_drafts++;
        }
        if (slot.verify && last) {
            slot.n_drafts = 0;
        }
    }

    if (step.ramp != DREX_NO_RAMP) {
        fetch_logits();
    }

    drex_completion done = DREX_COMPLETION_INITIALIZER;

    done.now_ns      = now_ns();
    done.duration_ns = t_ran - t_run;
    done.n_kv        = n_kv;

    if (record.is_open()) {
        record_step(done.duration_ns, n_kv);
    }

    check(drex_complete(engine, &done));
    end_step();
}

// only rows whose sampler needs them leave the device; the sampler waits for them
void server_drex::fetch_logits() {
    const auto * vocab = llama_model_get_vocab(llama_get_model(ctx));
    const bool   last  = step.ramp == DREX_NO_RAMP;

    auto wanted = [&](size_t i) {
        auto & slot = slots[step_rows[i].id_slot];
        slot.top = LLAMA_TOKEN_NULL;
        if (last) {
            return step_rows[i].verify || plan_rows[i].back == 0;
        }
        if (!step_rows[i].emit) {
            return false;
        }
        const bool known = slot.greedy && verdicts[i].token >= 0 && !(slot.no_eog && llama_vocab_is_eog(vocab, verdicts[i].token));
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

std::vector<int> server_drex::unprojected() const {
    std::vector<int> res;
    for (const auto & p : to_project) {
        res.push_back(p.id_slot);
    }
    return res;
}

void server_drex::end_step() {
    in_flight = false;
    verifying = false;

    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i].leaving) {
            slots[i].leaving = false;
            remove(i);
        }
    }
}

void server_drex::agrees(size_t i, bool yes, bool last) {
    auto & slot = slots[step_rows[i].id_slot];

    agreed[i] = yes ? (last ? 2 : 1) : 0;
    slot.n_verified++;
    slot.n_accepted += yes;
}

drex_request_info server_drex::info(int id_slot) const {
    drex_request_info res = DREX_REQUEST_INFO_INITIALIZER;
    if (seen.valid) {
        return seen.infos[id_slot];
    }
    if (slots[id_slot].added) {
        warn(drex_request_get(engine, slots[id_slot].id, &res));
    }
    return res;
}

drex_stats server_drex::stats() const {
    drex_stats res = DREX_STATS_INITIALIZER;
    if (seen.valid) {
        return seen.stats;
    }
    warn(drex_stats_get(engine, &res));
    return res;
}

void server_drex::look_aside() {
    seen.stats = stats();
    seen.infos.clear();
    for (size_t i = 0; i < slots.size(); ++i) {
        seen.infos.push_back(info(i));
    }
    seen.t_run_all = t_run_all;
    seen.perf      = llama_layer_range_perf(ctx);
    seen.valid = true;
}

json server_drex::timings(int id_slot) const {
    const auto in = info(id_slot);

    return {
        {"drex_exits",             std::vector<uint64_t>(in.exits, in.exits + ramp_layers.size())},
        {"drex_involuntary_exits", in.involuntary_exits},
        {"drex_involuntary_stays", in.involuntary_stays},
        {"drex_held_ms",           in.held_ns/1e6},
        {"drex_deadline_misses",   in.deadline_misses},
        {"drex_drafts",            slots[id_slot].n_verified},
        {"drex_drafts_accepted",   slots[id_slot].n_accepted},
    };
}

json server_drex::to_json(int id_slot) const {
    static const char * states[] = { "idle", "ready", "running", "held" };

    const auto in = info(id_slot);

    json res = {
        {"state",             states[in.state]},
        {"held_at_layer",     nullptr},
        {"confidence",        nullptr},
        {"tokens",            in.tokens},
        {"exits",             std::vector<uint64_t>(in.exits, in.exits + ramp_layers.size())},
        {"involuntary_exits", in.involuntary_exits},
        {"involuntary_stays", in.involuntary_stays},
        {"held_ms",           in.held_ns/1e6},
        {"pending",           in.n_pending},
        {"drafts",            slots[id_slot].n_verified},
        {"drafts_accepted",   slots[id_slot].n_accepted},
    };
    if (in.state == DREX_REQUEST_HELD) {
        res["held_at_layer"] = ramp_layers[in.ramp];
    }
    if (std::isfinite(in.last_confidence)) {
        res["confidence"] = in.last_confidence;
    }
    return res;
}

std::string server_drex::metrics() const {
    const drex_stats s = stats();

    std::stringstream out;

    auto family = [&out](const char * name, const char * type, const char * help) {
        out << "# HELP " << name << " " << help << "\n# TYPE " << name << " " << type << "\n";
    };
    auto single = [&](const char * name, const char * type, const char * help, double value) {
        family(name, type, help);
        out << name << " " << value << "\n";
    };
    auto ramp_label = [&](size_t r) {
        return "{ramp=\"" + std::to_string(r) + "\",layer=\"" + std::to_string(ramp_layers[r]) + "\"} ";
    };

    out.precision(17);

    family("drex_exits_total", "counter", "Rows that left at an exit ramp, drafts among them");
    for (size_t r = 0; r < ramp_layers.size(); ++r) {
        out << "drex_exits_total" << ramp_label(r) << s.exits[r] << "\n";
    }

    single("drex_tokens_total",             "counter", "Tokens decoded, at a ramp or after the last layer",               s.tokens);
    single("drex_involuntary_exits_total",  "counter", "Rows made to exit below their threshold",                         s.involuntary_exits);
    single("drex_involuntary_stays_total",  "counter", "Confident rows that went on with the batch",                      s.involuntary_stays);
    single("drex_nonfinite_rows_total",     "counter", "Rows whose confidence was NaN or infinite",                       s.nonfinite_rows);
    single("drex_steps_total",              "counter", "Layer windows run",                                               s.steps);
    single("drex_step_rows_total",          "counter", "Rows of all layer windows run",                                   s.step_rows);
    single("drex_window_seconds_total",     "counter", "Time spent in layer windows",                                     (seen.valid ? seen.t_run_all : t_run_all)/1e9);
    single("drex_filled_cells_total",       "counter", "KV cells whose skipped layers were filled by state-copy",         s.cells_filled);
    single("drex_filled_bytes_total",       "counter", "Bytes written by state-copy",                                     s.bytes_filled);

    single("drex_postfilled_rows_total",    "counter", "Exited rows that went through their skipped layers later on",      s.rows_filled);
    single("drex_drafts_total",             "counter", "Drafts of exit ramps that the full model judged",                  s.drafts);
    single("drex_drafts_accepted_total",    "counter", "Drafts of exit ramps that the full model confirmed",               s.drafts_accepted);
    single("drex_dropped_rows_total",       "counter", "Rows run for nothing, behind a draft that was not confirmed",      s.rows_dropped);
    single("drex_pending_rows",             "gauge",   "Exited rows in the hidden arena that have layers to go",           s.pending_rows);

    static const char * misses[] = { "host", "queue", "held", "run" };
    static_assert(std::size(misses) == DREX_MISS_REASONS, "a name for each");

    family("drex_deadline_misses_total", "counter", "Tokens emitted after their deadline, by where most of their time went");
    for (size_t i = 0; i < DREX_MISS_REASONS; ++i) {
        out << "drex_deadline_misses_total{reason=\"" << misses[i] << "\"} " << s.misses[i] << "\n";
    }

    static const char * reasons[] = { "none", "fill", "age", "deadline", "idle", "stay", "prompt" };
    static_assert(std::size(reasons) == DREX_FLUSH_REASONS, "a name for each");

    family("drex_flushes_total", "counter", "Windows over held rows, by what caused them");
    for (size_t i = 1; i < DREX_FLUSH_REASONS; ++i) {
        out << "drex_flushes_total{reason=\"" << reasons[i] << "\"} " << s.flushes[i] << "\n";
    }

    family("drex_held_rows", "gauge", "Rows waiting in the rebatching buffer");
    for (size_t r = 0; r < ramp_layers.size(); ++r) {
        out << "drex_held_rows" << ramp_label(r) << s.held_rows_at[r] << "\n";
    }
    single("drex_held_rows_max", "gauge", "Most rows that waited at once",                s.held_rows_max);
    single("drex_requests",      "gauge", "Requests alive",                               s.requests);
    single("drex_slots_free",    "gauge", "Free rows of the hidden arena",                s.slots_free);
    if (std::isfinite(s.art_ratio)) {
        single("drex_art_ratio", "gauge", "Rebatching overhead over deep time, c/t_d",    s.art_ratio);
    }

    family("drex_exit_share", "gauge", "Share of rows that are confident at an exit ramp, of those scored there first");
    for (size_t r = 0; r < ramp_layers.size(); ++r) {
        if (std::isfinite(s.exit_share[r])) {
            out << "drex_exit_share" << ramp_label(r) << s.exit_share[r] << "\n";
        }
    }
    if (s.searches > 0) {
        family("drex_rule_ramp", "gauge", "Policy auto: 1 where the present rule looks at an exit ramp");
        for (size_t r = 0; r < ramp_layers.size(); ++r) {
            out << "drex_rule_ramp" << ramp_label(r) << ((s.rule_ramps >> r) & 1) << "\n";
        }
        single("drex_rule_hold_rows",  "gauge",   "Policy auto: held rows at a ramp that are flushed",              s.rule_hold_rows);
        single("drex_rule_ready_rows", "gauge",   "Policy auto: ready rows below which held rows are flushed",      s.rule_ready_rows);
        single("drex_searches_total",  "counter", "Policy auto: searches for a better rule",                        s.searches);
        family("drex_predicted_tokens_per_second", "gauge", "Policy auto: speed that the last search predicted");
        out << "drex_predicted_tokens_per_second{rule=\"chosen\"} " << s.predicted_tokens_per_s     << "\n"
            << "drex_predicted_tokens_per_second{rule=\"off\"} "    << s.predicted_off_tokens_per_s << "\n";
    }

    family("drex_wait_seconds", "histogram", "Time that rows spent in the rebatching buffer");
    uint64_t n_waits = 0;
    for (size_t i = 0; i < DREX_WAIT_BUCKETS; ++i) {
        n_waits += s.wait_us_buckets[i];
        if (i + 1 < DREX_WAIT_BUCKETS) {
            out << "drex_wait_seconds_bucket{le=\"" << string_format("%g", std::ldexp(1e-6, i)) << "\"} " << n_waits << "\n";
        }
    }
    out << "drex_wait_seconds_bucket{le=\"+Inf\"} " << n_waits << "\n"
        << "drex_wait_seconds_sum "   << s.wait_us_sum/1e6 << "\n"
        << "drex_wait_seconds_count " << n_waits << "\n";

    const auto perf = seen.valid ? seen.perf : llama_layer_range_perf(ctx);
    single("drex_graphs_built_total",   "counter", "Compute graphs built for layer windows",               perf.n_built);
    single("drex_graphs_reused_total",  "counter", "Layer windows that reused a graph",                    perf.n_reused);
    single("drex_graphs_evicted_total", "counter", "Kept graphs that were dropped for want of room",       perf.n_evicted);
    single("drex_graphs",               "gauge",   "Graphs kept",                                          perf.n_kept);
    single("drex_graphs_bytes",         "gauge",   "Compute buffers and metadata of kept graphs",          perf.bytes);

    return out.str();
}
