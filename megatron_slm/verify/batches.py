"""Made-up batches: a pure function of (seed, step, index of the sample), so that every layout reads the same.

Ranks and micro-batches must hold uneven numbers of loss tokens: what divides by the tokens of one rank instead of those
of the batch would go unnoticed otherwise.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import torch

from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.batch import Batch, build_samples
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.order import SampleOrder
from megatron_slm.stages import made_up
from megatron_slm.verify.setting import VOCAB_SIZE

EOD = 0
DOCUMENT_ENDS = 0.1
"""Share of the tokens that end a document, where attention stays inside documents."""


def micro_batches(config: RunConfig, step: int, *, dp_rank: int, dp_size: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank, tensors [B, S], whole in S.

    Micro-batch ``j`` of rank ``r`` is number ``j * dp_size + r`` of the step, whatever the layout.
    """
    size, samples = config.train.micro_batch_size, config.train.global_batch_size
    return [_micro_batch(config, step, first // size) for first in range(dp_rank * size, samples, size * dp_size)]


def _micro_batch(config: RunConfig, step: int, number: int) -> Batch:
    if config.stage != "pretrain":
        return _of_examples(config, step, number)
    size, length = config.train.micro_batch_size, config.model.seq_length
    rows, kept = [], []
    for index in range(number * size, (number + 1) * size):
        random = _generator(config.train.seed, step, index)
        row = random.integers(1, config.model.vocab_size or VOCAB_SIZE, length + 1)
        if config.data.reset_attention_mask:
            row[random.random(length + 1) < DOCUMENT_ENDS] = EOD
        rows.append(row)
        kept.append(random.random(length) < _kept_share(config, number, index, random))
    batch = build_samples(
        rows,
        seq_length=length,
        eod_id=EOD,
        reset_attention_mask=config.data.reset_attention_mask,
        reset_position_ids=config.data.reset_position_ids,
        eod_mask_loss=config.data.eod_mask_loss,
    )
    batch["loss_mask"].mul_(torch.from_numpy(np.stack(kept)))
    return batch


def _of_examples(config: RunConfig, step: int, number: int) -> Batch:
    """The same of a stage after pretraining: whole documents with what its loss reads of each label."""
    size, batches = config.train.micro_batch_size, config.train.global_batch_size // config.train.micro_batch_size
    rows = [_generator(config.train.seed, step, index) for index in range(number * size, (number + 1) * size)]
    vocab_size = config.model.vocab_size or VOCAB_SIZE
    return made_up.micro_batch(config, rows, vocab_size, masked=number == 1 and batches > 2)


def _kept_share(config: RunConfig, number: int, index: int, random: np.random.Generator) -> float:
    """Share of a sample's tokens that count: one sample nearly none, one micro-batch none, the others anything."""
    batches = config.train.global_batch_size // config.train.micro_batch_size
    if number == 1 and batches > 2:
        return 0.0
    return 0.1 if index == 0 and batches > 1 else 0.3 + 0.7 * random.random()


def _generator(seed: int, step: int, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\0{step}\0{index}".encode(), digest_size=8, person=b"mslm verify").digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def start_cursor(config: RunConfig) -> Cursor:
    """The cursor of a run over a made-up corpus."""
    order = SampleOrder(1 << 20, config.train.seed, "made up", config.model.seq_length)
    phase = Phase.of(0, {"made up": Fraction(1)})
    return Cursor.start(MixtureOrder((Source("made up", order),), (phase,)), "none")
