"""A checkpoint cut anew for another layout: one process, no ranks, one piece in memory at a time.

Any layout can read any checkpoint; but a file is what one rank has written, so that ranks of another layout read parts
of many. What is written here lies as the target's own ranks would have saved it. That it is the same is shown, not
assumed: the global hash of what was written, read back, must be the source's.
"""

from __future__ import annotations

import io
import math
import pickle
import secrets
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_slm.config import flags, rules
from megatron_slm.config.load import Resolved, load
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.parallel.layout import Layout, layer_split
from megatron_slm.parallel.partition import Partition, Piece
from megatron_slm.train import manifest, publish, recovery
from megatron_slm.train.global_hash import combined, differing, tensor_hashes
from megatron_slm.train.payload import read_object, to_metadata
from megatron_slm.train.payload_blocks import Block, TensorReader
from megatron_slm.train.payload_index import (
    METADATA_FILE,
    Chunk,
    PayloadIndex,
    Span,
    StoredTensor,
    group_of,
    read_index,
)
from megatron_slm.train.run_directory import IDENTITY, RunDirectory
from megatron_slm.train.saved_state import STATE_FILE, SavedState, layout_record, read_state

CHANGEABLE = ("parallel.", "train.micro_batch_size", "train.global_batch_size")
"""Keys that the target may have otherwise; whatever else a configuration says is of the run, not of its layout."""


class Resharded(NamedTuple):
    """What has been written."""

    path: Path
    """The checkpoint, in the new run's directory."""
    before: Mapping[str, int]
    after: Mapping[str, int]
    num_files: int
    num_bytes: int
    global_hash: str
    warning: str | None


