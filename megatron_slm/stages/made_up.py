"""Micro-batches of a stage without any data: every field that its loss reads, rows a function of their generator alone.

Documents are of uneven lengths, their first tokens are a prompt, and rows hold uneven numbers of them: what is divided
by the wrong number shows. Shapes: B rows, S slots, K tokens of a stored teacher, G hidden of a running one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.examples.document import Batch, Document, build_rows, row_of
from megatron_slm.stages import teacher

EOD, FIRST_TOKEN = 0, 1
LOGPROB, SPREAD = -6.0, 0.3
"""About what a model of random weights says of a token, so that no ratio is far from 1; and how far it varies."""
SFT_WEIGHT = 0.02
LONGEST_SHARE = 4
"""A document takes at most this part of a row: a row has up to so many of them."""

FIELDS = {
    "reward": ("margins",),
    "dpo": ("margins", "ref_logprobs"),
    "ppo": ("generation_logprobs", "old_logprobs", "advantages", "old_values", "returns"),
    "grpo": ("generation_logprobs", "old_logprobs", "advantages"),
}
MEANS = dict.fromkeys(("ref_logprobs", "old_logprobs", "generation_logprobs"), LOGPROB)
DOUBLE = ("advantages", "returns")
"""What a run has in float64; DPO's reference too."""


def fields_of(config: RunConfig) -> tuple[str, ...]:
    """Numbers [B, S] that go with every label of a micro-batch of the stage."""
    priced = (config.stage == "ppo" and config.ppo.ppo_kl_coef > 0) or (
        config.stage == "grpo" and config.grpo.grpo_kl_beta > 0
    )
    return (*FIELDS.get(config.stage, ()), *(("ref_logprobs",) if priced else ()))


def micro_batch(
    config: RunConfig,
    rows: Sequence[np.random.Generator],
    vocab_size: int,
    *,
    teacher_hidden_size: int = 8,
    masked: bool = False,
) -> Batch:
    """One micro-batch, whole in S and on the host.

    Args:
        rows: draws each row.
        masked: no label counts.
    """
    documents = [_documents(config, random, vocab_size, masked=masked) for random in rows]
    batch = build_rows([row_of(each) for each in documents], seq_length=config.model.seq_length, eod_id=EOD)
    doubled = (*DOUBLE, "ref_logprobs") if config.stage == "dpo" else DOUBLE
    batch |= {name: batch[name].double() for name in doubled if name in batch}
    if config.stage == "dpo" and config.dpo.dpo_sft_weight:
        chosen = (batch["segments"] >= 0) & (batch["segments"] % 2 == 0)
        batch["sft_weights"] = torch.where(chosen, SFT_WEIGHT, 0.0).double()
    if config.stage == "distill":
        batch |= _teacher(config, batch["tokens"], vocab_size, teacher_hidden_size)
    return batch


def teacher_rows(first: int, count: int, hidden_size: int = 8) -> Tensor:
    """Rows [V_l, G] of a made-up teacher's output matrix from ``first`` on; float64, the same under every division."""
    numbers = torch.arange(first + 1, first + count + 1, dtype=torch.float64)
    return torch.sin(0.7 * numbers[:, None] * torch.arange(1, hidden_size + 1, dtype=torch.float64))


def _documents(config: RunConfig, random: np.random.Generator, vocab_size: int, *, masked: bool) -> list[Document]:
    """Two or four documents: one pair or two."""
    longest = max(3, config.model.seq_length // LONGEST_SHARE)
    count = int(random.choice([2, LONGEST_SHARE]))
    return [_document(config, random, vocab_size, longest, masked=masked) for _ in range(count)]


def _document(
    config: RunConfig, random: np.random.Generator, vocab_size: int, longest: int, *, masked: bool
) -> Document:
    pooled = config.stage == "reward"
    length = int(random.integers(3, longest + (not pooled) + 1))
    prompt = int(random.integers(0, length - 1))
    weights = np.zeros(length, np.float32)
    if not masked:
        weights[prompt + 1 :] = 1.0
    fields = {
        name: random.normal(MEANS.get(name, 0.0), SPREAD, length).astype(np.float32) for name in fields_of(config)
    }
    tokens = random.integers(FIRST_TOKEN, vocab_size, length)
    return Document(tokens, weights, fields, pooled=pooled and not masked)


def _teacher(config: RunConfig, tokens: Tensor, vocab_size: int, hidden_size: int) -> Batch:
    """What a running or a stored teacher has said of each position."""
    if (kept := config.distill.teacher_topk) is None:
        steps = torch.arange(1, hidden_size + 1, dtype=torch.float64)
        return {teacher.FIELD: torch.sin(tokens[..., None] * steps).to(getattr(torch, config.precision.params_dtype))}
    ids = (tokens[..., None] * 7 + torch.arange(kept)) % vocab_size
    logprobs = -torch.log(torch.tensor(2.0 * kept)) - torch.arange(kept) / kept
    return {"teacher_ids": ids, "teacher_logprobs": logprobs.float().expand(*ids.shape)}
