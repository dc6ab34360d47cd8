#!/usr/bin/env python3
"""usage: export_gguf.py --ckpt final.pt --tok tokenizer.json --out model.gguf --type f16|q8_0|f32"""

import argparse, json, os, sys
import numpy as np, torch, gguf

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from model import *

ap = argparse.ArgumentParser()
ap.add_argument("--ckpt", required=True)
ap.add_argument("--tok", required=True)
ap.add_argument("--out", required=True)
ap.add_argument("--type", default="f16")
ap.add_argument("--name", default="drex-rustdoc")
a = ap.parse_args()
ck = torch.load(a.ckpt, map_location="cpu", weights_only=True)
c = Cfg(**ck["cfg"])
sd = ck["model"]
w = gguf.GGUFWriter(a.out, "llama")
w.add_name(a.name)
w.add_license("MIT OR Apache-2.0")
w.add_description("early-exit Llama trained on the Rust documentation")
w.add_context_length(c.ctx)
w.add_embedding_length(c.d)
w.add_block_count(c.layers)
w.add_feed_forward_length(c.ff)
w.add_head_count(c.heads)
w.add_head_count_kv(c.kv_heads)
w.add_key_length(c.hd)
w.add_value_length(c.hd)
w.add_rope_dimension_count(c.hd)
w.add_rope_freq_base(c.rope_base)
w.add_layer_norm_rms_eps(c.eps)
w.add_vocab_size(c.vocab)
w.add_file_type(
    {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[
        a.type
    ]
)
w.add_array("llama.early_exit.layers", [int(x) for x in c.exits])
w.add_string("llama.early_exit.head", "shared")
t = json.load(open(a.tok))
vocab = t["model"]["vocab"]
special = {x["id"] for x in t["added_tokens"]}
toks = [None] * c.vocab
for s, i in vocab.items():
    toks[i] = s
for x in t["added_tokens"]:
    toks[x["id"]] = x["content"]
types = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(c.vocab)]
for i, s in enumerate(toks):
    if s is None:
        toks[i] = f"[PAD{i}]"
        types[i] = gguf.TokenType.UNUSED
w.add_tokenizer_model("gpt2")
w.add_tokenizer_pre("gpt-2")
w.add_token_list(toks)
w.add_token_types(types)
w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in t["model"]["merges"]])
w.add_bos_token_id(0)
w.add_eos_token_id(0)
w.add_add_bos_token(True)
w.add_add_eos_token(False)


def perm(W, n):  # half-split RoPE rows -> llama.cpp's interleaved pairs
    return W.reshape(n, 2, W.shape[0] // n // 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


Q = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}[a.type]


def add(name, x):
    x = np.ascontiguousarray(x.float().numpy() if isinstance(x, torch.Tensor) else x, dtype=np.float32)
    q = gguf.GGMLQuantizationType.F32 if x.ndim == 1 else Q
    w.add_tensor(name, gguf.quants.quantize(x, q), raw_dtype=q)


add("token_embd.weight", sd["emb"])
add("output_norm.weight", sd["norm"])
add("output.weight", sd["head"])
nq, nk = c.heads * c.hd, c.kv_heads * c.hd
for i in range(c.layers):
    p = f"layers.{i}."
    b = f"blk.{i}."
    qkv = sd[p + "qkv"].float().numpy()
    add(b + "attn_norm.weight", sd[p + "attn_norm"])
    add(b + "ffn_norm.weight", sd[p + "ffn_norm"])
    add(b + "attn_q.weight", perm(qkv[:nq], c.heads))
    add(b + "attn_k.weight", perm(qkv[nq : nq + nk], c.kv_heads))
    add(b + "attn_v.weight", qkv[nq + nk :])
    add(b + "attn_output.weight", sd[p + "o"])
    gu = sd[p + "gu"].float().numpy()
    add(b + "ffn_gate.weight", gu[: c.ff])
    add(b + "ffn_up.weight", gu[c.ff :])
    add(b + "ffn_down.weight", sd[p + "down"])
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
print(a.out, os.path.getsize(a.out), "bytes")
