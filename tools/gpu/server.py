#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama-server with early exit on whatever device it has: every fill serves, and `verify` and threshold 2 agree with the full
model as far as the unpatched way of serving agrees with itself, in a batch and alone. A batch's rows differ from one alone in the
last bits, so that near-ties part some streams for good; equality to the bit is for builds that have it, on a CPU.

    server.py LLAMA_SERVER MODEL NGL OUT.json
"""

import concurrent.futures
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

PROMPTS = [
    "The iterator returns",
    "A mutex protects",
    "Creates a new empty vector",
    "Returns the number of elements",
    "This function panics if",
    "Converts the string slice",
]
N = 48


def post(port, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def with_server(server, model, ngl, flags, work):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # The tiny model needs no more threads; a busy machine is no slower with two.
    command = [server, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-np", "6", "-c", "3072", "-ngl", str(ngl), "-t", "2",
               "--no-webui", *flags]
    with open("/dev/null") as null:
        child = subprocess.Popen(command, stdin=null, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = []
    import threading
    reader = threading.Thread(target=lambda: lines.extend(child.stdout), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                if child.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server does not start: {' '.join(flags)}: {''.join(lines[-5:])}")
                time.sleep(0.05)
        return work(port)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()


def all_prompts(port, **extra):
    body = {"n_predict": N, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False, **extra}
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda p: post(port, {"prompt": p, **body}), PROMPTS))


def main():
    server, model, ngl, out = sys.argv[1:5]
    result = {"ngl": int(ngl)}
    alone = {"n_predict": N, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}

    def without(port):
        return [post(port, {"prompt": p, **alone})["tokens"] for p in PROMPTS], [a["tokens"] for a in all_prompts(port)]

    full, batched = with_server(server, model, ngl, [], without)

    def same(streams):
        equal = total = 0
        for a, b in zip(streams, full):
            n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(b))
            equal, total = equal + n, total + len(b)
        return equal / total

    result["batched"] = {"equal_up_to_first_difference": same(batched)}

    def early(port):
        for fill in ["copy", "propagate", "postfill", "verify"]:
            answers = all_prompts(port, drex_fill=fill)
            exits = sum(sum(a["timings"]["drex_exits"]) for a in answers)
            made = sum(a["timings"]["predicted_n"] for a in answers)
            result[fill] = {"tokens": made, "exits": exits, "equal_up_to_first_difference": same([a["tokens"] for a in answers])}
            if made != N * len(PROMPTS):
                raise RuntimeError(f"{fill}: {made} tokens instead of {N * len(PROMPTS)}")
            if fill != "verify" and exits == 0:
                raise RuntimeError(f"{fill}: nothing left early")
            # rows that leave are sampled from their logits, which must be those of their own row
        sampled = all_prompts(port, temperature=0.8, seed=1, n_probs=2)
        result["sampled"] = {"tokens": sum(a["timings"]["predicted_n"] for a in sampled)}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as m:
            forced = re.search(r"^drex_involuntary_exits_total\S* (\d+)", m.read().decode(), re.M)
        result["involuntary_exits"] = int(forced.group(1))

    with_server(server, model, ngl, ["--drex-policy", "hold", "--metrics"], early)
    with_server(server, model, ngl, ["--drex-policy", "hold", "--drex-threshold", "2"],
                lambda port: result.update(never={"equal_up_to_first_difference": same([a["tokens"] for a in all_prompts(port)])}))

    # One near-tie early in one of the streams is worth a share of them.
    equal = {name: result[name]["equal_up_to_first_difference"] for name in ("batched", "verify", "never")}
    result["least"] = min(0.6, equal["batched"] - 1 / len(PROMPTS))
    result["ok"] = result["involuntary_exits"] == 0 and min(equal["verify"], equal["never"]) >= result["least"]
    with open(out, "w") as f:
        json.dump(result, f, indent=1)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
