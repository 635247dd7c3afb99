"""Vision transformers and convolutional networks."""

from __future__ import annotations

from tests.architectures.architecture import (
    FLEX_TOO,
    SDPA_TOO,
    Architecture,
    both,
    hf,
    image,
    joined,
)

VIT = {
    "image_size": 16, "patch_size": 8, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 5, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LAYERS = {
    "attention.query": ("*.q_proj",), "attention.key": ("*.k_proj",),
    "attention.value": ("*.v_proj",), "attention.output": ("*.attention.o_proj",),
    "mlp.up": ("*.mlp.fc1",), "mlp.down": ("*.mlp.fc2",),
}  # fmt: skip
PATCHES = {"conv": ("*.projection",), "embedding.patch": ("*.projection",)}
POSITIONS = {"embedding.position": ("*.position_embeddings",)}
HEAD = {"head": ("classifier",)}
NORMS = {"norm": ("*layernorm*",)}
SUBLAYERS = joined(both("*.attention", "attention"), both("*.mlp", "mlp"))

VISION = (
    Architecture(
        "vit", hf("ViTConfig", "ViTForImageClassification", **VIT), image(),
        joined(LAYERS, PATCHES, POSITIONS, HEAD, NORMS), SUBLAYERS,
        targets=("q_proj", "v_proj", "fc1"), attention=FLEX_TOO,
    ),
    Architecture(
        "deit", hf("DeiTConfig", "DeiTForImageClassification", **VIT), image(),
        joined(LAYERS, PATCHES, POSITIONS, HEAD, NORMS), SUBLAYERS, attention=FLEX_TOO,
    ),
    Architecture(
        "dinov2",
        hf("Dinov2Config", "Dinov2ForImageClassification", image_size=16, patch_size=8,
           hidden_size=24, mlp_ratio=2, num_hidden_layers=2, num_attention_heads=3, num_labels=5,
           drop_path_rate=0.0),
        image(),
        joined(LAYERS, PATCHES, POSITIONS, HEAD, {"norm": ("*.norm?", "*.layernorm")}),
        {  # the stochastic depth after these is one module for both
            "attention": ("*.attention",), "residual.attention": ("*.layer_scale1",),
            "mlp": ("*.mlp",), "residual.mlp": ("*.layer_scale2",),
        },
        attention=FLEX_TOO,
    ),
    Architecture(
        "swin",
        hf("SwinConfig", "SwinForImageClassification", image_size=16, patch_size=2, embed_dim=12,
           depths=[2, 2], num_heads=[2, 3], window_size=2, num_labels=5, drop_path_rate=0.0),
        image(),
        joined(LAYERS, PATCHES, HEAD, NORMS, {"norm": ("*.norm",)}),
        joined(
            {"attention": ("*.attention",), "residual.attention": ("*.drop_path",)},
            both("*.mlp", "mlp"),
        ),
        attention=SDPA_TOO,
    ),
    Architecture(
        "convnext",
        hf("ConvNextConfig", "ConvNextForImageClassification", patch_size=4, hidden_sizes=[8, 12],
           depths=[2, 1], num_stages=2, num_labels=5, layer_scale_init_value=0.5),
        image(32),
        joined(
            HEAD, NORMS,
            {
                "mlp.up": ("*.pwconv1",), "mlp.down": ("*.pwconv2",),
                "conv": ("*.patch_embeddings", "*.dwconv", "*.downsampling_layer.1"),
                "embedding.patch": ("*.patch_embeddings",), "norm": ("*.downsampling_layer.0",),
            },
        ),
        {"residual.mlp": ("*.pwconv2",)},  # channels come first after it
    ),
    Architecture(
        "resnet",
        hf("ResNetConfig", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 12],
           depths=[1, 1], layer_type="basic", num_labels=3),
        image(32),
        {"conv": ("*.convolution",), "norm": ("*.normalization",), "head": ("classifier.1",)},
        targets=("convolution",),
    ),
    Architecture(
        "segformer",
        hf("SegformerConfig", "SegformerForSemanticSegmentation", depths=[2, 1],
           num_encoder_blocks=2, sr_ratios=[2, 1], hidden_sizes=[12, 20], patch_sizes=[7, 3],
           strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=16,
           num_labels=5, drop_path_rate=0.0, classifier_dropout_prob=0.0),
        image(32),
        joined(
            LAYERS,
            {
                "conv": ("*.patch_embeddings.proj", "*.sequence_reduction", "*.dwconv.dwconv",
                         "*.linear_fuse", "*.classifier"),
                "embedding.patch": ("*.stages.0.patch_embeddings.proj",),
                "head": ("decode_head.classifier",),
                "norm": ("*layernorm*", "*.layer_norm", "*.batch_norm"),
            },
        ),
        joined(
            {"attention": ("*.attention",), "residual.attention": ("*.hidden_dropout",)},
            both("*.mlp", "mlp"),
        ),
        attention=FLEX_TOO,
    ),
)  # fmt: skip
