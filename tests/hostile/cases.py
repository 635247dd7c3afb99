"""What is fuzzed: saved adapters that are loaded, and spec files that are read and planned."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any, Protocol

import peft
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.errors import PeftfxError
from peftfx.methods.method import names
from peftfx.reading import read
from peftfx.select import SELECTORS
from peftfx.spec import Spec
from tests.helpers import fill
from tests.hostile import mutate
from tests.methods import ROWS

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.down = nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.v_proj(self.q_proj(x)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer(), nn.Linear(6, 3))


class Family(Protocol):
    """A kind of input. ``run`` says whether it was accepted; what it raises is the finding."""

    def change(self, random: Random) -> None:
        """Makes the case: files on disk."""
        ...

    def run(self, thorough: bool) -> bool:
        """Reads it. *thorough*: uses what was accepted, and looks at the model more closely."""
        ...


class Untouched:
    """A model that refused input must leave as it was."""

    def __init__(self) -> None:
        self.model = build()
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.modules = len(list(self.model.modules()))

    def check(self) -> None:
        """Raises :class:`AssertionError` where anything changed."""
        state = self.model.state_dict()
        assert not peftfx.is_adapted(self.model) and state.keys() == self.state.keys()
        assert all(torch.equal(v, self.state[k]) for k, v in state.items())
        assert all(p.requires_grad for p in self.model.parameters())
        assert len(list(self.model.modules())) == self.modules


LORA: dict[str, Any] = {"method": "lora", "name": ["*.q_proj", "*.v_proj"], "rank": 2,
                        "overrides": [{"name": "0.*", "rank": 3, "alpha": 7}]}  # fmt: skip
HEAD = {"method": "train", "name": "2"}
ADAPTERS: tuple[list[dict[str, Any]], ...] = (
    [LORA, HEAD],
    [LORA, {"method": "bitfit", "name": "*"}],
    [{"method": "dora", "name": "*.down", "rank": 2}],
    [{"method": "ia3", "name": ["*.q_proj", "*.down"]}],
    [{"method": "vera", "name": "*.down", "rank": 3}],
    [{"method": "lokr", "name": "*.q_proj", "rank": 1}],
    [{"method": "oft", "name": "*.q_proj", "block": 3}],
    [{"method": "sparse", "name": "*.down", "rank": 1}],
)


class Adapters:
    """Saved adapters; one file of one of them is not what was saved."""

    changes: str

    def __init__(self, root: Path) -> None:
        self.kept: list[tuple[Path, dict[str, bytes]]] = []
        self.untouched = Untouched()
        self.keys = _config_keys()
        for i, rules in enumerate(ADAPTERS):
            model = build()
            Backend({"rules": rules}, "eager").bind(model)
            fill(peftfx.parameters(model))
            for with_own in (True, False):
                directory = root / f"{i}{with_own}"
                peftfx.save(model, directory)
                if not with_own:  # as PEFT alone would have written it
                    (directory / "peftfx.json").unlink()
                files = {f.name: f.read_bytes() for f in sorted(directory.iterdir())}
                if self.name_in(files) is not None and len(files) > 1:
                    self.kept.append((directory, files))
        self.case, self.now = self.kept[0]
        assert self.run(False), "an adapter as it was saved is accepted"

    def name_in(self, files: dict[str, bytes]) -> str | None:
        """The file that is changed."""
        return next((n for n in files if n.endswith(self.changes)), None)

    def changed(self, random: Random, data: bytes) -> bytes:
        return mutate.text(random, data, self.keys)

    def change(self, random: Random) -> None:
        for name, data in self.kept_of(self.case).items():
            if self.now[name] != data:
                (self.case / name).write_bytes(data)
        self.case, files = random.choice(self.kept)
        name = self.name_in(files)
        assert name is not None
        self.now = {**files, name: self.changed(random, files[name])}
        (self.case / name).write_bytes(self.now[name])

    def kept_of(self, directory: Path) -> dict[str, bytes]:
        return next(files for path, files in self.kept if path == directory)

    def run(self, thorough: bool) -> bool:
        try:
            read(self.untouched.model, self.case)
            accepted = True
        except PeftfxError:
            accepted = False
        if thorough:
            self.load(accepted)
        assert {f.name: f.read_bytes() for f in self.case.iterdir()} == self.now, "files changed"
        return accepted

    def load(self, accepted: bool) -> None:
        """``peftfx.load`` says the same; what is loaded runs, and gives the base back."""
        model = self.untouched.model
        try:
            peftfx.load(model, self.case, compile=False)
        except PeftfxError:
            assert not accepted
        else:
            assert accepted and peftfx.is_adapted(model)
            with contextlib.suppress(PeftfxError):  # the first run may refuse it
                model(X)
            peftfx.release(model)
        self.untouched.check()


class Weights(Adapters):
    """The tensors."""

    changes = ".safetensors"

    def changed(self, random: Random, data: bytes) -> bytes:
        return mutate.safetensors(random, data)


class Configs(Adapters):
    """PEFT's configuration, alone or beside our own file."""

    changes = "adapter_config.json"


