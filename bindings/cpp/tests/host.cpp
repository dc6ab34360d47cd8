// SPDX-License-Identifier: Apache-2.0
//
// drex.hpp: the host's loop over a model that is made up, and what happens when
// something goes wrong. Compiled with -fno-exceptions, and again with
// DREX_HPP_EXCEPTIONS.

#include <drex.hpp>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#define EXPECT(what)                                                  \
  do {                                                                \
    if (!(what)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
      std::exit(1);                                                   \
    }                                                                 \
  } while (0)

template <class R>
static void ok(const R &r) {
  if (!r) {
    std::fprintf(stderr, "%s\n", r.error().text().c_str());
    std::exit(1);
  }
}

static constexpr std::uint32_t layers = 6, ramp_layer = 2, requests = 5, tokens = 9,
                               vocab = 40, row_bytes = 4;

static drex::result<drex::engine> make(drex::policy policy) {
  const std::array<std::uint32_t, 1> ramps{{ramp_layer}};
  drex::config config;
  config.ramps(ramps).use(policy).use(drex::metric::maxprob);
  config.n_layers = layers;
  config.n_slots = config.max_requests = config.max_batch = requests;
  return drex::engine::create(config);
}

// Every third token is not sure, and has to go deep.
static bool sure(std::uint64_t request, std::uint32_t token) {
  return (request + token) % 3 != 0;
}

static void loop() {
  using cache = std::array<std::array<std::array<unsigned char, row_bytes>,
                                      requests * tokens>, layers>;
  std::vector<cache> kv(2);  // on the heap, where sanitizers see its ends
  auto made = make(drex::policy::hold);
  ok(made);
  drex::engine engine = std::move(*made);

  std::vector<drex::kv_layer> bound(layers);
  for (std::uint32_t l = 0; l < layers; l++) {
    bound[l].n_cells = requests * tokens;
    bound[l].k = kv[0][l].data();
    bound[l].v = kv[1][l].data();
    bound[l].k_row_bytes = bound[l].k_cell_stride = row_bytes;
    bound[l].v_row_bytes = bound[l].v_cell_stride = row_bytes;
  }
  ok(engine.bind_kv(bound));

  std::array<std::uint32_t, requests> count{};
  for (std::uint64_t id = 0; id < requests; id++) {
    ok(engine.add(drex::request(id)));
    ok(engine.ready(id, 1));
  }
  std::vector<drex::row> room(requests);
  std::vector<drex::verdict> verdicts(requests);
  std::vector<std::uint32_t> cells(requests);
  std::vector<float> scores(requests * vocab);
  std::uint32_t alive = requests, early = 0, deep = 0;
  std::uint64_t now = 1;
  while (alive > 0) {
    auto planned = engine.plan(++now, room);
    ok(planned);
    EXPECT(!planned->empty());
    const auto rows = planned->rows();
    std::vector<std::uint64_t> emitted;
    for (std::size_t i = 0; i < rows.size(); i++) {
      const auto id = rows[i].request;
      cells[i] = static_cast<std::uint32_t>(id) * tokens + count[id];
      for (std::uint32_t l = planned->layer_begin(); l < planned->layer_end(); l++) {
        kv[0][l][cells[i]].fill(static_cast<unsigned char>(l + 1));
        kv[1][l][cells[i]].fill(static_cast<unsigned char>(l + 101));
      }
      float *row = scores.data() + i * vocab;
      std::memset(row, 0, vocab * sizeof *row);
      if (sure(id, count[id])) row[id + count[id]] = 25.0f;
    }
    if (planned->ramp()) {
      EXPECT(*planned->ramp() == 0 && planned->layer_end() == ramp_layer);
      const drex::logits at(drex::span<const float>(scores).first(rows.size() * vocab),
                            vocab);
      auto said = planned->ramp(at, cells, verdicts);
      ok(said);
      EXPECT(said->size() == rows.size());
      for (std::size_t i = 0; i < rows.size(); i++) {
        const auto id = rows[i].request;
        EXPECT((*said)[i].exits() == sure(id, count[id]));
        if (!(*said)[i].exits()) {
          EXPECT((*said)[i].what() == drex::decision::hold);
          continue;
        }
        EXPECT((*said)[i].token == static_cast<std::int32_t>(id + count[id]));
        emitted.push_back(id);
        early++;
      }
      ok(planned->fill());
    } else {
      EXPECT(planned->layer_end() == layers);
      for (const auto &row : rows) emitted.push_back(row.request);
      deep += static_cast<std::uint32_t>(rows.size());
    }
    ok(planned->complete(++now, 1000));
    for (const auto id : emitted) {
      if (++count[id] < tokens) {
        ok(engine.ready(id, now));
      } else {
        ok(engine.remove(id));
        alive--;
      }
    }
  }
  auto stats = engine.stats();
  ok(stats);
  EXPECT(stats->tokens == requests * tokens && stats->exits[0] == early);
  EXPECT(early == 30 && deep == 15 && stats->involuntary_exits == 0);
  for (std::uint32_t c = 0; c < requests * tokens; c++) {
    for (std::uint32_t l = 0; l < layers; l++) {
      const bool copied = sure(c / tokens, c % tokens) && l >= ramp_layer;
      const int from = static_cast<int>(copied ? ramp_layer : l + 1);
      EXPECT(kv[0][l][c][row_bytes - 1] == from && kv[1][l][c][0] == from + 100);
    }
  }
  std::printf("drex %s: %u tokens early, %u deep\n", drex::version(), early, deep);
}

