// Figures of early exit: timings of a response, /slots, /metrics, /drex/stats, and the line in the log.

#include "server-drex.h"

#include <cmath>
#include <iterator>
#include <sstream>

// the clock of a task's arrival
static int64_t time_ns() {
    return 1000*ggml_time_us();
}

void server_drex::add(int id_slot, const server_task & task, bool same_lora) {
    try {
        add_request(id_slot, task, same_lora);
    } catch (...) {
        load.ended[SERVER_DREX_END_INVALID]++;
        throw;
    }
    auto & slot = slots[id_slot];
    slot.t_arrived = 1000*task.params.drex.t_arrived;
    slot.empty     = task.n_tokens() == 0;

    load.n_prompt_tokens += task.n_tokens();
    load.queue.observe(time_ns() - slot.t_arrived);
}

int server_drex::remove(int id_slot, stop_type stop) {
    count_end(id_slot, stop);
    return drop(id_slot);
}

void server_drex::count_end(int id_slot, stop_type stop) {
    auto & slot = slots[id_slot];
    if (slot.added && !slot.leaving && !slot.counted) {
        slot.counted = true;
        // the answer to an empty prompt is empty, and has no reason to stop
        auto end = slot.empty ? SERVER_DREX_END_STOP : server_drex_end_of(stop);
        if (slot.end != SERVER_DREX_END_COUNT) {
            end = slot.end;
        }
        load.ended[end]++;
        if (end == SERVER_DREX_END_STOP || end == SERVER_DREX_END_LENGTH) {
            load.whole.observe(time_ns() - slot.t_arrived);
        }
    }
}

void server_drex::count_token(int id_slot) {
    auto & slot = slots[id_slot];

    const int64_t now = time_ns();
    if (slot.t_token == 0) {
        load.first.observe(now - slot.t_arrived);
    } else {
        load.between.observe(now - slot.t_token);
    }
    slot.t_token = now;
    load.n_tokens++;
}

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

// a quality as clients name it, null if none is promised
static json server_drex_quality(double quality) {
    return quality == 1.0 ? json("lossless") : quality > 0.0 ? json(quality) : json();
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
        {"drex_quality",           server_drex_quality(in.quality)},
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
    { "prompt_steps",      "Layer windows with prompt rows",                                &drex_stats::prompt_steps },
    { "prompt_rows",       "Prompt rows of all layer windows run",                          &drex_stats::prompt_rows },
    { "filled_cells",      "KV cells whose skipped layers were filled by state-copy",       &drex_stats::cells_filled },
    { "filled_bytes",      "Bytes written by state-copy",                                   &drex_stats::bytes_filled },
    { "postfilled_rows",   "Exited rows that went through their skipped layers later on",   &drex_stats::rows_filled },
    { "drafts",            "Drafts of exit ramps that the full model judged",               &drex_stats::drafts },
    { "drafts_accepted",   "Drafts of exit ramps that the full model confirmed",            &drex_stats::drafts_accepted },
    { "dropped_rows",      "Rows run for nothing, behind a draft that was not confirmed",   &drex_stats::rows_dropped },
    { "audits",            "Answers that were audited",                                     &drex_stats::audits },
    { "audited_tokens",    "Tokens of audited answers",                                     &drex_stats::audited_tokens },
    { "audited_differing", "Of these, tokens that the full model would have chosen otherwise", &drex_stats::audited_differing },
    { "audits_missed",     "Answers that were to be audited and were not",                  &drex_stats::audits_missed },
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
    sum.load              += more.load;
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
    res.graphs = llama_layer_range_perf(ctx);
    res.load   = load;
    accumulate(res, past);

    return res;
}

