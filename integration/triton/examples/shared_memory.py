# SPDX-License-Identifier: Apache-2.0
"""A request whose prompt and answer lie in shared memory of this machine: neither goes over the connection.

    python3 shared_memory.py localhost:8000 first "Returns the"

The model has one response for a request (decoupled: false). Prints the answer.
"""

import sys

import numpy as np
import tritonclient.http as http
import tritonclient.utils as utils
import tritonclient.utils.shared_memory as shared

ROOM = 1 << 16  # bytes for the answer


def main(url, model, prompt):
    client = http.InferenceServerClient(url)
    text = utils.serialize_byte_tensor(np.array([prompt.encode()], dtype=object))
    size = len(text.item())
    regions = {name: shared.create_shared_memory_region(name, f"/{name}", room)
               for name, room in (("drex_prompt", size), ("drex_answer", ROOM))}
    try:
        shared.set_shared_memory_region(regions["drex_prompt"], [text])
        client.register_system_shared_memory("drex_prompt", "/drex_prompt", size)
        client.register_system_shared_memory("drex_answer", "/drex_answer", ROOM)
        prompt_input = http.InferInput("text_input", [1], "BYTES")
        prompt_input.set_shared_memory("drex_prompt", size)
        sampling = http.InferInput("sampling_parameters", [1], "BYTES")
        sampling.set_data_from_numpy(np.array([b'{"temperature": 0, "max_tokens": 16}'], dtype=object))
        output = http.InferRequestedOutput("text_output")
        output.set_shared_memory("drex_answer", ROOM)
        client.infer(model, [prompt_input, sampling], outputs=[output])
        answer = shared.get_contents_as_numpy(regions["drex_answer"], np.object_, [1])
        print(answer[0].decode())
    finally:
        client.unregister_system_shared_memory()
        for region in regions.values():
            shared.destroy_shared_memory_region(region)


main(*sys.argv[1:])
