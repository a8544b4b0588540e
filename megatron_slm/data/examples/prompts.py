"""Compiled prompts: what a policy answers, and what its answer is judged by."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.order import SampleOrder
from megatron_slm.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered up to where the answer begins.

    Attributes:
        index: in its split; with the source the name of the sample.
        number: of its row over all inputs of the compilation, from 0.
        tokens: ids.
        fields: what its row says beside the messages, as JSON: ``answer``, ``verifier``, ``source``, anything else.
    """

    index: int
    number: int
    tokens: tuple[int, ...]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a split; a sample of the order of a run is one prompt.

    Args:
        store: of kind "prompt".
        seq_length: tokens of prompt and answer together.
        max_new_tokens: tokens of the longest answer.

    Raises:
        DataError: the split holds something else, or nothing, or a prompt leaves no room for the answer.
    """

    store: ExampleStore
    seq_length: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        where = self.store.directory
        if self.store.kind != "prompt":
            raise DataError(f"{where} holds {self.store.kind} examples; prompts are compiled with --kind prompt.")
        if not self.store.num_documents:
            raise DataError(f"{where} holds no prompt; compile more rows.")
        if self.store.longest + self.max_new_tokens > self.seq_length + 1:
            raise DataError(
                f"{where} holds a prompt of {self.store.longest} tokens, which with rollout.max_new_tokens "
                f"{self.max_new_tokens} does not fit model.seq_length {self.seq_length}; change one of the two, or "
                f"compile the prompts again with --seq-length {max(1, self.seq_length - self.max_new_tokens)}."
            )

    @property
    def num_samples(self) -> int:
        """Prompts of one epoch."""
        return self.store.num_documents

    @functools.cached_property
    def digest(self) -> str:
        """Of the prompts and what comes with them."""
        return hashlib.sha256(f"prompts {self.store.digest}".encode()).hexdigest()

    @property
    def eod_id(self) -> int:
        """The end-of-document token."""
        return self.store.eod_id

    def order(self, seed: int) -> SampleOrder:
        """The order in which the prompts come, epoch after epoch."""
        return SampleOrder(self.num_samples, seed, self.digest, self.seq_length)

    def prompt(self, index: int) -> Prompt:
        """Prompt ``index``."""
        tokens = tuple(self.store.tokens(index).tolist())
        return Prompt(index, int(self.store.numbers[index]), tokens, self.store.fields(index))

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """The prompts ``indices``."""
        return [self.prompt(index) for index in indices]
