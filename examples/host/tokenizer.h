// SPDX-License-Identifier: Apache-2.0
//
// Byte-level BPE with the vocabulary and the merges of the GGUF file, split as GPT-2 does it. Bytes beyond ASCII count
// as letters, which differs from GPT-2 for punctuation and digits of other scripts only.

#pragma once

#include <climits>
#include <unordered_map>

#include "gguf.h"

class tokenizer {
 public:
  explicit tokenizer(const gguf::file &file) : tokens_(file.meta("tokenizer.ggml.tokens").texts) {
    if (file.text("tokenizer.ggml.model") != "gpt2") throw std::runtime_error("only byte-level BPE vocabularies are supported");
    for (size_t i = 0; i < tokens_.size(); i++) ids_[tokens_[i]] = static_cast<int32_t>(i);
    const auto &merges = file.meta("tokenizer.ggml.merges").texts;
    for (size_t i = 0; i < merges.size(); i++) ranks_[merges[i]] = static_cast<int>(i);
    bos_ = static_cast<int32_t>(file.number("tokenizer.ggml.bos_token_id"));
    eos_ = static_cast<int32_t>(file.number("tokenizer.ggml.eos_token_id"));
    add_bos_ = file.has("tokenizer.ggml.add_bos_token") && file.number("tokenizer.ggml.add_bos_token") != 0;
    // Printable bytes stand for themselves, the rest for code points from 256 on.
    int next = 256;
    for (int b = 0; b < 256; b++) {
      const bool plain = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      const int code = plain ? b : next++;
      symbol_[b] = code < 128 ? std::string(1, static_cast<char>(code))
                              : std::string{static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
      bytes_[symbol_[b]] = static_cast<char>(b);
    }
  }

  int32_t eos() const { return eos_; }

  std::vector<int32_t> encode(const std::string &text) const {
    std::vector<int32_t> out;
    if (add_bos_) out.push_back(bos_);
    for (size_t at = 0; at < text.size();) {
      const size_t n = piece(text, at);
      merge(text.substr(at, n), out);
      at += n;
    }
    return out;
  }

  std::string decode(int32_t token) const {
    const std::string &text = tokens_.at(static_cast<size_t>(token));
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const size_t n = static_cast<unsigned char>(text[at]) < 128 ? 1 : 2;
      const auto found = bytes_.find(text.substr(at, n));
      if (found == bytes_.end()) return text;  // a token that is no text, such as the end's
      out += found->second;
      at += n;
    }
    return out;
  }

 private:
  static bool letter(unsigned char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c >= 128; }
  static bool digit(unsigned char c) { return c >= '0' && c <= '9'; }
  static bool space(unsigned char c) { return c == ' ' || (c >= 9 && c <= 13); }

  // 's|'t|'re|'ve|'m|'ll|'d| ?letters| ?digits| ?others|spaces before a space|spaces
  static size_t piece(const std::string &text, size_t at) {
    const auto c = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : '\0'; };
    for (const char *suffix : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
      if (text.compare(at, std::strlen(suffix), suffix) == 0) return std::strlen(suffix);
    const size_t start = at + (c(at) == ' ' ? 1 : 0);
    size_t end = start;
    if (start < text.size() && !space(c(start))) {
      const auto kind = [&](size_t i) { return letter(c(i)) ? 0 : digit(c(i)) ? 1 : space(c(i)) ? 2 : 3; };
      while (end < text.size() && kind(end) == kind(start)) end++;
      return end - at;
    }
    end = at;
    while (end < text.size() && space(c(end))) end++;
    // The last space goes with what follows it.
    return end < text.size() && end - at > 1 ? end - at - 1 : end - at;
  }

  void merge(const std::string &piece, std::vector<int32_t> &out) const {
    std::vector<std::string> parts;
    for (const char c : piece) parts.push_back(symbol_[static_cast<unsigned char>(c)]);
    for (;;) {
      int best = INT_MAX;
      size_t where = 0;
      for (size_t i = 0; i + 1 < parts.size(); i++) {
        const auto found = ranks_.find(parts[i] + " " + parts[i + 1]);
        if (found != ranks_.end() && found->second < best) best = found->second, where = i;
      }
      if (best == INT_MAX) break;
      parts[where] += parts[where + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
    }
    for (const auto &part : parts) {
      const auto found = ids_.find(part);
      if (found == ids_.end()) throw std::runtime_error("the vocabulary has no token for a byte of the text");
      out.push_back(found->second);
    }
  }

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
  std::unordered_map<std::string, int> ranks_;
  std::string symbol_[256];
  std::unordered_map<std::string, char> bytes_;
  int32_t bos_ = 0, eos_ = 0;
  bool add_bos_ = false;
};
