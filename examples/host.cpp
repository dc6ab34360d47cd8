// SPDX-License-Identifier: Apache-2.0
//
// A complete host: a small decoder that loads a GGUF file and serves several requests at once, with early exit and
// rebatching by drex. This is the page to read when you put drex into an engine of your own. The engine is in
// host/model.h: plain loops that know nothing of drex. This file has all that drex needs of an engine.
// docs/concepts.md explains the words.
//
//   cargo xtask install --build-tree
//   c++ -std=c++17 -O3 -Iinclude examples/host.cpp -Ltarget/drex/tree -ldrex -o target/host
//   LD_LIBRARY_PATH=target/drex/tree target/host -p "Returns the number of" -p "Creates an empty" -n 48

#include <drex.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <deque>
#include <map>

#include "host/gguf.h"
#include "host/model.h"
#include "host/options.h"
#include "host/tokenizer.h"

namespace {

// drex returns a status and leaves a text. This host ends at a failure; yours may fail one request.
void check(drex_status status) {
  if (status != DREX_OK) throw std::runtime_error(drex_last_error());
}

uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

struct produced {
  int32_t token;
  uint32_t layers;   // how many it went through
  float confidence;  // at the first ramp; NaN without a ramp
  double nll;        // of the token, from the logits that it was chosen by
};

struct request {
  uint64_t id = 0;
  size_t limit = 0;
  uint32_t sequence = 0;  // the sequence whose K/V cells it has
  std::vector<int32_t> prompt, tokens;  // tokens: prompt and output; the newest has not run yet
  uint32_t started = 0;                 // prompt rows that a window has taken
  std::vector<produced> output;         // under `verify`, the last ones may be drafts
  float confidence = NAN;               // of the newest row
  bool cancelled = false;

  bool finished(int32_t eos) const { return output.size() >= limit || (!output.empty() && output.back().token == eos); }
};

int32_t best(const float *logits, uint32_t n) { return static_cast<int32_t>(std::max_element(logits, logits + n) - logits); }

double nll(const float *logits, uint32_t n, int32_t token) {
  const double most = logits[best(logits, n)];
  double sum = 0.0;
  for (uint32_t i = 0; i < n; i++) sum += std::exp(logits[i] - most);
  return std::log(sum) + most - logits[token];
}

class host {
 public:
  host(const gguf::file &file, const options &o)
      : options_(o), tokenizer_(file), keeps_rows_(o.fill == DREX_FILL_POSTFILL || o.fill == DREX_FILL_VERIFY),
        // Requests that keep pending rows want room for them in the arena and in a window.
        n_slots_(o.parallel * (keeps_rows_ ? 1 + max_pending : 1)),
        // Prompt rows that wait at a ramp have arena rows beyond drex's.
        n_window_rows_(n_slots_ + prompt_chunk), model_(file, o.parallel, n_slots_ + n_window_rows_), rows_(n_slots_) {
    // ANCHOR: create
    drex_config config = DREX_CONFIG_INITIALIZER;
    config.n_layers = model_.n_layers;
    config.n_ramps = static_cast<uint32_t>(o.ramps.size());
    config.ramp_layers = o.ramps.data();
    config.n_slots = n_slots_;
    config.max_batch = n_slots_;
    config.max_pass_rows = n_window_rows_;
    config.max_requests = o.parallel;
    config.policy = o.policy;
    config.fill = o.fill;
    config.threshold = o.threshold;
    config.max_pending = max_pending;
    check(drex_create(&config, &engine_));
    try {
      bind();
    } catch (...) {
      drex_destroy(engine_);
      throw;
    }
    // ANCHOR_END: create
    for (uint32_t s = o.parallel; s-- > 0;) free_sequences_.push_back(s);
  }
  ~host() { drex_destroy(engine_); }
  host(const host &) = delete;
  host &operator=(const host &) = delete;

  void submit(request r) { waiting_.push_back(std::move(r)); }

