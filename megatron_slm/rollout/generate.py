"""Completions of prompts by the training modules, under any tp and pp: cached keys and values, one token a pass.

A draw depends on (seed, step, sample, position) and on the logits alone. It is made on one rank, the first tp rank of
the last pipeline stage, and told the others; so is every log-probability.

Shapes: B sequences of a batch, S prompt columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.parallel.incremental import Incremental, incremental
from megatron_slm.rollout.philox import uniforms
from megatron_slm.rollout.sampling import Sampling, draw

_COMPACT = 0.5
"""A batch is made smaller once no more than this share of its rows is unfinished."""


@dataclass(frozen=True)
class Completion:
    """What follows one prompt.

    Attributes:
        tokens: as drawn, the stop token included.
        logprobs: in nats, of the distribution that each token was drawn from (processed: after the temperature, among
            the kept tokens); 0 where the likeliest was taken.
        raw_logprobs: in nats, of the model itself: no temperature, all tokens.
        kept: for each token the ids it was drawn among, ascending; None where that was the whole vocabulary.
        finished: a stop token ended it; else it was cut at the longest length.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    kept: tuple[NDArray[np.int32], ...] | None
    finished: bool


@dataclass
class _Row:
    """A completion on its way."""

    prompt: Sequence[int]
    sample: int
    room: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    kept: list[NDArray[np.int32]] = field(default_factory=list)
    finished: bool = False

    @property
    def done(self) -> bool:
        return self.finished or len(self.tokens) >= self.room

    @property
    def position(self) -> int:
        """Of the next token in its sequence, the prompt included."""
        return len(self.prompt) + len(self.tokens)


def complete(
    chunks: Sequence[nn.Module],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    step: int,
    samples: Sequence[int],
    groups: Any,
    vocab_size: int,
    device: torch.device,
    batch_size: int,
) -> list[Completion]:
    """A completion of every prompt, in their order. Collective over the tp and pp ranks of one model copy.

    All of them are given the same prompts and return the same completions; another copy may have other prompts, or
    none. Where experts are divided over copies (ep), or the gather of parameters is overlapped, it is collective over
    those too. Training goes on as if nothing had been generated.

    Args:
        chunks: model chunks of this rank, wrapped or not.
        prompts: tokens of each, at least one.
        step, samples: what the draws depend on, beside the seed and the position; a sample number for each prompt.
        vocab_size: real tokens; padding columns are never drawn.
        batch_size: sequences that are generated at a time; changes no draw.

    Raises:
        ConfigError: the layout or the model cannot generate (``parallel.incremental``).
        DataError: a prompt is empty or leaves no room for a token.
        CheckpointError: the logits are not finite.
    """
    with incremental(chunks, groups=groups, device=device) as reader:
        rows = _rows(prompts, samples, sampling, reader.position_limit)
        voice = _Voice(reader, groups, sampling, step=step, vocab_size=vocab_size, device=device)
        # Alike lengths together: less padding.
        order = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
        work = _passes(voice, [order[i : i + batch_size] for i in range(0, len(order), batch_size)])
        _in_step(work, voice.idle, groups, device)
    if voice.speaks_for_others:
        voice.tell_records(rows)
    return [_completion(row, sampling) for row in rows]


