/* SPDX-License-Identifier: Apache-2.0
 *
 * What an operator sees of an engine, and what a host without a gather by index
 * uses: log, snapshot, metrics, trace, the greatest logits, gather and scatter.
 * Three requests over a model whose hidden state is a number that every layer
 * adds one to. With a folder as its argument, it leaves the texts there. */

#include <drex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS 6
#define RAMP 2
#define REQUESTS 3
#define TOKENS 4
#define VOCAB 50
#define TOP 3
#define WIDTH 4

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

struct heard {
  drex_engine *engine;
  int lines[DREX_LOG_TRACE + 1];
  int refused; /* calls from inside, all of which must be */
};

static void hear(void *user_data, drex_log_level level, const char *text) {
  struct heard *heard = user_data;
  drex_stats stats = DREX_STATS_INITIALIZER;
  heard->lines[level] += strlen(text) <= 511 && strchr(text, '\n') == NULL;
  if (heard->engine == NULL) return;
  heard->refused += drex_stats_get(heard->engine, &stats) == DREX_ERROR_HANDLE_BUSY;
}

struct sunk {
  char *text;
  size_t length;
  size_t parts;
};

static void sink(void *user_data, const char *bytes, size_t n_bytes) {
  struct sunk *sunk = user_data;
  char *more = realloc(sunk->text, sunk->length + n_bytes + 1);
  if (more == NULL) abort();
  memcpy(more + sunk->length, bytes, n_bytes);
  sunk->text = more;
  sunk->length += n_bytes;
  sunk->parts++;
  more[sunk->length] = '\0';
}

static int count(const char *text, const char *what) {
  int n = 0;
  while ((text = strstr(text, what)) != NULL) text++, n++;
  return n;
}

static int leave(const char *folder, const char *name, const char *text) {
  char path[4096];
  FILE *file;
  int written;
  if (folder == NULL) return 1;
  if (strlen(folder) + strlen(name) + 2 > sizeof path) return 0;
  sprintf(path, "%s/%s", folder, name);
  file = fopen(path, "wb");
  if (file == NULL) return 0;
  written = fputs(text, file) >= 0;
  return fclose(file) == 0 && written;
}

/* The snapshot, or with labels the metrics; NULL when drex says no. */
static char *text_of(drex_engine *engine, const char *labels) {
  size_t length = 0, again = 7;
  char *text = NULL;
  drex_status status = labels == NULL ? drex_snapshot(engine, NULL, 0, &length)
                                      : drex_metrics_text(engine, labels, NULL, 0, &length);
  if (status != DREX_OK || (text = malloc(length + 1)) == NULL) return NULL;
  /* Too little room by the 0 byte: the length is said, and nothing is written. */
  text[0] = '?';
  status = labels == NULL ? drex_snapshot(engine, text, length, &again)
                          : drex_metrics_text(engine, labels, text, length, &again);
  if (status == DREX_ERROR_CAPACITY && again == length && text[0] == '?') {
    again = 7;
    status = labels == NULL ? drex_snapshot(engine, text, length + 1, &again)
                            : drex_metrics_text(engine, labels, text, length + 1, &again);
    if (status == DREX_OK && again == length && strlen(text) == length) return text;
  }
  free(text);
  return NULL;
}

/* Every third token has to go deep. */
static int sure(uint64_t request, unsigned token) { return (request + token) % 3 != 0; }

