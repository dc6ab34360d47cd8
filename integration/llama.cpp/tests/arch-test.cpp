// Layer ranges of one model against its full passes, on the patched libllama. Every architecture can be tried.
//
//   arch-test MODEL FIRST RAMP...
//
// RAMP is a number of layers to cut behind; FIRST is the same model without the layers behind the first RAMP. Exits 3 and
// prints why if the model cannot be cut.
//
// Rows leave at ramps at random and wait, are regrouped, and run on together with chunks of prompts. In the exact build, with
// a quantised cache, every logit must be that of a full pass bit by bit, and every logit of the first ramp that of a full
// pass of FIRST:
//   postfill   rows that wait run on with the next row of their sequence
//   verify     the same, and the tokens that follow them may be wrong, which is found out at the last layer
//   propagate  rows that leave get projected K and V: regrouped against alone, as no full pass does that
// Sequences are longer than the cells of a sliding window, so that cells are used again. In a unified cache the sequences' cells
// lie among one another, so the full passes run the same batches. With a sliding window, rows that wait keep cells that the
// full passes have used again, and attention adds up in another order: there an F32 cache and a tolerance are used.

#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

enum fill_mode { POSTFILL, VERIFY, PROPAGATE };

static const char * const fill_names[] = { "postfill", "verify", "propagate" };

static const int n_seq     = 3;
static const int n_prompt  = 225;
static const int n_gen     = 60;
static const int n_tokens  = n_prompt + n_gen;
static const int max_chunk = 40;
static const int max_wait  = 6;

// of logits whose standard deviation is 4; a cell that is missing makes a difference of 1 and more
static const float tolerance = 0.1f;

using logits_of = std::map<std::pair<int, int>, std::vector<float>>; // by sequence and position

struct outcome {
    logits_of final;    // of rows that have passed the last layer
    logits_of ramp;     // of rows at the first ramp
    int64_t   n_left      = 0;
    int64_t   n_rollbacks = 0;
    std::vector<std::vector<row>> first; // batches of ranges that begin at layer 0
    bool ok = true;
};

// a token that left at ramp `at` - 1 and waits for range `at`
struct waiting {
    int     pos;
    int32_t slot;
    int     at;
};

struct sequence {
    int  n_done     = 0; // of the prompt
    int  chunk      = 0; // rows of the prompt on their way
    int  chunk_at   = 0;
    int  next       = n_prompt;
    int  at         = 0; // the range that the row of `next` enters next
    int32_t slot    = -1;
    std::vector<waiting>     wait; // the oldest first
    std::vector<llama_token> used;

    bool finished() const { return next == n_tokens && wait.empty(); }
};

class ranges_run {
public:
    ranges_run(llama_context * ctx, const std::vector<std::vector<llama_token>> & tokens, std::vector<int32_t> bounds, fill_mode fill, bool alone) :
        ctx(ctx), tokens(tokens), bounds(std::move(bounds)), fill_as(fill), alone(alone), last(this->bounds.size() - 2),
        n_vocab(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)))), rng(7) {
        for (const auto & t : tokens) {
            seqs.emplace_back();
            seqs.back().used = t;
        }
        for (int i = 0; i < n_seq*(1 + max_wait); ++i) {
            free_slots.push_back(i);
        }
        std::shuffle(free_slots.begin(), free_slots.end(), rng);
    }

    static uint32_t n_arena() { return n_seq*(1 + max_wait + max_chunk); }

    outcome run() {
        batch = llama_batch_ext_init(ctx);
        for (;;) {
            const auto open = std::count_if(seqs.begin(), seqs.end(), [](const auto & s) { return !s.finished(); });
            if (!res.ok || open == 0) {
                break;
            }
            step();
        }
        llama_batch_ext_free(batch);
        return std::move(res);
    }

