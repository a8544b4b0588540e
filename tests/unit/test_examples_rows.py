"""Documents become rows, rows become micro-batches: every field, the position rule, packed as unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.examples.curriculum import curriculum, curriculum_order
from megatron_slm.data.examples.document import Document, build_rows, row_of
from megatron_slm.data.examples.loader import PromptLoader, RowLoader, ValidRowLoader
from megatron_slm.data.examples.prompts import Prompts
from megatron_slm.data.examples.rows import CorpusRows, ExampleRows, open_rows
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.mixture import MixtureOrder, Phase, Source
from megatron_slm.data.prepare import prepare
from megatron_slm.errors import ConfigError, DataError
from tests.example_files import TEXT, compiled, pieces

WORDS = TEXT.split()


def chats(count: int) -> list[dict[str, Any]]:
    """Rows of uneven lengths, with a number to sort by."""
    return [
        {"prompt": " ".join(WORDS[i : i + 2 + i % 7]), "completion": " ".join(WORDS[i : i + 1 + i % 5]), "hard": -i}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, preferences, prompts and a corpus of one tokenizer."""
    root = tmp_path_factory.mktemp("examples")
    pieces(root / "tokenizer")
    model = root / "tokenizer"
    for name in ("chats", "pairs", "prompts"):
        (root / name).mkdir()
    compiled(root / "chats", chats(60), model, score_key="hard")
    pairs = [
        {**row, "chosen": row["completion"], "rejected": "no " * (i % 3 + 1), "margin": i}
        for i, row in enumerate(chats(20))
    ]
    compiled(root / "pairs", pairs, model, kind="preference")
    compiled(
        root / "prompts",
        [{"prompt": row["prompt"], "answer": i} for i, row in enumerate(chats(24))],
        model,
        kind="prompt",
    )
    (root / "text.txt").write_text(TEXT)
    prepare([root / "text.txt"], root / "corpus", tokenizer_model=model / "tokenizer.model", split=0.0)
    return root


def rows_of(folder: Path, name: str = "chats", seq_length: int = 256, **options: Any) -> ExampleRows:
    return ExampleRows(ExampleStore.open(folder / name / "out" / "train"), seq_length, **options)


def test_every_field_of_a_batch() -> None:
    one = Document(
        np.array([5, 6, 7]), np.array([9.0, 0.0, 0.5], np.float32), {"advantages": np.array([0, 1, 2], np.float32)}
    )
    other = Document(np.array([8, 9]), np.array([0.0, 1.0], np.float32))
    batch = build_rows([row_of([one, other]), None, row_of([other])], seq_length=5, eod_id=3)
    expected = {
        "tokens": [[5, 6, 8, 3, 3], [3] * 5, [8, 3, 3, 3, 3]],
        "labels": [[6, 7, 9, 3, 3], [3] * 5, [9, 3, 3, 3, 3]],
        "loss_mask": [[0, 0.5, 1, 0, 0], [0] * 5, [1, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]],
        "document_ids": [[0, 0, 1, 2, 2], [0] * 5, [0, 1, 1, 1, 1]],
        "segments": [[-1, 0, 1, -1, -1], [-1] * 5, [2, -1, -1, -1, -1]],
        "advantages": [[1, 2, 0, 0, 0], [0] * 5, [0] * 5],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {name: tensor.dtype for name, tensor in batch.items() if tensor.is_floating_point()} == {
        "loss_mask": torch.float32,
        "advantages": torch.float32,
    }


def test_a_pooled_document_reads_its_last_token() -> None:
    document = Document(
        np.array([5, 6, 7]), np.array([0, 0, 1], np.float32), {"margins": np.full(3, 2.0, np.float32)}, pooled=True
    )
    batch = build_rows([row_of([document, document])], seq_length=7, eod_id=3)
    assert batch["tokens"].tolist() == [[5, 6, 7, 5, 6, 7, 3]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0, 1, 1, 0]]
    assert batch["segments"].tolist() == [[-1, 0, 0, -1, 1, 1, -1]]
    assert batch["margins"].tolist() == [[2, 2, 2, 2, 2, 2, 0]]


