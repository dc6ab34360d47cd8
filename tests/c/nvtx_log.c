/* SPDX-License-Identifier: Apache-2.0
 *
 * Prints what an engine warns of when its log is set. */

#include <drex.h>
#include <stdio.h>

static void print(void * user_data, drex_log_level level, const char * text) {
    (void) user_data;
    if (level == DREX_LOG_WARN) {
        puts(text);
    }
}

int main(void) {
    const uint32_t ramp = 2;
    drex_engine * engine;
    drex_config config = DREX_CONFIG_INITIALIZER;
    config.n_layers = 4;
    config.n_ramps = 1;
    config.ramp_layers = &ramp;
    config.n_slots = config.max_requests = config.max_batch = 1;
    return drex_create(&config, &engine) || drex_log_set(engine, print, NULL, DREX_LOG_INFO) || drex_destroy(engine);
}
