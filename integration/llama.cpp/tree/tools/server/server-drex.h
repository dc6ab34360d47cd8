#pragma once

// Early exit with dynamic rebatching: the server's side of drex (see drex.h).
//
// Rows go where drex_plan() says: new tokens through the first window, held rows through the next one, and prompt rows
// along with either. At a ramp drex decides for each decode row; rows that exit are sampled from the ramp's logits, the
// others wait in the hidden arena until drex flushes them. Prompt rows pass all layers.

#include "server-drex-load.h"
#include "server-task.h"

#include "llama-layer-range.h"

#include <drex.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

class common_drex_exits;

// the page at /drex
extern const char * const server_drex_page;

// the result's JSON, with drex_tokens where the request asked for them
json server_drex_answer(server_task_result & result);

// what /metrics tells, but for what is fixed
struct server_drex_figures {
    drex_stats                  stats  = DREX_STATS_INITIALIZER;
    llama_layer_range_perf_data graphs = {};
    server_drex_load            load;
};

struct server_drex {
    // throws std::runtime_error with the reason when model, context or parameters do not allow early exit
    // is_resume: the server wakes from sleep. The files that it has begun go on; where one cannot, it is left out with a warning
    // past:      what figures() said before the server slept
    server_drex(const common_params & params, llama_context * ctx, bool has_spec, bool is_resume, const server_drex_figures & past);
    ~server_drex();

    // A router hands its own options to the server of each model. Without exit layers in the model's metadata the server runs
    // without early exit, and says so.
    static void settle_policy(common_params & params);

    // warns where options have no effect
    static void say_off(const common_params & params);

    // most rows of requests in one window, and most outputs: beside these, the last rows of prompts
    static uint32_t n_rows_max   (const common_params & params);
    static uint32_t n_outputs_max(const common_params & params);

    server_drex(const server_drex &) = delete;
    server_drex & operator=(const server_drex &) = delete;

    // the grammar of the slot's request lets the token follow those that were sampled; set before the first add()
    std::function<bool(int id_slot, llama_token token)> allows;

    // throws std::invalid_argument when the request asks for something that does not work with early exit
    // same_lora: its adapters are those of the server, and so of all other requests
    void add(int id_slot, const server_task & task, bool same_lora);

    // the slot's request gets an error
    void fail(int id_slot, error_type error) { slots[id_slot].end = server_drex_end_of(error); }

    // stop: why the request ended, if it did not fail
    // returns how many of the slot's last prompt tokens have not gone through all layers: their cells must not be reused
    int remove(int id_slot, stop_type stop);

    // the answer of the slot's request is to be audited before remove()
    bool audits(int id_slot) const;

    // the client has the whole answer, and remove() comes later
    void answered(int id_slot, stop_type stop) { count_end(id_slot, stop); }

    // after a pass of the full model: it would have chosen another token than this one at index i of the batch; throws where
    // there are no numbers
    bool differs(int id_slot, int i, llama_token token) const;

    // so many tokens of the slot's answer were audited
    void audited(int id_slot, int n_tokens, int n_differing);

    // the slot, which is not busy, has a sampled token to decode
    void ready(int id_slot, int n_kv);

    // in place of ready(): first the full model is to say what it thinks of the slot's drafts
    void settle(int id_slot);

    // the slot's token is under way: held, or about to run
    bool busy(int id_slot) const { return slots[id_slot].busy; }

    // with fill verify, tokens that ran and are not verified: they come after the slot's prompt tokens
    const llama_tokens & ahead(int id_slot) const { return slots[id_slot].ahead; }

    // the slot's request is answered by the full model: no K/V may serve it that is not the full model's
    bool is_strict(int id_slot) const { return slots[id_slot].strict; }

    // how many of the slot's tokens are drafts that the client does not know of, the one to run next included
    int n_drafts(int id_slot) const { return slots[id_slot].n_drafts; }

