/* SPDX-License-Identifier: Apache-2.0
 *
 * The smallest host: drex's loop around an engine that is a toy.
 *
 *   cargo xtask install --build-tree
 *   cc -std=c99 -Iinclude examples/minimal.c -Ltarget/drex/tree -ldrex -o target/minimal
 *   LD_LIBRARY_PATH=target/drex/tree target/minimal
 *
 * The toy has eight layers in two segments, 0-3 and 4-7, with an exit ramp between them. It recites a line for each
 * request, letter by letter. Inside a word its shallow half is sure of the next letter, and the token exits. Where a word
 * begins its shallow half is not sure: the row is held, and goes deeper together with others. "Yours" marks what a real
 * engine does anyway; the rest is all that drex asks for. docs/concepts.md explains the words. */

#include <drex.h>
#include <stdio.h>
#include <string.h>

enum { LAYERS = 8, RAMP = 4, REQUESTS = 4, CONTEXT = 64, CELLS = REQUESTS * CONTEXT, VOCAB = 128 };

static const char *const TEXT[REQUESTS] = {"no row is made to exit", "rows that must go on are held", "dense deep batches",
                                           "and nothing is copied to regroup them"};

/* Yours: a K/V cache, one number instead of a vector for each layer and cell. A cell belongs to one token. */
static float k_cache[LAYERS][CELLS], v_cache[LAYERS][CELLS];
/* Yours: the arena. A hidden state that must outlive its window stays in the arena row (the slot) that drex names. */
static struct { int request, position; } arena[REQUESTS];
static float logits[REQUESTS][VOCAB];
/* Yours: what is known of a request. Here its id is its number, and its position is all that it has. */
static int position[REQUESTS];

/* Every call returns a status, and drex_last_error() has a sentence for what was wrong. */
#define CHECK(call)                                                                                                    \
  do {                                                                                                                 \
    if ((call) != DREX_OK) {                                                                                           \
      fprintf(stderr, "%s\n", drex_last_error());                                                                      \
      return 1;                                                                                                        \
    }                                                                                                                  \
  } while (0)

/* ANCHOR: window */
/* Yours: runs layers [begin, end) over the rows, in their order. A window that begins at layer 0 starts from the
 * tokens, any other from the arena. A window that ends before the last layer leaves its hidden states in the arena.
 * Every window ends with logits: those of the ramp, or those of the model. */
static void run_layers(uint32_t begin, uint32_t end, const drex_row *rows, uint32_t n_rows) {
  uint32_t i, l;
  for (i = 0; i < n_rows; i++) {
    const uint32_t slot = rows[i].slot;
    if (begin == 0) {
      arena[slot].request = (int)rows[i].request;
      arena[slot].position = position[rows[i].request];
    }
    const int request = arena[slot].request, at = arena[slot].position;
    for (l = begin; l < end; l++) k_cache[l][request * CONTEXT + at] = v_cache[l][request * CONTEXT + at] = 1.0f + (float)l;
    const char next = TEXT[request][at];
    const int word_begins = at == 0 || TEXT[request][at - 1] == ' ';
    memset(logits[i], 0, sizeof logits[i]);
    logits[i][(int)next] = 20.0f;
    if (end < LAYERS && word_begins) logits[i]['e'] = 19.5f; /* "or is it an e?" */
  }
}
/* ANCHOR_END: window */

