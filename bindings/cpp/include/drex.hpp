// SPDX-License-Identifier: Apache-2.0
//
// drex.hpp: drex.h for C++17, header only.
//
// What it adds to drex.h, which stays the specification of what every call does:
//
//   engine, step, pages   own what they stand for. A step that goes out of scope
//                         before complete() is abandoned, so that an early return
//                         or an exception of the host's loses no row.
//   result<T>             a value, or an error with its status and text. Nothing
//                         here throws. With DREX_HPP_EXCEPTIONS defined before the
//                         header is included, result<T>::value() exists, and
//                         throws drex::exception for an error.
//   span<T>               pointer and length, from arrays, vectors and the like.
//   config, request, ...  drex.h's structs, initialized.
//
// No call allocates but what allocates in drex.h, and an error's text. Works with
// -fno-exceptions and -fno-rtti. Since 0.1.

#ifndef DREX_HPP
#define DREX_HPP

#include "drex.h"

#if !defined(_MSVC_LANG) && __cplusplus < 201703L
#error "drex.hpp needs C++17; drex.h works from C++11 on"
#endif

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#ifdef DREX_HPP_EXCEPTIONS
#include <stdexcept>
#endif

namespace drex {

// -- Results -------------------------------------------------------------------

// Why a call failed: DREX_ERROR_* and its text, which names the call, the field
// and the value.
class error {
 public:
  error(drex_status status, std::string text)
      : status_(status), text_(std::move(text)) {}

  // The calling thread's last error, right after a call that failed.
  static error last(drex_status status) { return {status, drex_last_error()}; }

  drex_status status() const noexcept { return status_; }
  const char *name() const noexcept { return drex_status_name(status_); }
  const std::string &text() const noexcept { return text_; }

 private:
  drex_status status_;
  std::string text_;
};

#ifdef DREX_HPP_EXCEPTIONS
class exception : public std::runtime_error {
 public:
  explicit exception(const drex::error &e)
      : std::runtime_error(e.text()), status_(e.status()) {}
  drex_status status() const noexcept { return status_; }

 private:
  drex_status status_;
};
#endif

// A value or an error; what std::expected is from C++23 on.
template <class T>
class [[nodiscard]] result {
 public:
  using value_type = T;

  result(T value) : v_(std::in_place_index<0>, std::move(value)) {}
  result(drex::error e) : v_(std::in_place_index<1>, std::move(e)) {}

  bool has_value() const noexcept { return v_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }

  // Only where there is a value.
  T &operator*() & noexcept { return *checked(); }
  const T &operator*() const & noexcept {
    return *const_cast<result *>(this)->checked();
  }
  T &&operator*() && noexcept { return std::move(*checked()); }
  T *operator->() noexcept { return checked(); }
  const T *operator->() const noexcept {
    return const_cast<result *>(this)->checked();
  }
  // Only where there is none.
  const drex::error &error() const noexcept {
    assert(!has_value());
    return *std::get_if<1>(&v_);
  }
  drex_status status() const noexcept {
    return has_value() ? DREX_OK : error().status();
  }
  template <class U>
  T value_or(U &&other) && {
    return has_value() ? std::move(**this) : static_cast<T>(std::forward<U>(other));
  }
#ifdef DREX_HPP_EXCEPTIONS
  T &value() & {
    if (!has_value()) throw drex::exception(error());
    return **this;
  }
  T &&value() && {
    if (!has_value()) throw drex::exception(error());
    return std::move(**this);
  }
#endif

 private:
  T *checked() noexcept {
    assert(has_value());
    return std::get_if<0>(&v_);
  }
  std::variant<T, drex::error> v_;
};

template <>
class [[nodiscard]] result<void> {
 public:
  using value_type = void;

  result() = default;
  result(drex::error e) : error_(std::move(e)) {}

  // What a call of drex.h returned, right after it.
  static result of(drex_status status) {
    return status == DREX_OK ? result() : result(drex::error::last(status));
  }

  bool has_value() const noexcept { return !error_; }
  explicit operator bool() const noexcept { return has_value(); }
  const drex::error &error() const noexcept {
    assert(error_);
    return *error_;
  }
  drex_status status() const noexcept {
    return error_ ? error_->status() : DREX_OK;
  }
#ifdef DREX_HPP_EXCEPTIONS
  void value() const {
    if (error_) throw drex::exception(*error_);
  }
#endif

