// What the subcommands of drex-tune-engine share: options, a model, sequences of tokens, rows through layer ranges.

#pragma once

#include "llama.h"
#include "llama-cpp.h"
#include "llama-layer-range.h"

#include <cstdint>
#include <string>
#include <vector>

struct options {
    std::string          model;
    std::string          exits;
    std::string          out;
    std::vector<int32_t> layers;
    std::vector<int32_t> rows        = { 1, 4, 16, 64 };
    int32_t              n_threads   = 2;
    int32_t              n_parallel  = 16;
    int32_t              n_predict   = 192;
    int32_t              n_chunk     = 512; // most tokens of a sequence
    int32_t              n_skip      = 0;   // sequences that are done already
    float                temperature = 0.8f;
    uint32_t             seed        = 1;
};

// tokens [0, n_given) are given, the others are what the states and scores are wanted of
struct sequence {
    int64_t                  id      = 0;
    int32_t                  n_given = 1;
    std::vector<llama_token> tokens;
};

[[noreturn]] void fail(const std::string & what);

// loads the model or fails
llama_model_ptr load_model(const options & o);

// texts on the standard input, each ended by a NUL
std::vector<std::string> read_texts();

// sequences on the standard input, one a line: id n_given token token ...
bool read_sequence(sequence & s, int32_t n_vocab);
void print_sequence(const sequence & s);

// text as JSON, quotes included
std::string quoted(const std::string & text);

struct row {
    llama_token  token;
    llama_pos    pos;
    llama_seq_id seq;
    bool         output;
};

// a sequence's rows, of which those from the last given one on are outputs; fails where there are more than n_chunk
std::vector<row> rows_of(const sequence & s, int32_t n_chunk);

// A context whose layers run range by range: row i of a batch leaves each range through row i of the arena.
struct ranges {
    llama_context *   ctx;
    llama_batch_ext * batch;
    int32_t           n_layer;
    int32_t           n_vocab;
    int32_t           n_embd;

    std::vector<int32_t> arena;

    // n_seq sequences of up to n_ctx_seq tokens; up to n_tokens rows at once, and those of up to n_seq rows keep their graphs
    ranges(const options & o, llama_model * model, int32_t n_seq, int32_t n_ctx_seq, int32_t n_tokens,
            ggml_backend_sched_eval_callback cb_eval = nullptr, void * cb_eval_user_data = nullptr);
    ~ranges();

    ranges(const ranges &) = delete;
    ranges & operator=(const ranges &) = delete;

    // waits for the result, or fails
    void run(const std::vector<row> & rows, int32_t begin, int32_t end);

    // drops what the context knows of a sequence, -1: of all
    void forget(llama_seq_id seq);
};

int run_info   (const options & o);
int run_write  (const options & o);
int run_tokens (const options & o);
int run_harvest(const options & o);
int run_score  (const options & o);
int run_cost   (const options & o);
int run_head   (const options & o);