    struct row {
        int  id_slot;
        int  offset;     // of its token, from the end of the slot's prompt tokens
        bool verify;     // of a request with fill verify
        bool draft;      // it drafted a token at a ramp before: verify that
        bool emit;       // after finish(): sample this row
    };

    // decide what to run next: rows() and n_prompt_rows(); false if there is nothing to run
    // n_prompt_rows: prompt rows that could run from layer 0
    // n_rows_max:    most rows of requests
    bool plan(int n_prompt_rows, int n_rows_max);

    const std::vector<row> & rows() const { return step_rows; }

    // prompt rows that go along: those that the last window with prompt rows left at a ramp, or the next ones of the host's
    int n_prompt_rows() const { return step.n_prompt_rows; }

    bool is_first() const { return step.layer_begin == 0; } // the rows are new tokens
    bool is_last()  const { return step.ramp == DREX_NO_RAMP; } // the window ends at the last layer

    // rows()[i] needs logits
    bool wants_logits(size_t i) const { return !is_last() || step_rows[i].verify || plan_rows[i].back == 0; }

    // the batch has a token for prompt row k of the window; output: it is sampled, at index i of the batch
    void add_prompt_row(int k, bool output, int i) {
        arena_rows.push_back(n_slots + k);
        if (output) {
            prompt_outputs.push_back(i);
        }
    }

    // rows of requests with fill verify, at the last layer: they are verified before finish()
    bool verifies(const row & r) const { return step.ramp == DREX_NO_RAMP && slots[r.id_slot].verifies(); }

    // between run() and finish(): requests that end in between are removed after finish()
    void begin_verify() {
        verifying = true;
        std::fill_n(agreed.begin(), step.n_rows, 0);
        std::fill_n(chosen.begin(), step.n_rows, LLAMA_TOKEN_NULL);
    }
    void end_verify() { verifying = false; }

    // the slot's next token decides about this draft, LLAMA_TOKEN_NULL: about none
    void judge(int id_slot, llama_token draft) { slots[id_slot].judged = draft; }

    // once for each window whose prompt rows have passed the last layer
    bool sends_progress(bool has_prompt) const { return has_prompt && !verifying; }

    // run the planned window over the batch, row i for rows()[i]; returns what llama_decode() returns
    int32_t run(llama_batch_ext * batch);

    // after run() == 0 of a first window: the slot's token has run; true if it belongs to the prompt's tokens from now on
    bool ran(int id_slot, llama_token token);

    // the row's token is verified, what comes after it is not: the first of ahead() leaves
    void verified(int id_slot);

    // rows()[i] is a draft of the token that the full model chose there, or of another; it can be the request's last
    void agrees(size_t i, bool yes, bool last);

    // rows()[i], which is no draft, got this token of the full model: ramps learn from it
    void chose(size_t i, llama_token token) { chosen[i] = token; }

    // nothing is left of what was run ahead: the slot goes on at pos
    void rollback(int id_slot, llama_pos pos) {
        slots[id_slot].ahead.clear();
        if (slots[id_slot].traces_tokens) {
            trace_rollback(id_slot);
        }
        llama_layer_range_rollback(ctx, id_slot, pos);
    }

    // during finish(): rows()[i] may leave with the token
    bool confirms(size_t i, llama_token token) const;

    // after finish() of a ramp: the token that the row drafted, LLAMA_TOKEN_NULL if none
    llama_token drafted(size_t i) const;

    // after finish(): rows()[i] has left, and layers behind it get K and V that are not the full model's
    bool approximates(size_t i) const;

    // the slot gets a token. true: a greedy slot's, which drex has seen already while it scored the row; false: sample it
    bool sampled(int id_slot, llama_token & token) {
        count_token(id_slot);
        if (slots[id_slot].traces_tokens) {
            trace_token(id_slot);
        }
        token = std::exchange(slots[id_slot].top, LLAMA_TOKEN_NULL);
        return token != LLAMA_TOKEN_NULL;
    }

