#pragma once

// Requests and windows as /metrics tells of them: how many, how they ended, how long they took.

#include "server-task.h"

#include <algorithm>
#include <array>
#include <cstdint>

// why a request has ended
enum server_drex_end {
    SERVER_DREX_END_STOP,
    SERVER_DREX_END_LENGTH,
    SERVER_DREX_END_CANCELLED,   // its client went away
    SERVER_DREX_END_INVALID,
    SERVER_DREX_END_UNAVAILABLE, // no room for it
    SERVER_DREX_END_INTERNAL,
    SERVER_DREX_END_COUNT,
};

// of a request that nothing went wrong with
inline server_drex_end server_drex_end_of(stop_type stop) {
    switch (stop) {
        case STOP_TYPE_EOS:
        case STOP_TYPE_WORD:  return SERVER_DREX_END_STOP;
        case STOP_TYPE_LIMIT: return SERVER_DREX_END_LENGTH;
        case STOP_TYPE_NONE:  break;
    }
    return SERVER_DREX_END_CANCELLED;
}

// of a request that got an error
inline server_drex_end server_drex_end_of(error_type error) {
    switch (error) {
        case ERROR_TYPE_INVALID_REQUEST:
        case ERROR_TYPE_NOT_SUPPORTED:
        case ERROR_TYPE_EXCEED_CONTEXT_SIZE: return SERVER_DREX_END_INVALID;
        case ERROR_TYPE_UNAVAILABLE:         return SERVER_DREX_END_UNAVAILABLE;
        default:                             return SERVER_DREX_END_INTERNAL;
    }
}

struct server_drex_histogram {
    // upper bounds in seconds, as the Triton backend has them; the last bucket has none
    static constexpr std::array<double, 17> bounds = {
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    };

    std::array<uint64_t, bounds.size() + 1> counts = {};

    int64_t sum_ns = 0;

    void observe(int64_t ns) {
        counts[std::lower_bound(bounds.begin(), bounds.end(), ns/1e9) - bounds.begin()]++;
        sum_ns += ns;
    }

    void operator+=(const server_drex_histogram & more) {
        for (size_t i = 0; i < counts.size(); ++i) {
            counts[i] += more.counts[i];
        }
        sum_ns += more.sum_ns;
    }
};

struct server_drex_load {
    uint64_t n_tokens        = 0; // given to requests
    uint64_t n_prompt_tokens = 0; // of requests that got a slot

    std::array<uint64_t, SERVER_DREX_END_COUNT> ended = {};

    server_drex_histogram windows; // with their ramps

    // of requests, from their arrival
    server_drex_histogram queue;   // to a slot
    server_drex_histogram first;   // to the first token
    server_drex_histogram between; // from one token to the next
    server_drex_histogram whole;   // to the last token, of those that stopped or had their length

    void operator+=(const server_drex_load & more) {
        n_tokens        += more.n_tokens;
        n_prompt_tokens += more.n_prompt_tokens;
        for (size_t i = 0; i < ended.size(); ++i) {
            ended[i] += more.ended[i];
        }
        windows += more.windows;
        queue   += more.queue;
        first   += more.first;
        between += more.between;
        whole   += more.whole;
    }
};
