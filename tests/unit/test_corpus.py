"""Shards give back what was written, as views of the file, and any damage is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.shards import ShardWriter
from megatron_slm.errors import DataError

EOD = 2


def write(directory: Path, documents: list[list[int]], *, shard_tokens: int = 100, vocab_size: int = 500) -> list[int]:
    directory.mkdir(parents=True, exist_ok=True)
    with ShardWriter(
        directory, vocab_size=vocab_size, eod_id=EOD, tokenizer_hash="t", shard_tokens=shard_tokens
    ) as writer:
        for document in documents:
            writer.add_document(document)
    return [token for document in documents for token in [*document, EOD]]


@pytest.fixture
def stream(tmp_path: Path) -> list[int]:
    state = np.random.default_rng(0)
    return write(tmp_path, [state.integers(3, 500, size).tolist() for size in (10, 0, 250, 1, 99, 137)])


def test_any_range_is_what_was_written(tmp_path: Path, stream: list[int]) -> None:
    corpus = Corpus.open(tmp_path, verify="hash")
    assert (corpus.num_tokens, corpus.num_documents, len(corpus.shard_files)) == (len(stream), 6, 6)
    for start in range(0, len(stream), 13):
        for stop in (start, start + 1, start + 90, start + 230, len(stream)):
            if start <= stop <= len(stream):
                assert corpus.tokens(start, stop).tolist() == stream[start:stop]
    for start, stop in ((-1, 3), (5, 4), (0, len(stream) + 1)):
        with pytest.raises(IndexError):
            corpus.tokens(start, stop)


def test_a_range_inside_a_shard_is_a_read_only_view_of_the_map(tmp_path: Path, stream: list[int]) -> None:
    before = pa.total_allocated_bytes()
    corpus = Corpus.open(tmp_path)
    assert pa.total_allocated_bytes() == before, "the shards were read into memory"
    first, overlapping = corpus.tokens(0, 100), corpus.tokens(40, 60)
    assert np.shares_memory(first, overlapping)
    across = corpus.tokens(90, 110)
    assert not np.shares_memory(first, across)
    for tokens in (first, across):
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1


def test_num_bytes_is_of_all_shard_files(tmp_path: Path, stream: list[int]) -> None:
    corpus = Corpus.open(tmp_path)
    assert corpus.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("shard-*.arrow")) > 2 * len(stream)


def test_files_of_names_the_shards_of_a_range(tmp_path: Path, stream: list[int]) -> None:
    corpus = Corpus.open(tmp_path)
    assert corpus.files_of(0, 100) == ["shard-00000.arrow"]
    assert corpus.files_of(99, 201) == ["shard-00000.arrow", "shard-00001.arrow", "shard-00002.arrow"]
    assert corpus.files_of(5, 5) == []


@pytest.mark.parametrize(("vocab_size", "dtype"), [(500, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_dtype_holds_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write(tmp_path, [[vocab_size - 1]], vocab_size=vocab_size)
    tokens = Corpus.open(tmp_path).tokens(0, 2)
    assert tokens.dtype == dtype and tokens.tolist() == [vocab_size - 1, EOD]


@pytest.mark.parametrize(
    ("document", "reason"), [([500], "not inside"), ([-1], "not inside"), ([5, EOD], "end-of-document")]
)
def test_ids_that_would_be_misread_are_not_written(tmp_path: Path, document: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write(tmp_path, [[4], document])
    assert not (tmp_path / "index.json").exists()


def test_digest_is_of_the_content_and_not_of_its_shards(tmp_path: Path) -> None:
    documents = [[5, 6, 7], [8, 9], [10] * 50]
    for name, size in (("small", 7), ("large", 1000)):
        write(tmp_path / name, documents, shard_tokens=size)
    write(tmp_path / "other", [[5, 6, 7], [8, 9], [10] * 49 + [11]])
    write(tmp_path / "vocabulary", documents, vocab_size=501)
    digests = [Corpus.open(tmp_path / name).digest for name in ("small", "large", "other", "vocabulary")]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize(("num_tokens", "samples"), [(1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_num_samples_leaves_a_token_for_the_last_label(tmp_path: Path, num_tokens: int, samples: int) -> None:
    write(tmp_path, [[5] * (num_tokens - 1)])
    assert Corpus.open(tmp_path).num_samples(8) == samples


def test_an_empty_split_opens(tmp_path: Path) -> None:
    write(tmp_path, [])
    corpus = Corpus.open(tmp_path, verify="hash")
    assert corpus.num_samples(4) == 0 and len(corpus.tokens(0, 0)) == 0


def test_every_flipped_bit_of_the_tokens_is_found(tmp_path: Path, stream: list[int]) -> None:
    shard = tmp_path / "shard-00001.arrow"
    intact = shard.read_bytes()
    body = intact.find(np.array(stream[100:140], dtype=np.uint16).tobytes())
    assert body > 0, "the tokens lie in the file as they are"
    for place in (body, body + 77, body + 199):
        damaged = bytearray(intact)
        damaged[place] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shard-00001\.arrow is damaged: sha256"):
            Corpus.open(tmp_path, verify="hash")
    shard.write_bytes(intact)
    Corpus.open(tmp_path, verify="hash")


def test_a_truncated_shard_is_found_by_its_size(tmp_path: Path, stream: list[int]) -> None:
    shard = tmp_path / "shard-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00002\.arrow has \d+ bytes, but the index promises \d+"):
        Corpus.open(tmp_path)


def test_a_shard_that_is_no_arrow_file_is_found_by_mapping(tmp_path: Path, stream: list[int]) -> None:
    shard = tmp_path / "shard-00000.arrow"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(DataError, match=r"shard-00000\.arrow is damaged"):
        Corpus.open(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path, stream: list[int]) -> None:
    with pytest.raises(DataError, match="not a prepared split"):
        Corpus.open(tmp_path / "absent")
    (tmp_path / "shard-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"shard .*shard-00003\.arrow is missing"):
        Corpus.open(tmp_path)


def test_a_changed_index_is_found(tmp_path: Path, stream: list[int]) -> None:
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    changes = [
        ({"num_tokens": index["num_tokens"] + 1}, "promises", "size"),
        ({"schema_version": 99}, "schema_version 99", "size"),
        ({"dtype": "int32"}, "of uint16", "size"),
        ({"digest": "0" * 64}, "the index was changed", "hash"),
        ({"shards": 3}, "damaged", "size"),
    ]
    for change, reason, verify in changes:
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(DataError, match=reason):
            Corpus.open(tmp_path, verify=verify)
    for text in ("{", "[]", json.dumps({"schema_version": 1})):
        path.write_text(text)
        with pytest.raises(DataError, match=r"index\.json"):
            Corpus.open(tmp_path)