private:
    // what a row does depends on the row alone, so that it does the same in any company
    uint32_t dice(int s, int pos, int salt, int sides) const {
        return std::mt19937(s*100003 + pos*97 + salt)() % sides;
    }

    void step() {
        const int st = rng() % (last + 1);

        struct origin {
            int  s;
            int  pos;
            bool prompt;
        };
        std::vector<row>     rows;
        std::vector<int32_t> slots;
        std::vector<origin>  from;
        std::vector<bool>    moved(seqs.size(), false), prompted(seqs.size(), false);

        auto add = [&](int s, int pos, int32_t slot, bool prompt) {
            rows .push_back({ seqs[s].used[pos], pos, s, !prompt });
            slots.push_back(slot);
            from .push_back({ s, pos, prompt });
        };

        std::vector<int> order;
        for (int s = 0; s < (int) seqs.size(); ++s) {
            order.push_back(s);
        }
        std::shuffle(order.begin(), order.end(), rng);

        for (const int s : order) {
            auto & q = seqs[s];
            if (alone && (!rows.empty() || (s > 0 && !seqs[s - 1].finished()))) {
                continue;
            }
            if (!alone && rng() % 3 == 0) {
                continue;
            }
            if (q.n_done < n_prompt) {
                if (q.chunk == 0 && st == 0) {
                    q.chunk = std::min<int>(1 + dice(s, q.n_done, 1, max_chunk), n_prompt - q.n_done);
                    q.chunk_at = 0;
                }
                if (q.chunk > 0 && q.chunk_at == st && (int) rows.size() + q.chunk <= 60) {
                    for (int i = 0; i < q.chunk; ++i) {
                        add(s, q.n_done + i, n_seq*(1 + max_wait) + s*max_chunk + i, true);
                    }
                    prompted[s] = true;
                }
                continue;
            }
            const bool settles = q.next == n_tokens && !q.wait.empty() && q.wait.back().at == st;
            if (q.next == n_tokens ? !settles : q.at != st) {
                continue;
            }
            if (st > 0) {
                for (const auto & w : q.wait) {
                    if (w.at == st) {
                        add(s, w.pos, w.slot, false);
                    }
                }
            }
            if (!settles) {
                if (st == 0) {
                    q.slot = free_slots.back();
                    free_slots.pop_back();
                }
                add(s, q.next, q.slot, false);
            }
            moved[s] = true;
        }
        if (rows.empty()) {
            return;
        }
        if (st == 0) {
            res.first.push_back(rows);
        }

        fill(batch, rows);
        res.ok = llama_layer_range_decode(ctx, batch, bounds[st], bounds[st + 1], slots.data()) == 0;

        for (size_t i = 0; res.ok && i < rows.size(); ++i) {
            const auto & o = from[i];
            if (o.prompt || !is_right(o.s, o.pos) || (st != last && st != 0)) {
                continue;
            }
            res.ok = llama_layer_range_fetch_logits(ctx, i, 1);
            const float * logits = llama_get_logits_ith(ctx, i);
            (st == last ? res.final : res.ramp)[{ o.s, o.pos }] = std::vector<float>(logits, logits + n_vocab);
        }

        std::vector<row>     leave;
        std::vector<int32_t> leave_slots;

        for (int s = 0; res.ok && s < (int) seqs.size(); ++s) {
            auto & q = seqs[s];
            if (prompted[s] && ++q.chunk_at > last) {
                q.n_done += q.chunk;
                q.chunk   = 0;
            }
            if (moved[s]) {
                move_on(s, st, leave, leave_slots);
            }
        }
        if (!leave.empty() && res.ok) {
            fill(batch, leave);
            res.ok = llama_layer_range_project(ctx, batch, bounds[st + 1], leave_slots.data()) == 0;
        }
    }

    bool is_right(int s, int pos) const {
        return std::equal(seqs[s].used.begin(), seqs[s].used.begin() + pos + 1, tokens[s].begin());
    }

    void move_on(int s, int st, std::vector<row> & leave, std::vector<int32_t> & leave_slots) {
        auto & q = seqs[s];

        // rows that waited
        int first_done = -1;
        for (auto & w : q.wait) {
            if (w.at == st && st > 0) {
                first_done = st == last && first_done < 0 ? w.pos : first_done;
                w.at++;
            }
        }
        while (!q.wait.empty() && q.wait.front().at > last) {
            free_slots.push_back(q.wait.front().slot);
            q.wait.erase(q.wait.begin());
        }

        // the row of the newest token: on, or out at this ramp
        if (q.next < n_tokens && q.at == st) {
            const bool out = st == last || ((int) q.wait.size() < max_wait && dice(s, q.next, 2 + st, 4) >= (fill_as == PROPAGATE ? 2 : 1));
            q.at = out ? 0 : st + 1;
            if (out) {
                if (st == last || fill_as == PROPAGATE) {
                    free_slots.push_back(q.slot);
                } else {
                    q.wait.push_back({ q.next, q.slot, st + 1 });
                }
                if (st < last) {
                    res.n_left++;
                    if (fill_as == PROPAGATE) {
                        leave.push_back({ q.used[q.next], q.next, s, false });
                        leave_slots.push_back(q.slot);
                    }
                } else if (first_done < 0) {
                    first_done = q.next;
                }
                q.slot = -1;
                q.next++;
                if (st < last && fill_as == VERIFY && q.next < n_tokens && dice(s, q.next, 100 + res.n_rollbacks, 3) == 0) {
                    q.used[q.next] = (tokens[s][q.next] + 1) % n_vocab; // a wrong draft
                }
            }
        }

        // what passed the last layer tells whether the token that follows was right
        for (int pos = first_done; pos >= 0 && pos + 1 < n_tokens && pos < q.next; ++pos) {
            const bool passed = std::none_of(q.wait.begin(), q.wait.end(), [&](const auto & w) { return w.pos == pos; }) &&
                !(pos == q.next);
            if (!passed) {
                break;
            }
            if (q.used[pos + 1] == tokens[s][pos + 1]) {
                continue;
            }
            // its row, and what came after it, are void
            for (const auto & w : q.wait) {
                if (w.pos > pos) {
                    free_slots.push_back(w.slot);
                }
            }
            q.wait.erase(std::remove_if(q.wait.begin(), q.wait.end(), [&](const auto & w) { return w.pos > pos; }), q.wait.end());
            if (q.slot >= 0) {
                free_slots.push_back(q.slot);
                q.slot = -1;
            }
            std::copy(tokens[s].begin() + pos + 1, tokens[s].end(), q.used.begin() + pos + 1);
            q.next = pos + 1;
            q.at   = 0;
            llama_layer_range_rollback(ctx, s, pos + 1);
            res.n_rollbacks++;
            break;
        }
    }

    llama_context   * ctx;
    llama_batch_ext * batch = nullptr;

    const std::vector<std::vector<llama_token>> & tokens;
    const std::vector<int32_t> bounds;

    const fill_mode fill_as;
    const bool      alone;
    const int       last;
    const int       n_vocab;

    std::mt19937 rng;

    std::vector<sequence> seqs;
    std::vector<int32_t>  free_slots;

    outcome res;
};

