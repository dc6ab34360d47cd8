// Teacher-forced scoring with the unpatched library: how many tokens of a finished stream are the full model's choice.
//
//   drex-score -m MODEL [-t THREADS] [--margins] [--choices] [-ctk TYPE] < streams.jsonl
//
// Reads one JSON object per line: {"id": any number, "prompt": [ids], "output": [ids], "ignore_eos": bool (optional)}.
// Prints one per line, in the same order: {"id": ..., "n": tokens, "agree": those equal to the argmax of one full pass
// over prompt and output (the lowest id where logits tie), "nll": the output's negative log likelihood}, and with
// --margins "margins": per token, by how much the logit of the full model's choice exceeds the token's (0 = agrees).
// With --choices also "choices": per token, that argmax, and "gaps": per token, the probability of the best token less that
// of the second best, over the tokens that can be chosen. -ctk q8_0 sets the type of the KV cache (f16 by default).
// "ignore_eos" leaves end-of-generation tokens out of the choice, as the option of that name does in llama-server; the
// likelihood is over all tokens either way.

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

namespace {

// The input is flat and made by a program, so a whole JSON library would be out of proportion.
struct parser {
    const std::string & text;
    size_t              at = 0;

    void space() {
        while (at < text.size() && strchr(" \t\r\n", text[at])) {
            at++;
        }
    }

    bool take(char c) {
        space();
        if (at < text.size() && text[at] == c) {
            at++;
            return true;
        }
        return false;
    }

    bool string(std::string & out) {
        if (!take('"')) {
            return false;
        }
        const size_t end = text.find('"', at);
        if (end == std::string::npos) {
            return false;
        }
        out = text.substr(at, end - at);
        at  = end + 1;
        return true;
    }

    bool number(int64_t & out) {
        space();
        char * end = nullptr;
        out        = strtoll(text.c_str() + at, &end, 10);
        const size_t now = end - text.c_str();
        if (now == at) {
            return false;
        }
        at = now;
        return true;
    }

    bool boolean(bool & out) {
        space();
        for (const bool value : { true, false }) {
            const char * word = value ? "true" : "false";
            if (text.compare(at, strlen(word), word) == 0) {
                at += strlen(word);
                out = value;
                return true;
            }
        }
        return false;
    }

    bool list(std::vector<llama_token> & out) {
        if (!take('[')) {
            return false;
        }
        if (take(']')) {
            return true;
        }
        do {
            int64_t value;
            if (!number(value)) {
                return false;
            }
            out.push_back((llama_token) value);
        } while (take(','));
        return take(']');
    }
};

struct stream {
    int64_t                  id = 0;
    std::vector<llama_token> prompt;
    std::vector<llama_token> output;
    bool                     ignore_eos = false;

    bool parse(const std::string & line) {
        parser p{ line };
        if (!p.take('{')) {
            return false;
        }
        do {
            std::string key;
            if (!p.string(key) || !p.take(':')) {
                return false;
            }
            const bool ok = key == "id"         ? p.number(id)
                          : key == "prompt"     ? p.list(prompt)
                          : key == "output"     ? p.list(output)
                          : key == "ignore_eos" ? p.boolean(ignore_eos)
                                                : false;
            if (!ok) {
                return false;
            }
        } while (p.take(','));
        return p.take('}') && !prompt.empty();
    }
};

[[noreturn]] void usage(const char * name, int code) {
    fprintf(code ? stderr : stdout, "usage: %s -m MODEL [-t THREADS] [--margins] [--choices] [-ctk f16|q8_0|f32] < streams.jsonl\n", name);
    exit(code);
}

[[noreturn]] void fail(const std::string & what) {
    fprintf(stderr, "drex-score: %s\n", what.c_str());
    exit(1);
}

} // namespace

