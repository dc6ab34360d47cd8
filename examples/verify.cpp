// SPDX-License-Identifier: Apache-2.0
//
// The fill `verify`: a token that leaves at the ramp is a draft, and the full model judges it later. What the clients
// get is the full model's output, token for token.
//
//   cargo xtask install --build-tree
//   c++ -std=c++17 -Iinclude -Ibindings/cpp/include examples/verify.cpp -Ltarget/drex/tree -ldrex -o target/verify
//   LD_LIBRARY_PATH=target/drex/tree target/verify
//
// The toy counts, and leaves multiples of five out. Its shallow half does not know of that: it is sure of every number
// but multiples of three. "Yours" marks what a real engine does anyway. examples/verify.py is the same in Python.

#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <drex.hpp>

constexpr std::uint32_t layers = 8, ramp = 4, vocab = 64, requests = 3, max_pending = 3;
constexpr std::uint32_t rows_max = requests * (1 + max_pending);  // a request's own row, and its drafts
constexpr std::size_t length = 16;

static std::int32_t full_model(std::int32_t token) { return (token + 1) % 5 == 0 ? token + 2 : token + 1; }

// Yours: an engine that runs layers [begin, end) over several rows of a sequence.
struct toy {
  // Of each request: its tokens, drafts included. The first `sent` of them stand.
  std::array<std::vector<std::int32_t>, requests> tokens{{{1}, {11}, {31}}};
  std::array<std::size_t, requests> sent{{1, 1, 1}};
  std::array<std::int32_t, rows_max> arena{};  // a hidden state by slot: here a token
  std::vector<float> logits;

  std::size_t position(const drex::row &row) const { return tokens[row.request].size() - 1 - row.back; }

  void run_layers(std::uint32_t begin, std::uint32_t end, drex::span<const drex::row> rows) {
    logits.assign(rows.size() * vocab, 0.0f);
    for (std::size_t i = 0; i < rows.size(); i++) {
      std::int32_t &hidden = arena[rows[i].slot];
      if (begin == 0) hidden = tokens[rows[i].request][position(rows[i])];
      const std::int32_t next = end == layers ? full_model(hidden) : hidden + 1;
      logits[i * vocab + static_cast<std::size_t>(next)] = end == layers || next % 3 != 0 ? 20.0f : 0.5f;
    }
  }
  std::int32_t best(std::size_t row) const {
    std::int32_t best = 0;
    for (std::int32_t t = 1; t < static_cast<std::int32_t>(vocab); t++) {
      if (logits[row * vocab + static_cast<std::size_t>(t)] > logits[row * vocab + static_cast<std::size_t>(best)]) best = t;
    }
    return best;
  }
};

// At the ramp: what exits is a draft. It stays from the client until it stands.
static drex::result<void> at_ramp(drex::step &step, toy &yours) {
  std::array<drex::verdict, rows_max> room;
  const auto verdicts = step.ramp(drex::logits(yours.logits, vocab), {}, room);
  if (!verdicts) return verdicts.error();
  for (std::size_t i = 0; i < verdicts->size(); i++) {
    const drex::verdict &verdict = (*verdicts)[i];
    if (verdict.what() == drex::decision::exit) yours.tokens[step.rows()[i].request].push_back(verdict.token);
  }
  return {};
}