std::string server_drex::metrics(size_t n_waiting) const {
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
    // a bound as the library writes it: no exponent, no zeros at the end
    auto decimal = [](double value) {
        std::string text = string_format("%.6f", value);
        text.erase(text.find_last_not_of('0') + 1);
        if (text.back() == '.') {
            text.pop_back();
        }
        return text;
    };
    // bound: upper ones of all buckets but the last; counts has one more
    auto histogram = [&](const char * name, const char * help, size_t n_bounds, auto && bound, const auto & counts, double sum) {
        family(name, "histogram", help);
        uint64_t n = 0;
        for (size_t i = 0; i < n_bounds; ++i) {
            n += counts[i];
            sample("_bucket{le=\"" + decimal(bound(i)) + "\"}", n);
        }
        n += counts[n_bounds];
        sample("_bucket{le=\"+Inf\"}", n);
        sample("_sum",   sum);
        sample("_count", n);
    };
    auto times = [&](const char * name, const char * help, const server_drex_histogram & h) {
        histogram(name, help, h.bounds.size(), [&](size_t i) { return h.bounds[i]; }, h.counts, h.sum_ns/1e9);
    };
    auto ramp = [&](size_t r) {
        return "{ramp=\"" + std::to_string(r) + "\",layer=\"" + std::to_string(ramp_layers[r]) + "\"}";
    };
    const size_t n_ramps = ramp_layers.size();

    family("build_info", "gauge", "1; the labels say what early exit was built from");
    sample("{version=\"" + std::string(drex_version()) + "\",abi=\"" + std::to_string(drex_abi_version()) + "\"}", 1);

    each("exits_total", "counter", "Rows that left at an exit ramp, drafts among them", n_ramps, ramp, [&](size_t r) { return s.exits[r]; });

    single("tokens_total",        "counter", "Tokens given to requests, the first one of each included", f.load.n_tokens);
    single("prompt_tokens_total", "counter", "Tokens of the prompts of requests that got a slot",        f.load.n_prompt_tokens);
    for (const auto & c : counters) {
        single((std::string(c.name) + "_total").c_str(), "counter", c.help, s.*c.value);
    }
    single("pending_rows", "gauge", "Exited rows in the hidden arena that have layers to go", s.pending_rows);

    auto reason = [](const char * name) { return std::string("{reason=\"") + name + "\"}"; };

    static const char * misses[] = { "host", "queue", "held", "run" };
    static_assert(std::size(misses) == DREX_MISS_REASONS, "a name for each");

    each("deadline_misses_total", "counter", "Tokens emitted after their deadline, by where most of their time went", std::size(misses),
            [&](size_t i) { return reason(misses[i]); }, [&](size_t i) { return s.misses[i]; });

    static const char * flushes[] = { "fill", "age", "deadline", "idle", "stay", "prompt" };
    static_assert(std::size(flushes) + 1 == DREX_FLUSH_REASONS, "a name for each but DREX_FLUSH_NONE");

    each("flushes_total", "counter", "Windows over held rows, by what caused them", std::size(flushes),
            [&](size_t i) { return reason(flushes[i]); }, [&](size_t i) { return s.flushes[i + 1]; });

    static const char * ends[] = { "stop", "length", "cancelled", "invalid", "unavailable", "internal" };
    static_assert(std::size(ends) == SERVER_DREX_END_COUNT, "a name for each");

    each("requests_ended_total", "counter", "Requests that ended, by why", std::size(ends),
            [&](size_t i) { return reason(ends[i]); }, [&](size_t i) { return f.load.ended[i]; });

    each("held_rows", "gauge", "Rows waiting in the rebatching buffer", n_ramps, ramp, [&](size_t r) { return s.held_rows_at[r]; });

    single("held_rows_max",    "gauge", "Most rows that waited at once", s.held_rows_max);
    single("requests",         "gauge", "Requests alive",                s.requests);
    single("requests_running", "gauge", "Requests that run",             s.requests);
    single("requests_waiting", "gauge", "Requests that wait for a slot", n_waiting);
    single("slots_free",       "gauge", "Free rows of the hidden arena", s.slots_free);

    // what is not known yet has no sample
    family("art_ratio", "gauge", "Rebatching overhead over deep time, c/t_d");
    if (std::isfinite(s.art_ratio)) {
        sample("", s.art_ratio);
    }
    family("exit_share", "gauge", "Share of rows that are confident at an exit ramp, of those scored there first");
    for (size_t r = 0; r < n_ramps; ++r) {
        if (std::isfinite(s.exit_share[r])) {
            sample(ramp(r), s.exit_share[r]);
        }
    }
    const bool searched = s.searches > 0;

    single("searches_total", "counter", "Policy auto: searches for a better rule", s.searches);
    each("rule_ramp", "gauge", "Policy auto: 1 where the present rule looks at an exit ramp", searched ? n_ramps : 0, ramp,
            [&](size_t r) { return (s.rule_ramps >> r) & 1; });

    auto none = [](size_t) { return ""; };
    each("rule_hold_rows",  "gauge", "Policy auto: held rows at a ramp that are flushed",         searched, none, [&](size_t) { return s.rule_hold_rows; });
    each("rule_ready_rows", "gauge", "Policy auto: ready rows below which held rows are flushed", searched, none, [&](size_t) { return s.rule_ready_rows; });

    each("rule_survival",   "gauge", "Quality lossless: chance to stand, with all drafts before it, from which a draft is made", searched, none,
            [&](size_t) { return s.rule_survival; });
    each("rule_drafts",     "gauge", "Quality lossless: most drafts of a request, 0: no bound but --drex-max-pending", searched, none,
            [&](size_t) { return s.rule_drafts; });

    each("agreement_target", "gauge", "Agreement with the full model that was last asked for", std::isfinite(s.agreement_target), none,
            [&](size_t) { return s.agreement_target; });
    each("agreement",        "gauge", "Share of the tokens of requests with that target that are the full model's, estimated from audits",
            std::isfinite(s.agreement), none, [&](size_t) { return s.agreement; });
    each("agreement_low",    "gauge", "Its lower bound, which chance breaks one time in fifty", std::isfinite(s.agreement_low), none,
            [&](size_t) { return s.agreement_low; });

    family("predicted_tokens_per_second", "gauge", "Policy auto: speed that the last search predicted");
    if (searched) {
        sample("{rule=\"chosen\"}", s.predicted_tokens_per_s);
        sample("{rule=\"off\"}",    s.predicted_off_tokens_per_s);
    }

    histogram("held_seconds", "Time that rows spent in the rebatching buffer", DREX_WAIT_BUCKETS - 1,
            [](size_t i) { return std::ldexp(1.0, i)/1e6; }, s.wait_us_buckets, s.wait_us_sum/1e6);

    times("window_seconds",              "Time of each layer window",                             f.load.windows);
    times("request_queue_time_seconds",  "Time from a request's arrival to its slot",             f.load.queue);
    times("time_to_first_token_seconds", "Time from a request's arrival to its first token",      f.load.first);
    times("inter_token_latency_seconds", "Time between two tokens of a request",                  f.load.between);
    times("e2e_request_latency_seconds", "Time from a request's arrival to its last token, of requests that came to their end", f.load.whole);

    single("graphs_built_total",   "counter", "Compute graphs built for layer windows",         f.graphs.n_built);
    single("graphs_reused_total",  "counter", "Layer windows that reused a graph",              f.graphs.n_reused);
    single("graphs_evicted_total", "counter", "Kept graphs that were dropped for want of room", f.graphs.n_evicted);
    single("graphs",               "gauge",   "Graphs kept",                                    f.graphs.n_kept);
    single("graphs_bytes",         "gauge",   "Compute buffers and metadata of kept graphs",    f.graphs.bytes);

    return out.str();
}