int main(int argc, char ** argv) {
    const char * path_model = nullptr;
    int          n_threads  = 2;
    bool         margins    = false;
    bool         choices    = false;
    ggml_type    type_kv    = GGML_TYPE_F16;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        if (arg == "-m" && i + 1 < argc) {
            path_model = argv[++i];
        } else if (arg == "-t" && i + 1 < argc) {
            n_threads = atoi(argv[++i]);
        } else if (arg == "--margins") {
            margins = true;
        } else if (arg == "--choices") {
            choices = true;
        } else if (arg == "-ctk" && i + 1 < argc) {
            const std::string type = argv[++i];
            if (type != "f16" && type != "q8_0" && type != "f32") {
                usage(argv[0], 2);
            }
            type_kv = type == "f16" ? GGML_TYPE_F16 : type == "q8_0" ? GGML_TYPE_Q8_0 : GGML_TYPE_F32;
        } else {
            usage(argv[0], arg == "-h" || arg == "--help" ? 0 : 2);
        }
    }
    if (!path_model || n_threads < 1) {
        usage(argv[0], 2);
    }

    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) {
                fputs(text, stderr);
            }
        },
        nullptr);
    llama_backend_init();

    llama_model * model = llama_model_load_from_file(path_model, llama_model_default_params());
    if (!model) {
        fail(std::string("cannot load ") + path_model);
    }
    const llama_vocab * vocab   = llama_model_get_vocab(model);
    const int32_t       n_vocab = llama_vocab_n_tokens(vocab);

    std::vector<bool> eog(n_vocab);
    for (int32_t i = 0; i < n_vocab; i++) {
        eog[i] = llama_vocab_is_eog(vocab, i);
    }

    llama_context * ctx   = nullptr;
    uint32_t        n_ctx = 0;

    std::string line;
    for (size_t n_line = 1; std::getline(std::cin, line); n_line++) {
        if (line.find_first_not_of(" \t\r") == std::string::npos) {
            continue;
        }
        stream s;
        if (!s.parse(line)) {
            fail("line " + std::to_string(n_line) + " is not a stream");
        }
        // The last token is chosen by the one before it, and chooses nothing itself.
        std::vector<llama_token> tokens = s.prompt;
        if (!s.output.empty()) {
            tokens.insert(tokens.end(), s.output.begin(), s.output.end() - 1);
        }
        for (const auto & list : { s.prompt, s.output }) {
            for (const llama_token token : list) {
                if (token < 0 || token >= n_vocab) {
                    fail("line " + std::to_string(n_line) + " has a token that the model has not");
                }
            }
        }
        if (!ctx || tokens.size() > n_ctx) {
            // One batch takes the whole stream, so that "full pass" means just that.
            n_ctx = std::max<uint32_t>(512, (tokens.size() + 255) / 256 * 256);
            llama_free(ctx);
            llama_context_params params = llama_context_default_params();
            params.n_ctx           = n_ctx;
            params.n_batch         = n_ctx;
            params.n_ubatch        = n_ctx;
            params.n_seq_max       = 1;
            params.n_threads       = n_threads;
            params.n_threads_batch = n_threads;
            params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
            params.type_k          = type_kv;
            params.type_v          = type_kv;
            ctx = llama_init_from_model(model, params);
            if (!ctx) {
                fail("cannot make a context of " + std::to_string(n_ctx) + " tokens");
            }
        }

        llama_memory_clear(llama_get_memory(ctx), true);
        llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
        for (size_t i = 0; i < tokens.size(); i++) {
            batch.token[i]     = tokens[i];
            batch.pos[i]       = i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = i + 1 >= s.prompt.size();
        }
        batch.n_tokens = tokens.size();
        if (llama_decode(ctx, batch) != 0) {
            fail("line " + std::to_string(n_line) + " does not decode");
        }

        size_t      agree = 0;
        double      nll   = 0.0;
        std::string text, best_text, gap_text;
        for (size_t i = 0; i < s.output.size(); i++) {
            const float * logits = llama_get_logits_ith(ctx, s.prompt.size() - 1 + i);
            int32_t       best   = -1;
            float         max    = -INFINITY;
            float         first  = -INFINITY; // of those that can be chosen
            float         second = -INFINITY;
            for (int32_t t = 0; t < n_vocab; t++) {
                max = std::max(max, logits[t]);
                if (s.ignore_eos && eog[t]) {
                    continue;
                }
                second = std::max(second, std::min(first, logits[t]));
                first  = std::max(first, logits[t]);
                if (best < 0 || logits[t] > logits[best]) {
                    best = t;
                }
            }
            double sum = 0.0, sum_chosen = 0.0;
            for (int32_t t = 0; t < n_vocab; t++) {
                sum += std::exp((double) logits[t] - max);
                if (!(s.ignore_eos && eog[t])) {
                    sum_chosen += std::exp((double) logits[t] - first);
                }
            }
            const llama_token emitted = s.output[i];
            agree += emitted == best;
            nll   += std::log(sum) + max - logits[emitted];
            if (margins) {
                char number[32];
                snprintf(number, sizeof(number), "%s%.6g", i ? "," : "", best < 0 ? 0.0 : (double) (logits[best] - logits[emitted]));
                text += number;
            }
            if (choices) {
                char number[32];
                snprintf(number, sizeof(number), "%s%.9g", i ? "," : "", (1.0 - std::exp((double) second - first)) / sum_chosen);
                gap_text += number;
                best_text += (i ? "," : "") + std::to_string(best);
            }
        }
        llama_batch_free(batch);

        printf("{\"id\":%lld,\"n\":%zu,\"agree\":%zu,\"nll\":%.6f", (long long) s.id, s.output.size(), agree, nll);
        if (margins) {
            printf(",\"margins\":[%s]", text.c_str());
        }
        if (choices) {
            printf(",\"choices\":[%s],\"gaps\":[%s]", best_text.c_str(), gap_text.c_str());
        }
        printf("}\n");
        fflush(stdout);
    }

    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
