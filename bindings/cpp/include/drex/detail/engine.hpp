// SPDX-License-Identifier: Apache-2.0
//
// The engine. Part of drex.hpp; include that.

#ifndef DREX_DETAIL_ENGINE_HPP
#define DREX_DETAIL_ENGINE_HPP

#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "step.hpp"

namespace drex {

// One engine. May be moved, also between threads; used by one thread at a time.
class engine {
 public:
  static result<engine> create(const config &c) {
    if (!c.thresholds_fit()) {
      return error(DREX_ERROR_INVALID_ARGUMENT,
                   "engine::create: thresholds has " +
                       std::to_string(c.thresholds_.size()) +
                       " elements; expected one for each ramp, " +
                       std::to_string(c.n_ramps));
    }
    return create(static_cast<const drex_config &>(c));
  }
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
    return done(drex_bind_kv(raw_, layers.empty() ? nullptr : layers.data(),
                             detail::count(layers.size())));
  }
  result<void> add(const drex_request_config &r) {
    return done(drex_request_add(raw_, &r));
  }
  // drex_request_ready(), without its n_kv: drex does not use it.
  result<void> ready(std::uint64_t id, std::uint64_t now_ns) {
    return done(drex_request_ready(raw_, id, 0, now_ns));
  }
  result<void> remove(std::uint64_t id) {
    return done(drex_request_remove(raw_, id));
  }
  result<request_info> info(std::uint64_t id) const {
    drex_request_info i = DREX_REQUEST_INFO_INITIALIZER;
    const drex_status s = drex_request_get(raw_, id, &i);
    if (s != DREX_OK) return failed(s);
    return i;
  }
  // drex_request_settle(): how many pending rows go deep.
  result<std::uint32_t> settle(std::uint64_t id, std::uint64_t now_ns) {
    std::uint32_t n = 0;
    const drex_status s = drex_request_settle(raw_, id, now_ns, &n);
    if (s != DREX_OK) return failed(s);
    return n;
  }
  // drex_request_audit(), where info().audit_due is 1.
  result<void> audit(std::uint64_t id, std::uint64_t n_tokens,
                     std::uint64_t n_differing) {
    return done(drex_request_audit(raw_, id, n_tokens, n_differing));
  }
  // drex_plan(). `room` holds the rows until the step ends; `n_prompt_rows` wait at
  // layer 0.
  result<step> plan(std::uint64_t now_ns, span<row> room,
                    std::uint32_t n_prompt_rows = 0) {
    drex_plan_input in = DREX_PLAN_INPUT_INITIALIZER;
    drex_step out = DREX_STEP_INITIALIZER;
    in.now_ns = now_ns;
    in.n_prompt_rows = n_prompt_rows;
    const drex_status s =
        drex_plan(raw_, &in, room.data(), detail::count(room.size()), &out);
    if (s != DREX_OK) return failed(s);
    return step(raw_, out, span<const row>(room.data(), out.n_rows));
  }
  result<void> observe(const drex_observation &o) {
    return done(drex_observe(raw_, &o));
  }
  // drex_replan(): whether the search is done.
  result<bool> replan(std::uint32_t max_windows = 0) {
    std::uint32_t done = 0;
    const drex_status s = drex_replan(raw_, max_windows, &done);
    if (s != DREX_OK) return failed(s);
    return done != 0;
  }
  // drex_profile_save() and _load(): JSON.
  result<std::string> save_profile() const {
    return text([this](char *to, std::size_t room, std::size_t *length) {
      return drex_profile_save(raw_, to, room, length);
    });
  }
  result<void> load_profile(const char *json) {
    return done(drex_profile_load(raw_, json));
  }
  result<drex::stats> stats() const {
    drex_stats out = DREX_STATS_INITIALIZER;
    const drex_status s = drex_stats_get(raw_, &out);
    if (s != DREX_OK) return failed(s);
    return out;
  }
  // drex_top_get(): the greatest logits of a row of the last ramp's, whose logits
  // had n_top > 0, until its step ends. They go into `room`; the result is that
  // part of it.
  result<span<top>> top_of(std::uint32_t row, span<top> room) const {
    std::uint32_t n = 0;
    const drex_status s =
        drex_top_get(raw_, row, room.data(), detail::count(room.size()), &n);
    if (s != DREX_OK) return failed(s);
    return room.first(n);
  }

