// Figures of early exit: timings of a response, /slots, /metrics.

#include "server-drex.h"

#include <cmath>
#include <iterator>
#include <sstream>

drex_request_info server_drex::info(int id_slot) const {
    drex_request_info res = DREX_REQUEST_INFO_INITIALIZER;
    if (seen.valid) {
        return seen.infos[id_slot];
    }
    if (slots[id_slot].added) {
        warn(drex_request_get(engine, slots[id_slot].id, &res));
    }
    return res;
}

void server_drex::look_aside() {
    seen.figures = figures();
    seen.infos.clear();
    for (size_t i = 0; i < slots.size(); ++i) {
        seen.infos.push_back(info(i));
    }
    seen.valid = true;
}

json server_drex::timings(int id_slot, llama_token sampled) const {
    const auto   in   = info(id_slot);
    const auto & slot = slots[id_slot];

    // a final response is sent before agrees() counts the draft that the last token has judged
    const bool judged = slot.judged != LLAMA_TOKEN_NULL;

    return {
        {"drex_exits",             std::vector<uint64_t>(in.exits, in.exits + ramp_layers.size())},
        {"drex_involuntary_exits", in.involuntary_exits},
        {"drex_involuntary_stays", in.involuntary_stays},
        {"drex_held_ms",           in.held_ns/1e6},
        {"drex_deadline_misses",   in.deadline_misses},
        {"drex_drafts",            slot.n_verified + judged},
        {"drex_drafts_accepted",   slot.n_accepted + (judged && slot.judged == sampled)},
    };
}

json server_drex::to_json(int id_slot) const {
    static const char * states[] = { "idle", "ready", "running", "held" };

    const auto in = info(id_slot);

    json res = {
        {"state",             states[in.state]},
        {"held_at_layer",     nullptr},
        {"confidence",        nullptr},
        {"tokens",            in.tokens},
        {"exits",             std::vector<uint64_t>(in.exits, in.exits + ramp_layers.size())},
        {"involuntary_exits", in.involuntary_exits},
        {"involuntary_stays", in.involuntary_stays},
        {"held_ms",           in.held_ns/1e6},
        {"pending",           in.n_pending},
        {"drafts",            slots[id_slot].n_verified},
        {"drafts_accepted",   slots[id_slot].n_accepted},
    };
    if (in.state == DREX_REQUEST_HELD) {
        res["held_at_layer"] = ramp_layers[in.ramp];
    }
    if (std::isfinite(in.last_confidence)) {
        res["confidence"] = in.last_confidence;
    }
    return res;
}

namespace {

// counters of drex that are one number each
struct counter {
    const char * name;
    const char * help;
    uint64_t drex_stats::* value;
};

const counter counters[] = {
    { "involuntary_exits", "Rows made to exit below their threshold",                       &drex_stats::involuntary_exits },
    { "involuntary_stays", "Confident rows that went on with the batch",                    &drex_stats::involuntary_stays },
    { "nonfinite_rows",    "Rows whose confidence was NaN or infinite",                     &drex_stats::nonfinite_rows },
    { "steps",             "Layer windows run",                                             &drex_stats::steps },
    { "step_rows",         "Rows of all layer windows run",                                 &drex_stats::step_rows },
    { "filled_cells",      "KV cells whose skipped layers were filled by state-copy",       &drex_stats::cells_filled },
    { "filled_bytes",      "Bytes written by state-copy",                                   &drex_stats::bytes_filled },
    { "postfilled_rows",   "Exited rows that went through their skipped layers later on",   &drex_stats::rows_filled },
    { "drafts",            "Drafts of exit ramps that the full model judged",               &drex_stats::drafts },
    { "drafts_accepted",   "Drafts of exit ramps that the full model confirmed",            &drex_stats::drafts_accepted },
    { "dropped_rows",      "Rows run for nothing, behind a draft that was not confirmed",   &drex_stats::rows_dropped },
};

template<size_t N>
void add(uint64_t (& sum)[N], const uint64_t (& more)[N]) {
    for (size_t i = 0; i < N; ++i) {
        sum[i] += more[i];
    }
}

// the counters of both
void accumulate(server_drex_figures & sum, const server_drex_figures & more) {
    for (const auto & c : counters) {
        sum.stats.*c.value += more.stats.*c.value;
    }
    add(sum.stats.exits,           more.stats.exits);
    add(sum.stats.flushes,         more.stats.flushes);
    add(sum.stats.misses,          more.stats.misses);
    add(sum.stats.wait_us_buckets, more.stats.wait_us_buckets);

    sum.stats.wait_us_sum += more.stats.wait_us_sum;
    sum.stats.searches    += more.stats.searches;
    sum.n_tokens          += more.n_tokens;
    sum.t_run             += more.t_run;
    sum.graphs.n_built    += more.graphs.n_built;
    sum.graphs.n_reused   += more.graphs.n_reused;
    sum.graphs.n_evicted  += more.graphs.n_evicted;
}

} // namespace

server_drex_figures server_drex::figures() const {
    if (seen.valid) {
        return seen.figures;
    }
    server_drex_figures res;
    warn(drex_stats_get(engine, &res.stats));
    res.graphs   = llama_layer_range_perf(ctx);
    res.n_tokens = n_tokens;
    res.t_run    = t_run_all;
    accumulate(res, past);

    return res;
}

