"""Builds a text classification set from the docstrings of installed packages.

The label is the package; its own name is masked. Train and test come from different modules, and
no text is in both.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.util
import re
from pathlib import Path

PACKAGES = {
    "numpy": ("numpy", "np"),
    "torch": ("torch", "pytorch"),
    "networkx": ("networkx", "nx"),
    "sklearn": ("sklearn", "scikit-learn", "scikit"),
    "matplotlib": ("matplotlib", "mpl", "pyplot", "plt"),
    "transformers": ("transformers", "huggingface", "hugging"),
    "scipy": ("scipy",),
}


def texts(package: str) -> list[tuple[str, str]]:
    """(module path, docstring) of every function and class of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
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
                    found.append((module, doc))
    return found


def mask(text: str, names: tuple[str, ...]) -> str:
    """The text in one line, without the package's names."""
    pattern = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    text = re.sub(rf"(?i)(?<![a-z])({pattern})(?![a-z])", "package", text)
    return re.sub(r"\s+", " ", text).strip()[:600]


def build(directory: Path, train: int = 352, test: int = 64, classes: int = 5) -> dict[str, int]:
    """Writes ``train.csv`` and ``test.csv``; gives the number of texts in each.

    Args:
        train, test: texts of each class; whole batches of 32, so that nothing compiles for a rest.
        classes: how many packages; the first that have texts enough.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    seen: set[str] = set()
    for package, names in PACKAGES.items():
        chosen: dict[str, list[str]] = {"train": [], "test": []}
        ordered = sorted(texts(package), key=lambda t: hashlib.sha256("".join(t).encode()).digest())
        for module, doc in ordered:
            text = mask(doc, names)
            if text in seen:
                continue
            seen.add(text)
            side = "test" if hashlib.sha256(module.encode()).digest()[0] < 64 else "train"
            if len(chosen[side]) < (train if side == "train" else test):
                chosen[side].append(text)
        if len(chosen["train"]) < train or len(chosen["test"]) < test:
            continue  # too small an installation of it to learn from
        for side, found in chosen.items():
            rows[side] += [(text, package) for text in found]
        if len(rows["train"]) == classes * train:
            break
    else:
        raise SystemExit(f"fewer than {classes} of {', '.join(PACKAGES)} have texts enough")
    for side, found in rows.items():
        found.sort(key=lambda t: hashlib.sha256(t[0].encode()).digest())
        with (directory / f"{side}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "label"))
            writer.writerows(found)
    return {side: len(found) for side, found in rows.items()}
