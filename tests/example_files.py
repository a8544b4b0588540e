"""Small tokenizers and compiled examples for tests."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_slm.data.examples.compiling import compile_examples
from megatron_slm.data.examples.request import Options
from megatron_slm.data.tokenizer import Tokenizer, train_tokenizer

TEXT = inspect.getsource(textwrap)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(directory: Path) -> Tokenizer:
    """Byte-level BPE with the special tokens of ChatML, trained here."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    return Tokenizer.open(directory)


def pieces(directory: Path) -> Tokenizer:
    """A sentencepiece BPE, trained here."""
    directory.mkdir(parents=True, exist_ok=True)
    return train_tokenizer([TEXT], 400, directory / "tokenizer.model")


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """One line of JSON a row; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def compiled(directory: Path, rows: Sequence[Any], tokenizer: Path, **options: Any) -> dict[str, Any]:
    """The manifest of ``rows`` compiled into ``directory / "out"``, by default with the plain template."""
    inputs = [write_rows(directory / "rows.jsonl", rows)]
    given = {name: options.pop(name) for name in ("template", "check_against", "workers") if name in options}
    made = Options(**{"kind": "chat", "seq_length": 256, "valid_share": 0.0, **options})
    return compile_examples(
        inputs, directory / "out", made, tokenizer_model=tokenizer, **{"template": "plain", **given}
    )
