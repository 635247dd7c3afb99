"""The one table of architectures, each tiny and with random weights, that tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """A model to build, inputs for it, and what is true of it.

    ``targets``: names of linears, as PEFT's ``target_modules`` has them. ``roles``: module names
    (their last parts) by role, as a reader of the model's source would say.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    roles: dict[str, set[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _hf(config: str, auto: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(**values)
        return getattr(transformers, auto)(made).eval()

    return build


def _text(vocabulary: int = 61, **extra: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocabulary, (2, 9), generator=generator)
        return {"input_ids": ids, **{k: f() for k, f in extra.items()}}

    return example


def _decoder() -> Tensor:
    return torch.tensor([[2, 5, 7, 9], [2, 4, 8, 6]])


def _image(size: int = 16) -> Callable[[], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


class Packed(nn.Module):
    """A plain encoder layer around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mha(x, x, x, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.out(x)


class Tables(nn.Module):
    """An MLP over embedding tables, as recommenders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(11, 6)
        self.item = nn.Embedding(13, 5)
        self.up = nn.Linear(11, 17)
        self.out = nn.Linear(17, 3)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        joined = torch.cat([self.user(user), self.item(item)], dim=-1)
        return self.out(torch.relu(self.up(joined)))


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


_LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BERT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
_GATED = {
    "attention.query": {"q_proj"}, "attention.key": {"k_proj"}, "attention.value": {"v_proj"},
    "attention.output": {"o_proj"}, "mlp.gate": {"gate_proj"}, "mlp.up": {"up_proj"},
    "mlp.down": {"down_proj"}, "head": {"lm_head"}, "embedding.token": {"embed_tokens"},
}  # fmt: skip
_BERT_ROLES = {
    "attention.query": {"query"}, "attention.key": {"key"}, "attention.value": {"value"},
    "attention.output": {"attention.output.dense"}, "mlp.up": {"intermediate.dense"},
    "mlp.down": {"0.output.dense", "1.output.dense"}, "head": {"classifier"},
    "embedding.token": {"word_embeddings"},
}  # fmt: skip

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "llama", _hf("LlamaConfig", "LlamaForCausalLM", **_LLAMA), _text(),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), _GATED,
    ),
    Architecture(
        "qwen3", _hf("Qwen3Config", "Qwen3ForCausalLM", **_LLAMA, head_dim=12), _text(),
        ("q_proj", "v_proj", "down_proj"), _GATED,
    ),
    Architecture(
        "phi3", _hf("Phi3Config", "Phi3ForCausalLM", **_LLAMA), _text(),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        {
            "attention.query": {"qkv_proj"}, "attention.key": {"qkv_proj"},
            "attention.value": {"qkv_proj"}, "attention.output": {"o_proj"},
            "mlp.gate": {"gate_up_proj"}, "mlp.up": {"gate_up_proj"}, "mlp.down": {"down_proj"},
            "head": {"lm_head"}, "embedding.token": {"embed_tokens"},
        },
    ),
    Architecture(
        "gpt2",
        _hf(
            "GPT2Config", "GPT2LMHeadModel", vocab_size=61, n_positions=32, n_embd=24, n_layer=2,
            n_head=3, n_inner=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        ),
        _text(), ("c_attn", "c_proj", "c_fc"),
        {
            "attention.query": {"c_attn"}, "attention.key": {"c_attn"},
            "attention.value": {"c_attn"}, "attention.output": {"attn.c_proj"},
            "mlp.up": {"c_fc"}, "mlp.down": {"mlp.c_proj"}, "head": {"lm_head", "wte"},
            "embedding.token": {"wte", "lm_head"}, "embedding.position": {"wpe"},
        },
    ),
    Architecture(
        "bert", _hf("BertConfig", "BertForSequenceClassification", **_BERT), _text(),
        ("query", "key", "value", "dense"), _BERT_ROLES,
    ),
    Architecture(
        "albert",
        _hf("AlbertConfig", "AlbertForSequenceClassification", **_BERT, embedding_size=16,
            classifier_dropout_prob=0.0),
        _text(), ("query", "value", "ffn"),
        {
            "attention.query": {"query"}, "attention.key": {"key"}, "attention.value": {"value"},
            "attention.output": {"attention.dense"}, "mlp.up": {"ffn"}, "mlp.down": {"ffn_output"},
            "head": {"classifier"}, "embedding.token": {"word_embeddings"},
        },
    ),
    Architecture(
        "deberta",
        _hf("DebertaV2Config", "DebertaV2ForSequenceClassification", **_BERT,
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            pooler_hidden_size=32, pooler_dropout=0.0),
        _text(), ("query_proj", "value_proj", "intermediate.dense"),
        {
            "attention.query": {"query_proj"}, "attention.key": {"key_proj"},
            "attention.value": {"value_proj"}, "attention.output": {"attention.output.dense"},
            "mlp.up": {"intermediate.dense"}, "mlp.down": {"0.output.dense", "1.output.dense"},
            "head": {"classifier"}, "embedding.token": {"word_embeddings"},
        },
    ),
    Architecture(
        "t5",
        _hf(
            "T5Config", "T5ForConditionalGeneration", vocab_size=61, d_model=24, d_kv=8, d_ff=40,
            num_layers=2, num_heads=3, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
            tie_word_embeddings=True,
        ),
        _text(decoder_input_ids=_decoder), ("q", "v", "wi", "wo"),
        {
            "attention.query": {"SelfAttention.q"}, "attention.key": {"SelfAttention.k"},
            "attention.value": {"SelfAttention.v"}, "attention.output": {"SelfAttention.o"},
            "cross_attention.query": {"EncDecAttention.q"},
            "cross_attention.value": {"EncDecAttention.v"},
            "mlp.up": {"wi"}, "mlp.down": {"wo"},
        },
    ),
    Architecture(
        "vit",
        _hf(
            "ViTConfig", "ViTForImageClassification", image_size=16, patch_size=8, hidden_size=24,
            intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_labels=5,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        _image(), ("q_proj", "v_proj", "fc1"),
        {"head": {"classifier"}, "conv": {"projection"}},
    ),
    Architecture(
        "whisper",
        _hf(
            "WhisperConfig", "WhisperForConditionalGeneration", vocab_size=61, d_model=24,
            encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
            decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=44, num_mel_bins=8,
            max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, dropout=0.0, use_cache=False,
            begin_suppress_tokens=None, suppress_tokens=None,
        ),
        lambda: {
            "input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1)),
            "decoder_input_ids": _decoder(),
        },
        ("q_proj", "v_proj", "fc1"),
        {
            "attention.query": {"self_attn.q_proj"}, "attention.output": {"self_attn.out_proj"},
            "cross_attention.key": {"encoder_attn.k_proj"}, "mlp.up": {"fc1"}, "mlp.down": {"fc2"},
            "conv": {"conv1", "conv2"},
        },
    ),
    Architecture(
        "resnet",
        _hf(
            "ResNetConfig", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 12],
            depths=[1, 1], layer_type="basic", num_labels=3,
        ),
        _image(32), ("convolution",), {"head": {"classifier.1"}},
    ),
    Architecture(
        "mixtral",
        _hf("MixtralConfig", "MixtralForCausalLM", **_LLAMA, num_local_experts=3,
            num_experts_per_tok=2),
        _text(), ("q_proj", "v_proj"),
        {k: v for k, v in _GATED.items() if not k.startswith("mlp")},
    ),
    Architecture(
        "mamba",
        _hf(
            "MambaConfig", "MambaForCausalLM", vocab_size=61, hidden_size=24, state_size=4,
            num_hidden_layers=2, expand=2, time_step_rank=3, use_cache=False,
        ),
        _text(), ("in_proj", "x_proj"), {"head": {"lm_head", "embeddings"}},
    ),
    Architecture(
        "packed", _seeded(Packed),
        lambda: {"x": torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))},
        ("mha", "up", "down"),
        {
            "attention.query": {"mha.in_proj_weight", "mha.in_proj_bias"},
            "attention.output": {"out_proj"},
            "mlp.up": {"up"}, "mlp.down": {"down"}, "head": {"out"},
        },
    ),
    Architecture(
        "sequential",
        _seeded(
            lambda: nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 5), nn.Tanh(),
                                  nn.Linear(5, 3))
        ),
        lambda: {"input": torch.randn(4, 7, generator=torch.Generator().manual_seed(1))},
        ("0", "2"), {"head": {"4"}},
    ),
    Architecture(
        "tables", _seeded(Tables),
        lambda: {"user": torch.tensor([1, 4, 9, 2]), "item": torch.tensor([3, 12, 0, 7])},
        ("user", "item", "up"), {"head": {"out"}},
    ),
)  # fmt: skip


def by_name(name: str) -> Architecture:
    """The architecture of that name."""
    return next(a for a in ARCHITECTURES if a.name == name)
