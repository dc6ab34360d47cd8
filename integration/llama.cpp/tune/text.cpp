// Texts: from files, and from the model itself.

#include "harvest.h"

#include <algorithm>

// the prompt as a conversation's first message, where the model has a template that llama.cpp knows
static std::string in_template(const llama_model * model, const std::string & prompt) {
    const char * tmpl = llama_model_chat_template(model, nullptr);
    if (!tmpl) {
        return prompt;
    }
    const llama_chat_message message = { "user", prompt.c_str() };
    std::string res(prompt.size() + 4096, 0);
    const int32_t n = llama_chat_apply_template(tmpl, &message, 1, true, &res[0], res.size());
    if (n < 0 || n > (int32_t) res.size()) {
        return prompt;
    }
    res.resize(n);
    return res;
}

static std::vector<llama_token> tokenized(const llama_vocab * vocab, const std::string & text, bool add, bool special) {
    std::vector<llama_token> res(text.size() + 16);
    const int32_t n = llama_tokenize(vocab, text.data(), text.size(), res.data(), res.size(), add, special);
    if (n < 0) {
        fail("a text of " + std::to_string(text.size()) + " bytes does not fit into as many tokens");
    }
    res.resize(n);
    return res;
}

int run_tokens(const options & o) {
    const llama_model_ptr model = load_model(o);
    const llama_vocab * vocab = llama_model_get_vocab(model.get());

    // each piece begins as a prompt does
    std::vector<llama_token> begin;
    if (llama_vocab_get_add_bos(vocab)) {
        begin.push_back(llama_vocab_bos(vocab));
    }
    const size_t n_part = o.n_chunk - begin.size();

    int64_t id = 0;
    for (const auto & text : read_texts()) {
        const auto all = tokenized(vocab, text, false, false);
        for (size_t i = 0; i + 1 < all.size(); i += n_part) {
            const size_t end = std::min(all.size(), i + n_part);
            sequence s = { id++, int(begin.size()) + 1, begin };
            s.tokens.insert(s.tokens.end(), all.begin() + i, all.begin() + end);
            print_sequence(s);
        }
    }
    return 0;
}

// What the model answers to each prompt, several at once, and what harvest would say of the answers.
int run_write(const options & o) {
    const llama_model_ptr model = load_model(o);
    const llama_vocab * vocab = llama_model_get_vocab(model.get());

    const auto prompts = read_texts();

    struct writer {
        sequence        seq;
        harvested       states;
        llama_sampler * sampler = nullptr;
        bool            busy    = false;
    };
    harvester h(o, model.get(), o.n_parallel, o.n_chunk + o.n_predict, std::max(o.n_parallel, o.n_chunk));

    std::vector<writer> writers(o.n_parallel);

    // Gives the writer its next token, after row i. Its answer ends where the text ends, or where there is no more room.
    auto take = [&](writer & w, int32_t i) {
        h.take(i, w.states);
        const llama_token token = llama_sampler_sample(w.sampler, h.ctx(), i);
        w.seq.tokens.push_back(token);
        if (llama_vocab_is_eog(vocab, token) || (int) w.seq.tokens.size() >= w.seq.n_given + o.n_predict) {
            h.write(w.seq.id, w.states);
            llama_sampler_free(w.sampler);
            w.busy = false;
        }
    };

    std::vector<row> rows;
    for (size_t next = o.n_skip; ; ) {
        for (int s = 0; s < o.n_parallel && next < prompts.size(); ++s) {
            auto & w = writers[s];
            if (w.busy) {
                continue;
            }
            w.seq = { int64_t(next), 1, tokenized(vocab, in_template(model.get(), prompts[next]), true, true) };
            if ((int) w.seq.tokens.size() > o.n_chunk) {
                w.seq.tokens.resize(o.n_chunk);
            }
            if (w.seq.tokens.empty()) {
                fail("prompt " + std::to_string(next) + " has no tokens");
            }
            w.seq.n_given = w.seq.tokens.size();
            w.busy        = true;
            w.states      = {};
            w.sampler     = llama_sampler_chain_init(llama_sampler_chain_default_params());
            llama_sampler_chain_add(w.sampler, llama_sampler_init_top_k(64));
            llama_sampler_chain_add(w.sampler, llama_sampler_init_top_p(0.95f, 1));
            llama_sampler_chain_add(w.sampler, llama_sampler_init_temp(o.temperature));
            llama_sampler_chain_add(w.sampler, llama_sampler_init_dist(o.seed + next));
            next++;

            h.forget(s);
            rows.clear();
            for (int i = 0; i < w.seq.n_given; ++i) {
                rows.push_back({ w.seq.tokens[i], i, s, i + 1 == w.seq.n_given });
            }
            h.run(rows);
            take(w, w.seq.n_given - 1);
        }

        rows.clear();
        for (int s = 0; s < o.n_parallel; ++s) {
            const auto & w = writers[s];
            if (w.busy) {
                rows.push_back({ w.seq.tokens.back(), (llama_pos) w.seq.tokens.size() - 1, s, true });
            }
        }
        if (rows.empty() && next >= prompts.size()) {
            break;
        }
        if (rows.empty()) {
            continue;
        }
        h.run(rows);
        for (int32_t i = 0; i < (int32_t) rows.size(); ++i) {
            take(writers[rows[i].seq], i);
        }
    }
    return 0;
}
