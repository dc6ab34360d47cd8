// Fitted exits, on the patched libllama.
//
//   exits-test MODEL DIR
//   exits-test --own MODEL FILE LAYERS TOKENS [SHIFT]
//
// The first form writes files of exits into DIR and loads them. Logits of ranges that end at an exit are compared with the
// same arithmetic in double precision over the arena's rows, and passes that go on with stock ones bit by bit. Files that are
// cut short, for another model or wrong in one place must be refused with a text that names it, and change nothing.
// Prints a line per case and exits 1 at the first failure.
//
// The second form writes exits that are the model's own final norm, after these layers and with a head over these tokens:
// "all", "all-N" (each N-th is left out), or their numbers. For a model that was trained for early exit, as the bundled one,
// they say what its own ramps say.
// SHIFT is that of the calibration, whose scale is 1; without it there is none.

#include "rows.h"

#include "llama-layer-exits.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <sstream>
#include <string>

static int n_cases = 0;

static void check(bool ok, const std::string & what) {
    printf("%s: %s\n", ok ? "ok" : "FAILED", what.c_str());
    if (!ok) {
        exit(1);
    }
    n_cases++;
}

static std::vector<float> noise(std::mt19937 & rng, size_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> res(n);
    for (auto & v : res) {
        v = normal(rng);
    }
    return res;
}

// what a file is written from
struct content {
    std::string           architecture = "exits";
    uint32_t              version      = 1;
    std::string           model_arch;
    uint32_t              n_layer, n_embd, n_vocab;
    std::string           hash;
    std::vector<uint32_t> layers;
    std::vector<int32_t>  tokens;

    struct tensor {
        std::string        name;
        int64_t            ne0, ne1;
        std::vector<float> data;
    };
    std::vector<tensor> tensors;
    std::vector<float>  calibration; // empty: none

    const std::vector<float> & get(const std::string & name) const {
        return std::find_if(tensors.begin(), tensors.end(), [&](const tensor & t) { return t.name == name; })->data;
    }

    void write(const std::string & path) const {
        gguf_context_ptr gguf(gguf_init_empty());
        gguf_set_val_str(gguf.get(), "general.architecture",         architecture.c_str());
        gguf_set_val_u32(gguf.get(), "exits.version",                version);
        gguf_set_val_str(gguf.get(), "exits.model.architecture",     model_arch.c_str());
        gguf_set_val_u32(gguf.get(), "exits.model.block_count",      n_layer);
        gguf_set_val_u32(gguf.get(), "exits.model.embedding_length", n_embd);
        gguf_set_val_u32(gguf.get(), "exits.model.vocab_size",       n_vocab);
        gguf_set_val_str(gguf.get(), "exits.model.hash",             hash.c_str());
        gguf_set_arr_data(gguf.get(), "exits.layers", GGUF_TYPE_UINT32, layers.data(), layers.size());
        if (!calibration.empty()) {
            gguf_set_arr_data(gguf.get(), "exits.calibration", GGUF_TYPE_FLOAT32, calibration.data(), calibration.size());
        }

        size_t size = ggml_tensor_overhead() + tokens.size()*4 + 1024;
        for (const auto & t : tensors) {
            size += ggml_tensor_overhead() + t.data.size()*4 + 1024;
        }
        ggml_context_ptr ctx(ggml_init({ size, nullptr, false }));
        ggml_tensor * t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, tokens.size());
        memcpy(t->data, tokens.data(), ggml_nbytes(t));
        ggml_set_name(t, "tokens");
        gguf_add_tensor(gguf.get(), t);
        for (const auto & from : tensors) {
            t = from.ne1 > 1 ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, from.ne0, from.ne1) : ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, from.ne0);
            memcpy(t->data, from.data.data(), ggml_nbytes(t));
            ggml_set_name(t, from.name.c_str());
            gguf_add_tensor(gguf.get(), t);
        }
        if (!gguf_write_to_file(gguf.get(), path.c_str(), false)) {
            fprintf(stderr, "%s cannot be written\n", path.c_str());
            exit(1);
        }
    }
};

// y = m x, m [rows of n]
static std::vector<double> product(const std::vector<float> & m, const std::vector<double> & x) {
    std::vector<double> y(m.size()/x.size(), 0.0);
    for (size_t i = 0; i < y.size(); ++i) {
        for (size_t j = 0; j < x.size(); ++j) {
            y[i] += double(m[i*x.size() + j])*x[j];
        }
    }
    return y;
}