    // after run() == 0: exits, holds, KV of skipped layers, and what the window has cost
    void finish(uint64_t n_kv);

    // the position of rows()[i], before run()
    void place(size_t i, llama_pos pos) { positions[i] = pos; }

    // after run() != 0: rows go back to where they were
    void abandon();

    // after run() == ret != 0, before abandon(): slots whose requests must end so that the others can go on, since the memory
    // does not hold what it should, or since K and V of rows that have left cannot be projected. Empty: it is not for them
    std::vector<int> culprits(int32_t ret, llama_batch_ext * batch);

    // While it lives, metrics() and to_json() may be called on another thread than run(), which on a device is inside the
    // engine at times: they tell how things were before.
    struct aside {
        server_drex & drex;

        explicit aside(server_drex & drex) : drex(drex) { drex.look_aside(); }
        ~aside() { drex.seen.valid = false; }

        aside(const aside &) = delete;
        aside & operator=(const aside &) = delete;
    };

    // drex_* fields of the response's timings; sampled: the slot's newest token
    json timings(int id_slot, llama_token sampled) const;

    // drex_tokens of a response: of the tokens since the last one, null if the request does not ask
    json tokens(int id_slot, llama_token sampled);

    json                to_json(int id_slot)      const; // for /slots
    std::string         metrics(size_t n_waiting) const; // for /metrics; n_waiting: requests that wait for a slot
    json                stats  (size_t n_waiting) const; // for /drex/stats
    server_drex_figures figures()                 const;

private:
    // how a token came about
    struct token_trace {
        uint32_t    ramp       = DREX_NO_RAMP;     // where it left
        float       confidence = NAN;              // there, or at the last ramp that it passed
        bool        verified   = true;             // by the full model
        llama_token replaced   = LLAMA_TOKEN_NULL; // a draft in whose place the full model chose it
        uint64_t    held_ns    = 0;
    };

    struct slot {
        bool     added = false;
        bool     busy  = false;
        bool     leaving = false;
        drex_fill_mode fill = DREX_FILL_COPY;
        bool     greedy  = false; // takes the model's best token of those that are not banned
        bool     strict  = false;
        bool     grammar = false;
        bool     raw     = false; // wants the logits as they were before tokens were banned
        uint64_t id    = 0;

        server_drex_end end = SERVER_DREX_END_COUNT; // with which error the request ends; none yet
        bool counted = false;                        // its end

        bool    empty     = false; // no prompt
        int64_t t_arrived = 0;     // ns
        int64_t t_token   = 0;     // when the last token was known, 0: none yet

        llama_tokens bans; // tokens that cannot be emitted

        llama_token top    = LLAMA_TOKEN_NULL;
        llama_token judged = LLAMA_TOKEN_NULL;

        llama_tokens ahead;
        int      n_drafts   = 0;
        uint64_t n_accepted = 0;
        uint64_t n_verified = 0;

        bool                     traces_tokens = false; // the request asks for drex_tokens
        token_trace              trace;                 // of the row that is under way
        std::vector<token_trace> drafts;                // that are not verified
        std::vector<token_trace> traces;                // of tokens that no response had yet
        uint64_t                 held_ns = 0;           // what the traces account for

        bool verifies() const { return fill == DREX_FILL_VERIFY; }
        bool projects() const { return fill == DREX_FILL_PROPAGATE; }
    };

    llama_context * ctx    = nullptr;
    drex_engine   * engine = nullptr;
    void          * stream = nullptr; // of the device, on the host there is none

    common_params_drex options;           // as they were given
    drex_fill_mode fill = DREX_FILL_COPY; // the server's default

    int32_t n_layer = 0;
    int32_t n_slots = 0; // arena rows of requests; those of prompt rows follow
    bool    has_lora = false;
    bool    slides   = false; // K/V of layers with a sliding window is gone when it has passed
    bool    fetches = false; // ramps are scored on the host, from logits that are fetched from where they were computed
    int32_t n_vocab = 0;

