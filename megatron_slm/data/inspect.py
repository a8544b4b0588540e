"""What the model sees: one sample of the training order, decoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_slm.data.batch import Samples
from megatron_slm.data.corpus import HASH_LIMIT_BYTES, Corpus
from megatron_slm.data.mixture import MixtureOrder
from megatron_slm.data.order import SampleOrder
from megatron_slm.data.replay import ReplayedSamples
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

SPLITS = ("train", "valid")


def inspect(
    data_path: str | Path, split: str, index: int, *, seq_length: int, seed: int, show_ids: bool = False
) -> str:
    """Describe and decode the sample at order position ``index`` of one corpus.

    The train split is read in the order of ``seed``; the valid split in natural order, as validation reads it. The last
    token of a sample is a label only, and again the first token of the next sample in the stream.

    Args:
        index: position, counted from 0 over all epochs: the sample that a run with this seed and length consumes after
            ``index`` others.
        show_ids: list every token id with its piece.

    Raises:
        DataError: there is no such corpus, split or sample, or the split (up to 4 GiB) is damaged.
    """
    if split not in SPLITS:
        raise DataError(f"There is no split {split}; it must be one of {', '.join(SPLITS)}.")
    _refuse_negative(index)
    if seq_length < 1:
        raise DataError(f"seq_length is {seq_length}, but a sample has at least one token.")
    corpus = Corpus.open(Path(data_path, split))
    if corpus.num_bytes <= HASH_LIMIT_BYTES:
        corpus = Corpus.open(Path(data_path, split), verify="hash")
    tokenizer = Tokenizer.open(Path(data_path) / "tokenizer", corpus.tokenizer_hash)
    order = SampleOrder(corpus.num_samples(seq_length), seed, corpus.digest, seq_length)
    epoch, sample = order.sample_id(index) if split == "train" else (0, index)
    if split == "valid" and index >= order.num_samples:
        raise DataError(
            f"The valid split has {order.num_samples} samples of {seq_length} tokens; {index} is past them."
        )
    lines = [
        f"{split} position {index}: epoch {epoch}, sample {sample} of {order.num_samples}"
        + (f", seed {seed}" if split == "train" else ", natural order"),
        *_sample(corpus, sample, seq_length, tokenizer, show_ids=show_ids),
    ]
    return "\n".join(lines)


def inspect_mixture(
    corpora: Mapping[str, Samples],
    order: MixtureOrder,
    tokenizer: Tokenizer,
    position: int,
    *,
    show_ids: bool = False,
) -> str:
    """Describe and decode the sample at ``position`` of a run over several sources, and what was realised before it.

    Raises:
        DataError: there is no such position.
    """
    _refuse_negative(position)
    found = order.sample_id(position)
    sources = {source.name: source.order for source in order.sources}
    lines = [
        f"train position {position}: source {found.source}, epoch {found.epoch}, sample {found.index} of "
        f"{sources[found.source].num_samples}, seed {sources[found.source].seed}",
        *_shares(order, position),
    ]
    source, index = corpora[found.source], found.index
    while isinstance(source, ReplayedSamples):
        trained = source.position(index)
        before = source.cursor.order.sample_id(trained)
        lines.append(f"replayed from position {trained}: source {before.source}, sample {before.index}")
        source, index = source.corpora[before.source], before.index
    assert isinstance(source, Corpus), f"a sample comes out of a corpus in the end, not out of {source}"
    return "\n".join([*lines, *_sample(source, index, order.seq_length, tokenizer, show_ids=show_ids)])


def _shares(order: MixtureOrder, position: int) -> Iterator[str]:
    """One line a source: the share in force, and how many samples before ``position`` came from it."""
    phase = order.phase_at(position)
    yield f"shares from sample {phase.start} on" + (", by held-out loss" if phase.adaptive else "")
    for source, count in zip(order.sources, order.counts(position).tolist(), strict=True):
        realised = f", {count / position:.4%} of those before" if position else ""
        share = phase.share_texts.get(source.name, "0")
        yield f"  {source.name}: share {share}, {count} samples so far{realised}"


def _sample(corpus: Corpus, index: int, seq_length: int, tokenizer: Tokenizer, *, show_ids: bool) -> Iterator[str]:
    """Where a sample lies in its corpus, its documents, and its ids where they are asked for."""
    start = index * seq_length
    tokens = corpus.sample(index, seq_length)
    bounds = [0, *(np.flatnonzero(tokens[:-1] == corpus.eod_id) + 1).tolist(), len(tokens)]
    files = ", ".join(corpus.files_of(start, start + len(tokens)))
    yield f"tokens {start}..{start + seq_length} of {corpus.num_tokens}, in {files}"
    yield f"{len(bounds) - 1} documents, beginning at {', '.join(map(str, bounds[:-1]))}"
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        ends = "ends here" if tokens[end - 1] == corpus.eod_id else "goes on"
        yield f"--- document {number}: tokens {begin}..{end - 1}, {ends}"
        yield tokenizer.decode(tokens[begin:end].tolist())
    if show_ids:
        yield "--- ids"
        for place, token in enumerate(tokens.tolist()):
            yield f"{place} {token} {tokenizer.piece(token)!r}"


def _refuse_negative(position: int) -> None:
    if position < 0:
        raise DataError(f"The sample position is {position}, but positions are counted from 0.")