// the exit's logits of a state, by the formula of llama-layer-exits.h
static std::vector<double> expected(const content & c, uint32_t layer, const std::vector<float> & head, const float * state) {
    const std::string prefix = "exit." + std::to_string(layer) + ".";
    auto has = [&](const char * name) {
        return std::any_of(c.tensors.begin(), c.tensors.end(), [&](const content::tensor & t) { return t.name == prefix + name; });
    };

    std::vector<double> x(state, state + c.n_embd);
    double sum = 0.0;
    for (const double v : x) {
        sum += v*v;
    }
    for (auto & v : x) {
        v /= std::sqrt(sum/c.n_embd + 1e-6);
    }

    const auto & bias = c.get(prefix + "bias");
    std::vector<double> y(bias.begin(), bias.end());
    auto add = [&](const std::vector<double> & term) {
        for (size_t i = 0; i < y.size(); ++i) {
            y[i] += term[i];
        }
    };
    if (has("weight")) {
        add(product(c.get(prefix + "weight"), x));
    }
    if (has("scale")) {
        std::vector<double> term(x);
        for (size_t i = 0; i < term.size(); ++i) {
            term[i] *= c.get(prefix + "scale")[i];
        }
        add(term);
    }
    if (has("down")) {
        add(product(c.get(prefix + "up"), product(c.get(prefix + "down"), x)));
    }
    if (has("mlp_up")) {
        auto inner = product(c.get(prefix + "mlp_up"), x);
        for (size_t i = 0; i < inner.size(); ++i) {
            const double v = inner[i] + c.get(prefix + "mlp_up_bias")[i];
            inner[i] = v/(1.0 + std::exp(-v));
        }
        add(product(c.get(prefix + "mlp_down"), inner));
    }
    return product(head, y);
}

// a file for this model, without exits
static content for_model(const llama_model * model, const char * path_model) {
    content res;
    char text[256] = "";
    llama_model_meta_val_str(model, "general.architecture", text, sizeof(text));
    res.model_arch = text;
    res.n_layer    = llama_model_n_layer(model);
    res.n_embd     = llama_model_n_embd(model);
    res.n_vocab    = llama_vocab_n_tokens(llama_model_get_vocab(model));

    char hash[17];
    if (const char * why = llama_layer_exits_hash(path_model, hash)) {
        fprintf(stderr, "%s\n", why);
        exit(1);
    }
    res.hash = hash;
    return res;
}

// makes the model's own final norm an exit after each layer
static void add_own(content & c, const char * path_model) {
    ggml_context * data = nullptr;
    gguf_init_params params = { /*.no_alloc =*/ false, /*.ctx =*/ &data };
    gguf_context_ptr gguf(gguf_init_from_file(path_model, params));
    ggml_context_ptr ctx(data);
    const ggml_tensor * norm = data ? ggml_get_tensor(data, "output_norm.weight") : nullptr;
    if (!norm || norm->type != GGML_TYPE_F32 || ggml_nelements(norm) != c.n_embd) {
        fprintf(stderr, "%s has no output_norm.weight in F32\n", path_model);
        exit(1);
    }
    const auto * weights = static_cast<const float *>(norm->data);
    for (const uint32_t layer : c.layers) {
        const std::string prefix = "exit." + std::to_string(layer) + ".";
        c.tensors.push_back({ prefix + "scale", c.n_embd, 1, { weights, weights + c.n_embd } });
        c.tensors.push_back({ prefix + "bias",  c.n_embd, 1, std::vector<float>(c.n_embd, 0.0f) });
    }
}

// skip: leaves out each so many-th token, 0: none
static void add_all_tokens(content & c, uint32_t skip = 0) {
    for (uint32_t t = 0; t < c.n_vocab; ++t) {
        if (skip == 0 || t % skip != skip - 1) {
            c.tokens.push_back(t);
        }
    }
}

