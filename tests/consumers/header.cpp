// SPDX-License-Identifier: Apache-2.0
//
// drex.h alone, from C++11 on.

#include <drex.h>

#include <cstdio>

int main() {
  const uint32_t ramps[] = {4};
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
  drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
  drex_request_info info = DREX_REQUEST_INFO_INITIALIZER;
  drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
  drex_step step = DREX_STEP_INITIALIZER;
  drex_logits logits = DREX_LOGITS_INITIALIZER;
  drex_completion completion = DREX_COMPLETION_INITIALIZER;
  drex_observation observation = DREX_OBSERVATION_INITIALIZER;
  drex_stats stats = DREX_STATS_INITIALIZER;
  drex_pages_config pages = DREX_PAGES_CONFIG_INITIALIZER;
  drex_pages_stats pages_stats = DREX_PAGES_STATS_INITIALIZER;
  drex_engine *engine = nullptr;
  drex_row row;
  (void)layer, (void)logits, (void)observation, (void)pages, (void)pages_stats;

  config.n_layers = 8;
  config.n_ramps = 1;
  config.ramp_layers = ramps;
  config.policy = DREX_POLICY_OFF;
  config.n_slots = config.max_requests = config.max_batch = 1;
  request.id = 7;
  const bool good = drex_create(&config, &engine) == DREX_OK &&
                    drex_request_add(engine, &request) == DREX_OK &&
                    drex_request_ready(engine, 7, 0, 0) == DREX_OK &&
                    drex_plan(engine, &input, &row, 1, &step) == DREX_OK &&
                    step.n_rows == 1 && row.request == 7 && step.layer_end == 8 &&
                    drex_complete(engine, &completion) == DREX_OK &&
                    drex_request_get(engine, 7, &info) == DREX_OK && info.tokens == 1 &&
                    drex_stats_get(engine, &stats) == DREX_OK && stats.steps == 1 &&
                    drex_destroy(engine) == DREX_OK;
  std::printf("drex %s: %s\n", drex_version(), good ? "1 token" : drex_last_error());
  return good ? 0 : 1;
}
