"""Audio: spectrograms and waves."""

from __future__ import annotations

from tests.architectures import vision
from tests.architectures.architecture import (
    FLEX_TOO,
    Architecture,
    both,
    decoder_ids,
    hf,
    joined,
    noise,
)
from tests.architectures.encoder_decoders import LAYERS, OUTPUTS, STACKS

WAVE = {
    "vocab_size": 19, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "conv_dim": (8, 12), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip


def _wave(name: str, config: str, model: str) -> Architecture:
    return Architecture(
        name, hf(config, model, **WAVE), noise("input_values", 2, 400),
        {
            "attention.query": ("*.q_proj",), "attention.key": ("*.k_proj",),
            "attention.value": ("*.v_proj",), "attention.output": ("*.attention.out_proj",),
            "mlp.up": ("*.intermediate_dense",), "mlp.down": ("*.output_dense",),
            "conv": ("*.conv", "*.pos_conv_embed.conv.parametrizations.weight"),
            "norm": ("*layer_norm",), "head": ("lm_head",),
        },
        joined(
            {"attention": ("*.attention",), "residual.attention": ("*.layers.?.dropout",)},
            both("*.feed_forward", "mlp"),
        ),
        attention=FLEX_TOO,
    )  # fmt: skip


AUDIO = (
    Architecture(
        "whisper",
        hf(
            "WhisperConfig", "WhisperForConditionalGeneration", vocab_size=61, d_model=24,
            encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
            decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=44, num_mel_bins=8,
            max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, dropout=0.0, use_cache=False,
            begin_suppress_tokens=None, suppress_tokens=None,
        ),
        lambda: {**noise("input_features", 2, 8, 20)(), "decoder_input_ids": decoder_ids()},
        joined(
            LAYERS,
            {
                "embedding.token": ("*.embed_tokens",),
                "embedding.position": ("*.embed_positions",),
                "norm": ("*coder.layer_norm",), "conv": ("*.conv1", "*.conv2"),
                "head": ("proj_out",),
            },
        ),
        OUTPUTS, stacks=STACKS, targets=("q_proj", "v_proj", "fc1"), attention=FLEX_TOO,
    ),
    _wave("wav2vec2", "Wav2Vec2Config", "Wav2Vec2ForCTC"),
    _wave("hubert", "HubertConfig", "HubertForCTC"),
    Architecture(
        "ast",
        hf("ASTConfig", "ASTForAudioClassification", hidden_size=24, intermediate_size=40,
           num_hidden_layers=2, num_attention_heads=3, patch_size=4, max_length=16,
           num_mel_bins=8, frequency_stride=4, time_stride=4, hidden_dropout_prob=0.0,
           num_labels=5),
        noise("input_values", 2, 16, 8),
        joined(vision.LAYERS, vision.PATCHES, vision.POSITIONS, vision.NORMS,
               {"head": ("classifier.dense",)}),
        vision.SUBLAYERS, attention=FLEX_TOO,
    ),
)  # fmt: skip
