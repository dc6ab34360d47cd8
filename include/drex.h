/* SPDX-License-Identifier: Apache-2.0
 *
 * drex.h: early exit with dynamic rebatching for a serving engine.
 *
 * Generated from src/ffi by cbindgen. To change it, change the Rust source and
 * run DREX_BLESS=1 cargo test --test header.
 *
 *
 * 1. WHAT IT IS
 *
 * A model has exit ramps: points between layers where a head gives logits. A
 * token that is confident there is emitted at once; one that is not needs the
 * deeper layers. drex decides, row by row, and regroups the rows that go on, so
 * that the deep layers always run dense batches: a row that must go on is *held*
 * until enough of them are (dynamic rebatching). No row is made to exit unless
 * the policy says so by name.
 *
 * The host keeps its model, its kernels and its memory. drex tells it which
 * layers to run over which rows; it reads the ramp's logits and copies K/V cells
 * in place, and never allocates or copies tensors of its own.
 *
 *
 * 2. THE HOST'S LOOP
 *
 * The host owns an arena of n_slots hidden-state rows. Each iteration:
 *
 *   plan      drex_plan() names a window of layers [layer_begin, layer_end) and
 *             its rows; every row has a request and an arena row (slot).
 *   window    The host runs these layers over these rows, in this order. A window
 *             that begins at layer 0 starts from each request's next token, any
 *             other from the arena rows. A window that ends before the last layer
 *             leaves its hidden states in the arena rows and also gives logits.
 *   ramp      If step.ramp is not DREX_NO_RAMP: drex_ramp() reads the logits and
 *             gives a verdict per row. EXIT: emit the token from these logits.
 *             HOLD and STAY: leave the arena row alone, the row comes back in a
 *             later step. GONE: forget it. Otherwise: sample every row whose
 *             request was not removed meanwhile.
 *   fill      drex_fill() fills the K/V that exited rows left out.
 *   verify    Only with DREX_FILL_VERIFY, after a window that ends at the last
 *             layer: drex_verify() says which drafts stand.
 *   complete  drex_complete() ends the step and says how long the window took.
 *
 * For each token that was emitted, drex_request_ready() when the next one can
 * run, or drex_request_remove() when the request is finished.
 *
 * Prompts are the host's: a request is said to be ready when its prompt has run.
 * The host runs prompts between steps, as it likes; or, better, in windows.
 * Decode rows then ride along in the passes that prompts need anyway, and a
 * pass that is cut at a ramp takes held rows along from there, at no cost but
 * their own. Such a host
 *
 *   plan      says in drex_plan_input.n_prompt_rows how many prompt rows wait at
 *             layer 0. step.n_prompt_rows of them run along in a window from
 *             layer 0: the host takes them in its own order, whole prompts or
 *             parts. In a window from another layer, those run along that the
 *             last window with prompt rows left there: the next step always is
 *             theirs. drex only counts them.
 *   window    runs both kinds of rows through the layers in one batch, and keeps
 *             the hidden states of prompt rows in arena rows of its own, beyond
 *             n_slots. Prompt rows never exit; they need no logits, but for a
 *             prompt's last row at n_layers, whose logits give the first token.
 *   ramp      hands over the logits of the decode rows alone, if there are any.
 *   complete  counts the KV cells of the decode rows alone.
 *
 * drex_config.max_pass_rows bounds both kinds together. A request that ends
 * while its prompt is on its way simply has no rows in the next window.
 *
 * With DREX_FILL_POSTFILL and DREX_FILL_VERIFY, rows that exited come back in
 * later steps as *pending rows* (drex_row.back > 0), before their request's own
 * row: several rows of one sequence, causal among themselves.
 *
 *
 * A LOOP WITH THE DEFAULT FILL
 *
 * The whole of it. A test compiles and runs this text.
 *
 *   #include <drex.h>
 *   #include <stdio.h>
 *
 *   // The host's own: its model, its queue, its client.
 *   #define LAYERS 16
 *   #define BATCH 4
 *   #define VOCAB 100
 *   uint64_t host_now(void);  // ns of a monotonic clock
 *   int host_wait(drex_engine *engine);  // new requests: drex_request_add(), their
 *                                        // prompts, drex_request_ready(); 0: stop
 *   void host_run(uint32_t layer_begin, uint32_t layer_end, const drex_row *rows,
 *                 uint32_t n_rows, float logits[][VOCAB]);
 *   uint32_t host_cell(const drex_row *row);  // KV cell of the row's token
 *   int32_t host_sample(const float *logits);
 *   void host_emit(drex_engine *engine, uint64_t request, int32_t token);
 *                        // to the client; then drex_request_ready() or _remove()
 *
 *   static float logits[BATCH][VOCAB];
 *   static drex_row rows[BATCH];
 *
 *   // One iteration. When it fails, a step may still be planned: see host_loop().
 *   static drex_status iterate(drex_engine *engine, int *idle) {
 *     drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
 *     drex_step step = DREX_STEP_INITIALIZER;
 *     drex_completion completion = DREX_COMPLETION_INITIALIZER;
 *     drex_verdict verdicts[BATCH];
 *     drex_status status;
 *     uint64_t begin = host_now();
 *     uint32_t i;
 *
 *     input.now_ns = begin;
 *     status = drex_plan(engine, &input, rows, BATCH, &step);
 *     // A host without prompts in windows never gets step.n_prompt_rows.
 *     *idle = status == DREX_OK && step.n_rows == 0;
 *     if (status != DREX_OK || *idle) return status;
 *
 *     host_run(step.layer_begin, step.layer_end, rows, step.n_rows, logits);
 *
 *     if (step.ramp != DREX_NO_RAMP) {
 *       drex_logits scored = DREX_LOGITS_INITIALIZER;
 *       uint32_t cells[BATCH];
 *       for (i = 0; i < step.n_rows; i++) cells[i] = host_cell(&rows[i]);
 *       scored.data = logits;
 *       scored.row_stride_bytes = sizeof logits[0];
 *       scored.n_rows = step.n_rows;
 *       scored.n_vocab = VOCAB;
 *       status = drex_ramp(engine, &scored, cells, verdicts, BATCH);
 *       if (status == DREX_OK) status = drex_fill(engine);
 *       if (status != DREX_OK) return status;
 *     }
 *     completion.now_ns = host_now();
 *     completion.duration_ns = completion.now_ns - begin;
 *     status = drex_complete(engine, &completion);
 *     for (i = 0; status == DREX_OK && i < step.n_rows; i++) {
 *       if (step.ramp == DREX_NO_RAMP) {
 *         host_emit(engine, rows[i].request, host_sample(logits[i]));
 *       } else if (verdicts[i].decision == DREX_DECISION_EXIT) {
 *         host_emit(engine, rows[i].request, verdicts[i].token);
 *       }
 *     }
 *     return status;
 *   }
 *
 *   int host_loop(const drex_kv_layer *kv) {
 *     const uint32_t ramps[1] = { 8 };
 *     drex_config config = DREX_CONFIG_INITIALIZER;
 *     drex_engine *engine = NULL;
 *     drex_status status;
 *     int idle = 1;
 *
 *     config.n_layers = LAYERS;
 *     config.n_ramps = 1;
 *     config.ramp_layers = ramps;
 *     config.n_slots = config.max_requests = config.max_batch = BATCH;
 *     status = drex_create(&config, &engine);
 *     if (status == DREX_OK) status = drex_bind_kv(engine, kv, LAYERS);
 *     while (status == DREX_OK && (!idle || host_wait(engine))) {
 *       status = iterate(engine, &idle);
 *     }
 *     if (status != DREX_OK) {
 *       fprintf(stderr, "%s\n", drex_last_error());
 *       // This host ends. One that goes on ends the step first: see below.
 *     }
 *     drex_destroy(engine);
 *     return status == DREX_OK ? 0 : 1;
 *   }
 *
 * A row that exited may be emitted, and its request made ready, before
 * drex_complete() as well.
 *
 *
 * A LOOP WITH DRAFTS
 *
 * With DREX_FILL_VERIFY a token of a ramp is a draft. n_slots has room for the
 * rows that stay pending, and K/V is not bound. Only what follows the window
 * differs. A test compiles and runs this text, too.
 *
 *   // The host's own, besides.
 *   int32_t host_draft(const drex_row *row);  // what the row's ramp gave
 *   int host_is_last(const drex_row *row);    // no token follows the row's
 *   void host_keep(uint64_t request, int32_t draft);  // the next token's input
 *   void host_take_back(const drex_row *row);  // the row's token never was
 *   void host_give(const drex_row *row, int32_t token);  // to the client
 *   void host_next(drex_engine *engine, uint64_t request);
 *       // drex_request_ready(); without a next token, drex_request_settle() while
 *       // drafts are left, then drex_request_remove()
 *
 *   // The window ended at the ramp.
 *   static drex_status drafted(drex_engine *engine, const drex_step *step,
 *                              const drex_completion *completion) {
 *     drex_logits scored = DREX_LOGITS_INITIALIZER;
 *     drex_verdict verdicts[BATCH];
 *     drex_status status;
 *     uint32_t i;
 *
 *     scored.data = logits;
 *     scored.row_stride_bytes = sizeof logits[0];
 *     scored.n_rows = step->n_rows;
 *     scored.n_vocab = VOCAB;
 *     status = drex_ramp(engine, &scored, NULL, verdicts, BATCH);
 *     if (status == DREX_OK) status = drex_complete(engine, completion);
 *     for (i = 0; status == DREX_OK && i < step->n_rows; i++) {
 *       if (verdicts[i].decision == DREX_DECISION_EXIT) {
 *         host_keep(rows[i].request, verdicts[i].token);
 *         host_next(engine, rows[i].request);
 *       }
 *     }
 *     return status;
 *   }
 *
 *   // The window ended at the last layer.
 *   static drex_status verified(drex_engine *engine, const drex_step *step,
 *                               const drex_completion *completion) {
 *     drex_decision decisions[BATCH];
 *     int32_t tokens[BATCH];
 *     uint8_t agrees[BATCH];
 *     drex_status status;
 *     uint32_t i;
 *
 *     for (i = 0; i < step->n_rows; i++) {
 *       tokens[i] = host_sample(logits[i]);
 *       agrees[i] = rows[i].back > 0 && tokens[i] == host_draft(&rows[i]);
 *       if (agrees[i] && host_is_last(&rows[i])) agrees[i] = 2;
 *     }
 *     status = drex_verify(engine, agrees, step->n_rows, decisions, BATCH);
 *     if (status == DREX_OK) status = drex_complete(engine, completion);
 *     for (i = 0; status == DREX_OK && i < step->n_rows; i++) {
 *       const uint64_t request = rows[i].request;
 *       const int last = i + 1 == step->n_rows || rows[i + 1].request != request;
 *       if (decisions[i] == DREX_DECISION_GONE) continue;
 *       if (decisions[i] == DREX_DECISION_DROP) {
 *         host_take_back(&rows[i]);
 *       } else {
 *         host_give(&rows[i], tokens[i]);
 *       }
 *       if (last) host_next(engine, request);
 *     }
 *     return status;
 *   }
 *
 *
 * WHAT IS ALLOWED WHEN
 *
 * An engine has no step, or a planned one whose window ends at a ramp or at
 * n_layers, or one that has had its verdicts: *ramped* by drex_ramp(), *verified*
 * by drex_verify(). A call that has no "yes" here gets DREX_ERROR_CALL_ORDER.
 *
 *                   no step   to a ramp   to n_layers   ramped   verified
 *   drex_plan       yes       -           -             -        -
 *   drex_bind_kv    yes       -           -             -        -
 *   drex_gather     -         yes         yes           yes      yes
 *   drex_scatter    -         yes         yes           yes      yes
 *   drex_ramp       -         yes         -             -        -
 *   drex_top_get    -         -           -             yes      -
 *   drex_fill       -         -           -             yes      -
 *   drex_fill_plan  -         -           -             yes      -
 *   drex_verify     -         -           yes           -        -
 *   drex_complete   -         -           yes           yes      yes
 *   drex_abandon    -         yes         yes           yes      yes
 *
 * All other calls are allowed at any time: requests come and go, the rule is
 * searched for, statistics are read. A "yes" has conditions:
 *
 *   drex_complete  Drafts of a step to n_layers had drex_verify(). Holes of a
 *                  ramped step, where K/V is bound and rows with DREX_FILL_COPY
 *                  exited, had drex_fill() or drex_fill_plan(). A step of prompt
 *                  rows alone (n_rows = 0) needs no drex_ramp() before it.
 *   drex_fill      K/V is bound; so it is for drex_fill_plan().
 *   drex_top_get   The ramp's logits had n_top > 0.
 *
 * drex_request_ready() and drex_request_settle() want an IDLE request.
 *
 *
 * WHEN A WINDOW FAILED
 *
 * Call drex_abandon() instead of what is left of the step:
 *
 *   before ramp  Every row goes back to where it was.
 *   after ramp   The exits stand: emit their tokens. Call drex_fill() before
 *                drex_abandon(), else their holes stay open. The other rows go
 *                back.
 *   arena rows   Rows that go back start once more from what their arena rows had
 *                when the step was planned, so the window must not have changed
 *                those that it started from. Where it has, as a window above layer
 *                0 that ran to its ramp in place, the step cannot be abandoned:
 *                complete it.
 *   prompt rows  They are forgotten, and wait at layer 0 again.
 *
 * The same calls with the same arguments always give the same results.
 *
 *
 * 3. THREADS
 *
 * An engine, and a pool of pages (drex_pages), may be used from any thread, by
 * one at a time: a second one that comes while a call runs gets
 * DREX_ERROR_HANDLE_BUSY at once, and nothing happens. So does a thread that only
 * reads, such as one that answers a scrape by drex_metrics_text(); it may try
 * again. Different ones work from different threads at the same time. Functions
 * that take neither may be called from any thread at any time. Each thread has its
 * own drex_last_error().
 *
 * Callbacks (drex_log_callback, drex_trace_sink) run on the thread and inside
 * the call that caused them: with several engines, on several threads. The
 * engine is busy meanwhile; other engines are not.
 *
 * On the host no call waits for anything; for a CUDA device see chapter 7.
 * All calls of the loop allocate nothing, take no lock and make no system call
 * but those of a CUDA driver: drex_request_*(), drex_plan(), drex_ramp(),
 * drex_top_get(), drex_gather(), drex_scatter(), drex_fill(), drex_verify(),
 * drex_speculate(), drex_complete(), drex_abandon(), drex_observe(),
 * drex_replan() and drex_stats_get(), and of pages all but drex_pages_create()
 * and drex_pages_destroy(). A log or a trace does not change that; a Rust host's
 * tracing subscriber does what it does. No call starts a thread, installs a
 * signal handler or prints. None opens a file, but for drex_create(), which loads
 * libraries: libcuda for a CUDA engine, and with the process's first engine the
 * one that NVTX_INJECTION64_PATH names, which a profiler sets. No panic and no
 * exception leaves a call.
 *
 *
 * 4. STRUCTS THAT BEGIN WITH THEIR SIZE
 *
 * Begin every such struct with its INITIALIZER macro, which sets its size and
 * the defaults, then set fields. So a program built against this header works
 * with later libraries, where structs may have more fields at their end:
 *
 *   input   A size below the first version's is DREX_ERROR_STRUCT_SIZE. What an
 *           older program does not pass has the value that the macro gives. Bytes
 *           beyond what the library knows must be 0, else a newer program relies
 *           on something that this library lacks: DREX_ERROR_STRUCT_SIZE too.
 *           So is a size above 4096, here and for outputs: it is none.
 *   output  The caller sets size; the library writes no more than that, and not
 *           the size itself. A size below the first version's is an error. What
 *           lies beyond what the library knows is left as it was, which is 0
 *           after the INITIALIZER.
 *   arrays  of such structs: the size of the first element is the distance from
 *           one to the next.
 *
 * drex_row, drex_verdict, drex_top and drex_page_copy have no size and never grow.
 *
 * A program may compare drex_abi_version() with DREX_ABI_VERSION at its start;
 * drex_create() does so by itself.
 *
 *
 * 5. CONVENTIONS
 *
 * Rules that hold where an item does not say otherwise:
 *
 *   units    Times are in nanoseconds, sizes and strides in bytes, layers count
 *            from 0 and windows are half open.
 *   arrays   [n] before a text: what the pointer points to has n elements. Of
 *            the host's memory only what drex_speculate() reads and the tables of
 *            drex_pages_*() must be aligned, to 4 bytes, else it is
 *            DREX_ERROR_INVALID_ARGUMENT.
 *   NULL     No pointer may be NULL: DREX_ERROR_NULL_ARGUMENT.
 *   owner    What is passed in stays the caller's, is not changed where it is
 *            const, and is not kept beyond the call; exceptions are the tensors
 *            bound by drex_bind_kv() and what drex_log_set() is given. Handles
 *            are the caller's to destroy. Returned texts are the library's and
 *            static.
 *   outputs  Written last, and only when the call returns DREX_OK. The one
 *            exception: where a text does not fit, its length is written, and
 *            the call returns DREX_ERROR_CAPACITY.
 *   errors   Every call that returns a status can return DREX_ERROR_PANIC, and
 *            every call on a handle DREX_ERROR_NULL_ARGUMENT,
 *            DREX_ERROR_INVALID_HANDLE and DREX_ERROR_HANDLE_BUSY. "Errors:"
 *            names the others, without DREX_ERROR_.
 *   memory   Where a call's errors have DREX_ERROR_MEMORY, what grows with its
 *            arguments is asked for, and may be refused. Elsewhere (small needs
 *            of these calls, profiles, snapshots, metrics, the writing of a
 *            trace) a refusal ends the process. CUDA's memory is
 *            DREX_ERROR_DEVICE.
 *   threads  Chapter 3.
 *   since    What is younger than version 0.1 says in which version it came.
 *            DREX_VERSION_* is the header's version, drex_version() the
 *            library's.
 *   clock    Times are those of one clock of the host's. Where it goes back, waits
 *            that began later count as 0; nothing else happens.
 *
 *
 * 6. PAGED K/V
 *
 * For hosts whose K/V lies in pages of one pool, a page holding some tokens of
 * one layer, and whose block tables name a page for each (layer, block) of a
 * sequence. A token that left after e layers has the K/V of layer e - 1 in all
 * later ones, so their entries can name that layer's page and nothing is copied;
 * cells are copied only in blocks whose tokens left at different depths, and
 * never more of them than drex_fill() would copy (but for what sequences that
 * share a block copy when they part). The table, the K/V and the
 * copying are the host's, drex plans and counts references. Instead of
 * drex_bind_kv() and drex_fill():
 *
 *   window    Before it runs, for each row in its order: drex_pages_write(), and
 *             its copies.
 *   exit      After drex_ramp(), for each row with EXIT and DREX_FILL_COPY:
 *             drex_pages_exit(), and its copies.
 *   end       drex_pages_release() for a sequence that ends or is cut back;
 *             drex_pages_fork() where another one shares its beginning.
 *
 * Calls on pages need no engine.
 *
 *
 * 7. CUDA
 *
 * With DREX_DEVICE_CUDA, logits, K/V and arena rows are pointers of a CUDA
 * device. libcuda is looked for when such an engine is made; nothing else of
 * drex needs it. The engine works in the CUDA context that is current when it is
 * made. Later calls may come from any thread: one that needs another context
 * than the current one pushes it, and pops it before it returns. The context
 * must outlive the engine. Scratch memory, 20 bytes for each row and 2048 logits of
 * n_vocab and some more with n_top, is allocated in drex_create() and
 * drex_bind_kv(), not later; these two wait until what they write is there.
 *
 *   ramp      One launch that reads the logits once, a copy of 20 bytes a row to
 *             pinned memory, and a wait for the stream. drex_ramp_enqueue()
 *             splits off the wait. No other call of a step waits, unless more
 *             than 224 rows are used on several streams, or the step before was
 *             abandoned after drex_ramp_enqueue(): then drex_plan() waits for it.
 *   fill      One launch on the stream of the ramp's logits, not waited for.
 *   streams   Work is enqueued on the streams that the host names, and is in
 *             order with what the host enqueues there. The legacy default stream
 *             is not ordered with non-blocking ones.
 *
 * Graphs. drex_ramp_enqueue(), drex_fill_enqueue(), drex_gather() and
 * drex_scatter() may be called while the host captures a stream. What changes
 * from step to step is read, when the graph runs, from memory that the following
 * calls write; so a graph is captured once for each number of rows (ramp) or once
 * (the others), and then, in each step:
 *
 *   drex_plan()       names the arena rows for gather and scatter
 *   launch            window, gather, scatter, ramp
 *   drex_ramp()       with logits.enqueued = 1: waits, and decides
 *   drex_fill_plan()  names the holes
 *   launch            fill, on the same stream
 *   drex_complete()
 *
 * The logits' address, row length and n_top are those of the capture, and so is
 * the bound K/V: a graph with a fill is invalid after drex_bind_kv(). A launched
 * graph must have ended before the next call that writes what it reads; on one
 * stream, with drex_ramp() between, it has.
 *
 * An error of the driver is DREX_ERROR_DEVICE, with its name and text in
 * drex_last_error(). After one that CUDA calls sticky, such as an illegal
 * address, the context is lost, and the engine can only be destroyed.
 */

