"""Judging answers on several ranks: verifiers on one, a divided reward model, the same numbers everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.data.examples.prompts import Prompt
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.evaluate.rewards import Part
from megatron_slm.model.ending import Scalar
from megatron_slm.rollout.generate import Completion
from megatron_slm.stages.sequences import Drawn, Shape
from tests.example_files import pieces
from tests.pool import RankPool
from tests.training import SMALL, Task, build

TASK = Task(replace(SMALL, num_layers=2, init_method_std=0.2), packed=True)
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "tp2 dp2": (4, {TP: 2}),
}
TOLERANCE = 1e-5
"""Rotary angles are fp32, and in a packed row the positions are others."""
ANSWERS = ["a line of text", " the text", "text\n", "indent", "no", "wrap a long line of text", "7"]
PARTS = (
    Part("exact_match", "exact_match", 2.0),
    Part("model", "model", 1.0),
    Part("right", "verifier", None),
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(4) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pieces(tmp_path_factory.mktemp("tokenizer")).path


def asked(tokenizer: Tokenizer) -> tuple[list[Drawn], list[Prompt]]:
    """Prompts and answers of uneven lengths; every other one ends with the token that ends a document."""
    drawn, prompts = [], []
    for number, answer in enumerate(ANSWERS):
        before = tokenizer.encode("Wrap" * (1 + number % 3))
        ids = tokenizer.encode("Wrap" * (1 + number % 3) + answer)[len(before) :]
        finished = number % 2 == 0
        tokens = (*ids, tokenizer.eod_id) if finished else tuple(ids)
        zeros = (0.0,) * len(tokens)
        drawn.append(Drawn(number, tuple(before), Completion(tokens, zeros, zeros, None, finished)))
        fields: dict[str, Any] = {"answer": answer if number != 3 else "other", "verifier": "exact_match"}
        if number == 4:
            del fields["answer"]  # cannot be judged
        prompts.append(Prompt(number, number, tuple(before), fields))
    return drawn, prompts


def judged(task: Task, path: Path) -> tuple[list[Any], list[str]]:
    """What this rank is told of the answers of its copy, and what it wrote into the log."""
    from megatron_slm.evaluate.verifier_pool import VerifierPool
    from megatron_slm.run_judge import Court, RewardModel, speaks
    from megatron_slm.stages.reference import Frozen
    from megatron_slm.train.step import StepPlan
    from tests.training import finish

    groups, chunks, _ = build(task, Scalar(0.5))
    plan = StepPlan(
        loss=lambda *_: (torch.zeros(()), torch.ones(()), {}),
        learning_rate=lambda _: 0.0,
        peak_learning_rate=0.0,
        seq_length=task.model.seq_length,
        groups=groups,
        device=torch.device("cpu"),
        logged=(),
    )
    opened = Tokenizer.open(path)
    drawn, prompts = asked(opened)
    mine = slice(None) if groups.dp.size() == 1 else (slice(0, 5), slice(5, None))[groups.dp.rank()]
    said: list[str] = []
    pool = VerifierPool(["exact_match", "verifier"], workers=1, timeout_s=20.0) if speaks(plan) else None
    model = RewardModel(Frozen(chunks), Shape(task.model.seq_length, 2, opened.eod_id), plan)
    court = Court(PARTS, opened, plan, pool=pool, model=model, warn=said.append)
    found = court(drawn[mine], prompts[mine])
    again = court(drawn[mine], prompts[mine])
    assert repr(found) == repr(again)
    if pool is not None:
        pool.close()
    finish()
    return found, said


def alone(task: Task, path: Path) -> list[float]:
    """The reward model's number of each answer, every one in a batch of its own, read by hand."""
    from megatron_slm.rollout.score import scores
    from tests.training import finish

    groups, chunks, _ = build(task, Scalar(0.5))
    length, found = task.model.seq_length, []
    for each in asked(Tokenizer.open(path))[0]:
        tokens = [*each.prompt, *each.completion.tokens]
        padded = torch.tensor([tokens + [0] * (length - len(tokens))])
        batch = {
            "tokens": padded,
            "labels": padded,
            "loss_mask": torch.ones(1, length),
            "position_ids": torch.arange(length)[None],
            "document_ids": torch.zeros(1, length, dtype=torch.int64),
        }
        (output,) = scores(chunks, [batch], seq_length=length, groups=groups)
        found.append(float(output[0, len(tokens) - 1]))
    finish()
    return found


@cache
def expected(ranks: RankPool, path: Path) -> Sequence[float]:
    numbers: list[float] = ranks.call(alone, 1, TASK, path)[0]
    assert len({round(number, 3) for number in numbers}) == len(ANSWERS), "each answer has its own number"
    return numbers


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_every_rank_is_told_what_one_rank_says(ranks: RankPool, tokenizer: Path, layout: str | None) -> None:
    size, degrees = LAYOUTS[layout] if layout else (1, {})
    model = expected(ranks, tokenizer)
    told = ranks.call(judged, size, TASK.on(**degrees), tokenizer)
    copies = [told] if layout != "tp2 dp2" else [told[:2], told[2:]]
    for copy in copies:
        assert all(repr(found) == repr(copy[0][0]) for found, _ in copy), "one copy, one judgement"
    found = [one for copy in copies for one in copy[0][0]]
    for number, (one, answer) in enumerate(zip(found, ANSWERS, strict=True)):
        assert one.parts["model"] == pytest.approx(model[number], abs=TOLERANCE)
        if number == 4:
            assert math.isnan(one.total) and set(one.parts) == {"model"}
            continue
        right = float(number != 3)
        assert (one.parts["exact_match"], one.parts["right"]) == (right, right), answer
        assert one.total == pytest.approx(2.0 * right + model[number], abs=TOLERANCE)
    for _, said in told:
        assert (
            len(said) == 1 and "exact_match could not judge sample 4 (row 5 of the prompts): the row has no" in said[0]
        )