static void errors() {
  drex::config config;
  auto none = drex::engine::create(config);
  EXPECT(!none && none.status() == DREX_ERROR_NULL_ARGUMENT);
  EXPECT(std::strcmp(none.error().name(), "DREX_ERROR_NULL_ARGUMENT") == 0);
  EXPECT(none.error().text().find("ramp_layers") != std::string::npos);
  // The text is this error's own, whatever fails later.
  EXPECT(drex::policy_from_name("Hold").status() == DREX_ERROR_INVALID_ARGUMENT);
  EXPECT(none.error().text().find("ramp_layers") != std::string::npos);
  EXPECT(*drex::policy_from_name("auto") == drex::policy::automatic);
  EXPECT(*drex::metric_from_name("gap") == drex::metric::gap);
  EXPECT(*drex::fill_from_name("verify") == drex::fill::verify);
  EXPECT(drex::fill_from_name("").status() == DREX_ERROR_INVALID_ARGUMENT);
  EXPECT(std::string(drex::name(drex::decision::pending)) == "pending");
  EXPECT(std::string(drex::name(drex::fill::copy)) == "copy");
  EXPECT(std::string(drex::flush_reason_name(DREX_FLUSH_AGE)) == "age");
  EXPECT(std::string(drex::miss_reason_name(DREX_MISS_HELD)) == "held");
  EXPECT(drex::policy_from_name("x").value_or(drex::policy::off) == drex::policy::off);
  EXPECT(std::strcmp(drex::name(drex::policy::art), "art") == 0);

  EXPECT(std::strstr(none.error().meaning(), "NULL") != nullptr);

  // One threshold for three ramps: drex_create() would read beyond it.
  const std::array<std::uint32_t, 3> three{{1, 2, 3}};
  const std::vector<float> one(1, 0.5f), enough(3, 0.5f);
  drex::config c;
  c.n_layers = 6;
  c.n_slots = c.max_requests = c.max_batch = 1;
  auto few = drex::engine::create(c.ramps(three).thresholds(one));
  EXPECT(few.status() == DREX_ERROR_INVALID_ARGUMENT);
  EXPECT(few.error().text().find("has 1 elements") != std::string::npos);
  ok(drex::engine::create(c.thresholds(enough)));
  // Whichever is said first.
  EXPECT(!drex::engine::create(c.ramps(drex::span<const std::uint32_t>(three).first(2))));
  c.ramp_thresholds = one.data();  // by hand, for one ramp
  ok(drex::engine::create(c.ramps(drex::span<const std::uint32_t>(three).first(1))));
  ok(drex::engine::create(c.ramps(three).thresholds({})));

  auto engine = make(drex::policy::latency);
  ok(engine);
  EXPECT(engine->remove(7).status() == DREX_ERROR_UNKNOWN_REQUEST);
  EXPECT(!engine->save_profile());

  std::array<drex::row, 2> room;
  std::array<drex::verdict, 2> verdicts;
  std::vector<float> scores(vocab);
  ok(engine->add(drex::request(1)));
  ok(engine->ready(1, 5));
  auto step = engine->plan(6, room);
  ok(step);
  EXPECT(step->rows().size() == 1 && step->rows()[0].request == 1);
  EXPECT(engine->plan(6, room).status() == DREX_ERROR_CALL_ORDER);
  // Too little of anything is an error and changes nothing.
  const drex::logits at(scores, vocab);
  EXPECT(step->ramp(at, {}, drex::span<drex::verdict>()).status() != DREX_OK);
  EXPECT(step->complete(7).status() == DREX_ERROR_CALL_ORDER);
  scores[3] = NAN;
  auto said = step->ramp(at, {}, verdicts);
  ok(said);
  EXPECT((*said)[0].what() == drex::decision::stay && std::isnan((*said)[0].confidence));
  ok(step->complete(8, 10));
  EXPECT(step->complete(8).status() == DREX_ERROR_NULL_ARGUMENT);
  EXPECT(step->complete(8).error().text() ==
         "drex_complete: the step has ended, or was moved from");
}