def labels(batch: dict[str, torch.Tensor]) -> list[Any]:
    """Every trained label with its position, by segment: what a loss sees of a batch, whatever the rows."""
    found: dict[int, list[Any]] = {}
    counted = batch["loss_mask"] != 0
    for segment, *rest in zip(
        *(batch[n][counted].tolist() for n in ("segments", "tokens", "labels", "position_ids", "loss_mask")),
        strict=True,
    ):
        found.setdefault(segment, []).append(tuple(rest))
    return sorted(found.values())


@pytest.mark.parametrize("name", ["chats", "pairs"])
def test_packed_rows_hold_what_unpacked_ones_hold(folder: Path, name: str) -> None:
    packed, alone = rows_of(folder, name), rows_of(folder, name, packed=False)
    assert packed.num_samples < alone.num_samples == len(alone.units)
    assert packed.packing.efficiency > 0.8 > alone.packing.efficiency
    assert labels(packed.batch(range(packed.num_samples))) == labels(alone.batch(range(alone.num_samples)))
    assert packed.digest != alone.digest
    assert f"{packed.packing.efficiency:.1%} of their slots used" in packed.described


def test_documents_are_what_was_stored_and_never_share_an_id(folder: Path) -> None:
    rows = rows_of(folder)
    batch = rows.batch([0, 1])
    for row in (0, 1):
        for place, number in enumerate(rows.documents(row)):
            mine = batch["document_ids"][row] == place
            assert batch["tokens"][row][mine].tolist() == rows.store.tokens(number)[:-1].tolist()
            assert batch["labels"][row][mine].tolist() == rows.store.tokens(number)[1:].tolist()
            assert batch["position_ids"][row][mine].tolist() == list(range(int(mine.sum())))


def test_pairs_lie_in_one_row_chosen_first(folder: Path) -> None:
    rows = rows_of(folder, "pairs", pooled=True)
    for row in range(rows.num_samples):
        numbers = rows.documents(row)
        assert [number % 2 for number in numbers] == [0, 1] * (len(numbers) // 2)
        assert all(second == first + 1 for first, second in zip(numbers[::2], numbers[1::2], strict=True))
        batch = rows.batch([row])
        for place, number in enumerate(numbers):
            mine = batch["segments"][0] == place
            assert set(batch["margins"][0][mine].tolist()) == {float(rows.store.margins[number])}
            assert batch["tokens"][0][mine][-1] == rows.store.tokens(number)[-1], "the last token is read"


def test_what_is_trained(folder: Path, tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e"))
    ]
    compiled(tmp_path, [{"messages": turns}], folder / "tokenizer")
    counts = {}
    for trained in ("assistant", "completion", "all"):
        rows = ExampleRows(ExampleStore.open(tmp_path / "out" / "train"), 64, trained=trained)
        counts[trained] = int((rows.batch([0])["loss_mask"] > 0).sum())
    assert counts["completion"] < counts["assistant"] < counts["all"] == rows.store.lengths[0] - 1


def test_parts_are_a_curriculum(folder: Path) -> None:
    whole = rows_of(folder)
    for by, difficulty in (("length", whole.store.lengths), ("score", whole.store.scores)):
        parts = [rows_of(folder, part=(number, 3), sorted_by=by) for number in range(3)]
        assert sorted(unit for part in parts for unit in part.units.tolist()) == list(range(60))
        for easier, harder in zip(parts, parts[1:], strict=False):
            assert difficulty[easier.units].max() <= difficulty[harder.units].min()
        assert len({part.digest for part in parts}) == 3
    with pytest.raises(DataError, match="--score-key"):
        _ = rows_of(folder, "pairs", part=(0, 2), sorted_by="score")


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="model.seq_length 8"):
        rows_of(folder, seq_length=8)
    with pytest.raises(DataError, match="--kind chat"):
        rows_of(folder, "prompts")
    with pytest.raises(DataError, match="--kind prompt"):
        Prompts(ExampleStore.open(folder / "chats" / "out" / "train"), 256, 16)
    with pytest.raises(DataError, match="compiled examples"):
        Corpus.open(folder / "chats" / "out" / "train")
    with pytest.raises(DataError, match="no split of compiled examples"):
        ExampleStore.open(folder)
    with pytest.raises(DataError, match="max_new_tokens"):
        Prompts(ExampleStore.open(folder / "prompts" / "out" / "train"), 32, 31)


