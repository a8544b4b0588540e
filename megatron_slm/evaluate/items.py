"""What a model is asked: rows of a JSONL file, each checked and encoded. The fields of a row say what it is.

``held_out``
    ``{"text"}``, or ``{"prompt", "completion"}``, of which the completion counts
``choice``
    ``{"prompt", "choices", "answer"}``: the right choice is the one the model finds likeliest; ``answer`` is its number
    from 0, or its text
``generation``
    ``{"prompt", "verifier", ...}``: the answer is drawn, and judged by the verifier with the row's other fields
``golden``
    ``{"prompt", "completion", "expected": [low, high]}``: the completion's log-probability in nats lies between

``prompt`` is a text, or with a template a text or a list of messages. ``id`` and ``source`` may stand in any row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.documents import Source, open_sources
from megatron_slm.data.examples.document import Document
from megatron_slm.data.examples.encoding import ExampleEncoder
from megatron_slm.data.examples.reading import check_sources, parsed, read_rows
from megatron_slm.data.examples.records import BadRow, Message, record_of
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError
from megatron_slm.evaluate.registry import verifier_of_row
from megatron_slm.evaluate.verifiers import Unverifiable

KINDS = ("held_out", "choice", "generation", "golden")


@dataclass(frozen=True)
class Item:
    """One thing that a model is asked.

    Attributes:
        id: in its task.
        documents: what is scored: the windows of a text, the choices, the completion.
        num_bytes: of the text of each document that counts.
        prompt: tokens after which an answer is drawn.
        fields: of the row.
    """

    id: str
    documents: tuple[Document, ...] = ()
    num_bytes: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where the row says that it is from."""
        return str(self.fields.get("source", ""))


@dataclass(frozen=True)
class Task:
    """Items of one kind.

    Attributes:
        digest: of what is asked, so that two results can be said to be of the same items.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    digest: str


class Asker:
    """Makes rows into items for one tokenizer.

    Args:
        encoder: writes prompts with a template; None takes them as they are.
        limit: tokens that the model reads at most.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: ExampleEncoder | None, limit: int) -> None:
        self._tokenizer, self._encoder, self._limit = tokenizer, encoder, limit

    def task(self, path: Path, limit: int | None = None) -> Task:
        """The rows of a file, or the first ``limit`` of them.

        Raises:
            DataError: a row is of no kind, of another than the first one's, or too long; the message names the line.
        """
        sources = open_sources([path])
        check_sources(sources)
        items: list[Item] = []
        content = hashlib.sha256(self._encoder.template.sha256.encode() if self._encoder else b"")
        kind = ""
        for place, kind, fields in asked_rows(sources, limit):
            try:
                item = self._item(kind, fields, len(items))
            except BadRow as error:
                raise DataError(f"{place} {error.detail}.") from error
            items.append(item)
            content.update(json.dumps(item.fields, sort_keys=True).encode() + b"\n")
        if not items:
            raise DataError(f"{path} holds no row. Write one JSON object a line.")
        names = [item.id for item in items]
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise DataError(f'{path}: two rows have the "id" {twice!r}; give each its own.')
        return Task(path.stem, kind, tuple(items), content.hexdigest())

    def _item(self, kind: str, fields: dict[str, Any], number: int) -> Item:
        make: dict[str, Callable[[str, dict[str, Any]], Item]] = {
            "held_out": self._held_out,
            "choice": self._choice,
            "generation": self._generation,
            "golden": self._golden,
        }
        return make[kind](str(fields.get("id", number)), fields)

    def _held_out(self, name: str, fields: dict[str, Any]) -> Item:
        if "text" not in fields:
            text = _text(fields, "completion")
            return Item(name, (self._answered(fields, text),), (len(text.encode()),), fields=fields)
        text = _text(fields, "text")
        # The first token of a text is predicted from the end of another one.
        ids = [self._tokenizer.eod_id, *self._tokenizer.encode(text)]
        return Item(name, tuple(windows(np.array(ids), self._limit)), (len(text.encode()),), fields=fields)

    def _choice(self, name: str, fields: dict[str, Any]) -> Item:
        choices = fields["choices"]
        texts = isinstance(choices, list) and all(isinstance(one, str) and one for one in choices)
        if not texts or len(choices) < 2:
            raise BadRow("choices", f'has "choices" {choices!r:.60}; give two texts or more')
        right_choice(fields)
        documents = tuple(self._answered(fields, one) for one in choices)
        return Item(name, documents, tuple(len(one.encode()) for one in choices), fields=fields)

    def _generation(self, name: str, fields: dict[str, Any]) -> Item:
        prompt = self._prompt(fields)
        if len(prompt) >= self._limit:
            raise BadRow("long", f"has a prompt of {len(prompt)} tokens; the model reads {self._limit}")
        return Item(name, prompt=tuple(prompt), fields=fields)

    def _golden(self, name: str, fields: dict[str, Any]) -> Item:
        expected = fields["expected"]
        numbers = isinstance(expected, list) and all(type(one) in (int, float) for one in expected)
        if not numbers or len(expected) != 2 or not expected[0] <= expected[1] or not math.isfinite(expected[0]):
            raise BadRow("range", f'has "expected" {expected!r:.60}; give [low, high] in nats, as [-12.5, -9]')
        text = _text(fields, "completion")
        return Item(name, (self._answered(fields, text),), (len(text.encode()),), fields=fields)

    def _prompt(self, fields: dict[str, Any]) -> list[int]:
        """Tokens up to where the answer begins."""
        if self._encoder is not None:
            found: list[int] = self._encoder.prompt(record_of(fields, "prompt")).tokens.tolist()
            return found
        return self._tokenizer.encode(_text(fields, "prompt", empty=True)) or [self._tokenizer.eod_id]

    def _answered(self, fields: dict[str, Any], text: str) -> Document:
        """The prompt and an answer whose tokens count."""
        if self._encoder is not None:
            record = record_of(fields, "prompt")
            encoded = self._encoder.conversation(record, (Message("assistant", text),))
            tokens, first = encoded.tokens, encoded.first_trained
        else:
            tokens, first = continued(self._tokenizer, _text(fields, "prompt", empty=True), text)
        if len(tokens) > self._limit + 1:
            raise BadRow("long", f"has {len(tokens)} tokens with its answer; the model reads {self._limit}")
        weights = np.zeros(len(tokens), dtype=np.float32)
        weights[first:] = 1.0
        return Document(tokens, weights)


