"""The directory beside the output in which a corpus is made, and which a killed command leaves for the next one.

What it holds, each file complete or absent::

    .OUTPUT.preparing/request.json      whose work this is
    .OUTPUT.preparing/*.npz             finished chunks of the passes
    .OUTPUT.preparing/tokenizer/        the tokenizer, once there is one
    .OUTPUT.preparing/corpus/           becomes OUTPUT by one rename
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_slm.errors import DataError

REQUEST_NAME = "request.json"
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ResumableError(DataError):
    """What has stopped the work was not the input; the same command goes on where it stopped."""


class Wanted(Protocol):
    """What was asked for: a request, of a corpus or of examples."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""

    def differences(self, found: Mapping[str, Any]) -> str:
        """Where the stored request ``found`` asked for something else; empty when it is equal."""


class Staging:
    """A locked staging directory. Made by :func:`open_staging`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.corpus = directory / "corpus"

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays saved under ``name``, or None where there are none, or no whole ones."""
        try:
            with np.load(self.directory / f"{name}.npz", allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Keep ``arrays`` under ``name``: they are on the disk when this returns."""
        path = self.directory / f"{name}.npz"
        with writing(path), self.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def has(self, name: str) -> bool:
        """Whether something was saved under ``name``."""
        return (self.directory / f"{name}.npz").exists()

    def load_finished(self, name: str) -> dict[str, np.ndarray]:
        """:meth:`load` of what has been saved.

        Raises:
            ResumableError: it is damaged; it is removed, to be made again.
        """
        stored = self.load(name)
        if stored is None:
            path = self.directory / f"{name}.npz"
            path.unlink(missing_ok=True)
            raise ResumableError(f"The finished chunk {path} is damaged. Run the same command again, to make it anew.")
        return stored

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """A temporary path that becomes ``path`` when the block ends well."""
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            yield temporary
            sync(temporary)
            os.rename(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def begin_corpus(self) -> Path:
        """An empty directory for what will be published."""
        with writing(self.corpus):
            if self.corpus.exists():
                shutil.rmtree(self.corpus)
            self.corpus.mkdir()
        return self.corpus

    def publish(self, target: Path) -> None:
        """Make the finished corpus ``target``, in one rename after all of it is on the disk."""
        with writing(target):
            sync_tree(self.corpus)
            os.rename(self.corpus, target)
            sync(target.parent)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def open_staging(target: Path, request: Wanted, chunking: dict[str, int]) -> Iterator[Staging]:
    """The staging directory of ``target``, with what an earlier command of the same ``request`` has finished.

    When the block raises, the directory is kept if going on makes sense: work is finished, and what was read of the
    input is not to blame. The work of another request is removed, and the log says so.

    Args:
        chunking: how documents are cut into chunks; finished ones are of use only to the same.

    Raises:
        DataError: another process works on the same output, or nothing can be written there.
    """
    directory = target.with_name(f".{target.name}.preparing")
    with writing(target):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, directory, target)
        staging = Staging(directory)
        try:
            _claim(staging, request, chunking)
            yield staging
        except BaseException as error:
            kept = _may_go_on(error) and any(directory.glob("*.npz"))
            # Whatever the corpus holds is made again from the chunks; its space may be what is missing.
            shutil.rmtree(staging.corpus if kept else directory, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def remove_leftover(target: Path) -> None:
    """Remove the staging directory of a published ``target``, unless a process is at work in it."""
    directory = target.with_name(f".{target.name}.preparing")
    with contextlib.suppress(OSError, DataError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor, directory, target)
            shutil.rmtree(directory)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What writing ``path`` may raise, in words.

    Raises:
        ResumableError: the disk is full, or ``path`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        # Arrow's own wording is longer than the system's.
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in OUT_OF_SPACE:
            raise ResumableError(
                f"Cannot write {path}: {reason}. Free some space and run the same command again; what is finished is "
                "kept."
            ) from error
        raise ResumableError(f"Cannot write {path}: {reason}. Choose another output, or mend this one.") from error


def to_array(content: Any) -> np.ndarray:
    """What JSON can hold, as an array of bytes (one of characters takes four times as many)."""
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


def from_array(stored: np.ndarray) -> Any:
    """The inverse of :func:`to_array`."""
    return json.loads(stored.tobytes())


def say(text: str) -> None:
    """Tell the person at the terminal; standard output belongs to the result."""
    print(f"mslm: {text}", file=sys.stderr, flush=True)


def sync_tree(directory: Path) -> None:
    """Wait until everything in ``directory`` is on the disk, so that a crash cannot publish half of it."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def sync(path: Path) -> None:
    """Wait until ``path`` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"Another process is preparing {target}. Wait for it, or choose another output.") from error
    # The other process may have published the directory between our opening it and our lock.
    if not directory.exists() or os.stat(directory).st_ino != os.fstat(descriptor).st_ino:
        raise DataError(f"Another process has just prepared {target}. Run the command again to check it.")


def _claim(staging: Staging, request: Wanted, chunking: dict[str, int]) -> None:
    """Keep what is there if it is of this request, else empty the directory; then write down whose it is."""
    path = staging.directory / REQUEST_NAME
    left = list(staging.directory.iterdir())
    if left:
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same = not request.differences(found["request"]) and found["chunking"] == chunking
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if same:
            return
        say(f"{staging.directory} held the unfinished work of another request; it is removed")
        with writing(staging.directory):
            for entry in left:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with writing(path), staging.replacing(path) as temporary:
        temporary.write_text(json.dumps({"request": request.to_dict(), "chunking": chunking}), encoding="utf-8")


def _may_go_on(error: BaseException) -> bool:
    """Whether the same command can have another end: not when the input was read and found wrong."""
    if not isinstance(error, DataError) or isinstance(error, ResumableError):
        return True
    return isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
