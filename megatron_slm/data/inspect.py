"""What the model sees: one sample of the training order, decoded."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from megatron_slm.data.corpus import HASH_LIMIT_BYTES, Corpus
from megatron_slm.data.order import SampleId, SampleOrder
from megatron_slm.data.prepare import TOKENIZER_PATH
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.errors import DataError

SPLITS = ("train", "valid")


def inspect(
    data_path: str | Path, split: str, index: int, *, seq_length: int, seed: int, show_ids: bool = False
) -> str:
    """Describe and decode the sample at order position ``index``.

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
    if index < 0:
        raise DataError(f"The sample position is {index}, but positions are counted from 0.")
    if seq_length < 1:
        raise DataError(f"seq_length is {seq_length}, but a sample has at least one token.")
    corpus = Corpus.open(Path(data_path, split))
    if corpus.num_bytes <= HASH_LIMIT_BYTES:
        corpus = Corpus.open(Path(data_path, split), verify="hash")
    tokenizer = Tokenizer.open(Path(data_path) / TOKENIZER_PATH, corpus.tokenizer_hash)
    order = SampleOrder(corpus.num_samples(seq_length), seed, corpus.digest, seq_length)
    if split == "train":
        sample_id = order.sample_id(index)
    else:
        sample_id = SampleId(epoch=0, index=index)
        if index >= order.num_samples:
            raise DataError(
                f"The valid split has {order.num_samples} samples of {seq_length} tokens; {index} is past them."
            )
    start = sample_id.index * seq_length
    tokens = corpus.tokens(start, start + seq_length + 1)
    bounds = [0, *(np.flatnonzero(tokens[:-1] == corpus.eod_id) + 1).tolist(), len(tokens)]
    files = ", ".join(corpus.files_of(start, start + len(tokens)))
    lines = [
        f"{split} position {index}: epoch {sample_id.epoch}, sample {sample_id.index} of {order.num_samples}"
        + (f", seed {seed}" if split == "train" else ", natural order"),
        f"tokens {start}..{start + seq_length} of {corpus.num_tokens}, in {files}",
        f"{len(bounds) - 1} documents, beginning at {', '.join(map(str, bounds[:-1]))}",
    ]
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        ends = "ends here" if tokens[end - 1] == corpus.eod_id else "goes on"
        lines += [
            f"--- document {number}: tokens {begin}..{end - 1}, {ends}",
            tokenizer.decode(tokens[begin:end].tolist()),
        ]
    if show_ids:
        lines.append("--- ids")
        lines += [f"{place} {token} {tokenizer.piece(token)!r}" for place, token in enumerate(tokens.tolist())]
    return "\n".join(lines)
