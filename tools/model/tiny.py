#!/usr/bin/env python3
"""Tiny random models, one for each architecture that the tests try. usage: tiny.py --tokenizer model.gguf --out DIR [NAME...]

Weights are random but not arbitrary: a layer adds little to the hidden row, so that a ramp often agrees with the last layer,
and the head is sharp enough that some rows are confident. Tokens come from the tokenizer of the named model."""

import argparse, os
import numpy as np, gguf

VOCAB, LAYERS, WIDTH, KV_HEADS, HEAD, FF = 1024, 8, 64, 1, 32, 96
EXPERTS, USED, FF_EXPERT = 4, 2, 48
WINDOW = 24


class Model:
    def __init__(self, path, name, arch, tokenizer, layers=LAYERS, width=WIDTH, quant=None):
        self.w = gguf.GGUFWriter(path, arch)
        self.arch, self.layers, self.width, self.quant = arch, layers, width, quant
        self.heads, self.ff = width // HEAD, FF if width == WIDTH else width
        self.rng = np.random.default_rng(sum(name.encode()))
        self.w.add_name("tiny")  # some loaders go by the model's name
        self.copy_tokenizer(tokenizer)
        self.keys(
            context_length=4096,
            embedding_length=width,
            block_count=layers,
            feed_forward_length=self.ff,
            **{
                "attention.head_count": self.heads,
                "attention.head_count_kv": KV_HEADS,
                "attention.layer_norm_rms_epsilon": 1e-6,
                "attention.key_length": HEAD,
                "attention.value_length": HEAD,
                "rope.dimension_count": HEAD,
                "rope.freq_base": 10000.0,
                "vocab_size": VOCAB,
            },
        )

    def copy_tokenizer(self, reader):
        for key, field in reader.fields.items():
            if not key.startswith("tokenizer."):
                continue
            kind, value = field.types[0], field.contents()
            if kind == gguf.GGUFValueType.ARRAY:
                self.w.add_array(key, value)
            else:
                self.w.add_key_value(key, value, kind)

    def keys(self, **values):
        """Metadata of the architecture. A key that is set again keeps the last value."""
        for key, value in values.items():
            key = f"{self.arch}.{key}"
            self.w.kv_data[0].pop(key, None)
            if isinstance(value, bool):
                self.w.add_bool(key, value)
            elif isinstance(value, int):
                self.w.add_uint32(key, value)
            elif isinstance(value, float):
                self.w.add_float32(key, value)
            else:
                self.w.add_array(key, value)

    def tensor(self, name, *shape, std=None, mean=0.0):
        """Dimensions as ggml has them, the fastest first. Matrices keep the size of what they multiply."""
        if std is None:
            std = shape[0] ** -0.5 if len(shape) > 1 else 0.02
        if self.quant == "q4_k" and len(shape) > 1 and shape[0] % 256 == 0:
            return self.q4_k(name, shape, std)
        data = mean + std * self.rng.standard_normal(shape[::-1])
        self.w.add_tensor(name, data.astype(np.float32))

    def q4_k(self, name, shape, std):
        """Random blocks: two scales of the block, 12 bytes of packed scales and minima, 128 bytes of quants."""
        n = int(np.prod(shape)) // 256
        block = self.rng.integers(0, 256, (n, 144), dtype=np.uint8)
        # 6-bit scales average 31, quants and minima centre the weights about 0
        block[:, 0:2] = np.frombuffer(np.float16(std / 150).tobytes(), np.uint8)
        block[:, 2:4] = np.frombuffer(np.float16(7.5 * std / 150).tobytes(), np.uint8)
        data = block.reshape(*shape[1:][::-1], shape[0] // 256 * 144)
        self.w.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)

    def norm(self, name, n=None, mean=1.0):
        self.tensor(name + ".weight", n or self.width, std=0.1 * mean, mean=mean)

    def ends(self, tied=False, embed=1.0):
        """Embeddings, the last norm, the head. The signs of the last norm keep a tied head from naming the same token again."""
        self.tensor("token_embd.weight", self.width, VOCAB, std=embed)
        signs = self.rng.choice([-1.0, 1.0], self.width)
        scale = 4.0 / (embed * self.width**0.5) if tied else 1.0
        self.w.add_tensor("output_norm.weight", (signs * scale).astype(np.float32))
        if not tied:
            self.tensor("output.weight", self.width, VOCAB, std=4.0 * self.width**-0.5)

    def attention(self, b, out=0.35, bias=False, fused=False, norms=None, norm=True):
        q, kv, n = self.heads * HEAD, KV_HEADS * HEAD, self.width
        sharp = 1.6 * n**-0.5
        if norm:
            self.norm(b + "attn_norm")
        if fused:
            self.tensor(b + "attn_qkv.weight", n, q + 2 * kv, std=sharp)
        else:
            for name, size in (("q", q), ("k", kv), ("v", kv)):
                self.tensor(f"{b}attn_{name}.weight", n, size, std=sharp if name != "v" else None)
                if bias:
                    self.tensor(f"{b}attn_{name}.bias", size, std=0.3)
        if norms:
            self.norm(b + "attn_q_norm", norms[0])
            self.norm(b + "attn_k_norm", norms[1])
        self.tensor(b + "attn_output.weight", q, n, std=out * q**-0.5)

    def feed_forward(self, b, out=0.35, fused=False, norm=True):
        n, ff = self.width, self.ff
        if norm:
            self.norm(b + "ffn_norm")
        if not fused:
            self.tensor(b + "ffn_gate.weight", n, ff)
        self.tensor(b + "ffn_up.weight", n, 2 * ff if fused else ff)
        self.tensor(b + "ffn_down.weight", ff, n, std=3 * out * ff**-0.5)

    def experts(self, b, bias=False, norm=True):
        n, e, ff = self.width, EXPERTS, FF_EXPERT
        if norm:
            self.norm(b + "ffn_norm")
        self.tensor(b + "ffn_gate_inp.weight", n, e, std=2 * n**-0.5)
        self.tensor(b + "ffn_gate_exps.weight", n, ff, e)
        self.tensor(b + "ffn_up_exps.weight", n, ff, e)
        self.tensor(b + "ffn_down_exps.weight", ff, n, e, std=ff**-0.5)
        if bias:
            self.tensor(b + "ffn_gate_inp.bias", e)
            self.tensor(b + "ffn_gate_exps.bias", ff, e, std=0.1)
            self.tensor(b + "ffn_up_exps.bias", ff, e, std=0.1)
            self.tensor(b + "ffn_down_exps.bias", n, e, std=0.1)

    def moe_keys(self):
        self.keys(expert_count=EXPERTS, expert_used_count=USED, expert_feed_forward_length=FF_EXPERT)

    def blocks(self):
        return [f"blk.{i}." for i in range(self.layers)]

    def done(self):
        self.w.write_header_to_file()
        self.w.write_kv_data_to_file()
        self.w.write_tensors_to_file()
        self.w.close()


