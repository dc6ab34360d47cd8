// SPDX-License-Identifier: Apache-2.0
//
// A decoder of the llama architecture in plain loops: q8_0 weights, f32 hidden states and K/V, no drex. What an engine
// must be able to do for drex is in two functions, window() and project(). Everything is computed row by row with the
// same operations in the same order, so a row's result does not depend on which rows share its window.

#pragma once

#include <cmath>
#include <memory>
#include <utility>

#include "gguf.h"

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) return std::ldexp(static_cast<float>(mantissa), -24) * (sign ? -1.0f : 1.0f);
  const uint32_t bits = exponent == 31 ? sign | 0x7f800000 | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Rounded to what binary16 can hold, for finite numbers in its normal range.
inline float rounded_to_half(float f) {
  int exponent;
  std::frexp(f, &exponent);
  const float unit = std::ldexp(1.0f, std::max(exponent, -13) - 11);
  return std::nearbyint(f / unit) * unit;
}

// q8_0: blocks of 32 numbers, a scale and 32 bytes each.
struct q8_matrix {
  size_t rows = 0, columns = 0;
  std::vector<int8_t> quants;
  std::vector<float> scales;

  q8_matrix() = default;
  explicit q8_matrix(const gguf::tensor &t) : rows(t.rows()), columns(t.columns()) {
    if (t.type != gguf::Q8_0) throw std::runtime_error("weight matrices must be q8_0");
    const size_t blocks = rows * columns / 32;
    quants.resize(blocks * 32);
    scales.resize(blocks);
    for (size_t b = 0; b < blocks; b++) {
      uint16_t scale;
      std::memcpy(&scale, t.data + b * 34, 2);
      scales[b] = half_to_float(scale);
      std::memcpy(&quants[b * 32], t.data + b * 34 + 2, 32);
    }
  }

  // Activations, quantised as the weights are.
  q8_matrix(const float *x, size_t n_rows, size_t n_columns)
      : rows(n_rows), columns(n_columns), quants(n_rows * n_columns), scales(n_rows * n_columns / 32) {
    for (size_t b = 0; b < scales.size(); b++) {
      float most = 0.0f;
      for (size_t i = 0; i < 32; i++) most = std::max(most, std::fabs(x[b * 32 + i]));
      scales[b] = rounded_to_half(most / 127.0f);
      const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
      for (size_t i = 0; i < 32; i++) quants[b * 32 + i] = static_cast<int8_t>(std::nearbyint(x[b * 32 + i] * inverse));
    }
  }

  float dot(size_t row, const q8_matrix &x, size_t x_row) const {
    const size_t blocks = columns / 32;
    float sum = 0.0f;
    for (size_t b = 0; b < blocks; b++) {
      const int8_t *w = &quants[(row * blocks + b) * 32], *a = &x.quants[(x_row * blocks + b) * 32];
      int32_t whole = 0;
      for (size_t i = 0; i < 32; i++) whole += w[i] * a[i];
      sum += static_cast<float>(whole) * scales[row * blocks + b] * x.scales[x_row * blocks + b];
    }
    return sum;
  }

  // [x.rows, rows]
  std::vector<float> times(const q8_matrix &x) const {
    std::vector<float> out(x.rows * rows);
    for (size_t r = 0; r < rows; r++)
      for (size_t i = 0; i < x.rows; i++) out[i * rows + r] = dot(r, x, i);
    return out;
  }
};

struct window_failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A row of a window, as the engine sees it.
struct model_row {
  int32_t token;      // read by windows that begin at layer 0
  uint32_t position;  // in its sequence
  uint32_t sequence;  // the sequence whose K/V it attends to
  uint32_t slot;      // its row of the arena
};

