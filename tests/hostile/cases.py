"""What is fuzzed: adapters that are loaded, specs that are planned, jobs, pickles to convert."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any, Protocol

import peft
import torch
from torch import Tensor, nn

import peftfx
from peftfx.backends import Backend
from peftfx.converting import convert
from peftfx.errors import PeftfxError
from peftfx.methods.method import names
from peftfx.reading import read
from peftfx.select import SELECTORS
from peftfx.spec import Spec
from peftfx.tensors import read_header
from peftfx.training.job import Job, load_job, read_rows
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

    def change(self, random: Random) -> bytes | None:
        """Makes the case: files on disk. Gives a digest of it, None where nothing was changed."""
        ...

    def run(self, thorough: bool) -> bool:
        """Reads it. *thorough*: uses what was accepted, and looks at the model more closely."""
        ...


def digest(*parts: str | bytes) -> bytes:
    """What tells an input from others."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.digest()


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


def listing(directory: Path) -> dict[str, bytes]:
    """What a directory holds; of a link, where it leads."""
    return {
        f.name: str(f.readlink()).encode() if f.is_symlink() else f.read_bytes()
        for f in directory.iterdir()
    }


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
        self.case, self.before = self.kept[0]
        self.now = self.before
        assert self.run(False), "an adapter as it was saved is accepted"

    def name_in(self, files: dict[str, bytes]) -> str | None:
        """The file that is changed."""
        return next((n for n in files if n.endswith(self.changes)), None)

    def changed(self, random: Random, data: bytes) -> bytes:
        return mutate.text(random, data, self.keys)

    def change(self, random: Random) -> bytes | None:
        self.restore()
        self.case, self.before = random.choice(self.kept)
        name = self.name_in(self.before)
        assert name is not None
        self.now = {**self.before, name: self.changed(random, self.before[name])}
        (self.case / name).write_bytes(self.now[name])
        same = self.now[name] == self.before[name]
        return None if same else digest(self.case.name, self.now[name])

    def restore(self) -> None:
        """Puts back what the last case changed."""
        for name, data in self.before.items():
            if self.now.get(name) != data:
                (self.case / name).write_bytes(data)

    def run(self, thorough: bool) -> bool:
        try:
            read(self.untouched.model, self.case)
            accepted = True
        except PeftfxError:
            accepted = False
        if thorough:
            self.load(accepted)
        assert listing(self.case) == self.now, "files changed"
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


class Downloads(Adapters):
    """Directories as interrupted downloads leave them, or with files of other adapters."""

    def name_in(self, files: dict[str, bytes]) -> str | None:
        return next(iter(files))  # any

    def restore(self) -> None:
        for file in self.case.iterdir():
            file.unlink()
        for name, data in self.before.items():
            (self.case / name).write_bytes(data)

    def change(self, random: Random) -> bytes | None:
        self.restore()
        self.case, self.before = random.choice(self.kept)
        self.now = dict(self.before)
        links = set()
        for _ in range(random.randint(1, 2)):
            name = random.choice(sorted(self.now))
            links.discard(name)
            data, at = self.now.pop(name), random.random()
            cut = int(at * len(data))
            action = random.randrange(8)
            if action == 0:
                self.now[name] = data[:cut]
            elif action == 1:  # room was made, and not yet filled
                self.now[name] = data[:cut] + bytes(len(data) - cut)
            elif action == 2:
                self.now[f"{name}.incomplete"] = data[:cut]
            elif action == 3:  # into a store that was not downloaded
                self.now[name] = f"../../blobs/{at:.8f}".encode()
                links.add(name)
            elif action == 4:
                self.now[name] = data[:cut] + data[cut:].replace(b"\n", b"\r\n")
            elif action == 5:
                other = random.choice(self.kept)[1]
                self.now[name] = other.get(name) or other[random.choice(sorted(other))]
            elif action == 6:
                piece = 1 << random.randrange(4, 9)  # pieces that came out of order
                pieces = [data[i : i + piece] for i in range(0, len(data), piece)]
                random.shuffle(pieces)
                self.now[name] = b"".join(pieces)
            if not self.now:
                break
        for name in {*self.before, *self.now}:
            if self.now.get(name) != self.before.get(name):
                (self.case / name).unlink(missing_ok=True)
            if name in links:
                (self.case / name).symlink_to(self.now[name].decode())
            elif name in self.now and self.now[name] != self.before.get(name):
                (self.case / name).write_bytes(self.now[name])
        what = [part for name in sorted(self.now) for part in (name, self.now[name])]
        return None if self.now == self.before else digest(self.case.name, *what)


