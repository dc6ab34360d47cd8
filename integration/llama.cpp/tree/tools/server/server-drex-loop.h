// Early exit with dynamic rebatching: the part of server_context_impl's loop that runs windows.
//
// Included in the class body, since it works on slots, batch and queue. drex is not null here.

// The prompt rows that pre_decode() has put into the batch. Rows [0, next) have passed all layers, rows
// [next, next + n_transit) wait at a ramp, the others at layer 0.
struct drex_prompt {
    std::vector<server_batch::token> rows;

    int next      = 0;
    int n_transit = 0;

    int64_t t_start = 0; // of the window in which the rows at the ramp began

    std::vector<bool> rode; // slots whose row has run beside these prompt rows

    int n_left()    const { return (int) rows.size() - next; }
    int n_waiting() const { return n_left() - n_transit; }

    // rows of requests that have ended
    void drop(const std::vector<int> & id_slots) {
        auto is_gone = [&](const server_batch::token & t) {
            return std::find(id_slots.begin(), id_slots.end(), t.id_slot) != id_slots.end();
        };
        n_transit -= std::count_if(rows.begin() + next, rows.begin() + next + n_transit, is_gone);
        rows.erase(std::remove_if(rows.begin() + next, rows.end(), is_gone), rows.end());
    }
};

// A turn of the loop ends when the prompt rows have passed all layers and this time is over: then tasks are looked at.
static constexpr int64_t drex_turn_us = 5*1000;

// A yield to the queue switches threads twice, which is a lot next to a short window: now and then is enough.
static constexpr int64_t drex_yield_us = 20*1000;

void decode_drex() {
    drex_prompt prompt;
    prompt.rows = batch.tokens;
    prompt.rode.resize(slots.size());

    for (auto & slot : slots) {
        slot.i_batch = -1;
    }

    try {
        const int64_t t_end = ggml_time_us() + drex_turn_us;
        while (decode_drex_window(prompt) && (prompt.n_left() > 0 || ggml_time_us() < t_end)) {}

        if (prompt.n_left() > 0) {
            throw std::runtime_error(string_format("%d prompt rows have no window", prompt.n_left()));
        }
    } catch (...) {
        drex_emits = false;
        for (const auto & audit : std::exchange(drex_audits, {})) {
            drex->remove(audit.id_slot, audit.stop);
            slots[audit.id_slot].prompt_clear();
        }
        // Prompts count rows whose cells have not been filled in all layers: no later request must build on them. Whoever
        // catches this ends the requests.
        for (auto & slot : slots) {
            if (slot.is_processing()) {
                slot.prompt_clear();
            }
        }
        throw;
    }
}

// The slots in the order in which prompts are taken: with early exit, that in which their requests came. Windows end answers
// while prompts wait, so a slot that gets one request after the other would keep the prompts of those behind it waiting for ever.
std::vector<server_slot *> drex_prompt_order() {
    std::vector<server_slot *> order;
    for (auto & slot : slots) {
        order.push_back(&slot);
    }
    if (drex) {
        const auto arrived = [](const server_slot * slot) { return slot->task ? slot->task->params.drex.t_arrived : 0; };
        std::stable_sort(order.begin(), order.end(), [&](const auto * a, const auto * b) { return arrived(a) < arrived(b); });
    }
    return order;
}

// Cells that the slot's row attends over, n_more tokens behind its prompt: its own, or in a unified cache those of all slots.
int n_attended(const server_slot & slot, int n_more) const {
    int n = slot.prompt.n_tokens() + n_more;
    for (const auto & other : slots) {
        n += params_base.kv_unified && other.id != slot.id ? other.prompt.n_tokens() : 0;
    }
    return n;
}

// Adapters are those of all requests: they change while there are none.
bool drex_refuses_lora(const server_task & task, const std::vector<common_adapter_lora_info> & lora) {
    const bool busy = std::any_of(slots.begin(), slots.end(), [](const server_slot & slot) { return slot.is_processing(); });
    if (!drex || !busy || are_lora_equal(lora, params_base.lora_adapters)) {
        return false;
    }
    send_error(task, "with early exit, the scales of adapters can change only while no request is under way", ERROR_TYPE_UNAVAILABLE);
    return true;
}

