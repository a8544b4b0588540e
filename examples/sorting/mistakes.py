"""Pairs of the right answer and a model's own wrong one, from what `mslm eval` has written.

    python examples/sorting/mistakes.py answers.json task/asked.jsonl --output mistakes.jsonl [--choices]

Preferences for `mslm data examples`, or with ``--choices`` items for `mslm eval`. A question that was answered rightly
gives none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Write the pairs of one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="written by mslm eval --out")
    parser.add_argument("task", type=Path, help="the questions that were asked")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--choices", action="store_true", help="items for mslm eval instead of preferences")
    given = parser.parse_args()
    write_mistakes(given.result, given.task, given.output, choices=given.choices)


def write_mistakes(result: Path, task: Path, output: Path, *, choices: bool) -> None:
    """See the module."""
    asked = [json.loads(line) for line in task.read_text().splitlines()]
    answered = json.loads(result.read_text())["tasks"][0]["items"]
    rows = []
    for fields, item in zip(asked, answered, strict=True):
        said = item["samples"][0]
        wrong = said["text"].strip()
        if said["score"] != 0.0 or not wrong:
            continue
        right = fields["answer"]
        if choices:
            rows.append({"prompt": fields["prompt"], "choices": [right, wrong], "answer": 0})
        else:
            rows.append({"prompt": fields["prompt"], "chosen": right, "rejected": wrong})
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