class Pickles:
    """PEFT's old pickles of tensors, which ``convert`` alone reads, by torch's own unpickler."""

    def __init__(self, root: Path) -> None:
        self.source, self.to = root / "source", root / "to"
        self.source.mkdir()
        (self.source / "adapter_config.json").write_text("{}")
        self.kept = []
        shared = torch.arange(12.0).reshape(3, 4)
        for value in (
            {"a.lora_A.weight": shared, "a.lora_B.weight": shared.T},
            {"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.zeros(0), "z": shared[1:, ::2]},
            {"x": nn.Parameter(shared), "n": torch.tensor(3)},
        ):
            for zipped in (True, False):
                stream = io.BytesIO()
                torch.save(value, stream, _use_new_zipfile_serialization=zipped)
                self.kept.append(stream.getvalue())
        self.data = b""

    def change(self, random: Random) -> bytes | None:
        before = random.choice(self.kept)
        if random.randrange(3):
            self.data = mutate.raw(random, before)
        else:  # another class, or another function, where one is named
            word = random.choice((b"_rebuild_tensor_v2", b"FloatStorage", b"torch._utils", b"cpu"))
            new = random.choice((b"os", b"posix", b"system", b"torch", b"builtins", b"eval", b"x"))
            at = before.find(word, random.randrange(len(before)))
            new = (new + b"_" * len(word))[: len(word)] if random.randrange(2) else new
            self.data = before if at < 0 else before[:at] + new + before[at + len(word) :]
            self.data = mutate.raw(random, self.data) if random.randrange(2) else self.data
        (self.source / "adapter_model.bin").write_bytes(self.data)
        return None if self.data == before else digest(self.data)

    def run(self, thorough: bool) -> bool:
        try:
            convert(self.source, self.to)
        except PeftfxError:
            assert not self.to.exists(), "nothing is written of what is refused"
            return False
        finally:
            files = listing(self.source)
            assert files == {"adapter_config.json": b"{}", "adapter_model.bin": self.data}
        read_header(self.to / "adapter_model.safetensors")
        shutil.rmtree(self.to)
        return True


class Jobs:
    """Job files, and the tables of texts and labels that they name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        job = {"model": "base", "train": "train.csv", "evaluate": "rows.jsonl", "output": "out",
               "spec": "spec.yaml", "epochs": 2, "learning_rate": 1e-3, "patience": 3,
               "lower": "eager", "compile": False}  # fmt: skip
        rows = [{"text": f'some "text", {i}', "label": "ab"[i % 2]} for i in range(6)]
        lines = [f"{k}: {json.dumps(v)}" for k, v in job.items()]
        self.keys = tuple(Job.model_fields)
        self.kept = {
            "job.json": json.dumps(job).encode(),
            "job.yaml": "\n".join(lines).encode(),
            "job.toml": "\n".join(f"{k} = {json.dumps(v)}" for k, v in job.items()).encode(),
            "rows.csv": b"text,label\n" + b"".join(b'"a ""b"", %d",x\n' % i for i in range(6)),
            "rows.jsonl": "\n".join(json.dumps(row) for row in rows).encode(),
        }
        self.file, self.data = root / "job.json", b""

    def change(self, random: Random) -> bytes | None:
        name = random.choice(sorted(self.kept))
        before = self.kept[name]
        if name == "job.json":
            self.data = mutate.text(random, before, self.keys)
        elif random.randrange(2):
            self.data = mutate.raw(random, before)
        else:
            self.data = mutate.lines(random, before)
        self.file = self.root / name
        self.file.write_bytes(self.data)
        return None if self.data == before else digest(name, self.data)

    def run(self, thorough: bool) -> bool:
        try:
            if self.file.stem == "job":
                load_job(self.file)
            else:
                rows = read_rows(str(self.file), "text", "label")
                assert rows and all(text and label for text, label in rows)
        except PeftfxError:
            return False
        finally:
            assert self.file.read_bytes() == self.data, "the file changed"
        return True


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

    def change(self, random: Random) -> bytes | None:
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
        return None if (ending, data) in self.kept else digest(ending, data)

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


FAMILIES: dict[str, Any] = {
    "weights": Weights, "configs": Configs, "own": Own, "downloads": Downloads, "specs": Specs,
    "jobs": Jobs, "pickles": Pickles,
}  # fmt: skip
