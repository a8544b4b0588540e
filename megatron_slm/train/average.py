"""The mean of several checkpoints' weights, as a checkpoint of its own.

One process, no ranks: one tensor at a time is read from every checkpoint, averaged in float64 and written in its own
dtype. The result holds weights alone; generation, evaluation and ``checkpoint.pretrained_checkpoint`` read it.
"""

from __future__ import annotations

import io
import pickle
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_slm.errors import CheckpointError
from megatron_slm.train import manifest
from megatron_slm.train.payload import COMMON_FILE, read_object, read_tensor, to_metadata
from megatron_slm.train.payload_index import (
    METADATA_FILE,
    Chunk,
    PayloadIndex,
    Span,
    StoredTensor,
    is_weight,
    read_index,
)
from megatron_slm.train.publish import published
from megatron_slm.train.saved_state import STATE_FILE, read_state

PAYLOAD_FILE = "__0_0.distcp"


def average(checkpoints: Sequence[Path], output: Path) -> Path:
    """Write the mean of the weights of ``checkpoints`` to ``output``, whole or not at all.

    Configuration, tokenizer, step and cursor are those of the last one; ``state.json`` names what was averaged.

    Raises:
        CheckpointError: ``output`` exists or cannot be written, a checkpoint is damaged or given twice, or they are not
            of one run.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists; name another --output, or remove it")
    for path in checkpoints:
        if published(path / "checkpoints") or published(path):
            raise CheckpointError(
                f"{path} is a run's directory, not a checkpoint: name its iter_NNNNNNN directories, or it alone with "
                "--last K"
            )
        manifest.verify(path)
    _require_one_run(checkpoints)
    indices = [read_index(path) for path in checkpoints]
    _require_one_model(checkpoints, indices)
    try:
        _write(checkpoints, indices, output)
    except (OSError, RuntimeError) as error:
        # torch fails once more, with words of its own, when it closes the file that the disk would not take.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{output} could not be written ({getattr(cause, 'strerror', None) or cause}); nothing is left of it: make "
            "room, or name another --output"
        ) from error
    return output


def _write(checkpoints: Sequence[Path], indices: Sequence[PayloadIndex], output: Path) -> None:
    """The checkpoint, beside its place and renamed to it when it is on the disk."""
    newest = checkpoints[-1]
    state = read_state(newest)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _write_payload(checkpoints, indices, temporary)
        shutil.copy2(newest / "config.yaml", temporary)
        shutil.copytree(newest / "tokenizer", temporary / "tokenizer")
        averaged = replace(
            state, records={}, parts=[], global_hash="", averaged=[str(path.resolve()) for path in checkpoints]
        )
        (temporary / STATE_FILE).write_text(averaged.to_json(), encoding="utf-8")
        manifest.seal(temporary, step=state.step, identity=manifest.read_manifest(newest).identity)
        temporary.rename(output)
        manifest.sync(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _require_one_run(checkpoints: Sequence[Path]) -> None:
    """The same identity, and each of other contents than those before it."""
    known = [manifest.read_manifest(path) for path in checkpoints]
    for position, (path, found) in enumerate(zip(checkpoints, known, strict=True)):
        if found.identity != known[0].identity:
            raise CheckpointError(
                f"{path} and {checkpoints[0]} are of different runs (identities {found.identity[:12] or 'none'} and "
                f"{known[0].identity[:12] or 'none'}); average checkpoints of one run"
            )
        if found in known[:position]:
            raise CheckpointError(
                f"{path} is the same checkpoint as {checkpoints[known.index(found)]}; name each checkpoint once"
            )


def _require_one_model(checkpoints: Sequence[Path], indices: Sequence[PayloadIndex]) -> None:
    """The same weights by name, dtype and shape, and the same tokenizer."""

    def weights(index: PayloadIndex) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items() if is_weight(name)}

    expected, tokenizer = weights(indices[0]), read_state(checkpoints[0]).tokenizer_hash
    for path, index in zip(checkpoints[1:], indices[1:], strict=True):
        found = weights(index)
        differing = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        if differing:
            raise CheckpointError(
                f"{path} and {checkpoints[0]} are not of one model: {differing[0]} (and {len(differing) - 1} more) is "
                f"{found.get(differing[0], 'absent')} and {expected.get(differing[0], 'absent')}; average checkpoints "
                "of one run"
            )
        if read_state(path).tokenizer_hash != tokenizer:
            raise CheckpointError(f"{path} and {checkpoints[0]} have different tokenizers; average those of one run")


def _write_payload(checkpoints: Sequence[Path], indices: Sequence[PayloadIndex], directory: Path) -> None:
    """Core's ``torch_dist`` files with the averaged weights, and the layers' other objects as the last one has them."""
    tensors, objects = {}, {}
    with (directory / PAYLOAD_FILE).open("wb") as stream:

        def append(value: object) -> Span:
            start = stream.tell()
            torch.save(value, stream)
            return Span(PAYLOAD_FILE, start, stream.tell() - start)

        for name, stored in indices[-1].tensors.items():
            if is_weight(name):
                span = append(_mean(checkpoints, indices, name))
                origin = tuple(0 for _ in stored.shape)
                tensors[name] = StoredTensor(stored.dtype, stored.shape, (Chunk(origin, stored.shape, span),))
        for name in indices[-1].objects:
            if is_weight(name):
                objects[name] = append(read_object(checkpoints[-1], indices[-1], name))
    (directory / METADATA_FILE).write_bytes(pickle.dumps(to_metadata(PayloadIndex(tensors, objects))))
    common = io.BytesIO()
    torch.save({}, common)
    (directory / COMMON_FILE).write_bytes(common.getvalue())
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def _mean(checkpoints: Sequence[Path], indices: Sequence[PayloadIndex], name: str) -> torch.Tensor:
    """The mean of one tensor, summed in float64, in its own dtype."""
    total: torch.Tensor | None = None
    for path, index in zip(checkpoints, indices, strict=True):
        tensor = read_tensor(path, index, name)
        total = tensor.double() if total is None else total.add_(tensor)
    assert total is not None, "the command refuses an empty list"
    return (total / len(checkpoints)).to(getattr(torch, indices[0].tensors[name].dtype))
