"""What a run starts from: its own newest checkpoint, another run's weights, or the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_slm.config.load import examine, load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.resume import check_lengths, check_resume
from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ModelConfig
from megatron_slm.train import checkpoint, recovery
from megatron_slm.train.optimizer_state import inner_optimizers
from megatron_slm.train.payload_index import read_index
from megatron_slm.train.replayed_run import refuse_other_replay
from megatron_slm.train.step import TrainState


class Origin(NamedTuple):
    """Where the state of a run comes from: ``path`` is verified, None for a new run."""

    path: Path | None = None
    weights_only: bool = False
    warning: str | None = None
    """Which checkpoint should have been used, and why it is not."""


def verify_origin(config: RunConfig, checkpoints: Path, start: Cursor, identity: str, *, fresh: bool) -> Origin:
    """Find and verify what ``restore`` will load, before anything of the run is written. One rank alone.

    A checkpoint of the run that is damaged, or of another run, is passed over for the one before it.

    Args:
        checkpoints: of the run.
        start: a cursor of the present data; its position does not matter.
        identity: digest of the run's identity.
        fresh: the run's own checkpoints are about to be moved aside.

    Raises:
        CheckpointError: missing, damaged, of another model, or its next samples would not be the ones it promised.
    """
    if fresh:
        _refuse_moved(config.checkpoint.pretrained_checkpoint, checkpoints.parent)
    if not fresh and (own := recovery.newest_whole(checkpoints, identity=identity)) is not None:
        saved, before = Cursor.from_dict(own.state.cursor), examine(own.path / "config.yaml")[0].config.data
        refuse_other_replay(config.data.replay_run, saved, start)
        check_resume(saved, start, before)
        check_lengths(saved.consumed_samples, before.length_schedule, config.data.length_schedule)
        return Origin(own.path, warning=own.warning)
    if config.checkpoint.pretrained_checkpoint is not None:
        source = recovery.find(Path(config.checkpoint.pretrained_checkpoint))
        require_same_shape(source.path, config.model)
        _refuse_adapters(source.path)
        return Origin(source.path, weights_only=True, warning=source.warning)
    return Origin()


def restore(
    state: TrainState, config: RunConfig, origin: Origin | None, *, layout: dict[str, int]
) -> tuple[str | None, list[str]]:
    """Load what ``verify_origin`` has accepted into a new state. Collective.

    Args:
        origin: from ``verify_origin`` on rank 0, whose choice is every rank's; None on the others.
        layout: degrees under which random states have their owners.

    Returns:
        The origin's warning, and what the state came from, in words.

    Raises:
        CheckpointError: of another model.
    """
    chosen = _of_first_rank(origin)
    if chosen.path is None:
        return None, [f"new run from seed {config.train.seed}"]
    if chosen.weights_only:
        checkpoint.load_weights(chosen.path, state.chunks, state.optimizer)
        return chosen.warning, [f"weights from {chosen.path}; new optimizer, step 0"]
    words = _resume(state, chosen.path, layout)
    if state.step >= config.train.train_iters:
        words[0] += f"; train.train_iters = {config.train.train_iters} is reached already"
    return chosen.warning, words


def roll_back(state: TrainState, checkpoints: Path, identity: str, *, layout: dict[str, int]) -> str | None:
    """Load the newest whole checkpoint of a running run. Collective.

    Returns:
        Where it was read from and what was wrong with newer ones; None where there is none.

    Raises:
        CheckpointError: on every rank; none is whole.
    """
    chosen, problem = Origin(), None
    if dist.get_rank() == 0:
        try:
            if (found := recovery.newest_whole(checkpoints, identity=identity)) is not None:
                chosen = Origin(found.path, warning=found.warning)
        except CheckpointError as error:
            problem = str(error)
    shared: list[Any] = [chosen, problem]
    dist.broadcast_object_list(shared, src=0)
    chosen, problem = shared
    if problem is not None:
        raise CheckpointError(problem)
    if chosen.path is None:
        return None
    _resume(state, chosen.path, layout)
    return str(chosen.path) if chosen.warning is None else f"{chosen.path} ({chosen.warning})"


def is_finite(state: TrainState) -> bool:
    """Whether weights and optimizer are finite on every rank. Collective; one pass over the tensors."""
    tensors = [parameter.data for chunk in state.chunks for parameter in chunk.parameters()]
    for inner in inner_optimizers(state.optimizer):
        tensors += [value for values in inner.optimizer.state.values() for value in values.values()]
        tensors += [parameter.data for group in inner.optimizer.param_groups for parameter in group["params"]]
    # A sum is not finite where an element is not, in one pass; where it merely overflows, the elements are looked at.
    sums = torch.stack([tensor.sum().to(torch.float64) for tensor in tensors])
    bad = not bool(torch.isfinite(sums).all()) and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    flag = torch.tensor([int(bad)], device=tensors[0].device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return not bool(flag)


def _refuse_moved(named: str | None, run: Path) -> None:
    if named is not None and run.resolve() in (Path(named).resolve(), *Path(named).resolve().parents):
        raise CheckpointError(
            f"checkpoint.pretrained_checkpoint = {named} lies in the run that --fresh moves aside; choose another "
            "name= for the new run"
        )


def _resume(state: TrainState, path: Path, layout: dict[str, int]) -> list[str]:
    """Make ``state`` what ``path`` holds, in the present order of samples; says what is not as it was saved."""
    saved, absent = checkpoint.load(path, state, layout=layout)
    resumed = check_resume(Cursor.from_dict(saved.cursor), state.cursor)
    state.step, state.cursor, state.records = saved.step, resumed.cursor, dict(saved.records)
    return [
        f"resumed {path} at step {saved.step}",
        *(f"warning: {path.name} holds no {name}: it starts from the loaded weights" for name in absent),
        *(
            f"warning: {path.name} holds {name}, which this run does not keep: it is left behind"
            for name in saved.parts
            if name not in state.parts
        ),
        *resumed.changes,
    ]


def _refuse_adapters(source: Path) -> None:
    """What a run starts from, and compares with, is a model of its weights alone."""
    if checkpoint.has_adapters(read_index(source).tensors):
        raise CheckpointError(
            f"checkpoint.pretrained_checkpoint = {source} has adapters (LoRA); put them into its weights with `mslm "
            f"checkpoint merge-lora {source} --output DIR`, and name that directory"
        )


def _of_first_rank(origin: Origin | None) -> Origin:
    """Rank 0's choice: two ranks that looked for themselves could find two checkpoints."""
    shared = [origin]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None, "rank 0 has verified where the state comes from"
    return shared[0]


def require_same_shape(source: Path, model: ModelConfig) -> None:
    """Compare the fields that decide the parameters' shapes and meaning.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    theirs, ours = (shape(config) for config in (load(source / "config.yaml").config.model, model))
    changed = [f"model.{key}: {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if changed:
        raise CheckpointError(
            f"{source} holds another model ({'; '.join(changed)}); set these fields to the checkpoint's values, or "
            "name another checkpoint.pretrained_checkpoint"
        )


def shape(model: ModelConfig) -> dict[str, object]:
    """Every field that a weight's shape or use depends on, derived values filled in."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "position_embedding_type": model.position_embedding_type,
        "normalization": model.normalization,
        "swiglu": model.swiglu,
        "openai_gelu": model.openai_gelu,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
    }
