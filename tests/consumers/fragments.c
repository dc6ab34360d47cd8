/* SPDX-License-Identifier: Apache-2.0
 *
 * What the blocks of C in README.md and docs/observability.md speak of. The test writes the blocks to loop.inc and
 * trace.inc. */

#include <drex.h>
#include <stdio.h>

#include "trace.inc"

enum { LAYERS = 8, VOCAB = 4 };

static float values[VOCAB];

static void run_layers(uint32_t begin, uint32_t end, const drex_row *rows) {
  (void)rows;
  values[1] = begin < end ? 20.0f : 0.0f;
}

static void serve(drex_engine *engine) {
  const uint32_t capacity = 1, n = 1;
  drex_row rows[1];
  drex_verdict verdicts[1];
  uint32_t cells[1] = {0};
  drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
  drex_step step = DREX_STEP_INITIALIZER;
  drex_logits logits = DREX_LOGITS_INITIALIZER;
  drex_completion completion = DREX_COMPLETION_INITIALIZER;
  logits.data = values;
  logits.row_stride_bytes = sizeof values;
  logits.n_rows = 1;
  logits.n_vocab = VOCAB;
  input.now_ns = 1;
  completion.now_ns = 2;
#include "loop.inc"
}

int main(void) {
  static float k[LAYERS], v[LAYERS];
  const uint32_t ramps[1] = {4};
  drex_kv_layer layers[LAYERS];
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
  drex_stats stats = DREX_STATS_INITIALIZER;
  drex_engine *engine = NULL;
  config.policy = DREX_POLICY_HOLD;
  config.n_layers = LAYERS;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.n_slots = config.max_requests = config.max_batch = 1;
  if (drex_create(&config, &engine) != DREX_OK) return 1;
  for (int l = 0; l < LAYERS; l++) {
    drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
    layer.n_cells = 1;
    layer.k = &k[l];
    layer.v = &v[l];
    layer.k_row_bytes = layer.k_cell_stride = layer.v_row_bytes = layer.v_cell_stride = sizeof(float);
    layers[l] = layer;
  }
  if (drex_bind_kv(engine, layers, LAYERS) != DREX_OK) return 1;
  if (drex_request_add(engine, &request) != DREX_OK || drex_request_ready(engine, request.id, 1, 0) != DREX_OK) return 1;

  record(engine, serve);

  FILE *file = fopen("drex.json", "r");
  const int traced = file != NULL && fseek(file, 0, SEEK_END) == 0 && ftell(file) > 100;
  if (file != NULL) fclose(file);
  if (drex_stats_get(engine, &stats) != DREX_OK) return 1;
  printf("drex %s: %llu step, %llu exit, %s\n", drex_version(), (unsigned long long)stats.steps,
         (unsigned long long)stats.exits[0], traced ? "traced" : "not traced");
  return drex_destroy(engine) != DREX_OK;
}
