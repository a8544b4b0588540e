"""Every form of a row becomes a record, and whatever is wrong with one is said by name."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_slm.data.examples.records import BadRow, Message, opening_of, record_of, text_of, transcript_of

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_all_forms_of_a_chat_are_one() -> None:
    expected = ((Message("user", "Q"),), ((Message("assistant", "A"),),))
    for row in (
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER, {"role": "user", "content": "not answered"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
    ):
        record = record_of(row, "chat")
        assert (record.prompt, record.answers) == expected
        assert not record.plain


def test_a_prompt_is_not_trained_whoever_says_it() -> None:
    record = record_of({"prompt": [USER, ANSWER, USER], "completion": "B"}, "chat")
    assert [message.weight for message in record.prompt] == [0.0, 0.0, 0.0]
    assert record.answers == ((Message("assistant", "B"),),)
    assert not record.plain
    assert record_of({"prompt": "Q", "completion": "A"}, "chat").plain
    earlier = record_of({"messages": [USER, ANSWER, USER, ANSWER]}, "chat")
    assert [message.weight for message in earlier.prompt] == [1.0, 1.0, 1.0], "in a conversation every answer is"


def test_weights_rationales_margins_scores_and_whatever_else() -> None:
    weighted = {"messages": [USER, {**ANSWER, "weight": 0.25, "rationale": "R: "}], "rationale_weight": 0.5, "hard": 3}
    record = record_of(weighted, "chat", "hard")
    assert record.answers[0][0] == Message("assistant", "R: A", 0.25, "R: ")
    assert (record.rationale_weight, record.score) == (0.5, 3.0)
    assert record_of({"prompt": "Q", "completion": "A", "rationale": "R"}, "chat").answers[0][0].content == "RA"
    assert record_of({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2}, "preference").margin == 2.0
    prompt = record_of({"prompt": "Q", "answer": [1, 2], "verifier": "sort", "source": "s"}, "prompt")
    assert prompt.fields == {"answer": [1, 2], "verifier": "sort", "source": "s"}


def test_conversations_of_a_preference_may_repeat_the_prompt() -> None:
    other = {"role": "assistant", "content": "B"}
    short = record_of({"prompt": [USER], "chosen": [ANSWER], "rejected": [other]}, "preference")
    assert record_of({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, other]}, "preference") == short


def test_what_is_compared() -> None:
    system = {"role": "system", "content": "S"}
    record = record_of({"messages": [system, USER, ANSWER, USER, ANSWER]}, "chat")
    assert text_of(record) == "Q\nA\nQ\nA"
    assert opening_of(record) == "user: Q"
    assert transcript_of(record) == "system: S\nuser: Q\nassistant: A\nuser: Q\nassistant: A"


@pytest.mark.parametrize(
    ("kind", "row", "reason", "said"),
    [
        ("chat", [1], "not an object", "list"),
        ("chat", {"text": "x"}, "missing field", "['text']"),
        ("chat", {"prompt": "Q"}, "missing field", '"completion"'),
        ("chat", {"prompt": "Q", "completion": " \n"}, "empty completion", '"completion"'),
        ("chat", {"messages": [USER]}, "no answer", '"messages"'),
        ("chat", {"messages": []}, "no messages", '"messages"'),
        ("chat", {"messages": ["hi"]}, "no messages", "messages[0]"),
        ("chat", {"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "unknown role", "narrator"),
        ("chat", {"messages": [{"role": "user"}, ANSWER]}, "missing field", "messages[0]"),
        ("chat", {"messages": [USER, {**ANSWER, "weight": -1}]}, "not a number", "messages[1]"),
        ("chat", {"messages": [USER, {**ANSWER, "weight": True}]}, "not a number", "True"),
        ("chat", {"messages": [{"role": "user", "content": 7}, ANSWER]}, "not text", "messages[0].content"),
        ("chat", {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "not text", "surrogate"),
        ("preference", {"prompt": "Q", "chosen": "A"}, "missing field", '"rejected"'),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "A"}, "equal answers", "chosen"),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": ""}, "empty completion", '"rejected"'),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "x"}, "not a number", '"margin"'),
        ("preference", {"prompt": "Q", "chosen": [USER], "rejected": [ANSWER]}, "no answer", '"chosen"'),
        ("prompt", {"answer": "A"}, "missing field", '"prompt"'),
        ("prompt", {"prompt": [USER, ANSWER]}, "already answered", '"prompt"'),
    ],
)
def test_refusals_name_the_field(kind: str, row: Any, reason: str, said: str) -> None:
    with pytest.raises(BadRow) as caught:
        record_of(row, kind)
    assert caught.value.reason == reason
    assert said in caught.value.detail
