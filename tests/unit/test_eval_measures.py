"""What answers amount to, and two results against each other: a better one, one that is not, one of other items."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.cli import main
from megatron_slm.data.examples.document import Document
from megatron_slm.errors import DataError
from megatron_slm.evaluate import measures
from megatron_slm.evaluate.compare import NO_DIFFERENCE, RESULT_VERSION, compare, read_result
from megatron_slm.evaluate.items import Item, Task
from megatron_slm.evaluate.scoring import Scored


def scored(*logprobs: float, correct: float = 1.0, confidence: float = 0.5) -> Scored:
    return Scored(np.array(logprobs), np.full(len(logprobs), correct), np.full(len(logprobs), confidence))


def item(name: str, *tokens: list[int], **fields: Any) -> Item:
    documents = tuple(Document(np.array([0, *one]), np.ones(len(one) + 1, np.float32)) for one in tokens)
    return Item(name, documents, tuple(fields.pop("num_bytes", [4] * len(tokens))), fields=fields)


def test_held_out_text_and_its_slices() -> None:
    items = (
        item("a", [1] * 60, source="x"),
        item("b", [1] * 30, [1] * 39 + [2], source="y"),
        item("c", [1, 1, 1, 3], source="y"),
    )
    parts = [
        [scored(*[-1.0] * 60)],
        [scored(*[-2.0] * 30), scored(*[-2.0] * 40, correct=0.0)],
        [scored(*[-3.0] * 4, confidence=1.0, correct=0.0)],
    ]
    values, calibration = measures.held_out(items, parts)
    found = measures.measured(Task("t", "held_out", items, "d"), values, measures.rare_rates(items))
    assert found["metrics"]["tokens"] == 134 and found["metrics"]["loss"] == pytest.approx((60 + 140 + 12) / 134)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(212 / 134))
    assert found["metrics"]["bits per byte"] == pytest.approx(212 / math.log(2) / 16)
    assert {key: one["loss"] for key, one in found["slices"]["source"].items()} == {
        "x": 1.0,
        "y": pytest.approx(152 / 74),
    }
    assert list(found["slices"]["tokens"]) == ["<= 64", "64 - 256"]
    assert {key: one["items"] for key, one in found["slices"]["rare tokens"].items()} == {"<= 5%": 2, "> 20%": 1}
    # 90 correct of 134 at a confidence of one half, 4 wrong ones at 1.
    assert calibration["ece"] == pytest.approx((130 * abs(0.5 - 90 / 130) + 4) / 134)
    assert calibration["brier"] == pytest.approx((130 * 0.25 + 4) / 134)


def test_choices_as_a_whole_by_token_and_by_byte() -> None:
    items = (item("a", [1], [1, 2, 3], choices=["x", "y"], answer=1, num_bytes=[2, 12]),)
    values, calibration = measures.choices(items, [[scored(-2.0), scored(-1.0, -1.0, -1.0)]])
    assert (values[0]["right_raw"], values[0]["right_token"], values[0]["right_byte"]) == (0.0, 1.0, 1.0)
    share = 1.0 / (1.0 + math.exp(-1.0))
    assert values[0]["share_of_right"] == pytest.approx(1.0 - share) and calibration["ece"] == pytest.approx(share)
    assert calibration["brier"] == pytest.approx(2 * share**2)


def test_golden_prompts_and_generated_answers() -> None:
    items = (item("a", [1], expected=[-3, -1]), item("b", [1], expected=[-0.5, 0]))
    assert [one["in_range"] for one in measures.golden(items, [[scored(-2.0)]] * 2)] == [1.0, 0.0]
    values = measures.generated([[1.0, 0.0, math.nan, 0.5], [1.0, 1.0, 0.2, 0.0], [math.nan] * 4])
    assert [one["passed"] for one in values] == [1.0, 2.0, 0.0] and values[2]["samples"] == 0.0
    found = measures.passes(values, [1, 2, 4])
    assert found["pass@1"] == pytest.approx((1 / 3 + 1 / 2) / 2) and found["pass@4"] == 1.0
    assert found["pass@2"] == pytest.approx(((1 - 1 / 3) + (1 - 1 / 6)) / 2) and found["unscored"] == 5 / 12


@pytest.mark.parametrize(("value", "name"), [(1, "<= 2"), (2, "<= 2"), (3, "2 - 4"), (4, "2 - 4"), (5, "> 4")])
def test_buckets(value: float, name: str) -> None:
    assert measures.bucket(value, (2, 4)) == name


def result(rights: list[float], nats: list[float], digest: str = "d") -> dict[str, Any]:
    choices = [
        {"id": str(at), "values": {f"right_{name}": one for name in ("raw", "token", "byte")}}
        for at, one in enumerate(rights)
    ]
    texts = [{"id": str(at), "values": {"nats": one, "tokens": 10.0}} for at, one in enumerate(nats)]
    return {
        "result_version": RESULT_VERSION,
        "model": "m",
        "step": 1,
        "tokenizer_hash": "h",
        "settings": {"seed": 1},
        "tasks": [
            {"name": "c", "kind": "choice", "digest": digest, "items": choices},
            {"name": "t", "kind": "held_out", "digest": digest, "items": texts},
        ],
    }


def test_a_better_model_is_found_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    nats = random.uniform(20, 30, 80)
    worse = result(random.integers(0, 2, 80).astype(float).tolist(), nats.tolist())
    better = result(random.integers(0, 2, 80).astype(float).tolist(), (nats - random.uniform(0, 2, 80)).tolist())
    rows = {row.metric: row for row in compare(worse, better, resamples=500, seed=0)}
    assert rows["loss"].verdict == "B is better" and rows["loss"].found.difference == pytest.approx(-0.1, abs=0.02)
    assert rows["accuracy (raw)"].verdict == NO_DIFFERENCE and 0.1 < rows["accuracy (raw)"].found.detectable < 0.4
    back = {row.metric: row for row in compare(better, worse, resamples=500, seed=0)}
    assert back["loss"].verdict == "A is better"
    few = compare(result([0.0] * 3, [9.0] * 3), result([1.0] * 3, [8.0] * 3), resamples=500, seed=0)
    assert {row.verdict for row in few} == {"too few items (3)"}


def test_answers_that_only_one_model_has_a_score_for_are_left_out() -> None:
    def of(samples: list[float]) -> dict[str, Any]:
        found = result([], [])
        values = [{"samples": one, "passed": one, "score": one, "unscored": 2.0 - one} for one in samples]
        items = [{"id": str(at), "values": value} for at, value in enumerate(values)]
        found["tasks"] = [{"name": "g", "kind": "generation", "digest": "d", "items": items}]
        return found

    rows = compare(of([2.0] * 20 + [0.0]), of([1.0] * 20 + [2.0]), resamples=200, seed=0)
    assert rows[0].left_out == 1 and rows[0].found.items == 20 and rows[0].verdict == NO_DIFFERENCE
    (nothing, _) = compare(of([0.0]), of([1.0]), resamples=200, seed=0)
    assert nothing.verdict == "too few items (0)"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tokenizer_hash", "other", "tokenizer_hash"),
        ("settings", {"seed": 2}, "drawn in another way"),
        ("tasks", [], "Evaluate both on the same"),
    ],
)
def test_what_cannot_be_compared_is_refused(key: str, value: Any, problem: str) -> None:
    one = result([1.0], [1.0])
    with pytest.raises(DataError, match=problem):
        compare(one, {**one, key: value}, resamples=100, seed=0)
    with pytest.raises(DataError, match="are not the same"):
        compare(one, result([1.0], [1.0], digest="e"), resamples=100, seed=0)


def test_the_command_compares_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = result([0.0, 1.0] * 10, [25.0] * 20), result([1.0] * 20, [24.0, 24.5] * 10)
    for name, content in {"a": first, "b": second, "c": {**copy.deepcopy(first), "tokenizer_hash": "x"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--resamples", "200"]) == 0
    assert capsys.readouterr().out.count("B is better") == 4
    assert main(["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"]) == 0
    assert {one["verdict"] for one in json.loads(capsys.readouterr().out)} == {"B is better"}
    (tmp_path / "d.json").write_text("{}")
    for name, problem in {"c": "tokenizer_hash", "d": "result_version None", "e": "Cannot read"}.items():
        assert main(["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / f"{name}.json")]) == 2
        said = capsys.readouterr().err
        assert problem in said and said.count("\n") == 1
    with pytest.raises(DataError, match="mslm eval --out"):
        read_result(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "Nothing is asked"),
        (["--task", "t.jsonl", "--samples", "0"], "--samples 0"),
        (["--task", "t.jsonl", "--temperature", "nan"], "--temperature nan"),
        (["--task", "t.jsonl", "--timeout", "0"], "--timeout 0"),
        (["--task", "t.jsonl", "--out", "/nowhere/x.json"], "no directory /nowhere"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "run", *options]) == 2
    assert problem in capsys.readouterr().err
