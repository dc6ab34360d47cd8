#include "drex-args.h"

#include "common.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>

// The whole text is one number within [low, high].
static double parse_number(const std::string & text, double low, double high) {
    char * end = nullptr;
    errno = 0;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || isspace((unsigned char) text[0]) || end != text.c_str() + text.size() || errno == ERANGE || !(value >= low && value <= high)) {
        throw std::invalid_argument(string_format("expected a number in [%g, %g], got \"%s\"", low, high, text.c_str()));
    }
    return value;
}

static int64_t parse_integer(const std::string & text, int64_t low, int64_t high) {
    char * end = nullptr;
    errno = 0;
    const long long value = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || isspace((unsigned char) text[0]) || end != text.c_str() + text.size() || errno == ERANGE || value < low || value > high) {
        throw std::invalid_argument(string_format("expected an integer in [%lld, %lld], got \"%s\"", (long long) low, (long long) high, text.c_str()));
    }
    return value;
}

static std::vector<std::string> parse_list(const std::string & text) {
    std::vector<std::string> res(1);
    for (const char c : text) {
        if (c == ',') {
            res.emplace_back();
        } else {
            res.back() += c;
        }
    }
    return res;
}

static std::string parse_name(const std::string & text, const std::vector<std::string> & names) {
    if (std::find(names.begin(), names.end(), text) == names.end()) {
        std::string all;
        for (const auto & name : names) {
            all += (all.empty() ? "" : ", ") + name;
        }
        throw std::invalid_argument(string_format("expected one of %s, got \"%s\"", all.c_str(), text.c_str()));
    }
    return text;
}

static const double  ms_max = 1e9;
static const int32_t n_max  = 1 << 20;

