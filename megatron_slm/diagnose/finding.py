"""What a rule is, and what it says when it finds something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_slm.diagnose.records import Records

RUNBOOKS = "docs/runbooks"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A pathology of a run.

    Attributes:
        name: of the pathology, and of its page.
        summary: one clause.
        step: where it begins, as far as the records tell.
        evidence: sentences with steps and numbers.
        causes: the likeliest first.
        intervention: the smallest that can help.
    """

    name: str
    summary: str
    step: int
    evidence: tuple[str, ...]
    causes: tuple[str, ...]
    intervention: str

    @property
    def runbook(self) -> str:
        """The page about it."""
        return f"{RUNBOOKS}/{self.name}.md"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "summary": self.summary,
            "step": self.step,
            "evidence": list(self.evidence),
            "causes": list(self.causes),
            "intervention": self.intervention,
            "runbook": self.runbook,
        }


@dataclass(frozen=True)
class Rule:
    """A question to a run's records.

    Attributes:
        name: of the pathology.
        check: answers it; None where the run does not have it.
        missing: what the records lack for an answer, in a clause; empty where they lack nothing.
        stages: that can have it; empty for all.
    """

    name: str
    check: Callable[[Records], Finding | None]
    missing: Callable[[Records], str]
    stages: tuple[str, ...] = ()
