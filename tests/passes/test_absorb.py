"""Norms and activations in front of adapters make S: where, where not and why, and rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftfx
from peftfx import dynamo, engine
from peftfx.backends import Backend
from peftfx.kernels.devices import assume
from peftfx.passes import JOINT
from peftfx.passes.absorb import Absorb
from peftfx.passes.claims import CLAIMS, Definition, shrink
from peftfx.passes.claims.library import Accumulate
from peftfx.passes.claims.shrink import Shrink
from peftfx.passes.lower import LowerPass
from tests.helpers import fill, relative

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 48}
IMAGE = {"image_size": 8, "patch_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # and what is absorbed in two layers
    "llama": ("LlamaModel", GATED, 6),
    "bert": ("BertModel", {**SMALL, **STILL}, 6),
    "gpt2": ("GPT2Model", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
                           "use_cache": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                           "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}, 6),
    "gemma2": ("Gemma2Model", {**GATED, "head_dim": 8}, 6),
    "phi3": ("Phi3Model", {**GATED, "pad_token_id": 0}, 6),
    "t5": ("T5EncoderModel", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48,
                              "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
                              "feed_forward_proj": "gated-gelu"}, 6),
    "vit": ("ViTModel", {**SMALL, **STILL, **IMAGE}, 6),
}  # fmt: skip
FEW = ("llama",)


class Lowering:
    """Decomposed as for Inductor, absorbed, lowered by definitions, and run eagerly."""

    def __init__(self, absorb: Absorb | None = None) -> None:
        self.report = engine.Report()
        passes = () if absorb is None else (absorb,)
        self.lower = LowerPass(CLAIMS, before=engine.GraphPasses(passes, self.report))

    def __call__(self, gm: Any, inputs: Any) -> Any:
        joint = engine.GraphPasses(JOINT, engine.Report())
        return dynamo.compile_aot(gm, inputs, self.lower, joint, dynamo.decompositions())

    @property
    def absorbed(self) -> int:
        return sum(s.rewrites for s in self.report.steps)

    @property
    def reasons(self) -> list[str]:
        return [r.reason for s in self.report.steps for r in s.refusals]


def trained(model: nn.Module, inputs: dict[str, Tensor], lower: Any, rule: Any) -> list[Tensor]:
    """The output and the gradients of all adapters."""
    torch._dynamo.reset()
    backend = Backend({"rules": [rule]}, lower)
    backend.bind(model, inputs)
    fill(peftfx.parameters(model))
    out = torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    out = getattr(out, "last_hidden_state", out)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out.float() * weights).sum().backward()
    found = [out.detach(), *(p.grad for p in peftfx.parameters(model))]
    peftfx.release(model)
    return found


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what attention gives, in any model, with the same results; in 16 bits."""
    monkeypatch.setenv("PEFTFX_FORMS", "absorbed")
    kind, options, count = MODELS[name]
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**options)).bfloat16()
    inputs = {"input_ids": torch.randint(0, 64, (2, 6))}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8).bfloat16()}
    rule = {"method": "lora", "role": ["attention", "mlp"], "rank": 3}
    ours = Lowering(Absorb())
    got = trained(model, inputs, ours, rule)
    assert ours.absorbed == count, ours.reasons
    assert all("neither a norm nor an activation" in r for r in ours.reasons)
    y, *gradients = (
        [ours, plain] for ours, plain in zip(got, trained(model, inputs, Lowering(), rule))
    )
    assert relative(*y) < 0.03
    both = [torch.cat([g[i].flatten() for g in gradients]) for i in range(2)]
    assert relative(*both) < 0.1  # rounded to 8 bits at other places


class Layer(nn.Module):
    """A layer as of a Llama, without attention."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm, self.other = (nn.RMSNorm(width, eps=1e-3) for _ in range(2))
        self.first = nn.Linear(width, width)
        self.gate, self.up = (nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        h = self.other(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


RULE = {"method": "lora", "name": "*", "except": ["norm", "other"], "rank": 3}


def train(width: int = 24, rule: Any = RULE, claims: Any = CLAIMS, **claim: Any) -> Any:
    """What :func:`trained` gives for a layer, and its lowering."""
    torch.manual_seed(0)
    ours = Lowering(Absorb(Shrink(**claim)))
    ours.lower.claims = claims
    return trained(Layer(width), {"x": torch.randn(2, 10, width)}, ours, rule), ours


def test_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's interpreter, forward and backward, as by the definitions, and as without."""
    expected, ours = train()
    assert not ours.absorbed and set(ours.reasons) == {"it is for GPUs, and this is on cpu"}
    monkeypatch.setenv("PEFTFX_FORMS", "absorbed")
    kernels = (Shrink(anywhere=True), Accumulate(), Definition())
    for form, claims in (("definition", CLAIMS), ("triton", kernels)):
        got, ours = train(claims=claims)
        assert ours.absorbed == 3 and not ours.reasons
        taken = {c.op: c.claim for c in ours.lower.choices if "shrink" in c.op}
        assert taken == {"norm_shrink": form, "gate_shrink": form}
        for one, other in zip(got, expected, strict=True):
            assert relative(one, other) < 1e-5


def test_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each site that is left has its reason."""
    assert "it is for GPUs, and this is on cpu" in str(train()[1].report)
    monkeypatch.setenv("PEFTFX_FORMS", "absorbed")
    assert set(train(rule={**RULE, "dropout": 0.1})[1].reasons) == {"dropout lies between it and A"}
    monkeypatch.setenv("PEFTFX_FORMS", "accumulate")
    assert set(train(anywhere=True)[1].reasons) == {"PEFTFX_FORMS orders accumulate"}
    monkeypatch.delenv("PEFTFX_FORMS")
    reasons = train(80, {**RULE, "rank": 70}, anywhere=True)[1].reasons
    assert "140 ranks read one x, a program holds 128" in reasons


def test_pays_where_arithmetic_puts_it() -> None:
    """On many rows, where what is normed lies in memory; not on a few, and not out of a loop."""

    def asked(rows: int, looped: bool = False, rank: int = 16) -> str | None:
        with FakeTensorMode(), assume("NVIDIA H200"):

            def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="cuda")

            x, outs = made(rows, 4096), (4096, 1024, 1024)
            A = [made(rank, 4096, dtype=torch.float32) for _ in outs]
            B = [made(n, rank, dtype=torch.float32) for n in outs]
            tail = (B, [None] * 3, [made(1)] * 3)
            weights = [made(n, 4096) for n in outs]
            group = (x, weights, [None] * 3, A, *tail)
            norm = (x, x, made(4096), None, A, 1e-5, 0.0, False, x.dtype)
            assert Shrink().check("norm_shrink", norm) is None
            return shrink.pays(
                ("low_rank_linear_group", group), (x, None, weights, [None] * 3, *tail),
                ("norm_shrink", norm), looped,
            )  # fmt: skip

    assert asked(8192) is None and asked(2048) is None
    assert "by itself at" in str(asked(1)) and "by itself at" in str(asked(16))
    assert "is made in one loop" in str(asked(8192, looped=True))
