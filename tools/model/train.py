#!/usr/bin/env python3
"""Train the early-exit Llama. usage: train.py --corpus DIR --out final.pt --steps 3000 [--init earlier.pt] [--device cuda]

Loss: cross-entropy at every exit and at the end through one shared norm and head, weighted. In most rows a random share of
tokens stops after a random exit, their deeper K/V being copied rows or projections of the frozen state, so that the model
learns to live with holes filled that way. Warm-up, flat, linear decay by step; 512-token rows in the last quarter."""

import argparse, os, sys, time
import numpy as np, torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from model import *

ap = argparse.ArgumentParser()
ap.add_argument("--corpus", required=True)
ap.add_argument("--out", required=True)
ap.add_argument("--init")
ap.add_argument("--steps", type=int, default=3000)
ap.add_argument("--tokens-per-step", type=int, default=8192)
ap.add_argument("--lr", type=float, default=3e-3)
ap.add_argument("--vocab", type=int, default=1024)
ap.add_argument("--d", type=int, default=192)
ap.add_argument("--layers", type=int, default=16)
ap.add_argument("--heads", type=int, default=3)
ap.add_argument("--kv-heads", type=int, default=1)
ap.add_argument("--ff", type=int, default=512)
ap.add_argument("--exits", type=int, nargs="+", default=[4, 8, 12])
ap.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.7, 0.8])
ap.add_argument("--device", default="cpu")
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--seed", type=int, default=0)
a = ap.parse_args()
torch.set_num_threads(a.threads)
torch.manual_seed(a.seed)
rng = np.random.default_rng(a.seed)
c = Cfg(vocab=a.vocab, d=a.d, layers=a.layers, heads=a.heads, kv_heads=a.kv_heads, ff=a.ff, exits=tuple(a.exits))
m = Model(c).to(a.device)
if a.init:
    m.load_state_dict(torch.load(a.init, map_location=a.device, weights_only=True)["model"])
data = np.fromfile(os.path.join(a.corpus, "train.bin"), dtype=np.uint16)
tables = {T: [t.to(a.device) for t in rope_tables(c, T)] for T in (256, 512)}
weights = torch.tensor([*a.weights, 1.0], device=a.device)
weights = weights / weights.sum()
matrices = [p for p in m.parameters() if p.ndim == 2]
vectors = [p for p in m.parameters() if p.ndim < 2]
opt = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=a.lr, betas=(0.9, 0.95)
)


def losses(ids, cos, sin, stop, raw):
    target = ids[:, 1:].reshape(-1)
    return torch.stack(
        [F.cross_entropy(m.logits(h).float().view(-1, c.vocab), target) for h in m(ids[:, :-1], cos, sin, stop, raw)]
    )


step_losses = torch.compile(losses)


def stops(B, T):
    """Which token stops after how many layers (c.layers: never), and which rows copy K/V instead of projecting."""
    stop = torch.full((B, T), c.layers)
    if torch.rand(()) < 0.7:
        exits = torch.tensor(c.exits)
        per_token, per_row = exits[torch.randint(0, len(exits), (B, T))], exits[
            torch.randint(0, len(exits), (B, 1))
        ].expand(B, T)
        stop = torch.where(
            torch.rand(B, T) < torch.rand(B, 1) * 0.7, torch.where(torch.rand(B, 1) < 0.5, per_token, per_row), stop
        )
    return stop.to(a.device), (torch.rand(B) < 0.5).to(a.device)


start = time.time()
for step in range(a.steps):
    done = step / a.steps
    T = 256 if done < 0.75 else 512
    B = a.tokens_per_step // T
    for g in opt.param_groups:
        g["lr"] = a.lr * min(1, (step + 1) / 150) * (1 if done < 0.6 else max(0.02, (1 - done) / 0.4))
    at = rng.integers(0, len(data) - T - 1, B)
    ids = torch.from_numpy(np.stack([data[i : i + T + 1] for i in at]).astype(np.int64)).to(a.device)
    with torch.autocast(a.device, torch.bfloat16):
        per_exit = step_losses(ids, *tables[T], *stops(B, T))
    (per_exit * weights).sum().backward()
    torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    if (step + 1) % 50 == 0 or step + 1 == a.steps:
        print(
            f"step {step + 1} {time.time() - start:.0f} s loss per exit {[round(x, 3) for x in per_exit.tolist()]}",
            flush=True,
        )
        torch.save({"cfg": asdict(c), "model": m.state_dict()}, a.out)
