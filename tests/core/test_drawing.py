"""The picture of a layer: what is in it, what is filled, what is refused."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations

import networkx as nx
import pytest

import peftfx
from peftfx.errors import PlanError
from peftfx.svg import Box, svg
from tests.architectures import by_name

LORA = {"rules": [{"method": "lora", "role": ["attention.query", "cross_attention.value"]}]}
SVG = "{http://www.w3.org/2000/svg}"


def boxes_of(text: str) -> list[tuple[str, ...]]:
    """The lines of each box, and whether it is filled."""
    groups = [g for g in ET.fromstring(text).iter(f"{SVG}g") if g.find(f"{SVG}rect") is not None]
    return [
        (str(g.find(f"{SVG}rect").get("class")), *(t.text or "" for t in g.iter(f"{SVG}text")))  # type: ignore[union-attr]
        for g in groups
    ]


def test_one_layer_of_a_decoder() -> None:
    arch = by_name("t5")
    found = boxes_of(peftfx.picture(arch.build(), LORA, arch.example(), layer=1, stack="decoder"))
    lora = "lora (rule 0)"
    assert ("adapted", "attention.query", "layer.0.SelfAttention.q", "24×24", lora) in found
    assert ("adapted", "cross_attention.value", "layer.1.EncDecAttention.v", "24×24", lora) in found
    assert ("", "mlp.down", "layer.2.DenseReluDense.wo", "24×40") in found
    assert ("plain", "from encoder.final_layer_norm", "2×9×24") in found
    assert [b[0] for b in found].count("adapted") == 2
    assert [b[1] for b in found].count("+") == 3  # self attention, cross attention, feed-forward
    heads = {b[1] for b in found}
    assert {"input", "output", "norm", "attention", "relu"} <= heads


def test_fused_and_gated() -> None:
    arch = by_name("phi3")
    spec = {"rules": [{"method": "lora", "role": "mlp.down", "layers": 1}]}
    text = peftfx.picture(arch.build(), spec, arch.example())
    assert "model.layers.1 (Phi3DecoderLayer)" in text  # the first that is adapted
    found = boxes_of(text)
    parts = ("attention.query", "attention.key", "attention.value")
    assert ("", *parts, "self_attn.qkv_proj", "64×32") in found
    assert ("", "mlp.up", "mlp.gate", "mlp.gate_up_proj", "88×32") in found


def test_what_acts_on_an_output_is_a_box_behind_it() -> None:
    arch = by_name("qwen3-moe")
    spec = {"rules": [{"method": "bottleneck", "role": "residual.mlp"}]}
    found = boxes_of(peftfx.picture(arch.build(), spec, arch.example()))
    assert ("adapted", "bottleneck", "mlp", "mlp", "residual.mlp", "rule 0") in found
    assert [b[0] for b in found].count("adapted") == 1
    assert {"router", "experts", "topk"} <= {b[1] for b in found}


def test_a_model_without_layers_is_drawn_whole() -> None:
    arch = by_name("packed")
    spec = {"rules": [{"method": "lora", "role": "mlp.up"}]}
    heads = [b[1] for b in boxes_of(peftfx.picture(arch.build(), spec, arch.example()))]
    assert {"attention.query", "mlp.up", "mlp.down", "head"} <= set(heads)


def test_what_is_not_there_is_refused() -> None:
    arch = by_name("t5")
    with pytest.raises(PlanError, match=r"no layer 7 in stack decoder(.|\n)*decoder\.block\.1"):
        peftfx.picture(arch.build(), LORA, arch.example(), layer=7, stack="decoder")


def test_boxes_do_not_overlap_and_edges_go_down() -> None:
    graph: nx.DiGraph[int] = nx.gnp_random_graph(30, 0.12, seed=3, directed=True)
    graph = nx.DiGraph((a, b) for a, b in graph.edges if a < b)
    boxes = {n: Box((f"<{n}>" * (1 + n % 4),)) for n in graph}
    root = ET.fromstring(svg("a & b", graph, boxes))
    rects = [g.find(f"{SVG}rect") for g in root.iter(f"{SVG}g")]
    spans = [
        tuple(float(r.get(k, "")) for k in ("x", "y", "width", "height"))
        for r in rects if r is not None
    ]  # fmt: skip
    assert len(spans) == len(graph)
    for (x, y, w, h), (u, v, m, n) in combinations(spans, 2):
        assert x + w <= u or u + m <= x or y + h <= v or v + n <= y
    ways = [p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("marker-end")]
    assert len(ways) == graph.number_of_edges()
    for way in ways:
        ys = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", way)]
        assert ys == sorted(ys)
