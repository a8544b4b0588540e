"""What the stages after pretraining hold beside the trained model, in the dry world.

``device.preload("cpu")`` comes before this is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_slm import run_model
from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import UserError
from megatron_slm.memory.ledger import Ledger, Row
from megatron_slm.memory.rank import BuildBeside, Fields
from megatron_slm.memory.report import gib
from megatron_slm.memory.roles import held_layers
from megatron_slm.model.config import LoraConfig, ModelConfig
from megatron_slm.model.ending import Ending, HiddenStates, Scalar, TokenScores
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.run_stage import scored_vocabulary
from megatron_slm.stages import made_up
from megatron_slm.stages.reference import Frozen
from megatron_slm.stages.teacher import TeacherMatrix
from megatron_slm.train import recovery

BuildTrained = Callable[..., run_model.BuiltModel]
"""``run_model.build_model``, or what declares a GPU's."""
ROLLOUT = "rollout"
"""Kind of what is held outside of the step, beyond the most that the step holds."""


def fields(config: RunConfig, vocab_size: int) -> Fields:
    """Shape and type of everything in a micro-batch of the stage.

    Boundaries of documents are left out: they are values, of which the dry world has none.
    """
    rows = [np.random.default_rng(number) for number in range(config.train.micro_batch_size)]
    width = (model_of(config, config.distill.distill_teacher) or config.model).hidden_size
    batch = made_up.micro_batch(config, rows, vocab_size, teacher_hidden_size=width)
    return {name: (tuple(one.shape), one.dtype) for name, one in batch.items() if name != "document_ids"}


def beside(config: RunConfig, build: BuildTrained) -> dict[str, BuildBeside]:
    """The models that are there in every step beside the trained one, as the run builds them."""
    own, found = config.model, dict[str, BuildBeside]()
    if config.stage == "ppo":
        found["critic"] = _critic(build)
    if referenced(config) and not config.lora.lora_rank:
        found["reference"] = _frozen(own, lambda config, size: TokenScores(scored_vocabulary(config, size)))
    if config.stage in ("ppo", "grpo") and config.rollout.reward_model is not None:
        found["reward model"] = _frozen(model_of(config, config.rollout.reward_model) or own, lambda *_: Scalar())
    if runs_teacher(config):
        found["teacher"] = _frozen(model_of(config, config.distill.distill_teacher) or own, lambda *_: HiddenStates())
    return found


def runs_teacher(config: RunConfig) -> bool:
    """Whether a second model teaches in every step."""
    return config.stage == "distill" and config.distill.teacher_topk is None


def referenced(config: RunConfig) -> bool:
    """Whether a frozen copy of the model is compared with in every step."""
    return (
        (config.stage == "dpo" and config.dpo.dpo_reference == "live")
        or (config.stage == "ppo" and config.ppo.ppo_kl_coef > 0)
        or (config.stage == "grpo" and config.grpo.grpo_kl_beta > 0)
    )


def model_of(config: RunConfig, path: str | None) -> ModelConfig | None:
    """The model of another run or checkpoint, at this run's length; None where it is not here to be read."""
    if path is None:
        return None
    try:
        theirs = load(recovery.find(Path(path), hashes=False).path / "config.yaml").config
    except UserError:
        return None
    return replace(theirs.model, seq_length=config.model.seq_length)


def notes(config: RunConfig) -> list[str]:
    """What a ledger of this stage counts and what it does not."""
    found = []
    others = {"rollout.reward_model": config.rollout.reward_model, "distill.distill_teacher": None}
    if runs_teacher(config):
        others["distill.distill_teacher"] = config.distill.distill_teacher
    for key, path in others.items():
        if path is not None and model_of(config, path) is None:
            found.append(f"{key} = {path} is not here: it is taken to be as large as the trained model.")
    if config.stage == "dpo" and config.dpo.dpo_reference == "precomputed" and not config.lora.lora_rank:
        found.append("the reference is there before the first step alone (dpo.dpo_reference=precomputed).")
    if names := list(beside(config, run_model.build_model)):
        found.append(
            f"counted beside the trained model: {', '.join(names)}. Not counted: the activations of their own passes, "
            "which come before or after the trained model's."
        )
    if draws(config):
        layers = max(sum(map(len, chunks)) for chunks in held_layers(config))
        found.append(
            f"a rollout holds up to {gib(cache_bytes(config, layers))} GiB of keys and values (rollout.batch_size "
            f"{config.rollout.batch_size}) where a step holds activations; what is beyond a step's most is counted."
        )
    return found


def outside_the_step(config: RunConfig, ledgers: Sequence[Ledger]) -> list[Ledger]:
    """The same with what a rollout holds beyond the most that a step holds."""
    found, held = [], held_layers(config)
    for one in ledgers:
        size = cache_bytes(config, sum(map(len, held[one.pipeline_rank]))) if draws(config) else 0
        over = one.timeline.static_bytes + size - one.timeline.peak_bytes
        last = len(one.timeline.moments) - 1
        if over > 0:
            row = Row(one.rank, one.pipeline_rank, 0, "", "keys and values", ROLLOUT, over, over, over, 0, last)
            one = replace(one, rows=[*one.rows, row])
        found.append(one)
    return found


def draws(config: RunConfig) -> bool:
    """Whether the trained model draws answers."""
    on_policy = config.stage == "distill" and config.distill.distill_on_policy_fraction > 0
    return config.stage in ("ppo", "grpo") or on_policy


def cache_bytes(config: RunConfig, layers: int) -> int:
    """Keys and values of a batch of rollouts, each as long as a sequence may be, in ``layers`` layers of a rank."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    width, groups = model.head_dim, max(1, model.query_groups // tp)
    if model.multi_latent_attention:  # cached as what is attended to: a key and a value of every head
        groups = model.num_attention_heads // tp
        width = model.qk_head_dim + model.qk_pos_emb_head_dim
    itemsize = torch.empty(0, dtype=getattr(torch, config.precision.params_dtype)).element_size()
    return 2 * layers * config.rollout.batch_size * model.seq_length * groups * width * itemsize


def _frozen(model: ModelConfig, ending: Callable[[RunConfig, int], Ending | Scalar]) -> BuildBeside:
    def build(
        config: RunConfig, groups: Any, device: torch.device, vocab_size: int, trained: list[nn.Module]
    ) -> Frozen:
        own = replace(config, model=model, lora=LoraConfig() if model is not config.model else config.lora)
        frozen = Frozen(run_model.build_frozen(own, groups, device, vocab_size, ending(config, vocab_size)))
        matrix = getattr(getattr(unwrap(trained[-1]), "ending", None), "teacher_weight", None)
        if isinstance(matrix, TeacherMatrix):
            matrix.take(frozen)
        return frozen

    return build


def _critic(build: BuildTrained) -> BuildBeside:
    def built(config: RunConfig, groups: Any, device: torch.device, vocab_size: int, trained: list[nn.Module]) -> Any:
        return build(config, groups, device, vocab_size, Scalar())

    return built
