"""What ``mslm checkpoint`` says of checkpoints. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_slm.config.load import load
from megatron_slm.errors import CheckpointError, UserError
from megatron_slm.train import manifest, publish
from megatron_slm.train.global_hash import combined, tensor_hashes
from megatron_slm.train.manifest import problems, read_manifest
from megatron_slm.train.payload_index import group_of, read_index
from megatron_slm.train.retention import Retention
from megatron_slm.train.run_directory import stored_identity
from megatron_slm.train.saved_state import STATE_FILE, read_state

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Step -> checkpoint of a run, given by its own or by its checkpoints directory.

    Raises:
        CheckpointError: there is none, or ``run`` is a checkpoint itself.
    """
    for directory in (run / "checkpoints", run):
        if found := publish.published(directory):
            return found
    if _is_checkpoint(run):
        raise CheckpointError(
            f"{run} is one checkpoint, not a run: mslm checkpoint inspect shows it; or name a run's directory"
        )
    raise CheckpointError(f"{run} holds no checkpoint: name a run's directory, such as runs/NAME")


def listing(run: Path) -> str:
    """A table of the checkpoints of ``run``. Sizes are compared with the manifests, not contents."""
    there = checkpoints_of(run)
    directory = next(iter(there.values())).parent
    identity = stored_identity(directory.parent)
    try:
        tracked = publish.tracked_step(directory)
        tracker = "" if tracked in there else f"\n{publish.TRACKER} names {tracked}, which is not there"
    except CheckpointError as error:
        tracked, tracker = None, f"\n{error}"
    kept = _retention(directory.parent).reasons(there, max(there) if tracked is None else tracked)
    rows = [("step", "size", "age", "complete", "kept because", "")]
    for step, path in there.items():
        wrong = problems(path, hashes=False, identity=identity)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        age = _duration(time.time() - path.stat().st_mtime)
        complete = "yes" if not wrong else f"NO: {wrong[0]}"
        why = kept.get(step, "no reason: it goes with the next save")
        rows.append((str(step), _bytes(size), age, complete, why, "<- tracker" if step == tracked else ""))
    return _table(rows) + tracker


def verified(paths: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    """A line for each checkpoint, and whether it is what was saved. A run's must also be of that run."""
    for path in paths:
        single = _is_checkpoint(path)
        identity = None if single else stored_identity(path)
        for checkpoint in [path] if single else checkpoints_of(path).values():
            wrong = problems(checkpoint, identity=identity)
            stated = "" if wrong else _stated_hash(checkpoint)
            yield (f"{checkpoint}: {'whole' + stated if not wrong else 'DAMAGED: ' + '; '.join(wrong)}", not wrong)


def contents(path: Path) -> str:
    """State, tensors and objects of one checkpoint."""
    state, index = read_state(path), read_index(path)
    lines = [
        f"checkpoint   {path}",
        f"step         {state.step}, {state.consumed_samples} samples",
        f"layout       {', '.join(f'{axis} {size}' for axis, size in state.layout.items()) or 'none'}",
        f"precision    {state.params_dtype}",
        f"identity     {read_manifest(path).identity or 'none'}",
        f"tokenizer    {state.tokenizer_hash}",
    ]
    if state.resharded_from:
        before = ", ".join(f"{axis} {size}" for axis, size in state.resharded_from.items())
        lines.append(f"resharded    from {before}; without random states: a resume draws new ones from seed and step")
    if state.global_hash:
        lines.append(f"global hash  {state.global_hash}")
    if state.averaged:
        lines.append(f"averaged     {', '.join(state.averaged)}")
    if state.parts:
        lines.append(f"parts        {', '.join(state.parts)}")
    rows = [("tensor", "shape", "dtype", "bytes")]
    sums: dict[str, tuple[int, int, int]] = {}
    for name, tensor in sorted(index.tensors.items()):
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        rows.append((name, shape, tensor.dtype, f"{tensor.num_bytes:,}"))
        count, elements, size = sums.get(group_of(name), (0, 0, 0))
        sums[group_of(name)] = (count + 1, elements + tensor.num_elements, size + tensor.num_bytes)
    totals = [("group", "tensors", "elements", "bytes")]
    totals += [(group, str(count), f"{elements:,}", f"{size:,}") for group, (count, elements, size) in sums.items()]
    objects = f"other objects: {len(index.objects)} (random states, layers' extra states)"
    return "\n".join([*lines, "", _table(rows), "", _table(totals), "", objects])


def hashes(path: Path, *, weights_only: bool = False) -> tuple[str, dict[str, str]]:
    """The global hash of a checkpoint's tensors, and what it is made of by name.

    Raises:
        CheckpointError: it is damaged, or is not what its ``state.json`` says it is.
    """
    found = tensor_hashes(path, weights_only=weights_only)
    result, stated = combined(found), read_state(path).global_hash
    if stated and not weights_only and result != stated:
        raise CheckpointError(
            f"{path} has the global hash {result}, its {STATE_FILE} says {stated}; choose another checkpoint"
        )
    return result, found


def _stated_hash(path: Path) -> str:
    """What a whole checkpoint says of its tensors, where it does: its files are what was hashed."""
    stated = read_state(path).global_hash
    return f", global hash {stated}" if stated else ""


def _is_checkpoint(path: Path) -> bool:
    return (path / manifest.MANIFEST).exists() or (path / STATE_FILE).exists()


def _retention(run: Path) -> Retention:
    """What the run's configuration keeps; all, where there is none."""
    try:
        config = load(run / "config.yaml").config.checkpoint
    except (UserError, OSError):
        return Retention()
    return Retention(config.keep_last, config.save_retain_interval)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _bytes(count: float) -> str:
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.3g} {UNITS[unit]}" if unit else f"{count:.0f} B"


def _duration(seconds: float) -> str:
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{max(seconds, 0.0):.0f} s"
