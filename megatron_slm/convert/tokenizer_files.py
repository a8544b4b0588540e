"""The tokenizer of a checkpoint as Hugging Face's files, and what its special tokens are called in ``config.json``."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_slm.data.tokenizer import FILE_NAMES, Tokenizer

SETTINGS = "tokenizer_config.json"

TEXTS = (
    "In the beginning", " two  spaces ", "a\n\n\tb", "def f(x):\n    return x ** 2", "na\u00efve \u2603",
    "1,234.50",
)  # fmt: skip
"""What a written tokenizer is tried with. No special token is in it: transformers finds them in text, ours does not."""


def write_tokenizer(directory: Path, output: Path) -> tuple[dict[str, Any], list[str]]:
    """Copy the tokenizer and its companions; without settings among these, write such as transformers can use.

    Returns:
        ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as they are known; and notes for the report.

    Raises:
        DataError: the tokenizer is damaged.
    """
    if not any((directory / name).is_file() for name in FILE_NAMES):
        return {}, ["The checkpoint holds no tokenizer."]
    tokenizer = Tokenizer.open(directory)
    for file in (tokenizer.path, *tokenizer.companions()):
        shutil.copy2(file, output / file.name)
    if not (output / SETTINGS).exists():
        (output / SETTINGS).write_text(json.dumps(_settings(tokenizer), indent=2) + "\n", encoding="utf-8")
        return {"eos_token_id": tokenizer.eod_id}, []
    return _named(json.loads((output / SETTINGS).read_text(encoding="utf-8")), tokenizer), []


def tokenizer_notes(output: Path, directory: Path) -> list[str]:
    """What there is to say of the tokenizer that transformers loads from ``output``, beside ours in ``directory``."""
    if not any((directory / name).is_file() for name in FILE_NAMES):
        return []
    transformers: Any = importlib.import_module("transformers")
    ours = Tokenizer.open(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(output, local_files_only=True)
    other = [text for text in TEXTS if theirs.encode(text, add_special_tokens=False) != ours.encode(text)]
    if not other:
        return [f"transformers' tokenizer gives our ids of {len(TEXTS)} texts."]
    return [
        f"transformers' tokenizer gives other ids than ours of {len(other)} of {len(TEXTS)} texts, as of {other[0]!r}."
    ]


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer_config.json`` of a tokenizer that never had one."""
    eod = tokenizer.piece(tokenizer.eod_id)
    if tokenizer.kind == "huggingface":
        return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": tokenizer.piece(tokenizer.encode("a")[0]).startswith("\u2581"),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": eod,
    }


def _named(settings: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of the special tokens that the settings name."""
    known = {tokenizer.piece(number): number for number in range(tokenizer.vocab_size)}
    tokens: dict[str, Any] = {"eos_token_id": tokenizer.eod_id}
    for kind in ("bos", "eos", "pad"):
        name = settings.get(f"{kind}_token") if isinstance(settings, dict) else None
        spelled = name.get("content") if isinstance(name, dict) else name
        if spelled in known:
            tokens[f"{kind}_token_id"] = known[spelled]
    return tokens
