#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

// early exit with dynamic rebatching (llama-server), see docs of drex
struct common_params_drex {
    bool        on      = false; // policy auto and quality lossless, as far as nothing else is named
    std::string policy  = "off";
    double      quality = 0.0;   // share of the tokens that are the full model's, 1: lossless, 0: as thresholds and fill say
    std::string metric  = "gap";
    std::string fill;            // empty: verify with quality lossless, propagate with an agreement, else copy

    std::string           exits;                // file of exits that were fitted to the model, empty: none
    std::vector<uint32_t> exit_layers;          // empty: from that file, else from the model's metadata
    std::vector<float>    thresholds;           // one, or one for each exit layer, empty: found with a quality, else 0.7

    int32_t n_slots    = 0;   // rows of the hidden arena, 0 = n_parallel*(1 + max_pending)
    int32_t max_pending = 8;  // exited tokens of a request whose skipped layers are still to be computed
    int32_t n_graphs   = 0; // compute graphs kept, one for each (window, number of rows, layout of their streams), 0 = by the number of slots
    int32_t graphs_mib = 0;   // most memory of these, 0 = by the size of the model
    int32_t max_batch  = 0;   // most rows in one window, 0 = as many as there can be
    int32_t flush_rows = 0;   // held rows that force a flush, 0 = the policy's own rule
    int32_t min_ready  = 0;   // policy hold: flush when fewer rows are ready, 0 = 1

    double max_hold_ms = 0.0; // 0 = a multiple of the predicted time of the remaining layers
    double deadline_ms = 0.0; // time between tokens, 0 = none
    double request_deadline_ms = 0.0; // time from prompt to last token, 0 = none

    std::string profile;      // learned costs, read at the start and written at the end
    std::string record;       // times and confidences, for drex-sim

    float art_ratio = NAN;    // policy art: pins c/t_d, NaN = measured

    bool enabled() const { return on || policy != "off"; }

    // what is on, in the terms of the other options
    void settle() {
        if (on && policy == "off") {
            policy = "auto";
        }
        if (on && quality == 0.0 && (fill.empty() || fill == "verify")) {
            quality = 1.0;
        }
        on = false;
    }

    bool lossless() const { return quality == 1.0; }
    bool agrees()   const { return quality > 0.0 && quality < 1.0; }

    // thresholds that are named are kept to
    bool learns() const { return quality > 0.0 && thresholds.empty(); }

    // rows of requests that name no fill stay pending
    bool keeps() const { return quality > 0.0 || fill == "postfill" || fill == "verify"; }

    std::string        fill_name()   const { return !fill.empty() ? fill : lossless() ? "verify" : agrees() ? "propagate" : "copy"; }
    std::vector<float> all_thresholds() const { return thresholds.empty() ? std::vector<float> { 0.7f } : thresholds; }

    // one for each of so many exit layers
    std::vector<float> thresholds_of(size_t n_ramps) const {
        auto res = all_thresholds();
        res.resize(n_ramps, res[0]);
        return res;
    }
};
