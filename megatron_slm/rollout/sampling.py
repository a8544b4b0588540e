"""How the next token is chosen, and with which probability: temperature, then top-k, then top-p.

Two log-probabilities are told apart, both in nats. The *raw* one is the model's own: log softmax of the logits. The
*processed* one is that of the distribution that was drawn from: after the temperature, among the kept tokens alone.

Shapes: B rows, V real tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.errors import ConfigError

NEVER = float("-inf")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: of each completion, at most.
        temperature: the logits are divided by it; 0 takes the likeliest.
        top_k: draw among so many likeliest tokens (and those as likely as the last of them); 0 is all.
        top_p: draw among the fewest likeliest tokens whose probabilities, after the temperature, add up to it
            (nucleus sampling, arXiv 1904.09751); 1 is all.
        seed: of the draws.
        stop_ids: tokens that end a completion; they belong to it.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.top_k < 0:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} must be at least 1, top_k {self.top_k} at least 0 (all tokens)."
            )
        if not 0.0 <= self.temperature < float("inf") or not 0.0 < self.top_p <= 1.0:  # nan is refused too
            raise ConfigError(
                f"temperature {self.temperature} must be at least 0 and finite, top_p {self.top_p} above 0 and at "
                "most 1."
            )

    @property
    def cuts(self) -> bool:
        """Whether some tokens can never be drawn, so that the kept ones are recorded."""
        return self.temperature == 0.0 or self.top_k > 0 or self.top_p < 1.0


class Drawn(NamedTuple):
    """One token of every row."""

    tokens: Tensor
    """int64 [B]; -1 where the logits are not finite."""
    logprobs: Tensor
    """float64 [B], processed."""
    raw_logprobs: Tensor
    """float64 [B]."""
    kept: list[NDArray[np.int32]] | None
    """Of each row the tokens it was drawn among, ascending; None where that is every token."""


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Drawn:
    """Draw a token of every row of logits [B, V] by one number of [0, 1) each, float64 [B].

    The tokens lie in the order of their ids on the line that is drawn from: what differs in the last digit of the
    logits moves the borders between them by as little, and changes a draw as rarely.
    """
    raw = torch.log_softmax(logits.double(), dim=-1)
    finite = torch.isfinite(logits).all(dim=-1)
    if sampling.temperature == 0.0:
        processed = torch.full_like(raw, NEVER).scatter_(1, raw.argmax(dim=-1, keepdim=True), 0.0)
    else:
        processed = _processed(raw, sampling)
    line = processed.exp().cumsum(dim=-1)
    # Below the end of the line, so that the first border above it is that of a token with a probability.
    end = line[:, -1]
    point = torch.minimum(uniforms.to(line) * end, torch.nextafter(end, torch.zeros_like(end)))
    tokens = torch.searchsorted(line, point[:, None], right=True)[:, 0].clamp(max=line.shape[-1] - 1)
    chosen = tokens[:, None]
    return Drawn(
        torch.where(finite, tokens, -1),
        processed.gather(1, chosen)[:, 0],
        raw.gather(1, chosen)[:, 0],
        _kept(processed) if sampling.cuts else None,
    )


def _processed(raw: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [B, V] that are drawn from; -inf of what is cut away."""
    if sampling.temperature == 1.0 and not sampling.cuts:
        return raw
    # Relative to the largest: a tiny temperature then gives 0 and -inf, never inf - inf.
    scores = (raw - raw.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, NEVER)
    if sampling.top_p < 1.0:
        falling = scores.sort(dim=-1, descending=True).values
        probability = torch.softmax(falling, dim=-1)
        before = probability.cumsum(dim=-1) - probability
        needed = (before < sampling.top_p).sum(dim=-1, keepdim=True)
        scores = scores.masked_fill(scores < falling.gather(1, needed.clamp(min=1) - 1), NEVER)
    return torch.log_softmax(scores, dim=-1)


def _kept(processed: Tensor) -> list[NDArray[np.int32]]:
    """The ids of each row that can be drawn."""
    rows, ids = torch.nonzero(processed > NEVER, as_tuple=True)
    counts = torch.bincount(rows, minlength=len(processed)).tolist()
    return [part.astype(np.int32) for part in np.split(ids.cpu().numpy(), np.cumsum(counts)[:-1])]
