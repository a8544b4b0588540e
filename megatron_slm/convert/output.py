"""A directory that is published whole or not at all, and what made it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest


def refuse_existing(output: Path) -> None:
    """Nothing is overwritten.

    Raises:
        CheckpointError: ``output`` is there.
    """
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"{output} exists; name another --output, or remove it")


@contextmanager
def whole_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary directory beside ``output``, renamed to it when the block ends, removed when it raises.

    What an earlier attempt at the same ``output`` has left when it was killed is removed first.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(output)
        temporary.mkdir()
        with owned(temporary):
            yield temporary
        sync_tree(temporary)
        temporary.rename(output)
        manifest.sync(output.parent)
    except (OSError, RuntimeError) as error:
        # torch fails once more, with words of its own, when it closes the file that the disk would not take.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(
            f"{output} could not be written ({cause.strerror or cause}); nothing is left of it: make room, or name "
            "another --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(output: Path) -> None:
    """Remove temporary directories of ``output`` that no living process owns."""
    for left in output.parent.glob(f".tmp-{glob.escape(output.name)}-*"):
        with contextlib.suppress(OSError), owned(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, which ends with the process however it ends.

    Raises:
        OSError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make the names below ``directory`` durable; the writers do so with contents."""
    for folder in sorted((entry for entry in directory.rglob("*") if entry.is_dir()), reverse=True):
        manifest.sync(folder)
    manifest.sync(directory)


def versions() -> dict[str, str]:
    """Of everything that the result depends on."""
    found = {}
    for name in ("megatron-slm", "megatron-core", "torch", "safetensors", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