// drex_request_ready() has one argument more, in the middle: a call that was taken
// over from C must not compile.
template <class... Args>
using readied = decltype(std::declval<drex::engine &>().ready(std::declval<Args>()...));
template <class, class... Args>
constexpr bool takes = false;
template <class... Args>
constexpr bool takes<std::void_t<readied<Args...>>, Args...> = true;
static_assert(takes<void, std::uint64_t, std::uint64_t>, "id, now_ns");
static_assert(!takes<void, std::uint64_t, std::uint32_t, std::uint64_t>, "C's order");

static void ownership() {
  static_assert(!std::is_copy_constructible_v<drex::engine>, "one owner");
  static_assert(!std::is_copy_constructible_v<drex::step>, "one owner");
  static_assert(!std::is_copy_constructible_v<drex::pages>, "one owner");
  static_assert(std::is_nothrow_move_constructible_v<drex::engine>, "");
  static_assert(std::is_nothrow_move_assignable_v<drex::step>, "");

  auto a = make(drex::policy::hold), b = make(drex::policy::hold);
  ok(a);
  ok(b);
  std::vector<drex::row> room(requests);
  for (std::uint64_t id = 0; id < 3; id++) {
    ok(a->add(drex::request(id)));
    ok(a->ready(id, 1));
  }
  {
    auto step = a->plan(2, room);
    ok(step);
    auto moved = std::move(*step);
    EXPECT(moved.rows().size() == 3);
    EXPECT(a->info(0)->state == DREX_REQUEST_RUNNING);
  }  // neither completed nor abandoned by hand
  EXPECT(a->info(0)->state == DREX_REQUEST_READY);
  EXPECT(a->stats()->steps == 0);
  EXPECT(a->plan(3, room)->rows().size() == 3);

  drex_engine *raw = a->get();
  drex::engine c = std::move(*a);
  EXPECT(a->get() == nullptr && c.get() == raw);
  EXPECT(a->stats().status() == DREX_ERROR_NULL_ARGUMENT);
  EXPECT(a->stats().error().text() ==
         "drex_stats_get: the engine was moved from or released");
  EXPECT(a->snapshot().error().text() ==
         "drex_snapshot: the engine was moved from or released");
  c = std::move(*b);  // ends the first
  drex_stats stats = DREX_STATS_INITIALIZER;
  EXPECT(drex_stats_get(raw, &stats) == DREX_ERROR_INVALID_HANDLE);
  EXPECT(drex_destroy(c.release()) == DREX_OK);
}