    std::string why_no_copy; // empty: fill copy can be used

    std::vector<uint32_t> ramp_layers;
    bool                  all_strict = false; // no threshold of the server's can be reached

    std::unique_ptr<common_drex_exits> exits; // nullptr: rows exit through the model's own head

    std::vector<slot> slots;

    drex_step step = DREX_STEP_INITIALIZER;

    std::vector<drex_row>     plan_rows;
    std::vector<row>          step_rows;
    std::vector<int32_t>      arena_rows;     // of the batch's tokens
    std::vector<int>          prompt_outputs; // indices in the batch
    std::vector<int32_t>      project_rows;
    std::vector<drex_verdict> verdicts;
    std::vector<llama_pos>     positions;

    // rows that left with fill propagate in the last step: K and V are projected when the next window runs, since the logits
    // are needed until then, and so that the time counts
    struct projection {
        int       id_slot;
        llama_pos pos;
        int32_t   arena_row;
    };
    std::vector<projection> to_project;
    int32_t                 project_layer = 0;

    std::unique_ptr<common_batch> batch_project;
    std::vector<uint8_t>       agreed;
    std::vector<llama_token>   chosen;
    std::vector<drex_decision> decisions;

    std::vector<float> banned; // in place of the logits of banned tokens
    std::vector<float> raw;    // these logits

    double        request_deadline_ms = 0.0;
    std::string   profile; // file, empty: none
    int64_t       t_profile = 0; // when it was written last, ns
    bool          profile_failed = false;
    std::ofstream record;

    bool    in_flight = false; // planned, neither finished nor abandoned
    bool    verifying = false;
    bool    enqueued  = false; // the scoring of the ramp's logits, on a device
    int64_t t_run     = 0; // when the window began
    int64_t t_ran     = 0; // when it ended

    server_drex_load    load;
    server_drex_figures past;

    // of the line in the log that comes each minute
    struct {
        int64_t    t_said   = 0; // ns
        int64_t    t_window = 0; // the newest one's end
        int64_t    busy_ns  = 0; // since the last line
        uint64_t   n_tokens = 0; // at the last line
        drex_stats stats    = DREX_STATS_INITIALIZER;
    } pace;

    // written on the thread that calls run() while no other is in here
    struct {
        bool                           valid = false;
        server_drex_figures            figures;
        std::vector<drex_request_info> infos; // one for each slot
    } seen;

    // a failed call leaves no half-done work behind; its text names the field and the value
    static void check(drex_status status);

    // where an exception would end the server, or end requests that have nothing to do with it
    static void warn(drex_status status);

    void add_request(int id_slot, const server_task & task, bool same_lora);
    int  drop(int id_slot);
    void count_end(int id_slot, stop_type stop);
    void count_token(int id_slot);
    uint64_t newly_held(int id_slot);
    void trace_ramp(size_t i);
    void trace_token(int id_slot);
    void trace_draft(int id_slot, llama_token draft, bool same);
    void trace_rollback(int id_slot);
    void look_aside();
    void say_pace(int64_t now);
    void bind_device(drex_config & config, const common_params & params);
    void say(const common_params & params) const;
    void bind_kv();
    void check_copy(const char * what, drex_fill_mode mode) const;
    void fetch_logits();
    void fetch_logits(size_t first, size_t n);
    drex_logits ramp_logits();
    int32_t project();
    void end_step();
    bool has_drafts() const;
    void calibrate();
    void open_files(const common_params & params, bool is_resume);
    void open_profile();
    void open_record(const common_params & params, bool is_resume);
    void keep_profile();
    void save_profile() const;
    void record_step(int64_t duration_ns, uint64_t n_kv);
    void ban_tokens();
    void unban_tokens();
    void edit_bans(bool restore);
    bool edit_logits(llama_token token, size_t first, size_t n, float * values, bool write);

    drex_request_info info(int id_slot) const;
};
