#!/usr/bin/env python3
"""What each way to fill K/V holes does to the text that comes out: a second implementation, in f64.

usage: fills.py MODEL.gguf TEXT... [--layer 8] [--threshold 0.5 0.7 0.9] [--rows 64] [--tokens 256] [--score drex-score]

Teacher-forced: rows of held-out text run through a plain NumPy decoder. A token whose gap between the two best
probabilities at the exit layer reaches the threshold leaves there; what its deeper K/V entries are is the fill mode:

  copy       those of the last computed layer
  propagate  projected by each skipped layer from the frozen hidden state (Schuster et al., CALM)
  postfill   computed, later; verify computes the same and replaces tokens that the full model would not emit

Prints, for each threshold and mode, over all tokens and over those that did not exit: the share whose most likely token is
the full model's, the perplexity of the text, and the mean KL divergence from the full model's distribution. With --score it
first checks itself against llama.cpp on the same tokens.
"""

import argparse, json, os, subprocess
import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer


class Model:
    def __init__(s, path):
        r = GGUFReader(path)
        field = lambda k: r.fields["llama." + k].contents()
        s.layers, s.heads, s.kv = field("block_count"), field("attention.head_count"), field("attention.head_count_kv")
        s.eps, s.base = field("attention.layer_norm_rms_epsilon"), field("rope.freq_base")
        s.w = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in r.tensors}
        s.hd = s.w["blk.0.attn_k.weight"].shape[0] // s.kv

    def norm(s, x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + s.eps) * s.w[w]

    def rope(s, x):  # [B, T, heads, hd], neighbouring elements are a pair
        t = np.arange(x.shape[1])[:, None] * s.base ** (-np.arange(0, s.hd, 2) / s.hd)
        cos, sin = np.cos(t)[None, :, None], np.sin(t)[None, :, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    def kv_of(s, i, h):
        n = s.norm(h, f"blk.{i}.attn_norm.weight")
        heads = lambda name: (n @ s.w[f"blk.{i}.{name}.weight"].T).reshape(*h.shape[:2], -1, s.hd)
        return n, s.rope(heads("attn_k")), heads("attn_v")

    def layer(s, i, h, fill=None):
        """fill(k, v): what the layer reads instead of its own. Returns the next hidden state and the K/V it read."""
        B, T, _ = h.shape
        n, k, v = s.kv_of(i, h)
        if fill:
            k, v = fill(i, k, v)
        q = s.rope((n @ s.w[f"blk.{i}.attn_q.weight"].T).reshape(B, T, s.heads, s.hd))
        g = s.heads // s.kv
        sc = np.einsum("bthd,bshd->bhts", q, np.repeat(k, g, 2)) / np.sqrt(s.hd)
        sc = np.where(np.tril(np.ones((T, T), bool)), sc, -np.inf)
        p = np.exp(sc - sc.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        a = np.einsum("bhts,bshd->bthd", p, np.repeat(v, g, 2)).reshape(B, T, -1)
        h = h + a @ s.w[f"blk.{i}.attn_output.weight"].T
        n = s.norm(h, f"blk.{i}.ffn_norm.weight")
        gate, up = n @ s.w[f"blk.{i}.ffn_gate.weight"].T, n @ s.w[f"blk.{i}.ffn_up.weight"].T
        return h + (gate / (1 + np.exp(-gate)) * up) @ s.w[f"blk.{i}.ffn_down.weight"].T, (k, v)

    def logp(s, h):
        x = s.norm(h, "output_norm.weight") @ s.w.get("output.weight", s.w["token_embd.weight"]).T
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("text", nargs="+")
    ap.add_argument("--layer", type=int, default=8)
    ap.add_argument("--threshold", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    ap.add_argument("--rows", type=int, default=64)
    ap.add_argument("--tokens", type=int, default=256)
    ap.add_argument("--score")
    a = ap.parse_args()

    tokenizer = Tokenizer.from_file(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizer.json"))
    ids = np.concatenate([tokenizer.encode(open(p, encoding="utf-8", errors="replace").read()).ids for p in a.text])
    if len(ids) < a.rows * (a.tokens + 1):
        ap.error(f"the text has {len(ids)} tokens, and {a.rows * (a.tokens + 1)} are needed")
    starts = np.linspace(0, len(ids) - a.tokens - 1, a.rows).astype(int)
    rows = np.stack([ids[i : i + a.tokens + 1] for i in starts])
    m = Model(a.model)

    full, ramp, hidden, source = [], [], [], []
    for row in rows:
        h = m.w["token_embd.weight"][row[None, :-1]]
        for i in range(m.layers):
            if i == a.layer:
                hidden.append(h)
                ramp.append(m.logp(h)[0])
            h, kv = m.layer(i, h)
            if i == a.layer - 1:
                source.append(kv)
        full.append(m.logp(h)[0])
    full, ramp, target = np.stack(full), np.stack(ramp), rows[:, 1:]

    if a.score:
        lines = [json.dumps({"id": i, "prompt": [int(r[0])], "output": [int(x) for x in r[1:]]}) for i, r in enumerate(rows)]
        out = subprocess.run(
            [a.score, "-m", a.model, "-ctk", "f32"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
        ).stdout
        scores = [json.loads(line) for line in out.splitlines()]
        theirs = sum(x["nll"] for x in scores) / sum(x["n"] for x in scores)
        agree = sum(x["agree"] for x in scores) / sum(x["n"] for x in scores)
        ours = -np.take_along_axis(full, target[..., None], -1).mean()
        print(f"cross-entropy {ours:.5f} here, {theirs:.5f} in llama.cpp; top-1 {(full.argmax(-1) == target).mean():.4f}, {agree:.4f}")
        assert abs(ours - theirs) < 0.01, "this is another model"

    p2 = np.sort(np.exp(ramp), -1)[..., -2:]
    gap = p2[..., 1] - p2[..., 0]
    print(f"{rows.shape[0]} rows of {a.tokens} tokens, exit after layer {a.layer} of {m.layers}")
    print("| threshold | exits | fill | agree, all | perplexity, all | agree, deep | perplexity, deep | KL, deep |")
    print("|---|---|---|---|---|---|---|---|")
    for t in a.threshold:
        out = gap >= t
        for mode in ["full model", "copy", "propagate", "postfill"]:
            deep = np.empty_like(full)
            for r in range(len(rows)):
                if mode in ("full model", "postfill"):
                    deep[r] = full[r]
                    continue
                left = out[r][None, :, None, None]

                def fill(i, k, v):
                    if mode == "copy":
                        fk, fv = source[r]
                    else:
                        _, fk, fv = m.kv_of(i, hidden[r])
                    return np.where(left, fk, k), np.where(left, fv, v)

                h = hidden[r]
                for i in range(a.layer, m.layers):
                    h, _ = m.layer(i, h, fill)
                deep[r] = m.logp(h)[0]
            emitted = full if mode == "full model" else np.where(out[..., None], ramp, deep)
            row = []
            for mask in [np.ones_like(out), ~out]:
                e, f = emitted[mask], full[mask]
                row.append(f"{(e.argmax(-1) == f.argmax(-1)).mean():.4f}")
                row.append(f"{np.exp(-np.take_along_axis(e, target[mask][:, None], -1).mean()):.3f}")
            kl = (np.exp(full) * (full - emitted)).sum(-1)[~out].mean()
            share = "" if mode == "full model" else f"{out.mean():.3f}"
            print(f"| {t} | {share} | {mode} | {' | '.join(row)} | {abs(kl):.4f} |", flush=True)


main()
