"""Trains a small model for a few steps of a stage on made-up examples, under any layout: ``tests/training.py`` after
pretraining.

What a batch holds is a function of step and row alone. Documents of uneven lengths, labels with weights, rows with
uneven numbers of documents: whatever is divided by the wrong number shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_slm.data.examples.document import Document, Row, build_rows, row_of
from megatron_slm.stages import config as stages
from megatron_slm.train.config import PrecisionConfig
from tests.training import VOCAB, Outcome, Task, build, finish, gathered, global_tensors, with_full_parameters

EOD = 3

CONFIGS: dict[str, Any] = {
    "sft": stages.SftConfig(),
    "sft dft": stages.SftConfig(sft_loss="dft"),
    "reward": stages.RewardConfig(reward_margin=True),
    "dpo": stages.DpoConfig(dpo_sft_weight=0.2),
    "dpo ipo": stages.DpoConfig(dpo_loss="ipo"),
    "grpo": stages.GrpoConfig(grpo_loss="grpo", grpo_kl_beta=0.1, grpo_entropy_coef=0.01),
    "grpo dapo": stages.GrpoConfig(grpo_loss="dapo"),
    "grpo gspo": stages.GrpoConfig(grpo_loss="gspo"),
    "ppo": stages.PpoConfig(ppo_entropy_coef=0.01),
    "critic": stages.PpoConfig(),
    "distill": stages.DistillConfig(distill_beta=0.4, distill_ce_weight=0.1),
    "distill stored": stages.DistillConfig(teacher_topk=4),
}
"""What is trained, by name; the first word is the stage."""


def train_stage(task: Task, name: str, packed: bool = True, gradients_of: int = 0) -> Outcome | None:
    """Take ``task.iters`` steps on this rank; rank 0 returns the outcome of the whole job.

    Args:
        gradients_of: number of the step whose gradients it holds.
    """
    from megatron_slm.parallel.gradients import zero_gradients
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.replay.shards import gradient_shards
    from megatron_slm.train.optimizer import apply_update, gradient_norm, set_learning_rate

    groups, chunks, optimizer = build(task, ending_of(name, task.precision))
    loss = loss_of(name, groups.cp)
    outcome = Outcome(initial=global_tensors(chunks))
    for step in range(task.iters):
        zero_gradients(chunks)
        optimizer.zero_grad()
        batches = micro_batches(task, name, step, groups, packed=packed)
        logged = run_schedule(
            chunks, batches, loss, forward_only=False, seq_length=task.model.seq_length, groups=groups
        )
        set_learning_rate(optimizer, task.optimizer.lr, task.optimizer.lr)
        outcome.grad_norms.append(gradient_norm(optimizer))
        if step == gradients_of:
            outcome.gradients = gathered(gradient_shards(chunks, optimizer))
        apply_update(optimizer, outcome.grad_norms[-1])
        outcome.losses += means(logged, groups)
    with_full_parameters(chunks)
    outcome.weights = global_tensors(chunks)
    finish()
    return outcome if dist.get_rank() == 0 else None


def ending_of(name: str, precision: PrecisionConfig) -> Any:
    """How the model of a stage ends."""
    from megatron_slm.model.ending import Scalar, TokenDivergence, TokenScores
    from megatron_slm.parallel.vocab_scores import Vocabulary

    vocabulary = Vocabulary(VOCAB, 0.9)
    if name in ("reward", "critic"):
        return Scalar(0.02)
    if name == "distill":
        dtype = torch.float64 if precision.fp64 else torch.float32
        return TokenDivergence(vocabulary, CONFIGS[name].distill_beta, partial(_teacher_rows, dtype))
    return TokenScores(vocabulary)


def _teacher_rows(dtype: torch.dtype) -> torch.Tensor:
    """This tp rank's rows of a made-up teacher's output matrix."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    whole = torch.randn(512, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return whole[rank * 512 // size :][: 512 // size].to(dtype)


