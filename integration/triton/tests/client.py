# SPDX-License-Identifier: Apache-2.0
"""Requests to Triton with its own gRPC client. Reads a JSON job from standard input, prints a JSON answer.

A job: {"url", "model", "requests": [{"prompt", "sampling", "inputs", "cancel_after", "disconnect_after", "timeout_us"}],
"at_once", "show"}. Each request has a client, and so a stream, of its own.
"""

import json
import queue
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as grpc


def tensor(name, value):
    if isinstance(value, bool):
        made, data = grpc.InferInput(name, [1], "BOOL"), np.array([value], dtype=bool)
    else:
        made, data = grpc.InferInput(name, [1], "BYTES"), np.array([value.encode()], dtype=object)
    made.set_data_from_numpy(data)
    return made


def generate(job, request, show):
    """One streaming request; what came back, and how often the final flag did."""
    out = {"text": "", "tokens": [], "responses": 0, "finals": 0, "errors": [], "parameters": {}, "reason": "", "after_final": 0}
    answers = queue.Queue()
    client = grpc.InferenceServerClient(job["url"])
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    inputs = {
        "text_input": request["prompt"],
        "stream": True,
        "sampling_parameters": json.dumps(request["sampling"]),
        "return_token_ids": True,
        "return_finish_reason": True,
    }
    inputs.update(request.get("inputs", {}))
    client.async_stream_infer(
        job["model"],
        [tensor(name, value) for name, value in inputs.items() if value is not None],
        enable_empty_final_response=True,
        timeout=request.get("timeout_us"),
    )
    cancel = request.get("cancel_after", request.get("disconnect_after"))
    while out["finals"] == 0:
        if cancel is not None and out["responses"] >= cancel:
            if "cancel_after" in request:
                client.stop_stream(cancel_requests=True)
            else:
                client._client_stub = None
                client._channel.close()
            return out
        try:
            result, error = answers.get(timeout=120)
        except queue.Empty:
            out["errors"].append("no answer for 120 s")
            break
        if error is not None:
            out["errors"].append(error.message())
            break  # the client library gives no final flag with an error
        response = result.get_response()
        final = response.parameters.get("triton_final_response")
        out["finals"] += bool(final and final.bool_param)
        out["responses"] += 1
        text = result.as_numpy("text_output")
        if text is not None:
            piece = text[0].decode()
            out["text"] += piece
            if show:
                print(piece, end="", flush=True, file=sys.stderr)
        ids = result.as_numpy("token_ids")
        if ids is not None:
            out["tokens"] += ids.tolist()
        reason = result.as_numpy("finish_reason")
        if reason is not None and reason[0]:
            out["reason"] = reason[0].decode()
        for name, value in response.parameters.items():
            if name.startswith("drex_"):
                out["parameters"][name] = value.string_param or value.int64_param
    time.sleep(job.get("linger", 0))  # whatever comes after the final flag is one too many
    out["after_final"] = answers.qsize()
    client.stop_stream()
    client.close()
    return out


def main():
    job = json.load(sys.stdin)
    requests = job["requests"]
    out = [None] * len(requests)
    places = threading.Semaphore(job.get("at_once", len(requests)))

    def run(at):
        with places:
            try:
                out[at] = generate(job, requests[at], job.get("show", False) and at == 0)
            except Exception as error:  # a client that fails is a result to report
                out[at] = {"text": "", "tokens": [], "responses": 0, "finals": 0, "errors": [repr(error)], "parameters": {}, "reason": "", "after_final": 0}

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(out))
    sys.stdout.flush()


main()
