"""The program that made a run: a digest of its source, the commit, and how its files differed from that. No torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_slm.errors import CheckpointError, ConfigError

PACKAGE = Path(__file__).parents[1]
LARGEST_DIFFERENCE_BYTES = 4 << 20
"""Of what is kept; of a larger one the digest alone."""


def code() -> dict[str, Any]:
    """A digest of every source file, and commit and difference where the program lies in a repository."""
    difference = code_difference()
    return {
        "sources_sha256": sources_sha256(PACKAGE),
        "commit": _git("rev-parse", "HEAD").strip() or None,
        "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
    }


def package_in(checkout: Path | None) -> Path:
    """The package in a checkout; this program's own where none is named.

    Raises:
        ConfigError: there is none in it.
    """
    if checkout is None:
        return PACKAGE
    package = checkout / PACKAGE.name
    if not (package / "cli.py").is_file():
        raise ConfigError(f"--code {checkout} is not a checkout: it holds no {PACKAGE.name}/cli.py.")
    return package


def sources_sha256(package: Path) -> str:
    """Digest of every source file of ``package`` with its name."""
    digest = hashlib.sha256()
    # Links lead to the folders that lie beside the package.
    for path in sorted(path for root, _, names in os.walk(package, followlinks=True) for path in _sources(root, names)):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def code_difference() -> bytes:
    """What ``git apply`` makes of the commit's files those that have run, new ones included; empty where none differ.

    Nothing of the repository is changed for it.
    """
    top = _git("rev-parse", "--show-toplevel").strip()
    if not top:
        return b""
    folders = sorted({str(path.resolve()) for path in (PACKAGE, *PACKAGE.iterdir()) if path.is_dir()})
    own = [folder for folder in folders if Path(folder).is_relative_to(top)]
    changed = _git("diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", "--", *own, folder=top, text=False)
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *own, folder=top).split("\0")
    options = ("diff", "--binary", "--no-ext-diff", "--no-color", "--no-index", "--", os.devnull)
    added = [_git(*options, name, folder=top, text=False, accepted=(0, 1)) for name in new if name.endswith(".py")]
    return b"".join([changed, *added])


def keep_difference(folder: Path, step: int) -> dict[str, Any]:
    """Write the difference beside the manifest of a start behind ``step``; what the manifest says of it.

    Raises:
        CheckpointError: it cannot be written.
    """
    difference = code_difference()
    if not difference:
        return {}
    known = {"diff_sha256": hashlib.sha256(difference).hexdigest(), "diff_bytes": len(difference)}
    if len(difference) > LARGEST_DIFFERENCE_BYTES:
        return {**known, "diff": None}
    path = folder / f"code_{step:07d}.diff"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(difference)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}); make room there.") from error
    return {**known, "diff": path.name}


def way_back(recorded: dict[str, Any], folder: Path) -> str:
    """What is typed to have the recorded program again."""
    if recorded.get("commit") is None:
        return f"install the program whose sources have the sha256 {recorded['sources_sha256']}"
    checkout = f"git checkout {recorded['commit']}"
    if recorded.get("diff_sha256") is None:
        return checkout
    if recorded.get("diff") is None:
        size = f"of {recorded['diff_bytes']} bytes, " if "diff_bytes" in recorded else ""
        return f"{checkout}, and apply the changes of then ({size}which were not kept)"
    return f"{checkout} && git apply {folder.absolute() / recorded['diff']}"


def _sources(root: str, names: Sequence[str]) -> list[Path]:
    return [Path(root) / name for name in names if name.endswith(".py")]


def _git(*arguments: str, folder: str | Path = PACKAGE, text: bool = True, accepted: Sequence[int] = (0,)) -> Any:
    """What git prints, as text or bytes; nothing where there is no git, no repository or an error."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=20.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "" if text else b""
    found = done.stdout if done.returncode in accepted else b""
    return found.decode() if text else found