def reshard(source: Path, output: Path, overrides: Sequence[str]) -> Resharded:
    """Write the checkpoint that ``source`` means into a new run's directory ``output``, whole or not at all.

    Args:
        overrides: tokens of the command line: degrees of the ``parallel`` section, and batch sizes that suit them.

    Raises:
        CheckpointError: ``output`` exists or cannot be written, or the source is damaged.
        ConfigError: the target is no valid layout of this model.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists; name another --output, or remove it")
    found = recovery.find(source)
    state = read_state(found.path)
    config, layout = _target(found.path, output, overrides)
    if layout_record(layout) == state.layout:
        raise ConfigError(
            f"{found.path} is of this layout already ({in_words(state.layout)}). Name the degrees to reshard to, such "
            "as --tensor-model-parallel-size 2."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
    try:
        written = _write_run(found.path, state, config, layout, temporary)
        temporary.rename(output)
        manifest.sync(output.parent)
    except (OSError, RuntimeError) as error:
        # torch fails once more, with words of its own, when it closes the file that the disk would not take.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{output} could not be written ({getattr(cause, 'strerror', None) or cause}); nothing is left of it: make "
            "room, or name another --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written._replace(path=output / written.path.relative_to(temporary), warning=found.warning)


def _target(source: Path, output: Path, overrides: Sequence[str]) -> tuple[Resolved, Layout]:
    """The checkpoint's configuration with the target's degrees, and its layout.

    Raises:
        ConfigError: an override is not of the layout, or the layout breaks a rule; the message lists every violation.
    """
    typed = flags.read(overrides)
    if strangers := [given.key for given in typed.given if not given.key.startswith(CHANGEABLE)]:
        raise ConfigError(
            f"{', '.join(strangers)} cannot be changed by resharding: it takes degrees (parallel.*) and batch sizes."
        )
    places = (f"name={output.name}", f"log.runs_dir={output.resolve().parent}")
    asked = load(source / "config.yaml", [*overrides, *places])
    world_size = asked.config.parallel.world_size
    if "parallel.world_size" not in {given.key for given in typed.given}:
        world_size = asked.config.parallel.smallest_world_size
        asked = load(source / "config.yaml", [*overrides, *places, f"parallel.world_size={world_size}"])
    rules.require(asked.config, world_size, provenance=asked.provenance)
    assert world_size is not None, "it was given, or has been computed"
    return asked, Layout.from_config(asked.config.parallel, world_size)


def _write_run(source: Path, state: SavedState, config: Resolved, layout: Layout, directory: Path) -> Resharded:
    """A run's directory with one checkpoint, on the disk when this returns."""
    run = RunDirectory(directory)
    run.checkpoints.mkdir(parents=True)
    final = publish.checkpoint_path(run.checkpoints, state.step)
    temporary = publish.begin(run.checkpoints, state.step)
    index = read_index(source)
    parallel, model = config.config.parallel, config.config.model
    split = layer_split(model.num_layers, parallel)
    written = _write_payload(source, index, Partition(layout, split, gated=model.swiglu), temporary)
    proof = _proved(source, index, temporary, written)
    _copy_others(source, temporary)
    (temporary / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    after = layout_record(layout)
    moved = replace(state, layout=after, resharded_from=state.layout, global_hash=proof)
    (temporary / STATE_FILE).write_text(moved.to_json(), encoding="utf-8")
    publish.publish(temporary, final, identity=manifest.read_manifest(source).identity)
    identity = source.parent.parent / IDENTITY
    if identity.exists():
        manifest.write_synced(directory / IDENTITY, identity.read_text(encoding="utf-8"))
    manifest.write_synced(directory / "config.yaml", config.to_yaml())
    manifest.sync(directory)
    files = {chunk.span.file for tensor in written.tensors.values() for chunk in tensor.chunks}
    size = sum(tensor.num_bytes for tensor in written.tensors.values())
    return Resharded(final, state.layout, after, len(files), size, proof, None)


def _write_payload(source: Path, index: PayloadIndex, partition: Partition, directory: Path) -> PayloadIndex:
    """The target's files, one rank after the other; random states belonged to the source's ranks and stay behind."""
    pieces: defaultdict[int, list[tuple[str, Piece]]] = defaultdict(list)
    for name, tensor in index.tensors.items():
        for piece in partition.pieces(name, tensor.shape):
            pieces[piece.rank].append((name, piece))
    named: defaultdict[int, list[str]] = defaultdict(list)
    for name in index.objects:
        if group_of(name) != "random":
            named[partition.object_rank(name)].append(name)
    readers = {name: TensorReader(source, name, tensor) for name, tensor in index.tensors.items()}
    chunks: defaultdict[str, list[Chunk]] = defaultdict(list)
    objects: dict[str, Span] = {}
    for rank in sorted({*pieces, *named}):
        with (directory / f"__{rank}_0.distcp").open("wb") as stream:
            for name, piece in pieces[rank]:
                data = _read_piece(readers[name], piece, index.tensors[name])
                chunks[name].append(Chunk(piece.offsets, piece.sizes, _append(stream, data)))
            for name in named[rank]:
                objects[name] = _append(stream, read_object(source, index, name))
    tensors = {
        name: StoredTensor(tensor.dtype, tensor.shape, tuple(chunks[name])) for name, tensor in index.tensors.items()
    }
    written = PayloadIndex(tensors, objects)
    (directory / METADATA_FILE).write_bytes(pickle.dumps(to_metadata(written)))
    return written


def _read_piece(reader: TensorReader, piece: Piece, stored: StoredTensor) -> torch.Tensor:
    """One piece of the target, put together from those of the source."""
    flat = torch.empty(math.prod(piece.sizes), dtype=getattr(torch, stored.dtype))
    reader.read(Block(piece.offsets, piece.sizes), memoryview(flat.view(torch.uint8).numpy().data))
    return flat.view(piece.sizes)


def _append(stream: io.BufferedWriter, value: object) -> Span:
    start = stream.tell()
    torch.save(value, stream)
    return Span(Path(stream.name).name, start, stream.tell() - start)


def _proved(source: Path, index: PayloadIndex, target: Path, written: PayloadIndex) -> str:
    """The global hash of source and target, both read from the disk.

    Raises:
        CheckpointError: they differ; names the first tensors that do.
    """
    before, after = tensor_hashes(source, index), tensor_hashes(target, written)
    if found := differing(before, after):
        raise CheckpointError(
            f"what was written is not what was read ({'; '.join(found[:3])}); nothing is left of it: a disk, memory "
            "or this program is at fault"
        )
    return combined(after)


def _copy_others(source: Path, target: Path) -> None:
    """Every file of a checkpoint that is not cut by rank: common.pt, metadata.json, tokenizer."""
    for file in sorted(entry for entry in source.rglob("*") if entry.is_file() and entry.suffix != ".distcp"):
        copied = target / file.relative_to(source)
        if file.name not in (METADATA_FILE, STATE_FILE, "config.yaml", manifest.MANIFEST):
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)


def in_words(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in layout.items())