  // ANCHOR: loop
  void run() {
    for (;;) {
      admit();
      drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
      drex_step step = DREX_STEP_INITIALIZER;
      input.now_ns = now_ns();
      input.n_prompt_rows = prompt_rows();
      check(drex_plan(engine_, &input, rows_.data(), n_slots_, &step));
      if (step.n_rows == 0 && step.n_prompt_rows == 0) return;  // a server would wait for a request here

      const std::vector<model_row> rows = translate(step.n_rows);
      if (step.layer_begin == 0) take_prompts(step.n_prompt_rows);
      const std::vector<model_row> all = with_prompts(rows, step);
      const uint64_t start = now_ns();
      std::vector<float> logits;
      model_.fail = options_.fail.count(++n_windows_) != 0;
      try {
        logits = model_.window(step.layer_begin, step.layer_end, all, rows.size());
      } catch (const window_failed &) {
        // No row has left. The arena rows are as they were, since the model writes them last. So all rows come again.
        // Prompt rows start again at layer 0. A server counts failures, and ends requests whose windows fail for good.
        n_failed_++;
        check(drex_abandon(engine_));
        if (step.n_prompt_rows > 0) forget_prompts();
        continue;
      }
      uint64_t duration = now_ns() - start;

      cancel();  // clients go away at any time, here in the middle of a step
      advanced_.clear();
      // A window may have prompt rows alone. Then no ramp is due, and nothing is sampled.
      if (step.n_rows > 0 && step.ramp != DREX_NO_RAMP) duration += at_ramp(step, rows, logits);
      else if (step.n_rows > 0) at_end(step, rows, logits);

      drex_completion completion = DREX_COMPLETION_INITIALIZER;
      completion.now_ns = now_ns();
      completion.duration_ns = duration;
      for (const model_row &row : rows) completion.n_kv += row.position + 1;
      check(drex_complete(engine_, &completion));
      if (step.n_prompt_rows > 0 && step.ramp == DREX_NO_RAMP) prompts_ran();
      for (const uint64_t id : advanced_) go_on(id);
    }
  }
  // ANCHOR_END: loop

  drex_stats stats() const {
    drex_stats s = DREX_STATS_INITIALIZER;
    check(drex_stats_get(engine_, &s));
    return s;
  }
  uint32_t slots() const { return n_slots_; }
  uint64_t failed() const { return n_failed_; }
  const tokenizer &vocabulary() const { return tokenizer_; }
  const std::map<uint64_t, request> &done() const { return done_; }

 private:
  static constexpr uint32_t max_pending = 4;
  static constexpr uint32_t prompt_chunk = 16;  // prompt rows in a window that has all decode rows too

  // ANCHOR: bind
  // Tells drex where K and V lie, for state-copy. The other fills need no binding, and a binding does no harm there.
  void bind() {
    std::vector<drex_kv_layer> layers;
    for (uint32_t l = 0; l < model_.n_layers; l++) {
      drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
      layer.n_cells = model_.n_cells;
      layer.k = model_.k[l].data();
      layer.v = model_.v[l].data();
      layer.k_row_bytes = layer.k_cell_stride = model_.kv_width * sizeof(float);
      layer.v_row_bytes = layer.v_cell_stride = model_.kv_width * sizeof(float);
      layers.push_back(layer);
    }
    check(drex_bind_kv(engine_, layers.data(), model_.n_layers));
  }
  // ANCHOR_END: bind

  // ANCHOR: admit
  // Prompts are the host's. All tokens of a prompt but the last wait here, and run along in the windows that drex plans.
  // The last token is the first one that drex schedules.
  void admit() {
    while (!waiting_.empty() && !free_sequences_.empty()) {
      request r = std::move(waiting_.front());
      waiting_.pop_front();
      r.sequence = free_sequences_.back();
      free_sequences_.pop_back();
      r.tokens = r.prompt;
      drex_request_config config = DREX_REQUEST_CONFIG_INITIALIZER;
      config.id = r.id;
      config.max_tokens = r.limit;
      check(drex_request_add(engine_, &config));
      const uint64_t id = r.id;
      alive_[id] = std::move(r);
      if (alive_[id].prompt.size() > 1) in_prompt_.push_back(id);
      else ready(id);
    }
  }

  void ready(uint64_t id) {
    check(drex_request_ready(engine_, id, static_cast<uint32_t>(alive_.at(id).tokens.size()), now_ns()));
  }
  // ANCHOR_END: admit

  // ANCHOR: prompts
  // Prompt rows that wait at layer 0.
  uint32_t prompt_rows() const {
    uint32_t n = 0;
    for (const uint64_t id : in_prompt_) n += rows_left(alive_.at(id));
    return n;
  }
  static uint32_t rows_left(const request &r) { return static_cast<uint32_t>(r.prompt.size()) - 1 - r.started; }

