"""Sampling a continuation with the training modules, one token at a time, the prefix recomputed for each.

One rank, no key/value cache: for looking at what a small model says, not for serving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_slm.errors import CheckpointError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 takes the likeliest; the draw depends on (seed, position)."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 1234


def continuation(
    model: nn.Module, prompt: list[int], sampling: Sampling, *, vocab_size: int, window: int, eod_id: int
) -> Iterator[int]:
    """Tokens after ``prompt`` until ``max_new_tokens`` or the end-of-document token, which is not yielded.

    Args:
        model: a whole model on one rank, in evaluation mode.
        prompt: when empty, the end-of-document token stands before what is drawn, as at the start of a document.
        vocab_size: real tokens; padding columns are never drawn.
        window: longest prefix that is fed; older tokens are forgotten.

    Raises:
        CheckpointError: the model gives logits that are not finite.
    """
    tokens = list(prompt) or [eod_id]
    device = next(model.parameters()).device
    for position in range(len(tokens), len(tokens) + sampling.max_new_tokens):
        prefix = torch.tensor([tokens[-window:]], device=device)
        position_ids = torch.arange(prefix.shape[1], device=device)[None]
        with torch.no_grad():
            logits = model(input_ids=prefix, position_ids=position_ids, attention_mask=None)  # [1, S, V]
        token = choose(logits[0, -1, :vocab_size].float().cpu(), sampling, position)
        if token == eod_id:
            return
        tokens.append(token)
        yield token


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token from logits [V].

    Raises:
        CheckpointError: a logit is NaN or infinite.
    """
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"The logits after {position} tokens are not finite: the weights of the checkpoint hold NaN or infinity, "
            "or overflow. Generate from an earlier checkpoint of the run."
        )
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    values, ids = logits.topk(min(sampling.top_k, len(logits)))
    # Relative to the largest and in double precision: a tiny temperature then gives 0 and -inf, never inf or 0 / 0.
    scaled = (values - values[0]).double() / sampling.temperature
    probabilities = torch.softmax(scaled, dim=-1).float()
    digest = hashlib.blake2b(f"{sampling.seed}\0{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
