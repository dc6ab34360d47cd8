// Layer windows against full passes, on the patched libllama.
//
//   window-test MODEL [--regroup]
//
// Decodes the same tokens twice: with full passes, and cut into windows, and compares every logit bit by bit.
// Without --regroup both run the same groups of rows, which must agree in every build. With --regroup the windows run
// over shuffled subsets (rows are held back at random), which agrees bit for bit in the exact build. That build alone is
// not enough for F16 and F32 caches: ggml's flash attention on a CPU takes another path for a single row over 512 or
// more cells, and for 64 or more rows. A quantised cache always takes the same one, hence Q8_0 in the large cases. Prints a line per case and exits 1 at the first difference.

#include "rows.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL [--regroup]\n", argv[0]);
        return 2;
    }
    const bool regroup = argc > 2 && strcmp(argv[2], "--regroup") == 0;

    log_warnings_only();

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }

    const int n_layer = llama_model_n_layer(model);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    struct test_case {
        int                  n_seq;
        ggml_type            type_kv;
        bool                 flash;
        std::vector<int32_t> bounds; // ramps
    };

    const std::vector<test_case> cases = {
        {  1, GGML_TYPE_F16,  true,  { n_layer/2 } },
        {  2, GGML_TYPE_F16,  true,  { n_layer/4, n_layer/2, 3*n_layer/4 } },
        {  8, GGML_TYPE_F16,  true,  { n_layer/2 } },
        {  8, GGML_TYPE_Q8_0, true,  { n_layer/4, n_layer/2 } },
        { 32, GGML_TYPE_Q8_0, true,  { n_layer/4, n_layer/2, 3*n_layer/4 } },
        {  8, GGML_TYPE_F32,  false, { 1, n_layer - 1 } },
    };

    int64_t n_rows_all = 0;

    for (const auto & tc : cases) {
        if (regroup && !tc.flash) {
            continue; // without flash attention a row's result depends on the batch in ggml itself
        }

        std::mt19937 rng(tc.n_seq*1000 + tc.bounds.size());

        const int n_prompt = 5;
        const int n_gen    = 24;

        std::vector<std::vector<llama_token>> tokens(tc.n_seq);
        for (auto & t : tokens) {
            for (int i = 0; i < n_prompt + n_gen; ++i) {
                t.push_back(rng() % n_vocab);
            }
        }

        // [seq][step][n_vocab]
        std::vector<std::vector<std::vector<float>>> expected(tc.n_seq, std::vector<std::vector<float>>(n_gen));

        llama_context * ctx = make_context(model, 64*tc.n_seq, tc.n_seq, tc.type_kv,
            tc.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED);
        llama_batch_ext * batch = llama_batch_ext_init(ctx);

        auto prompts = [&]() {
            std::vector<row> rows;
            for (int s = 0; s < tc.n_seq; ++s) {
                for (int i = 0; i < n_prompt; ++i) {
                    rows.push_back({ tokens[s][i], i, s });
                }
            }
            fill(batch, rows);
            return llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
        };

        bool ok = prompts();

        for (int g = 0; ok && g < n_gen; ++g) {
            std::vector<row> rows;
            for (int s = 0; s < tc.n_seq; ++s) {
                rows.push_back({ tokens[s][n_prompt + g], n_prompt + g, s });
            }
            fill(batch, rows);
            ok = llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
            for (int s = 0; ok && s < tc.n_seq; ++s) {
                const float * logits = llama_get_logits_ith(ctx, s);
                expected[s][g].assign(logits, logits + n_vocab);
            }
        }

        llama_memory_clear(llama_get_memory(ctx), true);

        const char * why = llama_window_init(ctx, { (uint32_t) tc.n_seq, 8 });
        if (why) {
            fprintf(stderr, "llama_window_init: %s\n", why);
            return 1;
        }

        ok = ok && prompts();

        // per sequence: how many tokens are done, and the window its current token enters next
        std::vector<int> done(tc.n_seq, 0), stage(tc.n_seq, 0);
        std::vector<int32_t> bounds = tc.bounds;
        bounds.insert(bounds.begin(), 0);
        bounds.push_back(n_layer);

        std::vector<int32_t> slot(tc.n_seq);
        for (int s = 0; s < tc.n_seq; ++s) {
            slot[s] = (s*7 + 3) % tc.n_seq;
        }
        std::sort(slot.begin(), slot.end());
        std::shuffle(slot.begin(), slot.end(), rng);

        double max_diff = 0.0;
        int64_t n_rows  = 0;
        int n_left = tc.n_seq*n_gen;

        while (ok && n_left > 0) {
            // a window and the sequences that run through it
            std::vector<int> seqs;
            int st = 0;
            if (regroup) {
                st = rng() % (bounds.size() - 1);
                for (int s = 0; s < tc.n_seq; ++s) {
                    if (done[s] < n_gen && stage[s] == st && rng() % 3 != 0) {
                        seqs.push_back(s);
                    }
                }
                std::shuffle(seqs.begin(), seqs.end(), rng);
                if (seqs.empty()) {
                    continue;
                }
            } else {
                st = stage[0];
                for (int s = 0; s < tc.n_seq; ++s) {
                    seqs.push_back(s);
                }
            }

            std::vector<row>     rows;
            std::vector<int32_t> slots;
            for (int s : seqs) {
                rows.push_back({ tokens[s][n_prompt + done[s]], n_prompt + done[s], s });
                slots.push_back(slot[s]);
            }
            fill(batch, rows);
            ok = llama_window_decode(ctx, batch, bounds[st], bounds[st + 1], slots.data()) == 0;

            for (size_t i = 0; ok && i < seqs.size(); ++i) {
                const int s = seqs[i];
                if (++stage[s] < (int) bounds.size() - 1) {
                    continue;
                }
                ok = llama_window_fetch_logits(ctx, i, 1);
                const float * logits = llama_get_logits_ith(ctx, i);
                for (int v = 0; v < n_vocab; ++v) {
                    max_diff = std::max(max_diff, (double) std::abs(logits[v] - expected[s][done[s]][v]));
                }
                ok = ok && memcmp(logits, expected[s][done[s]].data(), n_vocab*sizeof(float)) == 0;
                stage[s] = 0;
                done[s]++;
                n_left--;
                n_rows++;
            }
        }

        uint64_t n_built, n_reused;
        llama_window_perf(ctx, &n_built, &n_reused);

        // a row that is not there is refused
        if (ok) {
            int32_t bad[1] = { slot[0] };
            fill(batch, { { 1, 3, 0 } });
            ok = llama_window_decode(ctx, batch, bounds[1], n_layer, bad) == -1;
            bad[0] = tc.n_seq;
            ok = ok && llama_window_decode(ctx, batch, 0, bounds[1], bad) == -1;
            bad[0] = 0;
            ok = ok && llama_window_decode(ctx, batch, 0, n_layer + 1, bad) == -1;
        }

        printf("%s: %2d sequences, kv %-4s, flash %d, %zu windows, %s: %lld rows, max |difference| %g, graphs built %llu, reused %llu\n",
                ok ? "ok" : "FAILED", tc.n_seq, ggml_type_name(tc.type_kv), tc.flash, bounds.size() - 1,
                regroup ? "regrouped" : "same groups", (long long) n_rows, max_diff,
                (unsigned long long) n_built, (unsigned long long) n_reused);
        n_rows_all += n_rows;

        llama_batch_ext_free(batch);
        llama_free(ctx);
        if (!ok) {
            return 1;
        }
    }

    llama_model_free(model);
    printf("compared %lld rows\n", (long long) n_rows_all);
    return 0;
}
