/* SPDX-License-Identifier: Apache-2.0
 *
 * The host's part of the loop in drex.h's second chapter, made up: three
 * requests of six tokens over a model that is sure of every other token. The
 * test puts the chapter's text before this file. */

#define REQUESTS 3
#define TOKENS 6
#define ROW 8

static unsigned char cache[2][LAYERS][REQUESTS * TOKENS][ROW];
static uint32_t tokens[REQUESTS]; /* emitted so far */
static uint32_t alive, at_ramp, deep;

static void need(drex_status status) {
  if (status != DREX_OK) {
    fprintf(stderr, "%s: %s\n", drex_status_text(status), drex_last_error());
    alive = UINT32_MAX;
  }
}

uint64_t host_now(void) {
  static uint64_t now;
  return now += 1000;
}

int host_wait(drex_engine *engine) {
  static uint32_t came;
  while (came < REQUESTS) {
    drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
    request.id = came++;
    need(drex_request_add(engine, &request));
    need(drex_request_ready(engine, request.id, 1, host_now()));
    alive++;
  }
  return alive != 0 && alive != UINT32_MAX;
}

uint32_t host_cell(const drex_row *row) {
  return (uint32_t)row->request * TOKENS + tokens[row->request];
}

void host_run(uint32_t layer_begin, uint32_t layer_end, const drex_row *rows,
              uint32_t n_rows, float scores[][VOCAB]) {
  uint32_t i, l, b, v;
  for (i = 0; i < n_rows; i++) {
    const uint32_t request = (uint32_t)rows[i].request;
    for (l = layer_begin; l < layer_end; l++) {
      for (b = 0; b < ROW; b++) {
        cache[0][l][host_cell(&rows[i])][b] = (unsigned char)(l + 1);
        cache[1][l][host_cell(&rows[i])][b] = (unsigned char)(l + 101);
      }
    }
    for (v = 0; v < VOCAB; v++) scores[i][v] = 0.0f;
    if (layer_end == LAYERS || tokens[request] % 2 == 0) {
      scores[i][request + 10 * tokens[request]] = 30.0f;
    }
  }
}

int32_t host_sample(const float *scores) {
  int32_t best = 0, v;
  for (v = 1; v < VOCAB; v++) {
    if (scores[v] > scores[best]) best = v;
  }
  return best;
}

void host_emit(drex_engine *engine, uint64_t request, int32_t token) {
  drex_request_info info = DREX_REQUEST_INFO_INITIALIZER;
  if (token != (int32_t)(request + 10 * tokens[request])) alive = UINT32_MAX;
  if (++tokens[request] < TOKENS) {
    need(drex_request_ready(engine, request, tokens[request] + 1, host_now()));
    return;
  }
  need(drex_request_get(engine, request, &info));
  at_ramp += (uint32_t)info.exits[0];
  deep += (uint32_t)(info.tokens - info.exits[0]);
  need(drex_request_remove(engine, request));
  alive--;
}

int main(void) {
  drex_kv_layer kv[LAYERS];
  uint32_t l, c, b, wrong = 0;
  for (l = 0; l < LAYERS; l++) {
    drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
    layer.n_cells = REQUESTS * TOKENS;
    layer.k = cache[0][l];
    layer.v = cache[1][l];
    layer.k_row_bytes = layer.k_cell_stride = ROW;
    layer.v_row_bytes = layer.v_cell_stride = ROW;
    kv[l] = layer;
  }
  if (host_loop(kv) != 0 || alive != 0) return 1;
  /* A token that left after layer 8 has that layer's K and V further up. */
  for (c = 0; c < REQUESTS * TOKENS; c++) {
    for (l = 0; l < LAYERS; l++) {
      const uint32_t from = c % TOKENS % 2 == 0 && l >= 8 ? 8 : l + 1;
      for (b = 0; b < ROW; b++) {
        wrong += cache[0][l][c][b] != from || cache[1][l][c][b] != from + 100;
      }
    }
  }
  printf("%u tokens at the ramp, %u deep, %u bytes wrong\n", at_ramp, deep,
         wrong);
  return 0;
}
