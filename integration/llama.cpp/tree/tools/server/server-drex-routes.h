// Early exit: /drex and /drex/stats.
//
// Included in server_routes::init_routes(). server.cpp registers the two where there is a policy.

// the same for everyone, and there while the model loads
this->get_drex_page = [](const server_http_req &) {
    auto res = std::make_unique<server_http_res>();
    res->content_type = "text/html; charset=utf-8";
    res->headers["Cache-Control"] = "no-cache";
    res->headers["Content-Security-Policy"] =
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    res->data = server_drex_page;
    return res;
};

// does not depend on --metrics; a sleeping server says how things were before
this->get_drex_stats = [this](const server_http_req & req) {
    auto res = create_response(true);
    json stats;

    const bool is_awake = !queue_tasks.is_sleeping();
    if (is_awake) {
        server_task task(SERVER_TASK_TYPE_METRICS);
        task.id = res->rd.get_new_id();
        res->rd.post_task(std::move(task), true); // high-priority task
    }
    // a task posted right before sleeping is never processed, do not wait for it
    auto result = is_awake ? res->rd.next([&]{ return req.should_stop() || queue_tasks.is_sleeping(); }) : nullptr;

    if (result && result->is_error()) {
        res->error(result->to_json());
        return res;
    }
    if (result) {
        auto * res_task = dynamic_cast<server_task_result_metrics *>(result.get());
        GGML_ASSERT(res_task != nullptr);
        stats = std::move(res_task->metrics.drex_stats);
    } else {
        std::unique_lock<std::mutex> lock(mutex_cache);
        stats = cached_metrics.drex_stats;
    }
    if (stats.is_null()) {
        res->error(format_error_response("Early exit is off: the model has no exit layers", ERROR_TYPE_NOT_SUPPORTED));
        return res;
    }
    res->ok(stats);
    return res;
};
