"""Checkpoints in core's ``torch_dist`` format: what a resume needs, under any layout, published in two phases.

A checkpoint directory holds core's payload (``*.distcp``, ``.metadata``, ``common.pt``, ``metadata.json``), our
``state.json`` (step, data cursor, layout, schema version), ``config.yaml``, ``tokenizer/`` and ``manifest.json``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_slm.errors import CheckpointError, SaveError
from megatron_slm.model.config import ADAPTER_SUFFIX
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train import payload_write, publish
from megatron_slm.train.ema import ema_request
from megatron_slm.train.hook import OfRank, Part
from megatron_slm.train.optimizer_shards import load_optimizer_state, optimizer_request, optimizer_shards
from megatron_slm.train.payload import first_failure, read_payload
from megatron_slm.train.payload_index import is_weight, read_index
from megatron_slm.train.payload_write import StagedPayload, on_first_rank
from megatron_slm.train.retention import Retention
from megatron_slm.train.saved_state import STATE_FILE, SavedState, read_state
from megatron_slm.train.step import TrainState

HEAD = "value_head.weight"


@dataclass(frozen=True)
class Destination:
    """Where and how the checkpoints of a run are published.

    Attributes:
        directory: the run's checkpoints directory.
        identity: digest of the run's identity.
        retention: which of the earlier ones stay.
        add_files: called on rank 0 with the temporary directory, to add the configuration and the tokenizer.
        group: process group of all ranks that the writing may use; None is the default group.
    """

    directory: Path
    identity: str
    add_files: Callable[[Path], None]
    retention: Retention = field(default_factory=Retention)
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Staged:
    """A checkpoint that waits to be written."""

    step: int
    payload: StagedPayload
    state: str
    """The text of ``state.json``."""


def stage(saved: SavedState, state: TrainState, *, copy: bool) -> Staged:
    """Gather what a checkpoint holds; collective.

    Args:
        saved: what is not tensors.
        copy: of every tensor, so that training may go on before ``write``.
    """
    models = sharded_models(state.chunks)
    payload = {
        **models,
        "optimizer": optimizer_shards(state.optimizer, state.chunks, models),
        **_parts(models, state.parts),
        "random": _random_object(state.random.capture()),
        "content_metadata": _content(),
    }
    return Staged(saved.step, payload_write.stage(payload, copy=copy), saved.to_json())


def write(staged: Staged, to: Destination) -> Path:
    """Write and publish ``iter_NNNNNNN``; collective over ``to.group``. Nothing refers to it before it is durable.

    Raises:
        SaveError: on every rank, when one of them cannot write. The checkpoints before it are as they were.
    """
    final = publish.checkpoint_path(to.directory, staged.step)
    temporary: Path | None = None

    def finish(temporary: Path) -> None:
        (temporary / STATE_FILE).write_text(staged.state, encoding="utf-8")
        to.add_files(temporary)
        publish.publish(temporary, final, identity=to.identity)
        to.retention.apply(to.directory, staged.step)

    try:
        temporary = on_first_rank("begin", lambda: publish.begin(to.directory, staged.step), to.group)
        payload_write.write(staged.payload, temporary, to.group)
        on_first_rank("publish", lambda: finish(temporary), to.group)
    except CheckpointException as failed:
        error = first_failure(failed)
        if temporary is not None and dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(
            f"the checkpoint of step {staged.step} could not be written to {to.directory} ({error}); those before it "
            "are whole. Make room or the directory writable, and start the run again: it resumes from the newest"
        ) from error
    return final


def load(path: Path, state: TrainState, *, layout: dict[str, int]) -> tuple[SavedState, list[str]]:
    """Read weights, optimizer, parts and, under the layout it was saved with, random states into ``state``. Collective.

    Under another layout the random states have no owner: they are seeded anew from the seed and the step. Step and
    cursor of ``state`` are the caller's to set.

    Returns:
        What is not tensors, and the names of the state's parts that the checkpoint does not have: those are as they
        were.

    Raises:
        CheckpointError: damaged, of another model, or without an optimizer.
    """
    saved = read_state(path)
    if saved.averaged:
        raise CheckpointError(
            f"{path} holds averaged weights without an optimizer; name it as checkpoint.pretrained_checkpoint of a new "
            "run"
        )
    same_layout = saved.layout == layout and not saved.resharded_from
    stored = {
        name: part
        for name, part in state.parts.items()
        if name in saved.parts and (same_layout or not isinstance(part, OfRank))
    }
    models = sharded_models(state.chunks)
    index = read_index(path)
    request = {
        **models,
        "optimizer": optimizer_request(state.optimizer, state.chunks, models, index.tensors),
        **_parts(models, stored),
    }
    if same_layout:
        request["random"] = _random_object(None)
    loaded = read_payload(request, path)
    _load_chunks(loaded, state.chunks)
    load_optimizer_state(state.optimizer, state.chunks, loaded["optimizer"])
    for name, part in stored.items():
        part.load(loaded[name])
    if same_layout:
        state.random.restore(loaded["random"])
    else:
        state.random.reseed(saved.step)
    return saved, [name for name in state.parts if name not in stored]


def load_weights(
    path: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer | None = None, *, ema: bool = False
) -> None:
    """Read the weights alone, of any layout; an optimizer's master copies follow them. Collective.

    What the checkpoint does not have because it begins here stays as it is: a head (``value_head``: a reward model or
    critic that begins with the weights of a language model), and adapters.

    Args:
        ema: read their averages instead.

    Raises:
        CheckpointError: damaged, of another model, without averages, or with adapters where ``chunks`` have none.
    """
    saved = read_state(path)
    if ema and "ema" not in saved.parts:
        raise CheckpointError(
            f"{path} holds no averaged weights: its run did not have train.ema_decay. Leave --ema out, or name a "
            "checkpoint that has them"
        )
    request = sharded_models(chunks)
    stored = read_index(path).tensors
    own = {
        name: {key: entries.pop(key).data for key in [*entries] if _is_new(key, stored)}
        for name, entries in request.items()
    }
    if has_adapters(stored) and not has_adapters(key for entries in request.values() for key in entries):
        raise CheckpointError(
            f"{path} has adapters (LoRA), and this model none: without them it is another model. Put them into the "
            "weights with mslm checkpoint merge-lora, or give this run the section lora of the checkpoint's config.yaml"
        )
    loaded = read_payload(ema_request(request) if ema else request, path)
    for name, kept in own.items():
        loaded[name].update(kept)
    _load_chunks(loaded, chunks)
    if optimizer is not None:
        optimizer.reload_model_params()


def has_adapters(names: Iterable[str]) -> bool:
    """Whether a model's tensors of these names are adapters, some of them."""
    return any(is_weight(name) and ADAPTER_SUFFIX in name for name in names)


def _is_new(key: str, stored: Collection[str]) -> bool:
    """Whether an entry of the model is of a kind of which the checkpoint has nothing."""
    if key.endswith(HEAD):
        return not any(is_weight(name) and name.endswith(HEAD) for name in stored)
    return ADAPTER_SUFFIX in key and not has_adapters(stored)


def _content() -> dict[str, Any]:
    """What core is told about the payload, in a new dictionary each time because core adds process groups to it.

    "Fully reshardable" gathers the optimizer's flat buffers into tensors of the parameters' own shapes: any layout can
    read it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_models(chunks: list[nn.Module]) -> dict[str, Any]:
    """Sharded state of every chunk. Keys inside are global names, so chunks of another layout find theirs."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=_content()) for name, chunk in zip(names, chunks, strict=True)
    }


def _parts(models: dict[str, Any], parts: Mapping[str, Part]) -> dict[str, Any]:
    """Sharded state of the parts, to be saved or to be filled."""
    return {name: part.sharded_state(models) for name, part in parts.items()}


def _random_object(state: Any) -> ShardedObject:
    """One entry a rank. Their number is the world size, so they are asked for only under the same layout."""
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _load_chunks(loaded: dict[str, Any], chunks: list[nn.Module]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"])
