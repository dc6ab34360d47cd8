// drex_tokens: how each token of a request came about, for requests that ask.

#include "server-drex.h"

#include "build-info.h"

#include <cmath>

// what the slot's request was held since the last call
uint64_t server_drex::newly_held(int id_slot) {
    auto & slot = slots[id_slot];
    const uint64_t before = std::exchange(slot.held_ns, info(id_slot).held_ns);
    return slot.held_ns - before;
}

// after drex_ramp(): rows()[i] was looked at
void server_drex::trace_ramp(size_t i) {
    const int    id_slot = step_rows[i].id_slot;
    const auto & verdict = verdicts[i];
    auto       & slot    = slots[id_slot];

    if (verdict.decision == DREX_DECISION_GONE || verdict.decision == DREX_DECISION_PENDING) {
        return;
    }
    slot.trace.confidence = verdict.confidence;
    if (verdict.decision != DREX_DECISION_EXIT) {
        return;
    }
    slot.trace.ramp     = step.ramp;
    slot.trace.verified = false;
    if (slot.verifies()) {
        slot.trace.held_ns = newly_held(id_slot);
        slot.drafts.push_back(std::exchange(slot.trace, {}));
    }
}

// the slot gets a token
void server_drex::trace_token(int id_slot) {
    auto & slot = slots[id_slot];

    if (slot.judged != LLAMA_TOKEN_NULL && !slot.drafts.empty()) {
        slot.traces.push_back(slot.drafts.front());
        slot.traces.back().verified = true;
        slot.drafts.erase(slot.drafts.begin());
    } else {
        slot.trace.held_ns = newly_held(id_slot);
        slot.traces.push_back(std::exchange(slot.trace, {}));
    }
}

// the slot's newest token was held against a draft
void server_drex::trace_draft(int id_slot, llama_token draft, bool same) {
    auto & slot = slots[id_slot];

    if (!same && !slot.traces.empty()) {
        slot.traces.back().ramp     = DREX_NO_RAMP;
        slot.traces.back().replaced = draft;
    }
}

// what was run after the slot's newest token is gone
void server_drex::trace_rollback(int id_slot) {
    auto & slot = slots[id_slot];

    slot.drafts.clear();
    slot.trace = {};
    newly_held(id_slot);
}

json server_drex::tokens(int id_slot, llama_token sampled) {
    auto & slot = slots[id_slot];
    if (!slot.traces_tokens) {
        return json();
    }
    // a response is sent before agrees() says what became of the draft
    if (slot.judged != LLAMA_TOKEN_NULL) {
        trace_draft(id_slot, slot.judged, slot.judged == sampled);
    }

    json res = json::array();
    for (const auto & t : slot.traces) {
        json token = {
            {"exit_layer", nullptr},
            {"confidence", nullptr},
            {"verified",   t.verified},
            {"replaced",   nullptr},
            {"held_ms",    t.held_ns/1e6},
        };
        if (t.ramp != DREX_NO_RAMP) {
            token["exit_layer"] = ramp_layers[t.ramp];
        }
        if (std::isfinite(t.confidence)) {
            token["confidence"] = t.confidence;
        }
        if (t.replaced != LLAMA_TOKEN_NULL) {
            token["replaced"] = common_token_to_piece(ctx, t.replaced, true);
        }
        res.push_back(std::move(token));
    }
    slot.traces.clear();

    return res;
}

json server_drex_answer(server_task_result & result) {
    json res = result.to_json();
    if (result.drex_tokens.is_null() || res.is_null()) {
        return res;
    }

    const auto * whole = dynamic_cast<const server_task_result_cmpl_final *>(&result);

    if (res.is_array()) {
        if (res.empty()) {
            // a token without a chunk, since the chat format holds its text back
            const auto & part = dynamic_cast<const server_task_result_cmpl_partial &>(result);
            res.push_back({
                {"choices", json::array({
                    json {
                        {"finish_reason", nullptr},
                        {"index",         part.index},
                        {"delta",         json::object()},
                    },
                })},
                {"created", std::time(0)},
                {"id",      part.oaicompat_cmpl_id},
                {"model",   part.oaicompat_model},
                {"system_fingerprint", std::string(llama_build_info())},
                {"object",  "chat.completion.chunk"},
            });
        }
        res.back()["drex_tokens"] = std::move(result.drex_tokens);
    } else if (whole && !whole->stream && whole->generation_params.n_cmpl > 1 && res.contains("choices")) {
        res["choices"][0]["drex_tokens"] = std::move(result.drex_tokens); // choices are put together in one answer
    } else {
        res["drex_tokens"] = std::move(result.drex_tokens);
    }
    return res;
}
