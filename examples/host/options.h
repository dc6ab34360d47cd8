// SPDX-License-Identifier: Apache-2.0
//
// The command line of the example host.

#pragma once

#include <drex.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

struct usage_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct options {
  std::string model = "models/ee-rustdoc-16l-q8_0.gguf";
  std::vector<std::string> prompts;
  std::vector<size_t> lengths = {48};
  uint32_t parallel = 4;
  std::vector<uint32_t> ramps = {8};
  float threshold = 0.7f;
  drex_policy policy = DREX_POLICY_HOLD;
  drex_fill_mode fill = DREX_FILL_COPY;
  std::map<uint64_t, size_t> cancel;
  std::set<uint64_t> fail;
  bool json = false;

  static void help() {
    std::puts(
        "usage: host [options]\n"
        "  -m FILE           GGUF model, llama architecture, q8_0 (models/ee-rustdoc-16l-q8_0.gguf)\n"
        "  -p TEXT           a prompt; may be repeated, each is a request\n"
        "  -f FILE           prompts, one per line, with \\n for line ends\n"
        "  -n N[,N...]       most tokens of the requests, in turn (48)\n"
        "  -np N             requests at a time (4)\n"
        "  --ramps L[,L...]  numbers of layers after which a token may exit (8)\n"
        "  --threshold T     confidence at which a token exits; above 1: never (0.7)\n"
        "  --policy NAME     auto, hold, latency, off, ... (hold)\n"
        "  --fill NAME       copy, propagate, postfill, verify (copy)\n"
        "  --cancel ID:N     request ID, from 0, goes away when it has N tokens\n"
        "  --fail N          the N-th window fails, once, and its step is given up; may be repeated\n"
        "  --json            one JSON object per request, and one with totals");
  }

  static unsigned long number(const std::string &name, const std::string &text) {
    char *end = nullptr;
    const unsigned long n = std::strtoul(text.c_str(), &end, 10);
    if (text.empty() || text[0] < '0' || text[0] > '9' || *end != 0 || n > 1000000) throw usage_error(name + ": '" + text + "' is not a number in range");
    return n;
  }

  template <class T>
  static std::vector<T> numbers(const std::string &name, const std::string &text) {
    std::vector<T> out;
    for (size_t at = 0;;) {
      const size_t comma = text.find(',', at);
      out.push_back(static_cast<T>(number(name, text.substr(at, comma - at))));
      if (comma == std::string::npos) return out;
      at = comma + 1;
    }
  }

  static std::string unescaped(const std::string &line) {
    std::string out;
    for (size_t i = 0; i < line.size(); i++) {
      if (line[i] == '\\' && i + 1 < line.size() && line[i + 1] == 'n') out += '\n', i++;
      else out += line[i];
    }
    return out;
  }

  // Returns false where the user asked for help.
  bool parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
      const std::string name = argv[i];
      if (name == "-h" || name == "--help") return help(), false;
      if (name == "--json") {
        json = true;
        continue;
      }
      if (i + 1 == argc) throw usage_error(name + ": unknown, or its value is missing");
      const std::string value = argv[++i];
      if (name == "-m") model = value;
      else if (name == "-p") prompts.push_back(value);
      else if (name == "-f") {
        std::ifstream in(value);
        if (!in) throw usage_error("-f: cannot read " + value);
        for (std::string line; std::getline(in, line);)
          if (!line.empty()) prompts.push_back(unescaped(line));
      } else if (name == "-n") lengths = numbers<size_t>(name, value);
      else if (name == "-np") parallel = static_cast<uint32_t>(number(name, value));
      else if (name == "--ramps") ramps = numbers<uint32_t>(name, value);
      else if (name == "--threshold") {
        char *end = nullptr;
        threshold = std::strtof(value.c_str(), &end);
        if (value.empty() || *end != 0) throw usage_error("--threshold: '" + value + "' is not a number");
      } else if (name == "--policy") {
        if (drex_policy_from_name(value.c_str(), &policy) != DREX_OK) throw usage_error("--policy: there is no '" + value + "'");
      } else if (name == "--fill") {
        const std::map<std::string, drex_fill_mode> fills = {
            {"copy", DREX_FILL_COPY}, {"propagate", DREX_FILL_PROPAGATE}, {"postfill", DREX_FILL_POSTFILL}, {"verify", DREX_FILL_VERIFY}};
        const auto found = fills.find(value);
        if (found == fills.end()) throw usage_error("--fill: there is no '" + value + "'");
        fill = found->second;
      } else if (name == "--cancel") {
        const size_t colon = value.find(':');
        if (colon == std::string::npos) throw usage_error("--cancel: expected ID:N");
        cancel[number(name, value.substr(0, colon))] = number(name, value.substr(colon + 1));
      } else if (name == "--fail") {
        fail.insert(number(name, value));
      } else throw usage_error(name + ": unknown option");
    }
    if (prompts.empty()) prompts = {"Returns the number of elements in the", "Creates an empty map", "# Panics\n\nPanics if", "This function will"};
    if (parallel < 1 || parallel > 1024) throw usage_error("-np: expected 1 to 1024");
    for (const size_t n : lengths)
      if (n < 1) throw usage_error("-n: expected at least 1");
    return true;
  }
};
