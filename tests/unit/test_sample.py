"""What ``mslm generate`` draws and prints: real tokens only, whole characters, and nothing before a refusal."""

from __future__ import annotations

import argparse
import inspect
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor, nn

from megatron_slm import cli
from megatron_slm.data.tokenizer import Tokenizer, train_tokenizer
from megatron_slm.errors import CheckpointError
from megatron_slm.rollout.sample import Sampling, choose, continuation
from megatron_slm.run_generate import text_after

SOURCE = inspect.getsource(argparse)
EOD = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([SOURCE], 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def with_dummy_prefix() -> Tokenizer:
    """A tokenizer as many published models have one: decoding drops the first space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue(), Path("dummy-prefix.model"))


class Uniform(nn.Module):
    """Logits that are ``value`` everywhere, [1, S, V]; remembers what it was fed."""

    def __init__(self, vocab_size: int, value: float = 0.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((vocab_size,), value))
        self.fed: list[list[int]] = []

    def forward(self, *, input_ids: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
        self.fed.append(input_ids[0].tolist())
        return self.logits.expand(1, input_ids.shape[1], -1)


def draw(model: nn.Module, prompt: list[int], vocab_size: int, sampling: Sampling) -> list[int]:
    return list(continuation(model, prompt, sampling, vocab_size=vocab_size, window=16, eod_id=EOD))


def test_an_empty_prompt_begins_a_document() -> None:
    model = Uniform(50)
    drawn = draw(model, [], 50, Sampling(max_new_tokens=5))
    assert model.fed[0] == [EOD] and drawn
    assert all(fed == [EOD, *drawn[: len(fed) - 1]] for fed in model.fed)


def test_only_real_tokens_are_drawn() -> None:
    drawn = draw(Uniform(5000), [5], 40, Sampling(max_new_tokens=200, top_k=5000))
    assert drawn and max(drawn) < 40


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float) -> None:
    with pytest.raises(CheckpointError, match="not finite.*earlier checkpoint"):
        draw(Uniform(50, value), [5], 50, Sampling(temperature=temperature))


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([1.0, 3.0, -2.0])
    for temperature in (0.0, 5e-324, 1e-40, 1e-3):
        assert choose(logits, Sampling(temperature=temperature), 7) == 1


@pytest.mark.parametrize(
    "text", ["ﷺ é 😀", "ﷺé😀", "a 😀 b", "é", "the \ufffd end", "ends with \ufffd", " two  spaces\n"]
)
@pytest.mark.parametrize("prompt", ["", "def main", "def ", "é", "\ufffd"])
def test_pieces_are_whole_characters_and_lose_none(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = list(text_after(tokenizer, tokenizer.encode(prompt), ids))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_character_over_several_tokens_is_one_piece(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ﷺ é 😀")
    assert len(ids) > 5, "these characters must be spelled in bytes for this test to say anything"
    pieces = text_after(tokenizer, tokenizer.encode("x"), ids)
    assert [piece.strip() for piece in pieces if piece.strip()] == ["ﷺ", "é", "😀"]


def test_a_cut_character_is_shown_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    pieces = list(text_after(tokenizer, [], ids))
    assert pieces[0] == "a" and set("".join(pieces[1:])) == {"\ufffd"}


def test_a_dummy_prefix_loses_no_space(with_dummy_prefix: Tokenizer) -> None:
    whole = with_dummy_prefix.encode("return the parser é")
    prompt = with_dummy_prefix.encode("return")
    assert whole[: len(prompt)] == prompt
    ids = whole[len(prompt) :]
    assert with_dummy_prefix.decode(ids) == "the parser é", "this tokenizer does drop the first space"
    assert "".join(text_after(with_dummy_prefix, prompt, ids)) == " the parser é"


def _refuses(*_: object, **__: object) -> Iterator[str]:
    raise CheckpointError("runs/nope holds no checkpoint.")
    yield ""


def _says(*_: object, **__: object) -> Iterator[str]:
    yield from (" there", " was")


def test_the_prompt_is_printed_once_and_not_before_a_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stub, code, out, errors in (
        (_refuses, 2, "", "mslm: runs/nope holds no checkpoint.\n"),
        (_says, 0, "In the there was\n", ""),
        (lambda *_, **__: iter(()), 0, "In the\n", ""),
    ):
        monkeypatch.setattr("megatron_slm.run_generate.generate", stub)
        assert cli.main(["generate", "runs/nope", "--prompt", "In the"]) == code
        assert capsys.readouterr() == (out, errors)


@pytest.mark.parametrize("temperature", ["nan", "inf", "-0.1"])
def test_a_temperature_that_is_no_number_is_refused(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "runs/nope", "--prompt", "x", f"--temperature={temperature}"]) == 2
    assert f"--temperature {temperature} at least 0 and finite" in capsys.readouterr().err
