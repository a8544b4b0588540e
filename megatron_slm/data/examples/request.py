"""What was asked of a compilation: equal requests give equal examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_slm.data.examples.store import EXAMPLES_VERSION, KINDS
from megatron_slm.data.shards import DEFAULT_SHARD_TOKENS
from megatron_slm.errors import DataError

ON_BAD_ROW = ("stop", "skip")
TOO_LONG = ("leave-out", "truncate")
DUPLICATES = ("exact", "near")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the content beside the inputs, the tokenizer and the template.

    Attributes:
        kind: "chat", "preference" or "prompt".
        seq_length: tokens that a document may have, of a preference both answers with the prompt together.
        valid_share: of the prompts; every row of a prompt is in the same split.
        on_bad_row: "stop" refuses the whole input at the first row that cannot be used; "skip" leaves it out.
        too_long: of a chat whose prompt fits: a bad row, or cut at its end.
        rationale_weight: of the tokens of rationales.
        score_key: field that holds a number to sort by.
        duplicates: None keeps all; "exact" drops rows whose text an earlier one has; "near" also similar ones.
        near_threshold: Jaccard similarity of near duplicates.
        leak_share: a row leaks when more than this share of its words lies in n-grams of 13 words that an evaluation
            text has, or when its opening is one's.

    Raises:
        DataError: a value is out of range.
    """

    kind: str
    seq_length: int
    valid_share: float = 0.05
    seed: int = 1234
    on_bad_row: str = "stop"
    too_long: str = "leave-out"
    rationale_weight: float = 1.0
    score_key: str | None = None
    duplicates: str | None = None
    near_threshold: float = 0.8
    leak_share: float = 0.8
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--kind", self.kind, KINDS),
            ("--on-bad-row", self.on_bad_row, ON_BAD_ROW),
            ("--too-long", self.too_long, TOO_LONG),
            ("--dedup", self.duplicates or DUPLICATES[0], DUPLICATES),
        ):
            if value not in known:
                raise DataError(f"{option} is {value}, but it must be one of {', '.join(known)}.")
        if self.seq_length < 2:
            raise DataError(f"--seq-length is {self.seq_length}, but an example has two tokens at least.")
        if not 0.0 <= self.valid_share < 1.0:
            raise DataError(f"--valid-share is {self.valid_share}, but a share lies in [0, 1); 0.05 is usual.")
        if not 0.0 <= self.leak_share < 1.0:
            raise DataError(f"--leak-share is {self.leak_share}, but it lies in [0, 1); 0 drops any overlap.")
        if self.rationale_weight < 0.0:
            raise DataError(f"--rationale-weight is {self.rationale_weight}, but a weight is at least 0.")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens is {self.shard_tokens}, but a shard holds at least one token.")


@dataclass(frozen=True, kw_only=True)
class ExamplesRequest:
    """Everything that decides what is written. Inputs and evaluation files go by their sha256."""

    version: int
    options: Options
    inputs: tuple[str, ...]
    evaluation: tuple[str, ...]
    tokenizer_hash: str
    eod_token: str | None
    template_sha256: str

    @staticmethod
    def of(
        options: Options, inputs: Sequence[str], evaluation: Sequence[str], tokenizer: Any, template_sha256: str
    ) -> ExamplesRequest:
        """The request over ``inputs``, compared with ``evaluation`` files (sha256 of each)."""
        return ExamplesRequest(
            version=EXAMPLES_VERSION,
            options=options,
            inputs=tuple(inputs),
            evaluation=tuple(evaluation),
            tokenizer_hash=tokenizer.hash,
            eod_token=tokenizer.eod_token,
            template_sha256=template_sha256,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back, the options beside the rest."""
        fields = asdict(self)
        stored: dict[str, Any] = json.loads(json.dumps({**fields.pop("options"), **fields}))
        return stored

    def differences(self, found: Mapping[str, Any]) -> str:
        """Where the stored request ``found`` asked for something else; empty when it is equal."""
        wanted = self.to_dict()
        changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        return "; ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} was asked for" for name in changed)
