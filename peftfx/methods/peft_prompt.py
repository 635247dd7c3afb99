"""How HF PEFT writes prompts and prefixes: one tensor for the whole model.

``prompt_embeddings`` holds the finished rows; what made them is not in the file. For an
encoder-decoder PEFT stores twice the rows of a prompt and never reads the second half, and of a
prefix it hands layer i the slots 4i and 4i + 1, counted round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftfx.errors import CheckpointError
from peftfx.methods.peft import PeftForm, Placed

if TYPE_CHECKING:
    from peftfx.methods.method import Method

WHOLE = "prompt_embeddings"
Tensors = Mapping[str, Tensor]


class PromptForm(PeftForm):
    """A prompt: ``[length · stacks, D]``."""

    def spec(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The rule that a configuration amounts to, but for the method's name."""
        rule = {"role": "tokens", "length": content["num_virtual_tokens"]}
        start = content.get("prompt_tuning_init")
        start = getattr(start, "value", start)
        if start == "SAMPLE_VOCAB" and not content.get("inference_mode"):
            rule["init"] = "vocabulary"
        if start == "TEXT" and not content.get("inference_mode"):
            text, directory = content["prompt_tuning_init_text"], content["tokenizer_name_or_path"]
            rule |= {"init": "text", "text": text, "tokenizer": directory}
        return rule

    def config(self, placed: Placed) -> dict[str, Any]:
        """What the configuration says of the tensor and how it started."""
        ((site, _),) = placed
        return {"token_dim": site.out_features, **self.defaults}

    def refusal_of(self, method: Method) -> str | None:
        """Why the file would lose something of *method*, or None."""
        if method != method.finished():
            return f"PEFT keeps what {method.name} has made and drops what makes it"
        return None

    def join(self, placed: Placed, tensors: Sequence[Tensors]) -> Tensor:
        """The file's tensor."""
        rows = tensors[0]["embeddings"]
        more = placed[0][0].around["stacks"] - 1
        return torch.cat([rows, *[torch.zeros_like(rows)] * more])

    def part(self, placed: Placed, whole: Tensor) -> list[Tensors]:
        """The tensors of each placement, of a file's."""
        ((site, method),) = placed
        length: int = method.length  # type: ignore[attr-defined]
        _fits(whole, (length * site.around["stacks"], site.out_features))
        return [{"embeddings": whole[:length]}]


class EncodedForm(PromptForm):
    """P-tuning: a prompt without its encoder."""

    def spec(self, content: Mapping[str, Any]) -> dict[str, Any]:
        if content.get("inference_mode"):
            return {**super().spec(content), "encoder": "none"}
        made = getattr(content["encoder_reparameterization_type"], "value", None)
        made = made or content["encoder_reparameterization_type"]
        hidden = content.get("encoder_hidden_size") or 0
        layers = {"lstm_layers": content["encoder_num_layers"]} if made == "LSTM" else {}
        return {**super().spec(content), "encoder": made.lower(), "hidden": hidden, **layers}


class PrefixForm(PromptForm):
    """A prefix: ``[length, 2 · layers · heads · D]``, keys and values of a layer side by side."""

    def spec(self, content: Mapping[str, Any]) -> dict[str, Any]:
        rule = {**super().spec(content), "role": "attention"}
        if content.get("num_transformer_submodules") == 2:
            rule["stack"] = "decoder"
        if content.get("prefix_projection") and not content.get("inference_mode"):
            rule |= {"mlp": True, "hidden": content.get("encoder_hidden_size") or 0}
        if content.get("init_weights") == "zero":
            rule["init"] = "zeros"
        return rule

    def refusal_of(self, method: Method) -> str | None:
        if method.gate:  # type: ignore[attr-defined]
            return "PEFT has no gates"
        return super().refusal_of(method)

    def config(self, placed: Placed) -> dict[str, Any]:
        heads, width = self._heads(placed)
        found = {"token_dim": heads * width, "num_attention_heads": heads}
        return {**found, "num_layers": len(placed), **self.defaults}

    def _heads(self, placed: Placed) -> tuple[int, int]:
        shapes = {
            tuple(int(site.attrs[n]) for n in ("kv_heads", "head_dim", "value_dim"))
            for site, _ in placed
        }
        heads, width, values = next(iter(shapes))
        if len(shapes) > 1 or width != values:
            raise CheckpointError("PEFT has one number and width of heads for all layers")
        return heads, width

    def _slots(self, placed: Placed) -> Iterator[int]:
        """Where the keys of each layer stand; the values follow."""
        for layer, (site, _) in enumerate(placed):
            yield 2 * layer if site.around["stacks"] == 1 else 4 * layer % (2 * len(placed))

    def join(self, placed: Placed, tensors: Sequence[Tensors]) -> Tensor:
        layers = len(placed)
        heads, width = self._heads(placed)
        like = tensors[0]["keys"]
        whole = like.new_zeros(like.shape[1], 2 * layers, heads, width)
        taken: dict[int, int] = {}
        for layer, slot in enumerate(self._slots(placed)):
            other = taken.setdefault(slot, layer)
            for i, name in enumerate(("keys", "values")):
                if not torch.equal(tensors[other][name], tensors[layer][name]):
                    raise CheckpointError(
                        f"PEFT gives layers {other} and {layer} of a decoder one prefix"
                    )
                whole[:, slot + i] = tensors[layer][name].transpose(0, 1)
        return whole.flatten(1)

    def part(self, placed: Placed, whole: Tensor) -> list[Tensors]:
        layers = len(placed)
        heads, width = self._heads(placed)
        length: int = placed[0][1].length  # type: ignore[attr-defined]
        _fits(whole, (length, 2 * layers * heads * width))
        slots = whole.view(length, 2 * layers, heads, width).permute(1, 2, 0, 3)
        return [{"keys": slots[i], "values": slots[i + 1]} for i in self._slots(placed)]


def _fits(whole: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(whole.shape) != shape:
        raise CheckpointError(f"{WHOLE} is {list(whole.shape)}, and {list(shape)} is needed")
