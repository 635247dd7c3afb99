"""Text encoders."""

from __future__ import annotations

from tests.architectures.architecture import (
    FLEX_TOO,
    Architecture,
    both,
    fused,
    hf,
    joined,
    text,
)

BERT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
EMBEDDINGS = {
    "embedding.token": ("*.word_embeddings",), "embedding.position": ("*.position_embeddings",),
}  # fmt: skip
FEED_FORWARD = {"mlp.up": ("*.intermediate.dense",), "mlp.down": ("*.layer.?.output.dense",)}
ROLES = joined(
    EMBEDDINGS, FEED_FORWARD,
    {
        "attention.query": ("*.self.query",), "attention.key": ("*.self.key",),
        "attention.value": ("*.self.value",), "attention.output": ("*.attention.output.dense",),
        "norm": ("*.LayerNorm",),
    },
)  # fmt: skip
# no module of BERT's is its attention or its feed-forward alone: the sum and the norm are inside
OUTPUTS = {
    "residual.attention": ("*.attention.output.dropout",),
    "residual.mlp": ("*.layer.?.output.dropout",),
}
OUT = {"head": ("classifier.out_proj",)}
CLASSIFIER = {"head": ("classifier",)}

ENCODERS = (
    Architecture(
        "bert", hf("BertConfig", "BertForSequenceClassification", **BERT), text(),
        joined(ROLES, CLASSIFIER), OUTPUTS, targets=("query", "key", "value", "dense"),
        attention=FLEX_TOO,
    ),
    Architecture(
        "roberta",
        hf("RobertaConfig", "RobertaForSequenceClassification", **BERT, pad_token_id=0), text(),
        joined(ROLES, OUT), OUTPUTS, attention=FLEX_TOO,
    ),
    Architecture(
        "electra",
        hf("ElectraConfig", "ElectraForSequenceClassification", **BERT, embedding_size=16), text(),
        joined(ROLES, OUT), OUTPUTS, attention=FLEX_TOO,
    ),
    Architecture(
        "distilbert",
        hf(
            "DistilBertConfig", "DistilBertForSequenceClassification", vocab_size=61, dim=32,
            hidden_dim=44, n_layers=2, n_heads=4, max_position_embeddings=32, dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3,
        ),
        text(),
        joined(
            EMBEDDINGS, CLASSIFIER,
            {
                "attention.query": ("*.q_lin",), "attention.key": ("*.k_lin",),
                "attention.value": ("*.v_lin",), "attention.output": ("*.out_lin",),
                "mlp.up": ("*.lin1",), "mlp.down": ("*.lin2",),
                "norm": ("*.LayerNorm", "*_layer_norm"),
            },
        ),
        joined(both("*.attention", "attention"), both("*.ffn", "mlp")), attention=FLEX_TOO,
    ),
    Architecture(
        "albert",
        hf("AlbertConfig", "AlbertForSequenceClassification", **BERT, embedding_size=16,
           classifier_dropout_prob=0.0),
        text(),
        joined(
            EMBEDDINGS, CLASSIFIER,
            {
                "attention.query": ("*.attention.query",), "attention.key": ("*.attention.key",),
                "attention.value": ("*.attention.value",),
                "attention.output": ("*.attention.dense",),
                "mlp.up": ("*.ffn",), "mlp.down": ("*.ffn_output",),
                "norm": ("*.LayerNorm", "*.full_layer_layer_norm"),
            },
        ),
        {"residual.attention": ("*.output_dropout",), "residual.mlp": ("*.ffn_output",)},
        targets=("query", "value", "ffn"), attention=FLEX_TOO,
    ),
    Architecture(
        "deberta",
        hf("DebertaV2Config", "DebertaV2ForSequenceClassification", **BERT,
           relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
           pooler_hidden_size=32, pooler_dropout=0.0),
        text(),
        joined(
            FEED_FORWARD, CLASSIFIER,
            {
                "attention.query": ("*.query_proj",), "attention.key": ("*.key_proj",),
                "attention.value": ("*.value_proj",),
                "attention.output": ("*.attention.output.dense",),
                "embedding.token": ("*.word_embeddings",), "norm": ("*.LayerNorm",),
            },
        ),
        OUTPUTS, targets=("query_proj", "value_proj", "intermediate.dense"),
    ),
    Architecture(
        "modernbert",
        hf(
            "ModernBertConfig", "ModernBertForSequenceClassification", vocab_size=61,
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, global_attn_every_n_layers=2, local_attention=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            num_labels=3, initializer_range=0.2,
        ),
        text(),
        {
            "attention.query": ("*.Wqkv",), "attention.key": ("*.Wqkv",),
            "attention.value": ("*.Wqkv",), "attention.output": ("*.attn.Wo",),
            "mlp.gate": ("*.Wi",), "mlp.up": ("*.Wi",), "mlp.down": ("*.mlp.Wo",),
            "embedding.token": ("*.tok_embeddings",), "head": ("classifier",),
            "norm": ("*norm",),
        },
        joined(both("*.attn", "attention"), both("*.mlp", "mlp")),
        rows={
            "*.Wqkv": fused(step=1, query=32, key=32, value=32),
            "*.Wi": {"mlp.gate": ((0, 44),), "mlp.up": ((44, 88),)},
        },
        attention=FLEX_TOO,
    ),
    Architecture(
        "mpnet", hf("MPNetConfig", "MPNetForSequenceClassification", **BERT), text(),
        joined(
            EMBEDDINGS, FEED_FORWARD, OUT,
            {
                "attention.query": ("*.attn.q",), "attention.key": ("*.attn.k",),
                "attention.value": ("*.attn.v",), "attention.output": ("*.attn.o",),
                "norm": ("*.LayerNorm",),
            },
        ),
        {
            "attention": ("*.attn",), "residual.attention": ("*.attention.dropout",),
            "residual.mlp": ("*.layer.?.output.dropout",),
        },
    ),
)  # fmt: skip