std::vector<common_arg> common_drex_args(const common_params & params) {
    const auto & drex = params.drex;

    std::vector<common_arg> res;

    auto add = [&](common_arg arg) {
        res.push_back(std::move(arg));
    };

    add(common_arg(
        {"--drex"}, "{on,off}",
        "early exit with dynamic rebatching that leaves the output as it is: --drex-policy auto and --drex-quality lossless,\n"
        "unless the options below name something else (default: off)",
        [](common_params & params, const std::string & value) {
            params.drex.on = parse_name(value, { "on", "off" }) == "on";
            if (!params.drex.on) {
                params.drex.policy = "off";
            }
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX"));
    add(common_arg(
        {"--drex-quality"}, "{lossless,F}",
        "how far the output may differ from the full model's (default: as far as threshold and fill let it)\n"
        "  lossless: not at all; which tokens are worth a draft is learned, --drex-threshold pins it\n"
        "  F:        an agreement such as 0.99: so many of the tokens are the full model's, over all greedy requests. Some answers\n"
        "            are audited, thresholds follow from that, and --drex-fill says how holes are filled. The other requests,\n"
        "            and all until audits allow more, are lossless",
        [](common_params & params, const std::string & value) {
            params.drex.quality = value == "lossless" ? 1.0 : parse_number(value, 0.5, 1.0);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_QUALITY"));
    add(common_arg(
        {"--drex-policy"}, "{off,auto,hold,latency,art,lazy,eager,median,mean}",
        string_format("early exit with dynamic rebatching: what to do with the rows of a batch that are not confident (default: %s)\n"
            "  auto:    hold, with the thresholds that are predicted to be fastest for the present load, or no early exit\n"
            "  hold:    confident rows exit, the others are held and go deeper in dense batches\n"
            "  latency: confident rows exit, the others go on at once\n"
            "  art:     DREX's rule: hold where the measured overhead pays, else the batch goes on\n"
            "  lazy:    the batch exits when all rows are confident\n"
            "  eager, median, mean: baselines that force rows out", drex.policy.c_str()),
        [](common_params & params, const std::string & value) {
            params.drex.policy = parse_name(value, { "off", "auto", "hold", "latency", "art", "lazy", "eager", "median", "mean" });
            params.drex.on     = params.drex.on && params.drex.policy != "off"; // of the two, the later one counts
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_POLICY"));
    add(common_arg(
        {"--drex-exits"}, "FNAME",
        "file of exits that were fitted to the model (default: none, rows exit through the model's own head)",
        [](common_params & params, const std::string & value) {
            params.drex.exits = value;
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_EXITS"));
    add(common_arg(
        {"--drex-exit-layers"}, "L0,L1,...",
        "numbers of layers after which a row may exit (default: those of --drex-exits, else <arch>.early_exit.layers of the model's metadata)",
        [](common_params & params, const std::string & value) {
            params.drex.exit_layers.clear();
            for (const auto & text : parse_list(value)) {
                params.drex.exit_layers.push_back(parse_integer(text, 1, 65535));
            }
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_EXIT_LAYERS"));
    add(common_arg(
        {"--drex-threshold"}, "F[,F...]",
        string_format("confidence at which a row exits, one value or one for each exit layer; above 1: never (default: %.2f)", drex.all_thresholds()[0]),
        [](common_params & params, const std::string & value) {
            params.drex.thresholds.clear();
            for (const auto & text : parse_list(value)) {
                params.drex.thresholds.push_back(parse_number(text, 0.0, 1e6));
            }
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_THRESHOLD"));
    add(common_arg(
        {"--drex-metric"}, "{gap,maxprob,entropy}",
        string_format("confidence: gap between the two best probabilities, best probability, 1 - normalised entropy (default: %s)", drex.metric.c_str()),
        [](common_params & params, const std::string & value) {
            params.drex.metric = parse_name(value, { "gap", "maxprob", "entropy" });
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_METRIC"));
    add(common_arg(
        {"--drex-fill"}, "{copy,propagate,postfill,verify}",
        string_format("how the K/V of skipped layers is filled (default: %s, with --drex-quality lossless verify)\n"
            "  copy:      copied from the exit layer\n"
            "  propagate: projected from the hidden state at the exit\n"
            "  postfill:  computed later, exactly\n"
            "  verify:    computed later, and the full model checks the token: the output is the full model's", drex.fill_name().c_str()),
        [](common_params & params, const std::string & value) {
            params.drex.fill = parse_name(value, { "copy", "propagate", "postfill", "verify" });
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_FILL"));
    add(common_arg(
        {"--drex-max-batch"}, "N",
        "most rows of requests in one layer window, prompts apart (default: 0 = as many as there can be)",
        [](common_params & params, const std::string & value) {
            params.drex.max_batch = parse_integer(value, 0, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_MAX_BATCH"));
    add(common_arg(
        {"--drex-slots"}, "N",
        "rows of the hidden-state arena for requests, at least the number of slots (default: 0 = enough for all pending rows)",
        [](common_params & params, const std::string & value) {
            params.drex.n_slots = parse_integer(value, 0, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_SLOTS"));
    add(common_arg(
        {"--drex-max-pending"}, "N",
        string_format("fill postfill and verify: most exited tokens of a request whose K/V is not computed yet (default: %d)", drex.max_pending),
        [](common_params & params, const std::string & value) {
            params.drex.max_pending = parse_integer(value, 1, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_MAX_PENDING"));
    add(common_arg(
        {"--drex-flush-rows"}, "N",
        "number of held rows that starts a flush (default: 0 = art: a full batch, hold: 0.6 of the active requests)",
        [](common_params & params, const std::string & value) {
            params.drex.flush_rows = parse_integer(value, 0, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_FLUSH_ROWS"));
    add(common_arg(
        {"--drex-min-ready"}, "N",
        "policy hold: flush when fewer rows than this are ready for the first window (default: 0 = 1)",
        [](common_params & params, const std::string & value) {
            params.drex.min_ready = parse_integer(value, 0, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_MIN_READY"));
    add(common_arg(
        {"--drex-max-hold-ms"}, "MS",
        "flush rows that have been held for this long (default: 0 = a multiple of the predicted time of their remaining layers)",
        [](common_params & params, const std::string & value) {
            params.drex.max_hold_ms = parse_number(value, 0.0, ms_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_MAX_HOLD_MS"));
    add(common_arg(
        {"--drex-deadline-ms"}, "MS",
        "time between two tokens of a request that flushes keep where they can (default: 0 = none)",
        [](common_params & params, const std::string & value) {
            params.drex.deadline_ms = parse_number(value, 0.0, ms_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_DEADLINE_MS"));
    add(common_arg(
        {"--drex-request-deadline-ms"}, "MS",
        "time from the end of a request's prompt to its last token that flushes keep where they can (default: 0 = none)",
        [](common_params & params, const std::string & value) {
            params.drex.request_deadline_ms = parse_number(value, 0.0, ms_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_REQUEST_DEADLINE_MS"));
    add(common_arg(
        {"--drex-profile"}, "FNAME",
        "learned costs of layer windows: read at the start if the file exists, written every 10 seconds and at the end (default: none)",
        [](common_params & params, const std::string & value) {
            params.drex.profile = value;
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_PROFILE"));
    add(common_arg(
        {"--drex-record"}, "FNAME",
        "write times of layer windows and confidences of rows to a file, for drex-sim (default: none)",
        [](common_params & params, const std::string & value) {
            params.drex.record = value;
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_RECORD"));
    add(common_arg(
        {"--drex-art-ratio"}, "F",
        "policy art: share of confident rows above which a batch is split (default: measured)",
        [](common_params & params, const std::string & value) {
            params.drex.art_ratio = parse_number(value, 0.0, 1e6);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_ART_RATIO"));
    add(common_arg(
        {"--drex-graphs"}, "N",
        "most compute graphs that are kept, one for each layer window, number of rows and layout of their streams "
        "(default: 4 for each slot, at least 128)",
        [](common_params & params, const std::string & value) {
            params.drex.n_graphs = parse_integer(value, 1, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_GRAPHS"));
    add(common_arg(
        {"--drex-graphs-mib"}, "N",
        "most memory of these graphs in MiB; the least recently used ones go (default: 0 = a quarter of the model, at least 64 and 2 for each slot, at most 1024)",
        [](common_params & params, const std::string & value) {
            params.drex.graphs_mib = parse_integer(value, 0, n_max);
        }
    ).set_examples({LLAMA_EXAMPLE_SERVER}).set_env("LLAMA_ARG_DREX_GRAPHS_MIB"));

    return res;
}