std::string server_drex::metrics() const {
    const server_drex_figures f = figures();
    const drex_stats & s = f.stats;

    std::stringstream out;
    out.precision(17);

    std::string family_name;
    auto family = [&](const char * name, const char * type, const char * help) {
        family_name = std::string("drex_") + name;
        out << "# HELP " << family_name << " " << help << "\n# TYPE " << family_name << " " << type << "\n";
    };
    auto sample = [&](const std::string & labels, auto value) {
        out << family_name << labels << " " << value << "\n";
    };
    auto single = [&](const char * name, const char * type, const char * help, auto value) {
        family(name, type, help);
        sample("", value);
    };
    auto each = [&](const char * name, const char * type, const char * help, size_t n, auto && labels, auto && value) {
        family(name, type, help);
        for (size_t i = 0; i < n; ++i) {
            sample(labels(i), value(i));
        }
    };
    auto ramp = [&](size_t r) {
        return "{ramp=\"" + std::to_string(r) + "\",layer=\"" + std::to_string(ramp_layers[r]) + "\"}";
    };
    const size_t n_ramps = ramp_layers.size();

    each("exits_total", "counter", "Rows that left at an exit ramp, drafts among them", n_ramps, ramp, [&](size_t r) { return s.exits[r]; });

    single("tokens_total", "counter", "Tokens given to requests, the first one of each included", f.n_tokens);
    for (const auto & c : counters) {
        single((std::string(c.name) + "_total").c_str(), "counter", c.help, s.*c.value);
    }
    single("window_seconds_total", "counter", "Time spent in layer windows and ramps",               f.t_run/1e9);
    single("pending_rows",         "gauge",   "Exited rows in the hidden arena that have layers to go", s.pending_rows);

    static const char * misses[] = { "host", "queue", "held", "run" };
    static_assert(std::size(misses) == DREX_MISS_REASONS, "a name for each");

    auto reason = [](const char * name) { return std::string("{reason=\"") + name + "\"}"; };

    each("deadline_misses_total", "counter", "Tokens emitted after their deadline, by where most of their time went", std::size(misses),
            [&](size_t i) { return reason(misses[i]); }, [&](size_t i) { return s.misses[i]; });

    static const char * flushes[] = { "fill", "age", "deadline", "idle", "stay", "prompt" };
    static_assert(std::size(flushes) + 1 == DREX_FLUSH_REASONS, "a name for each but DREX_FLUSH_NONE");

    each("flushes_total", "counter", "Windows over held rows, by what caused them", std::size(flushes),
            [&](size_t i) { return reason(flushes[i]); }, [&](size_t i) { return s.flushes[i + 1]; });

    each("held_rows", "gauge", "Rows waiting in the rebatching buffer", n_ramps, ramp, [&](size_t r) { return s.held_rows_at[r]; });

    single("held_rows_max", "gauge", "Most rows that waited at once",  s.held_rows_max);
    single("requests",      "gauge", "Requests alive",                 s.requests);
    single("slots_free",    "gauge", "Free rows of the hidden arena",  s.slots_free);
    if (std::isfinite(s.art_ratio)) {
        single("art_ratio", "gauge", "Rebatching overhead over deep time, c/t_d", s.art_ratio);
    }

    family("exit_share", "gauge", "Share of rows that are confident at an exit ramp, of those scored there first");
    for (size_t r = 0; r < n_ramps; ++r) {
        if (std::isfinite(s.exit_share[r])) {
            sample(ramp(r), s.exit_share[r]);
        }
    }
    if (s.searches > 0) {
        each("rule_ramp", "gauge", "Policy auto: 1 where the present rule looks at an exit ramp", n_ramps, ramp,
                [&](size_t r) { return (s.rule_ramps >> r) & 1; });
        single("rule_hold_rows",  "gauge",   "Policy auto: held rows at a ramp that are flushed",              s.rule_hold_rows);
        single("rule_ready_rows", "gauge",   "Policy auto: ready rows below which held rows are flushed",      s.rule_ready_rows);
        single("searches_total",  "counter", "Policy auto: searches for a better rule",                        s.searches);
        family("predicted_tokens_per_second", "gauge", "Policy auto: speed that the last search predicted");
        sample("{rule=\"chosen\"}", s.predicted_tokens_per_s);
        sample("{rule=\"off\"}",    s.predicted_off_tokens_per_s);
    }

    family("wait_seconds", "histogram", "Time that rows spent in the rebatching buffer");
    uint64_t n_waits = 0;
    for (size_t i = 0; i < DREX_WAIT_BUCKETS; ++i) {
        n_waits += s.wait_us_buckets[i];
        const bool last = i + 1 == DREX_WAIT_BUCKETS;
        sample("_bucket{le=\"" + (last ? "+Inf" : string_format("%g", std::ldexp(1e-6, i))) + "\"}", n_waits);
    }
    sample("_sum",   s.wait_us_sum/1e6);
    sample("_count", n_waits);

    single("graphs_built_total",   "counter", "Compute graphs built for layer windows",         f.graphs.n_built);
    single("graphs_reused_total",  "counter", "Layer windows that reused a graph",              f.graphs.n_reused);
    single("graphs_evicted_total", "counter", "Kept graphs that were dropped for want of room", f.graphs.n_evicted);
    single("graphs",               "gauge",   "Graphs kept",                                    f.graphs.n_kept);
    single("graphs_bytes",         "gauge",   "Compute buffers and metadata of kept graphs",    f.graphs.bytes);

    return out.str();
}
