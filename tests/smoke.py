"""What a wheel has to be able to do where nothing else is installed than what it declares.

``tests/test_house.py`` runs it from another directory, with the wheel alone on the path. Packages
that the wheel does not ask for, nor what it asks for, cannot be imported.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any


def declared(name: str, found: set[str]) -> set[str]:
    """The distributions that *name* needs, extras left out; itself among them."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name not in found:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            return found  # for another platform
        found.add(name)
        for need in needs:
            if "extra ==" not in need:
                declared(re.split(r"[^\w.-]", need)[0], found)
    return found


class Installed:
    """Finds modules as Python does, but for those of distributions that are not declared."""

    def __init__(self) -> None:
        allowed = declared("peftfx", set())
        self.hidden = {
            top
            for top, owners in metadata.packages_distributions().items()
            if not {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & allowed
        }
        self.finders = list(sys.meta_path)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.hidden:
            return None
        found = (f.find_spec(name, path, target) for f in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context: Any) -> Any:
        return metadata.MetadataPathFinder.find_distributions(*context)


def main(site: str) -> None:
    sys.meta_path[:] = [Installed()]  # type: ignore[list-item]
    for name in ("transformers", "peft", "pytest"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} is in the way")

    import torch

    import peftfx

    assert peftfx.__file__.startswith(site), peftfx.__file__
    spec = {"rules": [{"method": "lora", "name": "*", "rank": 2}]}
    x = torch.ones(2, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    options = {"spec": spec, "lower": "aot_eager"}
    compiled = torch.compile(model, backend="peftfx", options=options, fullgraph=True)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in peftfx.parameters(model))
    with torch.no_grad():
        for p in peftfx.parameters(model):
            p.add_(0.1)
    with tempfile.TemporaryDirectory() as directory:
        peftfx.save(model, directory)
        fresh = torch.nn.Sequential(torch.nn.Linear(4, 3))
        with peftfx.disabled(model):
            fresh.load_state_dict(model.state_dict())
        peftfx.load(fresh, directory, compile=False)
        assert torch.allclose(fresh(x), compiled(x))
    for arguments in (["methods"], ["help", "BindError"], ["schema", "schema.json"]):
        command = [sys.executable, "-P", "-c", "from peftfx.cli import main; main()", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert Path("schema.json").stat().st_size > 1000


if __name__ == "__main__":
    main(sys.argv[1])