class model {
 public:
  // For n_sequences at a time, with n_slots rows in the arena.
  model(const gguf::file &file, uint32_t n_sequences, uint32_t n_slots) {
    if (file.text("general.architecture") != "llama") throw std::runtime_error("only the llama architecture is supported");
    const auto number = [&](const std::string &key) { return static_cast<uint32_t>(file.number("llama." + key)); };
    n_layers = number("block_count");
    context = number("context_length");
    width_ = number("embedding_length");
    heads_ = number("attention.head_count");
    kv_heads_ = number("attention.head_count_kv");
    head_ = file.has("llama.attention.key_length") ? number("attention.key_length") : width_ / heads_;
    epsilon_ = static_cast<float>(file.number("llama.attention.layer_norm_rms_epsilon"));
    rope_base_ = file.has("llama.rope.freq_base") ? static_cast<float>(file.number("llama.rope.freq_base")) : 10000.0f;
    embedding_ = q8_matrix(file.get("token_embd.weight"));
    n_vocab = static_cast<uint32_t>(embedding_.rows);
    output_norm_ = vector(file.get("output_norm.weight"));
    output_ = q8_matrix(file.get("output.weight"));
    for (uint32_t l = 0; l < n_layers; l++) {
      const auto get = [&](const char *name) -> const gguf::tensor & { return file.get("blk." + std::to_string(l) + "." + name + ".weight"); };
      layers_.push_back({vector(get("attn_norm")), vector(get("ffn_norm")), q8_matrix(get("attn_q")), q8_matrix(get("attn_k")),
                         q8_matrix(get("attn_v")), q8_matrix(get("attn_output")), q8_matrix(get("ffn_gate")),
                         q8_matrix(get("ffn_up")), q8_matrix(get("ffn_down"))});
    }
    n_cells = n_sequences * context;
    kv_width = kv_heads_ * head_;
    k.assign(n_layers, std::vector<float>(static_cast<size_t>(n_cells) * kv_width));
    v = k;
    arena_.resize(static_cast<size_t>(n_slots) * width_);
  }

  uint32_t n_layers, n_vocab, context, n_cells, kv_width;
  // [n_layers][n_cells * kv_width] each. A cell belongs to one position of one sequence.
  std::vector<std::vector<float>> k, v;

  // For --fail: the next window breaks off in its first layer, whose K/V it has written. No arena row has changed then.
  bool fail = false;

  uint32_t cell(const model_row &row) const { return row.sequence * context + row.position; }

  // ANCHOR: window
  // Runs layers [begin, end) over the rows. For the first n_logits of them it also runs the final norm and the head, which
  // are this model's ramp heads too, and returns logits [n_logits, n_vocab]. A window may have several rows of one
  // sequence: each attends to those before it.
  std::vector<float> window(uint32_t begin, uint32_t end, const std::vector<model_row> &rows, size_t n_logits) {
    std::vector<float> x(rows.size() * width_);
    for (size_t i = 0; i < rows.size(); i++) {
      if (begin == 0) embed(rows[i].token, &x[i * width_]);
      else std::memcpy(&x[i * width_], &arena_[rows[i].slot * width_], width_ * sizeof(float));
    }
    for (uint32_t l = begin; l < end; l++) layer(l, rows, x);
    if (end < n_layers)
      for (size_t i = 0; i < rows.size(); i++)
        std::memcpy(&arena_[rows[i].slot * width_], &x[i * width_], width_ * sizeof(float));
    x.resize(n_logits * width_);
    return output_.times(normed(x, output_norm_));
  }
  // ANCHOR_END: window

  // ANCHOR: project
  // State propagation: K and V of layers [begin, n_layers) from the rows' hidden states as they are.
  void project(uint32_t begin, const std::vector<model_row> &rows) {
    std::vector<float> x(rows.size() * width_);
    for (size_t i = 0; i < rows.size(); i++)
      std::memcpy(&x[i * width_], &arena_[rows[i].slot * width_], width_ * sizeof(float));
    for (uint32_t l = begin; l < n_layers; l++) write_kv(l, rows, normed(x, layers_[l].attention_norm));
  }
  // ANCHOR_END: project

 private:
  struct layer_weights {
    std::vector<float> attention_norm, ffn_norm;
    q8_matrix q, k, v, o, gate, up, down;
  };

  static std::vector<float> vector(const gguf::tensor &t) {
    if (t.type != gguf::F32) throw std::runtime_error("norm weights must be f32");
    std::vector<float> out(t.columns());
    std::memcpy(out.data(), t.data, out.size() * sizeof(float));
    return out;
  }

  void embed(int32_t token, float *out) const {
    const size_t row = static_cast<size_t>(token);
    for (size_t i = 0; i < width_; i++)
      out[i] = static_cast<float>(embedding_.quants[row * width_ + i]) * embedding_.scales[(row * width_ + i) / 32];
  }

