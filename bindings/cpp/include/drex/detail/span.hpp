// SPDX-License-Identifier: Apache-2.0
//
// Pointer and length. Part of drex.hpp; include that.

#ifndef DREX_DETAIL_SPAN_HPP
#define DREX_DETAIL_SPAN_HPP

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace drex {

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

}  // namespace drex

#endif  // DREX_DETAIL_SPAN_HPP
