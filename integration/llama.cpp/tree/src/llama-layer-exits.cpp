#include "llama-layer-exits-impl.h"

#include "llama-impl.h"
#include "llama-layer-range-impl.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>

#if defined(_WIN32)
#define seek_file _fseeki64
#define tell_file _ftelli64
#else
#define seek_file fseeko
#define tell_file ftello
#endif

namespace {

// A GGUF whose tensors are read one by one, none of them past the end of the file.
class tensor_file {
public:
    explicit tensor_file(const std::string & path) : path(path) {
        gguf_init_params params = { /*.no_alloc =*/ true, /*.ctx =*/ nullptr };
        gguf.reset(gguf_init_from_file(path.c_str(), params));
        file.reset(ggml_fopen(path.c_str(), "rb"));
        if (!gguf || !file) {
            throw std::runtime_error(path + " is no GGUF file, or cannot be read");
        }
        if (seek_file(file.get(), 0, SEEK_END) != 0 || (size = tell_file(file.get())) < 0) {
            throw std::runtime_error(path + " cannot be read");
        }
    }

    int64_t find_key(const char * key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf.get(), key);
        if (id < 0 || gguf_get_kv_type(gguf.get(), id) != type) {
            throw std::runtime_error(path + ": " + key + " is missing, or no " + gguf_type_name(type));
        }
        return id;
    }

    std::string get_string(const char * key) const { return gguf_get_val_str(gguf.get(), find_key(key, GGUF_TYPE_STRING)); }
    uint32_t    get_u32   (const char * key) const { return gguf_get_val_u32(gguf.get(), find_key(key, GGUF_TYPE_UINT32)); }

    int64_t n_tensors() const { return gguf_get_n_tensors(gguf.get()); }

    struct tensor {
        int64_t         id = -1; // there is none
        ggml_type       type = GGML_TYPE_F32;
        const int64_t * ne = nullptr;
        uint64_t        first = 0; // byte in the file
        uint64_t        n_bytes = 0;
    };

    tensor at(int64_t id) const {
        const uint64_t first = uint64_t(gguf_get_data_offset(gguf.get())) + gguf_get_tensor_offset(gguf.get(), id);
        const uint64_t n     = gguf_get_tensor_size(gguf.get(), id);
        if (first > uint64_t(size) || n > uint64_t(size) - first) {
            throw std::runtime_error(path + ": the tensor " + name(id) + " ends behind the file's end");
        }
        return { id, gguf_get_tensor_type(gguf.get(), id), gguf_get_tensor_ne(gguf.get(), id), first, n };
    }

    tensor find(const std::string & name) const {
        const int64_t id = gguf_find_tensor(gguf.get(), name.c_str());
        return id < 0 ? tensor{} : at(id);
    }

    const char * name(int64_t id) const { return gguf_get_tensor_name(gguf.get(), id); }

    void read(const tensor & t, uint64_t offset, void * data, size_t n) const {
        if (offset > t.n_bytes || n > t.n_bytes - offset) {
            throw std::runtime_error(path + ": the tensor " + name(t.id) + " has fewer bytes than are asked for");
        }
        if (seek_file(file.get(), t.first + offset, SEEK_SET) != 0 || fread(data, 1, n, file.get()) != n) {
            throw std::runtime_error(path + " cannot be read");
        }
    }

    const std::string path;
    gguf_context_ptr  gguf;

private:
    struct closer {
        void operator()(FILE * f) const { fclose(f); }
    };
    std::unique_ptr<FILE, closer> file;
    int64_t                       size = 0;
};

} // namespace

// opens the files of a model, the first of which is named
static std::vector<std::unique_ptr<tensor_file>> open_model(const std::string & path) {
    std::vector<std::unique_ptr<tensor_file>> res;
    res.push_back(std::make_unique<tensor_file>(path));

    const auto * gguf = res[0]->gguf.get();
    const int64_t id  = gguf_find_key(gguf, "split.count");
    const int n_files = id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_UINT16 ? gguf_get_val_u16(gguf, id) : 1;

    std::vector<char> prefix(path.size() + 1), part(path.size() + 64);
    if (n_files > 1 && llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n_files) <= 0) {
        throw std::runtime_error(path + " is not the first of the model's files");
    }
    for (int i = 1; i < n_files; ++i) {
        llama_split_path(part.data(), part.size(), prefix.data(), i, n_files);
        res.push_back(std::make_unique<tensor_file>(part.data()));
    }
    return res;
}

