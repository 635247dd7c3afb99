"""Directories that are written whole or not at all.

A save writes a new directory beside the old one, syncs it to disk and exchanges the two in one
step. Where the file system knows no such exchange there are two renames, and savers take turns by a
lock. Killed at any moment, or on a full disk, it leaves the old version or the new one, never a
mixture. What else the directory holds (a trainer's state, a README) goes into the new one by link.
Who reads one file after another takes :func:`read_whole`, lest a save come between the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from peftfx.errors import CheckpointError, PeftfxError, SaveError

T = TypeVar("T")
TRIES = 16

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_NEW, _OLD = ".peftfx-new-", ".peftfx-old-"


def write_directory(
    directory: str | os.PathLike[str], files: Mapping[str, bytes], without: Sequence[str] = ()
) -> None:
    """Makes *directory* hold *files*; those that it had of these names are replaced together.

    Args:
        without: names of files of an older version that must not stay beside the new ones.

    Raises:
        SaveError: the directory cannot be written. What was there is still whole.
    """
    target = Path(os.path.abspath(directory))
    if target.exists() and not target.is_dir():
        raise SaveError("the path is a file", where=str(target), remedy="name a directory")
    fresh: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent):
            _recover(target)
            _sweep(target)
        fresh = target.parent / f".{target.name}{_NEW}{os.getpid()}-{secrets.token_hex(4)}"
        fresh.mkdir()
        for name, data in files.items():
            _write(fresh / name, data)
        with _alone(target.parent):
            _recover(target)
            if target.is_dir():
                _keep_others(target, fresh, {*files, *without})
            _sync(fresh)
            old = _put(fresh, target)
            try:
                _sync(target.parent)
            except OSError:
                _take_back(fresh, target, old)
                raise
            if old is not None:
                _bring_late(old, target, {*files, *without})
    except OSError as error:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        raise SaveError(
            f"the directory cannot be written: {error.strerror or error}",
            where=str(target),
            remedy="free space or choose another place; what was there before is whole",
        ) from error
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file opened for reading. Pipes and devices are refused: reading them may never end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    handle = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    )  # a pipe has nobody to wait for
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(handle, "rb")


def read_whole(directory: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """What *read* gives, all of one version of a directory that a save may replace meanwhile.

    Raises:
        CheckpointError: it was replaced at every try.
    """
    for _ in range(TRIES):
        before = _version(directory)
        if before is None:  # a save without an exchange is between its two renames, or was killed
            recover(directory)
            before = _version(directory)
        try:
            found = read()
        except (PeftfxError, OSError):
            if _version(directory) == before:
                raise
        else:
            if _version(directory) == before:
                return found
    raise CheckpointError(
        "saves replaced the directory again and again while it was read",
        where=os.fspath(directory),
        remedy="load it once the saving pauses",
    )


def _version(directory: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = os.stat(directory)
    except (OSError, ValueError):  # a path that no file can have
        return None
    return status.st_ino, status.st_ctime_ns


def recover(directory: str | os.PathLike[str]) -> None:
    """Puts a version back that a killed save, on a system without an exchange, had moved aside."""
    with contextlib.suppress(OSError, ValueError):  # what cannot be put back is not there
        target = Path(os.path.abspath(directory))
        if not target.exists():
            with _alone(target.parent):
                _recover(target)


def _recover(target: Path) -> None:
    kept = [] if target.exists() else sorted(target.parent.glob(f".{_escaped(target.name)}{_OLD}*"))
    if kept:
        os.rename(kept[-1], target)


@contextlib.contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Keeps other savers in *parent* out of the block; a process that dies lets them in.

    Where the file system knows no locks, savers side by side are on their own.
    """
    handle = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep_others(target: Path, fresh: Path, ours: set[str]) -> None:
    """Links what *target* holds beside *ours* into *fresh*."""
    for entry in sorted(target.iterdir()):
        if entry.name in ours:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, copy_function=_link, symlinks=True)
        else:
            _link(entry, fresh / entry.name)


def _bring_late(old: Path, target: Path, ours: set[str]) -> None:
    """Moves what others put into *old* after :func:`_keep_others` looked.

    So does a trainer of several processes: the first one saves, and all leave their random state.
    """
    for entry in old.iterdir():
        there = target / entry.name
        if entry.name in ours or (entry.is_dir() and there.exists()):
            continue
        if not os.path.lexists(there) or not os.path.samestat(entry.lstat(), there.lstat()):
            os.replace(entry, there)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, destination, follow_symlinks=False)


def _put(fresh: Path, target: Path) -> Path | None:
    """Puts *fresh* in the place of *target*; gives where the old version is now, if any."""
    if not target.exists():
        try:
            _rename(fresh, target, _NOREPLACE)
            return None
        except FileExistsError:
            pass  # another save came first: exchange with it
    try:
        _rename(fresh, target, _EXCHANGE)
        return fresh
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    # no exchange here: between the two renames the old version is found by `recover`
    old = target.parent / f".{target.name}{_OLD}{os.getpid()}-{secrets.token_hex(4)}"
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise
    return old


def _take_back(fresh: Path, target: Path, old: Path | None) -> None:
    """Undoes :func:`_put`."""
    if old == fresh:
        _rename(fresh, target, _EXCHANGE)
        return
    os.rename(target, fresh)
    if old is not None:
        os.rename(old, target)


def _rename(source: Path, target: Path, flag: int) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        if flag == _NOREPLACE and not target.exists():
            os.rename(source, target)
            return
        raise OSError(errno.ENOSYS, "no renameat2")
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) != 0:
        number = ctypes.get_errno()
        if flag == _NOREPLACE and number in (errno.EINVAL, errno.ENOSYS):
            os.rename(source, target)
            return
        raise OSError(number, os.strerror(number), str(target))


def _sweep(target: Path) -> None:
    """Removes what killed saves of this directory left; those of living processes stay."""
    for mark in (_NEW, _OLD) if target.exists() else (_NEW,):
        for entry in target.parent.glob(f".{_escaped(target.name)}{mark}*"):
            pid = entry.name.rpartition(mark)[2].partition("-")[0]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
