"""What the evaluation harness asks, asked of a model that is a table: sums, greedy answers, cuts; the class if it is
installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.examples.document import Document
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.evaluate.lm_eval import Opened, answers, cut_at, loglikelihoods, model_class, rolling
from megatron_slm.evaluate.scoring import Scored
from tests.example_files import pieces


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return pieces(tmp_path_factory.mktemp("tokenizer"))


def opened(tokenizer: Tokenizer, limit: int = 16) -> Opened:
    """Every label has minus its number in nats, and those of even numbers are the likeliest."""

    def read(documents: Sequence[Document]) -> list[Scored]:
        assert all(one.num_slots <= limit for one in documents)
        labels = [one.tokens[1:][one.weights[1:] != 0].astype(float) for one in documents]
        return [Scored(-own, (own % 2 == 0).astype(float), own) for own in labels]

    def answer(prompts: Sequence[Sequence[int]], length: int, temperature: float) -> list[str]:
        return [f" {tokenizer.decode(prompt)[-4:]}|{length}|{temperature}\n\nmore" for prompt in prompts]

    return Opened(tokenizer, read, answer, limit)


def test_log_likelihoods_of_continuations(tokenizer: Tokenizer) -> None:
    model = opened(tokenizer)
    pairs = [("The text", " is wrapped"), ("", "text"), ("text " * 40, " wrapped")]
    found = loglikelihoods(model, pairs)
    for (context, text), (total, greedy) in zip(pairs, found, strict=True):
        before = len(tokenizer.encode(context))
        labels = tokenizer.encode(context + text)[before:]
        assert total == -sum(labels) and greedy == all(label % 2 == 0 for label in labels)


def test_whole_texts_count_every_token_once(tokenizer: Tokenizer) -> None:
    texts = ["Wrap a single paragraph of text, returning a list of wrapped lines. " * 3, "text", ""]
    assert rolling(opened(tokenizer), texts) == [-sum(tokenizer.encode(text)) for text in texts]


def test_answers_are_cut_and_asked_for_together(tokenizer: Tokenizer) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("one text", {"until": ["\n\n"], "max_gen_toks": 8}),
        ("text " * 40, {"until": "|", "max_gen_toks": 8}),
        ("two text", {"until": [], "do_sample": True, "temperature": 0.5, "max_gen_toks": 4}),
    ]
    assert answers(opened(tokenizer), asked) == [" text|8|0.0", " ext ", " text|4|0.5\n\nmore"]
    assert cut_at("a b c", ["c", "b"]) == "a " and cut_at("a", [""]) == "a"


def test_the_harness_asks_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    asked = []

    def open_run(run: str) -> Opened:
        asked.append(run)
        return opened(tokenizer)

    made = model_class(open_run)
    assert get_model("mslm") is made
    model = made.create_from_arg_string("run=runs/x", {"batch_size": 4, "device": None})  # type: ignore[attr-defined]
    request = Instance("loglikelihood", {}, ("The text", " is wrapped"), 0, ("t", 0, 1))
    assert model.loglikelihood([request]) == loglikelihoods(opened(tokenizer), [("The text", " is wrapped")])
    assert asked == ["runs/x"] and np.isfinite(
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("t",), 0)])
    )
