"""What must be as it was for a step to be made again with the same bits, and what is not. No torch.

Checked before anything is started. What only the started run can tell (its buckets, switches, device) is compared when
it has ended, in the two manifests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.errors import ReplayError
from megatron_slm.replay import source
from megatron_slm.replay.capsule import Capsule
from megatron_slm.train.run_directory import surroundings

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "DNNL_", "MKL_", "NCCL_ALGO", "NCCL_PROTO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
             "ONEDNN_")  # fmt: skip
"""Beginnings of variables that choose kernels or the order of exchanges, and that no library sets for itself."""
OWN = "megatron-slm"
"""Whose version says less than its sources."""


class Difference(NamedTuple):
    """One thing that was otherwise when the step was recorded."""

    what: str
    recorded: Any
    here: Any
    way_out: str

    def __str__(self) -> str:
        return f"{self.what}: {self.recorded} when it was recorded, {self.here} here; {self.way_out}"


def require(
    recording: Capsule, step: int, before: int, *, force: bool = False, package: Path = source.PACKAGE
) -> list[str]:
    """Refuse to make ``step`` again from step ``before`` where its bits could not be expected to come again.

    Args:
        force: do it all the same.
        package: ``megatron_slm`` of the checkout that will make it.

    Returns:
        What differs, where ``force`` has allowed it.

    Raises:
        ReplayError: names everything that differs, each with the way out.
    """
    found = [str(one) for one in differences(recording, step, before, package)]
    if not found or force:
        return found
    raise ReplayError(
        "\n".join(
            [
                f"Step {step} of {recording.folder} would not be made under the conditions of its recording:",
                *(f"  {line}" for line in found),
                "--force makes it all the same, to see how far it gets.",
            ]
        )
    )


def differences(recording: Capsule, step: int, before: int, package: Path) -> list[Difference]:
    """Everything that is known beforehand to differ."""
    manifest = recording.manifest(step)
    return [
        *_program(manifest["code"], recording.folder, package),
        *_versions(manifest["surroundings"]),
        *_machine(manifest["surroundings"]),
        *_threads(recording, step),
        *_environment(recording, step),
        *_starts(recording, step, before),
    ]


def _program(recorded: dict[str, Any], folder: Path, package: Path) -> Iterator[Difference]:
    here = source.sources_sha256(package)
    if here != recorded["sources_sha256"]:
        yield Difference(
            "source files",
            f"sha256 {recorded['sources_sha256'][:12]}",
            here[:12],
            f"in a clone of the repository, {source.way_back(recorded, folder)}, and name it with --code",
        )


def _versions(recorded: dict[str, Any]) -> Iterator[Difference]:
    here = surroundings()
    for name in sorted({*recorded["versions"], *here["versions"]} - {OWN}):
        was, now = recorded["versions"].get(name, "none"), here["versions"].get(name, "none")
        if was != now:
            yield Difference(f"version of {name}", was, now, f"install {name}=={was}" if was != "none" else "remove it")
    if recorded["python"] != here["python"]:
        yield Difference("Python", recorded["python"], here["python"], f"use Python {recorded['python']}")


def _machine(recorded: dict[str, Any]) -> Iterator[Difference]:
    here = surroundings()
    if recorded["cpu"] != here["cpu"]:
        yield Difference("processor", recorded["cpu"], here["cpu"], "kernels may differ: use such a machine")


def _threads(recording: Capsule, step: int) -> Iterator[Difference]:
    """A replay gives all its ranks one number."""
    counts = {rank: recording.manifest(step, rank)["threads"]["intra_op"] for rank in recording.ranks}
    if len({*counts.values()}) > 1:
        told = ", ".join(f"rank {rank} {count}" for rank, count in counts.items())
        yield Difference(
            "threads", told, f"{counts[recording.ranks[0]]} on every rank", "record with one OMP_NUM_THREADS for all"
        )


def _environment(recording: Capsule, step: int) -> Iterator[Difference]:
    """Of the first rank: a replay gives all its ranks the same."""
    recorded = recording.manifest(step, recording.ranks[0])["environment"]
    here = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    for name in sorted({*here, *(known for known in recorded if known.startswith(VARIABLES))}):
        was, now = recorded.get(name), here.get(name)
        if was != now:
            way_out = f"unset {name}" if was is None else f"export {name}={was}"
            yield Difference(f"variable {name}", was or "not set", now or "not set", way_out)


def _starts(recording: Capsule, step: int, before: int) -> Iterator[Difference]:
    """All steps on the way were made under one manifest's configuration and layout."""
    last, first = recording.manifest(step), recording.manifest(before + 1)
    for what in ("config", "layout", "data"):
        if first.get(what) != last.get(what):
            yield Difference(
                f"the {what} of steps {before + 1} and {step}",
                "one for each",
                "the latter's for both",
                f"the run was resumed at step {last['step']} with another; keep its checkpoint of that step",
            )
