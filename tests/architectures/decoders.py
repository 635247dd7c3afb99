"""Text decoders."""

from __future__ import annotations

from tests.architectures.architecture import (
    FLEX_TOO,
    SDPA_TOO,
    Architecture,
    both,
    fused,
    hf,
    joined,
    text,
)

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION = {
    "attention.query": ("*.self_attn.q_proj",), "attention.key": ("*.self_attn.k_proj",),
    "attention.value": ("*.self_attn.v_proj",), "attention.output": ("*.self_attn.o_proj",),
}  # fmt: skip
GATED = {
    "mlp.gate": ("*.mlp.gate_proj",), "mlp.up": ("*.mlp.up_proj",), "mlp.down": ("*.mlp.down_proj",)
}  # fmt: skip
ENDS = {"embedding.token": ("model.embed_tokens",), "head": ("lm_head",)}
NORMS = {"norm": ("*.input_layernorm", "*.post_attention_layernorm", "model.norm")}
PLAIN = joined(ATTENTION, GATED, ENDS, NORMS)
SUBLAYERS = joined(both("*.self_attn", "attention"), both("*.mlp", "mlp"))
POST_NORMED = {
    "attention": ("*.self_attn",), "mlp": ("*.mlp",),
    "residual.attention": ("*.post_attention_layernorm",),
    "residual.mlp": ("*.post_feedforward_layernorm",),
}  # fmt: skip
QK_NORMS = {"norm": ("*.q_norm", "*.k_norm")}
FOUR_NORMS = joined(
    NORMS, {"norm": ("*.pre_feedforward_layernorm", "*.post_feedforward_layernorm")}
)
# one weight for query, key and value: of each of four heads in turn, 8 features each
HEADS = {"*.query_key_value": fused(step=4, query=8, key=8, value=8)}
GPT_NEOX = {
    "attention.query": ("*.query_key_value",), "attention.key": ("*.query_key_value",),
    "attention.value": ("*.query_key_value",), "mlp.up": ("*.mlp.dense_h_to_4h",),
    "mlp.down": ("*.mlp.dense_4h_to_h",), "head": ("lm_head",),
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

DECODERS = (
    Architecture(
        "llama", hf("LlamaConfig", "LlamaForCausalLM", **LLAMA), text(), PLAIN, SUBLAYERS,
        targets=TARGETS, attention=FLEX_TOO,
    ),
    Architecture(
        "mistral", hf("MistralConfig", "MistralForCausalLM", **LLAMA), text(), PLAIN, SUBLAYERS,
        attention=FLEX_TOO,
    ),
    Architecture(
        "qwen3", hf("Qwen3Config", "Qwen3ForCausalLM", **LLAMA, head_dim=12), text(),
        joined(PLAIN, QK_NORMS), SUBLAYERS, targets=("q_proj", "v_proj", "down_proj"),
        attention=FLEX_TOO,
    ),
    Architecture(
        "phi3", hf("Phi3Config", "Phi3ForCausalLM", **LLAMA), text(),
        joined(
            {
                "attention.query": ("*.qkv_proj",), "attention.key": ("*.qkv_proj",),
                "attention.value": ("*.qkv_proj",), "attention.output": ("*.self_attn.o_proj",),
                "mlp.gate": ("*.gate_up_proj",), "mlp.up": ("*.gate_up_proj",),
                "mlp.down": ("*.mlp.down_proj",),
            },
            ENDS, NORMS,
        ),
        {
            "attention": ("*.self_attn",), "residual.attention": ("*.resid_attn_dropout",),
            "mlp": ("*.mlp",), "residual.mlp": ("*.resid_mlp_dropout",),
        },
        rows={
            "*.qkv_proj": fused(step=1, query=32, key=16, value=16),
            "*.gate_up_proj": {"mlp.gate": ((0, 44),), "mlp.up": ((44, 88),)},
        },
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), attention=FLEX_TOO,
    ),
    Architecture(
        "gemma2", hf("Gemma2Config", "Gemma2ForCausalLM", **LLAMA, head_dim=12), text(),
        joined(ATTENTION, GATED, ENDS, FOUR_NORMS), POST_NORMED, attention=("flex_attention",),
    ),
    Architecture(
        "gemma3", hf("Gemma3TextConfig", "Gemma3ForCausalLM", **LLAMA, head_dim=12), text(),
        joined(ATTENTION, GATED, ENDS, FOUR_NORMS, QK_NORMS), POST_NORMED, attention=FLEX_TOO,
    ),
    Architecture(
        "olmo2", hf("Olmo2Config", "Olmo2ForCausalLM", **LLAMA), text(),
        joined(
            ATTENTION, GATED, ENDS, QK_NORMS,
            {"norm": ("*.post_attention_layernorm", "*.post_feedforward_layernorm", "model.norm")},
        ),
        POST_NORMED, attention=FLEX_TOO,
    ),
    Architecture(
        "stablelm", hf("StableLmConfig", "StableLmForCausalLM", **LLAMA), text(), PLAIN,
        joined(
            both("*.self_attn", "attention"),
            {"mlp": ("*.mlp",), "residual.mlp": ("model.layers.?.dropout",)},
        ),
        attention=SDPA_TOO,
    ),
    Architecture(  # attention and feed-forward in parallel
        "cohere", hf("CohereConfig", "CohereForCausalLM", **LLAMA), text(),
        joined(ATTENTION, GATED, ENDS, {"norm": ("*.input_layernorm", "model.norm")}), SUBLAYERS,
        attention=FLEX_TOO,
    ),
    Architecture(
        "gpt2",
        hf(
            "GPT2Config", "GPT2LMHeadModel", vocab_size=61, n_positions=32, n_embd=24, n_layer=2,
            n_head=3, n_inner=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=1, eos_token_id=2,
        ),
        text(),
        {
            "attention.query": ("*.c_attn",), "attention.key": ("*.c_attn",),
            "attention.value": ("*.c_attn",), "attention.output": ("*.attn.c_proj",),
            "mlp.up": ("*.c_fc",), "mlp.down": ("*.mlp.c_proj",), "head": ("lm_head",),
            "embedding.token": ("*.wte",), "embedding.position": ("*.wpe",),
            "norm": ("*.ln_1", "*.ln_2", "*.ln_f"),
        },
        joined(both("*.attn", "attention"), both("*.mlp", "mlp")),
        rows={"*.c_attn": fused(step=1, query=24, key=24, value=24)},
        targets=("c_attn", "c_proj", "c_fc"), attention=SDPA_TOO,
    ),
    Architecture(  # attention and feed-forward in parallel
        "gpt-neox",
        hf(
            "GPTNeoXConfig", "GPTNeoXForCausalLM", vocab_size=61, hidden_size=32,
            intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, use_cache=False, bos_token_id=1, eos_token_id=2,
        ),
        text(),
        joined(
            GPT_NEOX,
            {
                "attention.output": ("*.attention.dense",), "embedding.token": ("*.embed_in",),
                "norm": ("*layernorm", "*.final_layer_norm"),
            },
        ),
        {
            "attention": ("*.attention",), "residual.attention": ("*.post_attention_dropout",),
            "mlp": ("*.mlp",), "residual.mlp": ("*.post_mlp_dropout",),
        },
        rows=HEADS, attention=FLEX_TOO,
    ),
    Architecture(  # attention and feed-forward in parallel, one head of keys and values
        "falcon",
        hf(
            "FalconConfig", "FalconForCausalLM", vocab_size=61, hidden_size=32, ffn_hidden_size=44,
            num_hidden_layers=2, num_attention_heads=4, use_cache=False,
        ),
        text(),
        joined(
            GPT_NEOX,
            {
                "attention.output": ("*.self_attention.dense",),
                "embedding.token": ("*.word_embeddings",), "norm": ("*.input_layernorm", "*.ln_f"),
            },
        ),
        joined(both("*.self_attention", "attention"), both("*.mlp", "mlp")),
        rows={"*.query_key_value": fused(step=1, query=32, key=8, value=8)}, attention=SDPA_TOO,
    ),
    Architecture(  # its modules add to the residual stream themselves
        "bloom",
        hf(
            "BloomConfig", "BloomForCausalLM", vocab_size=61, hidden_size=32, n_layer=2, n_head=4,
            use_cache=False,
        ),
        text(),
        joined(
            GPT_NEOX,
            {
                "attention.output": ("*.self_attention.dense",),
                "embedding.token": ("*.word_embeddings",), "norm": ("*layernorm", "*.ln_f"),
            },
        ),
        {
            "residual.attention": ("*.self_attention.dense",),
            "residual.mlp": ("*.mlp.dense_4h_to_h",),
        },
        rows=HEADS,
    ),
    Architecture(
        "opt",
        hf(
            "OPTConfig", "OPTForCausalLM", vocab_size=61, hidden_size=32, ffn_dim=44,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, dropout=0.0,
            word_embed_proj_dim=32, use_cache=False,
        ),
        text(),
        {
            **ATTENTION, "attention.output": ("*.self_attn.out_proj",), "mlp.up": ("*.fc1",),
            "mlp.down": ("*.fc2",), "head": ("lm_head",), "embedding.token": ("*.embed_tokens",),
            "embedding.position": ("*.embed_positions",), "norm": ("*_layer_norm",),
        },
        joined(both("*.self_attn", "attention"), {"residual.mlp": ("*.fc2",)}),
        attention=FLEX_TOO,
    ),
    Architecture(
        "mpt",
        hf(
            "MptConfig", "MptForCausalLM", vocab_size=61, d_model=32, n_heads=4, n_layers=2,
            expansion_ratio=2, max_seq_len=32, use_cache=False,
        ),
        text(),
        {
            "attention.query": ("*.Wqkv",), "attention.key": ("*.Wqkv",),
            "attention.value": ("*.Wqkv",), "attention.output": ("*.attn.out_proj",),
            "mlp.up": ("*.ffn.up_proj",), "mlp.down": ("*.ffn.down_proj",), "head": ("lm_head",),
            "embedding.token": ("*.wte",), "norm": ("*.norm_?",),
        },
        {
            "attention": ("*.attn",), "residual.attention": ("*.resid_attn_dropout",),
            "residual.mlp": ("*.ffn.down_proj",),
        },
        rows={"*.Wqkv": fused(step=1, query=32, key=32, value=32)},
    ),
)  # fmt: skip