#ifndef DREX_H
#define DREX_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* The version of this header. */
#define DREX_VERSION_MAJOR 0
#define DREX_VERSION_MINOR 1
#define DREX_VERSION_PATCH 0

/* Initializers, for instance: drex_config config = DREX_CONFIG_INITIALIZER;
 *
 * Each sets the struct's size and the defaults named here; all else is 0. */

/* policy AUTO, metric GAP, threshold 0.7, art_ratio NaN. n_layers, n_ramps,
 * ramp_layers, n_slots, max_requests and max_batch must be set. */
#define DREX_CONFIG_INITIALIZER                                              \
  { sizeof(drex_config), DREX_ABI_VERSION, 0, 0, NULL, 0, 0, 0,              \
    DREX_POLICY_AUTO, DREX_METRIC_GAP, DREX_FILL_COPY, DREX_DEVICE_HOST,     \
    0.7f, NULL, 0, 0, 0, 0, NAN, 0, 0, 0, 0, 0, 0 }

/* n_cells, and the fields of K, V or both, must be set. */
#define DREX_KV_LAYER_INITIALIZER                                            \
  { sizeof(drex_kv_layer), 0, NULL, NULL, 0, 0, 0, 0, 0, 0 }

/* The engine's metric, thresholds and fill mode. id must be set. */
#define DREX_REQUEST_CONFIG_INITIALIZER                                      \
  { sizeof(drex_request_config), DREX_METRIC_DEFAULT, 0, NAN,                \
    DREX_FILL_DEFAULT, 0, 0, 0, 0, 0 }

