// SPDX-License-Identifier: Apache-2.0
//
// Paged K/V. Part of drex.hpp; include that.

#ifndef DREX_DETAIL_PAGES_HPP
#define DREX_DETAIL_PAGES_HPP

#include <utility>

#include "types.hpp"

namespace drex {

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
    if (s != DREX_OK) return failed(s);
    return room.first(n);
  }
  result<copies> exit(span<std::uint32_t> table, std::uint64_t pos,
                      std::uint32_t exit_layer, copies room) {
    std::uint32_t n = 0;
    const drex_status s =
        drex_pages_exit(raw_, table.data(), blocks(table.size()), pos, exit_layer,
                        room.data(), detail::count(room.size()), &n);
    if (s != DREX_OK) return failed(s);
    return room.first(n);
  }
  result<void> fork(span<const std::uint32_t> table, std::uint32_t first_block,
                    std::uint32_t count) {
    return done(drex_pages_fork(raw_, table.data(), blocks(table.size()), first_block,
                                count));
  }
  result<void> release(span<std::uint32_t> table, std::uint32_t first_block,
                       std::uint32_t count) {
    return done(drex_pages_release(raw_, table.data(), blocks(table.size()),
                                   first_block, count));
  }
  result<drex_pages_stats> stats() const {
    drex_pages_stats out = DREX_PAGES_STATS_INITIALIZER;
    const drex_status s = drex_pages_stats_get(raw_, &out);
    if (s != DREX_OK) return failed(s);
    return out;
  }

 private:
  error failed(drex_status s) const {
    return error::last(s, raw_, "the pages were moved from");
  }
  result<void> done(drex_status s) const {
    return s == DREX_OK ? result<void>() : result<void>(failed(s));
  }
  pages(drex_pages *raw, std::uint32_t n_layers) noexcept
      : raw_(raw), n_layers_(n_layers) {}
  std::uint32_t blocks(std::size_t entries) const noexcept {
    return detail::count(entries / n_layers_);
  }
  drex_pages *raw_;
  std::uint32_t n_layers_;
};

}  // namespace drex

#endif  // DREX_DETAIL_PAGES_HPP
