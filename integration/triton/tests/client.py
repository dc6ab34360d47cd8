# SPDX-License-Identifier: Apache-2.0
"""Requests to Triton. Reads a JSON job from the first line of standard input, prints a JSON answer.

A job: {"url", "http", "model", "requests", "at_once", "drain", "show"}. A request: {"prompt", "sampling", "inputs",
"parameters", "how", "cancel_after", "disconnect_after", "cancel_on_line", "timeout_us"}; `inputs` adds to those that every
request has, null takes one away, and {"datatype", "shape", "hex"} is sent as it stands. `cancel_after` and
`disconnect_after` count responses; `cancel_on_line` waits for a second line on standard input. `how`:

    stream   (default) the gRPC service itself, which shows each message: final flags are counted with errors too, and
             whatever comes before the server ends the stream, which is asked for `drain` seconds after the final flag
    library  tritonclient.grpc, streaming
    unary    tritonclient.grpc, one response
    http     tritonclient.http, one response

Each request has a connection of its own.
"""

import json
import os
import queue
import struct
import sys
import threading
import time

import grpc
import numpy as np
import tritonclient.grpc as tritongrpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

SILENCE = 180  # seconds; generous, for slow machines
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
second_line = threading.Event()
unread = b""


def line():
    """Of standard input. Not through its buffer, whose lock a thread that waits would hold when this program ends."""
    global unread
    while b"\n" not in unread:
        part = os.read(0, 1 << 16)
        if not part:
            return b""
        unread += part
    text, unread = unread.split(b"\n", 1)
    return text + b"\n"


def empty():
    return {"text": "", "tokens": [], "responses": 0, "finals": 0, "errors": [], "parameters": {}, "reason": "",
            "after_final": 0, "ended": False, "cancelled": False, "counted": 0}


def inputs_of(request):
    inputs = {
        "text_input": request["prompt"],
        "stream": request.get("how", "stream") in ("stream", "library"),
        "sampling_parameters": json.dumps(request["sampling"]),
        "return_token_ids": True,
        "return_finish_reason": True,
    }
    inputs.update(request.get("inputs", {}))
    return {name: value for name, value in inputs.items() if value is not None}


def text_bytes(text):
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def raw_input(value):
    if isinstance(value, dict):
        return value["datatype"], value["shape"], bytes.fromhex(value["hex"])
    if isinstance(value, bool):
        return "BOOL", [1], bytes([value])
    return "BYTES", [1], text_bytes(value)


def message(job, request):
    asked = service_pb2.ModelInferRequest(model_name=request.get("model", job["model"]))
    for name, value in inputs_of(request).items():
        datatype, shape, raw = raw_input(value)
        asked.inputs.add(name=name, datatype=datatype, shape=shape)
        asked.raw_input_contents.append(raw)
    asked.parameters["triton_enable_empty_final_response"].bool_param = True
    if "timeout_us" in request:
        asked.parameters["timeout"].int64_param = request["timeout_us"]
    for name, value in request.get("parameters", {}).items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(asked.parameters[name], field, value)
    return asked


def outputs_of(response):
    """Name to value: a text, or a list of numbers."""
    found = {}
    for output, raw in zip(response.outputs, response.raw_output_contents):
        if output.datatype == "BYTES":
            (length,) = struct.unpack_from("<I", raw)
            if length != len(raw) - 4:
                raise ValueError(f"{output.name}: {length} bytes of text in {len(raw)}")
            found[output.name] = raw[4:].decode()
        else:
            found[output.name] = np.frombuffer(raw, {"INT32": "<i4", "UINT32": "<u4"}[output.datatype]).tolist()
    return found


def parameter(value):
    return getattr(value, value.WhichOneof("parameter_choice"))


def note(out, found, parameters, show=False):
    out["responses"] += 1
    piece = found.get("text_output", "")
    out["text"] += piece
    if show:
        print(piece, end="", flush=True, file=sys.stderr)
    out["tokens"] += found.get("token_ids", [])
    out["counted"] += sum(found.get("num_output_tokens", []))
    out["reason"] = found.get("finish_reason") or out["reason"]
    out["parameters"].update((n, v) for n, v in parameters.items() if n.startswith("drex_"))