def require_rows(path: Path, limit: int | None = None) -> None:
    """Refuse, before there is a model, rows that no model can be asked.

    Raises:
        DataError: a row is of no kind, of another than the first one's, or names a verifier that is not known.
    """
    sources = open_sources([path])
    check_sources(sources)
    for _ in asked_rows(sources, limit):
        pass


def asked_rows(sources: list[Source], limit: int | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, kind and fields of all rows, or of the first ``limit``.

    Raises:
        DataError: see :func:`require_rows`.
    """
    first = ""
    rows = (row for source in sources for row in read_rows(source))
    for row in itertools.islice(rows, limit):
        try:
            fields = parsed(row)
            if not isinstance(fields, dict):
                raise BadRow("no object", f"holds {type(fields).__name__}, not a JSON object")
            kind = kind_of(fields)
            if kind == "generation":
                verifier_of_row(fields)
        except BadRow as error:
            raise DataError(f"{row.place} {error.detail}.") from error
        except Unverifiable as error:
            raise DataError(f"{row.place}: {error}.") from error
        yield row.place, kind, fields
        first = first or kind  # what is wrong with the row alone was said by now
        if kind != first:
            raise DataError(f"{row.place} asks for {kind}, but the rows before it for {first}; give two files.")


def kind_of(fields: dict[str, Any]) -> str:
    """Which of :data:`KINDS` a row is.

    Raises:
        BadRow: none of them.
    """
    for kind, names in {
        "choice": ("choices",),
        "golden": ("expected",),
        "generation": ("verifier",),
        "held_out": ("text",),
    }.items():
        if all(name in fields for name in names):
            return kind
    if "completion" in fields:
        return "held_out"
    raise BadRow(
        "no kind",
        f'has neither "text", "completion", "choices", "verifier" nor "expected"; its keys are {sorted(fields)}',
    )


def right_choice(fields: dict[str, Any]) -> int:
    """Place of the right choice.

    Raises:
        BadRow: ``answer`` is none of them.
    """
    choices, answer = fields["choices"], fields.get("answer")
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer in choices:
        return int(choices.index(answer))
    raise BadRow("answer", f'has "answer" {answer!r:.60}; give a place from 0 to {len(choices) - 1}, or a choice')


def continued(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[np.ndarray, int]:
    """Tokens of a prompt and what follows it, and the first of them that counts.

    The two are encoded together, and the prompt is what their tokens have in common with the prompt's own: a space
    before the text is then in the text's first token, as in any text.
    """
    before = tokenizer.encode(prompt) or [tokenizer.eod_id]
    ids = tokenizer.encode(prompt + text) if prompt else [*before, *tokenizer.encode(text)]
    same = (one == other for one, other in zip(before, ids, strict=False))
    first = next((at for at, equal in enumerate(same) if not equal), len(before))
    # Something must come before the first token that counts.
    return np.array(ids, dtype=np.int64), max(1, min(first, len(ids) - 1))


def windows(tokens: np.ndarray, limit: int) -> list[Document]:
    """A text as documents of at most ``limit`` labels; every token but the first counts once.

    The last window reaches back, so that what is left at the end has as much before it as it can have.
    """
    found: list[Document] = []
    done, last = 1, len(tokens)
    while not found or done < last:
        end = min(done + limit, last)
        start = max(0, end - limit - 1)
        weights = np.ones(end - start, dtype=np.float32)
        weights[: done - start] = 0.0
        found.append(Document(tokens[start:end], weights))
        done = end
    return found


def _text(fields: dict[str, Any], name: str, *, empty: bool = False) -> str:
    text = fields.get(name)
    if not isinstance(text, str) or not (text or empty):
        raise BadRow("no text", f"has {name!r} {text!r:.60}, no text; its keys are {sorted(fields)}")
    return text


def digest_of(documents: Sequence[Document]) -> str:
    """Of tokens and of what counts."""
    content = hashlib.sha256()
    for one in documents:
        content.update(len(one.tokens).to_bytes(8, "little") + one.tokens.astype("<i8").tobytes())
        content.update(one.weights.astype("<f4").tobytes())
    return content.hexdigest()
