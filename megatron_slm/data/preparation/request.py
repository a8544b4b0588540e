"""What was asked for: equal requests give equal corpora."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from megatron_slm.data.documents import TEXT_UNITS, in_valid
from megatron_slm.data.preparation.reading import Reader
from megatron_slm.data.quality.config import QualityConfig
from megatron_slm.data.shards import SCHEMA_VERSION
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.data.tokenizer_sentencepiece import NUM_FIXED_PIECES
from megatron_slm.errors import DataError

DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the content of a corpus; two equal requests give equal corpora.

    Fields that came later have a default, which is what a corpus without them was made with.
    """

    schema_version: int
    inputs: tuple[str, ...]
    """sha256 of each."""
    vocab_size: int | None
    tokenizer_hash: str | None
    split: float
    seed: int
    text_key: str
    text_unit: str
    shard_tokens: int
    tokenizer_type: str | None = "bpe"
    eod_token: str | None = None
    licence: str | None = None
    pattern: str | None = None
    """Which files of directories are read; None without a directory."""
    quality: Mapping[str, Any] | None = None
    """The filters that differ from none, with the sha256 of the files they compare with."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.split < 1.0:
            raise DataError(f"--split is {self.split}, but the share of the valid split lies in [0, 1); 0.05 is usual.")
        # Beyond these bounds sentencepiece answers with its own insides.
        if self.vocab_size is not None and not NUM_FIXED_PIECES <= self.vocab_size < 1 << 31:
            raise DataError(
                f"--vocab-size is {self.vocab_size}, but the control pieces, the line break and the 256 bytes alone "
                f"are {NUM_FIXED_PIECES} pieces, each character of the text is one more, and ids have 31 bits; "
                f"{DEFAULT_VOCAB_SIZE} is the default."
            )
        if self.text_unit not in TEXT_UNITS:
            raise DataError(f"--text-unit is {self.text_unit}, but it must be one of {', '.join(TEXT_UNITS)}.")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens is {self.shard_tokens}, but a shard holds at least one token.")

    @staticmethod
    def of(
        reader: Reader,
        given: Tokenizer | None,
        quality: QualityConfig | None,
        *,
        vocab_size: int | None,
        tokenizer_type: str | None,
        **values: Any,
    ) -> Request:
        """What is asked for with these inputs, this tokenizer or a new one, and these filters.

        Args:
            values: ``split``, ``seed``, ``shard_tokens`` and ``licence``.

        Raises:
            DataError: a value is out of range, or an evaluation file cannot be read.
        """
        trained = given is None
        return Request(
            schema_version=SCHEMA_VERSION,
            inputs=tuple(source.sha256 for source in reader.sources),
            vocab_size=DEFAULT_VOCAB_SIZE if trained and vocab_size is None else vocab_size,
            tokenizer_hash=given.hash if given else None,
            tokenizer_type=(tokenizer_type or "bpe") if trained else None,
            eod_token=given.eod_token if given else None,
            text_key=reader.text_key,
            text_unit=reader.text_unit,
            pattern=reader.pattern if any(source.kind == "tree" for source in reader.sources) else None,
            quality=quality.described() if quality else None,
            **values,
        )

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that are wanted."""
        return ("train", "valid") if self.split else ("train",)

    def split_of(self, document: int) -> str:
        """The split that document number ``document`` belongs to."""
        return "valid" if in_valid(self.seed, document, self.split) else "train"

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        stored: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return stored

    def differences(self, found: Mapping[str, Any]) -> str:
        """Where the stored request ``found`` asked for something else; empty when it is equal."""
        absent = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        stored, wanted = _flat({**absent, **found}), _flat(self.to_dict())
        changed = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
        return "; ".join(f"{name} is {stored.get(name)} there, {wanted.get(name)} was asked for" for name in changed)


def _flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """With the filters by their own names."""
    quality = request["quality"] or {}
    return {name: value for name, value in request.items() if name != "quality"} | {
        f"quality.{name}": value for name, value in quality.items() if value
    }
