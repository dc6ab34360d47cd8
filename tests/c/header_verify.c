/* SPDX-License-Identifier: Apache-2.0
 *
 * The host's part of the header's loop with drafts, made up: three requests
 * of nine tokens over a model whose ramp is wrong about some that it is sure of.
 * The test puts the header's text before this file. */

#define REQUESTS 3
#define TOKENS 9

/* Of each request: its tokens with the drafts, how many, and how many of them
 * the client has. */
static int32_t made[REQUESTS][TOKENS + 1];
static uint32_t length[REQUESTS], given[REQUESTS];
static uint32_t alive, wrong, back;

static void need(drex_status status) {
  if (status != DREX_OK) {
    fprintf(stderr, "%s: %s\n", drex_status_text(status), drex_last_error());
    wrong++;
  }
}

static int32_t truth(uint32_t request, uint32_t index) {
  return (int32_t)(request * 7 + index * 3) % VOCAB;
}

/* Which token a row computes. */
static uint32_t index_of(const drex_row *row) {
  return length[row->request] - row->back;
}

uint64_t host_now(void) {
  static uint64_t now;
  return now += 1000;
}

void host_run(uint32_t layer_begin, uint32_t layer_end, const drex_row *rows_,
              uint32_t n_rows, float scores[][VOCAB]) {
  uint32_t i, v;
  (void)layer_begin;
  for (i = 0; i < n_rows; i++) {
    const uint32_t request = (uint32_t)rows_[i].request, index = index_of(&rows_[i]);
    int32_t token = truth(request, index);
    float sure = 30.0f;
    if (layer_end < LAYERS) {
      if (index % 5 == 3) token = (token + 1) % VOCAB;
      if (index % 3 == 2) sure = 0.1f;
    }
    for (v = 0; v < VOCAB; v++) scores[i][v] = 0.0f;
    scores[i][token] = sure;
  }
}

int32_t host_sample(const float *scores) {
  int32_t best = 0, v;
  for (v = 1; v < VOCAB; v++) {
    if (scores[v] > scores[best]) best = v;
  }
  return best;
}

int32_t host_draft(const drex_row *row) { return made[row->request][index_of(row)]; }

int host_is_last(const drex_row *row) { return index_of(row) == TOKENS - 1; }

void host_keep(uint64_t request, int32_t draft) {
  made[request][length[request]++] = draft;
}

void host_take_back(const drex_row *row) {
  length[row->request] = given[row->request];
  back++;
}

void host_give(const drex_row *row, int32_t token) {
  const uint32_t request = (uint32_t)row->request, index = index_of(row);
  wrong += index != given[request] || token != truth(request, index);
  if (row->back == 0 || token != made[request][index]) length[request] = index + 1;
  made[request][index] = token;
  given[request] = index + 1;
}

void host_next(drex_engine *engine, uint64_t request) {
  if (given[request] == TOKENS) {
    need(drex_request_remove(engine, request));
    alive--;
  } else if (length[request] < TOKENS) {
    need(drex_request_ready(engine, request, 1, host_now()));
  } else {
    need(drex_request_settle(engine, request, host_now(), NULL));
  }
}

/* Of the other loop. */
int host_wait(drex_engine *engine) { return engine == NULL; }
uint32_t host_cell(const drex_row *row) { return row->slot; }
void host_emit(drex_engine *engine, uint64_t request, int32_t token) {
  (void)engine, (void)request, (void)token;
}

int main(void) {
  const uint32_t ramps[1] = {8};
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_stats stats = DREX_STATS_INITIALIZER;
  drex_engine *engine = NULL;
  uint32_t r, steps = 0;
  config.n_layers = LAYERS;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.policy = DREX_POLICY_HOLD;
  config.fill = DREX_FILL_VERIFY;
  config.max_requests = config.max_batch = BATCH;
  config.n_slots = 4 * BATCH;
  need(drex_create(&config, &engine));
  for (r = 0; r < REQUESTS; r++, alive++) {
    drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
    request.id = r;
    need(drex_request_add(engine, &request));
    need(drex_request_ready(engine, r, 1, host_now()));
  }
  while (alive > 0 && wrong == 0 && steps++ < 1000) {
    drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
    drex_step step = DREX_STEP_INITIALIZER;
    drex_completion completion = DREX_COMPLETION_INITIALIZER;
    input.now_ns = host_now();
    need(drex_plan(engine, &input, rows, BATCH, &step));
    wrong += step.n_rows == 0;
    host_run(step.layer_begin, step.layer_end, rows, step.n_rows, logits);
    completion.duration_ns = 500;
    completion.now_ns = host_now();
    need(step.ramp != DREX_NO_RAMP ? drafted(engine, &step, &completion)
                                   : verified(engine, &step, &completion));
  }
  need(drex_stats_get(engine, &stats));
  printf("%u wrong, %u tokens, drafts%s, replaced%s, taken back%s\n", wrong + alive,
         (unsigned)stats.tokens, stats.drafts > 0 ? "" : " none",
         stats.drafts > stats.drafts_accepted ? "" : " none", back > 0 ? "" : " none");
  need(drex_destroy(engine));
  return wrong != 0;
}
