"""What a conversion is found to be: every tensor compared, and the logits. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_slm.errors import ConversionError

JSON_FILE, TEXT_FILE = "conversion.json", "conversion.md"
TOLERANCE = 1e-4
"""Largest error of a logit over the largest logit, in fp32."""

NEAR_TIE = 1e-5
"""Two tokens this close, over the largest logit, may change places: fp32 cannot tell them apart."""


@dataclass(frozen=True)
class TensorRow:
    """One Hugging Face tensor; ``equal`` to the last bit."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    equal: bool


@dataclass(frozen=True)
class PromptRow:
    """Logits after one fixed prompt of ``tokens`` tokens.

    Attributes:
        max_abs_error, max_abs_logit: largest difference, and largest logit of transformers.
        agreeing: positions where the likeliest token is the same.
        near_ties: the others, where transformers' logits of the two are within ``NEAR_TIE`` of the largest logit.
    """

    tokens: int
    max_abs_error: float
    max_abs_logit: float
    agreeing: int
    near_ties: int

    @property
    def relative_error(self) -> float:
        """Error in units of the largest logit."""
        return self.max_abs_error / self.max_abs_logit if self.max_abs_logit else float("inf")

    @property
    def passed(self) -> bool:
        """Within the tolerance, with the same likeliest token everywhere; NaN never is."""
        return self.relative_error <= TOLERANCE and self.agreeing + self.near_ties == self.tokens


@dataclass
class Report:
    """Everything that ``conversion.json`` and ``conversion.md`` say.

    Attributes:
        direction: "hf-import" or "hf-export".
        padding: rows that the vocabulary is padded with in the checkpoint.
        compared: how tensors were compared, in words.
        without_logits: why logits were not compared; None where they were.
    """

    direction: str
    source: str
    model_type: str
    dtype: str
    vocab_size: int
    padding: int
    compared: str
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    logits: list[PromptRow] = field(default_factory=list)
    without_logits: str | None = None

    @property
    def worst_relative_error(self) -> float | None:
        """The largest of the prompts; None where logits were not compared."""
        return max((row.relative_error for row in self.logits), default=None)

    def require(self) -> None:
        """Refuse what is not what it was made from.

        Raises:
            ConversionError: names the first tensors that differ, or the worst prompt.
        """
        differing = [row.name for row in self.tensors if not row.equal]
        if differing:
            raise ConversionError(
                f"{len(differing)} of {len(self.tensors)} tensors are not what they were made from "
                f"({', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}); nothing was published. Report "
                "it with the model's config.json"
            )
        failed = [row for row in self.logits if not row.passed]
        if failed:
            worst = max(failed, key=lambda row: row.relative_error)
            raise ConversionError(
                f"the logits are not those of transformers: after {worst.tokens} tokens they differ by "
                f"{worst.max_abs_error:.3g} of {worst.max_abs_logit:.3g} (at most {TOLERANCE:g} of it) and agree on "
                f"the likeliest token at {worst.agreeing} of {worst.tokens} positions; nothing was published. Report "
                "it with the model's config.json"
            )

    def write(self, directory: Path) -> None:
        """Both files."""
        summary = {"tensors": len(self.tensors), "worst_relative_logit_error": self.worst_relative_error}
        record = {**asdict(self), "tolerance": TOLERANCE, "summary": summary}
        (directory / JSON_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (directory / TEXT_FILE).write_text(self.to_markdown(), encoding="utf-8")

    def to_markdown(self) -> str:
        """The same for a reader."""
        lines = [
            f"# {self.direction} of {self.source}",
            "",
            f"- model type {self.model_type}, {self.dtype}, vocabulary {self.vocab_size} (and {self.padding} rows of "
            "padding in the checkpoint)",
            f"- {', '.join(f'{name} {version}' for name, version in self.versions.items())}",
            *(f"- {note}" for note in self.notes),
            "",
            "## Logits against transformers",
            "",
            *(self._logit_lines() if self.without_logits is None else [f"Not compared: {self.without_logits}"]),
            "",
            f"## Tensors: {sum(row.equal for row in self.tensors)} of {len(self.tensors)} equal",
            "",
            self.compared,
            "",
            *_table(
                ("tensor", "shape", "dtype", "equal"),
                [(r.name, " x ".join(map(str, r.shape)), r.dtype, "yes" if r.equal else "NO") for r in self.tensors],
            ),
        ]
        return "\n".join(lines) + "\n"

    def _logit_lines(self) -> list[str]:
        return [
            f"fp32 on one CPU rank, fixed token ids; at most {TOLERANCE:g} of the largest logit.",
            "",
            *_table(
                ("tokens", "largest error", "largest logit", "relative", "likeliest token agrees"),
                [
                    (
                        str(row.tokens),
                        f"{row.max_abs_error:.3g}",
                        f"{row.max_abs_logit:.4g}",
                        f"{row.relative_error:.2e}",
                        f"{row.agreeing} of {row.tokens}{f', {row.near_ties} near ties' if row.near_ties else ''}",
                    )
                    for row in self.logits
                ],
            ),
        ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
