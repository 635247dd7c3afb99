"""Vision and text in one model."""

from __future__ import annotations

import torch

from tests.architectures import decoders
from tests.architectures.architecture import (
    FLEX_TOO,
    Architecture,
    both,
    hf,
    image,
    joined,
    text,
    under,
)

CLIP_TEXT = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
CLIP_VISION = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
LAYERS = {
    "attention.query": ("*.self_attn.q_proj",), "attention.key": ("*.self_attn.k_proj",),
    "attention.value": ("*.self_attn.v_proj",), "attention.output": ("*.self_attn.out_proj",),
    "mlp.up": ("*.mlp.fc1",), "mlp.down": ("*.mlp.fc2",),
    "norm": ("*.layer_norm?", "*.post_layernorm"),
}  # fmt: skip
PATCHES = {
    "conv": ("*.patch_embedding",), "embedding.patch": ("*.patch_embedding",),
    "embedding.position": ("*.position_embedding",),
}  # fmt: skip
TEXT = {"embedding.token": ("*.token_embedding",), "norm": ("*.final_layer_norm",)}
SUBLAYERS = joined(both("*.self_attn", "attention"), both("*.mlp", "mlp"))
STACKS = {"vision_model": "vision", "text_model": "text"}
TOWER = "model.vision_tower.encoder."


def _with_image() -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((2, 4), 60), text()()["input_ids"].clamp(max=59)], 1)
    return {"input_ids": ids, **image()()}


MULTIMODAL = (
    Architecture(  # what it projects to is compared, so that it has no head
        "clip",
        hf("CLIPConfig", "CLIPModel", text_config=CLIP_TEXT, vision_config=CLIP_VISION,
           projection_dim=20),
        lambda: {**text()(), **image()()},
        joined(LAYERS, PATCHES, TEXT, {"norm": ("*.pre_layrnorm",)}), SUBLAYERS, stacks=STACKS,
        attention=FLEX_TOO,
    ),
    Architecture(  # its vision tower pools by attention of a learned query
        "siglip",
        hf("SiglipConfig", "SiglipModel", text_config={**CLIP_TEXT, "projection_size": 32},
           vision_config=CLIP_VISION),
        lambda: {**text()(), **image()()},
        joined(
            LAYERS, PATCHES, TEXT,
            {
                "cross_attention.query": ("*.head.attention.in_proj_*",),
                "cross_attention.key": ("*.head.attention.in_proj_*",),
                "cross_attention.value": ("*.head.attention.in_proj_*",),
                "cross_attention.output": ("*.head.attention.out_proj",),
                "norm": ("*.head.layernorm",),
            },
        ),
        SUBLAYERS, stacks=STACKS, attention=FLEX_TOO,
        rows={
            "*.in_proj_*": {
                "cross_attention.query": ((0, 32),), "cross_attention.key": ((32, 64),),
                "cross_attention.value": ((64, 96),),
            },
        },
    ),
    Architecture(
        "llava",
        hf(
            "LlavaConfig", "LlavaForConditionalGeneration",
            text_config={"model_type": "llama", **decoders.LLAMA},
            vision_config={"model_type": "clip_vision_model", **CLIP_VISION},
            image_token_index=60, vision_feature_layer=-1,
        ),
        _with_image,
        joined(
            under(TOWER[:-1], LAYERS), under("model.language_model", decoders.PLAIN), PATCHES,
            {"norm": ("*.pre_layrnorm", "*.post_layernorm", "*.language_model.norm"),
             "embedding.token": ("*.embed_tokens",), "head": ("lm_head",)},
        ),
        SUBLAYERS, attention=FLEX_TOO,
        stacks={"model.vision_tower": "vision", "model.language_model": "text"},
    ),
)  # fmt: skip
