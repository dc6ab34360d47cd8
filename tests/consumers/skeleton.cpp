// SPDX-License-Identifier: Apache-2.0
//
// The program of bindings/README.md as printed, and the same host once more with
// the page's callables, which the page's program leaves out. The test writes the
// page's blocks to skeleton.inc and callables.inc.

#include "callables.inc"

#define main printed_main
#include "skeleton.inc"
#undef main

#include <cstdlib>

#include <unistd.h>

template <class R>
static void ok(const R &r) {
  if (r) return;
  std::exit(fail(r.error()));
}

static bool written(std::FILE *file) {
  return std::fflush(file) == 0 && lseek(fileno(file), 0, SEEK_END) > 0;
}

int main() {
  if (printed_main() != 0) return 1;

  std::FILE *log = std::tmpfile(), *trace = std::tmpfile();
  if (log == nullptr || trace == nullptr) return 1;
  toy yours;
  auto engine = start(yours);
  ok(engine);
  // The page's log goes to the standard error.
  const int terminal = dup(2);
  if (terminal < 0 || dup2(fileno(log), 2) < 0) return 1;
  ok(watch(*engine));
  for (std::uint64_t id = 0; id < requests; id++) {
    ok(engine->add(drex::request(id)));
    ok(engine->ready(id, yours.now()));
  }
  for (;;) {
    const auto ran = iterate(*engine, yours);
    ok(ran);
    if (!*ran) break;
  }
  ok(save_trace(*engine, trace));
  const auto stats = engine->stats();
  ok(stats);
  *engine = *start(yours);  // ends the first one: its end is an event, too
  if (dup2(terminal, 2) < 0) return 1;

  bool right = true;
  std::uint32_t holes = 0;
  for (std::uint32_t id = 0; id < requests; id++) {
    right = right && yours.tokens[id].size() == length + 1;
    for (std::size_t i = 0; i < yours.tokens[id].size(); i++) {
      right = right && yours.tokens[id][i] == static_cast<std::int32_t>(10 * id + i);
    }
    for (std::uint32_t l = 0; l < layers; l++) {
      for (std::uint32_t at = 0; at < length; at++) {
        holes += (yours.k[l][id * context + at] == 0) + (yours.v[l][id * context + at] == 0);
      }
    }
  }
  std::printf("drex %s: %u tokens at the ramp, %s, %u holes, %u requests left; %s\n",
              drex::version(), static_cast<unsigned>(stats->exits[0]),
              right ? "all right" : "wrong ones", holes,
              static_cast<unsigned>(stats->requests),
              written(log) && written(trace) ? "seen" : "nothing seen");
  return 0;
}