#define DREX_REQUEST_INFO_INITIALIZER                                        \
  { sizeof(drex_request_info), 0, 0, 0, 0, { 0 }, 0, 0, 0, 0, 0, 0 }

/* now_ns must be set. */
#define DREX_PLAN_INPUT_INITIALIZER                                          \
  { sizeof(drex_plan_input), 0, 0 }

/* Of an output: nothing must be set, here and in the two _INFO and _STATS ones. */
#define DREX_STEP_INITIALIZER                                                \
  { sizeof(drex_step), 0, 0, 0, DREX_NO_RAMP, DREX_FLUSH_NONE, 0 }

/* dtype F32. data, row_stride_bytes, n_rows and n_vocab must be set. */
#define DREX_LOGITS_INITIALIZER                                              \
  { sizeof(drex_logits), DREX_DTYPE_F32, NULL, 0, 0, 0, NULL, 0, 0, NULL, NULL }

#define DREX_ARENA_INITIALIZER                                               \
  { sizeof(drex_arena), 0, NULL, NULL, 0, 0, 0, NULL }

/* now_ns must be set. */
#define DREX_COMPLETION_INITIALIZER                                          \
  { sizeof(drex_completion), 0, 0, 0, 0 }

/* n_rows, the layers and duration_ns must be set. */
#define DREX_OBSERVATION_INITIALIZER                                         \
  { sizeof(drex_observation), 0, 0, 0, 0, 0, 0, 0 }

#define DREX_STATS_INITIALIZER                                               \
  { sizeof(drex_stats), 0, 0, { 0 }, 0, 0, { 0 }, 0, { 0 }, 0, 0, 0, 0, 0,   \
    0, 0, 0, 0, { 0 }, 0, 0, { 0 }, 0, 0, 0, 0, 0, 0, 0, { 0 }, 0, 0, 0, 0, 0,  \
    0, 0 }

/* All must be set. */
#define DREX_PAGES_CONFIG_INITIALIZER                                        \
  { sizeof(drex_pages_config), 0, 0, 0 }

#define DREX_PAGES_STATS_INITIALIZER                                         \
  { sizeof(drex_pages_stats), 0, 0, 0, 0, 0, 0, 0 }

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/* -----------------------------------------------------------------------------
 * Versions, status codes and error texts
 */

// The version of this interface. It changes only when something that worked
// stops working; new functions, constants and fields at the end of structs
// do not change it.
#define DREX_ABI_VERSION 1

// How a call went: DREX_OK (0) or one of DREX_ERROR_*. The numbers never
// change their meaning; a later version may add more, so treat any number
// but 0 as a failure. A call that fails changes nothing and writes none of
// its outputs (chapter 5 has the one exception), and leaves a text that names
// the function, the field and the value: see drex_last_error().
typedef int32_t drex_status;

// Done.
#define DREX_OK 0
// A pointer that may not be NULL is.
#define DREX_ERROR_NULL_ARGUMENT 1
// A value is out of range, or clashes with another one.
#define DREX_ERROR_INVALID_ARGUMENT 2
// drex_config.abi_version is not the library's.
#define DREX_ERROR_ABI_MISMATCH 3
// A struct's size field is too small, or the struct comes from a later
// version and uses fields that this library does not know.
#define DREX_ERROR_STRUCT_SIZE 4
// The handle was never given out, or what it stood for has been destroyed, or
// is of the other kind (drex_engine, drex_pages).
#define DREX_ERROR_INVALID_HANDLE 5
// Another thread is inside a call on this handle, or this one is, in a
// callback.
#define DREX_ERROR_HANDLE_BUSY 6
// No request alive has this id.
#define DREX_ERROR_UNKNOWN_REQUEST 7
// A request with this id is alive already.
#define DREX_ERROR_DUPLICATE_REQUEST 8
// The call does not fit the calls before it, such as ramp without plan.
#define DREX_ERROR_CALL_ORDER 9
// Something of fixed size is full, or an array is too short.
#define DREX_ERROR_CAPACITY 10
// The value is known, and this version cannot serve it.
#define DREX_ERROR_UNSUPPORTED 11
// The device failed.
#define DREX_ERROR_DEVICE 12
// A bug in drex was caught, or one in a Rust host's tracing subscriber. The
// handle that the call was on is poisoned: every call on it but the one that
// destroys it returns this again.
#define DREX_ERROR_PANIC 13
// There is not as much memory as the call asked for. Only calls that name it
// return this: see chapter 5.
#define DREX_ERROR_MEMORY 14

// The library's version, such as "0.1.0". Static; never NULL.
const char *drex_version(void);

// The library's DREX_ABI_VERSION, to compare with the header's.
uint32_t drex_abi_version(void);

// A status by its name, such as "DREX_ERROR_CAPACITY"; "DREX_ERROR_UNKNOWN"
// for a number that this version does not know. Static; never NULL.
const char *drex_status_name(drex_status status);

// The general meaning of a status, such as "another thread is inside a call on
// this handle"; "unknown status" for a number that this version does not
// know. drex_last_error() says what it was in particular. Static; never NULL.
const char *drex_status_text(drex_status status);

// The text of the last call that failed on the calling thread, in UTF-8,
// such as "drex_create: threshold is NaN; expected a finite number >= 0".
// Empty before the first; a call that succeeds leaves it alone. Valid until
// the next failure on this thread, or the thread's end. Never NULL; not to
// be freed.
const char *drex_last_error(void);

/* -----------------------------------------------------------------------------
 * Engines and their configuration
 */

// Most exit ramps that a model may have.
#define DREX_MAX_RAMPS 16
// Most of the greatest logits of a row that a ramp lists.
#define DREX_MAX_TOP 64
// In place of a ramp's index: none.
#define DREX_NO_RAMP UINT32_MAX
// In place of an arena row: none.
#define DREX_NO_SLOT UINT32_MAX

// The rule by which rows leave at a ramp: DREX_POLICY_*. A row is *confident*
// when its confidence is at least its threshold. Under every policy, a row whose
// confidence is NaN and a row whose threshold is above 1 go on.
//
// An *involuntary exit* is a row made to exit below its threshold; only
// EAGER, MEDIAN and MEAN do that. An *involuntary stay* is a confident row
// that goes on with its batch. Both are counted, and marked in the verdict.
typedef uint32_t drex_policy;

// Full passes only; no ramp is ever reached.
#define DREX_POLICY_OFF 0
// One confident row makes the whole batch exit. Forces rows out.
#define DREX_POLICY_EAGER 1
// The batch exits when all of its rows are confident, else all go on at
// once. Rows with a threshold above 1 have no say.
#define DREX_POLICY_LAZY 2
// The batch exits when the median of (confidence - threshold) is at least 0;
// of an even number of rows, the mean of the middle two. Rows without a
// number, or with a threshold above 1, have no say. Forces rows out.
#define DREX_POLICY_MEDIAN 3
// As MEDIAN, with the mean. Forces rows out.
#define DREX_POLICY_MEAN 4
// Confident rows exit, the rest go on at once.
#define DREX_POLICY_LATENCY 5
// Confident rows exit, the rest are held in the rebatching buffer until
// drex_config.flush_rows are held, or fewer than drex_config.min_ready rows
// are ready, or one has waited too long, or a deadline is near.
#define DREX_POLICY_HOLD 6
// DREX's adaptive rebatching threshold: a batch of b rows of which b' are
// confident is split (confident rows exit, the rest are held) when b' = b or
// b' > (c/t_d) b, where c = t_s + t_d - t_f is what splitting costs; else
// all go on at once. The times of the shallow (t_s), deep (t_d) and full
// (t_f) pass at b rows are learned from drex_complete() and drex_observe();
// while one is unknown, c/t_d is taken as 0. Full passes are not run by
// themselves while rows may exit: time a few and report them with
// drex_observe(). c/t_d is kept within [0, 1].
#define DREX_POLICY_ART 7
// As HOLD, with the rule that is predicted to make the most tokens per
// second, "no early exit" among the rules: which ramps are looked at, how
// many held rows flush, below how many ready rows. Learned from what
// drex_complete() and the ramps report: times by rows and KV cells, how
// often rows exit. A small share of the tokens is made under other rules,
// to keep knowing what they would bring. See drex_replan().
#define DREX_POLICY_AUTO 8

// How sure a row is, from its raw logits (before temperature, penalties and
// grammar), in [0, 1]: DREX_METRIC_*.
typedef uint32_t drex_metric;

