/* SPDX-License-Identifier: Apache-2.0
 *
 * Programs that are wrong on purpose: what finds nothing wrong with the others
 * must find something wrong with these. The argument says which one. */

#include <drex.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VOCAB 128

/* The library is handed half as many floats as it is told. */
static int short_logits(void) {
  const uint32_t ramps[1] = {1};
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
  drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
  drex_step step = DREX_STEP_INITIALIZER;
  drex_logits logits = DREX_LOGITS_INITIALIZER;
  drex_engine *engine = NULL;
  drex_row row;
  drex_verdict verdict;
  float *data = calloc(VOCAB / 2, sizeof *data);
  config.n_layers = 2;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.policy = DREX_POLICY_HOLD;
  config.n_slots = config.max_requests = config.max_batch = 1;
  request.id = 1;
  if (data == NULL || drex_create(&config, &engine) != DREX_OK ||
      drex_request_add(engine, &request) != DREX_OK ||
      drex_request_ready(engine, 1, 0, 0) != DREX_OK ||
      drex_plan(engine, &input, &row, 1, &step) != DREX_OK) {
    return 2;
  }
  logits.data = data;
  logits.row_stride_bytes = VOCAB * sizeof *data;
  logits.n_rows = step.n_rows;
  logits.n_vocab = VOCAB;
  if (drex_ramp(engine, &logits, NULL, &verdict, 1) != DREX_OK) return 2;
  printf("%d\n", (int)verdict.token);
  drex_destroy(engine);
  free(data);
  return 0;
}

/* Memory that nobody can reach any more. */
static int leak(void) {
  void *volatile lost = malloc(100);
  lost = NULL;
  return lost == NULL ? 0 : 2;
}

static int overflow(void) {
  drex_row *rows = malloc(2 * sizeof *rows);
  volatile int i = 2;
  if (rows == NULL) return 2;
  memset(rows, 0, 2 * sizeof *rows);
  i = (int)rows[i].slot;
  free(rows);
  return i == 12345 ? 3 : 0;
}

static int undefined(void) {
  volatile int i = INT_MAX;
  i = i + 1;
  return i == 12345 ? 3 : 0;
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "short-logits") == 0) return short_logits();
  if (strcmp(what, "leak") == 0) return leak();
  if (strcmp(what, "overflow") == 0) return overflow();
  if (strcmp(what, "undefined") == 0) return undefined();
  return 2;
}
