"""The doctor's report as text and as JSON. No torch."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from megatron_slm.doctor.result import Result

WIDTH = 120


def failures(results: Sequence[Result]) -> int:
    """How many results are failures."""
    return sum(result.state == "fail" for result in results)


def render(results: Sequence[Result], about: str, seconds: float) -> str:
    """One line a probe under its subject; then warnings and failures with what to do.

    Args:
        about: what was examined.
        seconds: what it took.
    """
    subjects = list(dict.fromkeys(result.subject for result in results))
    merged = [line for subject in subjects for line in _merged([one for one in results if one.subject == subject])]
    width = max((len(result.name) for result in merged), default=0)
    lines = [f"{about}: {_counts(results)} in {seconds:.1f} s"]
    for subject in subjects:
        lines += ["", subject]
        lines += [_line(result, width) for result in merged if result.subject == subject]
    wrong = [result for state in ("warn", "fail") for result in merged if result.state == state]
    if wrong:
        lines += ["", "what to do"]
    for result in wrong:
        where = f" on {result.host}" if result.host and result.host not in result.value else ""
        lines += _wrapped(f"  {result.state:<6}  ", f"{result.subject}, {result.name}{where}: {result.value}")
        if result.expectation:
            lines += _wrapped(f"{'':<10}expected  ", result.expectation)
        lines += _wrapped(f"{'':<10}do        ", result.remedy)
    return "\n".join(lines)


def to_json(results: Sequence[Result], about: str, seconds: float) -> str:
    """The same for programs: every result of every host, and the numbers of those that are wrong."""
    return json.dumps(
        {
            "about": about,
            "seconds": round(seconds, 3),
            "failures": failures(results),
            "warnings": sum(result.state == "warn" for result in results),
            "results": [dataclasses.asdict(result) for result in results],
        },
        indent=1,
    )


def _counts(results: Sequence[Result]) -> str:
    words = {"ok": "ok", "absent": "absent", "warn": "warning(s)", "fail": "failure(s)"}
    found = {word: sum(result.state == state for result in results) for state, word in words.items()}
    return ", ".join(f"{number} {word}" for word, number in found.items())


def _merged(results: Sequence[Result]) -> list[Result]:
    """What is sound is shown once for all hosts, with the first one's value; what is wrong for every host."""
    shown: list[Result] = []
    for result in results:
        alike = [one for one in results if (one.name, one.state) == (result.name, result.state)]
        if result.state in ("warn", "fail") or alike[0] is result:
            hosts = {one.host for one in alike if one.host}
            more = f" ({result.host}; {len(hosts) - 1} more)" if len(hosts) > 1 and alike[0] is result else ""
            sound = result.state in ("ok", "absent")
            shown.append(dataclasses.replace(result, value=result.value + more) if sound else result)
    return shown


def _line(result: Result, width: int) -> str:
    expected = f"   [{result.expectation}]" if result.expectation and result.state in ("ok", "absent") else ""
    where = (
        f"{result.host}: "
        if result.state in ("warn", "fail") and result.host not in ("", *result.value.split())
        else ""
    )
    return f"  {result.state:<6}  {result.name:<{width}}  {where}{result.value}{expected}"


def _wrapped(label: str, text: str) -> list[str]:
    """Text beside its label; later lines stand under the first."""
    wrapped = textwrap.wrap(text, WIDTH - len(label), break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label if at == 0 else ' ' * len(label)}{line}" for at, line in enumerate(wrapped)]