// Beside the prompt rows of one batch a slot runs one row, however many windows they take: in the unpatched server that is what
// a batch has. With a row in each window, answers would go faster and prompts wait longer.
void drex_ready(const drex_prompt & prompt) {
    for (const auto & slot : slots) {
        if (slot.state != SLOT_STATE_GENERATING || drex->busy(slot.id) || (prompt.n_left() > 0 && prompt.rode[slot.id])) {
            continue;
        }
        const int n_drafts = drex->n_drafts(slot.id);
        const int n_ran    = slot.prompt.n_tokens() + drex->ahead(slot.id).size();
        // what cannot go on is verified first: at the end of the text, of the budget, of the context
        if (n_drafts > 0 && (llama_vocab_is_eog(vocab, slot.sampled) || n_ran + 1 >= slot.n_ctx ||
                    (slot.n_predict_max != -1 && n_drafts >= slot.n_remaining()))) {
            drex->settle(slot.id);
        } else {
            drex->ready(slot.id, n_attended(slot, drex->ahead(slot.id).size() + 1));
        }
    }
}

// one layer window over the rows that drex picks; false: there is nothing to run
bool decode_drex_window(drex_prompt & prompt) {
    drex_ready(prompt);

    int n_rows_max   = batch.n_tokens_alloc;
    int n_prompt_max = prompt.n_waiting();

    while (drex->plan(n_prompt_max, n_rows_max)) {
        const auto & rows     = drex->rows();
        const int    n_prompt = drex->n_prompt_rows();

        if (!drex->is_first() && n_prompt != prompt.n_transit) {
            drex->abandon(); // an exception has come between the two windows of other prompt rows
            continue;
        }

        batch.clear();

        uint64_t n_kv = 0;
        for (size_t i = 0; i < rows.size(); ++i) {
            const auto & row  = rows[i];
            const auto & slot = slots[row.id_slot];

            // only first windows look at the token
            const llama_pos pos = slot.prompt.tokens.pos_next() + row.offset;
            drex->place(i, pos);
            if (!batch.add(slot.id, slot.sampled, pos, drex->wants_logits(i), false)) {
                throw std::runtime_error(string_format("the batch of %d tokens is too small for the %zu rows of a window",
                            batch.n_tokens_alloc, rows.size()));
            }
            n_kv += n_attended(slot, row.offset + 1);
        }
        for (int k = 0; k < n_prompt; ++k) {
            const auto & t      = prompt.rows.at(prompt.next + k);
            const bool   output = t.output && drex->is_last();

            drex->add_prompt_row(k, output, batch.size());
            if (!batch.add(t.id_slot, t.token, t.pos, output, drex->is_last())) {
                throw std::runtime_error(string_format("the batch of %d tokens is too small for the %zu rows and %d prompt rows of a window",
                            batch.n_tokens_alloc, rows.size(), n_prompt));
            }
        }
        batch.render(0, batch.size());

        common_set_adapter_lora(ctx_tgt, slots[batch.tokens[0].id_slot].lora);
        llama_set_embeddings(ctx_tgt, false);

        int32_t ret = 0;
        metrics_pre_decode();
        if (n_prompt > 0 && drex->is_first()) {
            prompt.t_start = t_decode_start;
        }
        if (ggml_time_us() - t_drex_yield > drex_yield_us) {
            const server_drex::aside aside(*drex);
            queue_tasks.yield_to_queue([&]() {
                ret = drex->run(batch.view.get());
            });
            t_drex_yield = ggml_time_us();
        } else {
            ret = drex->run(batch.view.get());
        }

        if (ret == 0) {
            finish_drex_window(prompt, n_kv);
            return true;
        }

        std::vector<int> ids = drex->culprits(ret, batch.view.get());

        drex->abandon();

        // no room in the KV cache: make some, or take fewer rows
        const int  n_rows  = batch.size();
        const bool is_full = ids.empty() && ret == 1;
        if (is_full && (try_clear_idle_slots() || rows.size() > 1 || n_prompt > 1)) {
            n_rows_max   = std::max<int>(1, rows.size()/2);
            n_prompt_max = std::min(n_prompt_max, std::max(1, n_prompt/2));
            continue;
        }

        const std::string err = is_full ? "Context size has been exceeded." :
            ret == -1 && !ids.empty()   ? "Early exit: the KV cache does not hold what this request has run." : "Compute error.";
        SRV_ERR("%s n_rows = %d, ret = %d\n", err.c_str(), n_rows, ret);

        if (is_full && n_prompt > 0) {
            ids.push_back(batch.tokens.back().id_slot); // a row that is under way goes before a prompt
        } else if (ids.empty()) {
            for (const auto & t : batch.tokens) {
                ids.push_back(t.id_slot);
            }
        }
        end_drex_requests(prompt, ids, err, is_full);

        return true;
    }

    return false;
}