json server_drex::stats(size_t n_waiting) const {
    const server_drex_figures f = figures();
    const drex_stats & s = f.stats;
    const size_t n_ramps = ramp_layers.size();

    json res = {
        {"version",           drex_version()},
        {"policy",            options.policy},
        {"metric",            options.metric},
        {"fill",              options.fill_name()},
        {"quality",           server_drex_quality(options.quality)},
        {"agreement",         nullptr},
        {"layers",            n_layer},
        {"exit_layers",       ramp_layers},
        {"thresholds",        options.learns() ? json() : json(options.thresholds_of(n_ramps))},
        {"tokens",            f.load.n_tokens},
        {"prompt_tokens",     f.load.n_prompt_tokens},
        {"exits",             std::vector<uint64_t>(s.exits, s.exits + n_ramps)},
        {"exit_share",        json::array()},
        {"held_rows",         std::vector<uint64_t>(s.held_rows_at, s.held_rows_at + n_ramps)},
        {"pending_rows",      s.pending_rows},
        {"drafts",            s.drafts},
        {"drafts_accepted",   s.drafts_accepted},
        {"dropped_rows",      s.rows_dropped},
        {"requests_running",  s.requests},
        {"requests_waiting",  n_waiting},
        {"steps",             s.steps},
        {"step_rows",         s.step_rows},
        {"graphs",            f.graphs.n_kept},
        {"graphs_bytes",      f.graphs.bytes},
        {"rule",              nullptr},
        {"predicted_tokens_per_second", nullptr},
    };
    for (size_t r = 0; r < n_ramps; ++r) {
        res["exit_share"].push_back(std::isfinite(s.exit_share[r]) ? json(s.exit_share[r]) : json());
    }
    if (std::isfinite(s.agreement_target)) {
        const auto known = [](double value) { return std::isfinite(value) ? json(value) : json(); };
        res["agreement"] = {
            {"target",    s.agreement_target},
            {"estimate",  known(s.agreement)},
            {"low",       known(s.agreement_low)},
            {"high",      known(s.agreement_high)},
            {"threshold", known(s.agreement_threshold)},
            {"audits",    s.audits},
            {"tokens",    s.audited_tokens},
        };
    }
    if (s.searches > 0) {
        json looks_at = json::array();
        for (size_t r = 0; r < n_ramps; ++r) {
            if ((s.rule_ramps >> r) & 1) {
                looks_at.push_back(ramp_layers[r]);
            }
        }
        res["rule"] = {
            {"exit_layers", looks_at},
            {"hold_rows",   s.rule_hold_rows},
            {"ready_rows",  s.rule_ready_rows},
            {"survival",    options.learns() ? json(s.rule_survival) : json()},
            {"drafts",      options.learns() && s.rule_drafts > 0 ? json(s.rule_drafts) : json()},
            {"searches",    s.searches},
        };
        res["predicted_tokens_per_second"] = {
            {"chosen", s.predicted_tokens_per_s},
            {"off",    s.predicted_off_tokens_per_s},
        };
    }
    return res;
}

