// SPDX-License-Identifier: Apache-2.0
//
// Reads GGUF version 3: metadata and tensors of a file that is read into memory as a whole.

#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace gguf {

enum tensor_type : uint32_t { F32 = 0, F16 = 1, Q8_0 = 8 };

struct tensor {
  uint32_t type = F32;
  std::vector<uint64_t> shape;  // the fastest dimension first: [columns, rows]
  const uint8_t *data = nullptr;

  uint64_t columns() const { return shape.at(0); }
  uint64_t rows() const { return shape.size() > 1 ? shape[1] : 1; }
};

// A metadata value: one number or text, or a list of either.
struct value {
  std::vector<double> numbers;
  std::vector<std::string> texts;
};

class file {
 public:
  explicit file(const std::string &path) {
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    if (!in) throw std::runtime_error("cannot read " + path);
    bytes_.resize(static_cast<size_t>(in.tellg()));
    in.seekg(0);
    if (!in.read(reinterpret_cast<char *>(bytes_.data()), static_cast<std::streamsize>(bytes_.size())))
      throw std::runtime_error("cannot read " + path);
    parse();
  }
  file(const file &) = delete;
  file &operator=(const file &) = delete;

  const tensor &get(const std::string &name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::runtime_error("the model has no tensor " + name);
    return found->second;
  }
  bool has(const std::string &key) const { return values_.count(key) != 0; }

  const value &meta(const std::string &key) const {
    const auto found = values_.find(key);
    if (found == values_.end()) throw std::runtime_error("the model has no key " + key);
    return found->second;
  }
  double number(const std::string &key) const {
    const value &v = meta(key);
    if (v.numbers.size() != 1) throw std::runtime_error(key + " is not a number");
    return v.numbers[0];
  }
  std::string text(const std::string &key) const {
    const value &v = meta(key);
    if (v.texts.size() != 1) throw std::runtime_error(key + " is not a text");
    return v.texts[0];
  }

 private:
  template <class T>
  T take() {
    static_assert(std::is_arithmetic<T>::value, "");
    T v;
    std::memcpy(&v, bytes(sizeof v), sizeof v);
    return v;
  }
  const uint8_t *bytes(uint64_t n) {
    if (n > bytes_.size() - at_) throw std::runtime_error("the GGUF file ends early");
    const uint8_t *p = bytes_.data() + at_;
    at_ += n;
    return p;
  }
  std::string string() {
    const auto n = take<uint64_t>();
    const auto *p = reinterpret_cast<const char *>(bytes(n));
    return std::string(p, n);
  }
  void read(uint32_t type, value &out) {
    switch (type) {
      case 0: case 7: out.numbers.push_back(take<uint8_t>()); return;
      case 1: out.numbers.push_back(take<int8_t>()); return;
      case 2: out.numbers.push_back(take<uint16_t>()); return;
      case 3: out.numbers.push_back(take<int16_t>()); return;
      case 4: out.numbers.push_back(take<uint32_t>()); return;
      case 5: out.numbers.push_back(take<int32_t>()); return;
      case 6: out.numbers.push_back(static_cast<double>(take<float>())); return;
      case 8: out.texts.push_back(string()); return;
      case 10: out.numbers.push_back(static_cast<double>(take<uint64_t>())); return;
      case 11: out.numbers.push_back(static_cast<double>(take<int64_t>())); return;
      case 12: out.numbers.push_back(take<double>()); return;
      case 9: {
        const auto of = take<uint32_t>();
        if (of == 9) throw std::runtime_error("GGUF: a list of lists");
        for (auto n = take<uint64_t>(); n > 0; n--) read(of, out);
        return;
      }
      default: throw std::runtime_error("GGUF: unknown value type " + std::to_string(type));
    }
  }
  static uint64_t size_of(const tensor &t) {
    uint64_t n = 1;
    for (const uint64_t d : t.shape) {
      if (d == 0 || n > UINT32_MAX / d) throw std::runtime_error("GGUF: a tensor of an impossible shape");
      n *= d;
    }
    switch (t.type) {
      case F32: return n * 4;
      case F16: return n * 2;
      case Q8_0:
        if (t.shape[0] % 32 != 0) throw std::runtime_error("GGUF: q8_0 rows must be multiples of 32");
        return n / 32 * 34;
      default: throw std::runtime_error("tensors of GGML type " + std::to_string(t.type) + " are not supported, only f32, f16 and q8_0");
    }
  }
  void parse() {
    if (std::memcmp(bytes(4), "GGUF", 4) != 0) throw std::runtime_error("not a GGUF file");
    if (const auto version = take<uint32_t>(); version != 3)
      throw std::runtime_error("GGUF version " + std::to_string(version) + ", expected 3");
    const auto n_tensors = take<uint64_t>(), n_values = take<uint64_t>();
    for (uint64_t i = 0; i < n_values; i++) {
      const std::string key = string();
      read(take<uint32_t>(), values_[key]);
    }
    std::map<std::string, uint64_t> offsets;
    for (uint64_t i = 0; i < n_tensors; i++) {
      const std::string name = string();
      tensor &t = tensors_[name];
      const auto n_dims = take<uint32_t>();
      if (n_dims < 1 || n_dims > 4) throw std::runtime_error(name + " has " + std::to_string(n_dims) + " dimensions");
      for (uint32_t d = 0; d < n_dims; d++) t.shape.push_back(take<uint64_t>());
      t.type = take<uint32_t>();
      offsets[name] = take<uint64_t>();
    }
    const uint64_t align = has("general.alignment") ? static_cast<uint64_t>(number("general.alignment")) : 32;
    if (align == 0) throw std::runtime_error("general.alignment is 0");
    const uint64_t base = (at_ + align - 1) / align * align;
    for (auto &[name, t] : tensors_) {
      const uint64_t size = size_of(t), offset = offsets[name];
      if (base > bytes_.size() || offset > bytes_.size() - base || size > bytes_.size() - base - offset)
        throw std::runtime_error(name + " lies outside of the file");
      t.data = bytes_.data() + base + offset;
    }
  }

  std::vector<uint8_t> bytes_;
  uint64_t at_ = 0;
  std::map<std::string, value> values_;
  std::map<std::string, tensor> tensors_;
};

}  // namespace gguf
