// SPDX-License-Identifier: Apache-2.0
//
// Early exit with dynamic rebatching on one model: what the two windows cost, and what the loop brings.
//
//   serve --model FILE --json OUT [--ngl N] [--batch 8,16] [--exit-layers 8,16] [--p 0.2,0.5] [--prompt N] [--tokens N]
//         [--reps N] [--threads N] [--seconds S]
//   serve --grid 8/4,4/4,1/1 [--rounds N] ...
//
// With --grid: for each REQUESTS/BATCH policies `hold` and `auto` at each share p, in rounds in which everything without early
// exit runs too; ratios are those of one round. The first exit layer counts (0: a quarter of the layers).
//
// Layers, ramps and scoring really run. Only the outcome of a ramp comes from a mask, drawn by (request, token, seed): each
// token is a request of its own to drex, with threshold 0 (any confidence will do) or 1 (none of random weights will; above 1
// drex would not even look), so that drex itself
// decides, holds, flushes and counts. Tokens are random numbers: with random weights their values mean nothing.
//
// The run with early exit and the run without are the same loop over the same requests in the same memory; without, the
// policy is `off` and windows are [0, n_layer). In neither do logits visit the host, so sampling is left out of both, while
// the ramp's scoring counts against early exit. Beside it, the same rows run through stock passes, in the same cache, with a
// stream for each sequence, and in a unified one (their logits do go to the host, as they always do there): what is fastest is
// `off`.
//
// Writes JSON after each cell: what was measured stays when the time is up.

#include "serve.h"

#include <cstring>
#include <ctime>
#include <functional>

using namespace serve;

struct options {
    std::string model, json;
    std::string grid;
    int ngl = -1, n_prompt = 32, n_tokens = 40, n_reps = 16, n_threads = 2, n_rounds = 3;
    double seconds = 1e9;
    std::vector<int>    batches     = { 8, 16, 32, 64 };
    std::vector<int>    exit_layers = { 8, 16 };
    std::vector<double> shares      = { 0.2, 0.5, 0.8 };
};

// the share of tokens that leave is p, whatever the order in which they run
static bool leaves(int request, int token, double p) {
    uint64_t x = uint64_t(request)*0x9e3779b97f4a7c15ull + uint64_t(token)*0xbf58476d1ce4e5b9ull + 0x5eed;
    x ^= x >> 31; x *= 0x94d049bb133111ebull; x ^= x >> 29; x *= 0xbf58476d1ce4e5b9ull; x ^= x >> 32;
    return double(x >> 11)*0x1p-53 < p;
}

// tokens per second of the stock engine, with all rows of a pass in one batch
static double stock(session & s, int n_batch, int n_tokens) {
    const int n_warm = 2;
    int64_t t_begin = 0;
    for (int i = 0; i < n_tokens; ++i) {
        if (i == n_warm) {
            t_begin = now_ns();
        }
        for (int r0 = 0; r0 < s.n_requests; r0 += n_batch) {
            s.begin();
            for (int r = r0; r < r0 + n_batch; ++r) {
                s.add(r, s.n_prompt + i, r);
            }
            s.process();
            s.wait();
        }
    }
    const double seconds = (now_ns() - t_begin)/1e9;
    s.forget_tokens();

    return double(n_tokens - n_warm)*s.n_requests/seconds;
}

struct result {
    // tokens a second from the first plan on, and from a time after it on; NaN where the run was over by then
    double   cold = NAN, late = NAN;
    double   seconds = 0.0;
    uint64_t tokens = 0, exits = 0, involuntary = 0, windows = 0, expected_exits = 0, rows = 0;
    bool     counts_agree = false;
};

