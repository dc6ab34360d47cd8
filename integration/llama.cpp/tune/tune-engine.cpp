// What drex-tune asks of the engine: texts of a model, its hidden states, what its layers cost.
//
//   drex-tune-engine info    -m MODEL
//   drex-tune-engine write   -m MODEL [-t N] --layers L,L,... --out DIR [--parallel N] [--predict N] [--temperature F] [--seed N]
//                            [--skip N]                                                 < prompts
//   drex-tune-engine tokens  -m MODEL [--chunk N]                                       < texts
//   drex-tune-engine harvest -m MODEL [-t N] --layers L,L,... --out DIR                 < sequences
//   drex-tune-engine score   -m MODEL [-t N] --exits FILE                               < sequences
//   drex-tune-engine cost    -m MODEL [-t N] --layers L,L,... [--exits FILE] [--rows N,N,...]
//   drex-tune-engine head    -m MODEL                                                   < sequences
//
// Prompts and texts end with a NUL each. A sequence is a line: id n_given token token ...; answers are lines too, but those of
// head: the head's rows of all tokens of the sequences, as F32.

#include "engine.h"

#include "ggml-backend.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <iterator>
#include <sstream>

[[noreturn]] void fail(const std::string & what) {
    fprintf(stderr, "drex-tune-engine: %s\n", what.c_str());
    exit(1);
}

llama_model_ptr load_model(const options & o) {
    llama_model_ptr model(llama_model_load_from_file(o.model.c_str(), llama_model_default_params()));
    if (!model) {
        fail("the model " + o.model + " does not load");
    }
    return model;
}

std::vector<std::string> read_texts() {
    std::vector<std::string> res;
    for (std::string text; std::getline(std::cin, text, '\0'); ) {
        res.push_back(text);
    }
    return res;
}

bool read_sequence(sequence & s, int32_t n_vocab) {
    std::string line;
    if (!std::getline(std::cin, line)) {
        return false;
    }
    std::istringstream in(line);
    s.tokens.clear();
    if (!(in >> s.id >> s.n_given)) {
        fail("a sequence begins with no id and number of given tokens: " + line.substr(0, 80));
    }
    for (llama_token t; in >> t; ) {
        if (t < 0 || t >= n_vocab) {
            fail("sequence " + std::to_string(s.id) + " has the token " + std::to_string(t) + ", the vocabulary " +
                    std::to_string(n_vocab));
        }
        s.tokens.push_back(t);
    }
    if (!in.eof() || s.n_given < 1 || s.n_given > (int32_t) s.tokens.size()) {
        fail("sequence " + std::to_string(s.id) + " is no list of tokens of which the given ones are the first");
    }
    return true;
}

void print_sequence(const sequence & s) {
    std::string line = std::to_string(s.id) + " " + std::to_string(s.n_given);
    for (const llama_token t : s.tokens) {
        line += " " + std::to_string(t);
    }
    puts(line.c_str());
    fflush(stdout);
}

std::string quoted(const std::string & text) {
    std::string res = "\"";
    for (const unsigned char c : text) {
        if (c == '"' || c == '\\') {
            res += '\\';
            res += c;
        } else if (c < 0x20) {
            char code[8];
            snprintf(code, sizeof(code), "\\u%04x", c);
            res += code;
        } else {
            res += c;
        }
    }
    return res + "\"";
}

static long long integer(const std::string & name, const std::string & text, long long low, long long high) {
    char * end = nullptr;
    const long long n = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || n < low || n > high) {
        fail(name + " is " + text + ", expected a whole number from " + std::to_string(low) + " to " + std::to_string(high));
    }
    return n;
}

static std::vector<int32_t> integers(const std::string & name, const std::string & text) {
    std::vector<int32_t> res;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, ','); ) {
        res.push_back(integer(name, part, 1, 1 << 20));
    }
    return res;
}

int main(int argc, char ** argv) {
    static const struct {
        const char * name;
        int (*run)(const options &);
    } commands[] = {
        { "info",    run_info    },
        { "write",   run_write   },
        { "tokens",  run_tokens  },
        { "harvest", run_harvest },
        { "score",   run_score   },
        { "cost",    run_cost    },
        { "head",    run_head    },
    };

    options o;
    for (int i = 2; i < argc; i += 2) {
        const std::string name  = argv[i];
        if (i + 1 == argc) {
            fail(name + " has no value");
        }
        const std::string value = argv[i + 1];
        if (name == "-m") {
            o.model = value;
        } else if (name == "-t") {
            o.n_threads = integer(name, value, 1, 512);
        } else if (name == "--exits") {
            o.exits = value;
        } else if (name == "--out") {
            o.out = value;
        } else if (name == "--layers") {
            o.layers = integers(name, value);
        } else if (name == "--rows") {
            o.rows = integers(name, value);
        } else if (name == "--parallel") {
            o.n_parallel = integer(name, value, 1, 256);
        } else if (name == "--predict") {
            o.n_predict = integer(name, value, 1, 4096);
        } else if (name == "--chunk") {
            o.n_chunk = integer(name, value, 2, 4096);
        } else if (name == "--skip") {
            o.n_skip = integer(name, value, 0, INT32_MAX);
        } else if (name == "--seed") {
            o.seed = integer(name, value, 0, INT32_MAX);
        } else if (name == "--temperature") {
            o.temperature = strtof(value.c_str(), nullptr);
        } else {
            fail(name + " is not known");
        }
    }

    for (const auto & command : commands) {
        if (argc < 2 || strcmp(argv[1], command.name) != 0) {
            continue;
        }
        if (o.model.empty()) {
            fail("-m names no model");
        }
        llama_log_set([](ggml_log_level level, const char * text, void *) {
            if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) {
                fputs(text, stderr);
            }
        }, nullptr);
        llama_backend_init();
        return command.run(o);
    }
    fail("the first argument is none of info, write, tokens, harvest, score, cost, head");
}