int main(int argc, char **argv) {
  const char *folder = argc > 1 ? argv[1] : NULL;
  const uint32_t ramps[1] = {RAMP};
  static double hidden[REQUESTS][WIDTH], dense[REQUESTS][WIDTH];
  static float scores[REQUESTS][VOCAB];
  unsigned tokens[REQUESTS] = {0}, done = 0, exits = 0, windows = 0, held = 0;
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_stats stats = DREX_STATS_INITIALIZER;
  drex_arena arena = DREX_ARENA_INITIALIZER;
  drex_engine *engine = NULL;
  drex_row rows[REQUESTS];
  drex_verdict verdicts[REQUESTS];
  drex_top top[TOP + 1];
  struct heard heard = {NULL, {0}, 0};
  struct sunk sunk = {NULL, 0, 0};
  char *text;
  char line[100];
  size_t length = 0;
  uint64_t now = 0, id;
  uint32_t i, n = 0;

  config.policy = DREX_POLICY_HOLD;
  config.n_layers = LAYERS;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.n_top = TOP;
  config.n_slots = config.max_requests = config.max_batch = REQUESTS;
  CHECK(drex_create(&config, &engine));
  heard.engine = engine;
  EXPECT(drex_log_set(engine, hear, &heard, DREX_LOG_TRACE + 1) == DREX_ERROR_INVALID_ARGUMENT);
  CHECK(drex_log_set(engine, hear, &heard, DREX_LOG_TRACE));
  EXPECT(heard.lines[DREX_LOG_INFO] == 1 && heard.refused == 1);
  EXPECT(drex_trace_write(engine, sink, &sunk) == DREX_ERROR_CALL_ORDER);
  EXPECT(heard.lines[DREX_LOG_WARN] == 1);
  CHECK(drex_trace_start(engine, 1000));

  arena.arena = hidden;
  arena.dense = dense;
  arena.row_bytes = arena.arena_stride_bytes = arena.dense_stride_bytes = sizeof hidden[0];
  EXPECT(drex_gather(engine, &arena) == DREX_ERROR_CALL_ORDER);

  for (id = 0; id < REQUESTS; id++) {
    drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
    request.id = id;
    CHECK(drex_request_add(engine, &request));
    CHECK(drex_request_ready(engine, id, 0, now));
  }
  while (done < REQUESTS) {
    drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
    drex_step step = DREX_STEP_INITIALIZER;
    drex_completion completion = DREX_COMPLETION_INITIALIZER;
    int emitted[REQUESTS];
    input.now_ns = now += 1000;
    CHECK(drex_plan(engine, &input, rows, REQUESTS, &step));
    EXPECT(step.n_rows > 0);
    windows++;

    /* The window: a dense batch from the arena, and back. */
    if (step.layer_begin > 0) {
      memset(dense, 0, sizeof dense);
      CHECK(drex_gather(engine, &arena));
    }
    for (i = 0; i < step.n_rows; i++) {
      const uint64_t r = rows[i].request;
      uint32_t w;
      for (w = 0; w < WIDTH; w++) {
        const double begin = 1000.0 * (double)r + 10.0 * tokens[r] + w;
        if (step.layer_begin == 0) dense[i][w] = begin;
        EXPECT(dense[i][w] == begin + (step.layer_begin == 0 ? 0 : RAMP));
        dense[i][w] += step.layer_end - step.layer_begin;
      }
      emitted[i] = step.ramp == DREX_NO_RAMP;
    }
    if (step.ramp != DREX_NO_RAMP) {
      drex_logits logits = DREX_LOGITS_INITIALIZER;
      CHECK(drex_scatter(engine, &arena));
      memset(scores, 0, sizeof scores);
      for (i = 0; i < step.n_rows; i++) {
        const uint64_t r = rows[i].request;
        scores[i][r + 1] = 2.0f;
        scores[i][r + 10] = sure(r, tokens[r]) ? 20.0f : 2.5f;
      }
      logits.data = scores;
      logits.row_stride_bytes = sizeof scores[0];
      logits.n_rows = step.n_rows;
      logits.n_vocab = VOCAB;
      logits.n_top = TOP;
      CHECK(drex_ramp(engine, &logits, NULL, verdicts, REQUESTS));
      for (i = 0; i < step.n_rows; i++) {
        const uint64_t r = rows[i].request;
        emitted[i] = verdicts[i].decision == DREX_DECISION_EXIT;
        EXPECT(emitted[i] == sure(r, tokens[r]));
        exits += (unsigned)emitted[i];
        held += !emitted[i];
        CHECK(drex_top_get(engine, i, top, TOP + 1, &n));
        EXPECT(n == TOP && top[0].token == (int)r + 10 && top[1].token == (int)r + 1);
        EXPECT(top[0].logit == scores[i][r + 10] && top[2].token == 0);
        CHECK(drex_top_get(engine, i, top, 1, &n));
        EXPECT(n == 1);
      }
      EXPECT(drex_top_get(engine, step.n_rows, top, TOP, &n) == DREX_ERROR_INVALID_ARGUMENT);
    }
    completion.now_ns = now += 1000;
    completion.duration_ns = 900;
    CHECK(drex_complete(engine, &completion));
    for (i = 0; i < step.n_rows; i++) {
      const uint64_t r = rows[i].request;
      if (!emitted[i]) continue;
      if (++tokens[r] < TOKENS) {
        CHECK(drex_request_ready(engine, r, 0, now));
      } else {
        CHECK(drex_request_remove(engine, r));
        done++;
      }
    }
  }
  CHECK(drex_stats_get(engine, &stats));
  EXPECT(stats.tokens == REQUESTS * TOKENS && stats.exits[0] == exits && stats.steps == windows);
  EXPECT(exits == 8 && held == 4);

  text = text_of(engine, NULL);
  EXPECT(text != NULL && leave(folder, "snapshot.json", text));
  free(text);
  EXPECT(drex_metrics_text(engine, "ramp=\"1\"", NULL, 0, &length) == DREX_ERROR_INVALID_ARGUMENT);
  text = text_of(engine, "host=\"c\"");
  EXPECT(text != NULL && leave(folder, "metrics.txt", text));
  sprintf(line, "\ndrex_exits_total{host=\"c\",ramp=\"0\",layer=\"%d\"} %u\n", RAMP, exits);
  EXPECT(count(text, line) == 1);
  sprintf(line, "\ndrex_steps_total{host=\"c\"} %u\n", windows);
  EXPECT(count(text, line) == 1);
  free(text);

  CHECK(drex_trace_write(engine, sink, &sunk));
  EXPECT(sunk.parts > 0 && leave(folder, "trace.json", sunk.text));
  EXPECT(count(sunk.text, "\"ph\":\"X\"") == (int)windows);
  free(sunk.text);
  CHECK(drex_trace_stop(engine));
  EXPECT(drex_trace_write(engine, sink, &sunk) == DREX_ERROR_CALL_ORDER);

  /* Each request came and went; each step was planned and completed. */
  EXPECT(heard.lines[DREX_LOG_DEBUG] == 2 * REQUESTS);
  EXPECT(heard.lines[DREX_LOG_TRACE] >= 2 * (int)windows);
  for (i = n = 0; i <= DREX_LOG_TRACE; i++) n += (uint32_t)heard.lines[i];
  EXPECT(heard.refused == (int)n);
  CHECK(drex_log_set(engine, NULL, NULL, DREX_LOG_TRACE));
  EXPECT(drex_abandon(engine) == DREX_ERROR_CALL_ORDER);
  for (i = 0; i <= DREX_LOG_TRACE; i++) n -= (uint32_t)heard.lines[i];
  EXPECT(n == 0);
  CHECK(drex_log_set(engine, hear, &heard, DREX_LOG_INFO));
  heard.engine = NULL; /* from its own end an engine cannot be called */
  n = (uint32_t)heard.lines[DREX_LOG_INFO];
  CHECK(drex_destroy(engine));
  EXPECT(heard.lines[DREX_LOG_INFO] == (int)n + 1);
  printf("drex %s: %u windows, %u exits, %u held\n", drex_version(), windows, exits, held);
  return 0;
}
