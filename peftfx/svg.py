"""A directed graph of boxes as SVG: drawn in layers from top to bottom, edges past the boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import networkx as nx

_LINE, _PAD, _GAP, _RISE, _LANE = 15, 8, 26, 34, 18  # px
_CHAR, _BOLD = 6.2, 7.0  # px a letter of the two sizes of text
_SWEEPS = 8
_STYLE = """
text { font-family: ui-sans-serif, Helvetica, Arial, sans-serif; text-anchor: middle; }
.role { font-size: 12px; font-weight: 600; fill: #1b1f24; }
.line { font-size: 11px; fill: #57606a; }
.note { font-size: 11px; font-weight: 600; fill: #9a3412; }
.title { font-size: 14px; font-weight: 600; fill: #1b1f24; }
rect { fill: #f6f8fa; stroke: #8c959f; }
rect.adapted { fill: #ffe8cc; stroke: #e8590c; stroke-width: 2; }
rect.plain { fill: none; stroke: none; }
path { fill: none; stroke: #8c959f; stroke-width: 1.3; }
"""


@dataclass(frozen=True)
class Box:
    """A node: what it is, lines about it, and what is done to it."""

    heads: tuple[str, ...]
    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    plain: bool = False  # without a frame

    @property
    def width(self) -> float:
        widths = [len(t) * _BOLD for t in self.heads + self.notes]
        return max([*widths, *(len(t) * _CHAR for t in self.lines), 24]) + 2 * _PAD

    @property
    def height(self) -> float:
        return _LINE * len(self.heads + self.lines + self.notes) + 2 * _PAD - 4


Slot = tuple[int, int]  # a node and a row: its own, or one that edges of it pass through


def svg(title: str, graph: nx.DiGraph[int], boxes: Mapping[int, Box]) -> str:
    """*graph*, which has no cycles, with a box for each node."""
    drawing = _Layers(graph, boxes)
    drawing.order()
    drawing.place()
    parts = [*map(drawing.edge, drawing.edges), *map(drawing.box, graph)]
    inner, height = drawing.size()
    width = max(inner, len(title) * 8.0 + 2 * _GAP)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height + 40:.0f}" '
        f'width="{width:.0f}" height="{height + 40:.0f}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" style="fill:#8c959f"/>'
        "</marker></defs>",
        '<rect width="100%" height="100%" style="fill:white;stroke:none"/>',
        f'<text class="title" x="{width / 2:.0f}" y="24">{escape(title)}</text>',
        f'<g transform="translate({(width - inner) / 2:.0f},40)">', *parts, "</g></svg>\n",
    ])  # fmt: skip


class _Layers:
    """Where the boxes are: Sugiyama's method, with barycentres for order and for place."""

    def __init__(self, graph: nx.DiGraph[int], boxes: Mapping[int, Box]) -> None:
        self.boxes = boxes
        self.row = _rows(graph)
        self.edges = [
            [(a, r) for r in range(self.row[a], self.row[b])] + [(b, self.row[b])]
            for a, b in graph.edges
        ]
        self.beside: dict[Slot, set[Slot]] = {(n, r): set() for n, r in self.row.items()}
        for way in self.edges:
            for a, b in pairwise(way):
                self.beside.setdefault(a, set()).add(b)
                self.beside.setdefault(b, set()).add(a)
        count = max(self.row.values(), default=-1) + 1
        self.rows = [[s for s in self.beside if s[1] == r] for r in range(count)]
        self.x: dict[Slot, float] = {}
        self.heights = [max(boxes[n].height for n, r in self.row.items() if r == at)
                        for at in range(count)]  # fmt: skip

    def order(self) -> None:
        """Sorts each row by the mean position of what its slots are joined to."""
        for row in self.rows:
            self.x.update({slot: float(i) for i, slot in enumerate(row)})
        for sweep in range(_SWEEPS):
            down = sweep % 2 == 0
            for row in self.rows if down else reversed(self.rows):
                row.sort(key=lambda slot: self._mean(slot, slot[1] + (-1 if down else 1)))
                self.x.update({slot: float(i) for i, slot in enumerate(row)})

    def place(self) -> None:
        """Gives each slot the x that its neighbours pull it to, in order and apart."""
        for row in self.rows:
            self._spread(row, [0.0] * len(row))
        for sweep in range(4 * _SWEEPS):
            for row in self.rows if sweep % 2 else reversed(self.rows):
                self._spread(row, [self._mean(slot) for slot in row])
        left = min(self.x[s] - self._width(s) / 2 for s in self.x)
        self.x = {slot: x - left + _GAP for slot, x in self.x.items()}

    def _mean(self, slot: Slot, row: int | None = None) -> float:
        near = {s: self._pull(slot, s) for s in self.beside[slot] if row in (None, s[1])}
        whole = sum(near.values())
        return sum(self.x[s] * pull for s, pull in near.items()) / whole if near else self.x[slot]

    def _pull(self, slot: Slot, other: Slot) -> float:
        """Edges that pass by are straight; boxes keep to the boxes that they are joined to."""
        if self._real(slot):
            return 1.0 if self._real(other) else 0.1
        return 1.0 if self._real(other) else 8.0

    def _spread(self, row: list[Slot], wanted: list[float]) -> None:
        x: list[float] = []
        for i, slot in enumerate(row):
            least = wanted[i]
            if i:
                apart = (self._width(slot) + self._width(row[i - 1])) / 2 + _GAP
                least = max(least, x[-1] + apart)
            x.append(least)
        shift = sum(w - v for w, v in zip(wanted, x, strict=True)) / max(len(row), 1)
        self.x.update({slot: v + shift for slot, v in zip(row, x, strict=True)})

    def _width(self, slot: Slot) -> float:
        return self.boxes[slot[0]].width if self._real(slot) else _LANE

    def _real(self, slot: Slot) -> bool:
        return self.row[slot[0]] == slot[1]

    def size(self) -> tuple[float, float]:
        right = max(self.x[s] + self._width(s) / 2 for s in self.x)
        return right + _GAP, self._top(len(self.rows))

    def _top(self, row: int) -> float:
        return sum(self.heights[:row]) + _RISE * row

    def _span(self, slot: Slot) -> tuple[float, float]:
        """The y that edges enter and leave at."""
        top, height = self._top(slot[1]), self.heights[slot[1]]
        if not self._real(slot):
            return top, top + height
        middle, half = top + height / 2, self.boxes[slot[0]].height / 2
        return middle - half, middle + half

    def edge(self, way: list[Slot]) -> str:
        x, y = self.x[way[0]], self._span(way[0])[1]
        text = f"M{x:.1f},{y:.1f}"
        for slot in way[1:]:
            to, (top, bottom) = self.x[slot], self._span(slot)
            middle = (y + top) / 2
            text += f" C{x:.1f},{middle:.1f} {to:.1f},{middle:.1f} {to:.1f},{top:.1f}"
            if not self._real(slot):
                text += f" V{bottom:.1f}"
            x, y = to, bottom
        return f'<path d="{text}" marker-end="url(#tip)"/>'

    def box(self, node: int) -> str:
        box, slot = self.boxes[node], (node, self.row[node])
        x, (top, _) = self.x[slot], self._span(slot)
        style = "plain" if box.plain else "adapted" if box.notes else ""
        parts = [
            f'<g><rect class="{style}" x="{x - box.width / 2:.1f}" y="{top:.1f}" '
            f'width="{box.width:.1f}" height="{box.height:.1f}" rx="6"/>'
        ]
        texts = [("role", box.heads), ("line", box.lines), ("note", box.notes)]
        y = top + _PAD + 8
        for kind, text in ((kind, t) for kind, lines in texts for t in lines):
            parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')
            y += _LINE
        return "".join([*parts, "</g>"])


def _rows(graph: nx.DiGraph[int]) -> dict[int, int]:
    """The row of each node, as low as what it goes to allows."""
    row: dict[int, int] = {}
    for depth, nodes in enumerate(nx.topological_generations(graph)):
        row.update(dict.fromkeys(nodes, depth))
    for node in reversed(list(nx.topological_sort(graph))):
        row[node] = min((row[n] - 1 for n in graph.successors(node)), default=row[node])
    return row
