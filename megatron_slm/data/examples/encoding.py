"""Records to ids, with the weight of each as a label and who made it. What the assistant made is known, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_slm.data.examples.records import BadRow, Message, Record
from megatron_slm.data.examples.special_tokens import EncodedText, TemplateTokenizer
from megatron_slm.data.examples.store import ASSISTANT, RATIONALE, ROLES, TEMPLATE
from megatron_slm.data.examples.template import RAW, ChatTemplate, Span
from megatron_slm.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """One document: ids [n], weights float32 [n] of each as a label, roles uint8 [n] (places in ``ROLES``)."""

    tokens: np.ndarray
    weights: np.ndarray
    roles: np.ndarray

    @property
    def first_trained(self) -> int:
        """The first token that is trained as a label; n when there is none."""
        return int(np.argmax(self.weights != 0.0)) if self.weights.any() else len(self.tokens)

    def cut(self, length: int) -> Encoded:
        """The first ``length`` tokens."""
        return Encoded(self.tokens[:length], self.weights[:length], self.roles[:length])


@dataclass(frozen=True)
class ExampleEncoder:
    """Records to documents, in any process.

    Args:
        template: of conversations; "raw" takes plain strings alone.
        rationale_weight: of the tokens of rationales, where their row says nothing else.

    Raises:
        DataError: the template ends a turn with a token that the tokenizer has not.
    """

    tokenizer: TemplateTokenizer
    template: ChatTemplate
    rationale_weight: float = 1.0

    def __post_init__(self) -> None:
        special = self.tokenizer.special
        if self.template.name == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= special.keys():
            raise DataError(
                "The template chatml needs the special tokens <|im_start|> and <|im_end|>, but "
                f"{self.tokenizer.path} has {', '.join(list(special)[:8]) or 'none'}; take --template plain."
            )

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: those that stop its generation.

        Raises:
            DataError: the template writes no short conversation of two turns.
        """
        question, answer = Message("user", "Hello"), Message("assistant", "Hello")
        try:
            encoded = self.conversation(Record((question,), ((answer,),), plain=True), (answer,))
        except BadRow as error:
            raise DataError(f"A conversation of a question and an answer {error.detail}.") from error
        ends = [int(token) for token in encoded.tokens if int(token) in self.tokenizer.special_ids]
        return ends[-1:]

    def conversation(self, record: Record, answer: Sequence[Message]) -> Encoded:
        """The record's prompt with one of its answers; it ends with the last token that is trained.

        Raises:
            BadRow: the template refuses it, or does not say what the assistant made, or nothing of it is trained.
        """
        messages = (*record.prompt, *answer)
        self._check(record, messages)
        text, spans = self.template.spans(messages, tools=record.tools)
        spans = [self._ended(text, span) for span in spans]
        placed, at = self._encode(text, [cut for span in spans for cut in (span.start, span.stop)])
        roles = self._roles(record, messages, text)[placed.starts]
        weights = np.zeros(len(placed.ids), dtype=np.float32)
        share = self.rationale_weight if record.rationale_weight is None else record.rationale_weight
        for span, first, end in zip(spans, at[::2], at[1::2], strict=True):
            weight = messages[span.message].weight
            # Both sides of this border are generated, so a token may lie across it: it is where it begins.
            border = first + int(np.searchsorted(placed.starts[first:end], self._answer(text, span, messages)))
            weights[first:border], weights[border:end] = weight * share, weight
            roles[first:border], roles[border:end] = RATIONALE, ASSISTANT
        trained = np.flatnonzero(weights[1:]) + 1
        if not len(trained):
            raise BadRow("nothing trained", "has no token with a weight above 0 after its first; leave it out")
        return Encoded(np.array(placed.ids, dtype=np.int64), weights, roles).cut(int(trained[-1]) + 1)

    def prompt(self, record: Record) -> Encoded:
        """The record's prompt up to where the answer begins; nothing of it is trained.

        Raises:
            BadRow: the template refuses it, or it is empty.
        """
        self._check(record, record.prompt)
        placed = self._encode(self.template.render(record.prompt, answering=True, tools=record.tools), [])[0]
        if not placed.ids:
            raise BadRow("empty prompt", "has a prompt without text, which nothing can follow; leave it out")
        empty = np.zeros(len(placed.ids), dtype=np.float32)
        roles = np.full(len(placed.ids), ROLES.index("user"), dtype=np.uint8)
        return Encoded(np.array(placed.ids, dtype=np.int64), empty, roles)

    def _check(self, record: Record, messages: Sequence[Message]) -> None:
        if self.template.name == RAW and not record.plain:
            raise BadRow(
                "chat without template", "is a conversation, which --template raw cannot write; name another template"
            )
        for message in messages:
            if found := self.tokenizer.special_in(message.content):
                raise BadRow(
                    "special token", f"spells the special token {found} in its text, which would end or begin turns"
                )

    def _ended(self, text: str, span: Span) -> Span:
        """The span up to the token that ends the turn; what a derived span has after it, the template writes.

        Raises:
            BadRow: no token ends it.
        """
        end = self.tokenizer.last_special_end(text[span.start : span.stop])
        if end and not text[span.start + end : span.stop].strip():
            return span._replace(stop=span.start + end) if self.template.way == "derived" else span
        raise BadRow(
            "no end of turn",
            f"is written by the template {self.template.name} with an answer that no special token ends, so a model "
            "would never learn to stop; end the assistant's turns with eos_token, inside what is marked as generated",
        )

    def _answer(self, text: str, span: Span, messages: Sequence[Message]) -> int:
        """The character that the span's answer begins at, after its rationale."""
        rationale = messages[span.message].rationale
        if not text.startswith(rationale, span.start):
            raise BadRow(
                "rationale", f"has a rationale that the template {self.template.name} does not write as it is given"
            )
        return span.start + len(rationale)

    def _encode(self, text: str, cuts: list[int]) -> tuple[EncodedText, list[int]]:
        """Ids of ``text``, and how many of them come before each of the ascending ``cuts``.

        Raises:
            BadRow: a cut is inside a token: what the model reads when it generates would be other tokens.
        """
        bounds = [0, *cuts, len(text)]
        parts = [self.tokenizer.encode(text[i:j]) for i, j in itertools.pairwise(bounds)]
        counts = list(itertools.accumulate(map(len, parts)))[:-1]
        together = self.tokenizer.encode_placed(text)
        if list(itertools.chain.from_iterable(parts)) == together.ids:
            return together, counts
        if self.template.name == RAW and self.tokenizer.joins:
            # A prompt is encoded alone when its answer is generated.
            placed = [self.tokenizer.encode_placed(text[i:j]) for i, j in itertools.pairwise(bounds)]
            starts = [part.starts + bound for part, bound in zip(placed, bounds, strict=False)]
            return EncodedText([token for part in parts for token in part], np.concatenate(starts)), counts
        counts = []
        for cut in cuts:
            before = self.tokenizer.encode(text[:cut])
            if together.ids[: len(before)] != before:
                raise BadRow(
                    "cut inside a token",
                    f"has a token across the border of an answer, at {text[max(0, cut - 8) : cut + 8]!r}: no token may "
                    "hold both what is given and what is generated; end what comes before the answer with a line break "
                    "or a special token in the template",
                )
            counts.append(len(before))
        return together, counts

    def _roles(self, record: Record, messages: Sequence[Message], text: str) -> np.ndarray:
        """uint8 [characters + 1] of ``text``: whose content each is; the template's where that cannot be told."""
        roles = np.full(len(text) + 1, TEMPLATE, dtype=np.uint8)
        for span in self.template.contents(messages, text, tools=record.tools):
            roles[span.start : span.stop] = ROLES.index(messages[span.message].role)
        return roles
