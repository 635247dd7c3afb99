"""The one table of layer kinds that tests share: a module of each, and its LoRA by the formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Delta = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A layer and how it is called.

    ``weight`` is the site's parameter. ``delta`` is B·A in the layout of the weight, None where
    there is no such thing. ``peft``: what HF PEFT has of it, by method; ``ia3_input``: whether its
    input can be scaled.
    """

    id: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    delta: Delta | None = None
    weight: str = "weight"
    peft: tuple[str, ...] = ()
    ia3_input: bool = True
    rank: int = 4
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.id


class Net(nn.Module):
    """A layer between others; ``layer`` may give a tuple."""

    def __init__(self, layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.layer, self.kwargs = layer, kwargs

    def forward(self, *args: Any) -> Tensor:
        out = self.layer(*args, **self.kwargs)
        return torch.tanh(out[0] if isinstance(out, tuple) else out)


class Bare(nn.Module):
    """A parameter that its owner computes with by hand."""

    def __init__(self, shape: tuple[int, ...], how: Callable[[Tensor, Tensor], Tensor],
                 **attributes: Any) -> None:  # fmt: skip
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) * 0.5)
        self.how = how
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.w)


class Borrowed(nn.Module):
    """The weight of a linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class Experts(nn.Module):
    """Two stacks of matrices, each token through its own expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6) * 0.4)
        self.down = nn.Parameter(torch.randn(3, 6, 8) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(len(x), device=x.device) % 3
        y = torch.einsum("tk,tnk->tn", x, self.up[chosen])
        return torch.bmm(self.down[chosen], torch.relu(y).unsqueeze(-1)).squeeze(-1)


def _hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 7)  # type: ignore[no-any-return]


def _randn(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randn(s, generator=generator) for s in shapes)

    return make


