#!/usr/bin/env python3
"""A tiny random checkpoint as LayerSkip's are on Hugging Face: Llama 2, bfloat16, a SentencePiece tokenizer. usage:
layerskip.py --text README.md --out DIR

Needs numpy and sentencepiece. llama.cpp's convert_hf_to_gguf.py reads the folder."""

import argparse, json, os
import numpy as np, sentencepiece

WIDTH, LAYERS, HEADS, KV_HEADS, FF, VOCAB = 64, 8, 2, 1, 96, 512
HEAD = WIDTH // HEADS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": FF,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}


def tensors(rng):
    """A layer adds little to the hidden row, and the head is sharp, so that some rows leave early and are right."""

    def matrix(rows, columns, std):
        return std * rng.standard_normal((rows, columns))

    yield "model.embed_tokens.weight", matrix(VOCAB, WIDTH, 1.0)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", np.ones(WIDTH)
        yield layer + "self_attn.q_proj.weight", matrix(HEADS * HEAD, WIDTH, 0.2)
        yield layer + "self_attn.k_proj.weight", matrix(KV_HEADS * HEAD, WIDTH, 0.2)
        yield layer + "self_attn.v_proj.weight", matrix(KV_HEADS * HEAD, WIDTH, 0.12)
        yield layer + "self_attn.o_proj.weight", matrix(WIDTH, HEADS * HEAD, 0.05)
        yield layer + "post_attention_layernorm.weight", np.ones(WIDTH)
        yield layer + "mlp.gate_proj.weight", matrix(FF, WIDTH, 0.12)
        yield layer + "mlp.up_proj.weight", matrix(FF, WIDTH, 0.12)
        yield layer + "mlp.down_proj.weight", matrix(WIDTH, FF, 0.1)
    yield "model.norm.weight", rng.choice([-1.0, 1.0], WIDTH)
    yield "lm_head.weight", matrix(VOCAB, WIDTH, 0.5)


def write_safetensors(path, items):
    """The format: the header's length, the header as JSON, the data. bfloat16 is the upper half of a float32."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in items:
        raw = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + data)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--text", required=True)
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=a.text,
        model_prefix=os.path.join(a.out, "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        minloglevel=2,
    )
    with open(os.path.join(a.out, "config.json"), "w") as out:
        json.dump(CONFIG, out, indent=2)
    with open(os.path.join(a.out, "tokenizer_config.json"), "w") as out:
        json.dump({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}, out, indent=2)
    write_safetensors(os.path.join(a.out, "model.safetensors"), tensors(np.random.default_rng(1)))


main()
