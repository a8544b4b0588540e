"""Write a small set of chats that have one rule: a date in words is answered by its ISO form and nothing else.

    python examples/smollm2-sft/make_chats.py data/smollm2/task [--seed 0]

``chat.jsonl`` is for `mslm data examples`, ``test.jsonl`` for `mslm eval`; no date is in both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from pathlib import Path

CHATS, TEST = 256, 24
FIRST, LAST = datetime.date(1500, 1, 1), datetime.date(2099, 12, 31)
WAYS = ("{month} {day}, {year}", "{day} {month} {year}", "the {day}. of {month} in the year {year}")


def main() -> None:
    """Write the files of one seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(given.seed)
    dates = [
        datetime.date.fromordinal(n) for n in draw.sample(range(FIRST.toordinal(), LAST.toordinal()), CHATS + TEST)
    ]
    questions = [question(date, draw.choice(WAYS)) for date in dates]
    chats = [chat(*pair) for pair in zip(questions, dates, strict=True)]
    tests = [test(*pair) for pair in zip(questions, dates, strict=True)]
    for name, rows in (("chat", chats[TEST:]), ("test", tests[:TEST])):
        (given.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {CHATS} chats and {TEST} questions to {given.output}")


def question(date: datetime.date, way: str) -> str:
    """``Write March 7, 1931 as YYYY-MM-DD.``"""
    return f"Write {way.format(month=date.strftime('%B'), day=date.day, year=date.year)} as YYYY-MM-DD."


def chat(asked: str, date: datetime.date) -> dict[str, object]:
    """A row of messages."""
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": date.isoformat()}]}


def test(asked: str, date: datetime.date) -> dict[str, object]:
    """A question whose answer is judged."""
    return {"prompt": asked, "answer": date.isoformat(), "verifier": "exact_match"}


if __name__ == "__main__":
    main()
