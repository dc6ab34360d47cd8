// SPDX-License-Identifier: Apache-2.0
//
// The constants and structs of drex.h. Part of drex.hpp; include that.

#ifndef DREX_DETAIL_TYPES_HPP
#define DREX_DETAIL_TYPES_HPP

#include <cstddef>
#include <cstdint>
#include <string>

#include "result.hpp"
#include "span.hpp"

namespace drex {

enum class policy : drex_policy {
  off = DREX_POLICY_OFF,
  eager = DREX_POLICY_EAGER,
  lazy = DREX_POLICY_LAZY,
  median = DREX_POLICY_MEDIAN,
  mean = DREX_POLICY_MEAN,
  latency = DREX_POLICY_LATENCY,
  hold = DREX_POLICY_HOLD,
  art = DREX_POLICY_ART,
  automatic = DREX_POLICY_AUTO,  // "auto" is a keyword
};

enum class metric : drex_metric {
  gap = DREX_METRIC_GAP,
  maxprob = DREX_METRIC_MAXPROB,
  entropy = DREX_METRIC_ENTROPY,
  engines = DREX_METRIC_DEFAULT,
};

enum class fill : drex_fill_mode {
  copy = DREX_FILL_COPY,
  postfill = DREX_FILL_POSTFILL,
  verify = DREX_FILL_VERIFY,
  propagate = DREX_FILL_PROPAGATE,
  engines = DREX_FILL_DEFAULT,
};

enum class decision : drex_decision {
  exit = DREX_DECISION_EXIT,
  hold = DREX_DECISION_HOLD,
  stay = DREX_DECISION_STAY,
  gone = DREX_DECISION_GONE,
  pending = DREX_DECISION_PENDING,
  accept = DREX_DECISION_ACCEPT,
  replace = DREX_DECISION_REPLACE,
  drop = DREX_DECISION_DROP,
};

// A level and all that are more urgent.
enum class log_level : drex_log_level {
  off = DREX_LOG_OFF,
  error = DREX_LOG_ERROR,
  warn = DREX_LOG_WARN,
  info = DREX_LOG_INFO,
  debug = DREX_LOG_DEBUG,
  trace = DREX_LOG_TRACE,
};

inline const char *version() noexcept { return drex_version(); }
inline std::uint32_t abi_version() noexcept { return drex_abi_version(); }
// NULL when this library does not know it.
inline const char *name(policy p) noexcept {
  return drex_policy_name(static_cast<drex_policy>(p));
}
inline const char *name(metric m) noexcept {
  return drex_metric_name(static_cast<drex_metric>(m));
}
inline const char *name(fill f) noexcept {
  return drex_fill_name(static_cast<drex_fill_mode>(f));
}
inline const char *name(decision d) noexcept {
  return drex_decision_name(static_cast<drex_decision>(d));
}
inline const char *flush_reason_name(drex_flush_reason r) noexcept {
  return drex_flush_reason_name(r);
}
inline const char *miss_reason_name(drex_miss_reason r) noexcept {
  return drex_miss_reason_name(r);
}
inline result<policy> policy_from_name(const char *text) {
  drex_policy p = 0;
  const drex_status s = drex_policy_from_name(text, &p);
  if (s != DREX_OK) return error::last(s);
  return static_cast<policy>(p);
}
inline result<metric> metric_from_name(const char *text) {
  drex_metric m = 0;
  const drex_status s = drex_metric_from_name(text, &m);
  if (s != DREX_OK) return error::last(s);
  return static_cast<metric>(m);
}
inline result<fill> fill_from_name(const char *text) {
  drex_fill_mode f = 0;
  const drex_status s = drex_fill_from_name(text, &f);
  if (s != DREX_OK) return error::last(s);
  return static_cast<fill>(f);
}

// drex.h's structs with their initializers. All fields are there; the setters are
// for what C++ says better.
struct config : drex_config {
  config() noexcept : drex_config(DREX_CONFIG_INITIALIZER) {}
  // What these two are given must live until engine::create() returns.
  config &ramps(span<const std::uint32_t> layers) noexcept {
    ramp_layers = layers.data();
    n_ramps = detail::count(layers.size());
    return *this;
  }
  // As many as ramps, which engine::create() sees to; none: `threshold` for all.
  config &thresholds(span<const float> one_per_ramp) noexcept {
    ramp_thresholds = one_per_ramp.empty() ? nullptr : one_per_ramp.data();
    thresholds_ = one_per_ramp;
    return *this;
  }
  config &use(drex::policy p) noexcept {
    policy = static_cast<drex_policy>(p);
    return *this;
  }
  config &use(drex::metric m) noexcept {
    metric = static_cast<drex_metric>(m);
    return *this;
  }
  config &use(drex::fill f) noexcept {
    fill = static_cast<drex_fill_mode>(f);
    return *this;
  }

 private:
  friend class engine;
  // Whether there is a threshold for each ramp. The struct has no room for their
  // number; an array that was put into the field by hand is taken at its word.
  bool thresholds_fit() const noexcept {
    return ramp_thresholds == nullptr || ramp_thresholds != thresholds_.data() ||
           thresholds_.size() == n_ramps;
  }
  span<const float> thresholds_;
};

struct request : drex_request_config {
  explicit request(std::uint64_t request_id) noexcept
      : drex_request_config(DREX_REQUEST_CONFIG_INITIALIZER) {
    id = request_id;
  }
};

struct kv_layer : drex_kv_layer {
  kv_layer() noexcept : drex_kv_layer(DREX_KV_LAYER_INITIALIZER) {}
};
static_assert(sizeof(kv_layer) == sizeof(drex_kv_layer), "arrays of both are alike");

struct logits : drex_logits {
  // Rows of n_vocab floats, one after the other.
  logits(span<const float> values, std::uint32_t vocab) noexcept
      : drex_logits(DREX_LOGITS_INITIALIZER) {
    data = values.data();
    row_stride_bytes = static_cast<std::uint64_t>(vocab) * sizeof(float);
    n_rows = vocab == 0 ? 0 : detail::count(values.size() / vocab);
    n_vocab = vocab;
  }
  logits() noexcept : drex_logits(DREX_LOGITS_INITIALIZER) {}
};

// Rows of the arena at `rows`, and of a dense batch, of the same length.
struct arena : drex_arena {
  arena(void *rows, void *batch, std::uint64_t bytes) noexcept
      : drex_arena(DREX_ARENA_INITIALIZER) {
    drex_arena::arena = rows;
    dense = batch;
    arena_stride_bytes = dense_stride_bytes = row_bytes = bytes;
  }
  arena() noexcept : drex_arena(DREX_ARENA_INITIALIZER) {}
};

using row = drex_row;
using top = drex_top;
using request_info = drex_request_info;
using stats = drex_stats;

struct verdict : drex_verdict {
  drex::decision what() const noexcept {
    return static_cast<drex::decision>(decision);
  }
  bool exits() const noexcept { return decision == DREX_DECISION_EXIT; }
};
static_assert(sizeof(verdict) == sizeof(drex_verdict), "arrays of both are alike");

// Of a row by step::verify(), as a verdict is by step::ramp().
struct judgement {
  drex_decision decision;
  drex::decision what() const noexcept {
    return static_cast<drex::decision>(decision);
  }
  bool exits() const noexcept { return decision == DREX_DECISION_EXIT; }
};
static_assert(sizeof(judgement) == sizeof(drex_decision), "arrays of both are alike");

}  // namespace drex

#endif  // DREX_DETAIL_TYPES_HPP