// runs until a request has all its tokens; counts what comes after each had two, or, where the policy learns, a third of them
static result run(session & s, int n_batch, int n_req, drex_policy policy, int exit_layer, double p, int n_tokens, double late_ms = 0.0) {
    const bool off    = policy == DREX_POLICY_OFF;
    const bool learns = policy == DREX_POLICY_AUTO;
    const uint64_t n_before = learns ? n_tokens/3 : 2;

    engine e(s, n_batch, policy, off ? s.n_layer/2 : exit_layer);

    std::vector<int> done(n_req, 0);
    auto start = [&](int r) {
        drex_request_config c = DREX_REQUEST_CONFIG_INITIALIZER;
        c.id        = uint64_t(done[r])*n_req + r;
        c.threshold = !off && leaves(r, done[r], p) ? 0.0f : 1.0f;
        check(drex_request_add(e.ptr, &c));
        check(drex_request_ready(e.ptr, c.id, s.n_prompt + done[r] + 1, now_ns()));
    };
    for (int r = 0; r < n_req; ++r) {
        start(r);
    }

    result res;
    uint64_t emitted = 0, expected = 0, n_late = 0;
    int64_t  t_begin = 0, t_late = 0;
    bool     full = false;

    std::vector<drex_row>     rows(n_batch);
    std::vector<drex_verdict> verdicts(n_batch);

    const int64_t t_first = now_ns();
    while (!full) {
        drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
        drex_step       step  = DREX_STEP_INITIALIZER;
        input.now_ns = now_ns();
        check(drex_plan(e.ptr, &input, rows.data(), n_batch, &step));
        if (step.n_rows == 0) {
            throw std::runtime_error("there is nothing to run, though requests are under way");
        }

        const int64_t t_window = now_ns();
        s.begin();
        for (uint32_t i = 0; i < step.n_rows; ++i) {
            const int r = rows[i].request % n_req;
            s.add(r, s.n_prompt + done[r], rows[i].slot);
        }
        s.window(step.layer_begin, step.layer_end);

        if (step.ramp != DREX_NO_RAMP) {
            e.ramp(step.n_rows, verdicts);
        } else {
            s.wait();
        }
        drex_completion completion = DREX_COMPLETION_INITIALIZER;
        completion.now_ns      = now_ns();
        completion.duration_ns = completion.now_ns - t_window;
        check(drex_complete(e.ptr, &completion));

        uint64_t n_new = 0;
        for (uint32_t i = 0; i < step.n_rows; ++i) {
            if (step.ramp != DREX_NO_RAMP && verdicts[i].decision != DREX_DECISION_EXIT) {
                continue;
            }
            const int r = rows[i].request % n_req;
            expected += !off && leaves(r, done[r], p);
            check(drex_request_remove(e.ptr, rows[i].request));
            n_new++;
            if (++done[r] == n_tokens) {
                full = true;
            } else {
                start(r);
            }
        }
        emitted += n_new;
        if (t_late != 0) {
            n_late += n_new;
        } else if (completion.now_ns - t_first >= late_ms*1e6) {
            t_late = completion.now_ns;
        }

        if (t_begin == 0 && emitted >= n_before*uint64_t(n_req)) {
            t_begin = now_ns();
        } else if (t_begin != 0) {
            res.tokens += n_new;
            res.windows++;
            res.rows += step.n_rows;
        }
    }
    s.wait();
    const int64_t t_end = now_ns();
    res.seconds = (t_end - t_begin)/1e9;
    res.cold    = emitted/((t_end - t_first)/1e9);
    if (n_late != 0) {
        res.late = n_late/((t_end - t_late)/1e9);
    }

    drex_stats stats = DREX_STATS_INITIALIZER;
    check(drex_stats_get(e.ptr, &stats));
    res.exits          = stats.exits[0];
    res.expected_exits = expected;
    res.involuntary    = stats.involuntary_exits;
    // `auto` may let a window pass a ramp, and then nobody leaves there
    const bool exits_agree = learns ? stats.exits[0] <= expected : stats.exits[0] == expected;
    res.counts_agree   = exits_agree && stats.tokens == emitted && stats.involuntary_exits == 0 && stats.nonfinite_rows == 0;

    s.forget_tokens();

    return res;
}

// of a pass or a window, in ms: until its end was waited for, until the call came back, and by the device's clock
struct span { double whole, submit, device; };
struct samples {
    std::vector<double> whole, submit, device;
    span middle() const { return { median(whole), median(submit), median(device) }; }
};
struct times { span full, shallow, shallow_scored, deep; double head; };

