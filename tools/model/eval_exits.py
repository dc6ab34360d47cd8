#!/usr/bin/env python3
"""usage: eval_exits.py --ckpt final.pt --corpus DIR --out eval.json  (teacher-forced table, then greedy generation)"""

import argparse, json, os, sys, time
import numpy as np, torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from model import *

ap = argparse.ArgumentParser()
ap.add_argument("--ckpt")
ap.add_argument("--corpus")
ap.add_argument("--out")
ap.add_argument("--rows", type=int, default=96)
ap.add_argument("--gen-only", action="store_true")
ap.add_argument("--gen", nargs="*", default=["gap:0.7", "gap:0.9", "max:0.8", "max:0.9"])
a = ap.parse_args()
torch.set_num_threads(1)
torch.set_grad_enabled(False)
ck = torch.load(a.ckpt, map_location="cpu", weights_only=True)
c = Cfg(**ck["cfg"])
m = Model(c)
m.load_state_dict(ck["model"])
m.eval()
d = np.fromfile(os.path.join(a.corpus, "heldout.bin"), dtype=np.uint16).astype(np.int64)
P, G = 64, 64
T = P + G
G_ = c.heads // c.kv_heads
EX = list(c.exits)
st = np.linspace(0, len(d) - T - 2, a.rows).astype(int)
ids = torch.from_numpy(np.stack([d[i : i + T + 1] for i in st]))


def conf(lg, crit):
    p = lg.softmax(-1).topk(2, -1).values
    return p[..., 0] if crit == "max" else p[..., 0] - p[..., 1]


class Dec:
    def __init__(s, B):
        s.K = torch.zeros(c.layers, B, c.kv_heads, T + 1, c.hd)
        s.V = torch.zeros_like(s.K)
        s.n = 0

    def step(s, x, thr=None, crit=None, mode="full"):
        """x [B,n] tokens; returns (emitted logits, exit layer, {layer: logits}). n > 1 is prefill or teacher forcing"""
        B, n = x.shape
        cos, sin = rope_tables(c, n, s.n)
        h = F.embedding(x, m.emb)
        mask = torch.full((n, s.n + n), float("-inf")).triu(s.n + 1)
        stop = torch.zeros(B, n, dtype=torch.bool)
        exl = torch.full((B, n), c.layers)
        em = None
        ex = {}
        pk = pv = None
        for i, L in enumerate(m.layers):
            q, k, v = m.qkv(L, h, cos, sin)
            if mode == "raw" and i:
                mm = stop[:, None, :, None]
                k = torch.where(mm, pk, k)
                v = torch.where(mm, pv, v)
            pk, pv = k, v
            s.K[i, :, :, s.n : s.n + n] = k
            s.V[i, :, :, s.n : s.n + n] = v
            kk, vv = s.K[i, :, :, : s.n + n], s.V[i, :, :, : s.n + n]
            sc = (q.reshape(B, c.kv_heads, G_ * n, c.hd) @ kk.transpose(-1, -2)).view(
                B, c.kv_heads, G_, n, -1
            ) * c.hd**-0.5 + mask
            o = (sc.softmax(-1).view(B, c.kv_heads, G_ * n, -1) @ vv).view(B, c.heads, n, c.hd)
            nh = m.ffn(L, h + F.linear(o.transpose(1, 2).reshape(B, n, -1), L.o))
            h = torch.where(stop[..., None], h, nh) if mode in ("raw", "hid") else nh
            if i + 1 in EX or i + 1 == c.layers:
                lg = m.logits(h)
                ex[i + 1] = lg
                if em is None:
                    em = lg.clone()
                em = torch.where((exl == c.layers)[..., None], lg, em)
                if thr is not None and i + 1 < c.layers:
                    new = (conf(lg, crit) >= thr) & ~stop
                    exl = torch.where(new, torch.tensor(i + 1), exl)
                    stop |= new
        s.n += n
        return em, exl, ex


R = {}