static void spans() {
  float plain[3] = {1, 2, 3};
  const std::vector<float> vector{4, 5};
  const drex::span<const float> a(plain), b(vector), c(drex::span<float>{plain});
  EXPECT(a.size() == 3 && b[1] == 5.0f && c.data() == plain);
  EXPECT(drex::span<const float>().empty());
  static_assert(!std::is_constructible_v<drex::span<float>, const std::vector<float> &>,
                "const stays const");
  static_assert(!std::is_constructible_v<drex::span<const float>, std::vector<double> &>,
                "types are not mixed up");
  float sum = 0;
  for (const float f : b) sum += f;
  EXPECT(sum == 9.0f);
}

static void the_rest() {
  auto pool = drex::pages::create(4, 8, 32);
  ok(pool);
  std::vector<std::uint32_t> table(4 * 2, DREX_NO_PAGE);
  std::vector<drex_page_copy> room(8);
  auto copies = pool->write(table, 0, 0, 4, room);
  ok(copies);
  EXPECT(copies->empty() && table[0] != DREX_NO_PAGE && table[1] == DREX_NO_PAGE);
  EXPECT(pool->stats()->pages_used == 4);
  EXPECT(pool->write(table, 99, 0, 4, room).status() == DREX_ERROR_INVALID_ARGUMENT);
  ok(pool->release(table, 0, 1));
  EXPECT(pool->stats()->pages_used == 0);

  const std::array<float, 3> deep{{0.0f, 1.0f, 0.0f}}, draft{{1.0f, 0.0f, 0.0f}};
  EXPECT(*drex::speculate(deep, draft, 0, 0.5, 0.5) == 1);
  EXPECT(*drex::speculate(deep, {}, 1, 0.5, 0.5) == 1);
  EXPECT(!drex::speculate(deep, drex::span<const float>(draft).first(2), 0, 0.5, 0.5));
}

struct lines {
  int n = 0;
  char last[512] = "";
  void operator()(drex::log_level level, std::string_view line) noexcept {
    EXPECT(level <= drex::log_level::debug && line.size() < sizeof last);
    n++;
    last[line.copy(last, sizeof last - 1)] = '\0';
  }
};

static int count(std::string_view text, std::string_view what) {
  int n = 0;
  for (auto at = text.find(what); at != text.npos; at = text.find(what, at + 1)) n++;
  return n;
}