// one pass of n_batch rows: all layers; the first window, without and with scoring; the second one; the head alone
static times measure(session & s, int n_batch, int exit_layer, int n_reps) {
    engine e(s, n_batch, DREX_POLICY_HOLD, exit_layer);

    std::vector<drex_verdict> verdicts(n_batch);
    samples full, shallow, scored, deep;
    device_clock clock(s.stream);
    const int n_warm = 4;
    for (int rep = 0; rep < n_warm + n_reps; ++rep) {
        const int pos = s.n_prompt + rep%4; // few cells
        if (rep%4 == 0) {
            s.forget_tokens();
        }
        auto one = [&](samples & to, int r0, int begin, int end, bool score) {
            s.begin();
            for (int i = 0; i < n_batch; ++i) {
                s.add(r0 + i, pos, r0 + i);
            }
            if (score) {
                e.plan_held(n_batch);
            }
            clock.begin();
            const int64_t t = now_ns();
            s.window(begin, end);
            const int64_t t_submit = now_ns();
            if (score) {
                e.ramp(n_batch, verdicts);
            }
            clock.end();
            s.wait();
            if (rep >= n_warm) {
                to.whole.push_back((now_ns() - t)/1e6);
                to.submit.push_back((t_submit - t)/1e6);
                to.device.push_back(clock.ms());
            }
            if (score) {
                e.end_held(n_batch);
            }
        };
        one(full,    0,       0, s.n_layer,  false);
        one(shallow, n_batch, 0, exit_layer, false);
        one(deep,    n_batch, exit_layer, s.n_layer, false);
        s.forget(pos, n_batch, 2*n_batch);
        one(scored,  n_batch, 0, exit_layer, true);
        one(deep,    n_batch, exit_layer, s.n_layer, false);
    }
    s.forget_tokens();

    return { full.middle(), shallow.middle(), scored.middle(), deep.middle(), time_head(s, n_batch, n_reps) };
}

struct load { int n_req, n_batch; };

static std::vector<load> loads(const std::string & text) {
    std::vector<load> res;
    std::stringstream in(text);
    for (std::string part; std::getline(in, part, ','); ) {
        load l = { 0, 0 };
        char rest = 0;
        if (sscanf(part.c_str(), "%d/%d%c", &l.n_req, &l.n_batch, &rest) != 2 || l.n_batch < 1 || l.n_req % l.n_batch != 0 || l.n_req < 1) {
            throw std::runtime_error("--grid " + part + ": REQUESTS/BATCH, where the batches are full");
        }
        res.push_back(l);
    }
    return res;
}