def stream(
    chunks: Sequence[nn.Module],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    groups: Any,
    vocab_size: int,
    device: torch.device,
) -> Iterator[int]:
    """The tokens of one completion as they are drawn, for somebody who reads along. Collective as :func:`complete`.

    Once the model's positions are full the older half of the text is forgotten and the rest read anew: the text may be
    longer than what the model reads. Until the iterator ends or is closed the chunks are in evaluation mode.

    Raises:
        As :func:`complete`, but that a prompt may have any length.
    """
    text, limit = list(prompt), int(unwrap(chunks[0]).max_sequence_length)
    left, rounds = sampling.max_new_tokens, 0
    while left > 0:
        if len(text) >= limit:
            text = text[-max(1, limit // 2) :]
        with incremental(chunks, groups=groups, device=device) as reader:
            (row,) = _rows([text], [0], replace(sampling, max_new_tokens=left), reader.position_limit)
            voice = _Voice(reader, groups, sampling, step=rounds, vocab_size=vocab_size, device=device)
            told = 0
            for _ in chain(_passes(voice, [[row]]), [None]):
                yield from row.tokens[told:]
                told = len(row.tokens)
        if row.finished:
            return
        text, left, rounds = text + row.tokens, left - told, rounds + 1


def _rows(prompts: Sequence[Sequence[int]], samples: Sequence[int], sampling: Sampling, limit: int) -> list[_Row]:
    """The prompts, checked.

    Raises:
        DataError: see :func:`complete`.
    """
    rows = []
    for index, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        if not 0 < len(prompt) < limit:
            raise DataError(
                f"Prompt {index} (sample {sample}) has {len(prompt)} tokens, but the model reads 1 to {limit - 1} "
                "before it adds one. Shorten it, or leave it out."
            )
        rows.append(_Row(prompt, sample, min(sampling.max_new_tokens, limit - len(prompt))))
    return rows


def _completion(row: _Row, sampling: Sampling) -> Completion:
    kept = tuple(row.kept) if sampling.cuts else None
    return Completion(tuple(row.tokens), tuple(row.logprobs), tuple(row.raw_logprobs), kept, row.finished)


def _in_step(work: Iterator[None], idle: Callable[[], None], groups: Any, device: torch.device) -> None:
    """Do the work, which yields before each of its passes. Copies that share experts pass the model together."""

    def goes_on() -> bool:
        return next(work, work) is None

    wants = goes_on()
    while _any_copy(wants, groups, device):
        if wants:
            wants = goes_on()
        else:
            idle()


def _any_copy(flag: bool, groups: Any, device: torch.device) -> bool:
    """True where ``flag`` is, on this rank or on one that it shares experts with."""
    if groups.ep.size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=groups.tp_ep)
    return bool(value.item())


def _passes(voice: _Voice, batches: Sequence[list[_Row]]) -> Iterator[None]:
    """Complete one batch after the other; yields before every pass through the model."""
    for batch in batches:
        capacity = max(len(row.prompt) for row in batch) + max(row.room for row in batch)
        voice.reader.begin([len(row.prompt) for row in batch], capacity)
        yield
        voice.say(batch, _left_padded([row.prompt for row in batch]))
        active = list(range(len(batch)))  # rows of the caches, by their place in ``batch``
        while unfinished := [place for place in active if not batch[place].done]:
            if len(unfinished) <= _COMPACT * len(active):
                voice.reader.keep([row for row, place in enumerate(active) if not batch[place].done])
                active = unfinished
            yield
            voice.say([batch[place] for place in active], [[batch[place].tokens[-1]] for place in active])


def _left_padded(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    widest = max(map(len, prompts))
    return [[0] * (widest - len(prompt)) + list(prompt) for prompt in prompts]


class _Voice:
    """Passes through the model and what is drawn from them, the same on every rank of a copy."""

    def __init__(
        self,
        reader: Incremental,
        groups: Any,
        sampling: Sampling,
        *,
        step: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.reader = reader
        self._groups, self._sampling, self._step = groups, sampling, step
        self._vocab_size, self._device = vocab_size, device
        self.speaks_for_others = groups.tp.size() * groups.pp.size() > 1
        self._speaker = (groups.pp.size() - 1) * groups.tp.size()
        """Rank in the group of a model copy, whose first ranks are the tp ranks of the first stage."""

    @property
    def _draws(self) -> bool:
        return self.reader.ends_model and self._groups.tp.rank() == 0

    def idle(self) -> None:
        """A pass for the sake of the others."""
        self.reader.begin([1], 1)
        self.reader.read(torch.zeros(1, 1, dtype=torch.int64, device=self._device))

    def say(self, rows: Sequence[_Row], tokens: list[list[int]]) -> None:
        """Read new tokens [B, S] and add a token to every row that is not done.

        Raises:
            CheckpointError: the logits of a row are not finite.
        """
        logits = self.reader.read(torch.tensor(tokens, device=self._device))
        if logits is not None:
            logits = self._whole(logits)
        drawn = torch.zeros(len(rows), dtype=torch.int64, device=self._device)
        if logits is not None:
            drawn = self._drawn(logits, rows)
        if self.speaks_for_others:
            dist.broadcast(drawn, group=self._groups.mp, group_src=self._speaker)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            if row.done:
                continue
            if token < 0:
                raise CheckpointError(
                    f"The logits after {row.position} tokens of sample {row.sample} are not finite: the weights hold "
                    "NaN or infinity, or overflow. Generate from an earlier checkpoint of the run."
                )
            row.tokens.append(token)
            row.finished = token in self._sampling.stop_ids

    def _whole(self, logits: Tensor) -> Tensor | None:
        """Logits [B, V/tp] of every tp rank -> [B, V] without padding, on the first of them."""
        if self._groups.tp.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(self._groups.tp.size())] if self._draws else None
            dist.gather(logits.contiguous(), parts, group=self._groups.tp, group_dst=0)
            if parts is None:
                return None
            logits = torch.cat(parts, dim=-1)
        return logits[:, : self._vocab_size]

    def _drawn(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        """A token of every row; its records are kept on the rank that draws."""
        samples = np.array([row.sample for row in rows], dtype=np.int64)
        positions = np.array([row.position for row in rows], dtype=np.int64)
        numbers = torch.from_numpy(uniforms(self._sampling.seed, self._step, samples, positions)).to(self._device)
        drawn = draw(logits, numbers, self._sampling)
        logprobs, raw = drawn.logprobs.tolist(), drawn.raw_logprobs.tolist()
        for place, row in enumerate(rows):
            if not row.done:
                row.logprobs.append(logprobs[place])
                row.raw_logprobs.append(raw[place])
                if drawn.kept is not None:
                    row.kept.append(drawn.kept[place])
        return drawn.tokens

    def tell_records(self, rows: Sequence[_Row]) -> None:
        """Bring the other ranks of the copy what only the one that draws has kept."""
        total = sum(len(row.tokens) for row in rows)
        if not total:
            return
        numbers = torch.zeros(2, total, dtype=torch.float64, device=self._device)
        if self._draws:
            both = [[x for row in rows for x in getattr(row, name)] for name in ("logprobs", "raw_logprobs")]
            numbers = torch.tensor(both, dtype=torch.float64, device=self._device)
        self._tell(numbers)
        kept = self._told_kept([ids for row in rows for ids in row.kept], total) if self._sampling.cuts else []
        start = 0
        for row in rows:
            part = slice(start, start + len(row.tokens))
            row.logprobs, row.raw_logprobs = (values[part].tolist() for values in numbers)
            row.kept = kept[part]
            start = part.stop

    def _told_kept(self, kept: Sequence[NDArray[np.int32]], total: int) -> list[NDArray[np.int32]]:
        counts = torch.zeros(total, dtype=torch.int64, device=self._device)
        if self._draws:
            counts = torch.tensor([len(ids) for ids in kept], device=self._device)
        self._tell(counts)
        flat = torch.zeros(int(counts.sum()), dtype=torch.int32, device=self._device)
        if self._draws:
            flat = torch.from_numpy(np.concatenate(kept)).to(self._device)
        self._tell(flat)
        return np.split(flat.cpu().numpy(), np.cumsum(counts.tolist())[:-1])

    def _tell(self, values: Tensor) -> None:
        dist.broadcast(values, group=self._groups.mp, group_src=self._speaker)
