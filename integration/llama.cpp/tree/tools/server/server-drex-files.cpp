// Files of early exit: the profile, which is what was learned about costs, and the record of windows.

#include "server-drex.h"

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <stdexcept>

static const size_t  profile_max = 1 << 20; // bytes
static const int64_t profile_ns  = 10*1000*1000*1000ll; // between two writes

static std::string profile_tmp(const std::string & path) {
    return path + "." + std::to_string(getpid()) + ".tmp";
}

// false: there is no such file
static bool read_profile(const std::string & path, std::string & text) {
    const auto type = std::filesystem::status(path).type();
    if (type == std::filesystem::file_type::not_found) {
        return false;
    }
    if (type != std::filesystem::file_type::regular) {
        throw std::runtime_error("it is not a regular file");
    }

    std::ifstream in(path, std::ios::binary);
    if (!in) {
        throw std::runtime_error(strerror(errno));
    }
    text.resize(profile_max + 1);
    in.read(&text[0], text.size());
    text.resize(in.gcount());
    if (text.size() > profile_max) {
        throw std::runtime_error(string_format("it has more than %zu bytes, which no profile has", profile_max));
    }

    return true;
}

// The place of the profile can be written: that is told before the first request, not after the last one.
static void probe_profile(const std::string & path) {
    const std::string tmp = profile_tmp(path);
    if (!std::ofstream(tmp)) {
        throw std::runtime_error(string_format("it cannot be written: %s: %s", tmp.c_str(), strerror(errno)));
    }
    std::remove(tmp.c_str());
}

void server_drex::open_files(const common_params & params, bool is_resume) {
    profile = params.drex.profile;

    // a server that has slept has requests waiting: it does without
    auto open = [&](const char * option, std::string path, auto && open, auto && leave_out) {
        if (path.empty()) {
            return;
        }
        try {
            open();
        } catch (const std::exception & e) {
            const std::string text = std::string(option) + " " + path + ": " + e.what();
            if (!is_resume) {
                throw std::runtime_error(text);
            }
            SRV_WRN("early exit: %s; it is left out\n", text.c_str());
            leave_out();
        }
    };
    open("--drex-profile", params.drex.profile, [&]() { open_profile(); },                  [&]() { profile.clear(); });
    open("--drex-record",  params.drex.record,  [&]() { open_record(params, is_resume); },  [&]() { record.close(); });
}

void server_drex::open_profile() {
    std::string text;
    if (read_profile(profile, text)) {
        check(drex_profile_load(engine, text.c_str()));
    }
    probe_profile(profile);
}

void server_drex::save_profile() const {
    size_t n = 0;
    if (profile.empty() || drex_profile_save(engine, nullptr, 0, &n) != DREX_OK) {
        return; // nothing was learned
    }
    std::string text(n + 1, 0);
    check(drex_profile_save(engine, &text[0], text.size(), &n));
    text.resize(n);

    // a server that is killed here must not leave half a file
    const std::string tmp = profile_tmp(profile);
    std::ofstream out(tmp);
    out << text << "\n";
    out.close();
    if (!out || std::rename(tmp.c_str(), profile.c_str()) != 0) {
        const std::string why = strerror(errno);
        std::remove(tmp.c_str());
        throw std::runtime_error("--drex-profile " + profile + ": " + why);
    }
}

// A server that is killed has its profile all the same.
void server_drex::keep_profile() {
    if (profile.empty() || t_ran - t_profile < profile_ns) {
        return;
    }
    const bool first = t_profile == 0;
    t_profile = t_ran;
    if (first) {
        return;
    }
    try {
        save_profile();
        profile_failed = false;
    } catch (const std::exception & e) {
        if (!profile_failed) {
            SRV_WRN("early exit: %s\n", e.what());
        }
        profile_failed = true;
    }
}

void server_drex::open_record(const common_params & params, bool is_resume) {
    const auto & p = params.drex;

    record.open(p.record, is_resume ? std::ios::app : std::ios::out);

    const auto thresholds = p.thresholds_of(ramp_layers.size());
    record << json {
        {"drex_record", 1},         {"n_layers", n_layer},  {"ramp_layers", ramp_layers},         {"thresholds", thresholds},
        {"metric",      p.metric},  {"policy", p.policy},   {"max_batch",   std::min<size_t>(verdicts.size(), slots.size())},
    }.dump() << std::endl;

    if (!record) {
        throw std::runtime_error(strerror(errno));
    }
}

// a line for each window, see docs/simulator.md of drex
void server_drex::record_step(int64_t duration_ns, uint64_t n_kv) {
    json ids = json::array(), conf = json::array(), exits = json::array(), back = json::array(), drafts = json::array();
    bool pending = false;
    const bool verified = has_drafts();
    for (size_t i = 0; i < step_rows.size(); ++i) {
        ids .push_back(slots[step_rows[i].id_slot].id);
        back.push_back(plan_rows[i].back);
        pending = pending || plan_rows[i].back > 0;
        if (step.ramp != DREX_NO_RAMP) {
            conf .push_back(std::isfinite(verdicts[i].confidence) ? json(verdicts[i].confidence) : json(nullptr));
            exits.push_back(verdicts[i].decision == DREX_DECISION_EXIT ? 1 : 0);
        } else if (verified) {
            const auto d = decisions[i];
            drafts.push_back(d == DREX_DECISION_ACCEPT ? json(1) : d == DREX_DECISION_REPLACE ? json(0) : d == DREX_DECISION_DROP ? json(-1) : json(nullptr));
        }
    }
    json line = {
        {"e", "step"}, {"t", t_run}, {"ns", duration_ns}, {"begin", step.layer_begin}, {"end", step.layer_end}, {"kv", n_kv}, {"ids", ids},
    };
    if (step.ramp != DREX_NO_RAMP) {
        line["conf"] = conf;
        line["exit"] = exits;
    }
    if (step.n_prompt_rows > 0) {
        line["prompt"] = step.n_prompt_rows;
    }
    if (pending) {
        line["back"] = back;
        if (verified) {
            line["draft"] = drafts;
        }
    }
    record << line.dump() << "\n";
}
