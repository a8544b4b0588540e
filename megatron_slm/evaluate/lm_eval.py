"""A model for EleutherAI's lm-evaluation-harness (the extra ``lm-eval``): what it asks, asked of ours.

Nothing of it is imported before :func:`model_class` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_slm.data.examples.document import Document
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.evaluate.items import continued, windows
from megatron_slm.evaluate.scoring import Scored

NAME = "mslm"
"""By which the harness knows the model."""


class Opened(NamedTuple):
    """A model, loaded on one rank.

    Attributes:
        read: scores of documents.
        answer: texts that follow prompts, given at most so many new tokens and a temperature.
        limit: tokens that it reads at most.
    """

    tokenizer: Tokenizer
    read: Callable[[Sequence[Document]], list[Scored]]
    answer: Callable[[Sequence[Sequence[int]], int, float], list[str]]
    limit: int


def model_class(opened: Callable[[str], Opened]) -> type:
    """The harness's model class, registered with it as "mslm"; ``run`` is its one argument.

    Args:
        opened: loads a run by name.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(f"lm-eval cannot be imported ({error}): pip install 'megatron-slm[lm-eval]'.") from error

    class OurModel(LM):
        """A run of ours, as the harness asks it."""

        def __init__(self, run: str, **_: Any) -> None:
            super().__init__()
            self._opened = opened(run)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return loglikelihoods(self._opened, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return rolling(self._opened, [request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return answers(self._opened, [request.args for request in requests])

    return register_model(NAME)(OurModel)


def loglikelihoods(model: Opened, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Of each (context, continuation) the log-probability of the continuation, and whether greedy decoding gives it.

    Of a context that is too long the end is kept.
    """
    documents = []
    for context, text in pairs:
        tokens, first = continued(model.tokenizer, context, text)
        weights = np.ones(len(tokens), dtype=np.float32)
        weights[:first] = 0.0
        documents.append(Document(tokens[-model.limit - 1 :], weights[-model.limit - 1 :]))
    return [(float(one.logprobs.sum()), bool(one.correct.all())) for one in model.read(documents)]


def rolling(model: Opened, texts: Sequence[str]) -> list[float]:
    """Log-probability of each whole text."""
    eod = model.tokenizer.eod_id
    cut = [windows(np.array([eod, *model.tokenizer.encode(text)]), model.limit) for text in texts]
    found = iter(model.read([one for parts in cut for one in parts]))
    return [sum(float(next(found).logprobs.sum()) for _ in parts) for parts in cut]


def answers(model: Opened, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What follows each context, up to one of ``until``, drawn with ``max_gen_toks`` and ``temperature``."""
    texts = [""] * len(asked)
    groups: dict[tuple[int, float], list[int]] = {}
    for number, (_, options) in enumerate(asked):
        sampled = bool(options.get("do_sample", options.get("temperature", 0.0) > 0.0))
        temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
        groups.setdefault((int(options.get("max_gen_toks", 256)), temperature), []).append(number)
    for (length, temperature), numbers in groups.items():
        room = max(1, model.limit - length)
        prompts = [(model.tokenizer.encode(asked[at][0]) or [model.tokenizer.eod_id])[-room:] for at in numbers]
        for at, text in zip(numbers, model.answer(prompts, length, temperature), strict=True):
            stops = asked[at][1].get("until", [])
            texts[at] = cut_at(text, [stops] if isinstance(stops, str) else stops)
    return texts


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of ``stops``."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]