  // Takes n waiting prompt rows into a window from layer 0: prompt by prompt, the last prompt in part.
  void take_prompts(uint32_t n) {
    while (n > 0) {
      const uint64_t id = in_prompt_.front();
      request &r = alive_.at(id);
      const uint32_t taken = std::min(n, rows_left(r));
      on_the_way_.push_back({id, r.started, taken});
      r.started += taken;
      n -= taken;
      if (rows_left(r) == 0) in_prompt_.pop_front();
    }
  }

  // The window's rows: those that drex named, and behind them those of the prompts that are on their way. A prompt whose
  // client has gone has none.
  std::vector<model_row> with_prompts(std::vector<model_row> rows, const drex_step &step) const {
    if (step.n_prompt_rows == 0) return rows;
    uint32_t slot = n_slots_;
    for (const part &p : on_the_way_) {
      const auto found = alive_.find(p.id);
      for (uint32_t i = p.first; i < p.first + p.n; i++, slot++)
        if (found != alive_.end()) rows.push_back({found->second.prompt[i], i, found->second.sequence, slot});
    }
    return rows;
  }

  // The prompt rows on their way have passed all layers. A request is ready when its whole prompt has.
  void prompts_ran() {
    for (const part &p : on_the_way_) {
      const auto found = alive_.find(p.id);
      if (found != alive_.end() && p.first + p.n + 1 == found->second.prompt.size()) ready(p.id);
    }
    on_the_way_.clear();
  }

  // The prompt rows on their way wait at layer 0 again, before all others.
  void forget_prompts() {
    for (size_t i = on_the_way_.size(); i-- > 0;) {
      const part &p = on_the_way_[i];
      const auto found = alive_.find(p.id);
      if (found == alive_.end()) continue;
      if (rows_left(found->second) == 0) in_prompt_.push_front(p.id);
      found->second.started = p.first;
    }
    on_the_way_.clear();
  }
  // ANCHOR_END: prompts

  // ANCHOR: translate
  // drex names rows by request and age. The engine knows them by sequence and position.
  std::vector<model_row> translate(uint32_t n_rows) const {
    std::vector<model_row> out;
    for (uint32_t i = 0; i < n_rows; i++) {
      const request &r = alive_.at(rows_[i].request);
      const auto position = static_cast<uint32_t>(r.tokens.size()) - 1 - rows_[i].back;
      out.push_back({r.tokens[position], position, r.sequence, rows_[i].slot});
    }
    return out;
  }
  // ANCHOR_END: translate

  // ANCHOR: at_ramp
  // Returns the time that filling took, which belongs to the window.
  uint64_t at_ramp(const drex_step &step, const std::vector<model_row> &rows, const std::vector<float> &logits) {
    std::vector<uint32_t> cells;
    for (const model_row &row : rows) cells.push_back(model_.cell(row));
    std::vector<drex_verdict> verdicts(rows.size());
    drex_logits view = DREX_LOGITS_INITIALIZER;
    view.data = logits.data();
    view.row_stride_bytes = model_.n_vocab * sizeof(float);
    view.n_rows = step.n_rows;
    view.n_vocab = model_.n_vocab;
    check(drex_ramp(engine_, &view, cells.data(), verdicts.data(), step.n_rows));

    std::vector<model_row> left;
    for (size_t i = 0; i < rows.size(); i++) {
      const drex_verdict &verdict = verdicts[i];
      // PENDING rows only go along to be filled. The client of a GONE row has left.
      if (verdict.decision == DREX_DECISION_PENDING || verdict.decision == DREX_DECISION_GONE) continue;
      request &r = alive_.at(rows_[i].request);
      if (std::isnan(r.confidence)) r.confidence = verdict.confidence;
      // HOLD and STAY rows come back in a later step.
      if (verdict.decision != DREX_DECISION_EXIT) continue;
      emit(r, verdict.token, step.layer_end, &logits[i * model_.n_vocab]);
      left.push_back(rows[i]);
    }
    const uint64_t start = now_ns();
    if (options_.fill == DREX_FILL_PROPAGATE) model_.project(step.layer_end, left);
    else check(drex_fill(engine_));
    return now_ns() - start;
  }
  // ANCHOR_END: at_ramp

