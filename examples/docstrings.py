"""Builds a text classification set from the docstrings of installed packages.

The label is the package; its own name is masked. Train and test come from different modules, and
no text is in both.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PACKAGES = {
    "numpy": ("numpy", "np"),
    "torch": ("torch", "pytorch"),
    "networkx": ("networkx", "nx"),
    "sklearn": ("sklearn", "scikit-learn", "scikit"),
    "matplotlib": ("matplotlib", "mpl", "pyplot", "plt"),
    "transformers": ("transformers", "huggingface", "hugging"),
    "scipy": ("scipy",),
}
KINDS = ("function", "class")


@dataclass(frozen=True)
class Split:
    """Which texts a file has: of which modules and kinds, and how many of each package."""

    modules: Literal["train", "test"]
    count: int
    kinds: tuple[str, ...] = KINDS


# whole batches of 32, so that nothing compiles for a rest
SPLITS = {"train": Split("train", 352), "test": Split("test", 64)}


@dataclass(frozen=True)
class Text:
    """A docstring: the module it is from, what it describes, and itself."""

    module: str
    kind: str
    doc: str

    @property
    def order(self) -> bytes:
        """A key that shuffles, always alike."""
        return hashlib.sha256((self.module + self.doc).encode()).digest()

    @property
    def modules(self) -> str:
        """Whether its module is one to train or to test with."""
        first = hashlib.sha256(self.module.encode()).digest()[0]
        return "test" if first < 64 else "train"


@functools.cache
def texts(package: str) -> tuple[Text, ...]:
    """The docstring of every function and class of an installed package, shuffled."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ()
    root = Path(spec.origin).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        module = str(file.relative_to(root))
        if "test" in module:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates, and files for other versions of Python
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                doc = ast.get_docstring(node) or ""
                if len(doc) >= 80:
                    kind = "class" if isinstance(node, ast.ClassDef) else "function"
                    found.append(Text(module, kind, doc))
    return tuple(sorted(found, key=lambda text: text.order))


def mask(text: str, names: tuple[str, ...]) -> str:
    """The text in one line, without the package's names."""
    pattern = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    text = re.sub(rf"(?i)(?<![a-z])({pattern})(?![a-z])", "package", text)
    return re.sub(r"\s+", " ", text).strip()[:600]


def build(
    directory: Path,
    splits: Mapping[str, Split] = SPLITS,
    classes: int = 5,
    among: Iterable[str] = PACKAGES,
) -> dict[str, int]:
    """Writes a CSV for each split; gives the number of texts in each.

    Args:
        classes: how many packages; the first *among* these that have texts enough.
    """
    rows: dict[str, list[tuple[str, str]]] = {name: [] for name in splits}
    seen: set[str] = set()
    taken = 0
    for package in among:
        chosen: dict[str, list[str]] = {name: [] for name in splits}
        for found in texts(package):
            text = mask(found.doc, PACKAGES[package])
            if text in seen:
                continue
            seen.add(text)
            for name, split in splits.items():
                fits = found.modules == split.modules and found.kind in split.kinds
                if fits and len(chosen[name]) < split.count:
                    chosen[name].append(text)
                    break
        if any(len(chosen[name]) < split.count for name, split in splits.items()):
            continue  # too small an installation of it to learn from
        for name, of_package in chosen.items():
            rows[name] += [(text, package) for text in of_package]
        taken += 1
        if taken == classes:
            break
    else:
        raise SystemExit(f"fewer than {classes} of {', '.join(among)} have texts enough")
    for name, labelled in rows.items():
        write(directory / f"{name}.csv", ("text", "label"), labelled)
    return {name: len(labelled) for name, labelled in rows.items()}


def build_pairs(file: Path, count: int, packages: Iterable[str]) -> int:
    """Writes *count* first sentences of held-out docstrings of each package, with what follows.

    Gives the number of pairs. No first sentence is there twice.
    """
    pairs: dict[str, str] = {}
    for package in packages:
        before = len(pairs)
        for found in texts(package):
            first, _, rest = mask(found.doc, PACKAGES[package]).partition(". ")
            if found.modules == "test" and len(first) >= 30 and len(rest) >= 80:
                pairs.setdefault(first, rest)
            if len(pairs) == before + count:
                break
        else:
            raise SystemExit(f"{package} has fewer than {count} such docstrings")
    write(file, ("first", "rest"), list(pairs.items()))
    return len(pairs)


def write(file: Path, columns: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    """A CSV of *rows*, shuffled."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(sorted(rows, key=_shuffled))


def _shuffled(row: tuple[str, str]) -> bytes:
    return hashlib.sha256(row[0].encode()).digest()