static const int64_t pace_ns = 60*1000*1000*1000ll; // between two lines
static const int64_t idle_ns =  1*1000*1000*1000ll; // a longer time without a window counts as this

// Each minute with windows, at the end of one of them.
void server_drex::say_pace(int64_t now) {
    pace.busy_ns += pace.t_window > 0 ? std::min(now - pace.t_window, idle_ns) : 0;
    pace.t_window = now;
    if (pace.t_said == 0) {
        pace.t_said = now;
    }
    if (now - pace.t_said < pace_ns) {
        return;
    }

    drex_stats s = DREX_STATS_INITIALIZER;
    warn(drex_stats_get(engine, &s));

    const uint64_t n_tokens = load.n_tokens - pace.n_tokens;
    const double   seconds  = pace.busy_ns/1e9;

    // a row gives a token or is dropped, and some leave before
    const double n_rows = std::max<double>(1, n_tokens + s.rows_dropped - pace.stats.rows_dropped);

    std::string exits;
    for (size_t r = 0; r < ramp_layers.size(); ++r) {
        const double share = std::min(1.0, (s.exits[r] - pace.stats.exits[r])/n_rows);
        exits += string_format("%s%.0f%% after layer %u", r > 0 ? ", " : "", 100.0*share, ramp_layers[r]);
    }

    std::string gain = "policy " + options.policy + " predicts nothing";
    if (options.policy == "auto") {
        gain = "auto is still measuring";
        if (s.searches > 0 && s.predicted_off_tokens_per_s > 0) {
            gain = string_format("auto predicts %.2f times the speed of no early exit (%.0f against %.0f tokens/s)",
                    s.predicted_tokens_per_s/s.predicted_off_tokens_per_s, s.predicted_tokens_per_s, s.predicted_off_tokens_per_s);
        }
    }
    std::string agreement;
    if (s.audits > 0 && std::isfinite(s.agreement)) {
        agreement = string_format("; of the tokens %.2f%% are the full model's (at least %.2f%%, %g%% are asked for, %llu answers audited)",
                100.0*s.agreement, 100.0*s.agreement_low, 100.0*s.agreement_target, (unsigned long long) s.audits);
    }
    SRV_INF("early exit: %.1f tokens/s in %.0f s of work, rows that left: %s; %s%s\n", n_tokens/std::max(seconds, 1e-9), seconds,
            exits.c_str(), gain.c_str(), agreement.c_str());

    pace.t_said   = now;
    pace.busy_ns  = 0;
    pace.n_tokens = load.n_tokens;
    pace.stats    = s;
}