// everything in turn, round by round
static bool run_grid(llama_model * model, const options & o, const std::function<bool()> & late, json_file & out) {
    bool ok = true, first = true;
    for (const load & l : loads(o.grid)) {
        if (late()) {
            break;
        }
        times t;
        int exit_layer = o.exit_layers[0];
        {
            session s(model, 2*l.n_batch, o.n_prompt, o.n_tokens, o.n_threads);
            if (exit_layer == 0) {
                exit_layer = std::max(1, s.n_layer/4);
            }
            if (exit_layer >= s.n_layer) {
                throw std::runtime_error("--exit-layers " + std::to_string(exit_layer) + ": the model has " + std::to_string(s.n_layer) + " layers");
            }
            if (first) {
                out.add("device", s.device()).add("n_layer", s.n_layer).add("n_vocab", s.n_vocab);
                ok = first_checks(s, l.n_batch, exit_layer, out) && ok;
                first = false;
            }
            t = measure(s, l.n_batch, exit_layer, o.n_reps);
        }
        const double t_f = t.full.whole, t_s = t.shallow_scored.whole, t_d = t.deep.whole;
        printf("%d requests in batches of %d: t_f %.2f  t_s %.2f  t_d %.2f ms, c/t_d %.3f\n", l.n_req, l.n_batch, t_f, t_s, t_d, (t_s + t_d - t_f)/t_d);
        fflush(stdout);

        session s(model, l.n_req, o.n_prompt, o.n_tokens, o.n_threads);
        session unified(model, l.n_req, o.n_prompt, o.n_tokens, o.n_threads, layout::unified);

        struct kind { drex_policy policy; double p; };
        std::vector<kind> kinds;
        for (const drex_policy policy : { DREX_POLICY_HOLD, DREX_POLICY_AUTO }) {
            for (const double p : o.shares) {
                kinds.push_back({ policy, p });
            }
        }
        const char * names[] = { "windows", "stock streams", "stock unified" };
        std::vector<double> bases[3];
        std::vector<std::vector<result>> results(kinds.size());

        // builds the graphs
        run(s, l.n_batch, l.n_req, DREX_POLICY_OFF, 0, 0.0, 3);
        run(s, l.n_batch, l.n_req, DREX_POLICY_HOLD, exit_layer, o.shares[0], 3);

        const int n_contenders = 3 + int(kinds.size());
        for (int round = 0; round < o.n_rounds && !(round > 0 && late()); ++round) {
            for (int i = 0; i < n_contenders; ++i) {
                // forth, and back in the next round
                const int who = round % 2 ? n_contenders - 1 - i : i;
                double rate;
                if (who == 0) {
                    const result r = run(s, l.n_batch, l.n_req, DREX_POLICY_OFF, 0, 0.0, o.n_tokens);
                    ok = ok && r.counts_agree;
                    bases[0].push_back(rate = r.tokens/r.seconds);
                } else if (who < 3) {
                    bases[who].push_back(rate = stock(who == 1 ? s : unified, l.n_batch, o.n_tokens));
                } else {
                    const kind & k = kinds[who - 3];
                    results[who - 3].push_back(run(s, l.n_batch, l.n_req, k.policy, exit_layer, k.p, o.n_tokens, 10*t_f));
                    const result & r = results[who - 3].back();
                    ok = ok && r.counts_agree;
                    rate = r.tokens/r.seconds;
                }
                printf("   round %d, %s: %.3f tokens/s\n", round + 1, who < 3 ? names[who] : kinds[who - 3].policy == DREX_POLICY_HOLD ? "hold" : "auto", rate);
                fflush(stdout);
            }
        }

        int base = 0;
        for (int i = 1; i < 3; ++i) {
            base = median(bases[i]) > median(bases[base]) ? i : base;
        }
        for (size_t i = 0; i < kinds.size(); ++i) {
            const kind & k = kinds[i];
            std::vector<double> rates, ratios, cold, late_ratios;
            double exits = 0, expected = 0, involuntary = 0, rows = 0, windows = 0;
            bool agree = true;
            for (size_t round = 0; round < results[i].size(); ++round) {
                const result & r = results[i][round];
                const double off = bases[base][round];
                rates.push_back(r.tokens/r.seconds);
                ratios.push_back(rates.back()/off);
                cold.push_back(r.cold/off);
                if (std::isfinite(r.late)) {
                    late_ratios.push_back(r.late/off);
                }
                exits += double(r.exits); expected += double(r.expected_exits); involuntary += double(r.involuntary);
                rows += double(r.rows); windows += double(r.windows);
                agree = agree && r.counts_agree;
            }
            const double limit = l.n_batch/((t_s + (1.0 - k.p)*t_d)/1e3);
            std::string list = "[";
            for (size_t round = 0; round < ratios.size(); ++round) {
                list += (round ? ", " : "") + value(ratios[round]).text;
            }
            value rounds(0);
            rounds.text = list + "]";
            out.cell({
                { "requests", l.n_req }, { "batch", l.n_batch }, { "policy", k.policy == DREX_POLICY_HOLD ? "hold" : "auto" }, { "p", k.p },
                { "exit_layer", exit_layer }, { "n_kv", s.n_kv },
                { "t_f_ms", t_f }, { "t_s_ms", t.shallow.whole }, { "t_s_scored_ms", t_s }, { "t_d_ms", t_d }, { "t_head_ms", t.head },
                { "c_over_t_d_with_head", (t_s + t_d - t_f)/t_d },
                { "tokens_per_s", median(rates) }, { "stock_tokens_per_s", median(bases[base]) }, { "stock", names[base] },
                { "ratio_to_stock", median(ratios) }, { "ratio_rounds", rounds },
                { "cold_ratio", median(cold) }, { "after_ten_passes_ratio", median(late_ratios) },
                { "limit_tokens_per_s", limit }, { "of_limit", median(rates)/limit }, { "rows_per_window", rows/windows },
                { "exits", exits }, { "exits_of_mask", expected }, { "involuntary_exits", involuntary }, { "counts_agree", agree },
            });
        }
    }
    return ok;
}

