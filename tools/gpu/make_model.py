#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a GGUF file of a model's shape with random weights. Needs nothing but Python.

Times depend on shapes, not on values: one random block is written over and over, so that a 7B model takes as long as its
bytes take to write. Values are about 0.01 in size, so that nothing overflows.
"""

import argparse
import os
import struct
import sys

SHAPES = {
    #                 layers embd   ff   heads kv vocab  rope
    "llama-2-7b": (32, 4096, 11008, 32, 32, 32000, 1e4),
    "tinyllama-1b": (22, 2048, 5632, 32, 4, 32000, 1e4),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256, 5e5),
    "tiny": (8, 256, 512, 4, 2, 1024, 1e4),
}

F32, F16, Q8_0 = 0, 1, 8
ALIGN = 32


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, value):
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    return text(key) + struct.pack("<II", 4, value)


def random_block(kind, count):
    """`count` elements of a type, as bytes."""
    if kind == F16:
        # A random sign and mantissa; the exponent makes the size 2^-8 to 2^-7.
        keep, put = b"\xff\x83", b"\x00\x20"
    else:
        # A block is an f16 scale (0.01 / 128 or so) and 32 signed bytes.
        keep, put = b"\x00\x00" + b"\xff" * 32, struct.pack("<e", 8e-5) + b"\x00" * 32
        count //= 32
    n = len(keep) * count
    noise = int.from_bytes(os.urandom(n), "little")
    masked = noise & int.from_bytes(keep * count, "little") | int.from_bytes(put * count, "little")
    return masked.to_bytes(n, "little")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out")
    parser.add_argument("--type", choices=["f16", "q8_0"], default="f16")
    options = parser.parse_args()
    layers, embd, ff, heads, kv_heads, vocab, rope = SHAPES[options.shape]
    kind = F16 if options.type == "f16" else Q8_0
    kv = embd // heads * kv_heads

    tensors = [("token_embd.weight", (embd, vocab), kind)]
    for i in range(layers):
        b = f"blk.{i}."
        tensors += [
            (b + "attn_norm.weight", (embd,), F32),
            (b + "attn_q.weight", (embd, embd), kind),
            (b + "attn_k.weight", (embd, kv), kind),
            (b + "attn_v.weight", (embd, kv), kind),
            (b + "attn_output.weight", (embd, embd), kind),
            (b + "ffn_norm.weight", (embd,), F32),
            (b + "ffn_gate.weight", (embd, ff), kind),
            (b + "ffn_up.weight", (embd, ff), kind),
            (b + "ffn_down.weight", (ff, embd), kind),
        ]
    tensors += [("output_norm.weight", (embd,), F32), ("output.weight", (embd, vocab), kind)]

    def size(shape, kind):
        n = 1
        for d in shape:
            n *= d
        return n * 4 if kind == F32 else n * 2 if kind == F16 else n // 32 * 34

    pad = lambda n: -n % ALIGN
    meta = [
        entry("general.architecture", "llama"),
        entry("general.name", options.shape + " with random weights"),
        entry("llama.context_length", 131072),
        entry("llama.embedding_length", embd),
        entry("llama.block_count", layers),
        entry("llama.feed_forward_length", ff),
        entry("llama.attention.head_count", heads),
        entry("llama.attention.head_count_kv", kv_heads),
        entry("llama.rope.dimension_count", embd // heads),
        entry("llama.rope.freq_base", rope),
        entry("llama.attention.layer_norm_rms_epsilon", 1e-5),
        entry("llama.vocab_size", vocab),
        entry("tokenizer.ggml.model", "none"),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta)) + b"".join(meta)
    offset = 0
    for name, shape, k in tensors:
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", k, offset)
        offset += size(shape, k) + pad(size(shape, k))
    head += b"\0" * pad(len(head))

    block = random_block(kind, 1 << 24 if offset > 1 << 28 else 1 << 18)
    ones = struct.pack("<f", 1.0) * max(embd, ff)
    temp = options.out + ".tmp"
    with open(temp, "wb", buffering=0) as out:
        write_all(out, head)
        for _, shape, k in tensors:
            left = size(shape, k)
            source = memoryview(ones if k == F32 else block)
            while left:
                part = source[: min(left, len(source))]
                write_all(out, part)
                left -= len(part)
            write_all(out, b"\0" * pad(size(shape, k)))
    os.replace(temp, options.out)
    print(f"{options.out}: {offset / 1e9:.2f} GB")


def write_all(out, data):
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]


if __name__ == "__main__":
    sys.exit(main())
