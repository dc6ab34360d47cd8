#!/usr/bin/env python3
"""Byte-level BPE (GPT-2 pre-tokenizer) on train.jsonl.  usage: train_tokenizer.py --corpus DIR --vocab 1024 --out tokenizer.json
Also encodes the three splits to uint16 .bin files (documents separated by token 0)."""

import argparse, json, os
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers

ap = argparse.ArgumentParser()
ap.add_argument("--corpus", required=True)
ap.add_argument("--vocab", type=int, default=1024)
ap.add_argument("--out", required=True)
a = ap.parse_args()
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
tok.decoder = decoders.ByteLevel()
tr = trainers.BpeTrainer(
    vocab_size=a.vocab,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
    max_token_length=24,
)
load = lambda s: [json.loads(l)["text"] for l in open(os.path.join(a.corpus, s + ".jsonl"))]
tok.train_from_iterator(load("train"), tr)
tok.save(a.out)
for s in ("train", "valid", "heldout"):
    docs = load(s)
    ids = []
    for e in tok.encode_batch(docs):
        ids.append(0)
        ids += e.ids
    np.array(ids, dtype=np.uint16).tofile(os.path.join(a.corpus, s + ".bin"))
    print(
        s, len(docs), "docs", len(ids), "tokens", round(sum(len(d.encode()) for d in docs) / len(ids), 3), "bytes/token"
    )