static int usage() {
    fprintf(stderr, "usage: serve --model FILE --json OUT [--ngl N] [--batch LIST] [--exit-layers LIST] [--p LIST] [--prompt N]\n"
            "             [--tokens N] [--reps N] [--threads N] [--seconds S] [--grid LIST] [--rounds N]\n");
    return 2;
}

int main(int argc, char ** argv) try {
    options o;
    for (int i = 1; i < argc; i += 2) {
        const std::string a = argv[i];
        if (i + 1 == argc) {
            return usage();
        }
        const char * v = argv[i + 1];
        if      (a == "--model")       o.model       = v;
        else if (a == "--json")        o.json        = v;
        else if (a == "--ngl")         o.ngl         = atoi(v);
        else if (a == "--prompt")      o.n_prompt    = atoi(v);
        else if (a == "--tokens")      o.n_tokens    = atoi(v);
        else if (a == "--reps")        o.n_reps      = atoi(v);
        else if (a == "--threads")     o.n_threads   = atoi(v);
        else if (a == "--seconds")     o.seconds     = atof(v);
        else if (a == "--batch")       o.batches     = list<int>(v);
        else if (a == "--exit-layers") o.exit_layers = list<int>(v);
        else if (a == "--grid")        o.grid        = v;
        else if (a == "--rounds")      o.n_rounds    = atoi(v);
        else if (a == "--p")           o.shares      = list<double>(v);
        else return usage();
    }
    if (o.model.empty() || o.json.empty() || o.n_tokens < 4 || o.n_rounds < 1 || o.shares.empty() || o.exit_layers.empty()) {
        return usage();
    }

    log_init();
    const int64_t t_start = now_ns();
    auto late = [&] { return (now_ns() - t_start)/1e9 > o.seconds; };

    model_ptr model(load_model(o.model, o.ngl));
    json_file out(o.json);
    out.add("model", o.model.substr(o.model.find_last_of('/') + 1)).add("n_prompt", o.n_prompt).add("n_tokens", o.n_tokens).add("seed", "0x5eed");

    if (!o.grid.empty()) {
        const bool ok = run_grid(model.get(), o, late, out);
        out.finish(ok, late());
        printf("%s\n", ok ? "ok" : "FAILED");
        return ok ? 0 : 1;
    }

    bool ok = true;
    bool first = true;
    for (const int n_batch : o.batches) {
        if (late()) {
            break;
        }
        session s(model.get(), 2*n_batch, o.n_prompt, o.n_tokens, o.n_threads);
        if (first) {
            out.add("device", s.device()).add("n_layer", s.n_layer).add("n_vocab", s.n_vocab);
            ok = first_checks(s, std::min(n_batch, 8), o.exit_layers[0], out) && ok;
            first = false;
        }

        // the engine without early exit: our own loop, for 2B and for B requests, and stock passes
        double off_rate[2], stock_rate[2];
        for (const int half : { 0, 1 }) {
            const int n_req = half ? n_batch : 2*n_batch;
            run(s, n_batch, n_req, DREX_POLICY_OFF, 0, 0.0, std::min(o.n_tokens, 8)); // builds what the next one would build
            const result off = run(s, n_batch, n_req, DREX_POLICY_OFF, 0, 0.0, o.n_tokens);
            ok = ok && off.counts_agree;
            off_rate[half] = off.tokens/off.seconds;
        }
        stock_rate[1] = stock(s, n_batch, o.n_tokens);
        {
            session unified(model.get(), 2*n_batch, o.n_prompt, o.n_tokens, o.n_threads, layout::unified);
            stock_rate[0] = stock(unified, n_batch, o.n_tokens);
        }
        const double best_stock = std::max(stock_rate[0], stock_rate[1]);
        printf("B %2d without early exit: windows %.1f tokens/s, %.1f with B requests, stock passes in a unified cache %.1f, in streams %.1f\n",
                n_batch, off_rate[0], off_rate[1], stock_rate[0], stock_rate[1]);

        for (const int exit_layer : o.exit_layers) {
            const times  t = measure(s, n_batch, exit_layer, o.n_reps);
            const double t_d    = t.deep.whole;
            const double c_head = t.shallow_scored.whole + t_d - t.full.whole;
            const double c      = t.shallow.whole        + t_d - t.full.whole - t.head;
            printf("B %2d, exit after %2d of %d: t_f %.3f  t_s %.3f (scored %.3f)  t_d %.3f  head %.3f ms, c/t_d %.3f with head, %.3f without\n",
                    n_batch, exit_layer, s.n_layer, t.full.whole, t.shallow.whole, t.shallow_scored.whole, t_d, t.head, c_head/t_d, c/t_d);
            printf("   until the call is back: %.3f  %.3f  %.3f;  on the device: %.3f  %.3f  %.3f ms\n", t.full.submit, t.shallow.submit,
                    t.deep.submit, t.full.device, t.shallow.device, t.deep.device);

            struct kind { drex_policy policy; int n_req; double p; };
            std::vector<kind> kinds;
            for (const double p : o.shares) {
                kinds.push_back({ DREX_POLICY_HOLD, 2*n_batch, p });
            }
            // what users get, also where all requests fit into a batch
            kinds.push_back({ DREX_POLICY_AUTO, 2*n_batch, o.shares[o.shares.size()/2] });
            kinds.push_back({ DREX_POLICY_AUTO, n_batch,   o.shares.front() });
            kinds.push_back({ DREX_POLICY_AUTO, n_batch,   o.shares.back() });

            for (const kind & k : kinds) {
                if (late()) {
                    break;
                }
                const bool   holds = k.policy == DREX_POLICY_HOLD;
                run(s, n_batch, k.n_req, k.policy, exit_layer, k.p, std::min(o.n_tokens, 8));
                const auto   log0  = graph_log();
                const result r     = run(s, n_batch, k.n_req, k.policy, exit_layer, k.p, o.n_tokens);
                const auto   log1  = graph_log();
                const double rate  = r.tokens/r.seconds;
                const double off   = std::max(off_rate[k.n_req == n_batch], best_stock);
                const double limit = n_batch/((t.shallow_scored.whole + (1.0 - k.p)*t_d)/1e3);
                ok = ok && r.counts_agree;
                printf("   %s, %3d requests, p %.1f: %8.1f tokens/s, off %8.1f, ratio %.3f, of the limit %.3f%s%s\n", holds ? "hold" : "auto", k.n_req, k.p, rate,
                        off, rate/off, rate/limit, rate < 0.99*off ? "  LOSES" : "", r.counts_agree ? "" : "  COUNTS DIFFER");
                fflush(stdout);
                out.cell({
                    { "batch", n_batch }, { "requests", k.n_req }, { "policy", holds ? "hold" : "auto" }, { "n_kv", s.n_kv }, { "exit_layer", exit_layer }, { "p", k.p },
                    { "t_f_ms", t.full.whole }, { "t_s_ms", t.shallow.whole }, { "t_s_scored_ms", t.shallow_scored.whole }, { "t_d_ms", t_d }, { "t_head_ms", t.head },
                    { "submit_f_ms", t.full.submit }, { "submit_s_ms", t.shallow.submit }, { "submit_d_ms", t.deep.submit },
                    { "device_f_ms", t.full.device }, { "device_s_ms", t.shallow.device }, { "device_s_scored_ms", t.shallow_scored.device },
                    { "device_d_ms", t.deep.device },
                    { "c_over_t_d_with_head", c_head/t_d }, { "c_over_t_d_without_head", c/t_d },
                    { "tokens_per_s", rate }, { "off_tokens_per_s", off }, { "over_off", rate/off },
                    { "window_off_tokens_per_s", off_rate[k.n_req == n_batch] }, { "stock_tokens_per_s", stock_rate[0] }, { "stock_streams_tokens_per_s", stock_rate[1] },
                    { "limit_tokens_per_s", limit }, { "of_limit", rate/limit }, { "rows_per_window", double(r.rows)/r.windows },
                    { "exits", double(r.exits) }, { "exits_of_mask", double(r.expected_exits) }, { "involuntary_exits", double(r.involuntary) },
                    { "counts_agree", r.counts_agree }, { "cuda_graphs_reused", double(log1.reused - log0.reused) },
                    { "cuda_graphs_reset", double(log1.reset - log0.reset) },
                });
            }
        }
    }
    out.finish(ok, late());
    printf("%s\n", ok ? "ok" : "FAILED");
    return ok ? 0 : 1;
} catch (const std::exception & e) {
    fprintf(stderr, "error: %s\n", e.what());
    return 1;
}
