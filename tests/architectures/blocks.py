"""The layers of each architecture's stacks, whose output is a residual stream: globs of modules."""

from __future__ import annotations

_LLAMA = ("model.layers.?",)
_BOTH = ("model.encoder.layers.?", "model.decoder.layers.?")
_TWO = ("vision_model.encoder.layers.?", "text_model.encoder.layers.?")

BLOCKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "stablelm", "cohere",
         "mixtral", "qwen3-moe", "deepseek-v3", "modernbert"],
        _LLAMA,
    ),
    **dict.fromkeys(["gpt2", "falcon", "bloom"], ("transformer.h.?",)),
    "gpt-neox": ("gpt_neox.layers.?",),
    "opt": ("model.decoder.layers.?",),
    "mpt": ("transformer.blocks.?",),
    **{n: (f"{n}.encoder.layer.?",) for n in ("bert", "roberta", "electra", "deberta", "mpnet")},
    "distilbert": ("distilbert.transformer.layer.?",),
    "albert": ("albert.encoder.albert_layer_groups.?",),
    "t5": ("encoder.block.?", "decoder.block.?"),
    **dict.fromkeys(["bart", "mbart", "marian", "pegasus", "whisper"], _BOTH),
    "vit": ("vit.layers.?",),
    "deit": ("deit.layers.?",),
    "dinov2": ("dinov2.encoder.layer.?",),
    "swin": ("swin.encoder.layers.?.blocks.?",),
    "segformer": ("segformer.stages.?.blocks.?",),
    "wav2vec2": ("wav2vec2.encoder.layers.?",),
    "hubert": ("hubert.encoder.layers.?",),
    "ast": ("audio_spectrogram_transformer.layers.?",),
    **dict.fromkeys(["clip", "siglip"], _TWO),
    "llava": ("model.vision_tower.encoder.layers.?", "model.language_model.layers.?"),
    # convolutional stages put features first, state-space layers have no sublayers, others no list
    **dict.fromkeys(
        ["convnext", "resnet", "mamba", "mamba2", "packed", "flex", "sequential",
         "tables"],
        (),
    ),
}  # fmt: skip