// p(top 1) - p(top 2)
#define DREX_METRIC_GAP 0
// p(top 1)
#define DREX_METRIC_MAXPROB 1
// 1 - H / ln(n_vocab), where H is the entropy in nats; 1 for n_vocab = 1
#define DREX_METRIC_ENTROPY 2
// In a request: the engine's metric.
#define DREX_METRIC_DEFAULT UINT32_MAX

// How the K/V entries of the layers that an exited token skipped (its
// *hole*) are filled: DREX_FILL_*. Requests of one batch may differ.
typedef uint32_t drex_fill_mode;

// State-copy: K and V of the last computed layer at the token's cell are
// copied to all skipped layers.
#define DREX_FILL_COPY 0
// K and V of the skipped layers are computed. The token's hidden row stays in the
// arena, *pending*, and goes along when its request next goes through the skipped
// layers: exactly what the full model would have put there for this text.
#define DREX_FILL_POSTFILL 1
// As POSTFILL, and the token is a draft: emitted, that is given to the
// client, when the full model's logits for the pending row agree; else
// replaced, and what was made after it is void. See drex_verify(). The output
// is that of the full model. Deadlines do not hurry drafts on: the tokens of
// up to max_pending rows come together, when the rows have gone deep.
#define DREX_FILL_VERIFY 2
// The host fills them: after drex_ramp(), before the arena row is used again,
// it runs the skipped layers' own K and V projections over the rows that left,
// from their hidden states as they are (state propagation, Schuster et al.,
// arXiv 2207.07061). Closer to the full model than COPY, at the price of these
// projections; drex_fill() leaves such rows alone.
#define DREX_FILL_PROPAGATE 3
// In a request: the engine's mode.
#define DREX_FILL_DEFAULT UINT32_MAX

// Where logits, arena rows and K/V lie: DREX_DEVICE_*.
typedef uint32_t drex_device;

// Memory that the calling thread can read and write.
#define DREX_DEVICE_HOST 0
// Memory of a CUDA device. drex_create() needs a current CUDA context on its
// thread, and the engine works in that one: see chapter 7.
#define DREX_DEVICE_CUDA 1

// One engine: the scheduler of one model engine. Opaque, and not an
// address: never read through it. Made by drex_create(), ended by
// drex_destroy(). A destroyed handle gives DREX_ERROR_INVALID_HANDLE.
typedef struct drex_engine drex_engine;

// The description of an engine. Everything is copied; no pointer is kept.
typedef struct drex_config {
  // sizeof(drex_config)
  uint32_t size;
  // DREX_ABI_VERSION
  uint32_t abi_version;
  // Layers of the model, 2..65536.
  uint32_t n_layers;
  // Exit ramps, 1..DREX_MAX_RAMPS.
  uint32_t n_ramps;
  // [n_ramps] strictly increasing, each in 1..n_layers-1; a ramp at L
  // follows layers [0, L). Not NULL.
  const uint32_t *ramp_layers;
  // Rows of the host's hidden-state arena, 1..1048576; at least
  // max_requests, since every request may hold one. What is beyond is room
  // for pending rows, see DREX_FILL_POSTFILL; when it is full, rows go deep
  // rather than exit.
  uint32_t n_slots;
  // Most requests alive at once, 1..1048576.
  uint32_t max_requests;
  // B: most decode rows in one pass, pending ones included, 1..1048576.
  uint32_t max_batch;
  // The rule by which rows leave at a ramp.
  drex_policy policy;
  // How sure a row is, for requests that do not name a metric; not
  // DREX_METRIC_DEFAULT.
  drex_metric metric;
  // How holes are filled, for requests that do not name a mode; not
  // DREX_FILL_DEFAULT.
  drex_fill_mode fill;
  // Where logits, arena rows and K/V lie, all of them.
  drex_device device;
  // Finite, >= 0. A row exits when its confidence >= threshold; above 1:
  // never.
  float threshold;
  // [n_ramps] one threshold per ramp, or NULL: `threshold` for every ramp.
  const float *ramp_thresholds;
  // Rows held at a ramp that force a flush. 0: the policy's own rule (ART:
  // max_batch; HOLD: 0.6 of the requests that have had a token to run, or
  // of max_batch if that is less, rounded up).
  uint32_t flush_rows;
  // HOLD: flush when fewer rows than this are ready. 0 means 1.
  uint32_t min_ready;
  // Flush a row that was held this long, in ns. 0: 8 times the predicted time
  // of its remaining layers, for as many rows as are held there; while no time
  // is known, once 256 other steps have passed it by.
  uint64_t max_hold_ns;
  // Time between two tokens that a request may take, in ns; 0: none. A
  // request may name its own.
  uint64_t token_deadline_ns;
  // Pins c/t_d of ART, finite, >= 0; NaN: as measured.
  float art_ratio;
  // 0
  uint32_t reserved;
  // AUTO: of the random numbers that its predictions draw. Any number.
  uint64_t seed;
  // POSTFILL, VERIFY: pending rows of a request at most; 0: 8. When it has
  // so many, its next row goes deep even if it is confident (an involuntary
  // stay). They and that row must fit into max_batch, which cuts it.
  uint32_t max_pending;
  // CUDA: most logits of a row, which scratch memory is made for; 0:
  // 524288. On the host, rows may have any length.
  uint32_t n_vocab;
  // Most of the greatest logits that a ramp is asked to list, see
  // drex_top_get(); 0..DREX_MAX_TOP.
  uint32_t n_top;
  // Most rows of one window, decode rows and prompt rows together; 0:
  // max_batch. At least max_batch, at most 1048576. For hosts that name
  // drex_plan_input.n_prompt_rows.
  uint32_t max_pass_rows;
} drex_config;

// Makes an engine. What serving needs is allocated here; chapter 3 says which
// calls allocate nothing.
//
// config  copied, with what it points to
// out     receives the engine; the caller owns it and ends it with
//         drex_destroy()
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, ABI_MISMATCH, INVALID_ARGUMENT; MEMORY;
// CAPACITY when 256 engines are alive in this process; with DREX_DEVICE_CUDA also
// UNSUPPORTED where there is no CUDA driver, CALL_ORDER where no context is
// current, and DEVICE.
drex_status drex_create(const drex_config *config, drex_engine **out);

// Ends an engine, in any state, and frees what it holds. The host's tensors
// are not touched. NULL is fine.
//
// Errors: INVALID_HANDLE for one that is destroyed already; HANDLE_BUSY
// while another thread is inside, and then the engine lives on.
drex_status drex_destroy(drex_engine *engine);

// A policy's name in lower case, such as "hold"; NULL when unknown. Static.
const char *drex_policy_name(drex_policy policy);

// A metric's name in lower case, such as "gap"; NULL when unknown. Static.
const char *drex_metric_name(drex_metric metric);

// A fill mode's name in lower case, such as "copy"; NULL when unknown. Static.
const char *drex_fill_name(drex_fill_mode fill);

// The policy of a name, exactly as drex_policy_name() writes it.
//
// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
drex_status drex_policy_from_name(const char *name, drex_policy *out);

// The metric of a name, exactly as drex_metric_name() writes it.
//
// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
drex_status drex_metric_from_name(const char *name, drex_metric *out);

// The fill mode of a name, exactly as drex_fill_name() writes it.
//
// Errors: NULL_ARGUMENT; INVALID_ARGUMENT for an unknown name.
drex_status drex_fill_from_name(const char *name, drex_fill_mode *out);

/* -----------------------------------------------------------------------------
 * The host's K/V cache, for state-copy
 */

// The K/V cache of one layer. The tensors stay the host's, and must stay
// valid until other ones are bound or the engine is destroyed.
//
// K of cell c is k_row_bytes bytes at k + c * k_cell_stride, whatever they
// mean: quantised rows are copied as they are. V lies the same way (*row
// layout*) or *transposed*: element j of cell c is v_elem_bytes bytes at
// v + j * v_elem_stride + c * v_elem_bytes. A side with 0 row bytes does not
// exist, and its pointer may be NULL.
typedef struct drex_kv_layer {
  // sizeof(drex_kv_layer)
  uint32_t size;
  // Cells in the cache, at least 1.
  uint32_t n_cells;
  // K of cell 0.
  void *k;
  // V of cell 0; in the transposed layout, its element 0.
  void *v;
  // Bytes of one cell's K; 0: the layer has none.
  uint64_t k_row_bytes;
  // Bytes from one cell's K to the next one's; at least k_row_bytes.
  uint64_t k_cell_stride;
  // Bytes of one cell's V; 0: the layer has none. In the transposed layout,
  // a multiple of v_elem_bytes.
  uint64_t v_row_bytes;
  // Row layout: bytes from one cell's V to the next one's, at least
  // v_row_bytes. Unused in the transposed layout.
  uint64_t v_cell_stride;
  // 0: row layout. Else transposed: bytes of one element.
  uint64_t v_elem_bytes;
  // Transposed layout: bytes from element j to element j + 1 of one cell,
  // at least n_cells * v_elem_bytes. Unused in the row layout.
  uint64_t v_elem_stride;
} drex_kv_layer;

// Names the K/V cache that drex_fill() works on. Binding again replaces it.
//
// Without it, filling the holes of exited rows is the host's business.
//
// layers    [n_layers] copied; the tensors stay the host's. The size of the
//           first element is the distance to the next. NULL with n_layers =
//           0 unbinds.
// n_layers  drex_config.n_layers
//
// Layers before the first ramp's last one are not looked at. The others need
// K rows of one size and V rows of one size and layout, and tensors of their
// own.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; MEMORY; UNSUPPORTED,
// with the layers named, where state-copy cannot work; CALL_ORDER while a step
// is planned; DEVICE. After a failure, what was bound before still is.
drex_status drex_bind_kv(drex_engine *engine,
                         const drex_kv_layer *layers,
                         uint32_t n_layers);

/* -----------------------------------------------------------------------------
 * Requests, from their first token to their end
 */

// The state of a request: DREX_REQUEST_*.
typedef uint32_t drex_request_state;

// The request has no token to run: its prompt is being processed, or the host
// is sampling.
#define DREX_REQUEST_IDLE 0
// A token waits for the first window.
#define DREX_REQUEST_READY 1
// Its row is in the planned step, or was told to stay and is in the next.
#define DREX_REQUEST_RUNNING 2
// Its row waits in the rebatching buffer.
#define DREX_REQUEST_HELD 3

