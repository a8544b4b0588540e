"""What of compiled examples is trained: shares by role, packing, what was left out, and the first of them to read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

COLOUR, PLAIN = ("\x1b[1;32m", "\x1b[0m"), ("[[", "]]")
"""Around trained tokens, in a terminal and elsewhere."""


def describe(
    data_path: str | Path, split: str = "train", *, first: int = 3, seq_length: int | None = None, colour: bool = False
) -> str:
    """A report on one split.

    Args:
        first: examples (of preferences: pairs) to print.
        seq_length: of the packing that is reported; default that of the compilation.
        colour: trained tokens in colour; else in double brackets.

    Raises:
        DataError: there is no such split, or it is damaged.
    """
    manifest = read_manifest(data_path)
    if split not in manifest["splits"] or "kind" not in manifest:
        raise DataError(
            f"{data_path} has no split {split} of compiled examples; it has {', '.join(manifest['splits']) or 'none'}."
        )
    store = ExampleStore.open(Path(data_path, split), verify="hash")
    tokenizer = Tokenizer.open(Path(data_path, "tokenizer"), store.tokenizer_hash)
    length = manifest["request"]["seq_length"] if seq_length is None else seq_length
    lines = [
        *_counts(manifest, split, store),
        *_roles(manifest["splits"][split]),
        *([f"packed: {ExampleRows(store, length).described}"] if store.kind != "prompt" else ()),
        *_left_out(manifest),
        *_first(store, tokenizer, first, COLOUR if colour else PLAIN),
    ]
    return "\n".join(lines)


def _counts(manifest: dict[str, Any], split: str, store: ExampleStore) -> Iterator[str]:
    rows = manifest["splits"][split]["rows"]
    yield f"{split}: {rows:,} rows of kind {store.kind}, {store.num_tokens:,} tokens, the longest {store.longest}"
    template = manifest["template"]
    yield (
        f"template {template['name']} (sha256 {template['sha256'][:12]}), answers {template['spans']}, ended by "
        f"{', '.join(map(str, template['end_ids']))}"
    )


def _roles(facts: dict[str, Any]) -> Iterator[str]:
    """One line a role that has tokens: how many, and the share of them that is trained."""
    total = sum(facts["trained_by_role"].values())
    yield f"trained: {total:,} of {facts['num_tokens']:,} tokens ({total / max(1, facts['num_tokens']):.1%})"
    for role, count in facts["tokens_by_role"].items():
        if count:
            trained = facts["trained_by_role"].get(role, 0)
            yield f"  {role:<10} {count:>12,} tokens, {trained / count:6.1%} trained"


def _left_out(manifest: dict[str, Any]) -> Iterator[str]:
    total = sum(manifest["left_out"].values())
    yield f"left out: {total:,} of {sum(one['rows'] for one in manifest['sources']):,} rows of both splits"
    for reason, count in manifest["left_out"].items():
        example = manifest["left_out_first"][reason][0]
        yield f"  {count:,} {reason}: the first is {example['row']}, which {example['detail']}"
    if manifest["truncated"]:
        yield f"truncated: {manifest['truncated']:,} rows"
    if alike := manifest["leakage"]["train_rows_like_valid"]:
        first = manifest["leakage"]["first"][0]["row"]
        yield f"leakage: {alike:,} train rows are mostly words of valid rows; the first is {first}"


def _first(store: ExampleStore, tokenizer: Tokenizer, count: int, marks: tuple[str, str]) -> Iterator[str]:
    per_row = 2 if store.kind == "preference" else 1
    for document in range(min(count * per_row, store.num_documents)):
        side = (", chosen", ", rejected")[document % 2] if per_row == 2 else ""
        yield f"--- example {document // per_row}{side}: {store.lengths[document]} tokens"
        yield _marked(store, tokenizer, document, marks)
        if fields := store.fields(document):
            yield f"--- with {fields}"


def _marked(store: ExampleStore, tokenizer: Tokenizer, document: int, marks: tuple[str, str]) -> str:
    """The document's text, what is trained between the marks; special tokens by name."""
    tokens, trained = store.tokens(document), store.weights(document) != 0.0
    trained = np.concatenate([[False], trained[1:]])  # the first token is no label
    cuts = np.flatnonzero(trained[1:] != trained[:-1]) + 1
    parts = []
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(tokens)]):
        text = _text(tokenizer, tokens[start:stop].tolist())
        parts.append(f"{marks[0]}{text}{marks[1]}" if trained[start] else text)
    return "".join(parts)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What :meth:`Tokenizer.decode` gives, with the tokens that have no text by their names."""
    text: list[str] = []
    for special, run in itertools.groupby(ids, key=lambda token: not tokenizer.decode([token])):
        found = list(run)
        text.append("".join(map(tokenizer.piece, found)) if special else tokenizer.decode(found))
    return "".join(text)