# 1. teacher forced on held-out text: 64 tokens of full prefill, 64 scored tokens
def tf(thr, crit, mode):
    D = Dec(len(ids))
    D.step(ids[:, :P])
    em, exl, ex = D.step(ids[:, P:T], thr, crit, mode)
    y = ids[:, P + 1 : T + 1]
    return em, exl, ex, y


em, exl, ex, y = tf(None, None, "full")
full = ex[c.layers].argmax(-1)
R["per_exit"] = {
    L: {
        "ce": F.cross_entropy(lg.reshape(-1, c.vocab), y.reshape(-1)).item(),
        "acc": (lg.argmax(-1) == y).float().mean().item(),
        "agree_full": (lg.argmax(-1) == full).float().mean().item(),
    }
    for L, lg in ex.items()
}
for L, r in R["per_exit"].items():
    print("exit", L, r)
R["single"] = []
for crit in (() if a.gen_only else ("gap", "max")):
    for thr in (0.5, 0.7, 0.8, 0.9, 0.95):
        for L in EX:
            w = conf(ex[L], crit) >= thr
            r = w.float().mean().item()
            ag = (ex[L].argmax(-1) == full)[w].float().mean().item()
            ac = (ex[L].argmax(-1) == y)[w].float().mean().item()
            mp = ex[L].softmax(-1).max(-1).values[w].mean().item()
            R["single"].append([crit, thr, L, r, ag, ac, mp])
            print(f"single {crit} {thr} exit{L} rate {r:.3f} agree {ag:.3f} acc {ac:.3f} meanp {mp:.3f}")
R["cascade"] = []
for crit in (() if a.gen_only else ("gap", "max")):
    for thr in (0.5, 0.7, 0.8, 0.9, 0.95):
        for mode in ("full", "hid", "raw"):
            em, exl, _, _ = tf(thr, crit, mode)
            w = exl < c.layers
            row = [
                crit,
                thr,
                {"full": "postfill"}.get(mode, mode),
                w.float().mean().item(),
                exl.float().mean().item(),
                (em.argmax(-1) == full)[w].float().mean().item(),
                (em.argmax(-1) == full).float().mean().item(),
                (em.argmax(-1) == y).float().mean().item(),
                F.cross_entropy(em.reshape(-1, c.vocab), y.reshape(-1)).exp().item(),
            ]
            R["cascade"].append(row)
            print("cascade", *[round(z, 3) if isinstance(z, float) else z for z in row], flush=True)
json.dump(R, open(a.out, "w"), indent=1)


# 2. greedy generation, 64 prompts x 64 tokens
def gen(thr, crit, mode):
    x = ids[:64, :P]
    D = Dec(64)
    em, _, _ = D.step(x)
    t = em[:, -1:].argmax(-1)
    out = [t]
    E = []
    for _ in range(G - 1):
        em, e, _ = D.step(t, thr, crit, mode)
        t = em.argmax(-1)
        out.append(t)
        E.append(e)
    o = torch.cat(out, 1)
    E = torch.cat(E, 1)
    D = Dec(64)
    lg = D.step(torch.cat([x, o[:, :-1]], 1))[0][:, P - 1 :]
    ag = lg.argmax(-1) == o
    w = E < c.layers
    return (
        o,
        w.float().mean().item(),
        E.float().mean().item(),
        ag[:, 1:][w].float().mean().item(),
        ag.float().mean().item(),
        F.cross_entropy(lg.reshape(-1, c.vocab), o.reshape(-1)).exp().item(),
    )


base = gen(None, None, "full")
R["gen"] = [["full", 0, "full"] + list(base[1:])]
print("gen full ppl", base[-1])
for g in a.gen:
    crit, thr = g.split(":")
    for mode in ("full", "hid", "raw"):
        r = gen(float(thr), crit, mode)
        same = (r[0] == base[0]).cumprod(1).float().sum(1).mean().item()
        row = [crit, float(thr), {"full": "postfill"}.get(mode, mode)] + list(r[1:]) + [same]
        R["gen"].append(row)
        print("gen", *[round(z, 3) if isinstance(z, float) else z for z in row], flush=True)
json.dump(R, open(a.out, "w"), indent=1)
