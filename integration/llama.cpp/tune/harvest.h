// Hidden states of a batch, and what the full model says there.

#pragma once

#include "engine.h"

#include "ggml.h"

#include <cstdio>

// of a sequence, token by token
struct harvested {
    struct row {
        int32_t token;
        int32_t top;
        float   p_top;
        float   log_sum;
    };
    std::vector<row>         rows;
    std::vector<ggml_fp16_t> states; // of each output file
};

class harvester {
public:
    // as ranges; states of o.layers go to files in o.out
    harvester(const options & o, llama_model * model, int32_t n_seq, int32_t n_ctx_seq, int32_t n_tokens);
    ~harvester();

    harvester(const harvester &) = delete;
    harvester & operator=(const harvester &) = delete;

    // all layers; llama_get_logits_ith() has the logits of outputs
    void run(const std::vector<row> & rows);

    // row i of the last run, which was an output
    void take(int32_t i, harvested & to) const;

    // appends a sequence to the files, and says so
    void write(int64_t id, const harvested & from);

    llama_context * ctx() const { return r.ctx; }

    void forget(llama_seq_id seq) { r.forget(seq); }

private:
    struct output {
        int32_t            layer; // n_layer: the state that enters the head
        FILE *             file;
        std::vector<float> states; // of the last run: of all rows, those that enter the head of outputs only
    };
    std::vector<output>  outputs;
    FILE *               f_rows;
    ranges               r;
    std::vector<row>     last;
    std::vector<int32_t> i_output; // of each row of the last run, -1: none

    static bool on_tensor(ggml_tensor * t, bool ask, void * data);
};