static std::string hash_model(const std::string & path) {
    uint64_t h = 14695981039346656037ull; // FNV-1a
    auto add = [&](const void * data, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            h = (h ^ static_cast<const uint8_t *>(data)[i])*1099511628211ull;
        }
    };

    const uint64_t n_pieces = 16;
    uint8_t piece[64];

    for (const auto & file : open_model(path)) {
        for (int64_t i = 0; i < file->n_tensors(); ++i) {
            const auto t = file->at(i);
            const int32_t type = t.type;
            add(file->name(i), strlen(file->name(i)));
            add(&type, sizeof(type));
            add(t.ne, 4*sizeof(*t.ne));

            const uint64_t n = std::min<uint64_t>(sizeof(piece), t.n_bytes);
            for (uint64_t k = 0; k < n_pieces; ++k) {
                file->read(t, (t.n_bytes - n)/(n_pieces - 1)*k, piece, n);
                add(piece, n);
            }
        }
    }

    char text[17];
    snprintf(text, sizeof(text), "%016" PRIx64, h);
    return text;
}

// reads rows of the head: of its own tensor, or of the token embeddings where the model has none
static ggml_type read_head(const std::string & path, int64_t n_embd, const int32_t * tokens, int32_t n, void * data) {
    const auto files = open_model(path);
    for (const char * name : { "output.weight", "token_embd.weight" }) {
        for (const auto & file : files) {
            const auto t = file->find(name);
            if (t.id < 0) {
                continue;
            }
            if (t.ne[0] != n_embd || t.ne[2] != 1 || t.ne[3] != 1) {
                throw std::runtime_error(path + ": the rows of " + name + " have " + std::to_string(t.ne[0]) + " numbers, hidden rows " +
                        std::to_string(n_embd));
            }
            const size_t n_row = ggml_row_size(t.type, t.ne[0]);
            for (int32_t i = 0; data && i < n; ++i) {
                file->read(t, uint64_t(tokens[i])*n_row, static_cast<uint8_t *>(data) + size_t(i)*n_row, n_row);
            }
            return t.type;
        }
    }
    throw std::runtime_error(path + " has neither output.weight nor token_embd.weight");
}

//
// llama_layer_exits
//

static void check_model(const tensor_file & file, const llama_model & model, const std::string & path_model) {
    auto refuse = [&](const char * key, const std::string & has, const std::string & is) {
        throw std::runtime_error(file.path + " is for another model: its " + key + " is " + has + ", the model's is " + is);
    };
    auto same = [&](const char * key, uint32_t is) {
        const uint32_t has = file.get_u32(key);
        if (has != is) {
            refuse(key, std::to_string(has), std::to_string(is));
        }
    };

    if (file.get_string("general.architecture") != "exits") {
        throw std::runtime_error(file.path + ": general.architecture is " + file.get_string("general.architecture") + ", expected exits");
    }
    if (file.get_u32("exits.version") != 1) {
        throw std::runtime_error(file.path + ": exits.version is " + std::to_string(file.get_u32("exits.version")) + ", expected 1");
    }
    const std::string arch = file.get_string("exits.model.architecture");
    if (arch != model.arch_name()) {
        refuse("exits.model.architecture", arch, model.arch_name());
    }
    same("exits.model.block_count",      model.hparams.n_layer());
    same("exits.model.embedding_length", model.hparams.n_embd);
    same("exits.model.vocab_size",       model.vocab.n_tokens());

    const std::string hash = file.get_string("exits.model.hash");
    const std::string is   = hash_model(path_model);
    if (hash != is) {
        refuse("exits.model.hash", hash, is);
    }
}

