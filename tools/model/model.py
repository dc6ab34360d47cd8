"""Llama architecture (RMSNorm, half-split RoPE, GQA, SwiGLU) with one shared norm + head usable after any layer."""

import math
from dataclasses import dataclass, asdict, field
import torch, torch.nn as nn, torch.nn.functional as F


@dataclass
class Cfg:
    vocab: int = 1024
    d: int = 192
    layers: int = 16
    heads: int = 3
    kv_heads: int = 1
    hd: int = 64
    ff: int = 512
    ctx: int = 512
    rope_base: float = 10000.0
    eps: float = 1e-5
    exits: tuple = (4, 8, 12)


def rms(x, w, eps):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


class Layer(nn.Module):
    def __init__(s, c):
        super().__init__()
        s.c = c
        s.attn_norm = nn.Parameter(torch.ones(c.d))
        s.ffn_norm = nn.Parameter(torch.ones(c.d))
        std = 0.5 / math.sqrt(c.d)
        s.qkv = nn.Parameter(torch.randn((c.heads + 2 * c.kv_heads) * c.hd, c.d) * std)
        s.o = nn.Parameter(torch.randn(c.d, c.heads * c.hd) * std / math.sqrt(2 * c.layers) * 2)
        s.gu = nn.Parameter(torch.randn(2 * c.ff, c.d) * std)
        s.down = nn.Parameter(torch.randn(c.d, c.ff) * (0.5 / math.sqrt(c.ff)) / math.sqrt(2 * c.layers) * 2)


def rope_tables(c, n, pos0=0):
    inv = c.rope_base ** (-torch.arange(0, c.hd, 2, dtype=torch.float32) / c.hd)
    t = torch.arange(pos0, pos0 + n, dtype=torch.float32)
    f = torch.outer(t, inv)
    return torch.cat([f.cos(), f.cos()], -1), torch.cat([-f.sin(), f.sin()], -1)


def rope(x, cos, sin):  # x [..., T, hd], half split
    h = x.shape[-1] // 2
    rot = torch.cat([x[..., h:], x[..., :h]], -1)
    return x * cos + rot * sin


class Model(nn.Module):
    def __init__(s, c):
        super().__init__()
        s.c = c
        s.emb = nn.Parameter(torch.randn(c.vocab, c.d) * 0.5)
        s.layers = nn.ModuleList([Layer(c) for _ in range(c.layers)])
        s.norm = nn.Parameter(torch.ones(c.d))
        s.register_buffer("mask", torch.full((c.ctx, c.ctx), float("-inf")).triu(1), persistent=False)
        s.head = nn.Parameter(torch.randn(c.vocab, c.d) * 0.02)

    def qkv(s, L, h, cos, sin):
        c = s.c
        B, T, _ = h.shape
        x = F.linear(rms(h, L.attn_norm, c.eps), L.qkv)
        q, k, v = x.split([c.heads * c.hd, c.kv_heads * c.hd, c.kv_heads * c.hd], -1)
        q = rope(q.view(B, T, c.heads, c.hd).transpose(1, 2), cos, sin)
        k = rope(k.view(B, T, c.kv_heads, c.hd).transpose(1, 2), cos, sin)
        return q, k, v.view(B, T, c.kv_heads, c.hd).transpose(1, 2)

    def ffn(s, L, h):
        g, u = F.linear(rms(h, L.ffn_norm, s.c.eps), L.gu).chunk(2, -1)
        return h + F.linear(F.silu(g) * u, L.down)

    def logits(s, h):
        return F.linear(rms(h, s.norm, s.c.eps), s.head)

    def forward(s, ids, cos, sin, skip_after=None, raw_copy=None):
        """Training forward. skip_after [B,T] long: token stops being updated after that many layers (layers = never);
        raw_copy [B] bool: for that row the deeper layers' K/V of a stopped token are the last computed layer's K/V rows
        (True), or are projected from its frozen hidden state (False). Returns hidden states at exits and at the end."""
        c = s.c
        B, T = ids.shape
        h = F.embedding(ids, s.emb)
        outs = []
        pk = pv = None
        for i, L in enumerate(s.layers):
            q, k, v = s.qkv(L, h, cos, sin)
            if skip_after is not None and i > 0:
                stopped = skip_after <= i
                m = (stopped & raw_copy[:, None])[:, None, :, None]
                k = torch.where(m, pk, k)
                v = torch.where(m, pv, v)
            pk, pv = k, v
            # explicit attention: on CPU at T = 256..512 it beats scaled_dot_product_attention (whose bf16 backward is slow)
            G = c.heads // c.kv_heads
            qg = q.reshape(B, c.kv_heads, G * T, c.hd)  # query heads of one kv head stacked: no K/V copies
            sc = (qg @ k.transpose(-1, -2)).view(B, c.kv_heads, G, T, T)
            pr = torch.softmax(sc.float() * c.hd**-0.5 + s.mask[:T, :T], -1)
            a = (pr.to(v.dtype).view(B, c.kv_heads, G * T, T) @ v).view(B, c.heads, T, c.hd)
            n = h + F.linear(a.transpose(1, 2).reshape(B, T, -1), L.o)
            n = s.ffn(L, n)
            h = torch.where(stopped[..., None], h, n) if (skip_after is not None and i > 0) else n
            if i + 1 in c.exits:
                outs.append(h)
        outs.append(h)
        return outs