static void observability() {
  lines log;  // before the engine, whose end it hears of
  const std::array<std::uint32_t, 1> ramps{{ramp_layer}};
  drex::config config;
  config.ramps(ramps).use(drex::policy::latency);
  config.n_layers = layers;
  config.n_slots = config.max_requests = config.max_batch = requests;
  config.n_top = 3;
  auto made = drex::engine::create(config);
  ok(made);
  drex::engine engine = std::move(*made);
  auto nothing = [](std::string_view) noexcept {};
  EXPECT(engine.trace_write(nothing).status() == DREX_ERROR_CALL_ORDER);
  ok(engine.log_set(log, drex::log_level::debug));
  EXPECT(log.n == 1 && std::strstr(log.last, "policy"));
  ok(engine.trace_start(64));

  std::array<drex::row, 2> room;
  std::array<drex::verdict, 2> verdicts;
  std::vector<float> scores(2 * vocab);
  scores[7] = 25.0f;
  scores[9] = 20.0f;
  for (std::uint64_t id = 40; id < 42; id++) {
    ok(engine.add(drex::request(id)));
    ok(engine.ready(id, 1));
  }
  EXPECT(log.n == 3 && std::strstr(log.last, "41"));
  auto step = engine.plan(2000, room);
  ok(step);
  EXPECT(step->rows().size() == 2);

  // Rows to a batch, changed there, and back.
  std::array<std::uint16_t, 2 * requests> arena{};
  std::array<std::uint16_t, 4> dense{};
  for (std::size_t i = 0; i < arena.size(); i++) arena[i] = static_cast<std::uint16_t>(i);
  const drex::arena where(arena.data(), dense.data(), 4);
  ok(step->gather(where));
  for (std::size_t i = 0; i < 2; i++) {
    EXPECT(dense[2 * i] == 2 * step->rows()[i].slot);
    EXPECT(dense[2 * i + 1] == 2 * step->rows()[i].slot + 1);
    dense[2 * i] = static_cast<std::uint16_t>(700 + i);
  }
  ok(step->scatter(where));
  // Empty arrays do not hide that the call comes at the wrong time.
  const auto early = step->verify({}, {});
  EXPECT(early.status() == DREX_ERROR_CALL_ORDER);
  EXPECT(early.error().text().find("ends at a ramp") != std::string::npos);
  EXPECT(arena[2 * step->rows()[0].slot] == 700 && arena[2 * step->rows()[1].slot] == 701);
  EXPECT(step->gather(drex::arena()).status() == DREX_ERROR_NULL_ARGUMENT);

  drex::logits at(scores, vocab);
  at.n_top = 3;
  auto said = step->ramp(at, {}, verdicts);
  ok(said);
  EXPECT((*said)[0].exits() && !(*said)[1].exits());
  std::array<drex::top, 3> best;
  auto top = engine.top_of(0, best);
  ok(top);
  EXPECT(top->size() == 3 && (*top)[0].token == 7 && (*top)[1].token == 9);
  EXPECT((*top)[0].logit == 25.0f && (*top)[2].token == 0);
  EXPECT(engine.top_of(2, best).status() == DREX_ERROR_INVALID_ARGUMENT);
  // There is no device here.
  EXPECT(engine.ramp_enqueue(at).status() == DREX_ERROR_UNSUPPORTED);
  EXPECT(!engine.fill_enqueue(nullptr) && !step->fill_plan());
  ok(step->complete(5000, 3000));

  auto snapshot = engine.snapshot();
  ok(snapshot);
  EXPECT(snapshot->front() == '{' && snapshot->back() == '}' &&
         std::strlen(snapshot->c_str()) == snapshot->size());
  auto metrics = engine.metrics_text("model=\"toy\"");
  ok(metrics);
  EXPECT(count(*metrics, "\ndrex_exits_total{model=\"toy\",ramp=\"0\",layer=\"2\"} 1\n") == 1);
  EXPECT(count(*engine.metrics_text(), "\ndrex_steps_total 1\n") == 1);
  EXPECT(engine.metrics_text("ramp=\"1\"").status() == DREX_ERROR_INVALID_ARGUMENT);

  std::string trace;
  trace.reserve(1 << 16);
  ok(engine.trace_write([&trace](std::string_view part) noexcept { trace += part; }));
  EXPECT(count(trace, "\"ph\":\"X\"") == 1 && count(trace, "traceEvents") == 1);
  ok(engine.trace_stop());
  EXPECT(!engine.trace_write(nothing));

  ok(engine.log_off());
  const int heard = log.n;
  ok(engine.remove(40));
  EXPECT(log.n == heard);
  ok(engine.log_set(log, drex::log_level::info));
  { drex::engine gone = std::move(engine); }
  EXPECT(log.n == heard + 2);
}

#ifdef DREX_HPP_EXCEPTIONS
static void exceptions() {
  auto engine = make(drex::policy::hold);
  std::vector<drex::row> room(requests);
  ok(engine);
  engine->add(drex::request(1)).value();
  engine->ready(1, 1).value();
  bool caught = false;
  try {
    auto step = engine->plan(2, room).value();
    engine->add(drex::request(1)).value();
  } catch (const drex::exception &e) {
    caught = e.status() == DREX_ERROR_DUPLICATE_REQUEST && std::strstr(e.what(), "drex_");
  }
  EXPECT(caught);
  // Unwinding took the step back.
  EXPECT(engine->info(1).value().state == DREX_REQUEST_READY);
}
#endif

int main() {
  EXPECT(drex::abi_version() == DREX_ABI_VERSION);
  loop();
  errors();
  ownership();
  spans();
  the_rest();
  observability();
#ifdef DREX_HPP_EXCEPTIONS
  exceptions();
#endif
  return 0;
}
