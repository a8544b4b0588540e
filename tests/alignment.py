"""A task for alignment: sort digits. Compiled chats, preferences and prompts, small enough for a test."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

DIGITS, SEQ_LENGTH = 4, 64


@cache
def compiled(parent: Path, rows: int = 400) -> dict[str, Path]:
    """``chat``, ``preference`` and ``prompt``: directories of compiled examples with one tokenizer.

    Of a preference the rejected answer has two digits exchanged.
    """
    from megatron_slm.data.examples.compiling import compile_examples
    from megatron_slm.data.examples.request import Options
    from megatron_slm.data.prepare import prepare

    texts: dict[str, list[dict[str, object]]] = {"chat": [], "preference": [], "prompt": []}
    for question, answer, wrong in problems(rows):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        texts["chat"].append({"messages": messages})
        texts["preference"].append({"prompt": question, "chosen": answer, "rejected": wrong})
        texts["prompt"].append({"prompt": question, "answer": answer, "verifier": "exact_match"})
    corpus = parent / "text.txt"
    corpus.write_text("\n".join(f"{question} {answer}" for question, answer, _ in problems(50)))
    prepare([corpus], parent / "corpus", vocab_size=290, split=0.0)
    found = {}
    for kind, rows_of_kind in texts.items():
        source = parent / f"{kind}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows_of_kind))
        options = Options(kind=kind, seq_length=SEQ_LENGTH, valid_share=0.1)
        tokenizer = parent / "corpus" / "tokenizer"
        compile_examples([source], parent / kind, options, tokenizer_model=tokenizer, template="plain")
        found[kind] = parent / kind
    return found


def problems(rows: int) -> list[tuple[str, str, str]]:
    """(question, answer, an answer with two neighbours exchanged): each question once."""
    random = np.random.default_rng(0)
    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < rows:
        digits = random.integers(0, 10, DIGITS)
        right = np.sort(digits)
        places = np.flatnonzero(right[1:] != right[:-1])
        if len(places):
            wrong, place = right.copy(), places[0]
            wrong[[place, place + 1]] = wrong[[place + 1, place]]
            question = "sort " + " ".join(map(str, digits))
            found[question] = (question, " ".join(map(str, right)), " ".join(map(str, wrong)))
    return list(found.values())


def digits_right(answer: str, fields: dict[str, object]) -> float:
    """Share of the places that hold the right digit."""
    right, given = str(fields["answer"]).split(), answer.split()
    return sum(one == other for one, other in zip(right, given, strict=False)) / len(right)