  // ANCHOR: at_end
  // Every row has the full model's logits. drex_verify() says what each row means. With fills other than `verify` it says
  // that the requests' newest rows emit.
  void at_end(const drex_step &step, const std::vector<model_row> &rows, const std::vector<float> &logits) {
    const int32_t eos = tokenizer_.eos();
    std::vector<int32_t> choices;
    std::vector<uint8_t> agrees(rows.size());
    for (size_t i = 0; i < rows.size(); i++) {
      choices.push_back(best(&logits[i * model_.n_vocab], model_.n_vocab));
      const auto found = alive_.find(rows_[i].request);
      if (found == alive_.end() || rows_[i].back == 0) continue;
      const request &r = found->second;
      // A pending row of position p drafted the token of position p + 1.
      const size_t draft = rows[i].position + 1 - r.prompt.size();
      if (choices[i] != r.output[draft].token) continue;
      agrees[i] = draft + 1 == r.limit || choices[i] == eos ? 2 : 1;
    }
    std::vector<drex_decision> decisions(rows.size());
    check(drex_verify(engine_, agrees.data(), step.n_rows, decisions.data(), step.n_rows));
    for (size_t i = 0; i < rows.size(); i++) {
      const float *row_logits = &logits[i * model_.n_vocab];
      switch (decisions[i]) {
        case DREX_DECISION_EXIT:
          emit(alive_.at(rows_[i].request), choices[i], model_.n_layers, row_logits);
          break;
        case DREX_DECISION_REPLACE: {
          // The draft and the tokens after it are dropped. Their cells are overwritten as the sequence goes on.
          request &r = alive_.at(rows_[i].request);
          r.output.resize(rows[i].position + 1 - r.prompt.size());
          r.tokens.resize(rows[i].position + 1);
          emit(r, choices[i], model_.n_layers, row_logits);
          break;
        }
        case DREX_DECISION_ACCEPT:
          // The draft is a token now: a server would send it to its client here.
          if (advanced_.empty() || advanced_.back() != rows_[i].request) advanced_.push_back(rows_[i].request);
          break;
        default: break;  // PENDING, DROP, GONE
      }
    }
  }
  // ANCHOR_END: at_end

  void emit(request &r, int32_t token, uint32_t layers, const float *logits) {
    r.output.push_back({token, layers, r.confidence, nll(logits, model_.n_vocab, token)});
    r.tokens.push_back(token);
    r.confidence = NAN;
    if (advanced_.empty() || advanced_.back() != r.id) advanced_.push_back(r.id);
  }

  // ANCHOR: go_on
  void go_on(uint64_t id) {
    request &r = alive_.at(id);
    if (!r.finished(tokenizer_.eos())) {
      ready(id);
      return;
    }
    if (options_.fill == DREX_FILL_VERIFY) {
      // The last drafts must be verified first, in later steps. After that the request has no draft left, or goes on.
      uint32_t pending = 0;
      check(drex_request_settle(engine_, id, now_ns(), &pending));
      if (pending > 0) return;
    }
    remove(id);
  }

  void remove(uint64_t id) {
    check(drex_request_remove(engine_, id));
    const auto found = alive_.find(id);
    in_prompt_.erase(std::remove(in_prompt_.begin(), in_prompt_.end(), id), in_prompt_.end());
    free_sequences_.push_back(found->second.sequence);
    done_[id] = std::move(found->second);
    alive_.erase(found);
  }
  // ANCHOR_END: go_on

  // --cancel: removes requests in any state, held or in this very step.
  void cancel() {
    for (const auto &[id, after] : options_.cancel) {
      const auto found = alive_.find(id);
      if (found == alive_.end() || found->second.output.size() < after) continue;
      found->second.cancelled = true;
      remove(id);
    }
  }

