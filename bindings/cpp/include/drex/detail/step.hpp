// SPDX-License-Identifier: Apache-2.0
//
// One planned step. Part of drex.hpp; include that.

#ifndef DREX_DETAIL_STEP_HPP
#define DREX_DETAIL_STEP_HPP

#include <optional>
#include <string>
#include <utility>

#include "types.hpp"

namespace drex {

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
  bool empty() const noexcept { return step_.n_rows == 0 && step_.n_prompt_rows == 0; }
  // In the order in which the host runs them; they lie in what plan() was given.
  span<const row> rows() const noexcept { return rows_; }
  // Prompt rows that run along, which are not among them.
  std::uint32_t n_prompt_rows() const noexcept { return step_.n_prompt_rows; }
  std::uint32_t layer_begin() const noexcept { return step_.layer_begin; }
  std::uint32_t layer_end() const noexcept { return step_.layer_end; }
  // None: the window ends at the last layer, sample every row. ramp() is called
  // only where there are rows.
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
    if (s != DREX_OK) return failed(s);
    return room.first(step_.n_rows);
  }
  // drex_fill().
  result<void> fill() { return done(drex_fill(engine_)); }
  // drex_fill_plan(), in place of fill(), where a graph captured the fill.
  result<void> fill_plan() { return done(drex_fill_plan(engine_)); }
  // drex_gather() and drex_scatter(): this step's rows of the arena to a dense
  // batch, and back.
  result<void> gather(const drex_arena &a) {
    return done(drex_gather(engine_, &a));
  }
  result<void> scatter(const drex_arena &a) {
    return done(drex_scatter(engine_, &a));
  }
  // drex_verify(). Judgements go into `room`, one per row; the result is that part
  // of it.
  result<span<judgement>> verify(span<const std::uint8_t> agrees,
                                 span<judgement> room) {
    // Never NULL: where arrays are empty, drex says what is wrong with the call.
    const std::uint8_t no_answer = 0;
    judgement nowhere{};
    const drex_status s = drex_verify(
        engine_, agrees.empty() ? &no_answer : agrees.data(),
        detail::count(agrees.size()),
        room.empty() ? &nowhere.decision : &room[0].decision,
        detail::count(room.size()));
    if (s != DREX_OK) return failed(s);
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
    if (s != DREX_OK) return failed(s);
    engine_ = nullptr;
    return {};
  }
  // drex_abandon(). Does nothing for a step that has ended.
  void abandon() noexcept {
    if (engine_ != nullptr && !empty()) drex_abandon(engine_);
    engine_ = nullptr;
  }

 private:
  friend class engine;
  step(drex_engine *e, const drex_step &s, span<const row> rows) noexcept
      : engine_(e), step_(s), rows_(rows) {}

  error failed(drex_status s) const {
    return error::last(s, engine_, "the step has ended, or was moved from");
  }
  result<void> done(drex_status s) const {
    return s == DREX_OK ? result<void>() : result<void>(failed(s));
  }
  error short_array(const char *what, std::size_t n) const {
    return {DREX_ERROR_CAPACITY, std::string("step: ") + what + " has " +
                                     std::to_string(n) + " elements; expected " +
                                     std::to_string(step_.n_rows)};
  }

  drex_engine *engine_;
  drex_step step_;
  span<const row> rows_;
};

}  // namespace drex

#endif  // DREX_DETAIL_STEP_HPP