// Ends these requests, and nothing is left of them in the memory. The others go on. is_full: there is no room for them
void end_drex_requests(drex_prompt & prompt, std::vector<int> ids, const std::string & err, bool is_full) {
    for (size_t i = 0; i < ids.size(); ++i) {
        const auto & slot = slots[ids[i]];
        for (const auto & other : slots) {
            if (slot.task && slot.task->is_parent() && other.state == SLOT_STATE_WAIT_OTHER && other.task->id_parent == slot.task->id) {
                ids.push_back(other.id); // nobody else would wake it
            }
        }
    }
    for (const int id : ids) {
        // a slot that has ended meanwhile, or had several rows, has nobody to tell
        if (slots[id].is_processing()) {
            send_error(slots[id], err);
            if (is_full) {
                drex->fail(id, ERROR_TYPE_UNAVAILABLE); // the client is told what the unpatched server tells it
            }
            slots[id].release();
        }
        slots[id].prompt_clear();
    }
    prompt.drop(ids);

    // prompt rows at a ramp are drex's no more: they begin again, in new cells
    std::map<int, llama_pos> begins;
    for (int k = prompt.n_transit - 1; k >= 0; --k) {
        const auto & t = prompt.rows[prompt.next + k];
        begins[t.id_slot] = t.pos;
    }
    for (const auto & [id, pos] : begins) {
        slots[id].mem.seq_rm(id, pos, -1);
    }
    prompt.n_transit = 0;
}

// the window ran: its rows go where drex sends them, tokens go to their clients
void finish_drex_window(drex_prompt & prompt, uint64_t n_kv) {
    const auto & rows     = drex->rows();
    const int    n_prompt = drex->n_prompt_rows();

    if (drex->is_first()) {
        for (const auto & row : rows) {
            auto & slot = slots[row.id_slot];
            prompt.rode[slot.id] = true;
            if (slot.state == SLOT_STATE_GENERATING && drex->ran(slot.id, slot.sampled)) {
                slot.prompt.tokens.push_back(slot.sampled);
            }
        }
    }
    if (n_prompt > 0 && drex->is_last()) {
        t_decode_start = prompt.t_start; // tokens of prompts are counted here, the time of all their windows too
    }
    metrics_post_decode(0, batch.size(), true);
    verify_drex();
    drex->finish(n_kv);

    for (const auto & row : rows) {
        slots[row.id_slot].i_batch = -1;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        auto & slot = slots[rows[i].id_slot];
        if (rows[i].emit) {
            slot.i_batch = i;
        }
        if (drex->approximates(i)) {
            auto & tokens = slot.prompt.tokens;
            tokens.n_exact = std::min(tokens.n_exact, tokens.size() - 1);
        }
        const llama_token draft = drex->drafted(i);
        if (draft != LLAMA_TOKEN_NULL) {
            slot.sampled = draft; // runs next; the client gets it when it is verified
        }
    }

    if (n_prompt > 0 && !drex->is_last()) {
        prompt.n_transit = n_prompt;
    }
    if (n_prompt > 0 && drex->is_last()) {
        for (int k = 0; k < n_prompt; ++k) {
            const auto & t = prompt.rows[prompt.next + k];
            auto & slot = slots[t.id_slot];
            if (t.output && slot.state == SLOT_STATE_DONE_PROMPT) {
                slot.i_batch = rows.size() + k;
                drex_start_children(slot);
            }
        }
        prompt.next     += n_prompt;
        prompt.n_transit = 0;
    }

    drex_emits = true;
    post_decode(batch.size(), 0);
    drex_emits = false;
    drex_audit_answers();
}

// An answer that the full model is to read once more, with whole K/V: its request has ended, and its slot is still its own.
struct drex_audit {
    int         id_slot;
    int         n_prompt; // tokens before the answer
    llama_token last;     // the newest token, which has not run
    stop_type   stop;
};

std::vector<drex_audit> drex_audits;
bool                    drex_emits = false; // a window's tokens go out, and audits follow

// At the end of a request. What ends elsewhere, as a request whose client has left, is not audited.
bool drex_audits_later(const server_slot & slot) {
    if (!drex_emits || slot.prompt.n_tokens() <= slot.task->n_tokens() || !drex->audits(slot.id)) {
        return false;
    }
    drex->answered(slot.id, slot.stop);
    drex_audits.push_back({ slot.id, slot.task->n_tokens(), slot.sampled, slot.stop });
    return true;
}

