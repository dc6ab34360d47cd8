/* SPDX-License-Identifier: Apache-2.0
 *
 * The host's loop of drex.h, in plain C: four requests of eight tokens each
 * over a model that is made up. */

#include <drex.h>
#include <stdio.h>
#include <string.h>

#define LAYERS 8
#define RAMP 3
#define REQUESTS 4
#define TOKENS 8
#define VOCAB 32
#define CELLS 64
#define ROW 16

static unsigned char k[LAYERS][CELLS * ROW];
static unsigned char v[LAYERS][CELLS * ROW];

#define CHECK(call)                                                            \
  do {                                                                         \
    drex_status status_ = (call);                                              \
    if (status_ != DREX_OK) {                                                  \
      fprintf(stderr, "%s: %s (%s)\n", #call, drex_last_error(),               \
              drex_status_name(status_));                                      \
      return 1;                                                                \
    }                                                                          \
  } while (0)

#define EXPECT(what)                                                           \
  do {                                                                         \
    if (!(what)) {                                                             \
      fprintf(stderr, "line %d: %s\n", __LINE__, #what);                       \
      return 1;                                                                \
    }                                                                          \
  } while (0)

int main(void) {
  const uint32_t ramps[1] = {RAMP};
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_kv_layer layers[LAYERS];
  drex_engine *engine = NULL;
  drex_stats stats = DREX_STATS_INITIALIZER;
  drex_row rows[REQUESTS];
  drex_verdict verdicts[REQUESTS];
  uint32_t cells[REQUESTS];
  static float logits_data[REQUESTS][VOCAB];
  unsigned tokens[REQUESTS] = {0};
  unsigned done = 0, i, steps = 0;
  uint64_t now = 0, id;

  EXPECT(drex_abi_version() == DREX_ABI_VERSION);
  EXPECT(strcmp(drex_policy_name(config.policy), "auto") == 0);
  config.policy = DREX_POLICY_HOLD;

  /* What goes wrong says so. */
  EXPECT(drex_create(&config, &engine) == DREX_ERROR_NULL_ARGUMENT);
  EXPECT(strstr(drex_last_error(), "drex_create: ramp_layers") != NULL);
  EXPECT(engine == NULL);

  config.n_layers = LAYERS;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.n_slots = config.max_requests = config.max_batch = REQUESTS;
  CHECK(drex_create(&config, &engine));

  for (i = 0; i < LAYERS; i++) {
    drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
    layer.n_cells = CELLS;
    layer.k = k[i];
    layer.v = v[i];
    layer.k_row_bytes = layer.k_cell_stride = ROW;
    layer.v_row_bytes = layer.v_cell_stride = ROW;
    layers[i] = layer;
  }
  CHECK(drex_bind_kv(engine, layers, LAYERS));

  for (id = 0; id < REQUESTS; id++) {
    drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
    request.id = id;
    CHECK(drex_request_add(engine, &request));
    CHECK(drex_request_ready(engine, id, 1, now));
  }

  while (done < REQUESTS) {
    drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
    drex_step step = DREX_STEP_INITIALIZER;
    drex_completion completion = DREX_COMPLETION_INITIALIZER;
    unsigned char emitted[REQUESTS];

    EXPECT(++steps < 1000);
    input.now_ns = now;
    CHECK(drex_plan(engine, &input, rows, REQUESTS, &step));
    EXPECT(step.n_rows > 0 && step.n_rows <= REQUESTS);

    /* The "model": token t of a request writes t into its cell. */
    for (i = 0; i < step.n_rows; i++) {
      uint32_t l, request = (uint32_t)rows[i].request;
      cells[i] = request * TOKENS + tokens[request];
      for (l = step.layer_begin; l < step.layer_end; l++) {
        memset(&k[l][cells[i] * ROW], (int)(l + 1), ROW);
        memset(&v[l][cells[i] * ROW], (int)(l + 1), ROW);
      }
      emitted[i] = step.ramp == DREX_NO_RAMP;
    }
    if (step.ramp != DREX_NO_RAMP) {
      drex_logits logits = DREX_LOGITS_INITIALIZER;
      for (i = 0; i < step.n_rows; i++) {
        uint32_t request = (uint32_t)rows[i].request;
        memset(logits_data[i], 0, sizeof logits_data[i]);
        /* Every other token is sure of itself. */
        if ((request + tokens[request]) % 2 == 0) logits_data[i][request] = 20.0f;
      }
      logits.data = logits_data;
      logits.row_stride_bytes = sizeof logits_data[0];
      logits.n_rows = step.n_rows;
      logits.n_vocab = VOCAB;
      CHECK(drex_ramp(engine, &logits, cells, verdicts, REQUESTS));
      for (i = 0; i < step.n_rows; i++) {
        if (verdicts[i].decision == DREX_DECISION_EXIT) {
          EXPECT(verdicts[i].token == (int32_t)rows[i].request);
          emitted[i] = 1;
        }
      }
      CHECK(drex_fill(engine));
    }
    now += 1000000;
    completion.now_ns = now;
    completion.duration_ns = 1000000;
    CHECK(drex_complete(engine, &completion));
    for (i = 0; i < step.n_rows; i++) {
      uint32_t request = (uint32_t)rows[i].request;
      if (!emitted[i]) continue;
      if (++tokens[request] < TOKENS) {
        CHECK(drex_request_ready(engine, request, 1, now));
      } else {
        CHECK(drex_request_remove(engine, request));
        done++;
      }
    }
  }

  CHECK(drex_stats_get(engine, &stats));
  EXPECT(stats.tokens == REQUESTS * TOKENS);
  EXPECT(stats.exits[0] == REQUESTS * TOKENS / 2);
  EXPECT(stats.involuntary_exits == 0);
  EXPECT(stats.cells_filled == stats.exits[0]);
  EXPECT(stats.slots_free == REQUESTS);
  for (i = 0; i < REQUESTS * TOKENS; i++) {
    uint32_t request = i / TOKENS, token = i % TOKENS;
    int exited = (request + token) % 2 == 0;
    EXPECT(k[LAYERS - 1][i * ROW] == (exited ? RAMP : LAYERS));
    EXPECT(v[LAYERS - 1][i * ROW + ROW - 1] == (exited ? RAMP : LAYERS));
  }

  CHECK(drex_destroy(engine));
  EXPECT(drex_destroy(engine) == DREX_ERROR_INVALID_HANDLE);
  CHECK(drex_destroy(NULL));
  printf("drex %s: %d tokens in %u steps\n", drex_version(), REQUESTS * TOKENS, steps);
  return 0;
}