  // CUDA, drex.h chapter 7. drex_ramp_enqueue(): step::ramp() with the same logits
  // and enqueued = 1 comes later. drex_fill_enqueue(): for a capture of `stream`.
  result<void> ramp_enqueue(const drex_logits &at) {
    return done(drex_ramp_enqueue(raw_, &at));
  }
  result<void> fill_enqueue(void *stream) {
    return done(drex_fill_enqueue(raw_, stream));
  }

  // drex_log_set(): events go to `sink(log_level, std::string_view)`, on the thread
  // and inside the call that caused them. It is not copied, and must live as long as
  // the engine (whose end is an event, too) or until another takes its place. It
  // must be noexcept: nothing may be thrown through drex.
  template <class Sink>
  result<void> log_set(Sink &sink, log_level level) {
    static_assert(std::is_nothrow_invocable_v<Sink &, log_level, std::string_view>,
                  "a log sink is noexcept, and takes (log_level, std::string_view)");
    const drex_log_callback call = [](void *to, drex_log_level at,
                                      const char *line) noexcept {
      (*static_cast<Sink *>(to))(static_cast<log_level>(at), std::string_view(line));
    };
    return done(drex_log_set(raw_, call, address(sink),
                             static_cast<drex_log_level>(level)));
  }
  // No events from now on.
  result<void> log_off() {
    return done(drex_log_set(raw_, nullptr, nullptr, DREX_LOG_OFF));
  }
  // drex_snapshot(): counters, queues and estimates as JSON.
  result<std::string> snapshot() const {
    return text([this](char *to, std::size_t room, std::size_t *length) {
      return drex_snapshot(raw_, to, room, length);
    });
  }
  // drex_metrics_text(), for Prometheus. `labels` as name="value", or NULL.
  result<std::string> metrics_text(const char *labels = nullptr) const {
    return text([this, labels](char *to, std::size_t room, std::size_t *length) {
      return drex_metrics_text(raw_, labels, to, room, length);
    });
  }
  result<void> trace_start(std::uint32_t max_events) {
    return done(drex_trace_start(raw_, max_events));
  }
  // drex_trace_write(): the text's parts go to `sink(std::string_view)`, before this
  // returns; noexcept as above.
  template <class Sink>
  result<void> trace_write(Sink &&sink) const {
    using plain = std::remove_reference_t<Sink>;
    static_assert(std::is_nothrow_invocable_v<plain &, std::string_view>,
                  "a trace sink is noexcept, and takes (std::string_view)");
    const drex_trace_sink call = [](void *to, const char *bytes,
                                    std::size_t n) noexcept {
      (*static_cast<plain *>(to))(std::string_view(bytes, n));
    };
    return done(drex_trace_write(raw_, call, address(sink)));
  }
  result<void> trace_stop() { return done(drex_trace_stop(raw_)); }

 private:
  template <class T>
  static void *address(T &of) noexcept {
    return const_cast<void *>(static_cast<const volatile void *>(std::addressof(of)));
  }
  // A text of drex's: first its length, then itself.
  template <class Call>
  result<std::string> text(Call call) const {
    std::size_t length = 0;
    drex_status s = call(nullptr, 0, &length);
    if (s != DREX_OK) return failed(s);
    std::string out(length + 1, '\0');
    s = call(&out[0], out.size(), &length);
    if (s != DREX_OK) return failed(s);
    out.resize(length);
    return out;
  }
  error failed(drex_status s) const {
    return error::last(s, raw_, "the engine was moved from or released");
  }
  result<void> done(drex_status s) const {
    return s == DREX_OK ? result<void>() : result<void>(failed(s));
  }
  explicit engine(drex_engine *raw) noexcept : raw_(raw) {}
  drex_engine *raw_;
};

}  // namespace drex

#endif  // DREX_DETAIL_ENGINE_HPP