// The description of a request.
typedef struct drex_request_config {
  // sizeof(drex_request_config)
  uint32_t size;
  // Or DREX_METRIC_DEFAULT.
  drex_metric metric;
  // Chosen by the host; unique among the requests alive. Any number.
  uint64_t id;
  // For every ramp, as drex_config.threshold; NaN: the engine's.
  float threshold;
  // Or DREX_FILL_DEFAULT.
  drex_fill_mode fill;
  // Time between two tokens, in ns; 0: the engine's.
  uint64_t token_deadline_ns;
  // Higher is taken first when more rows wait than fit. Of priorities
  // that wait at one time, 64 are told apart.
  int32_t priority;
  // 0
  uint32_t reserved;
  // Time from the first drex_request_ready() to the last token, in ns; 0:
  // none. What is left of it is spread evenly over the tokens left, so
  // each has a deadline; the nearer one counts.
  uint64_t request_deadline_ns;
  // Tokens that it will have at most; 0: unknown, and then only the
  // request's deadline itself counts.
  uint64_t max_tokens;
} drex_request_config;

// A request's state and counters.
typedef struct drex_request_info {
  // sizeof(drex_request_info), set by the caller
  uint32_t size;
  // The state that it is in.
  drex_request_state state;
  // Where its row is held, else DREX_NO_RAMP.
  uint32_t ramp;
  // The arena row that its row occupies, else DREX_NO_SLOT.
  uint32_t slot;
  // Tokens decoded through drex so far.
  uint64_t tokens;
  // Rows that left at each ramp. With DREX_FILL_VERIFY they are drafts, and
  // count here also where they were replaced or dropped later, so there may
  // be more of them than tokens.
  uint64_t exits[DREX_MAX_RAMPS];
  // Of the exits, those below the row's threshold; see drex_policy.
  uint64_t involuntary_exits;
  // Times that its row was confident at a ramp and went on.
  uint64_t involuntary_stays;
  // Total time spent held, in ns; what is held now is not in it.
  uint64_t held_ns;
  // Tokens that came later than their deadline.
  uint64_t deadline_misses;
  // At the last ramp that its row passed; NaN before the first.
  float last_confidence;
  // Pending rows, see DREX_FILL_POSTFILL: of the tokens right before its
  // next one, or before its own row if it has one.
  uint32_t n_pending;
} drex_request_info;

// Makes a request known. It is IDLE: say drex_request_ready() when its
// prompt is done and its first token can run.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE; INVALID_ARGUMENT, also for a fill mode
// that n_slots or max_batch leave no room for; DUPLICATE_REQUEST; CAPACITY
// when max_requests are alive.
drex_status drex_request_add(drex_engine *engine,
                             const drex_request_config *request);

// The request's next token can run: IDLE becomes READY.
//
// id      of a request alive and IDLE
// n_kv    KV cells that the row attends over, 0 if unknown; a hint that this
//         version does not use: see drex_completion.n_kv
// now_ns  now; the first call starts the clock of the request's deadline
//
// A row that exited may be made ready again before drex_complete().
//
// Errors: UNKNOWN_REQUEST; CALL_ORDER when it is not IDLE.
drex_status drex_request_ready(drex_engine *engine,
                               uint64_t id,
                               uint32_t n_kv,
                               uint64_t now_ns);

// Forgets a request: finished, or cancelled, in any state, also between plan
// and complete. Its id is free at once. A held row leaves the buffer and its
// arena row is free at once; the arena row of a row in the planned step is
// free when the step ends, and drex_ramp() and drex_verify() say
// DREX_DECISION_GONE for it. Where neither is called, because the window ends at
// n_layers and has no drafts, the host passes over its logits by itself.
// The hole of a row that exited and was not filled yet is not filled.
//
// Errors: UNKNOWN_REQUEST.
drex_status drex_request_remove(drex_engine *engine, uint64_t id);

// A request's state and counters.
//
// out  its size is set by the caller
//
// Errors: UNKNOWN_REQUEST, NULL_ARGUMENT, STRUCT_SIZE.
drex_status drex_request_get(const drex_engine *engine,
                             uint64_t id,
                             drex_request_info *out);

// Sends an IDLE request's pending rows to the last layer without a newer
// row, in the next steps: at the request's end under DREX_FILL_VERIFY, or
// wherever its K/V must be whole (before it is saved or shared). The request
// is RUNNING until the last of them is through, then IDLE.
//
// now_ns   now
// pending  receives how many rows; 0: there is none, and the request stays
//          IDLE; may be NULL
//
// Errors: UNKNOWN_REQUEST; CALL_ORDER when it is not IDLE, or when a row of it
// is in a step that is not complete.
drex_status drex_request_settle(drex_engine *engine,
                                uint64_t id,
                                uint64_t now_ns,
                                uint32_t *pending);

/* -----------------------------------------------------------------------------
 * The next window and its rows
 */

// Why a step runs: DREX_FLUSH_*.
typedef uint32_t drex_flush_reason;

// Ready rows and prompt rows run through the first window.
#define DREX_FLUSH_NONE 0
// Enough rows were held.
#define DREX_FLUSH_FILL 1
// A row was held for as long as drex_config.max_hold_ns says.
#define DREX_FLUSH_AGE 2
// A held row's token would have missed its deadline.
#define DREX_FLUSH_DEADLINE 3
// Nothing else is left to run; under HOLD, fewer than min_ready rows.
#define DREX_FLUSH_IDLE 4
// Rows that a ramp told to go on at once.
#define DREX_FLUSH_STAY 5
// Prompt rows go on from a ramp, and take along what waits there.
// Since 0.2.
#define DREX_FLUSH_PROMPT 6
// How many reasons there are; a later version may have more, up to
// DREX_MAX_FLUSH_REASONS.
#define DREX_FLUSH_REASONS 7

// The input of drex_plan().
typedef struct drex_plan_input {
  // sizeof(drex_plan_input)
  uint32_t size;
  // Prompt rows that wait at layer 0 and could run now, without those that a
  // window left at a ramp. 0, always: the host runs prompts between steps, and
  // what they cost is learned from the time between steps. Taken for 0 where
  // drex_plan()'s out is too small for drex_step.n_prompt_rows.
  uint32_t n_prompt_rows;
  // Now, in ns of any monotonic clock; the same clock in all calls.
  uint64_t now_ns;
} drex_plan_input;

// A row of the planned step.
typedef struct drex_row {
  // The request's id.
  uint64_t request;
  // The row of the hidden-state arena, below n_slots. A window that begins
  // above layer 0 reads its input there; a window that ends at a ramp
  // leaves its last hidden state there.
  uint32_t slot;
  // 0: the request's own row, of its newest token. n: a pending row, n
  // tokens before that one, or before the next one when the request has no
  // row of its own here. A request's rows stand together, the oldest first.
  uint32_t back;
} drex_row;

// The window that drex_plan() chose: run layers [layer_begin, layer_end) over the
// rows.
typedef struct drex_step {
  // sizeof(drex_step), set by the caller
  uint32_t size;
  // Decode rows. 0, and n_prompt_rows 0 too: there is nothing to run, and the
  // other fields mean nothing.
  uint32_t n_rows;
  // 0, or a ramp's layer.
  uint32_t layer_begin;
  // A ramp's layer, or n_layers. A window may pass ramps where none of its
  // rows may exit, and with prompt rows any ramp.
  uint32_t layer_end;
  // The ramp at the window's end: call drex_ramp() if n_rows is not 0.
  // DREX_NO_RAMP: the window ends at n_layers; the host samples every row whose
  // request it has not removed.
  uint32_t ramp;
  // Why it runs.
  drex_flush_reason reason;
  // Prompt rows that run along. From layer 0: so many of those that wait, which
  // the host chooses, in its own order. From another layer: exactly those that
  // the last window with prompt rows left there. They are the host's: not
  // among `rows`, without verdicts, in arena rows of the host's own beyond
  // n_slots. It may run fewer, where a request has ended.
  // Since 0.2.
  uint32_t n_prompt_rows;
} drex_step;

// Chooses what to run next: a window of layers and its rows.
//
// input     the clock, and the prompt rows that wait
// rows      [capacity] receives drex_step.n_rows rows, in the order in which
//           the host must run them; the rest is not written
// capacity  at least 1; give max_batch. Less cuts the step short.
// out       its size is set by the caller
//
// In this order: prompt rows that the window before left at a ramp, together
// with the rows that wait there, those that were told to stay before those that
// are held, as many as fit; rows that a ramp told to stay, together with as
// many held at the same ramp as fit; a queue of held rows that is due for a
// deadline or for age; prompt rows that wait at layer 0, together with ready
// rows; a queue of held rows that is due for its fill or because nothing else is
// left, the deepest among equals; ready rows through the first window.
//
// A window with prompt rows from layer 0 has as many of them as fit into
// drex_config.max_pass_rows beside the ready rows, and beside the rows held at
// the ramp where it ends: decode rows come first, but for an eighth of the
// places. It ends at the first ramp that the policy looks at where a ready row
// may exit or rows are held, under OFF at none; under AUTO only where that is
// predicted to be faster than the whole pass and a flush of the held rows' own.
// A step with prompt rows may have n_rows = 0.
//
// When more rows wait than fit, those whose deadline is at stake come first,
// the nearest before the others; then higher priority; then the older row. A
// row passed over 8 times goes before all of these, in at most half of the
// places, so that none starves: with k places, a ready row with q older ones
// before it runs at the latest in the (9 + q / ceil(k / 2))th step of ready
// rows.
//
// After out->n_rows = 0 and out->n_prompt_rows = 0 there is no step, and
// nothing to complete. Any other step goes on until drex_complete() or
// drex_abandon() ends it. Chapter 2 has a table of what is allowed meanwhile, and
// of what must come before drex_complete().
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE; CAPACITY when capacity is 0, or has no
// room for the pending rows of the request that comes first; CALL_ORDER while
// a step is planned; DEVICE, and then no step is planned, and prompt rows that
// were on their way start again, as after drex_abandon().
drex_status drex_plan(drex_engine *engine,
                      const drex_plan_input *input,
                      drex_row *rows,
                      uint32_t capacity,
                      drex_step *out);

// A flush reason's name in lower case, such as "deadline"; NULL when unknown. Static.
const char *drex_flush_reason_name(drex_flush_reason reason);

/* -----------------------------------------------------------------------------
 * Verdicts at a ramp, and the fill
 */

// The element type of logits: DREX_DTYPE_*, in the machine's byte order.
typedef uint32_t drex_dtype;