int main(void) {
  /* ANCHOR: create */
  /* Every struct begins with its size. The macro sets it, and the defaults. */
  const uint32_t ramps[1] = {RAMP};
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_engine *engine = NULL;
  config.policy = DREX_POLICY_HOLD; /* the default, AUTO, would first learn what pays; HOLD shows more */
  config.n_layers = LAYERS;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.threshold = 0.7f;
  config.n_slots = config.max_requests = config.max_batch = REQUESTS;
  CHECK(drex_create(&config, &engine));

  /* Where the K/V cache lies, so that drex can fill the layers that an exited token skipped. */
  drex_kv_layer layers[LAYERS];
  for (int l = 0; l < LAYERS; l++) {
    drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
    layer.n_cells = CELLS;
    layer.k = k_cache[l];
    layer.v = v_cache[l];
    layer.k_row_bytes = layer.k_cell_stride = sizeof(float);
    layer.v_row_bytes = layer.v_cell_stride = sizeof(float);
    layers[l] = layer;
  }
  CHECK(drex_bind_kv(engine, layers, LAYERS));
  /* ANCHOR_END: create */

  /* ANCHOR: add */
  uint64_t now = 0; /* yours: any monotonic clock, in nanoseconds */
  int alive = 0;
  for (int r = 0; r < REQUESTS; r++) {
    drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
    request.id = (uint64_t)r;
    CHECK(drex_request_add(engine, &request));
    /* yours: the prompt, through all layers */
    CHECK(drex_request_ready(engine, (uint64_t)r, 1, now));
    alive++;
  }
  /* ANCHOR_END: add */

  printf("step  layers  what each request did: a letter left at the ramp, [a] came out of the last layer, . is held\n");
  for (unsigned step_number = 1; alive > 0; step_number++) {
    /* ANCHOR: plan */
    drex_row rows[REQUESTS];
    drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
    drex_step step = DREX_STEP_INITIALIZER;
    input.now_ns = now;
    CHECK(drex_plan(engine, &input, rows, REQUESTS, &step));
    if (step.n_rows == 0) break; /* yours: wait for a request; the toy has all of them */

    run_layers(step.layer_begin, step.layer_end, rows, step.n_rows);
    /* ANCHOR_END: plan */

    int emitted[REQUESTS]; /* per row: the token, or -1 */
    uint32_t i;
    /* ANCHOR: ramp */
    if (step.ramp != DREX_NO_RAMP) {
      uint32_t cells[REQUESTS]; /* the K/V cell of each row's token */
      drex_verdict verdicts[REQUESTS];
      drex_logits view = DREX_LOGITS_INITIALIZER;
      view.data = logits;
      view.row_stride_bytes = sizeof logits[0];
      view.n_rows = step.n_rows;
      view.n_vocab = VOCAB;
      for (i = 0; i < step.n_rows; i++) cells[i] = (uint32_t)(rows[i].request * CONTEXT) + (uint32_t)position[rows[i].request];
      CHECK(drex_ramp(engine, &view, cells, verdicts, REQUESTS));
      /* A row that does not exit comes back in a later step. Until then its arena row must stay as it is. */
      for (i = 0; i < step.n_rows; i++) emitted[i] = verdicts[i].decision == DREX_DECISION_EXIT ? verdicts[i].token : -1;
      CHECK(drex_fill(engine));
    } else {
      /* yours: sample every row; the toy takes the greatest logit */
      for (i = 0; i < step.n_rows; i++) {
        emitted[i] = 0;
        for (int t = 1; t < VOCAB; t++)
          if (logits[i][t] > logits[i][emitted[i]]) emitted[i] = t;
      }
    }
    /* ANCHOR_END: ramp */

    char line[REQUESTS][4] = {"", "", "", ""};
    for (i = 0; i < step.n_rows; i++) {
      if (emitted[i] < 0) strcpy(line[rows[i].request], " . ");
      else sprintf(line[rows[i].request], step.ramp == DREX_NO_RAMP ? "[%c]" : " %c ", emitted[i] == ' ' ? '_' : emitted[i]);
    }
    printf("%4u  %u-%u    ", step_number, step.layer_begin, step.layer_end - 1);
    for (int r = 0; r < REQUESTS; r++) printf("  %-3s", line[r]);
    printf("\n");

    /* ANCHOR: complete */
    drex_completion completion = DREX_COMPLETION_INITIALIZER;
    now += 1000000;
    completion.now_ns = now;
    completion.duration_ns = 1000000; /* yours: what the window took; `auto` learns from it */
    CHECK(drex_complete(engine, &completion));

    for (i = 0; i < step.n_rows; i++) {
      const uint64_t r = rows[i].request;
      if (emitted[i] < 0) continue;
      position[r]++;
      if (TEXT[r][position[r]] != '\0') {
        CHECK(drex_request_ready(engine, r, (uint32_t)position[r] + 1, now));
      } else { /* finished. A client that goes away is removed in the same way, in any state, at any time */
        CHECK(drex_request_remove(engine, r));
        alive--;
      }
    }
    /* ANCHOR_END: complete */
  }

  /* State-copy has left no hole: every token has K/V in every layer. */
  int holes = 0;
  for (int r = 0; r < REQUESTS; r++)
    for (int at = 0; at < position[r]; at++)
      for (int l = 0; l < LAYERS; l++) holes += k_cache[l][r * CONTEXT + at] == 0.0f || v_cache[l][r * CONTEXT + at] == 0.0f;

  drex_stats stats = DREX_STATS_INITIALIZER;
  CHECK(drex_stats_get(engine, &stats));
  printf("\ndrex %s: %llu tokens in %llu windows of %.1f rows; %llu left after %d of %d layers\n", drex_version(),
         (unsigned long long)stats.tokens, (unsigned long long)stats.steps, (double)stats.step_rows / (double)stats.steps,
         (unsigned long long)stats.exits[0], RAMP, LAYERS);
  printf("held at most %llu rows, %llu now; involuntary exits %llu; K/V cells filled %llu, missing %d\n",
         (unsigned long long)stats.held_rows_max, (unsigned long long)stats.held_rows,
         (unsigned long long)stats.involuntary_exits, (unsigned long long)stats.cells_filled, holes);
  CHECK(drex_destroy(engine));
  return holes != 0;
}
