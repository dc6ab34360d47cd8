// Fill by later passes against full passes, on the patched libllama.
//
//   postfill-test MODEL [--exact]
//
// Decodes the same tokens twice. Once with full passes. Once as early exit with pending rows does it: at a ramp a row
// leaves at random and stays in the arena, until a row of its sequence goes on and takes along what waits there, several
// rows of one sequence in one window. At the end nothing is pending, and K and V of every layer and token must be those
// of the full passes: bit by bit in the exact build (--exact), where a quantised cache makes a row's result independent of
// its company. Otherwise, in F16, they may differ by a few times as much as the engine's own full passes do between
// sequences in one batch and alone.
//
// Then rows that leave for good: the first layer that they skip has what a full pass has, since it projects the same hidden
// row, and all layers behind it have been written. Prints a line per case and exits 1 at the first difference.

#include "rows.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

// differences count in the largest value of a layer's K or V: this much always may be, and so many times the engine's own
static const double tolerance = 0.02;
static const double factor    = 3.0;

// a token that left at ramp `at` - 1 and waits for window `at`
struct pending {
    llama_pos pos;
    int32_t   slot;
    int       at;
};

// largest difference over largest value, 0 if all bytes are equal
static double difference(const ggml_tensor * a, size_t cell_a, const ggml_tensor * b, size_t cell_b) {
    const char * pa = (const char *) a->data + cell_a*a->nb[1];
    const char * pb = (const char *) b->data + cell_b*b->nb[1];
    if (memcmp(pa, pb, ggml_row_size(a->type, a->ne[0])) == 0) {
        return 0.0;
    }
    if (a->type != GGML_TYPE_F16) {
        return INFINITY;
    }
    double diff = 0.0, most = 0.0;
    for (int64_t i = 0; i < a->ne[0]; ++i) {
        const double x = ggml_fp16_to_fp32(((const ggml_fp16_t *) pa)[i]);
        const double y = ggml_fp16_to_fp32(((const ggml_fp16_t *) pb)[i]);
        diff = std::max(diff, std::abs(x - y));
        most = std::max(most, std::abs(x));
        if (std::isnan(y)) {
            return INFINITY;
        }
    }
    return diff/most;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL [--exact]\n", argv[0]);
        return 2;
    }
    const bool exact = argc > 2 && strcmp(argv[2], "--exact") == 0;

    log_warnings_only();

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    const int n_layer = llama_model_n_layer(model);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    struct test_case {
        int                  n_seq;
        int                  most; // pending rows of a sequence
        std::vector<int32_t> ramps;
        bool                 unified;
    };
    const std::vector<test_case> cases = {
        { 1, 8, { n_layer/2 }, true },
        { 8, 6, { n_layer/2 }, true },
        { 8, 6, { n_layer/2 }, false },
        { 6, 4, { n_layer/4, n_layer/2, 3*n_layer/4 }, false },
    };
    int64_t n_compared_all = 0;

    for (const auto & tc : cases) {
        std::mt19937 rng(tc.n_seq);

        const int n_prompt = 5, n_gen = 40, n_tokens = n_prompt + n_gen;
        const ggml_type type_kv = exact ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;

        std::vector<std::vector<llama_token>> tokens(tc.n_seq);
        std::vector<row> prompts;
        for (int s = 0; s < tc.n_seq; ++s) {
            for (int i = 0; i < n_tokens; ++i) {
                tokens[s].push_back(rng() % n_vocab);
            }
            for (int i = 0; i < n_prompt; ++i) {
                prompts.push_back({ tokens[s][i], i, s });
            }
        }

        llama_context * full = make_context(model, 256*tc.n_seq, tc.n_seq, type_kv, LLAMA_FLASH_ATTN_TYPE_ENABLED, tc.unified);
        llama_context * solo = make_context(model, 256*tc.n_seq, tc.n_seq, type_kv, LLAMA_FLASH_ATTN_TYPE_ENABLED, tc.unified);
        llama_context * part = make_context(model, 256*tc.n_seq, tc.n_seq, type_kv, LLAMA_FLASH_ATTN_TYPE_ENABLED, tc.unified);
        const char * why = llama_layer_range_init(full, { 1, 1, 64, 0 });
        why = why ? why : llama_layer_range_init(solo, { 1, 1, 64, 0 });
        why = why ? why : llama_layer_range_init(part, { uint32_t(tc.n_seq*(1 + tc.most)), 32, 64, 0 });
        if (why) {
            fprintf(stderr, "llama_layer_range_init: %s\n", why);
            return 1;
        }

        // full passes
        llama_batch_ext * batch = llama_batch_ext_init(full);
        fill(batch, prompts);
        bool ok = llama_process(full, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
        for (int g = n_prompt; ok && g < n_tokens; ++g) {
            std::vector<row> rows;
            for (int s = 0; s < tc.n_seq; ++s) {
                rows.push_back({ tokens[s][g], g, s });
            }
            fill(batch, rows);
            ok = llama_process(full, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
        }
        llama_batch_ext_free(batch);

        // and each sequence alone
        batch = llama_batch_ext_init(solo);
        fill(batch, prompts);
        ok = ok && llama_process(solo, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
        for (int g = n_prompt; ok && g < n_tokens; ++g) {
            for (int s = 0; ok && s < tc.n_seq; ++s) {
                fill(batch, { { tokens[s][g], g, s } });
                ok = llama_process(solo, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
            }
        }
        llama_batch_ext_free(batch);

        // the same with pending rows
        batch = llama_batch_ext_init(part);
        fill(batch, prompts);
        ok = ok && llama_process(part, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;

        std::vector<int32_t> bounds = tc.ramps;
        bounds.insert(bounds.begin(), 0);
        bounds.push_back(n_layer);
        const int last = bounds.size() - 2;

        std::vector<std::vector<pending>>  wait(tc.n_seq); // the oldest first
        std::vector<std::vector<uint32_t>> cell(tc.n_seq, std::vector<uint32_t>(n_tokens));
        std::vector<int> next(tc.n_seq, n_prompt), stage(tc.n_seq, 0);
        std::vector<int32_t> own(tc.n_seq, -1), free_slots;
        for (int i = 0; i < tc.n_seq*(1 + tc.most); ++i) {
            free_slots.push_back(i);
        }
        std::shuffle(free_slots.begin(), free_slots.end(), rng);

        int64_t n_left = 0, n_windows = 0, n_rows_max = 0;

        for (int n_open = tc.n_seq; ok && n_open > 0; ) {
            const int st = rng() % (last + 1);

            std::vector<row>     rows;
            std::vector<int32_t> slots;
            std::vector<int>     seqs;
            for (int s = 0; s < tc.n_seq; ++s) {
                const bool settling = next[s] == n_tokens && !wait[s].empty() && wait[s].back().at == st;
                if ((next[s] == n_tokens ? !settling : stage[s] != st) || rng() % 3 == 0) {
                    continue;
                }
                seqs.push_back(s);
                for (const auto & p : wait[s]) {
                    if (p.at == st && st > 0) {
                        rows .push_back({ tokens[s][p.pos], p.pos, s });
                        slots.push_back(p.slot);
                    }
                }
                if (!settling) {
                    if (st == 0) {
                        own[s] = free_slots.back();
                        free_slots.pop_back();
                    }
                    rows .push_back({ tokens[s][next[s]], next[s], s });
                    slots.push_back(own[s]);
                }
            }
            if (rows.empty()) {
                continue;
            }
            fill(batch, rows);
            ok = llama_layer_range_decode(part, batch, bounds[st], bounds[st + 1], slots.data()) == 0;
            n_windows++;
            n_rows_max = std::max<int64_t>(n_rows_max, rows.size());

            if (st == 0) {
                for (size_t i = 0; i < rows.size(); ++i) {
                    cell[rows[i].seq][rows[i].pos] = llama_layer_range_cells(part)[i];
                }
            }
            for (int s : seqs) {
                auto & w = wait[s];
                for (auto & p : w) {
                    p.at += p.at == st && st > 0;
                }
                while (!w.empty() && w.front().at > last) {
                    free_slots.push_back(w.front().slot);
                    w.erase(w.begin());
                }
                if (next[s] == n_tokens) {
                    n_open -= w.empty();
                    continue;
                }
                // on, or out at this ramp; a newer row never waits deeper than an older one, as older ones came along
                const bool out = st == last || ((int) w.size() < tc.most && rng() % 4 != 0);
                stage[s] = out ? 0 : st + 1;
                if (out) {
                    if (st < last) {
                        w.push_back({ next[s], own[s], st + 1 });
                        n_left++;
                    } else {
                        free_slots.push_back(own[s]);
                    }
                    next[s]++;
                    n_open -= next[s] == n_tokens && w.empty();
                }
            }
        }

        // an empty cache gives out its cells in order
        auto cell_of = [&](const llama_layer_range_kv & kv, int s, int i) -> size_t {
            return tc.unified ? (i < n_prompt ? s*n_prompt + i : tc.n_seq*n_prompt + (i - n_prompt)*tc.n_seq + s)
                              : s*(kv.n_cells/kv.n_stream) + i;
        };

        double diff = 0.0, usual = 0.0;
        int64_t n_compared = 0;
        for (int il = 0; ok && il < n_layer; ++il) {
            llama_layer_range_kv a, b, c;
            ok = llama_layer_range_get_kv(full, il, &a) && llama_layer_range_get_kv(part, il, &b) && llama_layer_range_get_kv(solo, il, &c) &&
                !a.v_trans && !b.v_trans;
            for (int s = 0; ok && s < tc.n_seq; ++s) {
                for (int i = n_prompt; i < n_tokens; ++i) {
                    const size_t expected = cell_of(a, s, i);
                    diff = std::max(diff, difference(a.k, expected, b.k, cell[s][i]));
                    diff = std::max(diff, difference(a.v, expected, b.v, cell[s][i]));
                    usual = std::max(usual, difference(a.k, expected, c.k, expected));
                    usual = std::max(usual, difference(a.v, expected, c.v, expected));
                    n_compared++;
                }
            }
        }
        ok = ok && n_left > tc.n_seq*n_gen/3 && (exact ? diff == 0.0 : diff <= std::max(tolerance, factor*usual));

        printf("%s: %d sequences, %s cache, %zu ramps, kv %s: %lld rows left early, %lld windows of up to %lld rows, K/V of %lld cells, "
                "largest difference %g (full passes alone: %g)\n", ok ? "ok" : "FAILED", tc.n_seq, tc.unified ? "unified" : "streams", tc.ramps.size(), ggml_type_name(type_kv),
                (long long) n_left, (long long) n_windows, (long long) n_rows_max, (long long) n_compared, diff, usual);
        n_compared_all += n_compared;

        llama_batch_ext_free(batch);

        // projection: one token of each sequence
        llama_context * proj = make_context(model, 256*tc.n_seq, tc.n_seq, type_kv, LLAMA_FLASH_ATTN_TYPE_ENABLED, tc.unified);
        why = llama_layer_range_init(proj, { uint32_t(tc.n_seq), 4, 64, 0 });
        batch = llama_batch_ext_init(proj);
        fill(batch, prompts);
        ok = ok && !why && llama_process(proj, LLAMA_PROCESS_TYPE_DECODE, batch) == 0;
        std::vector<row>     rows;
        std::vector<int32_t> slots;
        for (int s = 0; s < tc.n_seq; ++s) {
            rows.push_back({ tokens[s][n_prompt], n_prompt, s });
            slots.push_back(tc.n_seq - 1 - s);
        }
        const int32_t at = tc.ramps[0];
        fill(batch, rows);
        ok = ok && llama_layer_range_decode (proj, batch, 0, at, slots.data()) == 0;
        ok = ok && llama_layer_range_project(proj, batch, at,    slots.data()) == 0;
        ok = ok && llama_layer_range_project(proj, batch, at,    slots.data()) == -1; // they have left
        double diff_project = 0.0;
        for (int il = at; ok && il < n_layer; ++il) {
            llama_layer_range_kv a, b;
            ok = llama_layer_range_get_kv(full, il, &a) && llama_layer_range_get_kv(proj, il, &b);
            for (int s = 0; ok && s < tc.n_seq; ++s) {
                const size_t c = cell_of(a, s, n_prompt); // in both
                if (il == at) {
                    diff_project = std::max(diff_project, difference(a.k, c, b.k, c));
                    diff_project = std::max(diff_project, difference(a.v, c, b.v, c));
                    continue;
                }
                for (const auto * t : { b.k, b.v }) {
                    const char * p = (const char *) t->data + c*t->nb[1];
                    ok = ok && std::any_of(p, p + ggml_row_size(t->type, t->ne[0]), [](char x) { return x != 0; });
                }
            }
        }
        ok = ok && (exact ? diff_project == 0.0 : diff_project <= std::max(tolerance, factor*usual));
        printf("%s: projected from layer %d: largest difference there %g\n", ok ? "ok" : "FAILED", at, diff_project);
        llama_batch_ext_free(batch);
        llama_free(proj);
        llama_free(full);
        llama_free(solo);
        llama_free(part);
        if (!ok) {
            return 1;
        }
    }

    llama_model_free(model);
    printf("compared K/V of %lld cells\n", (long long) n_compared_all);
    return 0;
}