static std::vector<int32_t> read_layers(const tensor_file & file, int32_t n_layer) {
    const int64_t id = file.find_key("exits.layers", GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(file.gguf.get(), id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(file.path + ": exits.layers is no array of u32");
    }
    const auto * data = static_cast<const uint32_t *>(gguf_get_arr_data(file.gguf.get(), id));
    const size_t n    = gguf_get_arr_n(file.gguf.get(), id);
    std::vector<int32_t> res;
    for (size_t i = 0; i < n; ++i) {
        if (data[i] >= (uint32_t) n_layer || data[i] <= (res.empty() ? 0 : (uint32_t) res.back())) {
            throw std::runtime_error(file.path + ": exits.layers[" + std::to_string(i) + "] is " + std::to_string(data[i]) +
                    ", expected increasing numbers from 1 to " + std::to_string(n_layer - 1));
        }
        res.push_back(data[i]);
    }
    if (res.empty()) {
        throw std::runtime_error(file.path + ": exits.layers is empty");
    }
    return res;
}

static std::vector<int32_t> read_tokens(const tensor_file & file, int32_t n_vocab) {
    const auto t = file.find("tokens");
    if (t.id < 0 || t.type != GGML_TYPE_I32 || t.ne[0] < 2 || t.ne[0] > n_vocab || t.n_bytes != t.ne[0]*sizeof(int32_t)) {
        throw std::runtime_error(file.path + ": the tensor tokens is missing, or no row of 2 to " + std::to_string(n_vocab) + " I32");
    }
    std::vector<int32_t> res(t.ne[0]);
    file.read(t, 0, res.data(), t.n_bytes);
    for (size_t i = 0; i < res.size(); ++i) {
        if (res[i] < (i == 0 ? 0 : res[i - 1] + 1) || res[i] >= n_vocab) {
            throw std::runtime_error(file.path + ": tokens[" + std::to_string(i) + "] is " + std::to_string(res[i]) +
                    ", expected increasing numbers below " + std::to_string(n_vocab));
        }
    }
    return res;
}

std::shared_ptr<llama_layer_exits> llama_layer_exits::load(
        const llama_model & model, const std::string & path_model, const std::string & path_exits) {
    const tensor_file file(path_exits);
    check_model(file, model, path_model);

    const int64_t n_embd = model.hparams.n_embd;

    auto res = std::make_shared<llama_layer_exits>();
    res->layers = read_layers(file, model.hparams.n_layer());
    res->tokens = read_tokens(file, model.vocab.n_tokens());

    const size_t n_most = 8*res->layers.size() + 1;
    res->ctx.reset(ggml_init({ n_most*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }));
    if (!res->ctx) {
        throw std::runtime_error("there is no memory for exits");
    }

    std::vector<std::pair<ggml_tensor *, tensor_file::tensor>> found;

    // a tensor of this shape, where a number below 1 stands for any; nullptr: there is none
    auto get = [&](const std::string & name, int64_t ne0, int64_t ne1, bool is_matrix) -> ggml_tensor * {
        const auto t = file.find(name);
        if (t.id < 0) {
            return nullptr;
        }
        const bool fits = (ne0 < 1 || t.ne[0] == ne0) && (ne1 < 1 || t.ne[1] == ne1) && t.ne[0] > 0 && t.ne[1] > 0 &&
            t.ne[2] == 1 && t.ne[3] == 1;
        if (!fits) {
            throw std::runtime_error(file.path + ": the tensor " + name + " has the shape " + std::to_string(t.ne[0]) + " x " +
                    std::to_string(t.ne[1]) + " x " + std::to_string(t.ne[2]) + " x " + std::to_string(t.ne[3]) + ", expected " +
                    (ne0 < 1 ? "any" : std::to_string(ne0)) + " x " + (ne1 < 1 ? "any" : std::to_string(ne1)));
        }
        const bool typed = t.type == GGML_TYPE_F32 || (is_matrix && (t.type == GGML_TYPE_F16 || t.type == GGML_TYPE_BF16 || t.type == GGML_TYPE_Q8_0));
        if (!typed) {
            throw std::runtime_error(file.path + ": the tensor " + name + " has the type " + ggml_type_name(t.type) + ", expected " +
                    (is_matrix ? "f32, f16, bf16 or q8_0" : "f32"));
        }
        ggml_tensor * res_t = is_matrix ? ggml_new_tensor_2d(res->ctx.get(), t.type, t.ne[0], t.ne[1]) : ggml_new_tensor_1d(res->ctx.get(), t.type, t.ne[0]);
        ggml_set_name(res_t, name.c_str());
        found.emplace_back(res_t, t);
        return res_t;
    };

    for (const int32_t layer : res->layers) {
        const std::string prefix = "exit." + std::to_string(layer) + ".";
        exit e;
        e.layer  = layer;
        e.bias   = get(prefix + "bias",   n_embd, 1,      false);
        e.weight = get(prefix + "weight", n_embd, n_embd, true);
        e.scale  = get(prefix + "scale",  n_embd, 1,      false);
        e.down   = get(prefix + "down",   n_embd, 0,      true);
        e.mlp_up = get(prefix + "mlp_up", n_embd, 0,      true);
        if (e.down) {
            e.up = get(prefix + "up", e.down->ne[1], n_embd, true);
        }
        if (e.mlp_up) {
            e.mlp_up_bias = get(prefix + "mlp_up_bias", e.mlp_up->ne[1], 1,      false);
            e.mlp_down    = get(prefix + "mlp_down",    e.mlp_up->ne[1], n_embd, true);
        }
        auto need = [&](bool have, const char * name) {
            if (!have) {
                throw std::runtime_error(file.path + ": the tensor " + prefix + name + " is missing");
            }
        };
        need(e.bias, "bias");
        need(e.weight || e.scale, "weight");
        need(!e.down || e.up, "up");
        need(!e.mlp_up || e.mlp_up_bias, "mlp_up_bias");
        need(!e.mlp_up || e.mlp_down, "mlp_down");
        res->exits.push_back(e);
    }

    const int32_t   n_tokens = res->tokens.size();
    const ggml_type type     = read_head(path_model, n_embd, nullptr, 0, nullptr);
    res->head = ggml_new_tensor_2d(res->ctx.get(), type, n_embd, n_tokens);
    ggml_set_name(res->head, "exit.head");

    res->buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res->ctx.get(), ggml_backend_dev_buffer_type(model.dev_output())));
    if (!res->buf) {
        throw std::runtime_error("there is no memory for the exits' tensors");
    }
    ggml_backend_buffer_set_usage(res->buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

    std::vector<uint8_t> data;
    for (const auto & [to, from] : found) {
        data.resize(ggml_nbytes(to));
        file.read(from, 0, data.data(), data.size());
        if (!ggml_validate_row_data(to->type, data.data(), data.size())) {
            throw std::runtime_error(file.path + ": the tensor " + to->name + " has numbers that are not finite");
        }
        ggml_backend_tensor_set(to, data.data(), 0, data.size());
    }
    data.resize(ggml_nbytes(res->head));
    read_head(path_model, n_embd, res->tokens.data(), n_tokens, data.data());
    ggml_backend_tensor_set(res->head, data.data(), 0, data.size());

    return res;
}

