# SPDX-License-Identifier: Apache-2.0
"""The fill `verify` in Python: a token that leaves at the ramp is a draft, and the full model judges it later.

    cargo build --release
    export DREX_LIBRARY=$PWD/target/release/libdrex.so PYTHONPATH=$PWD/bindings/python
    python3 examples/verify.py

The toy counts, and leaves multiples of five out. Its shallow half does not know of that: it is sure of every number but
multiples of three. What the clients get is the full model's output, token for token. examples/verify.cpp is the same in
C++.
"""

import array
import sys

import drex

LAYERS, RAMP, VOCAB, MAX_PENDING, LENGTH = 8, 4, 64, 3, 16

tokens = {0: [1], 1: [11], 2: [31]}  # of each request, drafts included
sent = {r: 1 for r in tokens}  # so many of them stand
slots = len(tokens) * (1 + MAX_PENDING)  # a request's own row, and its drafts
arena = [0] * slots  # a hidden state by slot: here a token


def full_model(token):
    return token + 2 if (token + 1) % 5 == 0 else token + 1


def position(row):
    return len(tokens[row.request]) - 1 - row.back


def run_layers(begin, end, rows):
    """What a real engine does: layers [begin, end) over the rows. Returns their logits, [n_rows, VOCAB]."""
    flat = array.array("f", bytes(4 * VOCAB * len(rows)))
    for i, row in enumerate(rows):
        if begin == 0:
            arena[row.slot] = tokens[row.request][position(row)]
        following = full_model(arena[row.slot]) if end == LAYERS else arena[row.slot] + 1
        flat[i * VOCAB + following] = 20 if end == LAYERS or following % 3 else 0.5
    return memoryview(flat).cast("B").cast("f", [len(rows), VOCAB])


def at_ramp(engine, step, logits):
    """What exits is a draft. It stays from the client until it stands."""
    for row, verdict in zip(step.rows, engine.ramp(logits)):
        if verdict.decision == "exit":
            tokens[row.request].append(verdict.token)


def at_end(engine, step, logits):
    """Every row has the full model's logits. One with `back > 0` drafted the token that follows its own."""
    chosen = [max(range(VOCAB), key=lambda token: logits[i, token]) for i in range(len(step.rows))]
    at = [position(row) for row in step.rows]  # before tokens are taken back: positions count from the end
    agrees = []
    for row, p, token in zip(step.rows, at, chosen):
        same = row.back > 0 and tokens[row.request][p + 1] == token
        agrees.append((2 if p + 2 == LENGTH else 1) if same else 0)  # 2: the request's last token
    for row, p, token, judgement in zip(step.rows, at, chosen, engine.verify(agrees)):
        mine = tokens[row.request]
        if judgement.decision == "accept":  # the draft goes to the client
            sent[row.request] = p + 2
        elif judgement.decision == "replace":  # the draft and what came after it never were
            mine[p + 1 :] = [token]
            sent[row.request] = len(mine)
        elif judgement.decision == "exit":  # the request's own row, whose token is the full model's
            mine.append(token)
            sent[row.request] = len(mine)


def go_on(engine, request, now):
    """At its end a request's last drafts are settled first; it ends then, or goes on where one of them is replaced."""
    if len(tokens[request]) < LENGTH:
        engine.ready(request, now)
    elif engine.settle(request, now) == 0:
        engine.remove(request)


with drex.Engine(n_layers=LAYERS, ramp_layers=[RAMP], n_slots=slots, max_requests=len(tokens), max_pending=MAX_PENDING,
                 policy="hold", fill="verify") as engine:  # fmt: skip
    now = 0
    for request in tokens:
        engine.add(request)
        engine.ready(request, now)
    while step := engine.plan(now):
        before = {r: (list(tokens[r]), sent[r]) for r in tokens}
        logits = run_layers(step.layer_begin, step.layer_end, step.rows)
        (at_end if step.ramp is None else at_ramp)(engine, step, logits)
        engine.complete(now + 1000, duration_ns=1000)
        for request in tokens:
            if (tokens[request], sent[request]) != before[request]:
                go_on(engine, request, now)
        now += 1000

    same = all(len(t) == LENGTH and all(b == full_model(a) for a, b in zip(t, t[1:])) for t in tokens.values())
    for mine in tokens.values():
        print(*mine)
    stats = engine.stats()
    verdict = "the full model's output" if same else "not the full model's output"
    print(f"{stats['drafts']} drafts, {stats['drafts_accepted']} accepted; {verdict}")
    sys.exit(not same)