  const options &options_;
  tokenizer tokenizer_;
  bool keeps_rows_;
  uint32_t n_slots_, n_window_rows_;
  model model_;
  drex_engine *engine_ = nullptr;
  std::vector<drex_row> rows_;  // of the planned step
  std::vector<uint32_t> free_sequences_;
  std::deque<request> waiting_;
  std::map<uint64_t, request> alive_, done_;
  struct part {
    uint64_t id;
    uint32_t first, n;  // rows of its prompt
  };
  std::deque<uint64_t> in_prompt_;  // requests with prompt rows that wait at layer 0
  std::vector<part> on_the_way_;    // prompt rows in the windows since
  uint64_t n_windows_ = 0, n_failed_ = 0;  // windows planned, and of these failed
  std::vector<uint64_t> advanced_;  // requests that got or confirmed a token in this step
};

int serve(const options &o) {
  const gguf::file file(o.model);
  host h(file, o);
  const uint32_t context = static_cast<uint32_t>(file.number("llama.context_length"));
  for (size_t i = 0; i < o.prompts.size(); i++) {
    request r;
    r.id = i;
    r.prompt = h.vocabulary().encode(o.prompts[i]);
    r.limit = o.lengths[i % o.lengths.size()];
    if (r.prompt.empty() || r.prompt.size() + r.limit > context)
      throw std::runtime_error("prompt " + std::to_string(i) + ": " + std::to_string(r.prompt.size()) + " tokens and " +
                               std::to_string(r.limit) + " more do not fit into a context of " + std::to_string(context));
    h.submit(std::move(r));
  }
  const uint64_t start = now_ns();
  h.run();
  const double seconds = static_cast<double>(now_ns() - start) / 1e9;

  for (const auto &[id, r] : h.done()) {
    if (o.json) {
      const auto list = [&](const char *name, const auto &items, const auto &print) {
        std::printf(", \"%s\": [", name);
        for (size_t i = 0; i < items.size(); i++) std::printf("%s", i ? ", " : ""), print(items[i]);
        std::printf("]");
      };
      std::printf("{\"id\": %llu, \"cancelled\": %s", static_cast<unsigned long long>(id), r.cancelled ? "true" : "false");
      list("prompt", r.prompt, [](int32_t t) { std::printf("%d", t); });
      list("output", r.output, [](const produced &p) { std::printf("%d", p.token); });
      list("layers", r.output, [](const produced &p) { std::printf("%u", p.layers); });
      list("confidence", r.output, [](const produced &p) { std::isnan(p.confidence) ? std::printf("null") : std::printf("%.9g", p.confidence); });
      list("nll", r.output, [](const produced &p) { std::printf("%.9g", p.nll); });
      std::printf("}\n");
    } else {
      size_t early = 0;
      std::string text;
      for (const produced &p : r.output) {
        early += p.layers < file.number("llama.block_count");
        if (p.token != h.vocabulary().eos()) text += h.vocabulary().decode(p.token);
      }
      std::printf("--- request %llu: %zu tokens, %zu left early%s\n%s%s\n", static_cast<unsigned long long>(id), r.output.size(), early,
                  r.cancelled ? ", cancelled" : "", o.prompts[id].c_str(), text.c_str());
    }
  }
  const drex_stats s = h.stats();
  uint64_t exits = 0;  // under `verify` these are drafts, and some never become tokens
  for (uint32_t i = 0; i < s.n_ramps; i++) exits += s.exits[i];
  std::printf(o.json ? "{\"tokens\": %llu, \"exits\": %llu, \"windows\": %llu, \"rows\": %llu, \"held_max\": %llu, \"held\": %llu, \"slots_free\": %llu, "
                       "\"slots\": %u, \"involuntary_exits\": %llu, \"drafts\": %llu, \"drafts_accepted\": %llu, \"failed\": %llu, \"seconds\": %.6f}\n"
                     : "---\n%llu tokens, %llu rows left at a ramp, in %llu windows of %llu rows in all; held at most %llu, now %llu; "
                       "%llu of %u slots free; involuntary exits %llu; drafts %llu, accepted %llu; windows failed %llu; %.2f s\n",
              static_cast<unsigned long long>(s.tokens), static_cast<unsigned long long>(exits), static_cast<unsigned long long>(s.steps),
              static_cast<unsigned long long>(s.step_rows), static_cast<unsigned long long>(s.held_rows_max),
              static_cast<unsigned long long>(s.held_rows), static_cast<unsigned long long>(s.slots_free), h.slots(),
              static_cast<unsigned long long>(s.involuntary_exits), static_cast<unsigned long long>(s.drafts),
              static_cast<unsigned long long>(s.drafts_accepted), static_cast<unsigned long long>(h.failed()), seconds);
  return 0;
}

}  // namespace

int main(int argc, char **argv) {
  try {
    options o;
    if (!o.parse(argc, argv)) return 0;
    return serve(o);
  } catch (const usage_error &error) {
    std::fprintf(stderr, "host: %s; see host --help\n", error.what());
    return 2;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "host: %s\n", error.what());
    return 1;
  }
}
