"""A Hugging Face ``tokenizer.json`` as :class:`megatron_slm.data.tokenizer.Tokenizer` uses it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.errors import DataError

EOD_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
"""What ends a document in published tokenizers; of several, the one for texts before the one for turns of a chat."""


class HuggingFaceModel:
    """A loaded ``tokenizer.json``.

    Raises:
        DataError: the package ``tokenizers`` is missing, ``content`` is not its format, or has no token that ends a
            document.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, path: Path, eod_token: str | None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"Reading {path} needs the package tokenizers. Install it with `pip install megatron-slm[data]`."
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        # The package raises nothing narrower.
        except Exception as error:
            raise DataError(
                f"{path} is not a Hugging Face tokenizer.json ({error}). Give the tokenizer.json that lies beside the "
                "model, or a sentencepiece .model file."
            ) from error
        # A file may ask for what is meant for batches of one length.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token is text: only then can no document hold the end of another.
        self._tokenizer.encode_special_tokens = True
        # Ids may have gaps, and the embedding has a row for each.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special: dict[str, int] = {token.content: number for number, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        # Of one character there is nothing to take apart.
        spelled = sorted((name for name in self._special if len(name) > 1), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, spelled)) or "(?!)")
        self.eod_id = self._eod_id(path, eod_token)

    def _eod_id(self, path: Path, eod_token: str | None) -> int:
        for name in EOD_TOKENS if eod_token is None else (eod_token,):
            if name in self._special:
                return self._special[name]
        known = ", ".join(self._special) or "none"
        if eod_token is not None:
            raise DataError(f"--eod-token is {eod_token}, which is no special token of {path}; it has {known}.")
        raise DataError(
            f"No special token of {path} is known to end a document: it has {known}. Name one with --eod-token."
        )

    def encode(self, text: str) -> list[int]:
        return self._without_special(text, self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        if num_threads == 1:
            # The package's own threads do not survive a fork.
            return [self.encode(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_special(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def _without_special(self, text: str, ids: list[int]) -> list[int]:
        """``ids`` of ``text``, in which no special token stands for its own spelling.

        A unigram or word vocabulary finds special tokens in text like any other piece. Such text is cut after the first
        character of each, and encoded in parts.
        """
        if self._special_ids.isdisjoint(ids):
            return ids
        cuts = [match.start() + 1 for match in self._special_text.finditer(text)]
        if not cuts:
            # The token for what is unknown is special, too, and where it belongs.
            return ids
        bounds = itertools.pairwise([0, *cuts, len(text)])
        return [token for start, stop in bounds for token in self.encode(text[start:stop])]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, token_id: int) -> str:
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return "" if piece is None else piece
