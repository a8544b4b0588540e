"""Rows of JSON to records: what was said by whom, checked field by field.

``chat``
    ``{"messages": [{"role", "content", "weight"?, "rationale"?}, ...]}``, ShareGPT's
    ``{"conversations": [{"from", "value"}, ...]}``, or ``{"prompt", "completion", "rationale"?}``
``preference``
    ``{"prompt", "chosen", "rejected", "margin"?}``
``prompt``
    ``{"prompt", ...}`` (or ``messages`` that end before the answer); everything else is kept as JSON

Prompts, completions and answers are strings, or lists of messages. ``weight`` (of an assistant's message; default 1)
multiplies the loss of its tokens; ``rationale`` is what the assistant says before its content, with a weight of its own
(``rationale_weight`` of the row, or that of the command).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ROLE_NAMES: Mapping[str, str] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
"""Names of roles as data sets write them, and as templates know them."""

KNOWN_MESSAGE_KEYS = ("role", "from", "content", "value", "weight", "rationale")


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: a few words, by which rows left out are counted.
        detail: the rule, the value and the way out, as the end of a sentence that begins with the row's place.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        weight: of the loss of its tokens, where an assistant made it.
        rationale: what ``content`` begins with, if it has a weight of its own.
        more: other fields, for the template (``tool_calls``, ``name`` ...).
    """

    role: str
    content: str
    weight: float = 1.0
    rationale: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        prompt: messages before the answers.
        answers: of a chat the last answer, of a preference the chosen and the rejected one, of a prompt none. Each is
            the messages after ``prompt``.
        plain: everything was given as strings, so there may be no template.
        tools: for the template.
        rationale_weight: of the tokens of rationales; None: that of the command.
        margin: of a preference.
        fields: of a prompt, everything else.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    plain: bool
    tools: Any = None
    rationale_weight: float | None = None
    margin: float = 0.0
    score: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def record_of(row: Any, kind: str, score_key: str | None = None) -> Record:
    """The record that a row holds.

    Args:
        kind: "chat", "preference" or "prompt".
        score_key: field that holds a number to sort by.

    Raises:
        BadRow: a field is missing or of a wrong kind.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"holds {type(row).__name__}, not a JSON object; write one object a line")
    record = {"chat": _chat, "preference": _preference, "prompt": _prompt}[kind](row)
    weight = None if row.get("rationale_weight") is None else _number(row, "rationale_weight", least=0.0)
    score = None if score_key is None else _number(row, score_key)
    return replace(record, tools=row.get("tools"), rationale_weight=weight, score=score)


def transcript_of(record: Record) -> str:
    """Everything that is said, and by whom: rows of one transcript are the same row."""
    said = [*record.prompt, *(message for answer in record.answers for message in answer)]
    return "\n".join(f"{message.role}: {message.content}" for message in said)


def text_of(record: Record) -> str:
    """Everything that is said, one message a line; system messages, which many rows share, are left out."""
    said = [*record.prompt, *(message for answer in record.answers for message in answer)]
    return "\n".join(message.content for message in said if message.role != "system")


def opening_of(record: Record) -> str:
    """What is said before the first answer, but for system messages: rows that begin so ask the same."""
    said = [*record.prompt, *(record.answers[0] if record.answers else ())]
    asked = itertools.takewhile(lambda message: message.role != "assistant", said)
    return "\n".join(f"{message.role}: {message.content}" for message in asked if message.role != "system")


def _chat(row: dict[str, Any]) -> Record:
    for key in ("messages", "conversations"):
        if key in row:
            messages = _messages(row[key], key)
            if messages[-1].role != "assistant":
                # What follows the last answer is not answered.
                messages = messages[: _last_answer(messages, key) + 1]
            last = _last_answer(messages, key)
            return Record(messages[:last], (messages[last:],), plain=False)
    if "prompt" not in row and "completion" not in row:
        raise _missing(row, 'has neither "messages", "conversations" nor "prompt" and "completion"')
    prompt, plain = _turns(row, "prompt", "user")
    prompt = _untrained(prompt)
    completion, also_plain = _turns(row, "completion", "assistant")
    _answered(completion, "completion")
    if "rationale" in row:
        rationale = _text(row["rationale"], "rationale")
        first = completion[0]
        completion = (replace(first, content=rationale + first.content, rationale=rationale), *completion[1:])
    return Record(prompt, (completion,), plain and also_plain)


def _preference(row: dict[str, Any]) -> Record:
    prompt, plain = _turns(row, "prompt", "user")
    answers = []
    for key in ("chosen", "rejected"):
        answer, also_plain = _turns(row, key, "assistant")
        if answer[: len(prompt)] == prompt and not also_plain:
            # Some data sets repeat the prompt at the head of both conversations.
            answer = answer[len(prompt) :]
        _answered(answer, key)
        answers.append(answer)
        plain = plain and also_plain
    if answers[0] == answers[1]:
        raise BadRow("equal answers", '"chosen" and "rejected" are equal, which says nothing of either; leave it out')
    margin = _number(row, "margin") if row.get("margin") is not None else 0.0
    return Record(_untrained(prompt), tuple(answers), plain, margin=margin)


def _prompt(row: dict[str, Any]) -> Record:
    key = "prompt" if "prompt" in row or "messages" not in row else "messages"
    prompt, plain = _turns(row, key, "user")
    if prompt[-1].role == "assistant":
        raise BadRow("already answered", f'"{key}" ends with an answer; end it with what is to be answered')
    fields = {name: value for name, value in row.items() if name not in (key, "tools")}
    return Record(prompt, (), plain, fields=fields)


def _turns(row: dict[str, Any], key: str, role: str) -> tuple[tuple[Message, ...], bool]:
    """The messages under ``key``, and whether they were given as one string, said by ``role``."""
    if key not in row:
        raise _missing(row, f'has no "{key}"')
    if isinstance(row[key], str):
        return (Message(role, _text(row[key], key)),), True
    return _messages(row[key], key), False


def _messages(found: Any, key: str) -> tuple[Message, ...]:
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise BadRow("no messages", f'"{key}" is {_short(found)}; it must be a list of messages')
    return tuple(_message(one, f"{key}[{place}]") for place, one in enumerate(found))


def _message(found: Any, where: str) -> Message:
    if not isinstance(found, dict):
        raise BadRow("no messages", f"{where} is {_short(found)}; a message is an object with role and content")
    said_by = found.get("role", found.get("from"))
    role = ROLE_NAMES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise BadRow("unknown role", f"{where} has the role {said_by!r}; known are {', '.join(ROLE_NAMES)}")
    more = {name: value for name, value in found.items() if name not in KNOWN_MESSAGE_KEYS and value is not None}
    key = "content" if "content" in found or "value" not in found else "value"
    content = found.get(key)
    if content is None and "tool_calls" not in more:
        raise BadRow("missing field", f'{where} has no "content"; its keys are {sorted(found)}')
    text = "" if content is None else _text(content, f"{where}.{key}")
    if role == "assistant" and not text.strip() and "tool_calls" not in more:
        raise BadRow("empty completion", f"{where} is an answer without text; leave it out, or write one")
    weight = 1.0 if found.get("weight") is None else _number(found, "weight", least=0.0, where=where)
    rationale = _text(found["rationale"], f"{where}.rationale") if found.get("rationale") else ""
    return Message(role, rationale + text, weight, rationale, more)


def _text(found: Any, where: str) -> str:
    """A string, or the text parts of a list as chat interfaces write them."""
    if isinstance(found, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in found):
        found = "".join(str(part.get("text", "")) for part in found)
    if not isinstance(found, str):
        raise BadRow("not text", f"{where} is {_short(found)}, not text")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not text", f"{where} holds half of a surrogate pair, which is no text") from error
    return found


def _number(found: Mapping[str, Any], key: str, *, least: float = -math.inf, where: str = "") -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        place = f'{where}."{key}"' if where else f'"{key}"'
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise BadRow("not a number", f"{place} is {_short(value)}, not a finite number{bound}")
    return float(value)


def _untrained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """What is given as a prompt is not trained, whoever said it."""
    return tuple(replace(message, weight=0.0) for message in messages)


def _answered(messages: tuple[Message, ...], key: str) -> None:
    if not messages or messages[-1].role != "assistant":
        raise BadRow("no answer", f'"{key}" does not end with a message of the assistant')
    if not messages[-1].content.strip() and "tool_calls" not in messages[-1].more:
        raise BadRow("empty completion", f'"{key}" is empty; leave the row out, or write an answer')


def _last_answer(messages: tuple[Message, ...], key: str) -> int:
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if not places:
        raise BadRow("no answer", f'"{key}" holds no message of the assistant, so there is nothing to train on')
    return places[-1]


def _missing(row: dict[str, Any], what: str) -> BadRow:
    return BadRow("missing field", f"{what}; its keys are {sorted(map(str, row))}")


def _short(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 40 else f"{text[:37]}..."