  // RMS norm of each row, quantised for the matrix products that follow.
  q8_matrix normed(const std::vector<float> &x, const std::vector<float> &weight) const {
    std::vector<float> out(x.size());
    for (size_t at = 0; at < x.size(); at += width_) {
      double squares = 0.0;
      for (size_t i = 0; i < width_; i++) squares += static_cast<double>(x[at + i] * x[at + i]);
      const float scale = 1.0f / std::sqrt(static_cast<float>(squares / width_) + epsilon_);
      for (size_t i = 0; i < width_; i++) out[at + i] = x[at + i] * scale * weight[i];
    }
    return q8_matrix(out.data(), x.size() / width_, width_);
  }

  // Turns pairs of neighbours by angles that grow with the position.
  void rope(float *x, size_t n_heads, uint32_t position) const {
    for (size_t i = 0; i < head_; i += 2) {
      const float angle = static_cast<float>(position) * std::pow(rope_base_, -static_cast<float>(i) / static_cast<float>(head_));
      const float c = std::cos(angle), s = std::sin(angle);
      for (size_t h = 0; h < n_heads; h++) {
        float *p = x + h * head_ + i;
        const float a = p[0], b = p[1];
        p[0] = a * c - b * s;
        p[1] = a * s + b * c;
      }
    }
  }

  void write_kv(uint32_t l, const std::vector<model_row> &rows, const q8_matrix &in) {
    std::vector<float> new_k = layers_[l].k.times(in), new_v = layers_[l].v.times(in);
    for (size_t i = 0; i < rows.size(); i++) {
      rope(&new_k[i * kv_width], kv_heads_, rows[i].position);
      const size_t at = static_cast<size_t>(cell(rows[i])) * kv_width;
      std::memcpy(&k[l][at], &new_k[i * kv_width], kv_width * sizeof(float));
      std::memcpy(&v[l][at], &new_v[i * kv_width], kv_width * sizeof(float));
    }
  }

  // One query head over the cells of its row's sequence, up to the row's own position.
  void attend(uint32_t l, const model_row &row, size_t head, const float *q, float *out, std::vector<float> &weights) const {
    const size_t first = static_cast<size_t>(row.sequence) * context * kv_width + head / (heads_ / kv_heads_) * head_;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_));
    weights.resize(row.position + 1);
    float most = -INFINITY;
    for (size_t c = 0; c < weights.size(); c++) {
      float sum = 0.0f;
      for (size_t i = 0; i < head_; i++) sum += q[i] * k[l][first + c * kv_width + i];
      weights[c] = sum * scale;
      most = std::max(most, weights[c]);
    }
    float total = 0.0f;
    for (float &w : weights) total += w = std::exp(w - most);
    std::fill(out, out + head_, 0.0f);
    for (size_t c = 0; c < weights.size(); c++)
      for (size_t i = 0; i < head_; i++) out[i] += weights[c] / total * v[l][first + c * kv_width + i];
  }

  void layer(uint32_t l, const std::vector<model_row> &rows, std::vector<float> &x) {
    const layer_weights &w = layers_[l];
    const q8_matrix in = normed(x, w.attention_norm);
    write_kv(l, rows, in);
    if (std::exchange(fail, false)) throw window_failed("a window failed");
    std::vector<float> q = w.q.times(in), mixed(q.size()), weights;
    const size_t stride = heads_ * head_;
    for (size_t i = 0; i < rows.size(); i++) {
      rope(&q[i * stride], heads_, rows[i].position);
      for (size_t h = 0; h < heads_; h++) attend(l, rows[i], h, &q[i * stride + h * head_], &mixed[i * stride + h * head_], weights);
    }
    add(x, w.o.times(q8_matrix(mixed.data(), rows.size(), stride)));
    const q8_matrix ffn = normed(x, w.ffn_norm);
    std::vector<float> gate = w.gate.times(ffn);
    const std::vector<float> up = w.up.times(ffn);
    for (size_t i = 0; i < gate.size(); i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    add(x, w.down.times(q8_matrix(gate.data(), rows.size(), w.down.columns)));
  }

  static void add(std::vector<float> &x, const std::vector<float> &y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
  }

  size_t width_, heads_, kv_heads_, head_;
  float epsilon_, rope_base_;
  q8_matrix embedding_, output_;
  std::vector<float> output_norm_;
  std::vector<layer_weights> layers_;
  std::vector<float> arena_;  // [n_slots][width]
};
