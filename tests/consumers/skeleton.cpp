// SPDX-License-Identifier: Apache-2.0
//
// What the C++ of bindings/README.md leaves to the host, made up: three requests
// of six tokens over a model that is sure of every other token. The test writes
// the page's blocks to skeleton.inc and callables.inc.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <drex.hpp>

static constexpr std::uint32_t batch = 4, n_vocab = 100;
static constexpr std::uint32_t layers = 16, requests = 3, tokens = 6;

static std::string logged, traced;
static void write_line(std::string_view line) { logged.append(line); }
static void write_part(std::string_view part) { traced.append(part); }

struct host {
  std::uint64_t clock = 0;
  std::array<std::uint32_t, requests> count{};  // tokens so far
  std::array<std::array<unsigned char, requests * tokens>, layers> k{}, v{};
  // Longer than a step, with what others left in it.
  std::vector<float> scores = std::vector<float>(2 * batch * n_vocab, 99.0f);
  bool right = true;
  std::uint32_t deep = 0;

  std::uint64_t now() { return clock += 1000; }
  std::uint32_t cell(const drex::row &row) const {
    return static_cast<std::uint32_t>(row.request) * tokens + count[row.request];
  }
  std::int32_t expected(std::uint64_t id) const {
    return static_cast<std::int32_t>(id + 10 * count[id]);
  }
  drex::span<const float> run_layers(std::uint32_t begin, std::uint32_t end,
                                     drex::span<const drex::row> rows) {
    for (std::size_t i = 0; i < rows.size(); i++) {
      const auto id = rows[i].request;
      for (auto l = begin; l < end; l++) k[l][cell(rows[i])] = v[l][cell(rows[i])] = 1;
      for (std::size_t t = 0; t < n_vocab; t++) scores[i * n_vocab + t] = 0.0f;
      if (end == layers || count[id] % 2 == 0) {
        scores[i * n_vocab + static_cast<std::size_t>(expected(id))] = 30.0f;
      }
    }
    return scores;
  }
  std::int32_t sample(const float *logits) {
    std::int32_t best = 0;
    for (std::int32_t t = 1; t < static_cast<std::int32_t>(n_vocab); t++) {
      if (logits[t] > logits[best]) best = t;
    }
    deep++;
    return best;
  }
  bool emit(std::uint64_t id, std::int32_t token) {
    right = right && token == expected(id);
    return ++count[id] < tokens;
  }
};

#include "callables.inc"
#include "skeleton.inc"

template <class R>
static void ok(const R &r) {
  if (r) return;
  std::fprintf(stderr, "%s\n", r.error().text().c_str());
  std::exit(1);
}

template <class T>
static T take(drex::result<T> r) {
  ok(r);
  return std::move(*r);
}

int main() {
  host yours;
  drex::engine engine = take(start());
  ok(watch(engine));
  std::array<drex::kv_layer, layers> kv;
  for (std::size_t l = 0; l < layers; l++) {
    kv[l].n_cells = requests * tokens;
    kv[l].k = yours.k[l].data();
    kv[l].v = yours.v[l].data();
    kv[l].k_row_bytes = kv[l].v_row_bytes = 1;
    kv[l].k_cell_stride = kv[l].v_cell_stride = 1;
  }
  ok(engine.bind_kv(kv));
  for (std::uint64_t id = 0; id < requests; id++) {
    ok(engine.add(drex::request(id)));
    ok(engine.ready(id, yours.now()));
  }
  while (take(iterate(engine, yours))) {
  }
  ok(save_trace(engine));
  std::uint32_t holes = 0;
  for (std::size_t l = 0; l < layers; l++) {
    for (const auto cell : yours.k[l]) holes += cell == 0;
    for (const auto cell : yours.v[l]) holes += cell == 0;
  }
  const auto stats = take(engine.stats());
  std::printf("drex %s: %u tokens at the ramp, %u deep, %s, %u holes, %u requests left; %s\n",
              drex::version(), static_cast<unsigned>(stats.exits[0]), yours.deep,
              yours.right ? "all right" : "wrong ones", holes,
              static_cast<unsigned>(stats.requests),
              logged.empty() || traced.empty() ? "nothing seen" : "seen");
  return 0;
}
