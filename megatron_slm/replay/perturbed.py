"""A run made once more from weights that rounding alone has moved: what that changes, a layout may change too.

The weights a run starts with are had from the run itself: one step at a learning rate of zero leaves them as they are.
Each is then moved by one unit in the last place, up or down, and the run is made again from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.config.load import Resolved, load
from megatron_slm.errors import CheckpointError, ReplayError
from megatron_slm.replay.config import ReplayConfig
from megatron_slm.replay.rerun import EXIT_REACHED, EXIT_STOPPED, Start, anew, directory_of
from megatron_slm.train import manifest, publish
from megatron_slm.train.config import OptimizerConfig
from megatron_slm.train.payload import read_object, read_tensor
from megatron_slm.train.payload_index import is_weight, read_index
from megatron_slm.train.payload_stream import PayloadWriter
from megatron_slm.train.run_directory import RunDirectory, locked
from megatron_slm.train.saved_state import STATE_FILE, read_state

INITIAL, MOVED, PERTURBED = "initial", "moved", "perturbed"
ROUTER_BIAS = "expert_bias"
"""A buffer that a step moves whatever the learning rate is; it starts at zero."""


def perturbed_run(own: Path, steps: Sequence[int], start: Start) -> Path:
    """Make the run in ``own`` again from perturbed weights, up to the last of ``steps``; its directory.

    It lies in ``NAME-layout-diff`` beside the run, with what it started from, and is made anew each time.

    Args:
        steps: completed steps of the checkpoints that it has to save.
        start: trains one configuration on as many ranks as it says.

    Raises:
        CheckpointError: nothing can be written there.
        ReplayError: a run has failed.
    """
    place = place_beside(own)
    checkpoint = publish.published(own / "checkpoints")[steps[-1]]
    with locked(RunDirectory(place)):
        anew(place)
        moved = moved_weights(like(checkpoint, place / INITIAL, last=1), start)
        again = like(checkpoint, place / PERTURBED, last=steps[-1], save_interval=math.gcd(*steps))
        trained(start, begun_from(moved, again), steps[-1])
    return place / PERTURBED


def place_beside(own: Path) -> Path:
    """Where everything is made that a comparison of the run in ``own`` needs."""
    return own.with_name(f"{own.name}-layout-diff")


def moved_weights(resolved: Resolved, start: Start) -> Path:
    """A checkpoint of the weights with which a run begins, each moved by one unit in the last place.

    Args:
        resolved: the run, to be ended after its first step; the checkpoint is left beside its directory.
    """
    first = trained(start, with_sections(resolved, optimizer=_without_updates(resolved.config.optimizer)), 1)
    return _moved(first, directory_of(resolved).with_name(MOVED))


def begun_from(weights: Path, resolved: Resolved) -> Resolved:
    """A run that begins from the weights of a checkpoint."""
    checkpoint = dataclasses.replace(resolved.config.checkpoint, pretrained_checkpoint=str(weights))
    return with_sections(resolved, checkpoint=checkpoint)


def like(checkpoint: Path, directory: Path, *, last: int, save_interval: int = 1) -> Resolved:
    """The run of a checkpoint in another directory, on as many ranks, ended after step ``last``."""
    resolved = load(checkpoint / "config.yaml")
    config = resolved.config
    return with_sections(
        resolved,
        name=directory.name,
        log=dataclasses.replace(config.log, runs_dir=str(directory.parent)),
        parallel=dataclasses.replace(config.parallel, world_size=read_state(checkpoint).layout["world_size"]),
        train=dataclasses.replace(config.train, exit_interval=last, exit_duration_in_mins=None),
        checkpoint=dataclasses.replace(
            config.checkpoint, save_interval=save_interval, keep_last=None, save_retain_interval=None
        ),
        replay=ReplayConfig(whole_steps=config.replay.whole_steps),
    )


def _without_updates(optimizer: OptimizerConfig) -> OptimizerConfig:
    """The same with a learning rate of zero."""
    return dataclasses.replace(optimizer, lr=0.0, min_lr=0.0)


def with_sections(resolved: Resolved, **sections: object) -> Resolved:
    """The same with other sections."""
    return Resolved(dataclasses.replace(resolved.config, **sections), resolved.provenance)  # type: ignore[arg-type]


def trained(start: Start, resolved: Resolved, last: int) -> Path:
    """Run it; its checkpoint of step ``last``.

    Raises:
        ReplayError: it has failed, or has ended before.
    """
    directory, code = directory_of(resolved), start(resolved)
    found = publish.published(directory / "checkpoints")
    if code not in (EXIT_REACHED, EXIT_STOPPED) or last not in found:
        raise ReplayError(
            f"The run in {directory}, which measures the tolerance, has ended with exit code {code} and checkpoints of "
            f"steps {sorted(found)}, not of {last}; its message is above. Give one of your own: --reference RUN."
        )
    return found[last]


def _moved(source: Path, target: Path) -> Path:
    """A checkpoint of the weights of ``source`` alone, each moved by one unit in the last place.

    Raises:
        CheckpointError: it cannot be written.
    """
    index, state = read_index(source), read_state(source)
    try:
        target.mkdir()
        writer = PayloadWriter(target)
        for name in filter(is_weight, index.tensors):
            tensor = _perturbed(name, read_tensor(source, index, name))
            writer.block(name, tensor, offsets=[0] * tensor.dim(), shape=tensor.shape)
        for name in filter(is_weight, index.objects):
            writer.value(name, read_object(source, index, name))
        writer.close()
        shutil.copy2(source / "config.yaml", target)
        shutil.copytree(source / "tokenizer", target / "tokenizer")
        weights = dataclasses.replace(state, records={}, parts=[], global_hash="", averaged=[str(source.resolve())])
        (target / STATE_FILE).write_text(weights.to_json(), encoding="utf-8")
        manifest.seal(target, step=state.step, identity=manifest.read_manifest(source).identity)
    except (OSError, RuntimeError) as error:  # torch fails in words of its own where the disk takes no more
        raise CheckpointError(f"{target} cannot be written ({error}); make room there.") from error
    return target


def _perturbed(name: str, tensor: Tensor) -> Tensor:
    """Every element one unit in the last place of its format up or down; zeros stay."""
    if name.endswith(ROUTER_BIAS):
        return torch.zeros_like(tensor)
    if not tensor.is_floating_point():
        return tensor
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
    random = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, tensor.shape, generator=random).double().mul_(2.0).sub_(1.0)
    return (tensor.double() * (1.0 + sign * torch.finfo(tensor.dtype).eps)).to(tensor.dtype)
