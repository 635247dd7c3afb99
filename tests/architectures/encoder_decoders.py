"""Encoder-decoders of text."""

from __future__ import annotations

from tests.architectures.architecture import (
    FLEX_TOO,
    Architecture,
    both,
    decoder_ids,
    hf,
    joined,
    text,
)

BART = {
    "vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44, "max_position_embeddings": 32, "dropout": 0.0, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
LAYERS = {
    "attention.query": ("*.self_attn.q_proj",), "attention.key": ("*.self_attn.k_proj",),
    "attention.value": ("*.self_attn.v_proj",), "attention.output": ("*.self_attn.out_proj",),
    "cross_attention.query": ("*.encoder_attn.q_proj",),
    "cross_attention.key": ("*.encoder_attn.k_proj",),
    "cross_attention.value": ("*.encoder_attn.v_proj",),
    "cross_attention.output": ("*.encoder_attn.out_proj",),
    "mlp.up": ("*.fc1",), "mlp.down": ("*.fc2",), "norm": ("*_layer_norm",),
}  # fmt: skip
TEXT = {
    "embedding.token": ("*.encoder.embed_tokens", "*.decoder.embed_tokens"),
    "embedding.position": ("*.embed_positions",), "head": ("lm_head",),
}  # fmt: skip
OUTPUTS = joined(
    both("*.self_attn", "attention"), both("*.encoder_attn", "cross_attention"),
    {"residual.mlp": ("*.fc2",)},
)  # fmt: skip
STACKS = {"model.encoder": "encoder", "model.decoder": "decoder"}


def _bart(name: str, config: str, model: str, *norms: str) -> Architecture:
    return Architecture(
        name, hf(config, model, **BART), text(decoder_input_ids=decoder_ids),
        joined(LAYERS, TEXT, {"norm": norms}), OUTPUTS, stacks=STACKS, attention=FLEX_TOO,
    )  # fmt: skip


ENCODER_DECODERS = (
    Architecture(
        "t5",
        hf(
            "T5Config", "T5ForConditionalGeneration", vocab_size=61, d_model=24, d_kv=8, d_ff=40,
            num_layers=2, num_heads=3, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
            tie_word_embeddings=True,
        ),
        text(decoder_input_ids=decoder_ids),
        {
            "attention.query": ("*.SelfAttention.q",), "attention.key": ("*.SelfAttention.k",),
            "attention.value": ("*.SelfAttention.v",), "attention.output": ("*.SelfAttention.o",),
            "cross_attention.query": ("*.EncDecAttention.q",),
            "cross_attention.key": ("*.EncDecAttention.k",),
            "cross_attention.value": ("*.EncDecAttention.v",),
            "cross_attention.output": ("*.EncDecAttention.o",),
            "mlp.up": ("*.wi",), "mlp.down": ("*.wo",), "norm": ("*layer_norm",),
            "embedding.token": ("encoder.embed_tokens", "decoder.embed_tokens"),
            "head": ("lm_head",),
        },
        {
            "attention": ("*.SelfAttention",), "cross_attention": ("*.EncDecAttention",),
            "mlp": ("*.DenseReluDense",), "residual.attention": ("*.layer.0.dropout",),
            "residual.cross_attention": ("decoder.*.layer.1.dropout",),
            "residual.mlp": ("encoder.*.layer.1.dropout", "decoder.*.layer.2.dropout"),
        },
        stacks={"encoder": "encoder", "decoder": "decoder"}, targets=("q", "v", "wi", "wo"),
        attention=FLEX_TOO,
    ),
    _bart("bart", "BartConfig", "BartForConditionalGeneration", "*.layernorm_embedding"),
    _bart("mbart", "MBartConfig", "MBartForConditionalGeneration", "*.layernorm_embedding",
          "*coder.layer_norm"),
    _bart("marian", "MarianConfig", "MarianMTModel"),
    _bart("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", "*coder.layer_norm"),
)  # fmt: skip