 private:
  std::optional<drex::error> error_;
};

// -- Spans ---------------------------------------------------------------------

// Elements that somebody else owns. std::span, which comes with C++20, converts.
template <class T>
class span {
 public:
  constexpr span() noexcept = default;
  constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  // std::array, std::vector, std::span, another span: what has data() and size().
  template <class C, class = std::enable_if_t<std::is_convertible_v<
                         std::remove_pointer_t<decltype(std::declval<C &>().data())> (*)[],
                         T (*)[]>>,
            class = decltype(std::declval<C &>().size())>
  constexpr span(C &&c) noexcept : data_(c.data()), size_(c.size()) {}

  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }
  constexpr T &operator[](std::size_t i) const noexcept {
    assert(i < size_);
    return data_[i];
  }
  constexpr span first(std::size_t n) const noexcept {
    assert(n <= size_);
    return {data_, n};
  }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};

namespace detail {
// Lengths are 32 bits wide in drex.h. A longer array is one with room to spare.
inline std::uint32_t count(std::size_t n) noexcept {
  return n > UINT32_MAX ? UINT32_MAX : static_cast<std::uint32_t>(n);
}
}  // namespace detail

// -- Constants -----------------------------------------------------------------

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

inline const char *version() noexcept { return drex_version(); }
inline std::uint32_t abi_version() noexcept { return drex_abi_version(); }
// NULL when this library does not know it.
inline const char *name(policy p) noexcept {
  return drex_policy_name(static_cast<drex_policy>(p));
}
inline const char *name(metric m) noexcept {
  return drex_metric_name(static_cast<drex_metric>(m));
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

// -- Structs -------------------------------------------------------------------

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
  config &thresholds(span<const float> one_per_ramp) noexcept {
    ramp_thresholds = one_per_ramp.data();
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

using row = drex_row;
using request_info = drex_request_info;
using stats = drex_stats;

struct verdict : drex_verdict {
  drex::decision what() const noexcept {
    return static_cast<drex::decision>(decision);
  }
  bool exits() const noexcept { return decision == DREX_DECISION_EXIT; }
};
static_assert(sizeof(verdict) == sizeof(drex_verdict), "arrays of both are alike");

// -- Handles -------------------------------------------------------------------

// A planned step. Ends with complete(); abandoned if it goes out of scope before.
// Must not outlive its engine.
class step {
 public:
  step(step &&other) noexcept
      : engine_(std::exchange(other.engine_, nullptr)),
        step_(other.step_),
        rows_(other.rows_) {}
  step &operator=(step &&other) noexcept {
    if (this != &other) {
      abandon();
      engine_ = std::exchange(other.engine_, nullptr);
      step_ = other.step_;
      rows_ = other.rows_;
    }
    return *this;
  }
  ~step() { abandon(); }

  // Whether there is nothing to run.
  bool empty() const noexcept { return step_.n_rows == 0; }
  // In the order in which the host runs them; they lie in what plan() was given.
  span<const row> rows() const noexcept { return rows_; }
  std::uint32_t layer_begin() const noexcept { return step_.layer_begin; }
  std::uint32_t layer_end() const noexcept { return step_.layer_end; }
  // None: the window ends at the last layer, sample every row.
  std::optional<std::uint32_t> ramp() const noexcept {
    if (step_.ramp == DREX_NO_RAMP) return std::nullopt;
    return step_.ramp;
  }
  drex_flush_reason reason() const noexcept { return step_.reason; }

  // drex_ramp(). Verdicts go into `room`, one per row; the result is that part
  // of it. `cells` may be empty when no K/V is bound.
  result<span<verdict>> ramp(const drex_logits &at, span<const std::uint32_t> cells,
                             span<verdict> room) {
    if (!cells.empty() && cells.size() < step_.n_rows) {
      return short_array("cells", cells.size());
    }
    const drex_status s =
        drex_ramp(engine_, &at, cells.empty() ? nullptr : cells.data(), room.data(),
                  detail::count(room.size()));
    if (s != DREX_OK) return error::last(s);
    return room.first(step_.n_rows);
  }
  // drex_fill().
  result<void> fill() { return result<void>::of(drex_fill(engine_)); }
  // drex_verify(). Decisions, DREX_DECISION_*, go into `room`, one per row.
  result<span<drex_decision>> verify(span<const std::uint8_t> agrees,
                                     span<drex_decision> room) {
    const drex_status s =
        drex_verify(engine_, agrees.data(), detail::count(agrees.size()), room.data(),
                    detail::count(room.size()));
    if (s != DREX_OK) return error::last(s);
    return room.first(step_.n_rows);
  }
  // drex_complete(). After a failure the step is still there.
  result<void> complete(std::uint64_t now_ns, std::uint64_t duration_ns = 0,
                        std::uint64_t n_kv = 0) {
    drex_completion c = DREX_COMPLETION_INITIALIZER;
    c.now_ns = now_ns;
    c.duration_ns = duration_ns;
    c.n_kv = n_kv;
    const drex_status s = drex_complete(engine_, &c);
    if (s != DREX_OK) return error::last(s);
    engine_ = nullptr;
    return {};
  }
  // drex_abandon(). Does nothing for a step that has ended.
  void abandon() noexcept {
    if (engine_ != nullptr && step_.n_rows != 0) drex_abandon(engine_);
    engine_ = nullptr;
  }

 private:
  friend class engine;
  step(drex_engine *e, const drex_step &s, span<const row> rows) noexcept
      : engine_(e), step_(s), rows_(rows) {}

  error short_array(const char *what, std::size_t n) const {
    return {DREX_ERROR_CAPACITY, std::string("step: ") + what + " has " +
                                     std::to_string(n) + " elements; expected " +
                                     std::to_string(step_.n_rows)};
  }

  drex_engine *engine_;
  drex_step step_;
  span<const row> rows_;
};

// One engine. May be moved, also between threads; used by one thread at a time.
class engine {
 public:
  static result<engine> create(const drex_config &c) {
    drex_engine *raw = nullptr;
    const drex_status s = drex_create(&c, &raw);
    if (s != DREX_OK) return error::last(s);
    return engine(raw);
  }
  engine(engine &&other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  engine &operator=(engine &&other) noexcept {
    if (this != &other) {
      drex_destroy(raw_);
      raw_ = std::exchange(other.raw_, nullptr);
    }
    return *this;
  }
  ~engine() { drex_destroy(raw_); }

  // For calls of drex.h; still owned here.
  drex_engine *get() const noexcept { return raw_; }
  // The caller destroys it.
  drex_engine *release() noexcept { return std::exchange(raw_, nullptr); }

  // drex_bind_kv(); an empty span unbinds. The tensors must outlive this.
  result<void> bind_kv(span<const kv_layer> layers) {
    return result<void>::of(drex_bind_kv(raw_, layers.empty() ? nullptr : layers.data(),
                                         detail::count(layers.size())));
  }
  result<void> add(const drex_request_config &r) {
    return result<void>::of(drex_request_add(raw_, &r));
  }
  result<void> ready(std::uint64_t id, std::uint64_t now_ns, std::uint32_t n_kv = 0) {
    return result<void>::of(drex_request_ready(raw_, id, n_kv, now_ns));
  }
  result<void> remove(std::uint64_t id) {
    return result<void>::of(drex_request_remove(raw_, id));
  }
  result<request_info> info(std::uint64_t id) const {
    drex_request_info i = DREX_REQUEST_INFO_INITIALIZER;
    const drex_status s = drex_request_get(raw_, id, &i);
    if (s != DREX_OK) return error::last(s);
    return i;
  }
  // drex_request_settle(): how many pending rows go deep.
  result<std::uint32_t> settle(std::uint64_t id, std::uint64_t now_ns) {
    std::uint32_t n = 0;
    const drex_status s = drex_request_settle(raw_, id, now_ns, &n);
    if (s != DREX_OK) return error::last(s);
    return n;
  }
  // drex_plan(). `room` holds the rows until the step ends.
  result<step> plan(std::uint64_t now_ns, span<row> room) {
    drex_plan_input in = DREX_PLAN_INPUT_INITIALIZER;
    drex_step out = DREX_STEP_INITIALIZER;
    in.now_ns = now_ns;
    const drex_status s =
        drex_plan(raw_, &in, room.data(), detail::count(room.size()), &out);
    if (s != DREX_OK) return error::last(s);
    return step(raw_, out, span<const row>(room.data(), out.n_rows));
  }
  result<void> observe(const drex_observation &o) {
    return result<void>::of(drex_observe(raw_, &o));
  }
  // drex_replan(): whether the search is done.
  result<bool> replan(std::uint32_t max_windows = 0) {
    std::uint32_t done = 0;
    const drex_status s = drex_replan(raw_, max_windows, &done);
    if (s != DREX_OK) return error::last(s);
    return done != 0;
  }
  // drex_profile_save() and _load(): JSON.
  result<std::string> save_profile() const {
    std::size_t length = 0;
    drex_status s = drex_profile_save(raw_, nullptr, 0, &length);
    if (s != DREX_OK) return error::last(s);
    std::string text(length + 1, '\0');
    s = drex_profile_save(raw_, &text[0], text.size(), &length);
    if (s != DREX_OK) return error::last(s);
    text.resize(length);
    return text;
  }
  result<void> load_profile(const char *json) {
    return result<void>::of(drex_profile_load(raw_, json));
  }
  result<drex::stats> stats() const {
    drex_stats out = DREX_STATS_INITIALIZER;
    const drex_status s = drex_stats_get(raw_, &out);
    if (s != DREX_OK) return error::last(s);
    return out;
  }

 private:
  explicit engine(drex_engine *raw) noexcept : raw_(raw) {}
  drex_engine *raw_;
};

// A pool of K/V pages, drex.h chapter 6.
class pages {
 public:
  using copies = span<drex_page_copy>;

  static result<pages> create(std::uint32_t n_layers, std::uint32_t page_tokens,
                              std::uint32_t n_pages) {
    drex_pages_config c = DREX_PAGES_CONFIG_INITIALIZER;
    c.n_layers = n_layers;
    c.page_tokens = page_tokens;
    c.n_pages = n_pages;
    drex_pages *raw = nullptr;
    const drex_status s = drex_pages_create(&c, &raw);
    if (s != DREX_OK) return error::last(s);
    return pages(raw, n_layers);
  }
  pages(pages &&other) noexcept
      : raw_(std::exchange(other.raw_, nullptr)), n_layers_(other.n_layers_) {}
  pages &operator=(pages &&other) noexcept {
    if (this != &other) {
      drex_pages_destroy(raw_);
      raw_ = std::exchange(other.raw_, nullptr);
      n_layers_ = other.n_layers_;
    }
    return *this;
  }
  ~pages() { drex_pages_destroy(raw_); }
  drex_pages *get() const noexcept { return raw_; }

  // Block tables are [n_layers][n_blocks]; n_blocks comes from their length. The
  // copies that must be made lie in the part of `room` that is returned.
  result<copies> write(span<std::uint32_t> table, std::uint64_t pos,
                       std::uint32_t layer_begin, std::uint32_t layer_end,
                       copies room) {
    std::uint32_t n = 0;
    const drex_status s =
        drex_pages_write(raw_, table.data(), blocks(table.size()), pos, layer_begin,
                         layer_end, room.data(), detail::count(room.size()), &n);
    if (s != DREX_OK) return error::last(s);
    return room.first(n);
  }
  result<copies> exit(span<std::uint32_t> table, std::uint64_t pos,
                      std::uint32_t exit_layer, copies room) {
    std::uint32_t n = 0;
    const drex_status s =
        drex_pages_exit(raw_, table.data(), blocks(table.size()), pos, exit_layer,
                        room.data(), detail::count(room.size()), &n);
    if (s != DREX_OK) return error::last(s);
    return room.first(n);
  }
  result<void> fork(span<const std::uint32_t> table, std::uint32_t first_block,
                    std::uint32_t count) {
    return result<void>::of(drex_pages_fork(raw_, table.data(), blocks(table.size()),
                                            first_block, count));
  }
  result<void> release(span<std::uint32_t> table, std::uint32_t first_block,
                       std::uint32_t count) {
    return result<void>::of(drex_pages_release(raw_, table.data(), blocks(table.size()),
                                               first_block, count));
  }
  result<drex_pages_stats> stats() const {
    drex_pages_stats out = DREX_PAGES_STATS_INITIALIZER;
    const drex_status s = drex_pages_stats_get(raw_, &out);
    if (s != DREX_OK) return error::last(s);
    return out;
  }

 private:
  pages(drex_pages *raw, std::uint32_t n_layers) noexcept
      : raw_(raw), n_layers_(n_layers) {}
  std::uint32_t blocks(std::size_t entries) const noexcept {
    return detail::count(entries / n_layers_);
  }
  drex_pages *raw_;
  std::uint32_t n_layers_;
};

// drex_speculate(): speculative sampling. An empty `draft`: its token was certain.
inline result<std::int32_t> speculate(span<const float> deep, span<const float> draft,
                                      std::int32_t draft_token, double u, double v) {
  if (!draft.empty() && draft.size() != deep.size()) {
    return error(DREX_ERROR_INVALID_ARGUMENT,
                 "speculate: draft has " + std::to_string(draft.size()) +
                     " elements; expected as many as deep, " +
                     std::to_string(deep.size()));
  }
  std::int32_t token = 0;
  const drex_status s =
      drex_speculate(deep.data(), draft.empty() ? nullptr : draft.data(),
                     detail::count(deep.size()), draft_token, u, v, &token);
  if (s != DREX_OK) return error::last(s);
  return token;
}

}  // namespace drex

#endif  // DREX_HPP
