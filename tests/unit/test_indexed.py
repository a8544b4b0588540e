"""Megatron's token files: core reads ours, we read core's, and damaged ones are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_slm.data import indexed
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.shards import ShardWriter
from megatron_slm.errors import DataError

DOCUMENTS: list[list[list[int]]] = [[[1, 2, 3]], [[]], [[4], [5, 6], []], [], [[7, 8, 65_535]]]
"""Sequences of documents: one, an empty one, several with an empty last, none at all."""

DTYPES = (np.uint16, np.int32)


def flat(document: list[list[int]]) -> list[int]:
    return [token for sequence in document for token in sequence]


def by_core(prefix: Path, dtype: Any) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(flat(document), dtype=torch.int64), [len(part) for part in document])
    builder.finalize(f"{prefix}.idx")


def by_us(prefix: Path, dtype: Any) -> None:
    with indexed.IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in DOCUMENTS:
            writer.add_document(flat(document), [len(part) for part in document])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_write_the_same_bytes(dtype: Any, tmp_path: Path) -> None:
    by_core(tmp_path / "core", dtype)
    by_us(tmp_path / "ours", dtype)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"core.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core.bin", "core.idx", "ours.bin", "ours.idx"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_core_reads_ours(dtype: Any, tmp_path: Path) -> None:
    by_us(tmp_path / "ours", dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert theirs.index.dtype == dtype
    sequences = [theirs[number].tolist() for number in range(len(theirs))]
    bounds = theirs.document_indices.tolist()
    assert [sequences[first:last] for first, last in zip(bounds, bounds[1:], strict=False)] == DOCUMENTS


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_core_has_written(dtype: Any, tmp_path: Path) -> None:
    by_core(tmp_path / "core", dtype)
    index = indexed.read_index(tmp_path / "core")
    assert (index.dtype, index.num_documents, index.num_tokens) == (dtype, len(DOCUMENTS), 9)
    found = list(indexed.read(tmp_path / "core"))
    assert [document.tolist() for document in found] == [flat(document) for document in DOCUMENTS]
    assert {document.dtype for document in found} == {np.dtype(dtype)}


def corpus_of(directory: Path, documents: list[list[int]], vocab_size: int = 500) -> Corpus:
    directory.mkdir()
    with ShardWriter(directory, vocab_size=vocab_size, eod_id=2, tokenizer_hash="a" * 64, shard_tokens=100) as writer:
        for document in documents:
            writer.add_document(document)
    return Corpus.open(directory)


@pytest.mark.parametrize("vocab_size", [500, 100_000])
def test_an_exported_split_is_the_same_documents_for_core(
    vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(3, vocab_size, random.integers(0, 60)).tolist() for _ in range(40)]
    corpus = corpus_of(tmp_path / "train", documents, vocab_size)
    # Documents begin and end at every place of what is read at once, some longer than it.
    monkeypatch.setattr(indexed, "EXPORT_TOKENS", 17)
    indexed.export(corpus, tmp_path / "train_text_document")
    theirs = IndexedDataset(str(tmp_path / "train_text_document"))
    assert [theirs[number].tolist() for number in range(len(theirs))] == [[*document, 2] for document in documents]
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.index.dtype == (np.uint16 if vocab_size == 500 else np.int32)


def test_an_export_destroys_nothing_and_leaves_no_half(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "train", [[5, 6], [7]])
    (tmp_path / "kept.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"kept\.bin exists"):
        indexed.export(corpus, tmp_path / "kept")
    corpus.num_documents = 3
    with pytest.raises(DataError, match="2 documents were found, but its index promises 3"):
        indexed.export(corpus, tmp_path / "half")
    with pytest.raises(DataError, match="No such file or directory"):
        indexed.export(corpus, tmp_path / "absent" / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.bin", "train"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "train", [[5] * 10_000])
    # What is written to /dev/full does not fit.
    (tmp_path / ".text.bin.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left on device. Nothing was kept"):
        indexed.export(corpus, tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_ids_that_do_not_fit_and_wrong_lengths_are_refused(tmp_path: Path) -> None:
    too_wide = r"Document 1 holds the ids 5\.\.65536, which do not fit into uint16"
    with (
        pytest.raises(DataError, match=too_wide),
        indexed.IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document([1])
        writer.add_document([5, 65_536])
    with (
        pytest.raises(ValueError, match="sequences of 3 ids"),
        indexed.IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document([1], [1, 2])
    assert not list(tmp_path.iterdir())


def test_either_file_or_the_prefix_names_both(tmp_path: Path) -> None:
    by_us(tmp_path / "a.b", np.uint16)
    for name in ("a.b", "a.b.bin", "a.b.idx"):
        assert indexed.prefix_of(tmp_path / name) == tmp_path / "a.b"
    (tmp_path / "a.b").write_text("a file of this name is meant itself")
    assert indexed.prefix_of(tmp_path / "a.b") is None
    assert indexed.prefix_of(tmp_path / "c.txt") is None


def changed(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + value + content[offset + len(value) :]


LENGTHS = 34
PLACES = LENGTHS + 6 * 4
BOUNDS = PLACES + 6 * 8
"""Where the three lists of an index of six sequences begin."""

DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "no magic": ("idx", changed(0, b"X"), "does not begin with MMIDIDX"),
    "empty": ("idx", lambda content: b"", "does not begin with MMIDIDX"),
    "version": ("idx", changed(9, b"\2"), "has version 2"),
    "floats": ("idx", changed(17, b"\7"), "type code 7"),
    "cut head": ("idx", lambda content: content[:30], "does not begin with MMIDIDX"),
    "cut": ("idx", lambda content: content[:-1], "bytes, but its head promises 6 sequences"),
    "longer": ("idx", lambda content: content + bytes(3), "bytes, but its head promises 6 sequences"),
    "modes": ("idx", lambda content: content + bytes(6), "multimodal"),
    "many sequences": ("idx", changed(18, struct.pack("<Q", 1 << 60)), "but its head promises"),
    "length": ("idx", changed(LENGTHS, struct.pack("<i", 2)), "contradict each other"),
    "negative length": ("idx", changed(LENGTHS + 4, struct.pack("<i", -1)), "contradict each other"),
    "place": ("idx", changed(PLACES + 8, struct.pack("<q", 2)), "contradict each other"),
    "documents": ("idx", changed(BOUNDS + 8, struct.pack("<q", 4)), "contradict each other"),
    "last document": ("idx", changed(BOUNDS + 40, struct.pack("<q", 7)), "contradict each other"),
    "another type": ("idx", changed(17, b"\4"), "contradict each other"),
    "cut ids": ("bin", lambda content: content[:-1], "has 17 bytes, but .* promises 18"),
    "more ids": ("bin", lambda content: content + bytes(2), "has 20 bytes, but .* promises 18"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_name(case: str, tmp_path: Path) -> None:
    suffix, damage, reason = DAMAGE[case]
    by_us(tmp_path / "a", np.uint16)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"a\.{suffix}.*{reason}"):
        list(indexed.read(tmp_path / "a"))


def test_lengths_below_zero_are_refused_also_where_they_add_up(tmp_path: Path) -> None:
    head = indexed.HEAD.pack(indexed.MAGIC, 1, 8, 2, 2)
    (tmp_path / "a.idx").write_bytes(head + struct.pack("<iiqqqq", 5, -2, 0, 10, 0, 2))
    (tmp_path / "a.bin").write_bytes(bytes(6))
    with pytest.raises(DataError, match="contradict each other"):
        indexed.read_index(tmp_path / "a")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_half_of_a_pair_is_refused(suffix: str, tmp_path: Path) -> None:
    by_us(tmp_path / "a", np.uint16)
    (tmp_path / f"a.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"Cannot read .*a\.{suffix}: No such file"):
        indexed.read_index(tmp_path / "a")


def test_ids_cut_off_while_they_are_read(tmp_path: Path) -> None:
    with indexed.IndexedWriter(tmp_path / "a", np.dtype(np.int32)) as writer:
        for _ in range(100):
            writer.add_document(range(1000))
    documents = indexed.read(tmp_path / "a")
    next(documents)
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(200_000)
    with pytest.raises(DataError, match="was cut off while it was read"):
        list(documents)


def test_no_documents_at_all(tmp_path: Path) -> None:
    with indexed.IndexedWriter(tmp_path / "a", np.dtype(np.uint16)):
        pass
    assert list(indexed.read(tmp_path / "a")) == []