def stream(job, request, show):
    out = empty()
    channel = grpc.insecure_channel(job["url"], options=OWN_CONNECTION)
    done = threading.Event()

    def send():
        yield message(job, request)
        done.wait()  # the sending side stays open, as that of a client with more to ask

    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(send(), timeout=SILENCE)

    def leave():
        out["cancelled"] = True
        if "disconnect_after" in request:
            channel.close()
        else:
            call.cancel()

    if request.get("cancel_on_line"):
        threading.Thread(target=lambda: second_line.wait() and leave(), daemon=True).start()
    limit = request.get("cancel_after", request.get("disconnect_after"))
    try:
        if limit == 0:
            leave()
        for answer in call:
            over = out["finals"] > 0 or bool(out["errors"])
            out["after_final"] += over
            response = answer.infer_response
            final = response.parameters["triton_final_response"].bool_param
            out["finals"] += final
            if answer.error_message:
                out["errors"].append(answer.error_message)
            else:
                note(out, outputs_of(response), {n: parameter(v) for n, v in response.parameters.items()}, show)
            if not over and (final or answer.error_message):
                # Whatever comes meanwhile is one too many.
                threading.Timer(job.get("drain", 0.2), done.set).start()
            if out["responses"] == limit:
                leave()
        out["ended"] = True
    except (grpc.RpcError, ValueError) as error:
        if not out["cancelled"]:
            out["errors"].append(f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else repr(error))
    finally:
        done.set()
        channel.close()
    return out


def library_inputs(module, request):
    made = []
    for name, value in inputs_of(request).items():
        if isinstance(value, bool):
            tensor, data = module.InferInput(name, [1], "BOOL"), np.array([value], dtype=bool)
        else:
            tensor, data = module.InferInput(name, [1], "BYTES"), np.array([value.encode()], dtype=object)
        tensor.set_data_from_numpy(data)
        made.append(tensor)
    return made


def library_outputs(result):
    found = {}
    for name in ("text_output", "finish_reason", "token_ids"):
        value = result.as_numpy(name)
        if value is not None:
            found[name] = value.tolist() if name == "token_ids" else value[0].decode()
    return found


def library(job, request, show):
    out = empty()
    answers = queue.Queue()
    client = tritongrpc.InferenceServerClient(job["url"], channel_args=OWN_CONNECTION)
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer(request.get("model", job["model"]), library_inputs(tritongrpc, request),
                              enable_empty_final_response=True)
    while out["finals"] == 0:
        result, error = answers.get(timeout=SILENCE)
        if error is not None:
            out["errors"].append(error.message())
            break  # this client shows no final flag with an error
        response = result.get_response()
        out["finals"] += response.parameters["triton_final_response"].bool_param
        note(out, library_outputs(result), {n: parameter(v) for n, v in response.parameters.items()}, show)
    time.sleep(job.get("drain", 0.2))
    out["after_final"] = answers.qsize()
    client.stop_stream()
    client.close()
    out["ended"] = True
    return out


def unary(job, request, show):
    out = empty()
    answers = queue.Queue()
    client = tritongrpc.InferenceServerClient(job["url"], channel_args=OWN_CONNECTION)
    call = client.async_infer(request.get("model", job["model"]), library_inputs(tritongrpc, request),
                              callback=lambda result, error: answers.put((result, error)))
    if request.get("cancel_on_line"):
        second_line.wait()
        out["cancelled"] = True
        call.cancel()
    result, error = answers.get(timeout=SILENCE)
    if error is not None:
        out["errors"].append(f"{error.status()}: {error.message()}")
    else:
        response = result.get_response()
        note(out, library_outputs(result), {n: parameter(v) for n, v in response.parameters.items()}, show)
    time.sleep(job.get("drain", 0.2))
    out["after_final"] = answers.qsize()
    client.close()
    out["ended"] = True
    return out


def http(job, request, show):
    import tritonclient.http as tritonhttp  # gevent comes with it, which the others do not need

    out = empty()
    client = tritonhttp.InferenceServerClient(job["http"], connection_timeout=SILENCE, network_timeout=SILENCE)
    try:
        result = client.infer(request.get("model", job["model"]), library_inputs(tritonhttp, request))
        note(out, library_outputs(result), result.get_response().get("parameters", {}), show)
    except tritonhttp.InferenceServerException as error:
        out["errors"].append(error.message())
    client.close()
    out["ended"] = True
    return out


HOW = {"stream": stream, "library": library, "unary": unary, "http": http}


def main():
    job = json.loads(line())
    requests = job["requests"]
    out = [None] * len(requests)
    places = threading.Semaphore(job.get("at_once", len(requests)))

    def run(at):
        with places:
            try:
                out[at] = HOW[requests[at].get("how", "stream")](job, requests[at], job.get("show", False) and at == 0)
            except Exception as error:  # a client that fails is a result to report
                out[at] = {**empty(), "errors": [repr(error)]}

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(requests))]
    for thread in threads:
        thread.start()
    threading.Thread(target=lambda: line() and second_line.set(), daemon=True).start()
    for thread in threads:
        thread.join()
    print(json.dumps(out))
    sys.stdout.flush()


main()