class Own(Adapters):
    """Our own file: the spec, and the base's fingerprint."""

    changes = "peftfx.json"


def _config_keys() -> tuple[str, ...]:
    kinds = (peft.LoraConfig, peft.IA3Config, peft.LoKrConfig, peft.OFTConfig)
    found = {key for kind in kinds for key in kind.__dataclass_fields__}
    return tuple(sorted({*found, "spec", "fingerprint", "rules", "values", "dtype", *SELECTORS}))


class Specs:
    """Spec files: every method's, in the three formats."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.untouched = Untouched()
        rules = [row.rule(lr=1e-3) for row in ROWS]
        rules += [LORA | {"layers": "last 2", "except": "0.*"}, {"method": "freeze", "name": "2"}]
        options = {key for rule in rules for key in rule}
        self.keys = tuple(sorted({*options, *SELECTORS, "strict", "dtype", "version", *names()}))
        self.kept: list[tuple[str, bytes]] = []
        for i in range(len(rules)):
            spec = Spec.parse({"rules": [rules[i], rules[i - 1], HEAD][: 1 + i % 3]})
            for ending in (".yaml", ".toml", ".json"):
                with tempfile.TemporaryDirectory() as directory:
                    file = Path(directory) / f"spec{ending}"
                    spec.dump(file)
                    self.kept.append((ending, file.read_bytes()))
        self.file = root / "spec.yaml"

    def change(self, random: Random) -> None:
        ending, data = random.choice(self.kept)
        action = random.randrange(3)
        if ending == ".json" or (ending == ".yaml" and action == 0):  # JSON is YAML
            data = random.choice([d for e, d in self.kept if e == ".json"])
            data = mutate.text(random, data, self.keys)
        elif action == 1:
            data = mutate.raw(random, data)
        else:
            data = mutate.lines(random, data)
        self.file = self.root / f"spec{ending}"
        self.file.write_bytes(data)

    def run(self, thorough: bool) -> bool:
        model = self.untouched.model
        before = self.file.read_bytes()
        try:
            spec = Spec.load(self.file)
        except PeftfxError:
            return False
        again = Spec.parse(json.loads(json.dumps(spec.to_dict())))
        assert again == spec, "a spec is what it writes"
        try:
            str(peftfx.plan(model, spec))
            if thorough:
                Backend(spec, "eager").bind(model, (X,))
                peftfx.release(model)
        except PeftfxError:
            pass
        if thorough:
            self.untouched.check()
        assert self.file.read_bytes() == before, "the file changed"
        return True


FAMILIES: dict[str, Any] = {"weights": Weights, "configs": Configs, "own": Own, "specs": Specs}
