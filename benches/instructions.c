/* SPDX-License-Identifier: Apache-2.0
 *
 * instructions STEPS [watched]: so many steps with 512 requests and batches of
 * 256, of one plan, ramp and complete each, and of drex_request_ready() for
 * every row that emitted a token. `cargo xtask test --observe` counts their
 * instructions by callgrind, in runs of two lengths, so that start and end fall
 * out. Watched: with a log and a trace.
 */
#include <drex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REQUESTS = 512, BATCH = 256, VOCAB = 16 };

static float logits[BATCH][VOCAB];
static drex_row rows[BATCH];
static drex_verdict verdicts[BATCH];

static void ok(drex_status status) {
    if (status != DREX_OK) {
        fprintf(stderr, "%s\n", drex_last_error());
        exit(1);
    }
}

static void hear(void *user_data, drex_log_level level, const char *text) {
    (void)user_data, (void)level, (void)text;
}

int main(int argc, char **argv) {
    const int steps = argc > 1 ? atoi(argv[1]) : 1000;
    const uint32_t ramp = 4;
    uint64_t now = 0;
    drex_engine *engine;
    drex_config config = DREX_CONFIG_INITIALIZER;
    config.n_layers = 12;
    config.n_ramps = 1;
    config.ramp_layers = &ramp;
    config.n_slots = REQUESTS;
    config.max_requests = REQUESTS;
    config.max_batch = BATCH;
    config.policy = DREX_POLICY_HOLD;
    config.flush_rows = BATCH;
    ok(drex_create(&config, &engine));
    if (argc > 2 && strcmp(argv[2], "watched") == 0) {
        ok(drex_log_set(engine, hear, NULL, DREX_LOG_TRACE));
        ok(drex_trace_start(engine, 10000));
    }
    for (uint64_t id = 0; id < REQUESTS; id++) {
        drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
        request.id = id;
        ok(drex_request_add(engine, &request));
        ok(drex_request_ready(engine, id, 0, 0));
    }
    for (int s = 0; s < steps; s++) {
        drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
        drex_step step = DREX_STEP_INITIALIZER;
        drex_completion completion = DREX_COMPLETION_INITIALIZER;
        input.now_ns = now += 1000;
        ok(drex_plan(engine, &input, rows, BATCH, &step));
        if (step.ramp != DREX_NO_RAMP) {
            drex_logits l = DREX_LOGITS_INITIALIZER;
            /* Three of four are confident. */
            for (uint32_t i = 0; i < step.n_rows; i++) {
                logits[i][3] = (rows[i].request + (uint64_t)s) % 4 ? 20.f : 0.f;
            }
            l.data = logits;
            l.row_stride_bytes = sizeof logits[0];
            l.n_rows = step.n_rows;
            l.n_vocab = VOCAB;
            ok(drex_ramp(engine, &l, NULL, verdicts, BATCH));
        }
        completion.now_ns = now += 1000;
        completion.duration_ns = 900;
        ok(drex_complete(engine, &completion));
        for (uint32_t i = 0; i < step.n_rows; i++) {
            if (step.ramp == DREX_NO_RAMP || verdicts[i].decision == DREX_DECISION_EXIT) {
                ok(drex_request_ready(engine, rows[i].request, 0, now));
            }
        }
    }
    ok(drex_destroy(engine));
    return 0;
}