def _same(times: int, *shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (_randn(shape)()[0],) * times


def _linear(a: Tensor, b: Tensor) -> Tensor:
    return b @ a


def _turned(a: Tensor, b: Tensor) -> Tensor:
    return (b @ a).t()


def _conv(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nr,rk...->nk...", b.flatten(1), a)


def _transposed(groups: int) -> Delta:
    def delta(a: Tensor, b: Tensor) -> Tensor:
        parts = zip(a.chunk(groups), b.flatten(1).chunk(groups), strict=True)
        return torch.cat([torch.einsum("kr...,nr->kn...", x, y) for x, y in parts])

    return delta


def _stack(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([y @ x for x, y in zip(a, b, strict=True)])


def _stack_turned(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([(y @ x).t() for x, y in zip(a, b, strict=True)])


BAG = torch.tensor([1, 4, 4, 9, 2, 0, 7])
OFFSETS = torch.tensor([0, 2, 2, 5])
IDS = torch.tensor([[1, 4, 9], [2, 0, 7]])
ALL = ("lora", "ia3", "bitfit", "train")

KINDS: tuple[Kind, ...] = (
    Kind("linear", "linear", lambda: nn.Linear(7, 5), _randn((3, 7)), _linear, peft=ALL),
    Kind("linear without bias", "linear", lambda: nn.Linear(7, 5, bias=False), _randn((2, 3, 7)),
         _linear, peft=ALL),
    Kind("hf_conv1d", "hf_conv1d", _hf_conv1d, _randn((2, 3, 7)), _turned, peft=ALL),
    Kind("embedding", "embedding", lambda: nn.Embedding(11, 6, padding_idx=10), lambda: (IDS,),
         _turned, peft=("lora",), ia3_input=False),
    Kind("bag sum", "embedding_bag", lambda: nn.EmbeddingBag(11, 6, mode="sum"),
         lambda: (BAG, OFFSETS), _turned, ia3_input=False),
    Kind("bag weighted", "embedding_bag", lambda: nn.EmbeddingBag(11, 6, mode="sum"),
         lambda: (BAG, OFFSETS, torch.linspace(-1, 2, 7)), _turned, ia3_input=False),
    Kind("bag mean", "embedding_bag", lambda: nn.EmbeddingBag(11, 6), lambda: (IDS,), _turned,
         ia3_input=False),
    Kind("bag padded", "embedding_bag",
         lambda: nn.EmbeddingBag(11, 6, padding_idx=4, include_last_offset=True),
         lambda: (BAG, torch.cat([OFFSETS, torch.tensor([7])])), _turned, ia3_input=False),
    Kind("conv1d", "conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), _randn((2, 4, 9)),
         _conv, peft=("lora", "bitfit", "train")),
    Kind("conv2d", "conv2d", lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)),
         _randn((2, 4, 7, 8)), _conv, peft=ALL),
    Kind("conv3d", "conv3d", lambda: nn.Conv3d(4, 6, 2, padding=1), _randn((2, 4, 3, 4, 5)), _conv,
         peft=ALL),
    Kind("conv dilated", "conv2d", lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
         _randn((2, 4, 7, 7)), _conv),
    Kind("conv grouped", "conv2d", lambda: nn.Conv2d(4, 6, 3, groups=2), _randn((2, 4, 7, 7)),
         peft=ALL),
    Kind("transposed 1d", "conv_transpose1d",
         lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
         _randn((2, 4, 5)), _transposed(1)),
    Kind("transposed 2d", "conv_transpose2d",
         lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), dilation=(1, 2), bias=False),
         _randn((2, 4, 3, 4)), _transposed(1)),
    Kind("transposed 3d", "conv_transpose3d", lambda: nn.ConvTranspose3d(4, 6, 2, padding=1),
         _randn((2, 4, 3, 4, 3)), _transposed(1)),
    Kind("transposed grouped", "conv_transpose2d",
         lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
         _randn((2, 4, 3, 4)), _transposed(2)),
    Kind("attention", "attention", lambda: nn.MultiheadAttention(6, 2, batch_first=True),
         _same(3, 2, 5, 6), _linear, weight="in_proj_weight"),
    Kind("attention crossed", "attention", lambda: nn.MultiheadAttention(6, 3, bias=False),
         _randn((5, 2, 6), (4, 2, 6), (4, 2, 6)), _linear, weight="in_proj_weight"),
    Kind("attention query", "attention", lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=7),
         _randn((5, 2, 6), (4, 2, 5), (4, 2, 7)), _linear, weight="q_proj_weight"),
    Kind("attention value", "attention",
         lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=7, batch_first=True),
         _randn((2, 5, 6), (2, 4, 5), (2, 4, 7)), _linear, weight="v_proj_weight"),
    Kind("attention output", "linear", lambda: nn.MultiheadAttention(6, 2), _same(3, 5, 2, 6),
         _linear, weight="out_proj.weight"),
    Kind("borrowed", "linear", Borrowed, _randn((3, 7)), _linear, weight="inner.weight"),
    Kind("bare linear", "parameter", lambda: Bare((5, 7), F.linear), _randn((3, 7)), _linear,
         weight="w", peft=("lora",)),
    Kind("bare matmul", "parameter", lambda: Bare((7, 5), lambda x, w: x @ w), _randn((3, 7)),
         _linear, weight="w", peft=("lora",)),
    Kind("bare einsum", "parameter",
         lambda: Bare((3, 5, 7), lambda x, w: torch.einsum("tk,enk->ten", x, w)),
         _randn((4, 7)), _stack, weight="w", peft=("lora",)),
    Kind("bare bmm", "parameter",
         lambda: Bare((3, 7, 5), torch.bmm, is_transposed=True),
         _randn((3, 4, 7)), _stack_turned, weight="w", peft=("lora",)),
    Kind("experts", "parameter", Experts, _randn((5, 6)), _stack, weight="up", peft=("lora",)),
)  # fmt: skip

BY_ID = {k.id: k for k in KINDS}
