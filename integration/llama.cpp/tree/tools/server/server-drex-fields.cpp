#include "server-drex-fields.h"

#include <algorithm>
#include <cmath>

using server_schema::field_eval_context;

namespace {

struct drex_field {
    const char * name;
    const char * desc;
    void (*set)(task_params & params, const json & value);
};

double number(const json & value, double max) {
    const double res = value.is_number() ? value.get<double>() : NAN;
    if (!(res >= 0.0 && res <= max)) {
        throw std::invalid_argument(string_format("expected a number in [0, %g], got %s", max, value.dump().c_str()));
    }
    return res;
}

int32_t integer(const json & value) {
    const double res = value.is_number() ? value.get<double>() : NAN;
    if (!(res >= INT32_MIN && res <= INT32_MAX && res == std::floor(res))) {
        throw std::invalid_argument(string_format("expected an integer in [%d, %d], got %s", INT32_MIN, INT32_MAX, value.dump().c_str()));
    }
    return int32_t(res);
}

bool boolean(const json & value) {
    if (!value.is_boolean()) {
        throw std::invalid_argument("expected true or false, got " + value.dump());
    }
    return value.get<bool>();
}

std::string name(const json & value, const std::vector<std::string> & names) {
    const std::string res = value.is_string() ? value.get<std::string>() : "";
    if (std::find(names.begin(), names.end(), res) == names.end()) {
        std::string all;
        for (size_t i = 0; i < names.size(); ++i) {
            all += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
        }
        throw std::invalid_argument("expected " + all + ", got " + value.dump());
    }
    return res;
}

double quality(const json & value) {
    const double res = value == "lossless" ? 1.0 : value.is_number() ? value.get<double>() : NAN;
    if (!(res >= 0.5 && res <= 1.0)) {
        throw std::invalid_argument("expected lossless or a number in [0.5, 1], got " + value.dump());
    }
    return res;
}

const drex_field drex_fields[] = {
    { "drex_threshold", "Confidence at which a token of this request exits early, for every exit layer; above 1: never",
        [](task_params & params, const json & value) { params.drex.threshold = number(value, 1e6); } },
    { "drex_metric", "Confidence metric of this request: gap, maxprob or entropy",
        [](task_params & params, const json & value) { params.drex.metric = name(value, { "gap", "maxprob", "entropy" }); } },
    { "drex_fill", "How the K/V of skipped layers of this request is filled: copy, propagate, postfill or verify",
        [](task_params & params, const json & value) { params.drex.fill = name(value, { "copy", "propagate", "postfill", "verify" }); } },
    { "drex_quality", "How far this request's output may differ from the full model's: lossless, not at all, or an agreement in [0.5, 1]",
        [](task_params & params, const json & value) { params.drex.quality = quality(value); } },
    { "drex_deadline_ms", "Time between two tokens of this request that flushes keep where they can (0 = the server's default)",
        [](task_params & params, const json & value) { params.drex.deadline_ms = number(value, 1e9); } },
    { "drex_request_deadline_ms",
        "Time from the end of this request's prompt to its last token that flushes keep where they can (0 = the server's default)",
        [](task_params & params, const json & value) { params.drex.request_deadline_ms = number(value, 1e9); } },
    { "drex_priority", "Requests of higher priority are taken first when more rows wait than fit",
        [](task_params & params, const json & value) { params.drex.priority = integer(value); } },
    { "drex_tokens", "Answers say of each token where it left, how confident the exit was and how long the row was held",
        [](task_params & params, const json & value) { params.drex.tokens = boolean(value); } },
};

// letters that must change to make one text the other (Levenshtein)
size_t distance(const std::string & a, const std::string & b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) {
        row[j] = j;
    }
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t above = row[j];
            row[j] = std::min({ above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]) });
            diagonal = above;
        }
    }
    return row[b.size()];
}

} // namespace

void server_drex_add_fields(std::vector<std::unique_ptr<server_schema::field>> & fields, const common_params & params_base) {
    if (!params_base.drex.enabled()) {
        return;
    }
    for (const auto & f : drex_fields) {
        auto field = std::make_unique<server_schema::field_json>(f.name);
        field->set_desc(f.desc);
        field->set_handler([&f](field_eval_context & ctx, const json & data) {
            f.set(ctx.params, data.at(f.name));
        });
        fields.push_back(std::move(field));
    }
}

void server_drex_check_fields(const json & data, const common_params & params_base) {
    if (!data.is_object()) {
        return;
    }
    for (const auto & [key, value] : data.items()) {
        if (key.compare(0, 5, "drex_") != 0 || value.is_null()) {
            continue;
        }
        if (!params_base.drex.enabled()) {
            throw std::invalid_argument("Field '" + key + "': early exit is off, start the server with --drex on");
        }
        const auto * nearest = std::begin(drex_fields);
        for (const auto & f : drex_fields) {
            if (distance(key, f.name) < distance(key, nearest->name)) {
                nearest = &f;
            }
        }
        if (key != nearest->name) {
            throw std::invalid_argument("Field '" + key + "': there is no such field, did you mean '" + nearest->name + "'?");
        }
    }
}