// ANCHOR: at_end
// After the last layer every row has the full model's logits. A row with `back > 0` drafted the token that follows its
// own: the host says whether the full model chooses the same, and drex what becomes of it.
static drex::result<void> at_end(drex::step &step, toy &yours) {
  const auto rows = step.rows();
  std::array<std::uint8_t, rows_max> agrees{};
  for (std::size_t i = 0; i < rows.size(); i++) {
    if (rows[i].back == 0) continue;
    const std::size_t draft = yours.position(rows[i]) + 1;
    if (yours.best(i) != yours.tokens[rows[i].request][draft]) continue;
    agrees[i] = draft + 1 == length ? 2 : 1;  // 2: the request's last token
  }
  std::vector<std::size_t> at;  // before tokens are taken back: positions count from the end
  for (const drex::row &row : rows) at.push_back(yours.position(row));

  std::array<drex::judgement, rows_max> room;
  const auto judged = step.verify({agrees.data(), rows.size()}, room);
  if (!judged) return judged.error();
  for (std::size_t i = 0; i < rows.size(); i++) {
    auto &tokens = yours.tokens[rows[i].request];
    auto &sent = yours.sent[rows[i].request];
    switch ((*judged)[i].what()) {
      case drex::decision::accept:  // yours: the draft goes to the client
        sent = at[i] + 2;
        break;
      case drex::decision::replace:  // the draft and what came after it never were
        tokens.resize(at[i] + 1);
        tokens.push_back(yours.best(i));
        sent = tokens.size();
        break;
      case drex::decision::exit:  // the request's own row, whose token is the full model's
        tokens.push_back(yours.best(i));
        sent = tokens.size();
        break;
      default: break;  // drop: the row followed a draft that was replaced
    }
  }
  return {};
}
// ANCHOR_END: at_end

// ANCHOR: go_on
// A request that has a new token is ready again. At its end its last drafts are settled first: they come back in later
// steps, and the request ends, or goes on where one of them is replaced.
static drex::result<void> go_on(drex::engine &engine, toy &yours, std::uint64_t id, std::uint64_t now) {
  if (yours.tokens[id].size() < length) return engine.ready(id, now);
  const auto pending = engine.settle(id, now);
  if (!pending) return pending.error();
  if (*pending > 0) return {};
  return engine.remove(id);
}
// ANCHOR_END: go_on

static drex::result<bool> iterate(drex::engine &engine, toy &yours, std::uint64_t now) {
  std::array<drex::row, rows_max> room;
  auto step = engine.plan(now, room);
  if (!step) return step.error();
  if (step->empty()) return false;
  const std::array<std::vector<std::int32_t>, requests> tokens = yours.tokens;
  const std::array<std::size_t, requests> sent = yours.sent;

  yours.run_layers(step->layer_begin(), step->layer_end(), step->rows());
  const auto done = step->ramp() ? at_ramp(*step, yours) : at_end(*step, yours);
  if (!done) return done.error();
  if (const auto ended = step->complete(now + 1000, 1000); !ended) return ended.error();

  for (std::uint64_t id = 0; id < requests; id++) {
    if (yours.tokens[id] == tokens[id] && yours.sent[id] == sent[id]) continue;
    if (const auto on = go_on(engine, yours, id, now); !on) return on.error();
  }
  return true;
}

static int fail(const drex::error &error) {
  std::fprintf(stderr, "%s\n", error.text().c_str());
  return 1;
}

int main() {
  const std::array<std::uint32_t, 1> ramps{{ramp}};
  drex::config config;
  config.ramps(ramps).use(drex::policy::hold).use(drex::fill::verify);
  config.n_layers = layers;
  config.n_slots = config.max_batch = rows_max;
  config.max_requests = requests;
  config.max_pending = max_pending;
  auto engine = drex::engine::create(config);
  if (!engine) return fail(engine.error());

  toy yours;
  std::uint64_t now = 0;
  for (std::uint64_t id = 0; id < requests; id++) {
    if (const auto added = engine->add(drex::request(id)); !added) return fail(added.error());
    if (const auto ready = engine->ready(id, now); !ready) return fail(ready.error());
  }
  for (;; now += 1000) {
    const auto ran = iterate(*engine, yours, now);
    if (!ran) return fail(ran.error());
    if (!*ran) break;
  }

  bool same = true;
  for (const auto &tokens : yours.tokens) {
    for (std::size_t i = 0; i < tokens.size(); i++) {
      std::printf(i == 0 ? "%d" : " %d", tokens[i]);
      same = same && (i == 0 || tokens[i] == full_model(tokens[i - 1]));
    }
    std::printf("\n");
    same = same && tokens.size() == length;
  }
  const auto stats = engine->stats();
  if (!stats) return fail(stats.error());
  std::printf("%u drafts, %u accepted; %s\n", static_cast<unsigned>(stats->drafts),
              static_cast<unsigned>(stats->drafts_accepted), same ? "the full model's output" : "not the full model's output");
  return same ? 0 : 1;
}
