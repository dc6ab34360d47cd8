// Hidden states where exits may be, and what the full model says there.
//
// For each token that is wanted, DIR gets one row of each file:
//   layer-L.f16  the state that leaves layers [0, L), divided by its root mean square
//   final.f16    the state that enters the output head
//   rows.bin     16 bytes: the token, the full model's first choice (i32), its probability, log of the sum of exp(logit) (f32)

#include "harvest.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstring>

static FILE * open_file(const std::string & path) {
    FILE * f = fopen(path.c_str(), "ab");
    if (!f) {
        fail("the file " + path + " cannot be written: " + strerror(errno));
    }
    return f;
}

static void write_all(FILE * f, const void * data, size_t n) {
    if (fwrite(data, 1, n, f) != n || fflush(f) != 0) {
        fail(std::string("a file of states cannot be written: ") + strerror(errno));
    }
}

harvester::harvester(const options & o, llama_model * model, int32_t n_seq, int32_t n_ctx_seq, int32_t n_tokens) :
    r(o, model, n_seq, n_ctx_seq, n_tokens, on_tensor, this) {
    for (const int32_t layer : o.layers) {
        if (layer >= r.n_layer || (!outputs.empty() && layer <= outputs.back().layer)) {
            fail("--layers are no increasing numbers below " + std::to_string(r.n_layer));
        }
        outputs.push_back({ layer, open_file(o.out + "/layer-" + std::to_string(layer) + ".f16"), {} });
    }
    outputs.push_back({ r.n_layer, open_file(o.out + "/final.f16"), {} });
    f_rows = open_file(o.out + "/rows.bin");
}

harvester::~harvester() {
    for (const auto & out : outputs) {
        fclose(out.file);
    }
    fclose(f_rows);
}

// takes the state that enters the head
bool harvester::on_tensor(ggml_tensor * t, bool ask, void * data) {
    if (strcmp(t->name, "result_norm") != 0 || ggml_nelements(t) == 0) {
        return false;
    }
    auto & h = *static_cast<harvester *>(data);
    if (!ask) {
        if (t->type != GGML_TYPE_F32 || t->ne[0] != h.r.n_embd || !ggml_is_contiguous(t)) {
            fail("the state that enters the model's head is no row of its width");
        }
        auto & states = h.outputs.back().states;
        states.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, states.data(), 0, ggml_nbytes(t));
    }
    return true;
}

void harvester::run(const std::vector<row> & rows) {
    last = rows;
    for (auto & row : last) {
        row.output = false;
    }
    int32_t begin = 0;
    for (size_t k = 0; k + 1 < outputs.size(); ++k) {
        auto & out = outputs[k];
        r.run(last, begin, out.layer);
        begin = out.layer;

        const ggml_tensor * arena = llama_layer_range_hidden(r.ctx);
        out.states.resize(rows.size()*r.n_embd);
        ggml_backend_tensor_get(arena, out.states.data(), 0, rows.size()*arena->nb[1]);
    }
    outputs.back().states.clear();
    r.run(rows, begin, r.n_layer);

    i_output.clear();
    int32_t n_outputs = 0;
    for (const auto & row : rows) {
        i_output.push_back(row.output ? n_outputs++ : -1);
    }
    if ((int64_t) outputs.back().states.size() != int64_t(n_outputs)*r.n_embd) {
        fail("the model's graph has no tensor result_norm with a row for each output");
    }
    for (int32_t i = 0; i < (int32_t) rows.size(); ++i) {
        if (rows[i].output && !llama_layer_range_fetch_logits(r.ctx, i, 1)) {
            fail("the logits of row " + std::to_string(i) + " cannot be read");
        }
    }
    llama_synchronize(r.ctx);
    last = rows;
}

void harvester::take(int32_t i, harvested & to) const {
    for (const auto & out : outputs) {
        const bool    is_last = &out == &outputs.back();
        const float * x       = out.states.data() + size_t(is_last ? i_output[i] : i)*r.n_embd;
        double sum = 0.0;
        for (int32_t j = 0; j < r.n_embd; ++j) {
            sum += double(x[j])*x[j];
        }
        const float scale = is_last ? 1.0 : 1.0/std::sqrt(sum/r.n_embd + 1e-6);
        for (int32_t j = 0; j < r.n_embd; ++j) {
            to.states.push_back(ggml_fp32_to_fp16(x[j]*scale));
        }
    }
    const float * logits = llama_get_logits_ith(r.ctx, i);
    const int32_t top    = std::max_element(logits, logits + r.n_vocab) - logits;
    double sum = 0.0;
    for (int32_t v = 0; v < r.n_vocab; ++v) {
        sum += std::exp(logits[v] - logits[top]);
    }
    to.rows.push_back({ last[i].token, top, float(1.0/sum), float(logits[top] + std::log(sum)) });
}

void harvester::write(int64_t id, const harvested & from) {
    std::vector<ggml_fp16_t> rows(from.rows.size()*r.n_embd);
    for (size_t k = 0; k < outputs.size(); ++k) {
        for (size_t i = 0; i < from.rows.size(); ++i) {
            memcpy(&rows[i*r.n_embd], &from.states[(i*outputs.size() + k)*r.n_embd], r.n_embd*sizeof(rows[0]));
        }
        write_all(outputs[k].file, rows.data(), rows.size()*sizeof(rows[0]));
    }
    write_all(f_rows, from.rows.data(), from.rows.size()*sizeof(from.rows[0]));

    printf("%" PRId64 " %zu\n", id, from.rows.size());
    fflush(stdout);
}

int run_harvest(const options & o) {
    const llama_model_ptr model = load_model(o);
    harvester h(o, model.get(), 1, o.n_chunk, o.n_chunk);

    for (sequence s; read_sequence(s, llama_vocab_n_tokens(llama_model_get_vocab(model.get()))); ) {
        const auto rows = rows_of(s, o.n_chunk);
        h.forget(-1);
        h.run(rows);

        harvested all;
        for (int32_t i = s.n_given - 1; i < (int32_t) rows.size(); ++i) {
            h.take(i, all);
        }
        h.write(s.id, all);
    }
    return 0;
}