def loss_of(name: str, cp: Any) -> Callable[..., Any]:
    """The loss of a stage."""
    from megatron_slm.stages import distill, dpo, grpo, ppo, reward, sft

    functions: dict[str, Any] = {
        "sft": sft.loss,
        "reward": reward.loss,
        "dpo": dpo.loss,
        "grpo": grpo.loss,
        "ppo": ppo.loss,
        "critic": ppo.value_loss,
        "distill": distill.loss,
        "distill stored": distill.stored_loss,
    }
    function = functions.get(name) or functions[name.split()[0]]
    return partial(function, config=CONFIGS[name], cp=cp)


def means(logged: list[dict[str, torch.Tensor]], groups: Any) -> list[float]:
    """Everything that is logged, over the global batch."""
    names = list(logged[0]) if logged else []
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, names)
    names = next(each for each in told if each)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for entry in logged:
        sums += torch.stack([entry[name] for name in names])
    if groups.tp.rank() != 0:
        sums.zero_()
    dist.all_reduce(sums)
    return [total / count if count else 0.0 for total, count in sums.tolist()]


def micro_batches(
    task: Task, name: str, step: int, groups: Any, *, packed: bool = True
) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of one global batch."""
    from megatron_slm.parallel.context import cut_batch

    rows, length = task.train.global_batch_size, task.model.seq_length
    everything = [documents(name, step, row) for row in range(rows)]
    weight = 0.2 * rows_pairs(everything) / chosen_labels(everything)
    size, dp, rank = task.train.micro_batch_size, groups.dp.size(), groups.dp.rank()
    found = []
    for first in range(rank * size, rows, size * dp):
        mine = [each for documents in everything[first : first + size] for each in laid_out(documents, packed)]
        batch = build_rows(mine, seq_length=length, eod_id=EOD)
        if name.startswith("dpo"):
            chosen = (batch["segments"] >= 0) & (batch["segments"] % 2 == 0)
            batch["sft_weights"] = torch.where(chosen, weight, 0.0).double()
        if name == "distill":
            batch["teacher_hidden"] = torch.sin(batch["tokens"][..., None] * torch.arange(1.0, 9.0).double())
            batch["teacher_hidden"] = batch["teacher_hidden"].to(
                torch.float64 if task.precision.fp64 else torch.float32
            )
        if name == "distill stored":
            batch["teacher_ids"] = (batch["tokens"][..., None] * 7 + torch.arange(4)) % VOCAB
            batch["teacher_logprobs"] = -torch.linspace(1.0, 3.0, 4).double().expand(*batch["tokens"].shape, 4)
        found.append(cut_batch(batch, groups.cp.rank(), groups.cp.size()))
    return found


def laid_out(found: list[Document], packed: bool) -> list[Row]:
    """One row of all documents, or a row for each pair of them."""
    return [row_of(found)] if packed else [row_of(found[at : at + 2]) for at in range(0, len(found), 2)]


def documents(name: str, step: int, row: int) -> list[Document]:
    """The documents of a row: two or four, which are one pair or two."""
    random = np.random.default_rng([step, row])
    count = 2 if row % 3 else 4
    return [document(name, random, int(random.integers(3, 8))) for _ in range(count)]


def document(name: str, random: np.random.Generator, length: int) -> Document:
    """A document of ``length`` tokens, the first of which are a prompt."""
    tokens = random.integers(4, VOCAB, length)
    weights = (np.arange(length) > random.integers(0, 2)).astype(np.float32)
    if name.startswith("sft"):
        weights *= random.choice([1.0, 0.5], length)
    fields = {
        key: random.normal(shift, 0.3, length).astype(np.float32)
        for key, shift in {
            "ref_logprobs": -6.0,
            "old_logprobs": -6.0,
            "old_values": 0.0,
            "returns": 0.5,
        }.items()
    }
    fields["advantages"] = np.full(length, random.normal(), dtype=np.float32)
    fields["margins"] = np.full(length, 0.25, dtype=np.float32)
    return Document(tokens, weights.astype(np.float32), fields, pooled=name == "reward")


def rows_pairs(everything: list[list[Document]]) -> int:
    """Pairs of the global batch."""
    return sum(len(found) // 2 for found in everything)


def chosen_labels(everything: list[list[Document]]) -> int:
    """Labels that count on the chosen sides of the global batch."""
    return sum(int((each.weights[1:] != 0).sum()) for found in everything for each in found[::2])
