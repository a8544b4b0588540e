"""``manifest.json``: what a checkpoint consists of, whose it is, and whether it is still what was saved. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_slm.errors import CheckpointError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
PUBLISHED = re.compile(r"(?:\.old-)?iter_(\d{7,})(?:-[0-9a-f]{8})?")
"""Names of published checkpoints: iter_NNNNNNN, and one that is aside while its step is published again."""
REQUIRED = (".metadata", "common.pt", "config.yaml", "metadata.json", "state.json")
"""Files that every checkpoint has, beside its shards: a manifest that leaves one out would vouch for nothing."""
THREADS = 8
CHUNK_BYTES = 4 << 20

T = TypeVar("T")


class FileRecord(NamedTuple):
    """What the manifest says of one file."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """The step a checkpoint is of, the digest of its run's identity (empty: of no run), and the other files by name."""

    step: int
    identity: str
    files: Mapping[str, FileRecord]


def seal(directory: Path, *, step: int, identity: str) -> None:
    """Hash every file, write the manifest, and return when all of it is on the disk.

    Args:
        step: completed steps.
        identity: ``run_directory.digest`` of the run's identity, or "".
    """
    names = _file_names(directory)
    hashes = _in_threads(lambda name: sha256(directory / name, sync=True), names)
    files = {
        name: FileRecord((directory / name).stat().st_size, digest)._asdict()
        for name, digest in zip(names, hashes, strict=True)
    }
    record = {"version": MANIFEST_VERSION, "step": step, "identity": identity, "files": files}
    write_synced(directory / MANIFEST, json.dumps(record, indent=1))
    for folder in sorted((entry for entry in directory.rglob("*") if entry.is_dir()), reverse=True):
        sync(folder)
    sync(directory)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in ``path``.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    file = path / MANIFEST
    try:
        stored = json.loads(read_regular(file))
        version = stored["version"]
        if version == MANIFEST_VERSION:
            files = {name: FileRecord(**record) for name, record in stored["files"].items()}
            return Manifest(int(stored["step"]), str(stored["identity"]), files)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it is not a checkpoint, or not a whole one; name an iter_NNNNNNN directory"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); choose another checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); restore it or choose another checkpoint") from error
    raise CheckpointError(
        f"{file} has version {version}, this program reads {MANIFEST_VERSION}; use the program that wrote it"
    )


def problems(path: Path, *, hashes: bool = True, identity: str | None = None) -> list[str]:
    """Everything that is wrong with a checkpoint, in words; empty where it is what was saved.

    Args:
        path: a published checkpoint.
        hashes: read every byte; without it only presence and size are compared.
        identity: of the run that it must be of; None where any run's will do.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    found = []
    named = PUBLISHED.fullmatch(path.name)
    if named and int(named[1]) != manifest.step:
        found.append(f"its directory is named after step {int(named[1])}, but it was saved after step {manifest.step}")
    if identity is not None and identity != manifest.identity:
        found.append(
            f"it is of another run (model, data, seed or precision): its identity is "
            f"{manifest.identity[:12] or 'none'}, this run's is {identity[:12]}"
        )
    names = sorted(manifest.files)
    wrong = _in_threads(lambda name: _problem(path / name, manifest.files[name], hashes), names)
    found += [f"{name} {problem}" for name, problem in zip(names, wrong, strict=True) if problem]
    unlisted = {*REQUIRED, *_file_names(path)} - {*manifest.files}
    return found + [f"{name} is not listed in {MANIFEST}" for name in sorted(unlisted)]


def verify(path: Path, *, hashes: bool = True, identity: str | None = None) -> None:
    """Refuse a checkpoint that is not what was saved; the arguments are those of ``problems``.

    Raises:
        CheckpointError: lists every file that is missing, has another size or other contents.
    """
    if found := problems(path, hashes=hashes, identity=identity):
        raise CheckpointError(
            "\n".join(
                [f"{path} is damaged:", *(f"  {line}" for line in found), "Restore it, or choose another checkpoint."]
            )
        )


def _problem(file: Path, record: FileRecord, hashes: bool) -> str | None:
    """What is wrong with one file, or ``None``."""
    try:
        size = regular_size(file)
        if size != record.size:
            return f"has {size} bytes, {record.size} when saved"
        if hashes and (found := sha256(file)) != record.sha256:
            return f"has the sha256 {found}, {record.sha256} when saved"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except (OSError, ValueError) as error:  # of a name that no file can have
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def _file_names(directory: Path) -> list[str]:
    """Everything in a checkpoint but its directories and the manifest, sorted."""
    names = (str(entry.relative_to(directory)) for entry in directory.rglob("*") if not entry.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def regular_size(file: Path) -> int:
    """Bytes of a file.

    Raises:
        OSError: there is none, or it is a pipe or a device, whose reading might never end.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    return found.st_size


def read_regular(file: Path) -> bytes:
    """Contents of a file; what ``regular_size`` refuses is not opened.

    Raises:
        OSError: as of ``regular_size``, or it cannot be read.
    """
    regular_size(file)
    return file.read_bytes()


def _in_threads(work: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """``work`` of each name, in order; hashing and fsync release the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return list(pool.map(work, names))


def sha256(file: Path, *, sync: bool = False) -> str:
    """Hash of a file of any size, read in pieces; ``sync`` also waits until it is on the disk."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def write_synced(file: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