def plain(m, tied=False, **attention):
    m.ends(tied)
    for b in m.blocks():
        m.attention(b, **attention)
        m.feed_forward(b)


def qwen3moe(m):
    m.moe_keys()
    m.ends()
    for b in m.blocks():
        m.attention(b, norms=(HEAD, HEAD))
        m.experts(b)


def gemma(m, pattern, norms=None):
    """Norms before and after each part; the embeddings are multiplied by the root of the width."""
    m.keys(**{"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": pattern})
    m.ends(tied=True, embed=m.width**-0.5)
    for b in m.blocks():
        m.attention(b, norms=norms)
        m.norm(b + "post_attention_norm", mean=0.35)
        m.feed_forward(b)
        m.norm(b + "post_ffw_norm", mean=0.35)


def gemma2(m):
    m.keys(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    gemma(m, 2)


def gemma3(m):
    m.keys(**{"rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0})
    gemma(m, 3, norms=(HEAD, HEAD))


def gemma4(m, shared=0):
    m.keys(
        embedding_length_per_layer_input=0,
        final_logit_softcapping=30.0,
        **{
            "attention.key_length_swa": HEAD,
            "attention.value_length_swa": HEAD,
            "attention.shared_kv_layers": shared,
            "rope.dimension_count_swa": HEAD,
            "rope.freq_base_swa": 10000.0,
        },
    )
    m.tensor("rope_freqs.weight", HEAD // 2, std=0.0, mean=1.0)
    gemma(m, [i % 3 != 2 for i in range(m.layers)], norms=(HEAD, HEAD))


def cohere2(m):
    """Layers with a sliding window have RoPE, the others have none."""
    m.keys(logit_scale=1.0, **{"attention.sliding_window": WINDOW, "attention.layer_norm_epsilon": 1e-6})
    m.ends(tied=True)
    for b in m.blocks():
        m.attention(b)
        m.feed_forward(b, norm=False)


def olmo2(m):
    m.ends()
    for b in m.blocks():
        m.attention(b, norms=(m.heads * HEAD, KV_HEADS * HEAD), norm=False)
        m.norm(b + "post_attention_norm", mean=0.35)
        m.feed_forward(b, norm=False)
        m.norm(b + "post_ffw_norm", mean=0.35)


def phi3(m):
    m.ends()
    for b in m.blocks():
        m.attention(b, fused=True)
        m.feed_forward(b, fused=True)


def mistral3(m):
    m.keys(**{"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 64})
    plain(m)


def granite(m):
    m.keys(logit_scale=2.0, residual_scale=0.8, embedding_scale=1.5, **{"attention.scale": 0.2})
    plain(m)


def gpt_oss(m):
    m.moe_keys()
    m.keys(**{"attention.sliding_window": WINDOW})
    m.ends()
    for b in m.blocks():
        m.attention(b, bias=True)
        m.tensor(b + "attn_output.bias", m.width, std=0.1)
        m.tensor(b + "attn_sinks.weight", m.heads, std=1.0)
        m.norm(b + "post_attention_norm")
        m.experts(b, bias=True, norm=False)


def deepseek2(m):
    """Multi-head latent attention: keys and values share one compressed row."""
    rank, rope, key = 32, 32, 64
    m.moe_keys()
    m.keys(
        leading_dense_block_count=m.layers,
        expert_shared_count=1,
        **{
            "attention.q_lora_rank": rank,
            "attention.kv_lora_rank": rank,
            "attention.head_count_kv": 1,
            "attention.key_length": rank + rope,
            "attention.value_length": rank,
            "attention.key_length_mla": key,
            "attention.value_length_mla": HEAD,
            "rope.dimension_count": rope,
        },
    )
    m.ends()
    for b in m.blocks():
        m.norm(b + "attn_norm")
        m.norm(b + "attn_q_a_norm", rank)
        m.norm(b + "attn_kv_a_norm", rank)
        m.tensor(b + "attn_q_a.weight", m.width, rank)
        m.tensor(b + "attn_q_b.weight", rank, m.heads * key)
        m.tensor(b + "attn_kv_a_mqa.weight", m.width, rank + rope)
        m.tensor(b + "attn_k_b.weight", key - rope, rank, m.heads)
        m.tensor(b + "attn_v_b.weight", rank, HEAD, m.heads)
        m.tensor(b + "attn_output.weight", m.heads * HEAD, m.width)
        m.feed_forward(b)


def mamba(m):
    inner, state, rank = 2 * m.width, 8, 4
    m.keys(**{"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank})
    m.ends()
    for b in m.blocks():
        m.norm(b + "attn_norm")
        m.tensor(b + "ssm_in.weight", m.width, 2 * inner)
        m.tensor(b + "ssm_conv1d.weight", 4, inner)
        m.tensor(b + "ssm_conv1d.bias", inner)
        m.tensor(b + "ssm_x.weight", inner, rank + 2 * state)
        m.tensor(b + "ssm_dt.weight", rank, inner)
        m.tensor(b + "ssm_dt.bias", inner)
        m.tensor(b + "ssm_a", state, inner, std=0.1, mean=-1.0)
        m.tensor(b + "ssm_d", inner)
        m.tensor(b + "ssm_out.weight", inner, m.width)


def lfm2(m):
    """Layers with attention among layers with a short convolution."""
    m.keys(**{"shortconv.l_cache": 3, "attention.head_count_kv": [KV_HEADS if i % 2 else 0 for i in range(m.layers)]})
    m.tensor("token_embd.weight", m.width, VOCAB, std=1.0)
    m.norm("token_embd_norm")
    for i, b in enumerate(m.blocks()):
        if i % 2:
            m.attention(b, norms=(HEAD, HEAD))
        else:
            m.norm(b + "attn_norm")
            m.tensor(b + "shortconv.conv.weight", 3, m.width)
            m.tensor(b + "shortconv.in_proj.weight", m.width, 3 * m.width)
            m.tensor(b + "shortconv.out_proj.weight", m.width, m.width)
        m.feed_forward(b)


def gemma3n(m):
    """Each layer reads an embedding of its own, and four hidden rows stand side by side."""
    altup, rank, n = 4, 64, m.width
    per_layer = 256
    m.tensor("altup_proj.weight", n, n, altup - 1)
    m.tensor("altup_unembd_proj.weight", n, n, altup - 1)
    m.tensor("per_layer_token_embd.weight", per_layer * m.layers, VOCAB, std=1.0)
    m.tensor("per_layer_model_proj.weight", n, per_layer * m.layers)
    m.norm("per_layer_proj_norm", per_layer)
    gemma(m, 2, norms=(HEAD, HEAD))
    for b in m.blocks():
        m.tensor(b + "inp_gate.weight", n, per_layer)
        m.tensor(b + "proj.weight", per_layer, n)
        m.norm(b + "post_norm")
        m.tensor(b + "altup_correct_coef.weight", altup, altup)
        m.norm(b + "altup_correct_scale")
        m.tensor(b + "altup_predict_coef.weight", altup, altup * altup)
        m.tensor(b + "altup_router.weight", n, altup)
        m.norm(b + "altup_router_norm")
        m.tensor(b + "laurel_l.weight", n, rank)
        m.tensor(b + "laurel_r.weight", rank, n)
        m.norm(b + "laurel_post_norm")


# name: (architecture, what writes the tensors, more of Model's arguments)
MODELS = {
    "llama": ("llama", plain, {}),
    "qwen2": ("qwen2", lambda m: plain(m, bias=True), {}),
    "qwen2-q4_k": ("qwen2", lambda m: plain(m, bias=True), {"width": 256, "quant": "q4_k"}),
    "qwen3": ("qwen3", lambda m: plain(m, norms=(HEAD, HEAD)), {}),
    "qwen3moe": ("qwen3moe", qwen3moe, {}),
    "gemma2": ("gemma2", gemma2, {}),
    "gemma3": ("gemma3", gemma3, {}),
    "gemma4": ("gemma4", gemma4, {}),
    "cohere2": ("cohere2", cohere2, {}),
    "phi3": ("phi3", phi3, {}),
    "mistral3": ("mistral3", mistral3, {}),
    "granite": ("granite", granite, {}),
    "olmo2": ("olmo2", olmo2, {}),
    "smollm3": ("smollm3", lambda m: plain(m), {}),
    "gpt-oss": ("gpt-oss", gpt_oss, {}),
    "deepseek2": ("deepseek2", deepseek2, {}),
    "gemma3n": ("gemma3n", gemma3n, {"layers": 3}),
    "gemma4-shared": ("gemma4", lambda m: gemma4(m, shared=2), {}),
    "lfm2": ("lfm2", lfm2, {}),
    "mamba": ("mamba", mamba, {}),
}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--tokenizer", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("names", nargs="*", choices=[*MODELS, []], metavar="NAME")
    a = ap.parse_args()
    tokenizer = gguf.GGUFReader(a.tokenizer)
    os.makedirs(a.out, exist_ok=True)
    for name in a.names or MODELS:
        arch, write, more = MODELS[name]
        m = Model(os.path.join(a.out, name + ".gguf"), name, arch, tokenizer, **more)
        write(m)
        m.done()


main()
