"""Writes the task: sort six digits. Chats, preferences, prompts and a test set, no question twice.

    python examples/sorting/task.py --output task [--seed 0]

Of a preference the rejected answer is the right one with two neighbours exchanged, or with one digit replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

DIGITS, QUESTIONS, TEST, ASKED = 6, 20_000, 512, 3072
SIX_DIGITS = rf"^\s*\d(?: \d){{{DIGITS - 1}}}\s*$"
SHARES = {"chat": 0.5, "preference": 0.3, "prompt": 0.2}


def main() -> None:
    """Write the files of one seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_task(arguments.output, arguments.seed)


def write_task(output: Path, seed: int) -> None:
    """``text.txt`` for a tokenizer, JSONL for `mslm data examples` (chat, preference, prompt) and for `mslm eval`: test
    and asked, questions of the preferences, whose answers ``mistakes.py`` turns into pairs.
    """
    random = np.random.default_rng(seed)
    numbers = random.permutation(10**DIGITS)[:QUESTIONS]
    questions = [[int(digit) for digit in f"{number:0{DIGITS}d}"] for number in numbers]
    output.mkdir(parents=True, exist_ok=True)
    rows = {"test": [prompt_row(digits) for digits in questions[:TEST]]}
    rest, first = questions[TEST:], 0
    for kind, share in SHARES.items():
        mine = rest[first : first + round(share * len(rest))]
        first += len(mine)
        rows[kind] = [row_of(kind, digits, random) for digits in mine]
        if kind == "preference":
            rows["asked"] = [prompt_row(digits) for digits in mine[:ASKED]]
    for name, of_kind in rows.items():
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind))
    (output / "text.txt").write_text("\n".join(f"{question(q)} {answer(sorted(q))}" for q in rest[:2000]) + "\n")


def row_of(kind: str, digits: list[int], random: np.random.Generator) -> dict[str, str]:
    """A line of JSON of one kind."""
    right = sorted(digits)
    if kind == "chat":
        return {"prompt": question(digits), "completion": answer(right)}
    if kind == "preference":
        return {"prompt": question(digits), "chosen": answer(right), "rejected": answer(spoilt(right, random))}
    return prompt_row(digits)


def prompt_row(digits: list[int]) -> dict[str, str]:
    """A question with its answer, and the form of one for the verifier ``regex``."""
    row = {"prompt": question(digits), "answer": answer(sorted(digits)), "verifier": "exact_match"}
    return row | {"pattern": SIX_DIGITS}


def spoilt(right: list[int], random: np.random.Generator) -> list[int]:
    """Another answer than ``right``."""
    wrong = list(right)
    while wrong == right:
        place = int(random.integers(0, DIGITS))
        if random.random() < 0.5:
            wrong[place] = int(random.integers(0, 10))
        else:
            other = (place + 1) % DIGITS
            wrong[place], wrong[other] = wrong[other], wrong[place]
    return wrong


def question(digits: list[int]) -> str:
    """``4 1 3 =``."""
    return " ".join(map(str, digits)) + " ="


def answer(digits: list[int]) -> str:
    """``1 3 4``."""
    return " ".join(map(str, digits))


if __name__ == "__main__":
    main()
