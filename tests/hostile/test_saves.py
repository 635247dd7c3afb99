"""Saves that are killed, that find no room, that meet others: always one version, whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftfx
from peftfx import files
from peftfx.errors import CheckpointError, SaveError
from tests.hostile import kills
from tests.hostile.kills import NEW, OLD, SITUATIONS, content

PATH = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_killed_at_every_step() -> None:
    done = subprocess.run(  # a process of its own, which may fork
        [sys.executable, "-m", "tests.hostile.kills", "--count", "200"],
        env=PATH, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "200 saves killed" in done.stdout and "0 broken" in done.stdout


def attempt(target: Path, before: dict[str, bytes]) -> bool:
    """Whether a save found room; what is there is the new version then, else the old one."""
    try:
        files.write_directory(target, NEW)
    except SaveError as error:
        assert "written" in error.message
        assert content(target) == before
        found = False
    else:
        assert content(target) == {**before, **NEW}
        found = True
    assert [f.name for f in target.parent.iterdir()] == [target.name]
    return found


_LIMITED = """
import resource, sys
from pathlib import Path
from peftfx import files
from tests.hostile.test_saves import NEW, OLD, attempt
target = Path(sys.argv[1]) / "adapter"
files.write_directory(target, OLD)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
largest = max(map(len, NEW.values()))
for size in (*range(0, 8), 4095, 4096, 8191, 8192, largest - 1, largest):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    assert attempt(target, OLD) == (size >= largest), size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files.write_directory(target, OLD)
"""


def test_no_room_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """Files may not grow beyond a limit: the kernel cuts the write off there."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)],
        env=PATH, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


_DISK = """
import sys
from pathlib import Path
from peftfx import files
from tests.hostile.test_saves import NEW, OLD, attempt
parent = Path(sys.argv[1])
results = []
for pages in range(40):
    target = parent / "saves" / "adapter"
    target.parent.mkdir(exist_ok=True)
    files.write_directory(target, OLD)
    ballast = parent / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 4096)
        except OSError:
            pass
        stream.truncate(max(0, stream.tell() - pages * 4096))
    results.append(attempt(target, OLD))
    ballast.unlink()
assert not results[0] and results[-1] and results == sorted(results), results
print("room from", results.index(True), "pages on")
"""


def test_full_disk(tmp_path: Path) -> None:
    """A file system of 256 KiB, with so many pages left; where mounts are allowed."""
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("no right to mount")
    run = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", run, sys.executable, _DISK],
        env=PATH, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "link", "open", "rename"])
@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("exchange", [True, False])
def test_calls_that_find_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int, exchange: bool
) -> None:
    target = tmp_path / "adapter"
    files.write_directory(target, {**OLD, "foreign": b"kept"})
    count = 0
    real = getattr(os, call)

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        if not exchange:
            patch.setattr(files, "_rename", kills.no_exchange)
        try:
            files.write_directory(target, NEW)
            expected = NEW
        except SaveError as error:
            assert "No space" in error.message
            expected = OLD
    files.recover(target)  # as a reader does
    assert content(target) == {**expected, "foreign": b"kept"}


@pytest.mark.parametrize("exchange", [True, False])
def test_what_others_write_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Another process's files come, and are replaced, between the save's look and its exchange."""
    target = tmp_path / "adapter"
    files.write_directory(target, {**OLD, "state-0": b"before"})
    put = files._put

    def late(fresh: Path, into: Path) -> Path | None:
        (into / "state-1").write_bytes(b"new")
        (into / "other").write_bytes(b"after")
        (into / "other").replace(into / "state-0")
        return put(fresh, into)

    monkeypatch.setattr(files, "_put", late)
    if not exchange:
        monkeypatch.setattr(files, "_rename", kills.no_exchange)
    files.write_directory(target, NEW)
    assert content(target) == {**NEW, "state-0": b"after", "state-1": b"new"}
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


def test_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    files.write_directory(target, OLD)
    monkeypatch.setattr(files, "_rename", kills.no_exchange)
    files.write_directory(target, NEW)
    assert content(target) == NEW and len(list(tmp_path.iterdir())) == 1
    target.rename(tmp_path / ".adapter.peftfx-old-1-aa")  # killed between the two renames
    files.recover(target)
    assert content(target) == NEW


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SaveError):
            files.write_directory(target, NEW)
    assert (tmp_path / "file").read_text() == "x"


_READ_ONLY = """
import os, sys
from pathlib import Path
from peftfx import files
from peftfx.errors import SaveError
for name in ("adapter", "fresh", "below/fresh"):
    try:
        files.write_directory(Path(sys.argv[1]) / name, {"a": b"new"})
        raise SystemExit(f"{name} was written")
    except SaveError as error:
        assert "Read-only" in error.message, error
