// Layer ranges against full passes, on the patched libllama.
//
//   range-test MODEL [--regroup]
//
// Decodes the same tokens twice: with full passes, and cut into ranges, and compares every logit bit by bit.
// Without --regroup both run the same groups of rows, which must agree in every build. With --regroup the ranges run over
// shuffled subsets of rows (rows are held back at random) together with chunks of the prompts, which agrees bit for bit in
// the exact build. F16 and F32 caches need more than this build: ggml's flash attention on a CPU takes another path
// for a single row over 512 or more cells, and for 64 or more rows. A quantised cache always takes the same one, hence Q8_0
// in the large cases. Prints a line per case and exits 1 at the first difference.

#include "rows.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct test_case {
    int                  n_seq;
    ggml_type            type_kv;
    bool                 flash;
    std::vector<int32_t> bounds; // ramps
    bool                 unified;
    int                  n_prompt;
};

// rows of a prompt on their way through the ranges
struct chunk {
    int first = 0;
    int size  = 0; // 0: none on its way
    int stage = 0;
};

static const int max_chunk = 70;

// A logit of each row is read and written where the logits are, and nothing else changes.
static bool edits_logits(llama_context * ctx, int n_rows, int n_vocab) {
    const llama_token token = 7;

    std::vector<std::vector<float>> before(n_rows);
    bool ok = llama_layer_range_fetch_logits(ctx, 0, n_rows);
    for (int i = 0; ok && i < n_rows; ++i) {
        const float * logits = llama_get_logits_ith(ctx, i);
        before[i].assign(logits, logits + n_vocab);
    }

    std::vector<float> was(n_rows), now(n_rows);
    for (int i = 0; i < n_rows; ++i) {
        now[i] = 1000.0f + i;
    }
    ok = ok && llama_layer_range_edit_logits(ctx, token, 0, n_rows, was.data(), false);
    ok = ok && llama_layer_range_edit_logits(ctx, token, 0, n_rows, now.data(), true);
    ok = ok && llama_layer_range_fetch_logits(ctx, 0, n_rows);
    llama_synchronize(ctx);
    for (int i = 0; ok && i < n_rows; ++i) {
        ok = was[i] == before[i][token];
        before[i][token] = now[i];
        ok = ok && memcmp(llama_get_logits_ith(ctx, i), before[i].data(), n_vocab*sizeof(float)) == 0;
    }

    return ok && !llama_layer_range_edit_logits(ctx, n_vocab, 0, 1, was.data(), false) &&
        !llama_layer_range_edit_logits(ctx, token, n_rows, 1, was.data(), false);
}

