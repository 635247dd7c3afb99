"""The base's own task: sentence similarity. Which rest of a docstring belongs to a first sentence?

Embeddings are made as all-MiniLM's are: the mean of the last hidden states of a text's tokens,
normalised. Texts are compared by their inner product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Retrieval:
    """How often the right text comes first, and the mean of 1 / its rank."""

    recall: float
    mrr: float


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Embeddings ``[N, D]`` of *texts*, cut to *length* tokens, by a classifier without its head.

    Virtual tokens stand in front of the text's own, and are left out of the mean.
    """
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64], truncation=True, max_length=length, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        mask = batch["attention_mask"].unsqueeze(-1)  # [B, S, 1]
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
        hidden = hidden[:, -mask.shape[1] :]  # [B, S, D]
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(found), dim=-1)


def retrieval(
    model: nn.Module, tokenizer: Any, pairs: list[tuple[str, str]], length: int
) -> Retrieval:
    """Looks for the second text of each pair among the second ones of all."""
    first, second = (embed(model, tokenizer, list(side), length) for side in zip(*pairs))
    scores = first @ second.t()  # [N, N]
    ranks = (scores > scores.diagonal().unsqueeze(1)).sum(1) + 1
    return Retrieval(
        recall=(ranks == 1).float().mean().item(), mrr=(1 / ranks.float()).mean().item()
    )
