"""The house: what lies where, what imports what, and what a wheel holds."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from peftfx.methods import lookup, names

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    f
    for top in ("peftfx", "passes", "kernels", "tests", "benchmarks", "examples")
    for f in sorted((ROOT / top).rglob("*.py"))
    if not {"passes", "kernels"} & set(f.relative_to(ROOT).parts[1:2])
    or f.relative_to(ROOT).parts[0] == "tests"
]


def test_top_level() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name.split("/")[0] for name in listed}
    assert top <= {
        "peftfx", "passes", "kernels", "tests", "benchmarks", "examples", "pyproject.toml",
        "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt",
        ".ci", ".gitignore",
    }  # fmt: skip


def test_links() -> None:
    for name in ("passes", "kernels"):
        link = ROOT / "peftfx" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_files_are_short() -> None:
    long = {str(f): n for f in SOURCES if (n := len(f.read_text().splitlines())) > MOST}
    assert not long


MOST = 430  # lines: about 400


def test_a_method_is_a_short_file() -> None:
    files = {Path(inspect.getfile(lookup(name))) for name in names()}
    assert statistics.median(len(f.read_text().splitlines()) for f in files) < 120


def test_no_pass_knows_a_method() -> None:
    """Passes and lowering ask a mark's key; none holds a method's name or reads its file."""
    allowed = {"peftfx.methods.method", "peftfx.methods.key"}
    for file in sorted((ROOT / "passes").rglob("*.py")):
        tree = ast.parse(file.read_text())
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not texts & {*names()} - {file.stem}, file  # a pass may have its own name
        read = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {m for m in read if m and m.startswith("peftfx.methods")} - allowed, file


def test_private_names_of_torch_are_in_one_file() -> None:
    private = "dynamo|inductor|functorch|subclasses|higher_order_ops"
    pattern = re.compile(rf"torch\._({private})|functorch")
    bypass = set((ROOT / "peftfx" / "bypass").glob("*.py"))
    allowed = {ROOT / "peftfx" / "dynamo.py", *bypass}
    found = [
        str(f)
        for f in SOURCES
        if f.relative_to(ROOT).parts[0] in ("peftfx", "passes", "kernels")
        and f not in allowed
        and pattern.search(f.read_text())
    ]
    assert not found


def test_import_is_light() -> None:
    code = (
        "import sys, peftfx; peftfx.Spec; "
        "heavy = {'transformers', 'triton', 'pydantic', 'ruamel.yaml', 'typer'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """A wheel with nothing but what it declares, used from another directory; what an sdist has."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "peftfx/__init__.py", "peftfx/py.typed", "peftfx/passes/insert.py",
        "peftfx/kernels/low_rank_linear/op.py", "peftfx/methods/lora.py", "peftfx/cli/show.py",
    ):  # fmt: skip
        assert needed in names
    assert not any(n.startswith(("passes/", "kernels/", "tests/")) for n in names)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as source:
        carried = {n.partition("/")[2] for n in source.getnames()}
    assert carried > {"tests/core/test_spec.py", "benchmarks/parts/marks.py", "Makefile"}
    assert not any(n.endswith(".pyc") for n in carried)
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests" / "smoke.py"), str(target)],
        check=True, cwd=tmp_path, env={"PYTHONPATH": str(target)},
    )  # fmt: skip


def test_readme_blocks() -> None:
    """Every Python block of README runs, in order, in one process."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    code = "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
