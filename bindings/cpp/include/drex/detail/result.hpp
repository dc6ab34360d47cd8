// SPDX-License-Identifier: Apache-2.0
//
// A value or an error. Part of drex.hpp; include that.

#ifndef DREX_DETAIL_RESULT_HPP
#define DREX_DETAIL_RESULT_HPP

#include <cassert>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#ifdef DREX_HPP_EXCEPTIONS
#include <stdexcept>
#endif

namespace drex {

// Why a call failed: DREX_ERROR_* and its text, which names the call, the field
// and the value.
class error {
 public:
  error(drex_status status, std::string text)
      : status_(status), text_(std::move(text)) {}

  // The calling thread's last error, right after a call that failed.
  static error last(drex_status status) { return {status, drex_last_error()}; }
  // The same for a call on an object that may own nothing any more. Its text then
  // says what became of the object.
  static error last(drex_status status, const void *handle, const char *gone) {
    if (handle != nullptr) return last(status);
    const std::string text = drex_last_error();
    return {status, text.substr(0, text.find(": ") + 2) + gone};
  }

  drex_status status() const noexcept { return status_; }
  const char *name() const noexcept { return drex_status_name(status_); }
  // What the status means in general.
  const char *meaning() const noexcept { return drex_status_text(status_); }
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

}  // namespace drex

#endif  // DREX_DETAIL_RESULT_HPP
