"""What a run starts from: its own newest checkpoint, another run's weights, or the seed."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict
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
from megatron_slm.train import checkpoint, parents, recovery
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
    source = None
    if config.checkpoint.pretrained_checkpoint is not None:
        source = recovery.find(Path(config.checkpoint.pretrained_checkpoint))
        _require_fitting(parents.PRETRAINED, source, config, start)
        _refuse_adapters(source.path)
        _refuse_number(source.path, config.stage)
    if config.stage == "ppo" and config.ppo.ppo_critic_checkpoint is not None:
        critic = recovery.find(Path(config.ppo.ppo_critic_checkpoint), hashes=False)  # who builds it reads every byte
        _require_fitting("ppo.ppo_critic_checkpoint", critic, config, start)
    return Origin() if source is None else Origin(source.path, weights_only=True, warning=source.warning)


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
        parents.note(state.records, parents.PRETRAINED, chosen.path)
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
        *(f"warning: {path.name} {without(name, saved.parts)}" for name in absent),
        *(
            f"warning: {path.name} holds {name}, which this run does not keep: it is left behind"
            for name in saved.parts
            if name not in state.parts
        ),
        *resumed.changes,
    ]


def without(name: str, saved_parts: Collection[str]) -> str:
    """What becomes of a part of the state that was not read from a checkpoint which holds ``saved_parts``."""
    if name in saved_parts:
        return f"holds the {name} of another layout, whose ranks had it: it is drawn anew, because the layout changed"
    return f"holds no {name}: it starts from the loaded weights"


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


def _refuse_number(source: Path, stage: str) -> None:
    """What ends with words does not start from what ends with a number."""
    if stage != "reward" and load(source / "config.yaml").config.stage == "reward":
        raise CheckpointError(
            f"{parents.PRETRAINED} = {source} is a reward model: it ends with a number and has no words. Name a model "
            "of another stage; rollout.reward_model and ppo.ppo_critic_checkpoint use this one."
        )


def _require_fitting(key: str, source: recovery.Recovered, config: RunConfig, start: Cursor) -> None:
    """Refuse what an option names where its weights mean something else in this run.

    A converted model without a tokenizer has no hash to compare.
    """
    require_same_shape(source.path, config.model, key=key, may_stretch=config.stage == "pretrain")
    if source.state.tokenizer_hash not in ("", start.tokenizer_hash):
        raise CheckpointError(
            f"{key} = {source.path} has another tokenizer ({source.state.tokenizer_hash}) than the data "
            f"({start.tokenizer_hash}): the same ids mean other text. Prepare or compile the data with the tokenizer "
            "of that checkpoint."
        )


MAY_DIFFER = (
    "seq_length", "max_position_embeddings",
    "vocab_size", "make_vocab_size_divisible_by",
    "attention_dropout", "hidden_dropout",
    "moe_router_bias_update_rate", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_expert_capacity_factor", "moe_token_drop_policy",
    "mtp_num_layers", "mtp_loss_scaling_factor",
    "init_method_std",
)  # fmt: skip
"""Fields of the section ``model`` that say how long rows are and how weights are trained, not what they compute.

Reading the payload compares the rows of the vocabulary; predictions of further tokens may be left out or begun.
"""

STRETCHING = (
    "rotary_base", "use_rope_scaling", "rope_scaling_factor",
    "rope_type", "rotary_scaling_factor", "original_max_position_embeddings", "mscale", "mscale_all_dim",
)  # fmt: skip
"""Fields that pretraining may change when it goes on with longer samples: the weights learn to follow."""


def require_same_shape(source: Path, model: ModelConfig, *, key: str, may_stretch: bool = False) -> None:
    """Compare every field that decides the parameters' shapes and meaning.

    Args:
        key: the option that names ``source``.
        may_stretch: rotary frequencies may be others.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    theirs, ours = (_meaning(config) for config in (load(source / "config.yaml").config.model, model))
    allowed = {*MAY_DIFFER, *(STRETCHING if may_stretch else ())}
    changed = [
        f"model.{field}: {theirs[field]} there, {ours[field]} here"
        for field in ours
        if field not in allowed and not _same(theirs[field], ours[field])
    ]
    if changed:
        raise CheckpointError(
            f"{source} holds another model ({'; '.join(changed)}); set these fields to the checkpoint's values, or "
            f"name another {key}"
        )


def _same(one: object, other: object) -> bool:
    """Equal to the digits of fp32, in which other programs' files hold such numbers."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _meaning(model: ModelConfig) -> dict[str, object]:
    """All fields, derived values filled in."""
    return {**asdict(model), **shape(model), "moe_ffn_hidden_size": model.expert_ffn_size}


def shape(model: ModelConfig) -> dict[str, object]:
    """The main fields that a weight's shape or use depends on, derived values filled in: of the run's identity."""
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
