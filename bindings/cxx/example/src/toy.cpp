// SPDX-License-Identifier: Apache-2.0

#include "toy.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "drex-cxx/src/lib.rs.h"

namespace toy {
namespace {

constexpr std::uint32_t layers = 6, ramp = 2, row_bytes = 4;

class Toy : public drex::model::Model {
 public:
  Toy(std::uint32_t requests, std::uint32_t tokens, std::uint32_t fail_at)
      : tokens_(tokens),
        fail_at_(fail_at),
        next_(requests),
        cache_(2 * layers, std::vector<std::uint8_t>(requests * tokens * row_bytes)) {}

  std::uint32_t n_layers() const override { return layers; }
  std::uint32_t n_vocab() const override { return tokens_ + 1; }
  rust::Vec<std::uint32_t> ramp_layers() const override { return {ramp}; }
  drex::model::Kv kv(std::uint32_t layer) override {
    return {cache_[2 * layer].data(), cache_[2 * layer + 1].data(),
            static_cast<std::uint32_t>(next_.size()) * tokens_, row_bytes};
  }
  std::uint32_t cell(const drex::model::Row &row) const override {
    return static_cast<std::uint32_t>(row.request) * tokens_ + next_[row.request];
  }

  void run(std::uint32_t layer_begin, std::uint32_t layer_end,
           rust::Slice<const drex::model::Row> rows, rust::Slice<float> logits) override {
    if (++windows_ == fail_at_) throw std::runtime_error("out of toys");
    std::size_t i = 0;
    for (const auto &row : rows) {
      // A row that starts anew goes on from the token emitted last.
      if (layer_begin == 0) next_[row.request] = emitted(row);
      for (std::uint32_t l = layer_begin; l < layer_end; l++) {
        for (std::uint32_t side = 0; side < 2; side++) {
          std::fill_n(cache_[2 * l + side].begin() + cell(row) * row_bytes, row_bytes,
                      static_cast<std::uint8_t>(10 * side + l + 1));
        }
      }
      const std::uint32_t token = next_[row.request];
      float *out = logits.data() + i++ * n_vocab();
      std::fill_n(out, n_vocab(), 0.0f);
      if (layer_end == layers || token % 2 == 0) out[token] = 20.0f;
    }
  }

  std::int32_t sample(const drex::model::Row &, rust::Slice<const float> l) override {
    return static_cast<std::int32_t>(std::max_element(l.begin(), l.end()) - l.begin());
  }

  std::uint32_t right() const {
    std::uint32_t n = 0;
    for (std::uint32_t c = 0; c < next_.size() * tokens_; c++) {
      bool all = true;
      for (std::uint32_t l = 0; l < layers; l++) {
        const std::uint32_t from = c % tokens_ % 2 == 0 ? std::min(l + 1, ramp) : l + 1;
        all &= cache_[2 * l][c * row_bytes] == from;
        all &= cache_[2 * l + 1][c * row_bytes + row_bytes - 1] == from + 10;
      }
      n += all;
    }
    return n;
  }

 private:
  // The first cell of the request that nothing was written to: its next token.
  std::uint32_t emitted(const drex::model::Row &row) const {
    std::uint32_t t = 0;
    const auto base = static_cast<std::uint32_t>(row.request) * tokens_;
    while (t + 1 < tokens_ && cache_[2 * layers - 1][(base + t) * row_bytes] != 0) t++;
    return t;
  }

  std::uint32_t tokens_, fail_at_, windows_ = 0;
  std::vector<std::uint32_t> next_;  // of each request
  std::vector<std::vector<std::uint8_t>> cache_;
};

}  // namespace

std::unique_ptr<drex::model::Model> make_toy(std::uint32_t requests,
                                             std::uint32_t tokens,
                                             std::uint32_t fail_at) {
  return std::make_unique<Toy>(requests, tokens, fail_at);
}

std::uint32_t filled_right(const drex::model::Model &model) {
  return static_cast<const Toy &>(model).right();
}

}  // namespace toy
