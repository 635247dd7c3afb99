"""Mixtures of experts."""

from __future__ import annotations

from tests.architectures.architecture import FLEX_TOO, Architecture, fused, hf, joined, text
from tests.architectures.decoders import ATTENTION, ENDS, GATED, LLAMA, NORMS, QK_NORMS, SUBLAYERS

ROUTED = {"router": ("*.mlp.gate",), "experts": ("*.mlp.experts",)}

MIXTURES = (
    Architecture(
        "mixtral",
        hf("MixtralConfig", "MixtralForCausalLM", **LLAMA, num_local_experts=3,
           num_experts_per_tok=2),
        text(), joined(ATTENTION, ENDS, NORMS, ROUTED), SUBLAYERS, targets=("q_proj", "v_proj"),
        attention=FLEX_TOO,
    ),
    Architecture(
        "qwen3-moe",
        hf("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **LLAMA, head_dim=12, num_experts=4,
           num_experts_per_tok=2, moe_intermediate_size=20),
        text(), joined(ATTENTION, ENDS, NORMS, QK_NORMS, ROUTED), SUBLAYERS, attention=FLEX_TOO,
    ),
    Architecture(  # latent attention; a plain feed-forward first, then experts with a shared one
        "deepseek-v3",
        hf(
            "DeepseekV3Config", "DeepseekV3ForCausalLM", **{**LLAMA, "num_key_value_heads": 4},
            q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, n_group=2,
            topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        ),
        text(),
        joined(
            GATED, ENDS, NORMS, ROUTED,
            {
                "attention.query": ("*.q_b_proj",),
                "attention.key": ("*.kv_a_proj_with_mqa", "*.kv_b_proj"),
                "attention.value": ("*.kv_b_proj",), "attention.output": ("*.self_attn.o_proj",),
                "norm": ("*.q_a_layernorm", "*.kv_a_layernorm"),
                "mlp.gate": ("*.shared_experts.gate_proj",),
                "mlp.up": ("*.shared_experts.up_proj",),
                "mlp.down": ("*.shared_experts.down_proj",),
            },
        ),
        SUBLAYERS,
        rows={
            "*.kv_a_proj_with_mqa": {"attention.key": ((10, 14),)},
            "*.kv_b_proj": fused(step=4, key=6, value=8),
        },
        attention=("eager",),
    ),
)  # fmt: skip
