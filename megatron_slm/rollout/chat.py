"""A conversation with a model: what was said by whom, as the tokens after which the model answers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.data.examples.encoding import ExampleEncoder
from megatron_slm.data.examples.records import BadRow, Message, Record
from megatron_slm.data.examples.special_tokens import TemplateTokenizer
from megatron_slm.data.examples.template import open_template
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError


class Conversation:
    """The turns so far.

    Args:
        template: by name or path; None is the one beside the tokenizer.
        system: what the conversation begins with, if anything.
        limit: tokens that the model reads at most, its answer included.

    Raises:
        DataError: there is no template, or it does not fit the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, *, system: str | None, limit: int) -> None:
        self._encoder = ExampleEncoder(TemplateTokenizer(tokenizer), open_template(template, tokenizer))
        self._begin = [Message("system", system)] if system else []
        self._turns: list[Message] = []
        self._limit = limit
        self.stop_ids = [*self._encoder.end_ids, tokenizer.eod_id]
        """Tokens that end an answer."""

    def ask(self, text: str, *, room: int) -> list[int]:
        """Add what the user says; gives the tokens up to where the answer begins.

        The oldest turns are forgotten until ``room`` tokens are left for the answer.

        Raises:
            DataError: it cannot be said: the template refuses it, or it is too long. The conversation stays as it was.
        """
        turns = [*self._turns, Message("user", text)]
        while True:
            ids = self._encoded(turns)
            if len(ids) + min(room, self._limit // 2) <= self._limit:
                self._turns = turns
                return ids
            if len(turns) == 1:
                raise DataError(
                    f"That has {len(ids)} tokens with the template, but the model reads {self._limit}, half of which "
                    "are left for the answer. Say it shorter."
                )
            # A conversation begins with the user.
            turns = turns[next(place for place in range(1, len(turns)) if turns[place].role == "user") :]

    def _encoded(self, turns: Sequence[Message]) -> list[int]:
        try:
            found = self._encoder.prompt(Record((*self._begin, *turns), (), plain=False))
        except BadRow as error:
            raise DataError(f"What was said {error.detail}.") from error
        ids: list[int] = found.tokens.tolist()
        return ids

    def answered(self, text: str) -> None:
        """Add what the model has said, also where it was cut short."""
        self._turns.append(Message("assistant", text))

    def reset(self) -> None:
        """Begin anew."""
        self._turns = []