static bool in_other_order(const llama_model * model, bool unified) {
    return unified && llama_model_n_swa(model) > 0;
}

static llama_context * new_context(llama_model * model, bool unified) {
    return make_context(model, 512*n_seq, n_seq, in_other_order(model, unified) ? GGML_TYPE_F32 : GGML_TYPE_Q8_0, LLAMA_FLASH_ATTN_TYPE_ENABLED, unified, 64);
}

static bool full_pass(llama_context * ctx, llama_batch_ext * batch, const std::vector<row> & rows, logits_of & out) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));

    fill(batch, rows);
    if (llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch) != 0) {
        return false;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].output) {
            const float * logits = llama_get_logits_ith(ctx, i);
            out[{ rows[i].seq, rows[i].pos }] = std::vector<float>(logits, logits + n_vocab);
        }
    }
    return true;
}

// each sequence alone, token by token
static bool full_passes(llama_model * model, const std::vector<std::vector<llama_token>> & tokens, logits_of & out) {
    llama_context   * ctx   = new_context(model, false);
    llama_batch_ext * batch = llama_batch_ext_init(ctx);

    bool ok = true;
    for (int s = 0; s < n_seq; ++s) {
        for (int i = 0; ok && i < n_tokens;) {
            std::vector<row> rows;
            do {
                rows.push_back({ tokens[s][i], i, s, i >= n_prompt });
            } while (++i < n_prompt && i % 50 != 0);
            ok = full_pass(ctx, batch, rows, out);
        }
    }
    llama_batch_ext_free(batch);
    llama_free(ctx);

    return ok;
}

// the same batches, uncut
static bool replay(llama_model * model, const std::vector<std::vector<row>> & batches, logits_of & out) {
    llama_context   * ctx   = new_context(model, true);
    llama_batch_ext * batch = llama_batch_ext_init(ctx);

    bool ok = true;
    for (const auto & rows : batches) {
        ok = ok && full_pass(ctx, batch, rows, out);
    }
    llama_batch_ext_free(batch);
    llama_free(ctx);

    return ok;
}