// Runs the answer again from the end of the prompt on; throws when that fails
void drex_audit_answer(server_slot & slot, const drex_audit & audit) {
    const int n_run = slot.prompt.n_tokens() - audit.n_prompt;
    const int n_max = std::min<int>(llama_n_batch(ctx_tgt), server_drex::n_outputs_max(params_base));

    llama_tokens answer;
    for (int i = 0; i < n_run; ++i) {
        answer.push_back(slot.prompt.tokens[audit.n_prompt + i]);
    }
    answer.push_back(audit.last);

    int n_differing = 0;
    slot.mem.seq_rm(slot.id, audit.n_prompt, -1);
    for (int off = 0; off < n_run; off += n_max) {
        const int n = std::min(n_max, n_run - off);
        batch.clear();
        for (int i = 0; i < n; ++i) {
            batch.add(slot.id, answer[off + i], audit.n_prompt + off + i, true, false);
        }
        batch.render(0, n);
        if (const int ret = llama_process(ctx_tgt, LLAMA_PROCESS_TYPE_DECODE, batch.view.get())) {
            throw std::runtime_error(string_format("the pass failed, ret = %d", ret));
        }
        for (int i = 0; i < n; ++i) {
            n_differing += drex->differs(slot.id, i, answer[off + i + 1]);
        }
    }
    drex->audited(slot.id, n_run, n_differing);
}

void drex_audit_answers() {
    while (!drex_audits.empty()) {
        const auto audit = drex_audits.back();
        drex_audits.pop_back();

        auto & slot = slots[audit.id_slot];
        bool   ok   = false;
        try {
            drex_audit_answer(slot, audit);
            ok = true;
        } catch (const std::exception & e) {
            SLT_WRN(slot, "early exit: no audit: %s\n", e.what()); // no room in a unified cache, say
        }
        drex->remove(slot.id, audit.stop);
        if (!ok) {
            slot.prompt_clear();
        } else if (slot.prompt.tokens.n_exact >= (size_t) audit.n_prompt) {
            slot.prompt.tokens.n_exact = SIZE_MAX; // the K/V that is left is the full model's
        }
    }
}

// n_cmpl > 1: the parent's prompt has passed all layers, its children go on from a copy
void drex_start_children(server_slot & parent) {
    if (!parent.task->is_parent()) {
        return;
    }
    for (auto & other : slots) {
        if (other.state == SLOT_STATE_WAIT_OTHER && parent.task->id == other.task->id_parent) {
            parent.copy_state_to(other);
            other.state = SLOT_STATE_DONE_PROMPT;
        }
    }
}

// After the last layer, with fill verify: emits what the full model says, row by row, up to the first draft that it does not
// confirm. Each token is sampled as if the one before it had just been decoded.
void verify_drex() {
    const auto & rows = drex->rows();

    drex->begin_verify();
    for (size_t i = 0; i < rows.size(); ) {
        auto & slot = slots[rows[i].id_slot];

        size_t end = i;
        while (end < rows.size() && rows[end].id_slot == slot.id) {
            end++;
        }
        if (!drex->verifies(rows[i])) {
            i = end;
            continue;
        }

        // The engine's own counters of drafts. A request's last token releases the slot before its draft is counted, so these go
        // to the server's sums at once.
        const size_t n_drafts = std::count_if(rows.begin() + i, rows.begin() + end, [](const server_drex::row & r) { return r.draft; });
        metrics.n_draft_tokens      += n_drafts;
        metrics.n_draft_verif_steps += n_drafts > 0;

        // the drafts after each row, the last one is what would run next
        llama_tokens drafts(drex->ahead(slot.id).begin() + 1, drex->ahead(slot.id).end());
        drafts.push_back(slot.sampled);

        for (size_t k = 0; i + k < end; ++k) {
            slot.prompt.tokens.push_back(drex->ahead(slot.id)[0]);
            drex->verified(slot.id);
            slot.i_batch = i + k;
            drex->judge(slot.id, rows[i + k].draft ? drafts[k] : LLAMA_TOKEN_NULL);
            post_decode(batch.size(), 0);
            const bool more = slot.state == SLOT_STATE_GENERATING;
            if (!rows[i + k].draft) {
                drex->chose(i + k, slot.sampled);
                break;
            }
            const bool same = slot.sampled == drafts[k];
            drex->agrees(i + k, same, !more);
            if (same) {
                metrics.n_draft_accepted++;
                if (metrics.n_accepted_per_pos.size() <= k) {
                    metrics.n_accepted_per_pos.resize(k + 1);
                }
                metrics.n_accepted_per_pos[k]++;
            }
            if (!more) {
                break;
            }
            if (!same) {
                drex->rollback(slot.id, slot.prompt.tokens.pos_next());
                break;
            }
        }
        slot.i_batch = -1;
        i = end;
    }
    drex->end_verify();
}