// IEEE binary32
#define DREX_DTYPE_F32 0
// IEEE binary16
#define DREX_DTYPE_F16 1
// The upper half of binary32
#define DREX_DTYPE_BF16 2

// Is asked at a ramp whether a row whose confidence is sufficient may exit
// with its token: 1, or 0 where the host would not emit that token. It runs on
// the thread and inside the call of drex_ramp(), once for each such row, so a
// call on the same engine gets DREX_ERROR_HANDLE_BUSY. It must return: no
// exception, no longjmp. Rows that EAGER, MEDIAN or MEAN force out are not asked
// about.
// Since 0.2.
typedef uint32_t (*drex_confirm_callback)(void *user_data, uint32_t row, int32_t token);

// The logits at a ramp.
typedef struct drex_logits {
  // sizeof(drex_logits)
  uint32_t size;
  // The type of their elements.
  drex_dtype dtype;
  // [n_rows, n_vocab]; row i, in the order of drex_plan()'s rows, begins
  // at data + i * row_stride_bytes. Not NULL. On the host it needs no
  // alignment, on a CUDA device that of its elements.
  const void *data;
  // Bytes from row to row, at least n_vocab elements.
  uint64_t row_stride_bytes;
  // drex_step.n_rows
  uint32_t n_rows;
  // Logits per row, at least 1, below 2^31.
  uint32_t n_vocab;
  // CUDA: the CUstream (or cudaStream_t) on which the logits are made, and
  // on which drex works until the next ramp; NULL is the default stream.
  // NULL on the host.
  void *stream;
  // Greatest logits of each row to list, at most drex_config.n_top.
  uint32_t n_top;
  // 1: the logits were given to drex_ramp_enqueue() before, or a graph that
  // captured it has been launched. Else 0.
  uint32_t enqueued;
  // NULL, or decides about rows that would exit, for example under a
  // grammar. A row whose token it refuses has the greatest confidence that
  // is not sufficient.
  // Since 0.2.
  drex_confirm_callback confirm;
  // Handed to it; may be NULL.
  // Since 0.2.
  void *confirm_data;
} drex_logits;

// The decision on a row at a ramp, or by drex_verify(): DREX_DECISION_*.
typedef uint32_t drex_decision;

// Emit the token from the ramp's logits; the row is done.
#define DREX_DECISION_EXIT 0
// The row waits in the rebatching buffer for a deeper batch.
#define DREX_DECISION_HOLD 1
// The row goes on in the next step.
#define DREX_DECISION_STAY 2
// The request was removed while the step ran.
#define DREX_DECISION_GONE 3
// A pending row: it left before, and goes along.
#define DREX_DECISION_PENDING 4
// drex_verify(): the draft stands; it is a token now.
#define DREX_DECISION_ACCEPT 5
// drex_verify(): the full model's token is emitted in place of the draft.
#define DREX_DECISION_REPLACE 6
// drex_verify(): the row follows a draft that was replaced, and is void.
#define DREX_DECISION_DROP 7

// A ramp's verdict on a row.
typedef struct drex_verdict {
  // EXIT, HOLD, STAY, GONE or PENDING.
  drex_decision decision;
  // The greatest logit's index, the lowest on a tie; -1 where confidence
  // is NaN. For greedy hosts; others sample the row themselves.
  int32_t token;
  // In [0, 1]. NaN when a logit is NaN or +Inf, or all are -Inf, and for GONE
  // and PENDING. -Inf beside other logits is a mask, and fine.
  float confidence;
  // 1: an involuntary exit or an involuntary stay. A row is not asked, and
  // does not count, at a ramp that the rule of DREX_POLICY_AUTO passes by and
  // where its window ends only because pending rows wait there.
  uint32_t forced;
} drex_verdict;

// At the end of a window that ends at a ramp: scores every row's logits and
// decides what becomes of it. The logits must be complete, or on a CUDA device
// enqueued on their stream, and stay unchanged during the call. A row's
// confidence and token depend on nothing but its own logits.
//
// logits    the window's logits
// cells     [n_rows] the KV cell of each row, below n_cells of every bound
//           layer; for a row whose request was removed, any number. NULL only
//           when no K/V is bound. Copied.
// verdicts  [capacity] receives one per row, in their order
// capacity  at least n_rows
//
// A request whose row says EXIT is IDLE from here on.
//
// Not needed in a step with n_rows = 0, which only prompt rows pass; allowed
// there with logits.n_rows = 0, and then no other field is looked at.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CAPACITY;
// CALL_ORDER when no step is planned, when it ends at the last layer, when
// it had its verdicts, when cells are missing, or when logits.enqueued is 1
// and nothing was enqueued, or other logits were; DEVICE. After a failure, the
// call may be made again.
drex_status drex_ramp(drex_engine *engine,
                      const drex_logits *logits,
                      const uint32_t *cells,
                      drex_verdict *verdicts,
                      uint32_t capacity);

// Fills the holes of the rows that the last drex_ramp() let out and whose
// requests have DREX_FILL_COPY: for each, K and V of the window's last layer at
// the row's cell are copied to all layers from layer_end on. Does nothing when
// none exited, or when done already. Nothing else may touch these cells during
// the call.
//
// On a CUDA device it is enqueued on the stream of that ramp's logits, in one
// launch, and not waited for.
//
// Errors: CALL_ORDER when no K/V is bound, or when drex_ramp() was not
// called since the last plan; DEVICE, and CAPACITY for more memory than one
// launch can move.
drex_status drex_fill(drex_engine *engine);

// A decision's name in lower case, such as "exit"; NULL when unknown. Static.
const char *drex_decision_name(drex_decision decision);

// One of the greatest logits of a row.
typedef struct drex_top {
  // As it is, before any softmax.
  float logit;
  // Its index; -1 where the row has no more logits that are numbers.
  int32_t token;
} drex_top;

// The greatest logits of a row, the greatest first and the lower index before
// an equal one: candidates for hosts that sample, without the whole row. After
// a drex_ramp() whose logits had n_top > 0, until its step ends.
//
// row       of the planned step, from 0
// top       [capacity] receives them; may be NULL with capacity 0
// capacity  entries at top; no more are written
// n         receives how many: the lesser of capacity and n_top, or 0 for a
//           row without a verdict of its own (GONE, PENDING)
//
// Errors: NULL_ARGUMENT; INVALID_ARGUMENT; CALL_ORDER without such a ramp.
drex_status drex_top_get(const drex_engine *engine,
                         uint32_t row,
                         drex_top *top,
                         uint32_t capacity,
                         uint32_t *n);

/* -----------------------------------------------------------------------------
 * Verdicts of the full model on drafts
 */

// At the end of a window that ends at n_layers and has drafts: says which of
// them stand. A draft is the token that a row of a request with
// DREX_FILL_VERIFY emitted at a ramp; the row is in the step as a pending
// one. Allowed, and without consequence, in a step without drafts.
//
// For each request, going through its rows in their order (the oldest first):
// choose a token from the row's logits, and compare it with the draft. After
// the first that differs, the request's later rows are void. Hosts that sample
// choose by drex_speculate().
//
// agrees     [n_rows] 1: the token chosen from the row's logits is its draft;
//            2: the same, and it is the request's last token; 0: it is
//            another. Looked at for drafts only, up to the first 0 or 2 of
//            each request.
// n_rows     drex_step.n_rows
// decisions  [capacity] receives one per row: ACCEPT or REPLACE for drafts,
//            PENDING for pending rows without, EXIT for the request's own row:
//            emit the token chosen from its logits; DROP for what follows a
//            draft that was replaced or was the last token; GONE
// capacity   at least n_rows
//
// After REPLACE, the request's next token is the one chosen; the rows after it
// never were: the host takes their tokens back and frees their KV cells. The
// request is IDLE after drex_complete() in any case. Until then the verdicts
// can be lost by drex_abandon(): give their tokens to clients after it.
//
// Errors: NULL_ARGUMENT, INVALID_ARGUMENT, CAPACITY; CALL_ORDER when no step is
// planned, when it ends at a ramp, or when it is verified already.
drex_status drex_verify(drex_engine *engine,
                        const uint8_t *agrees,
                        uint32_t n_rows,
                        drex_decision *decisions,
                        uint32_t capacity);

// Speculative sampling: makes a token that was drawn from the ramp's
// distribution one of the full model's, by keeping or replacing it. For hosts
// that sample (greedy ones compare). The result is distributed as `deep`,
// whatever `draft` is; it equals draft_token as often as is possible.
// Leviathan et al. 2023, arXiv 2211.17192, section 2.3.
//
// deep         [n_vocab] probabilities by the full model, after temperature,
//              top-k and the like; finite, >= 0, not all 0; need not sum to 1
// draft        the same, by the ramp, as draft_token was drawn from them; NULL:
//              draft_token was certain
// draft_token  below n_vocab
// u, v         two random numbers, uniform in [0, 1)
// token        receives the token
//
// Takes no engine. Errors: NULL_ARGUMENT, INVALID_ARGUMENT.
drex_status drex_speculate(const float *deep,
                           const float *draft,
                           uint32_t n_vocab,
                           int32_t draft_token,
                           double u,
                           double v,
                           int32_t *token);

/* -----------------------------------------------------------------------------
 * The end of a step, and a step that is given up
 */

// The input of drex_complete().
typedef struct drex_completion {
  // sizeof(drex_completion)
  uint32_t size;
  // 0
  uint32_t reserved;
  // Now, in ns; when the step's tokens were emitted.
  uint64_t now_ns;
  // Time that the window took on the device, in ns; 0: unknown, and
  // nothing is learned from it, nor from more than 1e15 (eleven days).
  uint64_t duration_ns;
  // KV cells that the decode rows attended over, summed, without those of
  // prompt rows; what a cell costs is learned from it. 0: unknown, and then the
  // cells' share is taken for the rows'. Give it always or never.
  uint64_t n_kv;
} drex_completion;

// The planned step ran, and its tokens are out. Rows of a window that ended
// at n_layers have emitted theirs, and their requests are IDLE; held rows
// enter the buffer; the arena rows of those that emitted are free.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CALL_ORDER when no
// step is planned, when its ramp was not called, when it has drafts and
// drex_verify() was not called, or when K/V is bound, rows exited with
// DREX_FILL_COPY and drex_fill() was not called.
drex_status drex_complete(drex_engine *engine,
                          const drex_completion *completion);