// rows of `got` that are not those of `expected`, bit by bit or within a tolerance
static int64_t n_different(const logits_of & got, const logits_of & expected, float tolerance = 0.0f) {
    int64_t n = 0;
    for (const auto & [where, logits] : got) {
        const auto it = expected.find(where);
        if (it == expected.end()) {
            n++;
        } else if (tolerance == 0.0f) {
            n += memcmp(it->second.data(), logits.data(), logits.size()*sizeof(float)) != 0;
        } else {
            n += !std::equal(logits.begin(), logits.end(), it->second.begin(), [&](float a, float b) { return std::abs(a - b) <= tolerance; });
        }
    }
    return n;
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL FIRST RAMP...\n", argv[0]);
        return 2;
    }
    log_warnings_only();

    // tiles for eight rows and more, with weights in K-quants, add up in another order
    setenv("GGML_CPU_TILED_MM", "0", 1);

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_model * first = llama_model_load_from_file(argv[2], llama_model_default_params());
    if (!model || !first) {
        return 1;
    }

    std::vector<int32_t> bounds = { 0 };
    for (int i = 3; i < argc; ++i) {
        bounds.push_back(atoi(argv[i]));
    }
    bounds.push_back(llama_model_n_layer(model));

    std::mt19937 rng(1);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<std::vector<llama_token>> tokens(n_seq, std::vector<llama_token>(n_tokens));
    for (auto & sequence : tokens) {
        for (auto & t : sequence) {
            t = rng() % n_vocab;
        }
    }

    logits_of expected, expected_ramp;
    if (!full_passes(model, tokens, expected) || !full_passes(first, tokens, expected_ramp)) {
        return 1;
    }

    auto run = [&](bool unified, fill_mode fill_as, bool alone) {
        llama_context * ctx = new_context(model, unified);
        if (const char * why = llama_layer_range_init(ctx, { ranges_run::n_arena(), 32, 64, 0, bounds[1] })) {
            printf("refused: %s\n", why);
            exit(3);
        }
        outcome res = ranges_run(ctx, tokens, bounds, fill_as, alone).run();
        llama_free(ctx);
        return res;
    };

    bool    ok    = true;
    int64_t n_all = 0;

    auto report = [&](bool unified, fill_mode fill_as, const outcome & got, int64_t n_bad) {
        const bool good = got.ok && n_bad == 0 && got.n_left > n_seq*n_gen/3 && !got.final.empty() && !got.ramp.empty() &&
            (fill_as != VERIFY || got.n_rollbacks > n_seq);
        printf("%s: %s, %s: %zu rows at the end and %zu at a ramp, %lld left early, %lld taken back, %lld differ\n", good ? "ok" : "FAILED",
                unified ? "unified" : "streams", fill_names[fill_as], got.final.size(), got.ramp.size(), (long long) got.n_left,
                (long long) got.n_rollbacks, (long long) n_bad);
        ok     = ok && good;
        n_all += got.final.size() + got.ramp.size();
    };

    for (const fill_mode fill_as : { POSTFILL, VERIFY }) {
        const outcome got = run(false, fill_as, false);
        report(false, fill_as, got, n_different(got.final, expected) + n_different(got.ramp, expected_ramp));
    }
    {
        const outcome got = run(false, PROPAGATE, false);
        const outcome one = run(false, PROPAGATE, true);
        report(false, PROPAGATE, got, n_different(got.final, one.final) + n_different(got.ramp, one.ramp) + !one.ok);
    }
    {
        const outcome got = run(true, POSTFILL, false);
        logits_of uncut, uncut_ramp;
        ok = ok && replay(model, got.first, uncut) && replay(first, got.first, uncut_ramp);
        const float allowed = in_other_order(model, true) ? tolerance : 0.0f;
        report(true, POSTFILL, got, n_different(got.final, uncut, allowed) + n_different(got.ramp, uncut_ramp, allowed));
    }

    llama_context * ctx = new_context(model, false);
    llama_layer_range_init(ctx, { 1, 1, 1, 0, 0 });
    const char * unlike = llama_layer_range_kv_unlike(ctx);
    printf("copy: %s\n", unlike ? unlike : "possible");
    llama_free(ctx);

    printf("compared %lld rows\n", (long long) n_all);

    llama_model_free(first);
    llama_model_free(model);

    return ok ? 0 : 1;
}