// A row whose cell is gone, or whose position does not follow, is named, and the others run without it.
static bool names_misfits(llama_context * ctx, llama_batch_ext * batch, int il, int n_layer, int pos, int n_vocab) {
    const std::vector<int32_t>      slots = { 0, 1 };
    const std::vector<llama_seq_id> first = { 0 };

    fill(batch, { { 1, pos, 0 }, { 1, pos, 1 } });
    bool ok = llama_layer_range_decode(ctx, batch, 0, il, slots.data()) == 0 && edits_logits(ctx, 2, n_vocab);

    ok = ok && llama_memory_seq_rm(llama_get_memory(ctx), 0, pos, -1);
    ok = ok && llama_layer_range_decode(ctx, batch, il, n_layer, slots.data()) == -1;
    ok = ok && llama_layer_range_misfits(ctx, batch, il, slots.data()) == first;
    fill(batch, { { 1, pos, 1 } });
    ok = ok && llama_layer_range_decode(ctx, batch, il, n_layer, slots.data() + 1) == 0;

    // position pos of sequence 0 is missing now
    fill(batch, { { 1, pos + 1, 0 }, { 1, pos + 1, 1 } });
    ok = ok && llama_layer_range_decode(ctx, batch, 0, il, slots.data()) == -1;
    ok = ok && llama_layer_range_misfits(ctx, batch, 0, slots.data()) == first;
    fill(batch, { { 1, pos + 1, 1 } });
    ok = ok && llama_layer_range_decode(ctx, batch, 0, il, slots.data() + 1) == 0;
    ok = ok && llama_layer_range_misfits(ctx, batch, il, slots.data() + 1).empty();

    return ok;
}

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

    const std::vector<test_case> cases = {
        {  1, GGML_TYPE_F16,  true,  { n_layer/2 },                             true,    5 },
        {  2, GGML_TYPE_F16,  true,  { n_layer/4, n_layer/2, 3*n_layer/4 },     true,    5 },
        {  8, GGML_TYPE_F16,  true,  { n_layer/2 },                             false,   5 },
        {  8, GGML_TYPE_Q8_0, true,  { n_layer/4, n_layer/2 },                  true,    5 },
        {  6, GGML_TYPE_Q8_0, true,  { n_layer/2 },                             false, 100 },
        { 32, GGML_TYPE_Q8_0, true,  { n_layer/4, n_layer/2, 3*n_layer/4 },     false,  12 },
        {  8, GGML_TYPE_F32,  false, { 1, n_layer - 1 },                        true,    5 },
        {  8, GGML_TYPE_F32,  false, { 1, n_layer - 1 },                        false,   5 },
    };

    int64_t n_rows_all = 0;

    for (const auto & tc : cases) {
        if (regroup && !tc.flash) {
            continue; // without flash attention a row's result depends on the batch in ggml itself
        }
        if (!regroup && tc.n_prompt > 20) {
            continue;
        }

        std::mt19937 rng(tc.n_seq*1000 + tc.bounds.size());

        const int n_prompt = tc.n_prompt;
        const int n_gen    = 24;

        std::vector<std::vector<llama_token>> tokens(tc.n_seq);
        for (auto & t : tokens) {
            for (int i = 0; i < n_prompt + n_gen; ++i) {
                t.push_back(rng() % n_vocab);
            }
        }

        // [seq][step][n_vocab]
        std::vector<std::vector<std::vector<float>>> expected(tc.n_seq, std::vector<std::vector<float>>(n_gen));

        llama_context * ctx = make_context(model, (tc.unified ? 64 : 256)*tc.n_seq, tc.n_seq, tc.type_kv,
            tc.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED, tc.unified);
        llama_batch_ext * batch = llama_batch_ext_init(ctx);

        auto prompts = [&]() {
            for (int s = 0; s < tc.n_seq; ++s) {
                std::vector<row> rows;
                for (int i = 0; i < n_prompt; ++i) {
                    rows.push_back({ tokens[s][i], i, s, i + 1 == n_prompt });
                }
                fill(batch, rows);
                if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch) != 0) {
                    return false;
                }
            }
            return true;
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

        const uint32_t n_arena = tc.n_seq*(1 + max_chunk);
        const char * why = llama_layer_range_init(ctx, { n_arena, 16, 64, 0 });
        if (why) {
            fprintf(stderr, "llama_layer_range_init: %s\n", why);
            return 1;
        }

        // per sequence: prompt rows that are done, a chunk on its way, tokens that are done, the range its token enters next
        std::vector<int>   n_done(tc.n_seq, 0);
        std::vector<chunk> chunks(tc.n_seq);
        std::vector<int>   done(tc.n_seq, 0), stage(tc.n_seq, 0);

        // in a unified cache a cell's place would depend on when the prompts run, and attention adds up in their order
        const bool carried = regroup && !tc.unified;
        if (!carried) {
            ok = ok && prompts();
            std::fill(n_done.begin(), n_done.end(), n_prompt);
        }

        std::vector<int32_t> bounds = tc.bounds;
        bounds.insert(bounds.begin(), 0);
        bounds.push_back(n_layer);
        const int last = bounds.size() - 2;

        std::vector<int32_t> slot(tc.n_seq);
        for (int s = 0; s < tc.n_seq; ++s) {
            slot[s] = s;
        }
        std::shuffle(slot.begin(), slot.end(), rng);

        double  max_diff = 0.0;
        int64_t n_rows   = 0, n_prompt_rows = 0;
        int     n_left   = tc.n_seq*n_gen;

        while (ok && n_left > 0) {
            // a range and the rows that run through it
            const int st = regroup ? rng() % (last + 1) : stage[0];

            std::vector<int> seqs;
            for (int s = 0; s < tc.n_seq; ++s) {
                if (!regroup || (n_done[s] == n_prompt && done[s] < n_gen && stage[s] == st && rng() % 3 != 0)) {
                    seqs.push_back(s);
                }
            }
            if (regroup) {
                std::shuffle(seqs.begin(), seqs.end(), rng);
            }

            std::vector<row>     rows;
            std::vector<int32_t> slots;
            for (int s : seqs) {
                rows.push_back({ tokens[s][n_prompt + done[s]], n_prompt + done[s], s });
                slots.push_back(slot[s]);
            }
            // prompt rows are no outputs
            std::vector<int> moved;
            for (int s = 0; s < tc.n_seq; ++s) {
                auto & c = chunks[s];
                if (c.size == 0 && st == 0 && n_done[s] < n_prompt && rng() % 4 == 0) {
                    c = { n_done[s], 1 + int(rng() % std::min(max_chunk, n_prompt - n_done[s])), 0 };
                }
                if (c.size == 0 || c.stage != st || rng() % 3 == 0) {
                    continue;
                }
                for (int i = 0; i < c.size; ++i) {
                    rows.push_back({ tokens[s][c.first + i], c.first + i, s, false });
                    slots.push_back(tc.n_seq + s*max_chunk + i);
                }
                moved.push_back(s);
            }
            if (rows.empty()) {
                continue;
            }
            fill(batch, rows);
            ok = llama_layer_range_decode(ctx, batch, bounds[st], bounds[st + 1], slots.data()) == 0;

            for (int s : moved) {
                auto & c = chunks[s];
                if (++c.stage > last) {
                    n_done[s]     += c.size;
                    n_prompt_rows += c.size;
                    c = {};
                }
            }
            for (size_t i = 0; ok && i < seqs.size(); ++i) {
                const int s = seqs[i];
                if (++stage[s] <= last) {
                    continue;
                }
                ok = llama_layer_range_fetch_logits(ctx, i, 1);
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
        ok = ok && (!carried || n_prompt_rows == tc.n_seq*n_prompt);

        const auto perf = llama_layer_range_perf(ctx);

        // a row that is not there is refused
        if (ok) {
            int32_t bad[1] = { slot[0] };
            fill(batch, { { 1, 3, 0 } });
            ok = llama_layer_range_decode(ctx, batch, bounds[1], n_layer, bad) == -1;
            bad[0] = n_arena;
            ok = ok && llama_layer_range_decode(ctx, batch, 0, bounds[1], bad) == -1;
            bad[0] = 0;
            ok = ok && llama_layer_range_decode(ctx, batch, 0, n_layer + 1, bad) == -1;
            ok = ok && !llama_layer_range_fetch_logits(ctx, 1000, 1);
            ok = ok && (tc.n_seq < 2 || names_misfits(ctx, batch, bounds[1], n_layer, n_prompt + n_gen, n_vocab));
        }

        printf("%s: %2d sequences, %s cache, kv %-4s, flash %d, %zu ranges, %s: %lld rows, %lld prompt rows, max |difference| %g, "
                "graphs built %llu, reused %llu, kept %llu in %.1f MiB\n",
                ok ? "ok" : "FAILED", tc.n_seq, tc.unified ? "unified" : "streams", ggml_type_name(tc.type_kv), tc.flash, bounds.size() - 1,
                regroup ? "regrouped" : "same groups", (long long) n_rows, (long long) n_prompt_rows, max_diff,
                (unsigned long long) perf.n_built, (unsigned long long) perf.n_reused, (unsigned long long) perf.n_kept,
                perf.bytes/1048576.0);
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