// The planned step failed. Its rows go back to where they were, in their old
// order, and may be planned again; the step is not counted. Their arena rows
// must be as they were when it was planned, where its window starts from them.
// Rows that drex_ramp() let out before have given their token: they stay out,
// and their holes stay open unless drex_fill() was called before this. Pending
// rows that came along with one of these stay at this ramp: their arena rows
// must be what the window left. What drex_verify() said is void: its tokens do
// not count, and the rows come back with their drafts. Prompt rows of the step
// are forgotten: the host starts them again at layer 0, by
// drex_plan_input.n_prompt_rows, or ends their requests.
//
// Errors: CALL_ORDER when no step is planned.
drex_status drex_abandon(drex_engine *engine);

/* -----------------------------------------------------------------------------
 * Arena rows, for hosts without a gather by index
 */

// Rows of an arena, and rows of a dense batch: row i of the batch belongs to
// row i of the planned step.
typedef struct drex_arena {
  // sizeof(drex_arena)
  uint32_t size;
  // 0
  uint32_t reserved;
  // Row s at arena + s * arena_stride_bytes. Not NULL.
  void *arena;
  // Row i at dense + i * dense_stride_bytes. Not NULL.
  void *dense;
  // At least row_bytes.
  uint64_t arena_stride_bytes;
  // At least row_bytes.
  uint64_t dense_stride_bytes;
  // At least 1, below 2^32.
  uint64_t row_bytes;
  // As drex_logits.stream.
  void *stream;
} drex_arena;

// Gathers the planned step's hidden rows: arena row rows[i].slot to row i of
// a dense batch, for hosts whose engine has no gather by index. On a CUDA
// device in one launch on arena->stream; may be captured.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CALL_ORDER when no
// step is planned; DEVICE, and CAPACITY for more memory than one launch can
// move.
drex_status drex_gather(drex_engine *engine, const drex_arena *arena);

// The way back: row i of the dense batch to arena row rows[i].slot.
//
// Errors: as drex_gather().
drex_status drex_scatter(drex_engine *engine, const drex_arena *arena);

/* -----------------------------------------------------------------------------
 * Work on a CUDA device that is started apart from its call
 */

// CUDA: starts what drex_ramp() waits for, on the logits' stream, and returns
// at once. Say drex_ramp() with the same logits and enqueued = 1 later; what
// is between them, such as drex_replan(), runs beside the device. May be
// captured into a graph, see chapter 7; if that was not launched, no row has a
// confidence and none leaves.
//
// logits  as for drex_ramp(); n_rows may be any number up to the rows of the
//         largest step. They must stay as they are until drex_ramp() returns.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT; CAPACITY; DEVICE;
// UNSUPPORTED on the host.
drex_status drex_ramp_enqueue(drex_engine *engine,
                              const drex_logits *logits);

// CUDA: enqueues, for a graph capture, the fill of the holes that
// drex_fill_plan() names last before the graph is launched. See chapter 7.
//
// stream  the CUstream that is being captured
//
// Errors: CALL_ORDER when no K/V is bound; DEVICE, and CAPACITY as for
// drex_fill(); UNSUPPORTED on the host.
drex_status drex_fill_enqueue(drex_engine *engine, void *stream);

// CUDA: in place of drex_fill(), for a host that will launch a graph which
// captured drex_fill_enqueue(): names the holes, and launches nothing. The
// graph must be launched before drex_complete(), on the stream of the last
// ramp's logits or ordered behind it.
//
// Errors: CALL_ORDER as for drex_fill(); DEVICE; UNSUPPORTED on the host.
drex_status drex_fill_plan(drex_engine *engine);

/* -----------------------------------------------------------------------------
 * Costs of windows, and the search for a rule
 */

// A timing of a pass that drex did not plan: calibration, full passes.
typedef struct drex_observation {
  // sizeof(drex_observation)
  uint32_t size;
  // Decode rows; at least 1 where n_prompt_rows is 0.
  uint32_t n_rows;
  // The pass's first layer.
  uint32_t layer_begin;
  // Above layer_begin, at most n_layers.
  uint32_t layer_end;
  // At least 1; nothing is learned from more than 1e15 (eleven days).
  uint64_t duration_ns;
  // As drex_completion.n_kv.
  uint64_t n_kv;
  // Prompt rows beside them.
  // Since 0.2.
  uint32_t n_prompt_rows;
  // 0
  // Since 0.2.
  uint32_t reserved;
} drex_observation;

// Tells the cost model of a pass that drex did not plan, at any time.
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT.
drex_status drex_observe(drex_engine *engine,
                         const drex_observation *observation);

// AUTO: works on the search for a better rule, on the calling thread. Call it
// where the thread would wait for the device: after the window has been
// launched, before its logits are waited for. From the first call on,
// drex_complete() leaves this work to the host; without any, it does a part
// of it each time, at most about 0.5 % of the window's time.
//
// max_windows  about how much: simulated windows, some 40 ns each; 0: all
// done         receives 1 when no search is under way any more, else 0; may
//              be NULL
//
// Allowed between any two calls. Does nothing under other policies.
drex_status drex_replan(drex_engine *engine,
                        uint32_t max_windows,
                        uint32_t *done);

// The cost model's numbers as JSON, for drex_profile_load() and drex-sim.
//
// text      [capacity] receives the text and a 0 byte; NULL with capacity 0
//           to ask for the length
// capacity  bytes at text
// length    receives the text's bytes without the 0 byte, also with CAPACITY
//
// Allocates. Errors: NULL_ARGUMENT; CAPACITY when the text and its 0 byte do
// not fit and capacity is not 0; CALL_ORDER before anything is known.
drex_status drex_profile_save(const drex_engine *engine,
                              char *text,
                              size_t capacity,
                              size_t *length);

// Starts the cost model from numbers saved before, in place of what it has
// learned. They are left behind where measurements contradict them.
//
// text  JSON as drex_profile_save() writes it, of a model with the same
//       layers and ramps
//
// Allocates. Errors: NULL_ARGUMENT; INVALID_ARGUMENT with the field named.
drex_status drex_profile_load(drex_engine *engine, const char *text);

/* -----------------------------------------------------------------------------
 * Totals and current values
 */

// Length of drex_stats.flushes, more than there are DREX_FLUSH_*.
#define DREX_MAX_FLUSH_REASONS 16
// Length of drex_stats.misses, more than there are DREX_MISS_*.
#define DREX_MAX_MISS_REASONS 8
// Length of drex_stats.wait_us_buckets.
#define DREX_WAIT_BUCKETS 32

// Where most of the time went of a token that missed its deadline:
// DREX_MISS_*.
typedef uint32_t drex_miss_reason;

// Between its last token and drex_request_ready(): in the host.
#define DREX_MISS_HOST 0
// Ready, while other rows ran: overload.
#define DREX_MISS_QUEUE 1
// Held in the rebatching buffer.
#define DREX_MISS_HELD 2
// In layer windows, its own or others' while it was to go on at once.
#define DREX_MISS_RUN 3
// How many reasons there are; a later version may have more, up to
// DREX_MAX_MISS_REASONS.
#define DREX_MISS_REASONS 4

// Totals since drex_create(), and some current values.
typedef struct drex_stats {
  // sizeof(drex_stats), set by the caller
  uint32_t size;
  // The engine's; the entries of the arrays beyond it are 0.
  uint32_t n_ramps;
  // Rows that emitted a token, at a ramp or at the end. With
  // DREX_FILL_VERIFY a draft counts when it is accepted or replaced.
  uint64_t tokens;
  // Rows that left at each ramp. With DREX_FILL_VERIFY they are drafts, and
  // count here also where they were replaced or dropped later, so there may
  // be more of them than tokens.
  uint64_t exits[DREX_MAX_RAMPS];
  // Of the exits, those below the row's threshold; see drex_policy.
  uint64_t involuntary_exits;
  // Rows that were confident at a ramp and went on.
  uint64_t involuntary_stays;
  // Completed steps by reason; DREX_FLUSH_NONE counts those that were no
  // flush, so that all sum to `steps`. From DREX_FLUSH_REASONS on 0, as
  // far as this version goes; so are `misses` from DREX_MISS_REASONS on.
  uint64_t flushes[DREX_MAX_FLUSH_REASONS];
  // Rows in the rebatching buffer now, without those of the planned step.
  uint64_t held_rows;
  // Of these, at each ramp.
  uint64_t held_rows_at[DREX_MAX_RAMPS];
  // The most rows that were held at one time.
  uint64_t held_rows_max;
  // Requests alive now.
  uint64_t requests;
  // Arena rows free now.
  uint64_t slots_free;
  // Cells whose skipped layers drex_fill() filled.
  uint64_t cells_filled;
  // Bytes that it wrote for them.
  uint64_t bytes_filled;
  // Tokens that came later than their deadline.
  uint64_t deadline_misses;
  // Rows at a ramp whose confidence was NaN.
  uint64_t nonfinite_rows;
  // Completed steps.
  uint64_t steps;
  // Their rows, those of requests that went away included.
  uint64_t step_rows;
  // Held times: bucket 0 counts those under 1 us, bucket i those in
  // [2^(i-1), 2^i) us, the last one all that are longer.
  uint64_t wait_us_buckets[DREX_WAIT_BUCKETS];
  // Held times, each in whole us, summed.
  uint64_t wait_us_sum;
  // c/t_d at the first ramp for the last batch's rows, as pinned or as
  // measured; NaN when unknown.
  double art_ratio;
  // Deadline misses by where most of the token's time went: DREX_MISS_*.
  uint64_t misses[DREX_MAX_MISS_REASONS];
  // AUTO: searches for a better rule so far.
  uint64_t searches;
  // AUTO: the ramps that the present rule looks at, bit r for ramp r; 0:
  // no early exit.
  uint32_t rule_ramps;
  // AUTO: held rows at a ramp that flush.
  uint32_t rule_hold_rows;
  // AUTO: ready rows below which held ones are flushed.
  uint32_t rule_ready_rows;
  // 0
  uint32_t reserved;
  // AUTO: tokens per second that the last search predicted for its rule.
  double predicted_tokens_per_s;
  // AUTO: tokens per second that it predicted for full passes.
  double predicted_off_tokens_per_s;
  // Measured share of rows that are confident at each ramp, of those
  // scored there that were scored nowhere before; NaN before the first.
  double exit_share[DREX_MAX_RAMPS];
  // Pending rows now.
  uint64_t pending_rows;
  // Pending rows whose skipped layers were computed.
  uint64_t rows_filled;
  // VERIFY: drafts that were accepted or replaced.
  uint64_t drafts;
  // Of these, accepted.
  uint64_t drafts_accepted;
  // VERIFY: rows that followed a draft that was replaced or was the last.
  uint64_t rows_dropped;
  // Prompt rows of completed steps. One that a window leaves at a ramp counts
  // in each of its windows.
  // Since 0.2.
  uint64_t prompt_rows;
  // Completed steps with prompt rows.
  // Since 0.2.
  uint64_t prompt_steps;
} drex_stats;

