"""What a corpus is cleaned of."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_slm.data.readers import require_regular
from megatron_slm.data.shards import file_sha256
from megatron_slm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Filters, all off by default.

    Attributes:
        exact_duplicates: drop a document whose text an earlier one has; :func:`.signature.exact_key` says what equals.
        near_duplicates: drop a document whose Jaccard similarity to an earlier one reaches this; None: off. Exact
            duplicates go with them.
        min_characters, max_characters: drop shorter and longer documents; None: no bound.
        languages: ISO codes of the languages to keep; empty: all.
        scrub_pii: replace what looks like personal data by tags (see :mod:`megatron_slm.data.quality.personal`).
        leakage_against: evaluation files; a document that shares an n-gram with one is dropped.
        leakage_ngram: words of an n-gram.
        leakage_share: drop only documents of which a larger share of the words, in [0, 1), lies in shared n-grams.
        leakage_text_key: field that holds the text in evaluation files of objects.

    Raises:
        DataError: a value is out of range, or a package that a filter needs is not installed.
    """

    exact_duplicates: bool = False
    near_duplicates: float | None = None
    min_characters: int = 0
    max_characters: int | None = None
    languages: tuple[str, ...] = ()
    scrub_pii: bool = False
    leakage_against: tuple[str, ...] = ()
    leakage_ngram: int = 13
    leakage_share: float = 0.0
    leakage_text_key: str = "text"

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and not 0.0 < self.near_duplicates <= 1.0:
            raise DataError(
                f"--near-threshold is {self.near_duplicates}, but a Jaccard similarity lies in (0, 1]; 0.8 is usual."
            )
        if self.min_characters < 0:
            raise DataError(
                f"--min-chars is {self.min_characters}, but a length is at least 0; 0 drops no short document."
            )
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            raise DataError(
                f"--max-chars is {self.max_characters} and --min-chars {self.min_characters}: no document with text is "
                "between them. Raise --max-chars or lower --min-chars."
            )
        if self.leakage_ngram < 1:
            raise DataError(f"--ngram is {self.leakage_ngram}, but an n-gram has at least one word; 13 is usual.")
        if not 0.0 <= self.leakage_share < 1.0:
            raise DataError(f"leakage_share is {self.leakage_share}, but it lies in [0, 1); 0 drops any overlap.")
        for package, use in self._packages().items():
            if importlib.util.find_spec(package) is None:
                raise DataError(
                    f"{use} needs the package {package}, which is not installed: pip install megatron-slm[data]."
                )

    def described(self) -> dict[str, Any]:
        """Everything that decides the outcome, as JSON: what differs from the defaults, evaluation files by name and
        sha256, and the versions of the packages whose answers it depends on.

        Raises:
            DataError: an evaluation file cannot be read.
        """
        fields = {name: value for name, value in asdict(self).items() if value != getattr(NOTHING, name)}
        if self.languages:
            fields["languages"] = sorted(self.languages)
        if self.leakage_against:
            fields["leakage_against"] = [
                {"name": name, "sha256": _sha256(Path(path))} for name, path in self.eval_files().items()
            ]
            fields["leakage_ngram"] = self.leakage_ngram
        if packages := self._packages():
            fields["packages"] = {package: metadata.version(package) for package in packages}
        return fields

    def eval_files(self) -> dict[str, str]:
        """Evaluation files by the name that reasons give them: without the directory, where that is enough."""
        names = [Path(path).name for path in self.leakage_against]
        return {
            name if names.count(name) == 1 else path: path
            for name, path in zip(names, self.leakage_against, strict=True)
        }

    def _packages(self) -> dict[str, str]:
        """Packages of the extra ``data`` that are needed, each with its use."""
        needed = {}
        if self.near_duplicates is not None:
            needed["datasketch"] = "The search for near-duplicates"
        if self.languages:
            needed["py3langid"] = "The language filter"
        return needed


NOTHING = QualityConfig()
"""No filter at all."""


def _sha256(path: Path) -> str:
    require_regular(path)
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"Cannot read the evaluation file {path}: {error.strerror}. Check the path.") from error
