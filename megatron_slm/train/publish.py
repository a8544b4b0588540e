"""Checkpoint directories that exist either whole or not at all. No torch.

    checkpoints/
      latest_checkpointed_iteration.txt    the step of the newest checkpoint; readers trust it alone
      iter_0000100/                        published; ``manifest.json`` holds the size and hash of every other file
      .tmp-iter_0000200-1f0c93ab/          being written, or left by a save that was killed
      .old-iter_0000100-77d2e0b4/          the previous iter_0000100 while the same step is published again

The order is payload, rename, tracker, and each is on the disk before the next begins, so a process killed at any
moment (or a machine that loses power) leaves the tracker on a complete checkpoint. One process publishes at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_slm.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
THREADS = 8
CHUNK_BYTES = 4 << 20

T = TypeVar("T")


class FileRecord(NamedTuple):
    """What the manifest says of one file."""

    size: int
    sha256: str


def checkpoint_path(checkpoints_dir: Path, step: int) -> Path:
    """The directory a checkpoint of ``step`` completed steps is published under, Megatron's name."""
    assert step >= 0, f"a checkpoint is of 0 or more completed steps, not {step}"
    return checkpoints_dir / f"iter_{step:07d}"


def begin(checkpoints_dir: Path, step: int) -> Path:
    """Create the temporary directory that a checkpoint is written into; what an interrupted save left is removed."""
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    _sync(checkpoints_dir.parent)
    _tidy(checkpoints_dir)
    temporary = checkpoints_dir / f".tmp-{checkpoint_path(checkpoints_dir, step).name}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def publish(temporary: Path, final: Path) -> None:
    """Make the written ``temporary`` the newest checkpoint.

    If ``final`` exists (a resumed run makes the same step again), it is kept aside until the new one is in its place;
    :func:`latest` finds it there.

    Args:
        temporary: from :func:`begin`, with every file of the payload complete.
        final: :func:`checkpoint_path` of the same step.
    """
    checkpoints_dir = final.parent
    assert temporary.parent == checkpoints_dir, f"{temporary} and {final} must be siblings: a rename does not copy"
    _write_manifest(temporary)
    aside = checkpoints_dir / f".old-{final.name}-{secrets.token_hex(4)}"
    if final.exists():
        final.rename(aside)
        # A power failure must not keep the second rename without the first.
        _sync(checkpoints_dir)
    temporary.rename(final)
    _sync(checkpoints_dir)
    _write_tracker(checkpoints_dir, int(final.name.removeprefix("iter_")))
    if aside.exists():
        shutil.rmtree(aside)


def latest(checkpoints_dir: Path) -> Path | None:
    """The checkpoint that the tracker names, or ``None`` where nothing has been published.

    Changes nothing, so every rank and other programs may call it during a save. The returned directory has another
    name than ``iter_NNNNNNN`` when a save of the same step was killed between its two renames.

    Raises:
        CheckpointError: the tracker is damaged, or what it names is gone.
    """
    tracker = checkpoints_dir / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not (text.isascii() and text.isdigit()):
        raise CheckpointError(
            f"{tracker} holds {text[:40]!r}, not the number of a step; write the step of one of "
            f"{_published(checkpoints_dir)} into it"
        )
    named = checkpoint_path(checkpoints_dir, int(text))
    candidates = [named, *checkpoints_dir.glob(f".old-{named.name}-*"), named]
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{tracker} names step {int(text)}, but {named} does not exist; restore it, or write the step of one of "
            f"{_published(checkpoints_dir)} into the tracker"
        )
    return found


def verify(path: Path, *, hashes: bool = True) -> None:
    """Compare a checkpoint with its manifest.

    Args:
        path: a published checkpoint.
        hashes: read every byte; without it only presence and size are compared.

    Raises:
        CheckpointError: lists every file that is missing, has another size or other contents.
    """
    records = _read_manifest(path)
    problems = _in_threads(lambda name: _problem(path / name, records[name], hashes), sorted(records))
    wrong = [f"  {name} {problem}" for name, problem in zip(sorted(records), problems, strict=True) if problem]
    if wrong:
        raise CheckpointError(
            f"{path} is damaged:\n" + "\n".join(wrong) + "\n"
            f"Restore these files, or write the step of another checkpoint into {TRACKER} beside it."
        )


def _problem(file: Path, record: FileRecord, hashes: bool) -> str | None:
    """What is wrong with one file, or ``None``."""
    try:
        size = file.stat().st_size
        if size != record.size:
            return f"has {size} bytes, {record.size} when saved"
        if hashes and (found := _sha256(file)) != record.sha256:
            return f"has the sha256 {found}, {record.sha256} when saved"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _write_manifest(directory: Path) -> None:
    """Hash every file, write ``manifest.json``, and return when all of it is on the disk."""
    names = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    names = [name for name in names if name != MANIFEST]
    hashes = _in_threads(lambda name: _sha256(directory / name, sync=True), names)
    files = {
        name: FileRecord((directory / name).stat().st_size, digest)._asdict()
        for name, digest in zip(names, hashes, strict=True)
    }
    _write_synced(directory / MANIFEST, json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1))
    for folder in sorted((entry for entry in directory.rglob("*") if entry.is_dir()), reverse=True):
        _sync(folder)
    _sync(directory)


def _read_manifest(path: Path) -> dict[str, FileRecord]:
    """File name -> record.

    Raises:
        CheckpointError: there is no manifest, or it is not one.
    """
    file = path / MANIFEST
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        version = stored["version"]
        records = {name: FileRecord(**record) for name, record in stored["files"].items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it is not a checkpoint, or not a whole one; name an iter_NNNNNNN directory"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); restore it or choose another checkpoint") from error
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{file} has version {version}, this program reads {MANIFEST_VERSION}; use the program that wrote it"
        )
    return records


def _write_tracker(checkpoints_dir: Path, step: int) -> None:
    """Let the tracker name ``step``: one rename, so that it is never half written."""
    temporary = checkpoints_dir / f".tmp-{TRACKER}"
    _write_synced(temporary, f"{step}\n")
    temporary.replace(checkpoints_dir / TRACKER)
    _sync(checkpoints_dir)


def _tidy(checkpoints_dir: Path) -> None:
    """Remove what killed saves left, and put a checkpoint back that was aside without a successor."""
    for leftover in checkpoints_dir.glob(".tmp-iter_*"):
        shutil.rmtree(leftover)
    for aside in checkpoints_dir.glob(".old-iter_*"):
        final = checkpoints_dir / aside.name.removeprefix(".old-").rpartition("-")[0]
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    _sync(checkpoints_dir)


def _published(checkpoints_dir: Path) -> str:
    """Names of the published checkpoints, for an error message."""
    return ", ".join(sorted(path.name for path in checkpoints_dir.glob("iter_*"))) or "(there is none)"


def _in_threads(work: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """``work`` of each name, in order; hashing and fsync release the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return list(pool.map(work, names))


def _sha256(file: Path, *, sync: bool = False) -> str:
    """Hash of a file of any size, read in pieces; ``sync`` also waits until it is on the disk."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
