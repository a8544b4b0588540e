"""A diagnosis as text and as JSON."""

from __future__ import annotations

import json
import textwrap

from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.rules import Diagnosis

WIDTH, INDENT = 120, 17


def render(diagnosis: Diagnosis) -> str:
    """What is printed: the findings, then what was checked and what could not be."""
    records = diagnosis.records
    steps = [record["step"] for record in records.steps]
    head = (
        f"{records.path}: {records.stage}, steps {steps[0]} to {steps[-1]}, {len(records.validations)} validations, "
        f"{len(records.dynamics)} measurements of layers, {len(records.checkpoints)} checkpoints"
    )
    lines = [head, *(line for finding in diagnosis.findings for line in _lines(finding))]
    if diagnosis.sound:
        lines += ["", *_row("nothing found" if not diagnosis.findings else "not found", ", ".join(diagnosis.sound))]
    if diagnosis.unchecked:
        lines.append("")
    for name, why in diagnosis.unchecked:
        lines += _row("not checked", f"{name}: {why}")
    return "\n".join(lines)


def to_json(diagnosis: Diagnosis) -> str:
    """The same for programs."""
    records = diagnosis.records
    return json.dumps(
        {
            "run": str(records.path),
            "stage": records.stage,
            "steps": len(records.steps),
            "findings": [finding.to_dict() for finding in diagnosis.findings],
            "nothing_found": list(diagnosis.sound),
            "not_checked": dict(diagnosis.unchecked),
        },
        indent=1,
    )


def _lines(finding: Finding) -> list[str]:
    lines = ["", f"{finding.name} from step {finding.step} on: {finding.summary}"]
    for number, sentence in enumerate(finding.evidence):
        lines += _row("evidence" if number == 0 else "", sentence)
    for number, cause in enumerate(finding.causes, start=1):
        lines += _row("likely causes" if number == 1 else "", f"{number}. {cause}")
    return [*lines, *_row("do first", finding.intervention), *_row("runbook", finding.runbook)]


def _row(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    return [f"{'  ' + label if at == 0 else '':<{INDENT}}{line}" for at, line in enumerate(wrapped)]
