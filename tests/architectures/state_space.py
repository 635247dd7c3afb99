"""State-space models: no attention, no feed-forward."""

from __future__ import annotations

from tests.architectures.architecture import Architecture, hf, text

MAMBA = {"vocab_size": 61, "hidden_size": 24, "state_size": 4, "num_hidden_layers": 2, "expand": 2}
ROLES = {
    "conv": ("*.conv1d",), "norm": ("*.norm", "*.norm_f"), "head": ("lm_head",),
    "embedding.token": ("*.embeddings",),
}  # fmt: skip

STATE_SPACE = (
    Architecture(
        "mamba", hf("MambaConfig", "MambaForCausalLM", **MAMBA, time_step_rank=3, use_cache=False),
        text(), ROLES, targets=("in_proj", "x_proj"),
    ),
    Architecture(
        "mamba2",
        hf("Mamba2Config", "Mamba2ForCausalLM", **MAMBA, head_dim=8, num_heads=6, n_groups=1,
           chunk_size=4, use_cache=False),
        text(), ROLES,
    ),
)  # fmt: skip
