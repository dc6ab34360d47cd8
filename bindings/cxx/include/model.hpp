// SPDX-License-Identifier: Apache-2.0
//
// What a model in C++ implements to be served from Rust, see ../src/lib.rs.

#pragma once

#include <cstdint>

#include "rust/cxx.h"

namespace drex::model {

struct Row;  // drex.h's drex_row
struct Kv;   // drex.h's drex_kv_layer, row layout

// Every function is called from the thread that calls the Rust side, one at a time.
// An exception of run() or sample() becomes an error in Rust, and the step is taken back.
class Model {
 public:
  virtual ~Model() = default;

  virtual std::uint32_t n_layers() const = 0;
  virtual std::uint32_t n_vocab() const = 0;
  // Strictly increasing, as drex_config.ramp_layers.
  virtual rust::Vec<std::uint32_t> ramp_layers() const = 0;
  // The cache of a layer. It must not move.
  virtual Kv kv(std::uint32_t layer) = 0;
  // The KV cell of a row's token.
  virtual std::uint32_t cell(const Row &row) const = 0;

  // Layers [layer_begin, layer_end) over the rows, in their order; `logits` is
  // [rows, n_vocab]. Hidden states enter and leave by Row::slot.
  virtual void run(std::uint32_t layer_begin, std::uint32_t layer_end,
                   rust::Slice<const Row> rows, rust::Slice<float> logits) = 0;
  // The token of a row that ran through the last layer.
  virtual std::int32_t sample(const Row &row, rust::Slice<const float> logits) = 0;
};

}  // namespace drex::model