static int write_own(int argc, char ** argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: %s --own MODEL FILE LAYERS TOKENS [SHIFT]\n", argv[0]);
        return 2;
    }
    llama_model * model = llama_model_load_from_file(argv[2], llama_model_default_params());
    if (!model) {
        return 1;
    }
    content c = for_model(model, argv[2]);
    llama_model_free(model);

    auto numbers = [](const char * text) {
        std::vector<int32_t> res;
        std::istringstream in(text);
        for (std::string part; std::getline(in, part, ','); ) {
            res.push_back(std::stoi(part));
        }
        return res;
    };
    for (const int32_t layer : numbers(argv[4])) {
        c.layers.push_back(layer);
    }
    if (strncmp(argv[5], "all", 3) == 0) {
        add_all_tokens(c, argv[5][3] ? std::stoi(argv[5] + 4) : 0);
    } else {
        c.tokens = numbers(argv[5]);
    }
    add_own(c, argv[2]);
    for (size_t i = 0; argc > 6 && i < 3*c.layers.size(); ++i) {
        c.calibration.push_back(1.0f);
        c.calibration.push_back(std::stof(argv[6]));
    }
    c.write(argv[3]);
    return 0;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL DIR, or --own MODEL FILE LAYERS TOKENS [SHIFT]\n", argv[0]);
        return 2;
    }
    log_warnings_only();
    if (strcmp(argv[1], "--own") == 0) {
        return write_own(argc, argv);
    }
    const std::string path = std::string(argv[2]) + "/test.exits.gguf";

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }

    content good = for_model(model, argv[1]);
    char text[256] = "";

    std::mt19937 rng(1);
    const uint32_t first = good.n_layer/4, second = good.n_layer/2;
    const int64_t  n     = good.n_embd;
    good.layers = { first, second };
    for (uint32_t t = 2; t < good.n_vocab; t += 3) {
        good.tokens.push_back(t);
    }
    auto add = [&](uint32_t layer, const char * name, int64_t ne0, int64_t ne1, float scale) {
        good.tensors.push_back({ "exit." + std::to_string(layer) + "." + name, ne0, ne1, noise(rng, ne0*ne1, scale) });
    };
    add(first,  "weight",      n,  n,  0.05f);
    add(first,  "bias",        n,  1,  0.5f);
    add(second, "scale",       n,  1,  1.0f);
    add(second, "down",        n,  16, 0.05f);
    add(second, "up",          16, n,  0.2f);
    add(second, "mlp_up",      n,  24, 0.05f);
    add(second, "mlp_up_bias", 24, 1,  0.5f);
    add(second, "mlp_down",    24, n,  0.2f);
    add(second, "bias",        n,  1,  0.5f);
    good.write(path);

    llama_context * ctx = make_context(model, 256, 2, GGML_TYPE_F16, LLAMA_FLASH_ATTN_TYPE_ENABLED, false);
    check(llama_layer_exits_load(ctx, argv[1], path.c_str()) != nullptr, "exits need layer ranges");
    if (const char * why = llama_layer_range_init(ctx, { 64, 16, 64, 0 })) {
        fprintf(stderr, "llama_layer_range_init: %s\n", why);
        return 1;
    }
    llama_batch_ext * batch = llama_batch_ext_init(ctx);

    // what a range without exits says, to compare with
    std::vector<row>     rows;
    std::vector<int32_t> slots;
    for (int s = 0; s < 2; ++s) {
        for (int i = 0; i < 5; ++i) {
            rows.push_back({ llama_token(rng() % good.n_vocab), i, s });
            slots.push_back(10*s + i);
        }
    }
    auto run = [&](int32_t begin, int32_t end) {
        fill(batch, rows);
        return llama_layer_range_decode(ctx, batch, begin, end, slots.data()) == 0;
    };
    auto logits = [&]() {
        const ggml_tensor * t = llama_layer_range_logits(ctx);
        std::vector<float> res(t ? ggml_nelements(t) : 0);
        if (t) {
            llama_synchronize(ctx);
            ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));
        }
        return res;
    };
    bool ok = run(0, first);
    const auto own = logits();
    ok = ok && run(first, second) && run(second, good.n_layer);
    const auto without = logits();
    check(ok && own.size() == rows.size()*good.n_vocab && without.size() == own.size(), "without exits, ranges have logits of all tokens");

    const char * why = llama_layer_exits_load(ctx, argv[1], path.c_str());
    check(!why, std::string("a good file is taken") + (why ? std::string(": ") + why : ""));
    int32_t n_layers = 0, n_tokens = 0;
    const int32_t * layers = llama_layer_exits_layers(ctx, &n_layers);
    const int32_t * tokens = llama_layer_exits_tokens(ctx, &n_tokens);
    check(n_layers == 2 && layers[0] == (int32_t) first && layers[1] == (int32_t) second &&
            std::vector<int32_t>(tokens, tokens + n_tokens) == good.tokens, "layers and tokens are those of the file");

    // the model's own rows, from its file
    std::vector<float> head;
    {
        int32_t type = 0;
        check(!llama_layer_exits_head(argv[1], n, nullptr, 0, &type, nullptr), "a model has a head");
        check(llama_layer_exits_head(argv[1], n + 1, nullptr, 0, &type, nullptr) != nullptr, "a head has rows of the model's width");
        const size_t n_row = ggml_row_size(ggml_type(type), n);
        std::vector<uint8_t> data(n_row*n_tokens);
        check(!llama_layer_exits_head(argv[1], n, good.tokens.data(), n_tokens, &type, data.data()), "rows of the head are read");
        head.resize(n*n_tokens);
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (type == GGML_TYPE_F32) {
                memcpy(&head[i*n], &data[i*n_row], n_row);
            } else {
                ggml_get_type_traits(ggml_type(type))->to_float(&data[i*n_row], &head[i*n], n);
            }
        }
    }

    llama_memory_clear(llama_get_memory(ctx), true);
    for (const uint32_t layer : good.layers) {
        ok = run(layer == first ? 0 : first, layer);
        const auto got = logits();
        check(ok && got.size() == rows.size()*n_tokens, "an exit has logits of its tokens");

        const ggml_tensor * arena = llama_layer_range_hidden(ctx);
        std::vector<float> state(n);
        double most = 0.0, off = 0.0;
        for (size_t i = 0; i < rows.size(); ++i) {
            ggml_backend_tensor_get(arena, state.data(), slots[i]*arena->nb[1], n*sizeof(float));
            const auto want = expected(good, layer, head, state.data());
            for (int32_t k = 0; k < n_tokens; ++k) {
                most = std::max(most, std::abs(want[k]));
                off  = std::max(off, std::abs(want[k] - got[i*n_tokens + k]));
            }
        }
        // ggml rounds what enters a quantised product to 8 bits
        snprintf(text, sizeof(text), "the exit after %u differs by %.4f of %.2f", layer, off, most);
        check(off < 0.02*most, text);

        ok = llama_layer_range_fetch_logits(ctx, 3, 2);
        for (int i = 3; ok && i < 5; ++i) {
            const float * all = llama_get_logits_ith(ctx, i);
            int32_t k = 0;
            for (uint32_t v = 0; ok && v < good.n_vocab; ++v) {
                const bool is_in = k < n_tokens && tokens[k] == (int32_t) v;
                ok = all[v] == (is_in ? got[i*n_tokens + k] : -INFINITY);
                k += is_in;
            }
        }
        check(ok, "fetched logits stand at their tokens, the others have none");

        // tokens 5 and 6, of which the head has the first
        const float write[2] = { 3.0f, 4.0f };
        float in[2] = {}, out[2] = {}, written[2] = {};
        std::copy(write, write + 2, written);
        ok = llama_layer_range_edit_logits(ctx, 5, 3, 2, in, false) && llama_layer_range_edit_logits(ctx, 6, 3, 2, out, false) &&
            llama_layer_range_edit_logits(ctx, 5, 3, 2, written, true) && llama_layer_range_edit_logits(ctx, 6, 3, 2, written, true);
        const auto edited = logits();
        for (size_t i = 0; ok && i < edited.size(); ++i) {
            const bool here = i == 3*(size_t) n_tokens + 1 || i == 4*(size_t) n_tokens + 1;
            ok = edited[i] == (here ? write[i/n_tokens - 3] : got[i]);
        }
        check(ok && in[0] == got[3*n_tokens + 1] && in[1] == got[4*n_tokens + 1] && out[0] == -INFINITY && out[1] == -INFINITY,
                "the logit of a token is read and written where the head has it");
    }
    ok = run(second, good.n_layer);
    check(ok && logits() == without, "passes that go on are as without exits, bit for bit");

    // graphs of an exit are kept
    const auto before = llama_layer_range_perf(ctx);
    llama_memory_clear(llama_get_memory(ctx), true);
    ok = run(0, first);
    const auto once = logits();
    llama_memory_clear(llama_get_memory(ctx), true);
    ok = ok && run(0, first);
    check(ok && logits() == once && llama_layer_range_perf(ctx).n_reused >= before.n_reused + 1, "a graph with an exit is used again");

    // what is wrong is named
    const auto refused = [&](const std::string & what, const std::string & says) {
        const char * answer = llama_layer_exits_load(ctx, argv[1], path.c_str());
        int32_t n_now = 0;
        llama_layer_exits_layers(ctx, &n_now);
        check(answer && strstr(answer, says.c_str()) && n_now == 2, what + ": " + (answer ? answer : "was taken"));
    };
    const std::vector<std::pair<std::string, std::function<std::string(content &)>>> wrong = {
        { "architecture of the file",  [](content & c) { c.architecture = "llama";   return "general.architecture is llama"; } },
        { "version",                   [](content & c) { c.version = 2;              return "exits.version is 2"; } },
        { "architecture of the model", [](content & c) { c.model_arch = "mamba";     return "exits.model.architecture is mamba"; } },
        { "layers of the model",       [](content & c) { c.n_layer++;                return "exits.model.block_count is"; } },
        { "width of the model",        [](content & c) { c.n_embd++;                 return "exits.model.embedding_length is"; } },
        { "tokens of the model",       [](content & c) { c.n_vocab--;                return "exits.model.vocab_size is"; } },
        { "hash of the model",         [](content & c) { c.hash[3] ^= 1;             return "exits.model.hash is"; } },
        { "no layer",                  [](content & c) { c.layers[0] = 0;            return "exits.layers[0] is 0"; } },
        { "a layer twice",             [](content & c) { c.layers[1] = c.layers[0];  return "exits.layers[1] is"; } },
        { "the last layer",            [](content & c) { c.layers[1] = c.n_layer;    return "exits.layers[1] is"; } },
        { "a layer without tensors",   [](content & c) { c.layers[0]--;              return "bias is missing"; } },
        { "tokens out of order",       [](content & c) { c.tokens[4] = 0;            return "tokens[4] is 0"; } },
        { "a token too large",         [](content & c) { c.tokens.back() = c.n_vocab; return "tokens["; } },
        { "a token below 0",           [](content & c) { c.tokens[0] = -1;           return "tokens[0] is -1"; } },
        { "a shape",                   [](content & c) { c.tensors[0].ne1--; c.tensors[0].data.resize(c.tensors[0].ne0*c.tensors[0].ne1); return "weight has the shape"; } },
        { "a rank that does not fit",  [](content & c) { c.tensors[4].ne0 = 8; c.tensors[4].data.resize(8*c.tensors[4].ne1); return "up has the shape"; } },
        { "not a number",              [](content & c) { c.tensors[1].data[7] = NAN; return "bias has numbers that are not finite"; } },
        { "no map",                    [](content & c) { c.tensors[0].name += "s";   return "weight is missing"; } },
    };
    for (const auto & [what, change] : wrong) {
        content bad = good;
        const std::string says = change(bad);
        bad.write(path);
        refused(what, says);
    }

    {
        content same = for_model(model, argv[1]);
        same.layers = { first };
        add_all_tokens(same);
        add_own(same, argv[1]);
        same.write(path);
        llama_memory_clear(llama_get_memory(ctx), true);
        why = llama_layer_exits_load(ctx, argv[1], path.c_str());
        ok  = !why && run(0, first);
        const auto got = logits();
        float most = 0.0f, off = 0.0f;
        for (size_t i = 0; i < got.size() && got.size() == own.size(); ++i) {
            most = std::max(most, std::abs(own[i]));
            off  = std::max(off, std::abs(own[i] - got[i]));
        }
        snprintf(text, sizeof(text), "an exit that is the model's own norm differs from the model's ramp by %.5f of %.2f", off, most);
        check(ok && most > 0.0f && off < 0.02f*most, text);
    }

    // cut short, anywhere
    good.write(path);
    check(!llama_layer_exits_load(ctx, argv[1], path.c_str()), "another file takes the place of one");
    std::ifstream in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    in.close();
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    int n_cut = 0, n_taken = 0;
    for (size_t size = 0; size + 32 < bytes.size(); size += size < 2048 ? 1 : bytes.size()/200) {
        std::ofstream out(path, std::ios::binary | std::ios::trunc);
        out.write(bytes.data(), size);
        out.close();
        n_cut++;
        n_taken += llama_layer_exits_load(ctx, argv[1], path.c_str()) == nullptr;
    }
    check(n_cut > 100 && n_taken == 0, std::to_string(n_cut) + " files that are cut short are refused");

    // a bit that is wrong, anywhere in the metadata: whatever it means, nothing breaks
    good.write(path);
    const size_t n_meta = std::min<size_t>(bytes.size(), 2048);
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    for (size_t i = 0; i < n_meta; ++i) {
        const auto put = [&](char c) {
            file.seekp(i);
            file.put(c);
            file.flush();
        };
        put(bytes[i] ^ (1 << (rng() % 8)));
        llama_layer_exits_load(ctx, argv[1], path.c_str());
        put(bytes[i]);
    }
    file.close();
    llama_memory_clear(llama_get_memory(ctx), true);
    check(!llama_layer_exits_load(ctx, argv[1], path.c_str()) && run(0, first) && logits() == once, "after all that, a good file is as before");

    llama_batch_ext_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    std::remove(path.c_str());
    printf("%d cases\n", n_cases);
    return 0;
}