def mixture(folder: Path) -> tuple[dict[str, Any], MixtureOrder]:
    """Chats, and a corpus replayed: one row in four."""
    chat = rows_of(folder)
    text = open_rows(folder / "corpus" / "train", 256)
    assert isinstance(text, CorpusRows)
    sources = (Source("chat", chat.order(1)), Source("text", text.order(1)))
    return {"chat": chat, "text": text}, MixtureOrder(sources, (Phase(0, (("chat", 3), ("text", 1))),))


@pytest.mark.parametrize(("micro_batch_size", "ranks"), [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4)])
def test_the_global_batch_does_not_depend_on_its_cut(folder: Path, micro_batch_size: int, ranks: int) -> None:
    sources, order = mixture(folder)
    cursor = Cursor.start(order, "t").advance(5)
    found = {}
    for rank in range(ranks):
        loader = RowLoader(
            sources,
            seq_length=256,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for number, batch in enumerate(loader.micro_batches(cursor, 8)):
            for row in range(micro_batch_size):
                position = (number * ranks + rank) * micro_batch_size + row
                found[position] = {name: batch[name][row] for name in ("tokens", "labels", "loss_mask", "document_ids")}
    for position in range(8):
        sample = order.sample_id(5 + position)
        row = sources[sample.source].row(sample.index)
        assert found[position]["tokens"][: len(row.tokens)].tolist() == row.tokens.tolist()
        assert found[position]["loss_mask"][: len(row.weights)].tolist() == row.weights.tolist()
    with pytest.raises(ConfigError):
        loader.micro_batches(cursor, 0)


def test_a_replayed_corpus_is_read_as_pretraining_reads_it(folder: Path) -> None:
    corpus = Corpus.open(folder / "corpus" / "train")
    row = CorpusRows(corpus, 64).row(1)
    assert row.tokens.tolist() == corpus.sample(1, 64)[:-1].tolist()
    assert row.labels.tolist() == corpus.sample(1, 64)[1:].tolist()
    assert row.weights.min() == 1.0 and row.num_documents == 1
    cut = CorpusRows(corpus, 64, own_documents=True)
    rows = [cut.row(index) for index in range(cut.num_samples)]
    several = next(row for row in rows if row.num_documents > 1)
    assert several.positions[several.documents == 1][0] == 0
    assert several.tokens[several.documents == 0][-1] == corpus.eod_id


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_reads_every_row_once_in_order(folder: Path, ranks: int) -> None:
    rows = rows_of(folder)
    seen, slots = [], 0
    for rank in range(ranks):
        loader = ValidRowLoader(
            rows, seq_length=256, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=ranks
        )
        assert loader.num_samples(100, 4) == rows.num_samples
        for step in loader.steps(100, 4):
            for batch in step:
                slots += len(batch["tokens"])
                seen += [row.tolist() for row in batch["tokens"][batch["loss_mask"].sum(dim=1) > 0]]
    assert sorted(seen) == sorted(rows.batch([row])["tokens"][0].tolist() for row in range(rows.num_samples))
    assert slots % (2 * ranks) == 0


def test_prompts_are_dealt_by_position(folder: Path) -> None:
    prompts = Prompts(ExampleStore.open(folder / "prompts" / "out" / "train"), 256, 16)
    order = MixtureOrder.of_one("p", prompts.order(3))
    found = []
    for rank in range(2):
        loader = PromptLoader({"p": prompts}, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2)
        for batch in loader.micro_batches(Cursor.start(order, "t"), 8):
            found += batch
    assert [at for at, _ in sorted(found, key=lambda one: one[0])] == list(range(8))
    for at, prompt in found:
        assert prompt == prompts.prompt(order.sample_id(at).index)
    assert {prompt.fields["answer"] for prompt in prompts.prompts(range(24))} == set(range(24))


def test_a_curriculum_reads_every_part_once_and_then_all(folder: Path) -> None:
    parts = curriculum("chat", rows_of(folder), 3, sorted_by="score")
    assert list(parts) == ["chat-1", "chat-2", "chat-3"]
    order = curriculum_order(parts, seed=1)
    total = sum(rows.num_samples for rows in parts.values())
    read = [order.sample_id(position) for position in range(2 * total)]
    names = [sample.source for sample in read]
    assert names[:total] == [name for name, rows in parts.items() for _ in range(rows.num_samples)]
    assert len({(sample.source, sample.index) for sample in read[:total]}) == total
    assert set(names[total:]) == set(parts)
    assert Cursor.from_dict(Cursor.start(order, "t").advance(total).to_dict()).order == order