assert (Path(sys.argv[1]) / "adapter" / "a").read_bytes() == b"old"
"""


def test_read_only_disk(tmp_path: Path) -> None:
    """A file system mounted so that nothing can be written; where mounts are allowed."""
    mount = (
        f"mount -t tmpfs tmpfs {tmp_path} && mkdir {tmp_path}/adapter "
        f"&& printf old > {tmp_path}/adapter/a && mount -o remount,ro {tmp_path}"
    )
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("no right to mount")
    run = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", run, sys.executable, _READ_ONLY],
        env=PATH, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_calls_on_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    peftfx.adapt(model, {"rules": [{"method": "lora", "name": "*", "rank": 2}]}, lower="eager")
    peftfx.save(model, tmp_path / "adapter")
    held = content(tmp_path / "adapter")
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("mkdir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuses)
            with pytest.raises(SaveError, match="Read-only"):
                peftfx.save(model, tmp_path / "adapter")
    assert content(tmp_path / "adapter") == held
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


_SAVER = """
import sys, threading
from peftfx import files
from tests.hostile.kills import no_exchange
if sys.argv[4] == "no":
    files._rename = no_exchange
def save(name):
    for i in range(int(sys.argv[2])):
        mine = b"%d.%d " % (name, i)
        files.write_directory(sys.argv[1], {"a": mine * 2000, "b": mine})
threads = [threading.Thread(target=save, args=(int(sys.argv[3]) + k,)) for k in range(2)]
for t in threads: t.start()
for t in threads: t.join()
"""


def whole(target: Path) -> tuple[bytes, bytes]:
    return (target / "a").read_bytes(), (target / "b").read_bytes()


@pytest.mark.parametrize("exchange", ["yes", "no"])
def test_eight_savers(tmp_path: Path, exchange: str) -> None:
    """Four processes of two threads each, and a reader that never finds two versions mixed.

    Beside them lies a file of somebody else's, which stays through all saves.
    """
    target = tmp_path / "saves" / "adapter"
    files.write_directory(target, {"a": b"0 " * 2000, "b": b"0 ", "foreign": b"kept"})
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(target), "60", str(2 * i), exchange], env=PATH
        )
        for i in range(4)
    ]
    reads = 0
    while any(saver.poll() is None for saver in savers):
        a, b = files.read_whole(target, lambda: whole(target))
        assert a == b * 2000
        reads += 1
    assert [saver.returncode for saver in savers] == [0] * 4 and reads > 10
    a, b = whole(target)
    assert a == b * 2000 and b.endswith(b".59 ")
    assert (target / "foreign").read_bytes() == b"kept"
    assert [f.name for f in target.parent.iterdir()] == ["adapter"]


def test_a_reader_that_is_overtaken(tmp_path: Path) -> None:
    """What was read across a save is read again; forever overtaken, it says so."""
    target = tmp_path / "adapter"
    files.write_directory(target, OLD)
    seen: list[dict[str, bytes]] = []

    def overtaken() -> dict[str, bytes]:
        first = (target / "a").read_bytes()
        if not seen:
            files.write_directory(target, NEW)
        seen.append({"a": first, "b": (target / "b").read_bytes()})
        return seen[-1]

    assert files.read_whole(target, overtaken) == NEW
    assert seen[0] not in (OLD, NEW)

    def always() -> None:
        files.write_directory(target, OLD)

    with pytest.raises(CheckpointError, match="again and again"):
        files.read_whole(target, always)


def test_errors_of_one_version_are_told(tmp_path: Path) -> None:
    def missing() -> bytes:
        return (tmp_path / "nothing").read_bytes()

    with pytest.raises(FileNotFoundError):
        files.read_whole(tmp_path, missing)


@pytest.mark.parametrize("name", [s.name for s in SITUATIONS])
def test_the_next_save_takes_over(tmp_path: Path, name: str) -> None:
    """The harness itself: an unhurt save gives the version after."""
    situation = next(s for s in SITUATIONS if s.name == name)
    (tmp_path / "saves").mkdir()
    target = situation.lay(tmp_path / "saves")
    assert kills.steps_of(lambda: situation.save(target)) > 100
    assert situation.check(target)
