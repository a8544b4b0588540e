"""Made-up micro-batches and model outputs for every stage's loss, without a model.

Each row holds four documents of different lengths behind each other (two pairs), each with a prompt that does not
count, and a padding tail. Everything in float64. Shapes: B rows, S slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.parallel.pipeline import Batch
from megatron_slm.stages import distill, dpo, grpo, ppo, reward, sft
from megatron_slm.stages.config import DistillConfig, DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from megatron_slm.stages.segments import Loss

DOCUMENTS = (5, 3, 6, 4)
SLOTS, PROMPT, TOPK = 20, 2, 3
LOSSES = {
    "sft": (sft.loss, SftConfig()),
    "sft dft": (sft.loss, SftConfig(sft_loss="dft")),
    "reward": (reward.loss, RewardConfig(reward_margin=True)),
    "ppo": (ppo.loss, PpoConfig(ppo_convention="verl", ppo_entropy_coef=0.1)),
    "value": (ppo.value_loss, PpoConfig()),
    "distill": (distill.loss, DistillConfig(distill_ce_weight=0.3)),
    "distill stored": (distill.stored_loss, DistillConfig(distill_beta=0.5, teacher_topk=TOPK, distill_ce_weight=0.3)),
}
LOSSES |= {
    f"dpo {kind}": (dpo.loss, DpoConfig(dpo_loss=kind, dpo_label_smoothing=0.1, dpo_sft_weight=0.2))
    for kind in ("sigmoid", "sigmoid_norm", "ipo", "robust", "apo_zero")
}
POLICY = GrpoConfig(
    grpo_kl_beta=0.2,
    grpo_entropy_coef=0.1,
    grpo_is_correction="sequence_truncate",
    grpo_is_cap=1.2,
    grpo_completion_length=7,
)
LOSSES |= {
    f"grpo {kind}": (grpo.loss, dataclasses.replace(POLICY, grpo_loss=kind))
    for kind in ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
}
"""Name -> loss and its configuration, every term in it switched on."""

FIELDS = (
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "generation_logprobs",
    "old_values",
    "returns",
    "sft_weights",
    "margins",
)


@dataclass(frozen=True)
class Made:
    """A loss with its input.

    Attributes:
        output: [..., B, S], or [B, S] of a scalar head.
    """

    loss: Callable[..., Loss]
    config: object
    output: Tensor
    batch: Batch

    def __call__(self, output: Tensor | None = None, batch: Batch | None = None, cp: object = None) -> Loss:
        return self.loss(self.output if output is None else output, batch or self.batch, config=self.config, cp=cp)


def made(name: str, rows: int = 2, seed: int = 1) -> Made:
    """One of ``LOSSES`` on a random micro-batch."""
    loss, config = LOSSES[name]
    random = torch.Generator().manual_seed(seed)
    return Made(loss, config, output_of(name, rows, random), batch_of(rows, random))


def batch_of(rows: int, random: torch.Generator) -> Batch:
    """All fields that any stage reads."""
    weights, segments, positions = torch.zeros(rows, SLOTS), torch.full((rows, SLOTS), -1), torch.zeros(rows, SLOTS)
    chosen = torch.zeros(rows, SLOTS)
    for row in range(rows):
        start = 0
        for number, length in enumerate(DOCUMENTS):
            trained = slice(start + PROMPT, start + length)
            weights[row, trained] = 1.0
            segments[row, trained] = row * len(DOCUMENTS) + number
            positions[row, start : start + length] = torch.arange(length)
            chosen[row, trained] = float(number % 2 == 0)
            start += length
    batch = {"loss_mask": weights, "segments": segments, "position_ids": positions.long()}
    for name in FIELDS:
        batch[name] = torch.randn(rows, SLOTS, generator=random, dtype=torch.float64)
    for name in ("old_logprobs", "ref_logprobs", "generation_logprobs"):
        batch[name] = -batch[name].abs()
    batch["sft_weights"] = chosen.double() * 0.3
    batch["teacher_logprobs"] = batch["old_logprobs"][..., None] - math.log(2 * TOPK) - torch.arange(TOPK) / 2
    return batch


def output_of(name: str, rows: int, random: torch.Generator) -> Tensor:
    """What the model's ending would give: log-probabilities below 0, the rest any numbers."""
    if name in ("reward", "value"):
        return torch.randn(rows, SLOTS, generator=random, dtype=torch.float64)
    width = {"distill": 6, "distill stored": TOPK + 3}.get(name, 3)
    output = torch.randn(width, rows, SLOTS, generator=random, dtype=torch.float64).abs()
    if name == "distill stored":
        return torch.cat([-output[:-2] - math.log(2 * TOPK), output[-2:]])
    logprob = 1 if name == "distill" else 0
    output[logprob] = -output[logprob]
    return output


def part_of(whole: Made, rows: slice) -> tuple[Tensor, Batch]:
    """Some rows as a micro-batch of their own: its sequences are counted from 0."""
    batch = {name: values[rows] for name, values in whole.batch.items()}
    first = rows.start * len(DOCUMENTS)
    batch["segments"] = torch.where(batch["segments"] >= 0, batch["segments"] - first, -1)
    return whole.output[..., rows, :], batch