const llama_layer_exits::exit * llama_layer_exits::find(int32_t n_layer) const {
    const auto it = std::find(layers.begin(), layers.end(), n_layer);
    return it == layers.end() ? nullptr : &exits[it - layers.begin()];
}

int32_t llama_layer_exits::find_token(int32_t token) const {
    const auto it = std::lower_bound(tokens.begin(), tokens.end(), token);
    return it == tokens.end() || *it != token ? -1 : it - tokens.begin();
}

ggml_tensor * llama_layer_exits::build(const llm_graph_context & gctx, const exit & e, ggml_tensor * cur) const {
    ggml_context * ctx0 = gctx.ctx0;

    ggml_tensor * x = ggml_rms_norm(ctx0, cur, 1e-6f);
    gctx.cb(x, "exit_norm", e.layer);

    ggml_tensor * y = nullptr;
    auto add = [&](ggml_tensor * term) {
        y = y ? ggml_add(ctx0, y, term) : term;
    };
    if (e.weight) {
        add(ggml_mul_mat(ctx0, e.weight, x));
    }
    if (e.scale) {
        add(ggml_mul(ctx0, x, e.scale));
    }
    if (e.down) {
        add(ggml_mul_mat(ctx0, e.up, ggml_mul_mat(ctx0, e.down, x)));
    }
    if (e.mlp_up) {
        ggml_tensor * inner = ggml_silu(ctx0, ggml_add(ctx0, ggml_mul_mat(ctx0, e.mlp_up, x), e.mlp_up_bias));
        add(ggml_mul_mat(ctx0, e.mlp_down, inner));
    }
    add(e.bias);
    gctx.cb(y, "exit_map", e.layer);

    ggml_tensor * logits = ggml_mul_mat(ctx0, head, y);
    gctx.cb(logits, "exit_logits", e.layer);
    ggml_set_output(logits);

    return logits;
}

//
// interface
//

// runs f, and returns what it throws
static const char * told(const std::function<void()> & f) {
    static thread_local std::string why;
    try {
        f();
    } catch (const std::exception & e) {
        why = e.what();
        return why.c_str();
    }
    return nullptr;
}

const char * llama_layer_exits_hash(const char * path_model, char hash[17]) {
    return told([&]() {
        const std::string text = hash_model(path_model);
        memcpy(hash, text.c_str(), text.size() + 1);
    });
}

const char * llama_layer_exits_head(
        const char * path_model, int32_t n_embd, const int32_t * tokens, int32_t n, int32_t * type, void * data) {
    return told([&]() { *type = read_head(path_model, n_embd, tokens, n, data); });
}

const char * llama_layer_exits_load(llama_context * ctx, const char * path_model, const char * path_exits) {
    return told([&]() {
        llama_layer_range_set_exits(*ctx, llama_layer_exits::load(*llama_get_model(ctx), path_model, path_exits));
    });
}

const int32_t * llama_layer_exits_layers(const llama_context * ctx, int32_t * n) {
    const auto * exits = llama_layer_range_exits(*ctx);
    *n = exits ? exits->layers.size() : 0;
    return exits ? exits->layers.data() : nullptr;
}

const int32_t * llama_layer_exits_tokens(const llama_context * ctx, int32_t * n) {
    const auto * exits = llama_layer_range_exits(*ctx);
    *n = exits ? exits->tokens.size() : 0;
    return exits ? exits->tokens.data() : nullptr;
}