// A snapshot of the engine's totals. Cheap enough for every step.
//
// out  its size is set by the caller
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE.
drex_status drex_stats_get(const drex_engine *engine, drex_stats *out);

// A miss reason's name in lower case, such as "queue"; NULL when unknown. Static.
const char *drex_miss_reason_name(drex_miss_reason reason);

/* -----------------------------------------------------------------------------
 * Logs, traces, snapshots and metrics of an engine
 */

// How much is logged: a level and all that are more urgent.
typedef uint32_t drex_log_level;

// Nothing.
#define DREX_LOG_OFF 0
// A device failed.
#define DREX_LOG_ERROR 1
// Refused calls, missed deadlines, logits that are not finite.
#define DREX_LOG_WARN 2
// Engines, and the rules that AUTO chooses.
#define DREX_LOG_INFO 3
// Requests.
#define DREX_LOG_DEBUG 4
// Every step.
#define DREX_LOG_TRACE 5

// Receives one event: its level and a line of UTF-8 without a line break, at
// most 511 bytes, valid during the call. It runs on the thread and inside the
// call that caused it, so a call on the same engine gets
// DREX_ERROR_HANDLE_BUSY (DREX_ERROR_INVALID_HANDLE from the event of its
// destruction). It must return: no exception, no longjmp.
typedef void (*drex_log_callback)(void *user_data,
                                  drex_log_level level,
                                  const char *text);

// Sends an engine's events to a callback, and says its configuration at level
// INFO. Events of other engines do not go there.
//
// callback   NULL: none from now on
// user_data  handed to the callback; kept until the engine ends or another
//            call of this function; may be NULL
// level      DREX_LOG_*
//
// Errors: INVALID_ARGUMENT for an unknown level.
drex_status drex_log_set(drex_engine *engine,
                         drex_log_callback callback,
                         void *user_data,
                         drex_log_level level);

// Counters, queues, held rows with their ages, and the scheduler's estimates
// as a JSON object. What is not known is null.
//
// text      [capacity] receives the text and a 0 byte; NULL with capacity 0
//           to ask for the length
// capacity  bytes at text
// length    receives the text's bytes without the 0 byte, also with CAPACITY
//
// Allocates. Errors: NULL_ARGUMENT; CAPACITY when the text and its 0 byte do
// not fit and capacity is not 0.
drex_status drex_snapshot(const drex_engine *engine,
                          char *text,
                          size_t capacity,
                          size_t *length);

// Counters, gauges and histograms in Prometheus' text format 0.0.4. Every
// engine's text has the same families in the same order, each from its HELP
// line on, also where a family has no sample: so several texts can be merged.
//
// labels    put on every sample, as name="value" separated by commas, with
//           values escaped as that format says; NULL or empty: none. Not
//           ramp, layer, reason, rule or le.
// text, capacity, length  as for drex_snapshot()
//
// Allocates. Errors: NULL_ARGUMENT, INVALID_ARGUMENT; CAPACITY as for
// drex_snapshot().
drex_status drex_metrics_text(const drex_engine *engine,
                              const char *labels,
                              char *text,
                              size_t capacity,
                              size_t *length);

// Receives a part of a text: n_bytes bytes, without a 0 byte, valid during the
// call. A call on the same engine gets DREX_ERROR_HANDLE_BUSY. It must return:
// no exception, no longjmp.
typedef void (*drex_trace_sink)(void *user_data, const char *bytes, size_t n_bytes);

// Records from now on what happens to an engine's rows, in a ring: when it is
// full, the oldest events go. A trace that is under way is dropped.
//
// max_events  at least 1, of at most 64 bytes each; memory is taken now, and
//             none later. A step takes one for its window, one for its
//             counters, and one for each row that exits, and for each that
//             was held.
//
// Errors: INVALID_ARGUMENT; MEMORY, and then the trace before goes on.
drex_status drex_trace_start(drex_engine *engine, uint32_t max_events);

// Writes the trace so far, as Chrome's JSON trace events, which Perfetto
// (ui.perfetto.dev) and chrome://tracing open. The trace goes on.
//
// sink       called with the text's parts in their order, on this thread
// user_data  handed to it; may be NULL
//
// Windows are complete events on one track, from plan to complete, with the
// host's own duration_ns in their arguments. Each time that a row was held is
// a pair of async events of the request's, named after its ramp; rows that are
// held now end now. Exits are instants on a track per ramp. Times are the
// host's; an exit's is its window's end. Steps that were abandoned have no
// window. Requests are strings, since viewers' numbers end at 2^53. The events
// of several engines and processes can be put into one list.
//
// Allocates. Errors: NULL_ARGUMENT for sink; CALL_ORDER without
// drex_trace_start().
drex_status drex_trace_write(const drex_engine *engine,
                             drex_trace_sink sink,
                             void *user_data);

// Ends the recording and frees its events. Without one, does nothing.
drex_status drex_trace_stop(drex_engine *engine);

/* -----------------------------------------------------------------------------
 * Paged K/V
 */

// A block table entry without a page.
#define DREX_NO_PAGE UINT32_MAX

// An account of a pool of K/V pages. Opaque, and not an address. Made by
// drex_pages_create(), ended by drex_pages_destroy(). A destroyed handle gives
// DREX_ERROR_INVALID_HANDLE.
typedef struct drex_pages drex_pages;

// For drex_pages_create().
typedef struct drex_pages_config {
  // sizeof(drex_pages_config)
  uint32_t size;
  // Layers of the model, 1 to 65536.
  uint32_t n_layers;
  // Cells of a page, 1 to 65536. A page holds K and V of one layer.
  uint32_t page_tokens;
  // Pages of the pool, numbered from 0; at most 67108864. Any layer can use
  // any of them.
  uint32_t n_pages;
} drex_pages_config;

// Cells [first_cell, first_cell + n_cells) of a page, K and V, to the same
// cells of another.
typedef struct drex_page_copy {
  // The page that is read.
  uint32_t from;
  // The page that is written, another one.
  uint32_t to;
  // Below page_tokens.
  uint32_t first_cell;
  // At least 1.
  uint32_t n_cells;
} drex_page_copy;

// For drex_pages_stats_get().
typedef struct drex_pages_stats {
  // sizeof(drex_pages_stats), set by the caller
  uint32_t size;
  // 0
  uint32_t reserved;
  // Pages that some entry points to.
  uint64_t pages_used;
  // All others.
  uint64_t pages_free;
  // Block table entries that point to a page.
  uint64_t references;
  // Pages that sharing saves: references - pages_used.
  uint64_t pages_saved;
  // Cells of one layer that were copied so far.
  uint64_t cells_copied;
  // Cells of skipped layers that needed no copy.
  uint64_t cells_aliased;
} drex_pages_stats;

// Accounts for a pool of K/V pages, see chapter 6.
//
// config  read during the call only
// out     the handle; to be destroyed with drex_pages_destroy()
//
// Allocates 8 bytes a page; nothing else here does. Errors: NULL_ARGUMENT,
// STRUCT_SIZE, INVALID_ARGUMENT; MEMORY; CAPACITY for more than 256 pools.
drex_status drex_pages_create(const drex_pages_config *config,
                              drex_pages **out);

// NULL is ignored. Block tables stay the host's.
//
// Errors: INVALID_HANDLE, HANDLE_BUSY.
drex_status drex_pages_destroy(drex_pages *pages);

// Before layers [layer_begin, layer_end) write the cell of the token at `pos`:
// gives these layers pages for its block, and ends sharing where another layer
// or sequence would see what they write. Of a sequence's tokens in one window,
// the oldest first: these layers must have written no later cell yet.
//
// table       [n_layers][n_blocks] pages, layer by layer, DREX_NO_PAGE where
//             there is none; entries of the token's block are changed
// n_blocks    entries of a layer
// copies      what to copy before the window runs, in this order
// max_copies  room in `copies`; n_layers is always enough here
// n_copies    how many there are
//
// Errors: NULL_ARGUMENT; INVALID_ARGUMENT; CAPACITY when no page is free or
// `copies` is too short. Nothing has changed then.
drex_status drex_pages_write(drex_pages *pages,
                             uint32_t *table,
                             uint32_t n_blocks,
                             uint64_t pos,
                             uint32_t layer_begin,
                             uint32_t layer_end,
                             drex_page_copy *copies,
                             uint32_t max_copies,
                             uint32_t *n_copies);

// After the token at `pos`, its sequence's newest, left after layers
// [0, exit_layer): gives the skipped layers its K/V. Where all tokens of its
// block so far left after as many layers or fewer, their entries become the
// page of layer exit_layer - 1 and nothing is copied.
//
// exit_layer  the ramp's layer, as in drex_config.ramp_layers
// max_copies  2 * n_layers is always enough
//
// The rest is as for drex_pages_write().
drex_status drex_pages_exit(drex_pages *pages,
                            uint32_t *table,
                            uint32_t n_blocks,
                            uint64_t pos,
                            uint32_t exit_layer,
                            drex_page_copy *copies,
                            uint32_t max_copies,
                            uint32_t *n_copies);

// Another sequence shares blocks [first_block, first_block + count) from now
// on: the host has copied, or is about to copy, their entries into its table.
// Whoever writes into a shared page first gets one of its own.
//
// Errors: NULL_ARGUMENT, INVALID_ARGUMENT.
drex_status drex_pages_fork(drex_pages *pages,
                            const uint32_t *table,
                            uint32_t n_blocks,
                            uint32_t first_block,
                            uint32_t count);

// A sequence gives blocks [first_block, first_block + count) back; their
// entries become DREX_NO_PAGE.
//
// Errors: NULL_ARGUMENT; INVALID_ARGUMENT, also for a page that is free.
drex_status drex_pages_release(drex_pages *pages,
                               uint32_t *table,
                               uint32_t n_blocks,
                               uint32_t first_block,
                               uint32_t count);

// Counts of pages used, shared and copied.
//
// out  its size is set by the caller
//
// Errors: NULL_ARGUMENT, STRUCT_SIZE.
drex_status drex_pages_stats_get(const drex_pages *pages,
                                 drex_pages_stats *out);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DREX_H */
